//! Roots of both cells are replaced in a lab, under calls between its clusters that real agents and the kernel carry, and a
//! replica is lost and replaced meanwhile. Then trust ends, and begins again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_lab::{Lab, Pod, Ready, cell};
use ambit_tests::process::{binary, until};
use ambit_tests::small::{PORT, Small, entry, peered, served};
use std::time::{Duration, Instant};

/// A rotation waits for everybody at each of its steps.
const ROTATION_MAX: Duration = Duration::from_secs(180);

/// A call after the other, each of a new connection, and a line for each.
const CALLER: &str = "
import socket, sys, time
while True:
    try:
        with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10) as s:
            s.sendall(b'GET / HTTP/1.0\\r\\n\\r\\n')
            print('ok' if s.recv(64).startswith(b'HTTP/1.0 ') else 'no answer', flush=True)
    except OSError as e:
        print('failed:', e, flush=True)
    time.sleep(0.03)
";

/// `web` of a site, which calls without end.
fn calling(lab: &Lab, site: &str, to: &Pod) {
    entry(lab, site, "web").unwrap();
    let (address, port) = (to.address.to_string(), PORT.to_string());
    lab.start_pod(&format!("{site}-n1"), "web", &["python3", "-c", CALLER, &address, &port], Ready::Started).unwrap();
}

/// What `web` of a site wrote of each call so far.
fn calls(lab: &Lab, site: &str) -> Vec<String> {
    let log = std::fs::read_to_string(lab.folder(&format!("{site}-n1")).join("pod-web.log")).unwrap();
    log.lines().map(str::to_owned).collect()
}

/// Handshakes of a node's tunnels, as client and as server: done, and each failed one with its line.
fn handshakes(lab: &Lab, node: &str) -> (u64, Vec<String>) {
    let (_, page) = lab.page(node, cell::metrics(&lab.spec().member(node).unwrap()), "/metrics").unwrap();
    let (mut done, mut failed) = (0, Vec::new());
    for line in page.lines().filter(|line| line.starts_with("ambit_tls_handshakes_total{")) {
        let count: u64 = line.rsplit(' ').next().unwrap().parse().unwrap();
        if line.contains("result=\"failed\"") { failed.push(line.to_owned()) } else { done += count }
    }
    (done, failed)
}

fn rotate(lab: &Lab, site: &str) -> String {
    let (program, context) = (binary("ambit").unwrap(), lab.cell(site).unwrap().context());
    let argv = [program.to_str().unwrap(), "--context", context.to_str().unwrap(), "trust", "rotate", "--wait", "60s"];
    lab.must_run_in(&lab.operator(), &argv, ROTATION_MAX).unwrap()
}

#[test]
fn roots_of_both_clusters_are_replaced_under_calls_between_them_and_none_fails() {
    let small = Small::shaped("testrotates", 2, 1, 3).unwrap();
    let lab = &small.lab;
    peered(lab).unwrap();
    let there = served(lab, "east", "east-n1", "spiffe://west/web").unwrap();
    let here = served(lab, "west", "west-n1", "spiffe://east/web").unwrap();
    calling(lab, "west", &there);
    calling(lab, "east", &here);
    let steady = |site: &str| calls(lab, site).iter().rev().take(20).filter(|line| *line == "ok").count() == 20;
    let last = |site: &str| calls(lab, site).pop();
    until("calls both ways", || {
        let both = steady("west") && steady("east");
        both.then_some(()).or_else(|| {
            println!("{:?}, {:?}", last("west"), last("east"));
            None
        })
    });

    let sites = ["west", "east"];
    let before = sites.map(|site| calls(lab, site).len());
    let roots = sites.map(|site| lab.cell(site).unwrap().fingerprint);
    let greeted = sites.map(|site| handshakes(lab, &format!("{site}-n1")));
    let began = Instant::now();
    std::thread::scope(|threads| {
        let west = threads.spawn(|| rotate(lab, "west"));
        // Begun with three replicas, one of which is lost while everybody is waited for, and another comes.
        std::thread::sleep(Duration::from_millis(300));
        lab.replace_replica("west-r3", 3, 4, false).unwrap();
        println!("west: {}", west.join().unwrap());
    });
    println!("east: {}", rotate(lab, "east"));
    let took = began.elapsed();
    // And on, under the new roots alone.
    std::thread::sleep(Duration::from_secs(2));

    let (mut made, mut shaken, mut failed) = (0, 0, Vec::new());
    for (n, site) in sites.iter().enumerate() {
        assert_ne!(lab.cell(site).unwrap().fingerprint, roots[n], "{site} has a new root");
        lab.ambit(site, &["trust", "check"]).unwrap();
        let since = calls(lab, site).split_off(before[n]);
        made += since.len();
        failed.extend(since.into_iter().filter(|line| line != "ok"));
        let (done, refused) = handshakes(lab, &format!("{site}-n1"));
        shaken += done - greeted[n].0;
        failed.extend(refused.into_iter().filter(|line| !greeted[n].1.contains(line)));
    }
    println!(
        "{made} calls and {shaken} handshakes in {:.1} s and 2 s after it, {} failed (load average {})",
        took.as_secs_f64(),
        failed.len(),
        std::fs::read_to_string("/proc/loadavg").unwrap().split(' ').next().unwrap()
    );
    assert!(failed.is_empty(), "{failed:?}");
    assert!(made > 100 && shaken >= 4, "{made} calls, {shaken} handshakes");
    trust_ends_and_begins_again(lab, steady);
}

/// West suspends east: calls end both ways, though east believes west as before; approved again, they pass.
fn trust_ends_and_begins_again(lab: &Lab, steady: impl Fn(&str) -> bool) {
    lab.ambit("west", &["peer", "suspend", "east"]).unwrap();
    let refused = |site: &str| calls(lab, site).iter().rev().take(20).filter(|line| *line == "ok").count() == 0;
    until("no call passes", || (refused("west") && refused("east")).then_some(()));
    println!("{:?}, {:?}", calls(lab, "west").pop(), calls(lab, "east").pop());
    let why = calls(lab, "west").pop().unwrap();
    assert!(why.contains("Operation not permitted"), "west's own kernel refuses who calls east: {why}");
    let fingerprint = lab.cell("east").unwrap().fingerprint;
    lab.ambit("west", &["peer", "approve", "east", "--fingerprint", &fingerprint]).unwrap();
    until("calls both ways again", || (steady("west") && steady("east")).then_some(()));
}
