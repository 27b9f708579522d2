//! Which TPM, and which keys of it: read from text at the edge, so that everything below knows what it works with.

use crate::error::TpmError;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;
use tss_esapi::tcti_ldr::TctiNameConf;

/// The longest that one operation may take once the keys exist. Hardware signs in 0.2 to 0.6 s; an RSA EK that no one
/// made persistent is derived anew first, in seconds.
pub const OPERATION_MAX: Duration = Duration::from_secs(60);
/// The same while keys are made. Searching RSA primes has no bound; the Linux driver itself waits 300 s for it.
pub const CREATION_MAX: Duration = Duration::from_secs(300);
/// How long a TPM in dictionary-attack lockout is left alone. TPMs forget one failure in minutes to hours.
pub const LOCKOUT_REST: Duration = Duration::from_secs(60);

/// The AK's algorithm and scheme. The verifier accepts each of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AkKind {
    /// ECDSA over P-256 with SHA-256: made in an instant, and small.
    #[default]
    EccP256,
    /// ECDSA over P-384 with SHA-384.
    EccP384,
    /// RSA-2048, PKCS #1 v1.5 with SHA-256.
    Rsa2048Ssa,
    /// RSA-2048, PSS with SHA-256. The verifier takes salts as long as the digest only (FIPS 186-5, 5.4); TPMs that
    /// choose the longest salt that fits (Part 1, B.7) need another kind.
    Rsa2048Pss,
}

impl AkKind {
    const ALL: [AkKind; 4] = [AkKind::EccP256, AkKind::EccP384, AkKind::Rsa2048Ssa, AkKind::Rsa2048Pss];

    /// `p256`, `p384`, `rsa2048-ssa` or `rsa2048-pss`.
    pub fn as_str(self) -> &'static str {
        match self {
            AkKind::EccP256 => "p256",
            AkKind::EccP384 => "p384",
            AkKind::Rsa2048Ssa => "rsa2048-ssa",
            AkKind::Rsa2048Pss => "rsa2048-pss",
        }
    }

    /// The kind with this name.
    pub fn from_text(s: &str) -> Option<AkKind> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == s)
    }
}

/// An EK template of the TCG EK Credential Profile 2.5, each with its certificate's place in NV.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EkKind {
    /// RSA-2048, low range (template L-1).
    Rsa2048,
    /// P-256, low range (template L-2).
    EccP256,
    /// P-384, high range (template H-3).
    EccP384,
    /// RSA-3072, high range (template H-6).
    Rsa3072,
}

impl EkKind {
    /// In the order in which a certificate is looked for.
    pub(crate) const ALL: [EkKind; 4] = [EkKind::Rsa2048, EkKind::EccP256, EkKind::EccP384, EkKind::Rsa3072];

    /// `rsa2048`, `p256`, `p384` or `rsa3072`.
    pub fn as_str(self) -> &'static str {
        match self {
            EkKind::Rsa2048 => "rsa2048",
            EkKind::EccP256 => "p256",
            EkKind::EccP384 => "p384",
            EkKind::Rsa3072 => "rsa3072",
        }
    }

    /// The kind with this name.
    pub fn from_text(s: &str) -> Option<EkKind> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == s)
    }
}

/// Which EK to attest with. It decides the node's id, so it does not change by itself once an AK exists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EkChoice {
    /// The EK of the AK saved before; else the first of RSA-2048, P-256, P-384 and RSA-3072 whose certificate NV holds;
    /// else RSA-2048, for a TPM without certificates whose EK the operator lists.
    #[default]
    Auto,
    /// This one.
    Fixed(EkKind),
}

impl EkChoice {
    /// `auto`, or the name of an [`EkKind`].
    pub fn from_text(s: &str) -> Option<EkChoice> {
        if s == "auto" { Some(EkChoice::Auto) } else { EkKind::from_text(s).map(EkChoice::Fixed) }
    }
}

/// How to attest.
#[derive(Clone, Debug)]
pub struct Options {
    /// The TPM, named as tpm2-tools do: `device:/dev/tpmrm0`, `swtpm:host=127.0.0.1,port=2321`, `tabrmd:`.
    pub tcti: String,
    /// Keeps the AK's wrapped key, which is of no use outside of this TPM. It exists.
    pub state_dir: PathBuf,
    /// The EK.
    pub ek: EkChoice,
    /// The AK.
    pub ak: AkKind,
    /// Deadline of an operation, its turn in the queue included.
    pub operation_max: Duration,
    /// Deadline of an operation that may have to make keys.
    pub creation_max: Duration,
    /// How long a TPM in lockout is not asked again.
    pub lockout_rest: Duration,
}

impl Options {
    /// The TPM `tcti` with the usual keys and limits.
    pub fn new(tcti: &str, state_dir: &Path) -> Options {
        Options {
            tcti: tcti.to_owned(),
            state_dir: state_dir.to_owned(),
            ek: EkChoice::default(),
            ak: AkKind::default(),
            operation_max: OPERATION_MAX,
            creation_max: CREATION_MAX,
            lockout_rest: LOCKOUT_REST,
        }
    }

    pub(crate) fn tcti(&self) -> Result<TctiNameConf, TpmError> {
        let conf =
            TctiNameConf::from_str(&self.tcti).map_err(|source| TpmError::Tcti { tcti: self.tcti.clone(), source })?;
        match conf {
            TctiNameConf::Device(_) | TctiNameConf::Swtpm(_) | TctiNameConf::Tabrmd(_) => Ok(conf),
            // The reference simulator keeps its seeds in a plain file beside it, and nothing here is tried against it.
            TctiNameConf::Mssim(_) => Err(TpmError::TctiRefused { tcti: self.tcti.clone() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_is_read_back_and_others_are_not() {
        for kind in AkKind::ALL {
            assert_eq!(AkKind::from_text(kind.as_str()), Some(kind));
        }
        for kind in EkKind::ALL {
            assert_eq!(EkChoice::from_text(kind.as_str()), Some(EkChoice::Fixed(kind)));
        }
        assert_eq!(EkChoice::from_text("auto"), Some(EkChoice::Auto));
        for wrong in ["", "P256", "rsa", "rsa2048 "] {
            assert_eq!((AkKind::from_text(wrong), EkChoice::from_text(wrong)), (None, None), "{wrong}");
        }
    }

    #[test]
    fn only_tpms_that_were_tried_are_named() {
        let tcti = |s: &str| Options::new(s, Path::new("/")).tcti();
        for good in ["device:/dev/tpmrm0", "device:/dev/tpm0", "swtpm:host=127.0.0.1,port=1", "tabrmd:bus_type=session"]
        {
            tcti(good).unwrap();
        }
        assert!(matches!(tcti("mssim:host=127.0.0.1,port=1"), Err(TpmError::TctiRefused { .. })));
        for bad in ["", "no such thing", "swtpm:port=x", "tabrmd:bus_type=x"] {
            assert!(matches!(tcti(bad), Err(TpmError::Tcti { .. })), "{bad}");
        }
    }
}
