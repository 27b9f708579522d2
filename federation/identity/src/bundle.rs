//! SPIFFE bundles as documents (SPIFFE_Trust_Domain_and_Bundle.md section 4, RFC 7517): the roots and JWT keys of a trust
//! domain. A document names no trust domain; who fetched it knows whose it is.

use crate::profile;
use ambit_model::{Code, Refusal, TrustDomain};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fmt;

/// A document larger than this is no bundle.
pub const DOCUMENT_BYTES_MAX: usize = 1 << 20;
/// Keys in one bundle; a trust domain has a handful.
const KEYS_MAX: usize = 256;
/// A hint beyond a year is no hint.
const HINT_S_MAX: u64 = 366 * 86_400;

/// A key that signs JWT-SVIDs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JwtKey {
    /// Its id.
    pub kid: String,
    /// The JWK, as it came.
    pub jwk: Map<String, Value>,
}

/// The bundle of one trust domain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpiffeBundle {
    /// Rises with each change; not every publisher has one.
    pub sequence: Option<u64>,
    /// Seconds after which to ask again; not every publisher has one.
    pub refresh_hint_s: Option<u64>,
    /// Root certificates, DER. None: every X.509-SVID of the trust domain is revoked.
    pub roots: Vec<Vec<u8>>,
    /// Keys of JWT-SVIDs.
    pub jwt_keys: Vec<JwtKey>,
    /// Keys that were passed over, as the standard wants, by kind and use.
    pub skipped: Vec<String>,
}

/// A JSON object that refuses a key that comes twice: two readers must not read two documents.
struct Once(Map<String, Value>);

impl<'de> Deserialize<'de> for Once {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Once;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Once, A::Error> {
                let mut out = Map::new();
                while let Some((key, value)) = map.next_entry::<String, Value>()? {
                    if out.insert(key.clone(), value).is_some() {
                        return Err(serde::de::Error::custom(format!("'{key}' twice")));
                    }
                }
                Ok(Once(out))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

impl SpiffeBundle {
    /// Reads a bundle document.
    ///
    /// # Errors
    /// [`Code::BundleMalformed`].
    pub fn parse(document: &str) -> Result<SpiffeBundle, Refusal> {
        bounded(document)?;
        let Once(object) = serde_json::from_str(document).map_err(|e| bad("a JSON object", e.to_string()))?;
        Self::of(&object)
    }

    /// Reads a bundle map: the bundles of several trust domains (section 4.3). Their refresh hints say nothing here.
    ///
    /// # Errors
    /// [`Code::BundleMalformed`], also for a trust domain that comes twice.
    pub fn parse_map(document: &str) -> Result<BTreeMap<TrustDomain, SpiffeBundle>, Refusal> {
        #[derive(Deserialize)]
        struct Document {
            trust_domains: Once,
        }
        bounded(document)?;
        let map: Document =
            serde_json::from_str(document).map_err(|e| bad("a bundle map, each trust domain once", e.to_string()))?;
        let mut out = BTreeMap::new();
        for (td, bundle) in map.trust_domains.0 {
            let object = bundle.as_object().ok_or_else(|| bad("a bundle", format!("{bundle} of {td}")))?;
            let name: TrustDomain = td.parse().map_err(|_| bad("a trust domain", td.clone()))?;
            out.insert(name, SpiffeBundle { refresh_hint_s: None, ..Self::of(object)? });
        }
        Ok(out)
    }

    /// Whether a document is a bundle map.
    pub fn is_map(document: &str) -> bool {
        document.len() <= DOCUMENT_BYTES_MAX
            && serde_json::from_str::<Map<String, Value>>(document).is_ok_and(|o| o.contains_key("trust_domains"))
    }

    fn of(object: &Map<String, Value>) -> Result<SpiffeBundle, Refusal> {
        let number = |name: &str| match object.get(name) {
            None => Ok(None),
            Some(value) => {
                value.as_u64().map(Some).ok_or_else(|| bad(&format!("a whole number {name}"), value.to_string()))
            }
        };
        let mut out = SpiffeBundle {
            sequence: number("spiffe_sequence")?,
            refresh_hint_s: number("spiffe_refresh_hint")?,
            ..SpiffeBundle::default()
        };
        if let Some(hint) = out.refresh_hint_s.filter(|hint| *hint > HINT_S_MAX) {
            return Err(bad("a spiffe_refresh_hint of at most a year", format!("{hint} s")));
        }
        let keys = object.get("keys").and_then(Value::as_array).ok_or_else(|| bad("an array 'keys'", "none".into()))?;
        if keys.len() > KEYS_MAX {
            return Err(bad(&format!("at most {KEYS_MAX} keys"), keys.len().to_string()));
        }
        for (n, key) in keys.iter().enumerate() {
            let jwk = key.as_object().ok_or_else(|| bad("a JWK", format!("key {n}: {key}")))?;
            out.key(n, jwk)?;
        }
        Ok(out)
    }

    /// Takes one key. Of a kind or use that nobody here knows it is passed over (section 4.2.2).
    fn key(&mut self, n: usize, jwk: &Map<String, Value>) -> Result<(), Refusal> {
        let text = |name: &str| jwk.get(name).and_then(Value::as_str);
        let (kty, usage) = (text("kty").unwrap_or_default(), text("use").unwrap_or_default());
        match (kty, usage) {
            ("EC" | "RSA" | "OKP", "x509-svid") => {
                if jwk.contains_key("kid") {
                    return Err(bad("no kid in an x509-svid key", format!("key {n} has one")));
                }
                let x5c = jwk.get("x5c").and_then(Value::as_array).map(Vec::as_slice);
                // A publisher gives exactly one; of several a reader takes the first.
                let first = x5c.and_then(|x5c| x5c.first()).and_then(Value::as_str);
                let first = first.ok_or_else(|| bad("x5c with a certificate", format!("none in key {n}")))?;
                let der = STANDARD.decode(first).map_err(|e| bad("x5c in base64", format!("key {n}: {e}")))?;
                profile::parse(&der).map_err(|e| bad("a certificate in x5c", format!("key {n}: {e}")))?;
                self.roots.push(der);
            }
            ("EC" | "RSA", "jwt-svid") => {
                let kid = text("kid").filter(|kid| !kid.is_empty());
                let kid = kid.ok_or_else(|| bad("a kid in a jwt-svid key", format!("none in key {n}")))?.to_owned();
                if self.jwt_keys.iter().any(|known| known.kid == kid) {
                    return Err(bad("each kid once", format!("'{kid}' twice")));
                }
                self.jwt_keys.push(JwtKey { kid, jwk: jwk.clone() });
            }
            (kty, usage) => self.skipped.push(format!("key {n}: kty '{kty}', use '{usage}'")),
        }
        Ok(())
    }

    /// The document, as a publisher writes it.
    ///
    /// # Errors
    /// [`Code::Internal`] for a root whose public key cannot be written as a JWK.
    pub fn document(&self) -> Result<String, Refusal> {
        let mut keys = Vec::new();
        for root in &self.roots {
            keys.push(jwk_of(root)?);
        }
        keys.extend(self.jwt_keys.iter().map(|key| Value::Object(key.jwk.clone())));
        let mut object = Map::new();
        object.insert("keys".into(), Value::Array(keys));
        object.extend(self.sequence.map(|n| ("spiffe_sequence".to_owned(), json!(n))));
        object.extend(self.refresh_hint_s.map(|s| ("spiffe_refresh_hint".to_owned(), json!(s))));
        Ok(Value::Object(object).to_string())
    }
}

/// RFC 7518 section 6: the certificate's public key.
fn jwk_of(root: &[u8]) -> Result<Value, Refusal> {
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    use x509_parser::public_key::PublicKey;
    let cannot = |found: String| Refusal::new(Code::Internal, "a root with a public key of a known kind", found);
    let cert = profile::parse(root).map_err(cannot)?;
    let x5c = [STANDARD.encode(root)];
    let encoded = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    match cert.public_key().parsed().map_err(|e| cannot(e.to_string()))? {
        PublicKey::EC(point) => {
            let (x, y) = match point.data().split_first() {
                Some((4, point)) => point.split_at(point.len() / 2),
                _ => return Err(cannot("a compressed point".into())),
            };
            let crv = match x.len() {
                32 => "P-256",
                48 => "P-384",
                66 => "P-521",
                n => return Err(cannot(format!("coordinates of {n} bytes"))),
            };
            Ok(json!({ "kty": "EC", "use": "x509-svid", "crv": crv, "x": encoded(x), "y": encoded(y), "x5c": x5c }))
        }
        PublicKey::RSA(key) => {
            let trimmed = |n: &[u8]| encoded(n.strip_prefix(&[0]).unwrap_or(n));
            let (n, e) = (trimmed(key.modulus), trimmed(key.exponent));
            Ok(json!({ "kty": "RSA", "use": "x509-svid", "n": n, "e": e, "x5c": x5c }))
        }
        _ => Err(cannot("another kind".into())),
    }
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
