//! Brings a lab up: folders, cgroups, network, TPMs. Cells and agents come after, each by its own call.

use crate::lab::{Lab, LabError, make_folder};
use crate::lock::Lock;
use crate::process::Launch;
use crate::state::{Ready, State, Store};
use crate::topology::{Kind, Member, RUN_DIR, Spec};
use crate::{cgroup, down, gate, net, preflight, topology, tpm};
use ambit_model::{Refusal, refusal::Code};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// TPMs made at the same time: enough to keep two cores busy while some wait for their disk.
const TPM_WORKERS: usize = 4;
/// How long a node may take to be enrolled: several slow TPM commands on two loaded cores.
const ENROL_MAX: Duration = Duration::from_secs(30);

impl Lab {
    /// Builds the lab and returns when every TPM stands at its golden state. What a killed `up` left is removed first;
    /// a failure leaves nothing behind. `tell` hears of each step.
    pub fn up(spec: &Spec, tell: &(dyn Fn(&str) + Sync)) -> Result<Lab, LabError> {
        preflight::root()?;
        preflight::tools()?;
        let lock = Lock::take(Path::new(RUN_DIR), &spec.name)?;
        let store = Store::new(&spec.root());
        if store.load().is_ok_and(|state| state.complete) {
            let expected = format!("lab {} not to be up; `ambit-lab down --name {0}` ends it", spec.name);
            return Err(Refusal::new(Code::AlreadyExists, expected, "it is up").into());
        }
        let left = down::clean(&spec.name)?;
        if left.any() {
            tell(&format!("removed what an unfinished lab had left: {left}"));
        }
        let lab = Lab { spec: spec.clone(), store, cgroup: cgroup::top(&spec.name)? };
        match lab.build(tell) {
            Ok(()) => Ok(lab),
            Err(error) => {
                match down::clean(&spec.name) {
                    Ok(_) => lock.remove(),
                    Err(e) => tell(&format!("clean-up failed too: {}", crate::lab::chain(&e))),
                }
                Err(error)
            }
        }
    }

    /// Forms every cell, registers its cluster and enrols its nodes. A failure leaves the lab up, to be looked at.
    pub fn form_all(&self, tell: &(dyn Fn(&str) + Sync)) -> Result<(), LabError> {
        for site in &self.spec.sites {
            let start = Instant::now();
            let cell = self.form_cell(&site.name)?;
            let (name, count, seconds) = (&site.name, cell.addresses.len(), start.elapsed().as_secs_f32());
            tell(&format!("cell {name}: {count} replicas, root {} ({seconds:.1} s)", cell.fingerprint));
            self.register_cluster(name)?;
            let nodes = site.members().into_iter().filter(|m| matches!(m.kind, Kind::Node(_)));
            let nodes: Vec<String> = nodes.map(|m| m.role()).collect();
            let start = Instant::now();
            nodes.iter().try_for_each(|node| self.start_agent(node))?;
            for node in &nodes {
                self.wait_enrolled(node, ENROL_MAX)?;
                tell(&format!("node {node} enrolled and ready ({:.1} s)", start.elapsed().as_secs_f32()));
            }
        }
        Ok(())
    }

    fn build(&self, tell: &(dyn Fn(&str) + Sync)) -> Result<(), LabError> {
        let start = Instant::now();
        let seconds = || start.elapsed().as_secs_f32();
        self.make_folders()?;
        let members = self.spec.members();
        let (first, rest) = members.split_first().ok_or_else(no_members)?;
        std::thread::scope(|scope| {
            // The first TPM creates the manufacturer's CA; meanwhile the network is built.
            let network = scope.spawn(|| net::build(&self.spec));
            self.manufacturer().prepare().map_err(|source| LabError::Tpm { machine: "manufacturer".into(), source })?;
            self.make_tpm(first)?;
            tell(&format!("TPM manufacturer ready, class lab ({:.1} s)", seconds()));
            network.join().map_err(|_| Refusal::new(Code::Internal, "a network", "its builder panicked"))??;
            tell(&format!(
                "{} namespaces, {} sites and their router ready ({:.1} s)",
                net::list(self.name()).len(),
                self.spec.sites.len(),
                seconds()
            ));
            Ok::<_, LabError>(())
        })?;
        self.boot(first)?;
        self.make_and_boot(rest)?;
        tell(&format!("{} TPMs stand at the golden boot's PCRs ({:.1} s)", members.len(), seconds()));
        self.store.update(|state| state.complete = true)?;
        Ok(())
    }

    fn make_folders(&self) -> Result<(), LabError> {
        let root = self.spec.root();
        make_folder(&root)?;
        self.store.save(&State {
            spec: self.spec.clone(),
            complete: false,
            processes: Vec::new(),
            pods: Vec::new(),
        })?;
        cgroup::create(&self.own_cgroup())?;
        cgroup::mount_bpffs()?;
        for member in self.spec.members() {
            let role = member.role();
            make_folder(&self.folder(&role))?;
            make_private_folder(&self.folder(&role).join("tpm"))?;
            let parts: &[&str] = if matches!(member.kind, Kind::Node(_)) {
                &["mesh", "agent", "tpm", "host"]
            } else {
                &["server", "tpm"]
            };
            for part in parts {
                cgroup::create(&self.cgroup(&role, part))?;
            }
            if matches!(member.kind, Kind::Node(_)) {
                make_folder(&self.measured_folder(&role))?;
                make_folder(&self.pins(&role))?;
            }
        }
        make_private_folder(&self.folder("operator"))?;
        make_private_folder(&self.folder("manufacturer"))
    }

    /// Spreads the machines over a few workers; the first failure ends all.
    fn make_and_boot(&self, members: &[Member]) -> Result<(), LabError> {
        let next = Mutex::new(members.iter());
        let take = || next.lock().unwrap_or_else(std::sync::PoisonError::into_inner).next();
        let work = || {
            while let Some(member) = take() {
                if let Err(e) = self.make_tpm(member).and_then(|()| self.boot(member)) {
                    while take().is_some() {}
                    return Err(e);
                }
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..TPM_WORKERS).map(|_| scope.spawn(work)).collect();
            let panicked = || Refusal::new(Code::Internal, "TPMs", "a worker panicked");
            workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| panicked())?)
        })
    }

    fn make_tpm(&self, member: &Member) -> Result<(), LabError> {
        let role = member.role();
        let fail = |source| LabError::Tpm { machine: role.clone(), source };
        let state = self.folder(&role).join("tpm");
        self.manufacturer().make(self.name(), &self.own_cgroup(), &role, &state).map_err(fail)?;
        tpm::write_golden_logs(&self.boot_log(&role), &self.ima_log(&role)).map_err(fail)
    }

    /// Starts a machine's TPM with all that belongs to it, and checks it against the golden boot's own PCRs.
    fn boot(&self, member: &Member) -> Result<(), LabError> {
        let role = member.role();
        let folder = self.folder(&role);
        let launch = |argv: Vec<String>, log: &str| Launch {
            argv,
            env: Vec::new(),
            netns: Some(self.spec.namespace(&role)),
            cgroup: Some(self.cgroup(&role, "tpm")),
            uid: None,
            log: folder.join(log),
        };
        let boot = Ready::Tpm { boot_log: self.boot_log(&role), ima_log: self.ima_log(&role) };
        let swtpm = launch(tpm::swtpm_argv(&folder.join("tpm")), "swtpm.log");
        self.start(&format!("{role}-swtpm"), Some(&role), swtpm, boot)?;

        let own = preflight::own_binary("ambit-lab")?.display().to_string();
        let listening = Ready::Listening(SocketAddr::V4(gate::loopback(gate::PORT)));
        let gate = launch(vec![own.clone(), "tpm-gate".into()], "tpm-gate.log");
        self.start(&format!("{role}-tpm-gate"), Some(&role), gate, listening)?;
        self.check_golden(&role)?;

        if matches!(member.kind, Kind::Node(_)) {
            let path = |path: &Path| path.display().to_string();
            let argv = vec![
                own,
                "measurer".into(),
                "--folder".into(),
                path(&self.measured_folder(&role)),
                "--ima-log".into(),
                path(&self.ima_log(&role)),
            ];
            self.start(&format!("{role}-measurer"), Some(&role), launch(argv, "measurer.log"), Ready::Started)?;
        }
        Ok(())
    }

    fn check_golden(&self, role: &str) -> Result<(), LabError> {
        let fail = |source| LabError::Tpm { machine: role.to_owned(), source };
        let bank = crate::tpm_wire::Bank::Sha256;
        let found = tpm::read_pcrs(&self.spec.namespace(role), bank).map_err(fail)?;
        for (pcr, (found, expected)) in found.iter().zip(tpm::golden_pcrs(bank)).enumerate() {
            if *found != expected {
                let (expected, found) = (hex::encode(expected), hex::encode(found));
                return Err(fail(tpm::TpmStateError::Pcr { pcr, expected, found }));
            }
        }
        Ok(())
    }
}

/// For keys: pods run as other users and reach their socket through the folders above.
fn make_private_folder(path: &Path) -> Result<(), LabError> {
    make_folder(path)?;
    let private = std::fs::Permissions::from_mode(0o700);
    std::fs::set_permissions(path, private).map_err(|source| LabError::Io { path: path.into(), source })
}

fn no_members() -> LabError {
    Refusal::new(Code::BadRequest, "at least one machine", topology::RUN_DIR).into()
}
