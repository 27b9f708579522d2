//! A thousand streams of the Workload API at one agent: what they weigh, and how long a change takes to reach all of them.

use super::inside::Inside;
use super::{folder, resident_mb};
use crate::chaos::calls::epoch_ms;
use crate::demo::{Say, in_a_lab};
use crate::lab::{Lab, LabError, make_folder, write_file};
use crate::preflight::own_binary;
use crate::topology::Spec;
use ambit_model::{Refusal, refusal::Code};
use std::fmt::Write as _;
use std::time::Duration;

const LAB: &str = "streams";
const NODE: &str = "west-n1";
/// Of one user are at most 256.
const PODS: u32 = 4;
const STREAMS_PER_POD: usize = 250;
const FIRST_UID: u32 = 3_000;
const TRIALS: usize = 20;
const WAIT_MAX: Duration = Duration::from_secs(60);
/// After the last change, before it is weighed.
const IDLE: Duration = Duration::from_secs(10);
const MB_MAX: f64 = 64.0;
const MS_MAX: f64 = 200.0;

/// Runs it in a lab of its own and prints the figures.
pub fn streams() -> Result<(), LabError> {
    let say = Say::new();
    let spec = Spec::standard(LAB, 1, 1, 3)?;
    let (before, after, mut ms, mut spread) = in_a_lab(&spec, &say, |lab| measure(lab, &say))?;
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load: String = load.split(' ').take(3).collect::<Vec<_>>().join(" ");
    ms.sort_by(f64::total_cmp);
    spread.sort_by(f64::total_cmp);
    let median = |all: &[f64]| all.get(all.len() / 2).copied().unwrap_or(f64::INFINITY);
    let worst = |all: &[f64]| all.last().copied().unwrap_or(f64::INFINITY);
    let verdict = |met| if met { "met" } else { "missed" };
    let (light, quick) = (after <= MB_MAX, worst(&ms) <= MS_MAX);
    let streams = PODS as usize * STREAMS_PER_POD;
    println!("{streams} streams of the Workload API at one agent, {TRIALS} changes of their entries (lab)");
    println!("  resident memory           {after:6.1} MB  target {MB_MAX:.0} MB  {}", verdict(light));
    println!("    without a stream        {before:6.1} MB");
    println!(
        "  `ambit entry update` begun to the last stream told  median {:.0} ms, max {:.0} ms  target {MS_MAX:.0} ms  {}",
        median(&ms),
        worst(&ms),
        verdict(quick)
    );
    println!("    the first stream told to the last  median {:.0} ms, max {:.0} ms", median(&spread), worst(&spread));
    println!("load average {load}");
    let row = |name: &str, unit, ours: f64, target: f64| {
        serde_json::json!({
            "name": name, "unit": unit, "ours": ours, "peer": null, "floor": null, "target": target,
            "met": ours <= target, "load_average": load,
        })
    };
    let rows = [
        row("an agent with 1,000 streams, resident", "MB", after, MB_MAX),
        row("a change told to 1,000 streams, max", "ms", worst(&ms), MS_MAX),
    ];
    make_folder(&folder()?)?;
    write_file(&folder()?.join("streams.json"), format!("{:#}\n", serde_json::json!(rows)).as_bytes())?;
    println!("{} figures, {} met", rows.len(), usize::from(light) + usize::from(quick));
    Ok(())
}

/// Memory without and with the streams, and of each change how long it took to the last one, from its beginning and from
/// the first one.
fn measure(lab: &Lab, say: &Say) -> Result<(f64, f64, Vec<f64>, Vec<f64>), LabError> {
    lab.form_all(&|line| say.step(line))?;
    let file = lab.folder(NODE).join("entries.yaml");
    let write = |hint: &str| write_file(&file, entries(hint).as_bytes());
    let path = file.display().to_string();
    write("begun")?;
    lab.ambit("west", &["entry", "create", "-f", &path])?;
    for n in 0..PODS {
        lab.add_pod(NODE, &format!("many{n}"), FIRST_UID + n)?;
    }
    std::thread::sleep(IDLE);
    let before = resident_mb(lab, "west-n1-agent")?;
    say.chapter("Streams");
    let pods: Vec<Pod> = (0..PODS).map(|n| Pod::open(lab, &format!("{NODE}-many{n}"))).collect::<Result<_, _>>()?;
    for pod in &pods {
        pod.heard("begun")?;
    }
    let (mut ms, mut spread) = (Vec::new(), Vec::new());
    for trial in 0..TRIALS {
        let hint = format!("change-{trial}");
        write(&hint)?;
        let begun = epoch_ms();
        lab.ambit("west", &["entry", "update", "-f", &path])?;
        let heard: Vec<(f64, f64)> = pods.iter().map(|pod| pod.heard(&hint)).collect::<Result<_, _>>()?;
        let first = heard.iter().map(|(first, _)| *first).fold(f64::INFINITY, f64::min);
        let last = heard.iter().map(|(_, last)| *last).fold(0.0, f64::max);
        say.step(&format!(
            "{:2}: told to all after {:.0} ms, {:.0} ms after the first",
            trial + 1,
            last - begun,
            last - first
        ));
        ms.push(last - begun);
        spread.push(last - first);
    }
    std::thread::sleep(IDLE);
    Ok((before, resident_mb(lab, "west-n1-agent")?, ms, spread))
}

fn entries(hint: &str) -> String {
    let mut text = String::new();
    for n in 0..PODS {
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "---\nkind: Entry\nmetadata: {{name: many{n}}}\nspec:\n  spiffeId: spiffe://west/many{n}\n  cluster: west\n  \
             selectors: [\"cgroup:many{n}\"]\n  hint: {hint}\n"
        );
    }
    text
}

/// The streams of one pod.
struct Pod(Inside);

impl Pod {
    fn open(lab: &Lab, place: &str) -> Result<Pod, LabError> {
        let (program, socket) = (own_binary("ambit-lab")?, lab.workload_socket(NODE));
        let (program, socket) = (program.display().to_string(), socket.display().to_string());
        let argv = [program.as_str(), "streams-inside", &socket, &STREAMS_PER_POD.to_string()];
        Ok(Pod(Inside::start(lab, place, &argv)?))
    }

    /// When the first and the last of its streams heard of this hint.
    fn heard(&self, hint: &str) -> Result<(f64, f64), LabError> {
        let line = self.0.line(&format!("all streams to hear of {hint}"), WAIT_MAX)?;
        let words: Vec<&str> = line.split(' ').collect();
        match words.as_slice() {
            [of, first, last] if *of == hint => match (first.parse(), last.parse()) {
                (Ok(first), Ok(last)) => Ok((first, last)),
                _ => Err(Refusal::new(Code::Internal, "two times", line).into()),
            },
            _ => Err(Refusal::new(Code::Internal, format!("word of {hint}"), line).into()),
        }
    }
}
