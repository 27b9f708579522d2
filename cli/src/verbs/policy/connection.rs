//! `ambit explain --connection`: how one connection was judged, beside what is judged now.

use crate::when::utc;
use ambit_model::{Code, Refusal};
use ambit_proto::v1;
use serde_json::{Value, json};

/// The id in what was written: itself, or that of a traceparent (W3C Trace Context, section 3.2).
pub(super) fn id(text: &str) -> Result<String, Refusal> {
    let bad = || Refusal::new(Code::BadRequest, "an id of 32 hexadecimal digits, or a traceparent", text);
    let is_hex = |part: &str, digits: usize| part.len() == digits && part.bytes().all(|b| b.is_ascii_hexdigit());
    let parts: Vec<&str> = text.split('-').collect();
    let id = match parts[..] {
        [id] => id,
        [version, id, span, flags] if is_hex(version, 2) && is_hex(span, 16) && is_hex(flags, 2) => id,
        _ => return Err(bad()),
    };
    if is_hex(id, 32) { Ok(id.to_ascii_lowercase()) } else { Err(bad()) }
}

/// A line for each place where it was judged, and what is said otherwise now.
pub(super) fn text_of(id: &str, found: &v1::ConnectionResponse, now: &v1::ExplainResponse) -> String {
    let mut out = format!("\nconnection {id}");
    for row in &found.judged {
        let rule = if row.rule.is_empty() { row.reason.clone() } else { format!("{}, {}", row.rule, row.reason) };
        let ended = if row.flags.is_empty() { String::new() } else { format!("; ended {}", row.flags) };
        out.push_str(&format!(
            "\n  {:10} {} at {}, node {}, revision {}: {}{ended}",
            format!("{}:", row.place),
            verdict(row.allowed),
            utc(row.at_ms),
            short(&row.node),
            row.revision,
            if rule.is_empty() { "no rule is remembered" } else { &rule },
        ));
        if let Some(changed) = changed(row, now) {
            out.push_str(&format!("\n  {:10} {changed}", ""));
        }
    }
    if !found.silent.is_empty() {
        let nodes: Vec<String> = found.silent.iter().map(|node| short(node)).collect();
        out.push_str(&format!("\n  {:10} no answer from node {}", "silent:", nodes.join(", ")));
    }
    if !found.silent_replicas.is_empty() {
        let replicas: Vec<String> = found.silent_replicas.iter().map(u64::to_string).collect();
        out.push_str(&format!("\n  {:10} no answer from replica {}, nor its nodes", "silent:", replicas.join(", ")));
    }
    out
}

/// What became of the verdict since. An end that refused for another reason than policy is no change.
fn changed(row: &v1::JudgedConnection, now: &v1::ExplainResponse) -> Option<String> {
    let since = format!("since revision {}", row.revision);
    if row.allowed != now.allowed
        && (row.allowed || !row.rule.is_empty() || row.reason == now.reason || is_default(row))
    {
        let by = if now.rule.is_empty() { &now.reason } else { &now.rule };
        return Some(format!("changed {since}: {} now, by {by}", verdict(now.allowed)));
    }
    let is_other = row.allowed == now.allowed && !row.rule.is_empty() && row.rule != now.rule;
    is_other.then(|| format!("changed {since}: by {} now", if now.rule.is_empty() { &now.reason } else { &now.rule }))
}

/// No policy allowed it, as the kernel's or the agent's word for it is.
fn is_default(row: &v1::JudgedConnection) -> bool {
    row.reason.contains("default")
}

fn verdict(allowed: bool) -> &'static str {
    if allowed { "allowed" } else { "denied" }
}

fn short(node: &str) -> String {
    node.chars().take(12).collect()
}

pub(super) fn json_of(id: &str, found: &v1::ConnectionResponse, now: &v1::ExplainResponse) -> Value {
    let row = |row: &v1::JudgedConnection| {
        json!({
            "node": row.node, "place": row.place, "at": utc(row.at_ms), "revision": row.revision, "source": row.source,
            "destination": row.destination, "address": row.address, "port": row.port, "allowed": row.allowed,
            "rule": row.rule, "reason": row.reason, "flags": row.flags, "changed": changed(row, now),
        })
    };
    json!({
        "id": id, "judged": found.judged.iter().map(row).collect::<Vec<Value>>(), "asked": found.asked,
        "silent": found.silent, "silent_replicas": found.silent_replicas,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_its_digits_or_those_of_a_traceparent() {
        let digits = "0af7651916cd43dd8448eb211c80319c";
        for good in [digits.to_owned(), digits.to_uppercase(), format!("00-{digits}-b7ad6b7169203331-01")] {
            assert_eq!(id(&good).unwrap(), digits);
        }
        for bad in
            ["", "0af7", &format!("{digits}0"), &format!("00-{digits}-01"), &"g".repeat(32), &format!("-{digits}")]
        {
            assert_eq!(id(bad).unwrap_err().code, Code::BadRequest, "{bad}");
        }
    }

    #[test]
    fn what_was_judged_stands_beside_what_is_judged_now() {
        let row = |place: &str, node: &str, allowed, rule: &str, reason: &str, flags: &str| v1::JudgedConnection {
            node: node.repeat(32),
            place: place.into(),
            at_ms: 1_795_442_606_000,
            revision: 7,
            allowed,
            rule: rule.into(),
            reason: reason.into(),
            flags: flags.into(),
            ..Default::default()
        };
        let found = v1::ConnectionResponse {
            judged: vec![
                row("calling", "aa", true, "east/open", "allowed by policy", "-"),
                row("called", "bb", false, "", "svid_revoked: not an SVID that was not revoked", "UAEX"),
                row("kernel", "aa", false, "", "denied by default: no policy allows it", "UAEX"),
            ],
            silent: vec!["cc".repeat(32)],
            silent_replicas: vec![3],
            asked: vec![],
        };
        let now =
            v1::ExplainResponse { rule: "east/shut".into(), reason: "denied by policy".into(), ..Default::default() };
        assert_eq!(
            text_of("0af7", &found, &now),
            "\nconnection 0af7\
             \n  calling:   allowed at 2026-11-23T14:03:26Z, node aaaaaaaaaaaa, revision 7: east/open, allowed by policy; ended -\
             \n             changed since revision 7: denied now, by east/shut\
             \n  called:    denied at 2026-11-23T14:03:26Z, node bbbbbbbbbbbb, revision 7: svid_revoked: not an SVID that was not \
             revoked; ended UAEX\
             \n  kernel:    denied at 2026-11-23T14:03:26Z, node aaaaaaaaaaaa, revision 7: denied by default: no policy allows it; \
             ended UAEX\
             \n  silent:    no answer from node cccccccccccc\
             \n  silent:    no answer from replica 3, nor its nodes"
        );
        let open = v1::ExplainResponse { allowed: true, rule: "east/open".into(), ..Default::default() };
        let json = json_of("0af7", &found, &open);
        assert_eq!(json["judged"][0]["changed"], Value::Null);
        assert_eq!(json["judged"][1]["changed"], Value::Null, "what was revoked is not the policy's");
        assert_eq!(json["judged"][2]["changed"], "changed since revision 7: allowed now, by east/open");
        assert_eq!(json["silent_replicas"], json!([3]));
    }
}
