//! One policy's judgement of one boot.

use super::{CompiledPolicy, Consumed, Endorsement, FINDINGS_MAX};
use crate::bootlog::{BootFacts, Fact, Measured, SecureBootVariable, SignatureEntry};
use crate::chain::Denial;
use crate::hash::Bank;
use ambit_model::appraisal::{Digests, EndorsementClass, HexDigest, KeyVariable, POLICED_PCRS, PcrBank};
use ambit_model::{Code, Refusal};
use std::collections::{BTreeMap, BTreeSet};

/// What the firmware says in PCRs 4 and 5 on its way to the loader (PFP 10.4.4, EV_EFI_ACTION strings): part of every
/// boot, so no policy needs to list it. Strings that report a weaker state (`DMA Protection Disabled`, `UEFI Debug
/// Mode`) are not among them.
const BOOT_ACTIONS: [&str; 5] = [
    "Calling EFI Application from Boot Option",
    "Returning from EFI Application from Boot Option",
    "Exit Boot Services Invocation",
    "Exit Boot Services Returned with Success",
    "Exit Boot Services Returned with Failure",
];
/// Offending entries or digests named in one finding.
const NAMED_MAX: usize = 4;

/// What one policy says of a boot.
pub(super) struct Judgement {
    pub(super) findings: Vec<Denial>,
    pub(super) consumed: Vec<Consumed>,
}

/// What a boot shows by an event that a rule accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Shown {
    CommandLine,
    Pk,
    Kek,
    Db,
    Dbx,
    SbatLevel,
    Authority,
    Mok,
}

impl Shown {
    fn by(rule: &str, event: &Measured) -> Option<Shown> {
        match &event.fact {
            Fact::Keys { variable: SecureBootVariable::Pk, .. } => Some(Shown::Pk),
            Fact::Keys { variable: SecureBootVariable::Kek, .. } => Some(Shown::Kek),
            Fact::Keys { variable: SecureBootVariable::Db, .. } => Some(Shown::Db),
            Fact::Keys { variable: SecureBootVariable::Dbx, .. } => Some(Shown::Dbx),
            Fact::SbatLevel(_) => Some(Shown::SbatLevel),
            Fact::Authority { .. } => Some(Shown::Authority),
            Fact::Mok { .. } => Some(Shown::Mok),
            _ => (rule == "commandLine").then_some(Shown::CommandLine),
        }
    }
}

/// Whether a rule has an opinion on an event.
enum Ruling {
    /// It consumes the event.
    Consumes(String),
    /// It is about such events, and this one is not allowed.
    Refuses { code: Code, expected: String, found: String },
    /// The policy has no such rule.
    Absent,
}

impl CompiledPolicy {
    /// All that this policy finds wrong: first about the machine, then event by event, then PCR by PCR.
    pub(super) fn judge_boot(
        &self,
        endorsement: Endorsement,
        pcrs: &BTreeMap<u32, Vec<u8>>,
        bank: Bank,
        boot: &BootFacts,
    ) -> Judgement {
        let mut findings = self.machine(endorsement, boot);
        let mut rules: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        let mut shown: BTreeSet<Shown> = BTreeSet::new();
        for event in &boot.measured {
            if self.policy.unpoliced.contains(&event.pcr) || !pcrs.contains_key(&event.pcr) {
                continue;
            }
            let ruling = match self.golden(bank, event.pcr) {
                // Golden values consume the whole PCR, but never excuse Secure Boot: that is judged above.
                Some(_) => Ruling::Consumes(format!("pcrs.{}.{}", bank.as_str(), event.pcr)),
                None => self.event(event),
            };
            match ruling {
                Ruling::Consumes(rule) => {
                    shown.extend(Shown::by(&rule, event));
                    rules.entry(rule).or_default().push(event.number);
                }
                Ruling::Refuses { code, expected, found } => findings.push(finding(event, code, &expected, found)),
                Ruling::Absent => {
                    findings.push(finding(
                        event,
                        Code::BootEventNotCovered,
                        "an event that a rule covers",
                        describe(event),
                    ));
                }
            }
        }
        if boot.has_log {
            for (_, code, expected) in self.must_show(bank).into_iter().filter(|(what, ..)| !shown.contains(what)) {
                // Where an event is refused by the rule, that says more than that no event meets it.
                if !findings.iter().any(|f| f.refusal.code == code) {
                    let expected = format!("{expected} that the policy accepts");
                    findings.push(Refusal::new(code, expected, "none that was measured").into());
                }
            }
        }
        findings.extend(self.pcrs(pcrs, bank, boot));
        findings.truncate(FINDINGS_MAX);
        let consumed = rules.into_iter().map(|(rule, events)| Consumed { rule, events }).collect();
        Judgement { findings, consumed }
    }

    /// What concerns the machine as a whole.
    fn machine(&self, endorsement: Endorsement, boot: &BootFacts) -> Vec<Denial> {
        let mut out: Vec<Denial> = Vec::new();
        if let Endorsement::Class(class) = endorsement
            && !self.policy.endorsement.contains(&EndorsementClass::from(class))
        {
            let accepted: Vec<_> = self.policy.endorsement.iter().map(|c| c.as_str()).collect();
            out.push(Refusal::new(Code::EkClassNotAccepted, accepted.join(" or "), class.as_str()).into());
        }
        if !boot.has_log && !self.policy.boot_log_optional {
            out.push(Refusal::new(Code::BootLogMissing, "a boot log", "none").into());
        } else if !self.policy.secure_boot_any && boot.secure_boot != Some(true) {
            let found = match (boot.has_log, boot.secure_boot) {
                (false, _) => "no boot log that shows it",
                (true, Some(_)) => "SecureBoot off",
                (true, None) => "no SecureBoot variable measured",
            };
            let event = boot.measured.iter().find(|m| matches!(m.fact, Fact::SecureBoot(_)));
            let refusal = Refusal::new(Code::SecureBootOff, "SecureBoot on", found);
            out.push(Denial { refusal, diverged: event.map(Measured::place) });
        }
        out
    }

    fn golden(&self, bank: Bank, pcr: u32) -> Option<&Digests> {
        let bank = match bank {
            Bank::Sha256 => PcrBank::Sha256,
            Bank::Sha384 => PcrBank::Sha384,
        };
        self.policy.pcrs.get(&bank)?.get(&pcr)
    }

    /// What a boot must have measured: a rule that no event meets would be a rule that says nothing. Not where its PCRs
    /// are not judged event by event.
    fn must_show(&self, bank: Bank) -> Vec<(Shown, Code, &'static str)> {
        let p = &self.policy;
        let judged = |pcrs: &[u32]| pcrs.iter().all(|n| !p.unpoliced.contains(n) && self.golden(bank, *n).is_none());
        let mut out = Vec::new();
        if p.command_line.is_some() && judged(&[8, 9]) {
            out.push((Shown::CommandLine, Code::CommandLineNotAllowed, "a kernel command line"));
        }
        if judged(&[7]) {
            out.extend(p.keys.keys().map(|key| match key {
                KeyVariable::Pk => (Shown::Pk, Code::BootVariableNotAllowed, "PK"),
                KeyVariable::Kek => (Shown::Kek, Code::BootVariableNotAllowed, "KEK"),
                KeyVariable::Db => (Shown::Db, Code::BootVariableNotAllowed, "db"),
            }));
            let some = |digests: &Option<Digests>| digests.as_ref().is_some_and(|d| !d.is_empty());
            if some(&p.dbx_includes) {
                out.push((Shown::Dbx, Code::DbxTooOld, "dbx"));
            }
            if p.sbat_level.as_ref().is_some_and(|level| !level.is_empty()) {
                out.push((Shown::SbatLevel, Code::SbatTooOld, "SbatLevel"));
            }
            if some(&p.authorities) {
                out.push((Shown::Authority, Code::BootAuthorityNotAllowed, "an authority"));
            }
        }
        if p.mok.as_ref().is_some_and(|mok| !mok.is_empty()) && judged(&[14]) {
            out.push((Shown::Mok, Code::MokListNotAllowed, "one of shim's lists"));
        }
        out
    }

    /// Golden values, and without a log all that there is to judge.
    fn pcrs(&self, pcrs: &BTreeMap<u32, Vec<u8>>, bank: Bank, boot: &BootFacts) -> Vec<Denial> {
        let mut out = Vec::new();
        let judged = POLICED_PCRS.into_iter().filter(|n| !self.policy.unpoliced.contains(n));
        for (pcr, value) in judged.filter_map(|n| Some((n, pcrs.get(&n)?))) {
            let never_extended = value.iter().all(|b| *b == 0);
            let expected = match self.golden(bank, pcr) {
                Some(golden) if holds(golden, value) => continue,
                Some(golden) => format!("PCR {pcr} {} {}", bank.as_str(), named(golden)),
                // Without a log nothing else can explain what was extended.
                None if !boot.has_log && self.policy.boot_log_optional && !never_extended => {
                    format!("golden values of PCR {pcr} {}, since there is no boot log", bank.as_str())
                }
                None => continue,
            };
            let refusal = Refusal::new(Code::PcrNotAllowed, expected, hex::encode(value));
            out.push(Denial::at(refusal, format!("PCR {pcr}")));
        }
        out
    }

    /// What the rules say of one event: the one about its kind first, then the list of digests of its PCR.
    fn event(&self, event: &Measured) -> Ruling {
        let ruling = self.by_kind(event);
        let listed = self.policy.events.get(&event.pcr);
        match (ruling, listed) {
            (Ruling::Consumes(rule), _) => Ruling::Consumes(rule),
            (_, Some(listed)) if holds(listed, &event.digest) => Ruling::Consumes(format!("events.{}", event.pcr)),
            (other, _) => other,
        }
    }

    fn by_kind(&self, event: &Measured) -> Ruling {
        let p = &self.policy;
        match &event.fact {
            Fact::Separator => Ruling::Consumes("separator".to_owned()),
            Fact::Action(text) if matches!(event.pcr, 4 | 5) && BOOT_ACTIONS.contains(&text.as_str()) => {
                Ruling::Consumes("bootAction".to_owned())
            }
            // Secure Boot off was found above, where it is wrong.
            Fact::SecureBoot(_) => Ruling::Consumes("secureBoot".to_owned()),
            Fact::Keys { variable, entries } => self.keys(*variable, entries),
            Fact::SbatLevel(level) => self.sbat(level),
            Fact::Authority { variable, entry } => match &p.authorities {
                None => Ruling::Absent,
                Some(allowed) if holds(allowed, &entry.sha256) => Ruling::Consumes("authorities".to_owned()),
                Some(allowed) => Ruling::Refuses {
                    code: Code::BootAuthorityNotAllowed,
                    expected: named(allowed),
                    found: format!("{variable} {}", named_entry(entry)),
                },
            },
            Fact::Image { .. } => digest_rule("images", p.images.as_ref(), event, Code::BootImageNotAllowed),
            Fact::File { .. } => digest_rule("files", p.files.as_ref(), event, Code::BootFileNotAllowed),
            Fact::Mok { .. } => digest_rule("mok", p.mok.as_ref(), event, Code::MokListNotAllowed),
            Fact::GrubCommand(text) => match &p.grub_commands {
                None => Ruling::Absent,
                Some(_) if self.grub_commands.iter().any(|r| r.is_match(text)) => {
                    Ruling::Consumes("grubCommands".to_owned())
                }
                Some(_) => Ruling::Refuses {
                    code: Code::CommandLineNotAllowed,
                    expected: "a GRUB command that grubCommands matches".to_owned(),
                    found: quoted(text),
                },
            },
            Fact::CommandLine(text) => self.command_line(
                |line, me| line.exact.contains(text) || me.command_lines.iter().any(|r| r.is_match(text)),
                || quoted(text),
            ),
            Fact::LoadOptions => {
                let found = || format!("load options whose digest is {}", hex::encode(&event.digest));
                self.command_line(|_, me| me.load_options.contains(&event.digest), found)
            }
            Fact::Action(_) | Fact::Variable { .. } | Fact::Opaque => Ruling::Absent,
        }
    }

    fn command_line(
        &self,
        matches: impl Fn(&ambit_model::appraisal::CommandLine, &Self) -> bool,
        found: impl Fn() -> String,
    ) -> Ruling {
        match &self.policy.command_line {
            None => Ruling::Absent,
            Some(line) if matches(line, self) => Ruling::Consumes("commandLine".to_owned()),
            Some(_) => Ruling::Refuses {
                code: Code::CommandLineNotAllowed,
                expected: "a command line that commandLine matches".to_owned(),
                found: found(),
            },
        }
    }

    fn keys(&self, variable: SecureBootVariable, entries: &[SignatureEntry]) -> Ruling {
        let key = match variable {
            SecureBootVariable::Pk => KeyVariable::Pk,
            SecureBootVariable::Kek => KeyVariable::Kek,
            SecureBootVariable::Db => KeyVariable::Db,
            SecureBootVariable::Dbx => return self.dbx(entries),
        };
        let Some(allowed) = self.policy.keys.get(&key) else { return Ruling::Absent };
        let foreign: Vec<_> = entries.iter().filter(|e| !holds(allowed, &e.sha256)).take(NAMED_MAX).collect();
        if foreign.is_empty() {
            return Ruling::Consumes(format!("keys.{}", key.as_str()));
        }
        let found: Vec<_> = foreign.into_iter().map(named_entry).collect();
        Ruling::Refuses {
            code: Code::BootVariableNotAllowed,
            expected: format!("{} of {}", key.as_str(), named(allowed)),
            found: found.join(", "),
        }
    }

    fn dbx(&self, entries: &[SignatureEntry]) -> Ruling {
        let Some(wanted) = &self.policy.dbx_includes else { return Ruling::Absent };
        let here: std::collections::BTreeSet<&[u8]> = entries.iter().map(|e| e.sha256.as_slice()).collect();
        let missing: Digests = wanted.iter().filter(|w| !here.contains(w.as_bytes())).cloned().collect();
        if missing.is_empty() {
            return Ruling::Consumes("dbxIncludes".to_owned());
        }
        Ruling::Refuses {
            code: Code::DbxTooOld,
            expected: format!("dbx with {}", named(&missing)),
            found: format!("{} entries, {} of {} missing", entries.len(), missing.len(), wanted.len()),
        }
    }

    fn sbat(&self, level: &BTreeMap<String, u32>) -> Ruling {
        let Some(least) = &self.policy.sbat_level else { return Ruling::Absent };
        let old = least.iter().find(|(component, n)| level.get(*component).is_none_or(|have| have < *n));
        match old {
            None => Ruling::Consumes("sbatLevel".to_owned()),
            Some((component, n)) => Ruling::Refuses {
                code: Code::SbatTooOld,
                expected: format!("{component} {n} or newer"),
                found: level.get(component).map_or_else(|| "none".to_owned(), |have| format!("{component} {have}")),
            },
        }
    }
}

fn digest_rule(rule: &str, allowed: Option<&Digests>, event: &Measured, code: Code) -> Ruling {
    match allowed {
        None => Ruling::Absent,
        Some(allowed) if holds(allowed, &event.digest) => Ruling::Consumes(rule.to_owned()),
        Some(allowed) => {
            Ruling::Refuses { code, expected: format!("{rule} {}", named(allowed)), found: describe(event) }
        }
    }
}

fn finding(event: &Measured, code: Code, expected: &str, found: String) -> Denial {
    let place = event.place();
    Denial::at(Refusal::new(code, format!("{place}: {expected}"), found), place)
}

fn holds(digests: &Digests, bytes: &[u8]) -> bool {
    HexDigest::new(bytes).is_some_and(|d| digests.contains(&d))
}

/// `one of 3: aa, bb, ...`, bounded.
fn named(digests: &Digests) -> String {
    let few: Vec<String> = digests.iter().take(NAMED_MAX).map(HexDigest::to_string).collect();
    match digests.len() {
        0 => "an empty list".to_owned(),
        1 => few.concat(),
        n => format!("one of {n}: {}{}", few.join(", "), if n > NAMED_MAX { ", ..." } else { "" }),
    }
}

fn named_entry(entry: &SignatureEntry) -> String {
    let digest = hex::encode(entry.sha256);
    entry.subject.as_ref().map_or_else(|| digest.clone(), |s| format!("{digest} ({s})"))
}

fn quoted(text: &str) -> String {
    let short: String = text.chars().take(500).collect();
    format!("{short:?}")
}

/// An event for the operator: what it says, and the digest that a rule would name.
pub(super) fn describe(event: &Measured) -> String {
    let digest = hex::encode(&event.digest);
    match &event.fact {
        Fact::Action(text) | Fact::GrubCommand(text) | Fact::CommandLine(text) => {
            format!("{} ({digest})", quoted(text))
        }
        Fact::Variable { name } | Fact::Authority { variable: name, .. } => format!("{name} ({digest})"),
        Fact::Keys { variable, .. } => format!("{} ({digest})", variable.as_str()),
        Fact::Image { label } | Fact::File { label } | Fact::Mok { label } if !label.is_empty() => {
            format!("{digest} (said to be {label})")
        }
        Fact::SbatLevel(_) => format!("SbatLevel ({digest})"),
        Fact::LoadOptions => format!("load options ({digest})"),
        Fact::Separator
        | Fact::SecureBoot(_)
        | Fact::Opaque
        | Fact::Image { .. }
        | Fact::File { .. }
        | Fact::Mok { .. } => digest,
    }
}
