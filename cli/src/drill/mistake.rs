//! A policy that denies, as somebody might apply by mistake: the one fault that a cell injects. It carries its own end, so
//! every kernel opens again when the lease is over by the cell's time, whatever becomes of the drill.

use super::spec::Denial;
use crate::ask;
use crate::cell::{Cell, request_id};
use crate::duration::Millis;
use crate::when::{now_ms, utc};
use ambit_model::{Code, Refusal};
use ambit_proto::v1;

/// The document, before it is applied.
pub(super) struct Mistake {
    name: String,
    yaml: String,
}

/// The document, as it lies in a cell.
pub(super) struct Applied {
    cell: Cell,
    name: String,
}

impl Mistake {
    /// Of this run of a drill; it ends with the lease.
    pub(super) fn new(denial: &Denial, run: &str, lease: Millis) -> Mistake {
        let name = format!("drill-{run}");
        let ends = utc(now_ms().saturating_add(lease.0));
        let spec = format!("target: \"{}\", action: deny, from: [\"{}\"], expires: {ends}", denial.target, denial.from);
        let yaml = format!("kind: Policy\nmetadata: {{name: {name}}}\nspec: {{{spec}}}\n");
        Mistake { name, yaml }
    }
    /// The policy's name.
    pub(super) fn name(&self) -> &str {
        &self.name
    }
    /// What takes it back.
    pub(super) fn applied(&self, cell: &Cell) -> Applied {
        Applied { cell: cell.clone(), name: self.name.clone() }
    }
    /// Applies it, past any limit of flips: to be wrong is its purpose.
    pub(super) async fn apply(&self, cell: &Cell) -> Result<(), Refusal> {
        let request =
            v1::ApplyRequest { request_id: request_id()?, yaml: self.yaml.clone(), over: None, unlimited: true };
        ask!(cell, PolicyRegistry.apply(request)).map(drop)
    }
}

impl Applied {
    /// The policy's name.
    pub(super) fn name(&self) -> &str {
        &self.name
    }
    /// Deletes it. That it is gone already is no error.
    pub(super) async fn revert(&self) -> Result<(), Refusal> {
        let (kind, name) = ("Policy".to_owned(), self.name.clone());
        let request = v1::DeletePolicyRequest { request_id: request_id()?, kind, name, over: None, unlimited: true };
        match ask!(self.cell, PolicyRegistry.delete(request)) {
            Err(refusal) if refusal.code != Code::NotFound => Err(refusal),
            _ => Ok(()),
        }
    }
}
