//! Methods of later issues: they are authorised like the others and answer `unimplemented`.

use ambit_model::{Code, Refusal};
use ambit_proto::status::to_status;
use ambit_proto::v1;
use tonic::{Request, Response, Status};

/// Names the method and says that it is not built.
pub(crate) fn unbuilt<T>(what: &str) -> Result<Response<T>, Status> {
    Err(to_status(&Refusal::new(Code::Unimplemented, "a method that is built", what)))
}

pub(crate) struct LocalAuthority;

#[tonic::async_trait]
impl v1::local_authority_server::LocalAuthority for LocalAuthority {
    async fn get_x509_authority_state(&self, _: Request<v1::Unbuilt>) -> Result<Response<v1::Unbuilt>, Status> {
        unbuilt("LocalAuthority.GetX509AuthorityState (issue D)")
    }
    async fn prepare_x509_authority(&self, _: Request<v1::Unbuilt>) -> Result<Response<v1::Unbuilt>, Status> {
        unbuilt("LocalAuthority.PrepareX509Authority (issue D)")
    }
    async fn activate_x509_authority(&self, _: Request<v1::Unbuilt>) -> Result<Response<v1::Unbuilt>, Status> {
        unbuilt("LocalAuthority.ActivateX509Authority (issue D)")
    }
    async fn taint_x509_authority(&self, _: Request<v1::Unbuilt>) -> Result<Response<v1::Unbuilt>, Status> {
        unbuilt("LocalAuthority.TaintX509Authority (issue D)")
    }
    async fn revoke_x509_authority(&self, _: Request<v1::Unbuilt>) -> Result<Response<v1::Unbuilt>, Status> {
        unbuilt("LocalAuthority.RevokeX509Authority (issue D)")
    }
}
