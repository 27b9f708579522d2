//! What needs no cell: `ambit policy lint` and `ambit policy test`.

use crate::excerpt::pointed;
use crate::exit::Exit;
use crate::output::{Answer, Form, Table, counted};
use crate::when::now_ms;
use ambit_model::{Code, Refusal, Stamp};
use ambit_policy::{Document, Suite};
use serde_json::json;
use std::path::{Path, PathBuf};

/// The text of a file of documents.
pub(super) fn text_of(file: &Path) -> Result<String, Refusal> {
    crate::context::read_bounded(file, ambit_policy::BYTES_MAX as u64)
}

/// The documents of a file; a refusal shows its line.
pub(super) fn documents_of(file: &Path, text: &str) -> Result<Vec<Document>, Refusal> {
    ambit_policy::parse(text).map_err(|refusal| pointed(refusal, file, text))
}

/// Lines about what is hardly meant.
pub(super) fn findings(documents: &[Document]) -> Vec<String> {
    ambit_policy::lint(documents, Stamp(now_ms())).iter().map(|finding| format!("warning: {finding}")).collect()
}

/// Checks documents as the cell would, as far as nobody but the cell can tell.
pub(super) fn lint(form: Form, file: &Path) -> Result<Answer, Refusal> {
    let text = text_of(file)?;
    let documents = documents_of(file, &text)?;
    documents.iter().try_for_each(ambit_policy::check_enforceable)?;
    let mut table = Table::new("object", &["kind", "name", "trust_domains"]);
    for document in &documents {
        let domains: Vec<String> = document.trust_domains().iter().map(ToString::to_string).collect();
        table.row(vec![json!(document.kind()), json!(document.name().as_str()), json!(domains)]);
    }
    let mut answer = Answer::ok(table.render(form));
    answer.notes = findings(&documents);
    Ok(answer)
}

/// Runs the suites of a file against its own documents and those of other files.
pub(super) fn test(form: Form, file: &Path, policies: &[PathBuf]) -> Result<Answer, Refusal> {
    let text = text_of(file)?;
    let (mut documents, suites) = ambit_policy::parse_suite(&text).map_err(|refusal| pointed(refusal, file, &text))?;
    for other in policies {
        let text = text_of(other)?;
        documents.extend(documents_of(other, &text)?);
    }
    if suites.is_empty() {
        let found = format!("none in {}", file.display());
        return Err(Refusal::new(Code::BadRequest, "at least one document of kind PolicyTest", found));
    }
    judged(form, &documents, &suites)
}

fn judged(form: Form, documents: &[Document], suites: &[Suite]) -> Result<Answer, Refusal> {
    let mut table = Table::new("suite", &["name", "cases", "failed"]);
    let (mut notes, mut failed) = (Vec::new(), 0);
    for suite in suites {
        let failures = suite.run(documents, Stamp(now_ms()))?;
        table.row(vec![json!(suite.name.as_str()), json!(suite.cases.len()), json!(failures.len())]);
        failed += failures.len();
        notes.extend(failures.iter().map(|failure| format!("{}: {failure}", suite.name)));
    }
    let mut answer = Answer::ok(table.render(form));
    answer.notes = notes;
    Ok(if failed == 0 { answer } else { answer.note(counted(failed, "failure")).ending(Exit::Failed) })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SUITE: &str = "kind: Policy\nmetadata: {name: db}\nspec: {target: spiffe://west/db, action: allow, from: \
                         [spiffe://west/web], ports: [5432]}\n---\nkind: PolicyTest\nmetadata: {name: db}\nspec:\n  cases:\n  \
                         - {from: spiffe://west/web, to: spiffe://west/db, ports: [5432], expect: EXPECTED}\n";

    #[test]
    fn a_failed_case_ends_one_and_is_told() {
        for (expected, exit, notes) in [("allow", Exit::Ok, 0), ("deny", Exit::Failed, 2)] {
            let (documents, suites) = ambit_policy::parse_suite(&SUITE.replace("EXPECTED", expected)).unwrap();
            let answer = judged(Form::Table, &documents, &suites).unwrap();
            assert_eq!((answer.exit, answer.notes.len()), (exit, notes), "{answer:?}");
        }
    }
}
