//! Where streams look: what each node needs at the newest revision, and, ahead of it, whom to refuse.
//!
//! Two tasks follow the state. One brings whom to refuse, which waits for nothing. The other cuts what the nodes need that
//! are connected here, off the async threads; what comes while it is at it goes into the next edition.

use super::Cut;
use super::shelf::{Shelf, refused_items};
use crate::replica::Replica;
use ambit_model::NodeId;
use ambit_proto::resources::Set;
use ambit_proto::v1;
use ambit_state::State;
use ambit_state::slicing::Slicer;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// Changes within this time go out as one; small against the 500 ms that a change may take to the kernel.
const SETTLE: Duration = Duration::from_millis(15);
/// After one that took so long to make the next is not begun for that time so many times over: while changes come in a burst,
/// as when thousands of nodes come at once, editions take a fifth of a thread, and each brings more.
const SPACING: u32 = 4;
/// But for no longer than this: a change that comes in such a burst is to be heard of, too.
const SPACING_MAX: Duration = Duration::from_millis(200);
/// Until it is tried again where that failed: nobody waits for a change of the state to be told what there is.
const AGAIN: Duration = Duration::from_secs(1);

/// What every node connected here needs at one revision.
#[derive(Debug, Default)]
pub struct Edition {
    /// The cell's.
    pub revision: u64,
    stamp_ms: u64,
    imported: Arc<Vec<v1::ImportedSeq>>,
    sets: HashMap<NodeId, Set>,
}

impl Edition {
    /// What a node needs; none where it came too late for this edition, or is not known.
    pub fn cut(&self, node: &NodeId) -> Option<Cut> {
        let set = self.sets.get(node)?.clone();
        Some(Cut { revision: self.revision, stamp_ms: self.stamp_ms, set, imported: self.imported.clone() })
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct Board {
    editions: watch::Sender<Arc<Edition>>,
    refused: watch::Sender<Arc<Cut>>,
    came: Notify,
}

impl Board {
    /// The newest edition, and when there is a newer one.
    pub fn editions(&self) -> watch::Receiver<Arc<Edition>> {
        self.editions.subscribe()
    }
    /// Whom to refuse (a cut of denials only), and when that changed.
    pub fn refused(&self) -> watch::Receiver<Arc<Cut>> {
        self.refused.subscribe()
    }
    /// A node connected: it waits for an edition that has it.
    pub fn came(&self) {
        self.came.notify_one();
    }
}

/// Starts both tasks.
pub fn spawn(replica: &Replica) -> [JoinHandle<()>; 2] {
    [tokio::spawn(tell_refused(replica.clone())), tokio::spawn(cut(replica.clone()))]
}

async fn tell_refused(replica: Replica) {
    let (mut revisions, mut known) = (replica.watch_revision(), None);
    loop {
        let mark = replica.local(State::refused_mark);
        if known.as_ref() != Some(&mark) {
            let look =
                |s: &State| (s.refused_mark(), s.refused(), s.stamp().0, s.cell().map_or(0, |cell| cell.revision.0));
            let (mark, refused, stamp_ms, revision) = replica.local(look);
            let set = refused_items(&refused).into_iter().map(Arc::new).collect();
            replica.board().refused.send_replace(Arc::new(Cut { revision, stamp_ms, set, imported: Arc::default() }));
            known = Some(mark);
        }
        if revisions.changed().await.is_err() {
            return;
        }
    }
}

fn spacing(took: Duration) -> Duration {
    took.saturating_mul(SPACING).min(SPACING_MAX)
}

async fn cut(replica: Replica) {
    let mut revisions = replica.watch_revision();
    let mut kept = <(Slicer, Shelf)>::default();
    loop {
        revisions.borrow_and_update();
        let (at, nodes, begun) = (replica.clone(), replica.agents().nodes(), Instant::now());
        let made = tokio::task::spawn_blocking(move || {
            let (mut slicer, mut shelf) = kept;
            at.local(|s| slicer.follow(s));
            slicer.settle();
            let sets = shelf.sets(&mut slicer, &nodes);
            let imported = slicer.imported().iter();
            let imported = imported.map(|(td, seq)| v1::ImportedSeq { origin: td.to_string(), seq: *seq }).collect();
            let (revision, stamp_ms) = (slicer.revision().0, slicer.stamp().0);
            (Edition { revision, stamp_ms, imported: Arc::new(imported), sets }, (slicer, shelf))
        });
        let made = made.await;
        let next = Instant::now() + spacing(begun.elapsed());
        match made {
            Ok((edition, again)) => {
                replica.board().editions.send_replace(Arc::new(edition));
                kept = again;
            }
            Err(error) => {
                tracing::error!(%error, "slices were not made; begun anew");
                kept = Default::default();
                tokio::time::sleep(AGAIN).await;
                continue;
            }
        }
        tokio::select! {
            changed = revisions.changed() => {
                if changed.is_err() {
                    return;
                }
            }
            () = replica.board().came.notified() => {}
        }
        // Nodes come in crowds, too: an edition for each of them would cost each of them one for all.
        tokio::time::sleep_until(next.max(Instant::now() + SETTLE)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_leaves_most_of_the_time_to_others_and_no_change_waits_long() {
        for (took_ms, want_ms) in [(0, 0), (1, 4), (30, 120), (50, 200), (3_000, 200)] {
            assert_eq!(spacing(Duration::from_millis(took_ms)), Duration::from_millis(want_ms));
        }
    }
}
