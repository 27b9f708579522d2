//! The lab's own program, which injects faults and calls from pods. It stands beside this one, or in `PATH`.

use super::guard::Order;
use super::spec::Caller;
use crate::duration::Millis;
use ambit_model::{Code, Refusal};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::process::{Child, Command};
use tokio::time::timeout;

/// Starting a whole site again takes the lab some seconds; what takes longer hangs.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(90);

/// Where every lab of this machine lives (ambit-lab says the same).
const RUN_DIR: &str = "/run/ambit-lab";

/// `ambit-lab` beside this program where there is one, else the one in `PATH`.
pub fn program() -> PathBuf {
    let beside = std::env::current_exe().ok().and_then(|me| Some(me.parent()?.join("ambit-lab")));
    beside.filter(|p| p.is_file()).unwrap_or_else(|| PathBuf::from("ambit-lab"))
}

/// One lab.
#[derive(Clone, Debug)]
pub struct Lab {
    program: PathBuf,
    name: String,
    folder: PathBuf,
}

impl Lab {
    /// The lab of this name, whose files are in `folder`.
    pub fn new(program: PathBuf, name: String, folder: PathBuf) -> Lab {
        Lab { program, name, folder }
    }

    /// The lab of this name on this machine.
    pub fn here(name: String) -> Result<Lab, Refusal> {
        let plain = name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        if name.is_empty() || !plain {
            return Err(Refusal::new(Code::BadRequest, "a lab's name of a-z 0-9", name));
        }
        let folder = PathBuf::from(RUN_DIR).join(&name);
        Ok(Lab::new(program(), name, folder))
    }

    /// Held while a drill runs: one drill a lab.
    pub fn lock(&self) -> Result<std::fs::File, Refusal> {
        let file = self.folder.join("drill.lock");
        let options = std::fs::OpenOptions::new().create(true).truncate(false).write(true).open(&file);
        let opened = options.map_err(|e| {
            let expected = format!("lab {} to be up (a file {})", self.name, file.display());
            Refusal::new(Code::DrillGuard, expected, e.to_string())
        })?;
        match opened.try_lock() {
            Ok(()) => Ok(opened),
            Err(_) => Err(Refusal::new(Code::DrillGuard, format!("no other drill in lab {}", self.name), "one runs")),
        }
    }

    /// The administrator's context of a site, where the lab keeps it.
    pub fn context(&self, site: &str) -> PathBuf {
        self.folder.join("operator").join(site).join("context.json")
    }

    /// Where its files are.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Injects a fault. It is reverted when the lease ends, whatever becomes of us.
    pub async fn inject(&self, order: &Order, lease: Millis) -> Result<(), Refusal> {
        let lease = format!("{}s", lease.0 / 1000);
        self.run(&["inject", order.action, &order.target, "--lease", &lease]).await.map(drop)
    }

    /// Reverts it now. Nothing to revert is no error.
    pub async fn revert(&self, order: &Order) -> Result<(), Refusal> {
        // What was killed is waited for until it runs.
        let action = if order.action == "kill" { "restart" } else { "restore" };
        self.run(&["inject", action, &order.target]).await.map(drop)
    }

    /// Starts the caller probe: a process that prints one JSON line per call until it is killed.
    pub fn probe(&self, caller: &Caller) -> Result<Child, Refusal> {
        Command::new(&self.program)
            .args(["probe", "--name", &self.name, "--pod", &caller.pod])
            .args(["--target", &caller.target.to_string(), "--interval-ms", &caller.every.0.to_string()])
            // A group of its own: the operator's Ctrl-C is ours to act on, the probe ends when we say.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| self.failed("probe", e.to_string()))
    }

    async fn run(&self, args: &[&str]) -> Result<String, Refusal> {
        let mut command = Command::new(&self.program);
        command.args(args).args(["--name", &self.name]).stdin(Stdio::null()).process_group(0).kill_on_drop(true);
        let what = args.join(" ");
        let output = match timeout(COMMAND_TIMEOUT, command.output()).await {
            Ok(Ok(output)) => output,
            Ok(Err(e)) => return Err(self.failed(&what, e.to_string())),
            Err(_elapsed) => return Err(self.failed(&what, format!("no end within {COMMAND_TIMEOUT:?}"))),
        };
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let says = String::from_utf8_lossy(&output.stderr);
        let says = says.trim().lines().last().unwrap_or("nothing said").to_owned();
        Err(self.failed(&what, format!("{}: {says}", output.status)))
    }

    fn failed(&self, what: &str, found: String) -> Refusal {
        let expected = format!("'{} {what}' of lab {} to succeed", self.program.display(), self.name);
        Refusal::new(Code::DrillGuard, expected, found)
    }
}
