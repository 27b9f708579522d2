//! What is allowed to write but probably not meant.

use ambit_model::appraisal::{AppraisalPolicy, EndorsementClass, PcrBank};

/// PCRs, and the rules whose events stand in each.
const RULES_OF: [(u32, &str); 5] =
    [(4, "images"), (7, "keys, dbxIncludes, sbatLevel or authorities"), (8, "grubCommands"), (9, "files"), (14, "mok")];
/// A text that no honest pattern matches.
const ABSURD: &str = "\u{1}ambit lint: no machine says this\u{1}";

/// Bytes of one compiled pattern: the verifier refuses more.
const PATTERN_BYTES_MAX: usize = 256 * 1024;

/// Warnings, in the order of the document. None means that nothing looks wrong, not that the policy is good.
pub fn lint(policy: &AppraisalPolicy) -> Vec<String> {
    let mut out = Vec::new();
    endorsement(policy, &mut out);
    checks(policy, &mut out);
    patterns(policy, &mut out);
    overlaps(policy, &mut out);
    runtime(policy, &mut out);
    out
}

fn endorsement(policy: &AppraisalPolicy, out: &mut Vec<String>) {
    if policy.endorsement.contains(&EndorsementClass::Lab) {
        out.push("endorsement: lab TPMs prove the protocol and nothing about a machine".to_owned());
    }
}

fn checks(policy: &AppraisalPolicy, out: &mut Vec<String>) {
    if policy.secure_boot_any {
        out.push(
            "secureBoot: any: authorities and keys decide nothing on a machine that does not enforce them".to_owned(),
        );
    }
    if policy.boot_log_optional {
        out.push("bootLog: optional: without a log only golden values are judged".to_owned());
    }
    let decides = policy.images.is_some() || policy.authorities.is_some() || golden(policy, 4);
    if !decides || (policy.unpoliced.contains(&4) && policy.unpoliced.contains(&7)) {
        out.push("nothing decides which images boot: give images, authorities, or golden values of PCR 4".to_owned());
    }
    for pcr in policy.unpoliced.iter().filter(|pcr| matches!(pcr, 4 | 7 | 8 | 9 | 14)) {
        out.push(format!("unpoliced: PCR {pcr} holds what was booted; any of it passes"));
    }
    if policy.dbx_includes.as_ref().is_some_and(|d| d.is_empty()) {
        out.push("dbxIncludes: empty: any dbx passes, however old".to_owned());
    }
    if policy.sbat_level.as_ref().is_some_and(|l| l.is_empty()) {
        out.push("sbatLevel: empty: any SbatLevel passes, however old".to_owned());
    }
    let lists = [
        ("authorities", &policy.authorities),
        ("images", &policy.images),
        ("files", &policy.files),
        ("mok", &policy.mok),
    ];
    for (name, list) in lists.into_iter().filter(|(_, list)| list.as_ref().is_some_and(|d| d.is_empty())) {
        let _ = list;
        out.push(format!("{name}: empty: no such event passes"));
    }
}

fn patterns(policy: &AppraisalPolicy, out: &mut Vec<String>) {
    let commands = policy.grub_commands.iter().flatten().map(|p| ("grubCommands", p));
    let lines = policy.command_line.iter().flat_map(|c| &c.patterns).map(|p| ("commandLine.patterns", p));
    for (field, pattern) in commands.chain(lines) {
        match regex::RegexBuilder::new(&format!(r"\A(?:{pattern})\z")).size_limit(PATTERN_BYTES_MAX).build() {
            Err(_) => out.push(format!("{field}: {pattern:?} is no regular expression; it will be refused")),
            Ok(regex) if regex.is_match(ABSURD) => {
                let more = if field == "grubCommands" {
                    ", a kernel command line too: GRUB's digests do not cover which of the two a text is"
                } else {
                    ""
                };
                out.push(format!("{field}: {pattern:?} matches anything{more}"));
            }
            Ok(_) => {}
        }
    }
    if policy.command_line.as_ref().is_some_and(|c| c.patterns.is_empty() && c.exact.is_empty()) {
        out.push("commandLine: empty: no command line passes".to_owned());
    }
}

fn overlaps(policy: &AppraisalPolicy, out: &mut Vec<String>) {
    let written = |pcr: u32| match pcr {
        4 => policy.images.is_some(),
        7 => {
            !policy.keys.is_empty()
                || policy.dbx_includes.is_some()
                || policy.sbat_level.is_some()
                || policy.authorities.is_some()
        }
        8 => policy.grub_commands.is_some(),
        9 => policy.files.is_some(),
        14 => policy.mok.is_some(),
        _ => false,
    };
    for (pcr, rules) in RULES_OF.iter().filter(|(pcr, _)| golden(policy, *pcr) && written(*pcr)) {
        out.push(format!("pcrs: golden values of PCR {pcr} consume its events; {rules} decides nothing there"));
    }
    for pcr in policy.unpoliced.iter().filter(|pcr| golden(policy, **pcr)) {
        out.push(format!("pcrs: PCR {pcr} has golden values but is also compared as unpoliced"));
    }
    let size = |n: usize| if n == 32 { PcrBank::Sha256 } else { PcrBank::Sha384 };
    let lists = [&policy.images, &policy.files, &policy.mok].into_iter().flatten().chain(policy.events.values());
    let banks: std::collections::BTreeSet<PcrBank> =
        lists.flatten().map(|d| size(d.as_bytes().len())).chain(policy.pcrs.keys().copied()).collect();
    if banks.len() > 1 {
        out.push("digests of two banks: each is compared with nodes quoted in that bank only".to_owned());
    }
}

fn runtime(policy: &AppraisalPolicy, out: &mut Vec<String>) {
    let Some(ima) = &policy.ima else {
        out.push("ima: absent: what runs after boot is not judged".to_owned());
        return;
    };
    if ima.allow_lists.is_empty() && ima.files.is_empty() {
        out.push("ima: no allow-list and no file: only excepted paths pass".to_owned());
    }
    for glob in ima.exceptions.iter().filter(|g| matches!(g.as_str(), "*" | "**" | "/**" | "/*")) {
        out.push(format!("ima.exceptions: {glob:?} tolerates any file"));
    }
    if ima.violations_tolerated {
        out.push("ima.violations: tolerated: a file held open for writing runs unjudged".to_owned());
    }
}

fn golden(policy: &AppraisalPolicy, pcr: u32) -> bool {
    policy.pcrs.values().any(|bank| bank.contains_key(&pcr))
}
