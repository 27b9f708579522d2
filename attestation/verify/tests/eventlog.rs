//! tpm2_eventlog, which nobody here wrote, is the oracle of the boot log's replay: in every bank, for every recorded boot.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on ends")]

use ambit_verify::HashAlg;
use ambit_verify::bootlog::BootLog;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

const LOG: &str = "binary_bios_measurements";

fn logs() -> Vec<PathBuf> {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let folders = ["golden", "boots"].into_iter().flat_map(|kind| std::fs::read_dir(tests.join(kind)).unwrap());
    let mut logs: Vec<PathBuf> = folders.map(|e| e.unwrap().path().join(LOG)).filter(|log| log.exists()).collect();
    logs.sort();
    logs
}

/// The `pcrs:` part of the tool's YAML: banks, and below them an index and a value a line.
fn replayed_by_the_tool(log: &Path) -> BTreeMap<(String, u32), String> {
    let run = Command::new("tpm2_eventlog").arg(log).output().expect("tpm2_eventlog (Debian package tpm2-tools)");
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let text = String::from_utf8_lossy(&run.stdout).into_owned();
    let pcrs = text.split_once("\npcrs:\n").expect("the tool's replay").1;
    let mut out = BTreeMap::new();
    let mut bank = String::new();
    for line in pcrs.lines() {
        let (name, value) = line.trim().split_once(':').expect("a YAML mapping");
        match value.trim().strip_prefix("0x") {
            None => bank = name.to_owned(),
            Some(value) => drop(out.insert((bank.clone(), name.trim().parse().unwrap()), value.to_owned())),
        }
    }
    out
}

#[test]
fn our_replay_equals_tpm2_eventlogs() {
    let logs = logs();
    assert!(logs.len() >= 10, "recorded boots: {logs:?}");
    for log in logs {
        let bytes = std::fs::read(&log).unwrap();
        let parsed = BootLog::parse(&bytes).unwrap();
        let theirs = replayed_by_the_tool(&log);
        let banks: std::collections::BTreeSet<&str> = theirs.keys().map(|(bank, _)| bank.as_str()).collect();
        assert_eq!(banks, ["sha1", "sha256", "sha384"].into(), "{}", log.display());
        for hash in [HashAlg::Sha1, HashAlg::Sha256, HashAlg::Sha384] {
            let ours = parsed.replay(hash).unwrap();
            for ((_, pcr), value) in theirs.iter().filter(|((bank, _), _)| *bank == hash.to_string()) {
                assert_eq!(hex::encode(&ours[pcr]), *value, "{} PCR {pcr} {hash}", log.display());
            }
        }
    }
}
