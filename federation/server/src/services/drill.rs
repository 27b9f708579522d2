//! Drill reports: their digest is committed, then signed with this replica's record key.

use super::unbuilt::unbuilt;
use super::{OrStatus, request_id};
use crate::authorise::actor;
use crate::replica::Replica;
use ambit_model::{Code, Refusal};
use ambit_proto::v1;
use ambit_state::Command;
use tonic::{Request, Response, Status};

const NAME_MAX: usize = 128;

pub(crate) struct Drills(pub(crate) Replica);

#[tonic::async_trait]
impl v1::drill_server::Drill for Drills {
    async fn seal_report(
        &self,
        request: Request<v1::SealReportRequest>,
    ) -> Result<Response<v1::SealReportResponse>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let sha256: [u8; 32] = m
            .report_sha256
            .as_slice()
            .try_into()
            .map_err(|_| Refusal::new(Code::BadRequest, "a SHA-256 of 32 bytes", m.report_sha256.len().to_string()))
            .or_status()?;
        if m.drill.is_empty() || m.drill.len() > NAME_MAX {
            return Err(Refusal::new(Code::BadRequest, format!("a drill name of 1-{NAME_MAX} bytes"), m.drill))
                .or_status();
        }
        let command = Command::SealReport(m.drill, sha256);
        let applied = self.0.propose(actor.client, request_id(&m.request_id)?, command).await.or_status()?;
        let report = applied.into_report().or_status()?;
        let (statement, signature) = self.0.record().sign_report(self.0.trust_domain(), &report).or_status()?;
        let (keys, root_der) = self.0.local(|s| {
            let keys = s.key_set().cloned().unwrap_or_default();
            (keys, s.cell().map(|c| c.root_der.clone()).unwrap_or_default())
        });
        let key_set = Some(v1::KeySet { statement: keys.statement, signature: keys.signature });
        Ok(Response::new(v1::SealReportResponse { statement, signature, key_index: 0, key_set, root_der }))
    }

    async fn list_reports(
        &self,
        _: Request<v1::ListReportsRequest>,
    ) -> Result<Response<v1::ListReportsResponse>, Status> {
        let reports = self
            .0
            .read(|s| {
                s.reports()
                    .map(|r| v1::SealedReport {
                        drill: r.drill.clone(),
                        report_sha256: hex::encode(r.sha256),
                        stamp_ms: r.stamp.0,
                        index: r.index.0,
                    })
                    .collect()
            })
            .await
            .or_status()?;
        Ok(Response::new(v1::ListReportsResponse { reports }))
    }

    async fn run_drill(&self, _: Request<v1::DrillUnbuilt>) -> Result<Response<v1::DrillUnbuilt>, Status> {
        unbuilt("Drill.RunDrill: run drills with `ambit drill run` (issue F)")
    }
}
