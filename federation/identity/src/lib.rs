//! X.509-SVIDs: strict verification, issuance from committed records only, and the TLS configurations built on them.
//!
//! Never: IO, a clock (time is an argument, or rustls' own), or a leaf without a `Committed<Issuance>`.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod authority;
pub mod bundle;
pub mod csr;
pub mod keys;
pub mod profile;
pub mod record;
pub mod remote;
pub mod result;
pub mod svid;
pub mod tls;
pub mod wrap;

pub use authority::{IssuingKey, Named, Root, issue};
pub use csr::Csr;
pub use keys::{SvidKey, fingerprint};
pub use record::{KeySet, RecordKey};
pub use remote::RemoteKey;
pub use result::{ExportedResult, VerifiedResult};
pub use svid::{NodeBinding, PeerSvid, TrustStore, Usage, verify_svid, verify_svid_for};
pub use tls::{Expect, SharedTrust, Trust};
