//! `ambit attest` as a program: what it prints, and how it ends, for real boots.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on ends")]

use serde_json::Value;
use std::path::PathBuf;
use std::process::Command;

const NONCE: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

fn data(path: &str) -> String {
    format!("{}/../attestation/verify/tests/{path}", env!("CARGO_MANIFEST_DIR"))
}

/// A folder of this test's own, emptied first.
fn scratch(name: &str) -> PathBuf {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("attest-{name}"));
    let _ = std::fs::remove_dir_all(&path);
    std::fs::create_dir_all(&path).unwrap();
    path
}

/// Exit code, standard output, standard error.
fn ambit(args: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ambit"));
    let out = command.args(args).env_remove("AMBIT_CONTEXT").env("HOME", "/nonexistent").output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (out.status.code().unwrap(), text(&out.stdout), text(&out.stderr))
}

/// A policy learnt from a recorded machine, in a file.
fn learnt(scratch: &std::path::Path, boot: &str, more: &[&str]) -> String {
    let from = data(boot);
    let (code, yaml, err) =
        ambit(&[&["attest", "policy", "learn", "--from", &from, "--cluster", "west"], more].concat());
    assert_eq!(code, 0, "{err}");
    let file = scratch.join("policy.yaml");
    std::fs::write(&file, yaml).unwrap();
    file.display().to_string()
}

#[test]
fn a_machine_is_accepted_by_what_was_learnt_from_it() {
    let scratch = scratch("accepted");
    let list = scratch.join("files").display().to_string();
    let policy = learnt(&scratch, "golden/secureboot-grub", &["--ima-list", &list, "--class", "lab"]);
    let roots = scratch.join("roots.pem");
    let pem = |n: &str| std::fs::read_to_string(data(&format!("golden/ca/{n}"))).unwrap();
    std::fs::write(&roots, pem("swtpm-localca-rootca-cert.pem") + &pem("issuercert.pem")).unwrap();
    let folder = data("golden/secureboot-grub");
    let roots = roots.display().to_string();
    let base = ["attest", "appraise", &folder, "--policy", &policy, "--ima-list", &list];
    let full = [&base[..], &["--nonce", NONCE, "--roots", &roots, "--class", "lab", "-o", "json"]].concat();
    let (code, out, err) = ambit(&full);
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let answer: Value = serde_json::from_str(&out).unwrap();
    for (key, value) in [("verdict", "affirming"), ("endorsement", "verified"), ("class", "lab")] {
        assert_eq!(answer[key], value, "{key}");
    }
    assert_eq!(
        (&answer["nonce_checked"], &answer["quoted"], &answer["signer_checked"]),
        (&true.into(), &true.into(), &true.into())
    );
    assert_eq!(answer["rules"]["images"], serde_json::json!([23, 29, 42, 43]));
    assert_eq!(answer["facts"]["ima"]["entries"], 41);
    assert_eq!(answer["trust_vector"]["executables"], 2);
    for key in ["code", "diverged", "expected", "found", "remedy"] {
        assert_eq!(answer[key], Value::Null, "{key}");
    }
    assert_eq!(answer["unjudged"], serde_json::json!(["activation"]), "which no folder can prove");
    // A text that no digest covers is marked: whoever wrote the log chose it.
    let measured = answer["facts"]["boot"]["measured"].as_array().unwrap();
    for (fact, covered) in [("command_line", true), ("grub_command", true), ("file", false), ("image", false)] {
        let of_it: Vec<_> = measured.iter().filter(|e| e["fact"] == fact).collect();
        assert!(!of_it.is_empty() && of_it.iter().all(|e| e["authenticated"] == covered), "{fact}: {of_it:?}");
    }
    // What nobody asked for is said.
    let (_, out, _) = ambit(&[&base[..], &["--roots", &roots, "-o", "json"]].concat());
    let answer: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(answer["unjudged"], serde_json::json!(["nonce", "class", "activation"]));
    let (code, out, _) = ambit(&base);
    assert_eq!(code, 0);
    assert!(out.contains("nonce not checked (--nonce)") && out.contains("endorsement not checked (--roots)"), "{out}");
    let (code, out, err) = ambit(&base[..5]);
    assert_eq!((code, out.as_str()), (2, ""));
    assert!(err.starts_with("error[allow_list_missing]") && err.contains("--ima-list FILE"), "{err}");
}

/// Each row: the folder, options more, exit code, code and place.
#[test]
fn a_denial_names_code_place_expected_found_and_remedy() {
    let scratch = scratch("denied");
    let policy = learnt(&scratch, "boots/secureboot-grub", &[]);
    let zeros = "00".repeat(32);
    for (folder, more, code, place) in [
        (
            "boots/nosb-grub",
            &[][..],
            "secure_boot_off",
            Some("boot log event 4 (EV_EFI_VARIABLE_DRIVER_CONFIG) of PCR 7"),
        ),
        ("boots/nolog", &[], "boot_log_missing", None),
        ("boots/mok", &[], "mok_list_not_allowed", Some("boot log event 24 (EV_IPL) of PCR 14")),
        ("boots/gpt", &[], "boot_event_not_covered", Some("boot log event 23 (EV_EFI_GPT_EVENT) of PCR 5")),
        ("boots/secureboot-grub", &["--nonce", &zeros], "quote_nonce", None),
    ] {
        let folder = data(folder);
        let line = [&["attest", "appraise", &folder, "--policy", &policy], more].concat();
        let (exit, out, _) = ambit(&[&line[..], &["-o", "json"]].concat());
        let answer: Value = serde_json::from_str(&out).unwrap();
        assert_eq!((exit, &answer["verdict"], &answer["code"]), (4, &"denied".into(), &code.into()), "{folder}: {out}");
        assert_eq!(answer["diverged"].as_str(), place, "{folder}");
        for key in ["expected", "found", "remedy"] {
            assert!(!answer[key].as_str().unwrap().is_empty(), "{folder} {key}");
        }
        assert_eq!(answer["findings"][0]["code"], code);
        let (exit, out, _) = ambit(&line);
        assert_eq!(exit, 4);
        assert!(out.starts_with(&format!("denied[{code}]\n")) && out.contains("\n  try:      "), "{out}");
    }
}

#[test]
fn logs_that_no_quote_proves_are_never_affirming() {
    let scratch = scratch("unquoted");
    let policy = learnt(&scratch, "golden/secureboot-grub", &[]);
    for file in ["binary_bios_measurements", "ima_binary_runtime_measurements", "pcrs.sha256"] {
        std::fs::copy(data(&format!("golden/secureboot-grub/{file}")), scratch.join(file)).unwrap();
    }
    let folder = scratch.display().to_string();
    let line = ["attest", "appraise", &folder, "--policy", &policy, "-o", "json"];
    let verdict = |out: &str| serde_json::from_str::<Value>(out).unwrap()["verdict"].as_str().unwrap().to_owned();
    let (code, out, _) = ambit(&line);
    assert_eq!((code, verdict(&out).as_str()), (4, "denied"));
    assert!(out.contains("\"quote_missing\""), "{out}");
    let (code, out, _) = ambit(&[&line[..], &["--unquoted"]].concat());
    assert_eq!((code, verdict(&out).as_str()), (0, "unquoted"));
    std::fs::copy(data("golden/secureboot-grub/quote.tpms_attest"), scratch.join("quote.tpms_attest")).unwrap();
    let (code, out, _) = ambit(&line);
    let answer: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &answer["code"]), (4, &"evidence_malformed".into()), "half a quote");
    assert_eq!(answer["found"], "no quote.tpmt_signature, ak.tpmt_public");
    std::fs::remove_file(scratch.join("pcrs.sha256")).unwrap();
    std::fs::remove_file(scratch.join("quote.tpms_attest")).unwrap();
    let (code, out, _) = ambit(&line);
    let answer: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &answer["code"]), (4, &"evidence_malformed".into()), "nothing to judge");
    assert_eq!(answer["expected"], "a file pcrs.sha256");
    assert_eq!(ambit(&["attest", "appraise", "/nowhere", "--policy", &policy]).0, 2);
    assert_eq!(ambit(&["attest", "appraise", &folder, "--policy", "/nowhere"]).0, 2);
}

/// Files as an attacker or a broken disk leaves them: a verdict with its code, or a refusal that names the file.
#[test]
fn what_is_too_large_is_told_by_its_code_and_what_is_no_file_by_its_name() {
    let scratch = scratch("odd");
    let policy = learnt(&scratch, "golden/secureboot-grub", &[]);
    let folder = scratch.join("machine");
    for (name, bytes) in [("binary_bios_measurements", 2 << 20), ("ima_binary_runtime_measurements", 64 << 20)] {
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir(&folder).unwrap();
        for entry in std::fs::read_dir(data("golden/secureboot-grub")).unwrap().flatten() {
            std::fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
        }
        // Not one of the names: never read.
        std::fs::create_dir(folder.join("notes")).unwrap();
        std::fs::File::create(folder.join(name)).unwrap().set_len(bytes + 1).unwrap();
        let (code, out, err) =
            ambit(&["attest", "appraise", folder.to_str().unwrap(), "--policy", &policy, "-o", "json"]);
        let answer: Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}{err}"));
        assert_eq!((code, &answer["code"]), (4, &"evidence_too_large".into()), "{name}");
        assert!(answer["found"].as_str().unwrap().starts_with(&(bytes + 1).to_string()), "{answer}");
    }
    std::fs::remove_file(folder.join("cmdline")).unwrap();
    std::fs::create_dir(folder.join("cmdline")).unwrap();
    let (code, _, err) = ambit(&["attest", "appraise", folder.to_str().unwrap(), "--policy", &policy]);
    assert_eq!(code, 2);
    assert!(err.contains("machine/cmdline"), "{err}");
}

#[test]
fn policies_are_linted_and_compared() {
    let scratch = scratch("policies");
    let old = learnt(&scratch, "boots/secureboot-grub", &[]);
    let text = std::fs::read_to_string(&old).unwrap();
    let new = scratch.join("new.yaml").display().to_string();
    std::fs::write(&new, text.replace("secureBoot: required", "secureBoot: any")).unwrap();
    let (code, out, _) = ambit(&["attest", "policy", "lint", &new]);
    assert_eq!(code, 0);
    assert!(out.contains("secureBoot  any: authorities and keys decide nothing"), "{out}");
    assert_eq!(ambit(&["attest", "policy", "diff", &old, &old]), (0, "0 differences\n".into(), String::new()));
    let (code, out, _) = ambit(&["attest", "policy", "diff", &old, &new, "-o", "json"]);
    let changes: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, changes.as_array().unwrap().len()), (5, 2));
    assert_eq!((&changes[0]["field"], &changes[0]["added"]), (&"spec.secureBoot".into(), &"any".into()));
    let bad = scratch.join("bad.yaml").display().to_string();
    for (from, to, found) in
        [("secureBoot", "secureboot", "line 10 column 3"), ("patterns: []", "patterns: [\"(\"]", "regex parse error")]
    {
        std::fs::write(&bad, text.replace(from, to)).unwrap();
        let (code, _, err) = ambit(&["attest", "policy", "lint", &bad]);
        assert_eq!(code, 2, "{err}");
        assert!(err.starts_with("error[appraisal_policy_malformed]") && err.contains(found), "{err}");
    }
    // Nothing is learnt from evidence that is refused.
    let folder = scratch.join("folder");
    std::fs::create_dir_all(&folder).unwrap();
    for file in std::fs::read_dir(data("golden/secureboot-grub")).unwrap().map(|e| e.unwrap()) {
        std::fs::copy(file.path(), folder.join(file.file_name())).unwrap();
    }
    std::fs::copy(data("golden/mutants/retyped-pcr7.bin"), folder.join("binary_bios_measurements")).unwrap();
    let (code, out, err) = ambit(&["attest", "policy", "learn", "--from", &folder.display().to_string()]);
    assert_eq!((code, out.as_str()), (4, ""));
    assert!(err.starts_with("error[boot_log_event_altered]"), "{err}");
}

/// The policy that is shipped raises no warning and accepts the boot it was written for.
#[test]
fn the_shipped_policy_accepts_the_golden_boot() {
    let file = |name: &str| format!("{}/../deploy/policies/{name}", env!("CARGO_MANIFEST_DIR"));
    let (policy, list) = (file("debian-secureboot.yaml"), file("debian-initrd.sha256"));
    let (code, out, err) = ambit(&["attest", "policy", "lint", &policy]);
    assert_eq!((code, out.as_str()), (0, "0 warnings\n"), "{err}");
    let appraise =
        |folder: &str| ambit(&["attest", "appraise", &data(folder), "--policy", &policy, "--ima-list", &list]);
    let (code, out, _) = appraise("golden/secureboot-grub");
    assert_eq!(code, 0, "{out}");
    assert_eq!(appraise("boots/nosb-grub").0, 4);
}
