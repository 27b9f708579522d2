//! Faults: kill, pause, cut, fill. Each is reverted by its own lease, held by a keeper that outlives its injector.

use crate::disk;
use crate::lab::{Lab, LabError, make_folder, write_file};
use crate::lock::Lock;
use crate::net;
use crate::process::Launch;
use crate::state::Process;
use crate::topology::{Member, Site};
use ambit_model::{Refusal, refusal::Code};
use nix::sys::signal::Signal;
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// The longest lease: a forgotten fault must not outlive a working session.
const LEASE_MAX: Duration = Duration::from_secs(3600);
/// How often a keeper looks at its lease.
const KEEPER_POLL: Duration = Duration::from_millis(50);
/// How often a keeper tries to revert before it gives up.
const REVERTS_MAX: u32 = 5;

/// What [`Fault::Alter`] runs.
const ALTERED_FILE: &str = "altered";
const ALTERED: &[u8] = b"#!/bin/sh\necho nobody approved this\n";

/// What is done to a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// SIGKILL; reverted by starting again. A router is killed by taking all its links down: it is the kernel's
    /// forwarding and has no process.
    Kill,
    /// SIGSTOP; reverted by SIGCONT.
    Pause,
    /// Link down; reverted by up. `west-n1` parts a machine, `west` a site from all, `west:east` two sites,
    /// `west-r1>west-r2` loses what the first of two machines of a site sends to the second.
    Cut,
    /// No space left on the small disk of a replica ([`Lab::make_small_disk`]); reverted by giving the space back and by
    /// starting what died of it.
    Fill,
    /// The machine's node is banned by its cell; reverted by lifting the ban.
    Ban,
    /// A file that no policy knows runs on the machine; reverted by booting it from clean files and releasing its node.
    Alter,
}

/// A fault that will be reverted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// What was done.
    pub fault: Fault,
    /// To whom.
    pub target: String,
    /// When it ends, in milliseconds of the boot-time clock.
    pub ends_ms: u64,
    /// The node's id, of a fault that its cell is asked for: a cell tells no address of a node that it banned.
    #[serde(default)]
    pub node: Option<String>,
}

/// The router as a target.
const ROUTER: &str = "router";

/// The links a cut takes down.
enum Links {
    Member(Site, Member),
    Site(Site),
    Pair(Site, Site),
    OneWay(Member, Member),
}

impl Lease {
    fn id(&self) -> String {
        let fault = match self.fault {
            Fault::Kill => "kill",
            Fault::Pause => "pause",
            Fault::Cut => "cut",
            Fault::Fill => "fill",
            Fault::Ban => "ban",
            Fault::Alter => "alter",
        };
        format!("{fault}-{}", self.target.replace(':', "+").replace('>', "-to-"))
    }
    /// Milliseconds until it ends.
    pub fn left_ms(&self) -> u64 {
        self.ends_ms.saturating_sub(boot_ms())
    }
}

impl Lab {
    /// Injects a fault that ends after `lease`. The lease and its keeper stand before the fault does.
    pub fn inject(&self, fault: Fault, target: &str, lease: Duration) -> Result<(), LabError> {
        if lease.is_zero() || lease > LEASE_MAX {
            let expected = format!("a lease of 1 to {} s", LEASE_MAX.as_secs());
            return Err(Refusal::new(Code::BadRequest, expected, format!("{} s", lease.as_secs())).into());
        }
        self.resolve(fault, target)?;
        let ends_ms = boot_ms() + u64::try_from(lease.as_millis()).unwrap_or(u64::MAX);
        let node = matches!(fault, Fault::Ban | Fault::Alter).then(|| self.node_id(target)).transpose()?;
        let lease = Lease { fault, target: target.into(), ends_ms, node };
        // Held to the end, so that a short lease cannot be reverted before its fault is there.
        let _held = self.hold_faults()?;
        self.write_lease(&lease)?;
        self.start_keeper(&lease)?;
        self.act(&lease)
    }
    /// `kill -9` of a process, a machine's or a site's processes, with a lease of a minute.
    pub fn kill(&self, target: &str) -> Result<(), LabError> {
        self.inject(Fault::Kill, target, Duration::from_secs(60))
    }
    /// Cuts a link for a minute.
    pub fn cut(&self, target: &str) -> Result<(), LabError> {
        self.inject(Fault::Cut, target, Duration::from_secs(60))
    }
    /// Ends every fault on a target now; tells how many there were.
    pub fn restore(&self, target: &str) -> Result<usize, LabError> {
        let leases: Vec<Lease> = self.leases()?.into_iter().filter(|lease| lease.target == target).collect();
        leases.iter().try_for_each(|lease| self.revert(&lease.id()))?;
        Ok(leases.len())
    }
    /// Starts every dead process of a target again, in the order they were first started, and ends its kill leases.
    pub fn start_again(&self, target: &str) -> Result<(), LabError> {
        self.restore(target)?;
        if target == ROUTER {
            return self.set_router(true);
        }
        self.set_site_power(target, true)?;
        self.restart_all(&self.processes_of(target)?)
    }
    /// The faults in force.
    pub fn leases(&self) -> Result<Vec<Lease>, LabError> {
        let folder = self.lease_folder();
        let Ok(entries) = std::fs::read_dir(folder) else { return Ok(Vec::new()) };
        let mut paths: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
        paths.retain(|path| path.extension().is_some_and(|e| e == "json"));
        paths.sort();
        Ok(paths.iter().filter_map(|path| serde_json::from_slice(&std::fs::read(path).ok()?).ok()).collect())
    }
    /// A keeper's whole life: waits for the end of its lease, reverts, ends. Also ends when the lease is gone.
    pub fn keep_lease(&self, id: &str) -> Result<(), LabError> {
        let mut tries = 0;
        loop {
            let Some(lease) = self.read_lease(id) else { return Ok(()) };
            if lease.left_ms() == 0 {
                match self.revert(id) {
                    Ok(()) => return Ok(()),
                    Err(e) if tries >= REVERTS_MAX => return Err(e),
                    Err(e) => eprintln!("revert of {id} failed: {}", crate::lab::chain(&e)),
                }
                tries += 1;
                std::thread::sleep(Duration::from_secs(1));
            }
            std::thread::sleep(KEEPER_POLL);
        }
    }

    /// Undoes a fault, then removes its lease: a keeper that dies between leaves a lease that shows it.
    fn revert(&self, id: &str) -> Result<(), LabError> {
        let _held = self.hold_faults()?;
        let Some(lease) = self.read_lease(id) else { return Ok(()) };
        match (lease.fault, lease.target.as_str()) {
            (Fault::Kill, ROUTER) => self.set_router(true)?,
            (Fault::Kill, target) => {
                self.set_site_power(target, true)?;
                self.restart_all(&self.processes_of(target)?)?;
            }
            (Fault::Pause, target) => {
                self.processes_of(target)?.iter().for_each(|p| {
                    let _ = p.id.signal(Signal::SIGCONT);
                });
            }
            (Fault::Cut, target) => self.set_links(&self.links(target)?, true)?,
            (Fault::Fill, target) => {
                disk::empty(&self.small_disk(target))?;
                self.restart_all(&self.processes_of(target)?)?;
            }
            (Fault::Ban, _) => self.judge_node("unban", &lease)?,
            (Fault::Alter, target) => {
                self.reboot(target)?;
                self.judge_node("release", &lease)?;
            }
        }
        let path = self.lease_path(id);
        std::fs::remove_file(&path).map_err(|source| LabError::Io { path, source })?;
        self.store.update(|state| state.processes.retain(|p| p.name != keeper(id)))?;
        Ok(())
    }

    /// Machines start side by side, as they do when power returns; the processes of one in their first order.
    fn restart_all(&self, processes: &[Process]) -> Result<(), LabError> {
        let machines: BTreeSet<_> = processes.iter().map(|p| p.member.as_deref()).collect();
        std::thread::scope(|scope| {
            let start = |machine| {
                let mut own = processes.iter().filter(|p| p.member.as_deref() == machine);
                own.try_for_each(|process| self.restart(&process.name))
            };
            let threads: Vec<_> = machines.into_iter().map(|machine| scope.spawn(move || start(machine))).collect();
            let panicked = || Refusal::new(Code::Internal, "a machine started again", "its thread panicked");
            // Every machine is waited for; the first failure is told.
            let ends: Vec<_> = threads.into_iter().map(|t| t.join().map_err(|_| panicked())).collect();
            ends.into_iter().try_for_each(|end| end?)
        })
    }

    fn act(&self, lease: &Lease) -> Result<(), LabError> {
        match (lease.fault, lease.target.as_str()) {
            (Fault::Kill, ROUTER) => self.set_router(false),
            (Fault::Kill, target) => {
                let processes = self.processes_of(target)?;
                self.set_site_power(target, false)?;
                // All at once, as a machine loses power, then wait.
                processes.iter().for_each(|p| {
                    let _ = p.id.signal(Signal::SIGKILL);
                });
                processes.iter().for_each(|p| {
                    let _ = p.id.kill();
                });
                Ok(())
            }
            (Fault::Pause, target) => {
                self.processes_of(target)?.iter().for_each(|p| {
                    let _ = p.id.signal(Signal::SIGSTOP);
                });
                Ok(())
            }
            (Fault::Cut, target) => self.set_links(&self.links(target)?, false),
            (Fault::Fill, target) => disk::fill(&self.small_disk(target)),
            (Fault::Ban, _) => self.judge_node("ban", lease),
            (Fault::Alter, target) => self.measure(target, ALTERED_FILE, ALTERED).map(drop),
        }
    }

    /// What an operator would say of a machine's node.
    fn judge_node(&self, verb: &str, lease: &Lease) -> Result<(), LabError> {
        let site = self.node(&lease.target)?.site;
        let missing = || Refusal::new(Code::Internal, "a lease with the node's id", lease.target.clone());
        self.ambit(&site, &["node", verb, lease.node.as_ref().ok_or_else(missing)?]).map(drop)
    }

    /// A site without power answers nothing: not even the resets that a kernel sends for its dead processes.
    fn set_site_power(&self, target: &str, on: bool) -> Result<(), LabError> {
        match self.spec().site(target) {
            Some(_) => self.set_links(&self.links(target)?, on),
            None => Ok(()),
        }
    }

    fn resolve(&self, fault: Fault, target: &str) -> Result<(), LabError> {
        match (fault, target) {
            (Fault::Kill, ROUTER) => Ok(()),
            (Fault::Kill | Fault::Pause, target) => self.processes_of(target).map(drop),
            (Fault::Fill, target) => Ok(disk::is_small(&self.small_disk(target))?),
            (Fault::Cut, target) => self.links(target).map(drop),
            (Fault::Ban | Fault::Alter, target) => self.node(target).map(drop),
        }
    }

    /// The id under which the cell of its site knows a node.
    pub fn node_id(&self, role: &str) -> Result<String, LabError> {
        let node = self.node(role)?;
        let nodes = self.ambit(&node.site, &["node", "list", "-o", "json"])?;
        let nodes: serde_json::Value = serde_json::from_str(&nodes).unwrap_or_default();
        let address = node.address().to_string();
        let found =
            nodes.as_array().and_then(|all| all.iter().find(|n| n["address"] == address.as_str())?["id"].as_str());
        let missing = || Refusal::new(Code::NotFound, format!("{role} among the nodes"), nodes.to_string());
        found.map(str::to_owned).ok_or_else(|| missing().into())
    }

    /// The process of this name, else all of this machine, else all of this site.
    fn processes_of(&self, target: &str) -> Result<Vec<Process>, LabError> {
        let state = self.state()?;
        if let Some(process) = state.process(target) {
            return Ok(vec![process.clone()]);
        }
        let site = format!("{target}-");
        let on = |p: &Process| p.member.as_deref().is_some_and(|m| m == target || m.starts_with(&site));
        let found: Vec<Process> = state.processes.into_iter().filter(on).collect();
        if found.is_empty() {
            let expected = "a process, a machine or a site of the lab, or router (`ambit-lab status`)";
            return Err(Refusal::new(Code::NotFound, expected, target.to_owned()).into());
        }
        Ok(found)
    }

    fn links(&self, target: &str) -> Result<Links, LabError> {
        let missing = || {
            let expected = "a machine, a site, two sites as west:east, or two machines of a site as west-r1>west-r2";
            Refusal::new(Code::NotFound, expected, target.to_owned())
        };
        let site = |name: &str| self.spec.site(name).cloned().ok_or_else(missing);
        if let Some((a, b)) = target.split_once(':') {
            return Ok(Links::Pair(site(a)?, site(b)?));
        }
        if let Some((from, to)) = target.split_once('>') {
            let member = |name: &str| self.spec.member(name).ok_or_else(missing);
            let (from, to) = (member(from)?, member(to)?);
            return if from.site == to.site { Ok(Links::OneWay(from, to)) } else { Err(missing().into()) };
        }
        if let Some(member) = self.spec.member(target) {
            return Ok(Links::Member(site(&member.site)?, member));
        }
        Ok(Links::Site(site(target)?))
    }

    fn set_links(&self, links: &Links, up: bool) -> Result<(), LabError> {
        match links {
            Links::Member(site, member) => net::set_link(&self.spec, &site.name, Some(member), up)?,
            Links::Site(site) => net::set_link(&self.spec, &site.name, None, up)?,
            Links::Pair(a, b) => net::set_parted(&self.spec, a, b, !up)?,
            Links::OneWay(from, to) => net::set_unheard(&self.spec, from, to, !up)?,
        }
        Ok(())
    }

    fn set_router(&self, up: bool) -> Result<(), LabError> {
        self.spec.sites.iter().try_for_each(|site| Ok(net::set_link(&self.spec, &site.name, None, up)?))
    }

    fn start_keeper(&self, lease: &Lease) -> Result<(), LabError> {
        let id = lease.id();
        let running = self.state()?.process(&keeper(&id)).is_some_and(|p| p.id.alive());
        if running {
            // It reads the new end from the lease.
            return Ok(());
        }
        let own = crate::preflight::own_binary("ambit-lab")?.display().to_string();
        let argv = [&own, "lease-keeper", "--name", self.name(), "--lease", &id];
        let launch = Launch {
            argv: argv.map(str::to_owned).to_vec(),
            env: Vec::new(),
            netns: None,
            cgroup: Some(self.own_cgroup()),
            uid: None,
            log: self.spec.root().join("keepers.log"),
        };
        self.start(&keeper(&id), None, launch, crate::state::Ready::Started).map(drop)
    }

    /// One revert or injection of this lab at a time, or two would start the same process twice.
    fn hold_faults(&self) -> Result<Lock, LabError> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            match Lock::take(&self.spec.root(), "faults") {
                Ok(lock) => return Ok(lock),
                Err(busy) if busy.code != Code::Busy || Instant::now() > deadline => return Err(busy.into()),
                Err(_) => {}
            }
        }
    }

    fn write_lease(&self, lease: &Lease) -> Result<(), LabError> {
        make_folder(&self.lease_folder())?;
        let path = self.lease_path(&lease.id());
        let text = serde_json::to_vec(lease).unwrap_or_default();
        let next = path.with_extension("next");
        write_file(&next, &text)?;
        std::fs::rename(&next, &path).map_err(|source| LabError::Io { path, source })
    }

    fn read_lease(&self, id: &str) -> Option<Lease> {
        serde_json::from_slice(&std::fs::read(self.lease_path(id)).ok()?).ok()
    }

    fn lease_folder(&self) -> PathBuf {
        self.spec.root().join("leases")
    }

    fn lease_path(&self, id: &str) -> PathBuf {
        self.lease_folder().join(format!("{id}.json"))
    }
}

fn keeper(id: &str) -> String {
    format!("keeper-{id}")
}

fn boot_ms() -> u64 {
    // The clock exists on every kernel that the lab runs on; zero would only end leases at once.
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}
