//! A small lab: one cluster with three replicas and two nodes, where a test asks for no other.

use crate::process::{binary, must_run};
use crate::secrets;
use ambit_lab::guardian::Guardian;
use ambit_lab::process::ProcessId;
use ambit_lab::{Lab, down};
use anyhow::{Context, Result, ensure};

/// A small lab with its cell, gone with the test, however that ends.
pub struct Small {
    /// The lab.
    pub lab: Lab,
    _guardian: Guardian,
}

impl Small {
    /// Sets it up, as root.
    pub fn up(name: &str) -> Result<Small> {
        Small::shaped(name, 1, 2, 3)
    }

    /// The same with so many clusters, nodes and replicas of each.
    pub fn shaped(name: &str, clusters: u8, nodes: u8, replicas: u8) -> Result<Small> {
        needs_root()?;
        down::down(name)?;
        let _guardian = Guardian::post(name)?;
        let program = binary("ambit-lab")?.display().to_string();
        let (clusters, nodes, replicas) = (clusters.to_string(), nodes.to_string(), replicas.to_string());
        let shape = ["--clusters", &clusters, "--nodes", &nodes, "--replicas", &replicas];
        must_run(&[&[program.as_str(), "up", "--cells", "--name", name], &shape[..]].concat())?;
        Ok(Small { lab: Lab::open(name)?, _guardian })
    }

    /// One of its processes.
    pub fn process(&self, name: &str) -> Result<ProcessId> {
        Ok(self.lab.state()?.process(name).with_context(|| format!("no {name}"))?.id)
    }
}

impl Drop for Small {
    #[allow(clippy::panic, reason = "a test that leaves something behind, or whose logs hold a key, fails")]
    fn drop(&mut self) {
        let found = secrets::in_logs(&self.lab.spec().root());
        let removed = down::down(self.lab.name());
        if std::thread::panicking() {
            return;
        }
        if let Err(error) = removed {
            panic!("{error}");
        }
        match found {
            Ok(found) => assert!(found.is_empty(), "private keys in {found:?}"),
            Err(error) => panic!("logs that cannot be searched: {error:#}"),
        }
    }
}

/// Labs make namespaces and cgroups.
pub fn needs_root() -> Result<()> {
    let out = must_run(&["id", "-u"])?;
    ensure!(out.trim() == "0", "this test needs root: it makes namespaces and cgroups");
    Ok(())
}
