//! What a replica does unasked: trust follows the state, the leader ticks and pulls from peers, a joiner asks for its vote.

use super::{Replica, ticket, trust_of};
use crate::raft::Role;
use ambit_identity::KeySet;
use ambit_identity::tls::Expect;
use ambit_model::record::{Head, Record};
use ambit_model::{Code, Refusal, ReplicaId, TrustDomain};
use ambit_proto::status::from_status;
use ambit_proto::v1;
use ambit_state::objects::{PeerRow, PeerState};
use ambit_state::{Command, State};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tokio::task::{JoinHandle, JoinSet};

/// Deadlines and retention run on committed ticks, one a second (design.md section 3).
const TICK: Duration = Duration::from_secs(1);
/// After a failed pull: long enough not to burn, short against the 10 s that make a peer degraded.
const PULL_RETRY: Duration = Duration::from_millis(500);
/// A pull waits up to 1 s for news at the far end; beyond this it is dead.
const PULL_TIMEOUT: Duration = Duration::from_secs(4);
const PULL_LIMIT: u32 = 500;
/// A list that is missing here is missed by every judgement.
const BLOB_CARE: Duration = Duration::from_secs(5);
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
pub fn spawn(replica: &Replica, verdicts: super::verdicts::Queue) -> Chores {
    let r = || replica.clone();
    Chores {
        tasks: vec![
            tokio::spawn(follow_trust(r())),
            tokio::spawn(tick(r())),
            tokio::spawn(pull_from_peers(r())),
            tokio::spawn(ask_for_vote(r())),
            tokio::spawn(super::verdicts::run(r(), verdicts)),
            tokio::spawn(keep_blobs(r())),
        ],
    }
}

/// Every handshake sees the bundles of the last applied entry.
async fn follow_trust(replica: Replica) {
    let mut applied = replica.cell().watch_applied();
    let (mut seen, mut known) = (None, None);
    loop {
        let revision = replica.local(|s| s.cell().map(|c| c.revision));
        if revision.is_some() && revision != seen {
            seen = revision;
            let bundles = replica.local(State::bundles);
            // Most of what changes the revision changes no root, and parsing roots costs more than comparing them.
            if known.as_ref() != Some(&bundles) {
                match trust_of(bundles.clone(), replica.trust_domain()) {
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
        let done = async {
            replica.propose_own(Command::Tick).await?.outcome?;
            ticket::rotate_if_due(&replica).await
        };
        if let Err(refusal) = done.await {
            tracing::debug!(%refusal, "tick");
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
        if let Err(refusal) = pull_while_well(&replica, &td, &address).await {
            tracing::debug!(peer = %td, %address, %refusal, "pull failed");
            if matches!(refusal.code, Code::RecordChainBroken | Code::RecordEquivocation | Code::RecordSignature) {
                tracing::error!(peer = %td, %refusal, "import stopped: the peer's records do not hold");
                let stop = Command::StopPeer(td.clone(), refusal.to_string());
                if let Err(refusal) = replica.propose_own(stop).await {
                    tracing::warn!(%refusal, "stopping the import");
                }
                return;
            }
        }
        at += 1;
        tokio::time::sleep(PULL_RETRY).await;
    }
}

async fn pull_while_well(replica: &Replica, td: &TrustDomain, address: &str) -> Result<(), Refusal> {
    let at: SocketAddr = address.parse().map_err(|_| Refusal::new(Code::BadRequest, "ip:port", address))?;
    let channel = replica.dialer().channel(at, Expect::ReplicaOf(td.clone())).await?;
    let mut link = v1::peer_link_client::PeerLinkClient::new(channel);
    loop {
        let Some(peer) = replica.local(|s| s.peer(td).cloned()) else { return Ok(()) };
        let nonce: [u8; 16] = super::random()?;
        let sent = Instant::now();
        let request = v1::PullRequest { after_seq: peer.seq, nonce: nonce.to_vec(), limit: PULL_LIMIT };
        let answer = tokio::time::timeout(PULL_TIMEOUT, link.pull(request))
            .await
            .map_err(|_| Refusal::new(Code::Unavailable, "an answer from the peer", "silence"))?
            .map_err(|s| from_status(&s))?
            .into_inner();
        let (head, records) = verify(td, &peer, answer, &nonce)?;
        if !records.is_empty() {
            replica.propose_own(Command::Import(head, records)).await?.outcome?;
        }
        replica.heard(td, sent);
    }
}

/// Signature before content: key set by the root, head by the key set, nonce by the head, records by their chain to it.
fn verify(
    td: &TrustDomain,
    peer: &PeerRow,
    answer: v1::PullResponse,
    nonce: &[u8; 16],
) -> Result<(Head, Vec<Record>), Refusal> {
    let broken = |expected: &str, found: String| Refusal::new(Code::RecordChainBroken, expected, found);
    let set = answer.key_set.ok_or_else(|| broken("a key set", "none".into()))?;
    let keys = KeySet::verify(td, &peer.root_der, &set.statement, &set.signature)?;
    let known = KeySet::verify(td, &peer.root_der, &peer.key_set.statement, &peer.key_set.signature)?;
    if keys.seq() < known.seq() {
        // A replica that lags, not a lie: another is asked.
        return Err(Refusal::new(Code::Unavailable, "a key set no older than at registration", keys.seq().to_string()));
    }
    let head: Head = postcard::from_bytes(&answer.head).map_err(|e| broken("a head", e.to_string()))?;
    keys.verify_head(&head, &answer.signature)?;
    if head.origin != *td || head.nonce != *nonce {
        return Err(Refusal::new(Code::RecordSignature, "the head of this pull", "another"));
    }
    if head.seq < peer.seq {
        return Err(Refusal::new(Code::Unavailable, format!("a head at {} or later", peer.seq), head.seq.to_string()));
    }
    if head.seq == peer.seq && head.hash != peer.hash && peer.seq > 0 {
        let found = format!("{} with another history", head.seq);
        return Err(Refusal::new(Code::RecordEquivocation, format!("sequence {} as imported", peer.seq), found));
    }
    let mut records = Vec::with_capacity(answer.records.len());
    let (mut seq, mut hash) = (peer.seq, peer.hash);
    for bytes in &answer.records {
        let record: Record = postcard::from_bytes(bytes).map_err(|e| broken("a record", e.to_string()))?;
        if record.origin != *td || record.seq != seq + 1 || record.prev_hash != hash || record.seq > head.seq {
            return Err(broken("the next record of the chain", format!("{}/{}", record.origin, record.seq)));
        }
        (seq, hash) = (record.seq, record.hash());
        records.push(record);
    }
    if (seq, hash) != (head.seq, head.hash) && !(head.seq == 0 && seq == 0) {
        return Err(broken("records that lead to the signed head", format!("sequence {seq}, head {}", head.seq)));
    }
    Ok((head, records))
}

impl Replica {
    /// Other replicas as known: replicated state first, else what `join` was told.
    fn known_members(&self) -> Vec<(u64, String)> {
        let replicated: Vec<(u64, String)> =
            self.local(|s| s.members().map(|(id, m)| (id, m.address.clone())).collect());
        let mut all = if replicated.is_empty() { self.inner.told.clone() } else { replicated };
        all.retain(|(id, _)| *id != self.id());
        all
    }
}
