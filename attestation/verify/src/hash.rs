//! The hash algorithms of TPM 2.0 that this verifier knows (TPM 2.0 Part 2, 6.3), and the PCR banks it trusts.

use aws_lc_rs::{digest, hmac};
use std::fmt;

/// A hash algorithm. SHA-1 exists to read logs; nothing is ever trusted by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum HashAlg {
    /// SHA-1: only to walk over digests in logs and to check IMA's own template hash.
    Sha1,
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
}

impl HashAlg {
    /// The algorithm of a `TPM_ALG_ID`, if known.
    pub fn from_id(id: u16) -> Option<HashAlg> {
        match id {
            0x0004 => Some(HashAlg::Sha1),
            0x000b => Some(HashAlg::Sha256),
            0x000c => Some(HashAlg::Sha384),
            0x000d => Some(HashAlg::Sha512),
            _ => None,
        }
    }

    /// The `TPM_ALG_ID`.
    pub fn id(self) -> u16 {
        match self {
            HashAlg::Sha1 => 0x0004,
            HashAlg::Sha256 => 0x000b,
            HashAlg::Sha384 => 0x000c,
            HashAlg::Sha512 => 0x000d,
        }
    }

    /// Digest length in bytes.
    pub fn size(self) -> usize {
        match self {
            HashAlg::Sha1 => 20,
            HashAlg::Sha256 => 32,
            HashAlg::Sha384 => 48,
            HashAlg::Sha512 => 64,
        }
    }

    /// The digest of `parts`, one after the other.
    pub fn digest(self, parts: &[&[u8]]) -> Vec<u8> {
        let mut ctx = digest::Context::new(self.provider());
        for part in parts {
            ctx.update(part);
        }
        ctx.finish().as_ref().to_vec()
    }

    /// HMAC of `parts` under `key`; none for SHA-1, which no accepted key uses.
    pub(crate) fn hmac(self, key: &[u8], parts: &[&[u8]]) -> Option<Vec<u8>> {
        let mut ctx = hmac::Context::with_key(&hmac::Key::new(self.hmac_provider()?, key));
        for part in parts {
            ctx.update(part);
        }
        Some(ctx.sign().as_ref().to_vec())
    }

    fn hmac_provider(self) -> Option<hmac::Algorithm> {
        match self {
            HashAlg::Sha1 => None,
            HashAlg::Sha256 => Some(hmac::HMAC_SHA256),
            HashAlg::Sha384 => Some(hmac::HMAC_SHA384),
            HashAlg::Sha512 => Some(hmac::HMAC_SHA512),
        }
    }

    fn provider(self) -> &'static digest::Algorithm {
        match self {
            HashAlg::Sha1 => &digest::SHA1_FOR_LEGACY_USE_ONLY,
            HashAlg::Sha256 => &digest::SHA256,
            HashAlg::Sha384 => &digest::SHA384,
            HashAlg::Sha512 => &digest::SHA512,
        }
    }
}

impl fmt::Display for HashAlg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            HashAlg::Sha1 => "sha1",
            HashAlg::Sha256 => "sha256",
            HashAlg::Sha384 => "sha384",
            HashAlg::Sha512 => "sha512",
        })
    }
}

/// SHA-256 of `bytes` as an array.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    sha256_of(&[bytes])
}

/// SHA-256 of `parts`, one after the other, as an array.
pub fn sha256_of(parts: &[&[u8]]) -> [u8; 32] {
    let mut out = [0u8; 32];
    for (to, from) in out.iter_mut().zip(HashAlg::Sha256.digest(parts)) {
        *to = from;
    }
    out
}

/// A PCR bank that a quote may be asked over. There is no SHA-1 here on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Bank {
    /// The SHA-256 bank: the one every PC Client TPM has.
    Sha256,
    /// The SHA-384 bank.
    Sha384,
}

impl Bank {
    /// The bank's hash algorithm.
    pub fn hash(self) -> HashAlg {
        match self {
            Bank::Sha256 => HashAlg::Sha256,
            Bank::Sha384 => HashAlg::Sha384,
        }
    }

    /// `sha256` or `sha384`, as on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Bank::Sha256 => "sha256",
            Bank::Sha384 => "sha384",
        }
    }

    /// The bank with this name.
    pub fn from_text(s: &str) -> Option<Bank> {
        match s {
            "sha256" => Some(Bank::Sha256),
            "sha384" => Some(Bank::Sha384),
            _ => None,
        }
    }
}
