//! The wire: generated messages and stubs of `ambit/v1`, the SPIFFE Workload API, and conversions to model types.
//!
//! Never: decisions, IO, or kernel layouts. What cannot be converted strictly is refused here.
#![forbid(unsafe_code)]

pub mod convert;
pub mod status;

/// `ambit.v1`.
pub mod v1 {
    #![allow(
        missing_docs,
        unreachable_pub,
        clippy::all,
        clippy::allow_attributes_without_reason,
        reason = "generated code"
    )]
    tonic::include_proto!("ambit.v1");
}

/// The SPIFFE Workload API (it has no package name).
pub mod workload {
    #![allow(
        missing_docs,
        unreachable_pub,
        clippy::all,
        clippy::allow_attributes_without_reason,
        reason = "generated code"
    )]
    tonic::include_proto!("_");

    impl std::fmt::Debug for X509svid {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("X509svid").field("spiffe_id", &self.spiffe_id).finish_non_exhaustive()
        }
    }
    impl std::fmt::Debug for Jwtsvid {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("Jwtsvid").field("spiffe_id", &self.spiffe_id).finish_non_exhaustive()
        }
    }
}

/// The SPIFFE Broker API.
pub mod broker {
    #![allow(
        missing_docs,
        unreachable_pub,
        clippy::all,
        clippy::allow_attributes_without_reason,
        reason = "generated code"
    )]
    tonic::include_proto!("spiffe.broker");

    impl std::fmt::Debug for X509svid {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("X509svid").field("spiffe_id", &self.spiffe_id).finish_non_exhaustive()
        }
    }
    impl std::fmt::Debug for Jwtsvid {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("Jwtsvid").field("spiffe_id", &self.spiffe_id).finish_non_exhaustive()
        }
    }
}

pub mod xds;

/// Descriptor sets for gRPC reflection.
pub const AMBIT_DESCRIPTORS: &[u8] = tonic::include_file_descriptor_set!("ambit");
/// See [`AMBIT_DESCRIPTORS`].
pub const ENVOY_DESCRIPTORS: &[u8] = tonic::include_file_descriptor_set!("envoy");
/// See [`AMBIT_DESCRIPTORS`].
pub const SPIFFE_DESCRIPTORS: &[u8] = tonic::include_file_descriptor_set!("spiffe");
