//! The one thread that owns a replica's engine: core, log and state. Everything else talks to it through one bounded queue.
//!
//! Group commit: whatever was queued while the last sync ran goes into the next append. Any failure to write, and any
//! panic, ends the process: a replica in doubt restarts from disk, it does not go on.

use super::clock::Now;
use super::engine::{Engine, Request, tick_of};
use super::machine::Fatal;
use super::transport::Outbox;
use super::{Options, StartError};
use crate::store::Folder;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError};
use std::time::{Duration, Instant};

/// Requests in the queue. Proposals are bounded well below by their permits, so that raft's own messages find room.
const QUEUE_MAX: usize = 4096;
/// Requests taken in before the next append.
const BATCH_MAX: usize = 1024;
/// Where so many proposals came at once, more are about to: those that wait for the answers that are just being given. A
/// round for a few costs as much as one for all, so the next is put off a little. One caller alone never waits.
const COMPANY: usize = 4;
/// How long it is put off; a sync takes as long.
const GATHER: Duration = Duration::from_millis(1);
/// Ticks made up for after a stall; more would turn a pause of this process into an election.
const TICKS_CAUGHT_UP_MAX: u32 = 2;

/// The sending side of the queue.
#[derive(Clone)]
pub(super) struct Queue(SyncSender<Request>);

/// Why a request did not get into the queue.
pub(super) enum QueueError {
    Full,
    Stopped,
}

impl Queue {
    pub(super) fn push(&self, request: Request) -> Result<(), QueueError> {
        self.0.try_send(request).map_err(|e| match e {
            TrySendError::Full(_) => QueueError::Full,
            TrySendError::Disconnected(_) => QueueError::Stopped,
        })
    }
    /// Waits for room; only for [`Request::Stop`].
    pub(super) fn push_last(&self, request: Request) {
        let _ = self.0.send(request);
    }
}

pub(super) fn queue() -> (Queue, Receiver<Request>) {
    let (sender, receiver) = std::sync::mpsc::sync_channel(QUEUE_MAX);
    (Queue(sender), receiver)
}

pub(super) struct Driver {
    options: Options,
    engine: Engine<Folder>,
    outbox: Outbox,
    inbox: Receiver<Request>,
    gathered: Gathered,
}

/// Proposals on their way into the engine: a few are handed on as they come, many together.
#[derive(Default)]
struct Gathered {
    held: Vec<Request>,
    /// When those held are handed on.
    due: Option<Instant>,
    /// Handed on since the last round, and in the one before.
    now: usize,
    last: usize,
}

impl Gathered {
    /// What is to be handed on at once.
    fn take(&mut self, request: Request, now: Instant) -> Option<Request> {
        if !matches!(request, Request::Propose(..)) {
            return Some(request);
        }
        if self.last < COMPANY {
            self.now += 1;
            return Some(request);
        }
        self.due.get_or_insert(now + GATHER);
        self.held.push(request);
        None
    }

    /// A round begins: what is due goes into it.
    fn round(&mut self, now: Instant) -> Vec<Request> {
        let due = self.due.is_some_and(|at| at <= now) || self.held.len() >= BATCH_MAX;
        let held = if due { std::mem::take(&mut self.held) } else { Vec::new() };
        if due {
            self.due = None;
        }
        match std::mem::take(&mut self.now) + held.len() {
            0 => {}
            n => self.last = n,
        }
        held
    }
}

impl Driver {
    pub(super) fn spawn(
        options: Options,
        engine: Engine<Folder>,
        inbox: Receiver<Request>,
        outbox: Outbox,
    ) -> Result<std::thread::JoinHandle<()>, StartError> {
        let name = format!("raft-{}", options.id);
        let driver = Self { options, engine, outbox, inbox, gathered: Gathered::default() };
        let run = move || {
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| driver.run()));
            match outcome {
                Ok(Ok(())) => return,
                Ok(Err(fatal)) => {
                    tracing::error!(error = &fatal as &dyn std::error::Error, "raft cannot go on: the process ends");
                }
                Err(_) => tracing::error!("raft panicked: the process ends"),
            }
            std::process::abort();
        };
        std::thread::Builder::new().name(name).spawn(run).map_err(StartError::Thread)
    }

    fn take(&mut self, request: Request) {
        if let Some(request) = self.gathered.take(request, Instant::now()) {
            self.engine.take(request, Now::read());
        }
    }

    fn run(mut self) -> Result<(), Fatal> {
        let tick = tick_of(&self.options);
        let mut next_tick = Instant::now() + tick;
        let shared = self.engine.shared().clone();
        loop {
            let outbox = &mut self.outbox;
            self.engine.work(Now::read(), &mut |messages| outbox.send(messages, &shared.metrics))?;
            let pressed = self.engine.is_pressed();
            let until = self.gathered.due.map_or(next_tick, |due| due.min(next_tick));
            let wait = if pressed { Duration::ZERO } else { until.saturating_duration_since(Instant::now()) };
            match self.inbox.recv_timeout(wait) {
                Ok(Request::Stop) | Err(RecvTimeoutError::Disconnected) => break,
                Ok(request) => self.take(request),
                Err(RecvTimeoutError::Timeout) => {}
            }
            for _ in 1..BATCH_MAX {
                match self.inbox.try_recv() {
                    Ok(Request::Stop) => {
                        return self.engine.close();
                    }
                    Ok(request) => self.take(request),
                    Err(_) => break,
                }
            }
            for proposal in self.gathered.round(Instant::now()) {
                self.engine.take(proposal, Now::read());
            }
            // After the queue: a stalled process hears its leader's heartbeats before it counts the time without them.
            let mut caught_up = 0;
            while Instant::now() >= next_tick {
                if caught_up == TICKS_CAUGHT_UP_MAX {
                    next_tick = Instant::now();
                    break;
                }
                self.engine.tick();
                next_tick += tick;
                caught_up += 1;
            }
            self.engine.housekeeping(Now::read());
        }
        self.engine.close()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ambit_model::Stamp;
    use ambit_state::{Command, LogEntry};
    use tokio::sync::oneshot;

    fn proposal() -> Request {
        let entry = LogEntry { stamp: Stamp(0), client: [0; 32], request: [0; 16], command: Command::Tick };
        Request::Propose(Box::new(entry), oneshot::channel().0)
    }

    /// How many of so many are handed on at once.
    fn at_once(gathered: &mut Gathered, proposals: usize, now: Instant) -> usize {
        (0..proposals).filter(|_| gathered.take(proposal(), now).is_some()).count()
    }

    #[test]
    fn one_caller_never_waits_and_many_wait_a_moment_for_each_other() {
        let (mut gathered, now) = (Gathered::default(), Instant::now());
        for _ in 0..3 {
            assert_eq!(at_once(&mut gathered, 1, now), 1, "alone");
            assert!(gathered.round(now).is_empty() && gathered.due.is_none());
        }
        assert_eq!(at_once(&mut gathered, COMPANY, now), COMPANY, "nobody knew of the company");
        assert!(gathered.round(now).is_empty());
        assert_eq!(at_once(&mut gathered, 1, now), 0);
        assert_eq!(at_once(&mut gathered, 1, now + GATHER / 2), 0);
        assert!(gathered.take(Request::Stop, now).is_some(), "only proposals wait");
        assert!(gathered.round(now + GATHER / 2).is_empty(), "a round of nothing but messages");
        assert_eq!(gathered.round(now + GATHER).len(), 2, "as soon as the first has waited long enough");
        assert!(gathered.held.is_empty() && gathered.due.is_none());
        assert_eq!(at_once(&mut gathered, 1, now), 1, "two are no company");
    }

    #[test]
    fn a_full_round_is_not_put_off() {
        let (mut gathered, now) = (Gathered { last: COMPANY, ..Gathered::default() }, Instant::now());
        assert_eq!(at_once(&mut gathered, BATCH_MAX, now), 0);
        assert_eq!(gathered.round(now).len(), BATCH_MAX);
        assert!(gathered.round(now + GATHER).is_empty() && gathered.due.is_none());
    }
}
