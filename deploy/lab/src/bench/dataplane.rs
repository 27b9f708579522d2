//! What carrying traffic costs: two pods of two nodes on one link, in turn without anything in between, through two bare
//! relays, and through our agents. CPU per unit is the figure: wall-clock time on two shared cores says little.
//!
//! What is compared has the same legs. Beside each pod is a bare one, connected as it is and known to no agent: the direct way
//! is between two of them, on two nodes or on one, and relays take up and hand over inside them as agents do inside pods.
//! Our tunnels are warm, as they are a second after a pair of workloads first spoke: no handshake is in any figure.

use super::{folder, resident_mb};
use crate::demo::{Say, in_a_lab, wait};
use crate::lab::{Lab, LabError, Place, make_folder, write_file};
use crate::load::{ECHO_PORT, Kind, SINK_PORT, Seen};
use crate::preflight::own_binary;
use crate::state::{Pod, Ready};
use crate::topology::Spec;
use ambit_model::{Refusal, refusal::Code};
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::process::{Child, Stdio};
use std::time::Duration;

const LAB: &str = "dataplane";
/// Each measures every row in every way, one after another.
const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_millis(1500);
const COMMAND_MAX: Duration = Duration::from_secs(40);
const SETTLE_MAX: Duration = Duration::from_secs(40);
const IDLE_FLOWS: usize = 1000;
/// Opened and closed before.
const WARM_FLOWS: usize = 100;
/// After the last connection, before agents are weighed.
const REST: Duration = Duration::from_secs(5);
/// Where a relay listens for what the other ports serve.
const RELAY_OFFSET: u16 = 100;
const POLICIES: &str = "
kind: Policy
metadata: {name: to-far}
spec: {target: spiffe://west/far, action: allow, from: [spiffe://west/near], ports: [7001, 7002]}
---
kind: Policy
metadata: {name: to-same}
spec: {target: spiffe://west/same, action: allow, from: [spiffe://west/near], ports: [7001, 7002]}
";

/// Who carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    Direct,
    Relay,
    Ours,
}

const WAYS: [Way; 3] = [Way::Direct, Way::Relay, Way::Ours];

/// What is loaded, with how many clients.
struct Row {
    name: &'static str,
    kind: Kind,
    clients: usize,
}

const ROWS: [Row; 4] = [
    Row { name: "bulk, 1 stream", kind: Kind::Bulk, clients: 1 },
    Row { name: "bulk, 4 streams", kind: Kind::Bulk, clients: 4 },
    Row { name: "echo 64 B, 16 connections", kind: Kind::Echo, clients: 16 },
    Row { name: "connect + echo + close, 8 clients, warm", kind: Kind::Connect, clients: 8 },
];

/// One run of one row in one way.
#[derive(Clone, Debug)]
struct Run {
    row: usize,
    way: Way,
    seen: Seen,
    /// CPU seconds of whoever carries, both ends.
    carriers_s: f64,
    /// CPU seconds of the whole machine: the kernel's work for others hides from processes.
    machine_s: f64,
}

/// A figure with a target.
struct Figure {
    name: String,
    unit: &'static str,
    ours: f64,
    floor: Option<f64>,
    direct: Option<f64>,
    target: f64,
    /// Whether less is better.
    low: bool,
}

impl Figure {
    fn met(&self) -> bool {
        if self.low { self.ours <= self.target } else { self.ours >= self.target }
    }
}

/// All that was measured.
struct Measured {
    runs: Vec<Run>,
    /// Echoes a second between two pods of one node, and between two bare ones.
    same_node: [Vec<f64>; 2],
    rss_idle: [f64; 2],
    rss_used: [f64; 2],
    rss_flows: [f64; 2],
}

/// Runs it in a lab of its own and prints the figures.
pub fn dataplane() -> Result<(), LabError> {
    let say = Say::new();
    let spec = Spec::standard(LAB, 1, 2, 1)?;
    let measured = in_a_lab(&spec, &say, |lab| measure(lab, &say))?;
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load: String = load.split(' ').take(3).collect::<Vec<_>>().join(" ");
    table(&measured.runs);
    let figures = figures(&measured);
    let mut rows = Vec::new();
    for f in &figures {
        let other = |name: &str, value: Option<f64>| value.map_or(String::new(), |v| format!("  {name} {v:.2}"));
        println!(
            "{:49} {:9.2} {:6} target {} {:.2}  {}{}{}",
            f.name,
            f.ours,
            f.unit,
            if f.low { "<=" } else { ">=" },
            f.target,
            if f.met() { "met" } else { "missed" },
            other("bare relays", f.floor),
            other("direct", f.direct)
        );
        rows.push(serde_json::json!({
            "name": f.name, "unit": f.unit, "ours": f.ours, "peer": null, "floor": f.floor, "direct": f.direct,
            "target": f.target, "met": f.met(), "load_average": load,
        }));
    }
    println!("medians of {ROUNDS} rounds of {} ms, in turn; load average {load}", ROUND.as_millis());
    make_folder(&folder()?)?;
    write_file(&folder()?.join("dataplane.json"), format!("{:#}\n", serde_json::json!(rows)).as_bytes())?;
    println!("{} figures, {} met", figures.len(), figures.iter().filter(|f| f.met()).count());
    Ok(())
}

/// Who is where.
struct Stage<'a> {
    lab: &'a Lab,
    program: String,
    near: Pod,
    far: Pod,
    same: Pod,
    /// Their like without the mesh.
    bare: Bare,
    /// The second node's own address, where the far relay is.
    node: Ipv4Addr,
}

struct Bare {
    near: Place,
    far: Ipv4Addr,
    same: Ipv4Addr,
}

fn measure(lab: &Lab, say: &Say) -> Result<Measured, LabError> {
    lab.form_all(&|line| say.step(line))?;
    let stage = Stage::set(lab)?;
    stage.settle()?;
    let agents = ["west-n1-agent", "west-n2-agent"];
    let weigh = || Ok::<_, LabError>([resident_mb(lab, agents[0])?, resident_mb(lab, agents[1])?]);
    std::thread::sleep(REST);
    let rss_idle = weigh()?;
    // What first use costs once is not the connections' weight.
    stage.idle_flows(WARM_FLOWS, &weigh)?;
    std::thread::sleep(REST);
    let rss_used = weigh()?;
    let rss_flows = stage.idle_flows(IDLE_FLOWS, &weigh)?;
    say.chapter("Load, in turn");
    let (mut runs, mut same_node) = (Vec::new(), [const { Vec::new() }; 2]);
    for round in 0..ROUNDS {
        for (row, Row { name, .. }) in ROWS.iter().enumerate() {
            for way in WAYS {
                let run = stage.run(row, way)?;
                say.step(&format!("{} {name}, {way:?}: {}", round + 1, tell(&run)));
                runs.push(run);
            }
        }
        let ways = [(&stage.near.place(), stage.same.address), (&stage.bare.near, stage.bare.same)];
        for (figures, (place, address)) in same_node.iter_mut().zip(ways) {
            let seen = stage.load(place, Kind::Echo, SocketAddrV4::new(address, ECHO_PORT), 16)?;
            figures.push(seen.units as f64 / seen.seconds);
        }
    }
    Ok(Measured { runs, same_node, rss_idle, rss_used, rss_flows })
}

impl<'a> Stage<'a> {
    fn set(lab: &'a Lab) -> Result<Stage<'a>, LabError> {
        let program = own_binary("ambit-lab")?.display().to_string();
        let node = |name: &str| {
            let member = lab.spec().member(name).map(|m| m.address());
            member.ok_or_else(|| LabError::from(Refusal::new(Code::NotFound, "a node", name.to_owned())))
        };
        for name in ["near", "far", "same"] {
            let (id, selector) = (format!("spiffe://west/{name}"), format!("cgroup:{name}"));
            let whose = ["--spiffe-id", &id, "--cluster", "west", "--selector", &selector];
            lab.ambit("west", &[&["entry", "create", "--id", name], &whose[..]].concat())?;
        }
        let pod = |node: &str, name: &str| lab.add_pod(node, name, crate::workload::UID);
        let (near, same, far) = (pod("west-n1", "near")?, pod("west-n1", "same")?, pod("west-n2", "far")?);
        let (bare_near, _) = lab.add_bare("west-n1", "barenear", 0)?;
        let (bare_same, same_at) = lab.add_bare("west-n1", "baresame", 1)?;
        let (bare_far, far_at) = lab.add_bare("west-n2", "barefar", 0)?;
        let bare = Bare { near: bare_near.clone(), far: far_at, same: same_at };
        let stage = Stage { lab, program, near, far, same, bare, node: node("west-n2")? };
        for (name, place) in [
            ("far", &as_root(&stage.far)),
            ("same", &as_root(&stage.same)),
            ("bare-far", &bare_far),
            ("bare-same", &bare_same),
        ] {
            stage.serve(name, place)?;
        }
        let (here, there) = (lab.place("west-n1")?, lab.place("west-n2")?);
        stage.relay("near", &bare_near, (Ipv4Addr::LOCALHOST, RELAY_OFFSET), &here, (stage.node, RELAY_OFFSET))?;
        stage.relay("far", &there, (stage.node, RELAY_OFFSET), &bare_far, (far_at, 0))?;
        for place in [as_root(&stage.near), as_root(&stage.far), bare_near, bare_far, here, there] {
            // Thousands of connections a second between two addresses, each remembered for a minute after its end.
            let wide = ["sysctl", "-qw", "net.ipv4.ip_local_port_range=10240 65000", "net.ipv4.tcp_tw_reuse=1"];
            lab.must_run_in(&place, &wide, COMMAND_MAX)?;
        }
        let policies = lab.folder("operator").join("dataplane.yaml");
        write_file(&policies, POLICIES.as_bytes())?;
        lab.ambit("west", &["policy", "apply", "-f", &policies.display().to_string()])?;
        Ok(stage)
    }

    fn serve(&self, name: &str, place: &Place) -> Result<(), LabError> {
        let argv = [self.program.as_str(), "load-server"];
        let launch = self.lab.launch(place, &argv, &self.lab.folder("operator").join(format!("load-{name}.log")));
        let ready = Ready::Listening(SocketAddr::from((Ipv4Addr::UNSPECIFIED, ECHO_PORT)));
        self.lab.start(&format!("load-{name}"), None, launch, ready).map(drop)
    }

    /// From a place into another: each an address, and what is added to the ports there.
    fn relay(
        &self,
        name: &str,
        place: &Place,
        (at, plus): (Ipv4Addr, u16),
        into: &Place,
        (to, to_plus): (Ipv4Addr, u16),
    ) -> Result<(), LabError> {
        let pair = |port: u16| format!("{at}:{}>{to}:{}", port + plus, port + to_plus);
        let (echo, sink) = (pair(ECHO_PORT), pair(SINK_PORT));
        let argv = [self.program.as_str(), "bare-relay", &into.netns, &echo, &sink];
        let log = self.lab.folder("operator").join(format!("relay-{name}.log"));
        let launch = self.lab.launch(place, &argv, &log);
        let ready = Ready::Listening(SocketAddr::from((at, ECHO_PORT + plus)));
        self.lab.start(&format!("relay-{name}"), None, launch, ready).map(drop)
    }

    /// Until the mesh lets the first connection through.
    fn settle(&self) -> Result<(), LabError> {
        for pod in [&self.far, &self.same] {
            let to = SocketAddrV4::new(pod.address, ECHO_PORT);
            let argv = self.argv(Kind::Connect, to, 1, Duration::from_millis(1));
            let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
            let place = as_root(&self.near);
            let passes = || Ok(self.lab.run_in(&place, &argv, COMMAND_MAX)?.status.success());
            wait(SETTLE_MAX, "a first connection through the mesh", passes)?;
        }
        Ok(())
    }

    fn argv(&self, kind: Kind, to: SocketAddrV4, clients: usize, time: Duration) -> Vec<String> {
        use clap::ValueEnum;
        let kind = kind.to_possible_value().map(|v| v.get_name().to_owned()).unwrap_or_default();
        let words = ["load".to_owned(), kind, to.to_string(), clients.to_string(), time.as_millis().to_string()];
        [self.program.clone()].into_iter().chain(words).collect()
    }

    fn load(&self, place: &Place, kind: Kind, to: SocketAddrV4, clients: usize) -> Result<Seen, LabError> {
        let argv = self.argv(kind, to, clients, ROUND);
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        let place = Place { uid: None, ..place.clone() };
        let told = self.lab.must_run_in(&place, &argv, COMMAND_MAX)?;
        serde_json::from_str(&told).map_err(|e| Refusal::new(Code::Internal, "figures", format!("{e}: {told}")).into())
    }

    fn run(&self, row: usize, way: Way) -> Result<Run, LabError> {
        let Row { kind, clients, .. } = ROWS.get(row).unwrap_or(&ROWS[0]);
        let port = if *kind == Kind::Bulk { SINK_PORT } else { ECHO_PORT };
        let bare = self.bare.near.clone();
        let (place, to, carriers): (_, _, &[&str]) = match way {
            Way::Direct => (bare, SocketAddrV4::new(self.bare.far, port), &[]),
            Way::Relay => {
                (bare, SocketAddrV4::new(Ipv4Addr::LOCALHOST, port + RELAY_OFFSET), &["relay-near", "relay-far"])
            }
            Way::Ours => {
                let to = SocketAddrV4::new(self.far.address, port);
                (self.near.place(), to, &["west-n1-agent", "west-n2-agent"])
            }
        };
        let (machine, before) = (machine_s()?, self.cpu_s(carriers)?);
        let seen = self.load(&place, *kind, to, *clients)?;
        let (carriers_s, machine_s) = (self.cpu_s(carriers)? - before, machine_s()? - machine);
        Ok(Run { row, way, seen, carriers_s, machine_s })
    }

    fn cpu_s(&self, names: &[&str]) -> Result<f64, LabError> {
        let state = self.lab.state()?;
        let mut all = 0.0;
        for name in names {
            let pid = state.process(name).map(|p| p.id.pid);
            let stat = pid.and_then(|pid| std::fs::read_to_string(format!("/proc/{pid}/stat")).ok());
            let ticks = stat.as_deref().and_then(|text| {
                // After the name, which may hold anything: the 12th and 13th are user and system time (proc(5)).
                let fields: Vec<&str> = text.get(text.rfind(')')? + 1..)?.split_ascii_whitespace().collect();
                Some(fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?)
            });
            all += ticks.ok_or_else(|| Refusal::new(Code::Internal, format!("CPU time of {name}"), "none"))?;
        }
        Ok(all / tick()?)
    }

    /// Both agents' memory with many connections open, and nothing on them.
    fn idle_flows(&self, count: usize, weigh: &dyn Fn() -> Result<[f64; 2], LabError>) -> Result<[f64; 2], LabError> {
        let argv = self.argv(Kind::Idle, SocketAddrV4::new(self.far.address, ECHO_PORT), count, ROUND);
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        let launch = self.lab.launch(&as_root(&self.near), &argv, std::path::Path::new("/dev/null"));
        let mut command = crate::process::command(self.lab.name(), &launch)?;
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let child = child.map_err(|source| LabError::Io { path: (&self.program).into(), source })?;
        let mut flows = Flows(child);
        let mut line = String::new();
        if let Some(out) = flows.0.stdout.take() {
            let read = BufReader::new(out).read_line(&mut line);
            read.map_err(|source| LabError::Io { path: (&self.program).into(), source })?;
        }
        if line.trim() != "open" {
            return Err(Refusal::new(Code::Unavailable, format!("{count} connections open"), line).into());
        }
        std::thread::sleep(REST);
        weigh()
    }
}

/// The client that holds the connections.
struct Flows(Child);

impl Drop for Flows {
    fn drop(&mut self) {
        // Ours, by its handle; already ended is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The program may lie where the pod's user cannot read.
fn as_root(pod: &Pod) -> Place {
    Place { uid: None, ..pod.place() }
}

fn tick() -> Result<f64, LabError> {
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten();
    Ok(ticks.ok_or_else(|| Refusal::new(Code::Internal, "the length of a clock tick", "none"))? as f64)
}

/// All that the machine did since it began, seconds of CPU.
fn machine_s() -> Result<f64, LabError> {
    let path = std::path::PathBuf::from("/proc/stat");
    let text = std::fs::read_to_string(&path).map_err(|source| LabError::Io { path, source })?;
    let fields = text.lines().next().unwrap_or_default().split_ascii_whitespace().skip(1);
    // user, nice, system, (idle, iowait,) irq, softirq (proc(5)).
    let busy = fields.take(7).enumerate().filter(|(n, _)| ![3, 4].contains(n));
    Ok(busy.filter_map(|(_, ticks)| ticks.parse::<f64>().ok()).sum::<f64>() / tick()?)
}

/// The speed, and the CPU time of carriers and of the machine by unit: Gb/s and seconds per GB for bulk, units a second and
/// microseconds each for all else.
fn rates(run: &Run) -> (f64, f64, f64) {
    let units = (run.seen.units as f64).max(1.0);
    match ROWS.get(run.row).map(|row| row.kind) {
        Some(Kind::Bulk) => {
            (units * 8e-9 / run.seen.seconds, run.carriers_s / units * 1e9, run.machine_s / units * 1e9)
        }
        _ => (units / run.seen.seconds, run.carriers_s / units * 1e6, run.machine_s / units * 1e6),
    }
}

fn tell(run: &Run) -> String {
    let (rate, carriers, machine) = rates(run);
    match ROWS.get(run.row).map(|row| row.kind) {
        Some(Kind::Bulk) => format!("{rate:.2} Gb/s, {carriers:.2} CPU-s/GB of carriers, {machine:.2} of the machine"),
        _ => format!(
            "{rate:.0}/s, {carriers:.1} us of carriers, {machine:.1} us of the machine, p50 {:.0} us, p99 {:.0} us",
            run.seen.p50_us, run.seen.p99_us
        ),
    }
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all.get(all.len() / 2).copied().unwrap_or(f64::NAN)
}

fn of(runs: &[Run], row: usize, way: Way, figure: impl Fn(&Run) -> f64) -> Vec<f64> {
    runs.iter().filter(|run| run.row == row && run.way == way).map(figure).collect()
}

fn table(runs: &[Run]) {
    println!(
        "{:39} {:7} {:>17} {:>15} {:>9} {:>15}",
        "", "", "median (best)", "carriers' CPU", "machine's", "p50 / p99 us"
    );
    for (row, Row { name, kind, .. }) in ROWS.iter().enumerate() {
        for way in WAYS {
            let middle = |figure: fn(&Run) -> f64| median(of(runs, row, way, figure));
            let best = of(runs, row, way, |r| rates(r).0).into_iter().fold(0.0, f64::max);
            let least = of(runs, row, way, |r| rates(r).1).into_iter().fold(f64::INFINITY, f64::min);
            let (rate, carriers, machine) = (middle(|r| rates(r).0), middle(|r| rates(r).1), middle(|r| rates(r).2));
            let way = format!("{way:?}").to_lowercase();
            if *kind == Kind::Bulk {
                println!(
                    "{name:39} {way:7} {rate:5.2} ({best:5.2}) Gb/s {carriers:5.2} ({least:.2}) s/GB {machine:5.2} s/GB"
                );
            } else {
                let (p50, p99) = (middle(|r| r.seen.p50_us), middle(|r| r.seen.p99_us));
                println!(
                    "{name:39} {way:7} {rate:6.0} ({best:6.0})/s {carriers:6.1} ({least:.1}) us {machine:6.1} us {p50:6.0} / {p99:.0}"
                );
            }
        }
    }
}

fn figures(m: &Measured) -> Vec<Figure> {
    type Of = fn(&Run) -> f64;
    let (rate, cpu): (Of, Of) = (|r| rates(r).0, |r| rates(r).1);
    let (p50, p99): (Of, Of) = (|r| r.seen.p50_us, |r| r.seen.p99_us);
    let rows: [(&str, &str, usize, Of, f64, bool); 9] = [
        ("bulk, CPU of both agents, 1 stream", "s/GB", 0, cpu, 1.4, true),
        ("bulk, CPU of both agents, 4 streams", "s/GB", 1, cpu, 1.4, true),
        ("bulk, 1 stream", "Gb/s", 0, rate, 6.0, false),
        ("bulk, 4 streams", "Gb/s", 1, rate, 6.5, false),
        ("echo, CPU of both agents a request", "us", 2, cpu, 45.0, true),
        ("echo, p50", "us", 2, p50, 600.0, true),
        ("echo, p99", "us", 2, p99, 1300.0, true),
        ("connect + echo + close, warm, CPU of both agents", "us", 3, cpu, 170.0, true),
        ("connect + echo + close, warm, rate", "/s", 3, rate, 4500.0, false),
    ];
    let mut all: Vec<Figure> = rows
        .into_iter()
        .map(|(name, unit, row, figure, target, low)| {
            let middle = |way| median(of(&m.runs, row, way, figure));
            Figure {
                name: name.to_owned(),
                unit,
                ours: middle(Way::Ours),
                floor: Some(middle(Way::Relay)),
                // Nobody carries there.
                direct: (!name.contains("CPU")).then(|| middle(Way::Direct)),
                target,
                low,
            }
        })
        .collect();
    let grown = (0..2).map(|n| m.rss_flows[n] - m.rss_used[n]).fold(f64::NEG_INFINITY, f64::max);
    let [ours, bare] = m.same_node.clone().map(median);
    let mut put = |name: String, unit, ours, target, low| {
        all.push(Figure { name, unit, ours, floor: None, direct: None, target, low });
    };
    put(format!("{IDLE_FLOWS} idle connections, growth of an agent"), "MB", grown, 5.0, true);
    put("an idle agent, resident".into(), "MB", m.rss_idle[0].max(m.rss_idle[1]), 16.0, true);
    put("same node, 16 connections, of two bare pods".into(), "%", ours / bare * 100.0, 85.0, false);
    all
}
