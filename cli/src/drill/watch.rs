//! What the probes see, as it comes in, shared between the probes and the drill that judges them.

use super::figures::Sample;
use super::live::{Line, Live};
use super::report::Event;
use crate::when::now_ms;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Samples kept of one probe: a half-hour drill at 5 ms. Beyond it the drill ends rather than forgets.
pub const SAMPLES_MAX: usize = 400_000;

/// The drill's clock: a monotonic one, anchored once to the time of day.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    begun: Instant,
    /// Milliseconds since the Unix epoch when the drill began.
    pub begun_ms: u64,
}

impl Clock {
    /// Starts now.
    pub fn start() -> Clock {
        Clock { begun: Instant::now(), begun_ms: now_ms() }
    }
    /// Milliseconds since the drill began.
    pub fn ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// A growing list that one probe writes and the drill reads.
#[derive(Clone, Debug, Default)]
pub struct Samples {
    inner: Arc<Mutex<Vec<Sample>>>,
}

impl Samples {
    /// Adds one. Past [`SAMPLES_MAX`] it is dropped; [`Samples::full`] tells.
    pub fn push(&self, sample: Sample) {
        let mut samples = self.lock();
        if samples.len() < SAMPLES_MAX {
            samples.push(sample);
        }
    }
    /// Whether nothing more fits.
    pub fn full(&self) -> bool {
        self.lock().len() >= SAMPLES_MAX
    }
    /// Reads them in place.
    pub fn with<T>(&self, read: impl FnOnce(&[Sample]) -> T) -> T {
        read(&self.lock())
    }
    /// All so far.
    pub fn all(&self) -> Vec<Sample> {
        self.lock().clone()
    }
    fn lock(&self) -> MutexGuard<'_, Vec<Sample>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The timeline, told on standard error and to whoever watches, as it happens.
pub struct Timeline {
    clock: Clock,
    events: Vec<Event>,
    /// Where others read it.
    pub live: Live,
}

impl Timeline {
    /// An empty one.
    pub fn new(clock: Clock, live: Live) -> Timeline {
        Timeline { clock, events: Vec::new(), live }
    }
    /// Something happened, now.
    pub fn tell(&mut self, what: impl Into<String>) {
        let event = Event { t_ms: self.clock.ms(), what: what.into() };
        eprintln!("{:>7.1}s  {}", event.t_ms as f64 / 1000.0, event.what);
        self.live.tell(&Line::Event(event.clone()));
        self.events.push(event);
    }
    /// All that happened.
    pub fn into_events(self) -> Vec<Event> {
        self.events
    }
}
