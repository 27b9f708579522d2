//! `ambit audit prove`, and how what it writes is checked without a cell.

use super::super::Session;
use super::verify::{keys, signed, witnesses};
use crate::args::{AuditProve, AuditVerify};
use crate::ask;
use crate::context::read_bounded;
use crate::exit::file_refusal;
use crate::output::{Answer, Form, pretty};
use crate::when::utc;
use ambit_audit::proof_file::ProofFile;
use ambit_audit::{Hash, Note, Record, leaf_hash, verify_consistency, verify_inclusion};
use ambit_identity::audit::Certified;
use ambit_identity::keys::certificates_from_pem;
use ambit_model::{Code, Refusal, TrustDomain};
use ambit_proto::v1;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::path::Path;

const FORMAT: &str = "ambit-audit-proof/1";
/// A record, a path, a few heads and key sets.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// What lies in the file. Keys, roots and hashes are hexadecimal.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    format: String,
    trust_domain: TrustDomain,
    /// The record as it stands in the log.
    record: String,
    /// C2SP tlog-proof: place, path, and the head that the cell signed.
    proof: String,
    keys: Keys,
    cosigned: Vec<Cosigned>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Keys {
    statement: String,
    signature: String,
    root: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Cosigned {
    trust_domain: TrustDomain,
    note: String,
    keys: Keys,
    consistency: Vec<String>,
}

impl Keys {
    fn of(set: Option<v1::KeySet>, root: &[u8]) -> Self {
        let set = set.unwrap_or_default();
        let (statement, signature) = (hex::encode(set.statement), hex::encode(set.signature));
        Self { statement, signature, root: hex::encode(root) }
    }
    fn read(&self) -> Result<(v1::KeySet, Vec<u8>), Refusal> {
        Ok((v1::KeySet { statement: bytes(&self.statement)?, signature: bytes(&self.signature)? }, bytes(&self.root)?))
    }
}

fn bytes(text: &str) -> Result<Vec<u8>, Refusal> {
    hex::decode(text)
        .map_err(|_| Refusal::new(Code::AuditMismatch, "hexadecimal digits", text.chars().take(80).collect::<String>()))
}

fn hashes(texts: &[String]) -> Result<Vec<Hash>, Refusal> {
    let bad = || Refusal::new(Code::AuditMismatch, "hashes of 32 bytes", "others");
    texts.iter().map(|text| Hash::try_from(bytes(text)?).map_err(|_| bad())).collect()
}

/// The certificate that a person names: the first of the file.
fn certified(file: &Path) -> Result<Certified, Refusal> {
    let text = read_bounded(file, FILE_BYTES_MAX)?;
    let chain = certificates_from_pem(&text)?;
    let leaf = chain.first().ok_or_else(|| Refusal::new(Code::BadRequest, "a certificate (PEM)", "none"))?;
    Certified::read(leaf)
}

pub(super) async fn run(session: &Session, options: &AuditProve) -> Result<Answer, Refusal> {
    let cell = session.cell()?;
    let certificate = options.certificate.as_deref().map(certified).transpose()?;
    let what = match (&certificate, options.record) {
        (Some(certificate), _) => v1::prove_audit_request::What::Serial(certificate.serial.clone()),
        (None, Some(n)) => v1::prove_audit_request::What::N(n),
        (None, None) => return Err(Refusal::new(Code::BadRequest, "a certificate or --record", "neither")),
    };
    let answer = ask!(cell, Audit.prove_audit(v1::ProveAuditRequest { what: Some(what.clone()), old_size: 0 }))?;
    let head = answer.head.unwrap_or_default();
    let td = cell.context().trust_domain.clone();
    let note = signed(&td, &cell.context().fingerprint, &head)?;
    let path: Vec<String> = answer.inclusion.iter().map(hex::encode).collect();
    let proof = ProofFile { index: answer.n, path: hashes(&path)?, note }.text();
    let cosigned = head.cosigned.into_iter().map(|c| {
        Ok(Cosigned {
            trust_domain: c.trust_domain.parse()?,
            note: c.note,
            keys: Keys::of(c.key_set, &c.root_der),
            consistency: c.consistency.iter().map(hex::encode).collect(),
        })
    });
    let written = Written {
        format: FORMAT.to_owned(),
        trust_domain: td,
        record: String::from_utf8_lossy(&answer.record).into_owned(),
        proof,
        keys: Keys::of(head.key_set, &head.root_der),
        cosigned: cosigned.collect::<Result<_, Refusal>>()?,
    };
    // What this cell says is to be believed by its own root, or it is not worth a file.
    let text = json_text(&written)?;
    let proved = prove(text.as_bytes(), &cell.context().fingerprint, &[], certificate.as_ref())?;
    match &options.out {
        None => Ok(Answer::ok(text)),
        Some(file) => {
            std::fs::write(file, &text).map_err(|e| file_refusal(file, &e))?;
            Ok(Answer::ok(shown(session.form, &proved)))
        }
    }
}

fn json_text(written: &Written) -> Result<String, Refusal> {
    let text = serde_json::to_string_pretty(written);
    text.map(|text| text + "\n").map_err(|e| Refusal::new(Code::Internal, "a proof as JSON", e.to_string()))
}

/// What a file was found to prove.
struct Proved {
    n: u64,
    size: u64,
    origin: String,
    record: Record,
    witnessed: Vec<String>,
}

/// Every step from the root that the reader pinned to the record.
fn prove(
    file: &[u8],
    root: &[u8; 32],
    pinned: &[(TrustDomain, [u8; 32])],
    certificate: Option<&Certified>,
) -> Result<Proved, Refusal> {
    let bad =
        |found: String| Refusal::new(Code::AuditMismatch, format!("a file of `ambit audit prove` ({FORMAT})"), found);
    let written: Written = serde_json::from_slice(file).map_err(|e| bad(e.to_string()))?;
    if written.format != FORMAT {
        return Err(bad(written.format));
    }
    let (set, root_der) = written.keys.read()?;
    let ProofFile { index, path, note } = ProofFile::parse(&written.proof)?;
    keys(&written.trust_domain, root, Some(&set), &root_der)?.verify_checkpoint(&note)?;
    let head = &note.checkpoint;
    verify_inclusion(&leaf_hash(written.record.as_bytes()), index, head.size, &path, &head.root)?;
    let record = Record::decode(written.record.as_bytes())?;
    if let Some(certificate) = certificate {
        let fact = |name: &str| record.facts.get(name).cloned().unwrap_or_default();
        let found = (fact("serial"), fact("key_sha256"), record.object.clone());
        let expected =
            (hex::encode(&certificate.serial), hex::encode(certificate.key_sha256), certificate.spiffe_id.clone());
        if found != expected {
            let expected = format!("the issuance of serial {} for {}", expected.0, expected.2);
            return Err(Refusal::new(Code::AuditMismatch, expected, format!("of serial {} for {}", found.0, found.2)));
        }
    }
    let mut witnessed = Vec::new();
    for cosigned in &written.cosigned {
        let Some((td, root)) = pinned.iter().find(|(td, _)| *td == cosigned.trust_domain) else { continue };
        let (set, root_der) = cosigned.keys.read()?;
        let older = Note::parse(&cosigned.note)?;
        let keys = keys(td, root, Some(&set), &root_der)?;
        let (Some(at), true) = (keys.cosigned(&older), older.checkpoint.origin == head.origin) else { continue };
        let way = hashes(&cosigned.consistency)?;
        verify_consistency(older.checkpoint.size, head.size, &older.checkpoint.root, &head.root, &way)?;
        // What it cosigned before the record was made says nothing of it.
        if index < older.checkpoint.size {
            witnessed.push(format!("{td} at {} records, {}", older.checkpoint.size, utc(at.0)));
        }
    }
    Ok(Proved { n: index, size: head.size, origin: head.origin.clone(), record, witnessed })
}

pub(super) fn verify(form: Form, file: &Path, options: &AuditVerify) -> Result<Answer, Refusal> {
    let root = super::super::trust::pinned(options.root.as_deref(), options.fingerprint.as_deref())?;
    let certificate = options.certificate.as_deref().map(certified).transpose()?;
    let pinned = witnesses(&options.witnesses)?;
    let proved = prove(read_bounded(file, FILE_BYTES_MAX)?.as_bytes(), &root, &pinned, certificate.as_ref())?;
    Ok(Answer::ok(shown(form, &proved)))
}

fn shown(form: Form, p: &Proved) -> String {
    let witnessed = if p.witnessed.is_empty() { "unwitnessed".to_owned() } else { p.witnessed.join("; ") };
    match form {
        Form::Json => pretty(&json!({
            "origin": p.origin, "n": p.n, "size": p.size, "record": p.record, "witnessed": p.witnessed,
        })),
        Form::Table => format!(
            "record {} of {} in {}\n  {} {} {} by {}, {}\n  witnessed: {witnessed}",
            p.n,
            p.size,
            p.origin,
            p.record.act,
            p.record.object,
            p.record.outcome.as_str(),
            p.record.actor,
            utc(p.record.stamp_ms),
        ),
    }
}
