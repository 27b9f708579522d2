//! `ambit-agent check` names the processes of the mesh that hold capabilities over the network. Needs root and fails without it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use ambit_agent::privileged::{Holder, holders};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// A mesh cgroup of the test's own, and what runs in it; all of it goes with the test.
struct Mesh {
    at: PathBuf,
    children: Vec<Child>,
}

impl Mesh {
    fn make() -> Mesh {
        assert!(nix::unistd::geteuid().is_root(), "this test makes cgroups: run it as root");
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
        let mount = mounts.lines().find(|l| l.split(' ').nth(2) == Some("cgroup2")).expect("a cgroup2 mount");
        let at = Path::new(mount.split(' ').nth(1).unwrap()).join(format!("ambit-check-test-{}", std::process::id()));
        std::fs::create_dir_all(&at).unwrap();
        Mesh { at, children: vec![] }
    }
    /// `sleep` in this cgroup, started by these words; gives its process id once it runs.
    fn start(&mut self, cgroup: &str, words: &[&str]) -> u32 {
        std::fs::create_dir_all(self.at.join(cgroup)).unwrap();
        let enter = "echo $$ > \"$0/cgroup.procs\" && exec \"$@\"";
        let mut command = Command::new("sh");
        let child =
            command.args(["-c", enter]).arg(self.at.join(cgroup)).args(words).args(["sleep", "60"]).spawn().unwrap();
        let (pid, begun) = (child.id(), Instant::now());
        self.children.push(child);
        while std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap().trim() != "sleep" {
            assert!(begun.elapsed() < Duration::from_secs(10), "{words:?} never ran");
            std::thread::sleep(Duration::from_millis(5));
        }
        pid
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        for child in &mut self.children {
            drop(child.kill());
            drop(child.wait());
        }
        for _ in 0..100 {
            for dir in ["pod/inner", "pod", "plain", ""] {
                drop(std::fs::remove_dir(self.at.join(dir)));
            }
            if !self.at.exists() {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn who_holds_them_is_named_and_nobody_else() {
    let mut mesh = Mesh::make();
    assert_eq!(holders(&mesh.at).unwrap(), Default::default());
    let nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"];
    let given = |caps: &'static str| [&nobody[..], &["--inh-caps", caps, "--ambient-caps", caps]].concat();
    mesh.start("plain", &nobody);
    mesh.start("plain", &given("+net_bind_service"));
    let root = mesh.start("pod", &[]);
    let raw = mesh.start("pod/inner", &given("+net_raw"));
    let admin = mesh.start("pod", &given("+net_admin"));
    let found = holders(&mesh.at).unwrap();
    let holder = |pid, cgroup: &str, net_raw, net_admin| Holder {
        pid,
        name: "sleep".into(),
        cgroup: cgroup.into(),
        net_raw,
        net_admin,
        own_users: false,
    };
    let mut expected =
        vec![holder(root, "pod", true, true), holder(raw, "pod/inner", true, false), holder(admin, "pod", false, true)];
    expected.sort();
    assert_eq!((found.named, found.all, found.looked_at, found.cut_short), (expected, 3, 5, false));

    // By its program.
    let check =
        |args: &[&str]| Command::new(env!("CARGO_BIN_EXE_ambit-agent")).arg("check").args(args).output().unwrap();
    let mesh_at = mesh.at.display().to_string();
    let out = check(&["--mesh", &mesh_at]);
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    println!("{text}");
    assert!(out.status.success(), "{out:?}");
    assert!(text.contains(&format!("HOLDS    process {raw} (sleep) of cgroup 'pod/inner': CAP_NET_RAW\n")));
    assert!(text.ends_with("3 of 5 processes of the mesh hold CAP_NET_RAW or CAP_NET_ADMIN\n"));
    assert!(!String::from_utf8_lossy(&check(&[]).stdout).contains("of the mesh"));
    let out = check(&["--mesh", &format!("{mesh_at}/none")]);
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("[config_invalid]"), "{out:?}");
}
