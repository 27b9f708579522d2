//! The one history: what was applied anywhere, in order, applied once more by the oracle itself.

use super::promises::{self, Promises};
use super::{News, Violation};
use crate::client::OpId;
use crate::host::EPOCH_MS;
use crate::plan::{MS, Micros};
use ambit_model::{RaftIndex, Refusal};
use ambit_state::objects::NodeState;
use ambit_state::{Command, LogEntry, Reply, State};
use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;

/// The founding is index 1 and lives in the first snapshot only.
const FOUNDING: u64 = 1;

/// Tables that an incarnation has for itself: clock, cell, members and their admissions, tokens, record keys, ticket keys.
const INCARNATIONS_OWN: [u8; 7] = [1, 2, 3, 4, 5, 6, 7];
/// Tables that its beginning adds to: records for peers, and beginnings.
const ADDED_TO: [u8; 2] = [22, 30];

/// What one replica shows after it ran.
pub(crate) struct View {
    pub(crate) host: u64,
    pub(crate) applied: u64,
    pub(crate) digest: [u8; 32],
    pub(crate) leads_in: Option<u64>,
}

struct Place {
    term: u64,
    command: Option<Bytes>,
    /// Of the state after it.
    digest: [u8; 32],
}

pub(crate) struct History {
    /// Index of the first place: the founding, or the beginning of the last incarnation.
    first: u64,
    places: Vec<Place>,
    state: State,
    promises: Promises,
    /// What concerns other cells, until it is fetched; none where there are none.
    news: Option<Vec<News>>,
    exported: u64,
    trail: Sha256,
    /// Entries applied.
    pub(crate) entries: u64,
    /// Leaves that were permitted.
    pub(crate) leaves: u64,
    leaders: BTreeMap<u64, u64>,
    /// Acknowledged requests and where their effect is.
    pub(crate) acknowledged: u64,
    /// The highest index that holds an acknowledged write.
    pub(crate) newest_acknowledged: u64,
    /// How far a stamp may be ahead of the true time: one wrong clock of three must not move it.
    pub(crate) stamps_lead_max_ms: u64,
}

impl History {
    pub(crate) fn new(has_peers: bool) -> History {
        let mut state = State::new();
        state.skip(RaftIndex(FOUNDING));
        let founding = Place { term: 1, command: None, digest: state.digest() };
        History {
            first: FOUNDING,
            places: vec![founding],
            state,
            promises: Promises::default(),
            news: has_peers.then(Vec::new),
            exported: 0,
            trail: Sha256::new(),
            entries: 0,
            leaves: 0,
            leaders: BTreeMap::new(),
            acknowledged: 0,
            newest_acknowledged: 0,
            stamps_lead_max_ms: u64::MAX,
        }
    }

    /// Index with which it begins.
    pub(crate) fn first(&self) -> u64 {
        self.first
    }

    /// Index of the last entry known.
    pub(crate) fn end(&self) -> u64 {
        self.first + self.places.len() as u64 - 1
    }

    pub(crate) fn state(&self) -> &State {
        &self.state
    }

    fn place(&self, index: u64) -> Option<&Place> {
        self.places.get(usize::try_from(index.checked_sub(self.first)?).ok()?)
    }

    /// A replica applied this entry.
    pub(crate) fn applied(
        &mut self,
        host: u64,
        index: u64,
        term: u64,
        command: Option<Bytes>,
        now: Micros,
    ) -> Result<(), Violation> {
        if let Some(known) = self.place(index) {
            if known.term != term || known.command != command {
                let found =
                    format!("replica {host} applied another entry at {index}: term {term}, known {}", known.term);
                return Err(Violation::of("I2", found));
            }
            return Ok(());
        }
        if index != self.end() + 1 {
            return Err(Violation::of("I2", format!("replica {host} applied {index}, and nobody {}", self.end() + 1)));
        }
        match &command {
            None => self.state.skip(RaftIndex(index)),
            Some(bytes) => {
                let entry = LogEntry::decode(bytes).map_err(|r| Violation::of("I2", format!("{index}: {r}")))?;
                self.time_goes_on(index, &entry, now)?;
                let outcome = self.state.apply(RaftIndex(index), &entry).outcome;
                let (stamp, writes) = (self.state.stamp(), self.state.take_writes());
                let applied = promises::Applied { index, stamp, entry: &entry, outcome: &outcome, writes: &writes };
                self.promises.judge(&applied, &self.state)?;
                self.leaves += promises::leaves(&outcome).len() as u64;
                if outcome.is_ok() {
                    self.tell(index, entry.command);
                }
                self.trail.update(bytes);
            }
        }
        drop(self.state.take_writes());
        self.entries += 1;
        self.places.push(Place { term, command, digest: self.state.digest() });
        Ok(())
    }

    /// I15, of what the leader wrote and not of what apply makes of it: stamps never go back, and none is far ahead of the
    /// true time. How old one is says nothing: it may have waited long for its majority.
    fn time_goes_on(&self, index: u64, entry: &LogEntry, now: Micros) -> Result<(), Violation> {
        let (before, truth) = (self.state.stamp(), EPOCH_MS + now / MS);
        if entry.stamp < before {
            let found = format!("the stamp at {index} is {} ms before the last", before.0 - entry.stamp.0);
            return Err(Violation::of("I15", found));
        }
        if entry.stamp.0 > truth.saturating_add(self.stamps_lead_max_ms) {
            let ahead = i128::from(entry.stamp.0) - i128::from(truth);
            return Err(Violation::of("I15", format!("the stamp at {index} is {ahead} ms ahead")));
        }
        Ok(())
    }

    /// The cell begins anew with this state; nodes must be seen again before they get anything.
    pub(crate) fn begin_anew(&mut self, state: State, term: u64) -> Result<(), Violation> {
        self.nothing_is_forgotten(&state)?;
        self.first = state.applied().0;
        self.places = vec![Place { term, command: None, digest: state.digest() }];
        self.state = state;
        self.leaders.clear();
        self.promises.nodes_unseen();
        self.tell(self.first, Command::Tick);
        Ok(())
    }

    /// I1, where a cell begins anew: of what was acknowledged every row is there as it was. Only what speaks of the
    /// incarnation itself may change; what is exported, and the beginnings themselves, may only be added to.
    fn nothing_is_forgotten(&self, anew: &State) -> Result<(), Violation> {
        let rows = |state: &State| -> BTreeMap<(u8, Vec<u8>), Option<Vec<u8>>> {
            state.export().into_iter().map(|row| ((row.table, row.key), row.value)).collect()
        };
        let (before, after) = (rows(&self.state), rows(anew));
        let kept = |key: &(u8, Vec<u8>)| !INCARNATIONS_OWN.contains(&key.0);
        let lost = before.iter().find(|(key, value)| kept(key) && after.get(*key) != Some(*value));
        let new = after.keys().find(|key| kept(key) && !ADDED_TO.contains(&key.0) && !before.contains_key(*key));
        match lost.map(|(key, _)| key).or(new) {
            None => Ok(()),
            Some((table, key)) => {
                let found = format!("the cell begins anew with another row {} of table {table}", hex::encode(key));
                Err(Violation::of("I1", found))
            }
        }
    }

    /// What other cells are judged by.
    fn tell(&mut self, index: u64, command: Command) {
        let Some(news) = &mut self.news else { return };
        if let Command::Import(head, records) = command {
            let position = self.state.peer(&head.origin).map_or(0, |peer| peer.seq);
            news.push(News::Imported { index, head, records, position });
        }
        for record in self.state.records_after(self.exported) {
            self.exported = record.seq;
            news.push(News::Exported(record.clone()));
        }
    }

    pub(crate) fn has_news(&self) -> bool {
        self.news.as_ref().is_some_and(|news| !news.is_empty())
    }

    /// What concerns other cells since the last call.
    pub(crate) fn news(&mut self) -> Vec<News> {
        self.news.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Over every entry, in order.
    pub(crate) fn trail(&self) -> [u8; 32] {
        self.trail.clone().finalize().into()
    }

    /// A replica shows this state.
    pub(crate) fn shows(&mut self, view: &View) -> Result<(), Violation> {
        if let Some(term) = view.leads_in {
            let known = *self.leaders.entry(term).or_insert(view.host);
            if known != view.host {
                return Err(Violation::of("I2", format!("replicas {known} and {} lead in term {term}", view.host)));
            }
        }
        match self.place(view.applied) {
            Some(place) if place.digest == view.digest => Ok(()),
            Some(_) => {
                // Apply is deterministic (I15), and a snapshot with what follows is the same as all of it (I13).
                let found = format!("replica {} has another state at {}", view.host, view.applied);
                Err(Violation::of("I13", found))
            }
            None if view.applied == 0 => Ok(()),
            None => {
                Err(Violation::of("I2", format!("replica {} is at {}, which nobody applied", view.host, view.applied)))
            }
        }
    }

    /// The first row in which a state of the newest index differs, for the trace.
    pub(crate) fn difference(&self, other: &State) -> String {
        if other.applied() != self.state.applied() {
            return format!("at {}, the history is at {}", other.applied(), self.state.applied());
        }
        let rows = |state: &State| -> BTreeMap<(u8, Vec<u8>), Option<Vec<u8>>> {
            state.export().into_iter().map(|row| ((row.table, row.key), row.value)).collect()
        };
        let (known, found) = (rows(&self.state), rows(other));
        let keys = known.keys().chain(found.keys());
        let differs = keys.filter(|key| known.get(*key) != found.get(*key)).min();
        let anew = |state: &State| State::import(state.export()).map(|s| s.digest() == state.digest());
        differs.map_or(
            format!("no row differs; digests of the rows: {:?} {:?}", anew(&self.state), anew(other)),
            |key| {
                let show = |rows: &BTreeMap<_, Option<Vec<u8>>>| match rows.get(key) {
                    Some(Some(value)) => hex::encode(value),
                    _ => "no row".to_owned(),
                };
                format!("table {}, key {}: {} is {}", key.0, hex::encode(&key.1), show(&known), show(&found))
            },
        )
    }

    /// A write was acknowledged with this outcome.
    pub(crate) fn acknowledged(
        &mut self,
        op: OpId,
        index: u64,
        outcome: &Result<Reply, Refusal>,
    ) -> Result<(), Violation> {
        let place = self.place(index).and_then(|p| p.command.as_ref());
        let held = place.and_then(|bytes| LogEntry::decode(bytes).ok());
        if !held.is_some_and(|entry| entry.client == op.identity() && entry.request == op.request()) {
            return Err(Violation::of("I1", format!("{op} was acknowledged at {index}, which holds another")));
        }
        self.promises.answered(op, index, outcome)?;
        self.acknowledged += 1;
        self.newest_acknowledged = self.newest_acknowledged.max(index);
        Ok(())
    }

    /// A linearizable read was answered from a state at `applied`; `after` was acknowledged before it began.
    pub(crate) fn read(&self, host: u64, after: u64, applied: u64) -> Result<(), Violation> {
        if applied >= after {
            return Ok(());
        }
        let found = format!("a read at replica {host} saw {applied}; {after} was acknowledged before it began");
        Err(Violation::of("I3", found))
    }

    /// Nodes that are relied on.
    pub(crate) fn admitted(&self) -> usize {
        self.state.nodes().filter(|(_, row)| row.state == NodeState::Admitted).count()
    }

    /// After ten minutes without a quorum.
    pub(crate) fn nobody_is_out(&self) -> Result<(), Violation> {
        match self.state.denials().find(|(_, row)| row.code == "node_late") {
            Some((index, row)) => Err(Violation::of("I22", format!("node {} is out at {index}: node_late", row.node))),
            None => Ok(()),
        }
    }
}
