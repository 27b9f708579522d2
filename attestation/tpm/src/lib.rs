//! The attester of RFC 9334: the one place that talks to a TPM 2.0.
//!
//! It finds the EK (RSA-2048, the low-range template that every PC Client TPM has a certificate for), keeps one AK
//! (P-256, ECDSA with SHA-256) below it, activates credentials and quotes PCRs. What leaves it are raw TPM structures.
//!
//! It must never decide whether a machine is trustworthy, never speak to the network, and never let a TPM object that
//! it loaded outlive the operation: TPMs have as few as three slots.
//!
//! A TPM is slow and takes one command at a time, so one OS thread owns all work; [`Attester`] is the handle to it. The
//! connection is opened for each operation, because a software TPM serves one client at a time and others (an IMA
//! stand-in, an operator's tool) need their turn.
#![warn(missing_docs)]

mod ak_file;
mod error;
mod tpm;

pub use error::TpmError;

use std::path::{Path, PathBuf};
use tokio::sync::{mpsc, oneshot};
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

enum Request {
    Identity(oneshot::Sender<Result<TpmIdentity, TpmError>>),
    Activate(Vec<u8>, Vec<u8>, oneshot::Sender<Result<Zeroizing<Vec<u8>>, TpmError>>),
    Quote(Bank, u32, [u8; 32], oneshot::Sender<Result<Quote, TpmError>>),
}

/// Handle to the thread that owns the TPM. The thread ends when the last handle is dropped.
#[derive(Clone, Debug)]
pub struct Attester {
    requests: mpsc::Sender<Request>,
}

impl Attester {
    /// Starts the thread. `tcti` names the TPM as tpm2-tools do (`device:/dev/tpmrm0`, `swtpm:host=127.0.0.1,port=2321`);
    /// `state_dir` exists and keeps the AK's wrapped key, which is of no use outside of this TPM. Nothing is asked of
    /// the TPM yet: the first operation creates the AK if there is none.
    pub fn open(tcti: &str, state_dir: &Path) -> Result<Attester, TpmError> {
        let mut tpm = tpm::Tpm::new(tcti, PathBuf::from(state_dir))?;
        // Bounded: a full queue makes callers wait, and each of them has one request at most.
        let (requests, mut queue) = mpsc::channel(QUEUE_MAX);
        let serve = move || {
            while let Some(request) = queue.blocking_recv() {
                // A caller that went away does not want its answer.
                match request {
                    Request::Identity(reply) => drop(reply.send(tpm.identity())),
                    Request::Activate(blob, secret, reply) => drop(reply.send(tpm.activate(&blob, &secret))),
                    Request::Quote(bank, mask, data, reply) => drop(reply.send(tpm.quote(bank, mask, data))),
                }
            }
        };
        std::thread::Builder::new().name("tpm".into()).spawn(serve).map_err(|source| TpmError::Thread { source })?;
        Ok(Attester { requests })
    }

    /// The EK certificate, the EK and the AK.
    pub async fn identity(&self) -> Result<TpmIdentity, TpmError> {
        self.ask(Request::Identity).await
    }

    /// Opens a credential made for this EK and this AK: TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET.
    pub async fn activate(
        &self,
        credential_blob: Vec<u8>,
        encrypted_secret: Vec<u8>,
    ) -> Result<Zeroizing<Vec<u8>>, TpmError> {
        self.ask(|reply| Request::Activate(credential_blob, encrypted_secret, reply)).await
    }

    /// Quotes exactly the PCRs of `pcr_mask` (bit n is PCR n) in `bank`. Read the IMA log after this, never before: a
    /// log longer than the quote is accepted by the verifier, a shorter one is not.
    pub async fn quote(&self, bank: Bank, pcr_mask: u32, qualifying: [u8; 32]) -> Result<Quote, TpmError> {
        self.ask(|reply| Request::Quote(bank, pcr_mask, qualifying, reply)).await
    }

    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T, TpmError>>) -> Request,
    ) -> Result<T, TpmError> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(request(reply)).await.map_err(|_| TpmError::Stopped)?;
        answer.await.map_err(|_| TpmError::Stopped)?
    }
}
