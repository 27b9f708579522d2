//! An administrator's key and certificate in the folder of his context, and how they are replaced.
//!
//! Both stand in `admin.pem`, the chain after its key, and one rename replaces it: whatever breaks off, and whoever reads
//! meanwhile, there is a key with the certificate of that very key. `admin.key` holds the key once more, for programs that
//! want it apart; it is read here only beside an `admin.pem` that has none, as `ambitd init` and former releases wrote it.

use crate::context::read_bounded;
use crate::exit::file_refusal;
use ambit_identity::keys::{certificates_from_pem, certificates_to_pem};
use ambit_identity::tls::certified;
use ambit_identity::{SvidKey, profile};
use ambit_model::{Code, Refusal};
use rustls_pki_types::CertificateDer;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// An administrator's certificate and key are a few kilobytes of PEM.
const PEM_BYTES_MAX: u64 = 64 * 1024;
/// What a key's PEM ends with, of whatever format.
const KEY: &str = "PRIVATE KEY-----";

/// Reads the pair of a context's folder.
pub fn read(folder: &Path) -> Result<(Vec<CertificateDer<'static>>, SvidKey), Refusal> {
    let text = |name: &str| read_bounded(&folder.join(name), PEM_BYTES_MAX).map(Zeroizing::new);
    let pem = text("admin.pem")?;
    let key = if pem.contains(KEY) { SvidKey::from_pem(&pem)? } else { SvidKey::from_pem(&text("admin.key")?)? };
    Ok((certificates_from_pem(&pem)?, key))
}

/// How far through its life a certificate is, by this machine's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Age {
    /// Before its half.
    Young,
    /// Past its half.
    Due,
    /// Over.
    Ended,
}

/// When a certificate is valid, milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// First.
    pub not_before_ms: u64,
    /// Last.
    pub not_after_ms: u64,
}

impl Validity {
    /// Of the leaf.
    pub fn of(chain: &[CertificateDer<'_>]) -> Result<Validity, Refusal> {
        let leaf = chain.first().ok_or_else(|| Refusal::new(Code::BadRequest, "a certificate", "none"))?;
        let leaf = profile::certificate(leaf)?;
        let ms = |seconds: i64| u64::try_from(seconds).unwrap_or_default().saturating_mul(1_000);
        let (from, to) = (&leaf.validity().not_before, &leaf.validity().not_after);
        Ok(Validity { not_before_ms: ms(from.timestamp()), not_after_ms: ms(to.timestamp()) })
    }
    /// A clock that is behind sees it young; then nothing is renewed before it is right again.
    pub fn age(&self, now_ms: u64) -> Age {
        let life = self.not_after_ms.saturating_sub(self.not_before_ms);
        match now_ms {
            now if now >= self.not_after_ms => Age::Ended,
            now if now >= self.not_before_ms.saturating_add(life / 2) => Age::Due,
            _ => Age::Young,
        }
    }
}

/// A folder that nobody else changes as long as this lives.
#[derive(Debug)]
pub struct Locked {
    folder: PathBuf,
    _lock: File,
}

impl Locked {
    /// Waits for whoever changes it.
    pub fn wait(folder: &Path) -> Result<Locked, Refusal> {
        let (path, file) = Locked::file(folder)?;
        file.lock().map_err(|e| file_refusal(&path, &e))?;
        Ok(Locked { folder: folder.to_owned(), _lock: file })
    }
    /// None where somebody changes it at the moment.
    pub fn at_once(folder: &Path) -> Result<Option<Locked>, Refusal> {
        let (path, file) = Locked::file(folder)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Locked { folder: folder.to_owned(), _lock: file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(e)) => Err(file_refusal(&path, &e)),
        }
    }
    fn file(folder: &Path) -> Result<(PathBuf, File), Refusal> {
        let path = folder.join("lock");
        let opened = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = opened.map_err(|e| file_refusal(&path, &e))?;
        Ok((path, file))
    }

    /// Puts a key and its certificate in the place of those that are there.
    pub fn install(&self, chain: &[CertificateDer<'static>], key: &SvidKey) -> Result<(), Refusal> {
        let matched = certified(chain.to_vec(), key)?.keys_match();
        matched.map_err(|e| Refusal::new(Code::BadRequest, "a certificate for this very key", e.to_string()))?;
        let both = Zeroizing::new(format!("{}{}", *key.pem(), certificates_to_pem(chain.iter().map(AsRef::as_ref))));
        self.replace("admin.pem", both.as_bytes())?;
        self.replace("admin.key", key.pem().as_bytes())
    }
    /// Replaces one file in one step.
    pub fn replace(&self, name: &str, bytes: &[u8]) -> Result<(), Refusal> {
        let (new, path) = (self.folder.join(format!("{name}.new")), self.folder.join(name));
        write_private(&new, bytes)?;
        let renamed = std::fs::rename(&new, &path).and_then(|()| File::open(&self.folder)?.sync_all());
        renamed.map_err(|e| file_refusal(&path, &e))
    }
}

/// Writes a file of mode 0600 and syncs it.
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<(), Refusal> {
    let opened = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
    let mut file = opened.map_err(|e| file_refusal(path, &e))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(|e| file_refusal(path, &e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_due_from_its_half_on() {
        let one = Validity { not_before_ms: 1_000, not_after_ms: 9_000 };
        for (now, age) in [
            (0, Age::Young),
            (4_999, Age::Young),
            (5_000, Age::Due),
            (8_999, Age::Due),
            (9_000, Age::Ended),
            (u64::MAX, Age::Ended),
        ] {
            assert_eq!(one.age(now), age, "{now}");
        }
    }

    #[test]
    fn one_at_a_time_changes_a_folder() {
        let folder = std::env::temp_dir().join(format!("ambit-pair-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let held = Locked::wait(&folder).unwrap();
        assert!(Locked::at_once(&folder).unwrap().is_none());
        drop(held);
        assert!(Locked::at_once(&folder).unwrap().is_some());
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
