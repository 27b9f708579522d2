//! Appraisal policies as this replica judges by them: compiled once per change, shared by all judgements.

use super::Replica;
use ambit_model::appraisal::AppraisalPolicy;
use ambit_model::{ClusterId, Code, Refusal, Revision};
use ambit_state::objects::{PolicyRef, PolicyVersion};
use ambit_verify::appraisal::{AllowList, CompiledPolicy};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// What governs one cluster's nodes at one revision of the policies.
pub struct Governing {
    /// The revision of the policies.
    pub revision: Revision,
    /// Versions that may accept a node: what is wanted first, then what is accepted too while a roll-out lasts.
    pub versions: Vec<(PolicyRef, bool)>,
    /// The same, compiled, in the same order.
    pub compiled: Vec<Arc<CompiledPolicy>>,
}

impl Governing {
    /// Whether this version may accept a node.
    pub fn accepts(&self, policy: &PolicyRef) -> bool {
        self.versions.iter().any(|(known, _)| known == policy)
    }
    /// Whether this version is what is wanted.
    pub fn is_current(&self, policy: &PolicyRef) -> bool {
        self.versions.iter().any(|(known, current)| known == policy && *current)
    }
    /// Where this version stands.
    pub fn index_of(&self, policy: &PolicyRef) -> Option<usize> {
        self.versions.iter().position(|(known, _)| known == policy)
    }
}

/// Compiled policies and allow-lists, by what they are made from.
#[derive(Default)]
pub struct Policies {
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    governing: BTreeMap<ClusterId, Arc<Governing>>,
    compiled: BTreeMap<([u8; 32], u64), Arc<CompiledPolicy>>,
    lists: BTreeMap<[u8; 32], Arc<AllowList>>,
}

impl Replica {
    /// What governs this cluster's nodes now. `appraisal_policy_missing` where nothing does: default deny.
    pub fn governing(&self, cluster: &ClusterId) -> Result<Arc<Governing>, Refusal> {
        let (revision, rows) = self.local(|s| {
            let revision = s.cell().map(|c| c.policy_revision).unwrap_or_default();
            let known = self.held().governing.get(cluster).filter(|g| g.revision == revision).cloned();
            match known {
                Some(known) => (revision, Err(known)),
                None => {
                    let rows: Vec<_> = s.appraisal_policies().map(|(n, r)| (n.clone(), r.clone())).collect();
                    (revision, Ok(rows))
                }
            }
        });
        let rows = match rows {
            Err(known) => return Ok(known),
            Ok(rows) => rows,
        };
        let of_cluster = |v: &PolicyVersion| v.clusters.contains(cluster);
        let current = rows.iter().map(|(name, row)| (name, &row.current, true));
        let previous = rows.iter().filter_map(|(name, row)| Some((name, row.previous.as_ref()?, false)));
        let (mut versions, mut compiled) = (Vec::new(), Vec::new());
        for (name, version, wanted) in current.chain(previous).filter(|(_, v, _)| of_cluster(v)) {
            versions.push((PolicyRef { name: name.clone(), version: version.version }, wanted));
            compiled.push(self.compiled(version)?);
        }
        if versions.is_empty() {
            return Err(Refusal::new(
                Code::AppraisalPolicyMissing,
                format!("an appraisal policy that names cluster {cluster}"),
                "none",
            ));
        }
        let governing = Arc::new(Governing { revision, versions, compiled });
        self.held().governing.insert(cluster.clone(), governing.clone());
        Ok(governing)
    }

    /// The policy of this version, compiled.
    fn compiled(&self, version: &PolicyVersion) -> Result<Arc<CompiledPolicy>, Refusal> {
        if let Some(known) = self.held().compiled.get(&(version.sha256, version.version)).cloned() {
            return Ok(known);
        }
        let policy = AppraisalPolicy::decode(&version.canonical)?;
        let compiled = Arc::new(self.compile(&policy)?.with_version(version.version));
        let mut held = self.held();
        // Policies come and go; what no version names any more is not worth holding on to.
        if held.compiled.len() > 512 {
            held.compiled.clear();
        }
        held.compiled.insert((version.sha256, version.version), compiled.clone());
        Ok(compiled)
    }

    /// Compiles a policy with the allow-lists that are here. `allow_list_missing` where one is not.
    pub fn compile(&self, policy: &AppraisalPolicy) -> Result<CompiledPolicy, Refusal> {
        CompiledPolicy::compile(policy, &mut |sha256| self.list(sha256))
    }

    /// An allow-list, parsed once and shared by all policies that name it.
    fn list(&self, sha256: &[u8; 32]) -> Option<Arc<AllowList>> {
        if let Some(known) = self.held().lists.get(sha256).cloned() {
            return Some(known);
        }
        let list = Arc::new(AllowList::parse(&self.blobs().get(sha256)?).ok()?);
        let mut held = self.held();
        if held.lists.len() > 64 {
            held.lists.clear();
        }
        held.lists.insert(*sha256, list.clone());
        Some(list)
    }

    /// Fetches the allow-lists that policies name and this replica lacks: it joined later, or was down.
    pub async fn fetch_lists(&self) {
        let named: Vec<[u8; 32]> = self.local(|s| {
            let versions = s.appraisal_policies().flat_map(|(_, r)| [Some(&r.current), r.previous.as_ref()]);
            let policies = versions.flatten().filter_map(|v| AppraisalPolicy::decode(&v.canonical).ok());
            policies.flat_map(|p| lists_of(&p)).collect()
        });
        for sha256 in named {
            if self.list(&sha256).is_none()
                && let Err(refusal) = self.find_blob(&sha256).await
            {
                tracing::warn!(list = hex::encode(sha256), %refusal, "allow-list not here: its policies judge nobody");
            }
        }
    }

    fn held(&self) -> std::sync::MutexGuard<'_, Held> {
        self.inner.policies.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// SHA-256 of the allow-lists that a policy names.
pub fn lists_of(policy: &AppraisalPolicy) -> Vec<[u8; 32]> {
    policy.ima.iter().flat_map(|rules| rules.allow_lists.iter().copied()).collect()
}
