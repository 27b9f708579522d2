//! What an agent does while another one of its node takes over: real enrolments by a software TPM, a cell that the test plays.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use ambit_agent::takeover::Heard;
use ambit_agent::view::View;
use ambit_proto::v1;
use ambit_proto::v1::server_message::Body as Down;
use std::sync::Arc;
use std::time::Duration;
use support::Cell;
use support::agent::Agent;
use support::replica::Replica;
use support::tpm::Swtpm;
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(20);

/// While another agent takes over this node's admissions are that one's; the stream is this one's until what that one passes on
/// is heard.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_is_succeeded_asks_nothing_and_follows_the_successor() {
    let tpm = Swtpm::start();
    let (replica, mut streams) = Replica::start(Cell::founded("west", 1), tpm.dir.clone()).await;
    let mut agent = Agent::start(&replica, &tpm);
    let first = timeout(SOON, streams.recv()).await.expect("a stream").unwrap();
    first.beat().await;
    let asked = replica.begun().len();
    agent.successor.begin();
    let own = replica.with_cell(|cell| cell.slice(4, &[]));
    first.send(Down::Slice(own)).await;
    let is = |view: &Option<Arc<View>>| view.as_ref().is_some_and(|v| v.revision.0 == 4);
    timeout(SOON, agent.desired.wait_for(is)).await.expect("a slice on its own stream").unwrap();
    let slice = replica.with_cell(|cell| cell.slice(5, &[]));
    agent.successor.tell(Heard::Cell(Box::new(Down::Slice(slice)))).await.unwrap();
    let is = |view: &Option<Arc<View>>| view.as_ref().is_some_and(|v| v.revision.0 == 5);
    timeout(SOON, agent.desired.wait_for(is)).await.expect("its slice").unwrap();
    let denials = vec![v1::NodeDenial { node: "ab".repeat(32), generation: 1, trust_domain: "west".into() }];
    let list = v1::Denials { revision: 6, stamp_ms: support::now().0, denials, ..Default::default() };
    agent.successor.tell(Heard::Cell(Box::new(Down::Denials(list)))).await.unwrap();
    timeout(SOON, agent.denials.until(|denials| denials.revision().0 == 6)).await.expect("whom to refuse");
    for out in [true, false] {
        agent.successor.tell(Heard::Out(out)).await.unwrap();
        timeout(SOON, agent.denials.until(|denials| denials.is_out() == out)).await.expect("whether the node is out");
    }
    assert!(timeout(Duration::from_secs(2), streams.recv()).await.is_err(), "no stream meanwhile");
    assert_eq!(replica.begun().len(), asked, "and no enrolment");
    agent.successor.end();
    let again = timeout(SOON, streams.recv()).await.expect("a stream").unwrap();
    assert_eq!(again.generation, first.generation);
}

/// An admission that came behind the successor's would end that one's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_enrolment_under_way_gives_way_to_a_successor() {
    let tpm = Swtpm::start();
    let (replica, mut streams) = Replica::start(Cell::founded("west", 1), tpm.dir.clone()).await;
    let agent = Agent::start(&replica, &tpm);
    let begun = async {
        while replica.begun().is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(SOON, begun).await.expect("an enrolment");
    agent.successor.begin();
    assert!(timeout(Duration::from_secs(4), streams.recv()).await.is_err(), "it went on");
    assert_eq!(replica.begun().len(), 1);
    agent.successor.end();
    timeout(SOON, streams.recv()).await.expect("a stream").unwrap();
    assert_eq!(replica.begun().len(), 2, "from the beginning");
}
