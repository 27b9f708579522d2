//! Recovery shares of a root's key: any `threshold` of them give the key, fewer say nothing of it (Shamir, over GF(256)).
//!
//! A share says what it is of, so that one of another root, of another splitting or a damaged one is refused by name, not
//! found out by a key that fits nothing. Its text is a secret, and is wiped; no `Debug`, no `Display`.

use crate::authority::Root;
use crate::keys::{SvidKey, fingerprint, internal};
use ambit_model::{Code, Refusal, TrustDomain};
use blahaj::{Share, Sharks};
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use zeroize::{Zeroize, Zeroizing};

/// Holders of shares: more people than this keep no secret.
pub const SHARES_MAX: u8 = 16;
/// One share that opened the root would be a copy of its key.
pub const THRESHOLD_MIN: u8 = 2;
/// A share's text: a PKCS#8 P-256 key is 138 bytes.
const TEXT_BYTES_MAX: usize = 4 * 1024;
const FORM: &str = "ambit root share v1";

/// What shares were made together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShareSet {
    /// Of whose root.
    pub trust_domain: TrustDomain,
    /// SHA-256 of the root's certificate.
    pub root: [u8; 32],
    /// Random: shares of two splittings of one key do not go together.
    pub set: [u8; 16],
    /// How many give the key.
    pub threshold: u8,
    /// How many there are.
    pub of: u8,
}

impl ShareSet {
    /// Refuses a threshold below two or above the number of shares.
    pub fn new(root: &Root, trust_domain: &TrustDomain, threshold: u8, of: u8, set: [u8; 16]) -> Result<Self, Refusal> {
        if threshold < THRESHOLD_MIN || threshold > of || of > SHARES_MAX {
            let expected = format!("a threshold of {THRESHOLD_MIN} or more, of at most {SHARES_MAX} shares");
            return Err(Refusal::new(Code::BadRequest, expected, format!("{threshold} of {of}")));
        }
        Ok(Self { trust_domain: trust_domain.clone(), root: fingerprint(root.der()), set, threshold, of })
    }

    /// Splits the root's key.
    pub fn split(&self, root: &Root) -> Result<Vec<RootShare>, Refusal> {
        if fingerprint(root.der()) != self.root {
            return Err(Refusal::new(Code::FingerprintMismatch, hex::encode(self.root), "another root"));
        }
        let key = root.key().pkcs8();
        let dealt = Sharks(self.threshold).dealer(&key).take(usize::from(self.of));
        Ok(dealt.map(|share| RootShare { set: self.clone(), point: Zeroizing::new(Vec::from(&share)) }).collect())
    }
}

/// One share: a secret.
pub struct RootShare {
    set: ShareSet,
    /// Its index, then one byte for each of the key's.
    point: Zeroizing<Vec<u8>>,
}

/// A share as it is written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    form: String,
    trust_domain: TrustDomain,
    root: String,
    set: String,
    threshold: u8,
    of: u8,
    index: u8,
    share: String,
    /// SHA-256 over all of the above.
    checksum: String,
}

impl Drop for Written {
    fn drop(&mut self) {
        self.share.zeroize();
    }
}

impl Written {
    fn sum(&self) -> String {
        let mut sum = Sha256::new();
        for part in [&self.form, self.trust_domain.as_str(), &self.root, &self.set, &self.share] {
            sum.update((part.len() as u64).to_be_bytes());
            sum.update(part);
        }
        sum.update([self.threshold, self.of, self.index]);
        hex::encode(sum.finalize())
    }
}

fn damaged(found: impl Into<String>) -> Refusal {
    Refusal::new(Code::ShareInvalid, "a recovery share as it was written", found)
}

fn digits<const N: usize>(text: &str, what: &str) -> Result<[u8; N], Refusal> {
    let mut out = [0; N];
    hex::decode_to_slice(text, &mut out).map_err(|_| damaged(format!("another {what}")))?;
    Ok(out)
}

impl RootShare {
    /// What it is of.
    pub fn set(&self) -> &ShareSet {
        &self.set
    }
    /// Its number, from 1.
    pub fn index(&self) -> u8 {
        self.point.first().copied().unwrap_or_default()
    }

    /// Its text, which is the secret.
    pub fn text(&self) -> Result<Zeroizing<String>, Refusal> {
        let share = self.point.get(1..).map(hex::encode).unwrap_or_default();
        let mut written = Written {
            form: FORM.to_owned(),
            trust_domain: self.set.trust_domain.clone(),
            root: hex::encode(self.set.root),
            set: hex::encode(self.set.set),
            threshold: self.set.threshold,
            of: self.set.of,
            index: self.index(),
            share,
            checksum: String::new(),
        };
        written.checksum = written.sum();
        serde_json::to_string_pretty(&written).map(Zeroizing::new).map_err(|e| internal("a share that encodes", e))
    }

    /// Reads a text strictly.
    ///
    /// # Errors
    /// [`Code::ShareInvalid`], without a word of what it holds.
    pub fn parse(text: &[u8]) -> Result<RootShare, Refusal> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(damaged(format!("{} bytes", text.len())));
        }
        // What serde says of a text may quote it.
        let written: Written = serde_json::from_slice(text)
            .map_err(|e| damaged(format!("a text that ends to be one at line {}", e.line())))?;
        if written.form != FORM {
            return Err(damaged("another form"));
        }
        if written.sum() != written.checksum {
            return Err(damaged("one whose checksum does not hold"));
        }
        let set = ShareSet {
            trust_domain: written.trust_domain.clone(),
            root: digits(&written.root, "root")?,
            set: digits(&written.set, "set")?,
            threshold: written.threshold,
            of: written.of,
        };
        let counts = (THRESHOLD_MIN..=set.of).contains(&set.threshold) && set.of <= SHARES_MAX;
        if !counts || !(1..=set.of).contains(&written.index) {
            return Err(damaged(format!("number {} of {}, threshold {}", written.index, set.of, set.threshold)));
        }
        let mut point = Zeroizing::new(vec![written.index]);
        point.extend_from_slice(&Zeroizing::new(
            hex::decode(&written.share).map_err(|_| damaged("no hexadecimal digits"))?,
        ));
        Ok(RootShare { set, point })
    }
}

/// The root of `der`, or the authority under it that `above` leads from, with the key that these shares give.
///
/// # Errors
/// [`Code::ShareInvalid`] where they are of another root, of two sets, twice the same, or too few.
pub fn recover(
    td: &TrustDomain,
    der: CertificateDer<'static>,
    above: Vec<CertificateDer<'static>>,
    shares: &[RootShare],
) -> Result<Root, Refusal> {
    let refuse = |expected: String, found: String| Err(Refusal::new(Code::ShareInvalid, expected, found));
    let Some(first) = shares.first() else { return refuse("recovery shares".into(), "none".into()) };
    let id = fingerprint(&der);
    for (at, share) in shares.iter().enumerate() {
        let index = share.index();
        if share.set.root != id || share.set.trust_domain != *td {
            let found =
                format!("share {index} is of root {} of {}", hex::encode(share.set.root), share.set.trust_domain);
            return refuse(format!("shares of root {} of {td}", hex::encode(id)), found);
        }
        if share.set != first.set || share.point.len() != first.point.len() {
            return refuse(
                format!("shares that were made together with share {}", first.index()),
                format!("share {index} was not"),
            );
        }
        if shares.iter().take(at).any(|other| other.index() == index) {
            return refuse("different shares".into(), format!("share {index} twice"));
        }
    }
    let threshold = first.set.threshold;
    if shares.len() < usize::from(threshold) {
        return refuse(format!("{threshold} shares of {}", first.set.of), shares.len().to_string());
    }
    let mut points = Vec::new();
    for share in shares {
        points.push(Share::try_from(share.point.as_slice()).map_err(damaged)?);
    }
    let key = Sharks(threshold).recover(&points).map_err(damaged)?;
    let key = Zeroizing::new(key);
    let other = || damaged("shares whose checksums hold and that give no key of this root");
    Root::standing(td, der, above, SvidKey::from_pkcs8(&key).map_err(|_| other())?).map_err(|_| other())
}
