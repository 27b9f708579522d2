//! Denials of SVIDs: what was issued and is refused from now on. They only grow: an end of one never revives what it covered.

use crate::time::Stamp;
use serde::{Deserialize, Serialize};

/// Serial of a leaf that a cell issues: epoch, log index, position. Later ones are greater, also across incarnations.
pub type Serial = [u8; 16];

/// A certificate's serial as the one form that is compared: big-endian, in the fewest bytes. DER has a zero before a first
/// bit that is set (X.690 8.3), and people write zeros, or not.
pub fn serial_number(bytes: &[u8]) -> &[u8] {
    let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
    bytes.get(zeros..).unwrap_or_default()
}

/// The denial of a SPIFFE ID by its trust domain, or by the cell that keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdDenial {
    /// Leaves of this identity with serials up to and including this one are refused.
    pub up_to: Serial,
    /// Until it is lifted nothing is issued for it, and whatever it shows is refused.
    pub barred: bool,
    /// When it was last changed.
    pub since: Stamp,
    /// The last leaf that it covers has ended then; what is not barred is forgotten after.
    pub until: Stamp,
}

impl IdDenial {
    /// Whether a leaf of this identity is refused. A serial that is none of a cell's tells nothing of when it was issued,
    /// and is refused.
    pub fn covers(&self, serial: &[u8]) -> bool {
        self.barred || serial.len() != self.up_to.len() || *serial <= self.up_to[..]
    }
    /// Both of them: what either refuses is refused. Whether the identity is barred the later one says.
    #[must_use]
    pub fn then(self, later: IdDenial) -> IdDenial {
        IdDenial {
            up_to: self.up_to.max(later.up_to),
            barred: later.barred,
            since: later.since,
            until: self.until.max(later.until),
        }
    }
}

/// The denial of one leaf, by its authority and serial.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeafDenial {
    /// When it was made.
    pub since: Stamp,
    /// The leaf has ended then.
    pub until: Stamp,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn denial(up_to: u8, barred: bool) -> IdDenial {
        IdDenial { up_to: [up_to; 16], barred, since: Stamp(1), until: Stamp(2) }
    }

    #[test]
    fn what_was_issued_up_to_it_is_covered_and_an_end_revives_nothing() {
        let revoked = denial(5, false);
        for (serial, covered) in [([4; 16], true), ([5; 16], true), ([6; 16], false)] {
            assert_eq!(revoked.covers(&serial), covered, "{serial:?}");
        }
        assert!(denial(5, true).covers(&[6; 16]));
        assert!(revoked.covers(&[9; 15]) && revoked.covers(&[9; 17]) && revoked.covers(&[]));
        let lifted = denial(7, true).then(denial(8, false));
        assert!(lifted.covers(&[8; 16]) && !lifted.covers(&[9; 16]));
        assert!(denial(7, false).then(denial(3, false)).covers(&[7; 16]), "a later one never covers less");
    }
}
