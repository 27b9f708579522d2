//! Public keys as JWKs (RFC 7517, RFC 7518 section 6): those of JWT-SVIDs read from a bundle document into the form that the
//! verifier takes, and any of ours written.

use crate::keys::internal;
use crate::leaf::{integer, tlv};
use ambit_model::{JwtAuthority, Refusal, Stamp};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Map, Value};
use x509_parser::public_key::PublicKey;
use x509_parser::x509::SubjectPublicKeyInfo;

/// AlgorithmIdentifiers of SubjectPublicKeyInfo (RFC 5480 2.1.1, RFC 3279 2.3.1), DER, each with the bytes of a coordinate.
const CURVES: &[(&str, usize, &[u8])] = &[
    ("P-256", 32, &[0x30, 0x13, 6, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7]),
    ("P-384", 48, &[0x30, 0x10, 6, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1, 6, 5, 0x2b, 0x81, 4, 0, 34]),
    ("P-521", 66, &[0x30, 0x10, 6, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1, 6, 5, 0x2b, 0x81, 4, 0, 35]),
];
const RSA: &[u8] = &[0x30, 0x0d, 6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 1, 5, 0];
/// RSA keys of 8,192 bits are the longest that anything verifies with.
const MODULUS_BYTES_MAX: usize = 1_024;

/// The authority of a `jwt-svid` key, which must have a name; or what it lacks. A document says of no key when it ends.
pub(crate) fn authority(jwk: &Map<String, Value>) -> Result<JwtAuthority, &'static str> {
    let text = |name: &str| jwk.get(name).and_then(Value::as_str);
    let kid = text("kid").filter(|kid| !kid.is_empty()).ok_or("a kid in a jwt-svid key")?;
    let number = |name: &str| text(name).and_then(|text| URL_SAFE_NO_PAD.decode(text).ok());
    let (algorithm, key) = match text("kty") {
        Some("EC") => {
            let curve = CURVES.iter().find(|(name, ..)| Some(*name) == text("crv"));
            let (_, width, algorithm) = curve.ok_or("crv P-256, P-384 or P-521 in an EC key")?;
            let coordinate = |name| number(name).filter(|bytes| bytes.len() == *width);
            let both = coordinate("x").zip(coordinate("y")).ok_or("x and y of the curve's length in an EC key")?;
            (*algorithm, [&[4], both.0.as_slice(), &both.1].concat())
        }
        Some("RSA") => {
            // In the fewest bytes, and none of them a sign (RFC 7518 2, Base64urlUInt).
            let least = |name| number(name).filter(|bytes| bytes.first().is_some_and(|first| *first != 0));
            let (n, e) = least("n").zip(least("e")).ok_or("n and e in an RSA key")?;
            if n.len() > MODULUS_BYTES_MAX || e.len() > 8 {
                return Err("an RSA key of at most 8192 bits");
            }
            let mut numbers = Vec::new();
            for bytes in [n, e] {
                integer(&mut numbers, &bytes);
            }
            let mut key = Vec::new();
            tlv(&mut key, 0x30, &numbers);
            (RSA, key)
        }
        _ => return Err("kty EC or RSA"),
    };
    Ok(JwtAuthority { kid: kid.to_owned(), spki_der: info(algorithm, &key), not_after: Stamp(u64::MAX) })
}

/// SubjectPublicKeyInfo of a key of this algorithm.
fn info(algorithm: &[u8], key: &[u8]) -> Vec<u8> {
    let mut body = algorithm.to_vec();
    tlv(&mut body, 0x03, &[&[0], key].concat());
    let mut out = Vec::new();
    tlv(&mut out, 0x30, &body);
    out
}

/// Key type and numbers of a public key (RFC 7518 sections 6.2.1 and 6.3.1); what it is for is the caller's to add.
///
/// # Errors
/// [`ambit_model::Code::Internal`] for a key that is not of EC or RSA, or not readable.
pub(crate) fn written(spki: &SubjectPublicKeyInfo<'_>) -> Result<Map<String, Value>, Refusal> {
    let members = match spki.parsed().map_err(|e| internal("a public key", e))? {
        PublicKey::EC(point) => {
            // Uncompressed: 04, x, y (SEC 1 section 2.3.3).
            let xy = point.data().strip_prefix(&[4]).ok_or_else(|| internal("an uncompressed point", "another"))?;
            // The curve is the one that is named: others have points of the same length (secp256k1, brainpool).
            let is_of = |algorithm: &[u8]| info(algorithm, point.data()) == spki.raw;
            let curve = CURVES.iter().find(|(_, width, algorithm)| xy.len() == 2 * width && is_of(algorithm));
            let (curve, width, _) =
                curve.ok_or_else(|| internal("a key of P-256, P-384 or P-521", hex::encode(spki.raw)))?;
            let (x, y) = xy.split_at(*width);
            vec![
                ("kty", "EC".to_owned()),
                ("crv", (*curve).to_owned()),
                ("x", URL_SAFE_NO_PAD.encode(x)),
                ("y", URL_SAFE_NO_PAD.encode(y)),
            ]
        }
        PublicKey::RSA(key) => {
            let number = |bytes: &[u8]| {
                let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
                URL_SAFE_NO_PAD.encode(bytes.get(zeros..).unwrap_or_default())
            };
            vec![("kty", "RSA".to_owned()), ("n", number(key.modulus)), ("e", number(key.exponent))]
        }
        _ => return Err(internal("an EC or RSA key", spki.algorithm.algorithm.to_id_string())),
    };
    Ok(members.into_iter().map(|(name, value)| (name.to_owned(), Value::String(value))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use openssl::bn::{BigNum, BigNumContext};
    use openssl::ec::{EcGroup, EcKey};
    use openssl::nid::Nid;
    use openssl::pkey::PKey;
    use openssl::rsa::Rsa;
    use serde_json::json;
    use x509_parser::prelude::FromDer;

    fn read(jwk: &Value) -> Result<Vec<u8>, &'static str> {
        authority(jwk.as_object().unwrap()).map(|a| a.spki_der)
    }
    fn url(bytes: &[u8]) -> String {
        URL_SAFE_NO_PAD.encode(bytes)
    }

    #[test]
    fn keys_are_read_into_the_bytes_that_openssl_writes() {
        for (name, nid, width) in
            [("P-256", Nid::X9_62_PRIME256V1, 32), ("P-384", Nid::SECP384R1, 48), ("P-521", Nid::SECP521R1, 66)]
        {
            let group = EcGroup::from_curve_name(nid).unwrap();
            let key = EcKey::generate(&group).unwrap();
            let (mut x, mut y) = (BigNum::new().unwrap(), BigNum::new().unwrap());
            let mut context = BigNumContext::new().unwrap();
            key.public_key().affine_coordinates(&group, &mut x, &mut y, &mut context).unwrap();
            let (x, y) = (url(&x.to_vec_padded(width).unwrap()), url(&y.to_vec_padded(width).unwrap()));
            let jwk = json!({ "kty": "EC", "kid": "k", "crv": name, "x": x, "y": y });
            assert_eq!(read(&jwk).unwrap(), PKey::from_ec_key(key).unwrap().public_key_to_der().unwrap(), "{name}");
        }
        for bits in [2048, 3072] {
            let key = Rsa::generate(bits).unwrap();
            let jwk = json!({ "kty": "RSA", "kid": "k", "n": url(&key.n().to_vec()), "e": url(&key.e().to_vec()) });
            assert_eq!(read(&jwk).unwrap(), PKey::from_rsa(key).unwrap().public_key_to_der().unwrap());
        }
    }

    #[test]
    fn a_curve_is_what_its_key_names_and_not_how_long_its_points_are() {
        let ders = [Nid::SECP256K1, Nid::BRAINPOOL_P256R1, Nid::BRAINPOOL_P384R1, Nid::X9_62_PRIME256V1].map(|nid| {
            let group = EcGroup::from_curve_name(nid).unwrap();
            PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap().public_key_to_der().unwrap()
        });
        let is_written = |der: &Vec<u8>| written(&SubjectPublicKeyInfo::from_der(der).unwrap().1).is_ok();
        assert_eq!(ders.each_ref().map(is_written), [false, false, false, true]);
    }

    #[test]
    fn keys_that_say_too_little_or_too_much_are_refused() {
        let x = url(&[1; 32]);
        for bad in [
            json!({ "kty": "EC", "crv": "P-256", "x": x, "y": x }),
            json!({ "kty": "EC", "kid": "", "crv": "P-256", "x": x, "y": x }),
            json!({ "kty": "EC", "kid": "k", "crv": "secp256k1", "x": x, "y": x }),
            json!({ "kty": "EC", "kid": "k", "crv": "P-256", "x": url(&[1; 31]), "y": x }),
            json!({ "kty": "EC", "kid": "k", "crv": "P-256", "x": x }),
            json!({ "kty": "EC", "kid": "k", "crv": "P-256", "x": format!("{x}="), "y": x }),
            json!({ "kty": "RSA", "kid": "k", "n": url(&[0, 1]), "e": "AQAB" }),
            json!({ "kty": "RSA", "kid": "k", "n": url(&[1; 1025]), "e": "AQAB" }),
            json!({ "kty": "RSA", "kid": "k", "n": url(&[1; 256]) }),
            json!({ "kty": "OKP", "kid": "k", "crv": "Ed25519", "x": x }),
            json!({ "kid": "k" }),
        ] {
            assert!(read(&bad).is_err(), "{bad}");
        }
    }
}
