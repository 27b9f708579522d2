//! What the SPIFFE standard says of a certificate, rule by rule (X509-SVID.md, SPIFFE-ID.md, RFC 5280). The verifier
//! refuses by the first rule that MUST hold and does not; `ambit svid lint` tells all of them.

use ambit_model::{Code, Refusal, SpiffeId, TrustDomain};
use std::fmt;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate, X509Version};

/// Marks a downstream authority: a signing certificate that was given away, to a cluster's own issuer. DER NULL, not
/// critical, so that whoever knows nothing of it still verifies what is under it; the root's signature covers it. Whoever
/// holds such a key is none of us: it names no member of the cell and binds nothing to a node ([`beyond`]). The arc is
/// private and not registered, as that of the node binding ([`crate::authority::NODE_BINDING_OID`]).
pub const DOWNSTREAM_OID: &[u64] = &[1, 3, 6, 1, 4, 1, 61999, 1, 2];
/// As text, for parsers.
pub const DOWNSTREAM_OID_TEXT: &str = "1.3.6.1.4.1.61999.1.2";
/// Marks a standby's intermediate: UTF8String, the trust domain of who holds it. Signed by the root of the home in peace, and
/// believed by us under a verified live grant only. Not critical, so that whoever knows nothing of grants verifies what is
/// issued when it is needed. The arc is as above.
pub const STANDBY_OID: &[u64] = &[1, 3, 6, 1, 4, 1, 61999, 1, 3];
/// As text, for parsers.
pub const STANDBY_OID_TEXT: &str = "1.3.6.1.4.1.61999.1.3";
/// Of an element in DER.
const UTF8_STRING: u8 = 0x0c;
/// Below it are the cell's own identities: replicas, nodes, administrators.
const OWN_PATH: &str = "/ambit/";

/// One rule that does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// A stable name.
    pub rule: &'static str,
    /// Where the standard says it.
    pub section: &'static str,
    /// Whether the rule must hold, or only should.
    pub must: bool,
    /// What the rule wants.
    pub expected: &'static str,
    /// What the certificate has.
    pub found: String,
}

/// What a certificate is judged as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An X.509-SVID of a workload or node.
    Leaf,
    /// A signing certificate: a root or an intermediate.
    Authority,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Leaf => "leaf",
            Kind::Authority => "authority",
        })
    }
}

/// Which kind a certificate is, by its basic constraints alone.
pub fn kind_of(cert: &X509Certificate<'_>) -> Kind {
    match cert.basic_constraints() {
        Ok(Some(constraints)) if constraints.value.ca => Kind::Authority,
        _ => Kind::Leaf,
    }
}

/// One certificate and nothing after it.
pub(crate) fn parse(der: &[u8]) -> Result<X509Certificate<'_>, String> {
    let (rest, cert) = X509Certificate::from_der(der).map_err(|e| e.to_string())?;
    if rest.is_empty() { Ok(cert) } else { Err(format!("{} bytes after it", rest.len())) }
}

/// The certificate of these bytes.
///
/// # Errors
/// [`Code::SvidMalformed`] for bytes that are none, or more than one.
pub fn certificate(der: &[u8]) -> Result<X509Certificate<'_>, Refusal> {
    parse(der).map_err(|found| Refusal::new(Code::SvidMalformed, "a certificate", found))
}

/// Every rule for this kind that the certificate breaks; those that must hold first.
pub fn judge(cert: &X509Certificate<'_>, kind: Kind) -> Vec<Finding> {
    let mut out = Vec::new();
    shape(cert, &mut out);
    match kind {
        Kind::Leaf => leaf(cert, &mut out),
        Kind::Authority => authority(cert, &mut out),
    }
    out.sort_by_key(|finding| !finding.must);
    out
}

/// The SPIFFE ID of a leaf that breaks no rule.
pub(crate) fn leaf_id(cert: &X509Certificate<'_>) -> Option<SpiffeId> {
    match uris(cert)?.as_slice() {
        [one] => one.parse().ok(),
        _ => None,
    }
}

/// The trust domain that a signing certificate names for itself: a SPIFFE ID without a path.
pub fn authority_domain(cert: &X509Certificate<'_>) -> Option<TrustDomain> {
    match uris(cert)?.as_slice() {
        [one] => one.strip_prefix("spiffe://")?.parse().ok(),
        _ => None,
    }
}

/// Whether a signing certificate is a downstream authority's. Whatever the extension holds, it is none of our own.
pub fn is_downstream(cert: &X509Certificate<'_>) -> bool {
    has(cert, DOWNSTREAM_OID_TEXT)
}

/// Who holds a signing certificate as a standby; none where it is no standby's.
///
/// # Errors
/// What was found, where the mark is there and cannot be read, or is there twice: it marks a standby's all the same.
pub fn standby_of(cert: &X509Certificate<'_>) -> Result<Option<TrustDomain>, String> {
    let mut marks = cert.extensions().iter().filter(|extension| extension.oid.to_id_string() == STANDBY_OID_TEXT);
    let Some(mark) = marks.next() else { return Ok(None) };
    let text = match mark.value {
        [UTF8_STRING, length, text @ ..] if usize::from(*length) == text.len() && text.len() < 0x80 => text,
        _ => return Err("an unreadable standby mark".to_owned()),
    };
    let holder = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok());
    let holder = holder.ok_or_else(|| "a standby mark without a trust domain".to_owned())?;
    if marks.next().is_some() { Err("two standby marks".to_owned()) } else { Ok(Some(holder)) }
}

/// The mark of a standby's intermediate, DER.
///
/// # Errors
/// [`Code::BadRequest`] for a trust domain that is too long for it.
pub(crate) fn standby_mark(holder: &TrustDomain) -> Result<Vec<u8>, Refusal> {
    let text = holder.as_str().as_bytes();
    let length = u8::try_from(text.len()).ok().filter(|length| *length < 0x80);
    let length = length.ok_or_else(|| {
        Refusal::new(Code::BadRequest, "a standby whose trust domain has at most 127 characters", holder.as_str())
    })?;
    Ok([&[UTF8_STRING, length], text].concat())
}

/// What a leaf under a downstream authority says that only the cell itself may: that it is a replica, a node or an
/// administrator, or that it was issued through a node.
pub fn beyond(leaf: &X509Certificate<'_>) -> Option<Finding> {
    const OWN: Finding =
        rule("downstream-own-id", "Ambit downstream", true, "no identity below /ambit/ under a downstream authority");
    const BOUND: Finding =
        rule("downstream-node-binding", "Ambit downstream", true, "no node binding under a downstream authority");
    let own = uris(leaf).unwrap_or_default().into_iter().filter_map(|uri| uri.parse::<SpiffeId>().ok());
    if let Some(id) = own.into_iter().find(|id| id.path().starts_with(OWN_PATH)) {
        return Some(Finding { found: id.to_string(), ..OWN });
    }
    let bound = has(leaf, crate::authority::NODE_BINDING_OID_TEXT);
    bound.then(|| Finding { found: "a node binding".into(), ..BOUND })
}

fn has(cert: &X509Certificate<'_>, oid: &str) -> bool {
    cert.extensions().iter().any(|extension| extension.oid.to_id_string() == oid)
}

fn uris<'a>(cert: &'a X509Certificate<'_>) -> Option<Vec<&'a str>> {
    let san = cert.subject_alternative_name().ok()??;
    let uri = |name: &'a GeneralName<'_>| if let GeneralName::URI(uri) = name { Some(*uri) } else { None };
    Some(san.value.general_names.iter().filter_map(uri).collect())
}

const fn rule(rule: &'static str, section: &'static str, must: bool, expected: &'static str) -> Finding {
    Finding { rule, section, must, expected, found: String::new() }
}

/// What RFC 5280 wants of any of them.
fn shape(cert: &X509Certificate<'_>, out: &mut Vec<Finding>) {
    const VERSION: Finding = rule("x509-v3", "RFC 5280 4.1.2.1", true, "X.509 version 3");
    const VALIDITY: Finding = rule("validity-in-order", "RFC 5280 4.1.2.5", true, "notBefore before notAfter");
    const ONCE: Finding = rule("extensions-once", "RFC 5280 4.2", true, "each extension once, each readable");
    const SAN_CRITICAL: Finding =
        rule("san-critical", "RFC 5280 4.2.1.6", true, "a critical SAN where the subject is empty");
    const SAN_PLAIN: Finding =
        rule("san-not-critical", "RFC 5280 4.2.1.6", false, "a SAN that is not critical where there is a subject");
    if cert.version() != X509Version::V3 {
        out.push(Finding { found: format!("version {}", cert.version().0.saturating_add(1)), ..VERSION });
    }
    let validity = cert.validity();
    if validity.not_before >= validity.not_after {
        out.push(Finding { found: format!("{} and {}", validity.not_before, validity.not_after), ..VALIDITY });
    }
    match cert.extensions_map() {
        Err(e) => out.push(Finding { found: e.to_string(), ..ONCE }),
        Ok(_) => {
            let broken = cert.extensions().iter().find(|e| e.parsed_extension().error().is_some());
            out.extend(broken.map(|e| Finding { found: format!("unreadable {}", e.oid), ..ONCE }));
        }
    }
    if let Ok(Some(san)) = cert.subject_alternative_name() {
        match (cert.subject().iter().next().is_none(), san.critical) {
            (true, false) => out.push(Finding { found: "empty subject, SAN not critical".into(), ..SAN_CRITICAL }),
            (false, true) => out.push(Finding { found: format!("subject {}", cert.subject()), ..SAN_PLAIN }),
            _ => {}
        }
    }
}

fn leaf(cert: &X509Certificate<'_>, out: &mut Vec<Finding>) {
    const ONE_URI: Finding = rule("one-uri-san", "X509-SVID 2", true, "exactly one URI SAN, a SPIFFE ID with a path");
    const NAMES: Finding = rule("readable-sans", "RFC 5280 4.2.1.6", true, "readable names in the SAN");
    const ID: Finding = rule("spiffe-id", "SPIFFE-ID 2, X509-SVID 4.1", true, "a SPIFFE ID with a path");
    const NO_CA: Finding = rule("leaf-not-ca", "X509-SVID 4.1", true, "cA=false");
    const EKU: Finding =
        rule("leaf-eku", "X509-SVID 4.4", true, "both serverAuth and clientAuth in the ExtendedKeyUsage");
    const NO_EKU: Finding =
        rule("leaf-has-eku", "X509-SVID 4.4", false, "an ExtendedKeyUsage with serverAuth and clientAuth");
    if let Err(e) = cert.subject_alternative_name() {
        out.push(Finding { found: e.to_string(), ..NAMES });
    }
    match uris(cert).unwrap_or_default().as_slice() {
        [one] => {
            if let Err(refusal) = one.parse::<SpiffeId>() {
                out.push(Finding { found: format!("{}: expected {}", shown(one), refusal.expected), ..ID });
            }
        }
        many => out.push(Finding { found: format!("{} URI SANs", many.len()), ..ONE_URI }),
    }
    if cert.basic_constraints().ok().flatten().is_some_and(|b| b.value.ca) {
        out.push(Finding { found: "cA=true".into(), ..NO_CA });
    }
    leaf_key_usage(cert, out);
    match cert.extended_key_usage() {
        Ok(None) => out.push(Finding { found: "none".into(), ..NO_EKU }),
        Ok(Some(eku)) if eku.value.server_auth && eku.value.client_auth => {}
        Ok(Some(_)) => out.push(Finding { found: "another ExtendedKeyUsage".into(), ..EKU }),
        Err(e) => out.push(Finding { found: e.to_string(), ..EKU }),
    }
}

fn leaf_key_usage(cert: &X509Certificate<'_>, out: &mut Vec<Finding>) {
    const PRESENT: Finding = rule("key-usage", "X509-SVID 4.3", true, "a critical KeyUsage");
    const SIGNS: Finding = rule("leaf-signs", "X509-SVID 4.3", true, "KeyUsage digitalSignature");
    const NO_MORE: Finding =
        rule("leaf-signs-no-more", "X509-SVID 4.3", true, "KeyUsage without keyCertSign and cRLSign");
    let Ok(Some(usage)) = cert.key_usage() else {
        out.push(Finding { found: "none".into(), ..PRESENT });
        return;
    };
    if !usage.critical {
        out.push(Finding { found: "one that is not critical".into(), ..PRESENT });
    }
    if !usage.value.digital_signature() {
        out.push(Finding { found: usage.value.to_string(), ..SIGNS });
    }
    if usage.value.key_cert_sign() || usage.value.crl_sign() {
        out.push(Finding { found: usage.value.to_string(), ..NO_MORE });
    }
}

fn authority(cert: &X509Certificate<'_>, out: &mut Vec<Finding>) {
    const CA: Finding = rule("authority-is-ca", "X509-SVID 4.1", true, "cA=true in a critical BasicConstraints");
    const SIGNS: Finding = rule("authority-signs", "X509-SVID 4.3", true, "a critical KeyUsage with keyCertSign");
    const ID: Finding = rule("authority-id", "X509-SVID 2", true, "at most one URI SAN, a SPIFFE ID without a path");
    const NO_ID: Finding = rule("authority-has-id", "X509-SVID 2", false, "a SPIFFE ID without a path");
    match cert.basic_constraints() {
        Ok(Some(constraints)) if constraints.value.ca && constraints.critical => {}
        Ok(Some(c)) => out.push(Finding { found: format!("cA={}, critical={}", c.value.ca, c.critical), ..CA }),
        Ok(None) => out.push(Finding { found: "none".into(), ..CA }),
        Err(e) => out.push(Finding { found: e.to_string(), ..CA }),
    }
    const LAST: Finding = rule("downstream-last", "Ambit downstream", true, "pathLen 0 in a downstream authority");
    if is_downstream(cert) {
        let length = cert.basic_constraints().ok().flatten().and_then(|b| b.value.path_len_constraint);
        if length != Some(0) {
            let found = length.map_or_else(|| "none".to_owned(), |n| format!("pathLen {n}"));
            out.push(Finding { found, ..LAST });
        }
    }
    match cert.key_usage() {
        Ok(Some(usage)) if usage.critical && usage.value.key_cert_sign() => {}
        Ok(Some(usage)) => {
            out.push(Finding { found: format!("{}, critical={}", usage.value, usage.critical), ..SIGNS })
        }
        _ => out.push(Finding { found: "none".into(), ..SIGNS }),
    }
    match uris(cert).unwrap_or_default().as_slice() {
        [] => out.push(Finding { found: "none".into(), ..NO_ID }),
        [_] if authority_domain(cert).is_some() => {}
        [one] => out.push(Finding { found: shown(one), ..ID }),
        many => out.push(Finding { found: format!("{} URI SANs", many.len()), ..ID }),
    }
}

/// A URI from a stranger, for people.
fn shown(uri: &str) -> String {
    let mut text: String = uri.chars().take(200).flat_map(char::escape_default).collect();
    if uri.len() > 200 {
        text.push_str(&format!("... ({} bytes)", uri.len()));
    }
    text
}
