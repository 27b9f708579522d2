//! The program itself: what it prints where, and how it ends.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

mod cell;

use cell::FakeCell;
use std::process::{Command, Output};

fn ambit(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ambit"));
    command.args(args).env_remove("AMBIT_CONTEXT").env("HOME", "/nonexistent").output().unwrap()
}

/// Exit code, standard output, standard error.
fn said(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn wrong_lines_and_files_end_two() {
    for args in [
        &["nonsense"][..],
        &["node", "list"],
        &["--context", "/nowhere/context.json", "status"],
        &["policy", "lint", "/nowhere.yaml"],
        &["drill", "validate", "/dev/null"],
    ] {
        let (code, out, err) = said(&ambit(args));
        assert_eq!((code, out.as_str()), (2, ""), "{args:?}: {err}");
        assert!(err.starts_with("error"), "{args:?}: {err}");
    }
}

#[test]
fn refusals_name_code_expected_found_and_remedy() {
    let (_, _, err) = said(&ambit(&["--context", "/nowhere/context.json", "status"]));
    let golden = "error[bad_request]: expected a usable file /nowhere/context.json, found No such file or directory \
                  (os error 2)\n  try: correct the field named and send the request again\n";
    assert_eq!(err, golden);
}

#[test]
fn shipped_drills_are_valid_and_shown() {
    for name in ["leader-loss", "cluster-loss"] {
        let file = format!("{}/../deploy/drills/{name}.yaml", env!("CARGO_MANIFEST_DIR"));
        let (code, out, err) = said(&ambit(&["drill", "validate", &file]));
        assert_eq!(code, 0, "{err}");
        assert!(out.starts_with(&format!("drill {name} (platform): ")) && out.ends_with("1 drill, valid\n"), "{out}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_live_cell_answers() {
    let cell = FakeCell::start("binary").await;
    let context = cell.context().display().to_string();
    let run = |args: &[&str]| said(&ambit(&[&["--context", context.as_str(), "--timeout", "3s"], args].concat()));

    let (code, out, err) = run(&["cluster", "list"]);
    assert_eq!(code, 0, "{err}");
    assert_eq!(
        out,
        "NAME  TRUST DOMAIN  HOME  STATE   NODES  FINGERPRINT  AGE  REGION  DRAINED\nwest  west          west  active  2      -            0ms  -       no\n1 cluster\n"
    );

    let create = [
        "entry",
        "create",
        "--id",
        "web",
        "--spiffe-id",
        "spiffe://west/web",
        "--cluster",
        "west",
        "--selector",
        "unix:uid:7",
    ];
    let (code, out, err) = run(&create);
    assert_eq!((code, out.starts_with("ID   STATUS   REVISION\nweb  created")), (0, true), "{out}{err}");
    assert!(err.starts_with(&format!("context: west (root {}..)", &cell.fingerprint[..16])), "{err}");
    let (code, _, err) = run(&create);
    assert_eq!(code, 1, "the same entry again: {err}");
    assert!(err.contains("error[already_exists]") && err.contains("  try: "), "{err}");
    let (code, out, _) = run(&["entry", "list", "-o", "json"]);
    let entries: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, entries[0]["spiffe_id"].as_str()), (0, Some("spiffe://west/web")));

    let (code, _, err) = run(&["peer", "list"]);
    assert_eq!(code, 1, "not built there: {err}");
    assert!(err.starts_with("error[unimplemented]\n  try: "), "{err}");

    // Two of three replicas say nothing of use; the third does.
    *cell.shared.replicas_answering.lock().unwrap() = vec![3];
    let (code, _, err) = run(&["cluster", "list"]);
    assert_eq!(code, 0, "{err}");
    *cell.shared.replicas_answering.lock().unwrap() = vec![];
    let (code, _, err) = run(&["cluster", "list"]);
    assert_eq!(code, 3, "{err}");
    let (code, out, _) = run(&["check"]);
    assert_eq!(code, 3);
    assert!(out.contains("× agents") && out.contains("× peers") && out.contains(" failed\n"), "{out}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_root_and_nobody_at_all_are_refused() {
    let cell = FakeCell::start("pinned").await;
    let context = cell.context().display().to_string();
    cell.write_context(&cell.addresses, &"ab".repeat(32));
    let (code, _, err) = said(&ambit(&["--context", &context, "status"]));
    assert_eq!(code, 4, "{err}");
    assert!(err.starts_with("error[fingerprint_mismatch]"), "{err}");

    // A port that was ours a moment ago and is closed now.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    cell.write_context(&[closed, cell.addresses[0]], &cell.fingerprint);
    let (code, _, err) = said(&ambit(&["--context", &context, "cluster", "list"]));
    assert_eq!(code, 0, "the second address answers: {err}");
    cell.write_context(&[closed], &cell.fingerprint);
    let (code, _, err) = said(&ambit(&["--context", &context, "cluster", "list"]));
    assert_eq!(code, 3, "{err}");
    assert!(err.starts_with("error[unavailable]"), "{err}");
}
