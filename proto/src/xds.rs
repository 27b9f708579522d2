//! Envoy's secret discovery service and what it stands on, in modules by package: generated code refers to its neighbours
//! by their place.
#![allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::allow_attributes_without_reason,
    reason = "generated code"
)]

pub mod google {
    pub mod rpc {
        tonic::include_proto!("google.rpc");
    }
}

pub mod envoy {
    pub mod r#type {
        pub mod v3 {
            tonic::include_proto!("envoy.r#type.v3");
        }
    }
    pub mod config {
        pub mod core {
            pub mod v3 {
                tonic::include_proto!("envoy.config.core.v3");
            }
        }
    }
    pub mod extensions {
        pub mod transport_sockets {
            pub mod tls {
                pub mod v3 {
                    tonic::include_proto!("envoy.extensions.transport_sockets.tls.v3");

                    discreet! { TlsCertificate {} }
                }
            }
        }
    }
    pub mod service {
        pub mod discovery {
            pub mod v3 {
                tonic::include_proto!("envoy.service.discovery.v3");

                // What is packed in them may be a key.
                discreet! {
                    DiscoveryResponse { version_info, nonce }
                    Resource { name, version }
                }
            }
        }
        pub mod secret {
            pub mod v3 {
                tonic::include_proto!("envoy.service.secret.v3");
            }
        }
    }
}

pub use envoy::config::core::v3 as core;
pub use envoy::extensions::transport_sockets::tls::v3 as tls;
pub use envoy::service::discovery::v3 as discovery;
pub use envoy::service::secret::v3 as secret;
