//! Calls to a service over two clusters, with real cells, agents and kernels: where they go by distance, by weights and by an
//! operator's word, that open connections stay, and what the loss of a cluster costs.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_lab::fault::Fault;
use ambit_lab::{Lab, Pod, Ready};
use ambit_tests::process::until;
use ambit_tests::small::{PORT, Small, entry, peered};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

const SERVICE: &str = "10.96.0.10";
const COMMAND_MAX: Duration = Duration::from_secs(60);

/// Says who it is, and then what it hears.
const SERVER: &str = "
import socket, sys, threading
def serve(s):
    try:
        s.sendall(sys.argv[3].encode() + b'\\n')
        while (heard := s.recv(64)):
            s.sendall(heard)
    except OSError:
        pass
    s.close()
with socket.create_server((sys.argv[1], int(sys.argv[2])), backlog=512) as listener:
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
";

/// Calls so many times, one after the other; who answered how often.
const CALLS: &str = "
import collections, json, socket, sys
seen = collections.Counter()
for _ in range(int(sys.argv[3])):
    try:
        with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10) as s:
            s.settimeout(10)
            seen[s.recv(64).decode().strip() or 'nobody'] += 1
    except OSError as e:
        seen[type(e).__name__] += 1
print(json.dumps(seen))
";

/// One connection, for ever: a line for each word that came back, and for its end.
const HELD: &str = "
import socket, sys, time
s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10)
print(s.recv(64).decode().strip(), flush=True)
while True:
    try:
        s.sendall(b'x')
        print('ok' if s.recv(1) else 'ended', flush=True)
    except OSError as e:
        print('failed:', e, flush=True)
        break
    time.sleep(0.05)
";

/// A new connection every 20 ms, none waiting for another: when each began and how long until its first byte, in milliseconds.
const BEGUN: &str = "
import socket, sys, threading, time
def call():
    begun = time.time()
    try:
        with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=15) as s:
            s.settimeout(15)
            who = s.recv(64).decode().strip() or 'nobody'
    except OSError as e:
        who = type(e).__name__
    print(int(begun * 1000), int((time.time() - begun) * 1000), who, flush=True)
while True:
    threading.Thread(target=call, daemon=True).start()
    time.sleep(0.02)
";

fn apply(lab: &Lab, site: &str, text: &str) {
    let file = lab.folder("operator").join(format!("{site}-services.yaml"));
    std::fs::write(&file, text).unwrap();
    lab.ambit(site, &["policy", "apply", "-f", &file.display().to_string()]).unwrap();
}

fn shop(lab: &Lab, site: &str) -> Pod {
    entry(lab, site, "shop").unwrap();
    let pod = lab.add_pod(&format!("{site}-n1"), "shop", ambit_lab::workload::UID).unwrap();
    let (address, port) = (pod.address.to_string(), PORT.to_string());
    let argv = ["python3", "-c", SERVER, &address, &port, site];
    lab.start_in_pod(&pod, &argv, Ready::Listening(SocketAddr::from((pod.address, PORT)))).unwrap();
    pod
}

/// The service, whose origin is west, with these backends.
fn document(backends: &str) -> String {
    format!(
        "kind: Service\nmetadata: {{name: shop}}\nspec: {{address: {SERVICE}, port: {PORT}, backends: [{backends}]}}\n"
    )
}

fn answers(lab: &Lab, web: &Pod, calls: u32) -> BTreeMap<String, u32> {
    let (port, calls) = (PORT.to_string(), calls.to_string());
    let said = lab.must_run_in(&web.place(), &["python3", "-c", CALLS, SERVICE, &port, &calls], COMMAND_MAX).unwrap();
    serde_json::from_str(said.trim()).unwrap_or_else(|e| panic!("{e}: {said}"))
}

/// Once it is heard everywhere, all calls are answered there.
fn all_go_to(lab: &Lab, web: &Pod, who: &str) {
    until(&format!("calls go to {who}"), || {
        let last = answers(lab, web, 5);
        println!("  wanted {who}: {last:?}");
        (last == [(who.to_owned(), 5)].into()).then_some(())
    });
    assert_eq!(answers(lab, web, 30), [(who.to_owned(), 30)].into());
}

/// East calls a service of west's, of which each cluster runs one endpoint.
fn ready(name: &str) -> (Small, Pod) {
    let small = Small::shaped(name, 2, 1, 1).unwrap();
    let lab = &small.lab;
    peered(lab).unwrap();
    for site in ["west", "east"] {
        shop(lab, site);
        apply(
            lab,
            site,
            &format!(
                "kind: Policy\nmetadata: {{name: web-to-shop}}\nspec: {{target: spiffe://{site}/shop, action: allow, \
                 from: [spiffe://east/web], ports: [{PORT}]}}\n"
            ),
        );
    }
    entry(lab, "east", "web").unwrap();
    let web = lab.add_pod("east-n1", "web", ambit_lab::workload::UID).unwrap();
    (small, web)
}

#[test]
fn calls_go_where_distance_weights_and_operators_say_and_open_ones_stay() {
    let (small, web) = ready("testsvc");
    let lab = &small.lab;
    apply(lab, "west", &document("spiffe://west/shop, spiffe://east/shop"));
    all_go_to(lab, &web, "east");
    let port = PORT.to_string();
    lab.start_in_pod(&web, &["python3", "-c", HELD, SERVICE, &port], Ready::Started).unwrap();
    let log = lab.folder("east-n1").join("pod-web.log");
    let held = || std::fs::read_to_string(&log).unwrap_or_default().lines().map(str::to_owned).collect::<Vec<_>>();
    until("a connection that is held", || (held().len() > 3).then_some(()));

    drained_and_back(lab, &web);
    failed_over_and_back(lab, &web);

    // Weights, as canaries go: nothing, all, and in between.
    apply(lab, "west", &document("{id: spiffe://west/shop, weight: 1}, {id: spiffe://east/shop, weight: 0}"));
    all_go_to(lab, &web, "west");
    apply(lab, "west", &document("spiffe://west/shop, spiffe://east/shop"));
    all_go_to(lab, &web, "east");
    // All the while one connection was open, to the cluster that calls were led away from.
    let lines = held();
    assert_eq!(lines.first().map(String::as_str), Some("east"));
    assert!(lines.len() > 20 && lines.iter().skip(1).all(|line| line == "ok"), "{:?}", lines.last());

    evicted(lab);
}

fn drained_and_back(lab: &Lab, web: &Pod) {
    let said = lab.ambit("east", &["cluster", "drain", "east", "--note", "new switches"]).unwrap();
    assert!(said.contains("new switches") && said.contains("drained:"), "{said}");
    all_go_to(lab, web, "west");
    // Its word is everybody's.
    until("west hears of it", || {
        let list = lab.ambit("west", &["cluster", "list", "-o", "json"]).unwrap();
        let list: serde_json::Value = serde_json::from_str(&list).unwrap();
        let east = list.as_array().unwrap().iter().find(|c| c["name"] == "east").unwrap().clone();
        (east["drained"] == true).then_some(())
    });
    lab.ambit("east", &["cluster", "resume", "east"]).unwrap();
    all_go_to(lab, web, "east");
}

fn failed_over_and_back(lab: &Lab, web: &Pod) {
    let refused = lab.ambit("west", &["cluster", "fail-over", "shop", "east", "--to", "east"]).unwrap_err();
    assert!(refused.to_string().contains("two clusters"), "{refused}");
    let said =
        lab.ambit("west", &["cluster", "fail-over", "--all", "east", "--to", "west", "--note", "drill"]).unwrap();
    assert!(said.contains("fail-over") && said.contains("west/shop") && said.contains("drill"), "{said}");
    all_go_to(lab, web, "west");
    let circle = lab.ambit("west", &["cluster", "fail-over", "shop", "west", "--to", "east"]).unwrap_err();
    assert!(circle.to_string().contains("west -> east -> west"), "{circle}");
    lab.ambit("west", &["cluster", "fail-back", "shop", "east"]).unwrap();
    all_go_to(lab, web, "east");
    let shown = lab.ambit("west", &["cluster", "show", "east", "-o", "json"]).unwrap();
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    let steer = shown["words"].as_array().unwrap().iter().find(|word| word["what"] == "fail-over").unwrap();
    assert_eq!((&steer["in_force"], &steer["version"]), (&false.into(), &2.into()), "{shown}");
}

fn evicted(lab: &Lab) {
    let refused = lab.ambit("east", &["cluster", "evict", "east", "--confirm", "west"]).unwrap_err();
    assert!(refused.to_string().contains("--confirm east"), "{refused}");
    lab.ambit("east", &["cluster", "region", "east", "eu-1"]).unwrap();
    let shown = lab.ambit("east", &["cluster", "show", "east"]).unwrap();
    assert!(shown.contains("eu-1"), "{shown}");
    let gone = lab.ambit("east", &["cluster", "evict", "east", "--confirm", "east"]).unwrap();
    assert!(gone.contains("1 node") || gone.contains("evicted"), "{gone}");
}

/// Calls begun since this moment (milliseconds since 1970): how long each took, and who answered.
fn begun_since(lab: &Lab, at_ms: u64) -> Vec<(u64, u64, String)> {
    let log = std::fs::read_to_string(lab.folder("east-n1").join("pod-web.log")).unwrap_or_default();
    let row = |line: &str| {
        let mut words = line.split(' ');
        Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?, words.next()?.to_owned()))
    };
    log.lines().filter_map(row).filter(|(begun, ..)| *begun >= at_ms).collect()
}

fn now_ms() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64
}

/// Loses west, to which calls go first, in this way; and says what that cost, which is told and never judged.
fn lost(lab: &Lab, how: &str, fault: Fault) {
    let west_answers =
        || begun_since(lab, now_ms().saturating_sub(1_500)).iter().rev().take(10).all(|(.., who)| who == "west");
    until("calls go to west", || (west_answers() && begun_since(lab, now_ms() - 1_500).len() > 10).then_some(()));
    let at_ms = now_ms();
    lab.inject(fault, "west", Duration::from_secs(60)).unwrap();
    let there_ms = now_ms();
    std::thread::sleep(Duration::from_secs(4));
    let calls = begun_since(lab, there_ms);
    let mut took: Vec<u64> = calls
        .iter()
        .filter(|(begun, _, who)| who == "east" && *begun < there_ms + 2_000)
        .map(|(_, took, _)| *took)
        .collect();
    took.sort_unstable();
    let failed = calls.iter().filter(|(.., who)| who != "east" && who != "west").count();
    let first = calls.iter().filter(|(.., who)| who == "east").map(|(begun, took, _)| begun + took - there_ms).min();
    let load = std::fs::read_to_string("/proc/loadavg").unwrap();
    println!(
        "west lost ({how}, in {} ms): first success {first:?} ms after; of {} calls begun in the 2 s after it, time to the first byte p50 {} ms, \
         max {} ms; {failed} failed; load average {}",
        there_ms - at_ms,
        took.len(),
        took.get(took.len() / 2).copied().unwrap_or_default(),
        took.last().copied().unwrap_or_default(),
        load.split(' ').next().unwrap()
    );
    let late: Vec<_> = calls.iter().filter(|(begun, ..)| *begun > there_ms + 2_000).collect();
    assert!(late.len() > 10 && late.iter().all(|(.., who)| who == "east"), "{:?}", late.last());
    lab.start_again("west").unwrap();
}

#[test]
fn the_loss_of_a_cluster_costs_its_callers_little_and_they_come_back() {
    let (small, web) = ready("testloss");
    let lab = &small.lab;
    let order = "kind: Service\nmetadata: {name: shop}\nspec: {address: 10.96.0.10, port: 8080, \
                 backends: [spiffe://west/shop, spiffe://east/shop], order: first-backend}\n";
    apply(lab, "west", order);
    all_go_to(lab, &web, "west");
    let port = PORT.to_string();
    lab.start_in_pod(&web, &["python3", "-c", BEGUN, SERVICE, &port], Ready::Started).unwrap();
    for _ in 0..3 {
        lost(lab, "its processes stand still", Fault::Pause);
    }
    lost(lab, "killed, and its links cut", Fault::Kill);
    until("west answers again", || {
        let last = begun_since(lab, now_ms() - 1_000);
        (last.len() > 10 && last.iter().all(|(.., who)| who == "west")).then_some(())
    });
}
