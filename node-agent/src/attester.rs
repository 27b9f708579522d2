//! The node's TPM, as enrolment needs it.

use crate::config::Config;
use ambit_model::{Code, Refusal};
use zeroize::Zeroizing;

/// EK and AK, as the cell needs them.
#[derive(Clone, Debug)]
pub struct TpmIdentity {
    /// DER as read from NV; empty where the TPM holds none.
    pub ek_certificate: Vec<u8>,
    /// Further certificates of its chain.
    pub ek_intermediates: Vec<Vec<u8>>,
    /// TPMT_PUBLIC.
    pub ek_public: Vec<u8>,
    /// TPMT_PUBLIC.
    pub ak_public: Vec<u8>,
}

/// A quote with the PCR values that it covers.
#[derive(Clone, Debug)]
pub struct Quoted {
    /// TPMS_ATTEST.
    pub attest: Vec<u8>,
    /// TPMT_SIGNATURE.
    pub signature: Vec<u8>,
    /// Index and value.
    pub pcrs: Vec<(u32, Vec<u8>)>,
}

/// The attester.
#[derive(Clone, Debug)]
pub struct Attester {}

impl Attester {
    /// Opens the TPM that the configuration names.
    pub fn open(_config: &Config) -> Result<Self, Refusal> {
        Ok(Self {})
    }
    /// Reads or makes EK and AK.
    pub async fn identity(&self) -> Result<TpmIdentity, Refusal> {
        Err(Refusal::new(Code::Unimplemented, "a TPM", "ambit-tpm is not there yet"))
    }
    /// Opens the credential that only this TPM can open.
    pub async fn activate(&self, _blob: &[u8], _secret: &[u8]) -> Result<Zeroizing<Vec<u8>>, Refusal> {
        Err(Refusal::new(Code::Unimplemented, "a TPM", "ambit-tpm is not there yet"))
    }
    /// Quotes exactly the bank and PCRs asked.
    pub async fn quote(&self, _qualifying: &[u8; 32], _bank: &str, _mask: u32) -> Result<Quoted, Refusal> {
        Err(Refusal::new(Code::Unimplemented, "a TPM", "ambit-tpm is not there yet"))
    }
}
