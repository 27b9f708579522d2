//! What a decision costs in user space, compiled and by walking over the policies: `cargo xtask bench policy`.
#![allow(clippy::print_stdout, clippy::disallowed_methods, reason = "a measurement reads a clock and prints")]

use ambit_model::policy::{Action, Peers, Policy, PolicyExtras};
use ambit_model::{Moment, Refusal, SpiffeId, Stamp};
use ambit_policy::PolicySet;
use std::hint::black_box;
use std::time::{Duration, Instant};

const NOW: Moment = Moment { committed: Stamp(1), latest: Stamp(1) };
/// Decisions of one row; the walk takes too long for as many.
const DECISIONS: usize = 20_000;
const WALKS: usize = 200;
/// Half of them match a policy.
const QUESTIONS: usize = 1_000;
const TARGET: Duration = Duration::from_micros(10);
/// ztunnel's recorded cost of one connection's authorisation under as many policies, CPU time.
const PEER_MS: f64 = 13.3;

fn main() -> Result<(), Refusal> {
    println!("user-space authorisation, one connection's decision (release; one thread)");
    println!("{:>9} {:>12} {:>12} {:>12} {:>14} {:>8}", "policies", "compile", "median", "p99", "walk, median", "rows");
    let (mut rows, mut met) = (Vec::new(), 0);
    for count in [10, 1_000, 10_000, 100_000] {
        let row = measured(count)?;
        println!(
            "{count:>9} {:>9.1} ms {:>9} ns {:>9} ns {:>11.1} us {:>8}",
            row.compile.as_secs_f64() * 1e3,
            row.median.as_nanos(),
            row.p99.as_nanos(),
            row.walk.as_secs_f64() * 1e6,
            row.compiled,
        );
        met += usize::from(row.p99 < TARGET);
        rows.push((count, row));
    }
    let nested = nested()?;
    println!(
        "64 patterns nested in each other at both ends (the worst a path of 64 parts can do): {} ns",
        nested.as_nanos()
    );
    println!("target: p99 below {} us at 10,000 policies; ztunnel there {PEER_MS} ms (recorded)", TARGET.as_micros());
    if let Ok(load) = std::fs::read_to_string("/proc/loadavg") {
        println!("load average {}", load.split(' ').take(3).collect::<Vec<_>>().join(" "));
    }
    write(&rows);
    println!("{} figures, {met} met", rows.len());
    Ok(())
}

struct Row {
    compile: Duration,
    median: Duration,
    p99: Duration,
    walk: Duration,
    compiled: usize,
}

fn measured(count: usize) -> Result<Row, Refusal> {
    let set = policies(count)?;
    let begun = Instant::now();
    let index = set.compile();
    let compile = begun.elapsed();
    let questions: Vec<(SpiffeId, SpiffeId, u16)> =
        (0..QUESTIONS).map(|n| question(n, count)).collect::<Result<_, _>>()?;
    let decide = |n: usize| {
        let (src, dst, port) = &questions[n % QUESTIONS];
        let begun = Instant::now();
        black_box(index.evaluate(black_box(src), black_box(dst), *port, NOW));
        begun.elapsed()
    };
    // Once for the caches: a node decides about the same workloads again and again.
    (0..QUESTIONS).for_each(|n| {
        let _ = decide(n);
    });
    let mut took: Vec<Duration> = (0..DECISIONS).map(decide).collect();
    took.sort_unstable();
    let walk = |n: usize| {
        let (src, dst, port) = &questions[n % QUESTIONS];
        let begun = Instant::now();
        let verdict = black_box(set.evaluate(src, dst, *port, NOW));
        let took = begun.elapsed();
        assert_eq!(verdict, index.evaluate(src, dst, *port, NOW), "the two differ");
        took
    };
    let mut walks: Vec<Duration> = (0..WALKS).map(|n| walk(n * 5)).collect();
    walks.sort_unstable();
    let at = |all: &[Duration], share: f64| all[((all.len() - 1) as f64 * share) as usize];
    let (median, p99, walk) = (at(&took, 0.5), at(&took, 0.99), at(&walks, 0.5));
    Ok(Row { compile, median, p99, walk, compiled: index.len() })
}

/// Services in namespaces: most policies name one caller, some a namespace; a twentieth denies.
fn policies(count: usize) -> Result<PolicySet, Refusal> {
    let mut set = PolicySet::new(["west".parse()?, "east".parse()?].into());
    for n in 0..count {
        let target: Peers = format!("spiffe://west/ns{}/svc{n}", n % 200).parse()?;
        let caller = if n % 10 == 0 { format!("spiffe://east/ns{}/*", n % 200) } else { caller(n) };
        let action = if n % 20 == 7 { Action::Deny } else { Action::Allow };
        let (from, ports) = (vec![caller.parse()?], vec![8080, 9090]);
        let policy =
            Policy { name: format!("p{n}").parse()?, target, action, from, ports, extras: PolicyExtras::default() };
        set.insert("west".parse()?, policy);
    }
    Ok(set)
}

fn caller(n: usize) -> String {
    format!("spiffe://east/ns{}/client{}", n % 200, n % 1_000)
}

fn question(n: usize, count: usize) -> Result<(SpiffeId, SpiffeId, u16), Refusal> {
    let of = n.wrapping_mul(7_919) % count;
    let port = if n.is_multiple_of(2) { 8080 } else { 22 };
    Ok((caller(of).parse()?, format!("spiffe://west/ns{}/svc{of}", of % 200).parse()?, port))
}

/// A pattern at each depth of both ends, and a policy for each pair that a decision has to look at.
fn nested() -> Result<Duration, Refusal> {
    let mut set = PolicySet::new(["west".parse()?].into());
    let path = |depth: usize| "/x".repeat(depth);
    for depth in 1..64 {
        let (target, from) =
            (format!("spiffe://west{}/*", path(depth)), format!("spiffe://west{}/*", path(64 - depth)));
        let (name, from) = (format!("p{depth}").parse()?, vec![from.parse()?]);
        let extras = PolicyExtras::default();
        set.insert(
            "west".parse()?,
            Policy { name, target: target.parse()?, action: Action::Deny, from, ports: vec![1], extras },
        );
    }
    let index = set.compile();
    let end: SpiffeId = format!("spiffe://west{}", path(64)).parse()?;
    let begun = Instant::now();
    (0..1_000).for_each(|_| drop(black_box(index.evaluate(&end, &end, 2, NOW))));
    Ok(begun.elapsed() / 1_000)
}

/// `target/bench/policy.json`, beside the folder of the profile; where it cannot be, the table was printed.
fn write(rows: &[(usize, Row)]) {
    let own = std::env::current_exe().ok();
    let Some(target) = own.as_deref().and_then(|p| p.ancestors().nth(3)) else { return };
    let of = |(count, row): &(usize, Row)| {
        format!(
            "  {{\"name\": \"decision at {count} policies, p99\", \"unit\": \"ns\", \"ours\": {}, \"peer\": null, \
             \"floor\": null, \"target\": {}, \"met\": {}}}",
            row.p99.as_nanos(),
            TARGET.as_nanos(),
            row.p99 < TARGET
        )
    };
    let text = format!("[\n{}\n]\n", rows.iter().map(of).collect::<Vec<_>>().join(",\n"));
    let folder = target.join("bench");
    if std::fs::create_dir_all(&folder).and_then(|()| std::fs::write(folder.join("policy.json"), text)).is_err() {
        println!("{} could not be written", folder.display());
    }
}
