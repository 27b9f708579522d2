//! The no-bypass suite: what a workload, or somebody else in its pod, may try to get bytes out around the mesh, tried in every
//! state of the agent, with captures at both other machines searched for those bytes. Prints its table.
//!
//! Each attempt is made first while nothing is governed, and its bytes must be found then: what cannot leak proves nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "the kernel tests use the rest")]
#[path = "../kernel/support.rs"]
mod support;

mod annex;
mod attempts;
mod callers;
mod exceptions;
mod rig;
mod soak;
mod stamps;
mod wires;

use ambit_ebpf::{Capacity, Kernel, KernelError, Options, Reason};
use attempts::ATTEMPTS;
use libbpf_rs::{Link, MapHandle};
use rig::{FAR, Rig, State, tables};
use std::collections::BTreeMap;
use std::time::Duration;

/// What came of every attempt in one state: what the application was told, and how often its bytes were seen.
type Column = BTreeMap<&'static str, (String, usize)>;

const LEASE: Duration = Duration::from_secs(600);

/// Nothing is seen in clear, and of what the agent accepted, only the allowed call.
fn check(state: &State, column: &Column) {
    for (name, (told, seen)) in column {
        assert_eq!(*seen, 0, "{name} in state {}: told {told}, seen in clear", state.name);
    }
    let (allowed, _) = &column["an allowed connection"];
    assert_eq!(allowed, state.allowed, "state {}", state.name);
    assert_eq!(column["an allowed IPv6 connection"].0, state.allowed, "state {}", state.name);
    assert_eq!(column["a squatter on the capture port, IPv6"].0, "nobody came", "state {}", state.name);
    assert_eq!(column["the pod's own loopback, IPv6"].0, "ok", "state {}", state.name);
    assert_eq!(column["a squatter on the capture port"].0, "nobody came", "state {}", state.name);
    assert_eq!(column["the pod's own loopback"].0, "ok", "state {}", state.name);
    for denied in ["a denied connection", "a v4-mapped one", "SO_MARK", "TCP Fast Open", "multipath TCP"]
        .into_iter()
        .chain(["native IPv6", "native IPv6, V6ONLY", "native IPv6, bound", "the agent's IPv6 addresses on purpose"])
    {
        assert_eq!(column[denied].0, "EPERM", "{denied} in state {}", state.name);
    }
}

/// Where nothing is governed, the bytes of all that can leak are seen.
fn check_control(column: &Column) {
    for (name, _, leaks, _) in ATTEMPTS {
        let (told, seen) = &column[name];
        assert!(!leaks || *seen > 0, "{name} was not seen where nothing is governed (told {told}): it proves nothing");
    }
}

fn column(rig: &mut Rig, state: &State) -> Column {
    let found = rig.try_all(state.name);
    if state.governed {
        check(state, &found)
    } else {
        check_control(&found)
    }
    found
}

#[test]
fn nothing_leaves_in_clear_in_any_state() {
    let mut rig = Rig::new();
    let mut table: Vec<(State, Column)> = Vec::new();
    let run = |table: &mut Vec<(State, Column)>, rig: &mut Rig, name, allowed| {
        let state = State { name, allowed, governed: name != "none" };
        let found = column(rig, &state);
        table.push((state, found));
    };
    rig.connect_before();
    run(&mut table, &mut rig, "none", "");

    // Starting: the programs are there, the tables are not.
    let mut kernel = rig.open().unwrap();
    rig.govern(&kernel);
    kernel.set_workload(rig.node.cgroup("client"), rig::CLIENT).unwrap();
    run(&mut table, &mut rig, "starting", "EPERM");
    let ended = kernel.counters().unwrap().sockets_ended;
    assert!(ended >= 2 || !support::ends_sockets(), "connections from before were not ended");

    kernel.install(&tables(rig::SERVER)).unwrap();
    kernel.renew_lease(LEASE).unwrap();
    run(&mut table, &mut rig, "running", "ok");
    assert_eq!(rig.refused_inbound(), "ECONNREFUSED", "the pod's kernel may still say that nobody listens");

    // One address, another workload behind it: what was allowed to the first is not to the second.
    kernel.install(&tables(rig::OTHER)).unwrap();
    run(&mut table, &mut rig, "IP reused", "EPERM");
    kernel.install(&ambit_ebpf::Tables { endpoints: vec![], endpoints6: vec![], ..tables(rig::SERVER) }).unwrap();
    run(&mut table, &mut rig, "endpoint gone", "EPERM");

    kernel.install(&tables(rig::SERVER)).unwrap();
    let full = kernel.install(&rig::too_much()).unwrap_err();
    assert!(matches!(full, KernelError::MapFull { .. }), "{full}");
    run(&mut table, &mut rig, "map full", "ok");

    half_loaded(&rig);
    run(&mut table, &mut rig, "half upgraded", "ok");
    refused_by_the_verifier(&rig);
    run(&mut table, &mut rig, "verifier refused", "ok");

    let upgrading = rig.upgrade_all_the_time();
    run(&mut table, &mut rig, "upgrading", "ok");
    assert!(upgrading.stop() > 2, "no upgrade happened meanwhile");

    kernel.renew_lease(Duration::ZERO).unwrap();
    run(&mut table, &mut rig, "stale", "EPERM");
    kernel.renew_lease(LEASE).unwrap();

    rig.agent_dies();
    drop(kernel);
    run(&mut table, &mut rig, "dead", "ECONNREFUSED");

    kernel = rig.open().unwrap();
    rig.agent_returns(&kernel);
    run(&mut table, &mut rig, "back", "ok");

    // Two pods that may speak directly: nothing else gets a byte out for that.
    rig.govern_near(&kernel);
    kernel.set_locals(&rig.locals(&kernel, rig::SERVER, true)).unwrap();
    kernel.direct_flows().unwrap();
    run(&mut table, &mut rig, "direct", "ok");
    kernel.set_locals(&[]).unwrap();
    let told = kernel.counters().unwrap().denied[&Reason::ClearOutbound];
    assert!(told > 50, "packets dropped at the wire were not counted: {told}");
    table.push(recreated_veth(&mut rig, &kernel));
    print(&table);
}

/// Some links have the new program, then one is not what it should be: the upgrade stops there, and what is attached stays.
fn half_loaded(rig: &Rig) {
    let pin = rig.node.pins.join("links/sendmsg6");
    let mut kept = Link::open(&pin).unwrap();
    kept.unpin().unwrap();
    MapHandle::from_pinned_path(rig.node.pins.join("maps/config")).unwrap().pin(&pin).unwrap();
    let error = rig.open().err().expect("an upgrade over a pin that is no link");
    assert!(matches!(error, KernelError::PinUnexpected { .. }), "{error}");
    std::fs::remove_file(&pin).unwrap();
    kept.pin(&pin).unwrap();
}

/// The pinned verdicts are of a size that the programs would read past: the kernel's verifier refuses the new ones.
fn refused_by_the_verifier(rig: &Rig) {
    let pin = rig.node.pins.join("maps/verdicts");
    let mut kept = MapHandle::from_pinned_path(&pin).unwrap();
    std::fs::remove_file(&pin).unwrap();
    rig::pin_narrow_verdicts(&pin);
    let error = rig.open().err().expect("an upgrade that the verifier refuses");
    let said = error.to_string();
    assert!(said.contains("load object mesh.bpf.o"), "{said}");
    std::fs::remove_file(&pin).unwrap();
    kept.pin(&pin).unwrap();
}

/// A veth made anew has no program until the agent has seen it: the gap is told, and closed.
fn recreated_veth(rig: &mut Rig, kernel: &Kernel) -> (State, Column) {
    assert!(rig.wires_are_guarded(kernel));
    rig.remake_wire();
    assert!(!rig.wires_are_guarded(kernel), "an open wire was not told");
    assert_eq!(rig.guard(kernel), 1);
    assert!(rig.wires_are_guarded(kernel));
    let state = State { name: "veth anew", allowed: "ok", governed: true };
    let found = column(rig, &state);
    (state, found)
}

fn print(table: &[(State, Column)]) {
    let [(_, control), governed @ ..] = table else { panic!("no column") };
    println!("{:38} {:>10}  governed, in each of the states below: seen in clear", "attempt", "ungoverned");
    for (name, ..) in ATTEMPTS {
        let seen: usize = governed.iter().map(|(_, column)| column[name].1).sum();
        let mut told: Vec<&str> = governed.iter().map(|(_, column)| column[name].0.as_str()).collect();
        told.sort_unstable();
        told.dedup();
        println!("{name:38} {:>10}  {seen}  told {}", control[name].1, told.join(", "));
    }
    let states: Vec<&str> = governed.iter().map(|(state, _)| state.name).collect();
    println!("{} attempts, {} states ({}), target {FAR}: 0 in clear", ATTEMPTS.len(), states.len(), states.join(", "));
}

/// So that a test of the suite itself exists: with the floor taken away, bytes are seen.
#[test]
fn without_the_packet_program_bytes_are_seen() {
    let mut rig = Rig::new();
    let options = Options { capacity: Capacity::default(), ..rig.node.options() };
    let kernel = Kernel::open(&options).unwrap();
    rig.attach_only(&kernel);
    kernel.set_workload(rig.node.cgroup("client"), rig::CLIENT).unwrap();
    kernel.install(&tables(rig::SERVER)).unwrap();
    kernel.renew_lease(LEASE).unwrap();
    let found = rig.try_all("no floor");
    for leaks in ["a packet socket, UDP", "a socket from outside the mesh", "a descriptor passed in"] {
        assert!(found[leaks].1 > 0, "{leaks} was not seen: this suite could not tell");
    }
    assert_eq!(found["a denied connection"].1, 0);
}
