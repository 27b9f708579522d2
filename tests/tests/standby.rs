//! West, its standby east and its witness core as real processes, by the command line: named in peace, leased, granted, fenced.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_identity::keys::certificates_from_pem;
use ambit_tests::cell::Cell;
use ambit_tests::contexts::ambit;
use ambit_tests::peering::peer;
use serde_json::Value;
use std::process::Output;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(25);

fn said(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stderr), String::from_utf8_lossy(&out.stdout))
}

fn at(cell: &Cell, args: &[&str]) -> Output {
    ambit(&cell.admin_file("context.json").display().to_string(), args)
}

/// It ends so, with these words.
#[track_caller]
fn ends(cell: &Cell, code: i32, words: &str, args: &[&str]) -> String {
    let out = at(cell, args);
    let text = said(&out);
    assert!(out.status.code() == Some(code) && text.contains(words), "{args:?} without {words}: {text}");
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// Until it ends so, with these words.
#[track_caller]
fn comes_to(cell: &Cell, code: i32, words: &str, args: &[&str]) -> Duration {
    let begun = Instant::now();
    loop {
        let out = at(cell, args);
        let text = said(&out);
        if out.status.code() == Some(code) && text.contains(words) {
            return begun.elapsed();
        }
        assert!(begun.elapsed() < PATIENCE, "{args:?} does not come to {words}: {text}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn show(cell: &Cell) -> Value {
    let text = ends(cell, 0, "", &["cluster", "standby", "show", "--output", "json"]);
    serde_json::from_str(&text).unwrap()
}

/// An approver's key, in west's folder of operators; what he hands out.
fn keygen(west: &Cell, name: &str) -> String {
    let file = west.admin_file(&format!("{name}.key")).display().to_string();
    ends(west, 0, "", &["approver", "keygen", "--out", &file]).trim().to_owned()
}

/// The files of their words for a proposal, each as an option.
fn approve(west: &Cell, proposal: &str, who: &[&str], epoch: &str) -> Vec<String> {
    let asked = west.admin_file("proposal.json").display().to_string();
    std::fs::write(&asked, proposal).unwrap();
    let word = |name: &&str| {
        let key = west.admin_file(&format!("{name}.key")).display().to_string();
        let sign = ["approve", &asked, "--key", &key, "--yes", "--trust-domain", "west", "--epoch", epoch];
        let text = ends(west, 0, "approved: ", &sign);
        let file = west.admin_file(&format!("{name}.json")).display().to_string();
        std::fs::write(&file, text).unwrap();
        ["--approval".to_owned(), file]
    };
    who.iter().flat_map(word).collect()
}

fn with<'a>(args: &[&'a str], words: &'a [String]) -> Vec<&'a str> {
    args.iter().copied().chain(words.iter().map(String::as_str)).collect()
}

/// Until a certificate asked of west ends so, with these words.
#[track_caller]
fn minting_comes_to(west: &Cell, code: i32, words: &str) -> Duration {
    let begun = Instant::now();
    loop {
        // Never over another key.
        let out = west.file(&format!("minted-{}", begun.elapsed().as_nanos())).display().to_string();
        let out = at(west, &["svid", "mint", "spiffe://west/ci", "--out", &out, "--ttl", "2m"]);
        let text = said(&out);
        if out.status.code() == Some(code) && text.contains(words) {
            return begun.elapsed();
        }
        assert!(begun.elapsed() < PATIENCE, "minting does not come to {words}: {text}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Two approvers of west, and east named as its standby.
fn named(west: &Cell, naming: &[&str]) {
    let [alice, bob] = ["alice", "bob"].map(|name| keygen(west, name));
    ends(west, 0, "", &["approver", "add", "alice", "--public", &alice]);
    let add = ["approver", "add", "bob", "--public", &bob];
    let proposal = ends(west, 5, "approval_missing", &add);
    let word = approve(west, &proposal, &["alice"], "1");
    ends(west, 0, "bob", &with(&add, &word));
    let set = [&["cluster", "standby", "set"], naming].concat();
    let proposal = ends(west, 5, "approval_missing", &set);
    let one = approve(west, &proposal, &["alice"], "1");
    ends(west, 5, "approval_missing", &with(&set, &one));
    let both = approve(west, &proposal, &["alice", "bob"], "1");
    ends(west, 0, "east", &with(&set, &both));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_home_signs_under_its_lease_and_a_grant_takes_effect_when_nobody_renews_it() {
    let cells = tokio::join!(Cell::start("west", 1), Cell::start("east", 1), Cell::start("core", 1));
    let (west, mut east, mut core) = (cells.0.unwrap(), cells.1.unwrap(), cells.2.unwrap());
    peer(&west, &east).await.unwrap();
    peer(&west, &core).await.unwrap();
    peer(&east, &core).await.unwrap();
    ends(&east, 5, "standby_unknown", &["cluster", "grant", "west", "--for", "1h"]);
    named(&west, &["east", "--witness", "core", "--lease", "4s"]);

    // In peace: it signs under the lease, and its standby holds an intermediate that the root marked.
    minting_comes_to(&west, 0, "");
    let held = east.seat_of(1).unwrap().data.join("identity/standby-west.pem");
    let begun = Instant::now();
    while !held.exists() {
        assert!(begun.elapsed() < PATIENCE, "no standby's intermediate");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let certificates = certificates_from_pem(&std::fs::read_to_string(&held).unwrap()).unwrap();
    let cert = ambit_identity::profile::certificate(&certificates[0]).unwrap();
    assert_eq!(ambit_identity::profile::standby_of(&cert).unwrap().unwrap().as_str(), "east");
    comes_to(&west, 0, "\"settled\": true", &["cluster", "standby", "show", "--output", "json"]);

    // Either renews it; without both it ends.
    core.kill(1).unwrap();
    tokio::time::sleep(Duration::from_secs(6)).await;
    minting_comes_to(&west, 0, "");
    east.kill(1).unwrap();
    let took = minting_comes_to(&west, 3, "lease_ended");
    assert!(took < Duration::from_secs(8), "{took:?}");
    ends(&west, 0, "founder", &["admin", "list"]);
    for cell in [&mut east, &mut core] {
        cell.restart(1).unwrap();
        cell.read_context().unwrap();
    }
    minting_comes_to(&west, 0, "");

    // The approvers grant, while west lives: it stops by itself, whatever they believe of it.
    let proposal = ends(&east, 5, "they sign it with", &["cluster", "grant", "west", "--for", "1h"]);
    assert!(proposal.contains("fail over west to east in epoch 2"), "{proposal}");
    let grant = ["cluster", "grant", "west"];
    let one = approve(&west, &proposal, &["alice"], "1");
    ends(&east, 5, "approval_missing", &with(&grant, &one));
    let twice = [one.clone(), one].concat();
    ends(&east, 4, "approval_repeated", &with(&grant, &twice));
    let both = approve(&west, &proposal, &["alice", "bob"], "1");
    ends(&core, 4, "grant_holder", &with(&grant, &both));
    ends(&east, 0, "waiting", &with(&grant, &both));
    ends(&east, 4, "grant_replayed", &with(&grant, &both));
    minting_comes_to(&west, 5, "epoch_fenced");
    assert!(show(&west)["fenced"].as_str().unwrap().contains("epoch_fenced"), "{}", show(&west));
    ends(&west, 0, "signs nothing for its own trust domain", &["status"]);
    ends(&west, 5, "epoch_fenced", &["cluster", "take-back"]);
    // 4 s, an eighth of it and a second, after the witness has heard.
    comes_to(&east, 0, "in effect", &["cluster", "standby", "show"]);
    assert_eq!(show(&core)["grants"][0]["state"], "live", "{}", show(&core));
}
