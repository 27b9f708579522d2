//! What becomes of a node that its cell refuses, and of one that is let in again: real enrolments by a software TPM.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use ambit_agent::metrics::METRICS;
use ambit_model::Code;
use std::time::{Duration, Instant};
use support::Cell;
use support::agent::Agent;
use support::replica::Replica;
use support::tpm::Swtpm;
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(20);

fn shows(line: &str) -> bool {
    METRICS.page().lines().any(|l| l == line)
}

async fn soon(what: &str, is: impl Fn() -> bool) {
    let until = Instant::now() + SOON;
    while !is() {
        assert!(Instant::now() < until, "never: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// One test: the figures are the process's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_node_opens_nothing_asks_again_and_resumes_when_it_is_let_in() {
    let tpm = Swtpm::start();
    let (replica, mut streams) = Replica::start(Cell::founded("west", 1), tpm.dir.clone()).await;
    let agent = Agent::start(&replica, &tpm);
    let mut next = async || timeout(SOON, streams.recv()).await.expect("a stream").unwrap();
    let first = next().await;
    first.beat().await;
    assert!(shows("ambit_agent_trusted{code=\"ok\"} 1"));

    // One word of one replica, which may lag behind: the next stream goes on as the same admission.
    let generation = first.generation;
    first.end(Code::NodeUntrusted).await;
    let second = next().await;
    second.beat().await;
    assert_eq!((second.generation, replica.begun().len()), (generation, 1));
    assert!(!agent.denials.now().is_out());

    // Late is no verdict: nothing is cut, but only an enrolment helps.
    replica.refuse(Some(Code::NodeLate));
    second.end(Code::NodeLate).await;
    soon("it enrols again by itself", || replica.begun().len() >= 2).await;
    assert!(!agent.denials.now().is_out());
    replica.refuse(None);
    let third = next().await;
    assert!(third.generation > generation);

    // Quarantined: told on the stream and at every attempt to enrol.
    let generation = third.generation;
    replica.refuse(Some(Code::NodeQuarantined));
    let begun = Instant::now();
    third.end(Code::NodeQuarantined).await;
    timeout(Duration::from_secs(3), agent.denials.until(|d| d.is_out())).await.expect("nothing may open");
    println!("out {} ms after it was told", begun.elapsed().as_millis());
    soon("figures", || shows("ambit_agent_trusted{code=\"node_quarantined\"} 0")).await;
    assert!(!METRICS.page().contains("ambit_agent_trusted{code=\"ok\"}"));
    let asked = replica.begun().len();
    soon("it goes on asking", || replica.begun().len() >= asked + 3).await;
    assert!(!agent.membership.is_finished() && agent.denials.now().is_out());
    let waits: Vec<_> = replica.begun()[asked..].windows(2).map(|w| w[1] - w[0]).collect();
    assert!(waits.iter().all(|w| *w >= Duration::from_millis(400) && *w < Duration::from_secs(11)), "{waits:?}");

    // Released: within the longest wait there is a stream of a new generation.
    let begun = Instant::now();
    replica.refuse(None);
    let fourth = next().await;
    println!("back {} ms after the release", begun.elapsed().as_millis());
    assert!(fourth.generation > generation && begun.elapsed() < Duration::from_secs(13));
    assert!(!agent.denials.now().is_out() && shows("ambit_agent_trusted{code=\"ok\"} 1"));
}

/// The first enrolment is another matter: whoever started the agent is told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_never_enrolled_ends_with_the_denial() {
    let tpm = Swtpm::start();
    let (replica, _streams) = Replica::start(Cell::founded("west", 1), tpm.dir.clone()).await;
    replica.refuse(Some(Code::EkNotExpected));
    let agent = Agent::start(&replica, &tpm);
    let denied = timeout(SOON, agent.membership).await.expect("an end").unwrap();
    assert_eq!(denied.refusal.code, Code::EkNotExpected);
}
