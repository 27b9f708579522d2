//! A trust domain's bundle as the documents that outsiders read: the SPIFFE bundle (SPIFFE_Trust_Domain_and_Bundle.md
//! section 4, RFC 7517), and the OIDC discovery documents for its JWT part (OpenID Connect Discovery 1.0 section 3).
//!
//! The same content gives the same bytes. What is published names no trust domain; who fetches it knows whose it is.

use crate::profile;
use ambit_model::{Code, JwtAuthority, Refusal};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::{Map, Value, json};
use x509_parser::prelude::FromDer;
use x509_parser::public_key::PublicKey;
use x509_parser::x509::SubjectPublicKeyInfo;

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
    /// [`Code::Internal`] for a root or key that is not readable.
    pub fn bundle(&self) -> Result<String, Refusal> {
        let mut keys = Vec::new();
        for der in self.roots {
            let cert = profile::parse(der).map_err(|e| unreadable("a root certificate", e))?;
            let mut jwk = jwk(cert.public_key())?;
            jwk.insert("use".into(), json!("x509-svid"));
            jwk.insert("x5c".into(), json!([STANDARD.encode(der)]));
            keys.push(Value::Object(jwk));
        }
        for key in self.jwt_keys {
            keys.push(Value::Object(named(key, "jwt-svid")?));
        }
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
    /// [`Code::Internal`] for a key that is not readable.
    pub fn oidc_keys(&self) -> Result<String, Refusal> {
        let key = |key: &JwtAuthority| {
            let mut jwk = named(key, "sig")?;
            jwk.insert("alg".into(), json!(algorithm(&jwk)?));
            Ok(Value::Object(jwk))
        };
        let keys: Vec<Value> = self.jwt_keys.iter().map(key).collect::<Result<_, Refusal>>()?;
        Ok(json!({ "keys": keys }).to_string())
    }

    /// The discovery document of an issuer, which is an https URL without a slash at its end.
    ///
    /// # Errors
    /// [`Code::Internal`] for a key that is not readable.
    pub fn oidc_discovery(&self, issuer: &str) -> Result<String, Refusal> {
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
            "issuer": issuer,
            "jwks_uri": format!("{issuer}/keys"),
            "response_types_supported": ["id_token"],
            "subject_types_supported": ["public"],
        });
        Ok(document.to_string())
    }
}

fn named(key: &JwtAuthority, r#use: &str) -> Result<Map<String, Value>, Refusal> {
    let (_, spki) =
        SubjectPublicKeyInfo::from_der(&key.spki_der).map_err(|e| unreadable("a public key", e.to_string()))?;
    let mut jwk = jwk(&spki)?;
    jwk.insert("kid".into(), json!(key.kid));
    jwk.insert("use".into(), json!(r#use));
    Ok(jwk)
}

/// Key type and numbers (RFC 7518 section 6).
fn jwk(spki: &SubjectPublicKeyInfo<'_>) -> Result<Map<String, Value>, Refusal> {
    let mut out = Map::new();
    let mut put = |name: &str, value: String| out.insert(name.to_owned(), Value::String(value));
    match spki.parsed().map_err(|e| unreadable("a public key", e.to_string()))? {
        PublicKey::EC(point) => {
            // Uncompressed: 04, x, y (SEC 1 section 2.3.3).
            let (curve, xy) = match point.data() {
                [0x04, xy @ ..] if xy.len() == 64 => ("P-256", xy),
                [0x04, xy @ ..] if xy.len() == 96 => ("P-384", xy),
                other => return Err(unreadable("a point of P-256 or P-384", format!("{} bytes", other.len()))),
            };
            let (x, y) = xy.split_at(xy.len() / 2);
            put("kty", "EC".into());
            put("crv", curve.into());
            put("x", URL_SAFE_NO_PAD.encode(x));
            put("y", URL_SAFE_NO_PAD.encode(y));
        }
        PublicKey::RSA(key) => {
            let bare = |number: &[u8]| {
                URL_SAFE_NO_PAD.encode(number.iter().copied().skip_while(|b| *b == 0).collect::<Vec<_>>())
            };
            put("kty", "RSA".into());
            put("n", bare(key.modulus));
            put("e", bare(key.exponent));
        }
        _ => return Err(unreadable("an EC or RSA key", spki.algorithm.algorithm.to_id_string())),
    }
    Ok(out)
}

fn algorithm(jwk: &Map<String, Value>) -> Result<&'static str, Refusal> {
    match (jwk.get("kty").and_then(Value::as_str), jwk.get("crv").and_then(Value::as_str)) {
        (Some("EC"), Some("P-256")) => Ok("ES256"),
        (Some("EC"), Some("P-384")) => Ok("ES384"),
        (Some("RSA"), _) => Ok("RS256"),
        (kty, _) => Err(unreadable("an EC or RSA key", format!("{kty:?}"))),
    }
}

fn unreadable(expected: &str, found: String) -> Refusal {
    Refusal::new(Code::Internal, expected, found)
}
