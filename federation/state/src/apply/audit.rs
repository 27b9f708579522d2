//! Records of the audit log: made where a command was applied, of what it was and what it answered.

mod said;

use super::{At, cell_row};
use crate::audit::{AuditEntry, AuditRow, CosignedRow, WitnessAsk, WitnessedRow, origin};
use crate::command::{LogEntry, Reply};
use crate::objects::NodeState;
use crate::state::State;
use ambit_audit::record::Outcome;
use ambit_audit::{Frontier, Record, leaf_hash};
use ambit_model::{Code, NodeId, Refusal, TrustDomain};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

/// Replicas of two releases apply the same entry, and must make the same record of it. So what is said of a command
/// ([`said`]) is as fixed as the command's encoding: other rules are another form, begun by a command of its own.
const FORM: u8 = 1;
/// Incarnations of one peer whose logs are remembered.
const WITNESSED_EPOCHS: usize = 4;
/// Replicas that a cell may have had; their own requests are told by number.
const REPLICAS_MAX: u64 = 64;

/// One event, before it has its place.
#[derive(Debug)]
pub(crate) struct Event {
    act: &'static str,
    object: String,
    outcome: Outcome,
    code: String,
    facts: BTreeMap<String, String>,
}

impl Event {
    fn new(act: &'static str, object: impl Into<String>) -> Self {
        Self { act, object: object.into(), outcome: Outcome::Done, code: String::new(), facts: BTreeMap::new() }
    }
    fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.facts.insert(name.to_owned(), value.into());
        self
    }
    fn or<T>(mut self, result: &Result<T, Refusal>) -> Self {
        if let Err(refusal) = result {
            self.outcome = Outcome::Refused;
            self.code = refusal.code.as_str().to_owned();
        }
        self
    }
    /// A code as it was committed: a release that does not know it says the same.
    fn refused(mut self, code: &str) -> Self {
        self.outcome = Outcome::Refused;
        code.clone_into(&mut self.code);
        self
    }
}

/// Notes what became of a node, whatever brought it about.
pub(super) fn node_out(s: &mut State, id: &NodeId, state: NodeState) {
    let act = match state {
        NodeState::Admitted => return,
        NodeState::Banned => "node.ban",
        NodeState::Evicted => "node.evict",
        NodeState::Untrusted(_) => "node.distrust",
        NodeState::Quarantined => "node.quarantine",
        NodeState::Released => "node.release",
    };
    let mut event = Event::new(act, id.to_string());
    if let NodeState::Untrusted(code) = state {
        event.code = code.as_str().to_owned();
    }
    let generation = s.node(id).map(|row| row.generation.to_string()).unwrap_or_default();
    s.noted.push(event.with("generation", generation));
}

/// Begins the log of this incarnation; its first record says what came before.
pub(super) fn begin(s: &mut State) -> Result<Reply, Refusal> {
    let epoch = cell_row(s)?.epoch;
    if s.audit().is_some() {
        return Err(Refusal::new(Code::AlreadyExists, "a cell without an audit log", "one that has it"));
    }
    let before = s.audit.get(&0).map(|row| (row.epoch, row.frontier.size(), row.frontier.root()));
    s.audit.put(&mut s.journal, 0, AuditRow { form: FORM, epoch, frontier: Frontier::default(), before });
    Ok(Reply::Done)
}

/// Commits the head of a peer's log that this cell is to cosign, where it follows from the last one.
pub(super) fn witness(s: &mut State, at: At, ask: &WitnessAsk) -> Result<Reply, Refusal> {
    if s.peer(&ask.peer).is_none() {
        return Err(Refusal::new(Code::NotFound, "a peer of this cell", ask.peer.as_str()));
    }
    let key = (ask.peer.clone(), ask.epoch);
    let newest = s.witnessed().filter(|((td, _), _)| *td == ask.peer).map(|((_, epoch), _)| *epoch).max();
    if newest.is_some_and(|newest| ask.epoch < newest) {
        let expected = format!("a log of incarnation {} or later", newest.unwrap_or_default());
        return Err(Refusal::new(Code::AuditUnwitnessed, expected, ask.epoch.to_string()));
    }
    let last = s.witnessed_row(&ask.peer, ask.epoch);
    if ask.old != last.size && ask.size >= last.size {
        // Somebody asked meanwhile: nothing is wrong with it.
        return Err(Refusal::new(Code::StaleRevision, format!("a proof from size {}", last.size), ask.old.to_string()));
    }
    let follows = last.is_followed_by(ask);
    let row = match &follows {
        Ok(()) => WitnessedRow { size: ask.size, root: ask.root, stamp: at.stamp, trouble: String::new() },
        Err(refusal) => {
            WitnessedRow { trouble: format!("expected {}, found {}", refusal.expected, refusal.found), ..last }
        }
    };
    s.witnessed.put(&mut s.journal, key, row);
    let kept: Vec<_> = s.witnessed().map(|(key, _)| key.clone()).filter(|(td, _)| *td == ask.peer).collect();
    for key in kept.iter().take(kept.len().saturating_sub(WITNESSED_EPOCHS)) {
        s.witnessed.remove(&mut s.journal, key);
    }
    follows.map(|()| Reply::Done)
}

/// Keeps what a peer cosigned, where it is not older than what it cosigned before.
pub(super) fn cosigned(s: &mut State, td: &TrustDomain, row: &CosignedRow) -> Result<Reply, Refusal> {
    if s.peer(td).is_none() {
        return Err(Refusal::new(Code::NotFound, "a peer of this cell", td.as_str()));
    }
    let log = s.audit().filter(|log| log.epoch == row.epoch && row.size <= log.frontier.size());
    if log.is_none() || s.cosigned.get(td).is_some_and(|last| (row.epoch, row.size) < (last.epoch, last.size)) {
        return Err(Refusal::new(Code::StaleRevision, "a newer head of this log", row.size.to_string()));
    }
    s.cosigned.put(&mut s.journal, td.clone(), row.clone());
    Ok(Reply::Done)
}

/// Appends what is to be said of an entry. Without a log nothing is.
pub(super) fn record(s: &mut State, at: At, entry: &LogEntry, reply: &Result<Reply, Refusal>) {
    let noted = std::mem::take(&mut s.noted);
    let Some(mut row) = s.audit().cloned() else { return };
    let mut events = said::events(s, &entry.command, reply);
    let by_time = matches!(entry.command, crate::Command::Tick);
    events.extend(noted);
    if events.is_empty() {
        return;
    }
    let actor = if by_time { "cell".to_owned() } else { actor(s, entry) };
    for (position, event) in events.into_iter().enumerate() {
        let record = Record {
            v: row.form,
            epoch: row.epoch,
            index: at.index.0,
            at: u32::try_from(position).unwrap_or(u32::MAX),
            stamp_ms: at.stamp.0,
            actor: actor.clone(),
            act: event.act.to_owned(),
            object: event.object,
            outcome: event.outcome,
            code: event.code,
            facts: event.facts,
        };
        let bytes = record.encode();
        let (n, leaf) = (row.frontier.size(), leaf_hash(&bytes));
        row.frontier.push(leaf);
        s.audited.push(AuditEntry { epoch: row.epoch, n, leaf, bytes });
    }
    s.audit.put(&mut s.journal, 0, row);
}

/// Who proposed it. The entry holds SHA-256 of a name: of those whom the cell knows the name is found, of others the hash
/// is told, by which whoever knows the name finds it.
fn actor(s: &State, entry: &LogEntry) -> String {
    let is = |name: &str| <[u8; 32]>::from(Sha256::digest(name)) == entry.client;
    let told = || format!("sha256:{}", hex::encode(entry.client));
    let Some(cell) = s.cell() else { return told() };
    let td = &cell.trust_domain;
    // Most entries are a node's or an administrator's who is named in them: one hash, and found.
    let named = said::names(&entry.command, td);
    if let Some(name) = named.into_iter().find(|name| is(name)) {
        return name;
    }
    let admins = s.admins().map(|(name, _)| name.as_str()).chain([crate::FOUNDER]);
    let admins = admins.map(|name| format!("spiffe://{td}/ambit/admin/{name}"));
    let ids = s.id_admins().map(|(id, _)| id.to_string());
    let replicas = (1..=REPLICAS_MAX).map(|n| format!("spiffe://{td}/ambit/replica/{n}"));
    // What a replica does by itself it proposes under this name.
    if let Some(n) = (1..=REPLICAS_MAX).find(|n| is(&format!("replica {n}"))) {
        return format!("spiffe://{td}/ambit/replica/{n}");
    }
    admins.chain(ids).chain(replicas).find(|name| is(name)).unwrap_or_else(told)
}

pub(super) fn began(s: &State) -> Event {
    let row = s.audit();
    let name = s.cell().zip(row).map(|(cell, row)| origin(&cell.trust_domain, row.epoch)).unwrap_or_default();
    let event = Event::new("audit.begin", name);
    match row.and_then(|row| row.before) {
        Some((epoch, size, root)) => event
            .with("before_epoch", epoch.to_string())
            .with("before_size", size.to_string())
            .with("before_root", hex::encode(root)),
        None => event,
    }
}
