//! From an operator's denial of an identity to the end of its live connection and the first refusal of a new one, in the other
//! cluster: 50 trials, the callee's identity and the caller's in turn.

use super::folder;
use super::revoke::{SETTLE_MAX, Stage, TARGET_MS, TRIALS};
use crate::chaos::calls::epoch_ms;
use crate::demo::{Say, in_a_lab, wait};
use crate::lab::{Lab, LabError, make_folder, write_file};
use crate::preflight::own_binary;
use crate::topology::Spec;
use ambit_model::{Refusal, refusal::Code};
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

const LAB: &str = "deny";
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
    let spec = Spec::standard(LAB, 2, 1, 3)?;
    let trials = in_a_lab(&spec, &say, |lab| trials(lab, &say))?;
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load: String = load.split(' ').take(3).collect::<Vec<_>>().join(" ");
    println!("denial of an identity, {} trials, from `ambit` started (lab)", trials.len());
    let (mut rows, mut met_all) = (Vec::new(), 0);
    type Figure = fn(&Trial) -> f64;
    let figures: [(&str, Figure); 2] =
        [("new connections refused", |t| t.refused), ("the live connection ended", |t| t.cut)];
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

fn trials(lab: &Lab, say: &Say) -> Result<Vec<Trial>, LabError> {
    let stage = Stage::set(lab, say)?;
    say.chapter(&format!("{TRIALS} denials"));
    (0..TRIALS).map(|n| trial(lab, say, &stage, n)).collect()
}

fn trial(lab: &Lab, say: &Say, stage: &Stage<'_>, n: usize) -> Result<Trial, LabError> {
    let (site, id) = if n.is_multiple_of(2) { ("west", "spiffe://west/db") } else { ("east", "spiffe://east/web") };
    let held = Held::open(lab, stage.db)?;
    let begun = epoch_ms();
    lab.ambit(site, &["deny", "id", id])?;
    let first = || stage.calls.between(begun, f64::INFINITY).iter().find(|c| c.refused).map(|c| c.t_ms);
    wait(SETTLE_MAX, "a call refused in connect()", || Ok(first().is_some()))?;
    let refused = first().ok_or_else(|| Refusal::new(Code::Internal, "a refused call", "none"))?;
    let cut = held.ended()?;
    lab.ambit(site, &["deny", "lift", id])?;
    let back = stage.calls.flow(epoch_ms(), SETTLE_MAX, "calls after the denial")?;
    let trial = Trial { refused: refused - begun, cut: cut - begun };
    say.step(&format!(
        "{:2}: {id} refused after {:.0} ms, its connection ended after {:.0} ms; back {:.1} s after the end of it",
        n + 1,
        trial.refused,
        trial.cut,
        back.as_secs_f32()
    ));
    Ok(trial)
}

/// A connection of the caller's pod that is open and idle.
struct Held {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Held {
    fn open(lab: &Lab, to: SocketAddr) -> Result<Held, LabError> {
        let program = own_binary("ambit-lab")?;
        let (address, port) = (to.ip().to_string(), to.port().to_string());
        let mut child = Command::new(&program)
            .args(["exec", "--lab", lab.name(), "east-n1-web", "--", "python3", "-c", HOLD, &address, &port])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|source| LabError::Io { path: program, source })?;
        let (tell, lines) = mpsc::sync_channel(4);
        if let Some(out) = child.stdout.take() {
            // It ends with the pipe, which ends with the child.
            std::thread::spawn(move || {
                for line in BufReader::new(out).lines().map_while(Result::ok) {
                    let _ = tell.send(line);
                }
            });
        }
        let held = Held { child, lines };
        held.line("an open connection", Duration::from_secs(10))?;
        Ok(held)
    }

    /// When it ended, milliseconds since the Unix epoch.
    fn ended(&self) -> Result<f64, LabError> {
        let line = self.line("the end of the connection", SETTLE_MAX)?;
        line.parse().map_err(|_| Refusal::new(Code::Internal, "a time", line).into())
    }

    fn line(&self, what: &str, limit: Duration) -> Result<String, LabError> {
        self.lines
            .recv_timeout(limit)
            .map_err(|_| Refusal::new(Code::Unavailable, format!("{what} within {} s", limit.as_secs()), "none").into())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Ours, by its handle; already ended is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
