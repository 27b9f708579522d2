//! The keys to which others wrap what this replica may open: in its TPM, in a file, or, after it got a TPM, both.
//!
//! A TPM may be slow, hang or be replaced. Whoever needs it waits for it with a deadline and on no thread that others need,
//! and is told `issuer_unavailable`: then this replica opens nothing, and another does.

use super::files::Files;
use crate::config::{Config, TpmConfig};
use ambit_identity::wrap::{Purpose, WrapKey, agreed_with, unwrap_agreed};
use ambit_model::{Code, Refusal};
use ambit_tpm::{Attester, Options, TpmError, TpmWrapKey};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use zeroize::Zeroizing;

/// A hardware TPM agrees in a fifth of a second to a second, and derives an RSA EK in seconds. Whoever waits longer had better
/// ask another replica.
const OPERATION_MAX: Duration = Duration::from_secs(10);
/// Making an RSA EK or a first key takes slow TPMs most of a minute; nobody waits five for one that hangs.
const CREATION_MAX: Duration = Duration::from_secs(90);

/// What this replica opens with.
pub struct Keyring {
    tpm: Option<InTpm>,
    file: Mutex<Option<WrapKey>>,
}

struct InTpm {
    attester: Attester,
    key: TpmWrapKey,
}

/// A TPM that does not answer, or that holds another key, opens nothing: what is asked of this replica another may do.
pub fn unanswered(e: &TpmError) -> Refusal {
    let mut text = e.to_string();
    let mut source = std::error::Error::source(e);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    Refusal::new(Code::IssuerUnavailable, "this replica's TPM, with its own wrap key", text)
}

/// The attester of this replica's TPM; its AK is kept among the replica's files.
fn attester(at: &TpmConfig, files: &Files) -> Result<Attester, Refusal> {
    let mut options = Options::new(&at.tcti, files.dir());
    options.ek = at.ek;
    options.ak = at.ak;
    options.operation_max = OPERATION_MAX;
    options.creation_max = CREATION_MAX;
    Attester::start(options).map_err(|e| Refusal::new(Code::ConfigInvalid, "tpm as tpm2-tools name it", e.to_string()))
}

impl Keyring {
    /// Makes the key of a new replica: in its TPM where it has one.
    pub async fn create(config: &Config, files: &Files) -> Result<Keyring, Refusal> {
        let Some(at) = &config.tpm else {
            let key = WrapKey::generate()?;
            files.put_wrap(&key)?;
            return Ok(Keyring { tpm: None, file: Mutex::new(Some(key)) });
        };
        Ok(Keyring { tpm: Some(InTpm::create(at, files).await?), file: Mutex::new(None) })
    }

    /// What the replica has; where it was given a TPM since, with a key in that too, which the cell learns of when it attests.
    /// A TPM that does not answer now keeps no replica from starting.
    pub async fn open(config: &Config, files: &Files) -> Result<Keyring, Refusal> {
        let file = files.wrap_if_there()?;
        let tpm = match (&config.tpm, files.tpm_wrap()?) {
            (None, _) => None,
            (Some(at), Some(saved)) => {
                let attester = attester(at, files)?;
                let key = attester.wrap_key(&saved).map_err(|e| unanswered(&e))?;
                Some(InTpm { attester, key })
            }
            (Some(at), None) => match InTpm::create(at, files).await {
                Ok(made) => Some(made),
                Err(refusal) => {
                    tracing::error!(%refusal, "no wrap key in the TPM: the one in the file stays until the next start");
                    None
                }
            },
        };
        if tpm.is_none() && file.is_none() {
            let expected = "a wrap key: tpm in the configuration, as when it was made, or wrap.key";
            return Err(Refusal::new(Code::ConfigInvalid, expected, "neither"));
        }
        Ok(Keyring { tpm, file: Mutex::new(file) })
    }

    /// The point that a new replica is recorded with.
    pub fn public(&self) -> Result<Vec<u8>, Refusal> {
        match (&self.tpm, &*self.file()) {
            (Some(tpm), _) => Ok(tpm.key.point().to_vec()),
            (None, Some(file)) => file.public(),
            (None, None) => Err(Refusal::new(Code::Internal, "a wrap key", "none")),
        }
    }

    fn file(&self) -> MutexGuard<'_, Option<WrapKey>> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets the key that was in a file.
    pub fn forget_file(&self) {
        drop(self.file().take());
    }

    /// The TPM and the key in it.
    pub fn in_tpm(&self) -> Option<(&Attester, &TpmWrapKey)> {
        self.tpm.as_ref().map(|tpm| (&tpm.attester, &tpm.key))
    }

    /// Opens what was wrapped to this replica, with whichever key it was wrapped to.
    ///
    /// # Errors
    /// [`Code::IssuerUnavailable`] where none opens it.
    pub async fn unwrap_for(&self, purpose: Purpose, wrapped: &[u8]) -> Result<Zeroizing<Vec<u8>>, Refusal> {
        let none = |found: String| Refusal::new(Code::IssuerUnavailable, "a key wrapped to this replica", found);
        let by_file = self.file().as_ref().and_then(|file| file.unwrap_for(purpose, wrapped).ok());
        if let Some(opened) = by_file {
            return Ok(opened);
        }
        let Some(tpm) = &self.tpm else { return Err(none("one wrapped to another key".into())) };
        let agreed = tpm.key.agree(*agreed_with(wrapped)?).await.map_err(|e| unanswered(&e))?;
        unwrap_agreed(purpose, wrapped, &agreed).map_err(|_| none("one wrapped to another TPM's key".into()))
    }

    /// Whether the key in the TPM alone opens it.
    pub async fn tpm_opens(&self, purpose: Purpose, wrapped: &[u8]) -> Result<Zeroizing<Vec<u8>>, Refusal> {
        let tpm = self.tpm.as_ref().ok_or_else(|| Refusal::new(Code::IssuerUnavailable, "a TPM", "none configured"))?;
        let agreed = tpm.key.agree(*agreed_with(wrapped)?).await.map_err(|e| unanswered(&e))?;
        unwrap_agreed(purpose, wrapped, &agreed)
    }
}

impl InTpm {
    async fn create(at: &TpmConfig, files: &Files) -> Result<InTpm, Refusal> {
        let attester = attester(at, files)?;
        let key = attester.create_wrap_key().await.map_err(|e| unanswered(&e))?;
        files.put_tpm_wrap(&key.saved().map_err(|e| unanswered(&e))?)?;
        Ok(InTpm { attester, key })
    }
}
