//! Approvers from their first key to a root that two of them revoke: real replicas, by the command line.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_tests::cell::Cell;
use ambit_tests::process::{binary, run};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};

const SETTLE_MAX: Duration = Duration::from_secs(20);

/// An operator at a cell, with a folder for what approvers hand him.
struct Desk<'a>(&'a Cell);

impl Desk<'_> {
    fn ambit(&self, args: &[&str]) -> Output {
        let (program, context) = (binary("ambit").unwrap().display().to_string(), self.file("context.json"));
        run(&[&[program.as_str(), "--context", &context], args].concat()).unwrap()
    }
    /// Its standard output, where it ended so.
    #[track_caller]
    fn ends(&self, code: i32, words: &str, args: &[&str]) -> String {
        let out = self.ambit(args);
        let (text, notes) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        assert_eq!(out.status.code(), Some(code), "{args:?}: {notes}{text}");
        assert!(notes.contains(words) || text.contains(words), "{args:?} without {words}: {notes}{text}");
        text.into_owned()
    }
    fn file(&self, name: &str) -> String {
        self.0.admin_file(name).display().to_string()
    }
    /// A new approver's key; what he hands out.
    fn keygen(&self, name: &str) -> String {
        let file = self.file(&format!("{name}.key"));
        let public = self.ends(0, "hand this out", &["approver", "keygen", "--out", &file]);
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        self.ends(2, "bad_request", &["approver", "keygen", "--out", &file]);
        public.trim().to_owned()
    }
    /// The file of his word for a proposal.
    fn approve(&self, proposal: &str, who: &str, said: &str) -> String {
        let (asked, key) = (self.file("proposal.json"), self.file(&format!("{who}.key")));
        std::fs::write(&asked, proposal).unwrap();
        // Without a terminal nobody was asked, and nothing is signed; what would be is told all the same.
        assert_eq!(self.ends(2, "you are asked to sign", &["approve", &asked, "--key", &key]), "");
        let word = self.ends(0, said, &["approve", &asked, "--key", &key, "--yes"]);
        let file = self.file(&format!("{who}.json"));
        std::fs::write(&file, word).unwrap();
        file
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_administrator_revokes_no_root_once_there_are_approvers() {
    let mut cell = Cell::start("west", 3).await.unwrap();
    let desk = Desk(&cell);
    let [alice, bob] = ["alice", "bob"].map(|name| desk.keygen(name));
    // The keys of tokens come to replicas that joined within a second or two.
    let begun = Instant::now();
    while desk.ambit(&["trust", "check"]).status.code() != Some(0) && begun.elapsed() < SETTLE_MAX {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    desk.ends(0, "weakness: no approvers", &["trust", "check"]);
    desk.ends(2, "192 lower-case hex digits", &["approver", "add", "alice", "--public", &alice[1..]]);
    let mistyped = format!("{}{}", if alice.starts_with('0') { '1' } else { '0' }, &alice[1..]);
    desk.ends(2, "its own signature", &["approver", "add", "alice", "--public", &mistyped]);
    desk.ends(0, "one approver alone", &["approver", "add", "alice", "--public", &alice]);
    desk.ends(5, "one approver alone", &["trust", "check"]);

    // With one nothing is begun that one cannot end.
    desk.ends(5, "needs_second_approver", &["trust", "rotate"]);
    let proposal = desk.ends(5, "approval_missing", &["approver", "add", "bob", "--public", &bob]);
    let own = desk.approve(&proposal, "bob", "approved: add approver bob");
    for (cell, code, said) in [
        (["--trust-domain", "east", "--epoch", "1"], 4, "expected a proposal to east (epoch 1)"),
        (["--trust-domain", "west", "--epoch", "2"], 4, "found west (epoch 1)"),
        (["--trust-domain", "west", "--epoch", "1"], 0, "the cell was not asked"),
    ] {
        let (asked, key) = (desk.file("proposal.json"), desk.file("bob.key"));
        let sign = ["approve", &asked, "--key", &key, "--yes"];
        assert_eq!(desk.ends(code, said, &[&sign[..], &cell].concat()).is_empty(), code != 0);
    }
    let (asked, key) = (desk.file("proposal.json"), desk.file("alice.key"));
    let seconded = ["approve", &asked, "--key", &key, "--yes", "--approval", &own];
    desk.ends(0, "2 with yours, of 1 that it needs", &seconded);
    for (changed, found) in [("\"epoch\": 2", "west (epoch 2)"), ("\"trust_domain\": \"east\"", "east (epoch 1)")] {
        let (name, _) = changed.split_once(':').unwrap();
        let lines = proposal.lines().map(|l| if l.contains(name) { format!("{changed},") } else { l.to_owned() });
        std::fs::write(&asked, lines.collect::<Vec<_>>().join("\n")).unwrap();
        assert_eq!(desk.ends(4, found, &["approve", &asked, "--key", &key, "--yes"]), "", "of another cell than asked");
    }
    let add_bob = ["approver", "add", "bob", "--public", &bob, "--approval"];
    desk.ends(4, "approval_invalid", &[&add_bob[..], &[&own]].concat());
    let of_another_act = desk.file("of-another-act.json");
    std::fs::copy(&own, &of_another_act).unwrap();
    let word = desk.approve(&proposal, "alice", "approved: add approver bob");
    desk.ends(0, "alice", &[&add_bob[..], &[&word]].concat());
    desk.ends(1, "already_exists", &[&add_bob[..], &[&word]].concat());

    // The last step of a rotation is theirs.
    let proposal = desk.ends(5, "its revocation takes approvals", &["trust", "rotate", "--wait", "60s"]);
    let asked: serde_json::Value = serde_json::from_str(&proposal).unwrap();
    let root = asked["act"].as_str().unwrap().strip_prefix("revoke root ").unwrap().to_owned();
    assert_eq!(root, hex::encode(cell.fingerprint));
    // Which they may give while a replica is away: it judges for itself when it comes back.
    cell.kill(3).unwrap();
    let desk = Desk(&cell);
    let (a, b) = (desk.approve(&proposal, "alice", "revoke root"), desk.approve(&proposal, "bob", "revoke root"));
    let revoke = ["trust", "revoke", &root, "--without-acks"];
    desk.ends(5, "approval_missing", &revoke);
    desk.ends(5, "approval_missing", &[&revoke[..], &["--approval", &a]].concat());
    desk.ends(4, "approval_invalid", &[&revoke[..], &["--approval", &a, "--approval", &a]].concat());
    desk.ends(4, "approval_invalid", &[&revoke[..], &["--approval", &a, "--approval", &of_another_act]].concat());
    let altered = std::fs::read_to_string(&b).unwrap().replace("\"epoch\": 1", "\"epoch\": 2");
    std::fs::write(desk.file("altered.json"), altered).unwrap();
    let altered = desk.file("altered.json");
    desk.ends(4, "approval_invalid", &[&revoke[..], &["--approval", &a, "--approval", &altered]].concat());
    std::fs::set_permissions(desk.file("alice.key"), std::fs::Permissions::from_mode(0o640)).unwrap();
    desk.ends(2, "chmod 600", &["approve", &desk.file("proposal.json"), "--key", &desk.file("alice.key")]);
    desk.ends(0, "is revoked", &[&revoke[..], &["--approval", &a, "--approval", &b]].concat());
    desk.ends(5, "root_state", &[&revoke[..], &["--approval", &a, "--approval", &b]].concat());
    // What lacked a word, or had the wrong one, is told of in the audit like whatever else is refused.
    let refused = desk.ends(0, "approval_invalid", &["admin", "refusals"]);
    assert!(refused.contains("approval_missing"), "{refused}");
    let acts = desk.ends(0, "alice,bob", &["approver", "acts"]);
    assert!(acts.lines().nth(1).unwrap().contains(&root), "{acts}");

    cell.restart(3).unwrap();
    cell.read_context().unwrap();
    let same = |all: &[ambit_proto::v1::StatusResponse]| {
        all.len() == 3 && all.iter().all(|s| s.applied_index == all[0].applied_index && s.digest == all[0].digest)
    };
    cell.wait_for("three replicas of one state", same).await.unwrap();
    let only_one = cell.status(3).await.unwrap();
    assert_eq!(only_one.approvers, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_administrator_renews_what_he_has_unless_he_is_denied() {
    let cell = Cell::start("west", 1).await.unwrap();
    let desk = Desk(&cell);
    let dora = desk.file("dora");
    desk.ends(0, "operator", &["admin", "grant", "dora", "operator"]);
    desk.ends(0, "dora", &["admin", "issue", "dora", "--out", &dora]);
    let hers = format!("{dora}/context.json");
    let read = |name: &str| std::fs::read(Path::new(&dora).join(name)).unwrap();
    let (key, certificate) = (read("admin.key"), read("admin.pem"));
    let as_dora = |code, words, args: &[&str]| {
        let program = binary("ambit").unwrap().display().to_string();
        let out = run(&[&[program.as_str(), "--context", &hers], args].concat()).unwrap();
        let said = format!("{}{}", String::from_utf8_lossy(&out.stderr), String::from_utf8_lossy(&out.stdout));
        assert!(out.status.code() == Some(code) && said.contains(words), "{args:?}: {said}");
    };
    as_dora(0, "not_after", &["admin", "renew"]);
    assert!(read("admin.key") != key && read("admin.pem") != certificate);
    as_dora(0, "founder", &["admin", "list"]);
    as_dora(4, "permission_denied", &["admin", "grant", "dora", "auditor"]);
    // In a loop: each renewal is a row of the state for hours.
    let renew = [binary("ambit").unwrap().display().to_string(), "--context".into(), hers.clone()];
    let renew = [&renew.each_ref().map(String::as_str)[..], &["admin", "renew"]].concat();
    let busy = (0..200).map(|_| run(&renew).unwrap()).find(|out| !out.status.success()).expect("a bound");
    assert!(String::from_utf8_lossy(&busy.stderr).contains("busy"), "{busy:?}");
    let (key, certificate) = (read("admin.key"), read("admin.pem"));
    desk.ends(0, "", &["deny", "id", "spiffe://west/ambit/admin/dora"]);
    as_dora(4, "svid_revoked", &["admin", "renew"]);
    assert!(read("admin.key") == key && read("admin.pem") == certificate, "what is refused replaces nothing");
}

/// A slip of the pen is no revocation, and a root's name, which is in every chain, none that one administrator makes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nothing_is_known_of_is_revoked_on_its_own_word_and_a_root_never_so() {
    let cell = Cell::start("west", 1).await.unwrap();
    let desk = Desk(&cell);
    let pem = desk.ends(0, "BEGIN CERTIFICATE", &["trust", "show", "--pem"]);
    let roots = ambit_identity::keys::certificates_from_pem(&pem).unwrap();
    let name = ambit_identity::name_of(&roots[0]).unwrap();
    desk.ends(2, "revoked by its fingerprint", &["trust", "revoke", &name, "--unknown"]);
    let unknown = "ab".repeat(20);
    for verb in [["--dry-run"].as_slice(), &[]] {
        desk.ends(1, "not_found", &[&["trust", "revoke", &unknown][..], verb].concat());
    }
    desk.ends(0, "is revoked", &["trust", "revoke", &unknown, "--unknown"]);
    desk.ends(0, "founder", &["admin", "list"]);
}
