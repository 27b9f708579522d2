//! Methods of later issues: they are authorised like the others and answer `unimplemented`.

use ambit_model::{Code, Refusal};
use ambit_proto::status::to_status;
use ambit_proto::v1;
use tonic::{Request, Response, Status};

/// Names the method and says that it is not built.
pub(crate) fn unbuilt<T>(what: &str) -> Result<Response<T>, Status> {
    Err(to_status(&Refusal::new(Code::Unimplemented, "a method that is built", what)))
}

pub(crate) struct Audit;
pub(crate) struct TrustDomains;

#[tonic::async_trait]
impl v1::audit_server::Audit for Audit {
    async fn watch_audit(&self, _: Request<v1::AuditUnbuilt>) -> Result<Response<v1::AuditUnbuilt>, Status> {
        unbuilt("Audit.WatchAudit (issue H)")
    }
    async fn verify_chain(&self, _: Request<v1::AuditUnbuilt>) -> Result<Response<v1::AuditUnbuilt>, Status> {
        unbuilt("Audit.VerifyChain (issue H)")
    }
}

#[tonic::async_trait]
impl v1::trust_domain_registry_server::TrustDomainRegistry for TrustDomains {
    async fn list_federation_relationships(&self, _: Request<v1::Unbuilt>) -> Result<Response<v1::Unbuilt>, Status> {
        unbuilt("TrustDomainRegistry.ListFederationRelationships (issue F)")
    }
    async fn create_federation_group(&self, _: Request<v1::Unbuilt>) -> Result<Response<v1::Unbuilt>, Status> {
        unbuilt("TrustDomainRegistry.CreateFederationGroup (issue F)")
    }
}
