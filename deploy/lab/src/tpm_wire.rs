//! The TPM commands that the lab speaks itself, as bytes over a socket (TPM 2.0 Library, part 3: 22.2, 22.4, 25.3, 28.4, 30.2).

use crate::ima::Digests;
use std::io::{Read, Write};

/// Largest command or response of a TPM (MAX_COMMAND_SIZE of the reference implementation).
pub const MESSAGE_BYTES_MAX: usize = 4096;
/// Tag, size and code of every command and response.
pub const HEADER_BYTES: usize = 10;
/// PCRs per TPM2_PCR_Read response, at most.
const READ_BATCH: u32 = 8;
/// PCRs of a PC client TPM.
pub const PCRS: u32 = 24;

const TAG_NO_SESSIONS: u16 = 0x8001;
const TAG_SESSIONS: u16 = 0x8002;
const CC_DICTIONARY_ATTACK_PARAMETERS: u32 = 0x13a;
const CC_FLUSH_CONTEXT: u32 = 0x165;
const CC_GET_CAPABILITY: u32 = 0x17a;
const CC_PCR_READ: u32 = 0x17e;
const CC_PCR_EXTEND: u32 = 0x182;
/// TPM_RH_LOCKOUT.
const LOCKOUT: u32 = 0x4000_000a;
/// What Windows gives the TPM of a machine: 32 wrong authorisations, one forgotten in ten minutes; and a day after a wrong one of
/// the lockout's owner.
const GUESSES: [u32; 3] = [32, 600, 86_400];
/// Authorisation by an empty password.
const RS_PW: u32 = 0x4000_0009;
/// TPM_CAP_HANDLES.
const CAP_HANDLES: u32 = 1;
/// First handles of transient objects and of loaded sessions (TPM_HT_TRANSIENT, TPM_HT_LOADED_SESSION).
const HANDLE_CLASSES: [u32; 2] = [0x8000_0000, 0x0200_0000];

/// A bank of PCRs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bank {
    /// SHA-1.
    Sha1,
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
}

impl Bank {
    fn algorithm(self) -> u16 {
        match self {
            Bank::Sha1 => 0x0004,
            Bank::Sha256 => 0x000b,
            Bank::Sha384 => 0x000c,
        }
    }
}

/// The TPM did not answer as it should.
#[derive(Debug, thiserror::Error)]
pub enum TpmError {
    /// The socket failed.
    #[error("TPM socket failed")]
    Io(#[from] std::io::Error),
    /// The TPM answered a code.
    #[error("TPM command {command:#x} answered {code:#x}")]
    Code {
        /// TPM_CC.
        command: u32,
        /// TPM_RC.
        code: u32,
    },
    /// The answer is not one.
    #[error("TPM response malformed: {0}")]
    Malformed(&'static str),
}

/// Extends one PCR in the three banks at once.
pub fn extend(tpm: &mut (impl Read + Write), pcr: u32, digests: &Digests) -> Result<(), TpmError> {
    let mut body = authorised(pcr);
    body.extend_from_slice(&3u32.to_be_bytes());
    let values: [(Bank, &[u8]); 3] =
        [(Bank::Sha1, &digests.sha1), (Bank::Sha256, &digests.sha256), (Bank::Sha384, &digests.sha384)];
    for (bank, digest) in values {
        body.extend_from_slice(&bank.algorithm().to_be_bytes());
        body.extend_from_slice(digest);
    }
    call(tpm, TAG_SESSIONS, CC_PCR_EXTEND, &body).map(drop)
}

/// Sets how many wrong authorisations lock the TPM. A power loss counts as one where a key was used since the start (part 1,
/// 19.8), and swtpm, as it is made, bears three.
pub fn limit_guesses(tpm: &mut (impl Read + Write)) -> Result<(), TpmError> {
    let mut body = authorised(LOCKOUT);
    GUESSES.iter().for_each(|value| body.extend_from_slice(&value.to_be_bytes()));
    call(tpm, TAG_SESSIONS, CC_DICTIONARY_ATTACK_PARAMETERS, &body).map(drop)
}

/// A handle, and an empty password for it.
fn authorised(handle: u32) -> Vec<u8> {
    let mut body = Vec::with_capacity(160);
    body.extend_from_slice(&handle.to_be_bytes());
    body.extend_from_slice(&9u32.to_be_bytes());
    body.extend_from_slice(&RS_PW.to_be_bytes());
    body.extend_from_slice(&[0; 5]); // empty nonce, no attributes, empty password
    body
}

/// The values of all 24 PCRs of a bank.
pub fn read_pcrs(tpm: &mut (impl Read + Write), bank: Bank) -> Result<Vec<Vec<u8>>, TpmError> {
    let mut values = Vec::with_capacity(24);
    for first in (0..PCRS).step_by(READ_BATCH as usize) {
        let mask = (0xffu32 << first).to_le_bytes();
        let mut body = 1u32.to_be_bytes().to_vec();
        body.extend_from_slice(&bank.algorithm().to_be_bytes());
        body.push(3);
        body.extend_from_slice(&mask[..3]);
        let answer = call(tpm, TAG_NO_SESSIONS, CC_PCR_READ, &body)?;
        // Update counter 4, selection count 4, one selection 6, then the digests.
        let mut rest = answer.get(14..).ok_or(TpmError::Malformed("PCR selection"))?;
        let count = take_u32(&mut rest)?;
        if count != READ_BATCH {
            return Err(TpmError::Malformed("the bank is not active"));
        }
        for _ in 0..count {
            values.push(take_sized(&mut rest)?.to_vec());
        }
    }
    Ok(values)
}

/// Flushes every transient object and loaded session: what the kernel's resource manager does for a process that died.
pub fn flush_all(tpm: &mut (impl Read + Write)) -> Result<usize, TpmError> {
    let mut flushed = 0;
    for first in HANDLE_CLASSES {
        let mut body = CAP_HANDLES.to_be_bytes().to_vec();
        body.extend_from_slice(&first.to_be_bytes());
        body.extend_from_slice(&16u32.to_be_bytes());
        let answer = call(tpm, TAG_NO_SESSIONS, CC_GET_CAPABILITY, &body)?;
        let mut rest = answer.get(5..).ok_or(TpmError::Malformed("capability"))?;
        for _ in 0..take_u32(&mut rest)?.min(16) {
            let handle = take_u32(&mut rest)?;
            call(tpm, TAG_NO_SESSIONS, CC_FLUSH_CONTEXT, &handle.to_be_bytes())?;
            flushed += 1;
        }
    }
    Ok(flushed)
}

fn call(tpm: &mut (impl Read + Write), tag: u16, command: u32, body: &[u8]) -> Result<Vec<u8>, TpmError> {
    let size = u32::try_from(HEADER_BYTES + body.len()).map_err(|_| TpmError::Malformed("command too long"))?;
    let mut message = tag.to_be_bytes().to_vec();
    message.extend_from_slice(&size.to_be_bytes());
    message.extend_from_slice(&command.to_be_bytes());
    message.extend_from_slice(body);
    tpm.write_all(&message)?;
    let answer = read_message(tpm)?;
    let code = answer.get(6..10).and_then(|b| b.try_into().ok()).map(u32::from_be_bytes);
    match code {
        Some(0) => Ok(answer.get(HEADER_BYTES..).unwrap_or_default().to_vec()),
        Some(code) => Err(TpmError::Code { command, code }),
        None => Err(TpmError::Malformed("header")),
    }
}

/// Reads one command or response, header included. The error is `UnexpectedEof` if the peer closed before it.
pub fn read_message(stream: &mut impl Read) -> std::io::Result<Vec<u8>> {
    let mut message = vec![0; HEADER_BYTES];
    stream.read_exact(&mut message)?;
    let size = message.get(2..6).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes);
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    if !(HEADER_BYTES..=MESSAGE_BYTES_MAX).contains(&size) {
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, "TPM message of impossible size"));
    }
    message.resize(size, 0);
    stream.read_exact(message.get_mut(HEADER_BYTES..).unwrap_or_default())?;
    Ok(message)
}

fn take_u32(rest: &mut &[u8]) -> Result<u32, TpmError> {
    let (bytes, after) = rest.split_first_chunk::<4>().ok_or(TpmError::Malformed("cut short"))?;
    *rest = after;
    Ok(u32::from_be_bytes(*bytes))
}

fn take_sized<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], TpmError> {
    let (bytes, after) = rest.split_first_chunk::<2>().ok_or(TpmError::Malformed("cut short"))?;
    let (data, after) =
        after.split_at_checked(u16::from_be_bytes(*bytes).into()).ok_or(TpmError::Malformed("cut short"))?;
    *rest = after;
    Ok(data)
}
