//! What a replica does unasked: trust follows the state, the leader ticks and pulls from peers, a joiner asks for its vote.

use super::pull::{self, Answer, Ask, Untaken};
use super::{Replica, ticket, trust_of};
use crate::raft::Role;
use ambit_identity::CoSignature;
use ambit_identity::tls::Expect;
use ambit_model::{Code, Refusal, ReplicaId, TrustDomain};
use ambit_proto::status::from_status;
use ambit_proto::v1;
use ambit_state::Command;
use ambit_state::objects::{KeySetRow, PeerState};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tokio::task::{JoinHandle, JoinSet};

/// Deadlines and retention run on committed ticks, one a second (design.md section 3).
const TICK: Duration = Duration::from_secs(1);
/// A list that is missing here is missed by every judgement.
const BLOB_CARE: Duration = Duration::from_secs(5);
/// A leader that has not wrapped the root in so many ticks cannot open it.
const LEADER_TICKS: u32 = 15;
/// Days are left when this is told first.
const TELL: Duration = Duration::from_secs(3_600);
const PROMOTE_RETRY: Duration = Duration::from_millis(200);

/// The running chores.
pub struct Chores {
    tasks: Vec<JoinHandle<()>>,
}

impl Chores {
    /// Ends them.
    pub fn abort_all(&self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// Starts them.
pub fn spawn(replica: &Replica, verdicts: super::verdicts::Queue, reports: super::reports::Queue) -> Chores {
    let r = || replica.clone();
    let cuts = super::cuts::spawn(replica).into_iter();
    Chores {
        tasks: cuts
            .chain([
                tokio::spawn(follow_trust(r())),
                tokio::spawn(tick(r())),
                tokio::spawn(rotate(r())),
                tokio::spawn(pull_from_peers(r())),
                tokio::spawn(super::federate::run(r())),
                tokio::spawn(ask_for_vote(r())),
                tokio::spawn(super::verdicts::run(r(), verdicts)),
                tokio::spawn(super::reports::run(r(), reports)),
                tokio::spawn(keep_blobs(r())),
                tokio::spawn(super::authority::keep(r())),
                tokio::spawn(keep_root(r())),
                tokio::spawn(super::key_set::keep(r())),
                tokio::spawn(tell_of_end(r())),
                tokio::spawn(super::lease::keep(r())),
                tokio::spawn(super::standby::keep(r())),
                tokio::spawn(super::attest::run(r())),
                tokio::spawn(super::audit::keep(r())),
                tokio::spawn(super::audit::ask_for_cosignatures(r())),
            ])
            .collect(),
    }
}

/// Every handshake sees the bundles of the last applied entry.
async fn follow_trust(replica: Replica) {
    let mut applied = replica.cell().watch_applied();
    let (mut seen, mut known) = (None, None);
    loop {
        let (revision, documents) = replica.local(|s| (s.cell().map(|c| c.revision), s.document_revision()));
        if revision.is_some() && revision != seen {
            seen = revision;
            // Before anybody is woken to send it on.
            replica.propagation().applied(documents.0, Instant::now());
            let bundles = replica.local(|s| (s.bundles(), s.denied_authorities(), s.fences()));
            // Most of what changes the revision changes no root, and parsing roots costs more than comparing them.
            if known.as_ref() != Some(&bundles) {
                let (roots, denied, fences) = bundles.clone();
                match trust_of(roots, denied, fences, replica.trust_domain()) {
                    Ok(trust) => replica.trust().replace(trust),
                    Err(refusal) => tracing::error!(%refusal, "bundles are not usable; the last ones stay"),
                }
                known = Some(bundles);
            }
            replica.inner.revision.send_replace(seen.map_or(0, |r| r.0));
        }
        if applied.changed().await.is_err() {
            return;
        }
    }
}

async fn tick(replica: Replica) {
    let mut every = tokio::time::interval(TICK);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        every.tick().await;
        if replica.cell().status().role != Role::Leader || replica.local(|s| s.cell().is_none()) {
            continue;
        }
        if let Err(refusal) = replica.propose_own(Command::Tick).await.and_then(|applied| applied.outcome) {
            tracing::debug!(%refusal, "tick");
        }
    }
}

/// The leader's care for keys that are wrapped to all: it may wait for a TPM, which the cell's time must not.
async fn rotate(replica: Replica) {
    let mut every = tokio::time::interval(TICK);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        every.tick().await;
        super::jwt::forget(&replica);
        let status = replica.cell().status();
        let (Some(leader), false) = (status.leader, replica.local(|s| s.cell().is_none())) else { continue };
        let done = async {
            if status.role != Role::Leader {
                return super::jwt::wrap_to_leader(&replica, leader.0).await;
            }
            ticket::rotate_if_due(&replica).await?;
            super::jwt::rotate_if_due(&replica).await
        };
        if let Err(refusal) = done.await {
            tracing::debug!(%refusal, "keys not rotated yet");
        }
    }
}

/// Allow-lists that policies name are fetched where they are not here; evidence past its age goes.
async fn keep_blobs(replica: Replica) {
    let mut every = tokio::time::interval(BLOB_CARE);
    loop {
        every.tick().await;
        replica.fetch_lists().await;
        replica.blobs().expire();
    }
}

/// An authority under an external root is renewed by people, who are told from a third of its life on.
async fn tell_of_end(replica: Replica) {
    let mut every = tokio::time::interval(TELL);
    loop {
        every.tick().await;
        let late = replica.local(|s| {
            let (id, _) = s.active_root()?;
            let row = s.external(&id)?;
            row.is_due(s.stamp()).then(|| (row.authority(), row.lifetime.not_after.0))
        });
        if let Some((authority, ends_ms)) = late {
            tracing::warn!(
                authority,
                ends_ms,
                "the authority under the external root is to be renewed (ambit trust external csr)"
            );
        }
    }
}

/// The root's key is wrapped to whoever joined. The leader sees to it, or who can where the leader cannot: that its TPM does
/// not answer shows in that it is not done.
async fn keep_root(replica: Replica) {
    let mut every = tokio::time::interval(TICK);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    let mut lacking_for = 0u32;
    loop {
        every.tick().await;
        let leader = replica.cell().status().leader.map(|id| id.0);
        let (leader_opens, lacks) = replica.local(|s| {
            let active = s.active_root().map(|(_, row)| row.wrapped).unwrap_or_default();
            let lacks = s.wrap_keys().keys().any(|id| !active.contains_key(id));
            (leader.is_some_and(|leader| active.contains_key(&leader)), lacks)
        });
        lacking_for = if lacks { lacking_for.saturating_add(1) } else { 0 };
        if (leader == Some(replica.id()) || !leader_opens || lacking_for > LEADER_TICKS)
            && let Err(refusal) = super::seal::wrap_roots(&replica).await
        {
            tracing::debug!(%refusal, "root not wrapped yet");
        }
    }
}

/// A replica that joined asks until it has its vote. Only the leader can grant it; the others say who leads.
async fn ask_for_vote(replica: Replica) {
    let id = ReplicaId(replica.id());
    loop {
        let status = replica.cell().status();
        if status.voters.contains(&id) {
            return;
        }
        for (member, address) in replica.known_members() {
            let ask = async {
                let channel = replica.dial_replica(member, &address).await?;
                let request = v1::PromoteRequest { request_id: Vec::new(), replica: id.0 };
                let mut client = v1::membership_client::MembershipClient::new(channel);
                client.promote(request).await.map_err(|s| from_status(&s)).map(|_| ())
            };
            match tokio::time::timeout(Duration::from_secs(10), ask).await {
                Ok(Ok(())) => break,
                Ok(Err(refusal)) => tracing::debug!(member, %refusal, "asked for a vote"),
                Err(_) => tracing::debug!(member, "asked for a vote: silence"),
            }
        }
        tokio::time::sleep(PROMOTE_RETRY).await;
    }
}

/// The leader pulls, one task per active peer: a slow peer holds up nobody else.
async fn pull_from_peers(replica: Replica) {
    let mut pulling: BTreeMap<TrustDomain, tokio::task::AbortHandle> = BTreeMap::new();
    let mut tasks = JoinSet::new();
    let mut every = tokio::time::interval(Duration::from_millis(100));
    loop {
        every.tick().await;
        let leads = replica.cell().status().role == Role::Leader;
        let active: Vec<TrustDomain> = if leads {
            replica
                .local(|s| s.peers().filter(|(_, p)| p.state == PeerState::Active).map(|(td, _)| td.clone()).collect())
        } else {
            Vec::new()
        };
        pulling.retain(|td, handle| {
            let keep = active.contains(td) && !handle.is_finished();
            if !keep {
                handle.abort();
            }
            keep
        });
        for td in active {
            pulling.entry(td.clone()).or_insert_with(|| tasks.spawn(pull_one(replica.clone(), td)));
        }
        while tasks.try_join_next().is_some() {}
    }
}

/// Pulls from one peer until it stops being active, going through its addresses.
async fn pull_one(replica: Replica, td: TrustDomain) {
    let mut at = 0;
    loop {
        let Some(peer) = replica.local(|s| s.peer(&td).filter(|p| p.state == PeerState::Active).cloned()) else {
            return;
        };
        let Some(address) = peer.addresses.get(at % peer.addresses.len().max(1)).cloned() else { return };
        if let Err(untaken) = pull_while_well(&replica, &td, &address).await {
            let refusal = untaken.refusal();
            if untaken.is_a_lie() {
                tracing::warn!(peer = %td, %address, %refusal, "an answer that its cell did not sign, or that does not hold");
            } else {
                tracing::debug!(peer = %td, %address, %refusal, "pull failed");
            }
            if let Some(stop) = pull::stop(&td, &untaken) {
                tracing::error!(peer = %td, %refusal, "import stopped: the peer's records do not hold");
                if let Err(refusal) = replica.propose_own(stop).await {
                    tracing::warn!(%refusal, "stopping the import");
                }
                return;
            }
        }
        at += 1;
        tokio::time::sleep(pull::RETRY).await;
    }
}

async fn pull_while_well(replica: &Replica, td: &TrustDomain, address: &str) -> Result<(), Untaken> {
    let at: SocketAddr = address.parse().map_err(|_| Refusal::new(Code::BadRequest, "ip:port", address))?;
    let channel = replica.dialer().channel(at, Expect::ReplicaOf(td.clone())).await?;
    let mut link = v1::peer_link_client::PeerLinkClient::new(channel);
    loop {
        let nonce = super::random()?;
        let Some(ask) = replica.local(|s| Ask::new(s, td.clone(), nonce, pull::LIMIT)) else { return Ok(()) };
        let sent = Instant::now();
        let request = v1::PullRequest {
            after_seq: ask.after_seq(),
            nonce: ask.nonce().to_vec(),
            limit: ask.limit(),
            roots_held: ask.roots_held().iter().map(|id| id.to_vec()).collect(),
            kids_held: ask.kids_held().to_vec(),
        };
        let answer = tokio::time::timeout(pull::TIMEOUT, link.pull(request))
            .await
            .map_err(|_| Refusal::new(Code::Unavailable, "an answer from the peer", "silence"))?
            .map_err(|s| from_status(&s))?
            .into_inner();
        let mut batch = ask.verify(&answer_of(answer))?;
        if let Some(learned) = batch.learned() {
            // What came along comes again, under the key set that is known by then.
            replica.propose_own(learned).await?.outcome?;
            continue;
        }
        let is_the_end = batch.is_the_end();
        if let Some(import) = batch.into_import() {
            replica.propose_own(import).await?.outcome.map_err(Untaken::Origin)?;
        }
        if is_the_end {
            replica.heard(td, sent);
        }
    }
}

fn answer_of(answer: v1::PullResponse) -> Answer {
    // A key set that is missing verifies as little as one of nothing.
    let set = answer.key_set.unwrap_or_default();
    let key_set = KeySetRow { statement: set.statement, signature: set.signature };
    let signed = |one: v1::CoSignature| CoSignature { key_index: one.key_index, signature: one.signature };
    Answer {
        key_set,
        head: answer.head,
        signature: CoSignature { key_index: answer.key_index, signature: answer.signature },
        claim: answer.claim,
        signatures: answer.cosignatures.into_iter().map(signed).collect(),
        records: answer.records,
    }
}

impl Replica {
    /// Other replicas as known: replicated state first, else what `join` was told.
    pub(crate) fn known_members(&self) -> Vec<(u64, String)> {
        let replicated: Vec<(u64, String)> =
            self.local(|s| s.members().map(|(id, m)| (id, m.address.clone())).collect());
        let mut all = if replicated.is_empty() { self.inner.told.clone() } else { replicated };
        all.retain(|(id, _)| *id != self.id());
        all
    }
}
