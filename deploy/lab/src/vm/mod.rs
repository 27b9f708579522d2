//! The drill on real measurements: a node that is a machine of its own, with Secure Boot, a TPM driver and the kernel's
//! IMA, loses its standing when one measured file is altered, and gets it back after a clean boot. About two minutes, and
//! packages that nothing else needs: so it is no part of the tests.

mod guest;
mod image;

use crate::demo::{Demo, PORT, Say, figures::Figures, in_a_lab, wait};
use crate::lab::{Lab, LabError, make_folder, write_file};
use crate::topology::Spec;
use ambit_model::{Refusal, refusal::Code};
use guest::Guest;
use image::MEASURED;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The node that is a guest.
const NODE: &str = "west-n1";
/// What the guest runs, and as whom.
const POD: &str = "web";
const UID: u32 = crate::workload::UID;
/// Under emulation, an enrolment takes some seconds of processor time.
const ENROL_MAX: Duration = Duration::from_secs(120);
const SETTLE_MAX: Duration = Duration::from_secs(60);
/// How often a cluster asks its nodes for a quote, unless told otherwise; and what a judgement may take beyond it.
const INTERVAL: Duration = Duration::from_secs(30);
const SLACK: Duration = Duration::from_secs(5);
/// What the other cluster serves.
const PAGE: &str = "east-page";
const DOCUMENTS: &str = "
kind: Policy
metadata: {name: web-to-db}
spec: {target: spiffe://east/db, action: allow, from: [spiffe://west/web], ports: [8080]}
";

/// What the user asked for.
pub struct Options<'a> {
    /// The lab's name.
    pub name: &'a str,
    /// Unpacked Debian packages: kernel, shim, grub, busybox.
    pub debian: &'a Path,
}

/// Runs it in a lab of its own, which is taken down after it.
pub fn run(options: &Options<'_>) -> Result<(), LabError> {
    let say = Say::new();
    say.title("Ambit: a node with Secure Boot, a TPM driver and IMA of its own");
    let spec = Spec::standard(options.name, 2, 1, 1)?;
    let figures = in_a_lab(&spec, &say, |lab| tell(lab, options, &say))?;
    say.table(&figures);
    Ok(())
}

fn tell(lab: &Lab, options: &Options<'_>, say: &Say) -> Result<Figures, LabError> {
    let mut drill = Drill::begin(lab, options, say)?;
    drill.learn()?;
    drill.enrol()?;
    drill.start_workloads()?;
    drill.alter()?;
    drill.repair()?;
    Ok(drill.demo.figures)
}

/// A lab whose node west-n1 is a guest.
struct Drill<'a> {
    demo: Demo<'a>,
    guest: Guest<'a>,
    say: &'a Say,
}

impl<'a> Drill<'a> {
    /// Cells and peers, while the guest boots: that takes longest.
    fn begin(lab: &'a Lab, options: &Options<'_>, say: &'a Say) -> Result<Drill<'a>, LabError> {
        let begun = Instant::now();
        let boot = || -> Result<(Guest<'a>, f64), LabError> {
            guest::make_room(lab, NODE)?;
            Ok((Guest::boot(lab, NODE, &image(lab, options)?)?, begun.elapsed().as_secs_f64()))
        };
        let (cells, booted) = std::thread::scope(|scope| {
            let booted = scope.spawn(boot);
            let cells = Demo::with_cells(lab, say, Figures::default()).and_then(|mut demo| demo.peer().map(|()| demo));
            (cells, booted.join())
        });
        let panicked = |_| Refusal::new(Code::Internal, "a guest", "the thread that boots it panicked");
        let ((guest, seconds), mut demo) = (booted.map_err(panicked)??, cells?);
        say.chapter("The guest: OVMF with Secure Boot, shim, grub, Debian's kernel");
        demo.figures.put("image built and guest booted", seconds, "s", None);
        let mut drill = Drill { demo, guest, say };
        drill.show_boot()?;
        Ok(drill)
    }

    fn show_boot(&mut self) -> Result<(), LabError> {
        let told = self.guest.must(
            "uname -r; cat /proc/cmdline; dmesg | grep -i 'secure boot enabled' | head -n 1; \
             wc -l < /sys/kernel/security/ima/ascii_runtime_measurements",
        )?;
        self.say.quote(&told);
        // A file there has no length before it is read.
        let bytes = self.guest.must("wc -c < /sys/kernel/security/tpm0/binary_bios_measurements")?;
        require(bytes.trim() != "0", "a boot log in the guest", "an empty one")?;
        self.say.good(&format!(
            "the kernel passes on {} bytes of the firmware's event log, and measures by IMA",
            bytes.trim()
        ));
        Ok(())
    }

    /// A policy that accepts this machine as it is now: its boot, and every file of its image.
    fn learn(&mut self) -> Result<(), LabError> {
        self.say.chapter("An appraisal policy, learnt from the guest as it booted");
        self.guest.measure_image()?;
        let folder = self.demo.lab.folder("operator").join("evidence");
        self.guest.evidence(&folder)?;
        let folder = folder.display().to_string();
        let how = ["--from", &folder, "--name", "guest", "--cluster", "west", "--class", "lab"];
        let yaml = self.demo.lab.ambit("west", &[&["attest", "policy", "learn"], &how[..]].concat())?;
        let file = self.demo.lab.folder("operator").join("guest.yaml");
        write_file(&file, yaml.as_bytes())?;
        let told = self.demo.lab.ambit("west", &["attest", "policy", "apply", "-f", &file.display().to_string()])?;
        self.say.quote(&told);
        let entries = self.guest.must("wc -l < /sys/kernel/security/ima/ascii_runtime_measurements")?;
        self.say
            .good(&format!("it lists Secure Boot's keys, images, command line and {} measured files", entries.trim()));
        Ok(())
    }

    fn enrol(&mut self) -> Result<(), LabError> {
        self.say.chapter("Enrolment: the guest's TPM by its kernel's driver, its own boot log and IMA log");
        let lab = self.demo.lab.clone();
        lab.start_agent("east-n1")?;
        let took = self.start_agent()?;
        self.demo.figures.put("guest enrolled", took.as_secs_f64(), "s", None);
        lab.wait_enrolled("east-n1", ENROL_MAX)?;
        self.say.good(&format!("{NODE} enrolled {:.1} s after its agent was started", took.as_secs_f32()));
        self.say.quote(&lab.ambit("west", &["node", "list"])?);
        Ok(())
    }

    fn start_workloads(&mut self) -> Result<(), LabError> {
        self.say.chapter("A call from the guest into the other cluster");
        let lab = self.demo.lab.clone();
        for (site, name) in [("west", POD), ("east", "db")] {
            let (id, selector) = (format!("spiffe://{site}/{name}"), format!("cgroup:{name}"));
            let whose = ["--spiffe-id", &id, "--cluster", site, "--selector", &selector];
            lab.ambit(site, &[&["entry", "create", "--id", name], &whose[..]].concat())?;
        }
        let db = lab.add_pod("east-n1", "db", UID)?;
        self.demo.serve(&db, PAGE)?;
        self.demo.apply("east", "policies", DOCUMENTS)?;
        self.guest.add_pod(POD, UID)?;
        let took = self.wait_call(true)?;
        self.say.good(&format!("{NODE}'s {POD} reads east's db, {:.1} s after its pod was made", took.as_secs_f32()));
        Ok(())
    }

    fn start_agent(&mut self) -> Result<Duration, LabError> {
        let token = self.demo.lab.ambit("west", &["node", "token", "--cluster", "west"])?;
        self.guest.start_agent(token.trim())?;
        self.guest.wait_enrolled(ENROL_MAX)
    }

    fn alter(&mut self) -> Result<(), LabError> {
        self.say.chapter("One measured file altered while the node runs");
        self.guest.alter_measured_file()?;
        let begun = Instant::now();
        self.say.step(&format!("a line was added to {MEASURED} in {NODE}, and it was run"));
        let node = self.node_id()?;
        let lab = self.demo.lab.clone();
        let standing = || lab.ambit("west", &["-o", "json", "node", "list"]);
        wait(INTERVAL + SLACK, "the node untrusted", || Ok(standing()?.contains("\"untrusted\"")))?;
        let seconds = begun.elapsed().as_secs_f64();
        self.demo.figures.put("file altered -> node untrusted", seconds, "s", Some(INTERVAL.as_secs_f64()));
        self.say.good(&format!("untrusted {seconds:.1} s after it; a round comes every {} s", INTERVAL.as_secs()));
        self.wait_call(false)?;
        let seconds = begun.elapsed().as_secs_f64();
        self.demo.figures.put("file altered -> its call into the other cluster fails", seconds, "s", None);
        self.say.good(&format!("{NODE}'s {POD} no longer reaches east's db, {seconds:.1} s after it"));
        let told = lab.ambit("west", &["node", "explain", &node])?;
        self.say.quote(&told);
        require(told.contains(MEASURED), &format!("`ambit node explain` names {MEASURED}"), &told)
    }

    /// The file is what it was after a boot from the same disk. The IMA log of a machine that ran an altered file keeps
    /// that until then, whatever is written over the file.
    fn repair(&mut self) -> Result<(), LabError> {
        self.say.chapter("Repair: a clean boot from the same disk, and the operator's release");
        let node = self.node_id()?;
        let lab = self.demo.lab.clone();
        let begun = Instant::now();
        self.guest.reboot()?;
        self.say.good(&format!("{NODE} booted again, {:.1} s", begun.elapsed().as_secs_f32()));
        lab.ambit("west", &["node", "release", &node])?;
        let took = self.start_agent()?;
        self.say.good(&format!("released, and enrolled {:.1} s after its agent was started", took.as_secs_f32()));
        self.say.quote(&lab.ambit("west", &["node", "list"])?);
        self.guest.add_pod(POD, UID)?;
        self.wait_call(true)?;
        let seconds = begun.elapsed().as_secs_f64();
        self.demo.figures.put("switched off -> service restored", seconds, "s", None);
        self.say.good(&format!("{NODE}'s {POD} reads east's db again"));
        Ok(())
    }

    /// The guest's node id: the only node of its cell.
    fn node_id(&self) -> Result<String, LabError> {
        let told = self.demo.lab.ambit("west", &["-o", "json", "node", "list"])?;
        let list: serde_json::Value = serde_json::from_str(&told).unwrap_or_default();
        let id = list.pointer("/0/id").or_else(|| list.pointer("/id")).and_then(|id| id.as_str());
        id.map(str::to_owned).ok_or_else(|| Refusal::new(Code::NotFound, "the guest in its cell's list", told).into())
    }

    /// Whether the guest's pod reads the other cluster's page, and what it said.
    fn call(&mut self) -> Result<(bool, String), LabError> {
        let url = format!("http://{}:{PORT}/", self.demo.pod("east-n1", "db")?.address);
        let said = self.guest.run_in_pod(POD, UID, &format!("/sbin/curl -sS --max-time 5 {url}"))?;
        let text = said.text();
        Ok((said.code == 0 && text.contains(PAGE), text))
    }

    fn wait_call(&mut self, succeeds: bool) -> Result<Duration, LabError> {
        let begun = Instant::now();
        loop {
            let (read, said) = self.call()?;
            if read == succeeds {
                return Ok(begun.elapsed());
            }
            if begun.elapsed() > SETTLE_MAX {
                let expected = format!("calls into the other cluster to {}", if succeeds { "succeed" } else { "fail" });
                let found = format!("{said}; the agent's log ends:\n{}", self.guest.agent_log()?);
                return Err(Refusal::new(Code::Unavailable, expected, found).into());
            }
        }
    }
}

fn image(lab: &Lab, options: &Options<'_>) -> Result<PathBuf, LabError> {
    let folder = lab.folder("image");
    make_folder(&folder)?;
    image::build(lab.name(), options.debian, &folder)
}

fn require(holds: bool, what: &str, found: &str) -> Result<(), LabError> {
    if holds { Ok(()) } else { Err(Refusal::new(Code::Internal, what.to_owned(), found.to_owned()).into()) }
}
