//! The drill library, each drill run against a real lab and its report verified. In a program of its own, so that no other test
//! takes the machine from it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::process::Command;

#[test]
fn every_drill_of_the_library_passes_in_the_lab() {
    assert!(nix::unistd::geteuid().is_root(), "this test needs root: it makes namespaces and cgroups");
    let out = Command::new(env!("CARGO_BIN_EXE_ambit-lab")).args(["drills", "--name", "drilltest"]).output().unwrap();
    let told = String::from_utf8_lossy(&out.stdout);
    println!("{told}");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let all = ambit_lab::library::DRILLS.len();
    assert_eq!(told.lines().last().unwrap(), format!("{all} drills, {all} passed"));
}
