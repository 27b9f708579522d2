//! What can fail between this machine and its TPM.

use std::path::PathBuf;
use std::time::Duration;

fn seconds(d: Duration) -> String {
    format!("{:.1} s", d.as_secs_f32())
}

/// An operation of the attester that failed.
#[derive(Debug, thiserror::Error)]
pub enum TpmError {
    /// The TCTI configuration names no TPM.
    #[error("'{tcti}' names no TPM; write it as device:/dev/tpmrm0, tabrmd: or swtpm:host=127.0.0.1,port=2321")]
    Tcti {
        /// As configured.
        tcti: String,
        /// From the TSS.
        source: tss_esapi::Error,
    },
    /// A TCTI that is known and not served.
    #[error("'{tcti}' is a simulator that Ambit does not support; use device, tabrmd or swtpm")]
    TctiRefused {
        /// As configured.
        tcti: String,
    },
    /// The TPM cannot be reached.
    #[error("no TPM answers at '{tcti}'; is it there, and may this process open it?")]
    Unreachable {
        /// As configured.
        tcti: String,
        /// From the TSS.
        source: tss_esapi::Error,
    },
    /// A TPM command failed.
    #[error("the TPM refused to {operation}")]
    Command {
        /// What was asked.
        operation: &'static str,
        /// From the TPM.
        source: tss_esapi::Error,
    },
    /// The TPM counts too many failed authorisations (TPM_RC_LOCKOUT) and refuses every key under that protection.
    #[error(
        "the TPM is in dictionary-attack lockout and refused to {operation}; it is left alone for {}; find out who \
         guesses, and wait for its recovery time or clear it with the lockout authorisation",
        seconds(*rest)
    )]
    Lockout {
        /// What was asked.
        operation: &'static str,
        /// How long the TPM will not be asked again.
        rest: Duration,
    },
    /// No answer in time. The TPM may still be at work; what it answers later is dropped.
    #[error("the TPM did not {operation} within {}", seconds(*limit))]
    TimedOut {
        /// What was asked.
        operation: &'static str,
        /// The deadline, its turn in the queue included.
        limit: Duration,
    },
    /// So many operations wait for the TPM without an answer that no further one is begun.
    #[error("the TPM answers none of {unanswered} operations; '{operation}' was not begun")]
    Hung {
        /// What was asked.
        operation: &'static str,
        /// Operations, each with a thread, that were given up and have not come back.
        unanswered: usize,
    },
    /// The queue is full.
    #[error("too many operations wait for the TPM; '{operation}' was not queued")]
    Busy {
        /// What was asked.
        operation: &'static str,
    },
    /// The saved AK does not belong to this TPM.
    #[error("the AK in {} was made by another TPM; if the TPM was replaced, remove the file and enrol anew", path.display())]
    OtherTpm {
        /// The AK's file.
        path: PathBuf,
        /// From the TPM.
        source: tss_esapi::Error,
    },
    /// The AK's file cannot be read or written.
    #[error("cannot use {}", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// From the system.
        source: std::io::Error,
    },
    /// The AK's file is not what this crate writes.
    #[error("{} is damaged; remove it to make a new AK, then enrol anew", path.display())]
    StateDamaged {
        /// The file.
        path: PathBuf,
    },
    /// A credential that is no TPM2B.
    #[error("the {what} is no well-formed TPM2B")]
    Malformed {
        /// Which structure.
        what: &'static str,
    },
    /// The PCR selection asked for cannot be quoted.
    #[error("PCR mask {mask:#010x} in this bank: the TPM has no such PCRs")]
    Selection {
        /// As asked.
        mask: u32,
    },
    /// PCRs changed between reading and quoting, each time.
    #[error("the PCRs changed during each of {attempts} quotes")]
    PcrsMoving {
        /// How often it was tried.
        attempts: u32,
    },
    /// The thread could not be started.
    #[error("cannot start the TPM thread")]
    Thread {
        /// From the system.
        source: std::io::Error,
    },
    /// The thread is gone.
    #[error("the TPM thread has ended")]
    Stopped,
}
