//! Record keys: Ed25519, apart from issuing keys, listed in a root-certified key set. They sign heads, reports and
//! attestation results ([`crate::result`]).

use crate::authority::Root;
use crate::keys::internal;
use ambit_model::record::Head;
use ambit_model::{Code, Refusal, Stamp, TrustDomain};
use ambit_state::Committed;
use ambit_state::committed::SealedReport;
use ambit_state::external::path;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use serde::{Deserialize, Serialize};
use x509_parser::prelude::{FromDer, X509Certificate};

const KEY_SET_CONTEXT: &[u8] = b"ambit/key-set/v1";
const POSSESSION_CONTEXT: &[u8] = b"ambit/possession/v1";
const REPORT_CONTEXT: &[u8] = b"ambit/report/v1";
/// A cell has at most a handful of replicas, past and present.
const KEYS_MAX: usize = 64;

/// The public key of a pair, 32 bytes (RFC 8032).
pub(crate) fn public_of(pair: &Ed25519KeyPair) -> [u8; 32] {
    let mut out = [0u8; 32];
    if let (len, bytes) = (out.len(), pair.public_key().as_ref())
        && bytes.len() == len
    {
        out.copy_from_slice(bytes);
    }
    out
}

/// A replica's record key.
pub struct RecordKey {
    pair: Ed25519KeyPair,
    pkcs8: zeroize::Zeroizing<Vec<u8>>,
}

impl RecordKey {
    /// A fresh key.
    pub fn generate() -> Result<Self, Refusal> {
        let pair = Ed25519KeyPair::generate().map_err(|e| internal("a record key", e))?;
        let pkcs8 = pair.to_pkcs8v1().map_err(|e| internal("a record key", e))?.as_ref().to_vec();
        Self::from_pkcs8(&pkcs8)
    }
    /// From its file.
    pub fn from_pkcs8(der: &[u8]) -> Result<Self, Refusal> {
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der).map_err(|e| internal("an Ed25519 key", e))?;
        Ok(Self { pair, pkcs8: zeroize::Zeroizing::new(der.to_vec()) })
    }
    /// For its file.
    pub fn pkcs8(&self) -> &[u8] {
        &self.pkcs8
    }
    /// The public key, 32 bytes.
    pub fn public(&self) -> [u8; 32] {
        public_of(&self.pair)
    }
    /// The bare signature, for this crate's functions that take a proof.
    pub(crate) fn sign(&self, message: &[u8]) -> Vec<u8> {
        self.pair.sign(message).as_ref().to_vec()
    }
    /// Signs a head: the end of this cell's own chain.
    pub fn sign_head(&self, head: &Head) -> Vec<u8> {
        self.pair.sign(&head.signed_bytes()).as_ref().to_vec()
    }
    /// Proves possession over a transcript (peering).
    pub fn prove(&self, transcript: &[u8]) -> Vec<u8> {
        self.pair.sign(&[POSSESSION_CONTEXT, transcript].concat()).as_ref().to_vec()
    }
    /// Signs a drill's report that was committed: (statement, signature).
    pub fn sign_report(
        &self,
        td: &TrustDomain,
        report: &Committed<SealedReport>,
    ) -> Result<(Vec<u8>, Vec<u8>), Refusal> {
        let r = report.get();
        let statement = ReportStatement {
            trust_domain: td.clone(),
            drill: r.drill.clone(),
            sha256: r.sha256,
            stamp_ms: r.stamp.0,
            index: r.index.0,
        };
        let statement = postcard::to_stdvec(&statement).map_err(|e| internal("a statement", e))?;
        let signature = self.pair.sign(&[REPORT_CONTEXT, statement.as_slice()].concat()).as_ref().to_vec();
        Ok((statement, signature))
    }
}

/// Whether this record key signed exactly this.
pub(crate) fn is_signed_by(key: &[u8; 32], message: &[u8], signature: &[u8]) -> bool {
    UnparsedPublicKey::new(&ED25519, key).verify(message, signature).is_ok()
}

/// What a sealed report's signature covers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportStatement {
    /// The cell that sealed it.
    pub trust_domain: TrustDomain,
    /// The drill's name.
    pub drill: String,
    /// SHA-256 of the report's bytes.
    pub sha256: [u8; 32],
    /// When it was committed, ms since the Unix epoch.
    pub stamp_ms: u64,
    /// Where it was committed.
    pub index: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct KeySetStatement {
    trust_domain: TrustDomain,
    seq: u64,
    keys: Vec<[u8; 32]>,
}

/// First byte of a signature by an authority under an external root; one by the root itself begins as DER does.
const BELOW_ROOT: u8 = 1;

/// What leads from the external root to the key that signed, and its signature.
#[derive(Serialize, Deserialize)]
struct BelowRoot {
    chain: Vec<Vec<u8>>,
    signature: Vec<u8>,
}

impl BelowRoot {
    fn read(bytes: &[u8]) -> Option<Self> {
        match postcard::take_from_bytes(bytes) {
            Ok((read, [])) => Some(read),
            _ => None,
        }
    }
}

/// A verified key set: made by [`KeySet::verify`] only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeySet {
    statement: KeySetStatement,
    /// When the authority under an external root ends that certified it; a root's own key has no such end here.
    ends: Option<Stamp>,
}

impl KeySet {
    /// Certifies `keys` as the root: (statement, signature).
    pub fn certify(
        root: &Root,
        td: &TrustDomain,
        seq: u64,
        keys: Vec<[u8; 32]>,
    ) -> Result<(Vec<u8>, Vec<u8>), Refusal> {
        let statement = KeySetStatement { trust_domain: td.clone(), seq, keys };
        let bytes = postcard::to_stdvec(&statement).map_err(|e| internal("a statement", e))?;
        let signature = root.sign(&[KEY_SET_CONTEXT, bytes.as_slice()].concat())?;
        if root.above().is_empty() {
            return Ok((bytes, signature));
        }
        // Who knows the external root alone has to be led to the key.
        let by = BelowRoot { chain: root.above().iter().map(|der| der.to_vec()).collect(), signature };
        let signature = postcard::to_extend(&by, vec![BELOW_ROOT]).map_err(|e| internal("a signature", e))?;
        Ok((bytes, signature))
    }
    /// Verifies a key set of `td` under its root. Errors: `record_signature`.
    pub fn verify(td: &TrustDomain, root_der: &[u8], statement: &[u8], signature: &[u8]) -> Result<Self, Refusal> {
        let bad = |found: &str| {
            Refusal::new(Code::RecordSignature, format!("a key set certified by the root of {td}"), found)
        };
        let message = [KEY_SET_CONTEXT, statement].concat();
        // With its algorithm: a bare point would be taken for one of P-256, whatever curve is named.
        let verified = |key: &[u8], signature: &[u8]| {
            UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, key).verify(&message, signature)
        };
        let mut ends = None;
        let signed = match signature.split_first() {
            Some((&BELOW_ROOT, rest)) => {
                let by = BelowRoot::read(rest).ok_or_else(|| bad("an unreadable signature"))?;
                let judged = path(td, &by.chain, root_der).map_err(|refusal| bad(&refusal.found))?;
                ends = Some(judged.lifetime().not_after);
                verified(judged.spki(), &by.signature)
            }
            _ => {
                let (_, root) = X509Certificate::from_der(root_der).map_err(|_| bad("an unreadable root"))?;
                verified(root.public_key().raw, signature)
            }
        };
        #[cfg(ambit_mutant)]
        let signed = if ambit_state::mutant::is("key-set-uncertified") { Ok(()) } else { signed };
        signed.map_err(|_| bad("another signature"))?;
        let statement: KeySetStatement = postcard::from_bytes(statement).map_err(|_| bad("an unreadable statement"))?;
        if statement.trust_domain != *td || statement.keys.len() > KEYS_MAX {
            return Err(bad("a key set of another trust domain"));
        }
        Ok(Self { statement, ends })
    }
    /// The same, where what certified it is in time now: for what is heard of a living cell. What was certified once and kept
    /// says what it said.
    ///
    /// # Errors
    /// [`Code::Unavailable`] where the authority ended that certified it: a cell that renewed it certified its keys again.
    pub fn in_time(self, now: Stamp) -> Result<Self, Refusal> {
        match self.ends {
            Some(ends) if ends < now => {
                let expected = "a key set certified by an authority in time";
                Err(Refusal::new(Code::Unavailable, expected, format!("by one that ended at {} (ms)", ends.0)))
            }
            Some(_) | None => Ok(self),
        }
    }
    /// Its version; a lower one than known is a rollback.
    pub fn seq(&self) -> u64 {
        self.statement.seq
    }
    /// Whose it is.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.statement.trust_domain
    }
    /// The keys.
    pub fn keys(&self) -> &[[u8; 32]] {
        &self.statement.keys
    }
    fn any(&self, message: &[u8], signature: &[u8]) -> bool {
        self.statement.keys.iter().any(|k| is_signed_by(k, message, signature))
    }
    /// A head signed by one of the keys. (Signatures of a majority are issue F's.)
    pub fn verify_head(&self, head: &Head, signature: &[u8]) -> Result<(), Refusal> {
        if head.origin == self.statement.trust_domain && self.any(&head.signed_bytes(), signature) {
            return Ok(());
        }
        Err(Refusal::new(Code::RecordSignature, "a head signed by a record key of its origin", "another signature"))
    }
    /// Possession proved over a transcript by one of the keys.
    pub fn verify_possession(&self, transcript: &[u8], signature: &[u8]) -> Result<(), Refusal> {
        if self.any(&[POSSESSION_CONTEXT, transcript].concat(), signature) {
            return Ok(());
        }
        Err(Refusal::new(Code::PossessionUnproved, "a signature by a record key of the cell", "another"))
    }
    /// A sealed report's statement. Errors: `drill_report_invalid`.
    pub fn verify_report(&self, statement: &[u8], signature: &[u8]) -> Result<ReportStatement, Refusal> {
        let bad = |found: &str| {
            Refusal::new(Code::DrillReportInvalid, "a statement signed by a record key of the cell", found)
        };
        if !self.any(&[REPORT_CONTEXT, statement].concat(), signature) {
            return Err(bad("another signature"));
        }
        let statement: ReportStatement = postcard::from_bytes(statement).map_err(|_| bad("an unreadable statement"))?;
        if statement.trust_domain != self.statement.trust_domain {
            return Err(bad("another trust domain"));
        }
        Ok(statement)
    }
}
