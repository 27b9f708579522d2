//! Appraisal policies after parsing: what a machine must have booted to be believed. The YAML form is `ambit-policy`'s,
//! the judgement `ambit-verify`'s.
//!
//! A policy is default deny: every event of a policed PCR must be consumed by one of its rules. Collections are ordered,
//! so that one policy has one encoding and one [`AppraisalPolicy::sha256`].

use crate::id::{ClusterId, ObjectName};
use crate::refusal::{Code, Refusal};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

/// The PCRs that a policy must account for when a boot log explains them: firmware and boot loader (0-9), shim (14).
pub const POLICED_PCRS: [u32; 11] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 14];

/// What vouches for a TPM, as a policy accepts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum EndorsementClass {
    /// A maker of physical or firmware TPMs.
    Hardware,
    /// A hypervisor's TPMs.
    Virtual,
    /// A laboratory's software TPMs.
    Lab,
    /// An EK that the operator listed by hand.
    Listed,
}

impl EndorsementClass {
    /// Every class.
    pub const ALL: [EndorsementClass; 4] = [Self::Hardware, Self::Virtual, Self::Lab, Self::Listed];

    /// `hardware`, `virtual`, `lab` or `listed`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Hardware => "hardware",
            Self::Virtual => "virtual",
            Self::Lab => "lab",
            Self::Listed => "listed",
        }
    }
}

impl FromStr for EndorsementClass {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        let class = Self::ALL.into_iter().find(|c| c.as_str() == s);
        class.ok_or_else(|| Refusal::new(Code::BadRequest, "hardware, virtual, lab or listed", s))
    }
}

/// A PCR bank that a policy may speak of. There is no SHA-1 here on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum PcrBank {
    /// The SHA-256 bank.
    Sha256,
    /// The SHA-384 bank.
    Sha384,
}

impl PcrBank {
    /// `sha256` or `sha384`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
        }
    }
    /// Bytes of a value.
    pub fn size(self) -> usize {
        match self {
            Self::Sha256 => 32,
            Self::Sha384 => 48,
        }
    }
}

impl FromStr for PcrBank {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        match s {
            "sha256" => Ok(Self::Sha256),
            "sha384" => Ok(Self::Sha384),
            other => Err(Refusal::new(Code::BadRequest, "bank sha256 or sha384", other)),
        }
    }
}

/// A SHA-256, SHA-384 or SHA-512 digest, told apart by length. Shorter ones are no basis for trust.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "Vec<u8>", into = "Vec<u8>")]
pub struct HexDigest(Vec<u8>);

impl From<HexDigest> for Vec<u8> {
    fn from(digest: HexDigest) -> Vec<u8> {
        digest.0
    }
}

impl TryFrom<Vec<u8>> for HexDigest {
    type Error = String;
    fn try_from(bytes: Vec<u8>) -> Result<HexDigest, String> {
        HexDigest::new(bytes).ok_or_else(|| "a digest of another length".to_owned())
    }
}

impl HexDigest {
    /// The digest in `bytes`, if it is 32, 48 or 64 bytes long.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Option<HexDigest> {
        let bytes = bytes.into();
        matches!(bytes.len(), 32 | 48 | 64).then_some(HexDigest(bytes))
    }
    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl FromStr for HexDigest {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        let lower = s.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        let digest = hex::decode(s).ok().filter(|_| lower).and_then(HexDigest::new);
        digest.ok_or_else(|| {
            let expected = "a SHA-256, SHA-384 or SHA-512 digest in lower-case hexadecimal digits (64, 96 or 128)";
            Refusal::new(Code::BadRequest, expected, s)
        })
    }
}

impl fmt::Display for HexDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(&self.0))
    }
}

impl fmt::Debug for HexDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A Secure Boot variable whose entries are an allow-list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum KeyVariable {
    /// The platform key.
    Pk,
    /// Keys that may change db and dbx.
    Kek,
    /// What may be booted.
    Db,
}

impl KeyVariable {
    /// Every one.
    pub const ALL: [KeyVariable; 3] = [Self::Pk, Self::Kek, Self::Db];

    /// `PK`, `KEK` or `db`: the name of the UEFI variable.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pk => "PK",
            Self::Kek => "KEK",
            Self::Db => "db",
        }
    }
}

/// Digests of measured events, in the bank that is quoted.
pub type Digests = BTreeSet<HexDigest>;

/// The command line of the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandLine {
    /// Regular expressions over the whole of a text that GRUB or systemd-boot measured.
    pub patterns: BTreeSet<String>,
    /// Whole texts. They also match the EFI stub's event, whose log holds the digest only.
    pub exact: BTreeSet<String>,
}

/// One file that IMA may have measured: a digest, and the path it must stand at (none: anywhere).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ImaFile {
    /// The file's digest.
    pub digest: HexDigest,
    /// Its path.
    pub path: Option<String>,
}

/// What may have been measured at run time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImaRules {
    /// SHA-256 of each allow-list's text.
    pub allow_lists: BTreeSet<[u8; 32]>,
    /// A few files more.
    pub files: BTreeSet<ImaFile>,
    /// Paths (globs) at which an unlisted file is tolerated.
    pub exceptions: BTreeSet<String>,
    /// Whether violations are tolerated, wherever. A quote does not cover a violation's path (IMA extends ones for it),
    /// so that no path can excuse one: who relays the log could name any.
    pub violations_tolerated: bool,
}

/// An appraisal policy. An absent rule consumes nothing, so that an event of its kind is refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppraisalPolicy {
    /// Its name.
    pub name: ObjectName,
    /// The clusters whose nodes it may accept.
    pub clusters: BTreeSet<ClusterId>,
    /// What must vouch for the TPM; hardware only, unless said.
    pub endorsement: BTreeSet<EndorsementClass>,
    /// Whether a machine without a boot log may pass; then every policed PCR needs golden values.
    pub boot_log_optional: bool,
    /// Whether Secure Boot may be off.
    pub secure_boot_any: bool,
    /// What PK, KEK and db may contain: SHA-256 of a certificate, or a hash that the variable lists.
    pub keys: BTreeMap<KeyVariable, Digests>,
    /// What dbx must contain at least; none: dbx is not consumed.
    pub dbx_includes: Option<Digests>,
    /// Least generation of each component of shim's SbatLevel.
    pub sbat_level: Option<BTreeMap<String, u32>>,
    /// What may have verified an image: SHA-256 of a certificate, or the hash or value measured.
    pub authorities: Option<Digests>,
    /// Authenticode digests of what the firmware and shim ran (PCRs 2 and 4).
    pub images: Option<Digests>,
    /// Digests of files that a boot loader read (PCR 9).
    pub files: Option<Digests>,
    /// Digests of shim's machine owner lists (PCR 14).
    pub mok: Option<Digests>,
    /// Regular expressions over the whole of a GRUB command (PCR 8).
    pub grub_commands: Option<BTreeSet<String>>,
    /// The kernel's command line.
    pub command_line: Option<CommandLine>,
    /// Any other events by PCR and digest.
    pub events: BTreeMap<u32, Digests>,
    /// Golden values by bank and PCR: they consume all of the PCR.
    pub pcrs: BTreeMap<PcrBank, BTreeMap<u32, Digests>>,
    /// PCRs that say nothing about trust here.
    pub unpoliced: BTreeSet<u32>,
    /// What may run; none: PCR 10 is not judged.
    pub ima: Option<ImaRules>,
}

impl AppraisalPolicy {
    /// A policy without a rule: it accepts no machine that measures anything.
    pub fn new(name: ObjectName, clusters: BTreeSet<ClusterId>) -> AppraisalPolicy {
        AppraisalPolicy {
            name,
            clusters,
            endorsement: BTreeSet::from([EndorsementClass::Hardware]),
            boot_log_optional: false,
            secure_boot_any: false,
            keys: BTreeMap::new(),
            dbx_includes: None,
            sbat_level: None,
            authorities: None,
            images: None,
            files: None,
            mok: None,
            grub_commands: None,
            command_line: None,
            events: BTreeMap::new(),
            pcrs: BTreeMap::new(),
            unpoliced: BTreeSet::new(),
            ima: None,
        }
    }

    /// The canonical form: postcard, whose encoding of ordered collections is unique.
    ///
    /// # Errors
    /// [`Code::Internal`] if it cannot be encoded, which no value of this type should cause.
    pub fn encode(&self) -> Result<Vec<u8>, Refusal> {
        postcard::to_stdvec(self).map_err(|e| Refusal::new(Code::Internal, "an encodable policy", e.to_string()))
    }

    /// The policy in `bytes`.
    ///
    /// # Errors
    /// [`Code::AppraisalPolicyMalformed`] for anything but the canonical form of a policy.
    pub fn decode(bytes: &[u8]) -> Result<AppraisalPolicy, Refusal> {
        let bad = |found: String| Refusal::new(Code::AppraisalPolicyMalformed, "an encoded appraisal policy", found);
        let policy: AppraisalPolicy = postcard::from_bytes(bytes).map_err(|e| bad(e.to_string()))?;
        if policy.encode()? == bytes { Ok(policy) } else { Err(bad("another encoding".to_owned())) }
    }

    /// SHA-256 over the canonical form: the policy's identity in attestation results.
    pub fn sha256(&self) -> [u8; 32] {
        // An encoding that failed would give every such policy one name; `encode` cannot fail for this type.
        Sha256::digest(self.encode().unwrap_or_default()).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_encoding_is_canonical() {
        let mut policy = AppraisalPolicy::new("web".parse().unwrap(), BTreeSet::from(["west".parse().unwrap()]));
        policy.unpoliced.insert(1);
        let bytes = policy.encode().unwrap();
        assert_eq!(AppraisalPolicy::decode(&bytes).unwrap(), policy);
        let mut other = policy.clone();
        other.secure_boot_any = true;
        assert_ne!(other.sha256(), policy.sha256());
        assert!(AppraisalPolicy::decode(&[bytes.as_slice(), &[0]].concat()).is_err());
        for n in 0..bytes.len() {
            assert!(AppraisalPolicy::decode(&bytes[..n]).is_err());
        }
    }

    #[test]
    fn digests_are_strict() {
        for (text, good) in [
            ("00".repeat(32), true),
            ("0f".repeat(48), true),
            ("aa".repeat(64), true),
            ("00".repeat(20), false),
            ("AA".repeat(32), false),
            ("0".repeat(63), false),
            (String::new(), false),
        ] {
            assert_eq!(text.parse::<HexDigest>().is_ok(), good, "{text}");
        }
    }
}
