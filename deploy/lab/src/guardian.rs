//! Takes a lab down when whoever brought it up dies before doing so: Ctrl-C, a kill, even `kill -9`.

use crate::lab::{Lab, LabError};
use crate::preflight::own_binary;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// How often it looks whether its parent lives; nobody waits for the clean-up by the millisecond.
const LOOK: Duration = Duration::from_millis(50);

/// A guardian on its post, relieved when this is dropped: then its parent has cleaned up, or tells why it could not.
#[derive(Debug)]
pub struct Guardian {
    child: Option<Child>,
}

impl Guardian {
    /// Starts one for the lab of this name, unless that lab is up already: then it is not the caller's to take down.
    pub fn post(lab: &str) -> Result<Guardian, LabError> {
        crate::preflight::root()?;
        if Lab::open(lab).and_then(|lab| lab.state()).is_ok_and(|state| state.complete) {
            return Ok(Guardian { child: None });
        }
        let own = own_binary("ambit-lab")?;
        let parent = std::process::id().to_string();
        // A process group of its own: a terminal's interrupt must not reach it.
        let child = Command::new(&own)
            .args(["guardian", "--name", lab, "--parent", &parent])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .process_group(0)
            .spawn()
            .map_err(|source| LabError::Io { path: own, source })?;
        Ok(Guardian { child: Some(child) })
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Ours, by its handle; already ended is as good.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A guardian's whole life: waits until its parent is gone, then takes the lab down.
pub fn guard(lab: &str, parent: i32) -> Result<(), LabError> {
    // A dead parent's children get another one, also before the dead one is collected.
    while nix::unistd::getppid().as_raw() == parent {
        std::thread::sleep(LOOK);
    }
    let removed = crate::down::down(lab)?;
    if removed.any() {
        eprintln!("lab {lab} was left alone and is gone: {removed}");
    }
    Ok(())
}
