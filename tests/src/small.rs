//! A small lab: one cluster with three replicas and two nodes, where a test asks for no other.

use crate::process::{binary, must_run};
use crate::secrets;
use ambit_lab::guardian::Guardian;
use ambit_lab::process::ProcessId;
use ambit_lab::{Lab, Pod, Ready, down};
use anyhow::{Context, Result, ensure};
use std::net::SocketAddr;

/// The port of `db`.
pub const PORT: u16 = 8080;

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

/// Makes peers of the cells of a lab with the clusters west and east.
pub fn peered(lab: &Lab) -> Result<()> {
    let (west, east) = (lab.cell("west")?, lab.cell("east")?);
    let expected = ["--trust-domain", "east", "--fingerprint", &east.fingerprint];
    let made = lab.ambit("west", &[&["cluster", "token"], &expected[..]].concat())?;
    let at = west.addresses.first().context("an address")?.to_string();
    let token = made.split_whitespace().last().context("a token")?;
    let whom = ["--address", &at, "--trust-domain", "west", "--fingerprint", &west.fingerprint, "--token", token];
    lab.ambit("east", &[&["peer", "register"], &whom[..]].concat())?;
    lab.ambit("east", &["peer", "approve", "west", "--fingerprint", &west.fingerprint])?;
    lab.ambit("west", &["peer", "approve", "east", "--fingerprint", &east.fingerprint])?;
    Ok(())
}

/// An entry for the pods of that name on a site.
pub fn entry(lab: &Lab, site: &str, name: &str) -> Result<()> {
    let (id, selector) = (format!("spiffe://{site}/{name}"), format!("cgroup:{name}"));
    let whose = ["--spiffe-id", &id, "--cluster", site, "--selector", &selector];
    lab.ambit(site, &[&["entry", "create", "--id", name], &whose[..]].concat())?;
    Ok(())
}

/// `db` of a site, which answers HTTP to `caller`.
pub fn served(lab: &Lab, site: &str, node: &str, caller: &str) -> Result<Pod> {
    entry(lab, site, "db")?;
    let policy = format!(
        "kind: Policy\nmetadata: {{name: web-to-db}}\nspec: {{target: spiffe://{site}/db, action: allow, \
         from: [{caller}], ports: [{PORT}]}}\n"
    );
    let file = lab.folder("operator").join(format!("{site}-web-to-db.yaml"));
    std::fs::write(&file, policy)?;
    lab.ambit(site, &["policy", "apply", "-f", &file.display().to_string()])?;
    let pod = lab.add_pod(node, "db", ambit_lab::workload::UID)?;
    let (address, port) = (pod.address.to_string(), PORT.to_string());
    let argv = ["python3", "-m", "http.server", &port, "--bind", &address, "--directory", "/var/empty"];
    lab.start_in_pod(&pod, &argv, Ready::Listening(SocketAddr::from((pod.address, PORT))))?;
    Ok(pod)
}

/// Labs make namespaces and cgroups.
pub fn needs_root() -> Result<()> {
    let out = must_run(&["id", "-u"])?;
    ensure!(out.trim() == "0", "this test needs root: it makes namespaces and cgroups");
    Ok(())
}
