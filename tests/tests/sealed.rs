//! The root sealed to the replicas' TPMs: three real replicas with a software TPM each, from the first that attests itself to
//! a cell that begins anew from recovery shares.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_lab::tpm;
use ambit_proto::v1;
use ambit_proto::v1::node_attestation_client::NodeAttestationClient;
use ambit_tests::cell::{Cell, Seat, fresh};
use ambit_tests::machine::{Machine, apply_policy, golden_policy, put_list, register_bare_cluster};
use ambit_tests::operator::within;
use ambit_tests::process::{Folder, binary, run};
use ambit_tests::tpm::Maker;
use std::path::Path;
use std::process::Output;
use std::time::Duration;

/// Half of it passes in the test, and is more than the time that a TPM is given to answer.
const LIFETIME_S: u64 = 40;

/// Configuration of a replica on this machine.
fn on(machine: &Machine, folder: &Path) -> String {
    let (boot, ima) = (folder.join("boot.log"), folder.join("ima.log"));
    format!(
        "tpm = \"{}\"\nboot_log = \"{}\"\nima_log = \"{}\"\n[authority]\nlab = true\nlifetime_s = {LIFETIME_S}\n",
        machine.tcti(),
        boot.display(),
        ima.display()
    )
}

async fn allow(cell: &Cell, machine: &Machine) {
    let request = v1::AllowEkRequest { request_id: fresh(), cluster: "replica".into(), node_ids: vec![machine.node()] };
    let call = |channel| {
        let request = request.clone();
        async move { NodeAttestationClient::new(channel).allow_ek(request).await }
    };
    cell.insist(call).await.unwrap();
}

/// `ambit` with the administrator's context: whether it did it, and what it said.
fn ambit(cell: &Cell, args: &[&str]) -> (bool, String) {
    let program = binary("ambit").unwrap().display().to_string();
    let context = cell.admin_file("context.json").display().to_string();
    let out = run(&[&[program.as_str(), "--context", &context], args].concat()).unwrap();
    let said = [out.stdout, out.stderr].concat();
    (out.status.success(), String::from_utf8(said).unwrap())
}
fn done(cell: &Cell, args: &[&str]) -> String {
    let (done, said) = ambit(cell, args);
    assert!(done, "{args:?}: {said}");
    said
}
/// Two approvers, who from then on are asked.
fn approvers(cell: &Cell, path: &impl Fn(&str) -> String) {
    let public = |name: &str| done(cell, &["approver", "keygen", "--out", &path(&format!("{name}.approver"))]);
    let [alice, bob] = ["alice", "bob"].map(public);
    let card = |text: &str| text.lines().next().unwrap().to_owned();
    let add_bob = ["approver", "add", "bob", "--public", &card(&bob)].map(str::to_owned);
    done(cell, &["approver", "add", "alice", "--public", &card(&alice)]);
    approved(cell, path, &["alice"], &add_bob.each_ref().map(String::as_str));
}
/// What approvers are asked for, with the word of these.
fn with_words(cell: &Cell, path: &impl Fn(&str) -> String, who: &[&str], args: &[&str]) -> Vec<String> {
    let program = binary("ambit").unwrap().display().to_string();
    let context = cell.admin_file("context.json").display().to_string();
    let out = run(&[&[program.as_str(), "--context", &context], args].concat()).unwrap();
    assert!(refused(&out) == "approval_missing", "{}", String::from_utf8_lossy(&out.stderr));
    std::fs::write(path("proposal.json"), &out.stdout).unwrap();
    let mut all: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
    for name in who {
        let key = path(&format!("{name}.approver"));
        let sign = ["approve", &path("proposal.json"), "--key", &key, "--yes"];
        let out = run(&[&[program.as_str(), "--context", &context], &sign[..]].concat()).unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        std::fs::write(path(&format!("{name}.word")), &out.stdout).unwrap();
        all.extend(["--approval".to_owned(), path(&format!("{name}.word"))]);
    }
    all
}
fn approved(cell: &Cell, path: &impl Fn(&str) -> String, who: &[&str], args: &[&str]) {
    let args = with_words(cell, path, who, args);
    done(cell, &args.iter().map(String::as_str).collect::<Vec<_>>());
}
fn refused(out: &Output) -> String {
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success(), "accepted, where a refusal was due");
    said.split("error[").nth(1).and_then(|rest| rest.split(']').next()).unwrap_or(&said).to_owned()
}

/// The machine's TPM shows that something else booted.
fn boots_other(machine: &Machine) {
    let digest = format!("0:sha256={}", "11".repeat(32));
    let extended =
        std::process::Command::new("tpm2_pcrextend").arg(digest).env("TPM2TOOLS_TCTI", machine.tcti()).output();
    assert!(extended.unwrap().status.success());
}

/// How a machine that wants to become replica `number` fails.
async fn join_fails(cell: &Cell, name: &str, number: u64, more: &str) -> String {
    let seat = Seat::new(cell.folder(), name, more).unwrap();
    let token = cell.replica_token(number, seat.listen).await.unwrap();
    refused(&cell.join(&seat, number, &hex::encode(cell.fingerprint), &token).unwrap())
}

async fn form(cell: &Cell, what: &str) {
    cell.wait_for(what, |all| all.iter().all(|s| s.root_form == what)).await.unwrap();
}

/// The names of the replicas' intermediates.
async fn authorities(cell: &Cell) -> Vec<String> {
    cell.status(1).await.unwrap().members.into_iter().map(|m| m.authority).collect()
}
async fn all_renew(cell: &Cell) {
    let before = authorities(cell).await;
    let until = std::time::Instant::now() + Duration::from_secs(2 * LIFETIME_S);
    loop {
        let now = authorities(cell).await;
        if now.iter().all(|authority| !before.contains(authority)) {
            return;
        }
        assert!(std::time::Instant::now() < until, "not renewed: {now:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn files(cell: &Cell, number: usize) -> Vec<String> {
    let folder = cell.seat_of(number).unwrap().data.join("identity");
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|file| file.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("root") && name.ends_with(".key") || name.starts_with("wrap"))
        .collect();
    names.sort();
    names
}

#[tokio::test]
async fn the_root_is_sealed_to_three_tpms_and_opened_by_two_of_three_people() {
    let (maker, stranger) = (Maker::new().unwrap(), Maker::new().unwrap());
    let machine = async |name| Machine::new(&maker, name).await.unwrap();
    let (one, two, three) = (machine("one").await, machine("two").await, machine("three").await);
    let folder = Folder::new().unwrap();
    let at = folder.path("").clone();
    std::fs::write(at.join("boot.log"), tpm::BOOT_LOG).unwrap();
    std::fs::write(at.join("ima.log"), tpm::IMA_LOG).unwrap();
    let mut cell = Cell::configured(folder, "west", 1, &on(&one, &at)).await.unwrap();
    assert_eq!(files(&cell, 1), ["root.key", "wrap.tpm"]);
    form(&cell, "wrapped to each replica (unsealed: no attested TPM key at replica 1)").await;

    // The first replica attests itself as soon as there is a policy and its EK is named.
    register_bare_cluster(&cell, "replica", &maker).await.unwrap();
    let (yaml, list) = golden_policy("replica", "replica").unwrap();
    put_list(&cell, &list).await.unwrap();
    apply_policy(&cell, &yaml, false).await.unwrap();
    allow(&cell, &one).await;
    form(&cell, "wrapped to each replica (unsealed: ambit trust seal)").await;
    assert_eq!(cell.status(1).await.unwrap().members[0].attested_ek, one.node());
    done(&cell, &["raft", "require-attested"]);

    // Others do not get in: without a TPM, with one that nobody named, of another maker, or that booted something else.
    assert_eq!(join_fails(&cell, "bare", 2, "").await, "replica_unattested");
    assert_eq!(join_fails(&cell, "unnamed", 2, &on(&two, &at)).await, "ek_not_expected");
    let foreign = Machine::new(&stranger, "foreign").await.unwrap();
    allow(&cell, &foreign).await;
    assert_eq!(join_fails(&cell, "foreign", 2, &on(&foreign, &at)).await, "ek_chain_untrusted");
    let other = machine("other").await;
    allow(&cell, &other).await;
    boots_other(&other);
    let code = join_fails(&cell, "other", 2, &on(&other, &at)).await;
    assert_eq!(code, "boot_log_pcr_mismatch");

    for (number, machine) in [(2, &two), (3, &three)] {
        allow(&cell, machine).await;
        cell.configure(&on(machine, &at));
        cell.add(number).await.unwrap();
    }
    form(&cell, "wrapped to each replica (unsealed: ambit trust seal)").await;

    // No seal without people who can open the root when all TPMs are lost.
    let (sealed, said) = ambit(&cell, &["trust", "seal"]);
    assert!(!sealed && said.contains("seal_incomplete"), "{said}");
    let mut args = vec!["trust".to_owned(), "shares".to_owned(), "--threshold".to_owned(), "2".to_owned()];
    let files_of = cell.file("");
    let path = |name: &str| files_of.join(name).display().to_string();
    for name in ["al", "bo", "cy"] {
        let key = done(&cell, &["trust", "holder-key", "--out", &path(&format!("{name}.key"))]);
        args.extend(["--holder".to_owned(), format!("{name}={}", key.lines().next().unwrap())]);
    }
    args.extend(["--out".to_owned(), path("shares")]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    assert!(ambit(&cell, &args).1.contains("needs_second_approver"), "one administrator splits no root");
    assert!(done(&cell, &["trust", "seal", "--dry-run"]).contains("take two approvers"));
    approvers(&cell, &path);
    let args = with_words(&cell, &path, &["alice", "bob"], &args);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    // What cannot be written down is not asked of the cell: their word still counts.
    std::fs::create_dir_all(path("shares")).unwrap();
    std::fs::write(path("shares/cy.share"), "another").unwrap();
    assert!(ambit(&cell, &args).1.contains("cy.share"));
    std::fs::remove_file(path("shares/cy.share")).unwrap();
    done(&cell, &args);
    let root_key = std::fs::read(cell.seat_of(1).unwrap().data.join("identity/root.key")).unwrap();
    done(&cell, &["trust", "seal"]);
    form(&cell, "sealed").await;
    within("no key in a file opens the root", async || (1..=3).all(|n| files(&cell, n) == ["wrap.tpm"]).then_some(()))
        .await;
    all_renew(&cell).await;

    // A replica that booted something else is attested no more, and everybody sees it.
    boots_other(&three);
    cell.kill(3).unwrap();
    cell.restart(3).unwrap();
    let unsealed = "sealed (unsealed: no attested TPM key at replica 3)";
    form(&cell, unsealed).await;

    // A replica whose TPM is another opens nothing; the others do, and renew for it.
    cell.kill(3).unwrap();
    let config = cell.seat_of(3).unwrap().config.clone();
    let text = std::fs::read_to_string(&config).unwrap();
    let replaced = machine("replaced").await;
    std::fs::write(&config, text.replace(&three.tcti(), &replaced.tcti())).unwrap();
    cell.restart(3).unwrap();
    cell.wait_for_voters().await.unwrap();
    let seat = Seat::new(cell.folder(), "fourth", &on(&other, &at)).unwrap();
    let (token, via) = (cell.replica_token(4, seat.listen).await.unwrap(), cell.address(3).unwrap().to_string());
    let print = hex::encode(cell.fingerprint);
    let who = ["--trust-domain", "west", "--replica", "4", "--fingerprint", &print];
    let out = seat.ambitd("join", &[&who[..], &["--via", &via, "--token", &token]].concat()).unwrap();
    assert_eq!(refused(&out), "issuer_unavailable");
    all_renew(&cell).await;

    // A TPM that hangs holds up nothing but what needs it: time goes on, and who can opens the root for who cannot.
    two.hang().unwrap();
    let stamp = cell.status(1).await.unwrap().stamp_ms;
    all_renew(&cell).await;
    assert!(cell.status(1).await.unwrap().stamp_ms > stamp);
    form(&cell, unsealed).await;

    // All is lost but a backup and two of the three.
    done(&cell, &["raft", "snapshot", "--out", &path("backup")]);
    for name in ["al", "bo", "cy"] {
        let file = |of: &str| path(&format!("{of}{name}"));
        let (key, share) = (path(&format!("{name}.key")), path(&format!("shares/{name}.share")));
        let said = done(&cell, &["trust", "open-share", "--key", &key, "--share", &share, "--out", &file("plain-")]);
        assert!(said.contains("2 open it together"), "{said}");
    }
    let other_holder = path("bo.key");
    let args =
        ["trust", "open-share", "--key", &other_holder, "--share", &path("shares/al.share"), "--out", &path("no")];
    assert!(ambit(&cell, &args).1.contains("share_invalid"));
    let fingerprint = hex::encode(cell.fingerprint);
    let (backup, admin) = (path("backup"), path("admin-2"));
    // First with the TPM that hangs, which leaves the place as it was.
    let seat = Seat::new(cell.folder(), "anew", &on(&two, &at)).unwrap();
    let restore = |shares: &[&str]| {
        let shares: Vec<String> = shares.iter().map(|name| path(&format!("plain-{name}"))).collect();
        let mut args = vec!["--trust-domain", "west", "--fingerprint", &fingerprint, "--snapshot", &backup];
        args.extend(["--admin-out", admin.as_str(), "--shares"]);
        args.extend(shares.iter().map(String::as_str));
        seat.ambitd("restore", &args).unwrap()
    };
    assert_eq!(refused(&restore(&["al"])), "share_invalid");
    assert_eq!(refused(&restore(&["cy", "al"])), "issuer_unavailable");
    let text = std::fs::read_to_string(&seat.config).unwrap();
    std::fs::write(&seat.config, text.replace(&format!("tpm = \"{}\"\n", two.tcti()), "")).unwrap();
    let out = restore(&["cy", "al"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(std::fs::read(seat.data.join("identity/root.key")).unwrap(), root_key, "the very key");
    // Nothing that anybody wrote on the way holds the key.
    for number in 1..=3 {
        let log = std::fs::read(&cell.seat_of(number).unwrap().log).unwrap();
        for secret in [hex::encode(&root_key), hex::encode(&root_key[36..68])] {
            assert!(!String::from_utf8_lossy(&log).contains(&secret));
        }
    }
}
