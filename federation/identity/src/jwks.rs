//! The JWT part of a bundle as a document: a JWK set (RFC 7517 section 5) of the keys that verify JWT-SVIDs, which is what the
//! Workload API hands out (SPIFFE_Workload_API.md section 6.2.2).

use crate::keys::internal;
use ambit_model::{JwtAuthority, Refusal};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use x509_parser::prelude::FromDer;
use x509_parser::public_key::PublicKey;
use x509_parser::x509::SubjectPublicKeyInfo;

/// The document. Keys of no other use are in it; without keys it is an empty set, by which nothing verifies.
///
/// # Errors
/// [`ambit_model::Code::Internal`] for a key that is not readable.
pub fn jwks(keys: &[JwtAuthority]) -> Result<String, Refusal> {
    let keys: Vec<Value> = keys.iter().map(jwk).collect::<Result<_, _>>()?;
    Ok(json!({ "keys": keys }).to_string())
}

/// RFC 7518 sections 6.2.1 and 6.3.1. `use` and `kid` must be there (SPIFFE_Trust_Domain_and_Bundle.md section 4.2).
fn jwk(key: &JwtAuthority) -> Result<Value, Refusal> {
    let (_, spki) = SubjectPublicKeyInfo::from_der(&key.spki_der).map_err(|e| internal("a public key", e))?;
    let mut jwk = match spki.parsed().map_err(|e| internal("a public key", e))? {
        PublicKey::EC(point) => {
            // Uncompressed: 04, x, y (SEC 1 section 2.3.3).
            let curve = match point.data().len() {
                65 => "P-256",
                97 => "P-384",
                133 => "P-521",
                other => return Err(internal("a point of P-256, P-384 or P-521", format!("{other} bytes"))),
            };
            let xy = point.data().strip_prefix(&[4]).ok_or_else(|| internal("an uncompressed point", "another"))?;
            let (x, y) = xy.split_at(xy.len() / 2);
            json!({ "kty": "EC", "crv": curve, "x": URL_SAFE_NO_PAD.encode(x), "y": URL_SAFE_NO_PAD.encode(y) })
        }
        PublicKey::RSA(key) => {
            let number = |bytes: &[u8]| {
                let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
                URL_SAFE_NO_PAD.encode(bytes.get(zeros..).unwrap_or_default())
            };
            json!({ "kty": "RSA", "n": number(key.modulus), "e": number(key.exponent) })
        }
        _ => return Err(internal("an EC or RSA key", spki.algorithm.algorithm.to_id_string())),
    };
    for (name, value) in [("use", "jwt-svid"), ("kid", key.kid.as_str())] {
        jwk[name] = json!(value);
    }
    Ok(jwk)
}
