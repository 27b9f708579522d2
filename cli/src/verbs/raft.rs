//! `ambit raft`.

use super::Session;
use crate::args::Raft;
use crate::cell::{Cell, request_id, seconds};
use crate::output::{Answer, Form, Table, pretty};
use crate::when::utc;
use crate::{ask, ask_at};
use ambit_model::{Code, Refusal};
use ambit_proto::v1;
use serde_json::json;

pub(super) async fn run(session: &Session, verb: Raft) -> Result<Answer, Refusal> {
    match verb {
        Raft::Status => {
            let cell = session.cell()?;
            let seen = views(&cell).await;
            if let Some(refusal) = nobody(&seen) {
                return Err(refusal);
            }
            Ok(Answer::ok(table(&seen).render(session.form)))
        }
        Raft::Add { replica, address, ttl } => {
            let (cell, banner) = session.cell_to_change()?;
            let request = v1::CreateReplicaTokenRequest {
                request_id: request_id()?,
                replica,
                address: address.to_string(),
                ttl_seconds: seconds(ttl)?,
            };
            let reply = ask!(cell, Membership.create_replica_token(request))?;
            let text = match session.form {
                Form::Table => reply.token,
                Form::Json => pretty(&json!({"token": reply.token})),
            };
            Ok(Answer::ok(text).note(banner))
        }
        Raft::Remove { replica } => {
            let (cell, banner) = session.cell_to_change()?;
            let request = v1::RemoveVoterRequest { request_id: request_id()?, replica };
            let status = ask!(cell, Membership.remove_voter(request))?;
            Ok(Answer::ok(members(&status).render(session.form)).note(banner))
        }
        Raft::Transfer { to } => {
            let (cell, banner) = session.cell_to_change()?;
            let status = ask!(cell, Membership.transfer_leader(v1::TransferLeaderRequest { to }))?;
            Ok(Answer::ok(members(&status).render(session.form)).note(banner))
        }
        Raft::Snapshot => snapshot(session).await,
    }
}

async fn snapshot(session: &Session) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let mut table = Table::new("snapshot", &["address", "index", "digest", "trouble"]);
    for address in cell.context().addresses.clone() {
        match ask_at!(cell, address, Membership.snapshot(v1::SnapshotRequest {})) {
            Ok(s) => {
                table.row(vec![json!(address.to_string()), json!(s.index), json!(hex::encode(s.digest)), json!(null)]);
            }
            Err(r) if r.code == Code::Unavailable => {
                table.row(vec![json!(address.to_string()), json!(null), json!(null), json!(r.found)]);
            }
            Err(r) => return Err(r),
        }
    }
    Ok(Answer::ok(table.render(session.form)).note(banner))
}

/// What each address of the context says of the cell, asked side by side.
pub(crate) async fn views(cell: &Cell) -> Vec<(std::net::SocketAddr, Result<v1::StatusResponse, Refusal>)> {
    let mut asked = tokio::task::JoinSet::new();
    for (at, address) in cell.context().addresses.iter().copied().enumerate() {
        let cell = cell.clone();
        asked.spawn(async move { (at, address, ask_at!(cell, address, Membership.status(v1::StatusRequest {}))) });
    }
    let mut seen: Vec<_> = asked.join_all().await;
    seen.sort_by_key(|(at, ..)| *at);
    seen.into_iter().map(|(_, address, view)| (address, view)).collect()
}

/// The refusal to report where no address answered: a telling one before mere silence.
pub(crate) fn nobody(seen: &[(std::net::SocketAddr, Result<v1::StatusResponse, Refusal>)]) -> Option<Refusal> {
    if seen.iter().any(|(_, view)| view.is_ok()) {
        return None;
    }
    let refusals = || seen.iter().filter_map(|(_, view)| view.as_ref().err());
    refusals().find(|r| r.code != Code::Unavailable).or_else(|| refusals().next()).cloned()
}

fn table(seen: &[(std::net::SocketAddr, Result<v1::StatusResponse, Refusal>)]) -> Table {
    const COLUMNS: &[&str] =
        &["address", "replica", "role", "leader", "term", "commit", "applied", "digest", "trouble"];
    let mut table = Table::new("replica", COLUMNS);
    for (address, view) in seen {
        let address = json!(address.to_string());
        match view {
            Ok(s) => {
                let role = s.members.iter().find(|m| m.id == s.replica).map(|m| m.role.clone());
                let digest = hex::encode(&s.digest);
                table.row(vec![
                    address,
                    json!(s.replica),
                    json!(role),
                    json!(s.leader),
                    json!(s.term),
                    json!(s.commit_index),
                    json!(s.applied_index),
                    json!(digest.get(..16).unwrap_or(&digest)),
                    json!(null),
                ]);
            }
            Err(r) => {
                let mut row = vec![json!(null); COLUMNS.len()];
                row[0] = address;
                row[COLUMNS.len() - 1] = json!(format!("{}: {}", r.code, r.found));
                table.row(row);
            }
        }
    }
    table
}

pub(super) fn members(status: &v1::StatusResponse) -> Table {
    let mut table = Table::new("replica", &["replica", "address", "role", "voter", "leader", "issuer_until"]);
    for m in &status.members {
        table.row(vec![
            json!(m.id),
            json!(m.address),
            json!(m.role),
            json!(m.voter),
            json!(m.id == status.leader),
            json!(utc(m.intermediate_not_after_ms)),
        ]);
    }
    table
}
