//! The audit log as one replica keeps it: its head signed, records that it lacks fetched from others, and the leader asking
//! peers to cosign.

use super::pull::Ask;
use super::{Replica, random};
use crate::raft::Role;
use crate::store::audit::{AuditFiles, View};
use crate::store::{Bodies, StoreError};
use ambit_audit::{Checkpoint, Hash, Nodes, Note, consistency, leaf_hash, verify_consistency};
use ambit_identity::tls::Expect;
use ambit_model::{Code, Refusal, TrustDomain};
use ambit_proto::status::from_status;
use ambit_proto::v1;
use ambit_state::audit::CosignedRow;
use ambit_state::objects::{KeySetRow, PeerState};
use ambit_state::{Command, State};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

/// How often records that are missing here are looked for.
const LOOK: Duration = Duration::from_secs(1);
/// How often peers are asked to cosign, where the log grew.
const COSIGN: Duration = Duration::from_secs(5);
const ASK_MAX: Duration = Duration::from_secs(10);
/// Bytes of records in one answer: gRPC takes 4 MiB.
pub(crate) const READ_BYTES_MAX: usize = 1 << 20;

/// A store's error as a caller hears it.
pub(crate) fn unreadable(e: StoreError) -> Refusal {
    Refusal::new(Code::Unavailable, "the audit log's records in this replica's files", e.to_string())
}

pub(crate) fn not_begun() -> Refusal {
    Refusal::new(Code::AuditNotBegun, "an audit log", "none in this cell")
}

impl Replica {
    /// The log's files.
    pub(crate) fn audit(&self) -> Result<&AuditFiles, Refusal> {
        self.cell().audit()
    }
    /// What is agreed on here: incarnation and size.
    pub(crate) fn audited(&self) -> Result<(u64, u64), Refusal> {
        self.local(|s| s.audit().map(|row| (row.epoch, row.frontier.size()))).ok_or_else(not_begun)
    }
    /// The files, where they hold all that is agreed on.
    pub(crate) fn audit_view(&self, epoch: u64, size: u64) -> Result<View, Refusal> {
        let view = self.audit()?.view(epoch).map_err(unreadable)?;
        if view.size < size {
            let expected = format!("{size} records in this replica's files");
            return Err(Refusal::new(
                Code::Unavailable,
                expected,
                format!("{}: the others are on their way", view.size),
            ));
        }
        Ok(view)
    }
    /// The head, signed, with all that a verifier needs.
    pub(crate) fn audit_head(&self) -> Result<v1::AuditHeadResponse, Refusal> {
        let (epoch, size) = self.audited()?;
        let record = self.record();
        let read = self.local(|s| {
            let head = s.audit_head()?;
            let note = Note { lines: vec![record.sign_checkpoint(&head)], checkpoint: head.get().clone() };
            let cosigned: Vec<_> = s
                .cosigned()
                .map(|(td, row, head)| {
                    let own = record.sign_checkpoint(&head).text();
                    let note = format!("{}\n{own}{}", head.get().text(), row.line);
                    let peer = s.peer(td).map(|peer| (peer.key_set.clone(), peer.root_der.clone())).unwrap_or_default();
                    (td.clone(), row.size, note, peer)
                })
                .collect();
            let (keys, root_der) = (s.key_set().cloned().unwrap_or_default(), s.cell().map(|c| c.root_der.clone()));
            Some((note, cosigned, witnessed(s), keys, root_der.unwrap_or_default()))
        });
        let (note, cosigned, witnessed, keys, root_der) = read.ok_or_else(not_begun)?;
        let view = self.audit()?.view(epoch).map_err(unreadable)?;
        let whole = note.checkpoint.size;
        let way = |from: u64| {
            // A replica whose files are behind says less of the way, and the same of everything else.
            let there = from > 0 && whole <= view.size;
            let path = if there { consistency(&view, from, whole).unwrap_or_default() } else { Vec::new() };
            path.iter().map(|hash| hash.to_vec()).collect()
        };
        let cosigned = cosigned.into_iter().map(|(td, size, note, (keys, root_der))| v1::Cosigned {
            trust_domain: td.to_string(),
            note,
            key_set: Some(key_set(keys)),
            root_der,
            consistency: way(size),
        });
        let (cosigned, checkpoint, have) = (cosigned.collect(), note.text(), view.size.min(size.max(whole)));
        let key_set = Some(key_set(keys));
        Ok(v1::AuditHeadResponse { checkpoint, key_set, root_der, have, replica: self.id(), cosigned, witnessed })
    }
}

fn witnessed(s: &State) -> Vec<v1::WitnessedLog> {
    let log = |((td, epoch), row): (&(TrustDomain, u64), &ambit_state::audit::WitnessedRow)| v1::WitnessedLog {
        origin: ambit_state::audit::origin(td, *epoch),
        size: row.size,
        root: row.root.to_vec(),
        stamp_ms: row.stamp.0,
        trouble: row.trouble.clone(),
    };
    s.witnessed().map(log).collect()
}

fn key_set(row: KeySetRow) -> v1::KeySet {
    v1::KeySet { statement: row.statement, signature: row.signature }
}

/// Hashes as the wire has them.
///
/// # Errors
/// [`Code::BadRequest`].
pub(crate) fn hashes(wire: &[Vec<u8>]) -> Result<Vec<Hash>, Refusal> {
    let bad = || Refusal::new(Code::BadRequest, "at most 64 hashes of 32 bytes", "others");
    if wire.len() > 64 {
        return Err(bad());
    }
    wire.iter().map(|hash| hash.as_slice().try_into().map_err(|_| bad())).collect()
}

/// Keeps the log whole here, and has it begun where an incarnation began after one that had it.
pub(crate) async fn keep(replica: Replica) {
    let mut every = tokio::time::interval(LOOK);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        every.tick().await;
        if replica.cell().status().role == Role::Leader && replica.local(State::audit_is_due) {
            // Refused where another leader was first.
            let _ = replica.propose_own(Command::BeginAudit).await;
        }
        if let Err(refusal) = fill(&replica).await {
            tracing::warn!(%refusal, "records of the audit log are missing here");
        }
    }
}

/// Takes what is missing from whichever replica has it.
async fn fill(replica: &Replica) -> Result<(), Refusal> {
    let Some((epoch, agreed)) = replica.local(|s| s.audit().map(|row| (row.epoch, row.frontier.clone()))) else {
        return Ok(());
    };
    let mut last = Ok(());
    for (id, address) in replica.known_members() {
        let files = replica.audit()?;
        if files.size(epoch).map_err(unreadable)? >= agreed.size() {
            return Ok(());
        }
        last = fill_from(replica, epoch, &agreed, id, &address).await;
    }
    last
}

async fn fill_from(
    replica: &Replica,
    epoch: u64,
    agreed: &ambit_audit::Frontier,
    id: u64,
    address: &str,
) -> Result<(), Refusal> {
    let channel = replica.dial_replica(id, address).await?;
    let mut client = v1::audit_client::AuditClient::new(channel);
    let files = replica.audit()?;
    loop {
        let from = files.size(epoch).map_err(unreadable)?;
        if from >= agreed.size() {
            return Ok(());
        }
        let request = v1::ReadAuditRequest { from, to: agreed.size(), size: agreed.size(), epoch };
        let silence = |_| Refusal::new(Code::Unavailable, format!("records from replica {id}"), "silence");
        let answer = tokio::time::timeout(ASK_MAX, client.read_audit(request)).await.map_err(silence)?;
        let answer = answer.map_err(|s| from_status(&s))?.into_inner();
        if answer.records.is_empty() {
            return Err(Refusal::new(Code::Unavailable, format!("records from {from} on"), "none"));
        }
        // What this cell agreed on says what they must be.
        let mut edge = files.frontier(epoch, from).map_err(unreadable)?;
        answer.records.iter().for_each(|record| edge.push(leaf_hash(record)));
        let proof = hashes(&answer.consistency)?;
        verify_consistency(edge.size(), agreed.size(), &edge.root(), &agreed.root(), &proof)?;
        let taken = answer.records.len();
        files.fill(epoch, from, answer.records).map_err(unreadable)?;
        tracing::info!(from, taken, replica = id, "records of the audit log taken from another replica");
    }
}

/// The leader shows the log's head to each active peer whenever it grew.
pub(crate) async fn ask_for_cosignatures(replica: Replica) {
    let mut every = tokio::time::interval(COSIGN);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    let mut shown: BTreeMap<TrustDomain, u64> = BTreeMap::new();
    loop {
        every.tick().await;
        if replica.cell().status().role != Role::Leader {
            shown.clear();
            continue;
        }
        let Ok((epoch, size)) = replica.audited() else { continue };
        let known = shown.clone();
        let wanting: Vec<(TrustDomain, Vec<String>)> = replica.local(|s| {
            let active = s.peers().filter(|(_, peer)| peer.state == PeerState::Active);
            let grew = active.filter(|(td, _)| {
                let last = s.cosigned().find(|(by, ..)| by == td).map(|(_, row, _)| row.size);
                last != Some(size) && known.get(*td) != Some(&size)
            });
            grew.map(|(td, peer)| (td.clone(), peer.addresses.clone())).collect()
        });
        for (td, addresses) in wanting {
            let mut asked = Err(Refusal::new(Code::Unavailable, "an address of the peer", "none"));
            for address in addresses {
                let ask = ask_one(&replica, epoch, &td, &address);
                let silence = |_| Refusal::new(Code::Unavailable, "a cosignature", "silence");
                asked = tokio::time::timeout(ASK_MAX, ask).await.map_err(silence).and_then(|asked| asked);
                if asked.as_ref().is_ok_and(|()| true)
                    || asked.as_ref().is_err_and(|r| r.code == Code::AuditUnwitnessed)
                {
                    break;
                }
            }
            match asked {
                Ok(()) => drop(shown.insert(td, size)),
                Err(refusal) if refusal.code == Code::AuditUnwitnessed => {
                    tracing::error!(peer = %td, %refusal, "the peer does not cosign this cell's audit log");
                    shown.insert(td, size);
                }
                Err(refusal) => tracing::debug!(peer = %td, %refusal, "no cosignature"),
            }
        }
    }
}

async fn ask_one(replica: &Replica, epoch: u64, td: &TrustDomain, address: &str) -> Result<(), Refusal> {
    let at: SocketAddr = address.parse().map_err(|_| Refusal::new(Code::BadRequest, "ip:port", address))?;
    let channel = replica.dialer().channel(at, Expect::ReplicaOf(td.clone())).await?;
    let mut link = v1::peer_link_client::PeerLinkClient::new(channel);
    let head = replica.local(State::audit_head).ok_or_else(not_begun)?;
    let Checkpoint { size, root, .. } = *head.get();
    let view = replica.audit_view(epoch, size)?;
    let checkpoint = Note { lines: vec![replica.record().sign_checkpoint(&head)], checkpoint: head.get().clone() };
    let own_keys = replica.local(|s| s.key_set().cloned()).unwrap_or_default();
    let mut old = replica.local(|s| s.cosigned().find(|(by, ..)| *by == td).map_or(0, |(_, row, _)| row.size));
    // The second time from where the witness says that it is.
    for _ in 0..2 {
        let proof =
            if old == 0 || old > size { Vec::new() } else { consistency(&view, old, size).map_err(unreadable)? };
        let request = v1::CosignAuditRequest {
            checkpoint: checkpoint.text(),
            key_set: Some(key_set(own_keys.clone())),
            old_size: old,
            proof: proof.iter().map(|hash| hash.to_vec()).collect(),
        };
        let answer = link.cosign_audit(request).await.map_err(|s| from_status(&s))?.into_inner();
        if answer.line.is_empty() {
            old = answer.size;
            continue;
        }
        let set = answer.key_set.unwrap_or_default();
        let set = KeySetRow { statement: set.statement, signature: set.signature };
        let ask = replica.local(|s| Ask::new(s, td.clone(), random().unwrap_or_default(), 1));
        let ask = ask.ok_or_else(|| Refusal::new(Code::PeerNotActive, "an active peer", td.as_str()))?;
        let keys = ask.key_set(&set)?;
        let note = Note::parse(&format!("{}\n{}", head.get().text(), answer.line))?;
        let [line] = note.lines.as_slice() else {
            return Err(Refusal::new(Code::AuditMismatch, "one signature line", note.lines.len().to_string()));
        };
        if keys.cosigned(&note).is_none() {
            return Err(Refusal::new(Code::AuditMismatch, format!("a cosignature by {td}"), "another signature"));
        }
        let row = CosignedRow { epoch, size, root, line: line.text() };
        return replica.propose_own(Command::TakeCosignature(td.clone(), row)).await?.outcome.map(drop);
    }
    Err(Refusal::new(Code::Unavailable, "a witness that stays where it is", "others ask it meanwhile"))
}

/// Whether hashes of a subtree can be read at all.
pub(crate) fn proof_of<N: Nodes<Error = StoreError>>(nodes: &N, n: u64, size: u64) -> Result<Vec<Vec<u8>>, Refusal> {
    let path = ambit_audit::inclusion(nodes, n, size).map_err(unreadable)?;
    Ok(path.iter().map(|hash| hash.to_vec()).collect())
}
