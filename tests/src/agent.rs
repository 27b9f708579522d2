//! The agent's stream, message by message, and answers to its rounds; or an agent that answers all of them.

use crate::cell::Cell;
use crate::machine::{Answer, Machine, node_identity};
use ambit_identity::Expect;
use ambit_model::{Code, Generation, Refusal, TrustDomain};
use ambit_proto::resources::{Held, Taken};
use ambit_proto::status::from_status;
use ambit_proto::v1;
use ambit_proto::v1::agent_message::Body as Up;
use ambit_proto::v1::agent_stream_client::AgentStreamClient;
use ambit_proto::v1::server_message::Body as Down;
use ambit_tpm::Bank;
use ambit_transport::{Dialer, Identity};
use ambit_verify::Public;
use ambit_verify::transcript::round_data;
use anyhow::{Context, Result, bail};
use prost::Message;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

const CHUNK_BYTES: usize = 64 * 1024;
/// Rounds are a second apart here, and a cell under election or load may miss a few.
const PATIENCE: Duration = Duration::from_secs(20);
/// Before the next replica is tried.
const RETRY: Duration = Duration::from_millis(100);

/// An admitted machine: what it shows and what its quotes are bound to.
#[derive(Clone)]
pub struct Admitted {
    /// Its leaf and key.
    pub identity: Identity,
    /// Of its admission.
    pub generation: u64,
    /// Of its admission.
    pub cluster: String,
}

impl Admitted {
    /// By this verdict, given to that answer.
    pub fn by(verdict: &v1::Verdict, answer: &Answer, cluster: &str) -> Result<Admitted> {
        let identity = node_identity(verdict, &answer.key)?;
        Ok(Admitted { identity, generation: verdict.generation, cluster: cluster.to_owned() })
    }
}

/// What an answer to a round puts wrong. All else is right.
#[derive(Clone, Debug, Default)]
pub struct RoundLies {
    /// Quoted over another nonce than the one asked.
    pub other_nonce: bool,
    /// Quoted over one PCR less.
    pub fewer_pcrs: bool,
    /// Another IMA log from its beginning, cut to where it was asked from.
    pub ima_log: Option<Vec<u8>>,
    /// A change of the header.
    pub header: Option<fn(&mut v1::QuoteAnswer)>,
}

impl Machine {
    /// The messages that answer a round.
    pub async fn round(&self, me: &Admitted, request: &v1::QuoteRequest, lies: &RoundLies) -> Result<Vec<Up>> {
        let mut nonce: [u8; 32] = request.nonce.as_slice().try_into()?;
        if lies.other_nonce {
            nonce[0] ^= 1;
        }
        let ak_name = Public::name_of(self.ak_public())?;
        let data = round_data(&nonce, &self.node().parse()?, Generation(me.generation), &me.cluster.parse()?, &ak_name);
        let bank = Bank::from_text(&request.bank).context("a bank")?;
        let mask = if lies.fewer_pcrs { request.pcr_mask & !(1 << 8) } else { request.pcr_mask };
        let quote = self.attester().quote(bank, mask, data).await?;
        let logs = self.logs();
        let boot = if request.boot_log { logs.boot } else { Vec::new() };
        let whole = lies.ima_log.clone().unwrap_or(logs.ima);
        // After a reboot the log may be shorter than what the cell remembers of it.
        let ima = whole.get(usize::try_from(request.ima_offset)?..).unwrap_or_default().to_vec();
        let pcrs = quote.pcrs.into_iter().map(|(index, value)| v1::PcrValue { index, value }).collect();
        let mut header = v1::QuoteAnswer {
            nonce: request.nonce.clone(),
            quote: quote.attest,
            signature: quote.signature,
            pcrs,
            boot_log_len: boot.len() as u64,
            ima_log_len: ima.len() as u64,
            trouble: String::new(),
        };
        if let Some(edit) = lies.header {
            edit(&mut header);
        }
        let chunks = boot.chunks(CHUNK_BYTES).chain(ima.chunks(CHUNK_BYTES)).map(|c| Up::LogChunk(c.to_vec()));
        Ok(std::iter::once(Up::Quote(header)).chain(chunks).collect())
    }
}

/// Where nodes of tests are, where a test says nothing else.
const NODE_ADDRESS: &str = "127.0.0.1";

/// One open stream.
pub struct Agent {
    up: mpsc::Sender<v1::AgentMessage>,
    down: Streaming<v1::ServerMessage>,
}

impl Agent {
    /// Opens one at a replica of the cell.
    pub async fn open(cell: &Cell, replica: usize, identity: Identity) -> Result<Agent, Refusal> {
        Agent::open_from(cell, replica, identity, NODE_ADDRESS).await
    }

    /// The same, where the agent says that the node has this address.
    pub async fn open_from(
        cell: &Cell,
        replica: usize,
        identity: Identity,
        node_address: &str,
    ) -> Result<Agent, Refusal> {
        let internal = |e: anyhow::Error| Refusal::new(Code::Internal, "a replica", e.to_string());
        let at = cell.address(replica).map_err(internal)?;
        Agent::dial(&cell.dialer(identity), at, &cell.trust_domain, node_address).await
    }

    /// The same of an agent that takes deltas, and holds this already.
    pub async fn open_holding(cell: &Cell, replica: usize, me: Identity, held: &Held) -> Result<Agent, Refusal> {
        let internal = |e: anyhow::Error| Refusal::new(Code::Internal, "a replica", e.to_string());
        let at = cell.address(replica).map_err(internal)?;
        let (have_revision, have_digest) = (held.revision(), held.digest());
        let (node_address, holds_revision) = (NODE_ADDRESS.into(), held.holds());
        let (deltas, finds) = (true, true);
        let hello = v1::Subscribe { node_address, have_revision, deltas, have_digest, holds_revision, finds };
        Agent::say(&cell.dialer(me), at, &cell.trust_domain, hello).await
    }

    async fn dial(dialer: &Dialer, at: SocketAddr, td: &TrustDomain, node_address: &str) -> Result<Agent, Refusal> {
        let hello = v1::Subscribe { node_address: node_address.to_owned(), ..v1::Subscribe::default() };
        Agent::say(dialer, at, td, hello).await
    }

    async fn say(dialer: &Dialer, at: SocketAddr, td: &TrustDomain, hello: v1::Subscribe) -> Result<Agent, Refusal> {
        let channel = dialer.channel(at, Expect::ReplicaOf(td.clone())).await?;
        let closed = |_| Refusal::new(Code::Internal, "an open queue", "a closed one");
        // More than any answer here has messages, so that none waits for the other side.
        let (up, queue) = mpsc::channel(64);
        up.send(v1::AgentMessage { body: Some(Up::Subscribe(hello)) }).await.map_err(closed)?;
        let answer = AgentStreamClient::new(channel).sync(ReceiverStream::new(queue)).await;
        Ok(Agent { up, down: answer.map_err(|s| from_status(&s))?.into_inner() })
    }

    /// The next round asked; what else comes down is taken and dropped. The refusal that ends the stream, if it ends.
    pub async fn asked(&mut self) -> Result<v1::QuoteRequest, Refusal> {
        let silence = || Refusal::new(Code::Internal, "a round", format!("none within {PATIENCE:?}"));
        let next = async {
            loop {
                match self.down.message().await.map_err(|s| from_status(&s))? {
                    Some(v1::ServerMessage { body: Some(Down::Quote(request)) }) => return Ok(request),
                    Some(_) => {}
                    None => return Err(Refusal::new(Code::Unavailable, "an open stream", "its end")),
                }
            }
        };
        tokio::time::timeout(PATIENCE, next).await.map_err(|_| silence())?
    }

    /// The next delta that is whole and in effect, and its weight, bytes.
    pub async fn delta(&mut self, held: &mut Held) -> Result<(Taken, usize)> {
        let mut bytes = 0;
        let next = async {
            loop {
                if let Some(Down::Delta(part)) = self.down.message().await?.context("an open stream")?.body {
                    bytes += part.encoded_len();
                    match held.take(part)? {
                        Taken::Part => {}
                        taken => return Ok((taken, bytes)),
                    }
                }
            }
        };
        tokio::time::timeout(PATIENCE, next).await.context("no delta")?
    }

    /// The next list of nodes to refuse that names any.
    pub async fn denials(&mut self) -> Result<Vec<v1::NodeDenial>> {
        let next = async {
            loop {
                match self.down.message().await?.context("an open stream")?.body {
                    Some(Down::Denials(list)) if !list.denials.is_empty() => return Ok(list.denials),
                    _ => {}
                }
            }
        };
        tokio::time::timeout(PATIENCE, next).await.context("no denials")?
    }

    /// The next question about a connection; what else comes down is taken and dropped.
    pub async fn find(&mut self) -> Result<v1::FindConnection> {
        loop {
            if let Some(Down::Find(find)) = self.down.message().await?.context("an open stream")?.body {
                return Ok(find);
            }
        }
    }

    /// Sends messages; where the stream is closed already its end tells why.
    pub async fn send(&self, messages: Vec<Up>) {
        for body in messages {
            if self.up.send(v1::AgentMessage { body: Some(body) }).await.is_err() {
                return;
            }
        }
    }

    /// Answers the next round.
    pub async fn answer(&mut self, machine: &Machine, me: &Admitted, lies: &RoundLies) -> Result<v1::QuoteRequest> {
        let request = self.asked().await?;
        self.send(machine.round(me, &request, lies).await?).await;
        Ok(request)
    }

    /// What ends the stream, with no further round answered.
    pub async fn ended(&mut self) -> Result<Refusal> {
        let end = async {
            loop {
                match self.asked().await {
                    Ok(_) => {}
                    Err(refusal) if refusal.code == Code::Internal => bail!("{refusal}"),
                    Err(refusal) => return Ok(refusal),
                }
            }
        };
        tokio::time::timeout(PATIENCE, end).await.context("the stream goes on")?
    }
}

/// An agent that answers every round honestly, at whatever replica will have it, until it is dropped.
pub struct Attending {
    task: tokio::task::JoinHandle<()>,
    said: Arc<Mutex<Vec<Refusal>>>,
}

impl Attending {
    /// Starts it.
    pub fn start(cell: &Cell, machine: Arc<Machine>, me: Admitted) -> Result<Attending> {
        let servers: Vec<SocketAddr> = (1..=cell.size()).map(|n| cell.address(n)).collect::<Result<_>>()?;
        let (dialer, td, said) = (cell.dialer(me.identity.clone()), cell.trust_domain.clone(), Arc::default());
        let heard: Arc<Mutex<Vec<Refusal>>> = Arc::clone(&said);
        let task = tokio::spawn(async move {
            for at in servers.iter().cycle() {
                let refusal = match Agent::dial(&dialer, *at, &td, NODE_ADDRESS).await {
                    Ok(mut agent) => loop {
                        let request = match agent.asked().await {
                            Ok(request) => request,
                            Err(refusal) => break refusal,
                        };
                        if let Ok(messages) = machine.round(&me, &request, &RoundLies::default()).await {
                            agent.send(messages).await;
                        }
                    },
                    Err(refusal) => refusal,
                };
                heard.lock().unwrap_or_else(PoisonError::into_inner).push(refusal);
                tokio::time::sleep(RETRY).await;
            }
        });
        Ok(Attending { task, said })
    }

    /// What ended its streams so far.
    pub fn said(&self) -> Vec<Refusal> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Attending {
    fn drop(&mut self) {
        self.task.abort();
    }
}
