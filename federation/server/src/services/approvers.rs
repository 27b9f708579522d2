//! Approvers, and the acts that take them. What was signed is judged where it is applied, by every replica.

use super::{OrStatus, request_id};
use crate::authorise::Actor;
use crate::replica::Replica;
use ambit_model::Act;
use ambit_proto::{convert, v1};
use ambit_state::{Command, State};
use tonic::{Response, Status};

/// Proposes a change of approvers, and answers with what they are then.
pub(super) async fn perform(
    replica: &Replica,
    actor: Actor,
    id: &[u8],
    act: Act,
    approved: Option<v1::Approved>,
) -> Result<Response<v1::ListApproversResponse>, Status> {
    let id = request_id(id)?;
    let approved = convert::approved(approved).or_status()?;
    let command = Command::Act { act, approved, by: actor.name };
    replica.propose(actor.client, id, command).await.or_status()?.outcome.or_status()?;
    Ok(Response::new(replica.local(listing)))
}

pub(super) fn listing(s: &State) -> v1::ListApproversResponse {
    let approvers = s.approvers().map(|(name, row)| v1::Approver {
        name: name.to_string(),
        key: row.key.to_vec(),
        added_ms: row.added.0,
        added_by: row.added_by.clone(),
    });
    let acts = s.acts().rev().map(|(index, row)| v1::Act {
        index,
        at_ms: row.stamp.0,
        act: row.act.to_string(),
        by: row.by.clone(),
        approved_by: row.approved_by.iter().map(ToString::to_string).collect(),
        event: row.act.event().to_owned(),
    });
    v1::ListApproversResponse { approvers: approvers.collect(), acts: acts.collect() }
}
