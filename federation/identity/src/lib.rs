//! X.509- and JWT-SVIDs: strict verification, issuance from committed records only, and the TLS configurations built on them.
//!
//! Never: IO, a clock (time is an argument, or rustls' own), or a leaf or token without its committed record.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod approver;
pub mod audit;
pub mod authority;
pub mod bundle;
pub mod csr;
pub mod document;
pub mod external;
mod json;
mod jwk;
pub mod jwt;
pub mod keys;
mod leaf;
pub mod majority;
pub mod profile;
pub mod record;
pub mod remote;
pub mod result;
pub mod share;
pub mod svid;
pub mod tls;
pub mod wrap;

pub use approver::ApproverKey;
pub use authority::{IssuingKey, Named, Root, issue};
pub use csr::Csr;
pub use jwt::{JwtKey, JwtSvid, JwtTrust, issue_jwt, verify_jwt};
pub use keys::{SvidKey, fingerprint};
pub use majority::CoSignature;
pub use record::{KeySet, RecordKey};
pub use remote::RemoteKey;
pub use result::{ExportedResult, VerifiedResult};
pub use share::{RootShare, ShareSet};
pub use svid::{NodeBinding, PeerSvid, TrustStore, Usage, name_of, verify_svid, verify_svid_for};
pub use tls::{Expect, SharedTrust, Trust};
