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
