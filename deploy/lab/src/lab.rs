//! A running lab: the handle through which the demo, the drills and the tests use it.

use crate::cgroup::{self, CgroupError};
use crate::measurer::MeasureError;
use crate::net::NetError;
use crate::process::{self, Launch, ProcessError, ProcessId};
use crate::state::{Process, Ready, State, StateError, Store};
use crate::topology::{self, Kind, Spec};
use crate::tpm::{self, Manufacturer, TpmStateError};
use ambit_model::{Refusal, refusal::Code};
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

/// How long a process may take to be ready, on two loaded cores.
const READY_MAX: Duration = Duration::from_secs(20);

/// What can go wrong with a lab.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// Refused, with what to do.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The network.
    #[error(transparent)]
    Net(#[from] NetError),
    /// A process.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// A cgroup or a pin.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The state file.
    #[error(transparent)]
    State(#[from] StateError),
    /// A TPM.
    #[error("TPM of {machine}")]
    Tpm {
        /// The machine.
        machine: String,
        /// Why.
        source: TpmStateError,
    },
    /// The measurer's folder.
    #[error(transparent)]
    Measure(#[from] MeasureError),
    /// A tool of the machine.
    #[error(transparent)]
    Tool(#[from] crate::tool::ToolError),
    /// A file.
    #[error("{path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A command that the lab ran to its end failed.
    #[error("{command} failed: {output}")]
    Command {
        /// What was run.
        command: String,
        /// What it wrote.
        output: String,
    },
}

/// An error with its causes, for one line of a log.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        // A transparent error tells the same as its source.
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}

/// Where a command runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its namespace.
    pub netns: String,
    /// Its cgroup.
    pub cgroup: PathBuf,
    /// Its user; none = root.
    pub uid: Option<u32>,
}

/// A lab that is up, or was when it was opened.
#[derive(Clone, Debug)]
pub struct Lab {
    pub(crate) spec: Spec,
    pub(crate) store: Store,
    pub(crate) cgroup: PathBuf,
}

impl Lab {
    /// The running lab of this name.
    pub fn open(name: &str) -> Result<Lab, LabError> {
        crate::preflight::root()?;
        let name = topology::parse_name(name)?;
        let store = Store::new(&topology::root(&name));
        if !store.exists() {
            let expected = format!("lab {name} to be up");
            return Err(Refusal::new(Code::NotFound, expected, "no such lab; `ambit-lab up` starts one").into());
        }
        Ok(Lab { spec: store.load()?.spec, store, cgroup: cgroup::top(&name)? })
    }
    /// What it consists of.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }
    /// Its name.
    pub fn name(&self) -> &str {
        &self.spec.name
    }
    /// All it knows of itself, now.
    pub fn state(&self) -> Result<State, LabError> {
        Ok(self.store.load()?)
    }
    /// The folder of a role: configuration, logs and files of a member, the operator, a site.
    pub fn folder(&self, role: &str) -> PathBuf {
        self.spec.root().join(role)
    }
    /// Copies the logs of all roles into a folder, each as `ROLE-NAME.log`.
    ///
    /// # Errors
    /// What cannot be read or written.
    pub fn copy_logs(&self, to: &Path) -> Result<(), LabError> {
        make_folder(to)?;
        let list = |of: &Path| -> Result<Vec<PathBuf>, LabError> {
            let read = std::fs::read_dir(of).and_then(|all| all.map(|e| Ok(e?.path())).collect());
            read.map_err(|source| LabError::Io { path: of.into(), source })
        };
        for folder in list(&self.spec.root())?.into_iter().filter(|path| path.is_dir()) {
            let role = folder.file_name().unwrap_or_default().display().to_string();
            for log in list(&folder)?.into_iter().filter(|path| path.extension().is_some_and(|e| e == "log")) {
                let name = log.file_name().unwrap_or_default().display().to_string();
                std::fs::copy(&log, to.join(format!("{role}-{name}")))
                    .map_err(|source| LabError::Io { path: log, source })?;
            }
        }
        Ok(())
    }
    /// A cgroup of a role: `mesh`, `agent`, `tpm`, `host` of a node, `server` of a replica.
    pub fn cgroup(&self, role: &str, part: &str) -> PathBuf {
        self.cgroup.join(role).join(part)
    }
    /// The cgroup of the lab's own processes.
    pub fn own_cgroup(&self) -> PathBuf {
        self.cgroup.join("lab")
    }
    /// The folder of a node's BPF pins.
    pub fn pins(&self, node: &str) -> PathBuf {
        cgroup::pins(self.name()).join(node)
    }
    /// A machine's boot log, its own copy.
    pub fn boot_log(&self, role: &str) -> PathBuf {
        self.folder(role).join("binary_bios_measurements")
    }
    /// A machine's IMA log, which its measurer lengthens.
    pub fn ima_log(&self, role: &str) -> PathBuf {
        self.folder(role).join("ima_binary_runtime_measurements")
    }
    /// The folder a node's measurer watches.
    pub fn measured_folder(&self, node: &str) -> PathBuf {
        self.folder(node).join("measured")
    }
    /// The lab's TPM manufacturer.
    pub fn manufacturer(&self) -> Manufacturer {
        Manufacturer::new(self.spec.root().join("manufacturer"))
    }
    /// Where commands run for a role: `operator`, `router`, a site, a member, or a pod (`west-n1-api`), which is
    /// enforced as its processes are.
    pub fn place(&self, role: &str) -> Result<Place, LabError> {
        if let Some(pod) = self.state()?.pods.iter().find(|pod| format!("{}-{}", pod.node, pod.name) == role) {
            return Ok(Place { netns: pod.namespace.clone(), cgroup: pod.cgroup.clone(), uid: Some(pod.uid) });
        }
        let netns = self.spec.namespace(role);
        if let Some(member) = self.spec.member(role) {
            let part = if matches!(member.kind, Kind::Node(_)) { "host" } else { "server" };
            return Ok(Place { netns, cgroup: self.cgroup(role, part), uid: None });
        }
        if role == "operator" || role == "router" || self.spec.site(role).is_some() {
            return Ok(Place { netns, cgroup: self.own_cgroup(), uid: None });
        }
        let expected = "operator, router, a site, a member such as west-n1, or a pod such as west-n1-api";
        Err(Refusal::new(Code::NotFound, expected, role.to_owned()).into())
    }
    /// Runs a command to its end; an exit code other than 0 is the caller's to judge.
    pub fn run_in(&self, place: &Place, argv: &[&str], limit: Duration) -> Result<Output, LabError> {
        Ok(process::run(self.name(), &self.launch(place, argv, Path::new("/dev/null")), limit)?)
    }
    /// Runs a command to its end and returns its standard output; any failure is an error that shows what it wrote.
    pub fn must_run_in(&self, place: &Place, argv: &[&str], limit: Duration) -> Result<String, LabError> {
        let output = self.run_in(place, argv, limit)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            return Ok(text);
        }
        let errors = String::from_utf8_lossy(&output.stderr);
        let tail: String = errors.trim().chars().take(2000).collect();
        Err(LabError::Command { command: argv.join(" "), output: format!("{} {tail}", output.status) })
    }
    /// A launch in a place.
    pub fn launch(&self, place: &Place, argv: &[&str], log: &Path) -> Launch {
        Launch {
            argv: argv.iter().map(|a| (*a).to_owned()).collect(),
            env: Vec::new(),
            netns: Some(place.netns.clone()),
            cgroup: Some(place.cgroup.clone()),
            uid: place.uid,
            log: log.to_owned(),
        }
    }
    /// Starts a process that the lab keeps: recorded before anything else is done, then waited for.
    pub fn start(&self, name: &str, member: Option<&str>, launch: Launch, ready: Ready) -> Result<ProcessId, LabError> {
        let known = self.state()?.process(name).map(|p| p.id);
        if known.is_some_and(ProcessId::alive) {
            return Err(Refusal::new(Code::AlreadyExists, format!("{name} not running"), "it runs").into());
        }
        if let Some(folder) = launch.log.parent() {
            make_folder(folder)?;
        }
        if let Some(cgroup) = &launch.cgroup {
            cgroup::create(cgroup)?;
        }
        let id = process::spawn(self.name(), &launch)?;
        let process = Process { name: name.into(), member: member.map(str::to_owned), id, launch, ready };
        self.store.update(|state| state.record(process.clone()))?;
        self.wait(&process)?;
        Ok(id)
    }
    /// Starts a kept process again, as it was started before; nothing if it runs.
    pub fn restart(&self, name: &str) -> Result<(), LabError> {
        let state = self.state()?;
        let missing = || Refusal::new(Code::NotFound, "a process of the lab (`ambit-lab status`)", name.to_owned());
        let process = state.process(name).ok_or_else(missing)?.clone();
        if process.id.alive() {
            return Ok(());
        }
        if name.ends_with("-agent")
            && let Some(netns) = &process.launch.netns
        {
            // Best effort: without a TPM the agent says so itself.
            let _ = tpm::flush(netns);
        }
        self.start(name, process.member.as_deref(), process.launch, process.ready).map(drop)
    }
    /// Puts a file in front of a node's measurer, which measures it within a poll.
    pub fn measure(&self, node: &str, name: &str, bytes: &[u8]) -> Result<PathBuf, LabError> {
        Ok(crate::measurer::drop_file(&self.measured_folder(node), name, bytes)?)
    }

    fn wait(&self, process: &Process) -> Result<(), LabError> {
        match &process.ready {
            Ready::Started => Ok(()),
            Ready::Listening(address) => {
                let listening = || crate::net::listening(process.id.pid, *address);
                Ok(process::wait_ready(process.id, &process.launch, READY_MAX, listening)?)
            }
            Ready::Tpm { boot_log, ima_log } => {
                let machine = process.member.clone().unwrap_or_default();
                let netns = process.launch.netns.as_deref().unwrap_or_default();
                let booted = tpm::boot(netns, boot_log, ima_log);
                booted.map(drop).map_err(|source| LabError::Tpm { machine, source })
            }
        }
    }
}

pub(crate) fn make_folder(path: &Path) -> Result<(), LabError> {
    std::fs::create_dir_all(path).map_err(|source| LabError::Io { path: path.into(), source })
}

pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<(), LabError> {
    std::fs::write(path, bytes).map_err(|source| LabError::Io { path: path.into(), source })
}
