//! Proposals on their way to the leader. What comes while calls are under way shares the next: a call costs more than
//! the proposals in it.

use super::peers::Connections;
use super::transport;
use ambit_model::{Code, Refusal, ReplicaId};
use ambit_proto::v1::ProposeRequest;
use futures::stream::{FuturesUnordered, StreamExt};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use tokio::sync::{mpsc, oneshot};

/// Calls under way at once: the leader answers between two of its syncs, and the second call is there for the next.
const CALLS_MAX: usize = 2;
/// Proposals in one call.
pub(super) const PROPOSALS_MAX: usize = 256;
/// A call takes no further proposal once it carries this much.
const CALL_BYTES: usize = 1024 * 1024;
/// Proposals that wait for a call; callers wait for room, and are bounded by their permits.
const WAITING_MAX: usize = 256;

/// One encoded entry, and who wants to know in which term it was appended.
struct Waiting {
    command: Vec<u8>,
    answer: oneshot::Sender<Result<u64, Refusal>>,
}

/// The ways to all leaders there were; one task each, which ends with this.
pub(super) struct Forwarder {
    connections: Connections,
    lanes: Mutex<HashMap<ReplicaId, mpsc::Sender<Waiting>>>,
}

impl Forwarder {
    pub(super) fn new(connections: Connections) -> Self {
        Self { connections, lanes: Mutex::default() }
    }

    /// Asks `leader` to append an encoded entry; the term in which it did.
    pub(super) async fn propose(&self, leader: ReplicaId, command: Vec<u8>) -> Result<u64, Refusal> {
        let (answer, outcome) = oneshot::channel();
        let gone = || Refusal::new(Code::Unavailable, "a way to the leader", format!("none to replica {leader}"));
        self.lane(leader).send(Waiting { command, answer }).await.map_err(|_| gone())?;
        outcome.await.map_err(|_| gone())?
    }

    fn lane(&self, leader: ReplicaId) -> mpsc::Sender<Waiting> {
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        let lane = lanes.entry(leader).or_insert_with(|| {
            let (sender, waiting) = mpsc::channel(WAITING_MAX);
            tokio::spawn(carry(self.connections.clone(), leader, waiting));
            sender
        });
        lane.clone()
    }
}

/// Calls until the cell is gone.
async fn carry(connections: Connections, leader: ReplicaId, mut waiting: mpsc::Receiver<Waiting>) {
    let mut calls = FuturesUnordered::new();
    loop {
        tokio::select! {
            first = waiting.recv(), if calls.len() < CALLS_MAX => {
                let Some(first) = first else { return };
                let (commands, answers) = gather(first, &mut waiting);
                if !commands.is_empty() {
                    calls.push(call(&connections, leader, commands, answers));
                }
            }
            Some(()) = calls.next(), if !calls.is_empty() => {}
        }
    }
}

type Answers = Vec<oneshot::Sender<Result<u64, Refusal>>>;

/// All that wait already, up to what one call takes; not those whose callers have given up.
fn gather(first: Waiting, waiting: &mut mpsc::Receiver<Waiting>) -> (Vec<Vec<u8>>, Answers) {
    let (mut commands, mut answers, mut size) = (Vec::new(), Vec::new(), 0);
    let mut next = Some(first);
    while let Some(Waiting { command, answer }) = next.take() {
        if !answer.is_closed() {
            size += command.len();
            commands.push(command);
            answers.push(answer);
        }
        if size < CALL_BYTES && commands.len() < PROPOSALS_MAX {
            next = waiting.try_recv().ok();
        }
    }
    (commands, answers)
}

async fn call(connections: &Connections, leader: ReplicaId, commands: Vec<Vec<u8>>, answers: Answers) {
    match transport::forward(connections, leader, ProposeRequest { commands, change: None }).await {
        Ok(outcomes) => {
            for (answer, outcome) in answers.into_iter().zip(outcomes) {
                let _ = answer.send(outcome);
            }
        }
        Err(refusal) => {
            for answer in answers {
                let _ = answer.send(Err(refusal.clone()));
            }
        }
    }
}
