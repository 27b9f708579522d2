//! The trustworthiness vector of an attestation result (draft-ietf-rats-ar4si, section 2.3).

use serde::{Deserialize, Serialize};

/// Affirming: recognised, and as it should be.
pub const AFFIRMING: i8 = 2;
/// A warning: genuine, but of a kind or in a state that is not to be taken for the best.
pub const WARNING: i8 = 32;
/// Contraindicated: recognised as what is not to be relied on.
pub const CONTRAINDICATED: i8 = 96;
/// The cryptographic validation of the evidence failed.
pub const UNPROVED: i8 = 99;
/// No claim made.
pub const NO_CLAIM: i8 = 0;

/// What a verifier claims of a machine, as far as Ambit's judges it. In JSON its names are AR4SI's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct TrustVector {
    /// Whether it is the very machine that enrolled.
    pub instance_identity: i8,
    /// What vouches for its TPM.
    pub hardware: i8,
    /// What was booted, and what runs.
    pub executables: i8,
    /// Whether Secure Boot and the command line are as the policy has them.
    pub configuration: i8,
    /// The files that were opened for execution.
    pub file_system: i8,
}

impl TrustVector {
    fn claims(&self) -> [i8; 5] {
        [self.instance_identity, self.hardware, self.executables, self.configuration, self.file_system]
    }

    /// The tier of the worst claim: `affirming`, `warning`, `contraindicated`, or `none` where nothing is claimed.
    pub fn status(&self) -> &'static str {
        match self.claims().into_iter().max().unwrap_or(NO_CLAIM) {
            96.. => "contraindicated",
            32..=95 => "warning",
            2..=31 => "affirming",
            _ => "none",
        }
    }

    /// Claim by claim the worse of both: what was seen once since a boot stays true of it.
    #[must_use]
    pub fn worse(self, other: TrustVector) -> TrustVector {
        TrustVector {
            instance_identity: self.instance_identity.max(other.instance_identity),
            hardware: self.hardware.max(other.hardware),
            executables: self.executables.max(other.executables),
            configuration: self.configuration.max(other.configuration),
            file_system: self.file_system.max(other.file_system),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_is_that_of_the_worst_claim() {
        let sound = TrustVector { instance_identity: 2, hardware: 2, executables: 3, configuration: 2, file_system: 0 };
        assert_eq!(sound.status(), "affirming");
        assert_eq!(TrustVector { configuration: 32, ..sound }.status(), "warning");
        assert_eq!(TrustVector { executables: 96, hardware: 32, ..sound }.status(), "contraindicated");
        assert_eq!(TrustVector::default().status(), "none");
        let excepted = TrustVector { file_system: 32, executables: 2, ..sound };
        assert_eq!(sound.worse(excepted), TrustVector { file_system: 32, ..sound });
    }
}
