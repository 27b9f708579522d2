//! JWT-SVIDs (SPIFFE JWT-SVID.md, RFC 7519, RFC 7515): signed from a committed record only, verified to the letter.

use crate::document::OidcIssuer;
use crate::json::once;
use crate::keys::internal;
use ambit_model::jwt::kid_of;
use ambit_model::{Audience, Code, JwtAuthority, Refusal, SpiffeId, Stamp, TrustDomain};
use ambit_state::{Committed, JwtIssuance};
use aws_lc_rs::encoding::{AsBigEndian, AsDer, EcPrivateKeyBin, PublicKeyX509Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{self as sig, EcdsaKeyPair, KeyPair, UnparsedPublicKey, VerificationAlgorithm};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use x509_parser::prelude::FromDer;
use x509_parser::x509::SubjectPublicKeyInfo;
use zeroize::Zeroizing;

/// A token travels in an HTTP header; none is longer than what servers take there.
pub const TOKEN_BYTES_MAX: usize = 16 * 1024;
/// A year 9999 in seconds: what is later is no time (RFC 7519 2, NumericDate).
const DATE_S_MAX: f64 = 253_402_300_799.0;
/// Bytes of an uncompressed P-256 point, at the end of its SubjectPublicKeyInfo.
const POINT: usize = 65;

/// A trust domain's key that signs tokens: P-256, ES256. It is shared by the replicas of a cell, wrapped to each; neither
/// shown nor cloned.
pub struct JwtKey {
    pair: EcdsaKeyPair,
    kid: String,
    spki: Vec<u8>,
}

impl JwtKey {
    /// A fresh key.
    pub fn generate() -> Result<Self, Refusal> {
        let pair =
            EcdsaKeyPair::generate(&sig::ECDSA_P256_SHA256_FIXED_SIGNING).map_err(|e| internal("a JWT key", e))?;
        let spki: PublicKeyX509Der<'_> = pair.public_key().as_der().map_err(|e| internal("a JWT key", e))?;
        let spki = spki.as_ref().to_vec();
        Ok(Self { kid: kid_of(&spki), spki, pair })
    }
    /// From the private number that was wrapped to this replica and the public key that the cell agreed on; they must
    /// belong together.
    pub fn open(private: &[u8], spki: &[u8]) -> Result<Self, Refusal> {
        let bad = || Refusal::new(Code::Internal, "a JWT key of the authority that the cell agreed on", "another");
        let point = spki.len().checked_sub(POINT).and_then(|at| spki.get(at..)).ok_or_else(bad)?;
        let algorithm = &sig::ECDSA_P256_SHA256_FIXED_SIGNING;
        let pair = EcdsaKeyPair::from_private_key_and_public_key(algorithm, private, point).map_err(|_| bad())?;
        let own: PublicKeyX509Der<'_> = pair.public_key().as_der().map_err(|_| bad())?;
        if own.as_ref() != spki {
            return Err(bad());
        }
        Ok(Self { kid: kid_of(spki), spki: spki.to_vec(), pair })
    }
    /// The private number, to be wrapped at once.
    pub fn private(&self) -> Result<Zeroizing<Vec<u8>>, Refusal> {
        let bytes: EcPrivateKeyBin<'_> = self.pair.private_key().as_be_bytes().map_err(|e| internal("a JWT key", e))?;
        Ok(Zeroizing::new(bytes.as_ref().to_vec()))
    }
    /// Its name in the tokens' headers.
    pub fn kid(&self) -> &str {
        &self.kid
    }
    /// Its public part: SubjectPublicKeyInfo, DER.
    pub fn spki(&self) -> &[u8] {
        &self.spki
    }
}

/// Signs the token that was committed, for the audience that was committed. Refuses another authority or audience.
///
/// The header holds alg, kid and typ (JWT-SVID 2: nothing else may be there); the claims are sub, aud, exp, iat, and jti,
/// which is unique for ever, so that who takes a token only once can tell (RFC 7519 4.1.7). Where the cell has an `issuer`
/// there is iss too, without which a relying party of OIDC takes no token.
///
/// ```compile_fail,E0308
/// use ambit_identity::jwt::{JwtKey, issue_jwt};
/// fn uncommitted(i: ambit_state::JwtIssuance, to: &ambit_model::Audience, key: &JwtKey) {
///     let _ = issue_jwt(i, to, None, key);
/// }
/// ```
pub fn issue_jwt(
    committed: Committed<JwtIssuance>,
    audience: &Audience,
    issuer: Option<&OidcIssuer>,
    key: &JwtKey,
) -> Result<Zeroizing<String>, Refusal> {
    let i = committed.get();
    if i.kid != key.kid {
        return Err(Refusal::new(Code::AuthorityMismatch, key.kid.clone(), i.kid.clone()));
    }
    if i.audience_sha256 != audience.sha256() {
        return Err(Refusal::new(Code::AuthorityMismatch, "the audience that was committed", "another"));
    }
    let header = json!({ "alg": "ES256", "kid": key.kid, "typ": "JWT" });
    let mut claims = json!({
        "sub": i.spiffe_id.as_str(),
        "aud": audience.recipients(),
        "exp": i.not_after.0 / 1000,
        "iat": i.stamp.0 / 1000,
        "jti": hex::encode(i.jti),
    });
    if let Some(issuer) = issuer {
        claims["iss"] = json!(issuer.as_str());
    }
    let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let mut token = Zeroizing::new(format!("{}.{}", encode(&header), encode(&claims)));
    let signature =
        key.pair.sign(&SystemRandom::new(), token.as_bytes()).map_err(|e| internal("a token's signature", e))?;
    token.push('.');
    token.push_str(&URL_SAFE_NO_PAD.encode(signature));
    Ok(token)
}

/// A verified token: made by [`verify_jwt`] only.
#[derive(Clone, Debug, PartialEq)]
pub struct JwtSvid {
    id: SpiffeId,
    audience: Vec<String>,
    kid: String,
    not_after: Stamp,
    claims: Map<String, Value>,
}

impl JwtSvid {
    /// Who it says that its bearer is.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }
    /// For whom it is, all of them.
    pub fn audience(&self) -> &[String] {
        &self.audience
    }
    /// The key that signed it.
    pub fn kid(&self) -> &str {
        &self.kid
    }
    /// When it ends.
    pub fn not_after(&self) -> Stamp {
        self.not_after
    }
    /// All its claims, as the Workload API hands them out.
    pub fn claims(&self) -> &Map<String, Value> {
        &self.claims
    }
}

/// What kind of key verifies; an algorithm of another kind is refused before anything is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum KeyKind {
    P256,
    P384,
    P521,
    Rsa,
}

#[derive(Clone, Debug)]
struct PublicKey {
    kind: KeyKind,
    spki: Vec<u8>,
    not_after: Stamp,
}

/// Keys by trust domain and name. Each vouches for its own domain only: bundles are never pooled.
#[derive(Clone, Debug, Default)]
pub struct JwtTrust {
    keys: BTreeMap<TrustDomain, BTreeMap<String, PublicKey>>,
}

impl JwtTrust {
    /// Adds or replaces the keys of a trust domain. None: every JWT-SVID of it is revoked.
    ///
    /// # Errors
    /// [`Code::BundleMalformed`] for a name that is empty or comes twice, and for a key of a kind that signs no JWT-SVID.
    pub fn put(&mut self, td: &TrustDomain, authorities: &[JwtAuthority]) -> Result<(), Refusal> {
        let mut keys = BTreeMap::new();
        for authority in authorities {
            let bad =
                |found: String| Refusal::new(Code::BundleMalformed, "each kid once, with an EC or RSA key", found);
            let kind = kind_of(&authority.spki_der).ok_or_else(|| bad(format!("another key {}", authority.kid)))?;
            let key = PublicKey { kind, spki: authority.spki_der.clone(), not_after: authority.not_after };
            if authority.kid.is_empty() || keys.insert(authority.kid.clone(), key).is_some() {
                return Err(bad(format!("'{}'", authority.kid)));
            }
        }
        self.keys.insert(td.clone(), keys);
        Ok(())
    }
    /// The trust domains known.
    pub fn domains(&self) -> impl Iterator<Item = &TrustDomain> {
        self.keys.keys()
    }
}

/// RFC 5480 2.1.1, RFC 3279 2.3.1.
fn kind_of(spki: &[u8]) -> Option<KeyKind> {
    let (rest, parsed) = SubjectPublicKeyInfo::from_der(spki).ok()?;
    let curve = || parsed.algorithm.parameters.as_ref()?.as_oid().ok().map(|oid| oid.to_id_string());
    match (rest.is_empty(), parsed.algorithm.algorithm.to_id_string().as_str()) {
        (true, "1.2.840.113549.1.1.1") => Some(KeyKind::Rsa),
        (true, "1.2.840.10045.2.1") => match curve()?.as_str() {
            "1.2.840.10045.3.1.7" => Some(KeyKind::P256),
            "1.3.132.0.34" => Some(KeyKind::P384),
            "1.3.132.0.35" => Some(KeyKind::P521),
            _ => None,
        },
        _ => None,
    }
}

/// The algorithms of JWT-SVID 2.1, each with the kind of key that it needs (RFC 7518 3.1: RSA keys of 2048 bits and more).
fn algorithm(name: &str) -> Option<(KeyKind, &'static dyn VerificationAlgorithm)> {
    Some(match name {
        "ES256" => (KeyKind::P256, &sig::ECDSA_P256_SHA256_FIXED),
        "ES384" => (KeyKind::P384, &sig::ECDSA_P384_SHA384_FIXED),
        "ES512" => (KeyKind::P521, &sig::ECDSA_P521_SHA512_FIXED),
        "RS256" => (KeyKind::Rsa, &sig::RSA_PKCS1_2048_8192_SHA256),
        "RS384" => (KeyKind::Rsa, &sig::RSA_PKCS1_2048_8192_SHA384),
        "RS512" => (KeyKind::Rsa, &sig::RSA_PKCS1_2048_8192_SHA512),
        "PS256" => (KeyKind::Rsa, &sig::RSA_PSS_2048_8192_SHA256),
        "PS384" => (KeyKind::Rsa, &sig::RSA_PSS_2048_8192_SHA384),
        "PS512" => (KeyKind::Rsa, &sig::RSA_PSS_2048_8192_SHA512),
        _ => return None,
    })
}

fn malformed(expected: &str, found: impl Into<String>) -> Refusal {
    Refusal::new(Code::JwtMalformed, expected, found)
}
fn untrusted(expected: &str, found: impl Into<String>) -> Refusal {
    Refusal::new(Code::JwtUntrusted, expected, found)
}

/// Verifies a token that somebody presents to `audience`, at `now`.
///
/// # Errors
/// [`Code::JwtMalformed`] for what is no JWT-SVID, [`Code::TrustDomainUnknown`], [`Code::JwtUntrusted`] for a key, a
/// signature or a time that does not hold, [`Code::JwtAudience`] for a token for others.
pub fn verify_jwt(token: &str, audience: &str, trust: &JwtTrust, now: Stamp) -> Result<JwtSvid, Refusal> {
    let parts = Parts::of(token)?;
    let header = Header::parse(&parts.header)?;
    let claims = object("claims", &parts.claims)?;
    let id = subject(&claims)?;
    let recipients = recipients(&claims)?;
    let not_after = date(&claims, "exp")?.ok_or_else(|| malformed("exp (JWT-SVID 3.3)", "none"))?;
    let not_before = date(&claims, "nbf")?;
    let key = trust.keys.get(&id.trust_domain()).ok_or_else(|| {
        Refusal::new(Code::TrustDomainUnknown, "a trust domain with a bundle here", id.trust_domain().as_str())
    })?;
    let key = key.get(&header.kid).ok_or_else(|| {
        untrusted("a key of the trust domain's bundle", shown(&format!("kid {} of {}", header.kid, id.trust_domain())))
    })?;
    if key.not_after < now {
        return Err(untrusted("a key in time", format!("one that ended at {} ms", key.not_after.0)));
    }
    if key.kind != header.kind {
        return Err(untrusted("an algorithm of the key's kind", format!("{} for a {:?} key", header.name, key.kind)));
    }
    UnparsedPublicKey::new(header.algorithm, &key.spki)
        .verify(parts.signed.as_bytes(), &parts.signature)
        .map_err(|_| untrusted("a signature that verifies", "another"))?;
    if not_after <= now {
        return Err(untrusted("a token in time", format!("one that ended at {} ms", not_after.0)));
    }
    if not_before.is_some_and(|from| from > now) {
        return Err(untrusted("a token in time", "one that begins later (nbf)"));
    }
    if !recipients.iter().any(|one| one == audience) {
        return Err(Refusal::new(Code::JwtAudience, shown(audience), shown(&recipients.join(", "))));
    }
    Ok(JwtSvid { id, audience: recipients, kid: header.kid, not_after, claims })
}

/// The compact serialisation, taken apart (RFC 7515 3.1, 7.1).
struct Parts<'a> {
    signed: &'a str,
    header: Vec<u8>,
    claims: Vec<u8>,
    signature: Vec<u8>,
}

impl<'a> Parts<'a> {
    fn of(token: &'a str) -> Result<Parts<'a>, Refusal> {
        if token.len() > TOKEN_BYTES_MAX {
            let expected = format!("a token of at most {TOKEN_BYTES_MAX} bytes");
            return Err(malformed(&expected, token.len().to_string()));
        }
        let three = || malformed("three parts (a compact JWS)", format!("{}", token.split('.').count()));
        let (signed, signature) = token.rsplit_once('.').ok_or_else(three)?;
        let (header, claims) = signed.split_once('.').filter(|(_, claims)| !claims.contains('.')).ok_or_else(three)?;
        // Without padding, and no bit that does not count: one token is one text.
        let decode = |part: &str, text: &str| {
            let bytes =
                URL_SAFE_NO_PAD.decode(text).map_err(|e| malformed("base64url without padding", e.to_string()))?;
            if bytes.is_empty() { Err(malformed(part, "nothing")) } else { Ok(bytes) }
        };
        Ok(Parts {
            signed,
            header: decode("a header", header)?,
            claims: decode("claims", claims)?,
            signature: decode("a signature", signature)?,
        })
    }
}

struct Header {
    name: String,
    kind: KeyKind,
    algorithm: &'static dyn VerificationAlgorithm,
    kid: String,
}

impl Header {
    fn parse(bytes: &[u8]) -> Result<Header, Refusal> {
        let header = object("header", bytes)?;
        // JWT-SVID 2: no header beside these. What is ignored here, another reader may heed.
        if let Some(other) = header.keys().find(|name| !matches!(name.as_str(), "alg" | "kid" | "typ")) {
            return Err(malformed("no header but alg, kid and typ", shown(other)));
        }
        let text = |name: &str| match header.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.as_str())),
            Some(other) => Err(malformed(&format!("a text {name}"), shown(&other.to_string()))),
        };
        const ALG: &str = "alg RS, ES or PS with 256, 384 or 512 (JWT-SVID 2.1)";
        let name = text("alg")?.ok_or_else(|| malformed(ALG, "none"))?;
        let (kind, algorithm) = algorithm(name).ok_or_else(|| malformed(ALG, shown(name)))?;
        if let Some(typ) = text("typ")?.filter(|typ| !matches!(*typ, "JWT" | "JOSE")) {
            return Err(malformed("typ JWT or JOSE, if any (JWT-SVID 2.3)", shown(typ)));
        }
        let kid = text("kid")?.filter(|kid| !kid.is_empty()).ok_or_else(|| malformed("a kid", "none"))?;
        Ok(Header { name: name.to_owned(), kind, algorithm, kid: kid.to_owned() })
    }
}

fn object(what: &str, bytes: &[u8]) -> Result<Map<String, Value>, Refusal> {
    once(bytes).map_err(|e| malformed(&format!("{what} as one JSON object, each name once"), e.to_string()))
}

fn subject(claims: &Map<String, Value>) -> Result<SpiffeId, Refusal> {
    const SUB: &str = "sub, the SPIFFE ID of a workload (JWT-SVID 3.1)";
    let sub = claims.get("sub").and_then(Value::as_str).ok_or_else(|| malformed(SUB, "none"))?;
    sub.parse().map_err(|_| malformed(SUB, shown(sub)))
}

fn recipients(claims: &Map<String, Value>) -> Result<Vec<String>, Refusal> {
    const AUD: &str = "aud with at least one recipient (JWT-SVID 3.2)";
    let of = |value: &Value| match value.as_str() {
        Some(text) if !text.is_empty() => Ok(text.to_owned()),
        _ => Err(malformed(AUD, shown(&value.to_string()))),
    };
    match claims.get("aud") {
        Some(Value::Array(all)) if !all.is_empty() => all.iter().map(of).collect(),
        Some(one @ Value::String(_)) => Ok(vec![of(one)?]),
        Some(other) => Err(malformed(AUD, shown(&other.to_string()))),
        None => Err(malformed(AUD, "none")),
    }
}

/// A NumericDate (RFC 7519 2): seconds, perhaps with a fraction.
fn date(claims: &Map<String, Value>, name: &str) -> Result<Option<Stamp>, Refusal> {
    let Some(value) = claims.get(name) else { return Ok(None) };
    let seconds = value.as_f64().filter(|s| (0.0..=DATE_S_MAX).contains(s));
    let seconds = seconds.ok_or_else(|| malformed(&format!("{name} in seconds"), shown(&value.to_string())))?;
    // Whole seconds as they are: a float of milliseconds would round.
    let ms = value.as_u64().map_or((seconds * 1000.0) as u64, |s| s.saturating_mul(1000));
    Ok(Some(Stamp(ms)))
}

/// A stranger's text, for people.
fn shown(text: &str) -> String {
    text.chars().take(200).flat_map(char::escape_default).collect()
}
