//! Issuance records: what may be signed, by whom, for how long.

use super::{At, cell_row, grant};
use crate::authorities::{AuthorityState, authority_of};
use crate::command::{Command, LeafRequest, Reply};
use crate::committed::{Issuance, JwtIssuance, Subject};
use crate::objects::{EntryRow, NodeRow};
use crate::state::State;
use ambit_model::{Code, EntryId, Generation, Lifetime, NodeId, Refusal, Stamp, SvidTtl};

/// Administrators' certificates last 8 h (design.md section 4).
pub(super) const ADMIN_MS: u64 = 8 * 3_600_000;

/// Leaves of one node that may be remembered at once: a node of 1,000 workloads renews each a few times an hour, and
/// one that asks without end fills its own share only (I17).
pub(crate) const LEAVES_PER_NODE_MAX: usize = 4_096;

/// Epoch (4 bytes, top bit clear so that the DER integer is positive), index (8), position (4).
pub(super) fn serial(epoch: u64, at: At, position: u32) -> [u8; 16] {
    let mut out = [0u8; 16];
    let epoch = (epoch as u32) & 0x3fff_ffff | 0x4000_0000;
    out[..4].copy_from_slice(&epoch.to_be_bytes());
    out[4..12].copy_from_slice(&at.index.0.to_be_bytes());
    #[cfg(ambit_mutant)]
    if crate::mutant::is("serial-of-second") {
        out[4..12].copy_from_slice(&(at.stamp.0 / 1000).to_be_bytes());
    }
    out[12..].copy_from_slice(&position.to_be_bytes());
    out
}

/// When leaves of the authority's intermediate end, or a refusal where no replica holds it, or it is not relied on.
fn authority_ends(s: &State, authority: &str) -> Result<Stamp, Refusal> {
    let row = s.authority(authority).filter(|row| s.member(row.replica).is_some());
    let row = row.ok_or_else(|| {
        Refusal::new(Code::AuthorityMismatch, "the intermediate of a replica of this cell", authority)
    })?;
    if s.is_tainted(&row) {
        let found = format!("{authority}, which is tainted");
        return Err(Refusal::new(Code::AuthorityMismatch, "an intermediate that is relied on", found));
    }
    Ok(row.lifetime.not_after.minus_ms(row.margin_ms()))
}

/// I6: the earliest of the TTL, the issuer's end less a margin, and the last verdict plus the unattested maximum.
pub(super) fn lifetime(
    s: &State,
    at: At,
    authority: &str,
    ttl_ms: u64,
    verdict: Option<Stamp>,
) -> Result<Lifetime, Refusal> {
    let issuer = authority_ends(s, authority)?;
    Ok(lasts(at, ends(at, issuer, ttl_ms, verdict)?))
}

/// From now, a little earlier for clocks that lag.
fn lasts(at: At, not_after: Stamp) -> Lifetime {
    Lifetime { not_before: at.stamp.minus_ms(crate::NOT_BEFORE_SLACK_MS), not_after }
}

/// What is issued under an entry does not outlive it.
fn ttl_ms(at: At, row: &EntryRow, ttl_ms: u64) -> u64 {
    ttl_ms.min(row.entry.extras.expires_at.0.saturating_sub(at.stamp.0))
}

/// See [`lifetime`]; `issuer` is the last instant at which what it signs may be valid.
pub(super) fn ends(at: At, issuer: Stamp, ttl_ms: u64, verdict: Option<Stamp>) -> Result<Stamp, Refusal> {
    let mut not_after = at.stamp.plus_ms(ttl_ms).min(issuer);
    if let Some(verdict) = verdict {
        not_after = not_after.min(verdict.plus_ms(crate::UNATTESTED_MAX_MS));
    }
    if not_after <= at.stamp {
        return Err(Refusal::new(Code::IssuerUnavailable, "an issuer with time left", "one that ends"));
    }
    Ok(not_after)
}

/// I4: the node as it stands at this index, if it may be issued anything at all.
pub(super) fn trusted_node<'a>(
    s: &'a State,
    at: At,
    id: &NodeId,
    generation: Generation,
) -> Result<&'a NodeRow, Refusal> {
    grant::unfenced(s, at)?;
    let node = s.node(id).ok_or_else(|| Refusal::new(Code::NodeUnknown, "an enrolled node", id.to_string()))?;
    let (barred, denied) = (node.state.bars_trust(), s.denied(id).is_some_and(|g| generation <= g));
    #[cfg(ambit_mutant)]
    let (barred, denied) = if crate::mutant::is("revocation-unchecked") { (None, false) } else { (barred, denied) };
    if let Some(code) = barred {
        return Err(Refusal::new(code, "an admitted node", node.state.as_str()));
    }
    if node.generation < generation || denied {
        return Err(Refusal::new(
            Code::NodeUntrusted,
            format!("generation {}", node.generation),
            generation.to_string(),
        ));
    }
    if verdict(s, id).plus_ms(crate::UNATTESTED_MAX_MS) <= at.stamp {
        return Err(Refusal::new(Code::NodeUntrusted, "a verdict within the last hour", "an older one"));
    }
    if !s.attested_since_began(id) {
        let expected = format!("a verdict since the cell began its incarnation {}", cell_row(s)?.epoch);
        return Err(Refusal::new(Code::NodeLate, expected, "none yet"));
    }
    if s.is_late(id) {
        let expected = format!("a verdict within {} intervals", crate::LATE_INTERVALS);
        return Err(Refusal::new(Code::NodeLate, expected, "none: the node does not answer"));
    }
    Ok(node)
}

/// When the node's last good verdict was.
fn verdict(s: &State, id: &NodeId) -> Stamp {
    s.standing(id).map_or(Stamp(0), |standing| standing.verdict)
}

/// The record of a node's own leaf; called by `admit` once everything else held.
pub(super) fn node_leaf(
    s: &mut State,
    at: At,
    id: &NodeId,
    generation: Generation,
    authority: &str,
    key_hash: [u8; 32],
) -> Result<Issuance, Refusal> {
    grant::unfenced(s, at)?;
    let cell = cell_row(s)?;
    let issuance = Issuance {
        authority: authority.to_owned(),
        serial: serial(cell.epoch, at, 0),
        spiffe_id: cell.trust_domain.member(&format!("/ambit/node/{id}"))?,
        subject: Subject::Node,
        binding: Some((*id, generation)),
        epoch: cell.epoch,
        key_hash,
        lifetime: lifetime(s, at, authority, SvidTtl::DEFAULT.ms(), Some(at.stamp))?,
        index: at.index,
    };
    Ok(issuance)
}

/// How a leaf stands in [`State::leaves`].
pub(crate) fn indexed(issuance: &Issuance) -> (Option<NodeId>, (Stamp, [u8; 16])) {
    (issuance.binding.map(|(node, _)| node), (issuance.lifetime.not_after, issuance.serial))
}

pub(super) fn keep(s: &mut State, issuance: &Issuance) {
    let (node, leaf) = indexed(issuance);
    s.issued.put(&mut s.journal, issuance.serial, issuance.clone());
    s.leaves.entry(node).or_default().insert(leaf);
}

/// Forgets leaves that no clock of the cell can still take for valid.
pub(super) fn forget(s: &mut State, now: Stamp) {
    let is_over = |ends: Stamp| ends.plus_ms(crate::ISSUER_MARGIN_MS) < now;
    let mut gone = Vec::new();
    s.leaves.retain(|_, leaves| {
        // Every second, for every node: most have nothing to forget.
        while let Some((ends, serial)) = leaves.first().copied().filter(|(ends, _)| is_over(*ends)) {
            leaves.remove(&(ends, serial));
            gone.push(serial);
        }
        !leaves.is_empty()
    });
    for serial in gone {
        s.issued.remove(&mut s.journal, &serial);
    }
}

/// How many of `asked` leaves the node may have; those that have not ended are counted only where it matters.
fn room(s: &State, at: At, node: &NodeId, asked: usize) -> usize {
    let Some(leaves) = s.leaves.get(&Some(*node)).filter(|leaves| leaves.len() + asked > LEAVES_PER_NODE_MAX) else {
        return asked;
    };
    LEAVES_PER_NODE_MAX.saturating_sub(leaves.range((at.stamp, [0; 16])..).count())
}

/// What was answered before, as far as it may be answered again: no leaf to a node that is out by now, nor one of an
/// entry that is gone or fits the node no more.
pub(crate) fn answer_again(s: &State, at: At, command: &Command, reply: Reply) -> Result<Reply, Refusal> {
    match (command, reply) {
        (Command::Issue { node, generation, .. }, Reply::Leaves(leaves)) => {
            trusted_node(s, at, node, *generation)?;
            let again = |leaf: Issuance| {
                if fits_still(s, node, &leaf.subject) { Ok(leaf) } else { Err(unfit(leaf.spiffe_id.as_str())) }
            };
            Ok(Reply::Leaves(leaves.into_iter().map(|leaf| leaf.and_then(again)).collect()))
        }
        (Command::IssueJwt { node, generation, .. }, Reply::Token(token)) => {
            trusted_node(s, at, node, *generation)?;
            if fits_still(s, node, &token.subject) {
                Ok(Reply::Token(token))
            } else {
                Err(unfit(token.spiffe_id.as_str()))
            }
        }
        (Command::NewDownstream { node, generation, .. }, Reply::Downstream(one)) => {
            trusted_node(s, at, node, *generation)?;
            let row = s.downstream(&authority_of(&one.key_hash));
            if row.is_some_and(|row| row.state == AuthorityState::Active) {
                Ok(Reply::Downstream(one))
            } else {
                Err(Refusal::new(Code::SvidRevoked, "a downstream authority that is relied on", one.entry.as_str()))
            }
        }
        (_, reply) => Ok(reply),
    }
}

/// Whether what was issued would be issued again, as far as its entry is concerned.
fn fits_still(s: &State, node: &NodeId, subject: &Subject) -> bool {
    match subject {
        Subject::Workload(id, revision) | Subject::NamedWorkload(id, revision, _) => {
            s.entry(id).is_some_and(|row| row.revision == *revision && s.fits(&row.entry, node))
        }
        Subject::Node | Subject::Admin | Subject::Minted(..) | Subject::BreakGlass(_) => true,
    }
}

fn unfit(what: &str) -> Refusal {
    Refusal::new(Code::EntryNotOnNode, "an entry that names this node and whose node selectors it meets", what)
}

pub(super) fn leaves(
    s: &mut State,
    at: At,
    node: &NodeId,
    generation: Generation,
    authority: &str,
    requests: &[LeafRequest],
) -> Result<Reply, Refusal> {
    let generation = trusted_node(s, at, node, generation)?.generation;
    let issuer = authority_ends(s, authority)?;
    let mut room = room(s, at, node, requests.len());
    let mut out = Vec::with_capacity(requests.len());
    for (position, request) in requests.iter().enumerate() {
        let leaf = match room {
            0 => {
                let expected = format!("at most {LEAVES_PER_NODE_MAX} leaves of a node at once");
                Err(Refusal::new(Code::Busy, expected, "one more"))
            }
            _ => leaf(s, at, (node, generation), (authority, issuer), request, position as u32),
        };
        if let Ok(issuance) = &leaf {
            keep(s, issuance);
            room -= 1;
        }
        out.push(leaf);
    }
    Ok(Reply::Leaves(out))
}

fn leaf(
    s: &State,
    at: At,
    (node, generation): (&NodeId, Generation),
    (authority, issuer): (&str, Stamp),
    request: &LeafRequest,
    position: u32,
) -> Result<Issuance, Refusal> {
    let cell = cell_row(s)?;
    let entry =
        s.entry(&request.entry).filter(|e| s.fits(&e.entry, node)).ok_or_else(|| unfit(request.entry.as_str()))?;
    let not_after = ends(at, issuer, ttl_ms(at, entry, entry.entry.ttl.ms()), Some(verdict(s, node)))?;
    Ok(Issuance {
        authority: authority.to_owned(),
        serial: serial(cell.epoch, at, position),
        spiffe_id: entry.entry.spiffe_id.clone(),
        subject: Subject::workload(entry),
        binding: Some((*node, generation)),
        epoch: cell.epoch,
        key_hash: request.key_hash,
        lifetime: lasts(at, not_after),
        index: at.index,
    })
}

pub(super) fn admin(
    s: &mut State,
    at: At,
    name: &str,
    key_hash: [u8; 32],
    authority: &str,
    subject: Subject,
) -> Result<Reply, Refusal> {
    let cell = cell_row(s)?;
    let issuance = Issuance {
        authority: authority.to_owned(),
        serial: serial(cell.epoch, at, 0),
        spiffe_id: cell.trust_domain.member(&format!("/ambit/admin/{name}"))?,
        subject,
        binding: None,
        epoch: cell.epoch,
        key_hash,
        lifetime: lifetime(s, at, authority, ADMIN_MS, None)?,
        index: at.index,
    };
    keep(s, &issuance);
    Ok(Reply::Leaves(vec![Ok(issuance)]))
}

/// A token: the node and the entry as for a leaf, the authority the one that signs now (I4, I5, I6).
pub(super) fn token(
    s: &mut State,
    at: At,
    node: &NodeId,
    generation: Generation,
    kid: &str,
    entry: &EntryId,
    audience_sha256: &[u8; 32],
) -> Result<Reply, Refusal> {
    let generation = trusted_node(s, at, node, generation)?.generation;
    let row = s.entry(entry).filter(|row| s.fits(&row.entry, node)).ok_or_else(|| unfit(entry.as_str()))?;
    let verdict = Some(verdict(s, node));
    Ok(Reply::Token(Box::new(JwtIssuance {
        kid: kid.to_owned(),
        jti: serial(cell_row(s)?.epoch, at, 0),
        spiffe_id: row.entry.spiffe_id.clone(),
        subject: Subject::Workload(entry.clone(), row.revision),
        binding: Some((*node, generation)),
        audience_sha256: *audience_sha256,
        stamp: at.stamp,
        not_after: ends(at, signer_ends(s, kid)?, ttl_ms(at, row, row.entry.extras.jwt_ttl.ms()), verdict)?,
        index: at.index,
    })))
}

/// The last instant of tokens of the JWT authority that signs now, or a refusal where another one is named.
pub(super) fn signer_ends(s: &State, kid: &str) -> Result<Stamp, Refusal> {
    let signer = s.jwt_signer().filter(|row| row.kid == kid);
    signer
        .map(|row| row.not_after.minus_ms(crate::ISSUER_MARGIN_MS))
        .ok_or_else(|| Refusal::new(Code::AuthorityMismatch, "the JWT authority that signs now", kid))
}
