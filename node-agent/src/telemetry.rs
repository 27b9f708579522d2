//! What the agent tells its operators: logs on standard error, figures and health over HTTP.

use crate::clock::Clock;
use crate::course::Course;
use crate::health::Health;
use crate::issued::Issued;
use crate::kernel::{KernelHandle, Room};
use crate::metrics::METRICS;
use crate::staleness::Staleness;
use crate::state::State;
use axum::Router;
use axum::http::{StatusCode, header};
use axum::routing::get;
use std::io::IsTerminal;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::{TcpListener, TcpStream};
use tracing_subscriber::EnvFilter;

/// What must work before the node is ready for workloads.
const NEEDED: [&str; 4] = ["kernel", "enrolment", "stream", "inbound"];

/// Text on a terminal, one JSON object a line otherwise. `AMBIT_LOG` filters (`info` unless told).
pub fn start_logging() {
    let filter = EnvFilter::try_from_env("AMBIT_LOG").unwrap_or_else(|_| EnvFilter::new("info,tss_esapi=warn"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if std::io::stderr().is_terminal() {
        log.init();
    } else {
        log.json().flatten_event(true).init();
    }
}

/// Serves `/metrics`, `/healthz` (the process answers), `/readyz` (every needed component is up), `/state` (whether the cell is
/// heard, and how long what is held is good without it) and `/endpoints` (which are avoided, and why) until it fails, or the second course drains; the first is the
/// agent's.
pub async fn serve(
    listener: TcpListener,
    kernel: KernelHandle,
    issued: Issued,
    clock: Arc<Clock>,
    staleness: Staleness,
    health: Health,
    [course, pages]: [Course; 2],
) -> std::io::Result<()> {
    let text = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    let json = || [(header::CONTENT_TYPE, "application/json")];
    let state = move || {
        let open = METRICS.component.value(["stream"]) > 0.0;
        State::of(&issued.now(), open, clock.age(), staleness, clock.now())
    };
    let told = state.clone();
    let app = Router::new()
        .route("/metrics", get(move || async move { (text, page(&kernel) + &state().figures()) }))
        .route(
            "/state",
            get(move || async move { (json(), serde_json::to_string(&told()).unwrap_or_default() + "\n") }),
        )
        .route(
            "/endpoints",
            get(move || async move { (json(), serde_json::to_string(&health.shown()).unwrap_or_default() + "\n") }),
        )
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(move || async move { ready(&course) }));
    let listener = Until(listener, pages.clone());
    axum::serve(listener, app).with_graceful_shutdown(async move { pages.drained_a_while().await }).await
}

/// A listener that takes nobody any more once the course drains; who was taken is answered.
struct Until(TcpListener, Course);

impl axum::serve::Listener for Until {
    type Io = TcpStream;
    type Addr = SocketAddr;
    async fn accept(&mut self) -> (TcpStream, SocketAddr) {
        let Self(listener, course) = self;
        course.while_serving(axum::serve::Listener::accept(listener)).await
    }
    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

/// The agent's own figures and the kernel's, which outlive the agent.
fn page(kernel: &KernelHandle) -> String {
    let found = kernel.totals().and_then(|totals| Ok((totals, kernel.losses()?)));
    match found {
        Ok(((allowed, refused), (lost, room))) => {
            METRICS.page() + &kernel_figures(allowed, &refused) + &kernel_room(&lost, &room)
        }
        Err(refusal) => {
            tracing::warn!(%refusal, "kernel counters not read");
            METRICS.page()
        }
    }
}

fn kernel_figures(allowed: u64, refused: &[(&'static str, u64)]) -> String {
    let mut out = String::from(
        "# HELP ambit_kernel_decisions_total Decisions of the programs in the kernel.\n\
         # TYPE ambit_kernel_decisions_total counter\n",
    );
    for (reason, n) in std::iter::once(&("allowed", allowed)).chain(refused) {
        let result = if *reason == "allowed" { "allow" } else { "deny" };
        out += &format!("ambit_kernel_decisions_total{{result=\"{result}\",reason=\"{reason}\"}} {n}\n");
    }
    out
}

/// A full map refuses whoever comes next, so an operator must see it fill.
fn kernel_room(lost: &[(&'static str, u64)], room: &[Room]) -> String {
    let mut out = String::from(
        "# HELP ambit_kernel_losses_total Events and flows without room, and connections around the mesh that were ended.\n\
         # TYPE ambit_kernel_losses_total counter\n",
    );
    for (what, n) in lost {
        out += &format!("ambit_kernel_losses_total{{what=\"{what}\"}} {n}\n");
    }
    out += "# HELP ambit_kernel_map_entries Entries of a map of the kernel's.\n# TYPE ambit_kernel_map_entries gauge\n";
    for (map, entries, _) in room {
        out += &format!("ambit_kernel_map_entries{{map=\"{map}\"}} {entries}\n");
    }
    out += "# HELP ambit_kernel_map_capacity Entries that a map of the kernel's takes.\n# TYPE ambit_kernel_map_capacity gauge\n";
    for (map, _, capacity) in room {
        out += &format!("ambit_kernel_map_capacity{{map=\"{map}\"}} {capacity}\n");
    }
    out
}

fn ready(course: &Course) -> (StatusCode, String) {
    if course.is_draining() {
        return (StatusCode::SERVICE_UNAVAILABLE, "draining\n".to_owned());
    }
    let down: Vec<&str> = NEEDED.into_iter().filter(|c| METRICS.component.value([c]) < 1.0).collect();
    if down.is_empty() {
        (StatusCode::OK, "ready\n".to_owned())
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {}\n", down.join(", ")))
    }
}
