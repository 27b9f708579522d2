//! Where the AK's two halves are kept: its public area, and its private part wrapped by the TPM under the EK.

use crate::error::TpmError;
use crate::options::{AkKind, EkKind};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"ambit-ak";
/// Two TPM2B of an AK: a few hundred bytes; RSA-4096 would have about 2 KiB.
const FILE_BYTES_MAX: u64 = 8 * 1024;

/// A key as the TPM gave it: TPMT_PUBLIC, and the content of TPM2B_PRIVATE, which only the TPM's own EK unwraps.
#[derive(Clone, Debug)]
pub(crate) struct WrappedKey {
    pub(crate) public: Vec<u8>,
    pub(crate) private: Vec<u8>,
}

/// One file for each EK and kind of AK: a change of configuration makes a new AK, and changing back finds the old one.
pub(crate) fn path(state_dir: &Path, ek: EkKind, ak: AkKind) -> PathBuf {
    match (ek, ak) {
        (EkKind::Rsa2048, AkKind::EccP256) => state_dir.join("ak"),
        (ek, ak) => state_dir.join(format!("ak-{}-{}", ek.as_str(), ak.as_str())),
    }
}

/// The AK saved at `path`, or none if there is no such file.
pub(crate) fn load(path: &Path) -> Result<Option<WrappedKey>, TpmError> {
    let io = |source| TpmError::State { path: path.to_owned(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io(e)),
    };
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX).read_to_end(&mut bytes).map_err(io)?;
    match parse(MAGIC, &bytes) {
        Some(saved) => Ok(Some(saved)),
        None => Err(TpmError::StateDamaged { path: path.to_owned() }),
    }
}

impl WrappedKey {
    /// Both halves, behind `magic`.
    pub(crate) fn encode(&self, magic: &[u8; 8]) -> Result<Vec<u8>, TpmError> {
        let mut bytes = magic.to_vec();
        for part in [&self.public, &self.private] {
            let size = u16::try_from(part.len()).map_err(|_| TpmError::Malformed { what: "key" })?;
            bytes.extend_from_slice(&size.to_be_bytes());
            bytes.extend_from_slice(part);
        }
        Ok(bytes)
    }
}

/// Saves `ak` so that the file is whole or absent, whenever the machine stops.
pub(crate) fn save(path: &Path, ak: &WrappedKey) -> Result<(), TpmError> {
    let io = |source| TpmError::State { path: path.to_owned(), source };
    let bytes = ak.encode(MAGIC)?;
    let unfinished = path.with_extension("new");
    match std::fs::remove_file(&unfinished) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(io(e)),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished).map_err(io)?;
    file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(io)?;
    std::fs::rename(&unfinished, path).map_err(io)?;
    let folder = path.parent().unwrap_or(Path::new("."));
    File::open(folder).and_then(|f| f.sync_all()).map_err(io)
}

/// What [`WrappedKey::encode`] made.
pub(crate) fn parse(magic: &[u8; 8], bytes: &[u8]) -> Option<WrappedKey> {
    let rest = bytes.strip_prefix(magic)?;
    let (public, rest) = part(rest)?;
    let (private, rest) = part(rest)?;
    rest.is_empty().then(|| WrappedKey { public: public.to_vec(), private: private.to_vec() })
}

fn part(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (size, rest) = bytes.split_first_chunk::<2>()?;
    rest.split_at_checked(usize::from(u16::from_be_bytes(*size)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn an_ak_survives_and_damage_is_named() {
        let dir = std::env::temp_dir().join(format!("ambit-ak-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let file = path(&dir, EkKind::Rsa2048, AkKind::EccP256);
        assert!(load(&file).unwrap().is_none());
        save(&file, &WrappedKey { public: vec![1; 88], private: vec![2; 126] }).unwrap();
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        let saved = load(&file).unwrap().unwrap();
        assert_eq!((saved.public, saved.private), (vec![1; 88], vec![2; 126]));
        let bytes = std::fs::read(&file).unwrap();
        for damaged in [&bytes[..bytes.len() - 1], &bytes[1..], b"".as_slice()] {
            std::fs::write(&file, damaged).unwrap();
            assert!(matches!(load(&file), Err(TpmError::StateDamaged { .. })));
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
