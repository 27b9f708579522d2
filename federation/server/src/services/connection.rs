//! How one connection was judged: asked of the nodes that may run one of its ends, on their streams, by way of all replicas.
//!
//! A node's word is its own: it tells of connections of which it may run an end, and its replica says which node it is.

use crate::replica::Replica;
use ambit_model::{Address, Code, NodeId, Refusal, SpiffeId};
use ambit_proto::v1;
use ambit_state::State;
use ambit_state::objects::NodeState;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::LazyLock;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout, timeout_at};

/// Nodes that one replica asks at once; of more it is said that they were not.
const NODES_MAX: usize = 512;
/// Of how many nodes that did not answer it is told which.
const SILENT_MAX: usize = 64;
/// An agent looks it up in memory.
const ANSWER_MAX: Duration = Duration::from_millis(1000);
/// Another replica, with its agents.
const REPLICA_MAX: Duration = Duration::from_millis(1500);

/// Questions at once: each goes to many streams.
static AT_ONCE: LazyLock<Semaphore> = LazyLock::new(|| Semaphore::new(16));

/// What is asked, parsed.
struct Asked {
    id: String,
    source: SpiffeId,
    destination: Called,
    port: u16,
}

/// Who or what was called.
enum Called {
    Id(SpiffeId),
    At(Address),
}

impl Asked {
    fn read(m: &v1::ConnectionRequest) -> Result<Self, Refusal> {
        let is_id = m.id.len() == 32 && m.id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if !is_id {
            return Err(Refusal::new(Code::BadRequest, "an id of 32 hexadecimal digits", m.id.as_str()));
        }
        let port = u16::try_from(m.port).ok().filter(|port| *port > 0);
        let port = port.ok_or_else(|| Refusal::new(Code::BadRequest, "a port of 1-65535", m.port.to_string()))?;
        let destination = match m.destination.parse() {
            Ok(address) => Called::At(address),
            Err(_) => Called::Id(m.destination.parse()?),
        };
        Ok(Self { id: m.id.clone(), source: m.source.parse()?, destination, port })
    }

    /// Those of the nodes that may run one of the ends, as things stand.
    fn concerned(&self, s: &State, nodes: impl IntoIterator<Item = NodeId>) -> Vec<NodeId> {
        let called = match &self.destination {
            Called::Id(id) => Some(id),
            Called::At(address) => {
                s.endpoints().map(|(_, row)| &row.object).find(|e| e.address == *address).map(|e| &e.spiffe_id)
            }
        };
        let ends = || called.into_iter().chain([&self.source]);
        nodes.into_iter().filter(|node| ends().any(|id| s.may_run(id, node))).collect()
    }

    /// Whether this is the connection that was meant, where one id stands for several.
    fn is(&self, row: &v1::JudgedConnection) -> bool {
        let called = match &self.destination {
            Called::Id(id) => row.destination == id.as_str(),
            Called::At(at) => row.address.parse().is_ok_and(|to: SocketAddr| to.ip() == at.ip()),
        };
        row.source == self.source.as_str() && called && row.port == u32::from(self.port)
    }
}

/// The answer, for people or for another replica.
///
/// # Errors
/// Nobody who was asked remembers it, or what has this id is another connection.
pub(super) async fn answer(replica: &Replica, m: v1::ConnectionRequest) -> Result<v1::ConnectionResponse, Refusal> {
    let asked = Asked::read(&m)?;
    let busy = |_| Refusal::new(Code::Busy, "at most 16 such questions at once", "one more");
    let _place = AT_ONCE.try_acquire().map_err(busy)?;
    if m.local_only {
        return Ok(here(replica, &asked).await);
    }
    let others = replica.others();
    let request = v1::ConnectionRequest { local_only: true, ..m };
    let rest = others.iter().map(|(id, address)| {
        let request = request.clone();
        async move { (*id, ask(replica, *id, address, request).await) }
    });
    let (mut known, rest) = tokio::join!(here(replica, &asked), futures::future::join_all(rest));
    for (id, answer) in rest {
        match answer {
            Some(answer) => {
                known.judged.extend(answer.judged);
                known.asked.extend(answer.asked);
                known.silent.extend(answer.silent);
            }
            None => known.silent_replicas.push(id),
        }
    }
    told(replica, &asked, known)
}

/// The whole: with the nodes that no replica asked.
fn told(
    replica: &Replica,
    asked: &Asked,
    mut known: v1::ConnectionResponse,
) -> Result<v1::ConnectionResponse, Refusal> {
    let answered: BTreeSet<String> = known.asked.iter().cloned().collect();
    let mut silent: BTreeSet<String> = known.silent.drain(..).collect();
    silent.extend(replica.local(|s| {
        let admitted = s.nodes().filter(|(_, row)| row.state == NodeState::Admitted).map(|(id, _)| *id);
        asked.concerned(s, admitted).iter().map(ToString::to_string).collect::<Vec<_>>()
    }));
    silent.retain(|node| !answered.contains(node));
    let (meant, others): (Vec<_>, Vec<_>) = known.judged.into_iter().partition(|row| asked.is(row));
    if meant.is_empty() {
        let to = match &asked.destination {
            Called::Id(id) => id.to_string(),
            Called::At(at) => at.to_string(),
        };
        let expected = format!("a connection {} of {} to {to}:{}", asked.id, asked.source, asked.port);
        if let Some(other) = others.first() {
            let found = format!("one of {} to {}, port {}", other.source, other.destination, other.port);
            return Err(Refusal::new(Code::BadRequest, expected, found));
        }
        let found = format!(
            "none among the last ones of {} nodes; {} did not answer, nor did {} replicas",
            answered.len(),
            silent.len(),
            known.silent_replicas.len()
        );
        return Err(Refusal::new(Code::NotFound, format!("{expected}, which a node of this cell remembers"), found));
    }
    let mut judged = meant;
    judged.sort_by(|a, b| (a.at_ms, &a.place, &a.node).cmp(&(b.at_ms, &b.place, &b.node)));
    known.silent_replicas.sort_unstable();
    let silent = silent.into_iter().take(SILENT_MAX).collect();
    Ok(v1::ConnectionResponse {
        judged,
        silent,
        silent_replicas: known.silent_replicas,
        asked: answered.into_iter().collect(),
    })
}

/// What nodes tell whose streams end here. `asked` are those that answered.
async fn here(replica: &Replica, asked: &Asked) -> v1::ConnectionResponse {
    let agents = replica.agents().nodes();
    let all = replica.local(|s| asked.concerned(s, agents));
    let mut finding = replica.findings().begin(all.iter().take(NODES_MAX).copied().collect());
    let question = v1::FindConnection { ask: finding.ask, id: asked.id.clone() };
    let sent = all.iter().take(NODES_MAX).filter(|node| replica.agents().ask(node, question.clone())).count();
    let (until, mut answers) = (Instant::now() + ANSWER_MAX, Vec::new());
    while answers.len() < sent
        && let Ok(Some(answer)) = timeout_at(until, finding.answers.recv()).await
    {
        answers.push(answer);
    }
    drop(finding);
    let mut told = v1::ConnectionResponse::default();
    replica.local(|s| {
        for (node, rows) in answers {
            let is_own = |id: &str| id.parse().is_ok_and(|id: SpiffeId| s.may_run(&id, &node));
            told.asked.push(node.to_string());
            // A node speaks for the end that it may run.
            let own = rows.into_iter().filter(|row| match row.place.as_str() {
                "calling" | "kernel" => is_own(&row.source),
                "called" => is_own(&row.destination),
                "direct" => is_own(&row.source) && is_own(&row.destination),
                _ => false,
            });
            told.judged.extend(own.map(|row| v1::JudgedConnection { node: node.to_string(), ..row }));
        }
    });
    let answered: BTreeSet<&String> = told.asked.iter().collect();
    told.silent = all.iter().map(ToString::to_string).filter(|node| !answered.contains(node)).collect();
    told
}

async fn ask(
    replica: &Replica,
    id: u64,
    address: &str,
    request: v1::ConnectionRequest,
) -> Option<v1::ConnectionResponse> {
    let ask = async {
        let channel = replica.dial_replica(id, address).await.ok()?;
        let mut client = v1::policy_registry_client::PolicyRegistryClient::new(channel);
        client.connection(request).await.ok()
    };
    timeout(REPLICA_MAX, ask).await.ok().flatten().map(tonic::Response::into_inner)
}
