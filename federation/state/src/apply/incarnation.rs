//! A cell that begins anew, from a backup or from what one replica still had.
//!
//! Not a command: it happens to a state before there is a Raft group for it, never by an entry of one. What the lost
//! incarnation may have done after the last thing that came along is forgotten here and remembered elsewhere (agents,
//! peers, certificates), so everything that is counted goes on far above what can have been counted.

use super::{At, cell_row, touch};
use crate::committed::{Committed, ReplicaAdmission};
use crate::objects::{Cause, IncarnationRow, KeySetRow, Member};
use crate::state::State;
use ambit_model::{Code, Generation, Lifetime, NodeId, RaftIndex, Refusal, ReplicaId, Revision, Stamp};

/// Indexes of an incarnation begin at (epoch - 1) << 40: agents keep the highest revision that they saw.
const INDEX_SHIFT: u32 = 40;
/// Generations of an incarnation begin at (epoch - 1) << 32: a leaf of the lost one must not fit a later admission.
const GENERATION_SHIFT: u32 = 32;
/// As with bundles everywhere: epoch << 40 | counter.
const BUNDLE_SHIFT: u32 = 40;
/// Numbers of identities left out: what the lost incarnation may have handed out last.
const IDENTITY_GAP: u32 = 1 << 20;
/// Indexes fit 64 bits, and 53 as far as a cell's first thousands of incarnations go.
const EPOCH_MAX: u64 = 1 << 23;
const INCARNATIONS_MAX: usize = 64;

/// What an incarnation begins with.
#[derive(Clone, Debug)]
pub struct Beginning {
    /// Why.
    pub cause: Cause,
    /// The one replica.
    pub replica: u64,
    /// Its row. With [`Beginning::admit`] the end of its intermediate is filled in here.
    pub member: Member,
    /// SHA-256 of SPKI of its issuing key and of its TLS key, where it gets a new intermediate.
    pub admit: Option<([u8; 32], [u8; 32])>,
    /// The highest epoch that the cell is known to have had: a backup does not know of those that came after it.
    pub past_epoch: u64,
    /// A key set without the keys of those given up; none where the root is not at hand.
    pub keys: Option<KeySetRow>,
}

impl State {
    /// The epoch that the next incarnation begins, where the cell is known to have come to `past` (0: nothing is known of
    /// that).
    pub fn epoch_past(&self, past: u64) -> u64 {
        let own = self.cell().map_or(0, |cell| cell.epoch);
        own.max((self.applied().0 >> INDEX_SHIFT) + 1).max(past).saturating_add(1)
    }
    /// Begins an incarnation: new epoch, one replica, no tickets, no unspent tokens, and no SVID for any node before a
    /// verdict of its own. The proof for the root where the replica gets a new intermediate. Refuses before its first change.
    pub fn begin_incarnation(
        &mut self,
        now: Stamp,
        b: Beginning,
    ) -> Result<Option<Committed<ReplicaAdmission>>, Refusal> {
        let mut cell = cell_row(self)?;
        // What is to be signed for it, now or when it begins again, is signed by an authority that is in time, or not at all.
        let ends = self.authority_ends();
        if let Some(ends) = ends.filter(|ends| *ends < now.plus_ms(super::authority::LIFETIME_MS_MIN)) {
            let expected =
                "an authority under the external root with time left: certified anew (--external-certificate)";
            return Err(Refusal::new(Code::IssuerUnavailable, expected, format!("one that ended at {} (ms)", ends.0)));
        }
        let (from_index, from_digest) = (self.applied(), self.digest());
        let epoch = self.epoch_past(b.past_epoch);
        if epoch > EPOCH_MAX {
            return Err(Refusal::new(Code::BadRequest, format!("an epoch up to {EPOCH_MAX}"), epoch.to_string()));
        }
        let next_identity = cell.next_identity.checked_add(IDENTITY_GAP);
        let next_identity = next_identity.ok_or_else(|| {
            Refusal::new(Code::Internal, "numbers left for identities", cell.next_identity.to_string())
        })?;
        let given_up = self.members().map(|(id, _)| id).filter(|id| *id != b.replica).collect();
        let index = RaftIndex((epoch - 1) << INDEX_SHIFT);
        let at = At { index, stamp: self.advance(index, now) };

        cell.epoch = epoch;
        // Whoever restores has the root's key in hand: it is sealed again when its operator says so.
        if b.admit.is_some() {
            cell.root_form = "file".to_owned();
        }
        cell.bundle_sequence = epoch << BUNDLE_SHIFT | 1;
        cell.next_identity = next_identity;
        (cell.endorsement_revision, cell.policy_revision) = (Revision(index.0), Revision(index.0));
        self.cell.put(&mut self.journal, 0, cell);
        let row =
            IncarnationRow { cause: b.cause, began: at.stamp, from_index, from_digest, replica: b.replica, given_up };
        self.incarnations.put(&mut self.journal, epoch, row);
        while self.incarnations.len() > INCARNATIONS_MAX {
            let Some(oldest) = self.incarnations.iter().next().map(|(k, _)| *k) else { break };
            self.incarnations.remove(&mut self.journal, &oldest);
        }
        // Whoever restores holds the root's key, and gets the founder's certificate for it.
        if b.cause == Cause::Restored
            && let Ok(founder) = crate::FOUNDER.parse()
        {
            self.admins.remove(&mut self.journal, &founder);
            super::deny::readmit(self, &founder)?;
        }
        #[cfg(ambit_mutant)]
        if crate::mutant::is("anew-forgets-entries") {
            self.entries.prune(&mut self.journal, |_, _| true);
        }
        // Tokens that were spent, and tickets that were answered, after what came along are spent still.
        self.tokens.prune(&mut self.journal, |_, _| true);
        self.ticket_keys.prune(&mut self.journal, |_, _| true);
        self.members.prune(&mut self.journal, |_, _| true);
        // What the lost incarnation's replicas proved was of wrap keys that may be gone: they prove it again.
        let goes_on = b.admit.is_none().then_some(b.replica);
        self.attested_replicas.prune(&mut self.journal, |id, _| Some(*id) != goes_on);
        self.admissions.prune(&mut self.journal, |id, _| *id != b.replica || b.admit.is_some());
        let (member, admission) = admit(self, at, epoch, &b);
        self.members.put(&mut self.journal, b.replica, member);
        if let Some(keys) = b.keys {
            self.key_set.put(&mut self.journal, 0, keys);
            // The one before names keys of those given up.
            self.key_set.remove(&mut self.journal, &1);
        }
        // Its first record: whoever imports it refuses the lost incarnation from then on.
        super::jwt::begin_anew(self)?;
        self.forget_keys(goes_on);
        super::root::export_bundle(self)?;
        touch(self, at);
        // It is no entry's doing, and the log of this incarnation is not begun.
        self.noted.clear();
        Ok(admission.map(Committed::new))
    }

    /// Of the lost incarnation only the keys that a replica goes on with are kept; the others' may be anybody's. A replica
    /// with new keys cannot open what was wrapped to its former ones: it is wrapped to again.
    fn forget_keys(&mut self, goes_on: Option<u64>) {
        self.authorities.prune(&mut self.journal, |_, row| Some(row.replica) != goes_on);
        super::external::begin_anew(self, goes_on);
        for (id, mut row) in self.roots.iter().map(|(id, row)| (*id, row.clone())).collect::<Vec<_>>() {
            row.wrapped.retain(|replica, _| Some(*replica) == goes_on);
            self.roots.put(&mut self.journal, id, row);
        }
    }

    /// Whether the node's last verdict is of this incarnation of the cell.
    pub(crate) fn attested_since_began(&self, id: &NodeId) -> bool {
        #[cfg(ambit_mutant)]
        if crate::mutant::is("begun-anew-trusts") {
            return true;
        }
        // A verdict of the very same millisecond may be of the lost one: the next is a second away.
        let fresh = |began: Stamp| self.standing(id).is_some_and(|standing| standing.verdict > began);
        self.incarnations().next_back().is_none_or(|(_, row)| fresh(row.began))
    }
}

fn admit(s: &mut State, at: At, epoch: u64, b: &Beginning) -> (Member, Option<ReplicaAdmission>) {
    let Some((issuer_key_hash, tls_key_hash)) = b.admit else { return (b.member.clone(), None) };
    let lifetime = Lifetime {
        not_before: at.stamp.minus_ms(crate::NOT_BEFORE_SLACK_MS),
        not_after: at.stamp.plus_ms(super::cell::REPLICA_MS).min(s.authority_ends().unwrap_or(Stamp(u64::MAX))),
    };
    let serial = super::issue::serial(epoch, at, 0);
    let admission = ReplicaAdmission { replica: ReplicaId(b.replica), issuer_key_hash, tls_key_hash, serial, lifetime };
    s.admissions.put(&mut s.journal, b.replica, admission.clone());
    (Member { authority_not_after: lifetime.not_after, ..b.member.clone() }, Some(admission))
}

/// The highest generation that an incarnation before this one can have given.
pub(super) fn generations_before(s: &State) -> Generation {
    Generation(s.cell().map_or(0, |cell| cell.epoch.saturating_sub(1) << GENERATION_SHIFT))
}
