//! How one connection was judged: remembered by the nodes at its ends, asked of any replica, and shown beside what is judged now.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_proto::resources::Held;
use ambit_proto::v1;
use ambit_proto::v1::agent_message::Body as Up;
use ambit_tests::agent::Agent;
use ambit_tests::cell::Cell;
use ambit_tests::contexts::ambit;
use ambit_tests::machine::{Machine, register_cluster};
use ambit_tests::operator::{admit, create_entry};
use ambit_tests::process::Folder;
use ambit_tests::tpm::Maker;
use std::time::{Duration, Instant};

const ID: &str = "0af7651916cd43dd8448eb211c80319c";
const ASK: [&str; 3] = ["explain", "spiffe://west/web", "spiffe://west/db:80"];

fn row(place: &str, source: &str, destination: &str, flags: &str) -> v1::JudgedConnection {
    v1::JudgedConnection {
        place: place.into(),
        at_ms: 1_795_442_606_000,
        revision: 7,
        source: source.into(),
        destination: destination.into(),
        address: "10.71.101.12:80".into(),
        port: 80,
        allowed: true,
        rule: "west/web".into(),
        reason: "allowed by policy".into(),
        flags: flags.into(),
        ..Default::default()
    }
}

/// An agent of ours at replica `n` that remembers these under [`ID`], and says so until it is dropped.
async fn remembers(
    cell: &Cell,
    n: usize,
    me: &ambit_tests::agent::Admitted,
    rows: Vec<v1::JudgedConnection>,
) -> tokio::task::JoinHandle<()> {
    let mut agent = Agent::open_holding(cell, n, me.identity.clone(), &Held::default()).await.unwrap();
    tokio::spawn(async move {
        while let Ok(find) = agent.find().await {
            let judged = if find.id == ID { rows.clone() } else { vec![] };
            agent.send(vec![Up::Found(v1::FoundConnection { ask: find.ask, judged })]).await;
        }
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_both_ends_remember_is_asked_of_any_replica() {
    let mut cell = Cell::start("west", 3).await.unwrap();
    let maker = Maker::new().unwrap();
    let (machine, other) = (Machine::new(&maker, "a").await.unwrap(), Machine::new(&maker, "b").await.unwrap());
    register_cluster(&cell, "west", &maker).await.unwrap();
    let me = admit(&cell, &machine, "west").await.unwrap();
    let them = admit(&cell, &other, "west").await.unwrap();
    for id in ["db", "web"] {
        create_entry(&cell, id, "west").await.unwrap();
    }
    let (context, folder) = (cell.admin_file("context.json").display().to_string(), Folder::new().unwrap());
    let run = |args: &[&str], code: i32, words: &[&str], not: &[&str]| {
        let begun = Instant::now();
        let out = ambit(&context, args);
        let said = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
        println!("$ ambit {} ({:?})\n{said}", args.join(" "), begun.elapsed());
        assert_eq!(out.status.code(), Some(code), "{args:?}: {said}");
        words.iter().for_each(|word| assert!(said.contains(word), "{args:?}: '{word}' is missing in: {said}"));
        not.iter().for_each(|word| assert!(!said.contains(word), "{args:?}: '{word}' is in: {said}"));
    };
    let ask = |id: &str, code: i32, words: &[&str], not: &[&str]| {
        run(&[&ASK[..], &["--connection", id]].concat(), code, words, not);
    };
    let file = folder.path("open.yaml");
    let text = "kind: Policy\nmetadata: {name: web}\nspec: {target: spiffe://west/db, action: allow, \
                from: ['spiffe://west/web'], ports: [80]}\n";
    std::fs::write(&file, text).unwrap();
    run(&["policy", "apply", "-f", &file.display().to_string()], 0, &["policy web: changed"], &[]);

    // Nobody is here to ask; then the caller's node alone, at one replica, and the command asks any.
    let (mine, theirs) = (machine.node(), other.node());
    let nobody = "none among the last ones of 0 nodes; 2 did not answer";
    ask(ID, 1, &["error[not_found]", ID, nobody], &[]);
    let (web, db) = ("spiffe://west/web", "spiffe://west/db");
    let _caller = remembers(&cell, 1, &me, vec![row("calling", web, db, "-")]).await;
    let calling = format!(
        "calling:   allowed at 2026-11-23T14:03:26Z, node {}, revision 7: west/web, allowed by policy",
        &mine[..12]
    );
    let silent = format!("silent:    no answer from node {}", &theirs[..12]);
    ask(ID, 0, &["allowed: spiffe://west/web", &calling, "; ended -", &silent], &["called:", "changed"]);

    // Both ends, at two replicas. What is not the node's to tell, and what is no text, is not told.
    let lies = vec![
        row("called", web, db, ""),
        row("called", "spiffe://east/x", "spiffe://east/y", ""),
        row("\u{1b}[2J", web, db, ""),
    ];
    let _called = remembers(&cell, 2, &them, lies).await;
    let called = format!("called:    allowed at 2026-11-23T14:03:26Z, node {}", &theirs[..12]);
    let trace = format!("00-{ID}-b7ad6b7169203331-01");
    for id in [ID, &trace] {
        ask(
            id,
            0,
            &["allowed: spiffe://west/web", &calling, &called],
            &["silent", "spiffe://east", "changed", "\u{1b}"],
        );
    }
    run(
        &[&["-o", "json"], &ASK[..], &["--connection", ID]].concat(),
        0,
        &["\"connection\"", "\"flags\": \"-\"", &mine],
        &[],
    );
    // Another connection has that id, or none has; and what is no id.
    let meant = format!("a connection {ID} of spiffe://west/web to spiffe://west/db:81");
    let asked = ["explain", "spiffe://west/web", "spiffe://west/db:81", "--connection", ID];
    run(&asked, 2, &["error[bad_request]", &meant, "one of spiffe://west/web to spiffe://west/db, port 80"], &[]);
    ask(&"0b".repeat(16), 1, &["error[not_found]", "none among the last ones of 2 nodes; 0 did not answer"], &[]);
    ask("0af7", 2, &["error[bad_request]", "an id of 32 hexadecimal digits"], &[]);

    // What changed since is shown.
    run(&["policy", "delete", "web"], 0, &[], &[]);
    let changed = "changed since revision 7: denied now, by denied by default: no policy allows it";
    ask(ID, 0, &["denied: spiffe://west/web", &calling, &called, changed], &[]);

    // An agent that says nothing, and a replica that is gone, are waited for a moment, and named.
    let _mute = Agent::open_holding(&cell, 2, them.identity.clone(), &Held::default()).await.unwrap();
    let begun = Instant::now();
    ask(ID, 0, &[&calling, &silent], &["called:"]);
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    let gone = if cell.leader().await.unwrap() == 3 { 2 } else { 3 };
    cell.kill(gone).unwrap();
    ask(ID, 0, &[&calling, &format!("no answer from replica {gone}, nor its nodes")], &[]);
}
