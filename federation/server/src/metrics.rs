//! `/metrics` (Prometheus text format 0.0.4), `/healthz` and `/readyz` of a replica.

use crate::authorise::LeftOut;
use crate::raft::Role;
use crate::replica::Replica;
use crate::replica::propagation::BOUNDS_S;
use ambit_model::Act;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use std::fmt::Write;
use std::time::Duration;
use tokio::net::TcpListener;

/// Serves until the task is ended.
pub async fn serve(listener: TcpListener, replica: Replica) {
    let app = Router::new()
        .route(
            "/metrics",
            get(|State(r): State<Replica>| async move {
                ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], page(&r)).into_response()
            }),
        )
        .route("/healthz", get(|| async { "ok\n" }))
        .route(
            "/readyz",
            get(|State(r): State<Replica>| async move {
                match r.cell().status().leader {
                    Some(_) => (StatusCode::OK, "ok\n"),
                    None => (StatusCode::SERVICE_UNAVAILABLE, "no leader\n"),
                }
            }),
        )
        .with_state(replica);
    if let Err(error) = axum::serve(listener, app).await {
        tracing::error!(%error, "metrics page");
    }
}

struct Page(String);

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str, rows: &[(String, f64)]) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in rows {
            let _ = writeln!(self.0, "{name}{labels} {value}");
        }
    }
    fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.family(name, "gauge", help, &[(String::new(), value)]);
    }
    fn counter(&mut self, name: &str, help: &str, value: f64) {
        self.family(name, "counter", help, &[(String::new(), value)]);
    }
    /// Seconds, in buckets; `counts` has one more than there are bounds.
    fn histogram(&mut self, name: &str, help: &str, bounds: &[f64], counts: &[u64], sum: Duration) {
        self.family(name, "histogram", help, &[]);
        let ends = bounds.iter().map(f64::to_string).chain([String::from("+Inf")]);
        let mut total = 0;
        for (end, count) in ends.zip(counts) {
            total += count;
            let _ = writeln!(self.0, "{name}_bucket{} {total}", label("le", &end));
        }
        let _ = writeln!(self.0, "{name}_sum {}\n{name}_count {total}", sum.as_secs_f64());
    }
}

fn page(replica: &Replica) -> String {
    let mut p = Page(String::new());
    let (m, status) = (replica.cell().metrics(), replica.cell().status());
    p.gauge("ambit_raft_term", "Raft term.", m.term() as f64);
    let epoch = replica.local(|s| s.cell().map(|c| c.epoch).unwrap_or_default());
    p.gauge("ambit_cell_epoch", "Incarnation of the cell: rises with restore and recover.", epoch as f64);
    p.gauge("ambit_raft_commit_index", "Highest index known to be committed.", m.commit_index() as f64);
    p.gauge("ambit_raft_applied_index", "Highest index applied.", m.applied_index() as f64);
    p.gauge("ambit_raft_is_leader", "Whether this replica leads.", f64::from(u8::from(status.role == Role::Leader)));
    p.counter("ambit_raft_leader_changes_total", "Leaders seen.", m.leader_changes_total() as f64);
    p.counter("ambit_raft_fsyncs_total", "Syncs of the log.", m.fsync_total() as f64);
    p.counter("ambit_raft_fsync_seconds_total", "Time spent in syncs of the log.", m.fsync_seconds_total());
    p.counter("ambit_raft_proposals_total", "Proposals appended as leader.", m.proposals_total() as f64);
    p.counter("ambit_raft_busy_total", "Requests answered busy.", m.busy_total() as f64);
    p.counter("ambit_raft_snapshots_total", "Snapshots made or installed.", m.snapshots_total() as f64);
    p.counter("ambit_raft_frames_dropped_total", "Frames dropped.", m.frames_dropped_total() as f64);
    state_families(&mut p, replica);
    let counted = replica.propagation().counted();
    p.histogram(
        "ambit_policy_propagation_seconds",
        "Time from a change of documents applied here to its acknowledgement by a node that has it in the kernel.",
        &BOUNDS_S,
        &counted.buckets,
        counted.sum,
    );
    process_families(&mut p);
    p.0
}

fn state_families(p: &mut Page, replica: &Replica) {
    replica.local(|s| {
        let revision = s.cell().map(|c| c.revision.0).unwrap_or_default() as f64;
        p.family(
            "ambit_policy_revision",
            "gauge",
            "Revision of identity and policy.",
            &[(label("state", "desired"), revision)],
        );
        p.gauge("ambit_nodes", "Nodes known.", s.nodes().count() as f64);
        let glass = s.acts().filter(|(_, row)| matches!(row.act, Act::BreakGlass(..))).count();
        p.counter("ambit_break_glass_total", "Administrators certified by replicas themselves.", glass as f64);
        p.gauge("ambit_entries", "Entries.", s.entries().count() as f64);
        p.gauge("ambit_certificates", "Leaves committed that may still be valid.", s.issued().count() as f64);
        let ends = s.members().map(|(_, m)| m.authority_not_after.0).min().unwrap_or_default();
        p.gauge(
            "ambit_cert_not_after_min_seconds",
            "When the first intermediate ends, Unix time.",
            (ends / 1000) as f64,
        );
        let externals = s.roots().into_keys().filter_map(|id| Some((id, s.external(&id)?.lifetime.not_after)));
        let externals: Vec<_> =
            externals.map(|(id, ends)| (label("root", &hex::encode(id)), (ends.0 / 1000) as f64)).collect();
        p.family(
            "ambit_external_authority_not_after_seconds",
            "gauge",
            "When the cell's authority under an external root ends, Unix time.",
            &externals,
        );
        let ages: Vec<_> = s
            .peers()
            .filter_map(|(td, _)| Some((label("trust_domain", td.as_str()), replica.age_ms(td)? as f64 / 1000.0)))
            .collect();
        p.family(
            "ambit_trust_bundle_age_seconds",
            "gauge",
            "Age of what is known of a peer, where it is pulled.",
            &ages,
        );
        let seqs: Vec<_> = s.peers().map(|(td, r)| (label("trust_domain", td.as_str()), r.seq as f64)).collect();
        p.family("ambit_peer_imported_seq", "gauge", "Last record imported.", &seqs);
    });
    let refused: Vec<_> =
        replica.refusals().by_code().into_iter().map(|(code, n)| (label("code", code), n as f64)).collect();
    p.family("ambit_refusals_total", "counter", "Calls refused because of who asked.", &refused);
    let LeftOut { unlogged, forgotten } = replica.refusals().left_out();
    p.counter("ambit_refusals_unlogged_total", "Refusals without a line of the log.", unlogged as f64);
    p.counter("ambit_refusals_forgotten_total", "Refusals whose row gave way.", forgotten as f64);
    p.gauge("ambit_agent_streams", "Agents whose streams end here.", replica.agents().all().len() as f64);
}

fn label(name: &str, value: &str) -> String {
    format!("{{{name}=\"{value}\"}}")
}

/// The two that every Prometheus user expects, from /proc.
fn process_families(p: &mut Page) {
    let pages = std::fs::read_to_string("/proc/self/statm").ok();
    let resident = pages.and_then(|t| t.split_whitespace().nth(1)?.parse::<f64>().ok()).unwrap_or_default() * 4096.0;
    p.gauge("process_resident_memory_bytes", "Resident memory.", resident);
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after = stat.rsplit(") ").next().unwrap_or_default();
    // Fields 14 and 15 (utime, stime), in ticks of 10 ms.
    let ticks: f64 = after.split_whitespace().skip(11).take(2).filter_map(|t| t.parse::<f64>().ok()).sum();
    p.counter("process_cpu_seconds_total", "User and system time.", ticks / 100.0);
}
