//! `ambit audit verify`: every replica's records against the head that was signed, and that against what is remembered.

use super::super::Session;
use crate::args::AuditVerify;
use crate::ask_at;
use crate::cell::Cell;
use crate::context::read_bounded;
use crate::exit::file_refusal;
use crate::output::{Answer, Table};
use crate::when::utc;
use ambit_audit::{Checkpoint, Frontier, Hash, Note, Record, leaf_hash};
use ambit_identity::{KeySet, fingerprint};
use ambit_model::{Code, Refusal, Stamp, TrustDomain};
use ambit_proto::v1;
use serde_json::json;
use std::net::SocketAddr;
use std::path::Path;

/// Records asked for at once; the answer is cut by its bytes.
const AT_ONCE: u64 = 4_096;
/// A remembered head is three lines and its signatures.
const NOTE_BYTES_MAX: u64 = 64 * 1024;

pub(super) async fn run(session: &Session, options: &AuditVerify) -> Result<Answer, Refusal> {
    if let Some(file) = &options.proof {
        return super::prove::verify(session.form, file, options);
    }
    let cell = session.cell()?;
    let pinned = witnesses(&options.witnesses)?;
    let mut table = Table::new("replica", &["replica", "records", "root", "log"]);
    let (mut notes, mut whole, mut spoilt) = (Vec::new(), None::<Whole>, Vec::new());
    for address in cell.context().addresses.clone() {
        match whole_of(&cell, address).await {
            Ok(found) => {
                let (replica, head) = (found.replica, &found.head.checkpoint);
                let row = |log: &str| vec![json!(replica), json!(head.size), json!(hex::encode(head.root)), json!(log)];
                match found.fault(whole.as_ref()) {
                    None => {
                        table.row(row("whole"));
                        if whole.as_ref().is_none_or(|known| known.hashes.len() < found.hashes.len()) {
                            whole = Some(found);
                        }
                    }
                    Some(_) => spoilt.push(found),
                }
            }
            Err(refusal) if refusal.code.class() == ambit_model::refusal::Class::Unavailable => {
                notes.push(format!("not verified: {address}: {refusal}"));
            }
            Err(refusal) => return Err(refusal),
        }
    }
    if let Some(found) = spoilt.first() {
        // With the hashes of a replica that has the log whole the very record can be told.
        let fault = found.fault(whole.as_ref()).unwrap_or_default();
        let expected = format!("the records under the signed head of {}", found.head.checkpoint.origin);
        return Err(Refusal::new(Code::AuditMismatch, expected, format!("replica {}: {fault}", found.replica)));
    }
    let Some(whole) = whole else {
        return Err(Refusal::new(Code::Unavailable, "a replica that has the log whole", notes.join("; ")));
    };
    if let Some(file) = &options.checkpoint {
        notes.push(remember(file, &whole)?);
    }
    let witnessed = whole.witnessed(&pinned)?;
    let line = match witnessed.as_slice() {
        [] => "unwitnessed: no cosignature of a peer that was pinned (--witness TRUST_DOMAIN=FINGERPRINT)".to_owned(),
        all => all
            .iter()
            .map(|(td, size, at)| format!("witnessed by {td}: the first {size} records, {}", utc(at.0)))
            .collect::<Vec<_>>()
            .join("\n"),
    };
    let mut answer = Answer::ok(format!("{}\n{line}", table.render(session.form)));
    if session.form == crate::output::Form::Json {
        let by: Vec<_> =
            witnessed.iter().map(|(td, size, at)| json!({"by": td.as_str(), "size": size, "at": utc(at.0)})).collect();
        let Checkpoint { origin, size, root } = &whole.head.checkpoint;
        answer = Answer::ok(crate::output::pretty(
            &json!({ "origin": origin, "size": size, "root": hex::encode(root), "witnessed": by }),
        ));
    }
    answer.notes = notes;
    Ok(answer)
}

/// Peers whose word counts: trust domain and root's fingerprint.
pub(super) fn witnesses(named: &[String]) -> Result<Vec<(TrustDomain, [u8; 32])>, Refusal> {
    let one = |text: &String| {
        let bad = || Refusal::new(Code::BadRequest, "TRUST_DOMAIN=FINGERPRINT", text.clone());
        let (td, hex) = text.split_once('=').ok_or_else(bad)?;
        let mut fingerprint = [0; 32];
        hex::decode_to_slice(hex, &mut fingerprint).map_err(|_| bad())?;
        Ok((td.parse().map_err(|_| bad())?, fingerprint))
    };
    named.iter().map(one).collect()
}

/// Whether the head is one of this trust domain's, by the root with this fingerprint.
pub(super) fn signed(td: &TrustDomain, root: &[u8; 32], head: &v1::AuditHeadResponse) -> Result<Note, Refusal> {
    let note = Note::parse(&head.checkpoint)?;
    keys(td, root, head.key_set.as_ref(), &head.root_der)?.verify_checkpoint(&note)?;
    Ok(note)
}

/// A key set under the root with this fingerprint.
pub(super) fn keys(
    td: &TrustDomain,
    root: &[u8; 32],
    set: Option<&v1::KeySet>,
    root_der: &[u8],
) -> Result<KeySet, Refusal> {
    let found = fingerprint(root_der);
    if found != *root {
        let expected = format!("the root {} of {td}", hex::encode(root));
        return Err(Refusal::new(Code::FingerprintMismatch, expected, hex::encode(found)));
    }
    let set = set.cloned().unwrap_or_default();
    KeySet::verify(td, root_der, &set.statement, &set.signature)
}

pub(super) async fn head_at(cell: &Cell, address: SocketAddr) -> Result<v1::AuditHeadResponse, Refusal> {
    let head = ask_at!(cell, address, Audit.audit_head(v1::AuditHeadRequest {}))?;
    signed(&cell.context().trust_domain, &cell.context().fingerprint, &head)?;
    Ok(head)
}

/// All that one replica holds, under its head.
struct Whole {
    replica: u64,
    answer: v1::AuditHeadResponse,
    head: Note,
    /// Of the records as they are.
    hashes: Vec<Hash>,
    /// As the replica says that they were.
    said: Vec<Hash>,
    /// The first record that is none.
    unreadable: Option<(u64, Refusal)>,
}

async fn whole_of(cell: &Cell, address: SocketAddr) -> Result<Whole, Refusal> {
    let answer = head_at(cell, address).await?;
    let head = Note::parse(&answer.checkpoint)?;
    let size = head.checkpoint.size;
    let epoch = head.checkpoint.origin.rsplit('/').next().and_then(|epoch| epoch.parse().ok()).unwrap_or(0);
    let mut whole = Whole { replica: answer.replica, answer, head, hashes: vec![], said: vec![], unreadable: None };
    let mut last_index = 0;
    while (whole.hashes.len() as u64) < size {
        let from = whole.hashes.len() as u64;
        let request = v1::ReadAuditRequest { from, to: size.min(from + AT_ONCE), size: 0, epoch };
        let read = ask_at!(cell, address, Audit.read_audit(request))?;
        if read.records.is_empty() {
            if whole.answer.have < size {
                let found = format!("{from}: the others are on their way");
                return Err(Refusal::new(Code::Unavailable, format!("{size} records"), found));
            }
            break;
        }
        for record in &read.records {
            let n = whole.hashes.len() as u64;
            whole.hashes.push(leaf_hash(record));
            match Record::decode(record) {
                Ok(record) if record.index >= last_index => last_index = record.index,
                Ok(record) => {
                    let expected = format!("a record of index {last_index} or later");
                    let bad = Refusal::new(Code::AuditMismatch, expected, record.index.to_string());
                    whole.unreadable.get_or_insert((n, bad));
                }
                Err(refusal) => drop(whole.unreadable.get_or_insert((n, refusal))),
            }
        }
        whole.said.extend(read.leaf_hashes.chunks_exact(32).filter_map(|hash| Hash::try_from(hash).ok()));
    }
    Ok(whole)
}

fn root(hashes: &[Hash], size: u64) -> Option<Hash> {
    let mut frontier = Frontier::default();
    hashes.get(..usize::try_from(size).ok()?)?.iter().for_each(|hash| frontier.push(*hash));
    Some(frontier.root())
}

impl Whole {
    /// What is wrong with it: which record, as far as that can be told.
    fn fault(&self, other: Option<&Whole>) -> Option<String> {
        let Checkpoint { size, root: agreed, .. } = self.head.checkpoint;
        if root(&self.hashes, size) == Some(agreed) {
            return self.unreadable.as_ref().map(|(n, refusal)| format!("record {n}: {refusal}"));
        }
        // Which hashes the head is over: those that the replica kept, or another replica's.
        let right = if root(&self.said, size) == Some(agreed) {
            Some(&self.said)
        } else {
            other.map(|other| &other.hashes).filter(|hashes| root(hashes, size.min(hashes.len() as u64)).is_some())
        };
        let Some(right) = right else {
            return Some(format!("its {} records make another tree than the cell signed", self.hashes.len()));
        };
        let differs = right.iter().zip(&self.hashes).position(|(right, found)| right != found);
        let Some(n) = differs else { return Some(format!("records from {} on are missing", self.hashes.len())) };
        // What follows a dropped record stands in its place.
        let dropped = self.hashes.get(n).is_some_and(|found| right.get(n + 1) == Some(found));
        Some(format!("record {n} was {}", if dropped { "dropped" } else { "altered" }))
    }

    /// Pinned peers that cosigned a head of this very log: how many records, and when.
    fn witnessed(&self, pinned: &[(TrustDomain, [u8; 32])]) -> Result<Vec<(TrustDomain, u64, Stamp)>, Refusal> {
        let mut all = Vec::new();
        for cosigned in &self.answer.cosigned {
            let Some((td, root_pinned)) = pinned.iter().find(|(td, _)| td.as_str() == cosigned.trust_domain) else {
                continue;
            };
            let note = Note::parse(&cosigned.note)?;
            let Checkpoint { origin, size, root: cosigned_root } = &note.checkpoint;
            let keys = keys(td, root_pinned, cosigned.key_set.as_ref(), &cosigned.root_der)?;
            let Some(at) = keys.cosigned(&note) else { continue };
            if *origin != self.head.checkpoint.origin || root(&self.hashes, *size) != Some(*cosigned_root) {
                let expected = format!("the log that {td} cosigned at {size} records");
                return Err(Refusal::new(Code::AuditMismatch, expected, "another one: a split view"));
            }
            all.push((td.clone(), *size, at));
        }
        Ok(all)
    }
}

/// Compares with the head that was verified last, and puts this one in its place.
fn remember(file: &Path, whole: &Whole) -> Result<String, Refusal> {
    let now = &whole.head.checkpoint;
    let said = if file.exists() {
        let was = Note::parse(&read_bounded(file, NOTE_BYTES_MAX)?)?.checkpoint;
        if was.origin != now.origin {
            let expected = format!("the log {}", was.origin);
            let found =
                format!("{}: another incarnation of the cell (ambit raft status); keep the old file apart", now.origin);
            return Err(Refusal::new(Code::AuditMismatch, expected, found));
        }
        if root(&whole.hashes, was.size) != Some(was.root) {
            let expected = format!("a log that begins with the {} records verified last", was.size);
            return Err(Refusal::new(Code::AuditMismatch, expected, format!("{} others", now.size)));
        }
        format!("grew from the {} records verified last", was.size)
    } else {
        "nothing was remembered: remembered from here on".to_owned()
    };
    std::fs::write(file, whole.head.text()).map_err(|e| file_refusal(file, &e))?;
    Ok(said)
}
