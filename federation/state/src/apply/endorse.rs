//! The endorsement store: what makes a genuine TPM one of ours, and what puts it out again.

use super::{At, attest, cell_row, seal};
use crate::command::{Admission, Reply};
use crate::objects::{DenialRow, EkDenyRow, EkFacts, NodeState};
use crate::sealing::REPLICAS;
use crate::state::State;
use ambit_model::{ClusterId, Code, NodeId, ObjectName, Refusal, Revision};
use sha2::{Digest as _, Sha256};

/// EK roots of one cluster: every TPM maker there is, several times over.
const ROOTS_MAX: usize = 256;
/// Rules of the deny-list: each is matched at every enrolment.
const DENY_RULES_MAX: usize = 1_000;

pub(super) fn allow(s: &mut State, at: At, cluster: &ClusterId, nodes: &[NodeId]) -> Result<Reply, Refusal> {
    known(s, cluster)?;
    for node in nodes {
        s.allowed_eks.put(&mut s.journal, (cluster.clone(), *node), true);
    }
    changed(s, at);
    Ok(Reply::Done)
}

/// Nodes that are here by the allow-list are out with it: what made their EK expected is gone.
pub(super) fn disallow(s: &mut State, at: At, cluster: &ClusterId, nodes: &[NodeId]) -> Result<Reply, Refusal> {
    known(s, cluster)?;
    for node in nodes {
        s.allowed_eks.remove(&mut s.journal, &(cluster.clone(), *node));
    }
    let gone = |id: &NodeId, in_cluster: &ClusterId, ek: &EkFacts| {
        in_cluster == cluster && ek.by_allow_list && nodes.contains(id)
    };
    put_out(s, at, Code::EkNotExpected, "an EK on the allow-list", gone)?;
    if cluster.as_str() == REPLICAS {
        seal::put_out(s, |ek, _| nodes.contains(ek));
    }
    changed(s, at);
    Ok(Reply::Done)
}

pub(super) fn put_roots(
    s: &mut State,
    at: At,
    cluster: &ClusterId,
    add: &[(Vec<u8>, String)],
    remove: &[[u8; 32]],
) -> Result<Reply, Refusal> {
    let mut row = known(s, cluster)?;
    let digest = |der: &Vec<u8>| -> [u8; 32] { Sha256::digest(der).into() };
    if let Some(unknown) = remove.iter().find(|r| !row.ek_roots.iter().any(|(der, _)| digest(der) == **r)) {
        return Err(Refusal::new(Code::NotFound, "an EK root of this cluster", hex::encode(unknown)));
    }
    row.ek_roots.retain(|(der, _)| !remove.contains(&digest(der)));
    for (der, class) in add {
        // Given again with another class, the new class counts.
        row.ek_roots.retain(|(known, _)| known != der);
        row.ek_roots.push((der.clone(), class.clone()));
    }
    if row.ek_roots.len() > ROOTS_MAX {
        let found = row.ek_roots.len().to_string();
        return Err(Refusal::new(Code::BadRequest, format!("at most {ROOTS_MAX} EK roots"), found));
    }
    s.clusters.put(&mut s.journal, cluster.clone(), row);
    let gone = |_: &NodeId, in_cluster: &ClusterId, ek: &EkFacts| {
        in_cluster == cluster && ek.root_sha256.is_some_and(|root| remove.contains(&root))
    };
    put_out(s, at, Code::EkChainUntrusted, "an EK under a root of the cluster", gone)?;
    if cluster.as_str() == REPLICAS {
        seal::put_out(s, |_, ek| ek.root_sha256.is_some_and(|root| remove.contains(&root)));
    }
    changed(s, at);
    Ok(Reply::Done)
}

pub(super) fn put_denials(
    s: &mut State,
    at: At,
    add: &[(ObjectName, EkDenyRow)],
    remove: &[ObjectName],
) -> Result<Reply, Refusal> {
    if let Some(unknown) = remove.iter().find(|name| !s.ek_denials.contains(name)) {
        return Err(Refusal::new(Code::NotFound, "a rule of the deny-list", unknown.as_str()));
    }
    if s.ek_denials.len() + add.len() > DENY_RULES_MAX {
        return Err(Refusal::new(Code::Busy, format!("at most {DENY_RULES_MAX} rules"), "more"));
    }
    for name in remove {
        s.ek_denials.remove(&mut s.journal, name);
    }
    for (name, row) in add {
        s.ek_denials.put(&mut s.journal, name.clone(), row.clone());
    }
    let gone = |_: &NodeId, _: &ClusterId, ek: &EkFacts| add.iter().any(|(_, rule)| rule.denies(ek));
    put_out(s, at, Code::EkDenied, "a TPM that no rule denies", gone)?;
    seal::put_out(s, |_, ek| add.iter().any(|(_, rule)| rule.denies(ek)));
    changed(s, at);
    Ok(Reply::Done)
}

fn known(s: &State, cluster: &ClusterId) -> Result<crate::objects::ClusterRow, Refusal> {
    let row = s.clusters.get(cluster).cloned();
    row.ok_or_else(|| Refusal::new(Code::NotFound, "a cluster of this cell", cluster.as_str()))
}

/// Admitted nodes for which `gone` holds are untrusted from here on.
fn put_out(
    s: &mut State,
    at: At,
    code: Code,
    expected: &str,
    gone: impl Fn(&NodeId, &ClusterId, &EkFacts) -> bool,
) -> Result<(), Refusal> {
    let out: Vec<NodeId> = s
        .nodes()
        .filter(|(id, n)| n.state == NodeState::Admitted && gone(id, &n.cluster, &n.ek))
        .map(|(id, _)| *id)
        .collect();
    for node in out {
        let row = DenialRow {
            stamp: at.stamp,
            node,
            code: code.to_string(),
            diverged: "the cluster's endorsements".into(),
            expected: expected.to_owned(),
            found: "the endorsements changed".into(),
        };
        attest::lose(s, at, &row, code)?;
    }
    Ok(())
}

/// Endorsements changed since the EK was judged: whether what made it one of ours is still so.
pub(super) fn stands_still(s: &State, a: &Admission) -> Result<(), Refusal> {
    let stale = |expected: &str, found: String| Err(Refusal::new(Code::StaleAppraisal, expected, found));
    let row = known(s, &a.cluster)?;
    match a.ek.root_sha256 {
        Some(root) => {
            let same = |(der, class): &(Vec<u8>, String)| {
                *class == a.ek.class && <[u8; 32]>::from(Sha256::digest(der)) == root
            };
            if !row.ek_roots.iter().any(same) {
                return stale("the EK root that it was judged by", "none of this class any more".to_owned());
            }
        }
        None if !s.ek_allowed(&a.cluster, &a.node) => {
            return stale("an EK on the allow-list, or its certificate", "neither".to_owned());
        }
        None => {}
    }
    match s.ek_denials().find(|(_, rule)| rule.denies(&a.ek)) {
        Some((name, _)) => stale("a TPM that no rule denies", name.to_string()),
        None => Ok(()),
    }
}

/// Admissions under way are judged again: they name the revision that they were reached under.
pub(super) fn changed(s: &mut State, at: At) {
    if let Ok(mut row) = cell_row(s) {
        row.endorsement_revision = Revision(at.index.0);
        s.cell.put(&mut s.journal, 0, row);
    }
}
