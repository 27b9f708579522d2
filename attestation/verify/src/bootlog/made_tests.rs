//! Rules over order and meaning, tried on the golden log with events put in, taken out and changed. The PCRs are those
//! that the made log leads to, so that nothing but the rule can refuse it.

use super::*;
use crate::testdata::{golden, golden_pcrs};

const HASHES: [HashAlg; 3] = [HashAlg::Sha1, HashAlg::Sha256, HashAlg::Sha384];
const EFI_ACTION: u32 = 0x8000_0007;
const DRIVER_CONFIG: u32 = 0x8000_0001;

#[derive(Clone)]
struct Made {
    pcr: u32,
    kind: u32,
    data: Vec<u8>,
    digests: Vec<Vec<u8>>,
}

/// An event whose digests are over `hashed`.
fn event(pcr: u32, kind: u32, data: &[u8], hashed: &[u8]) -> Made {
    Made { pcr, kind, data: data.to_vec(), digests: HASHES.iter().map(|h| h.digest(&[hashed])).collect() }
}

fn golden_events() -> Vec<Made> {
    let bytes = golden("binary_bios_measurements");
    let log = BootLog::parse(&bytes).unwrap();
    let digests = |e: &Event<'_>| HASHES.iter().map(|h| e.digest(*h).unwrap().to_vec()).collect();
    log.events().iter().map(|e| Made { pcr: e.pcr, kind: e.kind, data: e.data.to_vec(), digests: digests(e) }).collect()
}

fn write(events: &[Made]) -> Vec<u8> {
    let mut out = golden("binary_bios_measurements")[..32 + 41].to_vec();
    for e in events {
        out.extend([e.pcr, e.kind, 3].iter().flat_map(|n| n.to_le_bytes()));
        for (hash, digest) in HASHES.iter().zip(&e.digests) {
            out.extend(hash.id().to_le_bytes());
            out.extend(digest);
        }
        out.extend((e.data.len() as u32).to_le_bytes());
        out.extend(&e.data);
    }
    out
}

fn judged(events: &[Made]) -> Result<BootFacts, Denial> {
    let bytes = write(events);
    let pcrs = BootLog::parse(&bytes).unwrap().replay(HashAlg::Sha256).unwrap();
    judge(&bytes, HashAlg::Sha256, &pcrs)
}

fn utf16(s: &str) -> Vec<u8> {
    s.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

fn variable(guid: &[u8], name: &str, value: &[u8]) -> Vec<u8> {
    let sizes = [name.len() as u64, value.len() as u64].map(u64::to_le_bytes).concat();
    [guid, &sizes, &utf16(name), value].concat()
}

/// Numbers as in the golden log: 4 SecureBoot, 8 dbx, 9 the separator of PCR 7, 18 of PCR 3, 22 db's authority, 26
/// SbatLevel.
#[test]
fn each_rule_of_order_refuses_by_its_own_code() {
    use Code::{BootEventOutOfOrder as Order, BootFirmwareError, BootLogEventAltered as Altered, BootVariableRepeated};
    type Edit = fn(&mut Vec<Made>);
    let rows: &[(&str, Edit, Code, &str)] = &[
        (
            "SecureBoot again",
            |e| e.insert(4, e[3].clone()),
            BootVariableRepeated,
            "event 5 (EV_EFI_VARIABLE_DRIVER_CONFIG) of PCR 7",
        ),
        (
            "SecureBoot off, then on after the separator",
            |e| {
                let off = variable(&e[3].data[..16], "SecureBoot", &[0]);
                let on = std::mem::replace(&mut e[3], event(7, DRIVER_CONFIG, &off, &off));
                e.insert(9, on);
            },
            BootVariableRepeated,
            "event 10 (EV_EFI_VARIABLE_DRIVER_CONFIG) of PCR 7",
        ),
        (
            "dbx again, at the end",
            |e| e.push(e[7].clone()),
            BootVariableRepeated,
            "event 49 (EV_EFI_VARIABLE_DRIVER_CONFIG) of PCR 7",
        ),
        (
            "a variable after the separator",
            |e| {
                let late = variable(&e[3].data[..16], "AuditMode", &[0]);
                e.insert(9, event(7, DRIVER_CONFIG, &late, &late));
            },
            Order,
            "event 10 (EV_EFI_VARIABLE_DRIVER_CONFIG) of PCR 7",
        ),
        ("no separator in PCR 3", |e| drop(e.remove(17)), Order, "PCR 3"),
        ("no separator in PCR 7", |e| drop(e.remove(8)), Order, "event 25 (EV_EFI_VARIABLE_AUTHORITY) of PCR 7"),
        (
            "a second separator",
            |e| e.push(event(4, EV_SEPARATOR, &[0; 4], &[0; 4])),
            Order,
            "event 49 (EV_SEPARATOR) of PCR 4",
        ),
        (
            "a second separator, the other value",
            |e| e.push(event(4, EV_SEPARATOR, &[255; 4], &[255; 4])),
            Order,
            "event 49 (EV_SEPARATOR) of PCR 4",
        ),
        (
            "a second separator, retyped as a text",
            |e| e.push(event(4, EFI_ACTION, &[0; 4], &[0; 4])),
            Altered,
            "event 49 (EV_EFI_ACTION) of PCR 4",
        ),
        (
            "a second separator, retyped as an image",
            |e| e.push(event(4, 0x8000_0003, b"shim", &[0; 4])),
            Altered,
            "event 49 (EV_EFI_BOOT_SERVICES_APPLICATION) of PCR 4",
        ),
        (
            "an error",
            |e| e[17] = event(3, EV_SEPARATOR, &[1, 0, 0, 0], &[1, 0, 0, 0]),
            BootFirmwareError,
            "event 18 (EV_SEPARATOR) of PCR 3",
        ),
        (
            "an error in the firmware's words",
            |e| e[17] = event(3, EV_SEPARATOR, b"failed", &[1, 0, 0, 0]),
            BootFirmwareError,
            "event 18 (EV_SEPARATOR) of PCR 3",
        ),
        (
            "an error dressed as none",
            |e| e[17] = event(3, EV_SEPARATOR, &[0; 4], &[1, 0, 0, 0]),
            BootFirmwareError,
            "event 18 (EV_SEPARATOR) of PCR 3",
        ),
        (
            "another separator",
            |e| e[17] = event(3, EV_SEPARATOR, &[2, 0, 0, 0], &[2, 0, 0, 0]),
            Altered,
            "event 18 (EV_SEPARATOR) of PCR 3",
        ),
        (
            "SbatLevel before the separator",
            |e| {
                let sbat = e.remove(25);
                e.insert(8, sbat);
            },
            Order,
            "event 9 (EV_EFI_VARIABLE_AUTHORITY) of PCR 7",
        ),
        (
            "MokListRT before the separator",
            |e| {
                let mok = e.remove(27);
                e.insert(8, mok);
            },
            Order,
            "event 9 (EV_EFI_VARIABLE_AUTHORITY) of PCR 7",
        ),
        (
            "an unknown type",
            |e| e.push(event(2, 0x8000_0042, b"x", b"x")),
            Altered,
            "event 49 (type 0x80000042) of PCR 2",
        ),
        (
            "a command line over other text",
            |e| e[43] = event(8, 13, b"kernel_cmdline: quiet\0", b"init=/bin/sh"),
            Altered,
            "event 44 (EV_IPL) of PCR 8",
        ),
        (
            "a file retyped as a tag",
            |e| e.push(event(9, 6, b"(hd0)/initrd", b"x")),
            Altered,
            "event 49 (EV_EVENT_TAG) of PCR 9",
        ),
        (
            "a text with a control character",
            |e| e.push(event(5, EFI_ACTION, b"a\nb", b"a\nb")),
            Altered,
            "event 49 (EV_EFI_ACTION) of PCR 5",
        ),
    ];
    let mut wrong = Vec::new();
    for (what, edit, code, place) in rows {
        let mut events = golden_events();
        edit(&mut events);
        let refused = |d: &Denial| d.refusal.code == *code && d.diverged.as_ref().is_some_and(|d| d.ends_with(place));
        match judged(&events) {
            Err(denial) if refused(&denial) => {}
            other => wrong.push(format!("wrong: {what}: {:?}", other.map(drop))),
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn what_is_no_offence_passes() {
    type Edit = fn(&mut Vec<Made>);
    let rows: &[(&str, Edit)] = &[
        ("unchanged", |_| {}),
        ("db's authority before the separator", |e| {
            let db = e.remove(21);
            e.insert(8, db);
        }),
        ("a remark with forged digests", |e| e.insert(0, event(7, EV_NO_ACTION, b"SecureBoot off", &[1, 0, 0, 0]))),
        ("a remark outside of the PCRs", |e| e.push(Made { pcr: u32::MAX, ..event(0, EV_NO_ACTION, b"x", b"x") })),
        ("StartupLocality of another PCR", |e| e.push(event(5, EV_NO_ACTION, b"StartupLocality\0\x03", b""))),
        ("a tag in PCR 1", |e| e.push(event(1, 6, b"maker's", b"secret"))),
    ];
    let before = golden_pcrs(HashAlg::Sha256)[&0].clone();
    for (what, edit) in rows {
        let mut events = golden_events();
        edit(&mut events);
        let facts = judged(&events).unwrap_or_else(|e| panic!("{what}: {e:?}"));
        assert_eq!(facts.secure_boot, Some(true), "{what}");
        let log = write(&events);
        assert_eq!(BootLog::parse(&log).unwrap().replay(HashAlg::Sha256).unwrap()[&0], before, "{what}");
    }
}

/// Each row: PCR, type, data, what the digest is over, and the fact.
#[test]
fn texts_mean_something_only_where_the_digest_covers_them() {
    let options = utf16("quiet root=/dev/sda1");
    let terminated = [options.as_slice(), &[0, 0]].concat();
    let tag = |id: u32, body: &[u8]| [&id.to_le_bytes()[..], &(body.len() as u32).to_le_bytes(), body].concat();
    let line = || Fact::CommandLine("quiet root=/dev/sda1".into());
    let file = |label: &str| Fact::File { label: label.into() };
    type Row = (&'static str, u32, u32, Vec<u8>, Vec<u8>, Fact);
    let rows: Vec<Row> = vec![
        ("systemd-boot", 8, 13, terminated.clone(), terminated.clone(), line()),
        ("systemd-boot, digest without the end", 8, 13, terminated.clone(), options.clone(), line()),
        ("UTF-16 without an end", 8, 13, options.clone(), options.clone(), line()),
        (
            "bare command of even length",
            8,
            13,
            b"set a=1\0".to_vec(),
            b"set a=1".to_vec(),
            Fact::GrubCommand("set a=1".into()),
        ),
        ("module", 8, 13, b"module_cmdline: /m a\0".to_vec(), b"/m a".to_vec(), Fact::GrubCommand("/m a".into())),
        ("command that is no UTF-8", 8, 13, b"grub_cmd: \xff\0".to_vec(), b"\xff".to_vec(), Fact::Opaque),
        (
            "EFI stub, options",
            9,
            6,
            tag(0x8f3b_22ed, b"LOADED_IMAGE::LoadOptions\0"),
            terminated.clone(),
            Fact::LoadOptions,
        ),
        ("EFI stub, initrd", 9, 6, tag(0x8f3b_22ec, b"Linux initrd\0"), b"initrd".to_vec(), file("Linux initrd")),
        ("options in the tag, not covered", 9, 6, tag(0x8f3b_22ed, &terminated), b"other".to_vec(), Fact::LoadOptions),
        ("options in the tag, covered", 9, 6, tag(0x8f3b_22ed, &terminated), terminated.clone(), line()),
        ("file", 9, 13, b"(hd0)/vmlinuz\0".to_vec(), b"kernel".to_vec(), file("(hd0)/vmlinuz")),
        ("MokList", 14, 13, b"MokList\0".to_vec(), b"list".to_vec(), Fact::Mok { label: "MokList".into() }),
        (
            "a variable named like another's",
            7,
            DRIVER_CONFIG,
            variable(&[7; 16], "SecureBoot", &[1]),
            variable(&[7; 16], "SecureBoot", &[1]),
            Fact::Variable { name: "SecureBoot".into() },
        ),
        ("an action", 5, EFI_ACTION, b"Exit\0".to_vec(), b"Exit\0".to_vec(), Fact::Action("Exit".into())),
    ];
    for (what, pcr, kind, data, hashed, fact) in rows {
        let mut events = golden_events();
        // Before the separator of PCR 7, where every kind may stand.
        events.insert(8, event(pcr, kind, &data, &hashed));
        let facts = judged(&events).unwrap_or_else(|e| panic!("{what}: {e:?}"));
        let found = facts.measured.iter().find(|m| m.number == 9).map(|m| m.fact.clone());
        assert_eq!(found, Some(fact), "{what}");
    }
}

/// What tpm2_eventlog shows of the same log is the oracle of the names and digests.
#[test]
fn variables_read_as_they_are() {
    let facts = judged(&golden_events()).unwrap();
    let keys = |wanted: SecureBootVariable| {
        facts.measured.iter().find_map(|m| match &m.fact {
            Fact::Keys { variable, entries } if *variable == wanted => Some(entries.clone()),
            _ => None,
        })
    };
    let subjects = |v| keys(v).unwrap().iter().map(|e| e.subject.clone().unwrap_or_default()).collect::<Vec<_>>();
    assert_eq!(subjects(SecureBootVariable::Pk), ["Debian UEFI Secure Boot (PK/KEK key)"]);
    assert_eq!(
        subjects(SecureBootVariable::Db),
        ["Microsoft Windows Production PCA 2011", "Microsoft Corporation UEFI CA 2011"]
    );
    // OVMF's dbx holds one entry: SHA-256 of nothing.
    let dbx = keys(SecureBootVariable::Dbx).unwrap();
    assert_eq!(
        (dbx.len(), dbx[0].kind, dbx[0].sha256.to_vec()),
        (1, SignatureKind::ImageDigest, HashAlg::Sha256.digest(&[]))
    );
    assert_eq!(dbx[0].owner, "a0baa8a3-041d-48a8-bc87-c36d121b5e3d");
    let level = facts.measured.iter().find_map(|m| match &m.fact {
        Fact::SbatLevel(level) => Some(level.clone()),
        _ => None,
    });
    assert_eq!(level.unwrap(), BTreeMap::from([("sbat".into(), 1), ("shim".into(), 4), ("grub".into(), 5)]));
    assert_eq!(facts.measured[22].fact, Fact::Image { label: "\\EFI\\BOOT\\BOOTX64.EFI".into() });
    assert_eq!(facts.measured.len(), 48);
}

/// An event of PCR 7 that no rule explains is learnt by its digest, and the rules beside it stay.
#[test]
fn what_no_rule_explains_is_learnt_by_its_digest() {
    use crate::appraisal::{CompiledPolicy, Endorsement, Source, appraise, learn};
    let mut events = golden_events();
    let audit = variable(&events[3].data[..16], "AuditMode", &[0]);
    events.insert(8, event(7, DRIVER_CONFIG, &audit, &audit));
    let log = write(&events);
    let pcrs = BootLog::parse(&log).unwrap().replay(HashAlg::Sha256).unwrap();
    let boot = judge(&log, HashAlg::Sha256, &pcrs).unwrap();
    let policy = learn(&Source {
        name: "audit".parse().unwrap(),
        clusters: std::collections::BTreeSet::new(),
        class: None,
        bank: crate::Bank::Sha256,
        pcrs: &pcrs,
        boot: &boot,
        cmdline: None,
        ima: &[],
        ima_form: crate::ima::ImaForm::Nothing,
        separate_list: false,
    })
    .policy;
    assert!(policy.keys.len() == 3 && policy.events[&7].len() == 1 && policy.authorities.is_some());
    let ask = |boot: &BootFacts| {
        let policy = std::sync::Arc::new(CompiledPolicy::compile(&policy, &mut |_| None).unwrap());
        appraise(&[policy], Endorsement::NotJudged, &pcrs, crate::Bank::Sha256, boot)
    };
    assert!(ask(&boot).is_ok());
    // In setup mode the same variable has another digest.
    let mut other = boot.clone();
    other.measured[8].digest = vec![7; 32];
    let denial = ask(&other).unwrap_err().headline();
    assert_eq!(denial.refusal.code, Code::BootEventNotCovered);
    assert!(denial.refusal.found.starts_with("AuditMode"), "{denial:?}");
}
