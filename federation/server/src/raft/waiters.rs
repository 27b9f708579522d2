//! Who waits for which request to be applied here. An outcome may hold a proof that exists once, so each goes to one waiter.

use ambit_state::Applied;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;

/// A caller's request: who, its request id, and SHA-256 of what it asks. The same id with another command is another's wait:
/// it is told what became of its own.
pub type RequestKey = ([u8; 32], [u8; 16], [u8; 32]);
type Queue = VecDeque<(u64, oneshot::Sender<Applied>)>;

/// Shared between callers and the engine; bounded by the permits that callers hold. Clones are the same.
#[derive(Clone, Default)]
pub(super) struct Waiters {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Default)]
struct Inner {
    next: u64,
    queues: HashMap<RequestKey, Queue>,
}

impl Waiters {
    /// Registered before the request leaves, so that its outcome cannot pass unseen. Dropping the ticket gives up.
    pub(super) fn register(&self, key: RequestKey) -> Ticket {
        let (sender, receiver) = oneshot::channel();
        let mut inner = self.lock();
        inner.next += 1;
        let number = inner.next;
        inner.queues.entry(key).or_default().push_back((number, sender));
        Ticket { waiters: self.clone(), key, number, receiver }
    }

    /// Gives the outcome to the one who has waited longest for this request, if anyone does.
    pub(super) fn complete(&self, applied: Applied) {
        let key = (applied.client, applied.request, applied.command);
        let mut inner = self.lock();
        let Some(queue) = inner.queues.get_mut(&key) else { return };
        let first = queue.pop_front();
        if queue.is_empty() {
            inner.queues.remove(&key);
        }
        drop(inner);
        if let Some((_, sender)) = first {
            // A waiter that has just given up asks again with the same ids, if at all.
            let _ = sender.send(applied);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One waiter. Dropping it gives up.
pub struct Ticket {
    waiters: Waiters,
    key: RequestKey,
    number: u64,
    /// Answered once the request was applied here.
    pub receiver: oneshot::Receiver<Applied>,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut inner = self.waiters.lock();
        if let Some(queue) = inner.queues.get_mut(&self.key) {
            queue.retain(|(number, _)| *number != self.number);
            if queue.is_empty() {
                inner.queues.remove(&self.key);
            }
        }
    }
}
