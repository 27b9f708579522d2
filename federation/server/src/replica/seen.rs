//! Who called whom in the last day, as the nodes whose streams end at this replica told it. In memory, and lost with it: plans of
//! policy are shown against it, and nothing is decided by it. A node's word is its own: it can keep rows of its own only, and
//! displace none of another's.

use ambit_model::{Code, NodeId, Refusal, SpiffeId, Stamp};
use ambit_proto::v1;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

/// Rows of one node; its oldest make room.
const PER_NODE_MAX: usize = 2_048;
/// Rows in all; beyond it nodes tell nothing new until old ones are over.
const ALL_MAX: usize = 131_072;
const KEPT_MS: u64 = 24 * 3600 * 1000;

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

/// How often, and when last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// Connections.
    pub times: u64,
    /// When the last was told, in the cell's time.
    pub last: Stamp,
}

#[derive(Debug, Default)]
struct Rows {
    flows: BTreeMap<Flow, Times>,
    by_age: BTreeSet<(Stamp, Flow)>,
}

impl Rows {
    fn forget_before(&mut self, since: Stamp) -> usize {
        let before = self.by_age.len();
        while self.by_age.first().is_some_and(|(last, _)| *last < since) {
            self.forget_oldest();
        }
        before - self.by_age.len()
    }

    fn forget_oldest(&mut self) {
        if let Some((_, flow)) = self.by_age.pop_first() {
            self.flows.remove(&flow);
        }
    }

    fn add(&mut self, flow: Flow, times: u64, now: Stamp) {
        let row = self.flows.entry(flow.clone()).or_default();
        self.by_age.remove(&(row.last, flow.clone()));
        *row = Times { times: row.times.saturating_add(times), last: now };
        self.by_age.insert((now, flow));
    }
}

#[derive(Debug, Default)]
struct Table {
    by_node: BTreeMap<NodeId, Rows>,
    rows: usize,
    left_out: u64,
}

/// All of them. Cloning shares.
#[derive(Clone, Debug, Default)]
pub struct Seen(Arc<Mutex<Table>>);

impl Seen {
    /// A node tells what it saw.
    ///
    /// # Errors
    /// Something in it is no flow: then none of it is taken.
    pub fn take(&self, node: NodeId, told: v1::SeenFlows, now: Stamp) -> Result<(), Refusal> {
        if told.flows.len() > PER_NODE_MAX {
            let found = told.flows.len().to_string();
            return Err(Refusal::new(Code::BadRequest, format!("at most {PER_NODE_MAX} flows at once"), found));
        }
        let flows = told.flows.into_iter().map(read).collect::<Result<Vec<_>, Refusal>>()?;
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Table { by_node, rows, left_out } = &mut *table;
        *left_out = left_out.saturating_add(told.left_out);
        let own = by_node.entry(node).or_default();
        *rows -= own.forget_before(Stamp(now.0.saturating_sub(KEPT_MS)));
        for (flow, times) in flows {
            if !own.flows.contains_key(&flow) {
                if own.flows.len() >= PER_NODE_MAX {
                    own.forget_oldest();
                    *rows -= 1;
                } else if *rows >= ALL_MAX {
                    *left_out = left_out.saturating_add(times);
                    continue;
                }
                *rows += 1;
            }
            own.add(flow, times, now);
        }
        Ok(())
    }

    /// What was seen in the day before `now`, of all nodes as one; and how many connections there was no room for.
    pub fn all(&self, now: Stamp) -> (BTreeMap<Flow, Times>, u64) {
        let since = Stamp(now.0.saturating_sub(KEPT_MS));
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all = BTreeMap::new();
        let mut forgotten = 0;
        table.by_node.retain(|_, rows| {
            forgotten += rows.forget_before(since);
            rows.flows.iter().for_each(|(flow, times)| merge(&mut all, flow.clone(), *times));
            !rows.flows.is_empty()
        });
        table.rows -= forgotten;
        (all, table.left_out)
    }
}

/// Two words of one flow are one: each end's node tells of it, so the larger number is taken and not the sum.
pub fn merge(all: &mut BTreeMap<Flow, Times>, flow: Flow, more: Times) {
    let row = all.entry(flow).or_default();
    *row = Times { times: row.times.max(more.times), last: row.last.max(more.last) };
}

/// Strictly, as everything that comes from outside.
///
/// # Errors
/// It is no flow.
pub fn read(flow: v1::SeenFlow) -> Result<(Flow, u64), Refusal> {
    let port = u16::try_from(flow.port).ok().filter(|port| *port > 0);
    let port = port.ok_or_else(|| Refusal::new(Code::BadRequest, "a port of 1-65535", flow.port.to_string()))?;
    let (source, destination) = (flow.source.parse()?, flow.destination.parse()?);
    Ok((Flow { source, destination, port, allowed: flow.allowed }, flow.times))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ambit_model::refusal::Class;

    const HOUR: u64 = 3600 * 1000;

    fn flow(caller: &str, port: u32, times: u64) -> v1::SeenFlow {
        let id = |name: &str| format!("spiffe://west/{name}");
        v1::SeenFlow { source: id(caller), destination: id("db"), port, allowed: true, times, last_ms: 0 }
    }

    fn node(n: u8) -> NodeId {
        hex::encode([n; 32]).parse().unwrap()
    }

    fn rows(seen: &Seen, now: u64) -> Vec<(String, u16, u64, u64)> {
        let (all, _) = seen.all(Stamp(now));
        all.into_iter().map(|(flow, t)| (flow.source.to_string(), flow.port, t.times, t.last.0)).collect()
    }

    #[test]
    fn what_both_ends_tell_is_one_and_is_over_after_a_day() {
        let seen = Seen::default();
        let told = |flows: &[v1::SeenFlow]| v1::SeenFlows { flows: flows.to_vec(), left_out: 1 };
        seen.take(node(1), told(&[flow("web", 80, 2)]), Stamp(HOUR)).unwrap();
        seen.take(node(2), told(&[flow("web", 80, 1), flow("job", 81, 1)]), Stamp(2 * HOUR)).unwrap();
        seen.take(node(1), told(&[flow("web", 80, 3)]), Stamp(3 * HOUR)).unwrap();
        let web = "spiffe://west/web".to_owned();
        let job = ("spiffe://west/job".to_owned(), 81, 1, 2 * HOUR);
        assert_eq!(rows(&seen, 4 * HOUR), [job, (web.clone(), 80, 5, 3 * HOUR)]);
        assert_eq!(rows(&seen, 26 * HOUR + 1), [(web, 80, 5, 3 * HOUR)]);
        assert_eq!(rows(&seen, 28 * HOUR), []);
        assert_eq!(seen.all(Stamp(0)).1, 3);
        assert_eq!(seen.0.lock().unwrap().rows, 0);
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
            let flows = v1::SeenFlows { flows: vec![flow("web", 80, 1), bad], left_out: 0 };
            assert_eq!(seen.take(node(1), flows, Stamp(1)).unwrap_err().code.class(), Class::Invalid);
        }
        assert_eq!(rows(&seen, 1), []);
        seen.take(node(2), v1::SeenFlows { flows: vec![flow("web", 9, 1)], left_out: 0 }, Stamp(1)).unwrap();
        let many = |from: u32| (from..from + PER_NODE_MAX as u32).map(|port| flow("scan", port, 1)).collect();
        for from in [1, 10_000, 20_000] {
            seen.take(node(1), v1::SeenFlows { flows: many(from), left_out: 0 }, Stamp(u64::from(from))).unwrap();
        }
        let all = rows(&seen, 20_000);
        assert_eq!(all.len(), PER_NODE_MAX + 1);
        assert!(all.iter().any(|(source, port, ..)| source.ends_with("web") && *port == 9));
        assert!(all.iter().filter(|(source, ..)| source.ends_with("scan")).all(|(_, port, ..)| *port >= 20_000));
        let more = v1::SeenFlows { flows: vec![flow("web", 9, 1); PER_NODE_MAX + 1], left_out: 0 };
        assert_eq!(seen.take(node(1), more, Stamp(1)).unwrap_err().code, Code::BadRequest);
    }
}
