//! `ambit svid verify` of a JWT-SVID, without a cell.

use super::{instant, read_bytes, refused, shown};
use crate::args::{BundleFile, SvidVerify};
use crate::output::{Answer, Form};
use crate::when::utc;
use ambit_identity::{JwtSvid, JwtTrust, bundle, verify_jwt};
use ambit_model::{Code, JwtAuthority, Refusal, Stamp, TrustDomain};
use serde_json::json;
use std::collections::BTreeSet;

/// The token that a file holds: one line of the characters of a compact JWS, which no certificate is.
pub(super) fn of(bytes: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(bytes).ok()?.trim_end_matches(['\n', '\r']);
    let compact = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'=' | b'+' | b'/');
    (text.contains('.') && text.bytes().all(compact)).then(|| text.to_owned())
}

pub(super) fn verify(form: Form, options: &SvidVerify, token: &str) -> Result<Answer, Refusal> {
    let audience = options
        .audience
        .as_ref()
        .ok_or_else(|| Refusal::new(Code::BadRequest, "--audience: to whom the token is presented", "none"))?;
    let at = instant(options)?;
    let (mut trust, mut domains) = (JwtTrust::default(), BTreeSet::new());
    let alone = options.bundles.len() == 1;
    for given in &options.bundles {
        for (td, keys) in keys(given, alone, options.trust_domain.as_ref())? {
            trust.put(&td, &keys)?;
            if !domains.insert(td.clone()) {
                return Err(Refusal::new(Code::BadRequest, "one bundle a trust domain", format!("two of {td}")));
            }
        }
    }
    let wanted = |svid: JwtSvid| match &options.trust_domain {
        Some(td) if svid.id().trust_domain() != *td => {
            Err(Refusal::new(Code::JwtUntrusted, format!("an identity of {td}"), svid.id().as_str()))
        }
        _ => Ok(svid),
    };
    Ok(match verify_jwt(token, audience, &trust, Stamp(at)).and_then(wanted) {
        Ok(svid) => valid(form, &svid, at),
        Err(refusal) => refused(form, 0, &refusal, &domains.into_iter().collect::<Vec<_>>()),
    })
}

/// A bundle document or a map of them. Roots in PEM hold no keys of tokens.
fn keys(
    given: &BundleFile,
    alone: bool,
    named: Option<&TrustDomain>,
) -> Result<Vec<(TrustDomain, Vec<JwtAuthority>)>, Refusal> {
    let text = String::from_utf8(read_bytes(&given.file)?)
        .map_err(|_| Refusal::new(Code::BundleMalformed, "JSON", given.file.display().to_string()))?;
    if bundle::is_map(&text) {
        return Ok(bundle::jwt_authorities_of_map(&text)?.into_iter().collect());
    }
    let td = given.trust_domain.clone().or_else(|| named.filter(|_| alone).cloned()).ok_or_else(|| {
        let expected = "the bundle's trust domain: --bundle TD=FILE, or --trust-domain where it is the only bundle";
        Refusal::new(Code::BadRequest, expected, format!("none for {}", given.file.display()))
    })?;
    Ok(vec![(td, bundle::jwt_authorities(&text)?)])
}

fn valid(form: Form, svid: &JwtSvid, at: u64) -> Answer {
    let (id, until) = (svid.id().as_str(), utc(svid.not_after().0));
    let value = json!({
        "verdict": "valid",
        "code": null,
        "expected": null,
        "found": null,
        "id": id,
        "trust_domain": svid.id().trust_domain().as_str(),
        "kid": svid.kid(),
        "audience": svid.audience(),
        "not_after": until,
        "at": utc(at),
    });
    Answer::ok(shown(form, &value, || {
        format!("valid: {id}\n  until: {until}\n  for:   {}", svid.audience().join(", "))
    }))
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_token_is_told_from_certificates() {
        for (text, is) in [
            ("eyJh.eyJi.c2ln\n", true),
            ("eyJh.eyJi.c2ln==", true),
            ("a.b", true),
            ("-----BEGIN CERTIFICATE-----\nAAAA\n", false),
            ("AAAA", false),
            ("{\"a\": 1.5}", false),
            ("", false),
        ] {
            assert_eq!(super::of(text.as_bytes()).is_some(), is, "{text}");
        }
        assert!(super::of(&[0x30, 0x82, 0x01]).is_none());
    }
}
