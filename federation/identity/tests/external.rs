//! What a cell signs under a root that somebody else keeps, by this crate and by OpenSSL, which is also the outside CA.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use ambit_identity::external::request;
use ambit_identity::keys::{certificates_to_pem, csr_to_pem};
use ambit_identity::svid::verify_pinned;
use ambit_identity::{Csr, IssuingKey, KeySet, RecordKey, Root, SvidKey, TrustStore, fingerprint, share, verify_svid};
use ambit_model::bundle::{Bundle, Own};
use ambit_model::{Code, Lifetime, RaftIndex, Stamp, TrustDomain};
use ambit_state::external::ExternalImport;
use ambit_state::objects::KeySetRow;
use ambit_state::{Applied, Command, LogEntry, State};
use common::founding;
use rustls_pki_types::CertificateDer;
use std::path::{Path, PathBuf};
use std::process::Command as Program;

const DAY_MS: u64 = 86_400_000;
/// A root of a century.
const CA_DAYS: &str = "36500";

struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Folder {
    fn new(name: &str) -> Folder {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        Folder(folder)
    }
    fn file(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
    fn openssl(&self, args: &[&str]) -> (bool, String) {
        let out = Program::new("openssl").args(args).current_dir(&self.0).output().unwrap();
        (out.status.success(), String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned())
    }
    fn der(&self, name: &str) -> Vec<u8> {
        let pem = std::fs::read(self.0.join(name)).unwrap();
        openssl::x509::X509::from_pem(&pem).unwrap().to_der().unwrap()
    }
    /// An outside CA's root, made by OpenSSL's program: `kind` as of `openssl req -newkey`.
    fn root(&self, kind: &[&str]) -> CertificateDer<'static> {
        let args = ["req", "-x509", "-nodes", "-days", CA_DAYS, "-keyout", "root.key", "-out", "root.pem"];
        let says =
            ["-subj", "/C=CH/O=Example/OU=PKI/CN=Example Root", "-addext", "keyUsage=critical,keyCertSign,cRLSign"];
        let (good, said) = self.openssl(&[&args[..], &["-newkey"], kind, &says].concat());
        assert!(good, "{said}");
        self.der("root.pem").into()
    }
    /// What the CA makes of a request for these days: what the request asks for, copied.
    fn sign(&self, csr: &[u8], days: &str) -> CertificateDer<'static> {
        std::fs::write(self.0.join("csr.pem"), csr_to_pem(csr)).unwrap();
        std::fs::write(self.0.join("ext.cnf"), "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n").unwrap();
        let args = ["x509", "-req", "-in", "csr.pem", "-CA", "root.pem", "-CAkey", "root.key", "-out", "authority.pem"];
        let how = ["-days", days, "-copy_extensions", "copyall", "-extfile", "ext.cnf", "-CAcreateserial"];
        let (good, said) = self.openssl(&[&args[..], &how].concat());
        assert!(good, "{said}");
        self.der("authority.pem").into()
    }
    fn pem(&self, name: &str, ders: &[CertificateDer<'_>]) -> String {
        std::fs::write(self.0.join(name), certificates_to_pem(ders.iter().map(AsRef::as_ref))).unwrap();
        self.file(name)
    }
    /// Whether OpenSSL takes a chain (leaf first) by these roots.
    fn verifies(&self, chain: &[CertificateDer<'_>], roots: &[CertificateDer<'_>], now: Stamp) -> (bool, String) {
        let (leaf, above) = (self.pem("leaf.pem", &chain[..1]), self.pem("above.pem", &chain[1..]));
        let (roots, at) = (self.pem("roots.pem", roots), (now.0 / 1000).to_string());
        let how = ["verify", "-x509_strict", "-check_ss_sig", "-attime", &at, "-CAfile", &roots, "-untrusted", &above];
        self.openssl(&[&how[..], &[leaf.as_str()]].concat())
    }
}

fn csr(key: &SvidKey) -> Csr {
    Csr::parse(&key.csr().unwrap()).unwrap()
}

/// A cell that goes over to an external root, at the time of the machine: that of the CA.
struct Going {
    folder: Folder,
    td: TrustDomain,
    now: Stamp,
    state: State,
    own: Root,
    under_own: IssuingKey,
    external: CertificateDer<'static>,
    authority: Root,
}

impl Going {
    fn run(state: &mut State, now: Stamp, command: Command) -> Applied {
        let index = RaftIndex(state.applied().0 + 1);
        state.apply(index, &LogEntry { stamp: now, client: [0; 32], request: [0; 16], command })
    }

    fn new(name: &str, kind: &[&str]) -> Going {
        let (folder, td): (_, TrustDomain) = (Folder::new(name), "west".parse().unwrap());
        // The CA's certificates begin when it makes them, by the machine's clock.
        let seconds = Program::new("date").arg("+%s").output().unwrap().stdout;
        let seconds: u64 = String::from_utf8(seconds).unwrap().trim().parse().unwrap();
        let now = Stamp(seconds * 1000).plus_ms(60_000);
        let (own, key) = (Root::create(&td, now, [0x41; 16]).unwrap(), SvidKey::generate().unwrap());
        let week = Lifetime { not_before: now.minus_ms(60_000), not_after: now.plus_ms(7 * DAY_MS) };
        let first = own.found(1, &csr(&key), week).unwrap();
        let under_own = IssuingKey::new(key, first).unwrap();
        let mut state = State::new();
        for command in founding(td.clone(), own.der().to_vec(), under_own.authority(), under_own.not_after()) {
            Self::run(&mut state, now, command).outcome.unwrap();
        }
        let key = SvidKey::generate().unwrap();
        let (asked, key_hash) = (request(&td, &key).unwrap(), key.spki_sha256());
        let wrapped: std::collections::BTreeMap<u64, Vec<u8>> = [(1, vec![1])].into();
        let waits = Command::RequestExternal { csr: asked.clone(), key_hash, wrapped: wrapped.clone() };
        Self::run(&mut state, now, waits).outcome.unwrap();
        let external = folder.root(kind);
        let certified = folder.sign(&asked, "60");
        let import = ExternalImport {
            chain: vec![certified.to_vec()],
            root: external.to_vec(),
            wrapped,
            keys: None,
            approved: None,
            by: "ada".into(),
        };
        let prepared = Self::run(&mut state, now, Command::ImportExternal(Box::new(import))).into_root().unwrap();
        let cross = own.cross_sign(&prepared, &external).unwrap();
        let id = fingerprint(&external);
        Self::run(&mut state, now, Command::CrossSignRoot(id, cross.to_vec())).outcome.unwrap();
        Self::run(&mut state, now, Command::ActivateRoot(id, KeySetRow::default())).outcome.unwrap();
        let authority = Root::under(&td, external.clone(), vec![certified], key).unwrap();
        let refused = authority.cross_sign(&prepared, own.der()).unwrap_err();
        assert_eq!(refused.code, Code::ExternalRoot, "an authority certifies no root");
        Going { folder, td, now, state, own, under_own, external, authority }
    }

    /// The replica's intermediate under the external root, with what is above it.
    fn renewed(&mut self, cross: bool) -> IssuingKey {
        let key = SvidKey::generate().unwrap();
        let renew = Command::RenewAuthority { replica: 1, key_hash: csr(&key).spki_sha256(), lifetime_ms: DAY_MS };
        let committed = Self::run(&mut self.state, self.now, renew).into_authority().unwrap();
        let intermediate = self.authority.renewed(&committed, &csr(&key)).unwrap();
        let row = self.state.roots().remove(&fingerprint(&self.external)).unwrap();
        let cross = cross.then(|| CertificateDer::from(row.cross_der));
        let above = self.authority.above().iter().cloned().chain(cross).collect();
        IssuingKey::new(key, intermediate).unwrap().under(above)
    }

    fn leaf(&self, issuer: &IssuingKey) -> Vec<CertificateDer<'static>> {
        let lifetime = Lifetime { not_before: self.now.minus_ms(60_000), not_after: self.now.plus_ms(3_600_000) };
        issuer.replica_leaf(1, &self.td, lifetime, &csr(&SvidKey::generate().unwrap())).unwrap()
    }

    fn store(&self, roots: &[&CertificateDer<'_>]) -> TrustStore {
        let roots = roots.iter().map(|der| der.to_vec()).collect();
        TrustStore::new(&Bundle::<Own>::new(self.td.clone(), 1, roots)).unwrap()
    }
}

const KINDS: &[(&str, &[&str])] = &[
    ("p256", &["ec", "-pkeyopt", "ec_paramgen_curve:P-256"]),
    ("p384", &["ec", "-pkeyopt", "ec_paramgen_curve:P-384", "-sha384"]),
    ("rsa", &["rsa:2048"]),
];

#[test]
fn leaves_verify_by_the_external_root_alone_and_by_the_former_while_that_is_relied_on() {
    for (name, kind) in KINDS {
        let mut g = Going::new(&format!("external-{name}"), kind);
        let (crossed, plain) = (g.renewed(true), g.renewed(false));
        let (own, external) = (g.own.der().clone(), g.external.clone());
        let former = g.leaf(&g.under_own);
        for (what, chain, roots, good) in [
            ("crossed by the external", g.leaf(&crossed), vec![&external], true),
            ("crossed by the former", g.leaf(&crossed), vec![&own], true),
            ("crossed by both", g.leaf(&crossed), vec![&own, &external], true),
            ("plain by the external", g.leaf(&plain), vec![&external], true),
            ("plain by the former", g.leaf(&plain), vec![&own], false),
            ("former by the external", former, vec![&external], false),
        ] {
            let verified = verify_svid(&chain, &g.store(&roots), g.now);
            assert_eq!(verified.is_ok(), good, "{name}, {what}: {verified:?}");
            let by: Vec<CertificateDer<'_>> = roots.iter().map(|der| (*der).clone()).collect();
            let (taken, said) = g.folder.verifies(&chain, &by, g.now);
            assert_eq!(taken, good, "{name}, {what}, openssl: {said}");
            if let Ok(peer) = verified {
                assert_eq!(peer.issuer().map(|named| named.replica), Some(1));
            }
        }
        // What a replica shows: both roots at the end, and either may be pinned.
        let shown = [g.leaf(&crossed), vec![external.clone(), own.clone()]].concat();
        for root in [&own, &external] {
            verify_pinned(&shown, &g.td, &fingerprint(root), g.now).unwrap();
        }
        // What is above a leaf is asked about while a connection lasts: all of it, but for roots, whose denial ends nothing.
        let above = [&plain, &crossed].map(|issuer| {
            let peer = verify_svid(&g.leaf(issuer), &g.store(&[&own, &external]), g.now).unwrap();
            (peer.above().to_vec(), issuer.authority().to_owned())
        });
        let authority = hex::encode(&g.authority.key().spki_sha256()[..20]);
        for (above, issuer) in above {
            assert_eq!(above, [issuer, authority.clone()], "{name}");
        }
        let pinned = verify_pinned(&shown, &g.td, &fingerprint(&external), g.now).unwrap();
        assert!(pinned.above().contains(&authority));
        assert!(!pinned.above().contains(&ambit_identity::name_of(&external).unwrap()));
        let mut denied = g.store(&[&external]);
        denied.deny_authorities([(g.td.clone(), hex::encode(&g.authority.key().spki_sha256()[..20]))]);
        let refused = verify_svid(&g.leaf(&plain), &denied, g.now).unwrap_err();
        assert_eq!(refused.code, Code::SvidUntrusted, "a revoked authority is refused by its key");
    }
}

#[test]
fn an_authority_is_tried_by_signing_under_it() {
    for (name, kind) in KINDS {
        let g = Going::new(&format!("external-tried-{name}"), kind);
        g.authority.tried(g.now).unwrap();
        let refused = g.authority.tried(g.now.plus_ms(61 * DAY_MS)).unwrap_err();
        assert_eq!(refused.code, Code::ExternalCertificate, "{name}: what it signs is taken by nobody");
    }
}

#[test]
fn record_keys_are_certified_by_the_authority_and_known_by_the_external_root() {
    let g = Going::new("external-keys", KINDS[2].1);
    let record = RecordKey::generate().unwrap();
    let (statement, signature) = KeySet::certify(&g.authority, &g.td, 3, vec![record.public()]).unwrap();
    let set = KeySet::verify(&g.td, &g.external, &statement, &signature).unwrap();
    assert_eq!((set.seq(), set.keys()), (3, &[record.public()][..]));
    assert!(set.clone().in_time(g.now.plus_ms(59 * DAY_MS)).is_ok());
    assert_eq!(set.in_time(g.now.plus_ms(61 * DAY_MS)).unwrap_err().code, Code::Unavailable);
    let (own, by_own) = KeySet::certify(&g.own, &g.td, 3, vec![record.public()]).unwrap();
    let other: TrustDomain = "east".parse().unwrap();
    for (what, td, root, statement, signature) in [
        ("another root", &g.td, g.own.der(), &statement, &signature),
        ("another trust domain", &other, &g.external, &statement, &signature),
        ("the former root's", &g.td, &g.external, &own, &by_own),
        ("no signature", &g.td, &g.external, &statement, &vec![1]),
        ("nothing", &g.td, &g.external, &statement, &vec![]),
    ] {
        let refused = KeySet::verify(td, root, statement, signature).unwrap_err();
        assert_eq!(refused.code, Code::RecordSignature, "{what}");
    }
    for at in 0..signature.len() {
        let mut changed = signature.clone();
        changed[at] ^= 1;
        assert!(KeySet::verify(&g.td, &g.external, &statement, &changed).is_err(), "byte {at}");
    }
}

#[test]
fn the_authority_opens_by_its_own_key_alone_also_from_shares() {
    let g = Going::new("external-shares", KINDS[0].1);
    let above = g.authority.above().to_vec();
    let other = SvidKey::generate().unwrap();
    let refused = Root::under(&g.td, g.external.clone(), above.clone(), other).err().unwrap();
    assert_eq!(refused.code, Code::AuthorityMismatch);
    let east: TrustDomain = "east".parse().unwrap();
    let key = SvidKey::from_pkcs8(&g.authority.key().pkcs8()).unwrap();
    assert_eq!(
        Root::under(&east, g.external.clone(), above.clone(), key).err().unwrap().code,
        Code::ExternalCertificate
    );
    let set = ambit_identity::ShareSet::new(&g.authority, &g.td, 2, 3, [1; 16]).unwrap();
    let shares = set.split(&g.authority).unwrap();
    let two = || shares.iter().take(2).map(|s| ambit_identity::RootShare::parse(s.text().unwrap().as_bytes()).unwrap());
    let opened = share::recover(&g.td, g.external.clone(), above, &two().collect::<Vec<_>>()).unwrap();
    assert_eq!(opened.key().spki_sha256(), g.authority.key().spki_sha256());
    let bare = share::recover(&g.td, g.external.clone(), Vec::new(), &two().collect::<Vec<_>>());
    assert_eq!(bare.err().unwrap().code, Code::ShareInvalid, "without its certificate it is no key of the root");
}

#[test]
fn a_request_asks_for_what_an_import_must_have_and_shows_no_more_than_its_key() {
    let (folder, td): (_, TrustDomain) = (Folder::new("external-request"), "west".parse().unwrap());
    let key = SvidKey::generate().unwrap();
    std::fs::write(folder.0.join("csr.pem"), csr_to_pem(&request(&td, &key).unwrap())).unwrap();
    let (good, said) = folder.openssl(&["req", "-in", "csr.pem", "-noout", "-text", "-verify"]);
    assert!(good, "{said}");
    for wanted in [
        "URI:spiffe://west",
        "CA:TRUE, pathlen:1",
        "Certificate Sign, CRL Sign",
        "X509v3 Basic Constraints: critical",
        "X509v3 Key Usage: critical",
        "O = Ambit, CN = west authority",
    ] {
        assert!(said.contains(wanted), "{wanted} in {said}");
    }
    // A domain as long as they come still makes a name that RFC 5280 allows.
    let long: TrustDomain = format!("{}.example", "a".repeat(60)).parse().unwrap();
    std::fs::write(folder.0.join("csr.pem"), csr_to_pem(&request(&long, &key).unwrap())).unwrap();
    let (good, said) = folder.openssl(&["req", "-in", "csr.pem", "-noout", "-subject", "-verify"]);
    assert!(good && said.contains("authority"), "{said}");
}
