//! From an operator's ban in one cell to `connect()` = EPERM in the kernel of a node of the other: 50 trials. A failed
//! round goes the same way from the same entry on; the demo measures that from the altered file.

use super::folder;
use crate::cell::Cell;
use crate::chaos::calls::{Calls, epoch_ms};
use crate::demo::figures::Figures;
use crate::demo::{Demo, PORT, Say, in_a_lab, wait};
use crate::lab::{Lab, LabError, make_folder, write_file};
use crate::topology::Spec;
use ambit_model::{Refusal, refusal::Code};
use std::net::SocketAddr;
use std::time::Duration;

const LAB: &str = "revoke";
pub(super) const TRIALS: usize = 50;
pub(super) const TARGET_MS: f64 = 500.0;
/// How often the caller calls: the figure's grain.
const EVERY: Duration = Duration::from_millis(2);
pub(super) const SETTLE_MAX: Duration = Duration::from_secs(40);
const DOCUMENTS: &str = "
kind: Policy
metadata: {name: web-to-db}
spec: {target: spiffe://west/db, action: allow, from: [spiffe://east/web], ports: [8080]}
";

/// Runs it in a lab of its own and prints the figures.
pub fn revoke() -> Result<(), LabError> {
    let say = Say::new();
    let spec = Spec::standard(LAB, 2, 1, 3)?;
    let mut ms = in_a_lab(&spec, &say, |lab| trials(lab, &say))?;
    ms.sort_by(f64::total_cmp);
    let at = |part: f64| ms.get(((ms.len() as f64 - 1.0) * part) as usize).copied().unwrap_or(f64::INFINITY);
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load: String = load.split(' ').take(3).collect::<Vec<_>>().join(" ");
    let met = at(1.0) <= TARGET_MS;
    println!("ban -> EPERM in the other cluster's kernel, {} trials, `ambit` started to first refusal (lab)", ms.len());
    println!("  median {:.0} ms, 90 % {:.0} ms", at(0.5), at(0.9));
    println!("  max {:.0} ms  target {TARGET_MS:.0} ms  {}", at(1.0), if met { "met" } else { "missed" });
    println!("load average {load}");
    let row = serde_json::json!([{
        "name": "ban to deny in the other cluster, max", "unit": "ms", "ours": at(1.0), "peer": null, "floor": null,
        "target": TARGET_MS, "met": met, "load_average": load, "trials": ms,
    }]);
    make_folder(&folder()?)?;
    write_file(&folder()?.join("revoke.json"), format!("{row:#}\n").as_bytes())?;
    println!("1 figures, {} met", usize::from(met));
    Ok(())
}

fn trials(lab: &Lab, say: &Say) -> Result<Vec<f64>, LabError> {
    let Stage { demo, calls, .. } = Stage::set(lab, say)?;
    let id = demo.lab.node_id("west-n1")?;
    say.chapter(&format!("{TRIALS} bans"));
    (0..TRIALS).map(|n| trial(lab, say, &calls, &id, &demo.west, n)).collect()
}

/// Two peered clusters of a node each: `web` of the one calls `db` of the other, all the time.
pub(super) struct Stage<'a> {
    pub(super) demo: Demo<'a>,
    pub(super) calls: Calls,
    pub(super) db: SocketAddr,
}

impl<'a> Stage<'a> {
    pub(super) fn set(lab: &Lab, say: &'a Say) -> Result<Stage<'a>, LabError> {
        let mut demo = Demo::with_cells(lab, say, Figures::default())?;
        demo.peer()?;
        for node in ["west-n1", "east-n1"] {
            lab.start_agent(node)?;
            lab.wait_enrolled(node, SETTLE_MAX)?;
        }
        for (site, node, name) in [("west", "west-n1", "db"), ("east", "east-n1", "web")] {
            let (id, selector) = (format!("spiffe://{site}/{name}"), format!("cgroup:{name}"));
            let whose = ["--spiffe-id", &id, "--cluster", site, "--selector", &selector];
            lab.ambit(site, &[&["entry", "create", "--id", name], &whose[..]].concat())?;
            lab.add_pod(node, name, crate::workload::UID)?;
        }
        demo.serve(&demo.pod("west-n1", "db")?, "page")?;
        demo.apply("west", "policies", DOCUMENTS)?;
        let db = SocketAddr::from((demo.pod("west-n1", "db")?.address, PORT));
        let calls = Calls::start(lab, "east-n1-web", db, EVERY)?;
        calls.flow(0.0, SETTLE_MAX, "calls that succeed")?;
        Ok(Stage { demo, calls, db })
    }
}

fn trial(lab: &Lab, say: &Say, calls: &Calls, id: &str, west: &Cell, n: usize) -> Result<f64, LabError> {
    let begun = epoch_ms();
    lab.ambit(&west.site, &["node", "ban", id])?;
    let refused = || calls.between(begun, f64::INFINITY).iter().find(|c| c.refused).map(|c| c.t_ms);
    wait(SETTLE_MAX, "a call refused in connect()", || Ok(refused().is_some()))?;
    let at = refused().ok_or_else(|| Refusal::new(Code::Internal, "a refused call", "none"))?;
    lab.ambit(&west.site, &["node", "unban", id])?;
    let back = calls.flow(epoch_ms(), SETTLE_MAX, "calls after the ban")?;
    say.step(&format!(
        "{:2}: refused after {:.0} ms; back {:.1} s after the unban",
        n + 1,
        at - begun,
        back.as_secs_f32()
    ));
    Ok(at - begun)
}
