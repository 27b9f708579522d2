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
}

impl Driver {
    pub(super) fn spawn(
        options: Options,
        engine: Engine<Folder>,
        inbox: Receiver<Request>,
        outbox: Outbox,
    ) -> Result<std::thread::JoinHandle<()>, StartError> {
        let name = format!("raft-{}", options.id);
        let driver = Self { options, engine, outbox, inbox };
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

    fn run(mut self) -> Result<(), Fatal> {
        let tick = tick_of(&self.options);
        let mut next_tick = Instant::now() + tick;
        let shared = self.engine.shared().clone();
        loop {
            let outbox = &mut self.outbox;
            self.engine.work(Now::read(), &mut |messages| outbox.send(messages, &shared.metrics))?;
            let pressed = self.engine.is_pressed();
            let wait = if pressed { Duration::ZERO } else { next_tick.saturating_duration_since(Instant::now()) };
            match self.inbox.recv_timeout(wait) {
                Ok(Request::Stop) | Err(RecvTimeoutError::Disconnected) => break,
                Ok(request) => self.engine.take(request, Now::read()),
                Err(RecvTimeoutError::Timeout) => {}
            }
            for _ in 1..BATCH_MAX {
                match self.inbox.try_recv() {
                    Ok(Request::Stop) => {
                        return self.engine.close();
                    }
                    Ok(request) => self.engine.take(request, Now::read()),
                    Err(_) => break,
                }
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
