//! Anyone but root is refused, with a code and nothing half-made.

use crate::support::{BINARY, text, traces};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// `nobody` of Debian.
const NOBODY: u32 = 65534;

#[test]
fn nobody_is_refused_and_nothing_is_made() {
    assert!(nix::unistd::geteuid().is_root(), "this test needs root, to become nobody");
    // The build folder may be closed to others.
    let copy = std::env::temp_dir().join(format!("ambit-lab-{}", std::process::id()));
    std::fs::copy(BINARY, &copy).unwrap();
    for verb in [&["up"][..], &["down"], &["status"], &["demo"], &["chaos", "--smoke"]] {
        let output =
            Command::new(&copy).args(verb).args(["--name", "nobody"]).uid(NOBODY).gid(NOBODY).output().unwrap();
        assert_eq!(output.status.code(), Some(4), "{verb:?}");
        let said = text(&output.stderr);
        assert!(said.contains("needs_root") && said.contains("run the command as root"), "{said}");
        assert_eq!(traces("nobody"), [""; 0], "{verb:?}");
    }
    std::fs::remove_file(copy).unwrap();
}

#[test]
fn a_missing_tool_is_named_with_its_package() {
    assert!(nix::unistd::geteuid().is_root(), "this test needs root");
    // Folders that the search adds to PATH hold `ip` and `nft`, not the swtpm tools.
    let output = Command::new(BINARY).args(["up", "--name", "notools"]).env("PATH", "/nowhere").output().unwrap();
    let said = text(&output.stderr);
    assert!(!output.status.success());
    assert!(said.contains("swtpm_setup (package swtpm-tools)") && said.contains("cargo xtask deps"), "{said}");
    assert_eq!(traces("notools"), [""; 0]);
}
