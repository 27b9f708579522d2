//! Time as the state machine knows it: leader-stamped milliseconds, never a local clock.

use crate::refusal::{Code, Refusal};
use serde::{Deserialize, Serialize};

/// Milliseconds since the Unix epoch, stamped by a leader into a log entry (I15).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Stamp(pub u64);

impl Stamp {
    /// This stamp plus `ms` milliseconds, saturating.
    #[must_use]
    pub fn plus_ms(self, ms: u64) -> Stamp {
        Stamp(self.0.saturating_add(ms))
    }
    /// This stamp less `ms` milliseconds, saturating.
    #[must_use]
    pub fn minus_ms(self, ms: u64) -> Stamp {
        Stamp(self.0.saturating_sub(ms))
    }
}

/// What is known of now: not before `committed`, and not after `latest`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// The highest stamp that a leader is known to have written.
    pub committed: Stamp,
    /// That, or the own clock where it is later.
    pub latest: Stamp,
}

impl Moment {
    /// Where nothing but committed time counts: in a cell.
    pub fn at(stamp: Stamp) -> Self {
        Self { committed: stamp, latest: stamp }
    }
}

/// When a certificate is valid. One type, so that its two ends are never swapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lifetime {
    /// First instant of validity.
    pub not_before: Stamp,
    /// Last instant of validity.
    pub not_after: Stamp,
}

/// A lifetime asked for an SVID, in seconds; cannot exceed [`SvidTtl::CEILING_S`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct SvidTtl(u32);

impl SvidTtl {
    /// No SVID lives longer: the damage of an unreachable revocation is bounded by it.
    pub const CEILING_S: u32 = 3600;
    /// Below a minute a renewal at half-life would be a busy loop.
    pub const FLOOR_S: u32 = 60;
    /// The lifetime where an entry names none.
    pub const DEFAULT: SvidTtl = SvidTtl(Self::CEILING_S);

    /// Seconds.
    pub fn seconds(self) -> u32 {
        self.0
    }
    /// Milliseconds.
    pub fn ms(self) -> u64 {
        u64::from(self.0) * 1000
    }
}

impl TryFrom<u32> for SvidTtl {
    type Error = Refusal;
    fn try_from(s: u32) -> Result<Self, Refusal> {
        if (Self::FLOOR_S..=Self::CEILING_S).contains(&s) {
            Ok(Self(s))
        } else {
            Err(Refusal::new(Code::BadRequest, "a TTL of 60-3600 seconds", s.to_string()))
        }
    }
}
impl From<SvidTtl> for u32 {
    fn from(t: SvidTtl) -> u32 {
        t.0
    }
}
