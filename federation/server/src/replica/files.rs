//! A replica's keys and certificates on disk: mode 0600, written before they are needed, never logged.

use ambit_identity::keys::{certificates_from_pem, certificates_to_pem};
use ambit_identity::wrap::WrapKey;
use ambit_identity::{IssuingKey, RecordKey, Root, SvidKey, fingerprint};
use ambit_model::{Code, Refusal, TrustDomain};
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// What a replica is told at `init` or `join` and never changes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Card {
    /// The cell's trust domain.
    pub trust_domain: TrustDomain,
    /// This replica's number.
    pub replica: u64,
    /// Authority epoch at the time.
    pub epoch: u64,
    /// The other replicas as known then; replicated state replaces it.
    pub members: Vec<(u64, String)>,
}

/// The folder with everything that only this replica has.
#[derive(Clone, Debug)]
pub struct Files {
    dir: PathBuf,
}

pub(super) fn failed(what: &str, path: &Path, e: impl std::fmt::Display) -> Refusal {
    Refusal::new(Code::ConfigInvalid, format!("{what} {}", path.display()), e.to_string())
}

/// Where the files of a replica lie.
const DIR: &str = "identity";

/// Whether the file of this name opens what is sealed: the key of a root, or the wrap key.
fn opens_sealed(name: &str) -> bool {
    name == "root.key" || name == "wrap.key" || (name.starts_with("root-") && name.ends_with(".key"))
}

impl Files {
    /// Below the data directory, created with mode 0700.
    pub fn create(data_dir: &Path) -> Result<Self, Refusal> {
        Self::create_as(data_dir, DIR)
    }
    /// Beside where they are to lie until all are there ([`Files::placed`]): what fails before leaves the place free.
    pub fn create_aside(data_dir: &Path) -> Result<Self, Refusal> {
        let dir = data_dir.join("identity.new");
        if dir.exists() {
            std::fs::remove_dir_all(&dir).map_err(|e| failed("a writable folder", &dir, e))?;
        }
        Self::create_as(data_dir, "identity.new")
    }
    /// Removes what was made aside: it may hold a root's key.
    pub fn remove_aside(data_dir: &Path) {
        let dir = data_dir.join("identity.new");
        if let Err(error) = std::fs::remove_dir_all(&dir)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::error!(%error, dir = %dir.display(), "keys of an attempt that failed are left: remove them");
        }
    }
    /// Puts them where they are looked for.
    pub fn placed(self, data_dir: &Path) -> Result<Self, Refusal> {
        let dir = data_dir.join(DIR);
        let renamed = std::fs::rename(&self.dir, &dir).and_then(|()| std::fs::File::open(data_dir)?.sync_all());
        renamed.map_err(|e| failed("a writable folder", &dir, e))?;
        Ok(Self { dir })
    }
    fn create_as(data_dir: &Path, name: &str) -> Result<Self, Refusal> {
        use std::os::unix::fs::DirBuilderExt;
        let dir = data_dir.join(name);
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .map_err(|e| failed("a writable folder", &dir, e))?;
        Ok(Self { dir })
    }
    /// Whether `init` or `join` was done here.
    pub fn exist(&self) -> bool {
        self.dir.join("card.json").exists()
    }

    /// Refuses where a file here may be read by others, also one that is not needed now: the root's key, say, or what a
    /// crash left half-written. All were written for the owner only.
    pub fn guarded(&self) -> Result<(), Refusal> {
        for file in std::fs::read_dir(&self.dir).map_err(|e| failed("a readable folder", &self.dir, e))? {
            let path = file.map_err(|e| failed("a readable folder", &self.dir, e))?.path();
            owner_only(&path)?;
        }
        Ok(())
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), Refusal> {
        let path = self.dir.join(name);
        write_private(&path, bytes)
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, Refusal> {
        private(&self.dir.join(name))
    }

    /// Keeps the root's key: the form `file`, shown as unsealed.
    pub fn put_root(&self, root: &Root) -> Result<(), Refusal> {
        self.write("root.key", &root.key().pkcs8())?;
        self.write("root.der", root.der())
    }
    /// The root's certificate, which every replica has.
    pub fn put_root_der(&self, der: &[u8]) -> Result<(), Refusal> {
        self.write("root.der", der)
    }
    /// The root's certificate.
    pub fn root_der(&self) -> Result<CertificateDer<'static>, Refusal> {
        Ok(CertificateDer::from(self.read("root.der")?))
    }
    /// Keeps the key of a later root, for `ambitd restore`, where that of the first is kept.
    pub fn put_later_root(&self, root: &Root) -> Result<(), Refusal> {
        if !self.dir.join("root.key").exists() {
            return Ok(());
        }
        let id = hex::encode(fingerprint(root.der()));
        self.write(&format!("root-{}.key", &id[..16]), &root.key().pkcs8())
    }
    /// The key that this replica was founded or restored with, on the replica that keeps it, and the SHA-256 of the root that
    /// it signs for.
    pub fn root_key(&self) -> Result<Option<([u8; 32], SvidKey)>, Refusal> {
        if !self.dir.join("root.key").exists() {
            return Ok(None);
        }
        let key = SvidKey::from_pkcs8(&self.read("root.key")?)?;
        Ok(Some((fingerprint(&self.root_der()?), key)))
    }
    /// Keeps the issuing key and what is above it, in one file that is replaced in one step: a key without its
    /// intermediate would be the end of the replica.
    pub fn put_issuer(&self, issuer: &IssuingKey) -> Result<(), Refusal> {
        let certificates = certificates_to_pem(issuer.upper().iter().map(AsRef::as_ref));
        let text = Zeroizing::new(format!("{}{certificates}", *issuer.key().pem()));
        self.write("issuer.pem.new", text.as_bytes())?;
        let (from, to) = (self.dir.join("issuer.pem.new"), self.dir.join("issuer.pem"));
        let renamed = std::fs::rename(from, &to).and_then(|()| std::fs::File::open(&self.dir)?.sync_all());
        renamed.map_err(|e| failed("a written file", &to, e))
    }
    /// The issuing key. Release 0.1 kept it in two files, which no renewal has touched.
    pub fn issuer(&self) -> Result<IssuingKey, Refusal> {
        let path = self.dir.join("issuer.pem");
        if !path.exists() {
            let key = SvidKey::from_pkcs8(&self.read("issuer.key")?)?;
            return IssuingKey::new(key, CertificateDer::from(self.read("intermediate.der")?));
        }
        let text = Zeroizing::new(self.read("issuer.pem")?);
        let text = std::str::from_utf8(&text).map_err(|e| failed("a PEM file", &path, e))?;
        let mut upper = certificates_from_pem(text)?.into_iter();
        let none = || failed("an intermediate in", &path, "none");
        let issuer = IssuingKey::new(SvidKey::from_pem(text)?, upper.next().ok_or_else(none)?)?;
        Ok(issuer.under(upper.collect()))
    }
    /// Keeps the TLS key.
    pub fn put_tls(&self, key: &SvidKey) -> Result<(), Refusal> {
        self.write("tls.key", &key.pkcs8())
    }
    /// The TLS key.
    pub fn tls(&self) -> Result<SvidKey, Refusal> {
        SvidKey::from_pkcs8(&self.read("tls.key")?)
    }
    /// The folder itself.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
    /// Keeps the record key.
    pub fn put_record(&self, record: &RecordKey) -> Result<(), Refusal> {
        self.write("record.key", record.pkcs8())
    }
    /// Keeps the wrap key of a replica without a TPM.
    pub fn put_wrap(&self, wrap: &WrapKey) -> Result<(), Refusal> {
        self.write("wrap.key", &wrap.der()?)
    }
    /// Keeps the wrap key that only the TPM opens.
    pub fn put_tpm_wrap(&self, saved: &[u8]) -> Result<(), Refusal> {
        self.write("wrap.tpm", saved)
    }
    /// The wrap key that only the TPM opens.
    pub fn tpm_wrap(&self) -> Result<Option<Vec<u8>>, Refusal> {
        if self.dir.join("wrap.tpm").exists() { self.read("wrap.tpm").map(Some) } else { Ok(None) }
    }
    /// The wrap key in a file, where there is one.
    pub fn wrap_if_there(&self) -> Result<Option<WrapKey>, Refusal> {
        if self.dir.join("wrap.key").exists() { self.wrap().map(Some) } else { Ok(None) }
    }
    /// Names of the files here that open what is sealed.
    pub fn unsealed(&self) -> Result<Vec<String>, Refusal> {
        let mut names = Vec::new();
        for file in std::fs::read_dir(&self.dir).map_err(|e| failed("a readable folder", &self.dir, e))? {
            let name = file.map_err(|e| failed("a readable folder", &self.dir, e))?.file_name();
            names.extend(name.to_str().filter(|name| opens_sealed(name)).map(str::to_owned));
        }
        Ok(names)
    }
    /// Removes every key that opens what is sealed: those of roots, and the wrap key in a file. Which were there.
    pub fn forget_unsealed(&self) -> Result<Vec<String>, Refusal> {
        let gone = self.unsealed()?;
        for name in &gone {
            let path = self.dir.join(name);
            std::fs::remove_file(&path).map_err(|e| failed("a file that can be removed", &path, e))?;
        }
        let synced = std::fs::File::open(&self.dir).and_then(|dir| dir.sync_all());
        synced.map_err(|e| failed("a written folder", &self.dir, e))?;
        Ok(gone)
    }
    /// The record key.
    pub fn record(&self) -> Result<RecordKey, Refusal> {
        RecordKey::from_pkcs8(&self.read("record.key")?)
    }
    /// The wrap key.
    pub fn wrap(&self) -> Result<WrapKey, Refusal> {
        WrapKey::from_der(&self.read("wrap.key")?)
    }
    /// Keeps the card; written last, so that its presence means that all is there.
    pub fn put_card(&self, card: &Card) -> Result<(), Refusal> {
        let bytes = serde_json::to_vec_pretty(card).map_err(|e| failed("a card in", &self.dir, e))?;
        self.write("card.json", &bytes)
    }
    /// The card.
    pub fn card(&self) -> Result<Card, Refusal> {
        serde_json::from_slice(&self.read("card.json")?).map_err(|e| failed("a readable card in", &self.dir, e))
    }
}

/// Reads a file that only its owner may read.
pub fn private(path: &Path) -> Result<Vec<u8>, Refusal> {
    owner_only(path)?;
    std::fs::read(path).map_err(|e| failed("a readable file", path, e))
}

fn owner_only(path: &Path) -> Result<(), Refusal> {
    let meta = std::fs::metadata(path).map_err(|e| failed("a file", path, e))?;
    if meta.mode() & 0o077 == 0 {
        return Ok(());
    }
    let found = format!("mode {:o}", meta.mode() & 0o777);
    Err(Refusal::new(Code::ConfigInvalid, format!("mode 600 on {}", path.display()), found))
}

/// Writes a file of mode 0600 and syncs it.
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<(), Refusal> {
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .map_err(|e| failed("a writable file", path, e))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(|e| failed("a written file", path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a crash midway, or a root that was kept meanwhile, leaves behind is found the next time.
    #[test]
    fn every_key_that_opens_what_is_sealed_is_found_and_removed() {
        let folder = std::env::temp_dir().join(format!("ambit-files-{}", std::process::id()));
        let files = Files::create(&folder).unwrap();
        let stay = ["issuer.pem", "record.key", "root.der", "tls.key", "wrap.tpm"];
        stay.iter().for_each(|name| files.write(name, b"-").unwrap());
        assert!(files.unsealed().unwrap().is_empty());
        for name in ["root.key", "wrap.key", "root-0011223344556677.key"] {
            files.write(name, b"-").unwrap();
            assert_eq!(files.unsealed().unwrap(), [name]);
            assert_eq!(files.forget_unsealed().unwrap(), [name]);
            assert!(files.unsealed().unwrap().is_empty());
        }
        let mut left: Vec<_> = std::fs::read_dir(files.dir()).unwrap().map(|f| f.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, stay);
        // A later root is kept under a name that is found.
        files.write("root.key", b"-").unwrap();
        files.put_later_root(&Root::create(&"west".parse().unwrap(), ambit_model::Stamp(1), [1; 16]).unwrap()).unwrap();
        assert_eq!(files.forget_unsealed().unwrap().len(), 2);
        std::fs::remove_dir_all(folder).unwrap();
    }
}
