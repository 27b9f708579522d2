//! The trust domain's JWT authorities: made by a leader, wrapped to the replicas, published before they sign, replaced on
//! committed ticks, or at an operator's word: prepared, active, old, tainted, revoked, one step at a time and never back.

use super::{At, export, payload, touch};
use crate::command::Reply;
use crate::objects::{JwtAuthorityRow, JwtAuthorityState, JwtKeys};
use crate::state::State;
use ambit_model::jwt::kid_of;
use ambit_model::record::Kind;
use ambit_model::{Code, JwtAuthority, Refusal, Stamp, TrustDomain};
use std::collections::{BTreeMap, BTreeSet};

/// An authority signs this long, then the next one does.
pub const JWT_SIGNS_MS: u64 = 3 * 24 * 3_600_000;
/// The next one is published this long before it signs: outsiders cache keys for hours.
pub const JWT_PUBLISHED_MS: u64 = 24 * 3_600_000;
/// The same in a hurry, where a replica that left still knows the key that signs: agents and peers have it within seconds,
/// outsiders at their next refresh.
pub const JWT_PUBLISHED_MIN_MS: u64 = 10 * 60_000;
/// One that signed stays published until its last token ended on every clock.
const OLD_MS: u64 = 1_000 * ambit_model::JwtTtl::CEILING_S as u64 + crate::ISSUER_MARGIN_MS;
/// Published at once: the one before, the one that signs, the next; more only where replicas leave one after the other.
const AUTHORITIES_MAX: usize = 8;
/// Revoked ones are remembered until no token of theirs could be valid anyway, and only so many of them.
const REVOKED_MAX: usize = 64;
/// A P-256 key is 91 bytes.
const SPKI_BYTES_MAX: usize = 1_024;
/// Keys of a foreign trust domain that is no cell: SPIRE publishes two of each of its servers.
const FOREIGN_MAX: usize = 64;
/// An RSA key of 8,192 bits is 1,058 bytes.
const FOREIGN_SPKI_BYTES_MAX: usize = 1_100;
const KID_BYTES_MAX: usize = 128;

/// What a leader is to do about the authorities.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JwtDue {
    /// Nothing.
    Nothing,
    /// Make one.
    Prepare,
    /// Wrap this one to these replicas too, who cannot open it.
    Wrap(String, Vec<u64>),
}

impl State {
    /// Authorities, oldest first.
    pub fn jwt_authorities(&self) -> impl Iterator<Item = &JwtAuthorityRow> {
        self.jwt_authorities.iter().map(|(_, row)| row)
    }
    /// The one that signs.
    pub fn jwt_signer(&self) -> Option<&JwtAuthorityRow> {
        self.jwt_authorities().find(|row| row.state == JwtAuthorityState::Active)
    }
    /// Keys of JWT-SVIDs by trust domain: the own, and those of peers whose bundles count.
    pub fn jwt_bundles(&self) -> BTreeMap<TrustDomain, Vec<JwtAuthority>> {
        let own = self.cell().map(|cell| (cell.trust_domain.clone(), self.published()));
        let known = self.known_domains();
        let peers = self.peer_jwt.iter().filter(|(td, _)| known.contains(td));
        own.into_iter().chain(peers.map(|(td, keys)| (td.clone(), keys.authorities.clone()))).collect()
    }
    fn published(&self) -> Vec<JwtAuthority> {
        let public = |row: &JwtAuthorityRow| JwtAuthority {
            kid: row.kid.clone(),
            spki_der: row.spki_der.clone(),
            not_after: row.not_after,
        };
        self.jwt_authorities().filter(|row| row.state != JwtAuthorityState::Revoked).map(public).collect()
    }
    /// Names of the own authorities whose tokens are to be asked for anew.
    pub fn tainted_jwt(&self) -> BTreeSet<String> {
        let tainted = self.jwt_authorities().filter(|row| row.state == JwtAuthorityState::Tainted);
        tainted.map(|row| row.kid.clone()).collect()
    }
    /// Keys of JWT-SVIDs of a peer, or of a foreign trust domain that is no cell, as it told of them last.
    pub fn peer_jwt(&self, td: &TrustDomain) -> &[JwtAuthority] {
        self.peer_jwt.get(td).map_or(&[], |keys| keys.authorities.as_slice())
    }
    /// What a leader is to do, as of the last entry.
    pub fn jwt_due(&self) -> JwtDue {
        let now = self.stamp();
        let prepared = self.jwt_authorities().any(|row| row.state == JwtAuthorityState::Prepared);
        let soon = self.jwt_signer().is_none_or(|row| row.leaves <= now.plus_ms(JWT_PUBLISHED_MS));
        if soon && !prepared && self.published().len() < AUTHORITIES_MAX {
            return JwtDue::Prepare;
        }
        let members = self.wrap_keys();
        let missing = |row: &JwtAuthorityRow| {
            let ids: Vec<u64> = members.keys().filter(|id| !row.wrapped.contains_key(id)).copied().collect();
            let signs = matches!(row.state, JwtAuthorityState::Prepared | JwtAuthorityState::Active);
            (signs && !ids.is_empty()).then(|| (row.kid.clone(), ids))
        };
        self.jwt_authorities().find_map(missing).map_or(JwtDue::Nothing, |(kid, ids)| JwtDue::Wrap(kid, ids))
    }
}

/// A new authority. The first signs at once; any other waits until it was published for long enough.
pub(super) fn put(s: &mut State, at: At, spki_der: &[u8], wrapped: &BTreeMap<u64, Vec<u8>>) -> Result<Reply, Refusal> {
    let kid = kid_of(spki_der);
    if spki_der.is_empty() || spki_der.len() > SPKI_BYTES_MAX {
        let expected = format!("a public key of 1-{SPKI_BYTES_MAX} bytes");
        return Err(Refusal::new(Code::BadRequest, expected, spki_der.len().to_string()));
    }
    let prepared = s.jwt_authorities().find(|row| row.state == JwtAuthorityState::Prepared || row.kid == kid);
    if let Some(row) = prepared {
        return Err(Refusal::new(Code::AlreadyExists, "no authority prepared", row.kid.clone()));
    }
    if s.published().len() >= AUTHORITIES_MAX {
        return Err(Refusal::new(Code::Busy, format!("at most {AUTHORITIES_MAX} JWT authorities"), "one more"));
    }
    only_members(s, wrapped)?;
    let row = JwtAuthorityRow {
        kid,
        spki_der: spki_der.to_vec(),
        state: JwtAuthorityState::Prepared,
        made: at.stamp,
        leaves: Stamp(u64::MAX),
        not_after: at.stamp.plus_ms(JWT_PUBLISHED_MS + 2 * JWT_SIGNS_MS),
        wrapped: wrapped.clone(),
    };
    let first = s.jwt_signer().is_none();
    s.jwt_authorities.put(&mut s.journal, at.index.0, row);
    if first {
        activate(s, at, at.index.0);
    }
    publish(s, at)?;
    Ok(Reply::Done)
}

/// The same key, wrapped to replicas that joined since.
pub(super) fn wrap(s: &mut State, kid: &str, wrapped: &BTreeMap<u64, Vec<u8>>) -> Result<Reply, Refusal> {
    only_members(s, wrapped)?;
    let (n, mut row) = named(s, kid)?;
    if matches!(row.state, JwtAuthorityState::Tainted | JwtAuthorityState::Revoked) {
        return Err(wrong("a JWT authority that signs, or is to", &row));
    }
    row.wrapped.extend(wrapped.iter().map(|(id, bytes)| (*id, bytes.clone())));
    s.jwt_authorities.put(&mut s.journal, n, row);
    Ok(Reply::Done)
}

fn named(s: &State, kid: &str) -> Result<(u64, JwtAuthorityRow), Refusal> {
    let found = s.jwt_authorities.iter().find(|(_, row)| row.kid == kid).map(|(n, row)| (*n, row.clone()));
    found.ok_or_else(|| Refusal::new(Code::NotFound, "a JWT authority of this cell", kid))
}

fn only_members(s: &State, wrapped: &BTreeMap<u64, Vec<u8>>) -> Result<(), Refusal> {
    match wrapped.keys().find(|id| !s.members.contains(id)) {
        None if wrapped.is_empty() => Err(Refusal::new(Code::BadRequest, "a key wrapped to replicas", "to none")),
        None => Ok(()),
        Some(other) => Err(Refusal::new(Code::NotFound, "replicas of this cell", other.to_string())),
    }
}

/// The next one signs from here on; the one before stays published until its last token ended.
fn activate(s: &mut State, at: At, number: u64) {
    let rows: Vec<(u64, JwtAuthorityRow)> = s.jwt_authorities.iter().map(|(n, row)| (*n, row.clone())).collect();
    for (n, row) in rows {
        let row = match row.state {
            _ if n == number => JwtAuthorityRow {
                state: JwtAuthorityState::Active,
                leaves: at.stamp.plus_ms(JWT_SIGNS_MS),
                not_after: at.stamp.plus_ms(2 * JWT_SIGNS_MS),
                ..row
            },
            JwtAuthorityState::Active => JwtAuthorityRow {
                state: JwtAuthorityState::Old,
                not_after: row.not_after.min(at.stamp.plus_ms(OLD_MS)),
                // Nobody signs with it again.
                wrapped: BTreeMap::new(),
                ..row
            },
            JwtAuthorityState::Prepared
            | JwtAuthorityState::Old
            | JwtAuthorityState::Tainted
            | JwtAuthorityState::Revoked => continue,
        };
        s.jwt_authorities.put(&mut s.journal, n, row);
    }
}

fn wrong(expected: &str, row: &JwtAuthorityRow) -> Refusal {
    Refusal::new(Code::RootState, expected, format!("{} is {}", row.kid, row.state.as_str()))
}

/// An operator's word: the prepared one signs now. Who must have heard of it is asked outside.
pub(super) fn activate_now(s: &mut State, at: At, kid: &str) -> Result<Reply, Refusal> {
    let (n, row) = named(s, kid)?;
    if row.state != JwtAuthorityState::Prepared {
        return Err(wrong("a prepared JWT authority", &row));
    }
    let signer = s.jwt_authorities.iter().find(|(_, row)| row.state == JwtAuthorityState::Active);
    let signer = signer.map(|(n, row)| (*n, JwtAuthorityRow { leaves: row.leaves.min(at.stamp), ..row.clone() }));
    if let Some((former, row)) = signer {
        s.jwt_authorities.put(&mut s.journal, former, row);
    }
    activate(s, at, n);
    publish(s, at)?;
    Ok(Reply::Done)
}

pub(super) fn taint(s: &mut State, at: At, kid: &str) -> Result<Reply, Refusal> {
    let (n, row) = named(s, kid)?;
    if row.state != JwtAuthorityState::Old {
        return Err(wrong("an old JWT authority", &row));
    }
    s.jwt_authorities.put(&mut s.journal, n, JwtAuthorityRow { state: JwtAuthorityState::Tainted, ..row });
    publish(s, at)?;
    Ok(Reply::Done)
}

/// Out of the bundle at once; its name stays, so that it is seen and does not come back.
pub(super) fn revoke(s: &mut State, at: At, kid: &str) -> Result<Reply, Refusal> {
    let (n, row) = named(s, kid)?;
    if !matches!(row.state, JwtAuthorityState::Tainted | JwtAuthorityState::Prepared) {
        return Err(wrong("a tainted or a merely prepared JWT authority", &row));
    }
    let revoked = s.jwt_authorities.iter().filter(|(_, row)| row.state == JwtAuthorityState::Revoked);
    let (count, oldest) = revoked.fold((0, None), |(count, oldest), (n, _)| (count + 1, oldest.or(Some(*n))));
    if let Some(oldest) = oldest.filter(|_| count >= REVOKED_MAX) {
        s.jwt_authorities.remove(&mut s.journal, &oldest);
    }
    let gone = JwtAuthorityRow {
        state: JwtAuthorityState::Revoked,
        spki_der: Vec::new(),
        wrapped: BTreeMap::new(),
        not_after: row.not_after.min(at.stamp.plus_ms(OLD_MS)),
        ..row
    };
    s.jwt_authorities.put(&mut s.journal, n, gone);
    publish(s, at)?;
    Ok(Reply::Done)
}

/// Each second: the next one becomes active when it is time, and what ended goes.
pub(super) fn tick(s: &mut State, at: At) -> Result<(), Refusal> {
    let mut changed = false;
    let prepared = s.jwt_authorities.iter().find(|(_, row)| row.state == JwtAuthorityState::Prepared);
    if let Some((n, made)) = prepared.map(|(n, row)| (*n, row.made)) {
        // Where none signs, waiting would help nobody.
        let due = s.jwt_signer().is_none_or(|signer| {
            let published = if signer.leaves <= made { JWT_PUBLISHED_MIN_MS } else { JWT_PUBLISHED_MS };
            signer.leaves <= at.stamp && made.plus_ms(published) <= at.stamp
        });
        if due {
            activate(s, at, n);
            changed = true;
        }
    }
    if s.jwt_authorities().any(|row| row.not_after < at.stamp) {
        // One that is published no more goes without a word.
        changed |= s.jwt_authorities().any(|row| row.not_after < at.stamp && row.state != JwtAuthorityState::Revoked);
        s.jwt_authorities.prune(&mut s.journal, |_, row| row.not_after < at.stamp);
    }
    if changed { publish(s, at) } else { Ok(()) }
}

/// A replica that left knows the keys: one that only was prepared goes, one that signs is replaced as soon as may be.
pub(super) fn without(s: &mut State, at: At, id: u64) -> Result<(), Refusal> {
    let known = |row: &JwtAuthorityRow| row.wrapped.contains_key(&id);
    if !s.jwt_authorities().any(known) {
        return Ok(());
    }
    s.jwt_authorities.prune(&mut s.journal, |_, row| row.state == JwtAuthorityState::Prepared && known(row));
    let signer = s.jwt_authorities.iter().find(|(_, row)| row.state == JwtAuthorityState::Active && known(row));
    if let Some((n, mut row)) = signer.map(|(n, row)| (*n, row.clone())) {
        row.wrapped.remove(&id);
        row.leaves = row.leaves.min(at.stamp);
        s.jwt_authorities.put(&mut s.journal, n, row);
    }
    publish(s, at)
}

/// A cell that begins anew has none of the keys that its lost incarnation signed with.
pub(super) fn begin_anew(s: &mut State) -> Result<(), Refusal> {
    let had = s.jwt_authorities.len() > 0;
    s.jwt_authorities.prune(&mut s.journal, |_, _| true);
    if had { say(s) } else { Ok(()) }
}

/// Another set of keys is another bundle: its sequence rises, nodes get it with their slice and peers as a record.
fn publish(s: &mut State, at: At) -> Result<(), Refusal> {
    if let Some(mut cell) = s.cell().cloned() {
        cell.bundle_sequence += 1;
        s.cell.put(&mut s.journal, 0, cell);
    }
    say(s)?;
    touch(s, at);
    Ok(())
}

fn say(s: &mut State) -> Result<(), Refusal> {
    let Some((td, sequence)) = s.cell().map(|cell| (cell.trust_domain.to_string(), cell.bundle_sequence)) else {
        return Ok(());
    };
    let keys = JwtKeys { sequence, authorities: s.published() };
    export(s, Kind::JwtKeys, td, payload(&keys)?);
    Ok(())
}

/// What a peer says of its keys is taken if it is of its own trust domain, not older than what is known, and of a size
/// that a bundle has.
pub(super) fn foreign(s: &mut State, origin: &TrustDomain, keys: JwtKeys) {
    let fits = |a: &JwtAuthority| fits(a, SPKI_BYTES_MAX);
    let newer = s.peer_jwt.get(origin).is_none_or(|known| known.sequence < keys.sequence);
    if newer && keys.authorities.len() <= AUTHORITIES_MAX && keys.authorities.iter().all(fits) {
        s.peer_jwt.put(&mut s.journal, origin.clone(), keys);
    }
}

fn fits(authority: &JwtAuthority, spki_bytes_max: usize) -> bool {
    (1..=KID_BYTES_MAX).contains(&authority.kid.len()) && (1..=spki_bytes_max).contains(&authority.spki_der.len())
}

/// Keys that a foreign trust domain may have.
pub(super) fn bounded(keys: &[JwtAuthority]) -> Result<(), Refusal> {
    if keys.len() <= FOREIGN_MAX && keys.iter().all(|key| fits(key, FOREIGN_SPKI_BYTES_MAX)) {
        return Ok(());
    }
    let expected = format!("at most {FOREIGN_MAX} JWT keys with names of at most {KID_BYTES_MAX} bytes");
    Err(Refusal::new(Code::BadRequest, expected, format!("{} keys", keys.len())))
}

/// What its endpoint said of its keys; without any nothing is remembered.
pub(super) fn put_foreign(s: &mut State, td: &TrustDomain, sequence: u64, authorities: &[JwtAuthority]) {
    match authorities {
        [] => _ = s.peer_jwt.remove(&mut s.journal, td),
        some => s.peer_jwt.put(&mut s.journal, td.clone(), JwtKeys { sequence, authorities: some.to_vec() }),
    }
}
