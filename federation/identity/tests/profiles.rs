//! Every kind of certificate and CRL that is made here, judged by pkilint and by openssl, which nobody here wrote.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use ambit_identity::external::request;
use ambit_identity::keys::certificates_to_pem;
use ambit_identity::{Csr, IssuingKey, Root, SvidKey, fingerprint, issue};
use ambit_model::{Entry, EntryExtras, Extras, Generation, Lifetime, RaftIndex, Selector, SvidTtl, TrustDomain};
use ambit_state::command::{IdVerb, LeafRequest, RoleChange};
use ambit_state::external::ExternalImport;
use ambit_state::objects::{KeySetRow, TokenRow, TokenScope};
use ambit_state::{Applied, Command, LogEntry, State};
use common::{NODE, NOW, admission, founding};
use std::path::{Path, PathBuf};
use std::process::{Command as Program, Stdio};

/// Findings that are no faults: code, how its message begins, and why. Any other fails, and so does a line that nothing needs.
const TOLERATED: &[(&str, &str, &str)] = &[
    (
        "pkix.invalid_uri_syntax",
        "Invalid URI syntax: \"spiffe://west",
        "pkilint knows some schemes of the web only; X509-SVID 2 and SPIFFE-ID 2 want just this URI (RFC 5280 4.2.1.6 wants \
         what RFC 3986 calls one)",
    ),
    (
        "pkix.invalid_domain_name_syntax",
        "Invalid domain name syntax: \"*.apps.example.org\"",
        "an entry may ask for a wildcard; RFC 5280 4.2.1.6 leaves its meaning to the application, RFC 9525 6.3 gives it",
    ),
];

/// One document, and who signed it.
struct Made {
    name: &'static str,
    der: Vec<u8>,
    issuer: &'static str,
}

/// A cell that is replacing its root.
struct Site {
    state: State,
    root: Root,
    issuer: IssuingKey,
    made: Vec<Made>,
}

fn csr(key: &SvidKey) -> Csr {
    Csr::parse(&key.csr().unwrap()).unwrap()
}

impl Site {
    fn new() -> Site {
        let td: TrustDomain = "west".parse().unwrap();
        let (root, key) = (Root::create(&td, NOW, [0x41; 16]).unwrap(), SvidKey::generate().unwrap());
        let week = Lifetime { not_before: NOW.minus_ms(60_000), not_after: NOW.plus_ms(7 * 86_400_000) };
        let first = root.found(1, &csr(&key), week).unwrap();
        let issuer = IssuingKey::new(key, first.clone()).unwrap();
        let mut site = Site { state: State::new(), root, issuer, made: vec![] };
        let root_der = site.root.der().to_vec();
        for command in founding(td, root_der.clone(), site.issuer.authority(), site.issuer.not_after()) {
            site.run(command).outcome.unwrap();
        }
        site.keep("root", &root_der, "root");
        site.keep("first intermediate", &first, "root");
        site
    }
    fn run(&mut self, command: Command) -> Applied {
        let index = RaftIndex(self.state.applied().0 + 1);
        self.state.apply(index, &LogEntry { stamp: NOW, client: [0; 32], request: [0; 16], command })
    }
    fn keep(&mut self, name: &'static str, der: &[u8], issuer: &'static str) {
        self.made.push(Made { name, der: der.to_vec(), issuer });
    }
    /// The leaf that `command` commits for `key`.
    fn leaf(&mut self, name: &'static str, key: &SvidKey, command: Command) {
        let committed = self.run(command).into_issuances().unwrap().remove(0).unwrap();
        let chain = issue(committed, &csr(key), &self.issuer).unwrap();
        self.keep(name, &chain[0], "first intermediate");
    }
    fn authority(&self) -> String {
        self.issuer.authority().to_owned()
    }

    fn nodes_and_workloads(&mut self) {
        let (key, authority) = (SvidKey::generate().unwrap(), self.authority());
        self.leaf("node", &key, admission(&authority, key.spki_sha256()));
        for (name, id, dns_names) in [
            ("workload", "spiffe://west/web", &[][..]),
            ("workload with DNS names", "spiffe://west/ns/prod/sa/w_e.b-1", &["web.example.org", "*.apps.example.org"]),
        ] {
            let extras = EntryExtras {
                dns_names: dns_names.iter().map(|name| name.parse().unwrap()).collect(),
                ..EntryExtras::NONE
            };
            let entry = Entry {
                id: name.to_lowercase().replace(' ', "-").parse().unwrap(),
                spiffe_id: id.parse().unwrap(),
                cluster: "c".parse().unwrap(),
                nodes: Default::default(),
                selectors: [Selector::UnixUid(1)].into(),
                ttl: SvidTtl::DEFAULT,
                federates_with: Default::default(),
                extras: Extras::new(extras).unwrap(),
            };
            let leaves = vec![LeafRequest { entry: entry.id.clone(), key_hash: key.spki_sha256() }];
            self.run(Command::CreateEntries(vec![entry])).outcome.unwrap();
            let command =
                Command::Issue { node: NODE, generation: Generation(1), authority: authority.clone(), leaves };
            self.leaf(name, &key, command);
        }
        let minted = Command::MintX509 {
            spiffe_id: "spiffe://west/minted".parse().unwrap(),
            dns_names: vec!["minted.example.org".parse().unwrap()],
            ttl: SvidTtl::DEFAULT,
            key_hash: key.spki_sha256(),
            authority,
            by: "ada".into(),
        };
        self.leaf("minted", &key, minted);
    }

    fn downstream(&mut self) {
        let (key, authority) = (SvidKey::generate().unwrap(), self.authority());
        let entry = Entry {
            id: "site".parse().unwrap(),
            spiffe_id: "spiffe://west/site".parse().unwrap(),
            cluster: "c".parse().unwrap(),
            nodes: [NODE].into(),
            selectors: [Selector::UnixUid(1)].into(),
            ttl: SvidTtl::DEFAULT,
            federates_with: Default::default(),
            extras: Extras::new(EntryExtras { downstream: true, ..EntryExtras::NONE }).unwrap(),
        };
        let leaves = vec![LeafRequest { entry: entry.id.clone(), key_hash: key.spki_sha256() }];
        self.run(Command::CreateEntries(vec![entry])).outcome.unwrap();
        let (node, generation) = (NODE, Generation(1));
        let issue = Command::Issue { node, generation, authority, leaves };
        let serial = self.run(issue).into_issuances().unwrap().remove(0).unwrap().get().serial;
        let (key_hash, lifetime_ms) = (key.spki_sha256(), 86_400_000);
        let ask = Command::NewDownstream { node, generation, serial, key_hash, lifetime_ms };
        let committed = self.run(ask).into_downstream().unwrap();
        let signed = self.root.downstream(&committed, &csr(&key)).unwrap();
        self.keep("downstream intermediate", &signed, "root");
    }

    fn administrators(&mut self) {
        let (key, authority, td) = (SvidKey::generate().unwrap(), self.authority(), "west".parse().unwrap());
        let day = Lifetime { not_before: NOW.minus_ms(60_000), not_after: NOW.plus_ms(86_400_000) };
        let founding = self.issuer.founding_admin("admin", &td, day, &csr(&key)).unwrap();
        self.keep("founding administrator", &founding[0], "first intermediate");
        let grant = RoleChange::Grant([ambit_model::AdminRole::Operator].into());
        let admin: ambit_model::ObjectName = "ada".parse().unwrap();
        self.run(Command::ChangeRoles { admin: admin.clone(), change: grant, by: "admin".into() }).outcome.unwrap();
        let certify = Command::CertifyAdmin { admin, key_hash: key.spki_sha256(), authority };
        self.leaf("administrator", &key, certify);
        let replica = self.issuer.replica_leaf(1, &td, day, &csr(&key)).unwrap();
        self.keep("replica", &replica[0], "first intermediate");
    }

    fn second_replica(&mut self) {
        let scope = TokenScope::Replica(2, "127.0.0.1:2".into());
        let token = TokenRow { scope, expires: NOW.plus_ms(60_000), used: false };
        self.run(Command::CreateToken([7; 32], token)).outcome.unwrap();
        let key = SvidKey::generate().unwrap();
        let [issuer_key_hash, tls_key_hash] = [key.spki_sha256(); 2];
        let admit = Command::AdmitReplica { token: [7; 32], replica: 2, issuer_key_hash, tls_key_hash };
        let admission = self.run(admit).into_replica().unwrap();
        let joined = self.root.intermediate(&admission, &csr(&key)).unwrap();
        self.keep("joined intermediate", &joined, "root");
    }

    /// One that revokes nothing, and one that does.
    fn lists(&mut self) {
        for name in ["empty CRL", "CRL"] {
            let authority = self.authority();
            let list = self.issuer.crl(&self.state.revoked_leaves(&authority), 3_600_000).unwrap();
            self.keep(name, &list, "first intermediate");
            self.run(Command::DenyId("spiffe://west/web".parse().unwrap(), IdVerb::Revoke)).outcome.unwrap();
        }
    }

    /// The next root, which is active from here on.
    fn rotation(&mut self) -> Root {
        let td: TrustDomain = "west".parse().unwrap();
        let next = Root::create(&td, NOW, [0x42; 16]).unwrap();
        let prepare = Command::PrepareRoot(next.der().to_vec(), [(1, vec![1])].into());
        let prepared = self.run(prepare).into_root().unwrap();
        let cross = self.root.cross_sign(&prepared, next.der()).unwrap();
        self.run(Command::CrossSignRoot(fingerprint(next.der()), cross.to_vec())).outcome.unwrap();
        self.run(Command::ActivateRoot(fingerprint(next.der()), KeySetRow::default())).outcome.unwrap();
        let key = SvidKey::generate().unwrap();
        let renew = Command::RenewAuthority { replica: 1, key_hash: csr(&key).spki_sha256(), lifetime_ms: 86_400_000 };
        let committed = self.run(renew).into_authority().unwrap();
        let renewed = next.renewed(&committed, &csr(&key)).unwrap();
        let named = ambit_identity::Named { replica: 1, epoch: 1 };
        let again = next.begin_again(named, &csr(&key), committed.get().lifetime).unwrap();
        self.keep("next root", next.der(), "next root");
        self.keep("cross-signed root", &cross, "root");
        self.keep("renewed intermediate", &renewed, "next root");
        self.keep("intermediate of one that was long away", &again, "next root");
        next
    }

    /// Under a root that OpenSSL made: what is signed there, and its key certified by the cell's own root.
    fn outside(&mut self, active: &Root) {
        let former = fingerprint(self.root.der());
        self.run(Command::TaintRoot(former)).outcome.unwrap();
        self.run(Command::RevokeRoot(former)).outcome.unwrap();
        let (td, key): (TrustDomain, _) = ("west".parse().unwrap(), SvidKey::generate().unwrap());
        let wrapped: std::collections::BTreeMap<u64, Vec<u8>> = [(1, vec![1])].into();
        let (asked, key_hash) = (request(&td, &key).unwrap(), key.spki_sha256());
        let waits = Command::RequestExternal { csr: asked.clone(), key_hash, wrapped: wrapped.clone() };
        self.run(waits).outcome.unwrap();
        let (external, authority) = outside(&asked);
        let (chain, root) = (vec![authority.clone()], external.clone());
        let import = ExternalImport { chain, root, wrapped, keys: None, approved: None, by: "ada".into() };
        let prepared = self.run(Command::ImportExternal(Box::new(import))).into_root().unwrap();
        let cross = active.cross_sign(&prepared, &external.clone().into()).unwrap();
        let id = fingerprint(&external);
        self.run(Command::CrossSignRoot(id, cross.to_vec())).outcome.unwrap();
        self.run(Command::ActivateRoot(id, KeySetRow::default())).outcome.unwrap();
        let signer = Root::under(&td, external.clone().into(), vec![authority.clone().into()], key).unwrap();
        let key = SvidKey::generate().unwrap();
        let renew = Command::RenewAuthority { replica: 1, key_hash: csr(&key).spki_sha256(), lifetime_ms: 86_400_000 };
        let committed = self.run(renew).into_authority().unwrap();
        let intermediate = signer.renewed(&committed, &csr(&key)).unwrap();
        self.keep("external root", &external, "external root");
        self.keep("external intermediate", &authority, "external root");
        self.keep("cross-signed external root", &cross, "next root");
        self.keep("intermediate below", &intermediate, "external intermediate");
    }
}

/// A root and what it makes of a request, by OpenSSL.
fn outside(csr: &[u8]) -> (Vec<u8>, Vec<u8>) {
    use openssl::x509::extension::{AuthorityKeyIdentifier, BasicConstraints, KeyUsage, SubjectKeyIdentifier};
    let csr = openssl::x509::X509Req::from_der(csr).unwrap();
    let group = openssl::ec::EcGroup::from_curve_name(openssl::nid::Nid::SECP384R1).unwrap();
    let key = openssl::pkey::PKey::from_ec_key(openssl::ec::EcKey::generate(&group).unwrap()).unwrap();
    let mut name = openssl::x509::X509NameBuilder::new().unwrap();
    name.append_entry_by_text("O", "Example").unwrap();
    name.append_entry_by_text("CN", "Example Root").unwrap();
    let name = name.build();
    let made = |root: Option<&openssl::x509::X509>, own_id: Option<&[u8]>| {
        let mut b = openssl::x509::X509::builder().unwrap();
        b.set_version(2).unwrap();
        let serial = openssl::bn::BigNum::from_slice(&[0x41; 16]).unwrap().to_asn1_integer().unwrap();
        b.set_serial_number(&serial).unwrap();
        b.set_issuer_name(&name).unwrap();
        b.set_subject_name(if root.is_some() { csr.subject_name() } else { &name }).unwrap();
        let at = |days: i64| openssl::asn1::Asn1Time::from_unix((NOW.0 / 1000) as i64 + days * 86_400).unwrap();
        b.set_not_before(&at(-1)).unwrap();
        b.set_not_after(&at(if root.is_some() { 60 } else { 3_650 })).unwrap();
        match root {
            Some(_) => b.set_pubkey(&csr.public_key().unwrap()).unwrap(),
            None => b.set_pubkey(&key).unwrap(),
        }
        match root {
            Some(root) => {
                let context = b.x509v3_context(Some(root), None);
                let keys = [
                    SubjectKeyIdentifier::new().build(&context).unwrap(),
                    AuthorityKeyIdentifier::new().keyid(true).build(&context).unwrap(),
                ];
                keys.into_iter().for_each(|one| b.append_extension(one).unwrap());
                csr.extensions().unwrap().into_iter().for_each(|one| b.append_extension(one).unwrap());
            }
            None => {
                let own = SubjectKeyIdentifier::new().build(&b.x509v3_context(None, None)).unwrap();
                b.append_extension(own).unwrap();
                // SEQUENCE { [0] key identifier }, which OpenSSL makes for no certificate that is not there yet.
                if let Some(id) = own_id {
                    let value = [&[0x30, 2 + id.len() as u8, 0x80, id.len() as u8], id].concat();
                    let value = openssl::asn1::Asn1OctetString::new_from_bytes(&value).unwrap();
                    let oid = openssl::asn1::Asn1Object::from_str("2.5.29.35").unwrap();
                    let named = openssl::x509::X509Extension::new_from_der(&oid, false, &value).unwrap();
                    b.append_extension(named).unwrap();
                }
                b.append_extension(BasicConstraints::new().critical().ca().build().unwrap()).unwrap();
                let usage = KeyUsage::new().critical().key_cert_sign().crl_sign().build().unwrap();
                b.append_extension(usage).unwrap();
            }
        }
        b.sign(&key, openssl::hash::MessageDigest::sha384()).unwrap();
        b.build()
    };
    let first = made(None, None);
    let root = made(None, first.subject_key_id().map(|id| id.as_slice()));
    (root.to_der().unwrap(), made(Some(&root), None).to_der().unwrap())
}

/// Reads a list of what is to be judged, and says each finding in a line: document, severity, code, message.
const PKILINT: &str = r#"
import contextlib, csv, io, sys
from pkilint.bin import lint_crl, lint_pkix_cert, lint_pkix_signer_signee_cert_chain as lint_chain
count = 0
for line in sys.stdin:
    kind, name, *files = line.rstrip("\n").split("\t")
    main, more = {"certificate": (lint_pkix_cert.main, []), "crl": (lint_crl.main, ["-t", "CRL", "-p", "PKIX"]),
                  "chain": (lint_chain.main, [])}[kind]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        main(["lint", "-s", "ERROR", "-f", "CSV", "--document-format", "DER", *more, *files])
    assert not err.getvalue(), (name, err.getvalue())
    rows = list(csv.DictReader(io.StringIO(out.getvalue())))
    for row in rows:
        print("\t".join([name, row["severity"], row["code"], row["message"] or ""]))
    count += 1
print("judged", count)
"#;

/// The environment that `cargo xtask deps` makes of tests/interop/requirements.txt.
fn python() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("interop");
    let requirements = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/interop/requirements.txt");
    let found = std::fs::read_to_string(folder.join("installed")).unwrap_or_default();
    let wanted = std::fs::read_to_string(requirements).unwrap();
    assert!(found == wanted, "{} is not what is required: cargo xtask deps", folder.display());
    folder.join("bin/python")
}

fn file(folder: &Path, name: &str) -> String {
    folder.join(name.replace(' ', "-")).display().to_string()
}

/// What pkilint finds in these documents that is at least an error: document, code and message.
fn pkilint(folder: &Path, made: &[Made]) -> Vec<[String; 3]> {
    let mut asked = String::new();
    for one in made {
        std::fs::write(file(folder, one.name), &one.der).unwrap();
        let (it, issuer) = (file(folder, one.name), file(folder, one.issuer));
        match one.name.contains("CRL") {
            true => asked.push_str(&format!("crl\t{}\t{it}\n", one.name)),
            false => asked.push_str(&format!("certificate\t{0}\t{it}\nchain\t{0}\t{issuer}\t{it}\n", one.name)),
        }
    }
    std::fs::write(folder.join("asked"), &asked).unwrap();
    let asked_of = std::fs::File::open(folder.join("asked")).unwrap();
    let mut program = Program::new(python());
    let done = program.args(["-c", PKILINT]).stdin(asked_of).stderr(Stdio::piped()).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let said = String::from_utf8(done.stdout).unwrap();
    let (findings, judged) = said.trim_end().rsplit_once('\n').unwrap_or(("", said.trim_end()));
    assert_eq!(judged, format!("judged {}", asked.lines().count()), "each of them");
    let finding = |line: &str| {
        let [document, _severity, code, message]: [&str; 4] =
            line.splitn(4, '\t').collect::<Vec<_>>().try_into().unwrap();
        [document, code, message].map(str::to_owned)
    };
    findings.lines().map(finding).collect()
}

/// Whether `openssl verify -x509_strict` takes each certificate by the roots alone, leaves also with the CRL.
fn openssl(folder: &Path, made: &[Made]) {
    let pem = |name: &str, ders: Vec<&[u8]>| {
        std::fs::write(folder.join(name), certificates_to_pem(ders)).unwrap();
        folder.join(name).display().to_string()
    };
    let of = |wanted: fn(&Made) -> bool| made.iter().filter(|m| wanted(m)).map(|m| m.der.as_slice()).collect();
    let roots = pem("roots.pem", of(|m| m.name == m.issuer));
    let between = pem("between.pem", of(|m| m.name.contains("intermediate")));
    let list = made.iter().find(|m| m.name == "CRL").unwrap();
    let crl = openssl::x509::X509Crl::from_der(&list.der).unwrap().to_pem().unwrap();
    std::fs::write(folder.join("crl.pem"), crl).unwrap();
    let at = (NOW.0 / 1000).to_string();
    for one in made.iter().filter(|m| !m.name.contains("CRL")) {
        let it = pem("it.pem", vec![&one.der]);
        let mut program = Program::new("openssl");
        program.args(["verify", "-x509_strict", "-check_ss_sig", "-attime", &at, "-CAfile", &roots]);
        program.args(["-untrusted", &between]);
        let is_leaf = one.issuer == "first intermediate";
        if is_leaf {
            program.arg("-crl_check").arg("-CRLfile").arg(folder.join("crl.pem"));
        }
        let done = program.arg(&it).output().unwrap();
        let said = String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned();
        let good = one.name != "workload";
        assert_eq!(done.status.success(), good, "{}: {said}", one.name);
        assert!(good || said.contains("certificate revoked"), "{}: {said}", one.name);
    }
}

struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn folder(name: &str) -> Folder {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    Folder(folder)
}

fn all() -> Vec<Made> {
    let mut site = Site::new();
    site.nodes_and_workloads();
    site.downstream();
    site.administrators();
    site.second_replica();
    site.lists();
    let next = site.rotation();
    site.outside(&next);
    site.made
}

#[test]
fn pkilint_and_openssl_find_no_fault_in_any_profile() {
    let (folder, made) = (folder("profiles"), all());
    let names: Vec<&str> = made.iter().map(|m| m.name).collect();
    assert_eq!(names.len(), 21, "{names:?}");
    let findings = pkilint(&folder.0, &made);
    let is_it = |[_, found, message]: &[String; 3], (code, begins, _): &(&str, &str, &str)| {
        found == code && message.starts_with(begins)
    };
    let faults: Vec<_> = findings.iter().filter(|one| !TOLERATED.iter().any(|known| is_it(one, known))).collect();
    assert!(faults.is_empty(), "{faults:?}");
    for known in TOLERATED {
        assert!(findings.iter().any(|one| is_it(one, known)), "found no more: {known:?}");
    }
    openssl(&folder.0, &made);
}

/// That it would say so: a leaf that was altered, so that it says of itself that it signs others.
#[test]
fn pkilint_finds_what_is_wrong() {
    let (folder, mut made) = (folder("faults"), all());
    made.retain(|m| ["root", "first intermediate", "workload", "CRL"].contains(&m.name));
    let leaf = made.iter_mut().find(|m| m.name == "workload").unwrap();
    // KeyUsage says that it signs certificates too, which a leaf must not (RFC 5280 4.2.1.3).
    let usage = [0x55, 0x1d, 0x0f, 1, 1, 0xff, 4, 4, 3, 2, 7, 0x80];
    let at = leaf.der.windows(usage.len()).position(|part| part == usage).unwrap() + usage.len() - 2;
    leaf.der[at..at + 2].copy_from_slice(&[2, 0x84]);
    let found = pkilint(&folder.0, &made).into_iter().map(|[name, code, _]| format!("{name}: {code}"));
    let found: Vec<String> = found.collect();
    for wanted in
        ["workload: pkix.ee_certificate_keycertsign_keyusage_set", "workload: pkix.signature_verification_failed"]
    {
        assert!(found.iter().any(|one| one == wanted), "{wanted} of {found:?}");
    }
}
