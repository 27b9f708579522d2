//! `ambit approve`: an approver's signature. What is signed is told in words before it is, since the file may come from
//! anybody, and so does whoever signs know for which cell.

use super::Session;
use super::approver::FILE_BYTES_MAX;
use crate::args::Approve;
use crate::ask;
use crate::context::read_bounded;
use crate::exit::file_refusal;
use crate::output::Answer;
use crate::when::{now_ms, utc};
use ambit_identity::ApproverKey;
use ambit_identity::approver::{approval_text, read_approval, read_proposal, signed};
use ambit_model::{Act, Code, Proposal, Refusal, TrustDomain};
use ambit_proto::v1;
use std::collections::BTreeSet;
use std::io::{IsTerminal, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use zeroize::Zeroizing;

/// The cell that the approver means.
struct Meant {
    trust_domain: TrustDomain,
    epoch: u64,
    /// How many approvers it has, where it could be asked.
    approvers: Option<usize>,
}

pub(super) async fn run(session: &Session, options: &Approve) -> Result<Answer, Refusal> {
    let proposal = read_proposal(&read_bounded(&options.proposal, FILE_BYTES_MAX)?)?;
    let key = private_key(&options.key)?;
    let meant = meant(session, options).await?;
    let (cell, found) = (of(&meant.trust_domain, meant.epoch), of(&proposal.trust_domain, proposal.epoch));
    if cell != found {
        let expected = format!("a proposal to {cell}; another one is named with --trust-domain and --epoch");
        return Err(Refusal::new(Code::ApprovalInvalid, expected, found));
    }
    if proposal.expires.0 <= now_ms() {
        return Err(Refusal::new(Code::ApprovalExpired, "a proposal in time", utc(proposal.expires.0)));
    }
    let mut by = BTreeSet::from([key.card().key]);
    for file in &options.others {
        by.insert(other(&proposal, file)?);
    }
    tell(&words(&proposal, by.len(), meant.approvers))?;
    confirmed(options)?;
    let approval = key.approve(&proposal)?;
    let told = format!("approved: {}\n  of {cell}, once, until {}", proposal.act, utc(proposal.expires.0));
    Ok(Answer::ok(approval_text(&proposal, &approval)?).note(told))
}

fn of(trust_domain: &TrustDomain, epoch: u64) -> String {
    format!("{trust_domain} (epoch {epoch})")
}

/// What was said on the command line, else what the context's cell says of itself: its epoch stands in no file.
async fn meant(session: &Session, options: &Approve) -> Result<Meant, Refusal> {
    if let (Some(trust_domain), Some(epoch)) = (&options.trust_domain, options.epoch) {
        return Ok(Meant { trust_domain: trust_domain.clone(), epoch, approvers: None });
    }
    let asked = async {
        let cell = session.cell()?;
        let status = ask!(cell, Membership.status(v1::StatusRequest {}))?;
        let approvers = Some(status.approvers as usize);
        Ok(Meant { trust_domain: cell.context().trust_domain.clone(), epoch: status.epoch, approvers })
    };
    asked.await.map_err(|refusal: Refusal| {
        let expected = format!("--trust-domain and --epoch, or a cell to ask: {}", refusal.expected);
        Refusal::new(refusal.code, expected, refusal.found)
    })
}

/// Whose signature over this very proposal is in the file.
fn other(proposal: &Proposal, file: &Path) -> Result<[u8; 32], Refusal> {
    let (of, approval) = read_approval(&read_bounded(file, FILE_BYTES_MAX)?)?;
    if of == *proposal && signed(proposal, &approval)? {
        return Ok(approval.key);
    }
    Err(Refusal::new(Code::ApprovalInvalid, "an approval of this very proposal", file.display().to_string()))
}

/// The proposal in words.
fn words(proposal: &Proposal, signatures: usize, approvers: Option<usize>) -> String {
    let Proposal { trust_domain, epoch, expires, act, .. } = proposal;
    let needs = match approvers.map(|approvers| act.needs(approvers)) {
        Some(Ok(needs)) => format!("{signatures} with yours, of {needs} that it needs"),
        Some(Err(refusal)) => format!("{signatures} with yours; the cell would refuse it now: {}", refusal.expected),
        None => format!("{signatures} with yours; the cell was not asked how many it needs"),
    };
    format!(
        "you are asked to sign:\n  what:       {}\n  object:     {}\n  cell:       {}\n  expires:    {}\n  signatures: {needs}\n",
        what(act),
        object(act),
        of(trust_domain, *epoch),
        utc(expires.0),
    )
}

fn what(act: &Act) -> &'static str {
    match act {
        Act::RevokeRoot(_) => "revoke a root for ever: nothing that is under it is believed any more",
        Act::AddApprover(..) => "add an approver: who has this key signs acts like this one from then on",
        Act::RemoveApprover(_) => "remove an approver: he signs no more acts",
        Act::RemoveTrustDomain(_) => "remove a foreign trust domain: nobody of it is believed any more",
        Act::ShareRoot { .. } => "split a root's key: so many of these people together sign anything in its name",
        Act::ImportRoot(..) => {
            "make a root that somebody else keeps the trust domain's: who has its key signs anything in its name"
        }
        Act::NameStandby(_) => {
            "name a standby: should this cell be lost, it may be granted all of this cell's authority"
        }
        Act::RemoveStandby => "remove the standby: nobody may be granted this cell's authority any more",
        Act::FailOver(_) => {
            "fail over: this cell is lost, and its standby speaks for it until then; where no witness vouches, YOU do"
        }
        Act::BreakGlass(..) => "break glass: certify an administrator for 8 h, without any administrator's word",
    }
}

fn object(act: &Act) -> String {
    match act {
        Act::RevokeRoot(root) => format!("the root with SHA-256 {}", hex::encode(root)),
        Act::AddApprover(name, card) => format!("{name}, key {}", hex::encode(card.key)),
        Act::RemoveApprover(name) => name.to_string(),
        Act::RemoveTrustDomain(td) => td.to_string(),
        Act::NameStandby(naming) => naming.to_string(),
        Act::RemoveStandby => "the standby that it names".to_owned(),
        Act::FailOver(grant) => grant.to_string(),
        Act::ShareRoot { root, threshold, holders } => {
            let holders: Vec<String> = holders.iter().map(ToString::to_string).collect();
            format!("the root with SHA-256 {}, {threshold} of {}", hex::encode(root), holders.join(", "))
        }
        Act::ImportRoot(root, key) => {
            format!("the root with SHA-256 {}, authority with key {}", hex::encode(root), hex::encode(key))
        }
        Act::BreakGlass(name, key) => format!("{name}, key with SHA-256 {}", hex::encode(key)),
    }
}

fn tell(text: &str) -> Result<(), Refusal> {
    let written = std::io::stderr().write_all(text.as_bytes());
    written.map_err(|e| Refusal::new(Code::Internal, "a writable stderr", e.to_string()))
}

/// `yes`, on the command line or at the terminal, and no other word.
fn confirmed(options: &Approve) -> Result<(), Refusal> {
    let refused = |found: &str| Err(Refusal::new(Code::BadRequest, "yes, or --yes, by who read the above", found));
    if options.yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        return refused("no terminal to ask at: nothing was signed");
    }
    tell("sign? (yes) ")?;
    let mut line = String::new();
    let read = std::io::stdin().read_line(&mut line);
    match read.map(|_| line.trim()) {
        Ok("yes") => Ok(()),
        _ => refused("another word: nothing was signed"),
    }
}

fn private_key(file: &Path) -> Result<ApproverKey, Refusal> {
    let mode = std::fs::metadata(file).map_err(|e| file_refusal(file, &e))?.mode();
    if mode & 0o077 != 0 {
        let expected = format!("a key that only its owner may read: chmod 600 {}", file.display());
        return Err(Refusal::new(Code::BadRequest, expected, format!("mode {:o}", mode & 0o7777)));
    }
    ApproverKey::from_pem(&Zeroizing::new(read_bounded(file, FILE_BYTES_MAX)?))
}
