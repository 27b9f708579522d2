//! The demonstration: the main job from nothing to a failed-over cluster, in front of the user, with every figure kept.

mod attest;
mod enforce;
mod enrol;
pub(crate) mod figures;
mod rehearse;
mod say;

use crate::cell::Cell;
use crate::guardian::Guardian;
use crate::lab::{Lab, LabError};
use crate::topology::Spec;
pub(crate) use enforce::{PORT, SECRET};
pub(crate) use enrol::wait;
use figures::Figures;
pub(crate) use say::Say;
use std::path::Path;
use std::time::Instant;

/// The third node of west is the one whose boot log is altered.
const WEST_NODES: u8 = 3;

/// What the user asked for.
pub struct Options<'a> {
    /// The lab's name.
    pub name: &'a str,
    /// Where every figure goes as JSON.
    pub json: Option<&'a Path>,
    /// Leave the lab up.
    pub keep: bool,
    /// Where the logs go, of a demo that failed too.
    pub logs: Option<&'a Path>,
}

/// The pieces that every chapter needs.
pub(crate) struct Demo<'a> {
    pub(crate) lab: Lab,
    pub(crate) west: Cell,
    pub(crate) east: Cell,
    pub(crate) say: &'a Say,
    pub(crate) figures: Figures,
}

/// Runs it. The lab is taken down at the end, also after a failure, unless it is to be kept.
pub fn run(options: &Options<'_>) -> Result<(), LabError> {
    let begun = Instant::now();
    let say = Say::new();
    say.title("Ambit: two attested clusters on this machine");
    let mut spec = Spec::standard(options.name, 2, 2, 3)?;
    if let Some(west) = spec.sites.first_mut() {
        west.nodes = WEST_NODES;
    }
    let tell = |lab: &Lab| {
        let told = tell(lab, &say, begun);
        let copied = options.logs.map_or(Ok(()), |folder| lab.copy_logs(folder));
        told.and_then(|figures| copied.map(|()| figures))
    };
    let figures = if options.keep {
        let lab = bring_up(&spec, &say)?;
        let told = tell(&lab);
        say.explore(&lab);
        told?
    } else {
        in_a_lab(&spec, &say, tell)?
    };
    say.table(&figures);
    if let Some(path) = options.json {
        crate::lab::write_file(path, figures.json().as_bytes())?;
        say.step(&format!("figures written to {}", path.display()));
    }
    say.next(options.keep);
    Ok(())
}

/// Does `work` in a lab of its own, which is taken down after it, also if it fails or this process is killed.
pub(crate) fn in_a_lab<T>(
    spec: &Spec,
    say: &Say,
    work: impl FnOnce(&Lab) -> Result<T, LabError>,
) -> Result<T, LabError> {
    let _guardian = Guardian::post(&spec.name)?;
    let lab = bring_up(spec, say)?;
    let done = work(&lab);
    let ended = crate::down::down(&spec.name).map(|removed| say.step(&format!("lab taken down: {removed}")));
    let done = done?;
    ended.map(|()| done)
}

fn bring_up(spec: &Spec, say: &Say) -> Result<Lab, LabError> {
    say.chapter("The lab: network, one TPM a machine, real boot logs");
    Lab::up(spec, &|line| say.step(line))
}

fn tell(lab: &Lab, say: &Say, begun: Instant) -> Result<Figures, LabError> {
    let mut figures = Figures::default();
    figures.put("lab ready", begun.elapsed().as_secs_f64(), "s", None);
    let mut demo = Demo::with_cells(lab, say, figures)?;
    demo.peer()?;
    demo.enrol_nodes()?;
    demo.refuse_altered_boot()?;
    demo.start_workloads()?;
    demo.check_svids()?;
    demo.allow_and_deny()?;
    demo.change_policy()?;
    demo.alter_a_file()?;
    demo.plan_on_what_was_seen()?;
    demo.drill("leader-loss")?;
    demo.drill("cluster-loss")?;
    demo.weigh()?;
    let seconds = begun.elapsed().as_secs_f64();
    demo.figures.put("whole demo", seconds, "s", Some(240.0));
    Ok(demo.figures)
}

impl<'a> Demo<'a> {
    /// The cells formed in a lab that is up; all else is to be done.
    pub(crate) fn with_cells(lab: &Lab, say: &'a Say, mut figures: Figures) -> Result<Demo<'a>, LabError> {
        let replicas = lab.spec().sites.first().map_or(0, |site| site.replicas);
        say.chapter(&format!("Two cells, replicas in each: {replicas}"));
        let west = enrol::form(lab, say, "west", &mut figures)?;
        let east = enrol::form(lab, say, "east", &mut figures)?;
        Ok(Demo { lab: lab.clone(), west, east, say, figures })
    }
}
