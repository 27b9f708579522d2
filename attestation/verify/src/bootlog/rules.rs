//! Which event types belong in which policed PCR, and what their digest must be taken over (PFP 10.4.1, table 27).

use super::{BootFacts, Event};
use crate::chain::Denial;
use crate::hash::HashAlg;
use crate::wire::Reader;
use ambit_model::{Code, Refusal};

/// What the specification says of an event type's digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Digest {
    /// Over the event data.
    OfData,
    /// Over the event data, which is a text.
    OfText,
    /// Over the event data, which is a UEFI_VARIABLE_DATA.
    OfVariable,
    /// Over the whole UEFI_VARIABLE_DATA or, in older firmware, only over the variable's value.
    OfVariableValue,
    /// Four bytes that end the firmware's part of a PCR.
    Separator,
    /// Over the text, in GRUB after a prefix that names who measured it.
    OfCommand,
    /// Over something that is not in the log (code, tables, files): the data says nothing that can be relied on.
    Elsewhere,
}

macro_rules! types {
    ($($name:ident = $id:literal, $digest:ident, $pcrs:pat,)*) => {
        /// The specification's name of an event type.
        pub(super) fn name(kind: u32) -> String {
            match kind {
                $($id => stringify!($name).to_owned(),)*
                other => format!("type {other:#010x}"),
            }
        }

        /// What the digest of this type is over, if the type belongs in `pcr` at all.
        fn rule(pcr: u32, kind: u32) -> Option<Digest> {
            match (kind, pcr) {
                $(($id, $pcrs) => Some(rule_in(pcr, Digest::$digest)),)*
                _ => None,
            }
        }
    };
}

types! {
    EV_POST_CODE = 0x0000_0001, Elsewhere, 0 | 1,
    EV_SEPARATOR = 0x0000_0004, Separator, _,
    EV_ACTION = 0x0000_0005, OfText, 1..=7,
    EV_EVENT_TAG = 0x0000_0006, Elsewhere, 5 | 9 | 14,
    EV_S_CRTM_CONTENTS = 0x0000_0007, Elsewhere, 0,
    EV_S_CRTM_VERSION = 0x0000_0008, OfData, 0,
    EV_CPU_MICROCODE = 0x0000_0009, Elsewhere, 1,
    EV_PLATFORM_CONFIG_FLAGS = 0x0000_000a, Elsewhere, 1,
    EV_TABLE_OF_DEVICES = 0x0000_000b, Elsewhere, 1,
    EV_COMPACT_HASH = 0x0000_000c, Elsewhere, 4..=6,
    EV_IPL = 0x0000_000d, OfCommand, 8 | 9 | 14,
    EV_NONHOST_CODE = 0x0000_000f, Elsewhere, 0 | 2,
    EV_NONHOST_CONFIG = 0x0000_0010, Elsewhere, 1 | 3,
    EV_NONHOST_INFO = 0x0000_0011, Elsewhere, 0,
    EV_OMIT_BOOT_DEVICE_EVENTS = 0x0000_0012, OfText, 4,
    EV_POST_CODE2 = 0x0000_0013, Elsewhere, 0 | 1,
    EV_EFI_VARIABLE_DRIVER_CONFIG = 0x8000_0001, OfVariable, 1 | 3 | 5 | 7,
    EV_EFI_VARIABLE_BOOT = 0x8000_0002, OfVariableValue, 1,
    EV_EFI_BOOT_SERVICES_APPLICATION = 0x8000_0003, Elsewhere, 2 | 4,
    EV_EFI_BOOT_SERVICES_DRIVER = 0x8000_0004, Elsewhere, 0 | 2,
    EV_EFI_RUNTIME_SERVICES_DRIVER = 0x8000_0005, Elsewhere, 0 | 2,
    EV_EFI_GPT_EVENT = 0x8000_0006, OfData, 5,
    EV_EFI_ACTION = 0x8000_0007, OfText, 1..=7,
    EV_EFI_PLATFORM_FIRMWARE_BLOB = 0x8000_0008, Elsewhere, 0 | 1 | 2 | 4,
    EV_EFI_HANDOFF_TABLES = 0x8000_0009, Elsewhere, 1,
    EV_EFI_PLATFORM_FIRMWARE_BLOB2 = 0x8000_000a, Elsewhere, 0 | 1 | 2 | 4,
    EV_EFI_HANDOFF_TABLES2 = 0x8000_000b, Elsewhere, 1,
    EV_EFI_VARIABLE_BOOT2 = 0x8000_000c, OfVariable, 1,
    EV_EFI_GPT_EVENT2 = 0x8000_000d, OfData, 5,
    EV_EFI_HCRTM_EVENT = 0x8000_0010, OfText, 0,
    EV_EFI_VARIABLE_AUTHORITY = 0x8000_00e0, OfVariable, 7,
    EV_EFI_SPDM_FIRMWARE_BLOB = 0x8000_00e1, Elsewhere, 2,
    EV_EFI_SPDM_FIRMWARE_CONFIG = 0x8000_00e2, Elsewhere, 3,
    EV_EFI_SPDM_DEVICE_POLICY = 0x8000_00e3, OfVariable, 7,
    EV_EFI_SPDM_DEVICE_AUTHORITY = 0x8000_00e4, OfVariable, 7,
}

/// GRUB measures commands into PCR 8 and files into PCR 9; shim measures variables into PCR 14 under the same type, and
/// the text beside a file's or variable's digest is no more than a label.
fn rule_in(pcr: u32, digest: Digest) -> Digest {
    if digest == Digest::OfCommand && pcr != 8 { Digest::Elsewhere } else { digest }
}

/// Judges one event of a policed PCR and notes what it authenticates.
pub(super) fn judge(event: &Event<'_>, hash: HashAlg, digest: &[u8], facts: &mut BootFacts) -> Result<(), Denial> {
    let Some(rule) = rule(event.pcr, event.kind) else {
        return Err(altered(event, format!("a type that belongs in PCR {}", event.pcr), name(event.kind)));
    };
    let over = |bytes: &[u8]| hash.digest(&[bytes]) == digest;
    let data = event.data;
    let good = match rule {
        Digest::Elsewhere => true,
        Digest::OfData => over(data),
        Digest::OfText => data.iter().all(|b| b.is_ascii_graphic() || matches!(b, b' ' | 0)) && over(data),
        Digest::OfVariable => variable(data).is_some() && over(data),
        Digest::OfVariableValue => variable(data).is_some_and(|v| over(v.value) || over(data)),
        Digest::Separator => return separator(event, over(data)),
        Digest::OfCommand => command(data, over, facts),
    };
    if !good {
        let computed = hex::encode(hash.digest(&[data]));
        return Err(altered(event, format!("data whose {hash} digest is {}", hex::encode(digest)), computed));
    }
    if rule == Digest::OfVariable && event.pcr == 7 {
        note_secure_boot(data, facts);
    }
    Ok(())
}

fn altered(event: &Event<'_>, expected: String, found: String) -> Denial {
    let expected = format!("{}: {expected}", event.place());
    Denial::at(Refusal::new(Code::BootLogEventAltered, expected, found), event.place())
}

/// PFP 10.4.1: 0 or 0xFFFFFFFF ends the firmware's measurements; 1 says that they failed.
fn separator(event: &Event<'_>, over_data: bool) -> Result<(), Denial> {
    match event.data {
        [0, 0, 0, 0] | [0xff, 0xff, 0xff, 0xff] if over_data => Ok(()),
        _ => Err(altered(event, "a separator without an error, over its own data".into(), hex::encode(event.data))),
    }
}

/// Whether the digest is over the command in `data`: all of it, without its terminating zero, or after GRUB's prefix.
fn command(data: &[u8], over: impl Fn(&[u8]) -> bool + Copy, facts: &mut BootFacts) -> bool {
    let text = data.strip_suffix(&[0]).unwrap_or(data);
    if let Some(cmdline) = text.strip_prefix(b"kernel_cmdline: ") {
        if over(cmdline) {
            facts.kernel_cmdline = Some(String::from_utf8_lossy(cmdline).into_owned());
            return true;
        }
        return false;
    }
    let bare = [b"grub_cmd: ".as_slice(), b"module_cmdline: "].into_iter().find_map(|prefix| text.strip_prefix(prefix));
    match bare {
        Some(bare) => over(bare),
        // systemd-boot measures the options themselves, in UTF-16 with or without their terminating zero.
        None => over(data) || over(text) || data.strip_suffix(&[0, 0]).is_some_and(over),
    }
}

/// UEFI_VARIABLE_DATA (PFP 10.2.6).
struct Variable<'a> {
    guid: &'a [u8],
    name: &'a [u8],
    value: &'a [u8],
}

fn variable(data: &[u8]) -> Option<Variable<'_>> {
    let mut r = Reader::new(data);
    let guid = r.take(16, "variable GUID").ok()?;
    let name_units = usize::try_from(r.u64_le("name length").ok()?).ok()?;
    let value_len = usize::try_from(r.u64_le("value length").ok()?).ok()?;
    let name = r.take(name_units.checked_mul(2)?, "name").ok()?;
    let value = r.take(value_len, "value").ok()?;
    r.end("bytes after the variable").ok()?;
    Some(Variable { guid, name, value })
}

/// EFI_GLOBAL_VARIABLE, 8be4df61-93ca-11d2-aa0d-00e098032b8c.
const GLOBAL_VARIABLE: [u8; 16] =
    [0x61, 0xdf, 0xe4, 0x8b, 0xca, 0x93, 0xd2, 0x11, 0xaa, 0x0d, 0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c];

/// Notes the `SecureBoot` variable. A second one can only make the answer worse.
fn note_secure_boot(data: &[u8], facts: &mut BootFacts) {
    let Some(v) = variable(data) else { return };
    let name: Vec<u8> = "SecureBoot".encode_utf16().flat_map(u16::to_le_bytes).collect();
    if v.guid == GLOBAL_VARIABLE && v.name == name {
        facts.secure_boot = Some(v.value == [1] && facts.secure_boot != Some(false));
    }
}
