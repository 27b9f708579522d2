//! The short form of `cargo xtask chaos --node`: real agents of a real lab are killed and upgraded while tables are swapped
//! under load. In a program of its own, so that no other test takes the machine from it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::process::Command;

#[test]
fn under_load_swaps_kills_and_upgrades_give_no_wrong_verdict_and_nothing_in_clear() {
    assert!(nix::unistd::geteuid().is_root(), "this test needs root: it makes namespaces and cgroups");
    let args = ["chaos", "--node", "--brief", "--name", "soak"];
    let out = Command::new(env!("CARGO_BIN_EXE_ambit-lab")).args(args).output().unwrap();
    let told = String::from_utf8_lossy(&out.stdout);
    println!("{told}");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let last = told.lines().last().expect("a line of counts");
    let counts = ["50 changes of policy", "2 kill -9, 1 upgrades, 1 end", " 0 wrong, 0 bytes in clear"];
    for part in counts.into_iter().chain(["calls unanswered: ", " 0 by upgrades, ", " 0 otherwise; "]) {
        assert!(last.contains(part), "{part}: {last}");
    }
}
