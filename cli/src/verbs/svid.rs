//! `ambit svid`: certificates checked to the letter of the SPIFFE standard, without a cell.

mod mint;
mod token;

use super::Session;
use crate::args::{BundleFile, Svid, SvidUsage, SvidVerify};
use crate::exit::Exit;
use crate::output::{Answer, Form, Table, pretty};
use crate::when::{now_ms, parse_utc, utc};
use ambit_identity::bundle::{self, DOCUMENT_BYTES_MAX, Roots};
use ambit_identity::keys::certificates_from_pem;
use ambit_identity::profile::{self, Kind};
use ambit_identity::{PeerSvid, TrustStore, Usage, verify_svid_for};
use ambit_model::bundle::{Bundle, Foreign};
use ambit_model::{Code, Refusal, Stamp, TrustDomain};
use rustls_pki_types::CertificateDer;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

const FILE_BYTES_MAX: u64 = DOCUMENT_BYTES_MAX as u64;

pub(super) async fn run(session: &Session, verb: Svid) -> Result<Answer, Refusal> {
    match verb {
        Svid::Mint(options) => mint::run(session, options).await,
        Svid::Verify(options) => verify(session.form, &options),
        Svid::Lint { file } => lint(session.form, &file),
        Svid::Revoke(what) => super::deny::revoke(session, what).await,
    }
}

fn verify(form: Form, options: &SvidVerify) -> Result<Answer, Refusal> {
    if let Some(token) = token::of(&read_bytes(&options.file)?) {
        return token::verify(form, options, &token);
    }
    if let Some(audience) = &options.audience {
        return Err(Refusal::new(
            Code::BadRequest,
            "a token, where --audience is given",
            format!("{audience} for another file"),
        ));
    }
    let chain = certificates(&options.file)?;
    let (trust, domains) = trust(options)?;
    let at = instant(options)?;
    let usage = match options.usage {
        SvidUsage::Client => Usage::Client,
        SvidUsage::Server => Usage::Server,
    };
    let judged = verify_svid_for(usage, &chain, &trust, Stamp(at)).and_then(|peer| wanted(options, peer));
    Ok(match judged {
        Ok(peer) => valid(form, &chain, &peer, at),
        Err(refusal) => refused(form, chain.len(), &refusal, &domains),
    })
}

fn instant(options: &SvidVerify) -> Result<u64, Refusal> {
    let Some(text) = &options.at else { return Ok(now_ms()) };
    let expected = "a time as 2026-11-23T14:03:26Z";
    parse_utc(text).ok_or_else(|| Refusal::new(Code::BadRequest, expected, text.clone()))
}

/// With `--trust-domain`, an identity of that one.
fn wanted(options: &SvidVerify, peer: PeerSvid) -> Result<PeerSvid, Refusal> {
    match &options.trust_domain {
        Some(td) if peer.id().trust_domain() != *td => {
            Err(Refusal::new(Code::SvidUntrusted, format!("an identity of {td}"), peer.id().as_str()))
        }
        _ => Ok(peer),
    }
}

fn valid(form: Form, chain: &[CertificateDer<'_>], peer: &PeerSvid, at: u64) -> Answer {
    let value = json!({
        "verdict": "valid",
        "code": null,
        "expected": null,
        "found": null,
        "id": peer.id().as_str(),
        "trust_domain": peer.id().trust_domain().as_str(),
        "serial": hex::encode(peer.serial()),
        "authority": peer.authority(),
        "downstream": peer.downstream(),
        "not_after": utc(peer.not_after().0),
        "at": utc(at),
        "certificates": chain.len(),
    });
    let under = if peer.downstream() { "\n  under: a downstream authority" } else { "" };
    let text = || format!("valid: {}\n  until: {}{under}", peer.id().as_str(), utc(peer.not_after().0));
    Answer::ok(shown(form, &value, text))
}

fn refused(form: Form, certificates: usize, refusal: &Refusal, domains: &[TrustDomain]) -> Answer {
    let value = json!({
        "verdict": "refused",
        "code": refusal.code.as_str(),
        "expected": refusal.expected,
        "found": refusal.found,
        "remedy": refusal.code.remedy(),
        "certificates": certificates,
        "bundles": domains.iter().map(TrustDomain::as_str).collect::<Vec<_>>(),
    });
    let text = || {
        let (expected, found) = (&refusal.expected, &refusal.found);
        format!(
            "refused[{}]\n  expected: {expected}\n  found:    {found}\n  try:      {}",
            refusal.code,
            refusal.code.remedy()
        )
    };
    Answer::ok(shown(form, &value, text)).ending(Exit::Denied)
}

/// Every rule that the certificates of a file break, in the standard's own sections.
fn lint(form: Form, file: &Path) -> Result<Answer, Refusal> {
    let chain = certificates(file)?;
    let mut table = Table::new("finding", &["certificate", "kind", "level", "rule", "section", "expected", "found"]);
    let mut broken = false;
    let above = chain.iter().skip(1).map(|der| profile::certificate(der)).collect::<Result<Vec<_>, _>>()?;
    let downstream = above.iter().any(profile::is_downstream);
    for (n, der) in chain.iter().enumerate() {
        let cert = profile::certificate(der)?;
        // The first is the leaf whatever it says of itself, unless it stands alone and is an authority.
        let kind = match n {
            0 if chain.len() > 1 => Kind::Leaf,
            0 => profile::kind_of(&cert),
            _ => Kind::Authority,
        };
        let beyond = if n == 0 && downstream { profile::beyond(&cert) } else { None };
        for finding in profile::judge(&cert, kind).into_iter().chain(beyond) {
            broken |= finding.must;
            let level = if finding.must { "must" } else { "should" };
            table.row(vec![
                json!(n),
                json!(kind.to_string()),
                json!(level),
                json!(finding.rule),
                json!(finding.section),
                json!(finding.expected),
                json!(finding.found),
            ]);
        }
    }
    let exit = if broken { Exit::Denied } else { Exit::Ok };
    Ok(Answer::ok(table.render(form)).ending(exit))
}

/// Certificates of a file, PEM or DER, leaf first.
fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, Refusal> {
    let bytes = read_bytes(file)?;
    match String::from_utf8(bytes) {
        Ok(text) if text.contains("-----BEGIN") => certificates_from_pem(&text),
        Ok(text) => Ok(vec![CertificateDer::from(text.into_bytes())]),
        Err(der) => Ok(vec![CertificateDer::from(der.into_bytes())]),
    }
}

/// The bundles given, each for its own trust domain.
fn trust(options: &SvidVerify) -> Result<(TrustStore, Vec<TrustDomain>), Refusal> {
    let mut roots: BTreeMap<TrustDomain, Vec<Vec<u8>>> = BTreeMap::new();
    let alone = options.bundles.len() == 1;
    for given in &options.bundles {
        for (td, bundle) in bundles(given, alone, options.trust_domain.as_ref())? {
            if roots.insert(td.clone(), bundle).is_some() {
                return Err(Refusal::new(Code::BadRequest, "one bundle a trust domain", format!("two of {td}")));
            }
        }
    }
    let mut store = TrustStore::default();
    for (td, roots) in &roots {
        store.add_foreign(&Bundle::<Foreign>::new(td.clone(), 0, roots.clone()))?;
    }
    Ok((store, roots.into_keys().collect()))
}

/// What one file holds: a bundle map, a bundle, or roots in PEM.
fn bundles(given: &BundleFile, alone: bool, named: Option<&TrustDomain>) -> Result<Vec<(TrustDomain, Roots)>, Refusal> {
    let text = String::from_utf8(read_bytes(&given.file)?)
        .map_err(|_| Refusal::new(Code::BundleMalformed, "JSON or PEM", given.file.display().to_string()))?;
    if bundle::is_map(&text) {
        return Ok(bundle::roots_of_map(&text)?.into_iter().collect());
    }
    let roots: Roots = if text.contains("-----BEGIN") {
        certificates_from_pem(&text)?.iter().map(|der| der.to_vec()).collect()
    } else {
        bundle::roots(&text)?
    };
    let said = |roots: &[Vec<u8>]| {
        let mut said = roots.iter().filter_map(|der| profile::authority_domain(&profile::certificate(der).ok()?));
        let first = said.next()?;
        said.all(|other| other == first).then_some(first)
    };
    // A document names no trust domain: who fetched it knows, or its roots say, each by its own SPIFFE ID.
    let td = given.trust_domain.clone().or_else(|| said(&roots)).or_else(|| named.filter(|_| alone).cloned());
    let td = td.ok_or_else(|| {
        let expected = "the bundle's trust domain: --bundle TD=FILE, or --trust-domain where it is the only bundle";
        Refusal::new(Code::BadRequest, expected, format!("none for {}", given.file.display()))
    })?;
    Ok(vec![(td, roots)])
}

fn read_bytes(file: &Path) -> Result<Vec<u8>, Refusal> {
    use std::io::Read as _;
    let trouble = |e: std::io::Error| crate::exit::file_refusal(file, &e);
    let mut bytes = Vec::new();
    std::fs::File::open(file).map_err(trouble)?.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(trouble)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        let expected = format!("a file of at most {FILE_BYTES_MAX} bytes");
        return Err(Refusal::new(Code::BadRequest, expected, file.display().to_string()));
    }
    Ok(bytes)
}

fn shown(form: Form, value: &Value, text: impl FnOnce() -> String) -> String {
    match form {
        Form::Json => pretty(value),
        Form::Table => text(),
    }
}
