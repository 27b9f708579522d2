//! A cell whose majority is lost for good goes on with what one replica holds: a new incarnation.

use crate::host::{Condition, EPOCH_MS};
use crate::load::member;
use crate::oracle::Violation;
use crate::plan::MS;
use crate::world::World;
use ambit_model::{ReplicaId, Stamp};
use ambit_state::objects::Cause;
use ambit_state::{Beginning, State};
use ambitd::raft::rebase::{Whole, found_on};
use ambitd::store::Membership;
use ambitd::store::model::ModelDisk;
use std::sync::PoisonError;

impl World {
    /// All machines but one are gone, and that one's replica begins the cell anew, on a new disk under a new number. Only
    /// where it holds all that was decided; says whether it did.
    pub(crate) fn begin_anew(&mut self) -> Result<bool, Violation> {
        let wrong = |what: String| Violation::of("sim", what);
        let end = self.history.end();
        let processes = self.hosts.values().filter_map(|host| host.process.as_ref());
        let Some(survivor) = processes.filter(|p| p.applied() == end).max_by_key(|p| p.status().term) else {
            return Ok(false);
        };
        let (status, shared) = (survivor.status(), survivor.shared.clone());
        let rows = shared.state.read().unwrap_or_else(PoisonError::into_inner).export();
        let mut state = State::import(rows).map_err(|r| wrong(r.to_string()))?;
        let id = self.hosts.keys().max().copied().unwrap_or_default() + 1;
        let beginning = Beginning {
            cause: Cause::Recovered,
            replica: id,
            member: member(self.record_keys.first().map_or([1; 32], |key| key.public())),
            admit: None,
            past_epoch: 0,
            keys: (!self.record_keys.is_empty()).then(|| self.anew.clone()),
        };
        state.begin_incarnation(Stamp(EPOCH_MS + self.now / MS), beginning).map_err(|r| wrong(r.to_string()))?;
        let membership = Membership { version: status.membership_version, ..Membership::of_founder(id) };
        let (whole, disk) = (Whole { state, term: status.term, membership }, ModelDisk::default());
        found_on(&disk, ReplicaId(id), &whole).map_err(|e| wrong(e.to_string()))?;
        let gone: Vec<u64> = self.hosts.keys().copied().collect();
        for id in gone {
            self.crash(id);
            if let Some(host) = self.hosts.get_mut(&id) {
                host.condition = Condition::Removed;
            }
        }
        self.invited = None;
        self.begun_anew = true;
        self.say(|| format!("the cell begins anew at {} with replica {id}", whole.state.applied()));
        self.history.begin_anew(whole.state, whole.term + 1)?;
        self.add_host(id, disk);
        Ok(true)
    }
}
