//! Questions about policies: who can call, which are unused, what changed.

use super::super::Session;
use super::flows::missing;
use super::plan::document_text;
use super::{action, callers, egress_row, policy_row};
use crate::ask;
use crate::duration::Millis;
use crate::output::{Answer, Form, Table, counted, pretty};
use crate::when::utc;
use ambit_model::{Code, Refusal, SpiffeId};
use ambit_proto::v1;
use serde_json::{Value, json};
use std::net::{IpAddr, SocketAddr};

/// `ambit policy who-can SPIFFE[:PORT]`.
pub(super) async fn who_can(session: &Session, destination: &str) -> Result<Answer, Refusal> {
    let (destination, port) = asked(destination)?;
    let cell = session.cell()?;
    let request = v1::WhoCanRequest { destination, port: u32::from(port.unwrap_or(0)) };
    let reply = ask!(cell, PolicyRegistry.who_can(request))?;
    let mut table = Table::new("caller", &["spiffe_id", "ports"]);
    for caller in &reply.callers {
        table.row(vec![json!(caller.spiffe_id), json!(caller.ports)]);
    }
    if session.form == Form::Json {
        let callers: Vec<Value> =
            reply.callers.iter().map(|c| json!({"spiffe_id": c.spiffe_id, "ports": c.ports})).collect();
        let rules: Vec<Value> = reply.rules.iter().map(policy_row).collect();
        let egress: Vec<Value> = reply.egress.iter().map(egress_row).collect();
        return Ok(Answer::ok(pretty(
            &json!({"callers": callers, "rules": rules, "egress": egress, "cut_short": reply.cut_short}),
        )));
    }
    let mut out = table.render(session.form);
    for rule in &reply.rules {
        let ports = if rule.ports.is_empty() { "every port".to_owned() } else { list(&rule.ports) };
        let ends = if rule.expires_at_ms == 0 { String::new() } else { format!(" until {}", utc(rule.expires_at_ms)) };
        let clear =
            if rule.transport.is_empty() { String::new() } else { format!(", {}: in clear text", rule.transport) };
        out.push_str(&format!(
            "\n  {} {}/{}: {} on {ports}{clear}{ends}",
            action(rule),
            rule.origin,
            rule.name,
            list(&callers(rule))
        ));
    }
    for rule in &reply.egress {
        let ports = if rule.ports.is_empty() { "every port".to_owned() } else { list(&rule.ports) };
        let (from, to) = (list(&rule.from), list(&rule.to));
        out.push_str(&format!("\n  egress {}: {from} to {to} on {ports}, {}", rule.name, rule.transport));
    }
    let answer = Answer::ok(out);
    Ok(if reply.cut_short { answer.note("there are more callers than are listed") } else { answer })
}

/// An address or a SPIFFE ID, and a port if there is one behind it: behind an IPv6 address in brackets.
fn asked(text: &str) -> Result<(String, Option<u16>), Refusal> {
    if let Ok(address) = text.parse::<SocketAddr>()
        && address.port() > 0
    {
        return Ok((address.ip().to_string(), Some(address.port())));
    }
    match text.parse::<IpAddr>() {
        Ok(address) => Ok((address.to_string(), None)),
        Err(_) => named(text).map(|(id, port)| (id.to_string(), port)),
    }
}

/// A SPIFFE ID, and a port if there is one behind it.
fn named(text: &str) -> Result<(SpiffeId, Option<u16>), Refusal> {
    let with_port = text.strip_prefix("spiffe://").and_then(|rest| rest.rsplit_once(':')).map(|(_, port)| port);
    let Some(written) = with_port else { return Ok((text.parse()?, None)) };
    let port = written.parse::<u16>().ok().filter(|port| *port > 0);
    let port = port.ok_or_else(|| Refusal::new(Code::BadRequest, "a port of 1-65535 behind the SPIFFE ID", text))?;
    Ok((text.strip_suffix(&format!(":{written}")).unwrap_or(text).parse()?, Some(port)))
}

fn list<T: ToString>(items: &[T]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// `ambit policy unused`.
pub(super) async fn unused(session: &Session, within: Option<Millis>) -> Result<Answer, Refusal> {
    let within_ms = within.map_or(0, |within| within.0);
    let reply = ask!(session.cell()?, PolicyRegistry.unused(v1::UnusedRequest { within_ms }))?;
    let mut table = Table::new("policy", &["kind", "origin", "name", "why", "written_by", "revision"]);
    for p in &reply.policies {
        let kind = if p.kind.is_empty() { "policy".to_owned() } else { p.kind.to_lowercase() };
        table.row(vec![
            json!(kind),
            json!(p.origin),
            json!(p.name),
            json!(p.why),
            json!(p.written_by),
            json!(p.revision),
        ]);
    }
    let count = |n: u64, what| counted(usize::try_from(n).unwrap_or(usize::MAX), what);
    let mut answer = Answer::ok(table.render(session.form)).note(format!("of {}", count(reply.policies_all, "policy")));
    if within.is_some() {
        answer = answer.note(format!(
            "{} were seen (of egress and of callers by address none are counted)",
            count(reply.connections, "connection")
        ));
        let missing = missing(reply.left_out, &reply.silent, within_ms.saturating_sub(reply.remembered_ms));
        answer = if missing.is_empty() { answer } else { answer.note(missing) };
    }
    Ok(answer)
}

/// `ambit policy history`.
pub(super) async fn history(session: &Session, limit: u32) -> Result<Answer, Refusal> {
    let reply = ask!(session.cell()?, PolicyRegistry.history(v1::HistoryRequest { limit }))?;
    if session.form == Form::Json {
        let document = |d: &v1::PlannedDocument| json!({"kind": d.kind, "name": d.name, "change": d.change, "before": d.before, "after": d.after});
        let row = |r: &v1::HistoryRow| {
            let documents: Vec<Value> = r.documents.iter().map(document).collect();
            json!({"revision": r.revision, "at": utc(r.stamp_ms), "by": r.by, "note": r.note, "documents": documents})
        };
        return Ok(Answer::ok(pretty(&Value::Array(reply.rows.iter().map(row).collect()))));
    }
    let answer = Answer::ok(history_text(&reply));
    Ok(if reply.cut_short {
        answer.note("older changes are left out: they are too large for one answer")
    } else {
        answer
    })
}

fn history_text(reply: &v1::HistoryResponse) -> String {
    let mut out = String::new();
    for row in &reply.rows {
        let note = if row.note.is_empty() { String::new() } else { format!(" ({})", row.note) };
        let by = if row.by.is_empty() { "somebody" } else { row.by.as_str() };
        out.push_str(&format!("revision {} at {} by {by}{note}\n", row.revision, utc(row.stamp_ms)));
        for line in row.documents.iter().map(document_text).collect::<String>().lines() {
            out.push_str(&format!("  {line}\n"));
        }
    }
    out + &counted(reply.rows.len(), "change")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_may_follow_a_spiffe_id() {
        for (text, want) in [
            ("spiffe://west/db", Ok(("spiffe://west/db", None))),
            ("spiffe://west/db:80", Ok(("spiffe://west/db", Some(80)))),
            ("spiffe://west/db:0", Err(Code::BadRequest)),
            ("spiffe://west/db:", Err(Code::BadRequest)),
            ("spiffe://west/db:x", Err(Code::BadRequest)),
            ("west/db", Err(Code::BadRequest)),
        ] {
            let found = named(text).map(|(id, port)| (id.to_string(), port)).map_err(|r| r.code);
            assert_eq!(found, want.map(|(id, port)| (id.to_owned(), port)), "{text}");
        }
    }

    #[test]
    fn addresses_of_both_families_are_asked_about() {
        for (text, address, port) in [
            ("10.0.0.1", "10.0.0.1", None),
            ("10.0.0.1:80", "10.0.0.1", Some(80)),
            ("fd00::1", "fd00::1", None),
            ("[fd00::1]:80", "fd00::1", Some(80)),
        ] {
            assert_eq!(asked(text).unwrap(), (address.to_owned(), port), "{text}");
        }
        assert_eq!(asked("[fd00::1]:0").unwrap_err().code, Code::BadRequest);
    }

    #[test]
    fn a_history_tells_who_changed_what_and_when() {
        let document = v1::PlannedDocument {
            kind: "Policy".into(),
            name: "db".into(),
            change: "removed".into(),
            before: "deny spiffe://w/a to spiffe://w/db on 80".into(),
            after: String::new(),
        };
        let row = v1::HistoryRow {
            revision: 7,
            stamp_ms: 1_795_442_606_000,
            by: "spiffe://w/ambit/admin/ann".into(),
            note: "rollback to 5".into(),
            documents: vec![document],
        };
        assert_eq!(
            history_text(&v1::HistoryResponse { rows: vec![row], cut_short: false }),
            "revision 7 at 2026-11-23T14:03:26Z by spiffe://w/ambit/admin/ann (rollback to 5)\n  policy db: removed\n    - deny \
             spiffe://w/a to spiffe://w/db on 80\n1 change"
        );
    }
}
