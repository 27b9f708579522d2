//! Who called whom in the last day, as the nodes whose streams end at this replica told it. In memory, and lost with it: plans of
//! policy are shown against it, and nothing is decided by it. A node's word is its own: it keeps rows of its own only, and
//! displaces none of another's.

use ambit_model::{Code, NodeId, Refusal, SpiffeId, Stamp};
use ambit_proto::v1;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Rows of one node, half of them for what was denied; its oldest of that half make room.
const PER_NODE_MAX: usize = 2_048;
/// Bytes of one node's rows, halved in the same way.
const NODE_BYTES_MAX: usize = 1 << 20;
/// Bytes of all rows; beyond it nodes tell nothing new until old ones are over.
const ALL_BYTES_MAX: usize = 64 << 20;
/// A row beside its two names, in memory about.
const ROW_BYTES: usize = 256;
/// How long what was seen is kept.
pub const KEPT_MS: u64 = 24 * 3600 * 1000;
/// With all room taken, how often it is looked for rows that are over.
const SWEEP_MS: u64 = 60_000;
/// No node says more at once: a sum of many stays a sum.
const TIMES_MAX: u64 = u32::MAX as u64;

/// A caller, whom it called on which port, and whether policy let it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Flow {
    /// The caller.
    pub source: SpiffeId,
    /// The called.
    pub destination: SpiffeId,
    /// Its port.
    pub port: u16,
    /// What came of it.
    pub allowed: bool,
}

impl Flow {
    fn bytes(&self) -> usize {
        self.source.as_str().len() + self.destination.as_str().len() + ROW_BYTES
    }
}

/// How often, and when last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// As the callers' nodes, and as the called ones' saw it.
    pub ends: [u64; 2],
    /// When the last was told, in the cell's time.
    pub last: Stamp,
}

impl Times {
    /// Connections: both ends tell of most, and one of them of those that the other did not see.
    pub fn times(&self) -> u64 {
        let [calling, called] = self.ends;
        calling.max(called)
    }

    /// What several nodes saw of one end adds up.
    fn add(&mut self, more: Times) {
        let sum = |a: u64, b: u64| a.saturating_add(b);
        let ([calling, called], [more_calling, more_called]) = (self.ends, more.ends);
        *self = Times { ends: [sum(calling, more_calling), sum(called, more_called)], last: self.last.max(more.last) };
    }
}

/// Rows of one verdict.
#[derive(Debug, Default)]
struct Half {
    flows: BTreeMap<Flow, Times>,
    by_age: BTreeSet<(Stamp, Flow)>,
    bytes: usize,
}

impl Half {
    fn forget_before(&mut self, since: Stamp) {
        while self.by_age.first().is_some_and(|(last, _)| *last < since) {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        if let Some((_, flow)) = self.by_age.pop_first() {
            self.bytes = self.bytes.saturating_sub(flow.bytes());
            self.flows.remove(&flow);
        }
    }

    fn is_full(&self, more: usize) -> bool {
        self.flows.len() >= PER_NODE_MAX / 2 || self.bytes + more > NODE_BYTES_MAX / 2
    }

    fn add(&mut self, flow: Flow, times: Times) {
        if !self.flows.contains_key(&flow) {
            self.bytes += flow.bytes();
        }
        let row = self.flows.entry(flow.clone()).or_default();
        self.by_age.remove(&(row.last, flow.clone()));
        row.add(times);
        self.by_age.insert((row.last, flow));
    }
}

/// Of one node: denied, allowed, and for how many there was no room, with when it said so last.
#[derive(Debug, Default)]
struct Rows {
    halves: [Half; 2],
    left_out: (u64, Stamp),
}

impl Rows {
    fn bytes(&self) -> usize {
        self.halves.iter().map(|half| half.bytes).sum()
    }

    fn forget_before(&mut self, since: Stamp) {
        self.halves.iter_mut().for_each(|half| half.forget_before(since));
        if self.left_out.1 < since {
            self.left_out.0 = 0;
        }
    }

    fn is_empty(&self) -> bool {
        self.halves.iter().all(|half| half.flows.is_empty()) && self.left_out.0 == 0
    }
}

#[derive(Debug, Default)]
struct Table {
    by_node: BTreeMap<NodeId, Rows>,
    bytes: usize,
    swept: Stamp,
}

impl Table {
    fn sweep(&mut self, now: Stamp) {
        let since = Stamp(now.0.saturating_sub(KEPT_MS));
        self.by_node.values_mut().for_each(|rows| rows.forget_before(since));
        self.by_node.retain(|_, rows| !rows.is_empty());
        self.bytes = self.by_node.values().map(Rows::bytes).sum();
        self.swept = now;
    }

    fn has_room(&mut self, more: usize, now: Stamp) -> bool {
        if self.bytes + more > ALL_BYTES_MAX && now.0 >= self.swept.0.saturating_add(SWEEP_MS) {
            self.sweep(now);
        }
        self.bytes + more <= ALL_BYTES_MAX
    }

    fn add(&mut self, node: NodeId, flow: Flow, times: Times, now: Stamp) {
        let bytes = flow.bytes();
        let half = usize::from(flow.allowed);
        let is_known = self
            .by_node
            .get(&node)
            .is_some_and(|rows| rows.halves.get(half).is_some_and(|h| h.flows.contains_key(&flow)));
        if !is_known && !self.has_room(bytes, now) {
            let (left_out, at) = &mut self.by_node.entry(node).or_default().left_out;
            (*left_out, *at) = (left_out.saturating_add(times.times()), now);
            return;
        }
        let rows = self.by_node.entry(node).or_default();
        let before = rows.bytes();
        if let Some(half) = rows.halves.get_mut(half) {
            while !is_known && half.is_full(bytes) && !half.flows.is_empty() {
                half.forget_oldest();
            }
            half.add(flow, times);
        }
        self.bytes = (self.bytes + rows.bytes()).saturating_sub(before);
    }
}

/// All of them. Cloning shares.
#[derive(Clone, Debug)]
pub struct Seen {
    table: Arc<Mutex<Table>>,
    begun: Instant,
}

impl Default for Seen {
    fn default() -> Self {
        Self { table: Arc::default(), begun: Instant::now() }
    }
}

impl Seen {
    /// For how long it remembers what it was told, milliseconds: a day, or since it began.
    pub fn remembers_ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX).min(KEPT_MS)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A node tells what it saw; of what `may_tell` says that it is not its to tell, nothing is taken.
    ///
    /// # Errors
    /// Something in it is no flow: then none of it is taken.
    pub fn take(
        &self,
        node: NodeId,
        told: v1::SeenFlows,
        may_tell: impl Fn(&Flow) -> bool,
        now: Stamp,
    ) -> Result<(), Refusal> {
        if told.flows.len() > PER_NODE_MAX {
            let found = told.flows.len().to_string();
            return Err(Refusal::new(Code::BadRequest, format!("at most {PER_NODE_MAX} flows at once"), found));
        }
        let flows = told.flows.into_iter().map(|flow| read(flow, now)).collect::<Result<Vec<_>, Refusal>>()?;
        let mut table = self.lock();
        if told.left_out > 0 {
            let rows = table.by_node.entry(node).or_default();
            rows.left_out = (rows.left_out.0.saturating_add(told.left_out.min(TIMES_MAX)), now);
        }
        let own = flows.into_iter().filter(|(flow, _)| may_tell(flow));
        own.for_each(|(flow, times)| table.add(node, flow, times, now));
        Ok(())
    }

    /// What was seen in the day before `now`, of all nodes as one; and how many connections there was no room for. Takes
    /// some time where there is much.
    pub fn all(&self, now: Stamp) -> (BTreeMap<Flow, Times>, u64) {
        let nodes: Vec<NodeId> = {
            let mut table = self.lock();
            table.sweep(now);
            table.by_node.keys().copied().collect()
        };
        let (mut all, mut left_out) = (BTreeMap::new(), 0_u64);
        for node in nodes {
            // One node at a time: streams wait for the lock.
            let table = self.lock();
            let Some(rows) = table.by_node.get(&node) else { continue };
            left_out = left_out.saturating_add(rows.left_out.0);
            let flows = rows.halves.iter().flat_map(|half| &half.flows);
            flows.for_each(|(flow, times)| merge(&mut all, flow.clone(), *times));
        }
        (all, left_out)
    }
}

/// Adds what somebody else saw of it.
pub fn merge(all: &mut BTreeMap<Flow, Times>, flow: Flow, more: Times) {
    all.entry(flow).or_default().add(more);
}

/// Strictly, as everything that comes from outside.
///
/// # Errors
/// It is no flow.
pub fn read(flow: v1::SeenFlow, last: Stamp) -> Result<(Flow, Times), Refusal> {
    let port = u16::try_from(flow.port).ok().filter(|port| *port > 0);
    let port = port.ok_or_else(|| Refusal::new(Code::BadRequest, "a port of 1-65535", flow.port.to_string()))?;
    let (source, destination) = (flow.source.parse()?, flow.destination.parse()?);
    let times = flow.times.min(TIMES_MAX);
    let ends = if flow.called { [0, times] } else { [times, 0] };
    Ok((Flow { source, destination, port, allowed: flow.allowed }, Times { ends, last }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ambit_model::refusal::Class;

    const HOUR: u64 = 3600 * 1000;

    fn flow(caller: &str, port: u32, times: u64) -> v1::SeenFlow {
        let id = |name: &str| format!("spiffe://west/{name}");
        v1::SeenFlow { source: id(caller), destination: id("db"), port, allowed: true, times, ..Default::default() }
    }

    fn node(n: u8) -> NodeId {
        hex::encode([n; 32]).parse().unwrap()
    }

    fn tell(seen: &Seen, n: u8, flows: Vec<v1::SeenFlow>, now: u64) -> Result<(), Refusal> {
        seen.take(node(n), v1::SeenFlows { flows, left_out: 0 }, |_| true, Stamp(now))
    }

    fn rows(seen: &Seen, now: u64) -> Vec<(String, u16, u64, u64)> {
        let (all, _) = seen.all(Stamp(now));
        all.into_iter().map(|(flow, t)| (flow.source.to_string(), flow.port, t.times(), t.last.0)).collect()
    }

    #[test]
    fn what_both_ends_tell_is_one_what_several_nodes_tell_adds_up_and_a_day_is_all() {
        let seen = Seen::default();
        let called = |times| v1::SeenFlow { called: true, ..flow("web", 80, times) };
        tell(&seen, 1, vec![flow("web", 80, 2)], HOUR).unwrap();
        tell(&seen, 2, vec![flow("web", 80, 1), flow("job", 81, 1)], 2 * HOUR).unwrap();
        tell(&seen, 3, vec![called(3)], 2 * HOUR).unwrap();
        tell(&seen, 1, vec![flow("web", 80, 3)], 3 * HOUR).unwrap();
        let web = "spiffe://west/web".to_owned();
        let job = ("spiffe://west/job".to_owned(), 81, 1, 2 * HOUR);
        assert_eq!(rows(&seen, 4 * HOUR), [job, (web.clone(), 80, 6, 3 * HOUR)]);
        assert_eq!(rows(&seen, 26 * HOUR + 1), [(web, 80, 5, 3 * HOUR)]);
        assert_eq!(rows(&seen, 28 * HOUR), []);
        assert_eq!(seen.lock().bytes, 0);
        for _ in 0..3 {
            let told = v1::SeenFlows { flows: vec![], left_out: u64::MAX };
            seen.take(node(1), told, |_| true, Stamp(28 * HOUR)).unwrap();
        }
        assert_eq!(seen.all(Stamp(29 * HOUR)).1, 3 * TIMES_MAX);
        assert_eq!(seen.all(Stamp(53 * HOUR)).1, 0, "it is over as rows are");
    }

    #[test]
    fn what_is_no_flow_is_refused_whole_and_a_node_displaces_its_own_only() {
        let seen = Seen::default();
        let bad = [
            v1::SeenFlow { port: 0, ..flow("web", 80, 1) },
            v1::SeenFlow { port: 65_536, ..flow("web", 80, 1) },
            v1::SeenFlow { source: "web".into(), ..flow("web", 80, 1) },
        ];
        for bad in bad {
            let refused = tell(&seen, 1, vec![flow("web", 80, 1), bad], 1).unwrap_err();
            assert_eq!(refused.code.class(), Class::Invalid);
        }
        assert_eq!(rows(&seen, 1), []);
        let others = v1::SeenFlows { flows: vec![flow("web", 7, 1), flow("x", 80, 1)], left_out: 0 };
        let may = |flow: &Flow| !flow.source.as_str().ends_with("/x");
        seen.take(node(3), others, may, Stamp(1)).unwrap();
        assert_eq!(rows(&seen, 1).iter().map(|(_, port, ..)| *port).collect::<Vec<_>>(), [7]);
        tell(&seen, 2, vec![flow("web", 9, 1)], 1).unwrap();
        tell(&seen, 1, vec![v1::SeenFlow { allowed: false, ..flow("web", 9, 1) }], 1).unwrap();
        let many = |from: u32| (from..from + 2_048).map(|port| flow("scan", port, 1)).collect();
        for from in [1, 10_000, 20_000] {
            tell(&seen, 1, many(from), u64::from(from)).unwrap();
        }
        let all = rows(&seen, 20_000);
        assert_eq!(all.len(), PER_NODE_MAX / 2 + 3, "its own half is full, and nothing else went");
        assert!(all.iter().filter(|(source, ..)| source.ends_with("scan")).all(|(_, port, ..)| *port >= 21_024));
        assert_eq!(tell(&seen, 1, vec![flow("web", 9, 1); PER_NODE_MAX + 1], 1).unwrap_err().code, Code::BadRequest);
    }

    #[test]
    fn bytes_are_bounded_and_those_of_nodes_that_left_make_room() {
        let seen = Seen::default();
        let long = "a".repeat(1_900);
        let many = |n: u8| (1..=1_024).map(|port| flow(&format!("{n}{long}"), port, 1)).collect::<Vec<_>>();
        for n in 0..200 {
            tell(&seen, n, many(n), u64::from(n)).unwrap();
            let table = seen.lock();
            assert!(table.by_node[&node(n)].bytes() <= NODE_BYTES_MAX / 2, "of one node");
            assert_eq!(table.bytes, table.by_node.values().map(Rows::bytes).sum::<usize>());
        }
        assert!(seen.lock().bytes <= ALL_BYTES_MAX && seen.all(Stamp(1_000)).1 > 0);
        tell(&seen, 201, vec![flow("web", 80, 1)], 26 * HOUR).unwrap();
        tell(&seen, 202, vec![flow("web", 81, 1)], 26 * HOUR).unwrap();
        assert_eq!(rows(&seen, 26 * HOUR).len(), 2);
    }
}
