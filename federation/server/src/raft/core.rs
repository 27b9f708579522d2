//! The sans-IO heart: inputs in, work out. No clock, no randomness of its own, no disk, no network.
//!
//! The driver, and later the simulator, call [`RaftCore::step`] with inputs, take [`Work`], make it durable, and come back
//! with the store's receipt. Between `ready` and `persisted` no input may be stepped; the types see to the order.

use crate::store::log::{Base, Batch};
use crate::store::{AfterFlush, Change, FlushReceipt, Membership};
use bytes::Bytes;
use protobuf::Message as _;
use raft::eraftpb::{ConfChange, ConfChangeType, Entry, EntryType, Message, MessageType};
use raft::{ProgressState, RawNode, ReadOnlyOption, SnapshotStatus, StateRole, Storage};
use std::collections::HashMap;

/// One append message carries at most this many bytes of entries.
const MESSAGE_BYTES_MAX: u64 = 1024 * 1024;
/// Append messages on the way to one follower.
const INFLIGHT_MESSAGES_MAX: usize = 256;
/// Entries on the leader that no majority has; above it proposals are `busy`.
const UNCOMMITTED_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Committed entries handed out at once: the driver must come back to its ticks.
const COMMITTED_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// Ticks from a leader's death to the first campaign: the others must hear of it too, or they keep to the leader.
const GONE_TICKS: usize = 2;
/// A learner is promoted once it lacks at most this many entries: a vote that cannot be cast would stop the cell.
const PROMOTE_LAG_MAX: u64 = 1000;

/// What the core is made with.
#[derive(Clone, Debug)]
pub struct Config {
    /// This replica.
    pub id: u64,
    /// Ticks without a leader before a campaign; the real timeout is drawn from one to two of these.
    pub election_ticks: usize,
    /// Ticks between heartbeats.
    pub heartbeat_ticks: usize,
    /// What the state machine already holds.
    pub applied: u64,
    /// Seed of the election timeouts.
    pub seed: u64,
}

/// Everything that can happen to a core.
#[derive(Debug)]
pub enum Input {
    /// Time passes.
    Tick,
    /// Messages of a peer. Frames of an older incarnation are dropped: a delayed rejection from before its restart could
    /// make the leader step back behind what the peer has acknowledged (raft-rs issue 555).
    Frame {
        /// The authenticated sender.
        from: u64,
        /// How often its store was opened.
        incarnation: u64,
        /// Raft's own messages.
        messages: Vec<Bytes>,
    },
    /// To be appended together, all or none, on a leader that has applied everything of earlier terms.
    Propose(Vec<Vec<u8>>),
    /// A change of membership, asked on this version.
    Change(Change, u64),
    /// Confirm leadership for reads under this unique context.
    ReadIndex(Vec<u8>),
    /// Hand leadership over.
    Transfer(u64),
    /// Try to lead now.
    Campaign,
    /// The transport lost this peer.
    Unreachable(u64),
    /// Nothing listens where this peer was: its process is dead.
    Gone(u64),
    /// A snapshot for this peer may not have arrived.
    SnapshotFailed(u64),
}

/// Why an input had no effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rejected {
    /// Only a leader that has applied its own term takes it. The leader, if known.
    NotLeader(Option<u64>),
    /// Too much is uncommitted.
    Busy,
    /// The membership is another by now, or another change is on its way.
    Stale,
    /// The learner lacks this many entries.
    Behind(u64),
    /// Bytes that are not a raft message, or a message that is not for this replica or not from its sender.
    Malformed,
    /// The frame is of an older incarnation of its sender.
    OldIncarnation,
}

/// A message to a peer.
#[derive(Debug)]
pub struct Outgoing {
    /// To whom.
    pub to: u64,
    /// Raft's own bytes.
    pub bytes: Vec<u8>,
    /// Whether it carries a snapshot: the sender must report if it may not have arrived.
    pub snapshot: bool,
}

/// A committed entry.
#[derive(Debug)]
pub struct Ordered {
    /// Where.
    pub index: u64,
    /// In which term it was appended.
    pub term: u64,
    /// What.
    pub content: Content,
}

/// What a committed entry is.
#[derive(Debug)]
pub enum Content {
    /// A new leader's first entry, or a change that raft voided.
    Empty,
    /// For the state machine.
    Command(Bytes),
    /// A change of membership asked on a version; it takes effect only if that is still the version.
    Change(Change, u64),
}

/// What the driver must do, in this order: send, install, apply, persist, open `after_flush` with the receipt and send
/// that, [`RaftCore::persisted`]. What is to be applied is durable already, so it may come after the sync too.
#[derive(Debug)]
pub struct Work {
    /// May leave at once (a leader's appends travel while it writes its own).
    pub send: Vec<Outgoing>,
    /// A snapshot that replaces state and log.
    pub install: Option<(Base, Bytes)>,
    /// To be made durable.
    pub batch: Batch,
    /// Votes and acknowledgements: only after the batch.
    pub after_flush: AfterFlush<Vec<Outgoing>>,
    /// To be applied; durable here already.
    pub apply: Vec<Ordered>,
    /// Confirmed reads: context and index.
    pub reads: Vec<(Vec<u8>, u64)>,
}

/// What became possible by the batch being durable.
#[derive(Debug)]
pub struct Released {
    /// To send.
    pub send: Vec<Outgoing>,
    /// To apply.
    pub apply: Vec<Ordered>,
}

/// One replica's raft, over any storage.
pub struct RaftCore<S: Storage> {
    node: RawNode<S>,
    pending: Option<raft::Ready>,
    incarnations: HashMap<u64, u64>,
    timeout_drawn_for: (u64, StateRole),
    random: u64,
    heartbeat_ticks: usize,
    /// Ticks until this follower of a dead leader campaigns.
    campaign_in: Option<usize>,
}

impl<S: Storage> RaftCore<S> {
    /// A core over what `storage` holds.
    pub fn new(config: &Config, storage: S) -> Result<Self, raft::Error> {
        let raft_config = raft::Config {
            id: config.id,
            election_tick: config.election_ticks,
            heartbeat_tick: config.heartbeat_ticks,
            applied: config.applied,
            max_size_per_msg: MESSAGE_BYTES_MAX,
            max_inflight_msgs: INFLIGHT_MESSAGES_MAX,
            max_uncommitted_size: UNCOMMITTED_BYTES_MAX,
            max_committed_size_per_ready: COMMITTED_BYTES_MAX,
            check_quorum: true,
            pre_vote: true,
            // Leases would need a bound on clock drift; a stale read here is a certificate for a revoked node.
            read_only_option: ReadOnlyOption::Safe,
            // raft-rs 0.7.0 appends entries to an empty message of the same batch whether or not they continue it
            // (`is_continuous_ents`): after a reordered answer the follower panics. The simulator found it. Proposals come
            // in batches of our own instead, one message each.
            batch_append: false,
            ..raft::Config::default()
        };
        raft_config.validate()?;
        let node = RawNode::new(&raft_config, storage, &slog::Logger::root(ToTracing, slog::o!()))?;
        let mut core = Self {
            node,
            pending: None,
            incarnations: HashMap::new(),
            timeout_drawn_for: (0, StateRole::Follower),
            random: config.seed,
            heartbeat_ticks: config.heartbeat_ticks,
            campaign_in: None,
        };
        core.draw_timeout();
        Ok(core)
    }

    /// Takes one input in.
    pub fn step(&mut self, input: Input) -> Result<(), Rejected> {
        debug_assert!(self.pending.is_none(), "an input between ready and persisted");
        let outcome = match input {
            Input::Tick => {
                self.node.tick();
                self.campaign_if_due();
                Ok(())
            }
            Input::Frame { from, incarnation, messages } => self.frame(from, incarnation, &messages),
            Input::Propose(data) => self.propose(data),
            Input::Change(change, version) => self.change(change, version),
            Input::ReadIndex(context) => {
                self.node.read_index(context);
                Ok(())
            }
            Input::Transfer(to) => {
                self.node.transfer_leader(to);
                Ok(())
            }
            Input::Campaign => self.campaign(),
            Input::Unreachable(peer) => {
                self.node.report_unreachable(peer);
                Ok(())
            }
            Input::Gone(peer) => {
                self.gone(peer);
                Ok(())
            }
            Input::SnapshotFailed(peer) => {
                self.node.report_snapshot(peer, SnapshotStatus::Failure);
                Ok(())
            }
        };
        let now = (self.node.raft.term, self.node.raft.state);
        if now != self.timeout_drawn_for {
            self.timeout_drawn_for = now;
            self.draw_timeout();
        }
        outcome
    }

    /// A leader that is known to be dead need not be waited for. Those who followed it forget it, so that they may vote
    /// for another, and campaign one after the other by their numbers, so that they do not split the votes. A replica
    /// that is wrong about it changes nothing: the others still hear their leader, and refuse their pre-votes.
    fn gone(&mut self, peer: u64) {
        let raft = &mut self.node.raft;
        if raft.state != StateRole::Follower || raft.leader_id != peer || !raft.promotable() {
            return;
        }
        raft.leader_id = raft::INVALID_ID;
        let before = |id: &u64| *id != peer && *id < raft.id;
        let rank = raft.prs().conf().voters().ids().iter().filter(before).count();
        self.campaign_in = Some(GONE_TICKS + rank * self.heartbeat_ticks);
    }

    /// raft-rs lets anybody campaign who is asked to, and panics where one without a vote wins.
    fn campaign(&mut self) -> Result<(), Rejected> {
        if !self.node.raft.promotable() {
            return Err(Rejected::NotLeader(self.leader()));
        }
        self.node.campaign().map_err(|_| Rejected::Busy)
    }

    fn campaign_if_due(&mut self) {
        match self.campaign_in.take() {
            Some(ticks) if ticks > 1 => self.campaign_in = Some(ticks - 1),
            Some(_) if self.node.raft.state == StateRole::Follower && self.leader().is_none() => {
                let _ = self.campaign();
            }
            Some(_) | None => {}
        }
    }

    fn frame(&mut self, from: u64, incarnation: u64, messages: &[Bytes]) -> Result<(), Rejected> {
        let known = self.incarnations.entry(from).or_default();
        if incarnation < *known {
            return Err(Rejected::OldIncarnation);
        }
        *known = incarnation;
        for bytes in messages {
            let message = Message::parse_from_bytes(bytes).map_err(|_| Rejected::Malformed)?;
            let kind = message.get_msg_type();
            // Proposals and changes come by their own call, where the leader can answer. A wish to hand leadership over
            // is passed on by followers, and names the one who shall lead as its sender.
            let sender_ok = message.from == from || kind == MessageType::MsgTransferLeader;
            if !sender_ok || message.to != self.node.raft.id || kind == MessageType::MsgPropose {
                return Err(Rejected::Malformed);
            }
            // A step that raft refuses (a removed peer, say) is no error of ours.
            if let Err(e) = self.node.step(message) {
                tracing::debug!(from, error = %e, "raft message not taken");
            }
        }
        Ok(())
    }

    fn propose(&mut self, batch: Vec<Vec<u8>>) -> Result<(), Rejected> {
        if !self.leads() {
            return Err(Rejected::NotLeader(self.leader()));
        }
        if self.node.raft.lead_transferee.is_some() {
            // Not busy: in a moment someone else leads, or this one leads on.
            return Err(Rejected::NotLeader(None));
        }
        let mut message = Message::default();
        message.set_msg_type(MessageType::MsgPropose);
        message.from = self.node.raft.id;
        let entry = |data: Vec<u8>| Entry { data: data.into(), ..Entry::default() };
        message.set_entries(batch.into_iter().map(entry).collect());
        self.node.raft.step(message).map_err(|_| Rejected::Busy)
    }

    fn change(&mut self, change: Change, version: u64) -> Result<(), Rejected> {
        if !self.leads() {
            return Err(Rejected::NotLeader(self.leader()));
        }
        if self.node.raft.has_pending_conf() {
            return Err(Rejected::Stale);
        }
        if let Change::Promote(id) = change {
            let raft = &self.node.raft;
            let matched = raft
                .prs()
                .get(id)
                .filter(|p| p.recent_active && p.state != ProgressState::Snapshot)
                .map_or(0, |p| p.matched);
            let lag = raft.raft_log.committed.saturating_sub(matched);
            if lag > PROMOTE_LAG_MAX || matched == 0 {
                return Err(Rejected::Behind(lag));
            }
        }
        let mut wire = ConfChange::default();
        let (kind, id) = match change {
            Change::AddLearner(id) => (ConfChangeType::AddLearnerNode, id),
            Change::Promote(id) => (ConfChangeType::AddNode, id),
            Change::Remove(id) => (ConfChangeType::RemoveNode, id),
        };
        wire.set_change_type(kind);
        wire.node_id = id;
        self.node.propose_conf_change(version.to_le_bytes().to_vec(), wire).map_err(|_| Rejected::Busy)
    }

    /// What is to be done, if anything.
    pub fn ready(&mut self) -> Option<Work> {
        if !self.node.has_ready() {
            return None;
        }
        let mut ready = self.node.ready();
        let number = ready.number();
        let install = (!ready.snapshot().is_empty()).then(|| {
            let meta = ready.snapshot().get_metadata();
            (Base { index: meta.index, term: meta.term }, ready.snapshot().data.clone())
        });
        let must_sync = ready.must_sync();
        #[cfg(ambit_mutant)]
        let must_sync = must_sync && !(ambit_state::mutant::is("hard-state-unsynced") && ready.entries().is_empty());
        let work = Work {
            send: encode(ready.take_messages()),
            install,
            batch: Batch { number, entries: ready.take_entries(), hard_state: ready.hs().cloned(), must_sync },
            after_flush: AfterFlush::new(encode(ready.take_persisted_messages()), number),
            apply: ordered(ready.take_committed_entries()),
            reads: ready.take_read_states().into_iter().map(|r| (r.request_ctx, r.index)).collect(),
        };
        self.pending = Some(ready);
        Some(work)
    }

    /// The batch of the last [`Work`] is on disk, and what it applies has been applied.
    pub fn persisted(&mut self, receipt: &FlushReceipt) -> Released {
        match self.pending.take() {
            Some(ready) if receipt.batch() >= ready.number() => {
                let mut light = self.node.advance_append(ready);
                Released { send: encode(light.take_messages()), apply: ordered(light.take_committed_entries()) }
            }
            other => {
                self.pending = other;
                Released { send: Vec::new(), apply: Vec::new() }
            }
        }
    }

    /// The state machine holds everything up to here.
    pub fn applied(&mut self, index: u64) {
        if index > self.node.raft.raft_log.applied {
            self.node.advance_apply_to(index);
        }
    }

    /// A change took effect; the members after it. `None` where raft refuses it, alike on every replica.
    pub fn apply_change(&mut self, change: Change, before: &Membership) -> Option<Membership> {
        let mut wire = ConfChange::default();
        let (kind, id) = match change {
            Change::AddLearner(id) => (ConfChangeType::AddLearnerNode, id),
            Change::Promote(id) => (ConfChangeType::AddNode, id),
            Change::Remove(id) => (ConfChangeType::RemoveNode, id),
        };
        wire.set_change_type(kind);
        wire.node_id = id;
        match self.node.apply_conf_change(&wire) {
            Ok(conf) => {
                if let Change::AddLearner(id) = change {
                    // Another machine under a number that was given before counts its starts from one.
                    self.incarnations.remove(&id);
                }
                // raft-rs lets a leader that was taken out lead on, refusing every proposal: a change that was asked of one
                // leader may be applied by the next, whom it concerns. The simulator found it.
                let is_out = self.node.raft.state == StateRole::Leader && !self.node.raft.promotable();
                #[cfg(ambit_mutant)]
                let is_out = is_out && !ambit_state::mutant::is("removed-leader-leads");
                if is_out {
                    let term = self.node.raft.term;
                    self.node.raft.become_follower(term, raft::INVALID_ID);
                }
                Some(before.changed_to(&conf))
            }
            Err(e) => {
                tracing::error!(?change, error = %e, "membership change refused by raft");
                None
            }
        }
    }

    /// Whether this replica leads and has applied all entries of earlier terms, so that its stamps continue theirs.
    pub fn leads(&self) -> bool {
        self.node.raft.state == StateRole::Leader && self.node.raft.apply_to_current_term()
    }
    /// Raft's role.
    pub fn role(&self) -> StateRole {
        self.node.raft.state
    }
    /// Whether this replica has a vote.
    pub fn promotable(&self) -> bool {
        self.node.raft.promotable()
    }
    /// Whom it follows.
    pub fn leader(&self) -> Option<u64> {
        Some(self.node.raft.leader_id).filter(|id| *id != 0)
    }
    /// Raft's term.
    pub fn term(&self) -> u64 {
        self.node.raft.term
    }
    /// Known to be on a majority.
    pub fn commit(&self) -> u64 {
        self.node.raft.raft_log.committed
    }
    /// Peers that wait for a snapshot to arrive.
    pub fn awaiting_snapshot(&self) -> Vec<u64> {
        let raft = &self.node.raft;
        if raft.state != StateRole::Leader {
            return Vec::new();
        }
        let mut out: Vec<u64> =
            raft.prs().iter().filter(|(_, p)| p.state == ProgressState::Snapshot).map(|(id, _)| *id).collect();
        out.sort_unstable();
        out
    }
    /// The storage.
    pub fn store(&self) -> &S {
        self.node.store()
    }
    /// The storage, to write it.
    pub fn store_mut(&mut self) -> &mut S {
        self.node.mut_store()
    }

    /// raft-rs draws from the thread's generator; drawing again from ours makes a run repeatable.
    fn draw_timeout(&mut self) {
        // splitmix64 (Steele, Lea, Flood 2014).
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let election = self.node.raft.election_timeout();
        let drawn = election + (z ^ (z >> 31)) as usize % election;
        self.node.raft.set_randomized_election_timeout(drawn);
    }
}

fn encode(messages: Vec<Message>) -> Vec<Outgoing> {
    let encoded = messages.into_iter().filter_map(|m| {
        // A message that does not encode is one that never arrived: raft sends again.
        let bytes = m.write_to_bytes().ok()?;
        Some(Outgoing { to: m.to, bytes, snapshot: m.get_msg_type() == MessageType::MsgSnapshot })
    });
    encoded.collect()
}

/// Entries as they are applied.
pub(super) fn ordered(entries: Vec<Entry>) -> Vec<Ordered> {
    entries.into_iter().map(|e| Ordered { index: e.index, term: e.term, content: content(e) }).collect()
}

fn content(entry: Entry) -> Content {
    match entry.get_entry_type() {
        EntryType::EntryNormal if entry.data.is_empty() => Content::Empty,
        EntryType::EntryNormal => Content::Command(entry.data),
        EntryType::EntryConfChange => {
            let version = <[u8; 8]>::try_from(entry.context.as_ref()).map(u64::from_le_bytes);
            match (ConfChange::parse_from_bytes(&entry.data), version) {
                (Ok(wire), Ok(version)) => {
                    let id = wire.node_id;
                    let change = match wire.get_change_type() {
                        ConfChangeType::AddLearnerNode => Change::AddLearner(id),
                        ConfChangeType::AddNode => Change::Promote(id),
                        ConfChangeType::RemoveNode => Change::Remove(id),
                    };
                    Content::Change(change, version)
                }
                // Every replica reads the same bytes and voids it alike.
                _ => Content::Empty,
            }
        }
        EntryType::EntryConfChangeV2 => Content::Empty,
    }
}

/// raft-rs logs through slog; its records go where ours go, at DEBUG unless it warns.
struct ToTracing;
impl slog::Drain for ToTracing {
    type Ok = ();
    type Err = slog::Never;
    fn log(&self, record: &slog::Record<'_>, _: &slog::OwnedKVList) -> Result<(), slog::Never> {
        match record.level() {
            slog::Level::Critical | slog::Level::Error => tracing::error!(target: "raft", "{}", record.msg()),
            slog::Level::Warning => tracing::warn!(target: "raft", "{}", record.msg()),
            _ => tracing::debug!(target: "raft", "{}", record.msg()),
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;
