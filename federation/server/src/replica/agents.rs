//! Agents whose streams end at this replica: what they hold and acknowledged.

use ambit_model::NodeId;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// One agent.
#[derive(Clone, Debug, Default)]
pub struct Agent {
    /// Where tunnels to it end.
    pub address: String,
    /// The last revision it acknowledged as applied in the kernel.
    pub applied: u64,
    /// Why it refused the last slice, or empty.
    pub refused: String,
    /// How far each peer's records had been imported in that slice.
    pub imported: Vec<(String, u64)>,
    /// Which stream: a newer one replaces an older of the same node.
    pub stream: u64,
}

/// All of them, by node. Bounded by the number of admitted nodes.
#[derive(Clone, Default)]
pub struct Agents {
    by_node: Arc<Mutex<BTreeMap<NodeId, Agent>>>,
}

impl Agents {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<NodeId, Agent>> {
        self.by_node.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// A stream opened.
    pub fn connected(&self, node: NodeId, address: String, stream: u64) {
        self.lock().insert(node, Agent { address, stream, ..Agent::default() });
    }
    /// A stream ended; a newer one of the same node stays.
    pub fn gone(&self, node: &NodeId, stream: u64) {
        let mut all = self.lock();
        if all.get(node).is_some_and(|a| a.stream == stream) {
            all.remove(node);
        }
    }
    /// Changes one agent's row.
    pub fn update(&self, node: &NodeId, f: impl FnOnce(&mut Agent)) {
        if let Some(agent) = self.lock().get_mut(node) {
            f(agent);
        }
    }
    /// All of them now.
    pub fn all(&self) -> Vec<(NodeId, Agent)> {
        self.lock().iter().map(|(n, a)| (*n, a.clone())).collect()
    }
}
