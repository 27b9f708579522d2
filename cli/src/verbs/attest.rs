//! `ambit attest`: appraisal policies, and machines judged by them without a cell.

mod answer;
mod cell;
mod learn;

use super::Session;
use crate::args::{Appraise, Attest, AttestPolicy};
use crate::exit::{Exit, file_refusal, refusal_text};
use crate::output::{Answer, Form, Table, pretty};
use ambit_model::{AppraisalPolicy, Code, Refusal, Stamp};
use ambit_policy::appraisal::{diff, lint, parse_appraisal};
use ambit_verify::EkClass;
use ambit_verify::appraisal::{ALLOW_LIST_BYTES_MAX, AllowList, CompiledPolicy};
use ambit_verify::folder::{Ask, Folder, roots_of_pem};
use serde_json::json;
use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// Files taken from a folder: a machine has some EK certificates beside what every folder has.
const FILES_MAX: usize = 64;
/// Bytes read of one: one more than an IMA log may have.
const FILE_BYTES_MAX: u64 = ambit_verify::IMA_LOG_BYTES_MAX + 1;

pub(crate) async fn run(session: &Session, verb: Attest) -> Result<Answer, Refusal> {
    match verb {
        Attest::Appraise(appraise) => self::appraise(session.form, &appraise),
        Attest::Policy(AttestPolicy::Lint { file }) => lint_file(session.form, &file),
        Attest::Policy(AttestPolicy::Diff { old, new }) => diff_files(session.form, &old, &new),
        Attest::Policy(AttestPolicy::Learn(options)) => match (&options.from, &options.node) {
            (Some(folder), _) => learn::learn_from(folder, &options),
            (None, Some(node)) => cell::learn(session, node, &options).await,
            (None, None) => Err(Refusal::new(Code::BadRequest, "a node, or --from DIR", "neither")),
        },
        Attest::Policy(AttestPolicy::Apply { file, ima_lists, staged }) => {
            cell::apply(session, &file, &ima_lists, staged).await
        }
        Attest::Policy(AttestPolicy::List) => cell::list(session).await,
        Attest::Policy(AttestPolicy::Show { name }) => cell::show(session, name).await,
        Attest::Policy(AttestPolicy::Promote { name }) => cell::promote(session, name).await,
        Attest::Policy(AttestPolicy::Delete { name }) => cell::delete(session, name).await,
        Attest::Policy(AttestPolicy::Test { file, ima_lists, node, at }) => {
            cell::test(session, &file, &ima_lists, node.as_deref(), at.as_deref()).await
        }
        Attest::Explain { id } => super::node::explain(session, Some(&id)).await,
    }
}

fn appraise(form: Form, options: &Appraise) -> Result<Answer, Refusal> {
    let folder = read_folder(&options.folder)?;
    let reference = options.reference.as_deref().map(read_folder).transpose()?;
    let lists = read_lists(&options.ima_lists)?;
    let mut policies = Vec::new();
    for file in &options.policies {
        let policy = read_policy(file)?;
        match CompiledPolicy::compile(&policy, &mut |sha256| lists.get(sha256).cloned()) {
            Ok(compiled) => policies.push(Arc::new(compiled)),
            // Offline the list is a file that the caller did not name.
            Err(refusal) if refusal.code == Code::AllowListMissing => return Ok(without_list(&refusal)),
            Err(refusal) => return Err(refusal),
        }
    }
    let class = options.class.as_deref().and_then(EkClass::from_text);
    let endorsements = match &options.roots {
        // The class is judged only if the caller named one.
        Some(file) => Some(roots_of_pem(&read(file)?, class.unwrap_or(EkClass::Lab))?),
        None => None,
    };
    let ask = Ask {
        nonce: options.nonce.as_deref().map(nonce).transpose()?,
        endorsements: endorsements.as_ref(),
        class,
        now: now(),
        reference: reference.as_ref(),
    };
    let outcome = folder.appraise(&ask, &policies);
    Ok(answer::of(form, &outcome, options.unquoted, class))
}

fn without_list(refusal: &Refusal) -> Answer {
    let answer = Answer::ok("").note(refusal_text(refusal));
    answer.note("  offline: name the file with --ima-list FILE").ending(Exit::Usage)
}

fn lint_file(form: Form, file: &Path) -> Result<Answer, Refusal> {
    let policy = read_policy(file)?;
    // A pattern that does not compile is an error here as it is on the server; a list elsewhere is none.
    CompiledPolicy::compile(&without_lists(&policy), &mut |_| None)?;
    let mut table = Table::new("warning", &["field", "warning"]);
    for warning in lint(&policy) {
        let (field, text) = warning.split_once(": ").unwrap_or(("", &warning));
        table.row(vec![json!(field), json!(text)]);
    }
    Ok(Answer::ok(table.render(form)))
}

fn without_lists(policy: &AppraisalPolicy) -> AppraisalPolicy {
    let mut policy = policy.clone();
    if let Some(ima) = &mut policy.ima {
        ima.allow_lists.clear();
    }
    policy
}

fn diff_files(form: Form, old: &Path, new: &Path) -> Result<Answer, Refusal> {
    let changes = diff(&read_policy(old)?, &read_policy(new)?);
    let exit = if changes.is_empty() { Exit::Ok } else { Exit::Drift };
    let mut table = Table::new("difference", &["field", "removed", "added"]);
    for change in changes {
        table.row(vec![json!(change.field), json!(change.removed), json!(change.added)]);
    }
    Ok(Answer::ok(table.render(form)).ending(exit))
}

/// The files of a folder that mean something. Of one beyond the verifier's limits it reads so much as shows that it is.
fn read_folder(path: &Path) -> Result<Folder, Refusal> {
    let entries = std::fs::read_dir(path).map_err(|e| file_refusal(path, &e))?;
    let mut files = BTreeMap::new();
    for entry in entries {
        let entry = entry.map_err(|e| file_refusal(path, &e))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !Folder::means(&name) {
            continue;
        }
        let file = entry.path();
        let meta = std::fs::metadata(&file).map_err(|e| file_refusal(&file, &e))?;
        if !meta.is_file() {
            let kind = if meta.is_dir() { "a folder" } else { "a pipe, socket or device" };
            return Err(Refusal::new(Code::BadRequest, format!("a regular file {}", file.display()), kind));
        }
        if files.len() >= FILES_MAX {
            let found = path.display().to_string();
            return Err(Refusal::new(Code::BadRequest, format!("at most {FILES_MAX} files of one machine"), found));
        }
        let mut bytes = Vec::new();
        let opened = std::fs::File::open(&file).map_err(|e| file_refusal(&file, &e))?;
        opened.take(FILE_BYTES_MAX).read_to_end(&mut bytes).map_err(|e| file_refusal(&file, &e))?;
        files.insert(name, bytes);
    }
    Ok(Folder::new(files))
}

fn read_lists(files: &[PathBuf]) -> Result<BTreeMap<[u8; 32], Arc<AllowList>>, Refusal> {
    let mut lists = BTreeMap::new();
    for file in files {
        let text = read(file)?;
        if text.len() > ALLOW_LIST_BYTES_MAX {
            return Err(Refusal::new(Code::BadRequest, "an allow-list of at most 32 MiB", file.display().to_string()));
        }
        let list = AllowList::parse(&text)?;
        lists.insert(list.sha256(), Arc::new(list));
    }
    Ok(lists)
}

fn read_policy(file: &Path) -> Result<AppraisalPolicy, Refusal> {
    let text = String::from_utf8(read(file)?)
        .map_err(|_| Refusal::new(Code::AppraisalPolicyMalformed, "text in UTF-8", file.display().to_string()))?;
    parse_appraisal(&text).map_err(|mut refusal| {
        refusal.found = format!("{}: {}", file.display(), refusal.found);
        refusal
    })
}

/// A policy, list or PEM file: as much of it as the largest of them may have.
fn read(file: &Path) -> Result<Vec<u8>, Refusal> {
    let mut bytes = Vec::new();
    let opened = std::fs::File::open(file).map_err(|e| file_refusal(file, &e))?;
    let max = ALLOW_LIST_BYTES_MAX as u64;
    opened.take(max + 1).read_to_end(&mut bytes).map_err(|e| file_refusal(file, &e))?;
    if bytes.len() as u64 > max {
        let expected = format!("a file of at most {max} bytes");
        return Err(Refusal::new(Code::BadRequest, expected, file.display().to_string()));
    }
    Ok(bytes)
}

fn nonce(text: &str) -> Result<Vec<u8>, Refusal> {
    hex::decode(text).map_err(|e| Refusal::new(Code::BadRequest, "a nonce in hexadecimal digits", e.to_string()))
}

fn now() -> Stamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Stamp(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// One JSON object, or lines for people.
fn in_form(form: Form, value: &serde_json::Value, text: impl FnOnce() -> String) -> String {
    match form {
        Form::Json => pretty(value),
        Form::Table => text(),
    }
}
