//! What the lab knows of itself, on disk: every process by number and start time, pods, leases.
//!
//! Written by rename, changed under a file lock, so that several commands and keepers can work at once.

use crate::process::{Launch, ProcessId};
use crate::topology::Spec;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

/// What can go wrong with the state file.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A file of it.
    #[error("state file {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not readable as a state.
    #[error("state file {path} is malformed; `ambit-lab down` removes the lab without it")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
}

/// The whole state of a lab.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// What was asked for.
    pub spec: Spec,
    /// Whether `up` came to its end.
    pub complete: bool,
    /// Every process the lab keeps, in the order of starting.
    pub processes: Vec<Process>,
    /// Pods, in the order of starting.
    pub pods: Vec<Pod>,
}

/// One kept process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// `west-r1`, `west-n1-agent`, `west-n1-swtpm`, …; unique.
    pub name: String,
    /// The machine it runs on: `west-n1`; none for the lab's own.
    pub member: Option<String>,
    /// The process of the last start.
    pub id: ProcessId,
    /// How to start it again.
    pub launch: Launch,
    /// When it is ready.
    pub ready: Ready,
}

/// What to wait for after a start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ready {
    /// Nothing.
    Started,
    /// Its namespace has a TCP listener there. It is looked up, not called: the mesh refuses calls from outside it.
    Listening(SocketAddr),
    /// A TPM: extended with what these logs tell, as the machine's boot would do.
    Tpm {
        /// Boot log of the machine.
        boot_log: PathBuf,
        /// IMA log of the machine.
        ima_log: PathBuf,
    },
}

/// One pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// Its node: `west-n1`.
    pub node: String,
    /// Its name, unique on its node: `[a-z][a-z0-9]{0,11}`.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its cgroup, below the node's mesh.
    pub cgroup: PathBuf,
    /// Its address.
    pub address: Ipv4Addr,
    /// The user its processes run as.
    pub uid: u32,
}

/// The state file of a lab.
#[derive(Clone, Debug)]
pub struct Store {
    path: PathBuf,
}

impl Store {
    /// The store in a lab's folder.
    pub fn new(root: &Path) -> Store {
        Store { path: root.join("state.json") }
    }
    /// Whether there is a state file.
    pub fn exists(&self) -> bool {
        self.path.exists()
    }
    /// The state.
    pub fn load(&self) -> Result<State, StateError> {
        let text = std::fs::read(&self.path).map_err(|source| self.io(source))?;
        serde_json::from_slice(&text).map_err(|source| StateError::Malformed { path: self.path.clone(), source })
    }
    /// Writes a new state.
    pub fn save(&self, state: &State) -> Result<(), StateError> {
        let text = serde_json::to_vec_pretty(state)
            .map_err(|source| StateError::Malformed { path: self.path.clone(), source })?;
        let next = self.path.with_extension("json.next");
        std::fs::write(&next, text).and_then(|()| std::fs::rename(&next, &self.path)).map_err(|source| self.io(source))
    }
    /// Changes the state; no other change happens meanwhile.
    pub fn update<T>(&self, change: impl FnOnce(&mut State) -> T) -> Result<T, StateError> {
        let _held = self.hold()?;
        let mut state = self.load()?;
        let result = change(&mut state);
        self.save(&state)?;
        Ok(result)
    }

    fn hold(&self) -> Result<File, StateError> {
        let path = self.path.with_extension("lock");
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(path);
        let file = file.map_err(|source| self.io(source))?;
        file.lock().map_err(|source| self.io(source))?;
        Ok(file)
    }

    fn io(&self, source: std::io::Error) -> StateError {
        StateError::Io { path: self.path.clone(), source }
    }
}

impl State {
    /// The process of this name.
    pub fn process(&self, name: &str) -> Option<&Process> {
        self.processes.iter().find(|p| p.name == name)
    }
    /// Records a start: a new process, or the next life of a known one.
    pub fn record(&mut self, process: Process) {
        match self.processes.iter_mut().find(|p| p.name == process.name) {
            Some(known) => *known = process,
            None => self.processes.push(process),
        }
    }
}
