//! Appraisal policies as documents: what is read, what is refused and where, and that writing loses nothing.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

use ambit_model::appraisal::{CommandLine, EndorsementClass, ImaFile, ImaRules, KeyVariable, PcrBank};
use ambit_model::{AppraisalPolicy, Code};
use ambit_policy::appraisal::{diff, lint, parse_appraisal, to_yaml, to_yaml_with};
use std::collections::{BTreeMap, BTreeSet};

const A: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
const ONES: &str = "1111111111111111111111111111111111111111111111111111111111111111";

fn full() -> AppraisalPolicy {
    let digests = || BTreeSet::from([A.parse().unwrap(), ONES.parse().unwrap()]);
    let wide = || BTreeSet::from(["e1".repeat(48).parse().unwrap()]);
    let mut p = AppraisalPolicy::new("web-nodes".parse().unwrap(), BTreeSet::from(["west".parse().unwrap()]));
    p.endorsement = BTreeSet::from([EndorsementClass::Virtual, EndorsementClass::Hardware]);
    p.boot_log_optional = true;
    p.secure_boot_any = true;
    p.keys = BTreeMap::from([(KeyVariable::Pk, digests()), (KeyVariable::Kek, BTreeSet::new())]);
    p.dbx_includes = Some(digests());
    p.sbat_level = Some(BTreeMap::from([("shim".to_owned(), 4), ("grub.debian".to_owned(), 5)]));
    p.authorities = Some(digests());
    p.images = Some(wide());
    p.files = Some(BTreeSet::new());
    p.mok = Some(digests());
    p.grub_commands = Some(BTreeSet::from(["set x=\"1\"\n.*".to_owned(), "no".to_owned(), "a: b # c".to_owned()]));
    p.command_line = Some(CommandLine {
        patterns: BTreeSet::from([r"BOOT_IMAGE=/vmlinuz-[0-9.]+ \S+".to_owned()]),
        exact: BTreeSet::from(["\u{e9} 'quoted' {a} - b\t".to_owned()]),
    });
    p.events = BTreeMap::from([(5, digests())]);
    p.pcrs = BTreeMap::from([
        (PcrBank::Sha256, BTreeMap::from([(0, digests())])),
        (PcrBank::Sha384, BTreeMap::from([(2, wide())])),
    ]);
    p.unpoliced = BTreeSet::from([1, 14]);
    p.ima = Some(ImaRules {
        allow_lists: BTreeSet::from([[0x11; 32], [0xee; 32]]),
        files: BTreeSet::from([
            ImaFile { digest: A.parse().unwrap(), path: Some("/usr/bin/a b".to_owned()) },
            ImaFile { digest: ONES.parse().unwrap(), path: None },
        ]),
        exceptions: BTreeSet::from(["/var/log/**".to_owned()]),
        violations_tolerated: true,
    });
    p
}

#[test]
fn writing_loses_nothing() {
    for policy in [full(), AppraisalPolicy::new("empty".parse().unwrap(), BTreeSet::from(["w".parse().unwrap()]))] {
        let text = to_yaml(&policy);
        assert_eq!(parse_appraisal(&text).unwrap(), policy, "{text}");
        assert_eq!(to_yaml(&parse_appraisal(&text).unwrap()), text);
        let comments = BTreeMap::from([
            (A.to_owned(), "Debian\nCA: # 1".to_owned()),
            ("unpoliced.1".to_owned(), "hardware".to_owned()),
            ("ima".to_owned(), "none".to_owned()),
        ]);
        let commented = to_yaml_with(&policy, &comments);
        assert_eq!(parse_appraisal(&commented).unwrap(), policy, "{commented}");
    }
    assert!(
        to_yaml_with(&full(), &BTreeMap::from([(A.to_owned(), "Debian".to_owned())]))
            .contains(&format!("- {A} # Debian\n"))
    );
}

/// What a machine says of itself ends up in comments: whatever it says, no line begins in the middle of one.
#[test]
fn no_comment_writes_a_rule() {
    let policy = full();
    for c in (0..0x3100).chain(0xfe00..0x1_0000).filter_map(char::from_u32).filter(|c| !c.is_alphanumeric()) {
        let comments = BTreeMap::from([(A.to_owned(), format!("x{c}    - {ONES}{c}  endorsement: [lab]{c}"))]);
        let text = to_yaml_with(&policy, &comments);
        assert_eq!(parse_appraisal(&text).ok(), Some(policy.clone()), "{c:?}: {text}");
    }
}

/// Each row: a spec below two clusters, and where and how it is refused.
#[test]
fn what_is_not_understood_is_refused_in_its_place() {
    let rows: &[(&str, &str)] = &[
        ("  secureboot: required\n", "line 6 column 3: spec: unknown field `secureboot`"),
        ("  secureBoot: maybe\n", "line 6 column 15: spec.secureBoot: unknown variant `maybe`"),
        ("  images:\n    - abc\n", "line 7 column 7: spec.images[0]: expected a SHA-256"),
        ("  images:\n    - 1212\n", "line 7 column 7"),
        ("  pcrs:\n    sha1:\n      0: []\n", "line 7 column 5: spec.pcrs: unknown field `sha1`"),
        ("  pcrs:\n    sha384:\n      0:\n        - aaaa\n", "line 9 column 11"),
        ("  unpoliced: [10]\n", "line 6 column 15: spec.unpoliced[0]: invalid value: integer `10`"),
        ("  unpoliced: [23]\n", "line 6 column 15"),
        ("  events:\n    5: []\n    \"5\": []\n", "line 7 column 5"),
        ("  endorsement: []\n", "line 6 column 16: spec.endorsement: invalid length 0"),
        (
            "  endorsement: [cloud]\n",
            "line 6 column 17: spec.endorsement[0]: expected hardware, virtual, lab or listed",
        ),
        ("  keys:\n    dbx: []\n", "line 7 column 5: spec.keys: unknown field `dbx`"),
        ("  ima:\n    files: [/bin/sh]\n", "line 7 column 13"),
        ("  ima:\n    allowLists: [abc]\n", "line 7 column 18"),
        ("  sbatLevel:\n    shim: new\n", "line 7 column 11"),
        ("  grubCommands: [\"\"]\n", "line 6 column 18"),
        ("---\nkind: AppraisalPolicy\n", "a second document"),
    ];
    let head = "kind: AppraisalPolicy\nmetadata:\n  name: web\nspec:\n  clusters: [west]\n";
    assert!(parse_appraisal(head).is_ok());
    for (spec, found) in rows {
        let refusal = parse_appraisal(&format!("{head}{spec}")).expect_err(spec);
        assert_eq!(refusal.code, Code::AppraisalPolicyMalformed, "{spec}");
        assert!(refusal.found.starts_with(found), "{spec}: {refusal}");
    }
    for text in [
        "",
        "[",
        "kind: Policy\n",
        "kind: AppraisalPolicy\n",
        &"[".repeat(1000),
        "kind: AppraisalPolicy\nmetadata:\n  name: web\nspec:\n  clusters: []\n",
    ] {
        assert_eq!(parse_appraisal(text).expect_err(text).code, Code::AppraisalPolicyMalformed);
    }
}

#[test]
fn defaults_are_the_strict_ones() {
    let policy = parse_appraisal("kind: AppraisalPolicy\nmetadata:\n  name: web\nspec:\n  clusters: [west]\n").unwrap();
    assert_eq!(policy, AppraisalPolicy::new("web".parse().unwrap(), BTreeSet::from(["west".parse().unwrap()])));
    assert!(!policy.boot_log_optional && !policy.secure_boot_any);
    assert_eq!(policy.endorsement, BTreeSet::from([EndorsementClass::Hardware]));
}

#[test]
fn two_versions_compare_field_by_field() {
    let (old, mut new) = (full(), full());
    assert_eq!(diff(&old, &new), vec![]);
    new.secure_boot_any = false;
    new.keys.get_mut(&KeyVariable::Pk).unwrap().pop_last();
    new.ima.as_mut().unwrap().exceptions.insert("/tmp/x".to_owned());
    let shown: Vec<String> =
        diff(&old, &new).into_iter().map(|c| format!("{} -{:?} +{:?}", c.field, c.removed, c.added)).collect();
    assert_eq!(
        shown,
        [
            "spec.ima.exceptions -None +Some(\"/tmp/x\")".to_owned(),
            format!("spec.keys.PK -Some({A:?}) +None"),
            "spec.secureBoot -None +Some(\"required\")".to_owned(),
            "spec.secureBoot -Some(\"any\") +None".to_owned(),
        ]
    );
}

#[test]
fn what_is_probably_not_meant_is_warned_of() {
    let mut sound = full();
    sound.boot_log_optional = false;
    sound.secure_boot_any = false;
    sound.ima.as_mut().unwrap().violations_tolerated = false;
    sound.images = Some(BTreeSet::from([A.parse().unwrap()]));
    sound.files = Some(BTreeSet::from([A.parse().unwrap()]));
    sound.grub_commands = Some(BTreeSet::from(["set timeout=[0-9]+".to_owned()]));
    sound.pcrs.remove(&PcrBank::Sha384);
    sound.unpoliced = BTreeSet::from([1]);
    assert_eq!(lint(&sound), Vec::<String>::new());
    type Edit = fn(&mut AppraisalPolicy);
    let rows: &[(Edit, &str)] = &[
        (|p| p.secure_boot_any = true, "secureBoot: any"),
        (|p| p.boot_log_optional = true, "bootLog: optional"),
        (|p| (p.images, p.authorities) = (None, None), "nothing decides which images boot"),
        (|p| p.unpoliced = BTreeSet::from([7]), "unpoliced: PCR 7"),
        (|p| p.dbx_includes = Some(BTreeSet::new()), "dbxIncludes: empty"),
        (|p| p.sbat_level = Some(BTreeMap::new()), "sbatLevel: empty"),
        (|p| p.files = Some(BTreeSet::new()), "files: empty"),
        (|p| p.grub_commands = Some(BTreeSet::from([".*".to_owned()])), "grubCommands: \".*\" matches anything"),
        (
            |p| p.command_line.as_mut().unwrap().patterns = BTreeSet::from(["(?s).+".to_owned()]),
            "commandLine.patterns: \"(?s).+\" matches anything",
        ),
        (
            |p| p.command_line.as_mut().unwrap().patterns = BTreeSet::from(["(".to_owned()]),
            "commandLine.patterns: \"(\" is no regular expression",
        ),
        (|p| p.command_line = Some(CommandLine::default()), "commandLine: empty"),
        (
            |p| {
                p.pcrs.get_mut(&PcrBank::Sha256).unwrap().insert(7, BTreeSet::new());
            },
            "pcrs: golden values of PCR 7 consume its events",
        ),
        (
            |p| {
                p.pcrs.get_mut(&PcrBank::Sha256).unwrap().insert(1, BTreeSet::new());
            },
            "pcrs: PCR 1 has golden values but",
        ),
        (
            |p| {
                p.mok.get_or_insert_default().insert("e1".repeat(48).parse().unwrap());
            },
            "digests of two banks",
        ),
        (|p| p.ima = None, "ima: absent"),
        (
            |p| {
                p.ima.as_mut().unwrap().exceptions.insert("**".to_owned());
            },
            "ima.exceptions: \"**\"",
        ),
        (|p| p.ima.as_mut().unwrap().violations_tolerated = true, "ima.violations: tolerated"),
        (|p| *p.ima.as_mut().unwrap() = ImaRules::default(), "ima: no allow-list"),
        (
            |p| {
                p.endorsement.insert(EndorsementClass::Lab);
            },
            "endorsement: lab",
        ),
    ];
    for (edit, warning) in rows {
        let mut policy = sound.clone();
        edit(&mut policy);
        let said = lint(&policy);
        assert!(said.iter().any(|w| w.starts_with(warning)), "{warning}: {said:?}");
    }
}
