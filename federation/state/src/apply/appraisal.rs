//! Appraisal policies: kept by name and version. What they mean is the verifier's; here only who is governed by what.

use super::{At, cell_row};
use crate::command::Reply;
use crate::objects::{AppraisalPolicyRow, PolicyVersion};
use crate::state::State;
use ambit_model::{Code, ObjectName, Refusal, Revision};

/// Policies of one cell; each is compiled and held by every replica.
const POLICIES_MAX: usize = 256;
/// A policy's canonical form; IMA lists are objects of their own.
const CANONICAL_BYTES_MAX: usize = 512 * 1024;

pub(super) fn put(
    s: &mut State,
    at: At,
    name: &ObjectName,
    content: &PolicyVersion,
    staged: bool,
    by: &str,
) -> Result<Reply, Refusal> {
    if content.canonical.len() > CANONICAL_BYTES_MAX {
        let found = format!("{} bytes", content.canonical.len());
        return Err(Refusal::new(Code::BadRequest, format!("at most {CANONICAL_BYTES_MAX} bytes"), found));
    }
    if let Some(unknown) = content.clusters.iter().find(|c| !s.clusters.contains(c)) {
        return Err(Refusal::new(Code::NotFound, "a cluster of this cell", unknown.as_str()));
    }
    let before = s.appraisal_policies.get(name).cloned();
    if before.is_none() && s.appraisal_policies.len() >= POLICIES_MAX {
        return Err(Refusal::new(Code::Busy, format!("at most {POLICIES_MAX} appraisal policies"), "one more"));
    }
    let same = |p: &AppraisalPolicyRow| p.current.sha256 == content.sha256 && (staged || p.previous.is_none());
    if before.as_ref().is_some_and(same) {
        return Ok(Reply::Items(Vec::new()));
    }
    let version = before.as_ref().map_or(1, |p| p.current.version + 1);
    let previous = before.filter(|_| staged).map(|p| p.current);
    let current = PolicyVersion { version, ..content.clone() };
    s.appraisal_policies.put(
        &mut s.journal,
        name.clone(),
        AppraisalPolicyRow { current, previous, written_by: by.to_owned() },
    );
    changed(s, at)?;
    Ok(Reply::Done)
}

pub(super) fn promote(s: &mut State, at: At, name: &ObjectName) -> Result<Reply, Refusal> {
    let row = known(s, name)?;
    if row.previous.is_some() {
        s.appraisal_policies.put(&mut s.journal, name.clone(), AppraisalPolicyRow { previous: None, ..row });
        changed(s, at)?;
    }
    Ok(Reply::Done)
}

pub(super) fn delete(s: &mut State, at: At, name: &ObjectName) -> Result<Reply, Refusal> {
    known(s, name)?;
    s.appraisal_policies.remove(&mut s.journal, name);
    changed(s, at)?;
    Ok(Reply::Done)
}

fn known(s: &State, name: &ObjectName) -> Result<AppraisalPolicyRow, Refusal> {
    let row = s.appraisal_policies.get(name).cloned();
    row.ok_or_else(|| Refusal::new(Code::NotFound, "an appraisal policy of this cell", name.as_str()))
}

/// Verdicts under way are judged again: they name the revision that they were reached under.
fn changed(s: &mut State, at: At) -> Result<(), Refusal> {
    let mut row = cell_row(s)?;
    row.policy_revision = Revision(at.index.0);
    s.cell.put(&mut s.journal, 0, row);
    Ok(())
}
