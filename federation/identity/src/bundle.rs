//! SPIFFE bundles as documents (SPIFFE_Trust_Domain_and_Bundle.md section 4, RFC 7517), read for the roots of their trust
//! domains. A document names no trust domain; who fetched it knows whose it is.

use crate::json::once;
use crate::jwk;
use crate::profile;
use ambit_model::{Code, JwtAuthority, Refusal, TrustDomain};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};

/// A document larger than this is no bundle.
pub const DOCUMENT_BYTES_MAX: usize = 1 << 20;
/// Keys in one bundle; a trust domain has a handful.
const KEYS_MAX: usize = 256;
/// A hint beyond a year is no hint.
const HINT_S_MAX: u64 = 366 * 86_400;

/// Root certificates of a trust domain, DER. None: every X.509-SVID of it is revoked.
pub type Roots = Vec<Vec<u8>>;

/// What a bundle document says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// `spiffe_sequence`; a publisher should give one.
    pub sequence: Option<u64>,
    /// `spiffe_refresh_hint`, seconds.
    pub refresh_hint_s: Option<u64>,
    /// See the type.
    pub roots: Roots,
    /// Keys of JWT-SVIDs. None: every JWT-SVID of it is revoked.
    pub jwt_authorities: Vec<JwtAuthority>,
}

/// Reads a bundle document.
///
/// # Errors
/// [`Code::BundleMalformed`].
pub fn document(text: &str) -> Result<Document, Refusal> {
    bounded(text)?;
    let object = once(text.as_bytes()).map_err(|e| bad("a JSON object, each name once", e.to_string()))?;
    read(&object)
}

/// The roots of a bundle document.
///
/// # Errors
/// [`Code::BundleMalformed`].
pub fn roots(text: &str) -> Result<Roots, Refusal> {
    document(text).map(|document| document.roots)
}

/// The keys of JWT-SVIDs in a bundle document.
///
/// # Errors
/// [`Code::BundleMalformed`].
pub fn jwt_authorities(text: &str) -> Result<Vec<JwtAuthority>, Refusal> {
    document(text).map(|document| document.jwt_authorities)
}

/// Reads a bundle map: the bundles of several trust domains (section 4.3).
///
/// # Errors
/// [`Code::BundleMalformed`], also for a trust domain that comes twice.
pub fn roots_of_map(document: &str) -> Result<BTreeMap<TrustDomain, Roots>, Refusal> {
    Ok(documents_of_map(document)?.into_iter().map(|(td, bundle)| (td, bundle.roots)).collect())
}

/// The keys of JWT-SVIDs in a bundle map.
///
/// # Errors
/// As [`roots_of_map`].
pub fn jwt_authorities_of_map(document: &str) -> Result<BTreeMap<TrustDomain, Vec<JwtAuthority>>, Refusal> {
    Ok(documents_of_map(document)?.into_iter().map(|(td, bundle)| (td, bundle.jwt_authorities)).collect())
}

fn documents_of_map(document: &str) -> Result<BTreeMap<TrustDomain, Document>, Refusal> {
    #[derive(Deserialize)]
    struct BundleMap {
        trust_domains: Map<String, Value>,
    }
    bounded(document)?;
    let map: BundleMap =
        once(document.as_bytes()).map_err(|e| bad("a bundle map, each trust domain once", e.to_string()))?;
    let mut out = BTreeMap::new();
    for (td, bundle) in map.trust_domains {
        let object = bundle.as_object().ok_or_else(|| bad("a bundle", format!("{bundle} of {td}")))?;
        let name: TrustDomain = td.parse().map_err(|_| bad("a trust domain", td.clone()))?;
        out.insert(name, read(object)?);
    }
    Ok(out)
}

/// Whether a document is a bundle map.
pub fn is_map(document: &str) -> bool {
    document.len() <= DOCUMENT_BYTES_MAX
        && serde_json::from_str::<Map<String, Value>>(document).is_ok_and(|o| o.contains_key("trust_domains"))
}

fn read(object: &Map<String, Value>) -> Result<Document, Refusal> {
    let number = |name: &str| match object.get(name) {
        None => Ok(None),
        Some(value) => {
            value.as_u64().map(Some).ok_or_else(|| bad(&format!("a whole number {name}"), value.to_string()))
        }
    };
    let (sequence, refresh_hint_s) = (number("spiffe_sequence")?, number("spiffe_refresh_hint")?);
    if let Some(hint) = refresh_hint_s.filter(|hint| *hint > HINT_S_MAX) {
        return Err(bad("a spiffe_refresh_hint of at most a year", format!("{hint} s")));
    }
    let keys = object.get("keys").and_then(Value::as_array).ok_or_else(|| bad("an array 'keys'", "none".into()))?;
    if keys.len() > KEYS_MAX {
        return Err(bad(&format!("at most {KEYS_MAX} keys"), keys.len().to_string()));
    }
    let (mut roots, mut kids, mut jwt_authorities) = (Vec::new(), BTreeSet::new(), Vec::new());
    for (n, key) in keys.iter().enumerate() {
        let jwk = key.as_object().ok_or_else(|| bad("a JWK", format!("key {n}: {key}")))?;
        let text = |name: &str| jwk.get(name).and_then(Value::as_str);
        match (text("kty").unwrap_or_default(), text("use").unwrap_or_default()) {
            ("EC" | "RSA" | "OKP", "x509-svid") => roots.push(root(n, jwk)?),
            ("EC" | "RSA", "jwt-svid") => {
                let authority = jwk::authority(jwk).map_err(|expected| bad(expected, format!("another key {n}")))?;
                if !kids.insert(authority.kid.clone()) {
                    return Err(bad("each kid once", format!("'{}' twice", authority.kid)));
                }
                jwt_authorities.push(authority);
            }
            // Of a kind or use that nobody here knows it is passed over (section 4.2.2).
            _ => {}
        }
    }
    Ok(Document { sequence, refresh_hint_s, roots, jwt_authorities })
}

/// The certificate of an x509-svid key. A publisher gives exactly one; of several a reader takes the first.
fn root(n: usize, jwk: &Map<String, Value>) -> Result<Vec<u8>, Refusal> {
    if jwk.contains_key("kid") {
        return Err(bad("no kid in an x509-svid key", format!("key {n} has one")));
    }
    let x5c = jwk.get("x5c").and_then(Value::as_array).map(Vec::as_slice);
    let first = x5c.and_then(|x5c| x5c.first()).and_then(Value::as_str);
    let first = first.ok_or_else(|| bad("x5c with a certificate", format!("none in key {n}")))?;
    let der = STANDARD.decode(first).map_err(|e| bad("x5c in base64", format!("key {n}: {e}")))?;
    profile::parse(&der).map_err(|e| bad("a certificate in x5c", format!("key {n}: {e}")))?;
    Ok(der)
}

fn bounded(document: &str) -> Result<(), Refusal> {
    if document.len() <= DOCUMENT_BYTES_MAX {
        return Ok(());
    }
    Err(bad(&format!("a document of at most {DOCUMENT_BYTES_MAX} bytes"), document.len().to_string()))
}

fn bad(expected: &str, found: String) -> Refusal {
    let found: String = found.chars().take(300).collect();
    Refusal::new(Code::BundleMalformed, expected, found)
}
