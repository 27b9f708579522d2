//! One certificate of somebody else's CA, judged as a signing certificate of SPIFFE (X509-SVID.md section 4) and as what
//! the verifiers that we know take.

use super::{CERTIFICATE_BYTES_MAX, wrong};
use ambit_model::{Lifetime, Refusal, Stamp, TrustDomain};
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA384_ASN1, ECDSA_P384_SHA256_ASN1, ECDSA_P384_SHA384_ASN1,
    RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_2048_8192_SHA512, UnparsedPublicKey,
    VerificationAlgorithm,
};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use x509_parser::asn1_rs::{Any, Tag};
use x509_parser::extensions::{AuthorityKeyIdentifier, GeneralName, ParsedExtension};
use x509_parser::prelude::{FromDer, X509Certificate, X509Version};
use x509_parser::public_key::PublicKey;

/// Below the private arc of Ambit: what marks our own leaves and downstream authorities is for no outside CA to say.
const OWN_ARC: &str = "1.3.6.1.4.1.61999.";
const KEY_USAGE: &str = "2.5.29.15";
const ALT_NAME: &str = "2.5.29.17";
const BASIC_CONSTRAINTS: &str = "2.5.29.19";
const NAME_CONSTRAINTS: &str = "2.5.29.30";
const EXTENDED_KEY_USAGE: &str = "2.5.29.37";
/// What our verifier reads where it is critical; it refuses any other (RFC 5280 section 4.2).
const READ: [&str; 4] = [KEY_USAGE, ALT_NAME, BASIC_CONSTRAINTS, EXTENDED_KEY_USAGE];
/// Whoever makes our certificates anew keeps a pathLen in one byte.
const PATH_MAX: u32 = 255;
const P256: &str = "1.2.840.10045.3.1.7";
const P384: &str = "1.3.132.0.34";
const RSA_BITS_MIN: usize = 2048;
const RSA_BITS_MAX: usize = 8192;

pub(super) struct Certificate<'a> {
    /// For refusals: which of them it is.
    what: &'static str,
    der: &'a [u8],
    cert: X509Certificate<'a>,
}

/// What a key can be.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Key {
    P256,
    P384,
    Rsa,
}

impl<'a> Certificate<'a> {
    /// One certificate and nothing after it.
    pub(super) fn read(what: &'static str, der: &'a [u8]) -> Result<Self, Refusal> {
        if der.len() > CERTIFICATE_BYTES_MAX {
            let found = format!("{what} of {} bytes", der.len());
            return Err(wrong(format!("certificates of at most {CERTIFICATE_BYTES_MAX} bytes"), found));
        }
        let bad = |found: String| wrong("a certificate in DER, and nothing after it", format!("{what}: {found}"));
        let (rest, cert) = X509Certificate::from_der(der).map_err(|e| bad(e.to_string()))?;
        if !rest.is_empty() {
            return Err(bad(format!("{} bytes after it", rest.len())));
        }
        Ok(Self { what, der, cert })
    }

    fn rule(&self, holds: bool, expected: &str, found: impl FnOnce() -> String) -> Result<(), Refusal> {
        if holds { Ok(()) } else { Err(wrong(expected, format!("{}: {}", self.what, found()))) }
    }

    pub(super) fn spki(&self) -> &[u8] {
        self.cert.public_key().raw
    }
    pub(super) fn key_hash(&self) -> [u8; 32] {
        Sha256::digest(self.spki()).into()
    }
    pub(super) fn lifetime(&self) -> Lifetime {
        let stamp = |s: i64| Stamp(u64::try_from(s).unwrap_or(0).saturating_mul(1000));
        let validity = self.cert.validity();
        Lifetime {
            not_before: stamp(validity.not_before.timestamp()),
            not_after: stamp(validity.not_after.timestamp()),
        }
    }

    /// A signing certificate under which `below` more of them may be.
    pub(super) fn is_authority(&self, td: &TrustDomain, below: usize) -> Result<(), Refusal> {
        let cert = &self.cert;
        self.rule(cert.version() == X509Version::V3, "X.509 version 3", || cert.version().to_string())?;
        let Lifetime { not_before, not_after } = self.lifetime();
        self.rule(not_before < not_after, "notBefore before notAfter", || "another order".to_owned())?;
        self.extensions()?;
        let unique = cert.issuer_uid.is_some() || cert.subject_uid.is_some();
        self.rule(!unique, "no unique identifiers (RFC 5280 4.1.2.8)", || "some".to_owned())?;
        let basic = cert.basic_constraints().ok().flatten();
        let found = || basic.as_ref().map_or("none".to_owned(), |b| format!("cA={}", b.value.ca));
        let ca = basic.as_ref().is_some_and(|b| b.value.ca && b.critical);
        self.rule(ca, "cA=true in a critical BasicConstraints (X509-SVID 4.1)", found)?;
        let length = basic.as_ref().and_then(|b| b.value.path_len_constraint);
        let room = length.is_none_or(|n| n <= PATH_MAX && usize::try_from(n).is_ok_and(|n| n >= below));
        let expected = format!("no pathLen, or one of {below} or more, up to {PATH_MAX}");
        self.rule(room, &expected, || format!("pathLen {}", length.unwrap_or_default()))?;
        let usage = cert.key_usage().ok().flatten();
        let signs = usage.as_ref().is_some_and(|u| u.critical && u.value.key_cert_sign());
        let found = || usage.as_ref().map_or("none".to_owned(), |u| format!("{}, critical={}", u.value, u.critical));
        self.rule(signs, "a critical KeyUsage with keyCertSign (X509-SVID 4.3)", found)?;
        let extended = cert.extended_key_usage().ok().flatten();
        // `any` is no word for either: webpki does not take it for them in what is below an anchor.
        let both = extended.as_ref().is_none_or(|e| e.value.server_auth && e.value.client_auth);
        let expected = "no ExtendedKeyUsage, or one with serverAuth and clientAuth";
        self.rule(both, expected, || "another, which holds for all that is under it".to_owned())?;
        self.rule(cert.subject().iter().next().is_some(), "a subject (RFC 5280 4.1.2.6)", || "none".to_owned())?;
        self.names(td)?;
        self.key().map(drop)
    }

    /// Each once, each readable, none critical that is not read, none that narrows names.
    fn extensions(&self) -> Result<(), Refusal> {
        let mut seen = BTreeSet::new();
        for extension in self.cert.extensions() {
            let oid = extension.oid.to_id_string();
            self.rule(seen.insert(oid.clone()), "each extension once (RFC 5280 4.2)", || format!("{oid} twice"))?;
            let readable = extension.parsed_extension().error().is_none();
            self.rule(readable, "readable extensions", || format!("another {oid}"))?;
            let known = !extension.critical || READ.contains(&oid.as_str());
            self.rule(known, "no critical extension that verifiers do not read", || oid.clone())?;
            // webpki refuses every URI under them, whatever they say.
            self.rule(oid != NAME_CONSTRAINTS, "no name constraints", || "some".to_owned())?;
            self.rule(!oid.starts_with(OWN_ARC), "no extension of Ambit's own", || oid.clone())?;
        }
        Ok(())
    }

    /// At most one URI, which names this trust domain: any other is refused wherever the certificate is shown. The standard says
    /// SHOULD, and cfssl for one drops all names of a CA certificate.
    fn names(&self, td: &TrustDomain) -> Result<(), Refusal> {
        let own = format!("spiffe://{td}");
        let uris = self.uris();
        let good = uris.iter().all(|uri| *uri == own) && uris.len() <= 1;
        self.rule(good, &format!("no URI but {own} (X509-SVID 2)"), || format!("{:.200}", uris.join(", ")))
    }

    fn uris(&self) -> Vec<&str> {
        let san = self.cert.subject_alternative_name().ok().flatten();
        let names = san.map(|san| &san.value.general_names);
        let uri = |name: &'_ GeneralName<'_>| matches!(name, GeneralName::URI(_));
        let all = names.into_iter().flatten().filter(|name| uri(name));
        all.filter_map(|name| if let GeneralName::URI(uri) = name { Some(*uri) } else { None }).collect()
    }

    /// What the authority itself must say besides: a key of the kind that a cell makes, under names that its own certificates
    /// can repeat.
    pub(super) fn is_own(&self) -> Result<(), Refusal> {
        let crl = self.cert.key_usage().ok().flatten().is_some_and(|usage| usage.value.crl_sign());
        self.rule(crl, "KeyUsage with keyCertSign and cRLSign", || "no cRLSign".to_owned())?;
        self.rule(self.key()? == Key::P256, "a P-256 key", || "another".to_owned())?;
        self.rule(self.key_id().is_some(), "a subject key identifier (RFC 5280 4.2.1.2)", || "none".to_owned())?;
        let mut types = BTreeSet::new();
        for set in self.cert.subject().iter() {
            let plain = |tag| matches!(tag, Tag::Utf8String | Tag::PrintableString | Tag::Ia5String);
            let (mut values, mut simple) = (0, true);
            for value in set.iter() {
                values += 1;
                let once = types.insert(value.attr_type().to_id_string());
                simple &= once && plain(value.attr_value().header.tag()) && writable(value.attr_value());
            }
            let expected =
                "a subject of single attributes, each type once, as UTF8, Printable or IA5 strings of their alphabets";
            self.rule(simple && values == 1, expected, || self.cert.subject().to_string())?;
        }
        Ok(())
    }

    fn key_id(&self) -> Option<&[u8]> {
        let mut all = self.cert.extensions().iter().map(|e| e.parsed_extension());
        all.find_map(|e| if let ParsedExtension::SubjectKeyIdentifier(id) = e { Some(id.0) } else { None })
    }

    fn issuer_key(&self) -> Option<&AuthorityKeyIdentifier<'_>> {
        let mut all = self.cert.extensions().iter().map(|e| e.parsed_extension());
        all.find_map(|e| if let ParsedExtension::AuthorityKeyIdentifier(aki) = e { Some(aki) } else { None })
    }

    /// What follows that which is signed.
    fn beside(&self) -> Option<&[u8]> {
        let head = match self.der.get(1)? {
            0x81 => 3,
            0x82 => 4,
            _ => return None,
        };
        self.der.get(head + self.cert.tbs_certificate.as_ref().len()..)
    }

    fn key(&self) -> Result<Key, Refusal> {
        let public = self.cert.public_key();
        let curve = public.algorithm.parameters.as_ref().and_then(|p| p.as_oid().ok()).map(|oid| oid.to_id_string());
        let kind = match (public.parsed(), curve.as_deref()) {
            (Ok(PublicKey::EC(_)), Some(P256)) => Some(Key::P256),
            (Ok(PublicKey::EC(_)), Some(P384)) => Some(Key::P384),
            (Ok(PublicKey::RSA(rsa)), _) if (RSA_BITS_MIN..=RSA_BITS_MAX).contains(&rsa.key_size()) => Some(Key::Rsa),
            _ => None,
        };
        kind.ok_or_else(|| {
            let found = format!("{}: a key of {}", self.what, public.algorithm.algorithm.to_id_string());
            wrong(format!("a key on P-256 or P-384, or RSA of {RSA_BITS_MIN}-{RSA_BITS_MAX} bits"), found)
        })
    }

    /// By name, by key identifier where both have one, and by signature.
    pub(super) fn is_signed_by(&self, above: &Certificate<'_>) -> Result<(), Refusal> {
        let (own, theirs) = (self.cert.issuer(), above.cert.subject());
        let expected = format!("the issuer {theirs}");
        self.rule(own.as_raw() == theirs.as_raw(), &expected, || format!("issued by {own}"))?;
        let named = self.issuer_key();
        let fits = match (named.and_then(|aki| aki.key_identifier.as_ref()), above.key_id()) {
            (Some(named), Some(has)) => named.0 == has,
            _ => true,
        };
        self.rule(fits, "the key identifier of its issuer", || "another".to_owned())?;
        // OpenSSL finds no issuer where these are another's: those of the certificate above.
        let serial = named.and_then(|aki| aki.authority_cert_serial);
        let fits = serial.is_none_or(|serial| serial == above.cert.raw_serial());
        self.rule(fits, "its issuer's serial number, or none, in the authority key identifier", || {
            "another".to_owned()
        })?;
        let names = named.and_then(|aki| aki.authority_cert_issuer.as_ref());
        let directory = |name: &GeneralName<'_>| match name {
            GeneralName::DirectoryName(name) => Some(name.as_raw() == above.cert.issuer().as_raw()),
            _ => None,
        };
        let fits = names.and_then(|names| names.iter().find_map(directory)).unwrap_or(true);
        self.rule(fits, "its issuer's issuer, or none, in the authority key identifier", || "another".to_owned())?;
        let name = self.cert.signature_algorithm.algorithm.to_id_string();
        let algorithm = algorithm(&name, above.key()?);
        let (algorithm, encoded) = algorithm.ok_or_else(|| {
            let found = format!("{}: {name}", self.what);
            wrong("ECDSA with SHA-256 or SHA-384, or RSA PKCS#1 with SHA-256, -384 or -512", found)
        })?;
        // RFC 5280 4.1.1.2: what is outside says nothing that was not signed, in its one encoding.
        let same = self.cert.signature_algorithm == self.cert.tbs_certificate.signature
            && self.beside().is_some_and(|beside| beside.starts_with(encoded))
            && self.cert.signature_value.unused_bits == 0;
        self.rule(same, "the signature algorithm that was signed", || "another".to_owned())?;
        let (message, signature) = (self.cert.tbs_certificate.as_ref(), &self.cert.signature_value.data);
        // With its algorithm: a bare point would be taken for one of the curve that is tried.
        let signed = UnparsedPublicKey::new(algorithm, above.spki()).verify(message, signature).is_ok();
        self.rule(signed, &format!("the signature of {theirs}"), || "another signature".to_owned())
    }
}

/// Whether the text is of its type's alphabet: what is not is not written anew when a certificate names its issuer.
fn writable(value: &Any<'_>) -> bool {
    let printable = |b: &u8| b.is_ascii_alphanumeric() || b" '()+,-./:=?".contains(b);
    let text = value.data;
    !text.is_empty()
        && match value.header.tag() {
            Tag::PrintableString => text.iter().all(printable),
            Tag::Ia5String => text.is_ascii(),
            _ => std::str::from_utf8(text).is_ok(),
        }
}

/// RFC 5758 3.2: without parameters.
const ECDSA_SHA256: &[u8] = &[0x30, 0x0a, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2];
const ECDSA_SHA384: &[u8] = &[0x30, 0x0a, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 3];
/// RFC 4055 5: with NULL.
const RSA_SHA256: &[u8] = &[0x30, 0x0d, 6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 11, 5, 0];
const RSA_SHA384: &[u8] = &[0x30, 0x0d, 6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 12, 5, 0];
const RSA_SHA512: &[u8] = &[0x30, 0x0d, 6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 13, 5, 0];

/// What verifies it, and its AlgorithmIdentifier.
fn algorithm(oid: &str, key: Key) -> Option<(&'static dyn VerificationAlgorithm, &'static [u8])> {
    Some(match (oid, key) {
        ("1.2.840.10045.4.3.2", Key::P256) => (&ECDSA_P256_SHA256_ASN1, ECDSA_SHA256),
        ("1.2.840.10045.4.3.3", Key::P256) => (&ECDSA_P256_SHA384_ASN1, ECDSA_SHA384),
        ("1.2.840.10045.4.3.2", Key::P384) => (&ECDSA_P384_SHA256_ASN1, ECDSA_SHA256),
        ("1.2.840.10045.4.3.3", Key::P384) => (&ECDSA_P384_SHA384_ASN1, ECDSA_SHA384),
        ("1.2.840.113549.1.1.11", Key::Rsa) => (&RSA_PKCS1_2048_8192_SHA256, RSA_SHA256),
        ("1.2.840.113549.1.1.12", Key::Rsa) => (&RSA_PKCS1_2048_8192_SHA384, RSA_SHA384),
        ("1.2.840.113549.1.1.13", Key::Rsa) => (&RSA_PKCS1_2048_8192_SHA512, RSA_SHA512),
        _ => return None,
    })
}
