//! The wire: generated messages and stubs of `ambit/v1`, the SPIFFE Workload API, and conversions to model types.
//!
//! Never: decisions, IO, or kernel layouts. What cannot be converted strictly is refused here.
#![forbid(unsafe_code)]

/// `Debug` of messages that hold a key or a token: the fields that are named here, and none beside them.
macro_rules! discreet {
    ($($message:ident { $($shown:ident),* })*) => {$(
        impl std::fmt::Debug for $message {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($message))$(.field(stringify!($shown), &self.$shown))*.finish_non_exhaustive()
            }
        }
    )*};
}

pub mod convert;
pub mod resources;
pub mod routing;
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

    discreet! {
        CreateClusterTokenResponse { fingerprint }
        CreateJoinTokenResponse {}
        CreateReplicaTokenResponse {}
        EvidenceHeader { ima_log_len, boot_log_len }
        NewJwtsvidResponse { spiffe_id, expires_at_ms }
        ProveRequest {}
        RegisterPeerRequest { trust_domain, addresses, fingerprint }
        ReplicaJoinRequest { replica, address }
    }
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

    discreet! {
        X509svid { spiffe_id, hint }
        Jwtsvid { spiffe_id, hint }
        ValidateJwtsvidRequest { audience }
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

    discreet! {
        X509svid { spiffe_id, hint }
        Jwtsvid { spiffe_id, hint }
    }
}

pub mod xds;

/// Descriptor sets for gRPC reflection.
pub const AMBIT_DESCRIPTORS: &[u8] = tonic::include_file_descriptor_set!("ambit");
/// See [`AMBIT_DESCRIPTORS`].
pub const ENVOY_DESCRIPTORS: &[u8] = tonic::include_file_descriptor_set!("envoy");
/// See [`AMBIT_DESCRIPTORS`].
pub const SPIFFE_DESCRIPTORS: &[u8] = tonic::include_file_descriptor_set!("spiffe");

#[cfg(test)]
mod tests {
    use crate::{broker, v1, workload, xds};
    use prost_types::Any;

    #[test]
    fn no_key_and_no_token_is_printed() {
        let (text, bytes) = (|| "s3cret".to_owned(), || b"s3cret".to_vec());
        let x509 = workload::X509svid { x509_svid_key: bytes(), ..Default::default() };
        let brokered = broker::X509svid { x509_svid_key: bytes(), ..Default::default() };
        let jwt = workload::Jwtsvid { svid: text(), ..Default::default() };
        let brokered_jwt = broker::Jwtsvid { svid: text(), ..Default::default() };
        let inline = xds::core::data_source::Specifier::InlineBytes(bytes());
        let key = xds::core::DataSource { specifier: Some(inline) };
        let certificate = xds::tls::TlsCertificate { private_key: Some(key), ..Default::default() };
        let secret = xds::tls::secret::Type::TlsCertificate(certificate);
        let packed = || Any { type_url: String::new(), value: bytes() };
        let resource = xds::discovery::Resource { resource: Some(packed()), ..Default::default() };
        let printed = [
            format!("{:?}", workload::X509svidResponse { svids: vec![x509], ..Default::default() }),
            format!("{:?}", broker::SubscribeToX509svidResponse { svids: vec![brokered], ..Default::default() }),
            format!("{:?}", workload::JwtsvidResponse { svids: vec![jwt] }),
            format!("{:?}", broker::FetchJwtsvidResponse { svids: vec![brokered_jwt] }),
            format!("{:?}", workload::ValidateJwtsvidRequest { svid: text(), ..Default::default() }),
            format!("{:?}", xds::tls::Secret { r#type: Some(secret), ..Default::default() }),
            format!("{:?}", xds::discovery::DiscoveryResponse { resources: vec![packed()], ..Default::default() }),
            format!("{:?}", xds::discovery::DeltaDiscoveryResponse { resources: vec![resource], ..Default::default() }),
            format!("{:?}", v1::CreateClusterTokenResponse { token: text(), ..Default::default() }),
            format!("{:?}", v1::CreateJoinTokenResponse { token: text() }),
            format!("{:?}", v1::CreateReplicaTokenResponse { token: text() }),
            format!("{:?}", v1::EvidenceHeader { join_token: text(), ..Default::default() }),
            format!("{:?}", v1::NewJwtsvidResponse { token: text(), ..Default::default() }),
            format!("{:?}", v1::ProveRequest { token: text(), ..Default::default() }),
            format!("{:?}", v1::RegisterPeerRequest { token: text(), ..Default::default() }),
            format!("{:?}", v1::ReplicaJoinRequest { token: text(), ..Default::default() }),
        ];
        for one in printed {
            assert!(!one.contains("s3cret") && !one.contains("115, 51, 99"), "{one}");
        }
    }
}
