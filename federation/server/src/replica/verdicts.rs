//! Good verdicts of rounds on their way into the log, many to one entry: while one batch is committed, the next gathers.

use super::Replica;
use ambit_model::{Code, Refusal};
use ambit_state::command::RoundVerdict;
use ambit_state::{Command, Reply};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// Verdicts waiting; with more, a round answers `busy` and is asked again.
const QUEUE: usize = 4_096;
/// Verdicts in one entry.
const BATCH_MAX: usize = 1_024;
/// A lone verdict waits this long for company: small against the seconds between two rounds of a node. An entry costs the
/// leader as much as thirty verdicts in it.
const GATHER: Duration = Duration::from_millis(500);

/// What waits to be committed.
pub type Queue = mpsc::Receiver<Waiting>;

type Waiting = (RoundVerdict, oneshot::Sender<Result<(), Refusal>>);

/// Where rounds hand in their verdicts.
#[derive(Clone)]
pub struct Verdicts {
    queue: mpsc::Sender<Waiting>,
}

impl Verdicts {
    /// The handle, and what [`run`] takes.
    pub fn new() -> (Verdicts, Queue) {
        let (queue, waiting) = mpsc::channel(QUEUE);
        (Verdicts { queue }, waiting)
    }

    /// Returns once the verdict is committed and applied, or says why it does not count.
    pub async fn put(&self, verdict: RoundVerdict) -> Result<(), Refusal> {
        let (tell, told) = oneshot::channel();
        let busy = |_| Refusal::new(Code::Busy, format!("at most {QUEUE} verdicts waiting"), "more");
        self.queue.try_send((verdict, tell)).map_err(busy)?;
        told.await.map_err(|_| Refusal::new(Code::Unavailable, "a running replica", "it is ending"))?
    }
}

/// Commits what gathers, until every handle is gone.
pub async fn run(replica: Replica, mut waiting: Queue) {
    let mut batch = Vec::new();
    while waiting.recv_many(&mut batch, BATCH_MAX).await > 0 {
        tokio::time::sleep(GATHER).await;
        while batch.len() < BATCH_MAX {
            let Ok(one) = waiting.try_recv() else { break };
            batch.push(one);
        }
        let (verdicts, tell): (Vec<_>, Vec<_>) = batch.drain(..).unzip();
        let outcome = match replica.propose_own(Command::PutVerdicts(verdicts)).await {
            Ok(applied) => applied.outcome,
            Err(refusal) => Err(refusal),
        };
        match outcome {
            Ok(Reply::Items(items)) if items.len() == tell.len() => {
                for (tell, item) in tell.into_iter().zip(items) {
                    let _ = tell.send(item);
                }
            }
            Ok(_) => tracing::error!("verdicts answered with something else"),
            Err(refusal) => {
                for tell in tell {
                    let _ = tell.send(Err(refusal.clone()));
                }
            }
        }
    }
}
