//! Backups on the operator's side: written whole or not at all, and checked without a cell.

use crate::cell::Cell;
use crate::client;
use crate::exit::file_refusal;
use crate::output::{Answer, Table};
use crate::verbs::Session;
use crate::when::utc;
use ambit_model::backup::{BackupCheck, BackupHeader};
use ambit_model::{Code, Refusal};
use ambit_proto::status::from_status;
use ambit_proto::v1::{self, backup_piece::Part};
use serde_json::json;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// A replica that sends nothing for so long is not waited for.
const SILENCE_MAX: Duration = Duration::from_secs(30);
const PIECE_BYTES: usize = 256 * 1024;

/// Downloads a backup from whichever replica gives one, beside its place, and moves it there once it is whole and synced.
pub(super) async fn write(session: &Session, out: &Path) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let started = Instant::now();
    if out.exists() {
        return Err(Refusal::new(Code::AlreadyExists, "a new file", out.display().to_string()));
    }
    let unfinished = out.with_added_extension("unfinished");
    let written = download(&cell, &unfinished).await;
    let (header, bytes, lists_missing) = match written {
        Ok(written) => written,
        Err(refusal) => {
            let _ = std::fs::remove_file(&unfinished);
            return Err(refusal);
        }
    };
    std::fs::rename(&unfinished, out).map_err(|e| file_refusal(out, &e))?;
    let folder = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|d| d.sync_all()).map_err(|e| file_refusal(folder, &e))?;
    let took_ms = started.elapsed().as_secs_f64() * 1000.0;
    let mut answer = Answer::ok(row(out, &header, bytes, Some(took_ms)).render_one(session.form)).note(banner);
    if lists_missing > 0 {
        answer =
            answer.note(format!("{lists_missing} allow-lists that policies name are on no replica, nor in the backup"));
    }
    Ok(answer.note("keep the root's key (identity/root.key of the replica that holds it) apart from this file"))
}

async fn download(cell: &Cell, to: &Path) -> Result<(BackupHeader, u64, u32), Refusal> {
    let mut last = None;
    for address in cell.context().addresses.clone() {
        let asked = cell
            .call_at(address, |channel| async move { client!(Membership, channel).backup(v1::BackupRequest {}).await });
        match asked.await {
            Ok(stream) => return receive(cell, stream, to).await,
            Err(refusal) if matches!(refusal.code, Code::Unavailable | Code::Busy) => last = Some(refusal),
            Err(refusal) => return Err(refusal),
        }
    }
    Err(last.unwrap_or_else(|| Refusal::new(Code::Unavailable, "a replica that answers", "none")))
}

async fn receive(
    cell: &Cell,
    mut stream: tonic::Streaming<v1::BackupPiece>,
    to: &Path,
) -> Result<(BackupHeader, u64, u32), Refusal> {
    // Nobody else reads where every workload may run.
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(to)
        .map_err(|e| file_refusal(to, &e))?;
    let (mut check, mut facts, mut bytes) = (BackupCheck::default(), v1::BackupFacts::default(), 0);
    loop {
        let silence =
            |_| Refusal::new(Code::Unavailable, "the next piece of the backup", format!("none for {SILENCE_MAX:?}"));
        let piece = tokio::time::timeout(SILENCE_MAX, stream.message()).await.map_err(silence)?;
        match piece.map_err(|s| from_status(&s))?.map(|p| p.part) {
            Some(Some(Part::Facts(said))) => facts = said,
            Some(Some(Part::Bytes(piece))) => {
                check.take(&piece)?;
                bytes += piece.len() as u64;
                file.write_all(&piece).map_err(|e| file_refusal(to, &e))?;
            }
            Some(None) => return Err(Refusal::new(Code::BackupDamaged, "facts or bytes", "neither")),
            None => break,
        }
    }
    let (header, _) = check.finish()?;
    let context = cell.context();
    of_context(&header, &context.trust_domain, &context.fingerprint)?;
    if (header.index, header.digest.as_slice()) != (facts.index, facts.digest.as_slice()) {
        let found = format!("index {}", header.index);
        return Err(Refusal::new(Code::BackupDamaged, format!("a file of index {}", facts.index), found));
    }
    file.sync_all().map_err(|e| file_refusal(to, &e))?;
    Ok((header, bytes, facts.lists_missing))
}

fn of_context(header: &BackupHeader, td: &ambit_model::TrustDomain, print: &[u8; 32]) -> Result<(), Refusal> {
    if header.trust_domain == *td && header.root_sha256 == *print {
        return Ok(());
    }
    let show =
        |td: &ambit_model::TrustDomain, print: &[u8; 32]| format!("a backup of {td}, root {}", hex::encode(print));
    Err(Refusal::new(Code::FingerprintMismatch, show(td, print), show(&header.trust_domain, &header.root_sha256)))
}

/// Checks a backup against the context, without a cell, and says how it is restored.
pub(super) fn guide(session: &Session, file: &Path) -> Result<Answer, Refusal> {
    let context = crate::context::Context::find(session.context.as_deref())?;
    let (mut check, mut piece, mut bytes) = (BackupCheck::default(), vec![0; PIECE_BYTES], 0);
    let mut opened = File::open(file).map_err(|e| file_refusal(file, &e))?;
    loop {
        let read = opened.read(&mut piece).map_err(|e| file_refusal(file, &e))?;
        match piece.get(..read) {
            Some([]) | None => break,
            Some(part) => check.take(part)?,
        }
        bytes += read as u64;
    }
    let (header, _) = check.finish()?;
    of_context(&header, &context.trust_domain, &context.fingerprint)?;
    let command = format!(
        "ambitd restore --config FILE --snapshot {} --trust-domain {} --fingerprint {} --root-key root.key --admin-out FOLDER",
        file.display(),
        header.trust_domain,
        hex::encode(header.root_sha256)
    );
    let answer = Answer::ok(row(file, &header, bytes, None).render_one(session.form));
    Ok(answer.note(format!("the file is whole. On an empty machine, with the root's key:\n  {command}")))
}

fn row(file: &Path, header: &BackupHeader, bytes: u64, took_ms: Option<f64>) -> Table {
    const COLUMNS: &[&str] =
        &["file", "trust_domain", "epoch", "index", "digest", "time", "allow_lists", "bytes", "took_ms"];
    let mut table = Table::new("backup", COLUMNS);
    table.row(vec![
        json!(file.display().to_string()),
        json!(header.trust_domain.as_str()),
        json!(header.epoch),
        json!(header.index),
        json!(hex::encode(header.digest)),
        json!(utc(header.stamp.0)),
        json!(header.lists.len()),
        json!(bytes),
        json!(took_ms.map(|ms| (ms * 10.0).round() / 10.0)),
    ]);
    table
}
