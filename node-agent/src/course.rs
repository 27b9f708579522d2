//! The course of an agent's life, as those see it who carry: it waits for its turn, serves, and drains. It never goes back.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::watch;

/// How often is looked whether the last connection has ended.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// From accept to a request, on one machine.
const ASKED_WITHIN: Duration = Duration::from_millis(200);

/// Where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    /// Another process still serves: nothing is accepted here.
    Waiting,
    /// The usual one.
    Serving,
    /// What is carried ends, and nothing new begins.
    Draining,
}

/// The course, and how many connections are carried in it. Cloning shares.
#[derive(Clone, Debug)]
pub struct Course {
    phase: Arc<watch::Sender<Phase>>,
    flows: Arc<AtomicUsize>,
}

/// A connection that is carried, until this is dropped.
#[derive(Debug)]
pub struct Flow(Arc<AtomicUsize>);

impl Drop for Flow {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Default for Course {
    /// One that serves.
    fn default() -> Self {
        Self { phase: Arc::new(watch::Sender::new(Phase::Serving)), flows: Arc::default() }
    }
}

impl Course {
    /// One that waits until [`Course::serve`].
    pub fn waiting() -> Self {
        Self { phase: Arc::new(watch::Sender::new(Phase::Waiting)), flows: Arc::default() }
    }

    /// From now on it serves, unless it drains already.
    pub fn serve(&self) {
        self.advance(Phase::Serving);
    }

    /// From now on nothing new begins.
    pub fn drain(&self) {
        self.advance(Phase::Draining);
    }

    fn advance(&self, to: Phase) {
        self.phase.send_if_modified(|phase| {
            let later = to > *phase;
            *phase = to.max(*phase);
            later
        });
    }

    /// Whether another process still serves.
    pub fn is_waiting(&self) -> bool {
        *self.phase.borrow() == Phase::Waiting
    }

    /// Whether nothing new may begin.
    pub fn is_draining(&self) -> bool {
        *self.phase.borrow() == Phase::Draining
    }

    /// Returns once it serves, or is past that.
    pub async fn serving(&self) {
        self.reached(Phase::Serving).await;
    }

    /// Returns once it drains.
    pub async fn draining(&self) {
        self.reached(Phase::Draining).await;
    }

    /// Returns a moment after it began to drain: whoever connected just before has asked by then.
    pub async fn drained_a_while(&self) {
        self.draining().await;
        tokio::time::sleep(ASKED_WITHIN).await;
    }

    async fn reached(&self, wanted: Phase) {
        // The sender is held here: it cannot be gone.
        let _ = self.phase.subscribe().wait_for(|phase| *phase >= wanted).await;
    }

    /// Runs what serves for as long as this does: begins in its time, and is dropped when it drains. It then never returns.
    pub async fn while_serving<T>(&self, serves: impl Future<Output = T>) -> T {
        self.serving().await;
        tokio::select! {
            biased;
            () = self.draining() => {}
            ended = serves => return ended,
        }
        std::future::pending().await
    }

    /// Counts a connection as carried.
    pub fn flow(&self) -> Flow {
        self.flows.fetch_add(1, Ordering::Relaxed);
        Flow(self.flows.clone())
    }

    /// Connections that are carried now.
    pub fn flows(&self) -> usize {
        self.flows.load(Ordering::Relaxed)
    }

    /// Returns once none is carried.
    pub async fn idle(&self) {
        while self.flows() > 0 {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[tokio::test]
    async fn it_serves_in_its_time_and_never_goes_back() {
        let course = Course::waiting();
        let mut served = Box::pin(course.while_serving(std::future::ready(7)));
        assert_eq!((&mut served).now_or_never(), None, "it waits");
        course.serve();
        assert_eq!(served.await, 7);
        let mut serves = Box::pin(course.while_serving(std::future::pending::<()>()));
        assert_eq!((&mut serves).now_or_never(), None);
        course.drain();
        course.serve();
        assert!(course.is_draining(), "not back");
        course.draining().await;
        assert_eq!(course.while_serving(std::future::ready(())).now_or_never(), None, "nothing begins any more");
    }

    #[tokio::test]
    async fn it_is_idle_when_the_last_connection_has_ended() {
        let course = Course::default();
        let (one, two) = (course.flow(), course.clone().flow());
        drop(one);
        assert_eq!((course.flows(), course.idle().now_or_never()), (1, None));
        drop(two);
        course.idle().await;
    }
}
