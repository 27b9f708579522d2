//! The connections and refusals that this node judged last, each under an id: `ambit explain --connection` asks for one.
//!
//! The id is the trace id that both ends' agents have of a connection (W3C Trace Context, section 3.2.2.3); of what no agent
//! carries, one that is made of what the kernel tells. In memory, and lost with the agent.

use crate::compile::DENIED_NODE;
use crate::record::flag;
use crate::view::View;
use ambit_ebpf::{Event, Reason};
use ambit_model::{Code, Moment, Revision, SpiffeId, Stamp};
use ambit_policy::Verdict;
use ambit_proto::v1;
use aws_lc_rs::digest::{SHA256, digest};
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// Rows, half of them for what was refused: who tries every port displaces none that passed.
pub const ROWS_MAX: usize = 8_192;
/// And so many bytes, halved in the same way.
const BYTES_MAX: usize = 4 << 20;
/// A row beside its words, in memory about.
const ROW_BYTES: usize = 256;
/// Of one id more ends are on one node only where somebody says others' ids.
const TOLD_MAX: usize = 8;

/// What names a connection: 32 hexadecimal digits as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Id([u8; 16]);

impl Id {
    /// The trace id in a traceparent.
    pub fn of_trace(trace: &str) -> Option<Self> {
        Self::parse(trace.split('-').nth(1)?)
    }
    /// Its text.
    pub fn parse(text: &str) -> Option<Self> {
        let mut id = [0; 16];
        let is_lower = text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        (is_lower && hex::decode_to_slice(text, &mut id).is_ok()).then_some(Self(id))
    }
    /// Of what the kernel tells: what it tells again, it names alike.
    pub fn of_kernel(told: &impl std::fmt::Debug) -> Self {
        let digest = digest(&SHA256, format!("{told:?}").as_bytes());
        Self(digest.as_ref().first_chunk().copied().unwrap_or_default())
    }
}

impl std::fmt::Display for Id {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

/// Where a verdict was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// At `connect()`, in the caller's kernel.
    Kernel,
    /// By the caller's agent.
    Calling,
    /// By the called workload's agent.
    Called,
    /// Between two pods of one node, by its kernel.
    Direct,
}

impl Place {
    fn as_str(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Calling => "calling",
            Self::Called => "called",
            Self::Direct => "direct",
        }
    }
}

/// One connection, as it was judged.
#[derive(Debug)]
pub struct Row {
    /// Its name.
    pub id: Id,
    /// Where it was judged.
    pub place: Place,
    /// When.
    pub at: Stamp,
    /// By which revision of the slice.
    pub revision: Revision,
    /// Who called.
    pub source: SpiffeId,
    /// Who was called; none where nobody known is at that address.
    pub destination: Option<SpiffeId>,
    /// The address that was asked for.
    pub to: SocketAddr,
    /// The port of the workload.
    pub port: u16,
    /// Whether it was let through.
    pub allowed: bool,
    /// The policy that decided, where one did.
    pub rule: String,
    /// Why.
    pub reason: String,
    /// How it ended, once it has.
    pub ended: OnceLock<&'static str>,
}

impl Row {
    fn bytes(&self) -> usize {
        let names = self.source.as_str().len() + self.destination.as_ref().map_or(0, |id| id.as_str().len());
        ROW_BYTES + names + self.rule.len() + self.reason.len()
    }
    fn message(&self) -> v1::JudgedConnection {
        v1::JudgedConnection {
            node: String::new(),
            place: self.place.as_str().to_owned(),
            at_ms: self.at.0,
            revision: self.revision.0,
            source: self.source.to_string(),
            destination: self.destination.as_ref().map(ToString::to_string).unwrap_or_default(),
            address: self.to.to_string(),
            port: self.port.into(),
            allowed: self.allowed,
            rule: self.rule.clone(),
            reason: self.reason.clone(),
            flags: self.ended.get().copied().unwrap_or_default().to_owned(),
        }
    }
}

/// The rule and the reason of a verdict, as text.
pub fn words(verdict: &Verdict) -> (String, String) {
    (verdict.rule.as_ref().map(ToString::to_string).unwrap_or_default(), verdict.reason.to_string())
}

/// What the kernel refused, `now` and so long since boot: by which rule, the slice of now tells.
pub fn refused(
    id: Id,
    event: &Event,
    (source, destination): (&SpiffeId, Option<&SpiffeId>),
    view: &View,
    (now, since_boot): (Moment, Duration),
) -> Row {
    let ago = u64::try_from(since_boot.saturating_sub(event.time).as_millis()).unwrap_or_default();
    let port = event.address.port();
    let by_policy = destination.filter(|_| matches!(event.reason, Reason::NoVerdict | Reason::PolicyDeny));
    let verdict = by_policy.map(|destination| view.rules.evaluate(source, destination, port, now));
    let said = verdict.filter(|verdict| !verdict.allowed).map(|verdict| words(&verdict));
    let (rule, reason) = said.unwrap_or_else(|| (String::new(), reason_of(event).to_owned()));
    Row {
        id,
        place: Place::Kernel,
        at: Stamp(now.latest.0.saturating_sub(ago)),
        revision: view.revision,
        source: source.clone(),
        destination: destination.cloned(),
        to: event.address,
        port,
        allowed: false,
        rule,
        reason,
        ended: OnceLock::from(flag::DENIED),
    }
}

/// Why the kernel refused. It knows no denied nodes: to it, the endpoint of one is one that no verdict speaks of.
pub fn reason_of(event: &Event) -> &'static str {
    if event.destination == DENIED_NODE.0 { Code::NodeUntrusted.as_str() } else { event.reason.as_str() }
}

#[derive(Debug, Default)]
struct Half {
    rows: VecDeque<Arc<Row>>,
    bytes: usize,
}

/// Cloning shares.
#[derive(Clone, Debug, Default)]
pub struct Recent(Arc<Mutex<[Half; 2]>>);

impl Recent {
    /// Remembers it, in place of the oldest where there is no room. Who carries it says how it [ended](Row::ended).
    pub fn note(&self, row: Row) -> Arc<Row> {
        let row = Arc::new(row);
        let mut halves = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let [refused, allowed] = &mut *halves;
        let half = if row.allowed { allowed } else { refused };
        half.bytes += row.bytes();
        half.rows.push_back(row.clone());
        while half.rows.len() > ROWS_MAX / 2 || half.bytes > BYTES_MAX / 2 {
            let Some(oldest) = half.rows.pop_front() else { break };
            half.bytes = half.bytes.saturating_sub(oldest.bytes());
        }
        row
    }

    /// What is remembered under an id, newest first.
    pub fn find(&self, id: Id) -> Vec<v1::JudgedConnection> {
        let halves = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Refusals hide nothing that passed under the same id, which is the caller's to choose.
        let of = |half: &Half| half.rows.iter().rev().filter(|row| row.id == id).take(TOLD_MAX / 2).cloned().collect();
        let mut rows: Vec<Arc<Row>> = halves.iter().flat_map(|half| -> Vec<_> { of(half) }).collect();
        rows.sort_by_key(|row| std::cmp::Reverse(row.at));
        rows.into_iter().map(|row| row.message()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view;

    fn row(n: u32, allowed: bool) -> Row {
        Row {
            id: Id::of_kernel(&n),
            place: Place::Called,
            at: Stamp(u64::from(n)),
            revision: Revision(7),
            source: "spiffe://west/web".parse().unwrap(),
            destination: Some("spiffe://east/db".parse().unwrap()),
            to: "10.72.101.11:80".parse().unwrap(),
            port: 80,
            allowed,
            rule: "east/db".into(),
            reason: "allowed by a policy".into(),
            ended: OnceLock::new(),
        }
    }

    #[test]
    fn the_last_ones_are_found_by_their_ids_and_refusals_displace_none_that_passed() {
        let recent = Recent::default();
        let open = recent.note(row(1, true));
        for n in 0..20_000 {
            recent.note(row(1_000 + n, false));
        }
        let told = recent.find(Id::of_kernel(&1u32));
        assert_eq!((told.len(), told[0].flags.as_str(), told[0].rule.as_str()), (1, "", "east/db"));
        open.ended.set("-").unwrap();
        assert_eq!(recent.find(open.id)[0].flags, "-");
        let half = u32::try_from(ROWS_MAX / 2).unwrap();
        assert!(recent.find(Id::of_kernel(&(21_000 - half - 1))).is_empty(), "the oldest made room");
        assert_eq!(recent.find(Id::of_kernel(&(21_000 - half))).len(), 1);
        // Of one id that somebody uses again and again, a few are told.
        (0..100).for_each(|_| drop(recent.note(row(7, false))));
        assert_eq!(recent.find(Id::of_kernel(&7u32)).len(), TOLD_MAX / 2);
        drop(recent.note(Row { at: Stamp(1), ..row(7, true) }));
        (0..100).for_each(|_| drop(recent.note(row(7, false))));
        let told = recent.find(Id::of_kernel(&7u32));
        assert_eq!((told.len(), told.iter().filter(|row| row.allowed).count()), (TOLD_MAX / 2 + 1, 1));
        // Words of any length take no more room.
        for n in 0..5_000 {
            recent.note(Row { reason: "x".repeat(10_000), ..row(n, true) });
        }
        let halves = recent.0.lock().unwrap();
        assert!(halves.iter().all(|half| half.bytes <= BYTES_MAX / 2 && half.rows.len() <= ROWS_MAX / 2));
        assert!(halves.iter().all(|half| half.bytes == half.rows.iter().map(|row| row.bytes()).sum::<usize>()));
    }

    #[test]
    fn what_the_kernel_refused_has_the_rule_that_does_or_its_own_reason() {
        let deny = v1::Policy {
            origin: "east".into(),
            name: "shut".into(),
            target: "spiffe://east/db".into(),
            action: v1::Action::Deny as i32,
            from: vec!["spiffe://west/web".into()],
            ports: vec![81],
            resolved: true,
            ..Default::default()
        };
        let view = view::tests::view(v1::Slice { policies: vec![deny], ..view::tests::slice() }).unwrap();
        let (web, db) = ("spiffe://west/web".parse().unwrap(), "spiffe://east/db".parse().unwrap());
        let event = |port: u16, destination, reason| Event {
            time: Duration::from_secs(90),
            cgroup: 11,
            source: 256,
            destination,
            from: None,
            address: SocketAddr::new([10, 72, 101, 11].into(), port),
            rule: 0,
            reason,
        };
        let now = Moment { committed: Stamp(5_000_000), latest: Stamp(5_000_000) };
        let row = |event: &Event| {
            let called = (event.destination == 258).then_some(&db);
            let id = Id::of_kernel(event);
            let row = refused(id, event, (&web, called), &view, (now, Duration::from_secs(91)));
            assert_eq!((row.at, row.revision, row.allowed), (Stamp(4_999_000), view.revision, false));
            (row.rule, row.reason, row.destination.is_some())
        };
        let by_default = "denied by default: no policy allows it".to_owned();
        assert_eq!(row(&event(81, 258, Reason::PolicyDeny)), ("east/shut".into(), "denied by policy".into(), true));
        assert_eq!(row(&event(80, 258, Reason::NoVerdict)), (String::new(), by_default, true));
        let unknown = event(80, 0, Reason::UnknownDestination);
        assert_eq!(row(&unknown), (String::new(), "unknown_destination".into(), false));
        let denied = event(80, DENIED_NODE.0, Reason::NoVerdict);
        assert_eq!(row(&denied), (String::new(), "node_untrusted".into(), false));
        assert_eq!(row(&event(80, 258, Reason::LeaseExpired)), (String::new(), "lease_expired".into(), true));
        let [one, other] = [90, 91].map(|s| Event { time: Duration::from_secs(s), ..unknown });
        assert!(Id::of_kernel(&one) != Id::of_kernel(&other) && Id::of_kernel(&one) == Id::of_kernel(&unknown));
    }

    #[test]
    fn an_id_is_a_trace_id_to_the_letter() {
        let id = "0af7651916cd43dd8448eb211c80319c";
        let trace = format!("00-{id}-b7ad6b7169203331-01");
        assert_eq!(Id::of_trace(&trace).unwrap().to_string(), id);
        assert_eq!(Id::parse(id), Id::of_trace(&trace));
        for bad in ["", "0a", &id[1..], &format!("{id}0"), &id.to_uppercase(), &"g".repeat(32)] {
            assert_eq!(Id::parse(bad), None, "{bad}");
        }
        assert_eq!(Id::of_kernel(&(1, "a")), Id::of_kernel(&(1, "a")));
        assert_ne!(Id::of_kernel(&(1, "a")), Id::of_kernel(&(2, "a")));
    }
}
