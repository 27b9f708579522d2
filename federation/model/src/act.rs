//! Acts that one administrator must not do alone, and the statement that approvers sign for them.
//!
//! An approver reads the act as the text that is parsed back into it, and signs what the state machine acts on: nobody
//! signs bytes that he cannot read.

use crate::grant::{FailoverGrant, Naming};
use crate::id::{ObjectName, TrustDomain};
use crate::refusal::{Code, Refusal};
use crate::time::Stamp;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Before every statement that an approver signs.
const ACT_CONTEXT: &[u8] = b"ambit/act/v1\0";
/// Before the key in the proof that somebody holds it.
const CARD_CONTEXT: &[u8] = b"ambit/approver/v1\0";
/// Of a signature by Ed25519 (RFC 8032).
pub const SIGNATURE_BYTES: usize = 64;
/// Of an act that takes two.
const TWO: usize = 2;

/// What an approver hands out: his Ed25519 public key, and its signature over itself. A key that was mistyped, for which
/// nobody could ever sign, so makes no approver. Written as 192 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApproverCard {
    /// The public key.
    pub key: [u8; 32],
    /// [`SIGNATURE_BYTES`] over [`ApproverCard::proved`].
    pub proof: Vec<u8>,
}

impl ApproverCard {
    /// What is signed to prove that the key is somebody's.
    pub fn proved(key: &[u8; 32]) -> Vec<u8> {
        [CARD_CONTEXT, key].concat()
    }
}

impl fmt::Display for ApproverCard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", hex::encode(self.key), hex::encode(&self.proof))
    }
}

impl FromStr for ApproverCard {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        let bad =
            || Refusal::new(Code::BadRequest, "192 lower-case hex digits, as ambit approver keygen prints them", s);
        let (key, proof) = s.split_at_checked(64).ok_or_else(bad)?;
        Ok(Self { key: digest(key).ok_or_else(bad)?, proof: bytes(proof, SIGNATURE_BYTES).ok_or_else(bad)? })
    }
}

/// An act that takes approvers, as soon as a cell has some.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Act {
    /// The root with this SHA-256 leaves the bundle for ever.
    RevokeRoot([u8; 32]),
    /// Whoever holds this key approves from now on.
    AddApprover(ObjectName, ApproverCard),
    /// Whoever has this name approves no more.
    RemoveApprover(ObjectName),
    /// The relationship with this foreign trust domain, or the peer that it is, ends, and its bundle goes.
    RemoveTrustDomain(TrustDomain),
    /// This administrator gets a certificate for the key with this SHA-256 (of its SPKI) from a replica itself, where he
    /// has none left to ask with.
    BreakGlass(ObjectName, [u8; 32]),
    /// The key of the root with this SHA-256 is split, so that any `threshold` of these people open it together.
    ShareRoot {
        /// Which root.
        root: [u8; 32],
        /// How many it takes.
        threshold: u8,
        /// Each gets one share.
        holders: Vec<ShareHolder>,
    },
    /// The root with this SHA-256, whose key somebody else keeps, is to be the trust domain's, with the cell's authority of the
    /// key with this SHA-256 (of its SPKI) under it.
    ImportRoot([u8; 32], [u8; 32]),
    /// These may be given the cell's authority, should it be lost.
    NameStandby(Naming),
    /// Nobody may any more.
    RemoveStandby,
    /// Its standby gets the authority of the cell. The home's approvers say so, and the holder's cell commits it.
    FailOver(FailoverGrant),
}

impl Act {
    /// How many approvers the act takes in a cell with so many. A cell without any lets one administrator act alone, as
    /// ever, but where no administrator acts at all, or where the root's key would leave the cell; from the first approver on
    /// none can. Whom to ask is decided by those
    /// who are asked already: with one, by him.
    ///
    /// # Errors
    /// [`Code::NeedsSecondApprover`] and [`Code::ApprovalMissing`], where there are too few of them.
    pub fn needs(&self, approvers: usize) -> Result<usize, Refusal> {
        match (self, approvers) {
            (Self::BreakGlass(..), 0) => {
                let expected =
                    "a cell with an approver (ambit approver add, while a federation-admin has a certificate)";
                Err(Refusal::new(Code::ApprovalMissing, expected, "one without any"))
            }
            (Self::BreakGlass(..), _) => Ok(1),
            // Alone, an administrator would split the key among keys that are all his own.
            (Self::ShareRoot { .. }, 0) => {
                Err(Refusal::new(Code::NeedsSecondApprover, "a cell with two approvers or more", "one without any"))
            }
            // Approvers are who will grant the authority: whoever names a standby has them.
            (Self::NameStandby(_) | Self::RemoveStandby | Self::FailOver(_), 0) => {
                Err(Refusal::new(Code::NeedsSecondApprover, "a cell with two approvers or more", "one without any"))
            }
            (_, 0) => Ok(0),
            (Self::NameStandby(_) | Self::RemoveStandby | Self::FailOver(_), 1) => {
                Err(Refusal::new(Code::NeedsSecondApprover, "a cell with two approvers or more", "one with one"))
            }
            (Self::RevokeRoot(_) | Self::RemoveTrustDomain(_) | Self::ShareRoot { .. } | Self::ImportRoot(..), 1) => {
                Err(Refusal::new(Code::NeedsSecondApprover, "a cell with two approvers or more", "one with one"))
            }
            (Self::AddApprover(..) | Self::RemoveApprover(_), 1) => Ok(1),
            (
                Self::RevokeRoot(_)
                | Self::RemoveTrustDomain(_)
                | Self::ShareRoot { .. }
                | Self::ImportRoot(..)
                | Self::AddApprover(..)
                | Self::RemoveApprover(_)
                | Self::NameStandby(_)
                | Self::RemoveStandby
                | Self::FailOver(_),
                _,
            ) => Ok(TWO),
        }
    }

    /// What audits tell it by, where it is not the ordinary way.
    pub fn event(&self) -> &'static str {
        match self {
            Self::BreakGlass(..) => "break_glass",
            Self::RevokeRoot(_)
            | Self::AddApprover(..)
            | Self::RemoveApprover(_)
            | Self::RemoveTrustDomain(_)
            | Self::ImportRoot(..)
            | Self::NameStandby(_)
            | Self::RemoveStandby
            | Self::ShareRoot { .. } => "act",
            Self::FailOver(_) => "fail_over",
        }
    }
}

/// Bytes of an uncompressed P-256 point.
const POINT_BYTES: usize = 65;

/// Who holds a recovery share. Written as NAME=POINT, the point in 130 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareHolder {
    /// For people.
    pub name: ObjectName,
    /// The P-256 point to which the share is encrypted.
    pub key: Vec<u8>,
}

impl fmt::Display for ShareHolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.name.as_str(), hex::encode(&self.key))
    }
}

impl FromStr for ShareHolder {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        let bad = || Refusal::new(Code::BadRequest, "NAME=KEY, as ambit trust holder-key prints it", s);
        let (name, key) = s.split_once('=').ok_or_else(bad)?;
        Ok(Self { name: name.parse()?, key: bytes(key, POINT_BYTES).ok_or_else(bad)? })
    }
}

impl fmt::Display for Act {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RevokeRoot(root) => write!(f, "revoke root {}", hex::encode(root)),
            Self::AddApprover(name, card) => write!(f, "add approver {} {card}", name.as_str()),
            Self::RemoveApprover(name) => write!(f, "remove approver {}", name.as_str()),
            Self::RemoveTrustDomain(td) => write!(f, "remove trust-domain {td}"),
            Self::BreakGlass(name, key) => write!(f, "break glass admin {} {}", name.as_str(), hex::encode(key)),
            Self::ImportRoot(root, key) => {
                write!(f, "import root {} with authority {}", hex::encode(root), hex::encode(key))
            }
            Self::NameStandby(naming) => write!(f, "name standby {naming}"),
            Self::RemoveStandby => write!(f, "remove standby"),
            Self::FailOver(grant) => write!(f, "fail over {grant}"),
            Self::ShareRoot { root, threshold, holders } => {
                write!(f, "share root {} among {threshold} of", hex::encode(root))?;
                holders.iter().try_for_each(|holder| write!(f, " {holder}"))
            }
        }
    }
}

impl FromStr for Act {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        let words: Vec<&str> = s.split(' ').collect();
        let bad = || Refusal::new(Code::BadRequest, "an act as ambit writes it into a proposal", s);
        match words.as_slice() {
            ["revoke", "root", root] => Ok(Self::RevokeRoot(digest(root).ok_or_else(bad)?)),
            ["add", "approver", name, card] => Ok(Self::AddApprover(name.parse()?, card.parse()?)),
            ["remove", "approver", name] => Ok(Self::RemoveApprover(name.parse()?)),
            ["remove", "trust-domain", td] => Ok(Self::RemoveTrustDomain(td.parse()?)),
            ["break", "glass", "admin", name, key] => Ok(Self::BreakGlass(name.parse()?, digest(key).ok_or_else(bad)?)),
            ["import", "root", root, "with", "authority", key] => {
                Ok(Self::ImportRoot(digest(root).ok_or_else(bad)?, digest(key).ok_or_else(bad)?))
            }
            ["name", "standby", naming @ ..] => Ok(Self::NameStandby(naming.join(" ").parse()?)),
            ["remove", "standby"] => Ok(Self::RemoveStandby),
            ["fail", "over", grant @ ..] => Ok(Self::FailOver(grant.join(" ").parse()?)),
            ["share", "root", root, "among", threshold, "of", holders @ ..] => {
                let count: u8 = threshold.parse().map_err(|_| bad())?;
                // One form only: `+2` and `02` are read as numbers too.
                if count.to_string() != *threshold {
                    return Err(bad());
                }
                let holders = holders.iter().map(|holder| holder.parse()).collect::<Result<_, _>>()?;
                Ok(Self::ShareRoot { root: digest(root).ok_or_else(bad)?, threshold: count, holders })
            }
            _ => Err(bad()),
        }
    }
}

/// An act proposed to one incarnation of one cell, until then. What approvers sign.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proposal {
    /// The cell's.
    pub trust_domain: TrustDomain,
    /// The cell's: what was approved before it began anew counts for nothing.
    pub epoch: u64,
    /// No longer good after.
    pub expires: Stamp,
    /// Random: the same act can be proposed a second time.
    pub nonce: [u8; 16],
    /// What is to be done.
    pub act: Act,
}

impl Proposal {
    /// The exact bytes that an approver signs: a context string, then all fields in the log's own encoding, in which each
    /// length is told before its bytes.
    ///
    /// # Errors
    /// [`Code::Internal`], which no proposal leads to.
    pub fn statement(&self) -> Result<Vec<u8>, Refusal> {
        postcard::to_extend(self, ACT_CONTEXT.to_vec())
            .map_err(|e| Refusal::new(Code::Internal, "a proposal that encodes", e.to_string()))
    }
}

/// One approver's word.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Approval {
    /// His public key.
    pub key: [u8; 32],
    /// [`SIGNATURE_BYTES`] over [`Proposal::statement`].
    pub signature: Vec<u8>,
}

/// What goes with a command beside the act itself: the rest of the proposal, which the cell puts together by itself, and
/// the signatures over it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Approved {
    /// See [`Proposal::epoch`].
    pub epoch: u64,
    /// See [`Proposal::expires`].
    pub expires: Stamp,
    /// See [`Proposal::nonce`].
    pub nonce: [u8; 16],
    /// Each approver's once.
    pub approvals: Vec<Approval>,
}

/// 64 lower-case hexadecimal digits.
fn digest(text: &str) -> Option<[u8; 32]> {
    bytes(text, 32)?.try_into().ok()
}

/// Lower-case hexadecimal digits of so many bytes: one form only, so that what is read is what was written.
fn bytes(text: &str, len: usize) -> Option<Vec<u8>> {
    let strict = text.len() == 2 * len && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    strict.then(|| hex::decode(text).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proposal(act: Act) -> Proposal {
        Proposal { trust_domain: "west".parse().unwrap(), epoch: 1, expires: Stamp(9), nonce: [7; 16], act }
    }

    #[test]
    fn an_act_is_read_as_it_is_written_and_in_no_other_form() {
        let (root, card, point) = ("ab".repeat(32), "cd".repeat(96), "ef".repeat(65));
        for (text, good) in [
            (format!("revoke root {root}"), true),
            (format!("revoke root {}", root.to_uppercase()), false),
            (format!("revoke  root {root}"), false),
            (format!("revoke root {root} "), false),
            (format!("revoke root {root}\n"), false),
            (format!("revoke root {}", &root[1..]), false),
            (format!("add approver alice {card}"), true),
            (format!("add approver Alice {card}"), false),
            (format!("add approver alice {}", &card[2..]), false),
            (format!("add approver alice {}é", &card[2..]), false),
            ("remove approver alice".to_owned(), true),
            ("remove approver".to_owned(), false),
            ("remove approver alice bob".to_owned(), false),
            ("remove trust-domain east".to_owned(), true),
            ("remove trust-domain East".to_owned(), false),
            ("remove trust-domain".to_owned(), false),
            (format!("break glass admin founder {root}"), true),
            (format!("break glass admin founder {}", &root[1..]), false),
            (format!("break glass admin Founder {root}"), false),
            (format!("break glass founder {root}"), false),
            (format!("share root {root} among 2 of al={point} bo={point}"), true),
            (format!("share root {root} among 2 of"), true),
            (format!("share root {root} among +2 of al={point}"), false),
            (format!("share root {root} among 02 of al={point}"), false),
            (format!("share root {root} among 2 of al={}", &point[2..]), false),
            (format!("share root {root} among 2 of al {point}"), false),
            (format!("import root {root} with authority {root}"), true),
            (format!("import root {root} with authority {}", &root[2..]), false),
            (format!("import root {root}"), false),
            ("name standby east".to_owned(), true),
            ("name standby east with witness core and lease 5 s".to_owned(), true),
            ("name standby".to_owned(), false),
            ("name standby  east".to_owned(), false),
            ("remove standby".to_owned(), true),
            ("remove standby east".to_owned(), false),
            ("fail over west to east in epoch 2 from 2026-11-23T14:03:26Z until 2026-11-24T02:03:26Z".to_owned(), true),
            ("fail over west to east".to_owned(), false),
            (String::new(), false),
        ] {
            let read = text.parse::<Act>();
            assert_eq!(read.is_ok(), good, "{text}");
            assert!(read.is_err() || read.unwrap().to_string() == text, "{text}");
        }
    }

    /// The bytes are fixed: an approval of one release is one of the next.
    #[test]
    fn a_statement_has_these_very_bytes() {
        let statement = proposal(Act::RemoveApprover("al".parse().unwrap())).statement().unwrap();
        let golden = [&b"ambit/act/v1\0"[..], &[4], b"west", &[1, 9], &[7; 16], &[2, 2], b"al"].concat();
        assert_eq!(statement, golden);
        let other = proposal(Act::RevokeRoot([1; 32])).statement().unwrap();
        assert_eq!(other, [&b"ambit/act/v1\0"[..], &[4], b"west", &[1, 9], &[7; 16], &[0], &[1; 32]].concat());
        let glass = proposal(Act::BreakGlass("al".parse().unwrap(), [3; 32])).statement().unwrap();
        let golden = [&b"ambit/act/v1\0"[..], &[4], b"west", &[1, 9], &[7; 16], &[4, 2], b"al", &[3; 32]].concat();
        assert_eq!(glass, golden);
    }

    /// By hand: which act takes how many, in cells with none, one, two and three approvers. `-`: refused.
    #[test]
    fn each_act_takes_so_many_approvers() {
        let card = ApproverCard { key: [1; 32], proof: vec![0; SIGNATURE_BYTES] };
        let al: ObjectName = "al".parse().unwrap();
        for (act, needs) in [
            (Act::RevokeRoot([1; 32]), "0-22"),
            (Act::AddApprover(al.clone(), card), "0122"),
            (Act::RemoveApprover(al.clone()), "0122"),
            (Act::RemoveTrustDomain("east".parse().unwrap()), "0-22"),
            (Act::BreakGlass(al, [1; 32]), "-111"),
            (Act::ShareRoot { root: [1; 32], threshold: 2, holders: Vec::new() }, "--22"),
            (Act::ImportRoot([1; 32], [2; 32]), "0-22"),
            (Act::NameStandby("east".parse().unwrap()), "--22"),
            (Act::RemoveStandby, "--22"),
        ] {
            let said = (0..4).map(|n| act.needs(n).map_or("-".to_owned(), |n| n.to_string()));
            assert_eq!(said.collect::<String>(), needs, "{act}");
        }
    }
}
