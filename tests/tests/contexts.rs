//! An administrator's context renews itself where it is used, and is of use whatever happens to who renews it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_identity::SvidKey;
use ambit_identity::keys::certificates_from_pem;
use ambit_identity::tls::certified;
use ambit_tests::cell::Cell;
use ambit_tests::contexts::{Expiring, ambit};
use ambit_tests::process::binary;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

const HOUR: i64 = 3_600_000;

fn context(cell: &Cell) -> String {
    cell.admin_file("context.json").display().to_string()
}
fn read(cell: &Cell, name: &str) -> String {
    std::fs::read_to_string(cell.admin_file(name)).unwrap()
}
/// The first certificate in a file; the text around it may be the key's.
fn leaf(cell: &Cell) -> Vec<u8> {
    certificates_from_pem(&read(cell, "admin.pem")).unwrap()[0].to_vec()
}
#[track_caller]
fn ends(code: i32, words: &str, out: &Output) -> String {
    let notes = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(
        out.status.code() == Some(code) && notes.contains(words),
        "{notes}{}",
        String::from_utf8_lossy(&out.stdout)
    );
    notes
}
/// Key and certificate of `admin.pem` are of one another.
fn is_whole(cell: &Cell) {
    let pem = read(cell, "admin.pem");
    let key = if pem.contains("PRIVATE KEY") { pem.clone() } else { read(cell, "admin.key") };
    let pair = certified(certificates_from_pem(&pem).unwrap(), &SvidKey::from_pem(&key).unwrap()).unwrap();
    pair.keys_match().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_context_renews_itself_past_its_half_and_no_verb_fails_for_it() {
    let cell = Cell::start("west", 1).await.unwrap();
    let (expiring, context) = (Expiring::of(&cell, 1).unwrap(), context(&cell));
    let verb = || ambit(&context, &["admin", "list"]);
    let mut before = leaf(&cell);
    let mut renewed = |cell: &Cell| std::mem::replace(&mut before, leaf(cell)) != leaf(cell);

    // Founded just now: young. Then before and past the half of eight hours.
    ends(0, "", &verb());
    assert!(!renewed(&cell), "young");
    expiring.install(-3 * HOUR, 5 * HOUR).unwrap();
    renewed(&cell);
    ends(0, "", &verb());
    assert!(!renewed(&cell), "before its half");
    expiring.install(-5 * HOUR, 3 * HOUR).unwrap();
    renewed(&cell);
    ends(0, "", &verb());
    assert!(renewed(&cell), "past its half");
    is_whole(&cell);
    ends(0, "", &verb());
    assert!(!renewed(&cell), "young again");
    assert_eq!(SvidKey::from_pem(&read(&cell, "admin.key")).unwrap().spki_sha256(), {
        SvidKey::from_pem(&read(&cell, "admin.pem")).unwrap().spki_sha256()
    });

    // What cannot be renewed is told, and the verb ends as it would have.
    expiring.install(-5 * HOUR, 3 * HOUR).unwrap();
    renewed(&cell);
    std::fs::remove_file(cell.admin_file("lock")).unwrap();
    std::fs::create_dir(cell.admin_file("lock")).unwrap();
    ends(0, "warning: your certificate ends", &verb());
    assert!(!renewed(&cell), "nothing half done");
    std::fs::remove_dir(cell.admin_file("lock")).unwrap();

    // Over: by now it is of no use, and what to do is said.
    expiring.install(-9 * HOUR, -HOUR).unwrap();
    let said = ends(4, "admin_expired", &verb());
    assert!(said.contains("ambitd admin break-glass") && said.contains("ambit admin issue"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_at_once_and_one_that_is_killed_leave_a_usable_pair() {
    let cell = Cell::start("west", 1).await.unwrap();
    let (expiring, context) = (Expiring::of(&cell, 1).unwrap(), context(&cell));
    let program = binary("ambit").unwrap();
    let start = |args: &[&str]| {
        let mut command = Command::new(&program);
        let command = command.args(["--context", &context]).args(args).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    for _ in 0..3 {
        expiring.install(-5 * HOUR, 3 * HOUR).unwrap();
        let due = leaf(&cell);
        let at_once: Vec<_> = (0..6).map(|_| start(&["admin", "list"])).collect();
        for one in at_once {
            ends(0, "", &one.wait_with_output().unwrap());
        }
        is_whole(&cell);
        assert!(leaf(&cell) != due);
    }
    // Whoever asks for it gets a new one, one after the other.
    let at_once: Vec<_> = (0..4).map(|_| start(&["admin", "renew"])).collect();
    for one in at_once {
        ends(0, "", &one.wait_with_output().unwrap());
    }
    is_whole(&cell);
    for n in 0..40 {
        let mut one = start(&["admin", "renew"]);
        std::thread::sleep(Duration::from_millis(n * 5));
        one.kill().unwrap();
        one.wait().unwrap();
        is_whole(&cell);
    }
    // Wherever it was cut off: the new files beside, or the key once more not yet written.
    std::fs::write(cell.admin_file("admin.pem.new"), "half of a").unwrap();
    std::fs::write(cell.admin_file("admin.key"), SvidKey::generate().unwrap().pem().as_bytes()).unwrap();
    ends(0, "", &ambit(&context, &["admin", "list"]));
    ends(0, "", &ambit(&context, &["admin", "renew"]));
    is_whole(&cell);
}
