//! From an operator's denial of an identity to the end of its live connections and the first refusal of a new one, on every
//! node of both clusters that calls: 50 trials, the callee's identity and a caller's in turn. Of each trial the last node counts.

use super::folder;
use super::inside::Inside;
use super::revoke::{SETTLE_MAX, Stage, TARGET_MS, TRIALS};
use crate::chaos::calls::{Calls, epoch_ms};
use crate::demo::{Say, in_a_lab, wait};
use crate::lab::{Lab, LabError, make_folder, write_file};
use crate::topology::Spec;
use ambit_model::{Refusal, refusal::Code};
use std::net::SocketAddr;
use std::time::Duration;

const LAB: &str = "deny";
/// Nodes of each of the two clusters. One of them serves.
const NODES: u8 = 3;
/// How often each of the callers beside the first calls: the figure's grain.
const EVERY: Duration = Duration::from_millis(10);
const DOCUMENTS: &str = "
kind: Policy
metadata: {name: app-to-db}
spec: {target: spiffe://west/db, action: allow, from: [spiffe://west/app], ports: [8080]}
";
/// Connects, says so, and says when the connection ended.
const HOLD: &str = "
import socket, sys, time
s = socket.create_connection((sys.argv[1], int(sys.argv[2])))
print('open', flush=True)
try:
    s.recv(1)
except OSError:
    pass
print(time.time() * 1000, flush=True)
";

/// One trial's figures, milliseconds from when `ambit` was started.
struct Trial {
    refused: f64,
    cut: f64,
}

/// Runs it in a lab of its own and prints the figures.
pub fn deny() -> Result<(), LabError> {
    let say = Say::new();
    let spec = Spec::standard(LAB, 2, NODES, 3)?;
    let trials = in_a_lab(&spec, &say, |lab| trials(lab, &say))?;
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load: String = load.split(' ').take(3).collect::<Vec<_>>().join(" ");
    println!("denial of an identity, {} trials, from `ambit` started to the last of all nodes (lab)", trials.len());
    let (mut rows, mut met_all) = (Vec::new(), 0);
    type Figure = fn(&Trial) -> f64;
    let figures: [(&str, Figure); 2] =
        [("new connections refused", |t| t.refused), ("live connections ended", |t| t.cut)];
    for (name, figure) in figures {
        let mut ms: Vec<f64> = trials.iter().map(figure).collect();
        ms.sort_by(f64::total_cmp);
        let at = |part: f64| ms.get(((ms.len() as f64 - 1.0) * part) as usize).copied().unwrap_or(f64::INFINITY);
        let met = at(1.0) <= TARGET_MS;
        met_all += usize::from(met);
        println!(
            "  {name:28} median {:.0} ms, 90 % {:.0} ms, max {:.0} ms  target {TARGET_MS:.0} ms  {}",
            at(0.5),
            at(0.9),
            at(1.0),
            if met { "met" } else { "missed" }
        );
        rows.push(serde_json::json!({
            "name": format!("denial of an identity: {name}, max"), "unit": "ms", "ours": at(1.0), "peer": null,
            "floor": null, "target": TARGET_MS, "met": met, "load_average": load, "trials": ms,
        }));
    }
    println!("load average {load}");
    make_folder(&folder()?)?;
    write_file(&folder()?.join("deny.json"), format!("{:#}\n", serde_json::json!(rows)).as_bytes())?;
    println!("{} figures, {met_all} met", rows.len());
    Ok(())
}

/// A pod that calls `db` all the time.
struct Caller {
    pod: String,
    id: &'static str,
    calls: Calls,
}

fn trials(lab: &Lab, say: &Say) -> Result<Vec<Trial>, LabError> {
    let stage = Stage::set(lab, say)?;
    let db = stage.db;
    stage.demo.apply("west", "app", DOCUMENTS)?;
    let whose = ["--spiffe-id", "spiffe://west/app", "--cluster", "west", "--selector", "cgroup:app"];
    lab.ambit("west", &[&["entry", "create", "--id", "app"], &whose[..]].concat())?;
    let mut callers = vec![Caller { pod: "east-n1-web".into(), id: "spiffe://east/web", calls: stage.calls }];
    for n in 2..=NODES {
        for (site, name, id) in [("west", "app", "spiffe://west/app"), ("east", "web", "spiffe://east/web")] {
            let node = format!("{site}-n{n}");
            lab.start_agent(&node)?;
            lab.wait_enrolled(&node, SETTLE_MAX)?;
            lab.add_pod(&node, name, crate::workload::UID)?;
            let pod = format!("{node}-{name}");
            let calls = Calls::start(lab, &pod, db, EVERY)?;
            calls.flow(0.0, SETTLE_MAX, "calls that succeed")?;
            callers.push(Caller { pod, id, calls });
        }
    }
    say.chapter(&format!("{TRIALS} denials, {} nodes that call", callers.len()));
    (0..TRIALS).map(|n| trial(lab, say, &callers, db, n)).collect()
}

fn trial(lab: &Lab, say: &Say, callers: &[Caller], db: SocketAddr, n: usize) -> Result<Trial, LabError> {
    let (site, id) = if n.is_multiple_of(2) { ("west", "spiffe://west/db") } else { ("east", "spiffe://east/web") };
    let hit: Vec<&Caller> = callers.iter().filter(|caller| site == "west" || caller.id == id).collect();
    let held = hit.iter().map(|caller| held(lab, &caller.pod, db)).collect::<Result<Vec<_>, _>>()?;
    let begun = epoch_ms();
    lab.ambit(site, &["deny", "id", id])?;
    let (mut refused, mut cut) = (0.0_f64, 0.0_f64);
    for caller in &hit {
        let first = || caller.calls.between(begun, f64::INFINITY).iter().find(|c| c.refused).map(|c| c.t_ms);
        wait(SETTLE_MAX, "a call refused in connect()", || Ok(first().is_some()))?;
        refused = refused.max(first().unwrap_or(f64::INFINITY) - begun);
    }
    for held in &held {
        cut = cut.max(ended(held)? - begun);
    }
    lab.ambit(site, &["deny", "lift", id])?;
    let lifted = epoch_ms();
    for caller in &hit {
        caller.calls.flow(lifted, SETTLE_MAX, "calls after the denial")?;
    }
    let nodes = hit.len();
    say.step(&format!(
        "{:2}: {id} refused on {nodes} nodes after {refused:.0} ms, {nodes} connections ended after {cut:.0} ms",
        n + 1
    ));
    Ok(Trial { refused, cut })
}

/// A connection of a pod that is open and idle.
fn held(lab: &Lab, pod: &str, to: SocketAddr) -> Result<Inside, LabError> {
    let (address, port) = (to.ip().to_string(), to.port().to_string());
    let held = Inside::start(lab, pod, &["python3", "-c", HOLD, &address, &port])?;
    held.line("an open connection", Duration::from_secs(10))?;
    Ok(held)
}

/// When a held connection ended, milliseconds since the Unix epoch.
fn ended(held: &Inside) -> Result<f64, LabError> {
    let line = held.line("the end of the connection", SETTLE_MAX)?;
    line.parse().map_err(|_| Refusal::new(Code::Internal, "a time", line).into())
}
