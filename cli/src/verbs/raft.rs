//! `ambit raft`.

mod backup;

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
            let answer = Answer::ok(table(&seen).render(session.form));
            let form = seen.iter().find_map(|(_, view)| view.as_ref().ok()).map(|status| status.root_form.clone());
            let answer = form.into_iter().fold(answer, |answer, form| answer.note(format!("root: {form}")));
            Ok(unasked(&cell, &seen).into_iter().fold(answer, Answer::note))
        }
        Raft::RequireAttested { off } => {
            let (cell, banner) = session.cell_to_change()?;
            let request = v1::RequireAttestedReplicasRequest { request_id: request_id()?, required: !off };
            let reply = ask!(cell, Membership.require_attested_replicas(request))?;
            let text = match session.form {
                Form::Table if reply.attested_replicas_only => "only attested replicas join".to_owned(),
                Form::Table => "any replica joins".to_owned(),
                Form::Json => pretty(&json!({"attested_replicas_only": reply.attested_replicas_only})),
            };
            Ok(Answer::ok(text).note(banner))
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
        Raft::Snapshot { out: None } => snapshot(session).await,
        Raft::Snapshot { out: Some(file) } => backup::write(session, &file).await,
        Raft::Restore { snapshot } => backup::guide(session, &snapshot),
        Raft::Recover => recover(session).await,
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
    const COLUMNS: &[&str] = &[
        "address",
        "replica",
        "role",
        "leader",
        "term",
        "commit",
        "applied",
        "lag",
        "membership",
        "epoch",
        "digest",
        "incarnation",
        "intermediate_until",
        "trouble",
    ];
    let mut table = Table::new("replica", COLUMNS);
    let commit = seen.iter().filter_map(|(_, view)| view.as_ref().ok()).map(|s| s.commit_index).max().unwrap_or(0);
    for (address, view) in seen {
        let address = json!(address.to_string());
        match view {
            Ok(s) => {
                let member = s.members.iter().find(|m| m.id == s.replica);
                let role = member.map(|m| m.role.clone());
                let digest = hex::encode(&s.digest);
                table.row(vec![
                    address,
                    json!(s.replica),
                    json!(role),
                    json!(s.leader),
                    json!(s.term),
                    json!(s.commit_index),
                    json!(s.applied_index),
                    json!(commit.saturating_sub(s.applied_index)),
                    json!(s.membership_version),
                    json!(s.epoch),
                    json!(digest.get(..16).unwrap_or(&digest)),
                    json!(s.incarnations.last().map_or("founded".to_owned(), incarnation)),
                    json!(member.map(|m| utc(m.intermediate_not_after_ms))),
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

/// How a cell that began anew did so.
fn incarnation(i: &v1::Incarnation) -> String {
    let digest = hex::encode(&i.from_digest);
    let digest = digest.get(..16).unwrap_or(&digest);
    let given_up = i.given_up.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
    let rest = if given_up.is_empty() { String::new() } else { format!(", given up {given_up}") };
    format!("{} {} from {} {digest}{rest}", i.cause, utc(i.began_ms), i.from_index)
}

/// Replicas of the cell that the context does not name, a line each: they were not asked.
fn unasked(cell: &Cell, seen: &[(std::net::SocketAddr, Result<v1::StatusResponse, Refusal>)]) -> Vec<String> {
    let newest = seen.iter().filter_map(|(_, view)| view.as_ref().ok()).max_by_key(|s| s.applied_index);
    let addresses: Vec<String> = cell.context().addresses.iter().map(ToString::to_string).collect();
    let members = newest.map(|s| s.members.as_slice()).unwrap_or_default();
    let missing = members.iter().filter(|m| !addresses.contains(&m.address));
    missing.map(|m| format!("replica {} at {} is not in this context: not asked", m.id, m.address)).collect()
}

/// Says what to do where a majority is lost; the doing is a local verb of the replica that goes on.
async fn recover(session: &Session) -> Result<Answer, Refusal> {
    let cell = session.cell()?;
    let seen = views(&cell).await;
    let answering: Vec<&v1::StatusResponse> = seen.iter().filter_map(|(_, view)| view.as_ref().ok()).collect();
    if let Some(led) = answering.iter().find(|s| s.leader != 0) {
        let found = format!("replica {} leads it in term {}", led.leader, led.term);
        return Err(Refusal::new(Code::RecoverUnsafe, "a cell that lost its majority for good", found));
    }
    let steps = "The cell has no leader. Nothing was changed.\n\n\
        1. Start every replica whose disk is whole. A majority of them is a cell again, and nothing is lost.\n\
        2. Only where a majority is lost for good: stop the replicas that are left. On each of them, look:\n\n\
        \x20    ambitd recover --config FILE\n\n\
        \x20  It prints term and last index, and changes nothing.\n\
        3. Where a backup is newer than the highest of them, restore that: ambit raft restore --snapshot FILE\n\
        4. Else go on with the one that has the highest term and, in it, the highest last index, by the option that\n\
        \x20  step 2 printed there. Wipe all others; they join again as new ones (ambit raft add).";
    let text = match session.form {
        Form::Table => format!("{}\n\n{steps}", table(&seen).render(Form::Table)),
        Form::Json => table(&seen).render(Form::Json),
    };
    Ok(Answer::ok(text))
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
