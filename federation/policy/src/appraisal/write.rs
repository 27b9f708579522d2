//! A policy as YAML: fields in one order, sorted lists, one value a line, so that two versions compare line by line.

use ambit_model::appraisal::{AppraisalPolicy, Digests, ImaFile, ImaRules};
use std::collections::BTreeMap;
use std::fmt::{Display, Write as _};

/// The canonical YAML of `policy`: parsing it gives the same policy.
pub fn to_yaml(policy: &AppraisalPolicy) -> String {
    to_yaml_with(policy, &BTreeMap::new())
}

/// The same with remarks behind values, by the value as it is written, or by `unpoliced.N`, `bootLog` or `ima`.
pub fn to_yaml_with(policy: &AppraisalPolicy, comments: &BTreeMap<String, String>) -> String {
    let mut w = Writer { out: String::new(), comments };
    w.line(0, "kind: AppraisalPolicy");
    w.line(0, "metadata:");
    w.line(1, &format!("name: {}", scalar(policy.name.as_str())));
    w.line(0, "spec:");
    w.list(1, "clusters", policy.clusters.iter().map(|c| c.as_str()));
    w.list(1, "endorsement", policy.endorsement.iter().map(|c| c.as_str()));
    let boot_log = if policy.boot_log_optional { "bootLog: optional" } else { "bootLog: required" };
    w.commented(1, boot_log, "bootLog");
    w.line(1, if policy.secure_boot_any { "secureBoot: any" } else { "secureBoot: required" });
    w.firmware(policy);
    w.loaders(policy);
    w.values(policy);
    match &policy.ima {
        Some(ima) => w.ima(ima),
        None => w.remark(1, "ima"),
    }
    w.out
}

struct Writer<'a> {
    out: String,
    comments: &'a BTreeMap<String, String>,
}

impl Writer<'_> {
    fn firmware(&mut self, policy: &AppraisalPolicy) {
        if !policy.keys.is_empty() {
            self.line(1, "keys:");
            for (variable, digests) in &policy.keys {
                self.list(2, variable.as_str(), digests);
            }
        }
        self.digests("dbxIncludes", policy.dbx_includes.as_ref());
        if let Some(level) = &policy.sbat_level {
            self.line(1, if level.is_empty() { "sbatLevel: {}" } else { "sbatLevel:" });
            for (component, generation) in level {
                self.line(2, &format!("{}: {generation}", scalar(component)));
            }
        }
        self.digests("authorities", policy.authorities.as_ref());
        self.digests("images", policy.images.as_ref());
    }

    fn loaders(&mut self, policy: &AppraisalPolicy) {
        self.digests("files", policy.files.as_ref());
        self.digests("mok", policy.mok.as_ref());
        if let Some(commands) = &policy.grub_commands {
            self.list(1, "grubCommands", commands.iter().map(String::as_str));
        }
        if let Some(line) = &policy.command_line {
            self.line(1, "commandLine:");
            self.list(2, "patterns", line.patterns.iter().map(String::as_str));
            self.list(2, "exact", line.exact.iter().map(String::as_str));
        }
    }

    fn values(&mut self, policy: &AppraisalPolicy) {
        if !policy.events.is_empty() {
            self.line(1, "events:");
            for (pcr, digests) in &policy.events {
                self.list(2, &pcr.to_string(), digests);
            }
        }
        if !policy.pcrs.is_empty() {
            self.line(1, "pcrs:");
            for (bank, values) in &policy.pcrs {
                let none = if values.is_empty() { " {}" } else { "" };
                self.line(2, &format!("{}:{none}", bank.as_str()));
                for (pcr, digests) in values {
                    self.list(3, &pcr.to_string(), digests);
                }
            }
        }
        if !policy.unpoliced.is_empty() {
            self.line(1, "unpoliced:");
            for pcr in &policy.unpoliced {
                self.commented(2, &format!("- {pcr}"), &format!("unpoliced.{pcr}"));
            }
        }
    }

    fn ima(&mut self, ima: &ImaRules) {
        self.line(1, "ima:");
        let path = |f: &ImaFile| f.path.clone().unwrap_or_else(|| "*".to_owned());
        self.list(2, "allowLists", ima.allow_lists.iter().map(hex));
        self.list(2, "files", ima.files.iter().map(|f| format!("{} {}", f.digest, path(f))));
        self.list(2, "exceptions", ima.exceptions.iter().map(String::as_str));
        if ima.violations_tolerated {
            self.commented(2, "violations: tolerate", "ima.violations");
        }
    }

    fn digests(&mut self, name: &str, digests: Option<&Digests>) {
        if let Some(digests) = digests {
            self.list(1, name, digests);
        }
    }

    fn list<T: Display>(&mut self, depth: usize, name: &str, values: impl IntoIterator<Item = T>) {
        let mut values = values.into_iter().peekable();
        let none = if values.peek().is_none() { " []" } else { "" };
        self.line(depth, &format!("{name}:{none}"));
        for value in values {
            let text = value.to_string();
            self.commented(depth + 1, &format!("- {}", scalar(&text)), &text);
        }
    }

    fn commented(&mut self, depth: usize, text: &str, at: &str) {
        match self.comments.get(at) {
            Some(comment) => self.line(depth, &format!("{text} # {}", one_line(comment))),
            None => self.line(depth, text),
        }
    }

    fn remark(&mut self, depth: usize, at: &str) {
        if let Some(comment) = self.comments.get(at) {
            self.line(depth, &format!("# {at}: {}", one_line(comment)));
        }
    }

    fn line(&mut self, depth: usize, text: &str) {
        self.out.push_str(&"  ".repeat(depth));
        self.out.push_str(text);
        self.out.push('\n');
    }
}

fn hex(bytes: &[u8; 32]) -> String {
    bytes.iter().fold(String::new(), |mut out, b| {
        // Writing to a String cannot fail.
        let _ = write!(out, "{b:02x}");
        out
    })
}

/// Part of a comment is what a machine said of itself. YAML breaks lines at more than control characters (U+2028, say), so
/// only what is known not to is let through: else a comment could write rules.
fn one_line(comment: &str) -> String {
    comment.chars().map(|c| if matches!(c, ' '..='~') || c.is_alphanumeric() { c } else { '?' }).collect()
}

/// A YAML scalar that reads as this very string: plain where that is certain, else double-quoted.
fn scalar(text: &str) -> String {
    let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'/'))
        && text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/')
        && !matches!(
            text.to_ascii_lowercase().as_str(),
            "true" | "false" | "null" | "yes" | "no" | "on" | "off" | "y" | "n"
        );
    // Lower-case digests need no quotes unless they could be a number.
    let digest = text.len() >= 64
        && text.bytes().all(|b| b.is_ascii_hexdigit())
        && text.bytes().any(|b| matches!(b, b'a'..=b'd' | b'f'));
    if plain || digest {
        return text.to_owned();
    }
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            c if u32::from(c) < 0x20
                || (0x7f..0xa0).contains(&u32::from(c))
                || matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}') =>
            {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}
