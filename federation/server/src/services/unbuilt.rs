//! Methods of later issues: they are authorised like the others and answer `unimplemented`.

use ambit_model::{Code, Refusal};
use ambit_proto::status::to_status;
use tonic::{Response, Status};

/// Names the method and says that it is not built.
pub(crate) fn unbuilt<T>(what: &str) -> Result<Response<T>, Status> {
    Err(to_status(&Refusal::new(Code::Unimplemented, "a method that is built", what)))
}
