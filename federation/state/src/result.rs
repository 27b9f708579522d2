//! The present standing of a node as its attestation result may say it.

use crate::committed::{Committed, NodeResult};
use crate::state::State;
use ambit_model::{Code, NodeId, Refusal};

impl State {
    /// What is committed of the node now: the only thing that a signed attestation result is made from.
    ///
    /// # Errors
    /// [`Code::NotFound`] for a node that was never admitted here.
    pub fn node_result(&self, id: &NodeId) -> Result<Committed<NodeResult>, Refusal> {
        let never = || Refusal::new(Code::NotFound, "a node of this cell", id.to_string());
        let cell = self.cell().ok_or_else(never)?;
        let row = self.node(id).ok_or_else(never)?.clone();
        let standing = self.standing(id).ok_or_else(never)?.clone();
        let boot = self.boots.get(id).ok_or_else(never)?.clone();
        let policy = self.appraisal_policies().find(|(name, _)| **name == standing.policy.name).map(|(_, p)| p);
        let versions = policy.into_iter().flat_map(|p| std::iter::once(&p.current).chain(p.previous.as_ref()));
        let policy_sha256 = versions.filter(|v| v.version == standing.policy.version).map(|v| v.sha256).next();
        Ok(Committed::new(NodeResult {
            trust_domain: cell.trust_domain.clone(),
            node: *id,
            late: self.is_late(id),
            row,
            standing,
            boot,
            policy_sha256,
            stamp: self.stamp(),
            index: self.applied(),
        }))
    }
}
