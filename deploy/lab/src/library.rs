//! The drills of `deploy/drills`, and how a lab runs them all: one stage, one drill after the other, every report verified.

use crate::demo::{Demo, PORT, Say, in_a_lab, wait};
use crate::lab::{Lab, LabError, make_folder, write_file};
use crate::preflight::own_binary;
use crate::topology::Spec;
use ambit::drill::spec::Drill;
use ambit_model::{Refusal, refusal::Code};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A drill ends by its own abort conditions before this.
const DRILL_MAX: Duration = Duration::from_secs(300);
/// The replica whose disk a drill fills, and its size: room for all that drills write before.
const SMALL_DISK: (&str, u64) = ("west-r3", 96);

/// The workload outside of the drills' scope; the second pod of its node, which is what the drills' files call.
const OUTSIDE: &str = "outside";
const SETTLE_MAX: Duration = Duration::from_secs(20);

macro_rules! drills {
    ($($name:literal),* $(,)?) => {
        /// Name and file of each.
        pub const DRILLS: &[(&str, &str)] = &[$(($name, include_str!(concat!("../../drills/", $name, ".yaml")))),*];
    };
}

drills![
    "leader-loss",
    "leader-pause",
    "replica-loss",
    "replica-cut",
    "one-way",
    "disk-full",
    "agent-loss",
    "agent-pause",
    "node-loss",
    "node-cut",
    "partition",
    "banned-node",
    "altered-file",
    "bad-policy",
    "cluster-loss",
];

/// The file of a drill.
///
/// # Errors
/// There is none of this name.
pub fn drill(name: &str) -> Result<&'static str, Refusal> {
    let known = || DRILLS.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    let found = DRILLS.iter().find(|(n, _)| *n == name).map(|(_, text)| *text);
    found.ok_or_else(|| Refusal::new(Code::NotFound, format!("one of the drills {}", known()), name))
}

/// A drill that was run, and whose report verified.
pub struct Ran {
    /// What it printed.
    pub told: String,
    /// Whether every objective was met.
    pub passed: bool,
    /// Its sealed report.
    pub report: PathBuf,
    /// The first line of what verifying it said.
    pub verdict: String,
}

impl Lab {
    /// Runs a drill against this lab and verifies its report offline, as sealed by each cell that its file names.
    ///
    /// # Errors
    /// The drill did not run: its guard refused, or its report does not verify.
    pub fn drill(&self, name: &str, text: &str) -> Result<Ran, LabError> {
        let folder = self.folder("operator");
        let (file, report) = (folder.join(format!("{name}.yaml")), folder.join(format!("{name}.report.json")));
        write_file(&file, text.as_bytes())?;
        let program = own_binary("ambit")?.display().to_string();
        let (file, out) = (file.display().to_string(), report.display().to_string());
        let argv = [program.as_str(), "drill", "run", &file, "--lab", self.name(), "--report", &out];
        let output = self.run_in(&self.operator(), &argv, DRILL_MAX)?;
        let told = String::from_utf8_lossy(&output.stdout).into_owned();
        if !report.exists() {
            let errors = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(LabError::Command { command: argv.join(" "), output: format!("{} {errors}", output.status) });
        }
        let mut verify: Vec<String> = [&program, "drill", "report", "verify", &out].map(ToString::to_string).into();
        for site in &text.parse::<Drill>()?.seal_at {
            verify.extend(["--fingerprint".to_owned(), self.cell(site.as_str())?.fingerprint]);
        }
        let verify: Vec<&str> = verify.iter().map(String::as_str).collect();
        let verdict = self.must_run_in(&self.operator(), &verify, DRILL_MAX)?;
        let verdict = verdict.trim().lines().next().unwrap_or_default().to_owned();
        Ok(Ran { told, passed: output.status.success(), report, verdict })
    }
}

/// Runs these drills, or all, on one stage in a lab of its own, and keeps their reports in a folder, as files and as pages. The
/// last line of the output counts them.
///
/// # Errors
/// The stage could not be set, a drill did not run, or one missed an objective.
pub fn run(name: &str, only: &[String], reports: Option<&Path>) -> Result<(), LabError> {
    let chosen: Vec<(&str, &str)> = match only {
        [] => DRILLS.to_vec(),
        only => only.iter().map(|n| drill(n).map(|text| (n.as_str(), text))).collect::<Result<_, _>>()?,
    };
    let say = Say::new();
    say.title("The drill library");
    let spec = Spec::standard(name, 2, 2, 3)?;
    let (mut passed, mut rows) = (0, Vec::new());
    in_a_lab(&spec, &say, |lab| {
        let _demo = stage(lab, &say)?;
        for (name, text) in &chosen {
            say.chapter(&format!("Drill: {name}"));
            let begun = Instant::now();
            let ran = lab.drill(name, text)?;
            passed += u32::from(ran.passed);
            say.quote(&ran.told);
            say.good(&format!("report verified offline: {}", ran.verdict));
            let word = if ran.passed { "passed" } else { "missed" };
            if let Some(folder) = reports {
                keep(lab, &ran.report, folder, name)?;
            }
            rows.push(format!("{name:<14} {word}  {:>5.1} s", begun.elapsed().as_secs_f64()));
        }
        Ok(())
    })?;
    rows.iter().for_each(|row| println!("{row}"));
    println!("load average {}", std::fs::read_to_string("/proc/loadavg").unwrap_or_default().trim());
    println!("{} drills, {passed} passed", chosen.len());
    if passed as usize == chosen.len() {
        return Ok(());
    }
    Err(Refusal::new(Code::Internal, "drills that meet every objective", format!("{passed} of {}", chosen.len()))
        .into())
}

/// What the drills' files speak of: two peered cells with nodes and workloads, in a lab that is up.
pub(crate) fn stage<'a>(lab: &Lab, say: &'a Say) -> Result<Demo<'a>, LabError> {
    lab.make_small_disk(SMALL_DISK.0, SMALL_DISK.1)?;
    let mut demo = Demo::with_cells(lab, say, Default::default())?;
    demo.peer()?;
    demo.enrol_nodes()?;
    demo.start_workloads()?;
    outside(&demo)?;
    Ok(demo)
}

/// A workload in east that nobody's fault or fail-over touches: what lies outside of the drills' scope.
fn outside(demo: &Demo<'_>) -> Result<(), LabError> {
    let (id, selector) = (format!("spiffe://east/{OUTSIDE}"), format!("cgroup:{OUTSIDE}"));
    let entry = ["entry", "create", "--id", OUTSIDE, "--spiffe-id", &id, "--cluster", "east", "--selector", &selector];
    demo.lab.ambit("east", &entry)?;
    let pod = demo.lab.add_pod("east-n2", OUTSIDE, crate::workload::UID)?;
    demo.serve(&pod, OUTSIDE)?;
    let policy = format!(
        "kind: Policy\nmetadata: {{name: {OUTSIDE}}}\nspec: {{target: {id}, action: allow, from: [spiffe://east/web]}}\n"
    );
    demo.apply("east", OUTSIDE, &policy)?;
    let (web, url) = (demo.pod("east-n1", "web")?, format!("http://{}:{PORT}/", pod.address));
    wait(SETTLE_MAX, "a call outside of the scope", || Ok(demo.call(&web, &url)?.0 == 0)).map(drop)
}

fn keep(lab: &Lab, report: &Path, folder: &Path, name: &str) -> Result<(), LabError> {
    make_folder(folder)?;
    let kept = folder.join(format!("{name}.json"));
    std::fs::copy(report, &kept).map_err(|source| LabError::Io { path: kept.clone(), source })?;
    let (program, kept) = (own_binary("ambit")?.display().to_string(), kept.display().to_string());
    lab.must_run_in(&lab.operator(), &[&program, "drill", "report", "html", &kept], DRILL_MAX).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_file_of_the_library_is_run() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../drills");
        let names = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        let files: BTreeSet<String> = names.filter_map(|n| n.strip_suffix(".yaml").map(str::to_owned)).collect();
        let known: BTreeSet<String> = DRILLS.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert_eq!(files, known);
        for (name, text) in DRILLS {
            let drill: Drill = text.parse().unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(drill.name.as_str(), *name);
        }
    }
}
