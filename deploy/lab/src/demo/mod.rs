//! The demonstration: the main job from nothing to a failed-over cluster, in front of the user, with every figure kept.

mod enforce;
mod enrol;
mod figures;
mod rehearse;
mod say;

use crate::cell::Cell;
use crate::lab::{Lab, LabError};
use crate::topology::Spec;
use figures::Figures;
use say::Say;
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
    say.chapter("The lab: network, one TPM a machine, real boot logs");
    let lab = Lab::up(&spec, &|line| say.step(line))?;
    let told = tell(&lab, &say, begun);
    let ended = match (&told, options.keep) {
        (_, true) => {
            say.explore(&lab);
            Ok(())
        }
        (_, false) => crate::down::down(options.name).map(|removed| say.step(&format!("lab taken down: {removed}"))),
    };
    let figures = told?;
    ended?;
    say.table(&figures);
    if let Some(path) = options.json {
        crate::lab::write_file(path, figures.json().as_bytes())?;
        say.step(&format!("figures written to {}", path.display()));
    }
    say.next(options.keep);
    Ok(())
}

fn tell(lab: &Lab, say: &Say, begun: Instant) -> Result<Figures, LabError> {
    let mut figures = Figures::default();
    figures.put("lab ready", begun.elapsed().as_secs_f64(), "s", None);
    say.chapter("Two cells, three replicas each");
    let west = enrol::form(lab, say, "west", &mut figures)?;
    let east = enrol::form(lab, say, "east", &mut figures)?;
    let mut demo = Demo { lab: lab.clone(), west, east, say, figures };
    demo.peer()?;
    demo.enrol_nodes()?;
    demo.refuse_altered_boot()?;
    demo.start_workloads()?;
    demo.check_svids()?;
    demo.allow_and_deny()?;
    demo.change_policy()?;
    demo.drill("leader-loss")?;
    demo.drill("cluster-loss")?;
    demo.weigh()?;
    let seconds = begun.elapsed().as_secs_f64();
    demo.figures.put("whole demo", seconds, "s", Some(240.0));
    Ok(demo.figures)
}
