//! A trust domain's bundle as the documents that outsiders read: the SPIFFE bundle (SPIFFE_Trust_Domain_and_Bundle.md
//! section 4, RFC 7517), and the OIDC discovery documents for its JWT part (OpenID Connect Discovery 1.0 section 3).
//!
//! The same content gives the same bytes. What is published names no trust domain; who fetches it knows whose it is.

use crate::jwk::written;
use crate::keys::internal;
use crate::profile;
use ambit_model::{JwtAuthority, Refusal};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};
use std::fmt;
use std::str::FromStr;
use x509_parser::prelude::FromDer;
use x509_parser::x509::SubjectPublicKeyInfo;

/// The https URL that names who makes tokens (OpenID Connect Core 1.0 section 2, `iss`): that of the discovery document,
/// without its well-known path and without a slash at its end. Relying parties compare it byte by byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OidcIssuer(String);

impl OidcIssuer {
    /// The URL.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for OidcIssuer {
    type Err = String;
    fn from_str(url: &str) -> Result<Self, String> {
        let host = url.strip_prefix("https://").unwrap_or_default();
        if host.is_empty() || url.ends_with('/') || host.contains(['?', '#', '@', ' ']) {
            return Err(format!("an issuer of the form https://host/path without a slash at its end, not {url}"));
        }
        Ok(Self(url.to_owned()))
    }
}

impl fmt::Display for OidcIssuer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What is published of one trust domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published<'a> {
    /// `spiffe_sequence`: changes with every change of the content, and only grows.
    pub sequence: u64,
    /// `spiffe_refresh_hint`, seconds.
    pub refresh_hint_s: u64,
    /// Root certificates, DER.
    pub roots: &'a [Vec<u8>],
    /// Keys of JWT-SVIDs.
    pub jwt_keys: &'a [JwtAuthority],
}

impl Published<'_> {
    /// The SPIFFE bundle. An `x509-svid` key has exactly one `x5c` and no `kid`, a `jwt-svid` key has a `kid` (section 4.2).
    ///
    /// # Errors
    /// [`ambit_model::Code::Internal`] for a root or key that is not readable.
    pub fn bundle(&self) -> Result<String, Refusal> {
        let mut keys = Vec::new();
        for der in self.roots {
            let cert = profile::parse(der).map_err(|e| internal("a root certificate", e))?;
            let mut jwk = written(cert.public_key())?;
            jwk.insert("use".into(), json!("x509-svid"));
            jwk.insert("x5c".into(), json!([STANDARD.encode(der)]));
            keys.push(Value::Object(jwk));
        }
        keys.extend(jwt_svid_keys(self.jwt_keys)?);
        let document = json!({
            "keys": keys,
            "spiffe_refresh_hint": self.refresh_hint_s,
            "spiffe_sequence": self.sequence,
        });
        Ok(document.to_string())
    }

    /// The key set of the JWT part, as relying parties of OIDC read it (RFC 7517 section 5).
    ///
    /// # Errors
    /// [`ambit_model::Code::Internal`] for a key that is not readable.
    pub fn oidc_keys(&self) -> Result<String, Refusal> {
        let key = |key: &JwtAuthority| {
            let mut jwk = named(key, "sig")?;
            jwk.insert("alg".into(), json!(algorithm(&jwk)?));
            Ok(Value::Object(jwk))
        };
        let keys: Vec<Value> = self.jwt_keys.iter().map(key).collect::<Result<_, Refusal>>()?;
        Ok(json!({ "keys": keys }).to_string())
    }

    /// The discovery document of an issuer.
    ///
    /// # Errors
    /// [`ambit_model::Code::Internal`] for a key that is not readable.
    pub fn oidc_discovery(&self, issuer: &OidcIssuer) -> Result<String, Refusal> {
        let mut algorithms: Vec<&str> =
            self.jwt_keys.iter().map(|key| algorithm(&named(key, "sig")?)).collect::<Result<_, Refusal>>()?;
        algorithms.sort_unstable();
        algorithms.dedup();
        if algorithms.is_empty() {
            // The member must be there and must not be empty; our keys are of this kind.
            algorithms.push("ES256");
        }
        let document = json!({
            // Tokens are got from the Workload API; the standard wants the member all the same.
            "authorization_endpoint": "",
            "id_token_signing_alg_values_supported": algorithms,
            "issuer": issuer.as_str(),
            "jwks_uri": format!("{issuer}/keys"),
            "response_types_supported": ["id_token"],
            "subject_types_supported": ["public"],
        });
        Ok(document.to_string())
    }
}

/// The JWT part of a bundle as a document of its own: a JWK set (RFC 7517 section 5), which is what the Workload API hands out
/// (SPIFFE_Workload_API.md section 6.2.2). Without keys it is an empty set, by which nothing verifies.
///
/// # Errors
/// [`ambit_model::Code::Internal`] for a key that is not readable.
pub fn jwks(keys: &[JwtAuthority]) -> Result<String, Refusal> {
    Ok(json!({ "keys": jwt_svid_keys(keys)? }).to_string())
}

fn jwt_svid_keys(keys: &[JwtAuthority]) -> Result<Vec<Value>, Refusal> {
    keys.iter().map(|key| named(key, "jwt-svid").map(Value::Object)).collect()
}

fn named(key: &JwtAuthority, r#use: &str) -> Result<Map<String, Value>, Refusal> {
    let (_, spki) = SubjectPublicKeyInfo::from_der(&key.spki_der).map_err(|e| internal("a public key", e))?;
    let mut jwk = written(&spki)?;
    jwk.insert("kid".into(), json!(key.kid));
    jwk.insert("use".into(), json!(r#use));
    Ok(jwk)
}

fn algorithm(jwk: &Map<String, Value>) -> Result<&'static str, Refusal> {
    match (jwk.get("kty").and_then(Value::as_str), jwk.get("crv").and_then(Value::as_str)) {
        (Some("EC"), Some("P-256")) => Ok("ES256"),
        (Some("EC"), Some("P-384")) => Ok("ES384"),
        (Some("EC"), Some("P-521")) => Ok("ES512"),
        (Some("RSA"), _) => Ok("RS256"),
        (kty, _) => Err(internal("an EC or RSA key", format!("{kty:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jwk::authority;
    use ambit_model::Stamp;
    use openssl::ec::{EcGroup, EcKey};
    use openssl::nid::Nid;
    use openssl::pkey::PKey;
    use openssl::rsa::Rsa;

    /// What openssl wrote as a key is, once written as a document, read into the same key.
    #[test]
    fn every_kind_of_key_is_written_as_it_is_read() {
        let ec = |nid| {
            let group = EcGroup::from_curve_name(nid).unwrap();
            PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap().public_key_to_der().unwrap()
        };
        let rsa = PKey::from_rsa(Rsa::generate(2048).unwrap()).unwrap().public_key_to_der().unwrap();
        let ders = [ec(Nid::X9_62_PRIME256V1), ec(Nid::SECP384R1), ec(Nid::SECP521R1), rsa];
        let key = |(n, der): (usize, &Vec<u8>)| JwtAuthority {
            kid: format!("k{n}"),
            spki_der: der.clone(),
            not_after: Stamp(u64::MAX),
        };
        let keys: Vec<JwtAuthority> = ders.iter().enumerate().map(key).collect();
        let document: Value = serde_json::from_str(&jwks(&keys).unwrap()).unwrap();
        let written = document["keys"].as_array().unwrap();
        assert!(written.iter().all(|jwk| jwk["use"] == "jwt-svid"), "{document}");
        let read: Vec<_> = written.iter().map(|jwk| authority(jwk.as_object().unwrap()).unwrap()).collect();
        assert_eq!(read, keys);
        assert_eq!(jwks(&[]).unwrap(), r#"{"keys":[]}"#);
        let bad = JwtAuthority { spki_der: vec![1, 2, 3], ..keys[0].clone() };
        assert!(jwks(&[bad]).is_err());
    }
}
