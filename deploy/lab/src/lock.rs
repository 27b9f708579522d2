//! One lab command at a time: a lock file that dies with its holder and is removed with the lab.

use ambit_model::{Refusal, refusal::Code};
use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A holder that was killed lives on in its child until that reaches its `exec`: long on a loaded machine.
const WAIT_MAX: Duration = Duration::from_secs(2);

/// Held while a lab is brought up or taken down; released by the kernel if the holder dies.
#[derive(Debug)]
pub struct Lock {
    file: File,
    path: PathBuf,
}

impl Lock {
    /// Takes the lock of a lab, or says `busy`.
    pub fn take(run_dir: &Path, lab: &str) -> Result<Lock, Refusal> {
        let path = run_dir.join(format!(".{lab}.lock"));
        let internal =
            |e: std::io::Error| Refusal::new(Code::Internal, format!("lock {}", path.display()), e.to_string());
        std::fs::create_dir_all(run_dir).map_err(internal)?;
        let deadline = Instant::now() + WAIT_MAX;
        loop {
            let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(internal)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                    continue;
                }
                Err(TryLockError::WouldBlock) => {
                    let expected = format!("no other command working on lab {lab}");
                    return Err(Refusal::new(Code::Busy, expected, "one is at work"));
                }
                Err(TryLockError::Error(e)) => return Err(internal(e)),
            }
            // The holder before us may have removed the file that we opened: then our lock guards nothing.
            let same = std::fs::metadata(&path).is_ok_and(|m| file.metadata().is_ok_and(|f| f.ino() == m.ino()));
            if same {
                return Ok(Lock { file, path });
            }
        }
    }
    /// Releases and removes the lock file: the lab is gone.
    pub fn remove(self) {
        let _ = std::fs::remove_file(&self.path);
        drop(self.file);
        if let Some(folder) = self.path.parent() {
            // Fails while another lab is there, as it should.
            let _ = std::fs::remove_dir(folder);
        }
    }
}
