//! Heads of audit logs, signed and cosigned with record keys, and verified by key sets. Only what was committed is signed.

use crate::record::{KeySet, RecordKey};
use ambit_audit::note::{Kind, Line};
use ambit_audit::{Checkpoint, Note, Verifier};
use ambit_model::{Code, Refusal, Stamp, TrustDomain};
use ambit_state::Committed;
use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// The name under which a cell cosigns others' logs.
pub fn witness_name(td: &TrustDomain) -> String {
    format!("{td}/ambit/witness")
}

impl RecordKey {
    /// The log's own signature of its head.
    pub fn sign_checkpoint(&self, head: &Committed<Checkpoint>) -> Line {
        let by = Verifier { name: head.get().origin.clone(), kind: Kind::Log, key: self.public() };
        Line::of_log(&by, &self.sign(head.get().text().as_bytes()))
    }
    /// A witness's signature of another cell's head, as the cell `td`, at this time.
    pub fn cosign(&self, td: &TrustDomain, head: &Committed<Checkpoint>, at: Stamp) -> Line {
        let by = Verifier { name: witness_name(td), kind: Kind::Witness, key: self.public() };
        let seconds = at.0 / 1000;
        Line::of_witness(&by, seconds, &self.sign(&head.get().cosigned(seconds)))
    }
}

impl KeySet {
    /// The incarnation that the head is of, where one of the keys signed it as this trust domain's.
    ///
    /// # Errors
    /// [`Code::AuditMismatch`].
    pub fn verify_checkpoint(&self, note: &Note) -> Result<u64, Refusal> {
        let origin = &note.checkpoint.origin;
        let bad = |found: &str| {
            let expected = format!("a head of the audit log of {} under one of its record keys", self.trust_domain());
            Refusal::new(Code::AuditMismatch, expected, format!("{origin}: {found}"))
        };
        let epoch = origin.strip_prefix(&format!("{}/ambit/audit/", self.trust_domain()));
        let epoch: u64 = epoch.and_then(|epoch| epoch.parse().ok()).ok_or_else(|| bad("another log"))?;
        if *origin != ambit_state::audit::origin(self.trust_domain(), epoch) {
            return Err(bad("another log"));
        }
        let by = |key: &[u8; 32]| Verifier { name: origin.clone(), kind: Kind::Log, key: *key };
        let signed = self.keys().iter().any(|key| note.signed_by(&by(key)).is_some());
        if signed { Ok(epoch) } else { Err(bad("another signature")) }
    }
    /// When one of the keys cosigned the head as this trust domain, ms since the Unix epoch; none where none did.
    pub fn cosigned(&self, note: &Note) -> Option<Stamp> {
        let name = witness_name(self.trust_domain());
        let by = |key: &[u8; 32]| Verifier { name: name.clone(), kind: Kind::Witness, key: *key };
        self.keys().iter().find_map(|key| note.signed_by(&by(key))).map(|seconds| Stamp(seconds.saturating_mul(1000)))
    }
}

/// What a certificate says that its record says too. Nothing of it is verified: the record is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certified {
    /// As in the certificate.
    pub serial: Vec<u8>,
    /// SHA-256 of the SubjectPublicKeyInfo.
    pub key_sha256: [u8; 32],
    /// The first URI.
    pub spiffe_id: String,
}

impl Certified {
    /// Reads a certificate (DER).
    ///
    /// # Errors
    /// [`Code::BadRequest`].
    pub fn read(der: &[u8]) -> Result<Self, Refusal> {
        let bad = || Refusal::new(Code::BadRequest, "an X.509-SVID", "another file");
        let (_, certificate) = X509Certificate::from_der(der).map_err(|_| bad())?;
        let names = certificate.subject_alternative_name().ok().flatten().ok_or_else(bad)?;
        let uri = names.value.general_names.iter().find_map(|name| match name {
            GeneralName::URI(uri) => Some((*uri).to_owned()),
            _ => None,
        });
        Ok(Self {
            serial: certificate.raw_serial().to_vec(),
            key_sha256: Sha256::digest(certificate.public_key().raw).into(),
            spiffe_id: uri.ok_or_else(bad)?,
        })
    }
}
