//! The measurer: stands in for the kernel's IMA, which this kind of machine lacks. LAB ONLY.
//!
//! It watches a folder as IMA watches what is executed: each new or changed file becomes an ima-ng record, appended to
//! the node's log and extended into PCR 10 of the three banks, in this order. A reader that quotes first and reads the
//! log after therefore always finds the quoted PCR as the replay of a beginning of the log.

use crate::ima::{self, ImaError, Record};
use crate::tpm_wire::{self, Bank, TpmError};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// How often the folder is read.
const POLL: Duration = Duration::from_millis(200);
/// Files of the folder, at most; further ones are reported and not measured.
const FILES_MAX: usize = 4096;
/// A larger file is not measured.
const FILE_BYTES_MAX: u64 = 256 << 20;
/// One command; the gate may be busy with another client.
const COMMAND_MAX: Duration = Duration::from_secs(60);

/// What can go wrong with measuring.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// A file.
    #[error("{path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The log.
    #[error(transparent)]
    Log(#[from] ImaError),
    /// The TPM.
    #[error(transparent)]
    Tpm(#[from] TpmError),
    /// Log and PCR tell different histories: somebody else wrote one of them.
    #[error("no beginning of the IMA log leads to PCR 10 = {pcr}")]
    Parted {
        /// Value in the TPM.
        pcr: String,
    },
}

/// One node's measurer.
pub struct Measurer {
    folder: PathBuf,
    log: PathBuf,
    tpm: SocketAddrV4,
    /// Whether every record of the log is known to be in the PCR.
    in_step: bool,
    /// Digest and path of what the log holds: IMA measures the same file once.
    measured: BTreeSet<(Vec<u8>, String)>,
    /// Size and time of a file when it was last hashed.
    hashed: BTreeMap<PathBuf, (u64, SystemTime)>,
}

impl Measurer {
    /// A measurer of `folder` that writes to `log` and the TPM behind `tpm`.
    pub fn new(folder: PathBuf, log: PathBuf, tpm: SocketAddrV4) -> Result<Measurer, MeasureError> {
        let records = ima::parse(&read(&log)?)?;
        let measured = records.iter().filter_map(Record::digest_and_path).map(|(d, p)| (d.to_vec(), p.to_owned()));
        let measured = measured.collect();
        Ok(Measurer { folder, log, tpm, in_step: false, measured, hashed: BTreeMap::new() })
    }
    /// Watches for ever; a failure is reported and tried again at the next poll.
    pub fn run(mut self) -> ! {
        loop {
            match self.poll() {
                Ok(0) => {}
                Ok(measured) => eprintln!("measured {measured} files"),
                Err(e) => eprintln!("{}", crate::lab::chain(&e)),
            }
            std::thread::sleep(POLL);
        }
    }
    /// One look at the folder; returns how many files were measured.
    pub fn poll(&mut self) -> Result<usize, MeasureError> {
        if !self.in_step {
            self.catch_up()?;
        }
        let mut count = 0;
        for path in self.changed()? {
            let Some(text) = path.to_str() else { continue };
            let digest = hash(&path)?;
            if self.measured.insert((digest.to_vec(), text.to_owned())) {
                self.measure(&Record::ima_ng(&digest, text))?;
                count += 1;
            }
        }
        Ok(count)
    }

    /// Extends what the log holds beyond the PCR: the measurer died between the two, or the TPM did not answer.
    fn catch_up(&mut self) -> Result<(), MeasureError> {
        let mut tpm = self.connect()?;
        let pcr = tpm_wire::read_pcrs(&mut tpm, Bank::Sha256)?.into_iter().nth(ima::PCR as usize).unwrap_or_default();
        let records = ima::parse(&read(&self.log)?)?;
        let known = (0..=records.len()).rev().find(|n| ima::replay_sha256(records.iter().take(*n)).as_slice() == pcr);
        let known = known.ok_or_else(|| MeasureError::Parted { pcr: hex::encode(&pcr) })?;
        for record in records.iter().skip(known) {
            tpm_wire::extend(&mut tpm, record.pcr, &record.digests())?;
        }
        self.in_step = true;
        Ok(())
    }

    fn measure(&mut self, record: &Record) -> Result<(), MeasureError> {
        let mut log = OpenOptions::new().append(true).open(&self.log).map_err(|e| io(&self.log, e))?;
        log.write_all(&record.encode()).map_err(|e| io(&self.log, e))?;
        self.in_step = false;
        let mut tpm = self.connect()?;
        tpm_wire::extend(&mut tpm, record.pcr, &record.digests())?;
        self.in_step = true;
        Ok(())
    }

    /// Files that are new or look changed, in the order of their names.
    fn changed(&mut self) -> Result<Vec<PathBuf>, MeasureError> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&self.folder).map_err(|e| io(&self.folder, e))?.flatten().take(FILES_MAX) {
            let path = entry.path();
            // A hidden file is one still being written under another name.
            let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
            // It may have gone meanwhile.
            let Ok(meta) = std::fs::metadata(&path) else { continue };
            let seen = (meta.len(), meta.modified().unwrap_or(SystemTime::UNIX_EPOCH));
            if hidden || !meta.is_file() || meta.len() > FILE_BYTES_MAX || self.hashed.get(&path) == Some(&seen) {
                continue;
            }
            self.hashed.insert(path.clone(), seen);
            found.push(path);
        }
        found.sort();
        Ok(found)
    }

    fn connect(&self) -> Result<TcpStream, MeasureError> {
        let tpm = TcpStream::connect(self.tpm).map_err(TpmError::Io)?;
        tpm.set_read_timeout(Some(COMMAND_MAX)).map_err(TpmError::Io)?;
        Ok(tpm)
    }
}

/// Puts a file where the measurer finds it, whole from the first moment.
pub fn drop_file(folder: &Path, name: &str, bytes: &[u8]) -> Result<PathBuf, MeasureError> {
    let (hidden, path) = (folder.join(format!(".{name}")), folder.join(name));
    std::fs::write(&hidden, bytes).and_then(|()| std::fs::rename(&hidden, &path)).map_err(|e| io(&path, e))?;
    Ok(path)
}

fn hash(path: &Path) -> Result<[u8; 32], MeasureError> {
    let mut file = File::open(path).map_err(|e| io(path, e))?.take(FILE_BYTES_MAX);
    let mut hasher = Sha256::new();
    std::io::copy(&mut file, &mut hasher).map_err(|e| io(path, e))?;
    Ok(hasher.finalize().into())
}

fn read(path: &Path) -> Result<Vec<u8>, MeasureError> {
    std::fs::read(path).map_err(|e| io(path, e))
}

fn io(path: &Path, source: std::io::Error) -> MeasureError {
    MeasureError::Io { path: path.into(), source }
}
