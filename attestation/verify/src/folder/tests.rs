//! Whole folders: real boots against policies learnt from others, and folders that are not what they seem. What each boot
//! is stands in `tests/boots/README.md`; its codes follow from that, not from this crate.

use super::*;
use crate::appraisal::{Learnt, Source, learn};
use crate::hash::HashAlg;
use crate::testdata::{ca_pem, folder, mutant};

/// Every boot in `tests/boots` that shares the base's disk image or its firmware.
const BOOTS: [&str; 13] = [
    "secureboot-grub",
    "secureboot-grub-twin",
    "secureboot-grub-2",
    "ima-violations",
    "ima-off",
    "gpt",
    "dbx",
    "mok",
    "efistub-sb",
    "efistub-nosb",
    "nosb-grub",
    "nolog",
    "nolog-shim",
];

fn boot(name: &str) -> Folder {
    Folder::new(folder("boots", name))
}

fn golden() -> BTreeMap<String, Vec<u8>> {
    folder("golden", "secureboot-grub")
}

fn learnt_from(folder: &Folder) -> Learnt {
    let judged = folder.judge(&Ask::default()).unwrap();
    learn(&Source {
        name: "learnt".parse().unwrap(),
        clusters: std::collections::BTreeSet::from(["west".parse().unwrap()]),
        class: Some(EkClass::Lab),
        bank: judged.checked.bank,
        pcrs: &judged.pcrs,
        boot: &judged.boot,
        cmdline: folder.cmdline(),
        ima: &judged.files,
        ima_form: judged.ima.form,
        separate_list: false,
    })
}

fn policy(folder: &Folder) -> Arc<CompiledPolicy> {
    Arc::new(CompiledPolicy::compile(&learnt_from(folder).policy, &mut |_| None).unwrap())
}

fn codes(outcome: &Outcome) -> Vec<Code> {
    outcome.verdict.as_ref().err().iter().flat_map(|r| r.findings.iter().map(|f| f.refusal.code)).collect()
}

#[test]
fn each_boot_is_accepted_by_what_was_learnt_from_it() {
    for name in BOOTS {
        let folder = boot(name);
        let nonce = folder.file("nonce").and_then(|n| hex::decode(String::from_utf8_lossy(n).trim()).ok());
        assert!(nonce.is_some(), "{name}");
        let ask = Ask { nonce, ..Ask::default() };
        let outcome = folder.appraise(&ask, &[policy(&folder)]);
        let checked = outcome.checked.as_ref().unwrap();
        assert!(outcome.verdict.is_ok(), "{name}: {:?}", outcome.verdict);
        assert!(checked.quoted && checked.nonce && checked.signer && !checked.endorsed, "{name}: {checked:?}");
    }
}

/// Each row: a boot, the headline under the policy of the base boot, and codes that must be among the findings.
#[test]
fn other_boots_are_refused_for_what_they_are() {
    use Code::*;
    let base = [policy(&boot("secureboot-grub"))];
    let rows: &[(&str, Option<Code>, &[Code])] = &[
        ("secureboot-grub-twin", None, &[]),
        ("secureboot-grub-2", Some(BootFileNotAllowed), &[CommandLineNotAllowed, ImaFileNotAllowed]),
        ("ima-violations", Some(BootFileNotAllowed), &[ImaViolation]),
        ("ima-off", Some(BootFileNotAllowed), &[CommandLineNotAllowed, ImaLogMissing]),
        ("gpt", Some(BootEventNotCovered), &[CommandLineNotAllowed]),
        ("dbx", Some(BootFileNotAllowed), &[]),
        // Signed by another key, the kernel is another file but the same image: authenticode leaves the signature out.
        ("mok", Some(MokListNotAllowed), &[BootAuthorityNotAllowed, BootFileNotAllowed]),
        // The same kernel and initrd, started by another hand.
        ("efistub-sb", Some(BootVariableNotAllowed), &[BootAuthorityNotAllowed, CommandLineNotAllowed]),
        ("efistub-nosb", Some(SecureBootOff), &[BootImageNotAllowed, CommandLineNotAllowed]),
        ("nosb-grub", Some(SecureBootOff), &[BootFileNotAllowed]),
        ("nolog", Some(BootLogMissing), &[PcrNotAllowed]),
        ("nolog-shim", Some(BootLogMissing), &[PcrNotAllowed]),
    ];
    for (name, headline, among) in rows {
        let outcome = boot(name).appraise(&Ask::default(), &base);
        let codes = codes(&outcome);
        assert_eq!(codes.first(), headline.as_ref(), "{name}: {:?}", outcome.verdict);
        for code in *among {
            assert!(codes.contains(code), "{name}: {code}: {codes:?}");
        }
        if headline.is_some() {
            assert!(outcome.verdict.as_ref().unwrap_err().policy.is_some(), "{name}");
        }
    }
    // The same boot with a newer dbx: too old the other way round.
    let newer = [policy(&boot("dbx"))];
    assert_eq!(codes(&boot("secureboot-grub").appraise(&Ask::default(), &newer)).first(), Some(&DbxTooOld));
}

#[test]
fn the_stubs_command_line_is_known_only_by_its_digest() {
    let folder = boot("efistub-nosb");
    let learnt = learnt_from(&folder);
    let exact = learnt.policy.command_line.unwrap().exact;
    assert_eq!(exact.first().map(String::as_str), folder.cmdline().map(str::trim_end));
    // A command line that was not measured is not believed.
    let mut files = crate::testdata::folder("boots", "efistub-nosb");
    files.insert("cmdline".into(), b"console=ttyS0 init=/bin/sh\n".to_vec());
    let lying = learnt_from(&Folder::new(files)).policy;
    assert_eq!(lying.command_line, None);
    assert!(lying.events.contains_key(&9));
}

/// Each row: what was done to the golden folder, and the code. The quote is real, so that each check stands alone.
#[test]
fn a_folder_is_judged_in_the_servers_order() {
    use Code::*;
    let golden_policy = [policy(&Folder::new(golden()))];
    let endorsements =
        roots_of_pem(&[ca_pem("swtpm-localca-rootca-cert.pem"), ca_pem("issuercert.pem")].concat(), EkClass::Lab)
            .unwrap();
    type Edit = Box<dyn Fn(&mut BTreeMap<String, Vec<u8>>)>;
    let rows: Vec<(&str, Edit, Code)> = vec![
        ("other nonce", Box::new(|f| drop(f.insert("?nonce".into(), vec![0xab; 32]))), QuoteNonce),
        ("software key, magic 0", Box::new(|f| forged(f, "forged-fk_magic")), QuoteSignature),
        (
            "PCR file of another boot",
            Box::new(|f| drop(f.insert("pcrs.sha256".into(), folder("boots", "gpt").remove("pcrs.sha256").unwrap()))),
            QuotePcrDigest,
        ),
        ("signature cut", Box::new(|f| f.get_mut("quote.tpmt_signature").unwrap().truncate(20)), EvidenceMalformed),
        (
            "EK of another TPM",
            Box::new(|f| {
                drop(f.insert("ek.tpm2b_public".into(), folder("boots", "gpt").remove("ek.tpm2b_public").unwrap()))
            }),
            EkMismatch,
        ),
        (
            "EK certificates of another TPM",
            Box::new(|f| {
                for n in ["ek-p384.nv.der", "ek-rsa2048.nv.der"] {
                    f.insert(n.into(), folder("boots", "gpt").remove(n).unwrap());
                }
            }),
            EkChainUntrusted,
        ),
        ("EK broken", Box::new(|f| f.get_mut("ek.tpm2b_public").unwrap().truncate(50)), EkMalformed),
        (
            "retyped",
            Box::new(|f| drop(f.insert("binary_bios_measurements".into(), mutant("retyped-pcr7.bin")))),
            BootLogEventAltered,
        ),
        (
            "truncated",
            Box::new(|f| drop(f.insert("binary_bios_measurements".into(), mutant("truncated.bin")))),
            BootLogMalformed,
        ),
        (
            "2^32-1 digests",
            Box::new(|f| drop(f.insert("binary_bios_measurements".into(), mutant("digest-count-2e32-1.bin")))),
            BootLogMalformed,
        ),
        (
            "log of another boot",
            Box::new(|f| {
                drop(f.insert(
                    "binary_bios_measurements".into(),
                    folder("boots", "mok").remove("binary_bios_measurements").unwrap(),
                ))
            }),
            BootLogPcrMismatch,
        ),
        ("log withheld", Box::new(|f| drop(f.remove("binary_bios_measurements"))), BootLogMissing),
        ("log empty", Box::new(|f| drop(f.insert("binary_bios_measurements".into(), Vec::new()))), BootLogMissing),
        ("IMA log withheld", Box::new(|f| drop(f.remove("ima_binary_runtime_measurements"))), ImaLogMismatch),
        (
            "IMA log cut",
            Box::new(|f| f.get_mut("ima_binary_runtime_measurements").unwrap().truncate(900)),
            ImaLogMalformed,
        ),
    ];
    let nonce = hex::decode("00112233445566778899aabbccddeeff".repeat(2)).unwrap();
    for (what, edit, code) in rows {
        let mut files = golden();
        edit(&mut files);
        let nonce = files.remove("?nonce").unwrap_or_else(|| nonce.clone());
        let ask = Ask {
            nonce: Some(nonce),
            endorsements: Some(&endorsements),
            class: Some(EkClass::Lab),
            now: Stamp(1_796_000_000_000),
            reference: None,
        };
        let outcome = Folder::new(files).appraise(&ask, &golden_policy);
        assert_eq!(codes(&outcome).first(), Some(&code), "{what}: {:?}", outcome.verdict);
    }
    let ask = Ask {
        nonce: Some(nonce),
        endorsements: Some(&endorsements),
        class: Some(EkClass::Lab),
        now: Stamp(1_796_000_000_000),
        reference: None,
    };
    let good = Folder::new(golden());
    assert!(good.appraise(&ask, &golden_policy).verdict.is_ok());
    // Without roots the EK still binds the AK.
    let mut other_ek = golden();
    other_ek.insert("ek.tpm2b_public".into(), folder("boots", "gpt").remove("ek.tpm2b_public").unwrap());
    let outcome = Folder::new(other_ek).appraise(&Ask::default(), &golden_policy);
    assert_eq!(codes(&outcome), [QuoteSigner]);
    // The policy was learnt from a lab TPM: a hardware one is not its kind.
    let hardware = Ask { class: Some(EkClass::Hardware), ..ask };
    assert_eq!(codes(&good.appraise(&hardware, &golden_policy)), [EkClassNotAccepted]);
}

fn forged(files: &mut BTreeMap<String, Vec<u8>>, name: &str) {
    for (to, from) in [("quote.tpms_attest", "tpms_attest"), ("quote.tpmt_signature", "tpmt_signature")] {
        files.insert(to.into(), mutant(&format!("{name}.{from}")));
    }
}

#[test]
fn a_reference_names_the_first_event_that_differs() {
    let golden_folder = Folder::new(golden());
    let mut files = golden();
    // One bit of the kernel's digest in PCR 9: its content is not in the log, so only the PCR can tell.
    let log = files.get_mut("binary_bios_measurements").unwrap();
    let digest = bootlog::BootLog::parse(log).unwrap().events()[40].digest(HashAlg::Sha256).unwrap().to_vec();
    let at = log.windows(32).position(|w| w == digest).unwrap();
    log[at] ^= 1;
    let altered = Folder::new(files);
    let place = |reference| {
        let ask = Ask { reference, ..Ask::default() };
        let outcome = altered.appraise(&ask, &[policy(&golden_folder)]);
        let denial = outcome.verdict.unwrap_err().headline();
        assert_eq!(denial.refusal.code, Code::BootLogPcrMismatch);
        denial.diverged.unwrap()
    };
    assert_eq!(place(None), "PCR 9");
    assert_eq!(place(Some(&golden_folder)), "boot log event 41 (EV_IPL) of PCR 9");
}

#[test]
fn without_a_quote_the_answer_says_so_and_half_of_one_is_denied() {
    let golden_policy = [policy(&Folder::new(golden()))];
    let judged = |files: &BTreeMap<String, Vec<u8>>, ask: &Ask<'_>| {
        let outcome = Folder::new(files.clone()).appraise(ask, &golden_policy);
        let headline = outcome.verdict.as_ref().err().map(|rejected| rejected.headline().refusal);
        (outcome, headline.map(|r| (r.code, r.found)))
    };
    for name in ["quote.tpms_attest", "quote.tpmt_signature", "ak.tpmt_public"] {
        let mut half = golden();
        half.remove(name);
        let refused = judged(&half, &Ask::default()).1;
        assert_eq!(refused, Some((Code::EvidenceMalformed, format!("no {name}"))));
    }
    let mut files = golden();
    files.retain(|name, _| !name.starts_with("quote.t"));
    let (outcome, refused) = judged(&files, &Ask::default());
    assert!(refused.is_none() && !outcome.checked.unwrap().quoted);
    let asked = Ask { nonce: Some(vec![0]), ..Ask::default() };
    assert_eq!(judged(&files, &asked).1, Some((Code::QuoteMissing, "none".into())));
    let all = String::from_utf8(golden()["pcrs.sha256"].clone()).unwrap();
    let twice = format!("{all}{}\n", all.lines().next().unwrap());
    for (what, text) in
        [("absent", None), ("no PCR 14", Some("0 aa\n")), ("garbage", Some("\u{e9}")), ("PCR 0 twice", Some(&twice))]
    {
        let mut files = files.clone();
        match text {
            None => drop(files.remove("pcrs.sha256")),
            Some(text) => drop(files.insert("pcrs.sha256".into(), text.into())),
        }
        assert_eq!(judged(&files, &Ask::default()).1.map(|r| r.0), Some(Code::EvidenceMalformed), "{what}");
    }
    let endorsements = roots_of_pem(ca_pem("issuercert.pem").as_ref(), EkClass::Lab).unwrap();
    let ask = Ask { endorsements: Some(&endorsements), ..Ask::default() };
    files.remove("ek.tpm2b_public");
    let refused = judged(&files, &ask).1;
    assert_eq!(refused, Some((Code::EvidenceMalformed, "none".into())), "roots, and no EK to judge by them");
}

/// What cannot be read is named by its place; what is too large is told by its size, as the server tells it.
#[test]
fn broken_and_oversize_logs_are_denied_by_their_place_or_size() {
    let golden_policy = [policy(&Folder::new(golden()))];
    let boot = "binary_bios_measurements";
    let ima = "ima_binary_runtime_measurements";
    let cut = |name: &str, bytes: usize| golden()[name][..bytes].to_vec();
    // The log's second event is bytes 197 to 335, the eighth entry of IMA's bytes 787 to 915.
    let rows: [(&str, Vec<u8>, Code, Option<&str>); 5] = [
        (boot, cut(boot, 40), Code::BootLogMalformed, Some("boot log event 0")),
        (boot, cut(boot, 200), Code::BootLogMalformed, Some("boot log event 2")),
        (boot, vec![0; (2 << 20) + 1], Code::EvidenceTooLarge, None),
        (ima, cut(ima, 900), Code::ImaLogMalformed, Some("IMA entry 8")),
        (ima, vec![0; (64 << 20) + 1], Code::EvidenceTooLarge, None),
    ];
    for (name, bytes, code, place) in rows {
        let mut files = golden();
        let len = bytes.len();
        files.insert(name.into(), bytes);
        let denial = Folder::new(files).appraise(&Ask::default(), &golden_policy).verdict.unwrap_err().headline();
        assert_eq!(denial.refusal.code, code, "{name} of {len}: {denial:?}");
        assert_eq!(denial.diverged.as_deref(), place, "{denial:?}");
    }
}
