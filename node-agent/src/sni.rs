//! The server name by which a tunnel's dialer names the workload it wants.
//!
//! A SPIFFE ID is no host name, so its hash stands for it. The name only selects a certificate: whether it is the right
//! one is proved by the SPIFFE ID in it.

use ambit_model::SpiffeId;
use sha2::{Digest, Sha256};

/// Never resolved; keeps the names out of any real zone.
const SUFFIX: &str = ".ambit.internal";

/// `<first 32 hex digits of SHA-256(id)>.ambit.internal`: a DNS label holds at most 63 characters.
pub fn server_name(id: &SpiffeId) -> String {
    let hash = hex::encode(Sha256::digest(id.as_str().as_bytes()));
    format!("{}{SUFFIX}", hash.get(..32).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_is_stable_and_a_valid_host_name() {
        let name = server_name(&"spiffe://west/db".parse().unwrap());
        assert_eq!(name, format!("{}.ambit.internal", &hex::encode(Sha256::digest(b"spiffe://west/db"))[..32]));
        assert!(rustls_pki_types::ServerName::try_from(name.clone()).is_ok());
        assert_ne!(name, server_name(&"spiffe://west/db2".parse().unwrap()));
    }
}
