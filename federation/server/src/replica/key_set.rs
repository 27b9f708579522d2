//! The record keys that the root certifies for peers: those of the replicas that there are, the voters' apart.
//!
//! More than half of the voters in it must sign what peers are to believe, so it follows who votes: a key of a replica that
//! left would count as one that is away, and could be a thief's.

use super::Replica;
use ambit_identity::record::Listed;
use ambit_identity::{KeySet, Root};
use ambit_model::{Code, Refusal, ReplicaId};
use ambit_state::objects::KeySetRow;
use ambit_state::{Command, State};
use std::collections::BTreeSet;
use std::time::Duration;

/// How often it is compared with who votes.
const LOOK: Duration = Duration::from_secs(1);
/// A leader that has not certified it in so many looks cannot open the root; then who can does.
const LEADER_LOOKS: u32 = 15;

/// The keys of the replicas that there are, and of one that joins: it votes later.
pub fn present(replica: &Replica, joins: Option<[u8; 32]>) -> Listed {
    let voting = replica.cell().status().voters;
    let (mut voters, mut others) = (Vec::new(), Vec::new());
    for (id, key) in replica.local(|s| s.members().map(|(id, m)| (id, m.record_key)).collect::<Vec<_>>()) {
        if voting.contains(&ReplicaId(id)) { voters.push(key) } else { others.push(key) }
    }
    others.extend(joins.filter(|key| !voters.contains(key) && !others.contains(key)));
    Listed { voters, others }
}

/// The next key set, and SHA-256 of the one that it is made from.
pub fn certify(replica: &Replica, root: &Root, listed: Listed) -> Result<([u8; 32], KeySetRow), Refusal> {
    let (row, epoch) = replica.local(|s| {
        let epoch = s.cell().map_or(0, |cell| cell.epoch);
        (s.key_set().cloned().unwrap_or_default(), epoch)
    });
    next(root, replica.trust_domain(), &row, epoch, listed).map(|next| (row.sha256(), next))
}

/// What a cell that begins anew with one replica has.
pub fn of_one(state: &State, root: &Root, key: [u8; 32], past_epoch: u64) -> Result<KeySetRow, Refusal> {
    let row = state.key_set().cloned().unwrap_or_default();
    let cell = state.cell().ok_or_else(|| Refusal::new(Code::Unavailable, "a founded cell", "an empty one"))?;
    next(root, &cell.trust_domain, &row, state.epoch_past(past_epoch), Listed::of_voters(vec![key]))
}

fn next(
    root: &Root,
    td: &ambit_model::TrustDomain,
    row: &KeySetRow,
    epoch: u64,
    listed: Listed,
) -> Result<KeySetRow, Refusal> {
    let known = KeySet::verify(td, root.der(), &row.statement, &row.signature)?;
    let (statement, signature) = KeySet::certify_listed(root, td, KeySet::seq_after(known.seq(), epoch), listed)?;
    Ok(KeySetRow { statement, signature })
}

/// Whether the key set says who votes. None where this replica does not know who does.
fn is_as(listed: Option<&Listed>, present: &Listed) -> bool {
    let set = |keys: &[[u8; 32]]| keys.iter().copied().collect::<BTreeSet<_>>();
    listed.is_some_and(|listed| {
        set(&listed.voters) == set(&present.voters) && set(&listed.others) == set(&present.others)
    })
}

/// Certified anew when replicas come, vote or go: by the leader, or by who can open the root where the leader cannot.
pub(super) async fn keep(replica: Replica) {
    let mut every = tokio::time::interval(LOOK);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    let mut differs_for = 0u32;
    loop {
        every.tick().await;
        let leader = replica.cell().status().leader.map(|id| id.0);
        let listed = replica.local(|s| s.key_set().and_then(|row| Listed::read(&row.statement)));
        let present = present(&replica, None);
        if leader.is_none() || listed.is_none() || present.voters.is_empty() || is_as(listed.as_ref(), &present) {
            differs_for = 0;
            continue;
        }
        differs_for = differs_for.saturating_add(1);
        if (leader == Some(replica.id()) || differs_for > LEADER_LOOKS)
            && let Err(refusal) = put(&replica, present).await
        {
            tracing::debug!(%refusal, "key set not certified yet");
        }
    }
}

async fn put(replica: &Replica, listed: Listed) -> Result<(), Refusal> {
    let (replaced, keys) = certify(replica, &replica.active_root().await?, listed)?;
    let own = replica.local(|s| s.member(replica.id()).cloned());
    let own = own.ok_or_else(|| Refusal::new(Code::Unavailable, "a member of the cell", "another"))?;
    // This replica as it is, with the next key set: what every release understands.
    let put = Command::PutMember(replica.id(), own, keys);
    replica.propose_own(Command::OverKeySet(replaced, Box::new(put))).await?.outcome.map(drop)
}
