//! Which event types belong in which policed PCR, and what their digest must be taken over (PFP 10.4.1, table 27).

use super::Event;
use super::facts::{Fact, SecureBootVariable};
use super::signatures::{self, SignatureEntry};
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

/// The types whose meaning is more than their digest's.
pub(super) const EV_EFI_VARIABLE_DRIVER_CONFIG: u32 = 0x8000_0001;
const EV_EVENT_TAG: u32 = 0x0000_0006;
const EV_IPL: u32 = 0x0000_000d;
const EV_EFI_BOOT_SERVICES_APPLICATION: u32 = 0x8000_0003;
const EV_EFI_BOOT_SERVICES_DRIVER: u32 = 0x8000_0004;
const EV_EFI_RUNTIME_SERVICES_DRIVER: u32 = 0x8000_0005;
const EV_EFI_VARIABLE_AUTHORITY: u32 = 0x8000_00e0;

/// Tagged events of Linux's EFI stub (drivers/firmware/efi/libstub/efistub.h). Their digest is over the load options or
/// the initrd; the tagged data is only their label.
const TAG_LOAD_OPTIONS: u32 = 0x8f3b_22ed;

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
    EV_EVENT_TAG = 0x0000_0006, Elsewhere, 0..=6 | 8 | 9 | 14,
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

/// Judges one event of a policed PCR and says what it authenticates.
pub(super) fn judge(event: &Event<'_>, hash: HashAlg, digest: &[u8]) -> Result<Fact, Denial> {
    let Some(rule) = rule(event.pcr, event.kind) else {
        return Err(altered(event, format!("a type that belongs in PCR {}", event.pcr), name(event.kind)));
    };
    let over = |bytes: &[u8]| hash.digest(&[bytes]) == digest;
    let data = event.data;
    let fact = match rule {
        Digest::Elsewhere => labelled(event, over),
        Digest::OfData => over(data).then_some(Fact::Opaque),
        Digest::OfText => text(data).filter(|_| over(data)).map(Fact::Action),
        Digest::OfVariable => Variable::parse(data).filter(|_| over(data)).map(|v| v.fact(event)),
        Digest::OfVariableValue => Variable::parse(data)
            .filter(|v| over(v.value) || over(data))
            .map(|v| Fact::Variable { name: v.name_text() }),
        Digest::Separator => return separator(event, over),
        Digest::OfCommand => command(data, over),
    };
    fact.ok_or_else(|| {
        let computed = hex::encode(hash.digest(&[data]));
        altered(event, format!("data whose {hash} digest is {}", hex::encode(digest)), computed)
    })
}

pub(super) fn altered(event: &Event<'_>, expected: String, found: String) -> Denial {
    let expected = format!("{}: {expected}", event.place());
    Denial::at(Refusal::new(Code::BootLogEventAltered, expected, found), event.place())
}

/// PFP 10.4.1: 0 or 0xFFFFFFFF ends the firmware's measurements; 1 says that they failed.
fn separator(event: &Event<'_>, over: impl Fn(&[u8]) -> bool) -> Result<Fact, Denial> {
    // The digest decides, not the data beside it: an error may carry the firmware's own words.
    if over(&1u32.to_le_bytes()) {
        let expected = format!("{}: a separator without an error", event.place());
        let found = format!("the error separator, with data {}", hex::encode(event.data));
        return Err(Denial::at(Refusal::new(Code::BootFirmwareError, expected, found), event.place()));
    }
    match event.data {
        [0, 0, 0, 0] | [0xff, 0xff, 0xff, 0xff] if over(event.data) => Ok(Fact::Separator),
        _ => Err(altered(event, "a separator over its own data".into(), hex::encode(event.data))),
    }
}

/// Printable ASCII, without a terminating zero.
fn text(data: &[u8]) -> Option<String> {
    let text = data.strip_suffix(&[0]).unwrap_or(data);
    let printable = text.iter().all(|b| b.is_ascii_graphic() || *b == b' ');
    printable.then(|| String::from_utf8_lossy(text).into_owned())
}

/// An event whose digest is of something that is not in the log: what its label claims.
fn labelled(event: &Event<'_>, over: impl Fn(&[u8]) -> bool) -> Option<Fact> {
    Some(match event.kind {
        EV_EFI_BOOT_SERVICES_APPLICATION | EV_EFI_BOOT_SERVICES_DRIVER | EV_EFI_RUNTIME_SERVICES_DRIVER => {
            Fact::Image { label: image_path(event.data) }
        }
        // A file's event retyped as a tag would be one that nobody can read.
        EV_EVENT_TAG if event.pcr == 9 => return tagged(event.data, over),
        EV_IPL if event.pcr == 9 => Fact::File { label: label(event.data) },
        EV_IPL if event.pcr == 14 => Fact::Mok { label: label(event.data) },
        _ => Fact::Opaque,
    })
}

/// TCG_PCClientTaggedEvent (PFP 10.4.2.1). Where the digest is over the tagged data, as the specification has it, the
/// text is authenticated; Linux hashes what the tag speaks of instead.
fn tagged(data: &[u8], over: impl Fn(&[u8]) -> bool) -> Option<Fact> {
    let mut r = Reader::new(data);
    let tag = r.u32_le("tag").ok()?;
    let body = r.sized_le(data.len(), "tagged data").ok()?;
    r.end("bytes after the tagged data").ok()?;
    if tag != TAG_LOAD_OPTIONS {
        return Some(Fact::File { label: label(body) });
    }
    Some(match unicode(body) {
        Some(text) if over(body) => Fact::CommandLine(text),
        _ => Fact::LoadOptions,
    })
}

/// What the digest over a command in PCR 8 authenticates: all of `data`, all but its terminating zero, or what follows
/// GRUB's prefix. The prefix itself is not covered: see [`Fact::GrubCommand`]'s rule in the appraisal.
fn command(data: &[u8], over: impl Fn(&[u8]) -> bool) -> Option<Fact> {
    let text = data.strip_suffix(&[0]).unwrap_or(data);
    let utf8 = |bytes: &[u8], fact: fn(String) -> Fact| {
        std::str::from_utf8(bytes).map(|s| fact(s.to_owned())).unwrap_or(Fact::Opaque)
    };
    if let Some(line) = text.strip_prefix(b"kernel_cmdline: ") {
        return over(line).then(|| utf8(line, Fact::CommandLine));
    }
    let bare = [b"grub_cmd: ".as_slice(), b"module_cmdline: "].into_iter().find_map(|prefix| text.strip_prefix(prefix));
    if let Some(bare) = bare {
        return over(bare).then(|| utf8(bare, Fact::GrubCommand));
    }
    // systemd-boot measures the kernel's options themselves, in UTF-16 with or without their terminating zero.
    let authenticated = over(data) || over(text) || data.strip_suffix(&[0, 0]).is_some_and(over);
    authenticated.then(|| unicode(data).map_or_else(|| utf8(text, Fact::GrubCommand), Fact::CommandLine))
}

/// UTF-16 (little-endian) text without its terminating zero. Anything else, ASCII included, is none: in UTF-16 every
/// other byte of a command is zero, and no command in UTF-8 holds one but at its end.
fn unicode(data: &[u8]) -> Option<String> {
    let body = data.strip_suffix(&[0, 0]).filter(|b| b.len().checked_rem(2) == Some(0)).unwrap_or(data);
    let (_, all_but_last) = body.split_last()?;
    if body.len().checked_rem(2) != Some(0) || !all_but_last.contains(&0) {
        return None;
    }
    let units = body.chunks_exact(2).map(|pair| <[u8; 2]>::try_from(pair).map(u16::from_le_bytes));
    let units: Vec<u16> = units.collect::<Result<_, _>>().ok()?;
    String::from_utf16(&units).ok().filter(|s| !s.contains('\0'))
}

/// Unauthenticated text for people: short, and of characters that break no line and turn no direction.
fn label(data: &[u8]) -> String {
    let text = unicode(data).unwrap_or_else(|| String::from_utf8_lossy(data).into_owned());
    let shown = |c: char| if matches!(c, ' '..='~') || c.is_alphanumeric() { c } else { '?' };
    text.trim_end_matches('\0').chars().take(200).map(shown).collect()
}

/// The file named in the device path of an UEFI_IMAGE_LOAD_EVENT (PFP 10.2.3), if any.
fn image_path(data: &[u8]) -> String {
    let path = data.get(32..).unwrap_or_default();
    let mut r = Reader::new(path);
    let mut out = String::new();
    while let (Ok(kind), Ok(sub), Ok(size)) = (r.u8("type"), r.u8("subtype"), r.u16_le("size")) {
        let Some(Ok(body)) = usize::from(size).checked_sub(4).map(|n| r.take(n, "node")) else { break };
        // Media device path, file path (UEFI 2.10, 10.3.5.4).
        if (kind, sub) == (4, 4) {
            out.push_str(&label(body));
        }
    }
    out
}

/// UEFI_VARIABLE_DATA (PFP 10.2.6).
pub(super) struct Variable<'a> {
    pub(super) guid: &'a [u8],
    pub(super) name: &'a [u8],
    value: &'a [u8],
}

/// EFI_GLOBAL_VARIABLE, 8be4df61-93ca-11d2-aa0d-00e098032b8c.
const GLOBAL_VARIABLE: [u8; 16] =
    [0x61, 0xdf, 0xe4, 0x8b, 0xca, 0x93, 0xd2, 0x11, 0xaa, 0x0d, 0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c];
/// EFI_IMAGE_SECURITY_DATABASE_GUID, d719b2cb-3d3a-4596-a3bc-dad00e67656f.
const SECURITY_DATABASE: [u8; 16] =
    [0xcb, 0xb2, 0x19, 0xd7, 0x3a, 0x3d, 0x96, 0x45, 0xa3, 0xbc, 0xda, 0xd0, 0x0e, 0x67, 0x65, 0x6f];
/// SHIM_LOCK_GUID, 605dab50-e046-4300-abb6-3dd810dd8b23.
const SHIM_LOCK: [u8; 16] =
    [0x50, 0xab, 0x5d, 0x60, 0x46, 0xe0, 0x00, 0x43, 0xab, 0xb6, 0x3d, 0xd8, 0x10, 0xdd, 0x8b, 0x23];

impl<'a> Variable<'a> {
    pub(super) fn parse(data: &'a [u8]) -> Option<Variable<'a>> {
        let mut r = Reader::new(data);
        let guid = r.take(16, "variable GUID").ok()?;
        let name_units = usize::try_from(r.u64_le("name length").ok()?).ok()?;
        let value_len = usize::try_from(r.u64_le("value length").ok()?).ok()?;
        let name = r.take(name_units.checked_mul(2)?, "name").ok()?;
        let value = r.take(value_len, "value").ok()?;
        r.end("bytes after the variable").ok()?;
        Some(Variable { guid, name, value })
    }

    pub(super) fn name_text(&self) -> String {
        let units = self.name.chunks_exact(2).filter_map(|pair| <[u8; 2]>::try_from(pair).ok());
        char::decode_utf16(units.map(u16::from_le_bytes))
            .map(|c| c.unwrap_or('?'))
            .map(|c| if c.is_control() { '?' } else { c })
            .take(100)
            .collect()
    }

    fn is(&self, guid: [u8; 16], name: &str) -> bool {
        let utf16 = name.encode_utf16().flat_map(u16::to_le_bytes);
        self.guid == guid && self.name.iter().copied().eq(utf16)
    }

    /// What a variable that was measured whole says.
    fn fact(&self, event: &Event<'_>) -> Fact {
        if event.pcr == 7 && event.kind == EV_EFI_VARIABLE_AUTHORITY {
            if self.is(SHIM_LOCK, "SbatLevel")
                && let Some(level) = signatures::sbat_level(self.value)
            {
                return Fact::SbatLevel(level);
            }
            return Fact::Authority { variable: self.name_text(), entry: SignatureEntry::of_authority(self.value) };
        }
        if event.pcr == 7 && event.kind == EV_EFI_VARIABLE_DRIVER_CONFIG {
            if self.is(GLOBAL_VARIABLE, "SecureBoot") {
                return Fact::SecureBoot(self.value == [1]);
            }
            let variable = [
                (SecureBootVariable::Pk, GLOBAL_VARIABLE),
                (SecureBootVariable::Kek, GLOBAL_VARIABLE),
                (SecureBootVariable::Db, SECURITY_DATABASE),
                (SecureBootVariable::Dbx, SECURITY_DATABASE),
            ];
            let known = variable.into_iter().find(|(v, guid)| self.is(*guid, v.as_str()));
            // One that cannot be read stays a bare variable, which no rule about its entries consumes.
            if let (Some((variable, _)), Ok(entries)) = (known, signatures::entries(self.value)) {
                return Fact::Keys { variable, entries };
            }
        }
        Fact::Variable { name: self.name_text() }
    }
}
