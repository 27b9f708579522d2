//! The agent's end of a stream of deltas: what it holds is what the whole slice says, and where it is not, it says so.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use ambit_agent::view::View;
use ambit_model::{Code, Generation, NodeId, Revision};
use ambit_proto::resources::Set;
use ambit_proto::v1;
use ambit_proto::v1::agent_message::Body as Up;
use ambit_proto::v1::server_message::Body as Down;
use std::sync::Arc;
use std::time::Duration;
use support::agent::Agent;
use support::replica::{Replica, Stream};
use support::tpm::Swtpm;
use support::{Cell, allow};
use tokio::sync::mpsc;
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(20);

struct Stage {
    replica: Replica,
    agent: Agent,
    stream: Stream,
    streams: mpsc::Receiver<Stream>,
    _tpm: Swtpm,
}

impl Stage {
    async fn set() -> Stage {
        let tpm = Swtpm::start();
        for log in ["boot_log", "ima_log"] {
            tpm.write(log, &[1; 100]);
        }
        let (replica, mut streams) = Replica::start(Cell::founded("west", 1), tpm.dir.clone()).await;
        let agent = Agent::start(&replica, &tpm);
        let stream = timeout(SOON, streams.recv()).await.expect("a stream").unwrap();
        Stage { replica, agent, stream, streams, _tpm: tpm }
    }

    /// A slice with policies of these names.
    fn slice(&self, names: &[&str]) -> v1::Slice {
        let policy = |name: &&str| allow(name, "spiffe://west/db", "spiffe://west/web", &[80]);
        let slice = self.replica.with_cell(|cell| cell.slice(0, &[]));
        v1::Slice { policies: names.iter().map(policy).collect(), ..slice }
    }

    async fn send(&self, parts: Vec<v1::Delta>) {
        for part in parts {
            self.stream.send(Down::Delta(part)).await;
        }
    }

    async fn view(&mut self, revision: u64) -> Arc<View> {
        let taken = self.agent.desired.wait_for(|v| v.as_ref().is_some_and(|v| v.revision == Revision(revision)));
        timeout(SOON, taken).await.expect("the view is made").unwrap().clone().unwrap()
    }

    /// The next refusal of the agent.
    async fn nack(&mut self) -> v1::Nack {
        loop {
            if let Up::Nack(nack) = self.stream.next().await {
                return nack;
            }
        }
    }
}

fn names(view: &View) -> Vec<String> {
    view.policies.iter().map(|(_, policy)| policy.name.to_string()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deltas_make_the_view_that_the_whole_slice_would_and_a_broken_one_is_asked_for_anew() {
    let mut stage = Stage::set().await;
    assert!(stage.stream.hello.deltas && stage.stream.hello.have_digest.is_empty(), "it holds nothing yet");
    let (a, b) = (stage.slice(&["p1", "p2"]), stage.slice(&["p2", "p3"]));
    let (set_a, set_b) = (Set::from(&a), Set::from(&b));
    // It answers who asks for a connection, also one that it does not know.
    assert!(stage.stream.hello.finds);
    stage.stream.send(Down::Find(v1::FindConnection { ask: 77, id: "0a".repeat(16) })).await;
    let found = loop {
        if let Up::Found(found) = stage.stream.next().await {
            break found;
        }
    };
    assert_eq!((found.ask, found.judged), (77, vec![]));
    stage.send(set_a.delta(None, 5, 0)).await;
    assert_eq!(names(&*stage.view(5).await), ["p1", "p2"]);
    stage.send(set_b.delta(Some(&set_a), 6, 0)).await;
    let by_delta = stage.view(6).await;
    let whole = stage.replica.with_cell(|cell| cell.view(v1::Slice { revision: 6, stamp_ms: 0, ..b.clone() }));
    assert_eq!((&by_delta.policies, by_delta.rules.len()), (&whole.policies, whole.rules.len()));
    let rest = |v: &View| format!("{:?} {:?} {:?} {:?} {:?}", v.revision, v.stamp, v.own, v.foreign, v.denials);
    assert_eq!(rest(&by_delta), rest(&whole));

    // The wrong digest; what was made of it is in no view.
    let wrong = set_a.delta(Some(&set_b), 7, 0).into_iter().map(|part| v1::Delta { digest: vec![3; 32], ..part });
    stage.send(wrong.collect()).await;
    let nack = stage.nack().await;
    assert!(nack.lost && nack.revision == 7 && nack.reason.starts_with("bad_request"), "{nack:?}");
    // What was on its way meanwhile is over what is lost.
    stage.send(set_b.delta(Some(&set_a), 8, 0)).await;
    stage.send(set_a.delta(None, 9, 0)).await;
    assert_eq!(names(&*stage.view(9).await), ["p1", "p2"]);

    // Older than what is held, from a replica that lags behind: dropped (I7). What follows is over something else then.
    stage.send(set_b.delta(None, 8, 0)).await;
    stage.send(set_a.delta(Some(&set_b), 10, 0)).await;
    assert!(stage.nack().await.lost && names(&*stage.view(9).await) == ["p1", "p2"]);
    stage.send(set_b.delta(None, 10, 0)).await;
    assert_eq!(names(&*stage.view(10).await), ["p2", "p3"]);

    // A slice that cannot be read is refused, and asking for it again would not help: what is held is held.
    let bad = v1::Slice { cluster: "east".into(), ..b.clone() };
    stage.send(Set::from(&bad).delta(Some(&set_b), 11, 0)).await;
    let nack = stage.nack().await;
    assert!(!nack.lost && nack.revision == 11, "{nack:?}");
    stage.send(set_a.delta(Some(&Set::from(&bad)), 12, 0)).await;
    assert_eq!(names(&*stage.view(12).await), ["p1", "p2"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whom_to_refuse_is_in_force_before_the_rest_and_a_new_stream_begins_with_what_is_held() {
    let mut stage = Stage::set().await;
    let a = stage.slice(&["p1"]);
    let set = Set::from(&a);
    stage.send(set.delta(None, 5, 0)).await;
    stage.view(5).await;
    let denied = v1::NodeDenial { trust_domain: "west".into(), node: "cd".repeat(32), generation: 3 };
    let next = Set::from(&v1::Slice { denials: vec![denied.clone()], ..stage.slice(&["p2"]) });
    let early = set.with_denials_of(&next);
    let ahead = early.delta(Some(&set), 6, 0).into_iter().map(|part| v1::Delta { denials_only: true, ..part });
    stage.send(ahead.collect()).await;
    let denies = |lane: &ambit_agent::denials::Lane| {
        lane.now().lists(&"west".parse().unwrap(), &NodeId([0xcd; 32]), Generation(3))
    };
    let lane = stage.agent.denials.clone();
    timeout(SOON, lane.until(|_| denies(&lane))).await.expect("denied at once");
    assert_eq!(stage.agent.desired.borrow().as_ref().unwrap().revision, Revision(5), "the rest is to come");
    assert_eq!(names(&*stage.view(5).await), ["p1"]);

    // Half of a delta, then the end of the stream: what is held is what was whole.
    let half: Vec<_> = next.delta(Some(&early), 7, 0).into_iter().map(|p| v1::Delta { more: true, ..p }).collect();
    stage.send(half).await;
    stage.stream.send(Down::Heartbeat(v1::Heartbeat { revision: 4, ..v1::Heartbeat::default() })).await;
    // Read it must be before the stream ends: an agent that has something to say may find that first.
    let also = v1::NodeDenial { trust_domain: "west".into(), node: "ef".repeat(32), generation: 1 };
    let list = v1::Denials { revision: 6, denials: vec![denied.clone(), also], ..v1::Denials::default() };
    stage.stream.send(Down::Denials(list)).await;
    let also = |lane: &ambit_agent::denials::Lane| {
        lane.now().lists(&"west".parse().unwrap(), &NodeId([0xef; 32]), Generation(1))
    };
    timeout(SOON, lane.until(|_| also(&lane))).await.expect("what was sent is read");
    let Stage { replica, agent, stream, mut streams, _tpm } = stage;
    stream.end(Code::Unavailable).await;
    let stream = timeout(SOON, streams.recv()).await.expect("a new stream").unwrap();
    assert_eq!((stream.hello.have_revision, stream.hello.have_digest.clone()), (6, early.digest().to_vec()));
    assert_eq!(stream.hello.holds_revision, 4, "as the last heartbeat said");
    let mut stage = Stage { replica, agent, stream, streams, _tpm };
    stage.send(next.delta(Some(&early), 7, 0)).await;
    assert_eq!(names(&*stage.view(7).await), ["p2"]);
    // Nothing changed at all, which is said all the same: it is of a later revision now.
    stage.send(next.delta(Some(&next), 8, 0)).await;
    assert_eq!(names(&*stage.view(8).await), ["p2"]);
}
