//! Asking a cell to seal a report.

use super::report::{Report, Seal};
use crate::ask;
use crate::cell::{Cell, request_id};
use ambit_model::{Code, Refusal};
use ambit_proto::v1;

/// The cell commits the report's digest and signs it.
pub async fn seal(cell: &Cell, report: &Report) -> Result<Seal, Refusal> {
    let request = v1::SealReportRequest {
        request_id: request_id()?,
        drill: report.drill.clone(),
        report_sha256: report.sha256()?.to_vec(),
    };
    let reply = ask!(cell, Drill.seal_report(request))?;
    let keys = reply.key_set.ok_or_else(|| Refusal::new(Code::Internal, "a key set with the seal", "none"))?;
    Ok(Seal {
        statement: hex::encode(reply.statement),
        signature: hex::encode(reply.signature),
        key_set_statement: hex::encode(keys.statement),
        key_set_signature: hex::encode(keys.signature),
        root: hex::encode(reply.root_der),
        trust_domain: cell.context().trust_domain.clone(),
    })
}
