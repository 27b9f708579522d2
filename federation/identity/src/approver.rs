//! Approvers' private keys, and the files that carry a proposal to them and their word back.
//!
//! Both files are JSON with the act as one line of text. What is signed is made from what was read of the file, never the
//! file's own bytes: an approver who is shown the act has been shown what he signs.

use crate::keys::internal;
use crate::record::public_of;
use ambit_model::act::{Act, Approval, Approved, ApproverCard, Proposal, SIGNATURE_BYTES};
use ambit_model::{Code, Refusal, Stamp, TrustDomain};
use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, UnparsedPublicKey};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

const BEGIN: &str = "-----BEGIN PRIVATE KEY-----\n";
const END: &str = "\n-----END PRIVATE KEY-----\n";

/// An approver's private key: Ed25519. Neither shown nor cloned; aws-lc wipes it when it is dropped.
pub struct ApproverKey {
    pair: Ed25519KeyPair,
}

impl ApproverKey {
    /// A fresh key.
    pub fn generate() -> Result<Self, Refusal> {
        Ok(Self { pair: Ed25519KeyPair::generate().map_err(|e| internal("an Ed25519 key", e))? })
    }
    /// From its file, as [`ApproverKey::pem`] or `openssl genpkey -algorithm ed25519` writes it.
    pub fn from_pem(pem: &str) -> Result<Self, Refusal> {
        let bad = |found: &str| Refusal::new(Code::BadRequest, "an Ed25519 key (PKCS#8, PEM)", found);
        let body = pem.strip_prefix(BEGIN).and_then(|rest| rest.strip_suffix(END));
        let body = body.ok_or_else(|| bad("other lines around it"))?;
        let der = STANDARD.decode(body).map(Zeroizing::new).map_err(|_| bad("no base64"))?;
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(&der).map_err(|_| bad("another key"))?;
        Ok(Self { pair })
    }
    /// PKCS#8 PEM, for a file of mode 0600.
    pub fn pem(&self) -> Result<Zeroizing<String>, Refusal> {
        let der = self.pair.to_pkcs8v1().map_err(|e| internal("an Ed25519 key", e))?;
        let body = Zeroizing::new(STANDARD.encode(der.as_ref()));
        Ok(Zeroizing::new([BEGIN, &body, END].concat()))
    }
    /// What the approver hands out.
    pub fn card(&self) -> ApproverCard {
        let key = public_of(&self.pair);
        ApproverCard { key, proof: self.pair.sign(&ApproverCard::proved(&key)).as_ref().to_vec() }
    }
    /// The approver's word for a proposal.
    pub fn approve(&self, proposal: &Proposal) -> Result<Approval, Refusal> {
        let signature = self.pair.sign(&proposal.statement()?).as_ref().to_vec();
        Ok(Approval { key: public_of(&self.pair), signature })
    }
}

/// Approvers are asked within a working day; the cell takes a day at most.
const PROPOSAL_MS: u64 = 8 * 3_600_000;

/// An act as it is proposed now.
pub fn propose(trust_domain: TrustDomain, epoch: u64, now: Stamp, act: Act) -> Result<Proposal, Refusal> {
    let mut nonce = [0; 16];
    aws_lc_rs::rand::fill(&mut nonce).map_err(|e| internal("random bytes", e))?;
    Ok(Proposal { trust_domain, epoch, expires: now.plus_ms(PROPOSAL_MS), nonce, act })
}

/// Whether this is its key's signature over the proposal. Whether the key is an approver's, the cell says.
pub fn signed(proposal: &Proposal, approval: &Approval) -> Result<bool, Refusal> {
    let key = UnparsedPublicKey::new(&ED25519, approval.key);
    Ok(key.verify(&proposal.statement()?, &approval.signature).is_ok())
}

/// A proposal's file.
pub fn proposal_text(proposal: &Proposal) -> Result<String, Refusal> {
    text(&Proposed::from(proposal))
}

/// Strictly: an unknown field refuses the whole.
pub fn read_proposal(text: &str) -> Result<Proposal, Refusal> {
    let read: Proposed = serde_json::from_str(text).map_err(|e| unread("a proposal (ambit writes one)", &e))?;
    read.parse()
}

/// The file of one approver's word.
pub fn approval_text(proposal: &Proposal, approval: &Approval) -> Result<String, Refusal> {
    text(&Signed {
        proposal: proposal.into(),
        key: hex::encode(approval.key),
        signature: hex::encode(&approval.signature),
    })
}

/// Strictly. Whether the signature holds, and is an approver's, the cell says.
pub fn read_approval(text: &str) -> Result<(Proposal, Approval), Refusal> {
    let read: Signed = serde_json::from_str(text).map_err(|e| unread("an approval (ambit approve writes one)", &e))?;
    let bad = |what: &str| Refusal::new(Code::BadRequest, format!("an approval's {what} in hex digits"), "another");
    let mut key = [0; 32];
    hex::decode_to_slice(&read.key, &mut key).map_err(|_| bad("key"))?;
    let mut signature = vec![0; SIGNATURE_BYTES];
    hex::decode_to_slice(&read.signature, &mut signature).map_err(|_| bad("signature"))?;
    Ok((read.proposal.parse()?, Approval { key, signature }))
}

/// What approvers signed of this act in this trust domain: files, each with its name for who reads the refusal. None where
/// there are none.
pub fn gather(own: &TrustDomain, act: &Act, files: &[(String, String)]) -> Result<Option<Approved>, Refusal> {
    let mut all: Option<Approved> = None;
    for (name, text) in files {
        let (proposal, approval) = read_approval(text)?;
        let wrong = |expected: String, found: &str| {
            Err(Refusal::new(Code::ApprovalInvalid, expected, format!("{found} in {name}")))
        };
        if proposal.act != *act {
            return wrong(act.to_string(), &proposal.act.to_string());
        }
        if proposal.trust_domain != *own {
            return wrong(format!("a proposal to {own}"), proposal.trust_domain.as_str());
        }
        let Proposal { epoch, expires, nonce, .. } = proposal;
        let all = all.get_or_insert(Approved { epoch, expires, nonce, approvals: Vec::new() });
        if (all.epoch, all.expires, all.nonce) != (epoch, expires, nonce) {
            return wrong("approvals of one proposal".to_owned(), "another one");
        }
        all.approvals.push(approval);
    }
    Ok(all)
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Proposed {
    act: String,
    trust_domain: TrustDomain,
    epoch: u64,
    expires_ms: u64,
    nonce: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Signed {
    proposal: Proposed,
    key: String,
    signature: String,
}

impl From<&Proposal> for Proposed {
    fn from(p: &Proposal) -> Self {
        Self {
            act: p.act.to_string(),
            trust_domain: p.trust_domain.clone(),
            epoch: p.epoch,
            expires_ms: p.expires.0,
            nonce: hex::encode(p.nonce),
        }
    }
}

impl Proposed {
    fn parse(self) -> Result<Proposal, Refusal> {
        let act: Act = self.act.parse()?;
        let mut nonce = [0; 16];
        hex::decode_to_slice(&self.nonce, &mut nonce)
            .map_err(|_| Refusal::new(Code::BadRequest, "a proposal's nonce of 32 hex digits", self.nonce.as_str()))?;
        let (trust_domain, epoch, expires) = (self.trust_domain, self.epoch, Stamp(self.expires_ms));
        Ok(Proposal { trust_domain, epoch, expires, nonce, act })
    }
}

fn text(file: &impl Serialize) -> Result<String, Refusal> {
    serde_json::to_string_pretty(file).map_err(|e| internal("a file that encodes", e))
}

fn unread(expected: &str, e: &serde_json::Error) -> Refusal {
    Refusal::new(Code::BadRequest, expected, e.to_string())
}
