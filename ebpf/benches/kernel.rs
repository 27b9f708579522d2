//! What a decision costs in the kernel, alone and in the call that it delays, beside the same call without any program.
//! `cargo xtask bench kernel`; last line: N figures, M met. Needs root.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a benchmark fails by panicking")]
#![allow(clippy::print_stdout, reason = "its table is what it is for")]

#[allow(dead_code, reason = "the kernel tests use the rest")]
#[path = "../tests/kernel/support.rs"]
mod support;

use ambit_ebpf::{Action, Capacity, DECIDE, Kernel, Options, Tables, Verdict, VerdictKey, netns_cookie};
use libbpf_rs::query::ProgInfoIter;
use libbpf_rs::{Object, ObjectBuilder, ProgramInput};
use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use support::Node;

const CLIENT: u32 = 300;
const FIRST: u32 = 1000;
const PORT: u16 = 443;
/// Entries of each table, verdicts and endpoints alike.
const SIZES: [u32; 4] = [1, 1 << 10, 1 << 14, 1 << 17];
/// Destinations that a workload speaks to again and again.
const WARM: u32 = 8;
/// Of the timed program in one call; without events.
const REPEAT: u32 = 400_000;
/// No more than the ring holds, and it is drained in between.
const REPEAT_TOLD: u32 = 4_000;
const DIALS: usize = 4_000;
/// How much more a decision over the largest tables may cost than over one entry, and still be called flat.
const FLAT_RATIO: f64 = 1.5;
const STATS: &str = "/proc/sys/kernel/bpf_stats_enabled";

struct Figure {
    name: String,
    unit: &'static str,
    ours: f64,
    floor: Option<f64>,
    target: Option<f64>,
}

impl Figure {
    fn met(&self) -> Option<bool> {
        self.target.map(|target| self.ours <= target)
    }
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if let [_, verb, address, count] = args.as_slice()
        && verb == "dial"
    {
        return dial(address.parse().unwrap(), count.parse().unwrap());
    }
    let node = Node::new();
    let options = Options {
        capacity: Capacity { endpoints: 1 << 17, verdicts: 1 << 18, ..Capacity::default() },
        ..node.options()
    };
    let kernel = Kernel::open(&options).unwrap();
    kernel.renew_lease(Duration::from_secs(3600)).unwrap();
    let cgroup = node.cgroup("client");
    kernel.set_workload(cgroup, CLIENT).unwrap();
    let listener = node.attach(&kernel);
    let cookie = netns_cookie(&listener).unwrap();
    let mut figures = alone(&kernel, &node, cgroup, cookie);
    figures.extend(in_place(&kernel, &node, listener));
    print(&figures);
}

fn address(n: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x0a00_0000 + n)
}

/// Addresses from 10.0.0.0 on, each another workload's, all of which the client may call.
fn tables(entries: u32) -> Tables {
    let key = |n| VerdictKey { source: CLIENT, destination: FIRST + n, port: PORT };
    Tables {
        verdicts: (0..entries).map(|n| (key(n), Verdict { action: Action::Allow, rule: 1 })).collect(),
        endpoints: (0..entries).map(|n| (address(n), FIRST + n)).collect(),
        ..Tables::default()
    }
}

/// BPF_PROG_TEST_RUN has no connect programs: the same decision, in a program that can be timed.
fn load_decide(node: &Node, span: u32, window: u32, cgroup: u64, cookie: u64) -> Object {
    let mut object = ObjectBuilder::default().open_memory(DECIDE.bytes).unwrap();
    let mut rodata = Vec::new();
    rodata.extend_from_slice(&span.to_ne_bytes());
    rodata.extend_from_slice(&window.to_ne_bytes());
    rodata.extend_from_slice(&cgroup.to_ne_bytes());
    rodata.extend_from_slice(&cookie.to_ne_bytes());
    for mut map in object.maps_mut() {
        let name = map.name().to_string_lossy().into_owned();
        let pin = node.pins.join("maps").join(&name);
        match name.as_str() {
            _ if name.ends_with("rodata") => map.set_initial_value(&rodata).unwrap(),
            _ if name.ends_with("bss") => {}
            _ => map.reuse_pinned_map(pin).unwrap(),
        }
    }
    object.load().unwrap()
}

/// Nanoseconds a run, and what the program returned.
fn run(object: &Object, program: &str, repeat: u32) -> (f64, u32) {
    let program = object.progs_mut().find(|p| p.name() == program).unwrap();
    let input = ProgramInput { data_in: Some(&[0; 64]), repeat, ..ProgramInput::default() };
    let output = program.test_run(input).unwrap();
    (output.duration.as_nanos() as f64, output.return_value)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The kernel's own loop around it is taken off: the same program without the decision.
fn net(object: &Object, repeat: u32, rounds: usize, mut after: impl FnMut()) -> (f64, f64) {
    let floor = median((0..7).map(|_| run(object, "ambit_nothing", REPEAT).0).collect());
    let timed = |_| {
        let (ns, returned) = run(object, "ambit_decide", repeat);
        assert_eq!(returned, 0, "timed something else than an allowed connection");
        after();
        ns
    };
    (median((0..rounds).map(timed).collect()) - floor, floor)
}

fn alone(kernel: &Kernel, node: &Node, cgroup: u64, cookie: u64) -> Vec<Figure> {
    let (mut figures, mut by_size) = (Vec::new(), Vec::new());
    for entries in SIZES {
        kernel.install(&tables(entries)).unwrap();
        let object = load_decide(node, entries, entries.min(WARM), cgroup, cookie);
        let (ours, floor) = net(&object, REPEAT, 7, || ());
        by_size.push(ours);
        let name = format!("decision, test_run net, {entries} entries");
        figures.push(Figure { name, unit: "ns", ours, floor: Some(floor), target: Some(200.0) });
    }
    let most = SIZES[3];
    let (name, ours) = (format!("{most} entries beside 1"), by_size[3] / by_size[0]);
    figures.push(Figure { name, unit: "x", ours, floor: None, target: Some(FLAT_RATIO) });

    let object = load_decide(node, most, most, cgroup, cookie);
    let (ours, floor) = net(&object, REPEAT, 7, || ());
    let name = format!("the same, each time another of {most} addresses");
    figures.push(Figure { name, unit: "ns", ours, floor: Some(floor), target: None });

    kernel.sample_allowed(1).unwrap();
    kernel.drain_events(&mut |_| {}).unwrap();
    let lost = kernel.counters().unwrap().events_lost;
    let object = load_decide(node, most, WARM, cgroup, cookie);
    let (ours, floor) = net(&object, REPEAT_TOLD, 51, || kernel.drain_events(&mut |_| {}).unwrap());
    assert_eq!(kernel.counters().unwrap().events_lost, lost, "timed lost events");
    let name = format!("decision with event, test_run net, {most} entries");
    figures.push(Figure { name, unit: "ns", ours, floor: Some(floor), target: None });
    kernel.sample_allowed(0).unwrap();
    figures
}

/// Real connections of a process in the mesh: what the program takes there, and what the caller waits.
fn in_place(kernel: &Kernel, node: &Node, listener: TcpListener) -> Vec<Figure> {
    accept_all(listener);
    accept_all(node.listen_in_pod(Ipv4Addr::LOCALHOST, 7000));
    node.in_pod(|| support::run("ip route add unreachable 10.66.0.0/24"));
    let entries = SIZES[3];
    kernel.install(&tables(entries)).unwrap();
    let (allowed, denied) = (SocketAddrV4::new(address(7), PORT), SocketAddrV4::new(address(7), PORT + 1));
    let mut figures = Vec::new();
    let mut figure = |name: String, ours, floor, target: Option<f64>| {
        figures.push(Figure { name, unit: "ns", ours, floor, target });
    };
    let plain = dialled(node, None, SocketAddrV4::new(Ipv4Addr::LOCALHOST, 7000));
    let unreachable = dialled(node, None, SocketAddrV4::new(Ipv4Addr::new(10, 66, 0, 1), PORT));
    for (what, sample, target) in [("allow", 0, 600.0), ("allow with event", 1, 800.0)] {
        kernel.sample_allowed(sample).unwrap();
        let (run_ns, _) = with_stats(kernel, node, allowed);
        figure(format!("in situ at connect(), {what}, {entries} entries"), run_ns, None, Some(target));
        let call = dialled(node, Some("client"), allowed);
        kernel.drain_events(&mut |_| {}).unwrap();
        figure(format!("connect() to the agent, {what}, p50"), call.0, Some(plain.0), None);
    }
    kernel.sample_allowed(0).unwrap();
    let (run_ns, _) = with_stats(kernel, node, denied);
    figure(format!("in situ at connect(), deny with event, {entries} entries"), run_ns, None, Some(800.0));
    let call = dialled(node, Some("client"), denied);
    figure("denied connect(), EPERM, p50".into(), call.0, Some(unreachable.0), Some(50_000.0));
    figure("denied connect(), EPERM, p99".into(), call.1, Some(unreachable.1), Some(50_000.0));
    figures
}

fn accept_all(listener: TcpListener) {
    std::thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            drop(stream);
        }
    });
}

/// A process of its own, in the pod's namespace: p50 and p99 of its connect() calls, ns.
fn dialled(node: &Node, cgroup: Option<&str>, to: SocketAddrV4) -> (f64, f64) {
    let place = cgroup.map_or(node.base.clone(), |name| node.mesh.join(name));
    let output = Command::new("sh")
        .args(["-c", "echo $$ > \"$0/cgroup.procs\" && exec nsenter --net=\"$1\" \"$2\" dial \"$3\" \"$4\""])
        .arg(place)
        .arg(format!("/proc/{}/ns/net", node.pod.id()))
        .arg(std::env::current_exe().unwrap())
        .arg(to.to_string())
        .arg(DIALS.to_string())
        .output()
        .unwrap();
    let said = support::text(output);
    let (p50, p99) = said.split_once(' ').unwrap();
    (p50.parse().unwrap(), p99.parse().unwrap())
}

fn dial(to: SocketAddrV4, count: usize) {
    let mut times: Vec<f64> = Vec::with_capacity(count);
    for _ in 0..count {
        let start = Instant::now();
        let outcome = TcpStream::connect(to);
        times.push(start.elapsed().as_nanos() as f64);
        // Otherwise every port of the range would wait for its minute.
        if let Ok(stream) = outcome {
            support::close_at_once(&stream);
        }
    }
    times.sort_by(f64::total_cmp);
    println!("{} {}", times[count / 2], times[count * 99 / 100]);
}

/// Mean time of the connect program, as the kernel counts it (its two clock readings included), and how often it ran.
fn with_stats(kernel: &Kernel, node: &Node, to: SocketAddrV4) -> (f64, u64) {
    let before = std::fs::read_to_string(STATS).unwrap();
    std::fs::write(STATS, "1").unwrap();
    let start = counted(node);
    // The ring holds about 4,600 events.
    kernel.drain_events(&mut |_| {}).unwrap();
    dialled(node, Some("client"), to);
    let end = counted(node);
    std::fs::write(STATS, before.trim()).unwrap();
    kernel.drain_events(&mut |_| {}).unwrap();
    let (ns, runs) = (end.0 - start.0, end.1 - start.1);
    assert!(runs >= DIALS as u64, "the program ran {runs} times");
    (ns as f64 / runs as f64, runs)
}

/// Nanoseconds and runs so far of the connect4 program that is attached.
fn counted(node: &Node) -> (u64, u64) {
    let link = libbpf_rs::Link::open(node.pins.join("links/connect4")).unwrap().info().unwrap();
    let program = ProgInfoIter::default().find(|info| info.id == link.prog_id).unwrap();
    (program.run_time_ns, program.run_cnt)
}

fn print(figures: &[Figure]) {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load: String = load.split(' ').take(3).collect::<Vec<_>>().join(" ");
    let mut json = String::from("[\n");
    let number = |value: Option<f64>| value.map_or("null".to_owned(), |v| format!("{v:.2}"));
    for (n, f) in figures.iter().enumerate() {
        let verdict = f.met().map_or("-", |met| if met { "met" } else { "missed" });
        let shown = |value: Option<f64>| value.map_or("-".to_owned(), |v| format!("{v:.1}"));
        println!(
            "{:56} {:>10.1} {:2}  floor {:>9}  target {:>8}  {verdict}",
            f.name,
            f.ours,
            f.unit,
            shown(f.floor),
            shown(f.target)
        );
        let comma = if n + 1 == figures.len() { "" } else { "," };
        let _ = writeln!(
            json,
            "  {{\"name\": \"{}\", \"unit\": \"{}\", \"ours\": {:.2}, \"peer\": null, \"floor\": {}, \"target\": {}, \
             \"met\": {}, \"load_average\": \"{load}\"}}{comma}",
            f.name,
            f.unit,
            f.ours,
            number(f.floor),
            number(f.target),
            f.met().map_or("null".to_owned(), |met| met.to_string())
        );
    }
    println!("load average {load}");
    let exe = std::env::current_exe().unwrap();
    let target = exe.ancestors().find(|p| p.ends_with("target")).unwrap_or(Path::new("target"));
    std::fs::create_dir_all(target.join("bench")).unwrap();
    std::fs::write(target.join("bench/kernel.json"), json + "]\n").unwrap();
    let judged = figures.iter().filter(|f| f.target.is_some()).count();
    println!("{judged} figures, {} met", figures.iter().filter(|f| f.met() == Some(true)).count());
}
