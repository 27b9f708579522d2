//! Benchmarks of whole processes in a lab. Targets are printed met or missed; a missed one fails nothing.

mod dataplane;
mod deny;
mod failover;
mod inside;
mod revoke;
mod streams;

pub use dataplane::dataplane;
pub use deny::deny;
pub use failover::failover;
pub use revoke::revoke;
pub use streams::streams;

use crate::lab::{Lab, LabError, make_folder, write_file};
use crate::topology::Spec;
use ambit_model::{Refusal, refusal::Code};
use std::path::PathBuf;
use std::time::Duration;

/// Idle means: formed, enrolled, and then left alone for this long.
const IDLE: Duration = Duration::from_secs(15);
const LAB: &str = "bench";

struct Figure {
    name: String,
    mib: f64,
    target: f64,
}

/// Resident memory of idle replicas and an idle agent: issue A's "speed and size". No peer is measured beside them yet.
pub fn memory() -> Result<(), LabError> {
    let lab = Lab::up(&Spec::standard(LAB, 1, 1, 3)?, &|line| eprintln!("  {line}"))?;
    let measured = lab.form_all(&|line| eprintln!("  {line}")).and_then(|()| {
        std::thread::sleep(IDLE);
        weigh(&lab)
    });
    crate::down::down(LAB)?;
    let figures = measured?;
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load: String = load.split(' ').take(3).collect::<Vec<_>>().join(" ");
    let met = figures.iter().filter(|f| f.mib <= f.target).count();
    for f in &figures {
        let verdict = if f.mib <= f.target { "met" } else { "missed" };
        println!("{:28} {:6.1} MB  target {:3.0} MB  {verdict}", f.name, f.mib, f.target);
    }
    println!("load average {load}");
    let rows: Vec<_> = figures
        .iter()
        .map(|f| {
            serde_json::json!({
                "name": f.name, "unit": "MB", "ours": f.mib, "peer": null, "floor": null, "target": f.target,
                "met": f.mib <= f.target, "load_average": load,
            })
        })
        .collect();
    let folder = folder()?;
    make_folder(&folder)?;
    write_file(&folder.join("memory.json"), format!("{:#}\n", serde_json::json!(rows)).as_bytes())?;
    println!("{} figures, {met} met", figures.len());
    Ok(())
}

fn weigh(lab: &Lab) -> Result<Vec<Figure>, LabError> {
    let all = [("west-r1", 60.0), ("west-r2", 60.0), ("west-r3", 60.0), ("west-n1-agent", 25.0)];
    all.into_iter()
        .map(|(name, target)| {
            Ok(Figure { name: format!("{name}, resident idle"), mib: resident_mb(lab, name)?, target })
        })
        .collect()
}

/// Resident memory of a process of the lab, MB.
fn resident_mb(lab: &Lab, name: &str) -> Result<f64, LabError> {
    let pid = lab.state()?.process(name).map(|p| p.id.pid);
    let status = pid.and_then(|pid| std::fs::read_to_string(format!("/proc/{pid}/status")).ok());
    let kib = status.as_deref().and_then(|text| {
        text.lines().find_map(|l| l.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse::<f64>().ok())
    });
    let kib = kib.ok_or_else(|| Refusal::new(Code::Internal, format!("the process {name}"), "none"))?;
    Ok(kib * 1024.0 / 1e6)
}

/// `target/bench`, beside the folder of the profile that this binary was built in.
pub(crate) fn folder() -> Result<PathBuf, LabError> {
    let own = std::env::current_exe().ok();
    let target = own.as_deref().and_then(|p| p.parent()?.parent()).map(|t| t.join("bench"));
    target.ok_or_else(|| Refusal::new(Code::Internal, "a target folder", "none").into())
}
