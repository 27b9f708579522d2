//! The agent's figures, in Prometheus text format 0.0.4.
//!
//! Label values are `&'static str`, so that the number of series is bounded by the source text and never by traffic.
//! Encoded here: `prometheus-client` writes OpenMetrics, which `promtool check metrics` does not check.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A counter or gauge with `N` labels.
#[derive(Debug)]
pub struct Family<const N: usize> {
    name: &'static str,
    help: &'static str,
    kind: &'static str,
    labels: [&'static str; N],
    values: Mutex<BTreeMap<[&'static str; N], f64>>,
}

impl<const N: usize> Family<N> {
    const fn new(name: &'static str, kind: &'static str, labels: [&'static str; N], help: &'static str) -> Self {
        Self { name, help, kind, labels, values: Mutex::new(BTreeMap::new()) }
    }
    fn with(&self, labels: [&'static str; N], change: impl FnOnce(&mut f64)) {
        let mut values = self.values.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        change(values.entry(labels).or_default());
    }
    /// Adds one.
    pub fn inc(&self, labels: [&'static str; N]) {
        self.with(labels, |v| *v += 1.0);
    }
    /// Adds `by`, which may be negative for a gauge.
    pub fn add(&self, labels: [&'static str; N], by: f64) {
        self.with(labels, |v| *v += by);
    }
    /// Sets a gauge to one series: those with other labels go.
    pub fn only(&self, labels: [&'static str; N], to: f64) {
        let mut values = self.values.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *values = BTreeMap::from([(labels, to)]);
    }
    /// Sets a gauge.
    pub fn set(&self, labels: [&'static str; N], to: f64) {
        self.with(labels, |v| *v = to);
    }
    /// The present value.
    pub fn value(&self, labels: [&'static str; N]) -> f64 {
        let values = self.values.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        values.get(&labels).copied().unwrap_or_default()
    }
    fn write(&self, out: &mut String) {
        let values = self.values.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        if values.is_empty() {
            return;
        }
        head(out, self.name, self.kind, self.help);
        for (set, value) in values {
            out.push_str(self.name);
            if N > 0 {
                let pairs: Vec<String> = self.labels.iter().zip(set).map(|(l, v)| format!("{l}=\"{v}\"")).collect();
                let _ = write!(out, "{{{}}}", pairs.join(","));
            }
            let _ = writeln!(out, " {value}");
        }
    }
}

/// Seconds, in buckets.
#[derive(Debug)]
pub struct Histogram {
    name: &'static str,
    help: &'static str,
    bounds: &'static [f64],
    counts: [AtomicU64; Histogram::BUCKETS_MAX],
    sum_ns: AtomicU64,
}

impl Histogram {
    const BUCKETS_MAX: usize = 12;

    const fn new(name: &'static str, bounds: &'static [f64], help: &'static str) -> Self {
        assert!(bounds.len() < Self::BUCKETS_MAX);
        Self { name, help, bounds, counts: [const { AtomicU64::new(0) }; Self::BUCKETS_MAX], sum_ns: AtomicU64::new(0) }
    }
    /// Counts one duration.
    pub fn observe(&self, took: Duration) {
        let seconds = took.as_secs_f64();
        let bucket = self.bounds.iter().position(|b| seconds <= *b).unwrap_or(self.bounds.len());
        if let Some(count) = self.counts.get(bucket) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        self.sum_ns.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
    fn write(&self, out: &mut String) {
        head(out, self.name, "histogram", self.help);
        let mut total = 0;
        for (bound, count) in self.bounds.iter().zip(&self.counts) {
            total += count.load(Ordering::Relaxed);
            let _ = writeln!(out, "{}_bucket{{le=\"{bound}\"}} {total}", self.name);
        }
        total += self.counts.get(self.bounds.len()).map_or(0, |c| c.load(Ordering::Relaxed));
        let _ = writeln!(out, "{}_bucket{{le=\"+Inf\"}} {total}", self.name);
        let sum = Duration::from_nanos(self.sum_ns.load(Ordering::Relaxed)).as_secs_f64();
        let _ = writeln!(out, "{}_sum {sum}\n{}_count {total}", self.name, self.name);
    }
}

/// How long ago something last happened; absent until it did.
#[derive(Debug)]
pub struct Age {
    name: &'static str,
    help: &'static str,
    last: Mutex<Option<Instant>>,
}

impl Age {
    const fn new(name: &'static str, help: &'static str) -> Self {
        Self { name, help, last: Mutex::new(None) }
    }
    /// It happens now.
    pub fn now(&self) {
        *self.last.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(Instant::now());
    }
    /// How long ago; none if it never did.
    pub fn elapsed(&self) -> Option<Duration> {
        let last = *self.last.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        last.map(|last| last.elapsed())
    }
    fn write(&self, out: &mut String) {
        if let Some(last) = *self.last.lock().unwrap_or_else(std::sync::PoisonError::into_inner) {
            head(out, self.name, "gauge", self.help);
            let _ = writeln!(out, "{} {}", self.name, last.elapsed().as_secs_f64());
        }
    }
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

/// Everything the agent counts.
#[derive(Debug)]
pub struct Metrics {
    /// Connections carried or refused: `direction` outbound, inbound, direct, egress or unmeshed (callers by address), `result` ok, denied, failed or unknown.
    pub connections: Family<2>,
    /// Connections open now, by direction.
    pub open: Family<1>,
    /// Another endpoint was tried, by reason.
    pub retries: Family<1>,
    /// Endpoints of services that connections were sent to, by how far they are and why they were used.
    pub chosen: Family<2>,
    /// Endpoints that were put out of use, by why.
    pub ejected: Family<1>,
    /// Connections turned away because one caller opened too many.
    pub limited: Family<0>,
    /// TLS handshakes of tunnels, both directions.
    pub handshakes: Family<2>,
    /// The receiving side's decision.
    pub authz: Histogram,
    /// From accepting a captured connection to an open tunnel.
    pub setup: Histogram,
    /// From receiving a slice to reading it back from the kernel.
    pub apply_time: Histogram,
    /// Revisions: desired and applied.
    pub revision: Family<1>,
    /// Attempts to put a slice into the kernel.
    pub apply: Family<2>,
    /// Tables of the kernel found to be other than what was put there, and put there anew.
    pub drift: Family<1>,
    /// Generations of tables put in force by this process.
    pub generations: Family<0>,
    /// Connections of an agent that ended.
    pub drained: Family<1>,
    /// 1 where a component works.
    pub component: Family<1>,
    /// SVIDs asked for.
    pub svids: Family<1>,
    /// Endpoints that are avoided now.
    pub unhealthy: Family<0>,
    /// Pods that are nobody: a way out is `open`, they are `unguarded`, or their file is `unusable`.
    pub pods_refused: Family<1>,
    /// Enrolments, by result code.
    pub enrolments: Family<1>,
    /// Calls of the Workload API.
    pub workload_api: Family<2>,
    /// 1 while the cell trusts this node, 0 with the code of its refusal where it does not.
    pub trusted: Family<1>,
    /// Answers to rounds of re-attestation, by outcome.
    pub quotes: Family<1>,
    /// What the TPM takes for a quote of a round, its queue included.
    pub quote_time: Histogram,
    /// Since the last quote that answered a round.
    pub last_quote: Age,
    /// Live connections ended because they would not be admitted any more, by direction.
    pub cut: Family<1>,
    /// Connections that an audit policy matched, by direction.
    pub audited: Family<1>,
    /// Connections to local workloads by what these see for their client: `shown` who calls, else the last leg's own address.
    pub clients: Family<1>,
    /// Intervals in which tasks of the node waited, by resource; told by `crate::contention`.
    pub contention: Family<1>,
}

/// The reasonable range for work on one node: 50 microseconds to 5 seconds.
const SETUP_S: &[f64] = &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0];
/// A software TPM takes 6 ms, a hardware one 0.2-0.6 s, and behind an enrolment longer.
const QUOTE_S: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];
/// A decision is a hash look-up; the target is 5 ms.
const DECISION_S: &[f64] = &[0.000_001, 0.000_01, 0.000_05, 0.0001, 0.0005, 0.001, 0.005, 0.05];

/// The process's one set of figures.
pub static METRICS: Metrics = Metrics {
    connections: Family::new(
        "ambit_connections_total",
        "counter",
        ["direction", "result"],
        "Connections of local workloads that the agent carried or refused, and those that went directly (told within a second).",
    ),
    open: Family::new(
        "ambit_connections_open",
        "gauge",
        ["direction"],
        "Connections carried now, and those that go directly.",
    ),
    generations: Family::new(
        "ambit_kernel_generations_total",
        "counter",
        [],
        "Generations of tables that this agent put in force in the kernel.",
    ),
    drained: Family::new(
        "ambit_connections_drained_total",
        "counter",
        ["result"],
        "Connections of the agent before this one that ended while it drained, and that it cut at the end.",
    ),
    retries: Family::new("ambit_retries_total", "counter", ["reason"], "Connections tried on another endpoint."),
    chosen: Family::new(
        "ambit_endpoints_chosen_total",
        "counter",
        ["distance", "why"],
        "Endpoints of services that connections were sent to: in the own cluster, its region or elsewhere; healthy, or avoided and used all the same.",
    ),
    ejected: Family::new(
        "ambit_endpoint_ejections_total",
        "counter",
        ["reason"],
        "Endpoints put out of use: no_tunnel, silent while another answered, or turned_away by the workload.",
    ),
    limited: Family::new(
        "ambit_callers_limited_total",
        "counter",
        [],
        "Connections to local workloads turned away because their caller opened more than it may.",
    ),
    handshakes: Family::new(
        "ambit_tls_handshakes_total",
        "counter",
        ["result", "reason"],
        "TLS handshakes of tunnels, both as client and as server.",
    ),
    authz: Histogram::new("ambit_authz_decision_seconds", DECISION_S, "Time of one decision at the receiving node."),
    setup: Histogram::new(
        "ambit_connection_setup_seconds",
        SETUP_S,
        "Time from a captured connection to its open tunnel stream.",
    ),
    apply_time: Histogram::new(
        "ambit_policy_apply_seconds",
        SETUP_S,
        "Time to put a slice into the kernel and read it back.",
    ),
    revision: Family::new("ambit_policy_revision", "gauge", ["state"], "Revision received and revision in the kernel."),
    apply: Family::new("ambit_policy_apply_total", "counter", ["result", "reason"], "Slices put into the kernel."),
    drift: Family::new(
        "ambit_kernel_drift_total",
        "counter",
        ["map"],
        "Tables of the kernel that others had changed, found and healed.",
    ),
    component: Family::new("ambit_agent_component_up", "gauge", ["component"], "1 where the component works."),
    svids: Family::new("ambit_svid_requests_total", "counter", ["result"], "Workload SVIDs asked of the cell."),
    unhealthy: Family::new("ambit_endpoints_unhealthy", "gauge", [], "Endpoints avoided because their tunnel failed."),
    pods_refused: Family::new(
        "ambit_pods_refused",
        "gauge",
        ["reason"],
        "Pods that are nobody: a way out is open, they could not be guarded, or their file is unusable.",
    ),
    enrolments: Family::new("ambit_enrolments_total", "counter", ["result"], "Enrolments of this node by result."),
    workload_api: Family::new(
        "ambit_workload_api_requests_total",
        "counter",
        ["method", "result"],
        "Calls of the node's local services: SPIFFE Workload API, Broker API, Envoy SDS.",
    ),
    trusted: Family::new(
        "ambit_agent_trusted",
        "gauge",
        ["code"],
        "1 while the cell trusts this node; 0, with the code of its refusal, where it does not.",
    ),
    quotes: Family::new(
        "ambit_agent_quote_answers_total",
        "counter",
        ["result"],
        "Answers to rounds of re-attestation: ok, or why there was no quote.",
    ),
    quote_time: Histogram::new(
        "ambit_agent_quote_seconds",
        QUOTE_S,
        "Time of the TPM for a quote of a round of re-attestation.",
    ),
    last_quote: Age::new("ambit_agent_quote_age_seconds", "Time since the last quote that answered a round."),
    audited: Family::new(
        "ambit_connections_audited_total",
        "counter",
        ["direction"],
        "Connections admitted that an audit policy would refuse, were it a deny.",
    ),
    clients: Family::new(
        "ambit_client_addresses_total",
        "counter",
        ["result"],
        "Connections to local workloads: the client's address shown to them, not told by its agent, disbelieved, or no room for it.",
    ),
    contention: Family::new(
        "ambit_node_contention_total",
        "counter",
        ["resource"],
        "Intervals of about 10 s in which tasks of the node stalled for more than a tenth of the time.",
    ),
    cut: Family::new(
        "ambit_connections_cut_total",
        "counter",
        ["direction"],
        "Live connections ended because a node was denied or a policy withdrawn.",
    ),
};

impl Metrics {
    /// The whole page.
    pub fn page(&self) -> String {
        let mut out = String::with_capacity(8 * 1024);
        self.connections.write(&mut out);
        self.open.write(&mut out);
        self.generations.write(&mut out);
        self.drained.write(&mut out);
        self.retries.write(&mut out);
        self.chosen.write(&mut out);
        self.ejected.write(&mut out);
        self.limited.write(&mut out);
        self.handshakes.write(&mut out);
        self.clients.write(&mut out);
        self.authz.write(&mut out);
        self.setup.write(&mut out);
        self.apply_time.write(&mut out);
        self.revision.write(&mut out);
        self.apply.write(&mut out);
        self.drift.write(&mut out);
        self.component.write(&mut out);
        self.svids.write(&mut out);
        self.unhealthy.write(&mut out);
        self.pods_refused.write(&mut out);
        self.enrolments.write(&mut out);
        self.workload_api.write(&mut out);
        self.trusted.write(&mut out);
        self.quotes.write(&mut out);
        self.quote_time.write(&mut out);
        self.last_quote.write(&mut out);
        self.cut.write(&mut out);
        self.audited.write(&mut out);
        self.contention.write(&mut out);
        process(&mut out);
        out
    }
}

/// What Prometheus clients say of their own process, from `/proc/self` (absent where it cannot be read).
fn process(out: &mut String) {
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten().unwrap_or(4096);
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The command's name may hold spaces: count the fields after its closing parenthesis (proc(5)).
    let fields: Vec<i64> =
        stat.rsplit(") ").next().unwrap_or_default().split(' ').map(|f| f.parse().unwrap_or_default()).collect();
    let (user, system, rss) = (fields.get(11), fields.get(12), fields.get(21));
    if let (Some(user), Some(system), Some(rss)) = (user, system, rss) {
        head(out, "process_cpu_seconds_total", "counter", "User and system CPU time used, in seconds.");
        let _ = writeln!(out, "process_cpu_seconds_total {}", (user + system) as f64 / ticks as f64);
        head(out, "process_resident_memory_bytes", "gauge", "Resident memory size in bytes.");
        let _ = writeln!(out, "process_resident_memory_bytes {}", rss * page);
    }
    if let Ok(open) = std::fs::read_dir("/proc/self/fd") {
        head(out, "process_open_fds", "gauge", "Number of open file descriptors.");
        let _ = writeln!(out, "process_open_fds {}", open.count());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn promtool_finds_nothing_wrong_with_the_page() {
        METRICS.connections.inc(["outbound", "ok"]);
        METRICS.revision.set(["desired"], 3.0);
        METRICS.component.set(["kernel"], 1.0);
        METRICS.unhealthy.set([], 0.0);
        METRICS.pods_refused.set(["open"], 0.0);
        METRICS.setup.observe(Duration::from_millis(3));
        METRICS.setup.observe(Duration::from_secs(60));
        METRICS.trusted.set(["node_late"], 0.0);
        METRICS.trusted.only(["ok"], 1.0);
        METRICS.quotes.inc(["timeout"]);
        METRICS.quote_time.observe(Duration::from_millis(7));
        METRICS.last_quote.now();
        METRICS.cut.inc(["inbound"]);
        let page = METRICS.page();
        assert!(page.contains("ambit_agent_trusted{code=\"ok\"} 1") && !page.contains("node_late"), "{page}");
        assert!(page.contains("ambit_connection_setup_seconds_bucket{le=\"+Inf\"} 2"), "{page}");
        assert!(page.contains("process_resident_memory_bytes "), "{page}");
        let mut child = Command::new("promtool")
            .args(["check", "metrics"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("promtool (Debian package prometheus)");
        std::io::Write::write_all(child.stdin.as_mut().unwrap(), page.as_bytes()).unwrap();
        let done = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success() && said.trim().is_empty(), "{said}\n{page}");
    }
}
