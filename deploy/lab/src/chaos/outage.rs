//! Cells that their nodes cannot reach: what is enforced stays as it is, refusals go on being counted, and what was decided
//! meanwhile is in force soon after.

use super::calls::{Calls, epoch_ms};
use super::{EVERY, HEAL_MAX, check};
use crate::cell::metrics;
use crate::demo::{Demo, PORT, Say, figures::Figures, in_a_lab, wait};
use crate::fault::Fault;
use crate::lab::{Lab, LabError};
use crate::topology::{Kind, Member, Spec};
use ambit_model::{Refusal, refusal::Code};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// A lease beyond the outage: what a run that failed leaves behind ends by itself.
const LEASE_MORE: Duration = Duration::from_secs(120);
/// An agent that hears nothing says so after two heartbeats of eight seconds.
const SILENCE_MAX: Duration = Duration::from_secs(40);
/// How often a word is given while nothing happens.
const WORD: Duration = Duration::from_secs(60);
const FREEZE: &str = "
kind: Policy
metadata: {name: freeze-db}
spec: {target: spiffe://west/db, action: deny, from: [spiffe://east/web]}
";

/// Runs it in a lab of its own.
pub fn run(name: &str, outage: Duration) -> Result<(), LabError> {
    let say = Say::new();
    say.title(&format!("Outage: no node hears its cell for {} s", outage.as_secs()));
    let spec = Spec::standard(name, 2, 2, 3)?;
    let line = in_a_lab(&spec, &say, |lab| {
        let mut demo = Demo::with_cells(lab, &say, Figures::default())?;
        demo.peer()?;
        demo.enrol_nodes()?;
        demo.start_workloads()?;
        outage_of(&demo, outage)
    })?;
    println!("{line}");
    Ok(())
}

fn outage_of(demo: &Demo<'_>, outage: Duration) -> Result<String, LabError> {
    let (lab, say) = (&demo.lab, demo.say);
    say.chapter("Calls that are allowed, and calls that are not");
    let db = SocketAddr::from((demo.pod("west-n1", "db")?.address, PORT));
    let allowed = Calls::start(lab, "east-n1-web", db, EVERY)?;
    let denied = [Calls::start(lab, "east-n1-other", db, EVERY)?, Calls::start(lab, "west-n2", db, EVERY)?];
    allowed.flow(0.0, HEAL_MAX, "allowed calls before the outage")?;

    say.chapter("No node is heard");
    let cuts = cuts(lab);
    // First what was counted before, last what is since: no call of the outage is missed.
    let counted = refusals(lab, "east-n1")?;
    let (began, begun_ms) = (Instant::now(), epoch_ms());
    cuts.iter().try_for_each(|cut| lab.inject(Fault::Cut, cut, outage + LEASE_MORE))?;
    wait(SILENCE_MAX, "agents that say so", || Ok(heard(lab)?.iter().all(|heard| !heard)))?;
    say.good(&format!("every agent says that its cell is not heard, {:.0} s after", began.elapsed().as_secs_f64()));
    // Decided while nobody can be told.
    demo.apply("west", "freeze", FREEZE)?;
    while began.elapsed() < outage {
        std::thread::sleep(WORD.min(outage.saturating_sub(began.elapsed())));
        say.step(&so_far(&allowed, &denied, begun_ms));
    }
    let healed_ms = epoch_ms();
    let recorded = refusals(lab, "east-n1")? - counted;
    let during = allowed.between(begun_ms, healed_ms);
    let passed = during.iter().filter(|call| call.ok).count();
    let refused = denied[0].between(begun_ms, healed_ms).len();

    say.chapter("The cells are heard again");
    for cut in &cuts {
        lab.restore(cut)?;
    }
    let first = || allowed.between(healed_ms, f64::INFINITY).into_iter().find(|call| call.refused);
    wait(HEAL_MAX, "what was decided meanwhile, in the kernel", || Ok(first().is_some()))?;
    let told = first().map_or(f64::INFINITY, |call| (call.t_ms - healed_ms) / 1000.0);
    wait(HEAL_MAX, "agents that hear their cell", || Ok(heard(lab)?.iter().all(|heard| *heard)))?;
    let all_heard = (epoch_ms() - healed_ms) / 1000.0;
    lab.ambit("west", &["policy", "delete", "freeze-db"])?;
    allowed.flow(epoch_ms(), HEAL_MAX, "allowed calls after the outage")?;

    let leaked: usize = denied.iter().map(|calls| calls.counts().1).sum();
    say.good(&so_far(&allowed, &denied, begun_ms));
    let line = format!(
        "{} s without a cell: {passed} of {} allowed calls passed, {leaked} denied calls passed, {recorded} refusals of \
         {refused} denied calls counted by the kernel; a denial of meanwhile in force {told:.1} s after, all nodes heard \
         {all_heard:.1} s after",
        outage.as_secs(),
        during.len(),
    );
    check(passed == during.len() && !during.is_empty(), "every allowed call passes", || line.clone())?;
    check(leaked == 0, "no denied call passes", || line.clone())?;
    check(recorded >= refused as f64 && refused > 0, "every refusal recorded", || line.clone())?;
    Ok(line)
}

fn so_far(allowed: &Calls, denied: &[Calls; 2], from_ms: f64) -> String {
    let during = allowed.between(from_ms, f64::INFINITY);
    let good = during.iter().filter(|call| call.ok).count();
    let passed: usize = denied.iter().map(|calls| calls.counts().1).sum();
    format!("{good} of {} allowed calls answered, {passed} denied calls passed", during.len())
}

/// From every replica to every node of its site: what nodes say arrives, and no answer comes.
fn cuts(lab: &Lab) -> Vec<String> {
    let members = lab.spec().members();
    let is = |member: &&Member, node: bool| matches!(member.kind, Kind::Node(_)) == node;
    let pairs = members.iter().filter(|m| is(m, false)).flat_map(|replica| {
        let nodes = members.iter().filter(move |m| is(m, true) && m.site == replica.site);
        nodes.map(move |node| format!("{}>{}", replica.role(), node.role()))
    });
    pairs.collect()
}

/// Whether each agent says that it hears its cell.
fn heard(lab: &Lab) -> Result<Vec<bool>, LabError> {
    let members = lab.spec().members();
    let nodes = members.iter().filter(|m| matches!(m.kind, Kind::Node(_)));
    let one = |node: &Member| {
        let (_, text) = lab.page(&node.role(), metrics(node), "/state")?;
        let said: serde_json::Value = serde_json::from_str(&text)
            .map_err(|e| Refusal::new(Code::Internal, "the agent's state", format!("{e}: {text}")))?;
        Ok(said["cell"] == "connected")
    };
    nodes.map(one).collect()
}

/// Refusals that a node's kernel counted.
fn refusals(lab: &Lab, node: &str) -> Result<f64, LabError> {
    let member = lab.spec().member(node).ok_or_else(|| Refusal::new(Code::Internal, "a node", node))?;
    let (_, page) = lab.page(node, metrics(&member), "/metrics")?;
    let counts = page.lines().filter(|line| line.starts_with("ambit_kernel_decisions_total{result=\"deny\""));
    Ok(counts.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
}
