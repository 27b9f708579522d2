use super::*;
use crate::bootlog;
use crate::hash::HashAlg;
use crate::ima as imalog;
use crate::testdata::{golden, golden_pcrs};
use ambit_model::appraisal::{AppraisalPolicy, EndorsementClass, HexDigest, KeyVariable, PcrBank};
use std::collections::BTreeSet;

fn golden_facts() -> BootFacts {
    bootlog::judge_any(&golden("binary_bios_measurements"), HashAlg::Sha256, &golden_pcrs(HashAlg::Sha256)).unwrap()
}

fn golden_files() -> Vec<LearntFile> {
    let mut out = Vec::new();
    let log = golden("ima_binary_runtime_measurements");
    imalog::judge_each(&log, HashAlg::Sha256, &golden_pcrs(HashAlg::Sha256)[&10], &mut |e| {
        out.extend(LearntFile::of(e))
    })
    .unwrap();
    out
}

fn learnt() -> Learnt {
    learnt_from(&golden_files())
}

/// From the golden boot, with these files.
fn learnt_from(ima: &[LearntFile]) -> Learnt {
    let (boot, pcrs) = (golden_facts(), golden_pcrs(HashAlg::Sha256));
    learn(&Source {
        name: "golden".parse().unwrap(),
        clusters: BTreeSet::from(["west".parse().unwrap()]),
        class: Some(EkClass::Lab),
        bank: Bank::Sha256,
        pcrs: &pcrs,
        boot: &boot,
        cmdline: None,
        ima,
        ima_form: crate::ima::ImaForm::Native,
        separate_list: false,
    })
}

fn compiled(policy: &AppraisalPolicy) -> Arc<CompiledPolicy> {
    Arc::new(CompiledPolicy::compile(policy, &mut |_| None).unwrap())
}

fn ask(policy: &AppraisalPolicy, facts: &BootFacts) -> Result<Accepted, Rejected> {
    let pcrs = golden_pcrs(HashAlg::Sha256);
    appraise(&[compiled(policy)], Endorsement::Class(EkClass::Lab), &pcrs, Bank::Sha256, facts)
}

#[test]
fn a_learnt_policy_accepts_its_boot_and_consumes_each_event_once() {
    let (learnt, facts) = (learnt(), golden_facts());
    let accepted = ask(&learnt.policy, &facts).unwrap();
    let mut consumed: Vec<usize> = accepted.consumed.iter().flat_map(|c| c.events.clone()).collect();
    consumed.sort_unstable();
    let policed: Vec<usize> =
        facts.measured.iter().filter(|m| !learnt.policy.unpoliced.contains(&m.pcr)).map(|m| m.number).collect();
    assert_eq!(consumed, policed);
    let of =
        |rule: &str| accepted.consumed.iter().find(|c| c.rule == rule).map(|c| c.events.clone()).unwrap_or_default();
    assert_eq!(of("images"), [23, 29, 42, 43]);
    assert_eq!(of("commandLine"), [44]);
    assert_eq!(of("sbatLevel"), [26]);
    assert_eq!(of("authorities"), [22, 28]);
    assert_eq!(of("mok"), [24, 25, 27]);
    assert_eq!(of("files"), [34, 41, 46]);
    assert_eq!(of("keys.PK"), [5]);
    assert_eq!(of("dbxIncludes"), [8]);
    assert_eq!(of("pcrs.sha256.0"), [1, 2, 3, 15]);
}

/// Each row: what the policy says otherwise than the golden boot, the code, and the event it is found at.
#[test]
fn each_rule_refuses_by_its_own_code() {
    use Code::*;
    type Change = fn(&mut AppraisalPolicy);
    let rows: &[(&str, Change, Code, Option<&str>)] = &[
        (
            "PK",
            |p| {
                p.keys.insert(KeyVariable::Pk, BTreeSet::new());
            },
            BootVariableNotAllowed,
            Some("boot log event 5 (EV_EFI_VARIABLE_DRIVER_CONFIG) of PCR 7"),
        ),
        (
            "db shorter",
            |p| {
                p.keys.get_mut(&KeyVariable::Db).unwrap().pop_first();
            },
            BootVariableNotAllowed,
            Some("boot log event 7 (EV_EFI_VARIABLE_DRIVER_CONFIG) of PCR 7"),
        ),
        (
            "no rule for db",
            |p| {
                p.keys.remove(&KeyVariable::Db);
            },
            BootEventNotCovered,
            Some("boot log event 7 (EV_EFI_VARIABLE_DRIVER_CONFIG) of PCR 7"),
        ),
        (
            "dbx newer",
            |p| {
                p.dbx_includes.get_or_insert_default().insert("11".repeat(32).parse().unwrap());
            },
            DbxTooOld,
            Some("boot log event 8 (EV_EFI_VARIABLE_DRIVER_CONFIG) of PCR 7"),
        ),
        (
            "SbatLevel newer",
            |p| {
                p.sbat_level.get_or_insert_default().insert("shim".into(), 10);
            },
            SbatTooOld,
            Some("boot log event 26 (EV_EFI_VARIABLE_AUTHORITY) of PCR 7"),
        ),
        (
            "SbatLevel of another component",
            |p| {
                p.sbat_level.get_or_insert_default().insert("systemd-boot".into(), 1);
            },
            SbatTooOld,
            Some("boot log event 26 (EV_EFI_VARIABLE_AUTHORITY) of PCR 7"),
        ),
        (
            "authority",
            |p| {
                p.authorities.get_or_insert_default().pop_first();
            },
            BootAuthorityNotAllowed,
            None,
        ),
        (
            "image",
            |p| p.images = Some(BTreeSet::new()),
            BootImageNotAllowed,
            Some("boot log event 23 (EV_EFI_BOOT_SERVICES_APPLICATION) of PCR 4"),
        ),
        ("file", |p| p.files = Some(BTreeSet::new()), BootFileNotAllowed, Some("boot log event 34 (EV_IPL) of PCR 9")),
        ("MokList", |p| p.mok = Some(BTreeSet::new()), MokListNotAllowed, Some("boot log event 24 (EV_IPL) of PCR 14")),
        (
            "GRUB command",
            |p| {
                p.grub_commands.as_mut().unwrap().retain(|c| !c.contains("timeout"));
            },
            CommandLineNotAllowed,
            Some("boot log event 35 (EV_IPL) of PCR 8"),
        ),
        (
            "command line",
            |p| p.command_line.as_mut().unwrap().exact = BTreeSet::from(["quiet".into()]),
            CommandLineNotAllowed,
            Some("boot log event 44 (EV_IPL) of PCR 8"),
        ),
        (
            "no rules at all",
            |p| *p = AppraisalPolicy::new(p.name.clone(), p.clusters.clone()),
            EkClassNotAccepted,
            None,
        ),
        ("class", |p| p.endorsement = BTreeSet::from([EndorsementClass::Hardware]), EkClassNotAccepted, None),
        (
            "golden",
            |p| {
                drop(
                    p.pcrs
                        .get_mut(&PcrBank::Sha256)
                        .unwrap()
                        .insert(0, BTreeSet::from(["11".repeat(32).parse().unwrap()])),
                )
            },
            PcrNotAllowed,
            Some("PCR 0"),
        ),
        ("no golden", |p| p.pcrs.clear(), BootEventNotCovered, Some("boot log event 1 (EV_S_CRTM_VERSION) of PCR 0")),
        (
            "PCR 1 policed",
            |p| {
                p.unpoliced.remove(&1);
            },
            BootEventNotCovered,
            Some("boot log event 10 (EV_EFI_VARIABLE_BOOT) of PCR 1"),
        ),
    ];
    let mut wrong = Vec::new();
    for (what, change, code, place) in rows {
        let mut policy = learnt().policy;
        change(&mut policy);
        match ask(&policy, &golden_facts()) {
            Ok(_) => wrong.push(format!("wrong: policy of another {what}: accepted")),
            Err(rejected) => {
                let headline = rejected.headline();
                let placed = place.is_none() || headline.diverged.as_deref() == *place;
                if headline.refusal.code != *code || !placed {
                    wrong.push(format!("wrong: policy of another {what}: {rejected:?}"));
                }
                assert_eq!(rejected.policy.unwrap().sha256, policy.sha256());
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// A minimum that no event meets would be a rule that says nothing: firmware or a shim that measured no such event is not
/// accepted by a policy that asks for it.
#[test]
fn what_a_policy_asks_for_must_have_been_measured() {
    use crate::bootlog::{Fact, SecureBootVariable as Variable};
    use Code::*;
    let keys = |wanted: Variable| move |f: &Fact| matches!(f, Fact::Keys { variable, .. } if *variable == wanted);
    type Is = Box<dyn Fn(&Fact) -> bool>;
    let rows: [(&str, Is, Code); 8] = [
        ("PK", Box::new(keys(Variable::Pk)), BootVariableNotAllowed),
        ("KEK", Box::new(keys(Variable::Kek)), BootVariableNotAllowed),
        ("db", Box::new(keys(Variable::Db)), BootVariableNotAllowed),
        ("dbx", Box::new(keys(Variable::Dbx)), DbxTooOld),
        ("SbatLevel", Box::new(|f| matches!(f, Fact::SbatLevel(_))), SbatTooOld),
        ("authority", Box::new(|f| matches!(f, Fact::Authority { .. })), BootAuthorityNotAllowed),
        ("MokList", Box::new(|f| matches!(f, Fact::Mok { .. })), MokListNotAllowed),
        ("command line", Box::new(|f| matches!(f, Fact::CommandLine(_))), CommandLineNotAllowed),
    ];
    let policy = learnt().policy;
    let mut wrong = Vec::new();
    for (what, is, code) in &rows {
        let mut facts = golden_facts();
        let before = facts.measured.len();
        facts.measured.retain(|m| !is(&m.fact));
        assert!(facts.measured.len() < before, "{what}");
        match ask(&policy, &facts) {
            Err(rejected) if rejected.findings.len() == 1 && rejected.headline().refusal.code == *code => {}
            other => wrong.push(format!("wrong: boot that measured no {what}: {:?}", other.map(|_| "accepted"))),
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
    // Where the PCR is judged as a whole, or not at all, its golden value says it.
    let mut facts = golden_facts();
    facts.measured.retain(|m| !matches!(m.fact, Fact::SbatLevel(_)));
    let mut unpoliced = policy.clone();
    unpoliced.unpoliced.insert(7);
    assert!(ask(&unpoliced, &facts).is_ok());
}

/// No list may hold a weak digest, and an exception would let any file of the path pass: nothing is learnt, and it is said.
#[test]
fn weak_measurements_are_not_learnt() {
    let mut ima = golden_files();
    for file in &mut ima {
        (file.algorithm, file.digest) = ("sha1".into(), file.digest[..20].to_vec());
    }
    let learnt = learnt_from(&ima);
    let rules = learnt.policy.ima.unwrap();
    assert!(rules.files.is_empty() && rules.exceptions.is_empty());
    assert!(learnt.warnings[0].contains("ima_hash=sha256"), "{:?}", learnt.warnings);
}

#[test]
fn secure_boot_off_is_found_before_all_else_and_golden_values_do_not_excuse_it() {
    let mut facts = golden_facts();
    facts.secure_boot = Some(false);
    let mut policy = learnt().policy;
    policy.images = Some(BTreeSet::new());
    let rejected = ask(&policy, &facts).unwrap_err();
    assert_eq!(rejected.headline().refusal.code, Code::SecureBootOff);
    assert_eq!(rejected.findings.len(), 5, "four images more: {rejected:?}");
    let mut golden_7 = learnt().policy;
    let value = crate::testdata::golden_pcrs(HashAlg::Sha256)[&7].clone();
    let value = HexDigest::new(value).unwrap();
    golden_7.pcrs.get_mut(&PcrBank::Sha256).unwrap().insert(7, BTreeSet::from([value]));
    assert_eq!(ask(&golden_7, &facts).unwrap_err().headline().refusal.code, Code::SecureBootOff);
    facts.secure_boot = None;
    assert_eq!(ask(&golden_7, &facts).unwrap_err().headline().refusal.code, Code::SecureBootOff);
    assert!(ask(&golden_7, &golden_facts()).is_ok());
}

#[test]
fn without_a_log_only_golden_values_pass() {
    let (pcrs, none) = (golden_pcrs(HashAlg::Sha256), BootFacts::default());
    assert_eq!(ask(&learnt().policy, &none).unwrap_err().headline().refusal.code, Code::BootLogMissing);
    let policy = learn(&Source {
        name: "nolog".parse().unwrap(),
        clusters: BTreeSet::new(),
        class: Some(EkClass::Lab),
        bank: Bank::Sha256,
        pcrs: &pcrs,
        boot: &none,
        cmdline: None,
        ima: &[],
        ima_form: crate::ima::ImaForm::Nothing,
        separate_list: false,
    })
    .policy;
    assert!(ask(&policy, &none).is_ok());
    for pcr in crate::bootlog::POLICED_PCRS {
        let mut less = policy.clone();
        less.pcrs.get_mut(&PcrBank::Sha256).unwrap().remove(&pcr);
        let denial = ask(&less, &none).unwrap_err().headline();
        assert_eq!((denial.refusal.code, denial.diverged), (Code::PcrNotAllowed, Some(format!("PCR {pcr}"))));
    }
}

#[test]
fn the_first_policy_that_accepts_answers_and_the_nearest_explains() {
    let good = learnt().policy;
    let mut one_wrong = good.clone();
    one_wrong.name = "near".parse().unwrap();
    one_wrong.files.as_mut().unwrap().pop_first();
    let far = AppraisalPolicy::new("far".parse().unwrap(), BTreeSet::new());
    let pcrs = golden_pcrs(HashAlg::Sha256);
    let ask = |policies: &[&AppraisalPolicy]| {
        let policies: Vec<_> = policies.iter().map(|p| compiled(p)).collect();
        appraise(&policies, Endorsement::Class(EkClass::Lab), &pcrs, Bank::Sha256, &golden_facts())
    };
    let accepted = ask(&[&far, &good, &one_wrong, &good]).unwrap();
    assert_eq!((accepted.policy.policy().name.as_str(), accepted.candidates.len()), ("golden", 2));
    let rejected = ask(&[&far, &one_wrong]).unwrap_err();
    assert_eq!((rejected.policy.unwrap().name.as_str(), rejected.findings.len()), ("near", 1));
    assert_eq!(ask(&[]).unwrap_err().headline().refusal.code, Code::AppraisalPolicyMissing);
}

fn judge_ima(policy: &AppraisalPolicy, change: impl FnOnce(&mut Vec<u8>)) -> Result<ImaAccepted, Rejected> {
    let mut log = golden("ima_binary_runtime_measurements");
    change(&mut log);
    let pcrs = golden_pcrs(HashAlg::Sha256);
    let mut appraisal = ImaAppraisal::new(&[compiled(policy)], Bank::Sha256, &pcrs);
    // The replay that decides whether the quote covers the log is tested with the log; here its entries are shown.
    let mut replay =
        crate::ima::Replay::resume(HashAlg::Sha256, &[1; 32], crate::ima::Checkpoint::start(HashAlg::Sha256));
    let mut entries = 0;
    replay
        .push(&log, &mut |e| {
            entries += 1;
            appraisal.entry(e)
        })
        .unwrap();
    let mut end = crate::ima::Checkpoint::start(HashAlg::Sha256);
    end.entries = entries;
    end.form = crate::ima::ImaForm::Native;
    appraisal.finish(&end)
}

#[test]
fn what_runs_is_judged_entry_by_entry() {
    let policy = learnt().policy;
    let accepted = judge_ima(&policy, |_| {}).unwrap();
    assert_eq!((accepted.listed, accepted.excepted, accepted.is_judged), (41, 0, true));
    let violation = |log: &mut Vec<u8>| {
        let at = log.windows(12).position(|w| w == b"/bin/busybox").unwrap();
        // 4 PCR, 20 hash, 4 + 7 name, 4 size, 4 + 40 digest field, 4 path size.
        log[at - 4 - 44 - 4 - 11 - 20..at - 4 - 44 - 4 - 11].fill(0);
    };
    let rows: Vec<(&str, AppraisalPolicy, Code)> = vec![
        (
            "unlisted",
            {
                let mut p = policy.clone();
                p.ima.as_mut().unwrap().files.retain(|f| f.path.as_deref() != Some("/bin/tpm2"));
                p
            },
            Code::ImaFileNotAllowed,
        ),
        (
            "listed at another path",
            {
                let mut p = policy.clone();
                let ima = p.ima.as_mut().unwrap();
                ima.files = ima
                    .files
                    .iter()
                    .cloned()
                    .map(|mut f| {
                        f.path = f.path.map(|p| p.replace("/bin/", "/sbin/"));
                        f
                    })
                    .collect();
                p
            },
            Code::ImaFileNotAllowed,
        ),
    ];
    for (what, policy, code) in rows {
        let denial = judge_ima(&policy, |_| {}).expect_err(what).headline();
        assert_eq!(denial.refusal.code, code, "{what}");
        assert!(denial.diverged.unwrap().starts_with("IMA entry "), "{what}");
    }
    let denied = judge_ima(&policy, violation).unwrap_err();
    assert_eq!(denied.headline().refusal.code, Code::ImaViolation);
    assert_eq!(denied.headline().diverged.as_deref(), Some("IMA entry 3 /bin/busybox"));
    let mut excepting = policy.clone();
    excepting.ima.as_mut().unwrap().exceptions.insert("/bin/*".into());
    // The path of a violation is anybody's word.
    assert_eq!(judge_ima(&excepting, violation).unwrap_err().headline().refusal.code, Code::ImaViolation);
    excepting.ima.as_mut().unwrap().violations_tolerated = true;
    assert_eq!(judge_ima(&excepting, violation).unwrap().excepted, 1);
    assert_eq!(judge_ima(&policy, |log| log.truncate(0)).unwrap_err().headline().refusal.code, Code::ImaLogMissing);
    let mut silent = policy.clone();
    silent.ima = None;
    assert!(!judge_ima(&silent, violation).unwrap().is_judged);
}

#[test]
fn the_boot_aggregate_is_of_the_quoted_pcrs() {
    let pcrs = golden_pcrs(HashAlg::Sha256);
    let policy = compiled(&learnt().policy);
    let digest = HashAlg::Sha256.digest(&(0..=9).map(|n| pcrs[&n].as_slice()).collect::<Vec<_>>());
    let entry = |digest: &'static [u8], number, algorithm| ImaEntryOf { digest, number, algorithm };
    struct ImaEntryOf {
        digest: &'static [u8],
        number: u64,
        algorithm: &'static str,
    }
    let mut other = pcrs.clone();
    other.insert(4, vec![0; 32]);
    let good: &'static [u8] = Box::leak(digest.into_boxed_slice());
    for (what, e, pcrs, passes) in [
        ("this boot's", entry(good, 1, "sha256"), &pcrs, true),
        ("after kexec", entry(good, 9, "sha256"), &pcrs, true),
        ("another boot's", entry(good, 1, "sha256"), &other, false),
        ("another digest", entry(&[1; 32], 1, "sha256"), &pcrs, false),
        ("a bank not quoted", entry(&[1; 20], 1, "sha1"), &pcrs, true),
        ("a bank not quoted, late", entry(&[1; 20], 2, "sha1"), &pcrs, false),
    ] {
        let entry = crate::ima::ImaEntry {
            number: e.number,
            algorithm: e.algorithm,
            digest: e.digest,
            path: b"boot_aggregate",
            signed: false,
            violation: false,
        };
        let verdict = policy.judge_ima_entry(&entry, &BootAggregate::of(Bank::Sha256, pcrs));
        assert_eq!(verdict.is_ok(), passes, "{what}: {verdict:?}");
    }
}

#[test]
fn an_allow_list_that_is_not_there_is_named() {
    let mut policy = learnt().policy;
    policy.ima.as_mut().unwrap().allow_lists.insert([7; 32]);
    let refusal = CompiledPolicy::compile(&policy, &mut |_| None).unwrap_err();
    assert_eq!(refusal.code, Code::AllowListMissing);
    assert!(refusal.expected.contains(&hex::encode([7; 32])));
    // A list of another text does not stand in for it.
    let other = Arc::new(AllowList::parse(b"").unwrap());
    assert!(CompiledPolicy::compile(&policy, &mut |_| Some(other.clone())).is_err());
}
