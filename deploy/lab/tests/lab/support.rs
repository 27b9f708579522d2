//! A small lab that is gone when the test is, also when the test fails.

use ambit_lab::{Lab, Spec, down};
use std::path::PathBuf;
use std::process::{Command, Output};

/// The binary under test.
pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_ambit-lab");

pub(crate) struct Small {
    pub(crate) lab: Lab,
}

impl Small {
    /// A lab with this name; each test has its own.
    pub(crate) fn up(name: &str, clusters: u8, nodes: u8) -> Small {
        assert!(nix::unistd::geteuid().is_root(), "this test needs root: it makes namespaces and cgroups");
        down::down(name).unwrap();
        let spec = Spec::standard(name, clusters, nodes, 1).unwrap();
        Small { lab: Lab::up(&spec, &|_| {}).unwrap() }
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let removed = down::down(self.lab.name());
        if !std::thread::panicking() {
            removed.unwrap();
        }
    }
}

/// Runs the binary to its end.
pub(crate) fn ambit_lab(args: &[&str]) -> Output {
    Command::new(BINARY).args(args).output().unwrap()
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Every trace of a lab on this machine.
pub(crate) fn traces(name: &str) -> Vec<String> {
    let mut found = ambit_lab::net::list(name);
    let places =
        [ambit_lab::cgroup::top(name).unwrap(), ambit_lab::cgroup::pins(name), ambit_lab::topology::root(name)];
    found.extend(places.iter().filter(|p: &&PathBuf| p.exists()).map(|p| p.display().to_string()));
    let lock = PathBuf::from(ambit_lab::topology::RUN_DIR).join(format!(".{name}.lock"));
    found.extend(lock.exists().then(|| lock.display().to_string()));
    found.extend(ambit_lab::process::marked(name).iter().map(|id| format!("process {}", id.pid)));
    // A process that lost its marker would still lie in a folder or namespace of the lab.
    let root = ambit_lab::topology::root(name).display().to_string();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if text(&line).contains(&root) {
            found.push(format!("process {:?} {}", entry.file_name(), text(&line).replace('\0', " ")));
        }
    }
    found
}
