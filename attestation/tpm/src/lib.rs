//! The attester of RFC 9334: the one place that talks to a TPM 2.0.
//!
//! It finds the EK and its certificate (RSA-2048, P-256, P-384 or RSA-3072), keeps one AK below it, activates
//! credentials, quotes PCRs, and makes keys for SVIDs that the AK certifies. What leaves it are raw TPM structures.
//!
//! It must never decide whether a machine is trustworthy, never speak to the network, and never let a TPM object that
//! it loaded outlive the operation: TPMs have as few as three slots.
//!
//! A TPM is slow, takes one command at a time, and may stop answering: one OS thread owns all work, a second one watches
//! its deadlines, and [`Attester`] is the handle to both. The connection is opened for each operation, because a
//! software TPM serves one client at a time and others (an IMA stand-in, an operator's tool) need their turn.
#![warn(missing_docs)]

mod ak_file;
mod answer;
mod error;
mod keys;
mod options;
mod svid_key;
mod tpm;
mod worker;
mod wrap_key;

pub use error::TpmError;
pub use options::{AkKind, CREATION_MAX, EkChoice, EkKind, LOCKOUT_REST, OPERATION_MAX, Options};
pub use svid_key::TpmKey;
pub use wrap_key::TpmWrapKey;

use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};
use tpm::Tpm;
use worker::{Request, Work};
use zeroize::Zeroizing;

/// Requests that may wait for the TPM. More would only wait longer: a TPM makes a handful of signatures a second.
const QUEUE_MAX: usize = 16;

/// A PCR bank to quote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bank {
    /// The SHA-256 bank.
    Sha256,
    /// The SHA-384 bank.
    Sha384,
}

impl Bank {
    /// The bank named `sha256` or `sha384`, as challenges name it.
    pub fn from_text(s: &str) -> Option<Bank> {
        match s {
            "sha256" => Some(Bank::Sha256),
            "sha384" => Some(Bank::Sha384),
            _ => None,
        }
    }
}

/// What this TPM is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TpmIdentity {
    /// The EK certificate as it is in NV (DER, maybe padded), if there is one.
    pub ek_certificate: Option<Vec<u8>>,
    /// TPMT_PUBLIC of the EK.
    pub ek_public: Vec<u8>,
    /// TPMT_PUBLIC of the AK.
    pub ak_public: Vec<u8>,
}

/// A quote, as raw TPM structures.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quote {
    /// TPMS_ATTEST.
    pub attest: Vec<u8>,
    /// TPMT_SIGNATURE.
    pub signature: Vec<u8>,
    /// Index and value of each PCR quoted, ascending: the very values that the quote covers.
    pub pcrs: Vec<(u32, Vec<u8>)>,
}

/// A key that the AK certified, as raw TPM structures.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certified {
    /// TPMT_PUBLIC of the key.
    pub public: Vec<u8>,
    /// TPMS_ATTEST of TPM2_Certify.
    pub attest: Vec<u8>,
    /// TPMT_SIGNATURE of the AK.
    pub signature: Vec<u8>,
}

/// Handle to the threads that own the TPM. They end when the last handle is dropped.
#[derive(Clone, Debug)]
pub struct Attester {
    requests: mpsc::Sender<Request>,
    operation_max: Duration,
    creation_max: Duration,
}

impl Attester {
    /// [`Attester::start`] with the usual keys and limits.
    pub fn open(tcti: &str, state_dir: &Path) -> Result<Attester, TpmError> {
        Self::start(Options::new(tcti, state_dir))
    }

    /// Starts the threads. Nothing is asked of the TPM yet: the first operation creates the AK if there is none.
    pub fn start(options: Options) -> Result<Attester, TpmError> {
        let tcti = options.tcti()?;
        let (operation_max, creation_max) = (options.operation_max, options.creation_max);
        // Bounded: a full queue makes callers wait, and each of them has one request at most.
        let (requests, queue) = mpsc::channel(QUEUE_MAX);
        let serve = move || worker::serve(queue, &options, &tcti);
        std::thread::Builder::new()
            .name("tpm-foreman".into())
            .spawn(serve)
            .map_err(|source| TpmError::Thread { source })?;
        Ok(Attester { requests, operation_max, creation_max })
    }

    /// The EK certificate, the EK and the AK.
    pub async fn identity(&self) -> Result<TpmIdentity, TpmError> {
        self.ask("give its identity", self.creation_max, Tpm::identity).await
    }

    /// Opens a credential made for this EK and this AK: TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET.
    pub async fn activate(
        &self,
        credential_blob: Vec<u8>,
        encrypted_secret: Vec<u8>,
    ) -> Result<Zeroizing<Vec<u8>>, TpmError> {
        let work = move |tpm: &mut Tpm, due| tpm.activate(&credential_blob, &encrypted_secret, due);
        self.operate("activate the credential", work).await
    }

    /// Quotes exactly the PCRs of `pcr_mask` (bit n is PCR n) in `bank`. Read the IMA log after this, never before: a
    /// log longer than the quote is accepted by the verifier, a shorter one is not.
    pub async fn quote(&self, bank: Bank, pcr_mask: u32, qualifying: [u8; 32]) -> Result<Quote, TpmError> {
        self.operate("quote", move |tpm, due| tpm.quote(bank, pcr_mask, qualifying, due)).await
    }

    /// Makes a P-256 key for an SVID. It lives as long as what this returns.
    pub async fn create_key(&self) -> Result<TpmKey, TpmError> {
        let key = self.ask("create a key", self.creation_max, Tpm::create_key).await?;
        TpmKey::new(self.clone(), key)
    }

    /// Makes a P-256 key to which others wrap. It lives as long as somebody keeps [`TpmWrapKey::saved`].
    pub async fn create_wrap_key(&self) -> Result<TpmWrapKey, TpmError> {
        let key = self.ask("create a wrap key", self.creation_max, Tpm::create_wrap_key).await?;
        TpmWrapKey::new(self.clone(), key)
    }

    /// The wrap key of [`TpmWrapKey::saved`]. Nothing is asked of the TPM yet.
    pub fn wrap_key(&self, saved: &[u8]) -> Result<TpmWrapKey, TpmError> {
        TpmWrapKey::read(self.clone(), saved)
    }

    async fn operate<T: Send + 'static>(
        &self,
        operation: &'static str,
        work: impl FnOnce(&mut Tpm, Instant) -> Result<T, TpmError> + Send + 'static,
    ) -> Result<T, TpmError> {
        self.ask(operation, self.operation_max, work).await
    }

    async fn ask<T: Send + 'static>(
        &self,
        operation: &'static str,
        limit: Duration,
        work: impl FnOnce(&mut Tpm, Instant) -> Result<T, TpmError> + Send + 'static,
    ) -> Result<T, TpmError> {
        let due = Instant::now() + limit;
        let (reply, answer) = oneshot::channel();
        let work: Work = Box::new(move |tpm| {
            // A caller that went away wants nothing of the TPM.
            if !reply.is_closed() {
                // It may still go away meanwhile.
                drop(reply.send(tpm.and_then(|(tpm, due)| work(tpm, due))));
            }
        });
        let asked = async {
            self.requests.send(Request { operation, due, limit, work }).await.map_err(|_| TpmError::Stopped)?;
            answer.await.map_err(|_| TpmError::Stopped)?
        };
        tokio::time::timeout_at(due.into(), asked).await.map_err(|_| TpmError::TimedOut { operation, limit })?
    }

    fn operate_blocking<T: Send + 'static>(
        &self,
        operation: &'static str,
        work: impl FnOnce(&mut Tpm, Instant) -> Result<T, TpmError> + Send + 'static,
    ) -> Result<T, TpmError> {
        let limit = self.operation_max;
        let due = Instant::now() + limit;
        let (reply, answer) = sync_channel(1);
        let work: Work = Box::new(move |tpm| drop(reply.send(tpm.and_then(|(tpm, due)| work(tpm, due)))));
        // Never waits for the queue: whoever cannot await must not be held up behind sixteen others.
        match self.requests.try_send(Request { operation, due, limit, work }) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => return Err(TpmError::Busy { operation }),
            Err(TrySendError::Closed(_)) => return Err(TpmError::Stopped),
        }
        answer.recv_timeout(limit).map_err(|e| match e {
            RecvTimeoutError::Timeout => TpmError::TimedOut { operation, limit },
            RecvTimeoutError::Disconnected => TpmError::Stopped,
        })?
    }
}
