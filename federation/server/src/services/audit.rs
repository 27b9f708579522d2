//! What was refused. The audit log itself is issue H's.

use super::unbuilt::unbuilt;
use crate::authorise::LeftOut;
use crate::replica::Replica;
use ambit_proto::v1;
use tonic::{Request, Response, Status};

pub(crate) struct Audit(pub(crate) Replica);

#[tonic::async_trait]
impl v1::audit_server::Audit for Audit {
    async fn watch_audit(&self, _: Request<v1::AuditUnbuilt>) -> Result<Response<v1::AuditUnbuilt>, Status> {
        unbuilt("Audit.WatchAudit (issue H)")
    }
    async fn verify_chain(&self, _: Request<v1::AuditUnbuilt>) -> Result<Response<v1::AuditUnbuilt>, Status> {
        unbuilt("Audit.VerifyChain (issue H)")
    }
    async fn list_refusals(
        &self,
        _: Request<v1::ListRefusalsRequest>,
    ) -> Result<Response<v1::ListRefusalsResponse>, Status> {
        let rows = self.0.refusals().rows().into_iter();
        let refused = rows.map(|(key, row)| v1::RefusedCall {
            caller: key.caller,
            method: key.method,
            code: key.code.to_owned(),
            count: row.count,
            first_ms: row.first_ms,
            last_ms: row.last_ms,
        });
        let (refused, replica) = (refused.collect(), self.0.id());
        let LeftOut { unlogged, forgotten } = self.0.refusals().left_out();
        Ok(Response::new(v1::ListRefusalsResponse { refused, replica, unlogged, forgotten }))
    }
}
