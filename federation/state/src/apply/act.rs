//! Acts that take approvers. Every replica verifies their signatures where it applies the entry: Ed25519 verification is a
//! function of key, message and signature, so that all come to the same.

use super::{At, cell_row, issue, peer, relationship, roles, root, seal, standby};
use crate::command::Reply;
use crate::committed::Subject;
use crate::objects::{ActRow, ApproverRow};
use crate::state::State;
use ambit_model::act::{Act, Approval, Approved, ApproverCard, Proposal, SIGNATURE_BYTES};
use ambit_model::{Code, ObjectName, Refusal, TrustDomain};
use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
use sha2::{Digest, Sha256};

/// People who are asked; one that lost his key is removed by two others.
const APPROVERS_MAX: usize = 16;
/// Acts remembered. One that could still be repeated is never forgotten: then there is no room until it ended.
const ACTS_MAX: usize = 1_000;
/// A proposal ends within a day: what was signed long ago may not be meant any more.
const PROPOSAL_MAX_MS: u64 = 24 * 3_600_000;

/// Does an act, or says why not before anything is changed. What an approver signed counts for one time.
pub(super) fn perform(
    s: &mut State,
    at: At,
    act: &Act,
    approved: Option<&Approved>,
    by: &str,
) -> Result<Reply, Refusal> {
    possible(s, act)?;
    let checked = approve(s, at, act, approved)?;
    match act {
        Act::RevokeRoot(id) => drop(root::revoke(s, at, id)?),
        Act::AddApprover(name, card) => {
            let row = ApproverRow { key: card.key, added: at.stamp, added_by: by.to_owned() };
            s.approvers.put(&mut s.journal, name.clone(), row);
            standby::approvers_changed(s)?;
        }
        Act::RemoveApprover(name) => {
            s.approvers.remove(&mut s.journal, name);
            standby::approvers_changed(s)?;
        }
        Act::RemoveTrustDomain(td) if s.peer(td).is_some() => drop(peer::remove(s, at, td)?),
        Act::RemoveTrustDomain(td) => drop(relationship::remove(s, at, td)?),
        Act::BreakGlass(..) => return Err(replicas_only(act)),
        Act::ImportRoot(..) => return Err(with_its_certificate(act)),
        Act::NameStandby(naming) => standby::name(s, at, Some(naming))?,
        Act::RemoveStandby => standby::name(s, at, None)?,
        Act::FailOver(_) => return Err(at_its_holder(act)),
        Act::ShareRoot { root, threshold, holders } => {
            let names: Vec<ObjectName> = holders.iter().map(|holder| holder.name.clone()).collect();
            seal::shared(s, at, root, *threshold, &names);
        }
    }
    remember(s, at, act, checked, by);
    Ok(Reply::Done)
}

/// What who has a replica's machine asks of it.
pub(super) struct BreakGlass<'a> {
    pub(super) admin: &'a ObjectName,
    pub(super) key_hash: [u8; 32],
    pub(super) authority: &'a str,
    pub(super) replica: u64,
    pub(super) approved: &'a Approved,
}

/// An administrator's certificate where none asks for it: who it is and what he may do is not changed by it.
pub(super) fn break_glass(s: &mut State, at: At, asked: &BreakGlass<'_>) -> Result<Reply, Refusal> {
    roles::certifiable(s, asked.admin)?;
    issue::lifetime(s, at, asked.authority, issue::ADMIN_MS, None)?;
    let act = Act::BreakGlass(asked.admin.clone(), asked.key_hash);
    let checked = check(s, at, &act, asked.approved, act.needs(s.approvers.len())?)?;
    room(s, at)?;
    let by = cell_row(s)?.trust_domain.member(&format!("/ambit/replica/{}", asked.replica))?;
    let subject = Subject::BreakGlass(checked.by.clone());
    let reply = issue::admin(s, at, asked.admin.as_str(), asked.key_hash, asked.authority, subject)?;
    remember(s, at, &act, checked, by.as_str());
    Ok(reply)
}

/// Whether an act that another command does is approved, and can be remembered; it is, by [`remember`].
pub(super) fn approve(s: &mut State, at: At, act: &Act, approved: Option<&Approved>) -> Result<Checked, Refusal> {
    let needed = act.needs(s.approvers.len())?;
    let checked = match approved {
        None if needed == 0 => Checked { statement: [0; 32], expires: at.stamp, by: Vec::new() },
        None => return Err(missing(needed, 0)),
        Some(approved) => check(s, at, act, approved, needed)?,
    };
    room(s, at)?;
    Ok(checked)
}

/// What was done, by whom, and that it was approved for this one time.
pub(super) fn remember(s: &mut State, at: At, act: &Act, checked: Checked, by: &str) {
    let Checked { statement, expires, by: approved_by } = checked;
    let row = ActRow { act: act.clone(), by: by.to_owned(), approved_by, stamp: at.stamp, statement, expires };
    s.acts.put(&mut s.journal, at.index.0, row);
}

/// The command of releases without approvers: good while a cell has none.
pub(super) fn revoke_root_alone(s: &mut State, at: At, id: &crate::authorities::RootId) -> Result<Reply, Refusal> {
    alone(s, &Act::RevokeRoot(*id))?;
    root::revoke(s, at, id)
}

/// The same.
pub(super) fn remove_relationship_alone(s: &mut State, at: At, td: &TrustDomain) -> Result<Reply, Refusal> {
    alone(s, &Act::RemoveTrustDomain(td.clone()))?;
    relationship::remove(s, at, td)
}

fn alone(s: &State, act: &Act) -> Result<(), Refusal> {
    match act.needs(s.approvers.len())? {
        0 => Ok(()),
        needed => Err(missing(needed, 0)),
    }
}

fn replicas_only(act: &Act) -> Refusal {
    Refusal::new(Code::BadRequest, "an act of administrators; a replica breaks glass (ambitd admin)", act.to_string())
}

/// What does not depend on who approves is refused before anybody is asked to.
fn possible(s: &State, act: &Act) -> Result<(), Refusal> {
    match act {
        Act::RevokeRoot(id) => root::revocable(s, id).map(drop),
        Act::AddApprover(name, card) => addable(s, name, card),
        Act::ShareRoot { root, threshold, holders } => root::shareable(s, root, *threshold, holders),
        Act::RemoveApprover(name) if s.approvers.contains(name) => Ok(()),
        Act::RemoveApprover(name) => Err(Refusal::new(Code::NotFound, "an approver of this cell", name.as_str())),
        Act::RemoveTrustDomain(td) if s.peer(td).is_some() => peer::removable(s, td),
        Act::RemoveTrustDomain(td) => relationship::removable(s, td),
        Act::BreakGlass(..) => Err(replicas_only(act)),
        Act::ImportRoot(..) => Err(with_its_certificate(act)),
        Act::NameStandby(naming) => standby::nameable(s, naming),
        Act::RemoveStandby => standby::removable(s),
        Act::FailOver(_) => Err(at_its_holder(act)),
    }
}

fn at_its_holder(act: &Act) -> Refusal {
    Refusal::new(Code::BadRequest, "a grant at its holder (ambit cluster grant)", act.to_string())
}

fn with_its_certificate(act: &Act) -> Refusal {
    Refusal::new(Code::BadRequest, "an import with its certificate (ambit trust external import)", act.to_string())
}

/// A key approves under one name only: else one person were two.
fn addable(s: &State, name: &ObjectName, card: &ApproverCard) -> Result<(), Refusal> {
    if let Some((other, _)) = s.approvers().find(|(other, row)| *other == name || row.key == card.key) {
        return Err(Refusal::new(Code::AlreadyExists, "a name and a key that no approver has", other.as_str()));
    }
    if s.approvers.len() >= APPROVERS_MAX {
        return Err(Refusal::new(Code::Busy, format!("at most {APPROVERS_MAX} approvers"), "more"));
    }
    if has_small_order(&card.key) {
        // Its signatures verify whoever made them.
        return Err(Refusal::new(Code::BadRequest, "an Ed25519 key that somebody holds", "a point of small order"));
    }
    if signs(&card.key, &ApproverCard::proved(&card.key), &card.proof) {
        return Ok(());
    }
    Err(Refusal::new(Code::BadRequest, "a key with its own signature (ambit approver keygen)", "another signature"))
}

/// Whether the point is one of the eight whose order divides the cofactor (RFC 8032 section 5.1), in whatever encoding.
fn has_small_order(key: &[u8; 32]) -> bool {
    const P: [u8; 32] = [
        0xed, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
        0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f,
    ];
    const OF_ORDER_EIGHT: [u8; 32] = [
        0x26, 0xe8, 0x95, 0x8f, 0xc2, 0xb2, 0x27, 0xb0, 0x45, 0xc3, 0xf4, 0x89, 0xf2, 0xef, 0x98, 0xf0, 0xd5, 0xdf,
        0xac, 0x05, 0xd3, 0xc6, 0x33, 0x39, 0xb1, 0x38, 0x02, 0x88, 0x6d, 0x53, 0xfc, 0x05,
    ];
    const OF_ORDER_EIGHT_TOO: [u8; 32] = [
        0xc7, 0x17, 0x6a, 0x70, 0x3d, 0x4d, 0xd8, 0x4f, 0xba, 0x3c, 0x0b, 0x76, 0x0d, 0x10, 0x67, 0x0f, 0x2a, 0x20,
        0x53, 0xfa, 0x2c, 0x39, 0xcc, 0xc6, 0x4e, 0xc7, 0xfd, 0x77, 0x92, 0xac, 0x03, 0x7a,
    ];
    // The last bit is x's sign; what is left is y: 0, 1, -1, two more, and 0 and 1 once more as p and p + 1.
    let (mut y, first) = (*key, |byte: u8, of: [u8; 32]| [&[byte], &of[1..]].concat());
    y[31] &= 0x7f;
    let zero = [0; 32];
    let small = [first(0, zero), first(1, zero), first(0xec, P), first(0xed, P), first(0xee, P)];
    small.iter().any(|of| of.as_slice() == y) || [OF_ORDER_EIGHT, OF_ORDER_EIGHT_TOO].contains(&y)
}

/// What approvals were found to be.
pub(super) struct Checked {
    statement: [u8; 32],
    expires: ambit_model::Stamp,
    by: Vec<ObjectName>,
}

/// What costs least is asked first.
fn check(s: &State, at: At, act: &Act, approved: &Approved, needed: usize) -> Result<Checked, Refusal> {
    let Approved { epoch, expires, nonce, approvals } = approved;
    let cell = cell_row(s)?;
    if *epoch != cell.epoch {
        let expected = format!("a proposal of epoch {}", cell.epoch);
        return Err(Refusal::new(Code::ApprovalInvalid, expected, epoch.to_string()));
    }
    let last = at.stamp.plus_ms(PROPOSAL_MAX_MS);
    if *expires < at.stamp || *expires > last {
        let expected = format!("a proposal that ends between {} and {} (ms)", at.stamp.0, last.0);
        return Err(Refusal::new(Code::ApprovalExpired, expected, expires.0.to_string()));
    }
    let (td, act) = (cell.trust_domain, act.clone());
    let proposal = Proposal { trust_domain: td, epoch: *epoch, expires: *expires, nonce: *nonce, act };
    let message = proposal.statement()?;
    let statement: [u8; 32] = Sha256::digest(&message).into();
    if let Some((index, _)) = s.acts().find(|(_, row)| row.statement == statement) {
        return Err(Refusal::new(Code::ApprovalUsed, "a proposal that was not acted on", format!("index {index}")));
    }
    if approvals.len() > APPROVERS_MAX {
        let expected = format!("at most {APPROVERS_MAX} approvals");
        return Err(Refusal::new(Code::ApprovalInvalid, expected, approvals.len().to_string()));
    }
    let mut by: Vec<ObjectName> = Vec::with_capacity(approvals.len());
    for approval in approvals {
        let name = approver(s, approval)?;
        if by.contains(name) {
            return Err(Refusal::new(Code::ApprovalInvalid, "approvals of different approvers", name.as_str()));
        }
        by.push(name.clone());
    }
    if by.len() < needed {
        return Err(missing(needed, by.len()));
    }
    for (approval, name) in approvals.iter().zip(&by) {
        if !signs(&approval.key, &message, &approval.signature) {
            let found = format!("another signature of {name}'s key");
            return Err(Refusal::new(Code::ApprovalInvalid, format!("a signature over: {}", proposal.act), found));
        }
    }
    Ok(Checked { statement, expires: *expires, by })
}

/// Whose approval it says it is.
fn approver<'a>(s: &'a State, approval: &Approval) -> Result<&'a ObjectName, Refusal> {
    let found = s.approvers().find(|(_, row)| row.key == approval.key).map(|(name, _)| name);
    let none = || Refusal::new(Code::ApprovalInvalid, "a key of an approver of this cell", hex::encode(approval.key));
    found.ok_or_else(none)
}

/// RFC 8032, with the check of S against the group's order that aws-lc makes: a signature has one form.
fn signs(key: &[u8; 32], message: &[u8], signature: &[u8]) -> bool {
    signature.len() == SIGNATURE_BYTES && UnparsedPublicKey::new(&ED25519, key).verify(message, signature).is_ok()
}

fn missing(needed: usize, found: usize) -> Refusal {
    Refusal::new(Code::ApprovalMissing, format!("{needed} approvers"), found.to_string())
}

/// Makes room for one act more, where the oldest can be repeated by nobody any more.
fn room(s: &mut State, at: At) -> Result<(), Refusal> {
    while s.acts.len() >= ACTS_MAX {
        let oldest = s.acts.iter().find(|(_, row)| row.expires < at.stamp).map(|(index, _)| *index);
        let Some(index) = oldest else {
            return Err(Refusal::new(Code::Busy, format!("at most {ACTS_MAX} acts within a day"), "more"));
        };
        s.acts.remove(&mut s.journal, &index);
    }
    Ok(())
}
