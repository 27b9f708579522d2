//! Who called whom: told by nodes to the replicas where their streams end, asked of any replica, and shown beside a plan.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_proto::resources::Held;
use ambit_proto::v1;
use ambit_proto::v1::agent_message::Body as Up;
use ambit_proto::v1::policy_registry_client::PolicyRegistryClient;
use ambit_tests::agent::Agent;
use ambit_tests::cell::Cell;
use ambit_tests::contexts::ambit;
use ambit_tests::machine::{Machine, register_cluster};
use ambit_tests::operator::{admit, create_entry};
use ambit_tests::process::Folder;
use ambit_tests::tpm::Maker;
use std::time::Duration;

fn flow(source: &str, port: u32, allowed: bool, times: u64) -> v1::SeenFlow {
    let id = |name: &str| format!("spiffe://west/{name}");
    v1::SeenFlow { source: id(source), destination: id("db"), port, allowed, times, ..Default::default() }
}

/// What replica `n` answers: caller, port, verdict, times.
async fn rows(cell: &Cell, n: usize) -> (Vec<(String, u32, bool, u64)>, v1::FlowsResponse) {
    let mut registry = PolicyRegistryClient::new(cell.admin(n).await.unwrap());
    let answer = registry.flows(v1::FlowsRequest::default()).await.unwrap().into_inner();
    let row = |f: &v1::SeenFlow| (f.source.rsplit('/').next().unwrap().to_owned(), f.port, f.allowed, f.times);
    let mut rows: Vec<_> = answer.flows.iter().map(row).collect();
    rows.sort();
    (rows, answer)
}

/// Of eight connections that were seen seven are allowed by a policy, and none is refused by another.
fn how_much_of_it_policies_speak_of(run: &impl Fn(&[&str], i32, &[&str]), folder: &Folder) {
    run(&["flows"], 0, &["  west/web\n", "  -\n", "of 8 connections policies speak of 7 (87.5 %)"]);
    let file = folder.path("idle.yaml");
    let text = "kind: Policy\nmetadata: {name: idle}\nspec: {target: spiffe://west/db, action: deny, \
                from: ['spiffe://west/ops'], ports: [99]}\n";
    std::fs::write(&file, text).unwrap();
    run(&["apply", "-f", &file.display().to_string()], 0, &[]);
    run(&["unused"], 0, &["0 policies", "of 2 policies"]);
    let begun = "it decides no connection seen since 2";
    run(
        &["unused", "--within", "2h"],
        0,
        &["policy  west    idle", begun, "1 policy", "8 connections were seen", "119m of that time a replica"],
    );
    // What refuses what was seen is used, and the last day is all that is kept.
    std::fs::write(&file, text.replace("[99]", "[81]")).unwrap();
    run(&["apply", "-f", &file.display().to_string()], 0, &[]);
    run(&["flows"], 0, &["  west/idle\n", "of 8 connections policies speak of 8 (100.0 %)"]);
    run(&["unused", "--within", "24h"], 0, &["0 policies"]);
    run(&["unused", "--within", "25h"], 2, &["at most 24h"]);
    run(&["delete", "idle"], 0, &[]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nodes_saw_is_asked_of_any_replica_and_planned_on() {
    let mut cell = Cell::start("west", 3).await.unwrap();
    let maker = Maker::new().unwrap();
    let (machine, other) = (Machine::new(&maker, "a").await.unwrap(), Machine::new(&maker, "b").await.unwrap());
    register_cluster(&cell, "west", &maker).await.unwrap();
    let me = admit(&cell, &machine, "west").await.unwrap();
    let them = admit(&cell, &other, "west").await.unwrap();
    for id in ["db", "web", "ops"] {
        create_entry(&cell, id, "west").await.unwrap();
    }
    let (context, folder) = (cell.admin_file("context.json").display().to_string(), Folder::new().unwrap());
    let run = |args: &[&str], code: i32, words: &[&str]| {
        let out = ambit(&context, &[&["policy"], args].concat());
        let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
        println!("$ ambit policy {}\n{said}", args.join(" "));
        assert_eq!(out.status.code(), Some(code), "{args:?}: {said}");
        words.iter().for_each(|word| assert!(said.contains(word), "{args:?}: '{word}' is missing in: {said}"));
    };
    let file = folder.path("open.yaml");
    let text = "kind: Policy\nmetadata: {name: web}\nspec: {target: spiffe://west/db, action: allow, \
                from: ['spiffe://west/*'], ports: [80]}\n";
    std::fs::write(&file, text).unwrap();
    let open = file.display().to_string();
    run(&["flows"], 0, &["0 flows"]);
    run(&["plan", "-f", &open], 0, &["3 pairs", "of 0 flows seen in the last day, 0 would be judged otherwise"]);
    run(&["apply", "-f", &open], 0, &["policy web: changed"]);

    // Both ends of one connection tell of it, to two replicas; the third is asked.
    let caller = Agent::open_holding(&cell, 1, me.identity.clone(), &Held::default()).await.unwrap();
    let called = Agent::open_holding(&cell, 2, them.identity.clone(), &Held::default()).await.unwrap();
    let seen = |flows: &[v1::SeenFlow], left_out| Up::Seen(v1::SeenFlows { flows: flows.to_vec(), left_out });
    caller.send(vec![seen(&[flow("web", 80, true, 7), flow("ops", 81, false, 1)], 2)]).await;
    let other_end = v1::SeenFlow { called: true, ..flow("web", 80, true, 5) };
    called.send(vec![seen(&[other_end], 0)]).await;
    let expected = [("ops".to_owned(), 81, false, 1), ("web".to_owned(), 80, true, 7)];
    let begun = std::time::Instant::now();
    while rows(&cell, 3).await.0 != expected {
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", rows(&cell, 3).await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(rows(&cell, 3).await.1.left_out == 2 && rows(&cell, 1).await.0 == expected);
    run(
        &["flows"],
        0,
        &["spiffe://west/web  spiffe://west/db  80    allowed  7", "2 flows", "no room to tell of 2 connections"],
    );
    how_much_of_it_policies_speak_of(&run, &folder);

    // Of what is closed, what was used is shown; what is open to nobody that called is not.
    let used = "of 2 flows seen in the last day, 1 would be judged otherwise";
    let row = "spiffe://west/web  spiffe://west/db  80    denied  7";
    run(&["delete", "web", "--max-flips", "0"], 5, &["error[policy_blast_radius]", used]);
    let shut = folder.path("shut.yaml");
    std::fs::write(&shut, text.replace("ports: [80]", "ports: [8080]")).unwrap();
    run(&["plan", "-f", &shut.display().to_string()], 0, &["3 pairs", row, used]);
    let wide = folder.path("wide.yaml");
    std::fs::write(&wide, text.replace("ports: [80]", "ports: [80, 81]")).unwrap();
    let passes = "spiffe://west/ops  spiffe://west/db  81    allowed  1";
    run(&["plan", "-f", &wide.display().to_string()], 0, &[passes, used]);
    run(&["delete", "web"], 0, &["closes ports of 3 pairs", used]);

    // Of what is no flow nothing is believed, nor of what is not the node's to tell; and its stream goes on.
    let liar = Agent::open_holding(&cell, 2, them.identity.clone(), &Held::default()).await.unwrap();
    liar.send(vec![seen(&[flow("liar", 80, true, 1), flow("web", 0, true, 1)], 0)]).await;
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    let strangers = v1::SeenFlow { destination: "spiffe://east/b".into(), ..flow("nobody", 80, true, 1) };
    liar.send(vec![seen(&[strangers, flow("ops", 82, true, 1)], 0)]).await;
    let expected = [&expected[..1], &[("ops".to_owned(), 82, true, 1)], &expected[1..]].concat();
    let begun = std::time::Instant::now();
    while rows(&cell, 3).await.0 != expected {
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", rows(&cell, 3).await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // A replica that is gone is told, and what only it knew is not: in plans too.
    cell.kill(1).unwrap();
    let (rows, answer) = rows(&cell, 2).await;
    let known = vec![("ops".to_owned(), 82, true, 1), ("web".to_owned(), 80, true, 5)];
    assert_eq!((rows, answer.silent), (known, vec![1]));
    // It may have led the cell, which then has no leader for a moment.
    let begun = std::time::Instant::now();
    let plan = loop {
        let mut registry = PolicyRegistryClient::new(cell.admin(2).await.unwrap());
        match registry.plan(v1::PlanRequest { yaml: text.to_owned(), ..Default::default() }).await {
            Ok(plan) => break plan.into_inner(),
            Err(status) => assert!(begun.elapsed() < Duration::from_secs(20), "{status:?}"),
        }
    };
    assert_eq!((plan.seen_all, plan.seen_flips, plan.seen_silent), (2, 1, vec![1]));
}
