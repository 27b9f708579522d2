//! Who believes a standby's authority, and an older epoch's leaf: real chains, made by OpenSSL, under grants that two
//! approvers signed.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

use ambit_identity::svid::verify_pinned;
use ambit_identity::{ApproverKey, TrustStore, fingerprint, profile, verify_svid};
use ambit_model::bundle::{Bundle, Foreign};
use ambit_model::grant::{FailoverGrant, SignedGrant};
use ambit_model::{Act, Code, Proposal, Stamp};
use ambit_state::grant::{ApproverKeys, Fences, Known, verify};
use openssl::asn1::{Asn1Object, Asn1OctetString, Asn1Time};
use openssl::bn::BigNum;
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{PKey, Private};
use openssl::x509::{X509, X509Builder, X509Extension, X509NameBuilder};
use rustls_pki_types::CertificateDer;

/// When the grant begins; it lasts an hour.
const BEGINS: u64 = 1_800_000_000;
/// A leaf is valid so long before it is issued, seconds.
const SLACK_S: i64 = 30;
const CA: &[(&str, &str)] = &[
    ("keyUsage", "critical,keyCertSign,cRLSign"),
    ("subjectAltName", "URI:spiffe://west"),
    ("basicConstraints", "critical,CA:TRUE"),
];
const STANDBY: &str = "1.3.6.1.4.1.61999.1.3";
const BINDING: &str = "1.3.6.1.4.1.61999.1.1";

struct Made {
    cert: X509,
    key: PKey<Private>,
}

/// A certificate that is valid so, seconds from the grant's begin.
fn made(name: &str, by: Option<&Made>, named: &[(&str, &str)], numbered: &[(&str, Vec<u8>)], life: (i64, i64)) -> Made {
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
    b.set_not_before(&Asn1Time::from_unix(BEGINS as i64 + life.0).unwrap()).unwrap();
    b.set_not_after(&Asn1Time::from_unix(BEGINS as i64 + life.1).unwrap()).unwrap();
    b.set_pubkey(&key).unwrap();
    for (name, value) in named {
        let context = b.x509v3_context(by.map(|by| &*by.cert), None);
        #[allow(deprecated, reason = "as in the other tests")]
        let extension = X509Extension::new(None, Some(&context), name, value).unwrap();
        b.append_extension(extension).unwrap();
    }
    for (oid, value) in numbered {
        let (oid, value) = (Asn1Object::from_str(oid).unwrap(), Asn1OctetString::new_from_bytes(value).unwrap());
        b.append_extension(X509Extension::new_from_der(&oid, false, &value).unwrap()).unwrap();
    }
    b.sign(by.map_or(&key, |by| &by.key), MessageDigest::sha256()).unwrap();
    Made { cert: b.build(), key }
}

fn der(of: &Made) -> CertificateDer<'static> {
    of.cert.to_der().unwrap().into()
}

/// UTF8String.
fn mark(holder: &str) -> Vec<u8> {
    [&[0x0c, holder.len() as u8], holder.as_bytes()].concat()
}

/// A leaf issued so many seconds after the grant began, which is valid for ten minutes, through a node in this epoch.
fn leaf(by: &Made, path: &str, epoch: u8, issued: i64) -> Made {
    let san = format!("URI:spiffe://west{path}");
    let named = [
        ("basicConstraints", "critical,CA:FALSE"),
        ("keyUsage", "critical,digitalSignature"),
        ("extendedKeyUsage", "serverAuth,clientAuth"),
        ("subjectAltName", san.as_str()),
    ];
    let mut binding = vec![0x30, 54, 4, 32];
    binding.extend([7; 32]);
    binding.extend([4, 8, 0, 0, 0, 0, 0, 0, 0, 1, 4, 8, 0, 0, 0, 0, 0, 0, 0, epoch]);
    made("a workload", Some(by), &named, &[(BINDING, binding)], (issued - SLACK_S, issued + 600))
}

fn fences() -> Fences {
    let keys = [ApproverKey::generate().unwrap(), ApproverKey::generate().unwrap()];
    let (begins, ends) = (Stamp(BEGINS * 1_000), Stamp((BEGINS + 3_600) * 1_000));
    let (home, holder): (ambit_model::TrustDomain, _) = ("west".parse().unwrap(), "east".parse().unwrap());
    let act = Act::FailOver(FailoverGrant { home: home.clone(), holder, epoch: 2, begins, ends });
    let proposal = Proposal { trust_domain: home, epoch: 1, expires: ends, nonce: [1; 16], act };
    let approvals = keys.iter().map(|key| key.approve(&proposal).unwrap()).collect();
    let names = ["alice", "bob"].map(|name| name.parse().unwrap());
    let approvers: ApproverKeys = names.into_iter().zip(keys.iter().map(|key| key.card().key)).collect();
    let known = Known { naming: None, approvers: &approvers, epoch: 1 };
    let mut fences = Fences::default();
    fences.know(verify(&SignedGrant { proposal, approvals }, known).unwrap());
    fences
}

fn store(root: &Made, fences: Fences) -> TrustStore {
    let mut store = TrustStore::default();
    store.add_foreign(&Bundle::<Foreign>::new("west".parse().unwrap(), 1, vec![der(root).to_vec()])).unwrap();
    store.fence(fences);
    store
}

#[test]
fn a_standby_is_believed_under_its_grant_only_and_an_older_epoch_until_it_began() {
    let week = (-7 * 86_400, 7 * 86_400);
    let root = made("west root", None, CA, &[], week);
    let constraint = ("basicConstraints", "critical,CA:TRUE,pathlen:0");
    let below = [&CA[..2], &[constraint]].concat();
    let authority = |name: &str, marks: &[(&str, Vec<u8>)]| made(name, Some(&root), &below, marks, week);
    let home = authority("west replica 1 epoch 1 0123456789abcdef", &[]);
    let back = authority("west replica 1 epoch 3 0123456789abcdef", &[]);
    let east = authority("west standby east 1", &[(STANDBY, mark("east"))]);
    let core = authority("west standby core 1", &[(STANDBY, mark("core"))]);
    let unreadable = authority("west standby x 1", &[(STANDBY, vec![0x0c, 9, b'e'])]);
    let nobody = authority("west standby x 2", &[(STANDBY, mark("East"))]);
    let (fenced, ungranted, bad) = (Some(Code::EpochFenced), Some(Code::StandbyUngranted), Some(Code::SvidMalformed));
    for (what, by, path, epoch, issued, now, refused, unknown) in [
        ("the home's of before", &home, "/db", 1, -60, 60, None, None),
        ("the home's of after", &home, "/db", 1, 60, 90, fenced, None),
        ("the home's of after, with a later epoch in it", &home, "/db", 9, 60, 90, fenced, None),
        ("the home's replica", &home, "/ambit/replica/1", 1, 60, 90, None, None),
        ("of a later epoch", &back, "/db", 3, 60, 90, None, None),
        ("the standby's", &east, "/db", 2, 60, 90, None, ungranted),
        ("the standby's of before", &east, "/db", 2, -60, 90, ungranted, ungranted),
        ("the standby's in the home's epoch", &east, "/db", 1, 60, 90, ungranted, ungranted),
        ("the standby's that outlives the grant", &east, "/db", 2, 3_200, 3_300, ungranted, ungranted),
        ("the standby's as a replica of the home", &east, "/ambit/replica/1", 2, 60, 90, ungranted, ungranted),
        ("the standby's as an administrator", &east, "/ambit/admin/x", 2, 60, 90, ungranted, ungranted),
        ("another's who holds a standby's", &core, "/db", 2, 60, 90, ungranted, ungranted),
        ("under a mark that cannot be read", &unreadable, "/db", 2, 60, 90, bad, bad),
        ("under a mark of no trust domain", &nobody, "/db", 2, 60, 90, bad, bad),
    ] {
        let leaf = leaf(by, path, epoch, issued);
        let (chain, now) = ([der(&leaf), der(by)], Stamp((BEGINS + now) * 1_000));
        let judged = |fences: Fences| verify_svid(&chain, &store(&root, fences), now).err().map(|r| r.code);
        assert_eq!(judged(fences()), refused, "{what}, by who knows the grant");
        assert_eq!(judged(Fences::default()), unknown, "{what}, by who knows none");
        // First contact: no grant is known yet.
        let (pinned, whole) = (fingerprint(&der(&root)), [der(&leaf), der(by), der(&root)]);
        let judged = verify_pinned(&whole, &"west".parse().unwrap(), &pinned, now);
        assert_eq!(judged.err().map(|r| r.code), unknown, "{what}, at first contact");
    }
    let east = der(&east);
    let cert = profile::certificate(&east).unwrap();
    assert_eq!(profile::standby_of(&cert).unwrap().unwrap().as_str(), "east");
}
