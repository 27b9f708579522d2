//! When every administrator's certificate has expired: the runbook of `deploy/break-glass.md`, as it stands there, at a cell
//! of real replicas; and each way in which it must not work.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_tests::cell::Cell;
use ambit_tests::contexts::{Expiring, ambit};
use ambit_tests::process::{binary, run};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};

/// The commands between the fences.
fn runbook() -> String {
    let page = std::fs::read_to_string(ambit_tests::root().unwrap().join("deploy/break-glass.md")).unwrap();
    let (_, rest) = page.split_once("```sh\n").unwrap();
    rest.split_once("```").unwrap().0.to_owned()
}

struct Scene {
    cell: Cell,
}

impl Scene {
    fn file(&self, name: &str) -> String {
        self.cell.file(name).display().to_string()
    }
    fn context(&self) -> String {
        self.cell.admin_file("context.json").display().to_string()
    }
    #[track_caller]
    fn ends(&self, code: i32, words: &str, out: &Output) -> String {
        let (text, notes) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        assert_eq!(out.status.code(), Some(code), "{notes}{text}");
        assert!(notes.contains(words) || text.contains(words), "without {words}: {notes}{text}");
        text.into_owned()
    }
    #[track_caller]
    fn ambit(&self, code: i32, words: &str, args: &[&str]) -> String {
        self.ends(code, words, &ambit(&self.context(), args))
    }
    /// `ambitd admin break-glass` at replica 1.
    #[track_caller]
    fn glass(&self, code: i32, words: &str, args: &[&str]) -> String {
        let config = self.cell.seat_of(1).unwrap().config.display().to_string();
        let program = binary("ambitd").unwrap().display().to_string();
        let out = run(&[&[program.as_str(), "admin", "break-glass", "--config", &config], args].concat()).unwrap();
        self.ends(code, words, &out)
    }
    /// A request for a key that nobody has in a folder.
    fn request(&self, name: &str) -> String {
        let csr = ambit_identity::SvidKey::generate().unwrap().csr().unwrap();
        std::fs::write(self.file(name), ambit_identity::keys::csr_to_pem(&csr)).unwrap();
        self.file(name)
    }
    /// What `key` signs of a proposal that is changed so.
    fn word(&self, key: &str, proposal: &str, name: &str, change: impl Fn(String) -> String) -> String {
        let changed = change(std::fs::read_to_string(self.file(proposal)).unwrap());
        std::fs::write(self.file("changed.json"), &changed).unwrap();
        let read: serde_json::Value = serde_json::from_str(&changed).unwrap();
        let (td, epoch) = (read["trust_domain"].as_str().unwrap().to_owned(), read["epoch"].to_string());
        let (changed, key) = (self.file("changed.json"), self.file(key));
        let args = ["approve", &changed, "--key", &key, "--trust-domain", &td, "--epoch", &epoch, "--yes"];
        std::fs::write(self.file(name), self.ambit(0, "approved: break glass", &args)).unwrap();
        self.file(name)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_runbook_works_when_all_have_expired_and_nothing_else_does() {
    let scene = Scene { cell: Cell::start("west", 3).await.unwrap() };
    let (alice, mallory) = (scene.file("alice.key"), scene.file("mallory.key"));
    let public = scene.ambit(0, "", &["approver", "keygen", "--out", &alice]);
    scene.ambit(0, "", &["approver", "keygen", "--out", &mallory]);
    // Without an approver there is nobody whose word counts.
    let early = scene.request("early.pem");
    scene.glass(1, "approval_missing", &["founder", "--csr", &early]);
    scene.ambit(0, "", &["approver", "add", "alice", "--public", public.trim()]);
    scene.ambit(0, "olga", &["admin", "grant", "olga", "operator"]);

    let expiring = Expiring::of(&scene.cell, 1).unwrap();
    expiring.install(-9 * 3_600_000, -3_600_000).unwrap();
    scene.ambit(4, "ambitd admin break-glass", &["admin", "list"]);

    let out = Command::new("sh")
        .args(["-ec", &runbook()])
        .current_dir(scene.cell.file(""))
        .env("PATH", format!("{}:/usr/bin:/bin", binary("ambit").unwrap().parent().unwrap().display()))
        .env("CONTEXT", scene.context())
        .env("CONFIG", scene.cell.seat_of(1).unwrap().config.display().to_string())
        .envs([("KEY", alice.as_str()), ("CELL", "west"), ("EPOCH", "1")])
        .output()
        .unwrap();
    let said = scene.ends(0, "break_glass", &out).to_lowercase();
    assert!(said.contains("break_glass") && said.contains("approved by alice"), "{said}");
    assert!(
        String::from_utf8_lossy(&out.stderr).contains("certify an administrator for 8 h"),
        "told before it is signed"
    );

    // The same word once more, for another name, another key, another cell, another epoch, too late, by nobody's key.
    let (csr, used) = (scene.file("request.pem"), scene.file("approval.json"));
    scene.glass(1, "approval_used", &["founder", "--csr", &csr, "--approval", &used]);
    scene.glass(1, "approval_invalid", &["olga", "--csr", &csr, "--approval", &used]);
    let other = scene.request("other.pem");
    scene.glass(1, "approval_invalid", &["founder", "--csr", &other, "--approval", &used]);
    let proposal = scene.glass(0, "an approver is to sign", &["founder", "--csr", &other]);
    std::fs::write(scene.file("second.json"), proposal).unwrap();
    let elsewhere = scene.word("alice.key", "second.json", "elsewhere.json", |p| p.replace("\"west\"", "\"east\""));
    let next = scene.word("alice.key", "second.json", "next.json", |p| p.replace("\"epoch\": 1", "\"epoch\": 2"));
    let nobodys = scene.word("mallory.key", "second.json", "nobodys.json", |p| p);
    for word in [&elsewhere, &next, &nobodys] {
        scene.glass(1, "approval_invalid", &["founder", "--csr", &other, "--approval", word]);
    }
    // What one approver said of another name than the request's is told before the cell is asked; and behind its back:
    let swapped = scene.word("alice.key", "second.json", "swapped.json", |p| p.replace("admin founder", "admin olga"));
    let forged = std::fs::read_to_string(&swapped).unwrap().replace("admin olga", "admin founder");
    std::fs::write(&swapped, forged).unwrap();
    scene.glass(1, "approval_invalid", &["founder", "--csr", &other, "--approval", &swapped]);
    scene.glass(
        1,
        "permission_denied",
        &[
            "eve",
            "--csr",
            &other,
            "--approval",
            &scene.word("alice.key", "second.json", "eve.json", |p| p.replace("admin founder", "admin eve")),
        ],
    );

    stands_out(&scene).await;
}

/// On every replica, and the refusals too.
async fn stands_out(scene: &Scene) {
    let same = |all: &[ambit_proto::v1::StatusResponse]| {
        all.len() == 3 && all.iter().all(|s| s.applied_index == all[0].applied_index && s.digest == all[0].digest)
    };
    scene.cell.wait_for("three replicas of one state", same).await.unwrap();
    for replica in 1..=3 {
        let page = scene.cell.metrics_page(replica).unwrap();
        assert!(page.contains("\nambit_break_glass_total 1\n"), "{page}");
    }
    let log = std::fs::read_to_string(&scene.cell.seat_of(1).unwrap().log).unwrap();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("\"event\":\"break_glass\"")).collect();
    assert!(lines.len() == 1 && lines[0].contains("\"level\":\"WARN\"") && lines[0].contains("founder"), "{lines:?}");
    let refused = scene.ambit(0, "local uid", &["admin", "refusals"]);
    assert!(refused.contains("approval_used") && refused.contains("approval_invalid"), "{refused}");
    // Who is not the replica's user does not even reach the socket.
    let folder = scene.cell.seat_of(1).unwrap().data.join("local");
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&folder), mode(&folder.join("admin.sock"))), (0o700, 0o600));
}
