//! `ambit attest policy learn`: a policy from the files of one machine.

use super::{nonce, now, read, read_folder};
use crate::args::LearnPolicy;
use crate::exit::{Exit, file_refusal, refusal_text};
use crate::output::Answer;
use ambit_model::Refusal;
use ambit_policy::appraisal::{lint, to_yaml_with};
use ambit_verify::EkClass;
use ambit_verify::appraisal::{Source, learn};
use ambit_verify::folder::{Ask, roots_of_pem};
use std::collections::BTreeSet;
use std::path::Path;

/// Prints the policy on standard output; what it could not check, and its warnings, on standard error.
pub(super) fn learn_from(from: &Path, options: &LearnPolicy) -> Result<Answer, Refusal> {
    let folder = read_folder(from)?;
    let class = options.class.as_deref().and_then(EkClass::from_text);
    let endorsements = match &options.roots {
        Some(file) => Some(roots_of_pem(&read(file)?, class.unwrap_or(EkClass::Lab))?),
        None => None,
    };
    let ask = Ask {
        nonce: options.nonce.as_deref().map(nonce).transpose()?,
        endorsements: endorsements.as_ref(),
        class,
        now: now(),
        reference: None,
    };
    let judged = match folder.judge(&ask) {
        Ok(judged) => judged,
        // Nothing is learnt from evidence that is refused.
        Err(denial) => return Ok(Answer::ok("").note(refusal_text(&denial.refusal)).ending(Exit::Denied)),
    };
    let learnt = learn(&Source {
        name: options.name.parse()?,
        clusters: options.clusters.iter().map(|c| c.parse()).collect::<Result<BTreeSet<_>, _>>()?,
        class,
        bank: judged.checked.bank,
        pcrs: &judged.pcrs,
        boot: &judged.boot,
        cmdline: folder.cmdline(),
        ima: &judged.files,
        ima_form: judged.ima.form,
        separate_list: options.ima_list.is_some(),
    });
    let mut answer = Answer::ok(to_yaml_with(&learnt.policy, &learnt.comments));
    match (&learnt.allow_list, &options.ima_list) {
        (Some(text), Some(file)) => std::fs::write(file, text).map_err(|e| file_refusal(file, &e))?,
        (Some(_), None) => {
            let expected = "--ima-list OUT: too many files were measured to write them into the policy";
            return Err(Refusal::new(ambit_model::Code::BadRequest, expected, "none"));
        }
        (None, _) => {}
    }
    for warning in &learnt.warnings {
        answer = answer.note(format!("warning: {warning}"));
    }
    if !judged.checked.quoted {
        answer = answer.note("warning: no quote in the folder: nothing proves what this policy was learnt from");
    }
    if class.is_none() {
        answer = answer.note("note: endorsement: hardware, as nobody said what vouches for this TPM (--class)");
    }
    Ok(lint(&learnt.policy).into_iter().fold(answer, |answer, warning| answer.note(format!("warning: {warning}"))))
}
