//! The one history: what was applied anywhere, in order, applied once more by the oracle itself.

use super::Violation;
use super::promises::Promises;
use crate::client::Client;
use crate::host::EPOCH_MS;
use crate::plan::{MS, Micros};
use ambit_model::{RaftIndex, Refusal};
use ambit_state::{LogEntry, Reply, State};
use bytes::Bytes;
use std::collections::BTreeMap;

/// The founding is index 1 and lives in the first snapshot only.
const FOUNDING: u64 = 1;

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
    places: Vec<Place>,
    state: State,
    promises: Promises,
    leaders: BTreeMap<u64, u64>,
    /// Acknowledged requests and where their effect is.
    pub(crate) acknowledged: u64,
    /// The highest index that holds an acknowledged write.
    pub(crate) newest_acknowledged: u64,
    /// How far a stamp may be ahead of the true time: one wrong clock of three must not move it.
    pub(crate) stamps_lead_max_ms: u64,
}

impl History {
    pub(crate) fn new() -> History {
        let mut state = State::new();
        state.skip(RaftIndex(FOUNDING));
        let founding = Place { term: 1, command: None, digest: state.digest() };
        History {
            places: vec![founding],
            state,
            promises: Promises::default(),
            leaders: BTreeMap::new(),
            acknowledged: 0,
            newest_acknowledged: 0,
            stamps_lead_max_ms: u64::MAX,
        }
    }

    /// Index of the last entry known.
    pub(crate) fn end(&self) -> u64 {
        FOUNDING + self.places.len() as u64 - 1
    }

    pub(crate) fn state(&self) -> &State {
        &self.state
    }

    fn place(&self, index: u64) -> Option<&Place> {
        self.places.get(usize::try_from(index.checked_sub(FOUNDING)?).ok()?)
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
                let before = self.state.stamp();
                let outcome = self.state.apply(RaftIndex(index), &entry).outcome;
                let (stamp, truth) = (self.state.stamp(), EPOCH_MS + now / MS);
                // It may have waited long for its majority: how old it is says nothing.
                if stamp < before || stamp.0 > truth.saturating_add(self.stamps_lead_max_ms) {
                    let found = format!("the stamp at {index} is {} ms ahead", stamp.0 as i128 - i128::from(truth));
                    return Err(Violation::of("I15", found));
                }
                self.promises.judge(index, stamp, &entry, &outcome, &self.state)?;
            }
        }
        self.places.push(Place { term, command, digest: self.state.digest() });
        Ok(())
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
        client: usize,
        number: u64,
        index: u64,
        outcome: &Result<Reply, Refusal>,
    ) -> Result<(), Violation> {
        let place = self.place(index).and_then(|p| p.command.as_ref());
        let held = place.and_then(|bytes| LogEntry::decode(bytes).ok());
        let is_it = held
            .is_some_and(|entry| entry.client == Client::identity(client) && entry.request == Client::request(number));
        if !is_it {
            let found = format!("client {client}'s request {number} was acknowledged at {index}, which holds another");
            return Err(Violation::of("I1", found));
        }
        self.promises.answered(client, number, index, outcome)?;
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

    /// After ten minutes without a quorum.
    pub(crate) fn nobody_is_out(&self) -> Result<(), Violation> {
        match self.state.denials().find(|(_, row)| row.code == "node_late") {
            Some((index, row)) => Err(Violation::of("I22", format!("node {} is out at {index}: node_late", row.node))),
            None => Ok(()),
        }
    }
}
