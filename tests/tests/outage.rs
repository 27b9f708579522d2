//! Enrolment and trust across the death of replicas (Proof 5 of the issue, I22): nothing is admitted twice, no leaf is
//! lost for good, and an outage of the cell cuts no honest node.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_model::Code;
use ambit_model::refusal::Class;
use ambit_proto::status::from_status;
use ambit_proto::v1;
use ambit_tests::agent::{Admitted, Attending};
use ambit_tests::cell::Cell;
use ambit_tests::machine::{Answer, Lies, Machine, evidence, explain, join_token, register_cluster};
use ambit_tests::operator::{nodes, within};
use ambit_tests::process::must_run;
use ambit_tests::table::row;
use ambit_tests::tpm::Maker;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Sends evidence to the replicas that run, one after the other, until one of them judges it.
async fn insist(cell: &Cell, answer: &Answer) -> Result<v1::Verdict, v1::Denied> {
    let mut turn = 0;
    within("a replica that judges", async || {
        let running = cell.running();
        let at = running[turn % running.len()];
        turn += 1;
        match evidence(cell.anonymous(at).await.ok()?, &answer.frames).await {
            Ok(judged) => Some(judged),
            Err(status) => {
                let refusal = from_status(&status);
                assert_eq!(refusal.code.class(), Class::Unavailable, "{refusal}");
                None
            }
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_leader_dies_between_challenge_and_evidence() {
    let mut cell = Cell::start("west", 3).await.unwrap();
    let maker = Maker::new().unwrap();
    let machine = Machine::new(&maker, "n1").await.unwrap();
    register_cluster(&cell, "west", &maker).await.unwrap();
    let token = join_token(&cell, "west").await.unwrap();

    // The leader itself makes the challenge, and takes the ticket key in its memory along.
    let leader = cell.leader().await.unwrap();
    let begun = machine.begin(cell.anonymous(leader).await.unwrap(), "west", &token).await.unwrap().unwrap();
    let answer = machine.answer(&begun, &Lies::default()).await.unwrap();
    cell.kill(leader).unwrap();
    let verdict = insist(&cell, &answer).await.unwrap();
    assert_eq!((verdict.node_id.as_str(), verdict.generation), (machine.node().as_str(), 1));

    cell.restart(leader).unwrap();
    cell.wait_for_voters().await.unwrap();
    for replica in 1..=3 {
        let again = evidence(cell.anonymous(replica).await.unwrap(), &answer.frames).await.unwrap();
        assert_eq!(again.unwrap_err().code, "nonce_consumed", "replica {replica}");
        let listed = nodes(&cell, replica).await.unwrap();
        assert_eq!((listed.len(), listed[0].generation), (1, 1), "replica {replica}");
    }
    row(3, "evidence for a challenge of a leader that died", "accepted, once").unwrap();
}

fn signal(process: u32, name: &str) {
    must_run(&["kill", "-s", name, &process.to_string()]).unwrap();
}

/// Bytes that came for whoever listens at `at` and were not read.
fn unread(at: SocketAddr) -> u64 {
    let port = format!(":{:04X}", at.port());
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let established = table.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        // Local address, state (01: established), queues, inode (0: not accepted yet).
        let [local, state, queues, inode] = [1, 3, 4, 9].map(|n| fields.get(n).copied().unwrap_or_default());
        let ours = local.ends_with(&port) && state == "01" && inode != "0";
        ours.then(|| u64::from_str_radix(queues.split(':').nth(1).unwrap_or("0"), 16).unwrap())
    });
    established.sum()
}

/// Longer than any pause of the leader here, so that nobody takes its place.
const ELECTION_MS: u64 = 5_000;
/// An admission is more than this on the wire; an acknowledgement is less.
const ADMISSION_BYTES: u64 = 1_000;
/// As long as nothing more arrived for this long, all that was sent has arrived.
const SETTLED: Duration = Duration::from_millis(150);

/// A follower is frozen once its admission is on its way to the leader, which sleeps: so the cell commits it, and the one
/// replica that may sign for it never hears of that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_dies_between_commit_and_signature() {
    let mut cell = Cell::patient("west", 3, ELECTION_MS).await.unwrap();
    let maker = Maker::new().unwrap();
    let machine = Machine::new(&maker, "n1").await.unwrap();
    register_cluster(&cell, "west", &maker).await.unwrap();
    let token = join_token(&cell, "west").await.unwrap();
    let leader = cell.leader().await.unwrap();
    let [signer, third] = [1, 2, 3].into_iter().filter(|n| *n != leader).collect::<Vec<_>>()[..] else { panic!() };

    let begun = machine.begin(cell.anonymous(signer).await.unwrap(), "west", &token).await.unwrap().unwrap();
    let answer = machine.answer(&begun, &Lies::default()).await.unwrap();
    let (leading, signing) = (cell.process(leader).unwrap().id(), cell.process(signer).unwrap().id());
    let channel = cell.anonymous(signer).await.unwrap();
    signal(leading, "STOP");
    let at = cell.address(leader).unwrap();
    let before = unread(at);
    let frames = answer.frames.clone();
    let call = tokio::spawn(async move { evidence(channel, &frames).await });
    let mut seen = (before, Instant::now());
    within("the admission on its way", async || {
        let now = unread(at);
        if now != seen.0 {
            seen = (now, Instant::now());
        }
        (now >= before + ADMISSION_BYTES && seen.1.elapsed() > SETTLED).then_some(())
    })
    .await;
    signal(signing, "STOP");
    signal(leading, "CONT");
    let committed =
        within("the admission in the state of the third replica", async || nodes(&cell, third).await?.pop()).await;
    assert_eq!((committed.id.as_str(), committed.generation), (machine.node().as_str(), 1));
    assert!(!call.is_finished(), "the replica answered before it was frozen");
    cell.kill(signer).unwrap();
    assert_eq!(from_status(&call.await.unwrap().unwrap_err()).code.class(), Class::Unavailable);

    // No other replica signs for that nonce. The node begins again, known by now: its token is not asked for.
    assert_eq!(insist(&cell, &answer).await.unwrap_err().code, "nonce_consumed");
    let (verdict, _) = machine.enrol(&cell, third, "west", "", &Lies::default()).await.unwrap().unwrap();
    assert_eq!(verdict.generation, 2);
    // The one that died comes back without signing anything.
    cell.restart(signer).unwrap();
    cell.wait_for_voters().await.unwrap();
    assert_eq!(insist(&cell, &answer).await.unwrap_err().code, "nonce_consumed");
    for replica in 1..=3 {
        let listed = nodes(&cell, replica).await.unwrap();
        assert_eq!((listed.len(), listed[0].generation), (1, 2), "replica {replica}");
    }
}

/// Eight rounds' time; a node that did not answer for three is late.
const OUTAGE: Duration = Duration::from_secs(8);
const NODES: usize = 2;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cell_without_quorum_cuts_no_node() {
    let mut cell = Cell::start("west", 3).await.unwrap();
    let maker = Maker::new().unwrap();
    let mut attending = Vec::new();
    for n in 0..NODES {
        let machine = Machine::new(&maker, &format!("n{n}")).await.unwrap();
        if n == 0 {
            register_cluster(&cell, "west", &maker).await.unwrap();
        }
        let token = join_token(&cell, "west").await.unwrap();
        let (verdict, answer) = machine.enrol(&cell, 1, "west", &token, &Lies::default()).await.unwrap().unwrap();
        let me = Admitted::by(&verdict, &answer, "west").unwrap();
        attending.push((machine.node(), Attending::start(&cell, Arc::new(machine), me).unwrap()));
    }
    let verdicts = |listed: &[v1::Node]| listed.iter().map(|n| n.last_verdict_ms).collect::<Vec<_>>();
    let first = nodes(&cell, 1).await.unwrap();
    let rounds_since = async |cell: &Cell, before: &[v1::Node]| {
        let before = verdicts(before);
        within("a round of every node", async || {
            let listed = nodes(cell, 1).await?;
            assert!(listed.iter().all(|n| n.state == "admitted"), "{listed:?}");
            verdicts(&listed).iter().zip(&before).all(|(now, then)| now > then).then_some(listed)
        })
        .await
    };
    let attested = rounds_since(&cell, &first).await;

    cell.kill(2).unwrap();
    cell.kill(3).unwrap();
    let lost = Instant::now();
    while lost.elapsed() < OUTAGE {
        // The one that is left decides nothing, and says so.
        if let Some(listed) = nodes(&cell, 1).await {
            assert!(lost.elapsed() < OUTAGE / 2, "a cell without quorum still answers: {listed:?}");
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    cell.restart(2).unwrap();
    cell.restart(3).unwrap();
    let healed = within("a quorum", async || nodes(&cell, 1).await).await;
    for node in &healed {
        assert_eq!((node.state.as_str(), node.code.as_str(), node.late), ("admitted", "", false), "{node:?}");
    }
    let after = rounds_since(&cell, &attested).await;
    for node in rounds_since(&cell, &after).await {
        assert_eq!((node.generation, node.late), (1, false), "{node:?}");
    }
    for (node, agent) in &attending {
        assert!(explain(&cell, 1, node).await.unwrap().denials.is_empty(), "{node}");
        let told: Vec<Code> = agent.said().iter().map(|r| r.code).collect();
        assert!(told.iter().all(|code| code.class() == Class::Unavailable), "{node} was told {told:?}");
    }
}
