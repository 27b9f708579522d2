//! What nodes need, cut out of the state: as resources, of one revision; and what was sent lately, so that an agent that
//! comes back with it is sent what changed since.

mod board;
mod feed;
mod messages;
mod shelf;

pub use board::{Board, Edition, spawn};
pub use feed::Feed;

use ambit_model::Refusal;
use ambit_proto::resources::{Set, SetDigest};
use ambit_proto::v1;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

/// Resources in all sets that are remembered; one costs a pointer, since sets share what did not change.
const REMEMBERED_MAX: usize = 1 << 20;

/// What one node needs at one revision.
#[derive(Clone, Debug, Default)]
pub struct Cut {
    /// The cell's revision.
    pub revision: u64,
    /// The cell's time.
    pub stamp_ms: u64,
    /// All of it.
    pub set: Set,
    /// How far peers were imported.
    pub imported: Arc<Vec<v1::ImportedSeq>>,
}

impl Cut {
    /// As agents of former releases take it.
    ///
    /// # Errors
    /// [`ambit_model::Code::BadRequest`] where a resource does not decode, which was encoded here.
    pub fn whole(&self) -> Result<v1::Slice, Refusal> {
        let slice = self.set.slice(self.revision, self.stamp_ms)?;
        Ok(v1::Slice { imported: self.imported.to_vec(), ..slice })
    }

    /// The list of whom to refuse, in the same way.
    ///
    /// # Errors
    /// As [`Cut::whole`].
    pub fn denials(&self) -> Result<v1::Denials, Refusal> {
        let s = self.set.denials(self.revision, self.stamp_ms)?;
        Ok(v1::Denials {
            revision: s.revision,
            stamp_ms: s.stamp_ms,
            denials: s.denials,
            authorities: s.authority_denials,
            ids: s.id_denials,
            leaves: s.leaf_denials,
        })
    }
}

/// Sets that agents were sent, by digest; the oldest go.
#[derive(Debug, Default)]
pub struct Remembered {
    sets: Mutex<Sets>,
}

#[derive(Debug, Default)]
struct Sets {
    by_digest: HashMap<SetDigest, Set>,
    order: VecDeque<SetDigest>,
    resources: usize,
}

impl Remembered {
    /// One that an agent may come back with.
    pub fn note(&self, set: &Set) {
        let mut sets = self.lock();
        let digest = set.digest();
        if sets.by_digest.contains_key(&digest) {
            return;
        }
        sets.resources += set.len();
        sets.by_digest.insert(digest, set.clone());
        sets.order.push_back(digest);
        while sets.resources > REMEMBERED_MAX
            && let Some(oldest) = sets.order.pop_front()
        {
            let gone = sets.by_digest.remove(&oldest).map_or(0, |set| set.len());
            sets.resources = sets.resources.saturating_sub(gone);
        }
    }

    /// The set of this digest, if it is remembered.
    pub fn find(&self, digest: &[u8]) -> Option<Set> {
        self.lock().by_digest.get(digest).cloned()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Sets> {
        self.sets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
