//! Rows of the adversarial list that need another boot than a test's TPM has: real boots of other kinds and logs made from
//! them, judged by policies learnt from a good one. Their PCRs are replayed here, apart from the verifier.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_lab::ima::{Digests, Record};
use ambit_lab::tpm::{BOOT_LOG, IMA_LOG};
use ambit_lab::{boot_log, ima};
use ambit_model::appraisal::AppraisalPolicy;
use ambit_tests::table::row;
use ambit_verify::KeptEvidence;
use ambit_verify::appraisal::{AllowList, CompiledPolicy};
use sha2::{Digest as _, Sha256, Sha384};
use std::collections::BTreeMap;
use std::sync::Arc;

/// PCRs that rounds ask for.
const MASK: u32 = 0x47ff;

/// Logs, and the PCRs that they lead to or are said to.
#[derive(Clone)]
struct Boot {
    boot: Vec<u8>,
    ima: Vec<u8>,
    pcrs: BTreeMap<u32, Vec<u8>>,
    bank: &'static str,
}

impl Boot {
    /// As an honest machine has them, started at this locality.
    fn of(boot: Vec<u8>, ima: Vec<u8>, locality: u8, bank: &'static str) -> Boot {
        let len = if bank == "sha384" { 48 } else { 32 };
        let mut pcrs: BTreeMap<u32, Vec<u8>> =
            (0..16).filter(|n| MASK >> n & 1 == 1).map(|n| (n, vec![0; len])).collect();
        *pcrs.get_mut(&0).unwrap().last_mut().unwrap() = locality;
        let mut extend = |pcr: u32, digests: &Digests| {
            let Some(value) = pcrs.get_mut(&pcr) else { return };
            *value = match bank {
                "sha384" => Sha384::new().chain_update(&value).chain_update(digests.sha384).finalize().to_vec(),
                _ => Sha256::new().chain_update(&value).chain_update(digests.sha256).finalize().to_vec(),
            };
        };
        boot_log::parse(&boot).unwrap().iter().for_each(|e| extend(e.pcr, &e.digests));
        ima::parse(&ima).unwrap().iter().for_each(|r| extend(r.pcr, &r.digests()));
        Boot { boot, ima, pcrs, bank }
    }
    /// The same, with the golden kernel's IMA log: its first entry is over PCRs 0-9 of this boot.
    fn measured(boot: Vec<u8>, locality: u8) -> Boot {
        let pcrs = Boot::of(boot.clone(), Vec::new(), locality, "sha256").pcrs;
        let over: Vec<u8> = (0..10).flat_map(|n| pcrs[&n].clone()).collect();
        let mut records = ima::parse(IMA_LOG).unwrap();
        records[0] = Record::ima_ng(&Sha256::digest(over).into(), "boot_aggregate");
        Boot::of(boot, records.iter().flat_map(Record::encode).collect(), locality, "sha256")
    }
    fn golden() -> Boot {
        Boot::of(BOOT_LOG.to_vec(), IMA_LOG.to_vec(), 0, "sha256")
    }
    /// One of the verifier's measured boots.
    fn named(name: &str) -> Boot {
        let folder = ambit_tests::root().unwrap().join("attestation/verify/tests/boots").join(name);
        let file = |file: &str| std::fs::read(folder.join(file)).unwrap();
        Boot::of(file("binary_bios_measurements"), file("ima_binary_runtime_measurements"), 0, "sha256")
    }
    fn evidence(&self) -> KeptEvidence {
        let Boot { boot, ima, pcrs, bank } = self.clone();
        KeptEvidence::new("lab", bank, pcrs, boot, ima).unwrap()
    }
    /// A policy that accepts it, changed.
    fn policy(&self, change: impl FnOnce(&mut AppraisalPolicy)) -> Arc<CompiledPolicy> {
        let mut learnt = self.evidence().learn(&"p".parse().unwrap(), &"west".parse().unwrap()).unwrap();
        change(&mut learnt.policy);
        let list = learnt.allow_list.unwrap_or_default();
        let list = Arc::new(AllowList::parse(list.as_bytes()).unwrap());
        Arc::new(CompiledPolicy::compile(&learnt.policy, &mut |_| Some(list.clone())).unwrap())
    }
}

#[track_caller]
fn judged(case: u8, what: &str, boot: &Boot, policy: &Arc<CompiledPolicy>, code: &str) {
    let found = boot.evidence().appraise(std::slice::from_ref(policy));
    let found = found.map_or_else(|denial| denial.refusal.code.to_string(), |_| "accepted".into());
    assert_eq!(found, code, "case {case}: {what}");
    row(case, what, code).unwrap();
}

fn same(_: &mut AppraisalPolicy) {}

/// An event as it stands in a log with three banks.
fn event(pcr: u32, kind: u32, data: &[u8], digested: Option<&[u8]>) -> Vec<u8> {
    use sha2::digest::Digest;
    let digest = |len: usize, digest: Vec<u8>| if digested.is_some() { digest } else { vec![0; len] };
    let over = digested.unwrap_or_default();
    let mut out = [pcr.to_le_bytes(), kind.to_le_bytes(), 3u32.to_le_bytes()].concat();
    // The lab's reader wants all banks; nobody here looks at SHA-1.
    for (algorithm, value) in [
        (0x0004u16, vec![0; 20]),
        (0x000b, digest(32, Sha256::digest(over).to_vec())),
        (0x000c, digest(48, Sha384::digest(over).to_vec())),
    ] {
        out.extend(algorithm.to_le_bytes());
        out.extend(value);
    }
    out.extend(u32::try_from(data.len()).unwrap().to_le_bytes());
    out.extend(data);
    out
}

/// Where each event of a log begins: the header, then those with digests.
fn places(log: &[u8]) -> Vec<usize> {
    let u32_at = |at: usize| u32::from_le_bytes(log[at..at + 4].try_into().unwrap()) as usize;
    let mut places = vec![0];
    let mut at = 32 + u32_at(28);
    while at < log.len() {
        places.push(at);
        let mut next = at + 12;
        for _ in 0..u32_at(at + 8) {
            next += 2 + match (log[next], log[next + 1]) {
                (4, 0) => 20,
                (0x0b, 0) => 32,
                _ => 48,
            };
        }
        at = next + 4 + u32_at(next);
    }
    places
}

#[test]
fn boots_that_are_as_they_say_and_not_as_the_policy_says() {
    let base = Boot::named("secureboot-grub");
    let policy = base.policy(same);
    judged(41, "a good boot", &base, &policy, "accepted");
    judged(41, "Secure Boot off, all else proved", &Boot::named("nosb-grub"), &policy, "secure_boot_off");
    let newer = Boot::named("dbx").policy(same);
    judged(42, "dbx with one hash less than the policy wants", &base, &newer, "dbx_too_old");
    let newer = base.policy(|p| *p.sbat_level.as_mut().unwrap().get_mut("shim").unwrap() += 1);
    judged(42, "SbatLevel older than the policy wants", &base, &newer, "sbat_too_old");
    judged(29, "boot without a log", &Boot { boot: Vec::new(), ..base.clone() }, &policy, "boot_log_missing");
}

/// What a machine booted before, or another machine has: real logs, each sound in itself, beside PCRs of another boot.
#[test]
fn the_log_of_another_boot_explains_nothing() {
    let base = Boot::named("secureboot-grub");
    let policy = base.policy(same);
    for name in ["secureboot-grub-2", "dbx", "mok", "gpt", "efistub-sb", "efistub-nosb", "nosb-grub"] {
        let other = Boot::named(name);
        assert_ne!(other.boot, base.boot, "{name}");
        let swapped = Boot { boot: other.boot.clone(), ..base.clone() };
        judged(36, &format!("boot log of the boot {name}"), &swapped, &policy, "boot_log_pcr_mismatch");
        let swapped = Boot { boot: base.boot.clone(), ..other };
        judged(36, &format!("a good boot's log, after the boot {name}"), &swapped, &policy, "boot_log_pcr_mismatch");
    }
}

#[test]
fn firmware_that_says_odd_things() {
    let (golden, policy) = (Boot::golden(), Boot::golden().policy(same));
    let after_header = places(BOOT_LOG)[1];
    let locality = |n: u8| {
        let data = [b"StartupLocality\0".as_slice(), &[n]].concat();
        let mut log = BOOT_LOG.to_vec();
        log.splice(after_header..after_header, event(0, 3, &data, None));
        log
    };
    for n in [3, 4] {
        let boot = Boot::measured(locality(n), n);
        judged(37, &format!("started at locality {n}, and the log says so"), &boot, &boot.policy(same), "accepted");
        let lie = Boot { boot: locality(n), ..golden.clone() };
        judged(37, &format!("the log says locality {n}, PCR 0 does not"), &lie, &policy, "boot_log_pcr_mismatch");
        let silent = Boot { boot: BOOT_LOG.to_vec(), ..boot };
        judged(
            37,
            &format!("started at locality {n}, and no event says so"),
            &silent,
            &policy,
            "boot_log_pcr_mismatch",
        );
    }

    let places = places(BOOT_LOG);
    let is = |at: usize, pcr: u8, kind: u8| BOOT_LOG[at] == pcr && BOOT_LOG[at + 4..at + 8] == [kind, 0, 0, 0];
    let n = places.iter().skip(1).position(|at| is(*at, 7, 4)).unwrap() + 1;
    let mut log = BOOT_LOG.to_vec();
    let error = 1u32.to_le_bytes();
    log.splice(places[n]..places[n + 1], event(7, 4, &error, Some(&error)));
    let failed = Boot::of(log, IMA_LOG.to_vec(), 0, "sha256");
    judged(38, "separator with the error value", &failed, &policy, "boot_firmware_error");

    // The real variable again, now saying what a policy wants to read.
    let name: Vec<u8> = "SecureBoot".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let n = places.windows(2).position(|p| BOOT_LOG[p[0]..p[1]].windows(name.len()).any(|w| w == name)).unwrap();
    let again = &BOOT_LOG[places[n]..places[n + 1]];
    let doubled = Boot::of([BOOT_LOG, again].concat(), IMA_LOG.to_vec(), 0, "sha256");
    judged(34, "SecureBoot variable again after the separator", &doubled, &policy, "boot_variable_repeated");
}

#[test]
fn ima_logs_that_do_not_lead_to_pcr_10() {
    let (golden, policy) = (Boot::golden(), Boot::golden().policy(same));
    let records = ima::parse(IMA_LOG).unwrap();
    let encoded = |records: &[Record]| records.iter().flat_map(Record::encode).collect::<Vec<u8>>();
    let with = |records: &[Record]| Boot { ima: encoded(records), ..golden.clone() };
    let mut reordered = records.clone();
    reordered.swap(5, 6);
    judged(39, "IMA entries reordered", &with(&reordered), &policy, "ima_log_mismatch");
    let mut fixed = records.clone();
    fixed[5] = Record::ima_ng(&[9; 32], fixed[5].digest_and_path().unwrap().1);
    judged(39, "IMA entry changed, its hash fixed", &with(&fixed), &policy, "ima_log_mismatch");
    judged(39, "IMA log without its last entry", &with(&records[..records.len() - 1]), &policy, "ima_log_mismatch");
    let mut violated = records.clone();
    violated.push(Record { template_hash: [0; 20], ..records[5].clone() });
    let violated = Boot::of(BOOT_LOG.to_vec(), encoded(&violated), 0, "sha256");
    judged(39, "IMA violation", &violated, &policy, "ima_violation");
    // What Debian's kernel does in a bank whose hash IMA lacks.
    let padded = Boot::of(BOOT_LOG.to_vec(), IMA_LOG.to_vec(), 0, "sha384");
    judged(39, "SHA-384 bank extended with zero-padded SHA-1", &padded, &padded.policy(same), "accepted");
}
