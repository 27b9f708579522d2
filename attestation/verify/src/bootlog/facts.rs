//! What a boot log says once it is authenticated: one fact for each event of a policed PCR.

use super::signatures::SignatureEntry;
use std::collections::BTreeMap;

/// What the boot log says, as far as the quote authenticates it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BootFacts {
    /// Events after the header.
    pub events: usize,
    /// Whether the firmware handed over a log at all.
    pub has_log: bool,
    /// The `SecureBoot` variable as measured into PCR 7; none if PCR 7 was not quoted or shows none.
    pub secure_boot: Option<bool>,
    /// The kernel command line as a boot loader measured it into PCR 8; none if PCR 8 was not quoted or shows none.
    pub kernel_cmdline: Option<String>,
    /// Each event that extended a policed PCR, in order.
    pub measured: Vec<Measured>,
}

/// One event that extended a policed PCR.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Measured {
    /// Position in the log; the header is 0.
    pub number: usize,
    /// The PCR.
    pub pcr: u32,
    /// The event type's name in the specification.
    pub kind: String,
    /// The digest extended, in the bank judged.
    pub digest: Vec<u8>,
    /// What the event says.
    pub fact: Fact,
}

impl Measured {
    /// Where the event stands, without its content: what a node may be told.
    pub fn place(&self) -> String {
        place(self.number, &self.kind, self.pcr)
    }
}

/// The words for the place of an event.
pub(crate) fn place(number: usize, kind: &str, pcr: u32) -> String {
    format!("boot log event {number} ({kind}) of PCR {pcr}")
}

/// What one event says. Texts named `label` are not covered by the digest: for people, never for a decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fact {
    /// The firmware's part of the PCR ends here.
    Separator,
    /// A text of the firmware, such as `Calling EFI Application from Boot Option`.
    Action(String),
    /// Whether Secure Boot was on.
    SecureBoot(bool),
    /// The entries of `PK`, `KEK`, `db` or `dbx`.
    Keys {
        /// The variable.
        variable: SecureBootVariable,
        /// Its entries.
        entries: Vec<SignatureEntry>,
    },
    /// Any other variable.
    Variable {
        /// Its name.
        name: String,
    },
    /// What verified an image that was then run.
    Authority {
        /// The variable that it stood in.
        variable: String,
        /// The certificate or hash.
        entry: SignatureEntry,
    },
    /// The least generation of each component that shim runs.
    SbatLevel(BTreeMap<String, u32>),
    /// An image that the firmware or shim ran; the digest is its authenticode digest.
    Image {
        /// Its device path, as far as it names a file.
        label: String,
    },
    /// A command that GRUB ran.
    GrubCommand(String),
    /// The kernel's command line.
    CommandLine(String),
    /// The kernel's command line as its EFI stub measured it: the log holds only a label.
    LoadOptions,
    /// A file that a boot loader or the EFI stub read.
    File {
        /// Its name.
        label: String,
    },
    /// One of shim's machine owner lists.
    Mok {
        /// Its name.
        label: String,
    },
    /// A digest of something that is not in the log.
    Opaque,
}

/// The variables whose entries decide what may boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SecureBootVariable {
    /// The platform key.
    Pk,
    /// Keys that may change db and dbx.
    Kek,
    /// What may be booted.
    Db,
    /// What must not be booted.
    Dbx,
}

impl SecureBootVariable {
    /// The variable's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pk => "PK",
            Self::Kek => "KEK",
            Self::Db => "db",
            Self::Dbx => "dbx",
        }
    }
}
