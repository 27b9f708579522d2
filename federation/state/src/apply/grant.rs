//! Grants of a lost cell's authority: committed at their holder, judged again wherever their record arrives, and what
//! follows from them at the holder, at the witness, at every peer, and at the home when it comes back.

use super::{At, cell_row, export, payload, touch};
use crate::authorities::{AuthorityRow, AuthorityState};
use crate::command::Reply;
use crate::grant::{
    ApproverKeys, CELLS_APART_MS, FENCE_MS, Fences, GrantRecord, GrantRow, Known, LateRecord, VerifiedGrant, verify,
};
use crate::lease;
use crate::state::State;
use ambit_model::act::Act;
use ambit_model::grant::{FailoverGrant, Naming, Seen, SignedGrant, Vouch};
use ambit_model::record::{Kind, Record};
use ambit_model::{Code, Refusal, Stamp, TrustDomain};

/// Grants remembered of one home, those that fence nothing any more not counted.
const GRANTS_PER_HOME_MAX: usize = 64;
/// Records of one home that wait for an operator's word; what is more is dropped, and stays in the home's own chain.
const LATE_MAX: usize = 10_000;
/// An epoch that cells can count on from (see `incarnation.rs`).
const EPOCH_MAX: u64 = 1 << 22;
/// A grant may be made ready this long before it begins.
const AHEAD_MS: u64 = 24 * 3_600_000;

/// Commits a grant at its holder, which is this cell.
pub(super) fn commit(s: &mut State, at: At, signed: &SignedGrant, by: &str) -> Result<Reply, Refusal> {
    let (own, grant) = (cell_row(s)?.trust_domain, signed.grant()?.clone());
    grant.check()?;
    if grant.holder != own {
        return Err(Refusal::new(Code::GrantHolder, format!("a grant to this cell, {own}"), grant.holder.as_str()));
    }
    if grant.ends <= at.stamp || signed.proposal.expires < at.stamp {
        let found = format!("{grant}, proposed until {} (ms)", signed.proposal.expires.0);
        return Err(Refusal::new(Code::GrantExpired, format!("one in time at {} (ms)", at.stamp.0), found));
    }
    if grant.begins > at.stamp.plus_ms(AHEAD_MS) {
        let expected = format!("a grant that begins by {} (ms)", at.stamp.plus_ms(AHEAD_MS).0);
        return Err(Refusal::new(Code::GrantWindow, expected, grant.to_string()));
    }
    let row = s.standbys.get(&grant.home).cloned();
    let unknown = || {
        let expected = format!("a record of {} that names its standby", grant.home);
        Refusal::new(Code::StandbyUnknown, expected, "none imported here")
    };
    let naming = row.and_then(|row| row.naming).ok_or_else(unknown)?;
    verified(s, signed, Some(&naming))?;
    let room = s.grants_of(&grant.home).count() < GRANTS_PER_HOME_MAX;
    if !room {
        let expected = format!("at most {GRANTS_PER_HOME_MAX} grants of a home within a week");
        return Err(Refusal::new(Code::Busy, expected, "one more"));
    }
    keep(s, at, signed, naming.vouch, by)?;
    export(s, Kind::Grant, grant.home.to_string(), payload(&GrantRecord::Granted(signed.clone()))?);
    Ok(Reply::Done)
}

/// By what is known of the home here.
fn verified(s: &State, signed: &SignedGrant, naming: Option<&Naming>) -> Result<VerifiedGrant, Refusal> {
    let home = &signed.grant()?.home;
    let epoch = s.epoch_of(home);
    if signed.grant()?.epoch > EPOCH_MAX {
        let expected = format!("an epoch up to {EPOCH_MAX}");
        return Err(Refusal::new(Code::BadRequest, expected, signed.grant()?.epoch.to_string()));
    }
    let none = ApproverKeys::new();
    let approvers = s.approver_keys(home).unwrap_or(&none);
    verify(signed, Known { naming, approvers, epoch })
}

fn keep(s: &mut State, at: At, signed: &SignedGrant, vouch: Vouch, by: &str) -> Result<(), Refusal> {
    let grant = signed.grant()?;
    let key = (grant.home.clone(), grant.epoch);
    let row =
        GrantRow { signed: signed.clone(), vouch, seen: at.stamp, stopped: None, released: None, by: by.to_owned() };
    s.grants.put(&mut s.journal, key, row);
    touch(s, at);
    Ok(())
}

/// A peer says that it holds a home's authority, or that it gave it back. What is not good is not taken.
pub(super) fn heard(s: &mut State, at: At, origin: &TrustDomain, home: &TrustDomain, said: GrantRecord) {
    let took = match said {
        GrantRecord::Granted(signed) => take(s, at, origin, home, &signed),
        GrantRecord::Released(epoch) => {
            let key = (home.clone(), epoch);
            let held =
                s.grants.get(&key).cloned().filter(|row| {
                    row.signed.grant().is_ok_and(|grant| grant.holder == *origin) && row.released.is_none()
                });
            if let Some(row) = held {
                s.grants.put(&mut s.journal, key, GrantRow { released: Some(at.stamp), ..row });
            }
            Ok(())
        }
    };
    // As with every record of a peer that it may not write: the sequence moves on, and the object is ignored.
    drop(took);
}

fn take(s: &mut State, at: At, origin: &TrustDomain, home: &TrustDomain, signed: &SignedGrant) -> Result<(), Refusal> {
    let (own, grant) = (cell_row(s)?.trust_domain, signed.grant()?.clone());
    if grant.holder != *origin || grant.home != *home || *origin == own {
        return Err(Refusal::new(Code::GrantHolder, origin.as_str(), grant.to_string()));
    }
    if *home == own {
        return be_fenced(s, at, signed, origin);
    }
    let naming = s.standbys.get(home).and_then(|row| row.naming.clone());
    let naming = naming.ok_or_else(|| Refusal::new(Code::StandbyUnknown, "a standby of the home", "none"))?;
    verified(s, signed, Some(&naming))?;
    let is_witness = naming.witness() == Some(&own);
    keep(s, at, signed, naming.vouch, &format!("peer {origin}"))?;
    if is_witness {
        // Nothing is renewed after this entry, and the holder hears of it by this record.
        export(s, Kind::Seen, home.to_string(), payload(&Seen::Grant(grant.epoch))?);
    }
    Ok(())
}

/// The home hears of a grant of its own authority: whoever of its approvers, of now or before, signed it meant it. It does
/// not argue about whom it named since.
fn be_fenced(s: &mut State, at: At, signed: &SignedGrant, holder: &TrustDomain) -> Result<(), Refusal> {
    let mut approvers: ApproverKeys = s.approvers().map(|(name, row)| (name.clone(), row.key)).collect();
    for (index, row) in s.acts() {
        if let Act::AddApprover(name, card) = &row.act {
            // A name may have had another key before: it is counted by the key.
            let other = approvers.values().all(|key| *key != card.key);
            let name = if approvers.contains_key(name) { format!("former-{index}").parse()? } else { name.clone() };
            approvers.extend(other.then_some((name, card.key)));
        }
    }
    let grant = signed.grant()?;
    let known = s.grants_of(&grant.home).map(|(epoch, _)| epoch).max().unwrap_or(0);
    // Former approvers count here, keys that were stolen among them: what can never have been good stops no cell for good.
    if grant.epoch > EPOCH_MAX {
        return Err(Refusal::new(Code::BadRequest, format!("an epoch up to {EPOCH_MAX}"), grant.epoch.to_string()));
    }
    if grant.begins > at.stamp.plus_ms(AHEAD_MS + CELLS_APART_MS) {
        return Err(Refusal::new(
            Code::GrantWindow,
            "a grant that has begun where it was committed",
            grant.to_string(),
        ));
    }
    // Of the very epoch that it has by now, for instance since it was restored, the grant fences it too.
    verify(signed, Known { naming: None, approvers: &approvers, epoch: known })?;
    let vouch = s.own_standby().and_then(|row| row.naming.clone()).map_or(Vouch::Approvers, |naming| naming.vouch);
    keep(s, at, signed, vouch, &format!("peer {holder}"))?;
    Ok(())
}

/// The witness renews the home's lease no more.
pub(super) fn was_heard(s: &mut State, at: At, by: &TrustDomain, home: &TrustDomain, epoch: u64) {
    let key = (home.clone(), epoch);
    let Some(row) = s.grants.get(&key).cloned() else { return };
    if matches!(&row.vouch, Vouch::Witness { cell, .. } if cell == by) && row.stopped.is_none() {
        s.grants.put(&mut s.journal, key, GrantRow { stopped: Some(at.stamp), ..row });
    }
}

/// The holder gives the authority back before its time.
pub(super) fn release(s: &mut State, at: At, home: &TrustDomain) -> Result<Reply, Refusal> {
    let own = cell_row(s)?.trust_domain;
    let held = s.grants_of(home).last().map(|(epoch, row)| (epoch, row.clone()));
    let held = held.filter(|(_, row)| {
        row.released.is_none() && row.signed.grant().is_ok_and(|grant| grant.holder == own && at.stamp < grant.ends)
    });
    let Some((epoch, row)) = held else {
        return Err(Refusal::new(Code::NotFound, format!("a grant of {home} that this cell holds"), "none"));
    };
    s.grants.put(&mut s.journal, (home.clone(), epoch), GrantRow { released: Some(at.stamp), ..row });
    export(s, Kind::Grant, home.to_string(), payload(&GrantRecord::Released(epoch))?);
    touch(s, at);
    Ok(Reply::Done)
}

/// The home takes its authority back, in an epoch above every grant: whatever it signed before is issued anew.
pub(super) fn take_back(s: &mut State, at: At) -> Result<Reply, Refusal> {
    let mut cell = cell_row(s)?;
    let grants: Vec<(u64, GrantRow)> =
        s.grants_of(&cell.trust_domain).map(|(epoch, row)| (epoch, row.clone())).collect();
    let Some((last, _)) = grants.last().filter(|(epoch, _)| *epoch >= cell.epoch) else {
        return Err(Refusal::new(Code::NotFound, "a grant of this cell's authority", "none above its epoch"));
    };
    for (_, row) in &grants {
        over(row, at.stamp)?;
    }
    let used_up = || Refusal::new(Code::Internal, "an epoch above every grant", last.to_string());
    cell.epoch = last.checked_add(1).ok_or_else(used_up)?;
    cell.bundle_sequence = cell.bundle_sequence.max(cell.epoch << 40) + 1;
    s.cell.put(&mut s.journal, 0, cell);
    let active = |row: &AuthorityRow| row.state == AuthorityState::Active;
    for (id, row) in s.authorities().into_iter().filter(|(_, row)| active(row)) {
        s.authorities.put(&mut s.journal, id, AuthorityRow { state: AuthorityState::Tainted, ..row });
    }
    // The log of an epoch is of that epoch: the new one begins with this.
    if s.audit_is_due() {
        super::audit::begin(s)?;
        let began = super::audit::began(s);
        s.noted.push(began);
    }
    // Of the new epoch: from this record on peers take in all that the home says.
    super::root::export_bundle(s)?;
    touch(s, at);
    Ok(Reply::Done)
}

/// Whether nobody signs under it any more.
fn over(row: &GrantRow, now: Stamp) -> Result<(), Refusal> {
    let grant = row.signed.grant()?;
    let ended = row.released.map_or(grant.ends, |released| released.min(grant.ends));
    if ended.plus_ms(CELLS_APART_MS) <= now {
        return Ok(());
    }
    let expected = format!("no grant until {} (ms), or a minute after {} gave it back", grant.ends.0, grant.holder);
    Err(Refusal::new(Code::EpochFenced, expected, grant.to_string()))
}

/// Whether this cell may sign for its own trust domain, as far as it knows: before anything is issued.
pub(super) fn unfenced(s: &State, at: At) -> Result<(), Refusal> {
    let cell = cell_row(s)?;
    for (epoch, row) in s.grants_of(&cell.trust_domain) {
        over(row, at.stamp)?;
        if epoch >= cell.epoch {
            let expected = format!("an epoch above {epoch}, of {}", row.signed.grant()?);
            return Err(Refusal::new(Code::EpochFenced, expected, cell.epoch.to_string()));
        }
    }
    Ok(())
}

/// Of a fenced epoch revocations only are taken; whatever else comes late waits. None: it is to be taken as ever.
pub(super) fn late(s: &State, record: &Record) -> Option<LateRecord> {
    let fence = s.grants_of(&record.origin).map(|(epoch, _)| epoch).max()?;
    let revokes = match record.kind {
        Kind::NodeDenial | Kind::IdDenial | Kind::LeafDenial | Kind::AuthorityDenial => true,
        Kind::Cluster
        | Kind::Bundle
        | Kind::Policy
        | Kind::Service
        | Kind::Endpoint
        | Kind::JwtKeys
        | Kind::NodeAddress
        | Kind::Group
        | Kind::Standby
        | Kind::Approvers
        | Kind::Grant
        | Kind::Seen
        | Kind::Steer => false,
    };
    #[cfg(ambit_mutant)]
    let revokes = revokes && !crate::mutant::is("older-ban-dropped");
    (record.epoch <= fence && !revokes).then(|| record.clone())
}

/// Keeps a late record for an operator's word.
pub(super) fn hold(s: &mut State, record: LateRecord) {
    let held = s.late.from((record.origin.clone(), 0)).take_while(|((td, _), _)| *td == record.origin).count();
    if held < LATE_MAX {
        s.late.put(&mut s.journal, (record.origin.clone(), record.seq), record);
    }
}

/// A late record that an operator may judge. Whom the home named, who approves for it and what it granted is not taken out of
/// time: one administrator would so undo what two approvers did since.
pub(super) fn held(s: &State, origin: &TrustDomain, seq: u64, keep: bool) -> Result<Record, Refusal> {
    let none = || Refusal::new(Code::NotFound, "a late record (ambit cluster standby show)", format!("{origin}/{seq}"));
    let record = s.late.get(&(origin.clone(), seq)).cloned().ok_or_else(none)?;
    if keep && matches!(record.kind, Kind::Standby | Kind::Approvers | Kind::Grant | Kind::Seen) {
        let expected = "drop: whom a home names and who approves for it is said by its newest record alone";
        return Err(Refusal::new(Code::BadRequest, expected, format!("keep {:?}", record.kind)));
    }
    Ok(record)
}

/// It was judged.
pub(super) fn judged(s: &mut State, origin: &TrustDomain, seq: u64) {
    s.late.remove(&mut s.journal, &(origin.clone(), seq));
}

/// A later word on the same object came in time: what was held of it is over.
pub(super) fn overtaken(s: &mut State, by: &Record) {
    let of = |((td, _), _): &(&(TrustDomain, u64), &LateRecord)| *td == by.origin;
    let held = s.late.from((by.origin.clone(), 0)).take_while(of);
    let same = held.filter(|(_, row)| row.kind == by.kind && row.key == by.key).map(|(key, _)| key.clone());
    for key in same.collect::<Vec<_>>() {
        s.late.remove(&mut s.journal, &key);
    }
}

/// Forgets grants that fence nothing any more, but for the last of each home: its epoch is not given again.
pub(super) fn forget(s: &mut State, now: Stamp) {
    let ended = |row: &GrantRow| row.signed.grant().map_or(Stamp(0), |grant| grant.ends);
    let last: Vec<(TrustDomain, u64)> = s.grants.iter().fold(Vec::new(), |mut last, (key, _)| {
        last.retain(|(home, _): &(TrustDomain, u64)| *home != key.0);
        last.push(key.clone());
        last
    });
    s.grants.prune(&mut s.journal, |key, row| ended(row).plus_ms(FENCE_MS) < now && !last.contains(key));
}

impl State {
    /// Grants of a home's authority, by epoch.
    pub fn grants_of(&self, home: &TrustDomain) -> impl Iterator<Item = (u64, &GrantRow)> {
        let of = home.clone();
        self.grants.from((home.clone(), 0)).take_while(move |((td, _), _)| *td == of).map(|((_, n), row)| (*n, row))
    }

    /// All grants that this cell knows: home and epoch.
    pub fn grants(&self) -> impl Iterator<Item = (&(TrustDomain, u64), &GrantRow)> {
        self.grants.iter()
    }

    /// Records of fenced epochs that wait for an operator's word.
    pub fn late_records(&self) -> impl Iterator<Item = (&(TrustDomain, u64), &LateRecord)> {
        self.late.iter()
    }

    /// The highest epoch that a home is known to have, or to have been granted in.
    pub fn epoch_of(&self, home: &TrustDomain) -> u64 {
        let own = self.cell().filter(|cell| cell.trust_domain == *home).map_or(0, |cell| cell.epoch);
        let peer = self.peer(home).map_or(0, |peer| peer.epoch);
        self.grants_of(home).map(|(epoch, _)| epoch).max().unwrap_or(0).max(own).max(peer)
    }

    /// Why this cell does not sign for its own trust domain, if a grant keeps it from that.
    pub fn fenced(&self) -> Option<Refusal> {
        unfenced(self, At { index: self.applied(), stamp: self.stamp() }).err()
    }

    /// Whether this cell, as a granter, renews the lease of a home in this epoch: it is standby or witness by what it knows,
    /// and of no grant that the epoch is not above. To be asked of a state that is as new as the question.
    ///
    /// # Errors
    /// [`Code::StandbyUnknown`], [`Code::EpochFenced`].
    pub fn renews(&self, home: &TrustDomain, epoch: u64) -> Result<u64, Refusal> {
        let own = self.cell().map(|cell| &cell.trust_domain);
        let naming = self.standbys.get(home).and_then(|row| row.naming.as_ref());
        let concerns = |n: &&Naming| Some(&n.standby) == own || (n.witness().is_some() && n.witness() == own);
        let lease_ms = naming.filter(concerns).and_then(|naming| match &naming.vouch {
            Vouch::Witness { lease_ms, .. } => Some(*lease_ms),
            Vouch::Approvers => None,
        });
        let unknown =
            || Refusal::new(Code::StandbyUnknown, "a home that names this cell, and a witness", home.as_str());
        let lease_ms = lease_ms.ok_or_else(unknown)?;
        for (granted, row) in self.grants_of(home) {
            over(row, self.stamp())?;
            if granted >= epoch {
                let expected = format!("an epoch above {granted}");
                return Err(Refusal::new(Code::EpochFenced, expected, epoch.to_string()));
            }
        }
        Ok(lease_ms)
    }

    /// The grant under which this cell may sign for a home at this stamp, as far as the log can tell: it is live, the last of
    /// that home, and nobody has renewed the home's lease for as long as it could sign. Beside it the signer asks its own
    /// clock ([`lease::Wait`]).
    ///
    /// # Errors
    /// [`Code::StandbyUngranted`].
    pub fn holds(&self, home: &TrustDomain) -> Result<(&FailoverGrant, &Vouch), Refusal> {
        let (own, now) = (self.cell().map(|cell| &cell.trust_domain), self.stamp());
        let refuse = |found: String| Refusal::new(Code::StandbyUngranted, format!("a live grant of {home}"), found);
        let (_, row) = self.grants_of(home).last().ok_or_else(|| refuse("none".into()))?;
        let grant = row.signed.grant()?;
        if Some(&grant.holder) != own || !grant.is_live(now) || row.released.is_some() {
            return Err(refuse(grant.to_string()));
        }
        let since = self.stopped(row).ok_or_else(|| refuse("one whose witness has not heard of it yet".into()))?;
        let wait = lease::wait_ms(&row.vouch);
        #[cfg(ambit_mutant)]
        let wait = if crate::mutant::is("grant-before-lease-ends") { 0 } else { wait };
        if since.plus_ms(wait) > now {
            return Err(refuse(format!("one in effect from {} (ms), at {} (ms)", since.plus_ms(wait).0, now.0)));
        }
        Ok((grant, &row.vouch))
    }

    /// Since when nobody renews the home's lease, as the holder heard it.
    fn stopped(&self, row: &GrantRow) -> Option<Stamp> {
        #[cfg(ambit_mutant)]
        if crate::mutant::is("grant-before-lease-ends") {
            return Some(row.seen);
        }
        match &row.vouch {
            Vouch::Approvers => Some(row.seen),
            Vouch::Witness { .. } => row.stopped,
        }
    }

    /// Grants that this cell holds and after which nobody renews the home's lease: what [`lease::Wait`] is to see.
    pub fn unrenewed(&self) -> Vec<(TrustDomain, u64)> {
        let own = self.cell().map(|cell| &cell.trust_domain);
        let held = self.grants.iter().filter(|(_, row)| {
            row.signed.grant().is_ok_and(|grant| Some(&grant.holder) == own) && self.stopped(row).is_some()
        });
        held.map(|(key, _)| key.clone()).collect()
    }

    /// What this cell accepts of which epoch. Each grant was verified when it was taken in.
    pub fn fences(&self) -> Fences {
        let mut fences = Fences::default();
        // The last grant of a home is kept for its epoch; what it fenced has ended by then.
        let fences_still =
            |row: &GrantRow| row.signed.grant().is_ok_and(|grant| grant.ends.plus_ms(FENCE_MS) >= self.stamp());
        let rows = self.grants.iter().map(|(_, row)| row).filter(|row| fences_still(row));
        rows.filter_map(known_good).for_each(|grant| fences.know(grant));
        fences
    }
}

/// A row is written only after its grant was verified.
fn known_good(row: &GrantRow) -> Option<VerifiedGrant> {
    let mut grant = row.signed.grant().ok()?.clone();
    if let Some(released) = row.released {
        grant.ends = grant.ends.min(released);
    }
    Some(VerifiedGrant::of_row(grant))
}
