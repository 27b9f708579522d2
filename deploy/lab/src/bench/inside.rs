//! A program in a place of the lab whose lines a benchmark reads as they come.

use crate::lab::{Lab, LabError};
use crate::preflight::own_binary;
use ambit_model::{Refusal, refusal::Code};
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// Ends with its handle.
pub(super) struct Inside {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Inside {
    /// Starts `argv` in a place, as `ambit-lab exec` does.
    pub(super) fn start(lab: &Lab, place: &str, argv: &[&str]) -> Result<Inside, LabError> {
        let program = own_binary("ambit-lab")?;
        let mut child = Command::new(&program)
            .args(["exec", "--lab", lab.name(), place, "--"])
            .args(argv)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|source| LabError::Io { path: program, source })?;
        let (tell, lines) = mpsc::sync_channel(4);
        if let Some(out) = child.stdout.take() {
            // It ends with the pipe, which ends with the child.
            std::thread::spawn(move || {
                for line in BufReader::new(out).lines().map_while(Result::ok) {
                    let _ = tell.send(line);
                }
            });
        }
        Ok(Inside { child, lines })
    }

    /// The next line, which is to say `what`.
    pub(super) fn line(&self, what: &str, limit: Duration) -> Result<String, LabError> {
        let none = |_| Refusal::new(Code::Unavailable, format!("{what} within {} s", limit.as_secs()), "none");
        Ok(self.lines.recv_timeout(limit).map_err(none)?)
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        // Ours, by its handle; already ended is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
