//! Certificates of somebody else's CA, made by OpenSSL: what an import must be, each refusal, and that a refusal changes
//! nothing.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use ambit_model::act::{Act, Approval, Approved, ApproverCard, Proposal};
use ambit_model::{Code, Entry, EntryExtras, Extras, Lifetime, Refusal, Stamp};
use ambit_state::authorities::AuthorityState;
use ambit_state::command::{Admission, LeafRequest};
use ambit_state::external::{ExternalImport, LEFT_MS_MIN, LIFE_MS_MAX, path};
use ambit_state::objects::KeySetRow;
use ambit_state::{Command, Reply, State};
use common::{Cell, admission, cluster, code, entry, node, sha256};
use openssl::asn1::{Asn1Object, Asn1OctetString, Asn1Time};
use openssl::bn::BigNum;
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{HasPublic, PKey, Private};
use openssl::rsa::Rsa;
use openssl::sign::Signer;
use openssl::x509::extension::{
    AuthorityKeyIdentifier, BasicConstraints, ExtendedKeyUsage, KeyUsage, SubjectAlternativeName, SubjectKeyIdentifier,
};
use openssl::x509::{X509, X509Extension, X509NameBuilder};

const NOW: u64 = 1_800_000_000_000;
const DAY_MS: u64 = 86_400_000;

fn ec(curve: Nid) -> PKey<Private> {
    PKey::from_ec_key(EcKey::generate(&EcGroup::from_curve_name(curve).unwrap()).unwrap()).unwrap()
}
fn p256() -> PKey<Private> {
    ec(Nid::X9_62_PRIME256V1)
}
fn rsa(bits: u32) -> PKey<Private> {
    PKey::from_rsa(Rsa::generate(bits).unwrap()).unwrap()
}
fn spki_sha256<T: HasPublic>(key: &PKey<T>) -> [u8; 32] {
    sha256(&key.public_key_to_der().unwrap())
}

/// { [1] { [4] { CN=x } }, [2] 7 } and the serial alone: 7 is that of all certificates here.
const AKI_ISSUER_X: &[u8] = &[
    0x30, 0x15, 0xa1, 0x10, 0xa4, 0x0e, 0x30, 0x0c, 0x31, 0x0a, 0x30, 0x08, 6, 3, 0x55, 4, 3, 0x0c, 1, b'x', 0x82, 1, 7,
];
const AKI_SERIAL_8: &[u8] = &[0x30, 3, 0x82, 1, 8];
const AKI_SERIAL_7: &[u8] = &[0x30, 3, 0x82, 1, 7];

/// What one certificate says. As it should be, unless a row says otherwise.
struct Says {
    subject: Vec<(&'static str, &'static str)>,
    ca: Option<(bool, Option<u32>)>,
    usage: Option<(bool, bool, bool)>,
    uris: Vec<&'static str>,
    from_days: i64,
    days: i64,
    /// For servers, for clients, for any.
    extended: Option<(bool, bool, bool)>,
    key_id: bool,
    /// Another authority key identifier than by the key, DER.
    aki: Option<&'static [u8]>,
    digest: MessageDigest,
    /// OID and whether it is critical.
    more: Option<(&'static str, bool)>,
}

impl Says {
    fn authority() -> Says {
        Says {
            subject: vec![("O", "Ambit"), ("CN", "west authority")],
            ca: Some((true, Some(1))),
            usage: Some((true, true, true)),
            uris: vec!["spiffe://west"],
            from_days: -1,
            days: 60,
            extended: None,
            key_id: true,
            aki: None,
            digest: MessageDigest::sha256(),
            more: None,
        }
    }
    fn root() -> Says {
        Says {
            subject: vec![("C", "CH"), ("O", "Example"), ("CN", "Example Root")],
            ca: Some((true, None)),
            uris: vec![],
            days: 3_650,
            ..Says::authority()
        }
    }
    fn tier() -> Says {
        Says { subject: vec![("CN", "Example Issuing")], ca: Some((true, Some(2))), days: 400, ..Says::root() }
    }
}

/// A certificate of `key` by this issuer.
fn made(says: &Says, key: &PKey<Private>, by: Option<&X509>, signer: &PKey<Private>) -> X509 {
    let mut b = X509::builder().unwrap();
    b.set_version(2).unwrap();
    b.set_serial_number(&BigNum::from_u32(7).unwrap().to_asn1_integer().unwrap()).unwrap();
    let mut name = X509NameBuilder::new().unwrap();
    says.subject.iter().for_each(|(field, text)| name.append_entry_by_text(field, text).unwrap());
    let name = name.build();
    b.set_subject_name(&name).unwrap();
    b.set_issuer_name(by.map_or(&name, |by| by.subject_name())).unwrap();
    b.set_pubkey(key).unwrap();
    let at = |days: i64| Asn1Time::from_unix(NOW as i64 / 1000 + days * 86_400).unwrap();
    b.set_not_before(&at(says.from_days)).unwrap();
    b.set_not_after(&at(says.days)).unwrap();
    if let Some((critical, length)) = says.ca {
        let mut basic = BasicConstraints::new();
        let basic = if critical { basic.critical() } else { &mut basic };
        let basic = basic.ca();
        let basic = match length {
            Some(length) => basic.pathlen(length),
            None => basic,
        };
        b.append_extension(basic.build().unwrap()).unwrap();
    }
    if let Some((critical, sign, crl)) = says.usage {
        let mut usage = KeyUsage::new();
        usage.digital_signature();
        if critical {
            usage.critical();
        }
        if sign {
            usage.key_cert_sign();
        }
        if crl {
            usage.crl_sign();
        }
        b.append_extension(usage.build().unwrap()).unwrap();
    }
    if let Some((server, client, any)) = says.extended {
        let mut usage = ExtendedKeyUsage::new();
        if server {
            usage.server_auth();
        }
        if client {
            usage.client_auth();
        }
        if any {
            usage.other("anyExtendedKeyUsage");
        }
        b.append_extension(usage.build().unwrap()).unwrap();
    }
    let context = b.x509v3_context(by.map(|by| &**by), None);
    let mut extensions = Vec::new();
    if says.key_id {
        extensions.push(SubjectKeyIdentifier::new().build(&context).unwrap());
    }
    if let Some(aki) = says.aki {
        let value = Asn1OctetString::new_from_bytes(aki).unwrap();
        extensions
            .push(X509Extension::new_from_der(&Asn1Object::from_str("2.5.29.35").unwrap(), false, &value).unwrap());
    } else if by.is_some_and(|by| by.subject_key_id().is_some()) {
        extensions.push(AuthorityKeyIdentifier::new().keyid(false).build(&context).unwrap());
    }
    if !says.uris.is_empty() {
        let mut names = SubjectAlternativeName::new();
        for uri in &says.uris {
            names.uri(uri);
        }
        extensions.push(names.build(&context).unwrap());
    }
    if let Some((oid, critical)) = says.more {
        let value = Asn1OctetString::new_from_bytes(&[5, 0]).unwrap();
        let value = if oid == "2.5.29.30" {
            // SEQUENCE { [0] { { [6] "west" } } }
            Asn1OctetString::new_from_bytes(&[0x30, 0x0a, 0xa0, 8, 0x30, 6, 0x86, 4, b'w', b'e', b's', b't']).unwrap()
        } else {
            value
        };
        let oid = Asn1Object::from_str(oid).unwrap();
        extensions.push(X509Extension::new_from_der(&oid, critical, &value).unwrap());
    }
    extensions.into_iter().for_each(|extension| b.append_extension(extension).unwrap());
    b.sign(signer, says.digest).unwrap();
    b.build()
}

/// An outside CA with its root.
struct Outside {
    key: PKey<Private>,
    root: X509,
}

impl Outside {
    fn new(key: PKey<Private>, says: &Says) -> Outside {
        let root = made(says, &key, None, &key);
        Outside { key, root }
    }
    fn certify(&self, says: &Says, key: &PKey<Private>) -> X509 {
        made(says, key, Some(&self.root), &self.key)
    }
}

fn der(cert: &X509) -> Vec<u8> {
    cert.to_der().unwrap()
}

/// A cell whose key waits, and that key.
fn waiting() -> (Cell, PKey<Private>) {
    let (mut cell, key) = (Cell::founded("west"), p256());
    request(&mut cell, &key).unwrap();
    (cell, key)
}
fn request(cell: &mut Cell, key: &PKey<Private>) -> Result<Reply, Refusal> {
    let (csr, key_hash) = (vec![1], spki_sha256(key));
    cell.at(NOW, 0, Command::RequestExternal { csr, key_hash, wrapped: [(1, vec![1])].into() })
}
fn import(chain: Vec<Vec<u8>>, root: &X509) -> ExternalImport {
    let wrapped = [(1, vec![2])].into();
    ExternalImport { chain, root: der(root), wrapped, keys: None, approved: None, by: "ada".into() }
}
fn run(cell: &mut Cell, import: ExternalImport) -> Result<Reply, Refusal> {
    cell.at(NOW, 0, Command::ImportExternal(Box::new(import)))
}

/// Who names another rule than it is refused by, or changes anything, fails here.
#[track_caller]
fn refused(cell: &mut Cell, what: &str, import: ExternalImport, rule: &str) {
    let rows = |cell: &Cell| cell.state.rows().filter(|row| row.table != 1).collect::<Vec<_>>();
    let before = rows(cell);
    let refusal = run(cell, import).unwrap_err();
    let text = format!("{} / {}", refusal.expected, refusal.found);
    assert!(refusal.code == Code::ExternalCertificate && text.contains(rule), "{what}: {refusal:?}");
    assert!(rows(cell) == before, "{what}: something changed");
}

#[test]
fn roots_of_real_cas_are_taken_with_up_to_two_tiers() {
    for (what, root, digest) in [
        ("P-256", p256(), MessageDigest::sha256()),
        ("P-384", ec(Nid::SECP384R1), MessageDigest::sha384()),
        ("P-384 with SHA-256", ec(Nid::SECP384R1), MessageDigest::sha256()),
        ("RSA 2048", rsa(2048), MessageDigest::sha256()),
        ("RSA 3072 with SHA-512", rsa(3072), MessageDigest::sha512()),
    ] {
        for tiers in 0..=2usize {
            let (mut cell, key) = waiting();
            let outside = Outside::new(root.clone(), &Says { digest, ..Says::root() });
            let above = digest;
            let (mut chain, mut by) = (Vec::new(), Outside { key: outside.key.clone(), root: outside.root.clone() });
            for n in (1..=tiers).rev() {
                let subject = vec![("CN", ["", "Tier 1", "Tier 2"][n])];
                let tier_key = p256();
                // What is signed by the root is signed as the root is, and the rest as P-256 keys do.
                let digest = if n == tiers { above } else { MessageDigest::sha256() };
                let says = Says { subject, ca: Some((true, Some(n as u32 + 1))), digest, ..Says::tier() };
                let tier = by.certify(&says, &tier_key);
                chain.insert(0, der(&tier));
                by = Outside { key: tier_key, root: tier };
            }
            let digest = if tiers == 0 { digest } else { MessageDigest::sha256() };
            chain.insert(0, der(&by.certify(&Says { digest, ..Says::authority() }, &key)));
            let reply = run(&mut cell, import(chain.clone(), &outside.root));
            let Ok(Reply::Root(prepared)) = reply else { panic!("{what}, {tiers} tiers: {reply:?}") };
            let id = sha256(&der(&outside.root));
            assert_eq!((prepared.root, prepared.active), (id, sha256(b"west")));
            let row = cell.state.external(&id).unwrap();
            assert_eq!((&row.chain, row.key_hash), (&chain, spki_sha256(&key)));
            let due = |days: u64| row.is_due(Stamp(NOW + days * DAY_MS));
            assert_eq!((due(0), due(39), due(41), due(99)), (false, false, true, true));
            assert!(cell.state.external_request().is_none(), "a request is good for one import");
            let bundle = cell.state.bundle_record().unwrap();
            assert!(bundle.roots.iter().any(|root| root.der == der(&outside.root)), "the root and nothing else of it");
            assert_eq!(bundle.roots.len(), 2);
            // Whatever stands in the chains of all is denied by no name: that would be the end of the cell.
            for one in chain.iter().chain([&der(&outside.root)]) {
                let key = X509::from_der(one).unwrap().public_key().unwrap();
                let deny = Command::DenyAuthority(hex(&spki_sha256(&key)[..20]));
                assert_eq!(code(cell.at(NOW, 0, deny)), Code::RootState, "{what}, {tiers} tiers");
            }
            let unknown = "ab".repeat(20);
            cell.at(NOW, 0, Command::DenyAuthority(unknown.clone())).unwrap();
            assert_eq!(denied_until(&cell, &unknown), Stamp(NOW + LIFE_MS_MAX), "as long as an outside CA may give");
        }
    }
}

fn denied_until(cell: &Cell, name: &str) -> Stamp {
    *cell.state.authority_denials().find(|((_, denied), _)| denied == name).unwrap().1
}

#[test]
fn what_is_not_as_it_must_be_is_refused_by_its_rule_and_changes_nothing() {
    let (mut cell, key) = waiting();
    let outside = Outside::new(p256(), &Says::root());
    let ok = Says::authority;
    let rows: Vec<(&str, Says, &str)> = vec![
        ("a leaf", Says { ca: None, usage: Some((true, false, false)), ..ok() }, "cA=true"),
        ("cA not critical", Says { ca: Some((false, Some(1))), ..ok() }, "cA=true"),
        ("pathLen 0", Says { ca: Some((true, Some(0))), ..ok() }, "pathLen 0"),
        ("no KeyUsage", Says { usage: None, ..ok() }, "keyCertSign"),
        ("KeyUsage not critical", Says { usage: Some((false, true, true)), ..ok() }, "critical KeyUsage"),
        ("no keyCertSign", Says { usage: Some((true, false, true)), ..ok() }, "keyCertSign"),
        ("no cRLSign", Says { usage: Some((true, true, false)), ..ok() }, "cRLSign"),
        ("another trust domain", Says { uris: vec!["spiffe://east"], ..ok() }, "no URI but spiffe://west"),
        ("two trust domains", Says { uris: vec!["spiffe://west", "spiffe://east"], ..ok() }, "no URI but"),
        ("an id with a path", Says { uris: vec!["spiffe://west/web"], ..ok() }, "no URI but"),
        ("expired", Says { from_days: -60, days: -1, ..ok() }, "one that ended"),
        ("not yet valid", Says { from_days: 1, ..ok() }, "before it begins"),
        ("six days left", Says { days: 6, ..ok() }, "7 days left"),
        ("400 days", Says { days: 400, ..ok() }, "at most 398 days"),
        ("longer than its root", Says { days: 4_000, from_days: 3_640, ..ok() }, "ends before what is above it"),
        ("an unknown critical extension", Says { more: Some(("1.2.3.4.5", true)), ..ok() }, "1.2.3.4.5"),
        ("name constraints", Says { more: Some(("2.5.29.30", false)), ..ok() }, "no name constraints"),
        ("a downstream mark", Says { more: Some(("1.3.6.1.4.1.61999.1.2", false)), ..ok() }, "Ambit's own"),
        ("for servers only", Says { extended: Some((true, false, false)), ..ok() }, "ExtendedKeyUsage"),
        ("for any purpose by that name", Says { extended: Some((false, false, true)), ..ok() }, "ExtendedKeyUsage"),
        ("for servers and any", Says { extended: Some((true, false, true)), ..ok() }, "ExtendedKeyUsage"),
        ("pathLen 256", Says { ca: Some((true, Some(256))), ..ok() }, "up to 255"),
        (
            "an issuer's serial that is another's",
            Says { aki: Some(AKI_SERIAL_8), ..ok() },
            "its issuer's serial number",
        ),
        ("an issuer's issuer that is another", Says { aki: Some(AKI_ISSUER_X), ..ok() }, "its issuer's issuer"),
        ("no key identifier", Says { key_id: false, ..ok() }, "subject key identifier"),
        ("no subject", Says { subject: vec![], ..ok() }, "a subject"),
        (
            "a name with two OUs",
            Says { subject: vec![("OU", "a"), ("OU", "b"), ("CN", "c")], ..ok() },
            "each type once",
        ),
        ("SHA-1", Says { digest: MessageDigest::sha1(), ..ok() }, "ECDSA with SHA-256"),
    ];
    for (what, says, rule) in rows {
        let cert = outside.certify(&says, &key);
        refused(&mut cell, what, import(vec![der(&cert)], &outside.root), rule);
    }
    let good = outside.certify(&ok(), &key);
    let other_key = outside.certify(&ok(), &p256());
    refused(&mut cell, "another key", import(vec![der(&other_key)], &outside.root), "requested key");
    let rsa_key = outside.certify(&ok(), &rsa(2048));
    refused(&mut cell, "an RSA key", import(vec![der(&rsa_key)], &outside.root), "P-256 key");
    refused(&mut cell, "none", import(vec![], &outside.root), "0 certificates");
    let four = vec![der(&good), der(&outside.root), der(&outside.root), der(&outside.root)];
    refused(&mut cell, "four", import(four, &outside.root), "4 certificates");
    let with_root = vec![der(&good), der(&outside.root)];
    refused(&mut cell, "the root in the chain", import(with_root, &outside.root), "key of its own");
    refused(&mut cell, "no DER", import(vec![vec![1, 2, 3]], &outside.root), "a certificate in DER");
    refused(&mut cell, "more after it", import(vec![[der(&good), vec![0]].concat()], &outside.root), "1 bytes after");
    refused(&mut cell, "huge", import(vec![vec![0x30; 9_000]], &outside.root), "at most 8192 bytes");
    for bit in [0, 1, 7] {
        let mut changed = der(&good);
        let last = changed.len() - 5;
        changed[last] ^= 1 << bit;
        refused(&mut cell, "a changed signature", import(vec![changed], &outside.root), "the signature of");
    }
    for says in [
        Says { extended: Some((true, true, true)), ..ok() },
        Says { ca: Some((true, Some(255))), ..ok() },
        Says { aki: Some(AKI_SERIAL_7), ..ok() },
    ] {
        let (mut other, key) = waiting();
        assert!(run(&mut other, import(vec![der(&outside.certify(&says, &key))], &outside.root)).is_ok());
    }
    let (mut other, key) = waiting();
    let unnamed = outside.certify(&Says { uris: vec![], ..ok() }, &key);
    assert!(run(&mut other, import(vec![der(&unnamed)], &outside.root)).is_ok(), "a SPIFFE ID is a SHOULD");
    assert!(run(&mut cell, import(vec![der(&good)], &outside.root)).is_ok(), "and the good one is taken");
}

#[test]
fn roots_that_are_none_are_refused() {
    let (mut cell, key) = waiting();
    let top = Outside::new(p256(), &Says::root());
    // Signed by somebody else: no root.
    let tier_key = p256();
    let tier = top.certify(&Says::tier(), &tier_key);
    let below = Outside { key: tier_key, root: tier };
    let cert = below.certify(&Says::authority(), &key);
    refused(&mut cell, "a tier as the root", import(vec![der(&cert)], &below.root), "a root that signed itself");
    refused(&mut cell, "a tier left out", import(vec![der(&cert)], &top.root), "the issuer");
    // Same name, another key.
    let twin = Outside::new(p256(), &Says::root());
    let cert = top.certify(&Says { key_id: true, ..Says::authority() }, &key);
    refused(&mut cell, "a twin of the root", import(vec![der(&cert)], &twin.root), "key identifier of its issuer");
    let bare = |key_id| Outside::new(p256(), &Says { key_id, ..Says::root() });
    let cert = bare(false).certify(&Says::authority(), &key);
    refused(&mut cell, "another's signature", import(vec![der(&cert)], &bare(false).root), "the signature of");
    for (what, key_of, says, rule) in [
        ("no KeyUsage", p256(), Says { usage: None, ..Says::root() }, "keyCertSign"),
        ("pathLen 1", p256(), Says { ca: Some((true, Some(1))), ..Says::root() }, "one of 2 or more"),
        ("of another trust domain", p256(), Says { uris: vec!["spiffe://east"], ..Says::root() }, "no URI but"),
        ("ended", p256(), Says { from_days: -90, days: -30, ..Says::root() }, "ends before what is above it"),
        ("RSA 1024", rsa(1024), Says::root(), "RSA of 2048"),
        ("P-521", ec(Nid::SECP521R1), Says::root(), "P-256 or P-384"),
        ("policy constraints", p256(), Says { more: Some(("2.5.29.36", true)), ..Says::root() }, "extension"),
    ] {
        let outside = Outside::new(key_of, &says);
        let cert = outside.certify(&Says::authority(), &key);
        refused(&mut cell, what, import(vec![der(&cert)], &outside.root), rule);
    }
    // A tier that nothing but a leaf may follow.
    let tier_key = p256();
    let tier = top.certify(&Says { ca: Some((true, Some(1))), ..Says::tier() }, &tier_key);
    let cert = Outside { key: tier_key, root: tier.clone() }.certify(&Says::authority(), &key);
    refused(&mut cell, "a tier with pathLen 1", import(vec![der(&cert), der(&tier)], &top.root), "one of 2 or more");
}

#[test]
fn a_request_is_spent_once_and_the_next_authority_signs_at_once_until_it_ends() {
    let (mut cell, key) = waiting();
    assert_eq!(code(request(&mut cell, &p256())), Code::AlreadyExists, "one at a time");
    let outside = Outside::new(p256(), &Says::root());
    let first = import(vec![der(&outside.certify(&Says::authority(), &key))], &outside.root);
    run(&mut cell, first.clone()).unwrap();
    assert_eq!(code(run(&mut cell, first.clone())), Code::AlreadyExists, "replayed");
    assert_eq!(code(cell.at(NOW, 0, Command::WithdrawExternal(spki_sha256(&key)))), Code::NotFound);
    let id = sha256(&first.root);
    let second = p256();
    request(&mut cell, &second).unwrap();
    let of_second = outside.certify(&Says { days: 80, ..Says::authority() }, &second);
    let next = ExternalImport { keys: Some(keys(5)), ..import(vec![der(&of_second)], &outside.root) };
    // A root whose key is here certifies it: without that nobody but who holds it would follow.
    assert_eq!(code(cell.at(NOW, 0, Command::ActivateRoot(id, keys(2)))), Code::RootState);
    cell.at(NOW, 0, Command::CrossSignRoot(id, vec![9])).unwrap();
    cell.at(NOW, 0, Command::ActivateRoot(id, keys(2))).unwrap();
    let sequence = cell.state.cell().unwrap().bundle_sequence;
    // Intermediates end with the authority: here a week is asked for, and a week is left.
    let renew = |n: u8| Command::RenewAuthority { replica: 1, key_hash: [n; 32], lifetime_ms: 7 * DAY_MS };
    let Reply::Authority(early) = cell.at(NOW, 0, renew(1)).unwrap() else { panic!("another reply") };
    assert_eq!(early.lifetime.not_after, Stamp(NOW + 7 * DAY_MS));
    let row = |cell: &Cell, n: u8| cell.state.authority(&format!("{n:02x}").repeat(20)).unwrap();
    assert!(cell.state.is_under_last(&row(&cell, 1)));
    // The next one: no bundle changes, and what is under the first is to be renewed.
    assert_eq!(code(run(&mut cell, ExternalImport { keys: None, ..next.clone() })), Code::BadRequest);
    run(&mut cell, next).unwrap();
    assert_eq!(cell.state.cell().unwrap().bundle_sequence, sequence);
    assert_eq!(cell.state.key_set(), Some(&keys(5)));
    assert!(!cell.state.is_under_last(&row(&cell, 1)));
    let first_name = cell.state.externals_of(&id).next().unwrap().1.authority();
    assert_eq!(code(cell.at(NOW, 0, Command::RevokeAuthority(first_name.clone()))), Code::AuthorityInUse);
    let signing = cell.state.external(&id).unwrap().authority();
    assert_eq!(code(cell.at(NOW, 0, Command::RevokeAuthority(signing.clone()))), Code::AuthorityInUse);
    assert_eq!(code(cell.at(NOW, 0, Command::TaintAuthority(signing))), Code::RootState);
    assert!(cell.state.tainted_authorities().is_empty());
    let untouched = State::import(cell.state.export()).unwrap();
    cell.at(NOW, 0, Command::TaintAuthority(first_name.clone())).unwrap();
    assert!(cell.state.tainted_authorities().contains(&"01".repeat(20)), "what is under it is issued anew");
    cell.at(NOW, 0, renew(2)).unwrap();
    assert!(cell.state.is_under_last(&row(&cell, 2)));
    // Without that its revocation would cut off whoever was issued something under it.
    let mut hasty = Cell { state: untouched, index: cell.index, log: Vec::new() };
    hasty.at(NOW, 0, renew(2)).unwrap();
    assert_eq!(code(hasty.at(NOW, 0, Command::RevokeAuthority(first_name.clone()))), Code::RootState);
    assert!(hasty.state.denied_authorities().is_empty());
    cell.at(NOW, 0, Command::RevokeAuthority(first_name.clone())).unwrap();
    let until = cell.state.authority_denials().find(|((_, name), _)| *name == first_name).map(|(_, until)| *until);
    assert_eq!(until, Some(Stamp(NOW + 60 * DAY_MS)), "as long as it lasts");
    assert_eq!([1, 2].map(|n| row(&cell, n).state), [AuthorityState::Revoked, AuthorityState::Active]);
    let denied = |cell: &Cell, name: String| cell.state.denied_authorities().contains(&("west".parse().unwrap(), name));
    assert!(denied(&cell, "01".repeat(20)) && !denied(&cell, "02".repeat(20)), "and what it signed");
    // Near its end nothing outlives it, and at its end nothing is signed.
    let ends = NOW + 80 * DAY_MS;
    let Reply::Authority(late) = cell.at(ends - DAY_MS, 0, renew(3)).unwrap() else { panic!("another reply") };
    assert_eq!(late.lifetime.not_after, Stamp(ends));
    assert_eq!(code(cell.at(ends, 0, renew(4))), Code::IssuerUnavailable);
    cell.at(ends, 0, Command::Tick).unwrap();
    assert_eq!(cell.state.externals_of(&id).count(), 1, "the first is forgotten, the last is not");
    // The next root needs no certificate of a key that is not here.
    let own = b"own root".to_vec();
    cell.at(NOW, 0, Command::TaintRoot(sha256(b"west"))).unwrap();
    cell.at(NOW, 0, Command::RevokeRoot(sha256(b"west"))).unwrap();
    cell.at(ends, 0, Command::PrepareRoot(own.clone(), [(1, vec![1])].into())).unwrap();
    cell.at(ends, 0, Command::ActivateRoot(sha256(&own), keys(6))).unwrap();
    assert_eq!(cell.state.authority_ends(), None);
    // The root goes, and its authority with it by name: it may have signed what the cell knows nothing of.
    let last = cell.state.external(&id).unwrap().authority();
    cell.at(ends, 0, renew(5)).unwrap();
    cell.at(ends, 0, Command::TaintRoot(id)).unwrap();
    assert!(!denied(&cell, last.clone()));
    cell.at(ends, 0, Command::RevokeRoot(id)).unwrap();
    assert!(denied(&cell, last) && denied(&cell, "03".repeat(20)) && !denied(&cell, "05".repeat(20)));
}

#[test]
fn downstream_authorities_are_tainted_and_revoked_with_what_signed_them() {
    let (mut cell, key) = waiting();
    let outside = Outside::new(p256(), &Says::root());
    let first = import(vec![der(&outside.certify(&Says::authority(), &key))], &outside.root);
    let id = sha256(&first.root);
    run(&mut cell, first).unwrap();
    cell.at(NOW, 0, Command::CrossSignRoot(id, vec![9])).unwrap();
    cell.at(NOW, 0, Command::ActivateRoot(id, keys(2))).unwrap();
    let renew = |n: u8| Command::RenewAuthority { replica: 1, key_hash: [n; 32], lifetime_ms: 7 * DAY_MS };
    let name = |n: u8| format!("{n:02x}").repeat(20);
    cell.at(NOW, 0, renew(1)).unwrap();
    cell.at(NOW, 0, Command::AllowEk(cluster("west"), vec![node(1)])).unwrap();
    let admitted = Admission { authority: name(1), deadline: Stamp(NOW + 60_000), ..admission(&cell, 1, 1, None) };
    cell.at(NOW, 0, Command::AdmitNode(admitted)).unwrap();
    let extras = Extras::new(EntryExtras { downstream: true, ..EntryExtras::NONE }).unwrap();
    let site = Entry { extras, nodes: [node(1)].into(), ..entry("site", "west") };
    let Reply::Items(_) = cell.at(NOW, 0, Command::CreateEntries(vec![site])).unwrap() else { panic!("no items") };
    let ask = |cell: &mut Cell, authority: String, n: u8| {
        let leaves = vec![LeafRequest { entry: "site".parse().unwrap(), key_hash: [8; 32] }];
        let generation = cell.state.node(&node(1)).unwrap().generation;
        let issue = Command::Issue { node: node(1), generation, authority, leaves };
        let Reply::Leaves(mut leaves) = cell.at(NOW, 0, issue).unwrap() else { panic!("no leaves") };
        let serial = leaves.remove(0).unwrap().serial;
        let (key_hash, lifetime_ms) = ([n; 32], DAY_MS);
        cell.at(NOW, 0, Command::NewDownstream { node: node(1), generation, serial, key_hash, lifetime_ms }).unwrap();
    };
    ask(&mut cell, name(1), 20);
    let second = p256();
    request(&mut cell, &second).unwrap();
    let next = import(vec![der(&outside.certify(&Says { days: 80, ..Says::authority() }, &second))], &outside.root);
    run(&mut cell, ExternalImport { keys: Some(keys(5)), ..next }).unwrap();
    cell.at(NOW, 0, renew(2)).unwrap();
    ask(&mut cell, name(2), 21);
    let states = |cell: &Cell| [20, 21].map(|n| cell.state.downstream(&name(n)).unwrap().state);
    let former = cell.state.externals_of(&id).next().unwrap().1.authority();
    // The intermediate alone: what the authority signed itself counts as well.
    cell.at(NOW, 0, Command::TaintAuthority(name(1))).unwrap();
    assert_eq!(code(cell.at(NOW, 0, Command::RevokeAuthority(former.clone()))), Code::RootState);
    cell.at(NOW, 0, Command::TaintAuthority(former.clone())).unwrap();
    assert_eq!(states(&cell), [AuthorityState::Tainted, AuthorityState::Active]);
    cell.at(NOW, 0, Command::RevokeAuthority(former)).unwrap();
    assert_eq!(states(&cell), [AuthorityState::Revoked, AuthorityState::Active]);
    let denied = cell.state.denied_authorities();
    assert!(denied.contains(&("west".parse().unwrap(), name(20))), "here and at peers");
    assert!(!denied.contains(&("west".parse().unwrap(), name(21))));
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn keys(n: u8) -> KeySetRow {
    KeySetRow { statement: vec![n], signature: vec![n] }
}

struct Key(PKey<Private>);

impl Key {
    fn public(&self) -> [u8; 32] {
        self.0.raw_public_key().unwrap().try_into().unwrap()
    }
    fn sign(&self, message: &[u8]) -> Vec<u8> {
        Signer::new_without_digest(&self.0).unwrap().sign_oneshot_to_vec(message).unwrap()
    }
}

#[test]
fn a_new_root_takes_two_approvers_and_the_next_certificate_none() {
    let (mut cell, key) = waiting();
    let [alice, bob] = [(); 2].map(|()| Key(PKey::generate_ed25519().unwrap()));
    let outside = Outside::new(p256(), &Says::root());
    let bare = import(vec![der(&outside.certify(&Says::authority(), &key))], &outside.root);
    let signed = |act: &Act, keys: &[&Key]| {
        let (trust_domain, expires) = ("west".parse().unwrap(), Stamp(NOW + 3_600_000));
        let proposal = Proposal { trust_domain, epoch: 1, expires, nonce: [keys.len() as u8; 16], act: act.clone() };
        let message = proposal.statement().unwrap();
        let approvals = keys.iter().map(|k| Approval { key: k.public(), signature: k.sign(&message) }).collect();
        Approved { epoch: 1, expires, nonce: proposal.nonce, approvals }
    };
    let card = |k: &Key| ApproverCard { key: k.public(), proof: k.sign(&ApproverCard::proved(&k.public())) };
    let add = |name: &str, k: &Key| Act::AddApprover(name.parse().unwrap(), card(k));
    let done = |act: Act, approved| Command::Act { act, approved, by: "ada".into() };
    let act = Act::ImportRoot(sha256(&bare.root), spki_sha256(&key));
    assert_eq!(code(cell.at(NOW, 0, done(act.clone(), None))), Code::BadRequest, "without its certificate");
    cell.at(NOW, 0, done(add("alice", &alice), None)).unwrap();
    assert_eq!(code(run(&mut cell, bare.clone())), Code::NeedsSecondApprover);
    let second = add("bob", &bob);
    let by_alice = signed(&second, &[&alice]);
    cell.at(NOW, 0, done(second, Some(by_alice))).unwrap();
    let with = |approved| ExternalImport { approved: Some(approved), ..bare.clone() };
    assert_eq!(code(run(&mut cell, bare.clone())), Code::ApprovalMissing);
    assert_eq!(code(run(&mut cell, with(signed(&act, &[&alice])))), Code::ApprovalMissing);
    let of_another = Act::ImportRoot(sha256(&bare.root), [1; 32]);
    assert_eq!(code(run(&mut cell, with(signed(&of_another, &[&alice, &bob])))), Code::ApprovalInvalid);
    run(&mut cell, with(signed(&act, &[&alice, &bob]))).unwrap();
    assert_eq!(cell.state.acts().last().map(|(_, row)| row.act.clone()), Some(act));
    let id = sha256(&bare.root);
    cell.at(NOW, 0, Command::CrossSignRoot(id, vec![9])).unwrap();
    cell.at(NOW, 0, Command::ActivateRoot(id, keys(2))).unwrap();
    let second = p256();
    request(&mut cell, &second).unwrap();
    let next = import(vec![der(&outside.certify(&Says::authority(), &second))], &outside.root);
    run(&mut cell, ExternalImport { keys: Some(keys(3)), ..next }).unwrap();
}

#[test]
fn an_authority_that_ended_is_certified_anew_while_the_cell_stands_still() {
    let (mut cell, key) = waiting();
    let outside = Outside::new(p256(), &Says::root());
    let of = |says: Says, key: &PKey<Private>| vec![der(&outside.certify(&says, key))];
    let late = Stamp(NOW + 61 * DAY_MS);
    let anew = |days: i64| Says { from_days: 60, days: 61 + days, ..Says::authority() };
    assert_eq!(code(cell.state.certify_anew(of(anew(60), &key), late)), Code::NotFound, "no external root");
    let first = import(of(Says::authority(), &key), &outside.root);
    let id = sha256(&first.root);
    run(&mut cell, first).unwrap();
    cell.at(NOW, 0, Command::CrossSignRoot(id, vec![9])).unwrap();
    cell.at(NOW, 0, Command::ActivateRoot(id, keys(2))).unwrap();
    let begin = || ambit_state::Beginning {
        cause: ambit_state::objects::Cause::Restored,
        replica: 1,
        member: cell_member(),
        admit: Some(([5; 32], [6; 32])),
        past_epoch: 0,
        keys: None,
    };
    let recovered = || ambit_state::Beginning { admit: None, ..begin() };
    for (what, beginning) in [("restored", begin()), ("recovered", recovered())] {
        let before = cell.state.digest();
        let refused = cell.state.begin_incarnation(late, beginning).map(drop);
        assert_eq!(refused.unwrap_err().code, Code::IssuerUnavailable, "{what} by one that ended");
        assert!(cell.state.digest() == before, "{what}: something changed");
    }
    let young = Says { from_days: 61, days: 121, ..Says::authority() };
    assert_eq!(
        code(cell.state.certify_anew(of(young, &key), late)),
        Code::ExternalCertificate,
        "not yet for all clocks"
    );
    assert_eq!(code(cell.state.certify_anew(of(anew(60), &p256()), late)), Code::ExternalCertificate, "another key");
    assert_eq!(code(cell.state.certify_anew(of(anew(5), &key), late)), Code::ExternalCertificate, "too short");
    cell.state.certify_anew(of(anew(60), &key), late).unwrap();
    let admitted = cell.state.begin_incarnation(late, begin()).unwrap().unwrap();
    assert_eq!(admitted.get().lifetime.not_after, Stamp(late.0 + 7 * DAY_MS));
    assert_eq!(cell.state.authority_ends(), Some(Stamp(NOW + 121 * DAY_MS)));
}

/// A cell with an external root that is prepared with this authority.
fn prepared(outside: &Outside, says: &Says) -> (Cell, [u8; 32]) {
    let (mut cell, key) = waiting();
    let first = import(vec![der(&outside.certify(says, &key))], &outside.root);
    run(&mut cell, first).unwrap();
    let id = sha256(&der(&outside.root));
    cell.at(NOW, 0, Command::CrossSignRoot(id, vec![9])).unwrap();
    (cell, id)
}

fn run_at(cell: &mut Cell, now: u64, import: ExternalImport) -> Result<Reply, Refusal> {
    cell.at(now, 0, Command::ImportExternal(Box::new(import)))
}

#[test]
fn a_prepared_root_whose_authority_ran_out_is_activated_with_another_one_and_not_before() {
    let outside = Outside::new(p256(), &Says::root());
    let (mut cell, id) = prepared(&outside, &Says::authority());
    let late = NOW + 54 * DAY_MS;
    for at in [late, NOW + 70 * DAY_MS] {
        let refused = cell.at(at, 0, Command::ActivateRoot(id, keys(2))).unwrap_err();
        assert!(refused.code == Code::ExternalCertificate && refused.expected.contains("7 days left"), "{refused:?}");
    }
    let second = p256();
    request(&mut cell, &second).unwrap();
    let of_second = outside.certify(&Says { from_days: 50, days: 120, ..Says::authority() }, &second);
    let instead = import(vec![der(&of_second)], &outside.root);
    let sequence = cell.state.cell().unwrap().bundle_sequence;
    let reply = run_at(&mut cell, NOW + 70 * DAY_MS, instead);
    let Ok(Reply::Root(again)) = reply else { panic!("another reply: {reply:?}") };
    assert_eq!((again.root, cell.state.cell().unwrap().bundle_sequence), (id, sequence), "no bundle changes");
    let row = cell.state.roots().remove(&id).unwrap();
    assert_eq!(
        (&row.wrapped[&1], row.cross_der),
        (&vec![2], vec![9]),
        "the root's certificate stays: it is of its key"
    );
    cell.at(NOW + 70 * DAY_MS, 0, Command::ActivateRoot(id, keys(2))).unwrap();
    assert_eq!(cell.state.authority_ends(), Some(Stamp(NOW + 120 * DAY_MS)));
}

#[test]
fn an_authority_signs_from_half_a_minute_after_its_beginning_on() {
    let outside = Outside::new(p256(), &Says::root());
    let young = Says { from_days: 0, ..Says::authority() };
    let (mut cell, id) = prepared(&outside, &young);
    let refused = cell.at(NOW + 29_999, 0, Command::ActivateRoot(id, keys(2))).unwrap_err();
    assert!(refused.code == Code::ExternalCertificate && refused.found.contains("wait 1 s"), "{refused:?}");
    cell.at(NOW + 30_000, 0, Command::ActivateRoot(id, keys(2))).unwrap();
    let second = p256();
    request(&mut cell, &second).unwrap();
    let later = outside.certify(&Says { from_days: 1, days: 80, ..Says::authority() }, &second);
    let next = ExternalImport { keys: Some(keys(3)), ..import(vec![der(&later)], &outside.root) };
    let refused = run_at(&mut cell, NOW + DAY_MS + 10_000, next.clone()).unwrap_err();
    assert!(refused.code == Code::ExternalCertificate && refused.found.contains("wait 20 s"), "{refused:?}");
    run_at(&mut cell, NOW + DAY_MS + 30_000, next).unwrap();
}

#[test]
fn an_external_root_that_was_given_up_returns_and_an_own_one_never() {
    let outside = Outside::new(p256(), &Says::root());
    let (mut cell, id) = prepared(&outside, &Says::authority());
    let former = cell.state.external(&id).unwrap().authority();
    cell.at(NOW, 0, Command::RevokeRoot(id)).unwrap();
    let denied = |cell: &Cell| cell.state.authority_denials().any(|((_, name), _)| *name == former);
    assert!(denied(&cell) && cell.state.external(&id).is_none());
    let until = denied_until(&cell, &former);
    cell.at(NOW, 0, Command::DenyAuthority(former.clone())).unwrap();
    assert_eq!(denied_until(&cell, &former), until, "a denial only grows");
    let second = p256();
    request(&mut cell, &second).unwrap();
    let again = import(vec![der(&outside.certify(&Says::authority(), &second))], &outside.root);
    let Ok(Reply::Root(back)) = run(&mut cell, again) else { panic!("it does not return") };
    assert_eq!((back.root, cell.state.roots()[&id].state), (id, ambit_model::bundle::RootState::Prepared));
    assert!(denied(&cell), "what it was before stays refused");
    cell.at(NOW, 0, Command::CrossSignRoot(id, vec![9])).unwrap();
    cell.at(NOW, 0, Command::ActivateRoot(id, keys(2))).unwrap();
    // A root whose key was here is not asked for by that name, whoever has its key by now.
    let own = Outside::new(p256(), &Says::root());
    let own_id = sha256(&der(&own.root));
    let mut cell = Cell::founded("west");
    cell.at(NOW, 0, Command::PrepareRoot(der(&own.root), [(1, vec![1])].into())).unwrap();
    cell.at(NOW, 0, Command::RevokeRoot(own_id)).unwrap();
    let key = p256();
    request(&mut cell, &key).unwrap();
    let again = import(vec![der(&own.certify(&Says::authority(), &key))], &own.root);
    assert_eq!(code(run(&mut cell, again)), Code::RootState);
}

#[test]
fn what_was_made_with_a_former_authoritys_key_is_refused() {
    let outside = Outside::new(p256(), &Says::root());
    let (mut cell, id) = prepared(&outside, &Says::authority());
    let made_with = cell.state.external(&id).unwrap().key_hash;
    let wrap = || Command::OverAuthority(id, made_with, Box::new(Command::WrapRoot(id, [(1, vec![3])].into())));
    let wrapped = |cell: &Cell| cell.state.roots()[&id].wrapped[&1].clone();
    cell.at(NOW, 0, wrap()).unwrap();
    assert_eq!(wrapped(&cell), [3]);
    let second = p256();
    request(&mut cell, &second).unwrap();
    run(&mut cell, import(vec![der(&outside.certify(&Says::authority(), &second))], &outside.root)).unwrap();
    assert_eq!(code(cell.at(NOW, 0, wrap())), Code::StaleRevision);
    assert_eq!(wrapped(&cell), [2], "the key of the authority that signs");
    let none = Command::OverAuthority(sha256(b"west"), made_with, Box::new(Command::Tick));
    assert_eq!(code(cell.at(NOW, 0, none)), Code::StaleRevision, "no external root");
}

fn cell_member() -> ambit_state::objects::Member {
    ambit_state::objects::Member {
        address: "127.0.0.1:1".into(),
        authority: "a2".into(),
        authority_not_after: Stamp(0),
        wrap_key: vec![],
        record_key: [1; 32],
    }
}

#[test]
fn bounds_are_what_they_say() {
    assert_eq!((LEFT_MS_MIN / DAY_MS, LIFE_MS_MAX / DAY_MS), (7, 398));
    let outside = Outside::new(p256(), &Says::root());
    let chain = vec![der(&outside.certify(&Says::authority(), &p256()))];
    let judged = path(&"west".parse().unwrap(), &chain, &der(&outside.root)).unwrap();
    let days = |n: i64| Stamp((NOW as i64 + n * DAY_MS as i64) as u64);
    assert_eq!(judged.lifetime(), Lifetime { not_before: days(-1), not_after: days(60) });
    assert_eq!(judged.key_hash(), sha256(judged.spki()));
    // No bytes make it panic.
    let good = &chain[0];
    for at in 0..good.len() {
        for byte in [0, 0xff, good[at] ^ 1, 0x30, 0x80] {
            let mut changed = good.clone();
            changed[at] = byte;
            let changed_any = changed != *good;
            let outcome = path(&"west".parse().unwrap(), &[changed], &der(&outside.root));
            assert!(outcome.is_err() || !changed_any, "byte {at} of {}: {byte}, {}", good.len(), hex(good));
        }
        assert!(path(&"west".parse().unwrap(), &[good[..at].to_vec()], &der(&outside.root)).is_err());
    }
}
