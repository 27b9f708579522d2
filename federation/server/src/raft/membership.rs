//! Changes of membership and leadership: found satisfied or made so, one replica at a time (I16).

use super::cell::Cell;
use super::core::{Input, Rejected};
use super::engine::Request;
use super::transport::{self, change_to_wire};
use super::{Role, Status};
use crate::store::Change;
use ambit_model::{Code, Refusal, ReplicaId};
use ambit_proto::v1::ProposeRequest;
use std::time::Duration;
use tokio::sync::oneshot;

/// Between attempts while a learner catches up or another change is on its way.
const RETRY_AFTER: Duration = Duration::from_millis(50);
/// An appended change that did not show by then is asked again; its version makes it void if it took effect.
const APPLY_WAIT: Duration = Duration::from_secs(1);
/// A joiner may have to receive a snapshot first.
const PROMOTE_DEADLINE: Duration = Duration::from_secs(30);

impl Cell {
    /// Lets `id` receive the log. Done already is fine.
    pub async fn add_learner(&self, id: ReplicaId) -> Result<(), Refusal> {
        self.change(Change::AddLearner(id.0), self.options().deadline).await
    }

    /// Gives the learner `id` a vote once it has caught up, for which this waits up to 30 s.
    pub async fn promote(&self, id: ReplicaId) -> Result<(), Refusal> {
        self.change(Change::Promote(id.0), PROMOTE_DEADLINE).await
    }

    /// Takes `id` out of the cell. A leader hands over first. The last voter stays.
    pub async fn remove(&self, id: ReplicaId) -> Result<(), Refusal> {
        self.change(Change::Remove(id.0), self.options().deadline).await
    }

    /// Hands leadership to the voter `to` and waits until it leads.
    pub async fn transfer_leader(&self, to: ReplicaId) -> Result<(), Refusal> {
        let mut status = self.watch_status();
        if !status.borrow().voters.contains(&to) {
            return Err(Refusal::new(Code::BadRequest, "a voter of this cell", format!("replica {to}")));
        }
        let transfer = async {
            loop {
                if status.borrow_and_update().leader == Some(to) {
                    return Ok(());
                }
                self.push(Request::Core(Input::Transfer(to.0)))?;
                let led = tokio::time::timeout(APPLY_WAIT, status.wait_for(|s| s.leader == Some(to))).await;
                if matches!(led, Ok(Err(_))) {
                    return Err(self.stopped());
                }
            }
        };
        match tokio::time::timeout(self.options().deadline, transfer).await {
            Ok(outcome) => outcome,
            Err(_) => Err(self.no_quorum(&format!("leadership did not reach replica {to}"))),
        }
    }

    async fn change(&self, change: Change, deadline: Duration) -> Result<(), Refusal> {
        let mut last = None;
        let outcome = tokio::time::timeout(deadline, async {
            loop {
                self.read_barrier().await?;
                let status = self.status();
                if satisfied(&status, change) {
                    return Ok(());
                }
                possible(&status, change)?;
                if let Change::Remove(id) = change
                    && status.leader == Some(ReplicaId(id))
                    && let Some(other) = status.voters.iter().find(|v| v.0 != id)
                {
                    self.transfer_leader(*other).await?;
                    continue;
                }
                match self.ask_leader(change, &status).await {
                    Ok(()) => {
                        let mut watch = self.watch_status();
                        let shown = watch.wait_for(|s| s.membership_version != status.membership_version);
                        let _ = tokio::time::timeout(APPLY_WAIT, shown).await;
                    }
                    Err(refusal) if matches!(refusal.code, Code::Unavailable | Code::Busy | Code::StaleRevision) => {
                        last = Some(refusal);
                        tokio::time::sleep(RETRY_AFTER).await;
                    }
                    Err(refusal) => return Err(refusal),
                }
            }
        });
        match outcome.await {
            Ok(outcome) => outcome,
            Err(_) => Err(last.unwrap_or_else(|| self.no_quorum("the change of membership was not applied in time"))),
        }
    }

    async fn ask_leader(&self, change: Change, status: &Status) -> Result<(), Refusal> {
        match status.leader {
            Some(_) if status.role == Role::Leader => {
                let (answer, outcome) = oneshot::channel();
                self.push(Request::Change(change, status.membership_version, answer))?;
                match outcome.await {
                    Ok(outcome) => outcome.map(drop).map_err(|r| self.refusal_of(r)),
                    Err(_) => Err(self.stopped()),
                }
            }
            Some(leader) => {
                let wire = Some(change_to_wire(change, status.membership_version));
                let request = ProposeRequest { commands: Vec::new(), change: wire };
                let outcomes = transport::forward(self.connections(), leader, request).await?;
                outcomes.into_iter().next().unwrap_or_else(|| Err(self.stopped())).map(drop)
            }
            None => Err(self.refusal_of(Rejected::NotLeader(None))),
        }
    }
}

fn satisfied(status: &Status, change: Change) -> bool {
    let voter = |id| status.voters.contains(&ReplicaId(id));
    let learner = |id| status.learners.contains(&ReplicaId(id));
    match change {
        Change::AddLearner(id) => voter(id) || learner(id),
        Change::Promote(id) => voter(id),
        Change::Remove(id) => !voter(id) && !learner(id),
    }
}

fn possible(status: &Status, change: Change) -> Result<(), Refusal> {
    match change {
        Change::AddLearner(0) => Err(Refusal::new(Code::BadRequest, "a replica number from 1", "0")),
        Change::Promote(id) if !status.learners.contains(&ReplicaId(id)) => {
            Err(Refusal::new(Code::NotFound, "a learner of this cell", format!("replica {id}")))
        }
        Change::Remove(id) if status.voters == [ReplicaId(id)] => {
            Err(Refusal::new(Code::BadRequest, "a cell that keeps a voter", format!("replica {id}, the last one")))
        }
        _ => Ok(()),
    }
}
