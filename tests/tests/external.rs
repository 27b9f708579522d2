//! A cell that goes over to a root that somebody else keeps, under steady handshakes: three replicas, OpenSSL's program and
//! cfssl as the outside CA, the command line as its operators use it. No handshake fails, and no key of the CA comes near the cell.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_tests::cell::Cell;
use ambit_tests::machine::{Machine, join_token, register_cluster};
use ambit_tests::node::{Greetings, Node};
use ambit_tests::operator::{create_entry, within};
use ambit_tests::peering::peer;
use ambit_tests::process::{Folder, binary, must_run, run};
use ambit_tests::tpm::Maker;
use std::path::Path;
use std::process::Output;
use std::sync::Arc;
use std::time::Duration;

const CA: &str = "basicConstraints=critical,CA:TRUE,pathlen:1\nkeyUsage=critical,keyCertSign,cRLSign\n";
const KEY_IDS: &str = "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n";
const URI: &str = "subjectAltName=URI:spiffe://west\n";

/// What OpenSSL's program signs begins right then; an authority signs half a minute after that, for clocks that lag.
const OLD_ENOUGH: Duration = Duration::from_secs(31);

/// An operator, and beside him the outside CA, whose folder the cell never sees.
struct Desk<'a> {
    cell: &'a Cell,
    outside: &'a Folder,
}

impl Desk<'_> {
    fn ambit_as(&self, context: &str, args: &[&str]) -> Output {
        let program = binary("ambit").unwrap().display().to_string();
        run(&[&[program.as_str(), "--context", context], args].concat()).unwrap()
    }
    fn ambit(&self, args: &[&str]) -> Output {
        self.ambit_as(&self.cell.admin_file("context.json").display().to_string(), args)
    }
    #[track_caller]
    fn ends(&self, code: i32, words: &str, args: &[&str]) -> String {
        let out = self.ambit(args);
        let said = format!("{}{}", String::from_utf8_lossy(&out.stderr), String::from_utf8_lossy(&out.stdout));
        assert!(out.status.code() == Some(code) && said.contains(words), "{args:?} without {code} {words}: {said}");
        String::from_utf8_lossy(&out.stdout).into_owned()
    }
    fn file(&self, name: &str) -> String {
        self.outside.path(name).display().to_string()
    }
    fn write(&self, name: &str, text: &str) -> String {
        std::fs::write(self.outside.path(name), text).unwrap();
        self.file(name)
    }

    /// A root of the CA: NAME.pem and NAME.key.
    fn root(&self, name: &str, kind: &[&str]) {
        let (key, pem) = (self.file(&format!("{name}.key")), self.file(&format!("{name}.pem")));
        let subject = format!("/C=CH/O=Example/CN=Example {name}");
        let args = ["openssl", "req", "-x509", "-nodes", "-days", "3650", "-keyout", &key, "-out", &pem, "-newkey"];
        let says = ["-subj", &subject, "-addext", "keyUsage=critical,keyCertSign,cRLSign"];
        must_run(&[&args[..], kind, &says].concat()).unwrap();
    }

    /// What the CA makes of a request: as its configuration says, whatever the request asks for.
    fn sign(&self, by: &str, csr: &str, out: &str, days: &str, says: &str) -> String {
        let (ca, key) = (self.file(&format!("{by}.pem")), self.file(&format!("{by}.key")));
        let (config, out) = (self.write("ext.cnf", says), self.file(out));
        let args = ["openssl", "x509", "-req", "-in", csr, "-CA", &ca, "-CAkey", &key, "-CAcreateserial", "-out", &out];
        must_run(&[&args[..], &["-days", days, "-extfile", &config]].concat()).unwrap();
        out
    }

    /// Whether OpenSSL takes this chain (leaf first, PEM) by the root alone.
    fn verified(&self, chain: &str, root: &str) -> String {
        must_run(&["openssl", "verify", "-x509_strict", "-CAfile", root, "-untrusted", chain, chain]).unwrap()
    }
}

/// A node of the cluster that has the cell's name, as the workload `web`.
async fn node(cell: &Cell, machine: Machine) -> Arc<Node> {
    let td = cell.trust_domain.to_string();
    let token = join_token(cell, &td).await.unwrap();
    let node = Node::start(cell, machine, &td, token, "web").unwrap();
    within("an SVID", async || node.is_ready().then_some(())).await;
    Arc::new(node)
}

/// A certificate that is as good as any but for one thing, and the words of its refusal.
fn refusals(desk: &Desk<'_>, csr: &str) {
    let other = desk.file("other.csr");
    must_run(&[
        "openssl",
        "req",
        "-new",
        "-nodes",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-subj",
        "/CN=x",
        "-keyout",
        &desk.file("other.key"),
        "-out",
        &other,
    ])
    .unwrap();
    let good = format!("{CA}{KEY_IDS}{URI}");
    let leaf = format!("basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n{KEY_IDS}{URI}");
    for (what, csr, days, says, words) in [
        ("another key", other.as_str(), "60", good.clone(), "requested key"),
        ("a leaf", csr, "60", leaf, "cA=true"),
        ("another trust domain", csr, "60", good.replace("west", "east"), "no URI but spiffe://west"),
        ("too short", csr, "2", good.clone(), "7 days left"),
        ("too long", csr, "1000", good.clone(), "at most 398 days"),
        ("pathLen 0", csr, "60", good.replace("pathlen:1", "pathlen:0"), "pathLen 0"),
        ("unknown critical extension", csr, "60", format!("{good}1.2.3.4=critical,DER:0500\n"), "1.2.3.4"),
    ] {
        let out = desk.sign("root", csr, "bad.pem", days, &says);
        let args = ["trust", "external", "import", "--certificate", &out, "--root", &desk.file("root.pem")];
        let said = desk.ends(2, words, &args);
        assert!(said.is_empty(), "{what}: {said}");
    }
    let good = desk.sign("root", csr, "good.pem", "60", &good);
    // A chain that does not reach the root, a root that is none, and a key where it has no business.
    for (root, words) in [("twin.pem", "the issuer"), ("tier.pem", "a root that signed itself")] {
        let args = ["trust", "external", "import", "--certificate", &good, "--root", &desk.file(root)];
        desk.ends(2, words, &args);
    }
    let both = std::fs::read_to_string(desk.file("root.pem")).unwrap()
        + &std::fs::read_to_string(desk.file("root.key")).unwrap();
    let both = desk.write("both.pem", &both);
    desk.ends(2, "a private key", &["trust", "external", "import", "--certificate", &good, "--root", &both]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cell_goes_over_to_an_external_root_and_renews_under_it_and_leaves_it_and_no_handshake_fails() {
    let (mut cell, outside) = (Cell::start("west", 3).await.unwrap(), Folder::new().unwrap());
    let east = Cell::start("east", 1).await.unwrap();
    peer(&cell, &east).await.unwrap();
    let maker = Maker::new().unwrap();
    let (m1, m2) = (Machine::new(&maker, "m1").await.unwrap(), Machine::new(&maker, "m2").await.unwrap());
    let m3 = Machine::new(&maker, "m3").await.unwrap();
    for (cell, td) in [(&cell, "west"), (&east, "east")] {
        register_cluster(cell, td, &maker).await.unwrap();
        create_entry(cell, "web", td).await.unwrap();
    }
    let (one, two) = (node(&cell, m1).await, node(&cell, m2).await);
    // A peer's node, which knows the outside CA by the peer's word only.
    let far = node(&east, m3).await;
    within("bundles on both sides", async || {
        (one.greet(&far).await.is_ok() && far.greet(&one).await.is_ok()).then_some(())
    })
    .await;
    let pairs = [(&one, &two), (&two, &one), (&one, &far), (&far, &one)];
    let greetings = Greetings::start(pairs.map(|(from, to)| (from.clone(), to.clone())).into());
    let first = hex::encode(cell.fingerprint);

    {
        let desk = Desk { cell: &cell, outside: &outside };
        desk.root("root", &["ec", "-pkeyopt", "ec_paramgen_curve:P-384", "-sha384"]);
        desk.root("twin", &["rsa:2048"]);
        let tier = desk.file("tier.csr");
        must_run(&[
            "openssl",
            "req",
            "-new",
            "-nodes",
            "-newkey",
            "rsa:2048",
            "-subj",
            "/CN=tier",
            "-keyout",
            &desk.file("tier.key"),
            "-out",
            &tier,
        ])
        .unwrap();
        desk.sign("root", &tier, "tier.pem", "400", &format!("{}{KEY_IDS}", CA.replace("pathlen:1", "pathlen:2")));
        // An operator reads and does not ask; without a request nothing is imported.
        desk.ends(0, "olga", &["admin", "grant", "olga", "operator"]);
        desk.ends(0, "olga", &["admin", "issue", "olga", "--out", &desk.file("olga")]);
        let args = ["trust", "external", "csr"];
        let out = desk.ambit_as(&desk.file("olga/context.json"), &args);
        assert_eq!(out.status.code(), Some(4), "{out:?}");
        let csr = desk.file("authority.csr");
        desk.ends(0, "30-90 days", &["trust", "external", "csr", "--out", &csr]);
        desk.ends(0, "", &["trust", "external", "csr", "--out", &csr]);
        refusals(&desk, &csr);
        let import =
            ["trust", "external", "import", "--certificate", &desk.file("good.pem"), "--root", &desk.file("root.pem")];
        let out = desk.ambit_as(&desk.file("olga/context.json"), &import);
        assert_eq!(out.status.code(), Some(4), "{out:?}");
        desk.ends(0, "it would be done", &[&import[..], &["--dry-run"]].concat());
        desk.ends(0, "is prepared", &import);
        desk.ends(1, "not_found", &import);
        // Younger than clocks may lag it signs nothing; to rotate is to wait for it.
        // Who holds a certificate under the former root is waited for; she renews hers.
        tokio::task::block_in_place(|| {
            std::thread::scope(|threads| {
                let rotating = threads.spawn(|| desk.ends(0, "activated", &["trust", "rotate", "--wait", "90s"]));
                while !rotating.is_finished() {
                    desk.ambit_as(&desk.file("olga/context.json"), &["admin", "renew"]);
                    std::thread::sleep(Duration::from_millis(500));
                }
                rotating.join().unwrap();
            });
        });
    }
    cell.read_context().unwrap();
    let external = hex::encode(cell.fingerprint);
    assert_ne!(external, first);
    let hers = outside.path("olga/context.json");
    let pinned = std::fs::read_to_string(&hers).unwrap().replace(&first, &external);
    std::fs::write(&hers, pinned).unwrap();
    cell.wait_for_voters().await.unwrap();

    {
        let desk = Desk { cell: &cell, outside: &outside };
        let root = desk.file("root.pem");
        // The bundle is the external root and nothing else.
        let bundle = desk.ends(0, "", &["trust", "show", "--pem"]);
        let theirs = must_run(&["openssl", "x509", "-in", &root]).unwrap();
        assert_eq!(bundle.trim(), theirs.trim());
        desk.ends(0, "external, its authority", &["status"]);
        // What nodes, workloads and administrators show is under it, by OpenSSL's word.
        for (name, node) in [("one.pem", &one), ("two.pem", &two)] {
            within("a leaf under the external root", async || {
                let chain = desk.write(name, &node.svid_pem().unwrap());
                run(&["openssl", "verify", "-x509_strict", "-CAfile", &root, "-untrusted", &chain, &chain])
                    .unwrap()
                    .status
                    .success()
                    .then_some(())
            })
            .await;
        }
        desk.verified(&cell.admin_file("admin.pem").display().to_string(), &root);
        let page = cell.metrics_page(1).unwrap();
        assert!(page.contains(&format!("ambit_external_authority_not_after_seconds{{root=\"{external}\"}}")), "{page}");
        // Nobody leaves an external root by chance.
        desk.ends(5, "external_root", &["trust", "rotate"]);

        // Renewal, by another program, through a tier: no bundle changes, and nothing is rotated.
        let csr = desk.file("next.csr");
        desk.ends(0, "30-90 days", &["trust", "external", "csr", "--out", &csr]);
        desk.ends(5, "waits for its external certificate", &["trust", "check"]);
        let config = desk.write(
            "cfssl.json",
            r#"{"signing":{"default":{"expiry":"1440h","usages":["cert sign","crl sign"],
               "ca_constraint":{"is_ca":true,"max_path_len":1}}}}"#,
        );
        let (tier, key) = (desk.file("tier.pem"), desk.file("tier.key"));
        let signed = must_run(&["cfssl", "sign", "-ca", &tier, "-ca-key", &key, "-config", &config, &csr]).unwrap();
        let signed: serde_json::Value = serde_json::from_str(&signed).unwrap();
        let chain = signed["cert"].as_str().unwrap().to_owned() + "\n" + &std::fs::read_to_string(&tier).unwrap();
        let chain = desk.write("next.pem", &chain);
        let before = desk.ends(0, "", &["trust", "show", "-o", "json"]);
        desk.ends(0, "is active", &["trust", "external", "import", "--certificate", &chain, "--root", &root]);
        let shown = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
        let sequence = shown(&before)["sequence"].clone();
        within("every replica under the next authority", async || {
            let now = shown(&desk.ends(0, "", &["trust", "show", "-o", "json"]));
            assert_eq!(now["sequence"], sequence, "no bundle changes");
            let externals = now["externals"].as_array().cloned().unwrap_or_default();
            let old = externals.iter().find(|one| one["signs"] == false)?["authority"].as_str()?.to_owned();
            // Its leaves last still; who refuses it early has them issued anew first.
            assert!(desk.ambit(&["trust", "taint", &old]).status.success());
            desk.ends(0, "", &["admin", "renew"]);
            desk.ambit_as(&desk.file("olga/context.json"), &["admin", "renew"]);
            desk.ambit(&["trust", "revoke", &old]).status.success().then_some(())
        })
        .await;
        within("leaves under the next authority", async || {
            let chain = desk.write("one.pem", &one.svid_pem().unwrap());
            (std::fs::read_to_string(&chain).unwrap().matches("BEGIN").count() >= 4)
                .then_some(desk.verified(&chain, &root))
        })
        .await;
    }
    // A replica that joins now, and one that was away, are of it as all others.
    cell.read_context().unwrap();
    cell.add(4).await.unwrap();
    cell.kill(2).unwrap();
    cell.restart(2).unwrap();
    cell.wait_for_voters().await.unwrap();

    // And back to a root of the cell's own, which nothing certifies: both are held by all before it signs.
    let desk = Desk { cell: &cell, outside: &outside };
    let rotate = ["trust", "rotate", "--own", "--wait", "90s"];
    tokio::task::block_in_place(|| {
        std::thread::scope(|threads| {
            let rotating = threads.spawn(|| desk.ends(0, "revoked: the old root", &rotate));
            // Nothing leads from the own root to the external one: from its activation on she has to pin it.
            while !rotating.is_finished() {
                let active = std::fs::read_to_string(desk.cell.admin_file("context.json")).unwrap();
                std::fs::write(desk.file("olga/context.json"), active).unwrap();
                desk.ambit_as(&desk.file("olga/context.json"), &["admin", "renew"]);
                std::thread::sleep(Duration::from_millis(500));
            }
            rotating.join().unwrap();
        });
    });
    cell.read_context().unwrap();
    assert_ne!(hex::encode(cell.fingerprint), external);
    cell.wait_for_voters().await.unwrap();
    let (done, failed) = greetings.end().await;
    println!("{done} handshakes, {} failed", failed.len());
    assert!(failed.is_empty() && done > 300, "{failed:?}");
    no_outside_key_in(&cell, &outside);
}

/// What two approvers signed of a proposal, in files.
fn words(desk: &Desk<'_>, proposal: &str, who: &[&str]) -> Vec<String> {
    let asked = desk.write("proposal.json", proposal);
    let word = |name: &&str| {
        let key = desk.file(&format!("{name}.key"));
        let word = desk.ends(0, "approved", &["approve", &asked, "--key", &key, "--yes"]);
        desk.write(&format!("{name}.json"), &word)
    };
    who.iter().map(word).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_root_takes_two_people_and_a_cell_under_it_is_restored_with_its_authoritys_key() {
    let (mut cell, outside) = (Cell::start("west", 1).await.unwrap(), Folder::new().unwrap());
    let import = {
        let desk = Desk { cell: &cell, outside: &outside };
        let cards = ["alice", "bob"].map(|name| {
            let out = desk.file(&format!("{name}.key"));
            desk.ends(0, "hand this out", &["approver", "keygen", "--out", &out]).trim().to_owned()
        });
        desk.root("root", &["rsa:3072"]);
        let csr = desk.file("authority.csr");
        desk.ends(0, "30-90 days", &["trust", "external", "csr", "--out", &csr]);
        let chain = desk.sign("root", &csr, "good.pem", "60", &format!("{CA}{KEY_IDS}{URI}"));
        let import = ["trust", "external", "import", "--certificate", &chain, "--root", &desk.file("root.pem")];
        desk.ends(0, "one approver alone", &["approver", "add", "alice", "--public", &cards[0]]);
        desk.ends(5, "needs_second_approver", &import);
        let add = ["approver", "add", "bob", "--public", &cards[1]];
        let proposal = desk.ends(5, "approval_missing", &add);
        let word = words(&desk, &proposal, &["alice"]);
        desk.ends(0, "alice", &[&add[..], &["--approval", &word[0]]].concat());
        let proposal = desk.ends(5, "approval_missing", &import);
        assert!(proposal.contains("import root "), "{proposal}");
        let both = words(&desk, &proposal, &["alice", "bob"]);
        desk.ends(5, "approval_missing", &[&import[..], &["--approval", &both[0]]].concat());
        let approved = [&import[..], &["--approval", &both[0], "--approval", &both[1]]].concat();
        desk.ends(0, "is prepared", &approved);
        desk.ends(0, "import root", &["approver", "acts"]);
        tokio::time::sleep(OLD_ENOUGH).await;
        desk.ends(5, "its revocation takes approvals", &["trust", "rotate", "--wait", "60s"]);
        // The next certificate is nobody's gain, and takes nobody's word.
        let csr = desk.file("next.csr");
        desk.ends(0, "30-90 days", &["trust", "external", "csr", "--out", &csr]);
        let chain = desk.sign("root", &csr, "next.pem", "60", &format!("{CA}{KEY_IDS}{URI}"));
        ["trust", "external", "import", "--certificate", &chain, "--root", &desk.file("root.pem")].map(str::to_owned)
    };
    cell.read_context().unwrap();
    let external = hex::encode(cell.fingerprint);
    let desk = Desk { cell: &cell, outside: &outside };
    let import = import.each_ref().map(String::as_str);
    desk.ends(2, "do the same again", &[&import[..], &["--dry-run"]].concat());
    tokio::time::sleep(OLD_ENOUGH).await;
    desk.ends(0, "is active", &import);
    // Where the first root's key is in a file, that of the authority is too, once it signs.
    let identity = cell.seat_of(1).unwrap().data.join("identity");
    let kept = identity.join(format!("root-{}.key", &external[..16]));
    let of_next = || {
        let public =
            run(&["openssl", "pkey", "-in", &kept.display().to_string(), "-inform", "DER", "-pubout"]).unwrap();
        let wanted = must_run(&["openssl", "req", "-in", &desk.file("next.csr"), "-noout", "-pubkey"]).unwrap();
        String::from_utf8_lossy(&public.stdout).trim() == wanted.trim()
    };
    within("the next authority's key in a file", async || of_next().then_some(())).await;
    let (backup, root_key) = (desk.file("west.backup"), desk.file("kept.key"));
    desk.ends(0, "", &["raft", "snapshot", "--out", &backup]);
    std::fs::copy(&kept, &root_key).unwrap();
    let former = desk.file("former.key");
    std::fs::copy(identity.join("root.key"), &former).unwrap();
    cell.kill(1).unwrap();

    let (seat, out) = (cell.seat("again").unwrap(), outside.path("again").display().to_string());
    let restore = |key: &str| {
        let who = ["--trust-domain", "west", "--fingerprint", &external, "--admin-out", &out];
        seat.ambitd("restore", &[&who[..], &["--snapshot", &backup, "--root-key", key]].concat()).unwrap()
    };
    let refused = restore(&former);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("authority_mismatch"), "{refused:?}");
    let restored = restore(&root_key);
    assert!(restored.status.success(), "{}", String::from_utf8_lossy(&restored.stderr));
    let process = seat.start().unwrap();
    let context = format!("{out}/context.json");
    let desk = Desk { cell: &cell, outside: &outside };
    let checked = within("a restored cell", async || {
        let shown = desk.ambit_as(&context, &["trust", "show"]);
        shown.status.success().then(|| String::from_utf8_lossy(&shown.stdout).into_owned())
    })
    .await;
    assert!(checked.contains("external, its authority") && checked.contains(&external), "{checked}");
    // It is of the root as ever: what it shows verifies by it alone, and it goes on signing.
    desk.verified(&format!("{out}/admin.pem"), &desk.file("root.pem"));
    within("a renewed administrator", async || {
        desk.ambit_as(&context, &["admin", "renew"]).status.success().then_some(())
    })
    .await;
    desk.verified(&format!("{out}/admin.pem"), &desk.file("root.pem"));
    drop(process);
}

/// The CA's keys are nowhere below the cell's folder, in no form that it writes.
fn no_outside_key_in(cell: &Cell, outside: &Folder) {
    for name in ["root.key", "tier.key"] {
        let der = must_run(&["openssl", "pkey", "-in", &outside.path(name).display().to_string(), "-noout", "-text"])
            .unwrap();
        let private: String = der.lines().skip_while(|l| !l.starts_with("priv")).skip(1).take(2).collect();
        let bytes = hex::decode(private.replace([' ', ':'], "")).unwrap();
        let needle = &bytes[bytes.len().min(1)..];
        assert!(needle.len() >= 16, "{name}: {der}");
        for file in walk(cell.folder().path("").as_path()) {
            let text = std::fs::read(&file).unwrap_or_default();
            assert!(!text.windows(needle.len()).any(|part| part == needle), "{}", file.display());
        }
    }
}

fn walk(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut out = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() { out.extend(walk(&path)) } else { out.push(path) }
    }
    out
}
