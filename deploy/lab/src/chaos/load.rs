//! The write load: the drill engine's own writer, from the operator's namespace, and its ledger.

use crate::cell::Cell;
use crate::lab::{Lab, LabError};
use crate::net;
use ambit::drill::figures::Sample;
use ambit::drill::ledger::{self, LedgerFigures, Write};
use ambit::drill::spec::Writer;
use ambit::drill::watch::{Clock, Samples};
use ambit::drill::writer;
use ambit::duration::Millis;
use ambit_model::{Refusal, refusal::Code};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// One new entry this often.
const EVERY: Millis = Millis(20);
/// One request to one replica; an election is waited out by the writer itself.
const REQUEST_MAX: Duration = Duration::from_secs(10);
/// How long the cell may take to list its entries at the end.
const LIST_MAX: Duration = Duration::from_secs(20);

/// A running load.
pub(super) struct Load {
    stop: oneshot::Sender<()>,
    thread: JoinHandle<Result<Vec<Write>, LabError>>,
    samples: Samples,
    clock: Clock,
}

impl Load {
    /// Starts to write to a cell.
    pub(super) fn start(lab: &Lab, cell: &Cell) -> Result<Load, LabError> {
        let (stop, stopped) = oneshot::channel();
        let (samples, clock) = (Samples::default(), Clock::start());
        let (operator, context, site) = (lab.operator().netns, cell.context(), cell.site.clone());
        let into = samples.clone();
        let thread = std::thread::spawn(move || {
            let work = move || -> Result<Vec<Write>, Refusal> {
                // One thread, so that every socket is made in the operator's namespace.
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                let runtime = runtime.map_err(|e| Refusal::new(Code::Internal, "a runtime", e.to_string()))?;
                let context = ambit::context::Context::read(&context)?;
                let cell = ambit::cell::Cell::open(context, REQUEST_MAX)?;
                let writer = Writer { cell: site.parse()?, every: EVERY };
                runtime.block_on(write(cell, writer, clock, into, stopped))
            };
            Ok(net::inside(&operator, work)??)
        });
        Ok(Load { stop, thread, samples, clock })
    }
    /// Whether it still writes; it ends early only where it could not start.
    pub(super) fn runs(&self) -> bool {
        !self.thread.is_finished()
    }
    /// Writes acknowledged so far.
    pub(super) fn acknowledged(&self) -> usize {
        self.samples.with(|all| all.iter().filter(|s| s.ok).count())
    }
    /// The longest time without an acknowledgement, and when it began, both in seconds.
    pub(super) fn longest_gap(&self) -> (f64, f64) {
        let acks: Vec<u64> = self.samples.with(|all| all.iter().filter(|s| s.ok).map(|s: &Sample| s.t_ms).collect());
        let gaps = acks.windows(2).map(|pair| (pair[1].saturating_sub(pair[0]), pair[0]));
        let (ms, at) = gaps.max().unwrap_or_default();
        (ms as f64 / 1000.0, at as f64 / 1000.0)
    }
    /// How long it has been writing.
    pub(super) fn elapsed(&self) -> Duration {
        Duration::from_millis(self.clock.ms())
    }
    /// When it began; the ledger counts from there.
    pub(super) fn clock(&self) -> Clock {
        self.clock
    }
    /// Stops, compares the ledger with what the cell lists, and counts.
    pub(super) fn stop(self) -> Result<LedgerFigures, LabError> {
        Ok(ledger::figures(&self.ledger()?))
    }
    /// Stops, and compares the ledger with what the cell lists.
    pub(super) fn ledger(self) -> Result<Vec<Write>, LabError> {
        // It has ended by itself only where it failed, which it tells.
        let _ = self.stop.send(());
        let panicked = || Refusal::new(Code::Internal, "the writer's ledger", "its thread panicked");
        self.thread.join().map_err(|_| panicked())?
    }
}

async fn write(
    cell: ambit::cell::Cell,
    writer: Writer,
    clock: Clock,
    samples: Samples,
    stopped: oneshot::Receiver<()>,
) -> Result<Vec<Write>, Refusal> {
    let run = format!("chaos{}", clock.begun_ms);
    let running = writer::start(cell.clone(), &writer, run.clone(), clock, samples).await?;
    // Dropped without a word: whoever watched has failed; the ledger is of no use to anyone, but nothing is left open.
    let _ = stopped.await;
    let mut writes = running.stop().await;
    let deadline = Instant::now() + LIST_MAX;
    let listed = loop {
        match writer::list(&cell).await {
            Err(refusal) if Instant::now() > deadline => return Err(refusal),
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
            Ok(listed) => break listed,
        }
    };
    ledger::reconcile(&mut writes, &run, &listed);
    Ok(writes)
}
