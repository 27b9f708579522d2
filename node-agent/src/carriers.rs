//! Threads that carry traffic, each with a runtime of its own. A connection stays on the thread that took it, with the tunnel
//! that it uses: nothing of it is woken elsewhere, and no lock is shared.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use tokio::runtime::{Builder, Handle};

/// More would cost memory for tunnels that each of them keeps.
const CARRIERS_MAX: usize = 16;
/// A connection moves to the least busy thread, which costs two wake-ups, where its own has so many more.
const IMBALANCE: usize = 8;

/// The threads. Cloning shares.
#[derive(Clone, Debug)]
pub struct Carriers {
    all: Arc<[Carrier]>,
}

#[derive(Debug)]
struct Carrier {
    handle: Handle,
    /// Connections that it carries.
    busy: AtomicUsize,
}

/// A connection on a thread; counts until dropped.
#[derive(Debug)]
pub struct Carried {
    carriers: Carriers,
    at: usize,
}

impl Drop for Carried {
    fn drop(&mut self) {
        if let Some(carrier) = self.carriers.all.get(self.at) {
            carrier.busy.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Carriers {
    /// Starts a thread for every second core: the others are the workloads', and what one thread finds to do in one turn it
    /// does for less. They run until the process ends.
    pub fn start() -> io::Result<Self> {
        let count = (thread::available_parallelism().map_or(1, usize::from) / 2).clamp(1, CARRIERS_MAX);
        let all = (0..count).map(start).collect::<io::Result<Vec<_>>>()?;
        Ok(Self { all: all.into() })
    }

    /// The runtime that this is called on, as the only one.
    pub fn here() -> Self {
        Self { all: [Carrier { handle: Handle::current(), busy: AtomicUsize::new(0) }].into() }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.all.len()
    }

    /// One of them, in turn of `n`.
    pub fn handle(&self, n: usize) -> Handle {
        // There is always one.
        self.all.get(n % self.all.len()).map_or_else(Handle::current, |carrier| carrier.handle.clone())
    }

    /// Where the next connection that came to `own` is carried, and that it is.
    pub fn choose(&self, own: usize) -> (usize, Carried) {
        let busy = |n: usize| self.all.get(n).map_or(usize::MAX, |carrier| carrier.busy.load(Ordering::Relaxed));
        let least = (0..self.all.len()).min_by_key(|n| busy(*n)).unwrap_or(own);
        let at = if busy(own) < busy(least).saturating_add(IMBALANCE) { own } else { least };
        if let Some(carrier) = self.all.get(at) {
            carrier.busy.fetch_add(1, Ordering::Relaxed);
        }
        (at, Carried { carriers: self.clone(), at })
    }
}

fn start(n: usize) -> io::Result<Carrier> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let handle = runtime.handle().clone();
    thread::Builder::new()
        .name(format!("ambit-carry-{n}"))
        .spawn(move || runtime.block_on(std::future::pending::<()>()))?;
    Ok(Carrier { handle, busy: AtomicUsize::new(0) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_stay_until_their_thread_has_many_more_than_another() {
        let carrier = || {
            let runtime = Builder::new_current_thread().build().unwrap();
            Carrier { handle: runtime.handle().clone(), busy: AtomicUsize::new(0) }
        };
        let carriers = Carriers { all: [carrier(), carrier()].into() };
        let mut carried: Vec<_> = (0..IMBALANCE).map(|_| carriers.choose(0)).collect();
        assert!(carried.iter().all(|(at, _)| *at == 0));
        carried.push(carriers.choose(0));
        assert_eq!(carried.last().unwrap().0, 1, "the other one");
        assert_eq!(carriers.choose(1).0, 1);
        carried.clear();
        assert_eq!(carriers.choose(0).0, 0, "all are idle again");
    }
}
