//! Authority over a trust domain while its own cell is lost: who may be given it in peace, and the grant that gives it.
//!
//! A cell names one peer its *standby*, and may name another its *witness*. Two approvers of the home grant its authority
//! to the standby, for at most a day and in an epoch above every one that the home had.

use crate::act::{Act, Approval, Proposal};
use crate::id::TrustDomain;
use crate::refusal::{Code, Refusal};
use crate::time::{Stamp, SvidTtl};
use crate::utc;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Of one grant; whoever needs longer asks the approvers again.
pub const GRANT_MS_MAX: u64 = 24 * 3_600_000;
/// A quarter of the longest SVID: a home that is cut off stops signing before what it signed last is half over.
pub const LEASE_MS_MAX: u64 = SvidTtl::CEILING_S as u64 * 1000 / 4;
/// Renewed at a quarter, over the pull that there is each second.
pub const LEASE_MS_MIN: u64 = 4_000;

/// Who says that the home signs no more when a grant takes effect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Vouch {
    /// The approvers: they know that it is down.
    Approvers,
    /// The lease under which it signs: it ran out, as neither the standby nor this peer renewed it any more.
    Witness {
        /// The third cell.
        cell: TrustDomain,
        /// How long the home signs after it asked, milliseconds.
        lease_ms: u64,
    },
}

/// Whom a cell names for the case that it is lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Naming {
    /// Who may be granted its authority.
    pub standby: TrustDomain,
    /// See the type.
    pub vouch: Vouch,
}

impl Naming {
    /// The witness, if the home signs under a lease.
    pub fn witness(&self) -> Option<&TrustDomain> {
        match &self.vouch {
            Vouch::Approvers => None,
            Vouch::Witness { cell, .. } => Some(cell),
        }
    }

    /// Whether a cell may name these.
    ///
    /// # Errors
    /// [`Code::BadRequest`] where two of the three are one, or for a lease out of bounds.
    pub fn check(&self, home: &TrustDomain) -> Result<(), Refusal> {
        let bad = |expected: String, found: String| Err(Refusal::new(Code::BadRequest, expected, found));
        if self.standby == *home {
            return bad("another cell as standby".into(), self.standby.to_string());
        }
        match &self.vouch {
            Vouch::Witness { cell, .. } if *cell == self.standby || cell == home => {
                bad("a third cell as witness".into(), cell.to_string())
            }
            Vouch::Witness { lease_ms, .. }
                if !(LEASE_MS_MIN..=LEASE_MS_MAX).contains(lease_ms) || !lease_ms.is_multiple_of(1000) =>
            {
                bad(format!("a lease of {}-{} s", LEASE_MS_MIN / 1000, LEASE_MS_MAX / 1000), format!("{lease_ms} ms"))
            }
            Vouch::Witness { .. } | Vouch::Approvers => Ok(()),
        }
    }
}

/// Written as `east`, or as `east with witness core and lease 900 s`.
impl fmt::Display for Naming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.standby)?;
        match &self.vouch {
            Vouch::Approvers => Ok(()),
            Vouch::Witness { cell, lease_ms } => write!(f, " with witness {cell} and lease {} s", lease_ms / 1000),
        }
    }
}

impl FromStr for Naming {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        let bad = || Refusal::new(Code::BadRequest, "STANDBY, or STANDBY with witness PEER and lease N s", s);
        let read = match s.split(' ').collect::<Vec<_>>().as_slice() {
            [standby] => Self { standby: standby.parse()?, vouch: Vouch::Approvers },
            [standby, "with", "witness", cell, "and", "lease", seconds, "s"] => {
                let seconds: u32 = seconds.parse().map_err(|_| bad())?;
                let vouch = Vouch::Witness { cell: cell.parse()?, lease_ms: u64::from(seconds) * 1000 };
                Self { standby: standby.parse()?, vouch }
            }
            _ => return Err(bad()),
        };
        // One form only: `+5` and `05` are read as numbers too.
        if read.to_string() == s { Ok(read) } else { Err(bad()) }
    }
}

/// The home's authority for its standby. Whole seconds: what approvers read is what they sign.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FailoverGrant {
    /// The lost cell's trust domain.
    pub home: TrustDomain,
    /// Who gets the authority.
    pub holder: TrustDomain,
    /// Above every one that the home had.
    pub epoch: u64,
    /// From when on.
    pub begins: Stamp,
    /// Nothing that is issued under it is valid after.
    pub ends: Stamp,
}

impl FailoverGrant {
    /// Whether it is in its window.
    pub fn is_live(&self, at: Stamp) -> bool {
        self.begins <= at && at < self.ends
    }

    /// What holds whenever it is read.
    ///
    /// # Errors
    /// [`Code::GrantWindow`], and [`Code::GrantHolder`] for a grant to the home itself.
    pub fn check(&self) -> Result<(), Refusal> {
        if self.holder == self.home {
            return Err(Refusal::new(Code::GrantHolder, "another cell than the home", self.holder.as_str()));
        }
        let lasts = self.ends.0.saturating_sub(self.begins.0);
        if lasts == 0
            || lasts > GRANT_MS_MAX
            || !self.begins.0.is_multiple_of(1000)
            || !self.ends.0.is_multiple_of(1000)
        {
            let expected = format!("a grant for 1-{} s", GRANT_MS_MAX / 1000);
            return Err(Refusal::new(
                Code::GrantWindow,
                expected,
                format!("{} to {} (ms)", self.begins.0, self.ends.0),
            ));
        }
        Ok(())
    }
}

/// Written as `west to east in epoch 2 from 2026-11-23T14:03:26Z until 2026-11-24T02:03:26Z`.
impl fmt::Display for FailoverGrant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (begins, ends) = (utc::text(self.begins.0), utc::text(self.ends.0));
        write!(f, "{} to {} in epoch {} from {begins} until {ends}", self.home, self.holder, self.epoch)
    }
}

impl FromStr for FailoverGrant {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        let bad = || Refusal::new(Code::BadRequest, "HOME to HOLDER in epoch N from INSTANT until INSTANT", s);
        let instant = |text: &str| utc::parse(text).map(Stamp).ok_or_else(bad);
        match s.split(' ').collect::<Vec<_>>().as_slice() {
            [home, "to", holder, "in", "epoch", epoch, "from", begins, "until", ends] => {
                let number: u64 = epoch.parse().map_err(|_| bad())?;
                if number.to_string() != *epoch {
                    return Err(bad());
                }
                let (begins, ends) = (instant(begins)?, instant(ends)?);
                Ok(Self { home: home.parse()?, holder: holder.parse()?, epoch: number, begins, ends })
            }
            _ => Err(bad()),
        }
    }
}

/// A grant with what the home's approvers signed: whoever is told of it judges it by himself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedGrant {
    /// Of [`Act::FailOver`], to the home.
    pub proposal: Proposal,
    /// Each approver's once.
    pub approvals: Vec<Approval>,
}

impl SignedGrant {
    /// What is granted, as it says.
    ///
    /// # Errors
    /// [`Code::BadRequest`] for a proposal of another act, or to another cell than the home.
    pub fn grant(&self) -> Result<&FailoverGrant, Refusal> {
        match &self.proposal.act {
            Act::FailOver(grant) if grant.home == self.proposal.trust_domain => Ok(grant),
            other => Err(Refusal::new(Code::BadRequest, "a grant, proposed to its home", other.to_string())),
        }
    }
}

/// What a peer tells a home, or a holder, that it has taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Seen {
    /// The home's record of this sequence: whom it names now.
    Naming(u64),
    /// The grant of this epoch: the home's lease is renewed no more.
    Grant(u64),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back_and_no_other_form() {
        for (text, good) in [
            ("east", true),
            ("east with witness core and lease 900 s", true),
            ("east with witness core and lease 0900 s", false),
            ("east with witness core and lease +900 s", false),
            ("east with witness core", false),
            ("East", false),
            ("", false),
        ] {
            let read = text.parse::<Naming>();
            assert_eq!(read.is_ok(), good, "{text}");
            assert!(read.is_err() || read.unwrap().to_string() == text, "{text}");
        }
        let window = "from 2026-11-23T14:03:26Z until 2026-11-24T02:03:26Z";
        for (text, good) in [
            (format!("west to east in epoch 2 {window}"), true),
            (format!("west to east in epoch 02 {window}"), false),
            (format!("west to east in epoch -2 {window}"), false),
            (format!("west to east in epoch 2 {window} "), false),
            ("west to east in epoch 2 from 1 until 2".to_owned(), false),
        ] {
            let read = text.parse::<FailoverGrant>();
            assert_eq!(read.is_ok(), good, "{text}");
            assert!(read.is_err() || read.unwrap().to_string() == text, "{text}");
        }
    }

    #[test]
    fn names_and_windows_have_bounds() {
        let west: TrustDomain = "west".parse().unwrap();
        for (text, good) in [
            ("east", true),
            ("west", false),
            ("east with witness core and lease 4 s", true),
            ("east with witness core and lease 900 s", true),
            ("east with witness core and lease 3 s", false),
            ("east with witness core and lease 901 s", false),
            ("east with witness east and lease 9 s", false),
            ("east with witness west and lease 9 s", false),
        ] {
            assert_eq!(text.parse::<Naming>().unwrap().check(&west).is_ok(), good, "{text}");
        }
        let grant = |begins, ends| {
            let (home, holder) = (west.clone(), "east".parse().unwrap());
            FailoverGrant { home, holder, epoch: 2, begins: Stamp(begins), ends: Stamp(ends) }.check()
        };
        assert!(grant(1_000, 2_000).is_ok() && grant(1_000, 1_000 + GRANT_MS_MAX).is_ok());
        for (begins, ends) in
            [(1_000, 2_000 + GRANT_MS_MAX), (2_000, 1_000), (1_000, 1_000), (1_001, 2_000), (1_000, 2_001)]
        {
            assert_eq!(grant(begins, ends).unwrap_err().code, Code::GrantWindow, "{begins} {ends}");
        }
    }
}
