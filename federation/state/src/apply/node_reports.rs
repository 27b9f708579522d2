//! What nodes say of themselves, many at once: nothing that one of them says fails what another does.

use super::{At, node_address, objects};
use crate::command::{NodeReport, Reply, Reported};
use crate::state::State;
use ambit_model::{Code, Refusal};

/// Reports in one entry; a batch is what arrived while the last one was committed.
pub const NODE_REPORTS_MAX: usize = 4_096;

/// Each with its own outcome, as if it had come alone.
pub(super) fn take(s: &mut State, at: At, reports: &[NodeReport]) -> Result<Reply, Refusal> {
    if reports.len() > NODE_REPORTS_MAX {
        let expected = format!("at most {NODE_REPORTS_MAX} reports");
        return Err(Refusal::new(Code::BadRequest, expected, reports.len().to_string()));
    }
    Ok(Reply::Reports(reports.iter().map(|report| one(s, at, report)).collect()))
}

fn one(s: &mut State, at: At, report: &NodeReport) -> Reported {
    match report {
        NodeReport::Address(node, generation, address) => {
            node_address::register(s, at, node, *generation, *address).map(|()| Vec::new())
        }
        NodeReport::Endpoints(node, endpoints) => objects::report_endpoints(s, at, node, endpoints),
    }
}
