//! Threads around a TPM that may never answer.
//!
//! One thread, the worker, owns the connection and does the operations one after the other. libtss2 waits without end
//! for an answer, and nothing can wake it, so a second thread, the foreman, waits beside it: past an operation's
//! deadline the worker is given up, and the next operation gets a new one. A worker that was given up finishes what it
//! was waiting for, if that ever comes, and ends; its answer is dropped and it writes nothing. Their number is bounded:
//! while that many wait for the TPM, further operations are refused at once.

use crate::error::TpmError;
use crate::options::Options;
use crate::tpm::Tpm;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tss_esapi::tcti_ldr::TctiNameConf;

/// Workers that may wait for an answer past their deadline. One hang is an accident, and a TPM that left three commands
/// unanswered has not come back.
const UNANSWERED_MAX: usize = 3;

/// What a worker does with its TPM until a deadline; or, with an error, tells its caller that it will not be done.
pub(crate) type Work = Box<dyn FnOnce(Result<(&mut Tpm, Instant), TpmError>) + Send>;

/// An operation that waits for its turn.
pub(crate) struct Request {
    pub(crate) operation: &'static str,
    pub(crate) due: Instant,
    /// What `due` was set by, for the error that names it.
    pub(crate) limit: Duration,
    pub(crate) work: Work,
}

/// Whether a worker is still the one. Held while it writes, so that it cannot be given up in between.
#[derive(Clone, Debug)]
pub(crate) struct Claim(Arc<Mutex<bool>>);

impl Claim {
    fn new() -> Claim {
        Claim(Arc::new(Mutex::new(true)))
    }

    /// Runs `work` unless the worker was given up.
    pub(crate) fn hold(&self, work: impl FnOnce() -> Result<(), TpmError>) -> Result<(), TpmError> {
        let valid = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if *valid { work() } else { Err(TpmError::Stopped) }
    }

    fn end(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = false;
    }

    fn has_ended(&self) -> bool {
        !*self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The foreman's life: until the last handle is dropped.
pub(crate) fn serve(mut queue: mpsc::Receiver<Request>, options: &Options, tcti: &TctiNameConf) {
    let unanswered = Arc::new(AtomicUsize::new(0));
    let mut worker: Option<Worker> = None;
    while let Some(Request { operation, due, limit, work }) = queue.blocking_recv() {
        if due <= Instant::now() {
            work(Err(TpmError::TimedOut { operation, limit }));
            continue;
        }
        let held = unanswered.load(Ordering::Acquire);
        if worker.is_none() && held >= UNANSWERED_MAX {
            work(Err(TpmError::Hung { operation, unanswered: held }));
            continue;
        }
        let current = match worker.take().map_or_else(|| Worker::start(options, tcti, &unanswered), Ok) {
            Ok(current) => current,
            Err(error) => {
                work(Err(error));
                continue;
            }
        };
        worker = current.perform(operation, due, work, &unanswered);
    }
}

struct Worker {
    work: SyncSender<(Work, Instant)>,
    done: Receiver<()>,
    claim: Claim,
}

impl Worker {
    fn start(options: &Options, tcti: &TctiNameConf, unanswered: &Arc<AtomicUsize>) -> Result<Worker, TpmError> {
        // One piece of work at a time, and one note that it was done.
        let (work, tasks) = sync_channel::<(Work, Instant)>(1);
        let (note, done) = sync_channel(1);
        let claim = Claim::new();
        let mut tpm = Tpm::new(options.clone(), tcti.clone(), claim.clone());
        let leaving = Leaving { claim: claim.clone(), unanswered: Arc::clone(unanswered) };
        let live = move || {
            let _leaving = leaving;
            while let Ok((work, due)) = tasks.recv() {
                work(Ok((&mut tpm, due)));
                if note.send(()).is_err() {
                    break;
                }
            }
        };
        std::thread::Builder::new().name("tpm".into()).spawn(live).map_err(|source| TpmError::Thread { source })?;
        Ok(Worker { work, done, claim })
    }

    /// Waits for `work` until `due`. Gives the worker back if it can be used again.
    fn perform(self, operation: &'static str, due: Instant, work: Work, unanswered: &AtomicUsize) -> Option<Worker> {
        if self.work.send((work, due)).is_err() {
            return None;
        }
        match self.done.recv_timeout(due.saturating_duration_since(Instant::now())) {
            Ok(()) => Some(self),
            // It panicked. Its caller sees the answer's channel close.
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => {
                let held = unanswered.fetch_add(1, Ordering::AcqRel) + 1;
                self.claim.end();
                tracing::error!(operation, unanswered = held, "TPM does not answer");
                None
            }
        }
    }
}

/// Counts a worker that was given up as back, however its thread ends.
struct Leaving {
    claim: Claim,
    unanswered: Arc<AtomicUsize>,
}

impl Drop for Leaving {
    fn drop(&mut self) {
        if self.claim.has_ended() {
            self.unanswered.fetch_sub(1, Ordering::AcqRel);
            tracing::warn!("TPM answered after the deadline");
        }
    }
}
