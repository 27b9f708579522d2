//! Agents whose streams end at this replica: what they hold and acknowledged.

use ambit_model::NodeId;
use ambit_proto::v1;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{mpsc, watch};

/// One agent.
#[derive(Clone, Debug, Default)]
pub struct Agent {
    /// Where tunnels to it end.
    pub address: String,
    /// The last revision it acknowledged as applied in the kernel.
    pub applied: u64,
    /// Why it refused the last slice, or empty.
    pub refused: String,
    /// What it read back from its kernel's maps, by digest; empty before it said any.
    pub map_digest: Vec<u8>,
    /// How far each peer's records had been imported in that slice.
    pub imported: Vec<(String, u64)>,
    /// The sequence of the own bundle by which it verifies, as it said; 0 before it said any.
    pub bundle_sequence: u64,
    /// Intermediates (key identifier, hex) under which it shows leaves, as it said; none before it said any.
    pub authorities: Vec<String>,
    /// Which stream: a newer one replaces an older of the same node.
    pub stream: u64,
    /// It answers who asks for a connection.
    pub finds: bool,
}

/// Questions to one agent that its stream has not sent yet; who asks more gets no answer.
const ASKS: usize = 8;

/// All of them, by node. Bounded by the number of admitted nodes.
#[derive(Clone, Default)]
pub struct Agents {
    by_node: Arc<Mutex<BTreeMap<NodeId, Row>>>,
}

/// An agent, and what tells its stream that there is a newer one, by being dropped, and what to ask.
type Row = (Agent, watch::Sender<()>, mpsc::Sender<v1::FindConnection>);

/// What a stream hears of its agent's row.
#[derive(Debug)]
pub struct Heard {
    /// Closed once a newer stream of the same node opened.
    pub newer: watch::Receiver<()>,
    /// What the agent is to be asked.
    pub asks: mpsc::Receiver<v1::FindConnection>,
}

impl Agents {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<NodeId, Row>> {
        self.by_node.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// A stream opened; `finds` where its agent answers who asks for a connection.
    pub fn connected(&self, node: NodeId, address: String, stream: u64, finds: bool) -> Heard {
        let (here, newer) = watch::channel(());
        let (ask, asks) = mpsc::channel(ASKS);
        self.lock().insert(node, (Agent { address, stream, finds, ..Agent::default() }, here, ask));
        Heard { newer, asks }
    }
    /// Has the agent asked; false where it is not here, does not answer such questions or has too many.
    pub fn ask(&self, node: &NodeId, question: v1::FindConnection) -> bool {
        self.lock().get(node).is_some_and(|(agent, _, ask)| agent.finds && ask.try_send(question).is_ok())
    }
    /// A stream ended; a newer one of the same node stays.
    pub fn gone(&self, node: &NodeId, stream: u64) {
        let mut all = self.lock();
        if all.get(node).is_some_and(|(a, ..)| a.stream == stream) {
            all.remove(node);
        }
    }
    /// Changes one agent's row.
    pub fn update(&self, node: &NodeId, f: impl FnOnce(&mut Agent)) {
        if let Some((agent, ..)) = self.lock().get_mut(node) {
            f(agent);
        }
    }
    /// Whose streams are here.
    pub fn nodes(&self) -> Vec<NodeId> {
        self.lock().keys().copied().collect()
    }
    /// All of them now.
    pub fn all(&self) -> Vec<(NodeId, Agent)> {
        self.lock().iter().map(|(n, (a, ..))| (*n, a.clone())).collect()
    }
}
