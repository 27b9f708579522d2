//! The answer to an offline appraisal, for people and for programs.

use super::in_form;
use crate::exit::Exit;
use crate::output::{Answer, Form, counted};
use ambit_model::{Code, Refusal};
use ambit_verify::EkClass;
use ambit_verify::appraisal::Rejected;
use ambit_verify::bootlog::{BootFacts, Fact, Measured};
use ambit_verify::chain::Denial;
use ambit_verify::claims::{policy_json, rules_json, trust_vector};
use ambit_verify::folder::{Believed, Checked, Outcome};
use serde_json::{Value, json};

/// The verdict. Logs that no quote proves are believed only by a caller who said so.
pub(super) fn of(form: Form, outcome: &Outcome, unquoted: bool, class: Option<EkClass>) -> Answer {
    let quoted = outcome.checked.as_ref().is_some_and(|c| c.quoted);
    match &outcome.verdict {
        Ok(believed) if quoted || unquoted => accepted(form, outcome, believed, quoted, class),
        Ok(believed) => {
            let refusal = Refusal::new(
                Code::QuoteMissing,
                "a quote that proves the PCRs",
                "none; the logs alone would be accepted",
            );
            let policy = Some(believed.boot.policy.reference());
            denied(form, outcome, &Rejected { policy, findings: vec![refusal.into()] }, class)
        }
        Err(rejected) => denied(form, outcome, rejected, class),
    }
}

fn accepted(form: Form, outcome: &Outcome, believed: &Believed, quoted: bool, class: Option<EkClass>) -> Answer {
    let verdict = if quoted { "affirming" } else { "unquoted" };
    let policy = believed.boot.policy.reference();
    // Nothing in files proves that the AK is in the TPM of the EK: of the machine's identity no claim is made.
    let vector = trust_vector(None, Some((&believed.boot, &believed.ima)));
    let mut value = base(outcome, verdict, class);
    merge(
        &mut value,
        json!({
            "policy": policy_json(&policy),
            "rules": rules_json(&believed.boot),
            "files": { "judged": believed.ima.is_judged, "listed": believed.ima.listed, "excepted": believed.ima.excepted },
            "trust_vector": vector,
            "findings": [],
        }),
    );
    let text = || {
        let mut lines = vec![format!("{verdict}: policy {} (sha256 {})", policy.name, hex::encode(policy.sha256))];
        lines.extend(checked_lines(outcome, class));
        let rules = believed.boot.consumed.iter().map(|c| format!("  {}: {}", c.rule, events(&c.events)));
        lines.push("rules and the events that they consumed:".to_owned());
        lines.extend(rules);
        let ima = &believed.ima;
        lines.push(if ima.is_judged {
            format!("files: {} listed, {} excepted", ima.listed, ima.excepted)
        } else {
            "files: not judged by this policy".to_owned()
        });
        lines.join("\n")
    };
    Answer::ok(in_form(form, &value, text))
}

fn denied(form: Form, outcome: &Outcome, rejected: &Rejected, class: Option<EkClass>) -> Answer {
    let headline = rejected.headline();
    let mut value = base(outcome, "denied", class);
    merge(&mut value, finding_json(&headline));
    merge(
        &mut value,
        json!({
            "policy": rejected.policy.as_ref().map(policy_json),
            "findings": rejected.findings.iter().map(finding_json).collect::<Vec<_>>(),
        }),
    );
    let text = || {
        let mut lines = vec![format!("denied[{}]", headline.refusal.code)];
        if let Some(policy) = &rejected.policy {
            lines.push(format!("  policy:   {}", policy.name));
        }
        lines.push(format!("  diverged: {}", headline.diverged.as_deref().unwrap_or("-")));
        lines.push(format!("  expected: {}", headline.refusal.expected));
        lines.push(format!("  found:    {}", headline.refusal.found));
        lines.push(format!("  try:      {}", headline.refusal.code.remedy()));
        let others = rejected.findings.iter().skip(1).map(|f| {
            let place = f.diverged.as_deref().unwrap_or("-");
            format!(
                "  also:     {} at {place}: expected {}, found {}",
                f.refusal.code, f.refusal.expected, f.refusal.found
            )
        });
        lines.extend(others);
        lines.extend(checked_lines(outcome, class));
        lines.join("\n")
    };
    Answer::ok(in_form(form, &value, text)).ending(Exit::Denied)
}

/// The keys that every answer has.
fn base(outcome: &Outcome, verdict: &str, class: Option<EkClass>) -> Value {
    let checked = outcome.checked.as_ref();
    json!({
        "verdict": verdict,
        "code": null,
        "diverged": null,
        "expected": null,
        "found": null,
        "remedy": null,
        "policy": null,
        "quoted": checked.is_some_and(|c| c.quoted),
        "nonce_checked": checked.is_some_and(|c| c.nonce),
        "signer_checked": checked.is_some_and(|c| c.signer),
        "endorsement": endorsement(checked),
        "unjudged": unjudged(checked, class),
        "class": class.filter(|_| checked.is_some_and(|c| c.endorsed)).map(EkClass::as_str),
        "facts": facts(outcome),
    })
}

fn endorsement(checked: Option<&Checked>) -> &'static str {
    match checked {
        Some(c) if c.endorsed => "verified",
        Some(_) => "not checked",
        None => "none",
    }
}

/// What the server would judge and nobody asked for here: an answer of a program that wants all of it names none.
fn unjudged(checked: Option<&Checked>, class: Option<EkClass>) -> Vec<&'static str> {
    let Some(c) = checked else { return Vec::new() };
    let parts = [
        ("quote", c.quoted),
        ("nonce", c.nonce),
        ("signer", c.signer),
        ("endorsement", c.endorsed),
        ("class", c.endorsed && class.is_some()),
        // That the AK is in the TPM of the EK shows only when the TPM opens a credential for it: no folder can.
        ("activation", false),
    ];
    parts.iter().filter(|(_, judged)| !judged).map(|(part, _)| *part).collect()
}

fn facts(outcome: &Outcome) -> Value {
    let pcrs: serde_json::Map<_, _> =
        outcome.pcrs.iter().map(|(n, v)| (n.to_string(), hex::encode(v).into())).collect();
    json!({
        "bank": outcome.checked.as_ref().map(|c| c.bank.as_str()),
        "pcrs": pcrs,
        "boot": outcome.boot.as_ref().map(boot_json),
        "ima": outcome.ima.as_ref().map(|ima| json!({
            "entries": ima.entries,
            "bytes": ima.bytes,
            "violations": ima.violations,
            "extended_as": ima.form.as_str(),
        })),
    })
}

fn boot_json(boot: &BootFacts) -> Value {
    json!({
        "log": boot.has_log,
        "events": boot.events,
        "secure_boot": boot.secure_boot,
        "kernel_cmdline": boot.kernel_cmdline,
        "measured": boot.measured.iter().map(event_json).collect::<Vec<_>>(),
    })
}

/// `authenticated`: whether the event's digest is over its text. If not, whoever wrote the log chose the text.
fn event_json(event: &Measured) -> Value {
    let label = |fact, label: &String| (fact, Some(label.clone()), false);
    let (fact, text, authenticated) = match &event.fact {
        Fact::Separator => ("separator", None, true),
        Fact::Action(text) => ("action", Some(text.clone()), true),
        Fact::SecureBoot(on) => ("secure_boot", Some(on.to_string()), true),
        Fact::Keys { variable, entries } => {
            let named = entries.iter().map(|e| e.subject.clone().unwrap_or_else(|| hex::encode(e.sha256)));
            ("keys", Some(format!("{}: {}", variable.as_str(), named.collect::<Vec<_>>().join(", "))), true)
        }
        Fact::Variable { name } => ("variable", Some(name.clone()), event.kind != "EV_EFI_VARIABLE_BOOT"),
        Fact::Authority { variable, entry } => {
            let named = entry.subject.clone().unwrap_or_else(|| hex::encode(entry.sha256));
            ("authority", Some(format!("{variable}: {named}")), true)
        }
        Fact::SbatLevel(level) => {
            ("sbat_level", Some(level.iter().map(|(c, n)| format!("{c},{n}")).collect::<Vec<_>>().join(" ")), true)
        }
        Fact::GrubCommand(text) => ("grub_command", Some(text.clone()), true),
        Fact::CommandLine(text) => ("command_line", Some(text.clone()), true),
        Fact::Image { label: text } => label("image", text),
        Fact::File { label: text } => label("file", text),
        Fact::Mok { label: text } => label("mok", text),
        Fact::LoadOptions => ("load_options", None, false),
        Fact::Opaque => ("opaque", None, false),
    };
    json!({
        "event": event.number,
        "pcr": event.pcr,
        "type": event.kind,
        "digest": hex::encode(&event.digest),
        "fact": fact,
        "text": text,
        "authenticated": authenticated,
    })
}

fn finding_json(denial: &Denial) -> Value {
    json!({
        "code": denial.refusal.code.as_str(),
        "diverged": denial.diverged,
        "expected": denial.refusal.expected,
        "found": denial.refusal.found,
        "remedy": denial.refusal.code.remedy(),
    })
}

/// What was checked and what was not: an answer never hides what nobody asked.
fn checked_lines(outcome: &Outcome, class: Option<EkClass>) -> Vec<String> {
    let mut out = Vec::new();
    if let Some(c) = &outcome.checked {
        out.push(if c.quoted {
            let nonce = if c.nonce { "checked" } else { "not checked (--nonce)" };
            let signer = if c.signer {
                "by an AK that says it is under this EK (only an activation by a cell proves it)"
            } else {
                "by an AK whose EK is not here"
            };
            format!("quote: {} bank, signed {signer}; nonce {nonce}", c.bank.as_str())
        } else {
            format!("quote: none: nothing proves {} and the logs", format_args!("pcrs.{}", c.bank.as_str()))
        });
        out.push(match (c.endorsed, class) {
            (false, _) => "EK: endorsement not checked (--roots), and no rule about its class judged".to_owned(),
            (true, None) => "EK: endorsed by the roots given; no rule about its class judged (--class)".to_owned(),
            (true, Some(class)) => format!("EK: endorsed by the roots given, class {}", class.as_str()),
        });
    }
    if let Some(boot) = &outcome.boot {
        let secure_boot = match boot.secure_boot {
            Some(true) => "on",
            Some(false) => "off",
            None => "unknown",
        };
        out.push(format!("boot log: {}, Secure Boot {secure_boot}", counted(boot.events, "event")));
    }
    if let Some(ima) = &outcome.ima {
        out.push(format!(
            "IMA log: {}, {}",
            counted(ima.entries, "entry").replace("entrys", "entries"),
            counted(ima.violations, "violation")
        ));
    }
    out
}

fn events(numbers: &[usize]) -> String {
    numbers.iter().map(usize::to_string).collect::<Vec<_>>().join(" ")
}

fn merge(into: &mut Value, from: Value) {
    if let (Some(into), Value::Object(from)) = (into.as_object_mut(), from) {
        into.extend(from);
    }
}
