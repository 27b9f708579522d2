//! Whom a cell names for the case that it is lost, and what it knows of the namings of others.
//!
//! A naming is good for who acts on it from when its record arrives there. So a home goes on under the lease of a former
//! naming until the former standby has said, in its own chain of records, that it knows of the next: a grant that it acted
//! on before comes before that word.

use super::{At, authority, cell_row, export, payload, touch};
use crate::authorities::authority_of;
use crate::command::Reply;
use crate::committed::StandbyAuthority;
use crate::grant::{ApproverKeys, StandbyRow};
use crate::objects::PeerState;
use crate::state::State;
use ambit_model::grant::{Naming, Seen};
use ambit_model::record::Kind;
use ambit_model::{Code, Lifetime, Refusal, Stamp, TrustDomain};

/// Twice as long as one must have left: renewed at half of it.
const STANDBY_MS: u64 = 14 * 24 * 3_600_000;
/// Five replicas, each renewing, with some that were lost on their way.
const AUTHORITIES_MAX: usize = 64;

/// Whether the cell may name these: active peers, and no earlier naming that somebody may still act on.
pub(super) fn nameable(s: &State, naming: &Naming) -> Result<(), Refusal> {
    naming.check(&cell_row(s)?.trust_domain)?;
    for td in std::iter::once(&naming.standby).chain(naming.witness()) {
        if s.peer(td).is_none_or(|peer| peer.state != PeerState::Active) {
            return Err(Refusal::new(Code::PeerNotActive, "an active peer", td.as_str()));
        }
    }
    settled(s)
}

/// Whether there is a standby to remove.
pub(super) fn removable(s: &State) -> Result<(), Refusal> {
    match s.own_standby() {
        Some(StandbyRow { naming: Some(_), .. }) => settled(s),
        Some(_) | None => Err(Refusal::new(Code::NotFound, "a standby that this cell named", "none")),
    }
}

fn settled(s: &State) -> Result<(), Refusal> {
    match s.own_standby().and_then(|row| row.former.as_ref()) {
        Some(former) if s.peer(&former.standby).is_some() => {
            let expected = format!("a word of {} that it heard of what came after", former.standby);
            Err(Refusal::new(Code::StandbyUnsettled, expected, "none yet"))
        }
        Some(_) | None => Ok(()),
    }
}

/// The next naming, or none any more. Peers are told, with whose word a grant takes.
pub(super) fn name(s: &mut State, at: At, naming: Option<&Naming>) -> Result<(), Refusal> {
    let own = cell_row(s)?.trust_domain;
    let former = s.own_standby().and_then(|row| row.naming.clone());
    deny_former(s, at, naming)?;
    say_approvers(s)?;
    let told = naming.map_or(Ok(Vec::new()), payload)?;
    export(s, Kind::Standby, own.to_string(), told);
    let row = StandbyRow { naming: naming.cloned(), seq: cell_row(s)?.export_seq, former, settled: false };
    s.standbys.put(&mut s.journal, own, row);
    touch(s, at);
    Ok(())
}

/// Peers are told who the approvers are, as soon as there is a standby, and at each change from then on.
pub(super) fn say_approvers(s: &mut State) -> Result<(), Refusal> {
    let keys: ApproverKeys = s.approvers().map(|(name, row)| (name.clone(), row.key)).collect();
    let own = cell_row(s)?.trust_domain.to_string();
    export(s, Kind::Approvers, own, payload(&keys)?);
    Ok(())
}

/// What a standby that is none any more was given for the case that it is.
fn deny_former(s: &mut State, at: At, naming: Option<&Naming>) -> Result<(), Refusal> {
    let of_former = |row: &StandbyAuthority| naming.is_none_or(|naming| naming.standby != row.holder);
    let given = s.standby_authorities.iter().filter(|(_, row)| of_former(row));
    let given: Vec<_> = given.map(|(id, row)| (id.clone(), row.lifetime.not_after)).collect();
    for (id, until) in given {
        authority::deny(s, at, &id, until)?;
        s.standby_authorities.remove(&mut s.journal, &id);
    }
    Ok(())
}

/// In peace, from its own entry: what the root is to sign for a replica of the standby.
pub(super) fn certify(
    s: &mut State,
    at: At,
    holder: &TrustDomain,
    replica: u64,
    key_hash: &[u8; 32],
) -> Result<Reply, Refusal> {
    let cell = cell_row(s)?;
    let named = s.own_standby().and_then(|row| row.naming.as_ref()).is_some_and(|naming| naming.standby == *holder);
    if !named {
        let expected = "the standby that this cell names (ambit cluster standby show)";
        return Err(Refusal::new(Code::StandbyUnknown, expected, holder.as_str()));
    }
    // It would certify who has its authority already.
    super::grant::unfenced(s, at)?;
    let id = authority_of(key_hash);
    if s.authority(&id).is_some() || s.downstream(&id).is_some() || s.standby_authorities.contains(&id) {
        return Err(Refusal::new(Code::AlreadyExists, "a new key", id));
    }
    if s.standby_authorities.iter().filter(|(_, row)| row.lifetime.not_after > at.stamp).count() >= AUTHORITIES_MAX {
        let expected = format!("at most {AUTHORITIES_MAX} intermediates of a standby at once");
        return Err(Refusal::new(Code::Busy, expected, "one more"));
    }
    let none = || Refusal::new(Code::IssuerUnavailable, "an active root", "none");
    let (root, _) = s.active_root().ok_or_else(none)?;
    let lifetime = Lifetime {
        not_before: at.stamp.minus_ms(crate::NOT_BEFORE_SLACK_MS),
        not_after: super::external::bounded(s, at, at.stamp.plus_ms(STANDBY_MS))?,
    };
    let serial = super::issue::serial(cell.epoch, at, 0);
    let row = StandbyAuthority { holder: holder.clone(), replica, root, key_hash: *key_hash, serial, lifetime };
    s.standby_authorities.put(&mut s.journal, id, row.clone());
    Ok(Reply::Standby(Box::new(row)))
}

/// Forgets what no clock can still take for valid.
pub(super) fn forget(s: &mut State, now: Stamp) {
    s.standby_authorities.prune(&mut s.journal, |_, row| row.lifetime.not_after.plus_ms(crate::ISSUER_MARGIN_MS) < now);
}

/// After a change of approvers.
pub(super) fn approvers_changed(s: &mut State) -> Result<(), Refusal> {
    if s.own_standby().is_some_and(|row| row.naming.is_some()) { say_approvers(s) } else { Ok(()) }
}

/// A peer says whom it names. Who is standby by it, or was, says that it knows.
pub(super) fn heard(s: &mut State, home: &TrustDomain, seq: u64, naming: Option<Naming>) -> Result<(), Refusal> {
    let own = cell_row(s)?.trust_domain;
    let naming = naming.filter(|naming| naming.check(home).is_ok());
    let former = s.standbys.get(home).and_then(|row| row.naming.clone());
    let concerns = naming.iter().chain(&former).any(|naming| naming.standby == own);
    let row = StandbyRow { naming, seq, former: None, settled: true };
    s.standbys.put(&mut s.journal, home.clone(), row);
    if concerns {
        export(s, Kind::Seen, home.to_string(), payload(&Seen::Naming(seq))?);
    }
    Ok(())
}

/// A peer has heard of this cell's naming.
pub(super) fn was_heard(s: &mut State, by: &TrustDomain, seq: u64) {
    let Some(own) = s.cell().map(|cell| cell.trust_domain.clone()) else { return };
    let Some(mut row) = s.standbys.get(&own).cloned().filter(|row| row.seq <= seq) else { return };
    row.settled |= row.naming.as_ref().is_some_and(|naming| naming.standby == *by);
    if row.former.as_ref().is_some_and(|former| former.standby == *by) {
        row.former = None;
    }
    s.standbys.put(&mut s.journal, own, row);
}

/// A peer that is gone says nothing more of itself, and nobody acts on what it said.
pub(super) fn forget_peer(s: &mut State, td: &TrustDomain) {
    s.standbys.remove(&mut s.journal, td);
    s.approver_keys.remove(&mut s.journal, td);
}

impl State {
    /// Whom this cell names, if it ever named somebody.
    pub fn own_standby(&self) -> Option<&StandbyRow> {
        self.standbys.get(&self.cell()?.trust_domain)
    }

    /// Whom cells name, by home; the own cell's is among them.
    pub fn standbys(&self) -> impl Iterator<Item = (&TrustDomain, &StandbyRow)> {
        self.standbys.iter()
    }

    /// The namings that somebody may act on against this cell: it signs under the lease of each.
    pub fn namings(&self) -> Vec<Naming> {
        let gone = |former: &&Naming| self.peer(&former.standby).is_none();
        let row = self.own_standby();
        let former = row.and_then(|row| row.former.as_ref()).filter(|former| !gone(former));
        row.and_then(|row| row.naming.as_ref()).into_iter().chain(former).cloned().collect()
    }

    /// Intermediates of this cell's standby that may be in time, by name.
    pub fn standby_authorities(&self) -> impl Iterator<Item = (&String, &StandbyAuthority)> {
        self.standby_authorities.iter()
    }

    /// Keys of a home's approvers, as this cell knows them.
    pub fn approver_keys(&self, home: &TrustDomain) -> Option<&ApproverKeys> {
        self.approver_keys.get(home)
    }
}
