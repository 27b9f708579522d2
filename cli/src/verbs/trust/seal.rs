//! `ambit trust seal`, `shares`, `holder-key` and `open-share`: the root's key in TPMs, and in the hands of several people.

use super::super::Session;
use super::super::approver::{Outcome, approved, or_proposal};
use crate::args::{OpenShare, Shares};
use crate::ask;
use crate::cell::request_id;
use crate::context::{fingerprint, read_bounded};
use crate::output::{Answer, Form, pretty};
use ambit_identity::RootShare;
use ambit_identity::wrap::{Purpose, WrapKey};
use ambit_model::act::ShareHolder;
use ambit_model::{Act, Code, Refusal};
use ambit_proto::v1;
use serde_json::json;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use zeroize::Zeroizing;

/// A key or a share.
const FILE_BYTES_MAX: u64 = 16 * 1024;

/// `ambit trust seal`.
pub(super) async fn seal(session: &Session, dry_run: bool) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let reply = ask!(cell, LocalAuthority.seal_root(v1::SealRootRequest { request_id: request_id()?, dry_run }))?;
    let text = match (session.form, reply.lacks.is_empty()) {
        (Form::Json, _) => pretty(&json!({"done": !dry_run, "lacks": reply.lacks, "root_form": reply.root_form})),
        (Form::Table, true) if dry_run => "it would be done: nothing lacks".to_owned(),
        (Form::Table, true) => format!("the root is {}", reply.root_form),
        (Form::Table, false) => reply.lacks.join("\n"),
    };
    Ok(Answer::ok(text).note(banner))
}

/// `ambit trust shares`.
pub(super) async fn shares(session: &Session, options: Shares) -> Result<Answer, Refusal> {
    let (cell, banner) = session.cell_to_change()?;
    let root = match &options.root {
        Some(root) => fingerprint(root)?,
        None => fingerprint(&ask!(cell, Membership.status(v1::StatusRequest {}))?.fingerprint)?,
    };
    let holders: Vec<ShareHolder> = options.holders.iter().map(|holder| holder.parse()).collect::<Result<_, _>>()?;
    let path = |holder: &str| options.out.join(format!("{holder}.share"));
    // Before the cell is asked: what it did then could not be written down.
    std::fs::create_dir_all(&options.out).map_err(|e| file_refusal(&options.out, &e))?;
    for holder in &holders {
        free(&path(holder.name.as_str()))?;
    }
    let act = Act::ShareRoot { root, threshold: options.threshold, holders: holders.clone() };
    let request = v1::ShareRootRequest {
        request_id: request_id()?,
        root: hex::encode(root),
        threshold: options.threshold.into(),
        holders: holders.into_iter().map(|h| v1::ShareHolder { name: h.name.to_string(), key: h.key }).collect(),
        approved: approved(&cell, &act, &options.approvals.files)?,
    };
    let done = ask!(cell, LocalAuthority.share_root(request));
    let reply = match or_proposal(&cell, act, &options.approvals, done).await? {
        Outcome::Done(reply) => reply,
        Outcome::Proposed(answer) => return Ok(answer.note(banner)),
    };
    let mut lines = Vec::new();
    for share in &reply.shares {
        let path = path(&share.holder);
        write_new(&path, hex::encode(&share.wrapped).as_bytes())?;
        lines.push(path.display().to_string());
    }
    let text = match session.form {
        Form::Table => lines.join("\n"),
        Form::Json => pretty(&json!({"root": reply.root, "threshold": options.threshold, "shares": lines})),
    };
    let hint =
        "give each to its holder, who tries it once: ambit trust open-share; older shares of this root still open it";
    Ok(Answer::ok(text).note(hint).note(banner))
}

/// `ambit trust holder-key`.
pub(super) fn holder_key(out: &Path) -> Result<Answer, Refusal> {
    let key = WrapKey::generate()?;
    write_new(out, Zeroizing::new(hex::encode(&*key.der()?)).as_bytes())?;
    let hint = "hand this out; keep the file where only you can read it, and on no machine of the cell";
    Ok(Answer::ok(hex::encode(key.public()?)).note(hint))
}

/// `ambit trust open-share`.
pub(super) fn open_share(options: &OpenShare) -> Result<Answer, Refusal> {
    let mode = std::fs::metadata(&options.key).map_err(|e| file_refusal(&options.key, &e))?.mode();
    if mode & 0o077 != 0 {
        let expected = format!("a key that only its owner may read: chmod 600 {}", options.key.display());
        return Err(Refusal::new(Code::BadRequest, expected, format!("mode {:o}", mode & 0o7777)));
    }
    let other = |found: &str| Refusal::new(Code::ShareInvalid, "a share that was encrypted to this key", found);
    let der = hex::decode(Zeroizing::new(read_bounded(&options.key, FILE_BYTES_MAX)?).as_bytes()).map(Zeroizing::new);
    let der = der.map_err(|_| Refusal::new(Code::BadRequest, "a key of ambit trust holder-key", "another file"))?;
    let key = WrapKey::from_der(&der)?;
    let wrapped =
        hex::decode(read_bounded(&options.share, FILE_BYTES_MAX)?).map_err(|_| other("no hexadecimal digits"))?;
    let text = key.unwrap_for(Purpose::RootShare, &wrapped).map_err(|_| other("another"))?;
    let share = RootShare::parse(&text)?;
    write_new(&options.out, &text)?;
    let set = share.set();
    Ok(Answer::ok(format!(
        "share {} of {} of root {} of {}: {} open it together",
        share.index(),
        set.of,
        hex::encode(set.root),
        set.trust_domain,
        set.threshold
    )))
}

/// Whether a file can be made there: it is tried, and removed again.
fn free(path: &Path) -> Result<(), Refusal> {
    write_new(path, b"")?;
    std::fs::remove_file(path).map_err(|e| file_refusal(path, &e))
}

/// Never over another file: it may be the only one of its kind.
fn write_new(path: &Path, bytes: &[u8]) -> Result<(), Refusal> {
    let opened = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let written = opened.and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()));
    written.map_err(|e| file_refusal(path, &e))
}

fn file_refusal(path: &Path, e: &std::io::Error) -> Refusal {
    Refusal::new(Code::BadRequest, format!("a usable file {}", path.display()), e.to_string())
}
