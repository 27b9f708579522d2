//! `down` leaves nothing, whatever happened before.

use crate::support::{BINARY, ambit_lab, text, traces};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

#[test]
fn down_leaves_nothing_and_twice_is_once() {
    assert!(nix::unistd::geteuid().is_root(), "this test needs root");
    let up = ["up", "--name", "cleanone", "--clusters", "1", "--nodes", "1", "--replicas", "1"];
    let output = ambit_lab(&up);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(traces("cleanone").len() > 5);

    let again = ambit_lab(&up);
    assert!(text(&again.stderr).contains("already_exists"), "{}", text(&again.stderr));
    // Inside the lab, down would end the shell that runs it.
    let inside = ambit_lab(&["exec", "--name", "cleanone", "operator", "--", BINARY, "down", "--name", "cleanone"]);
    assert!(!inside.status.success());
    // A bystander whose name looks alike is not ours.
    let bystander = Command::new("sleep").arg("30").env("AMBIT_LAB", "cleanonebutnot").spawn().unwrap();

    // Without its memory it still knows what is its own.
    std::fs::remove_file(ambit_lab::topology::root("cleanone").join("state.json")).unwrap();
    for _ in 0..2 {
        let down = ambit_lab(&["down", "--name", "cleanone"]);
        assert!(down.status.success(), "{}", text(&down.stderr));
        assert_eq!(traces("cleanone"), [""; 0]);
    }
    let mut bystander = bystander;
    assert!(bystander.try_wait().unwrap().is_none(), "a process of nobody's was killed");
    bystander.kill().unwrap();
    bystander.wait().unwrap();
}

#[test]
fn down_leaves_nothing_after_up_was_killed_at_any_moment() {
    assert!(nix::unistd::geteuid().is_root(), "this test needs root");
    let mut unfinished = 0;
    for delay_ms in [5, 20, 30, 40, 50, 60, 80, 100, 150, 700, 1500, 2200, 2600, 3200] {
        let mut up = Command::new(BINARY)
            .args(["up", "--name", "cleankill", "--clusters", "2", "--nodes", "2", "--replicas", "3"])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(delay_ms));
        up.kill().unwrap();
        unfinished += u32::from(!up.wait().unwrap().success());
        let down = ambit_lab(&["down", "--name", "cleankill"]);
        assert!(down.status.success(), "after {delay_ms} ms: {}", text(&down.stderr));
        assert_eq!(traces("cleankill"), [""; 0], "after {delay_ms} ms");
    }
    assert!(unfinished >= 4, "up was too quick to be killed midway");
}

#[test]
fn up_removes_what_an_unfinished_up_left() {
    assert!(nix::unistd::geteuid().is_root(), "this test needs root");
    let small = ["up", "--name", "cleanagain", "--clusters", "1", "--nodes", "1", "--replicas", "1"];
    let mut up = Command::new(BINARY).args(small).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    // Stopped, so that it cannot end before we look.
    let pid = nix::unistd::Pid::from_raw(i32::try_from(up.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
    let busy = ambit_lab(&["down", "--name", "cleanagain"]);
    assert!(text(&busy.stderr).contains("busy"), "two commands at once: {}", text(&busy.stderr));
    up.kill().unwrap();
    up.wait().unwrap();
    let output = ambit_lab(&small);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("unfinished"), "{}", text(&output.stderr));
    assert!(ambit_lab(&["down", "--name", "cleanagain"]).status.success());
    assert_eq!(traces("cleanagain"), [""; 0]);
}

#[test]
fn a_lab_whose_owner_is_killed_is_taken_down_without_being_asked() {
    assert!(nix::unistd::geteuid().is_root(), "this test needs root");
    // While TPMs are made, and when all of them stand.
    for moment in ["TPM manufacturer ready", "TPMs stand"] {
        let chaos = ["chaos", "--smoke", "--name", "orphan"];
        let mut owner = Command::new(BINARY).args(chaos).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let told = BufReader::new(owner.stdout.take().unwrap()).lines().map_while(Result::ok);
        let reached = told.into_iter().any(|line| line.contains(moment));
        owner.kill().unwrap();
        owner.wait().unwrap();
        assert!(reached, "it never said: {moment}");
        let deadline = Instant::now() + Duration::from_secs(20);
        while !traces("orphan").is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(50));
        }
        assert_eq!(traces("orphan"), [""; 0], "killed at: {moment}");
    }
}
