//! The drill on real measurements: a node that is a machine of its own, with Secure Boot, a TPM driver and the kernel's
//! IMA, loses its standing when one measured file is altered, and gets it back after a clean boot. About two minutes, and
//! packages that nothing else needs: so it is no part of the tests.

mod guest;
mod image;

use crate::demo::{Demo, PORT, Say, figures::Figures, in_a_lab};
use crate::lab::{Lab, LabError, make_folder};
use crate::topology::Spec;
use ambit_model::{Refusal, refusal::Code};
use guest::Guest;
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
    drill.enrol()?;
    drill.start_workloads()?;
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

    fn enrol(&mut self) -> Result<(), LabError> {
        self.say.chapter("Enrolment: the guest's TPM by its kernel's driver, its own boot log and IMA log");
        let lab = self.demo.lab.clone();
        lab.start_agent("east-n1")?;
        let token = lab.ambit("west", &["node", "token", "--cluster", "west"])?;
        self.guest.start_agent(token.trim())?;
        let took = self.guest.wait_enrolled(ENROL_MAX)?;
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

    /// Whether the guest's pod reads the other cluster's page, and what it said.
    fn call(&mut self) -> Result<(bool, String), LabError> {
        let url = format!("http://{}:{PORT}/", self.demo.pod("east-n1", "db")?.address);
        let said = self.guest.run_in_pod(POD, UID, &format!("/sbin/curl -sS --max-time 5 {url}"))?;
        Ok((said.code == 0 && said.text.contains(PAGE), said.text))
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
