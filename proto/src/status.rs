//! Refusals as gRPC statuses and back: the code travels in trailers, so that nothing has to parse prose.

use ambit_model::refusal::Class;
use ambit_model::{Code, Refusal};
use tonic::metadata::{AsciiMetadataValue, BinaryMetadataValue, MetadataMap};
use tonic::{Code as GrpcCode, Status};

const CODE: &str = "ambit-code";
const EXPECTED: &str = "ambit-expected-bin";
const FOUND: &str = "ambit-found-bin";

/// A status whose trailers carry the refusal whole.
pub fn to_status(refusal: &Refusal) -> Status {
    let code = match refusal.code.class() {
        Class::Invalid => GrpcCode::InvalidArgument,
        Class::Denied => GrpcCode::PermissionDenied,
        Class::Unauthenticated => GrpcCode::Unauthenticated,
        Class::Missing => GrpcCode::NotFound,
        Class::Conflict => GrpcCode::Aborted,
        Class::Unavailable => GrpcCode::Unavailable,
        Class::Unimplemented => GrpcCode::Unimplemented,
        Class::Precondition => GrpcCode::FailedPrecondition,
    };
    let mut trailers = MetadataMap::new();
    trailers.insert(CODE, AsciiMetadataValue::from_static(refusal.code.as_str()));
    trailers.insert_bin(EXPECTED, BinaryMetadataValue::from_bytes(refusal.expected.as_bytes()));
    trailers.insert_bin(FOUND, BinaryMetadataValue::from_bytes(refusal.found.as_bytes()));
    Status::with_metadata(code, refusal.to_string(), trailers)
}

/// The refusal in a status; a status without one (a dead connection, say) becomes `unavailable`.
pub fn from_status(status: &Status) -> Refusal {
    let text = |key| {
        let bytes = status.metadata().get_bin(key).and_then(|v| v.to_bytes().ok()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let code = status.metadata().get(CODE).and_then(|v| v.to_str().ok()).and_then(Code::from_text);
    match code {
        Some(code) => Refusal::new(code, text(EXPECTED), text(FOUND)),
        None => {
            let code = match status.code() {
                GrpcCode::Unimplemented => Code::Unimplemented,
                GrpcCode::Unauthenticated => Code::Unauthenticated,
                GrpcCode::PermissionDenied => Code::PermissionDenied,
                GrpcCode::InvalidArgument => Code::BadRequest,
                _ => Code::Unavailable,
            };
            Refusal::new(code, "an answer from the server", format!("{}: {}", status.code(), status.message()))
        }
    }
}
