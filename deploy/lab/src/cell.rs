//! Forms a cell: `ambitd init` on the first replica, tokens and `ambitd join` on the others, `ambitd run` on all.

use crate::lab::{Lab, LabError, Place, make_folder, write_file};
use crate::preflight::own_binary;
use crate::state::Ready;
use crate::topology::{Kind, METRICS_PORT, Member, REPLICA_PORT};
use ambit_model::{Refusal, refusal::Code};
use serde::{Deserialize, Serialize};
use std::net::{SocketAddr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// One command of ambitd or ambit: a few flushes and a round trip, on two loaded cores.
const COMMAND_MAX: Duration = Duration::from_secs(30);
/// As issue A states its figures: RTO is measured at this election timeout.
const ELECTION_TIMEOUT_MS: u32 = 300;
/// Several to an election timeout, so that one lost heartbeat starts no election.
const HEARTBEAT_MS: u32 = 50;

/// How long a replica that was taken out of its cell still runs.
const REMOVED_RUNS: Duration = Duration::from_secs(2);

/// How often a node of the lab is asked for a quote, seconds: one interval is what a changed machine may go unnoticed.
pub const ATTEST_EVERY_S: u64 = 5;
/// A program that the lab's policy lets run: what a scenario puts in a measured folder, and then alters.
pub const APP: &[u8] = b"#!/bin/sh\necho the program that was approved\n";

/// How to reach a formed cell, and what its administrator holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cell {
    /// Its site, cluster and trust domain.
    pub site: String,
    /// SHA-256 of the trust domain's root, 64 hexadecimal digits.
    pub fingerprint: String,
    /// Its replicas.
    pub addresses: Vec<SocketAddr>,
    /// Folder with context.json, admin.pem, admin.key and root.pem.
    pub folder: PathBuf,
}

/// `context.json` as `ambitd init` writes it and `ambit` reads it.
#[derive(Serialize, Deserialize)]
struct Context {
    trust_domain: String,
    fingerprint: String,
    addresses: Vec<SocketAddr>,
}

impl Cell {
    /// The context file for `ambit --context`.
    pub fn context(&self) -> PathBuf {
        self.folder.join("context.json")
    }
    /// The trust domain's root certificate.
    pub fn root(&self) -> PathBuf {
        self.folder.join("root.pem")
    }
}

impl Lab {
    /// Forms the cell of a site with all its replicas.
    pub fn form_cell(&self, site: &str) -> Result<Cell, LabError> {
        let replicas = self.replicas(site)?;
        let (first, others) = replicas.split_first().ok_or_else(|| no_site(site))?;
        let admin = self.admin_folder(site);
        make_folder(&admin)?;
        let admin = admin.display().to_string();
        self.write_server_config(first)?;
        self.ambitd(first, &["init", "--trust-domain", site, "--replica", "1", "--admin-out", &admin])?;
        self.start_server(first)?;
        let formed = self.cell(site)?;
        for replica in others {
            if let Kind::Replica(number) = replica.kind {
                self.add_replica(&formed, first, replica, number.into())?;
            }
        }
        self.write_context(&formed, &replicas)?;
        self.cell(site)
    }
    /// Gives a replica a small disk, before its cell is formed. It goes with the lab.
    pub fn make_small_disk(&self, role: &str, mib: u64) -> Result<(), LabError> {
        crate::disk::make(&self.small_disk(role), mib)
    }
    /// The place of a replica's small disk.
    pub(crate) fn small_disk(&self, role: &str) -> PathBuf {
        self.folder(role).join("disk")
    }
    /// Takes a replica out of its cell, kills it, and has its machine join again as replica `number` with an empty
    /// disk. `alive`: it still runs when it is taken out. Not for the first replica, which keeps the root.
    pub fn replace_replica(&self, role: &str, was: u64, number: u64, alive: bool) -> Result<(), LabError> {
        let member = self.spec().member(role).ok_or_else(|| no_site(role))?;
        let replicas = self.replicas(&member.site)?;
        let (first, cell) = (replicas.first().ok_or_else(|| no_site(role))?, self.cell(&member.site)?);
        let kill = || -> Result<(), LabError> {
            if let Some(process) = self.state()?.process(role) {
                process.id.kill();
            }
            Ok(())
        };
        if !alive {
            kill()?;
        }
        self.ambit(&member.site, &["raft", "remove", "--replica", &was.to_string()])?;
        if alive {
            // A removed member that goes on talking must disturb nobody (I16).
            std::thread::sleep(REMOVED_RUNS);
            kill()?;
        }
        let data = self.data_folder(role);
        std::fs::remove_dir_all(&data).map_err(|source| LabError::Io { path: data, source })?;
        self.add_replica(&cell, first, &member, number)
    }
    /// The cell of a site, formed before.
    pub fn cell(&self, site: &str) -> Result<Cell, LabError> {
        let folder = self.admin_folder(site);
        let path = folder.join("context.json");
        let text = std::fs::read(&path).map_err(|source| LabError::Io { path: path.clone(), source })?;
        let context: Context = serde_json::from_slice(&text)
            .map_err(|e| Refusal::new(Code::Internal, format!("a context in {}", path.display()), e.to_string()))?;
        let Context { fingerprint, addresses, .. } = context;
        Ok(Cell { site: site.into(), fingerprint, addresses, folder })
    }
    /// Runs the command line against a site's cell, as its administrator, from the operator's namespace; returns what
    /// it printed.
    pub fn ambit(&self, site: &str, args: &[&str]) -> Result<String, LabError> {
        let program = own_binary("ambit")?.display().to_string();
        let context = self.admin_folder(site).join("context.json").display().to_string();
        let argv = [&[program.as_str(), "--context", context.as_str()], args].concat();
        self.must_run_in(&self.operator(), &argv, COMMAND_MAX)
    }
    /// Registers a site's cluster with its own cell; EKs of the lab's manufacturer are trusted as class lab.
    pub fn register_cluster(&self, site: &str) -> Result<String, LabError> {
        let roots = self.manufacturer().certificates().map(|file| format!("{}:lab", file.display()));
        let [root, issuing] = &roots;
        let every = format!("{ATTEST_EVERY_S}s");
        let roots = ["--ek-root", root, "--ek-root", issuing];
        let registered =
            self.ambit(site, &[&["cluster", "register", site, "--attest-every", &every][..], &roots[..]].concat())?;
        self.apply_appraisal_policy(site)?;
        Ok(registered)
    }
    /// Learns what a machine of this lab boots from a reference machine's files, and makes it the site's policy, as an
    /// operator would. [`APP`] is on its list of what may run beside.
    pub fn apply_appraisal_policy(&self, site: &str) -> Result<String, LabError> {
        let folder = self.admin_folder(site).join("appraisal");
        let reference = folder.join("reference");
        make_folder(&reference)?;
        for (name, bytes) in crate::tpm::REFERENCE {
            write_file(&reference.join(name), bytes)?;
        }
        let (policy, list) = (folder.join("servers.yaml"), folder.join("ima.list"));
        let (from, out) = (reference.display().to_string(), list.display().to_string());
        let what = ["--name", "servers", "--cluster", site, "--class", "lab", "--ima-list", &out];
        // The site's own files are added before the policy is written: it names its list by digest.
        let learn = [&["attest", "policy", "learn", "--from", &from][..], &what[..]].concat();
        let yaml = self.ambit(site, &learn)?;
        let mut text = std::fs::read(&list).map_err(|source| LabError::Io { path: list.clone(), source })?;
        let before = sha256_hex(&text);
        text.extend(format!("{} *\n", sha256_hex(APP)).bytes());
        write_file(&list, &text)?;
        write_file(&policy, yaml.replace(&before, &sha256_hex(&text)).as_bytes())?;
        let file = policy.display().to_string();
        self.ambit(site, &["attest", "policy", "apply", "-f", &file, "--ima-list", &out])
    }
    /// Where the operator's commands run.
    pub fn operator(&self) -> Place {
        Place { netns: self.spec().namespace("operator"), cgroup: self.own_cgroup(), uid: None }
    }

    fn replicas(&self, site: &str) -> Result<Vec<Member>, LabError> {
        let members = self.spec().site(site).ok_or_else(|| no_site(site))?.members();
        Ok(members.into_iter().filter(|m| matches!(m.kind, Kind::Replica(_))).collect())
    }

    fn admin_folder(&self, site: &str) -> PathBuf {
        self.folder("operator").join(site)
    }

    fn add_replica(&self, cell: &Cell, via: &Member, replica: &Member, number: u64) -> Result<(), LabError> {
        let (number, address) = (number.to_string(), listen(replica).to_string());
        let token = self.ambit(&cell.site, &["raft", "add", "--replica", &number, "--address", &address])?;
        self.write_server_config(replica)?;
        let (via, token) = (listen(via).to_string(), token.trim());
        let who = ["join", "--trust-domain", &cell.site, "--replica", &number];
        let how = ["--via", via.as_str(), "--fingerprint", &cell.fingerprint, "--token", token];
        self.ambitd(replica, &[&who[..], &how[..]].concat())?;
        self.start_server(replica)
    }

    fn ambitd(&self, replica: &Member, args: &[&str]) -> Result<String, LabError> {
        let role = replica.role();
        let program = own_binary("ambitd")?.display().to_string();
        let config = self.server_config(&role).display().to_string();
        let (verb, rest) = args.split_first().ok_or_else(|| no_site(&role))?;
        let argv = [&[program.as_str(), *verb, "--config", config.as_str()], rest].concat();
        self.must_run_in(&self.place(&role)?, &argv, COMMAND_MAX)
    }

    fn start_server(&self, replica: &Member) -> Result<(), LabError> {
        let role = replica.role();
        let program = own_binary("ambitd")?.display().to_string();
        let config = self.server_config(&role).display().to_string();
        let argv = [program.as_str(), "run", "--config", config.as_str()];
        let launch = self.launch(&self.place(&role)?, &argv, &self.folder(&role).join("ambitd.log"));
        self.start(&role, Some(&role), launch, Ready::Listening(listen(replica))).map(drop)
    }

    fn server_config(&self, role: &str) -> PathBuf {
        self.folder(role).join("ambitd.toml")
    }

    fn data_folder(&self, role: &str) -> PathBuf {
        let disk = self.small_disk(role);
        if disk.exists() { disk.join("data") } else { self.folder(role).join("data") }
    }

    fn write_server_config(&self, replica: &Member) -> Result<(), LabError> {
        let role = replica.role();
        let data = quoted(&self.data_folder(&role));
        let (listen, metrics) = (listen(replica), metrics(replica));
        let text = format!(
            "data_dir = {data}\nlisten = \"{listen}\"\nmetrics_listen = \"{metrics}\"\n\n[raft]\n\
             election_timeout_ms = {ELECTION_TIMEOUT_MS}\nheartbeat_ms = {HEARTBEAT_MS}\n"
        );
        write_file(&self.server_config(&role), text.as_bytes())
    }

    /// `init` knows the first replica only; the operator's commands shall survive its death.
    fn write_context(&self, cell: &Cell, replicas: &[Member]) -> Result<(), LabError> {
        let context = Context {
            trust_domain: cell.site.clone(),
            fingerprint: cell.fingerprint.clone(),
            addresses: replicas.iter().map(listen).collect(),
        };
        write_file(&cell.context(), &serde_json::to_vec_pretty(&context).unwrap_or_default())
    }
}

/// Where a replica serves.
pub fn listen(replica: &Member) -> SocketAddr {
    SocketAddrV4::new(replica.address(), REPLICA_PORT).into()
}

/// Where a member serves its metrics.
pub fn metrics(member: &Member) -> SocketAddr {
    SocketAddrV4::new(member.address(), METRICS_PORT).into()
}

/// A path as a TOML string; the lab's own paths hold nothing that needs more.
pub(crate) fn quoted(path: &Path) -> String {
    format!("\"{}\"", path.display())
}

fn no_site(site: &str) -> LabError {
    Refusal::new(Code::NotFound, "a site of the lab", site.to_owned()).into()
}

fn sha256_hex(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    hex::encode(Sha256::digest(bytes))
}
