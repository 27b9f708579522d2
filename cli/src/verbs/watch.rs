//! `ambit watch`: objects as they change, over whichever replica is there.

use super::Session;
use crate::args::Watch;
use crate::cell::Cell;
use crate::client;
use crate::output::{Answer, Form};
use ambit_model::Refusal;
use ambit_proto::status::from_status;
use ambit_proto::v1::{self, watch_event::Event};
use serde_json::{Value, json};
use std::io::Write;
use std::time::Duration;
use tonic::Streaming;

/// Between the end of a stream and the next try.
const AGAIN: Duration = Duration::from_millis(200);

/// Prints a line for each event until it is interrupted, or with `--once` until everything was told. A stream that breaks
/// is taken up at another replica where this one ended.
pub(super) async fn run(session: &Session, options: Watch) -> Result<Answer, Refusal> {
    let cell = session.cell()?;
    let kinds = options.kinds.iter().map(|kind| kind.as_str().to_owned()).collect::<Vec<_>>();
    let mut after = options.after;
    loop {
        let request = v1::WatchRequest { kinds: kinds.clone(), after_revision: after, stale_ok: options.stale_ok };
        let mut events = open(&cell, request).await?;
        match follow(session.form, &mut events, &mut after, options.once).await {
            Followed::Enough => return Ok(Answer::ok("")),
            Followed::Broken(refusal) => {
                complain(&format!("watch: {refusal}; going on after revision {after}"));
                // A replica that takes calls and ends them at once is not asked in a tight loop.
                tokio::time::sleep(AGAIN).await;
            }
            Followed::Refused(refusal) => return Err(refusal),
        }
    }
}

async fn open(cell: &Cell, request: v1::WatchRequest) -> Result<Streaming<v1::WatchEvent>, Refusal> {
    let ask = |channel| {
        let request = request.clone();
        async move { client!(Watch, channel).watch(request).await }
    };
    cell.call(ask).await
}

enum Followed {
    /// Everything asked for was told, or nobody reads any more.
    Enough,
    /// Another replica may go on.
    Broken(Refusal),
    /// The cell's answer is no.
    Refused(Refusal),
}

async fn follow(form: Form, events: &mut Streaming<v1::WatchEvent>, after: &mut u64, once: bool) -> Followed {
    loop {
        let (revision, event) = match events.message().await {
            Ok(Some(v1::WatchEvent { revision, event: Some(event) })) => (revision, event),
            // One that a newer server tells, and this does not know.
            Ok(Some(_)) => continue,
            Ok(None) => {
                return Followed::Broken(Refusal::new(ambit_model::Code::Unavailable, "an open stream", "its end"));
            }
            Err(status) => {
                let refusal = from_status(&status);
                return match refusal.code.class() {
                    ambit_model::refusal::Class::Unavailable => Followed::Broken(refusal),
                    _ => Followed::Refused(refusal),
                };
            }
        };
        let synced = matches!(event, Event::Synced(_));
        if !line(form, revision, &event) {
            return Followed::Enough;
        }
        if synced {
            *after = revision;
            if once {
                return Followed::Enough;
            }
        }
    }
}

/// Whether it could be written: a closed pipe ends the program without complaint.
fn line(form: Form, revision: u64, event: &Event) -> bool {
    let (what, name, object) = told(event);
    let text = match form {
        Form::Json => json!({ "revision": revision, "event": what, "object": object }).to_string(),
        Form::Table => {
            let rest = object
                .as_object()
                .into_iter()
                .flatten()
                .filter(|(key, _)| !["id", "name", "kind"].contains(&key.as_str()));
            let rest: Vec<String> = rest.map(|(key, value)| format!("{key}={}", plain(value))).collect();
            format!("{revision:<8} {what:<8} {name} {}", rest.join(" ")).trim_end().to_owned()
        }
    };
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).is_ok()
}

/// The event's word, the object's name, and the object.
fn told(event: &Event) -> (&'static str, String, Value) {
    match event {
        Event::Reset(reset) => ("reset", reset.why.clone(), json!({ "why": reset.why })),
        Event::Synced(synced) => ("synced", String::new(), json!({ "age_ms": synced.age_ms })),
        Event::Gone(gone) => {
            ("gone", format!("{} {}", gone.kind, gone.name), json!({ "kind": gone.kind, "name": gone.name }))
        }
        Event::Node(n) => {
            let node = json!({ "id": n.id, "cluster": n.cluster, "generation": n.generation, "state": n.state, "code": n.code });
            ("node", n.id.clone(), node)
        }
        Event::Entry(e) => {
            let entry = json!({
                "id": e.id, "spiffe_id": e.spiffe_id, "cluster": e.cluster, "nodes": e.nodes, "selectors": e.selectors,
                "ttl_seconds": e.ttl_seconds, "federates_with": e.federates_with, "revision": e.revision,
                "downstream": e.downstream, "admin": e.admin, "federates_with_groups": e.federates_with_groups,
                "labels": e.labels,
            });
            ("entry", e.id.clone(), entry)
        }
        Event::Service(s) => {
            let service = json!({
                "origin": s.origin, "name": s.name, "address": s.address, "port": s.port, "backends": s.backends,
                "order": s.order,
            });
            ("service", format!("{}/{}", s.origin, s.name), service)
        }
        Event::Egress(e) => ("egress", e.name.clone(), super::policy::egress_row(e)),
        Event::Group(g) => {
            let group = json!({ "origin": g.origin, "name": g.name, "members": g.members, "written_by": g.written_by });
            ("group", format!("{}/{}", g.origin, g.name), group)
        }
        Event::Policy(p) => {
            let action = super::policy::action(p);
            let policy = json!({
                "origin": p.origin, "name": p.name, "target": p.target, "action": action,
                "from": super::policy::callers(p), "ports": p.ports, "transport": p.transport, "resolved": p.resolved, "written_by": p.written_by,
            });
            ("policy", format!("{}/{}", p.origin, p.name), policy)
        }
    }
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) if text.is_empty() => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(items) if items.is_empty() => "-".to_owned(),
        Value::Array(items) => items.iter().map(plain).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

fn complain(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}
