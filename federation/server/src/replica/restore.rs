//! `ambitd restore`: a cell begins anew on an empty machine, from a backup and the root's key, which is kept apart.
//!
//! Everything else is made anew under the root: issuing key, TLS key, record key, wrap key. The old ones are not needed,
//! and are not to be trusted where a whole cell was lost.

use super::backup::Backup;
use super::blobs::{Blobs, Keep};
use super::files::{Card, Files, failed, private};
use super::found::{put_admin, start_failed};
use super::keyring::Keyring;
use super::wall_clock;
use crate::config::Config;
use crate::raft::rebase::found_on;
use crate::store::Folder;
use ambit_identity::keys::certificates_from_pem;
use ambit_identity::{Csr, IssuingKey, RecordKey, Root, RootShare, SvidKey, share};
use ambit_model::{Code, Refusal, ReplicaId, TrustDomain};
use ambit_state::objects::{Cause, Member};
use ambit_state::{Beginning, State};
use rustls_pki_types::CertificateDer;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use zeroize::Zeroizing;

/// A machine's clock may be this far behind the backup's last entry.
const CLOCK_BEHIND_MS_MAX: u64 = super::CLOCK_SKEW_MS_MAX;

/// What `ambitd restore` was told.
pub struct Restore<'a> {
    /// The cell's trust domain.
    pub trust_domain: &'a TrustDomain,
    /// Its root's fingerprint, from elsewhere than the backup.
    pub fingerprint: [u8; 32],
    /// The backup.
    pub snapshot: &'a Path,
    /// The root's private key, kept apart from backups.
    pub root_key: RootKey<'a>,
    /// The highest epoch that the cell is known to have had; 0: the backup's.
    pub past_epoch: u64,
    /// The number that this replica gets.
    pub replica: u64,
    /// The authority under an external root certified anew (PEM), where the certificate in the backup ended.
    pub external: Option<&'a Path>,
    /// Folder for the administrator's context, certificate and key.
    pub admin_out: &'a Path,
}

/// How the root's key was kept.
pub enum RootKey<'a> {
    /// In a file (PKCS#8).
    File(&'a Path),
    /// In recovery shares, a file each.
    Shares(&'a [PathBuf]),
}

/// What was restored.
pub struct Restored {
    index: u64,
    digest: [u8; 32],
    epoch: u64,
    began_at: u64,
    given_up: Vec<u64>,
    missing: Vec<[u8; 32]>,
    took: Duration,
}

/// Restores. Refuses a folder that holds anything of a replica, a damaged file, another cell's, and another root's key.
pub async fn restore(config: &Config, r: &Restore<'_>) -> Result<Restored, Refusal> {
    let started = Instant::now();
    let held = ["identity", "log", "snapshot", "tables"].iter().find(|part| config.data_dir.join(part).exists());
    if let Some(part) = held {
        let found = format!("{} in {}", part, config.data_dir.display());
        return Err(Refusal::new(Code::AlreadyExists, "an empty data_dir", found));
    }
    if r.replica == 0 || r.replica > crate::services::REPLICA_MAX {
        let expected = format!("a replica of 1-{}", crate::services::REPLICA_MAX);
        return Err(Refusal::new(Code::BadRequest, expected, r.replica.to_string()));
    }
    let mut backup = Backup::open(r.snapshot, r.trust_domain, &r.fingerprint)?;
    let (index, digest) = (backup.header.index, backup.whole.state.digest());
    certify_anew(&mut backup.whole.state, r.external)?;
    let root = root_of(&backup.whole.state, r)?;
    check_clock(&backup.whole.state)?;
    let restored = begin_anew(config, r, &mut backup, &root, (index, digest), started).await;
    if restored.is_err() {
        Files::remove_aside(&config.data_dir);
        // Nothing of it was here before, and without an identity none of it is anybody's.
        for part in ["log", "snapshot", "tables"].map(|part| config.data_dir.join(part)) {
            if !config.data_dir.join("identity").exists() && part.exists() {
                std::fs::remove_dir_all(&part).map_err(|e| failed("a writable folder", &part, e))?;
            }
        }
    }
    restored
}

async fn begin_anew(
    config: &Config,
    r: &Restore<'_>,
    backup: &mut Backup,
    root: &Root,
    (index, digest): (u64, [u8; 32]),
    started: Instant,
) -> Result<Restored, Refusal> {
    let (issuer_key, tls) = (SvidKey::generate()?, SvidKey::generate()?);
    let (issuer_csr, tls_csr) = (Csr::parse(&issuer_key.csr()?)?, Csr::parse(&tls.csr()?)?);
    let record = RecordKey::generate()?;
    // A TPM that does not answer leaves the folder as it was: the same again is a try anew.
    let files = Files::create_aside(&config.data_dir)?;
    let keyring = Keyring::create(config, &files).await?;
    let beginning = Beginning {
        cause: Cause::Restored,
        replica: r.replica,
        member: Member {
            address: config.listen.to_string(),
            authority: ambit_identity::authority::authority_id(&issuer_csr),
            authority_not_after: Default::default(),
            wrap_key: keyring.public()?,
            record_key: record.public(),
        },
        admit: Some((issuer_csr.spki_sha256(), tls_csr.spki_sha256())),
        past_epoch: r.past_epoch,
        // Only the new key: what the lost replicas signed last is not to be followed by more.
        keys: Some(super::key_set::of_one(&backup.whole.state, root, record.public(), r.past_epoch)?),
    };
    let admission = backup.whole.state.begin_incarnation(wall_clock(), beginning)?;
    let admission = admission.ok_or_else(|| Refusal::new(Code::Internal, "an admission", "none"))?;
    let issuer = IssuingKey::new(issuer_key, root.intermediate(&admission, &issuer_csr)?)?.under(root.above().to_vec());

    files.put_root(root)?;
    files.put_issuer(&issuer)?;
    files.put_tls(&tls)?;
    files.put_record(&record)?;
    let blobs = Blobs::open(config.data_dir.join("blobs"))?;
    backup.lists(|list| blobs.put(Keep::AllowList, &list).map(drop))?;
    put_admin(r.admin_out, config, r.trust_domain, root, &issuer)?;
    found_on(&Folder(config.data_dir.clone()), ReplicaId(r.replica), &backup.whole).map_err(start_failed)?;
    let state = &backup.whole.state;
    let (epoch, given_up) =
        state.incarnations().next_back().map(|(e, row)| (e, row.given_up.clone())).unwrap_or_default();
    files.put_card(&Card { trust_domain: r.trust_domain.clone(), replica: r.replica, epoch, members: Vec::new() })?;
    let began_at = state.applied().0;
    // Last, and in one step: what has an identity is whole.
    files.placed(&config.data_dir)?;
    let missing = std::mem::take(&mut backup.missing);
    Ok(Restored { index, digest, epoch, began_at, given_up, missing, took: started.elapsed() })
}

/// What the outside CA signed once more, where it is given.
pub(super) fn certify_anew(state: &mut State, file: Option<&Path>) -> Result<(), Refusal> {
    let Some(file) = file else { return Ok(()) };
    let text = std::fs::read_to_string(file).map_err(|e| failed("a readable file", file, e))?;
    let root = state.active_root().map(|(_, row)| row.der).unwrap_or_default();
    let chain = certificates_from_pem(&text)?.into_iter().map(|der| der.to_vec());
    state.certify_anew(chain.filter(|der| *der != root).collect(), wall_clock())
}

fn root_of(state: &State, r: &Restore<'_>) -> Result<Root, Refusal> {
    let cell = state.cell().ok_or_else(|| Refusal::new(Code::BackupDamaged, "a founded cell", "an empty one"))?;
    let der = CertificateDer::from(cell.root_der.clone());
    // Under an external root the key is that of the cell's authority.
    let active = state.active_root().and_then(|(id, _)| super::authority::kept(state, &id));
    let above = active.map(|(_, above)| above).unwrap_or_default();
    match r.root_key {
        RootKey::File(path) => {
            Root::standing(r.trust_domain, der, above, SvidKey::from_pkcs8(&Zeroizing::new(private(path)?))?)
        }
        RootKey::Shares(paths) => {
            let read = |path: &PathBuf| RootShare::parse(&Zeroizing::new(private(path)?));
            let shares = paths.iter().map(read).collect::<Result<Vec<_>, Refusal>>()?;
            share::recover(r.trust_domain, der, above, &shares)
        }
    }
}

/// A clock far behind would let nothing be signed until it caught up with the cell's time, which does not go back.
fn check_clock(state: &State) -> Result<(), Refusal> {
    let (cell, here) = (state.stamp(), wall_clock());
    if here.plus_ms(CLOCK_BEHIND_MS_MAX) >= cell {
        return Ok(());
    }
    let found = format!("a clock {} ms behind it", cell.0.saturating_sub(here.0));
    Err(Refusal::new(Code::ConfigInvalid, "a clock that is past the backup's last entry", found))
}

impl fmt::Display for Restored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "restored:    index {}, digest {}", self.index, hex::encode(self.digest))?;
        writeln!(f, "incarnation: epoch {}, one voter, from index {}", self.epoch, self.began_at)?;
        writeln!(f, "given up:    {}", super::recover::numbers(&self.given_up))?;
        writeln!(f, "time:        {:.1} ms", self.took.as_secs_f64() * 1000.0)?;
        for sha256 in &self.missing {
            writeln!(f, "missing:     allow-list {} (ambit attest policy apply --ima-list)", hex::encode(sha256))?;
        }
        writeln!(
            f,
            "next:        ambitd run; then add replicas (ambit raft add), wipe what is left of the old ones, and"
        )?;
        write!(
            f,
            "             let nodes attest: until its own verdict no node gets an SVID. Tokens and tickets are void."
        )
    }
}
