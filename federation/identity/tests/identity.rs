//! Issuance and verification against each other and against OpenSSL, which nobody here wrote.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use ambit_identity::keys::{certificates_from_pem, certificates_to_pem, fingerprint};
use ambit_identity::svid::{Presented, verify_pinned};
use ambit_identity::wrap::{self, WrapKey};
use ambit_identity::{CoSignature, Csr, IssuingKey, KeySet, RecordKey, Root, SvidKey, TrustStore, issue, verify_svid};
use ambit_model::bundle::{Bundle, Foreign, Own};
use ambit_model::record::{Claim, Head};
use ambit_model::{Code, Lifetime, RaftIndex, TrustDomain};
use ambit_state::State;
use ambit_state::command::LogEntry;
use common::{NODE, NOW, admission, founding};
use rustls_pki_types::CertificateDer;

struct Fixture {
    td: TrustDomain,
    root: Root,
    issuer: IssuingKey,
}

fn fixture(td: &str) -> Fixture {
    let td: TrustDomain = td.parse().unwrap();
    let root = Root::create(&td, NOW, [1; 16]).unwrap();
    let key = SvidKey::generate().unwrap();
    let csr = Csr::parse(&key.csr().unwrap()).unwrap();
    let lifetime = Lifetime { not_before: NOW.minus_ms(60_000), not_after: NOW.plus_ms(7 * 86_400_000) };
    let issuer = IssuingKey::new(key, root.found(1, &csr, lifetime).unwrap()).unwrap();
    Fixture { td, root, issuer }
}

fn store(f: &Fixture) -> TrustStore {
    TrustStore::new(&Bundle::<Own>::new(f.td.clone(), 1, vec![f.root.der().to_vec()])).unwrap()
}

/// A node's leaf through the state machine, the only way there is.
fn node_leaf(f: &Fixture, authority: &str, key: &SvidKey, csr: &Csr) -> Result<Vec<CertificateDer<'static>>, Code> {
    let mut state = State::new();
    let mut index = 0;
    let mut run = |command| {
        index += 1;
        let entry = LogEntry { stamp: NOW, client: [0; 32], request: [0; 16], command };
        state.apply(RaftIndex(index), &entry)
    };
    for command in founding(f.td.clone(), f.root.der().to_vec(), authority, f.issuer.not_after()) {
        run(command).outcome.unwrap();
    }
    let mut issuances = run(admission(authority, key.spki_sha256())).into_issuances().unwrap();
    issue(issuances.remove(0).unwrap(), csr, &f.issuer).map_err(|r| r.code)
}

#[test]
fn a_committed_leaf_verifies_here_and_in_openssl() {
    let f = fixture("west");
    let key = SvidKey::generate().unwrap();
    let csr = Csr::parse(&key.csr().unwrap()).unwrap();
    let chain = node_leaf(&f, f.issuer.authority(), &key, &csr).unwrap();
    let peer = verify_svid(&chain, &store(&f), NOW).unwrap();
    assert_eq!(peer.id().as_str(), format!("spiffe://west/ambit/node/{}", NODE));
    assert_eq!(peer.binding().unwrap().node, NODE);
    assert_eq!(peer.binding().unwrap().generation.0, 1);

    let x509 = |der: &[u8]| openssl::x509::X509::from_der(der).unwrap();
    let mut roots = openssl::x509::store::X509StoreBuilder::new().unwrap();
    roots.add_cert(x509(f.root.der())).unwrap();
    let mut param = openssl::x509::verify::X509VerifyParam::new().unwrap();
    param.set_time((NOW.0 / 1000) as i64);
    param.set_flags(openssl::x509::verify::X509VerifyFlags::X509_STRICT).unwrap();
    roots.set_param(&param).unwrap();
    let mut between = openssl::stack::Stack::new().unwrap();
    between.push(x509(&chain[1])).unwrap();
    let leaf = x509(&chain[0]);
    let mut context = openssl::x509::X509StoreContext::new().unwrap();
    let good = context.init(&roots.build(), &leaf, &between, |c| c.verify_cert()).unwrap();
    assert!(good, "{}", context.error());
    assert_eq!(certificates_from_pem(&certificates_to_pem(chain.iter().map(AsRef::as_ref))).unwrap(), chain);
}

#[test]
fn issue_refuses_another_authority_and_another_key() {
    let f = fixture("west");
    let key = SvidKey::generate().unwrap();
    let csr = Csr::parse(&key.csr().unwrap()).unwrap();
    assert_eq!(node_leaf(&f, "another", &key, &csr).unwrap_err(), Code::AuthorityMismatch);
    let other = Csr::parse(&SvidKey::generate().unwrap().csr().unwrap()).unwrap();
    assert_eq!(node_leaf(&f, f.issuer.authority(), &key, &other).unwrap_err(), Code::AuthorityMismatch);
}

#[test]
fn verification_refuses_foreign_roots_other_times_and_broken_chains() {
    let (west, east) = (fixture("west"), fixture("east"));
    let key = SvidKey::generate().unwrap();
    let csr = Csr::parse(&key.csr().unwrap()).unwrap();
    let lifetime = Lifetime { not_before: NOW.minus_ms(1000), not_after: NOW.plus_ms(60_000) };
    let chain = west.issuer.replica_leaf(1, &west.td, lifetime, &csr).unwrap();
    // East's authority signs an identity of west: the per-domain bundle refuses what a pooled one would accept.
    let forged = east.issuer.replica_leaf(1, &west.td, lifetime, &csr).unwrap();
    let mut both = store(&west);
    both.add_foreign(&Bundle::<Foreign>::new(east.td.clone(), 1, vec![east.root.der().to_vec()])).unwrap();
    let code = |chain: &[CertificateDer<'_>], store: &TrustStore, at| verify_svid(chain, store, at).unwrap_err().code;
    assert!(verify_svid(&chain, &both, NOW).is_ok());
    assert_eq!(code(&forged, &both, NOW), Code::SvidUntrusted);
    assert_eq!(code(&chain, &store(&east), NOW), Code::TrustDomainUnknown);
    assert_eq!(code(&chain, &both, NOW.plus_ms(61_000)), Code::SvidUntrusted);
    assert_eq!(code(&chain, &both, NOW.minus_ms(3_000)), Code::SvidUntrusted);
    assert_eq!(code(&chain[..1], &both, NOW), Code::SvidUntrusted);
    assert_eq!(code(&chain[1..], &both, NOW), Code::SvidMalformed, "an intermediate is nobody");
    assert_eq!(code(&[], &both, NOW), Code::SvidMalformed);
    let mut flipped = chain[0].to_vec();
    let last = flipped.len() - 1;
    flipped[last] ^= 1;
    assert_eq!(code(&[flipped.into(), chain[1].clone()], &both, NOW), Code::SvidUntrusted);

    let mut pinned = chain.clone();
    pinned.push(west.root.der().clone());
    let print = fingerprint(west.root.der());
    assert!(verify_pinned(&pinned, &west.td, &print, NOW).is_ok());
    let wrong = verify_pinned(&pinned, &west.td, &fingerprint(east.root.der()), NOW).unwrap_err();
    assert_eq!(wrong.code, Code::FingerprintMismatch);
    pinned[2] = east.root.der().clone();
    assert!(verify_pinned(&pinned, &west.td, &print, NOW).is_err());
}

#[test]
fn a_request_carries_a_key_and_nothing_else() {
    use openssl::{ec, hash, nid, pkey, x509};
    let make = |curve, subject: Option<&str>| {
        let group = ec::EcGroup::from_curve_name(curve).unwrap();
        let key = pkey::PKey::from_ec_key(ec::EcKey::generate(&group).unwrap()).unwrap();
        let mut req = x509::X509ReqBuilder::new().unwrap();
        req.set_pubkey(&key).unwrap();
        if let Some(cn) = subject {
            let mut name = x509::X509NameBuilder::new().unwrap();
            name.append_entry_by_text("CN", cn).unwrap();
            req.set_subject_name(&name.build()).unwrap();
        }
        req.sign(&key, hash::MessageDigest::sha256()).unwrap();
        req.build().to_der().unwrap()
    };
    let plain = make(nid::Nid::X9_62_PRIME256V1, None);
    assert!(Csr::parse(&plain).is_ok());
    let mut flipped = plain.clone();
    *flipped.last_mut().unwrap() ^= 1;
    let mut long = plain.clone();
    long.push(0);
    // ecdsa-with-SHA256 renamed ecdsa-with-SHA384: the signature still verifies as what it is.
    let sha256 = [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02];
    let at = plain.windows(8).position(|window| window == sha256).unwrap();
    let mut renamed = plain.clone();
    renamed[at + 7] = 3;
    let (named, other) = (make(nid::Nid::X9_62_PRIME256V1, Some("me")), make(nid::Nid::SECP384R1, None));
    for bad in [named, other, flipped, long, renamed, vec![]] {
        assert_eq!(Csr::parse(&bad).unwrap_err().code, Code::CsrMalformed);
    }
    for bad in with_more() {
        assert_eq!(Csr::parse(&bad).unwrap_err().code, Code::CsrMalformed);
    }
}

/// Requests with names and extensions in them, and of other kinds of keys, each signed as it should be.
fn with_more() -> Vec<Vec<u8>> {
    use openssl::x509::extension::{BasicConstraints, KeyUsage, SubjectAlternativeName};
    use openssl::{ec, hash, nid, pkey, rsa, stack, x509};
    let group = ec::EcGroup::from_curve_name(nid::Nid::X9_62_PRIME256V1).unwrap();
    let p256 = pkey::PKey::from_ec_key(ec::EcKey::generate(&group).unwrap()).unwrap();
    let mut out = Vec::new();
    let builder = || x509::X509ReqBuilder::new().unwrap();
    let context = builder();
    let context = context.x509v3_context(None);
    let san = |name: &mut SubjectAlternativeName| name.build(&context).unwrap();
    for extension in [
        san(SubjectAlternativeName::new().uri("spiffe://west/root")),
        san(SubjectAlternativeName::new().dns("root")),
        san(SubjectAlternativeName::new().uri("spiffe://west/a").uri("spiffe://east/b")),
        BasicConstraints::new().critical().ca().build().unwrap(),
        KeyUsage::new().critical().key_cert_sign().build().unwrap(),
    ] {
        let mut request = builder();
        request.set_pubkey(&p256).unwrap();
        let mut extensions = stack::Stack::new().unwrap();
        extensions.push(extension).unwrap();
        request.add_extensions(&extensions).unwrap();
        request.sign(&p256, hash::MessageDigest::sha256()).unwrap();
        out.push(request.build().to_der().unwrap());
    }
    let rsa = pkey::PKey::from_rsa(rsa::Rsa::generate(2048).unwrap()).unwrap();
    for (key, digest) in
        [(rsa, hash::MessageDigest::sha256()), (pkey::PKey::generate_ed25519().unwrap(), hash::MessageDigest::null())]
    {
        let mut request = builder();
        request.set_pubkey(&key).unwrap();
        request.sign(&key, digest).unwrap();
        out.push(request.build().to_der().unwrap());
    }
    out
}

#[test]
fn key_sets_heads_and_wrapped_keys_hold_or_are_refused() {
    let (west, east) = (fixture("west"), fixture("east"));
    let key = RecordKey::from_pkcs8(RecordKey::generate().unwrap().pkcs8()).unwrap();
    let (statement, signature) = KeySet::certify(&west.root, &west.td, 1, vec![key.public()]).unwrap();
    let set = KeySet::verify(&west.td, west.root.der(), &statement, &signature).unwrap();
    assert!(KeySet::verify(&west.td, east.root.der(), &statement, &signature).is_err());
    assert!(KeySet::verify(&east.td, west.root.der(), &statement, &signature).is_err());
    let head = Head { origin: west.td.clone(), epoch: 1, seq: 2, hash: [3; 32], stamp: NOW, nonce: [4; 16] };
    let claim = Claim { head, is_the_end: true };
    let signed = |key: &RecordKey| [CoSignature { key_index: 0, signature: key.sign_claim(&claim) }];
    let holds = |claim: &Claim, key| set.verify_claim(&west.td, &claim.signed_bytes(), &signed(key)).is_ok();
    assert!(holds(&claim, &key));
    let later = Head { seq: 3, ..claim.head.clone() };
    for other in [Claim { head: later, ..claim.clone() }, Claim { is_the_end: false, ..claim.clone() }] {
        assert!(!holds(&other, &key), "{other:?}");
    }
    assert!(!holds(&claim, &RecordKey::generate().unwrap()));
    assert!(set.verify_claim(&east.td, &claim.signed_bytes(), &signed(&key)).is_err());
    let v1 = [CoSignature { key_index: 0, signature: key.sign_head(&claim.head) }];
    assert!(set.verify_claim(&west.td, &claim.signed_bytes(), &v1).is_err(), "a head of before is no claim");
    assert!(set.verify_possession(b"t", &key.prove(b"t")).is_ok());
    assert!(set.verify_possession(b"u", &key.prove(b"t")).is_err());

    let holder = WrapKey::from_der(&WrapKey::generate().unwrap().der().unwrap()).unwrap();
    let wrapped = wrap::wrap(&holder.public().unwrap(), &[5; 32]).unwrap();
    assert_eq!(holder.unwrap(&wrapped).unwrap().as_slice(), &[5; 32]);
    assert!(WrapKey::generate().unwrap().unwrap(&wrapped).is_err());
}

/// A certificate of `key`, self-signed by rcgen, with this serial and key identifier.
fn made(key: &SvidKey, serial: &[u8], key_id: &[u8], ca: bool) -> CertificateDer<'static> {
    let pair = rcgen::KeyPair::try_from(key.pkcs8().as_slice()).unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.serial_number = Some(rcgen::SerialNumber::from_slice(serial));
    params.key_identifier_method = rcgen::KeyIdMethod::PreSpecified(key_id.to_vec());
    params.subject_alt_names = vec![rcgen::SanType::URI("spiffe://west/web".try_into().unwrap())];
    params.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature];
    if ca {
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Constrained(0));
    }
    params.self_signed(&pair).unwrap().der().clone()
}

#[test]
fn an_issuing_key_is_named_as_verifiers_name_it() {
    let (key, other) = (SvidKey::generate().unwrap(), SvidKey::generate().unwrap());
    let name = key.spki_sha256()[..20].to_vec();
    for (case, of, id, good) in [
        ("its name", &key, &name, true),
        ("another name", &key, &vec![9; 20], false),
        ("another key", &other, &name, false),
    ] {
        let certificate = made(of, &[1], id, true);
        let paired = IssuingKey::new(SvidKey::from_pkcs8(&key.pkcs8()).unwrap(), certificate);
        let told = paired.map(|key| key.authority().to_owned()).map_err(|refusal| refusal.code);
        assert_eq!(told, if good { Ok(hex::encode(&name)) } else { Err(Code::AuthorityMismatch) }, "{case}");
    }
}

#[test]
fn a_serial_has_one_form_whatever_der_and_people_write_before_it() {
    let key = SvidKey::generate().unwrap();
    for serial in [[0x40; 16].as_slice(), &[0x80; 16], &[0xff; 20], &[0x7f, 0, 0], &[1]] {
        let der = made(&key, serial, &[9; 20], false);
        let theirs = openssl::x509::X509::from_der(&der).unwrap().serial_number().to_bn().unwrap();
        assert_eq!(theirs.to_vec(), serial, "what openssl prints");
        assert_eq!(Presented::of(&[der]).unwrap().serial, serial);
    }
    for (written, number) in [(&[0, 0x80, 1][..], &[0x80, 1][..]), (&[0, 0, 7], &[7]), (&[0], &[]), (&[7, 0], &[7, 0])]
    {
        assert_eq!(ambit_model::serial_number(written), number);
    }
}

#[test]
fn a_key_set_is_certified_by_a_root_that_names_the_curve_of_its_key() {
    let f = fixture("west");
    let (statement, signature) = KeySet::certify(&f.root, &f.td, 1, vec![[1; 32]]).unwrap();
    // prime256v1 to prime239v3: the same point under another curve's name (RFC 5480 2.1.1.1).
    let curve = [0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7];
    let root = f.root.der().to_vec();
    let at = root.windows(curve.len()).position(|part| part == curve).unwrap();
    let mut renamed = root.clone();
    renamed[at + curve.len() - 1] = 6;
    for (root, good) in [(root, true), (renamed, false)] {
        assert_eq!(KeySet::verify(&f.td, &root, &statement, &signature).is_ok(), good);
    }
}
