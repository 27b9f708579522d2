//! Record keys: Ed25519, apart from issuing keys, listed in a root-certified key set. They sign heads, reports and
//! attestation results ([`crate::result`]).

use crate::authority::Root;
use crate::keys::internal;
use crate::majority::{CoSignature, majority, signers};
use ambit_model::record::{Claim, Head};
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
/// As with bundles: epoch << 40 | counter.
const EPOCH_SHIFT: u32 = 40;
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
    /// Signs a claim of this cell ([`ambit_model::record::Claim`]).
    pub fn sign_claim(&self, claim: &Claim) -> Vec<u8> {
        self.pair.sign(&claim.signed_bytes()).as_ref().to_vec()
    }
    /// Signs a head: what earlier releases believe of one replica alone.
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

/// What follows the statement: how many of the keys, from the first, are voters'. Earlier releases wrote none and do not read
/// so far. Of a statement without it all keys count: a cell of before may list former replicas', never fewer than its voters'.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Voters(u8);

/// The record keys of a cell, as its key set lists them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Of the replicas that vote: more than half of them sign what peers believe.
    pub voters: Vec<[u8; 32]>,
    /// Of replicas that do not vote yet, or no more: they sign results and reports.
    pub others: Vec<[u8; 32]>,
}

impl Listed {
    /// Every key speaks for a voter.
    pub fn of_voters(voters: Vec<[u8; 32]>) -> Self {
        Self { voters, others: Vec::new() }
    }
    /// What a statement lists, whoever certified it: of the own state, where the root did.
    pub fn read(statement: &[u8]) -> Option<Self> {
        let (read, voters) = read_statement(statement)?;
        let (voters, others) = read.keys.split_at_checked(voters)?;
        Some(Self { voters: voters.to_vec(), others: others.to_vec() })
    }
}

/// A statement and how many of its keys are voters'.
fn read_statement(bytes: &[u8]) -> Option<(KeySetStatement, usize)> {
    let (statement, rest) = postcard::take_from_bytes::<KeySetStatement>(bytes).ok()?;
    if rest.is_empty() {
        let all = statement.keys.len();
        return Some((statement, all));
    }
    match postcard::take_from_bytes::<Voters>(rest) {
        Ok((Voters(voters), [])) if (1..=statement.keys.len()).contains(&usize::from(voters)) => {
            Some((statement, usize::from(voters)))
        }
        _ => None,
    }
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
    /// So many of its keys, from the first, are voters'.
    voters: usize,
    /// When the authority under an external root ends that certified it; a root's own key has no such end here.
    ends: Option<Stamp>,
}

impl KeySet {
    /// Certifies `keys`, each a voter's, as the root: (statement, signature).
    pub fn certify(
        root: &Root,
        td: &TrustDomain,
        seq: u64,
        keys: Vec<[u8; 32]>,
    ) -> Result<(Vec<u8>, Vec<u8>), Refusal> {
        Self::certify_listed(root, td, seq, Listed::of_voters(keys))
    }
    /// The same, of keys that are not all voters'. Errors: `internal` where none is, or there are too many.
    pub fn certify_listed(
        root: &Root,
        td: &TrustDomain,
        seq: u64,
        listed: Listed,
    ) -> Result<(Vec<u8>, Vec<u8>), Refusal> {
        let voters = u8::try_from(listed.voters.len()).map_err(|e| internal("a number of voters", e))?;
        let keys = [listed.voters, listed.others].concat();
        if voters == 0 || keys.len() > KEYS_MAX {
            let found = format!("{voters} voters of {} keys", keys.len());
            return Err(Refusal::new(Code::Internal, format!("a voter, and at most {KEYS_MAX} keys"), found));
        }
        let statement = KeySetStatement { trust_domain: td.clone(), seq, keys };
        let bytes = postcard::to_stdvec(&statement).map_err(|e| internal("a statement", e))?;
        let bytes = postcard::to_extend(&Voters(voters), bytes).map_err(|e| internal("a statement", e))?;
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
        let (statement, voters) = read_statement(statement).ok_or_else(|| bad("an unreadable statement"))?;
        if statement.trust_domain != *td || statement.keys.len() > KEYS_MAX {
            return Err(bad("a key set of another trust domain"));
        }
        Ok(Self { statement, voters, ends })
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
    /// The version after `known` in this incarnation of the cell: above all that a lost one may have come to, as with bundles.
    pub fn seq_after(known: u64, epoch: u64) -> u64 {
        known.saturating_add(1).max(epoch.saturating_sub(1) << EPOCH_SHIFT | 1)
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
    /// The keys of the replicas that vote; never none but of a set without keys.
    pub fn voters(&self) -> &[[u8; 32]] {
        self.statement.keys.get(..self.voters).unwrap_or_default()
    }
    /// Which they are.
    pub fn listed(&self) -> Listed {
        let (voters, others) = self.statement.keys.split_at_checked(self.voters).unwrap_or_default();
        Listed { voters: voters.to_vec(), others: others.to_vec() }
    }
    fn any(&self, message: &[u8], signature: &[u8]) -> bool {
        self.statement.keys.iter().any(|k| is_signed_by(k, message, signature))
    }
    /// What an origin says of its history, signed by more than half of its voters. Errors: `record_signature`.
    pub fn verify_claim(
        &self,
        origin: &TrustDomain,
        message: &[u8],
        signatures: &[CoSignature],
    ) -> Result<(), Refusal> {
        let bad = |found: String| {
            let expected = format!("signatures of {} of its {} voters", majority(self.voters), self.voters);
            Refusal::new(Code::RecordSignature, expected, found)
        };
        if *origin != self.statement.trust_domain || signatures.len() > KEYS_MAX {
            return Err(bad(format!("{} signatures in the name of {origin}", signatures.len())));
        }
        let good = signers(self.voters(), message, signatures);
        let needed = majority(self.voters);
        #[cfg(ambit_mutant)]
        let needed = if ambit_state::mutant::is("head-minority") { 1 } else { needed };
        if good >= needed { Ok(()) } else { Err(bad(format!("{good} of the {} that came", signatures.len()))) }
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
