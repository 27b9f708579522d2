//! What a downstream authority may sign, and what nobody believes of it. OpenSSL makes all of the certificates, and says
//! of each what it thinks itself.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

use ambit_identity::svid::{Presented, verify_pinned};
use ambit_identity::{TrustStore, fingerprint, profile, verify_svid};
use ambit_model::bundle::{Bundle, Foreign};
use ambit_model::{Code, Stamp};
use openssl::asn1::{Asn1Object, Asn1OctetString, Asn1Time};
use openssl::bn::BigNum;
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{PKey, Private};
use openssl::stack::Stack;
use openssl::x509::store::X509StoreBuilder;
use openssl::x509::verify::{X509VerifyFlags, X509VerifyParam};
use openssl::x509::{X509, X509Builder, X509Extension, X509NameBuilder, X509StoreContext};
use rustls_pki_types::CertificateDer;

const NOW: Stamp = Stamp(1_800_000_000_000);
const MARK: (&str, bool, &[u8]) = ("1.3.6.1.4.1.61999.1.2", false, &[5, 0]);
const CA: &[(&str, &str)] = &[("keyUsage", "critical,keyCertSign,cRLSign"), ("subjectAltName", "URI:spiffe://west")];

struct Made {
    cert: X509,
    key: PKey<Private>,
}

/// A certificate with these extensions, by OpenSSL's names and by number; signed by `by`, or by itself.
fn made(name: &str, by: Option<&Made>, named: &[(&str, &str)], numbered: &[(&str, bool, &[u8])]) -> Made {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
    let key = PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap();
    let mut subject = X509NameBuilder::new().unwrap();
    subject.append_entry_by_text("CN", name).unwrap();
    let subject = subject.build();
    let mut b = X509Builder::new().unwrap();
    b.set_version(2).unwrap();
    let mut serial = BigNum::new().unwrap();
    serial.rand(120, openssl::bn::MsbOption::ONE, false).unwrap();
    b.set_serial_number(&serial.to_asn1_integer().unwrap()).unwrap();
    b.set_subject_name(&subject).unwrap();
    b.set_issuer_name(by.map_or(&*subject, |by| by.cert.subject_name())).unwrap();
    let seconds = (NOW.0 / 1000) as i64;
    b.set_not_before(&Asn1Time::from_unix(seconds - 60).unwrap()).unwrap();
    b.set_not_after(&Asn1Time::from_unix(seconds + 3_600).unwrap()).unwrap();
    b.set_pubkey(&key).unwrap();
    for (name, value) in named {
        let issuer = by.map(|by| &*by.cert);
        let context = b.x509v3_context(issuer, None);
        #[allow(deprecated, reason = "the other way knows no name constraints")]
        let extension = X509Extension::new(None, Some(&context), name, value).unwrap();
        b.append_extension(extension).unwrap();
    }
    for (oid, critical, value) in numbered {
        let (oid, value) = (Asn1Object::from_str(oid).unwrap(), Asn1OctetString::new_from_bytes(value).unwrap());
        b.append_extension(X509Extension::new_from_der(&oid, *critical, &value).unwrap()).unwrap();
    }
    b.sign(by.map_or(&key, |by| &by.key), MessageDigest::sha256()).unwrap();
    Made { cert: b.build(), key }
}

fn root() -> Made {
    made("west root", None, &[CA, &[("basicConstraints", "critical,CA:TRUE")]].concat(), &[])
}

fn authority(root: &Made, constraints: &str, more: &[(&str, &str)], marked: bool) -> Made {
    let named = [CA, &[("basicConstraints", constraints)], more].concat();
    made("west downstream", Some(root), &named, if marked { &[MARK] } else { &[] })
}

/// A leaf of this SAN.
fn leaf(by: &Made, san: &str, bound: bool) -> Made {
    let named = [
        ("basicConstraints", "critical,CA:FALSE"),
        ("keyUsage", "critical,digitalSignature"),
        ("extendedKeyUsage", "serverAuth,clientAuth"),
        ("subjectAltName", san),
    ];
    let mut binding = vec![0x30, 54, 4, 32];
    binding.extend([7; 32]);
    binding.extend([4, 8, 0, 0, 0, 0, 0, 0, 0, 1, 4, 8, 0, 0, 0, 0, 0, 0, 0, 1]);
    let numbered = [("1.3.6.1.4.1.61999.1.1", false, binding.as_slice())];
    made("a workload", Some(by), &named, if bound { &numbered } else { &[] })
}

fn der(of: &Made) -> CertificateDer<'static> {
    of.cert.to_der().unwrap().into()
}

fn store(root: &Made) -> TrustStore {
    let mut store = TrustStore::default();
    store.add_foreign(&Bundle::<Foreign>::new("west".parse().unwrap(), 1, vec![der(root).to_vec()])).unwrap();
    let east = made("east root", None, &[CA, &[("basicConstraints", "critical,CA:TRUE")]].concat(), &[]);
    store.add_foreign(&Bundle::<Foreign>::new("east".parse().unwrap(), 1, vec![der(&east).to_vec()])).unwrap();
    store
}

fn openssl(root: &Made, between: &[&Made], leaf: &Made) -> bool {
    let mut roots = X509StoreBuilder::new().unwrap();
    roots.add_cert(root.cert.clone()).unwrap();
    let mut param = X509VerifyParam::new().unwrap();
    param.set_time((NOW.0 / 1000) as i64);
    param.set_flags(X509VerifyFlags::PARTIAL_CHAIN).unwrap();
    roots.set_param(&param).unwrap();
    let mut stack = Stack::new().unwrap();
    for one in between {
        stack.push(one.cert.clone()).unwrap();
    }
    X509StoreContext::new().unwrap().init(&roots.build(), &leaf.cert, &stack, |c| c.verify_cert()).unwrap()
}

#[test]
fn workloads_of_a_downstream_authority_are_believed_and_what_only_the_cell_says_is_not() {
    let root = root();
    let ca = authority(&root, "critical,CA:TRUE,pathlen:0", &[], true);
    let plain = authority(&root, "critical,CA:TRUE,pathlen:0", &[], false);
    let node = format!("URI:spiffe://west/ambit/node/{}", "07".repeat(32));
    let rows: &[(&str, &str, bool, Option<Code>)] = &[
        ("a workload", "URI:spiffe://west/site/web", false, None),
        ("a workload with a DNS name", "URI:spiffe://west/web,DNS:web.example", false, None),
        ("near the cell's own", "URI:spiffe://west/ambits/admin/x", false, None),
        ("an administrator", "URI:spiffe://west/ambit/admin/x", false, Some(Code::SvidUntrusted)),
        ("a replica", "URI:spiffe://west/ambit/replica/1", false, Some(Code::SvidUntrusted)),
        ("a node", &node, true, Some(Code::SvidUntrusted)),
        ("a workload of a node", "URI:spiffe://west/web", true, Some(Code::SvidUntrusted)),
        ("another trust domain's", "URI:spiffe://east/web", false, Some(Code::SvidUntrusted)),
        ("an unknown trust domain's", "URI:spiffe://south/web", false, Some(Code::TrustDomainUnknown)),
        ("two", "URI:spiffe://west/web,URI:spiffe://west/ambit/admin/x", false, Some(Code::SvidMalformed)),
    ];
    let (trust, print) = (store(&root), fingerprint(&der(&root)));
    for (what, san, bound, refused) in rows {
        let leaf = leaf(&ca, san, *bound);
        let chain = [der(&leaf), der(&ca), der(&root)];
        // Nobody but us sees anything amiss in any of them.
        assert!(openssl(&root, &[&ca], &leaf), "{what}");
        let judged = verify_svid(&chain[..2], &trust, NOW);
        assert_eq!(judged.as_ref().err().map(|r| r.code), *refused, "{what}: {judged:?}");
        assert!(judged.is_err() || judged.unwrap().downstream(), "{what}");
        if what.contains("trust domain") {
            continue;
        }
        let pinned = verify_pinned(&chain, &"west".parse().unwrap(), &print, NOW);
        assert_eq!(pinned.err().map(|r| r.code), *refused, "{what}, pinned");
        assert_eq!(Presented::of(&chain).is_some(), refused.is_none(), "{what}, as it is shown");
        // The order in which it is shown changes nothing; and under an unmarked authority nothing is amiss.
        let turned = [chain[0].clone(), chain[2].clone(), chain[1].clone()];
        assert_eq!(verify_svid(&turned, &trust, NOW).err().map(|r| r.code), *refused, "{what}, turned");
    }
    let own = leaf(&plain, "URI:spiffe://west/ambit/admin/x", false);
    let peer = verify_svid(&[der(&own), der(&plain)], &trust, NOW).unwrap();
    assert!(!peer.downstream());
}

#[test]
fn nothing_is_below_a_downstream_authority() {
    let root = root();
    let trust = store(&root);
    let ca = authority(&root, "critical,CA:TRUE,pathlen:0", &[], true);
    let below = authority(&ca, "critical,CA:TRUE,pathlen:0", &[], false);
    let leaf_of = |by: &Made| leaf(by, "URI:spiffe://west/web", false);
    let code = |chain: &[CertificateDer<'_>]| verify_svid(chain, &trust, NOW).unwrap_err().code;
    let own = leaf_of(&below);
    assert_eq!(code(&[der(&own), der(&below), der(&ca)]), Code::SvidUntrusted);
    assert!(!openssl(&root, &[&below, &ca], &own));
    // One that the root did not bound is refused for that.
    for constraints in ["critical,CA:TRUE", "critical,CA:TRUE,pathlen:1"] {
        let loose = authority(&root, constraints, &[], true);
        assert_eq!(code(&[der(&leaf_of(&loose)), der(&loose)]), Code::SvidMalformed, "{constraints}");
        let cert = der(&loose);
        let findings = profile::judge(&profile::certificate(&cert).unwrap(), profile::Kind::Authority);
        assert_eq!(findings.iter().find(|f| f.must).map(|f| f.rule), Some("downstream-last"), "{constraints}");
    }
    // A mark that holds anything is one.
    let named = [CA, &[("basicConstraints", "critical,CA:TRUE,pathlen:0")]].concat();
    let odd = made("odd", Some(&root), &named, &[(MARK.0, false, b"x")]);
    let admin = leaf(&odd, "URI:spiffe://west/ambit/admin/x", false);
    assert_eq!(code(&[der(&admin), der(&odd)]), Code::SvidUntrusted);
    // Who is denied is denied here too.
    let mut denied = store(&root);
    let good = leaf_of(&ca);
    let chain = [der(&good), der(&ca)];
    let name = verify_svid(&chain, &denied, NOW).unwrap().authority().to_owned();
    denied.deny_authorities([("west".parse().unwrap(), name)]);
    assert_eq!(verify_svid(&chain, &denied, NOW).unwrap_err().code, Code::SvidUntrusted);
}

/// Why a downstream authority carries no URI name constraints (RFC 5280 4.2.1.10): OpenSSL keeps to them, and webpki, which
/// every program in Rust verifies with, refuses whatever has a URI under them, permitted or not.
#[test]
fn uri_name_constraints_are_kept_by_openssl_and_refuse_everything_in_webpki() {
    let root = root();
    let bound = [("nameConstraints", "critical,permitted;URI:west")];
    let ca = authority(&root, "critical,CA:TRUE,pathlen:0", &bound, true);
    let (inside, outside) = (leaf(&ca, "URI:spiffe://west/web", false), leaf(&ca, "URI:spiffe://east/web", false));
    assert!(openssl(&root, &[&ca], &inside));
    assert!(!openssl(&root, &[&ca], &outside));
    let refusal = verify_svid(&[der(&inside), der(&ca)], &store(&root), NOW).unwrap_err();
    assert_eq!(refusal.code, Code::SvidUntrusted);
    assert!(refusal.found.contains("NameConstraint"), "{refusal}");
    println!("webpki on a permitted URI: {}", refusal.found);
}
