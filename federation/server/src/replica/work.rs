//! CPU work of verification, kept off the threads that serve and apply: so much at once, so much waiting, then `busy`.

use ambit_model::{Code, Refusal};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{Semaphore, SemaphorePermit, oneshot};

/// Judged at once: one core stays for Raft and for serving.
const THREADS: usize = 2;
/// Waiting; at 0.1-4 ms each the last of them waits a few seconds at worst.
const WAITING_MAX: usize = 2_048;
/// Logs held while they are read and judged, in MiB, over all streams.
const LOG_MIB_MAX: u32 = 192;

type Job = Box<dyn FnOnce() + Send>;

/// Threads that judge, fed by a bounded queue: while something waits in it they do not sleep, and a judgement takes less
/// than putting a thread to sleep and waking it. They end with it.
pub struct Work {
    queue: SyncSender<Job>,
    logs: Semaphore,
}

impl Work {
    /// Starts the threads.
    pub fn start() -> Result<Work, Refusal> {
        let (queue, jobs) = sync_channel(WAITING_MAX);
        let jobs = Arc::new(Mutex::new(jobs));
        for n in 1..=THREADS {
            let jobs = jobs.clone();
            std::thread::Builder::new()
                .name(format!("judge-{n}"))
                .spawn(move || judge(&jobs))
                .map_err(|e| Refusal::new(Code::Internal, "a thread that judges", e.to_string()))?;
        }
        Ok(Work { queue, logs: Semaphore::new(LOG_MIB_MAX as usize) })
    }

    /// Runs `f` on a thread of its own kind. Not at all, if the caller has given up before its turn.
    pub async fn run<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> Result<T, Refusal> {
        let (tell, told) = oneshot::channel();
        let job: Job = Box::new(move || {
            if !tell.is_closed() {
                let _ = tell.send(f());
            }
        });
        self.queue.try_send(job).map_err(|e| match e {
            TrySendError::Full(_) => {
                Refusal::new(Code::Busy, format!("at most {WAITING_MAX} judgements waiting"), "more")
            }
            TrySendError::Disconnected(_) => Refusal::new(Code::Unavailable, "a running replica", "it is ending"),
        })?;
        told.await.map_err(|_| Refusal::new(Code::Internal, "a judgement", "one that failed"))
    }

    /// Room for logs of `bytes` together, held until dropped. At once or not at all.
    pub fn log_room(&self, bytes: u64) -> Result<SemaphorePermit<'_>, Refusal> {
        let mib = u32::try_from(bytes.div_ceil(1 << 20)).unwrap_or(u32::MAX);
        let busy = |_| Refusal::new(Code::Busy, format!("logs of {LOG_MIB_MAX} MiB at once"), "more");
        self.logs.try_acquire_many(mib).map_err(busy)
    }
}

fn judge(jobs: &Mutex<Receiver<Job>>) {
    loop {
        let next = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = next else { return };
        // A judgement that panics is a defect, told by the hook; its caller hears that it failed, and others go on.
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn work_is_bounded_and_a_caller_that_gives_up_leaves_no_trace() {
        let work = Arc::new(Work::start().unwrap());
        assert_eq!(work.run(|| 7).await.unwrap(), 7);
        for _ in 0..THREADS + 1 {
            assert_eq!(work.run(|| panic!("a judgement that fails")).await.unwrap_err().code, Code::Internal);
        }
        assert_eq!(work.run(|| 8).await.unwrap(), 8, "and the threads are still there");
        let all = work.log_room(u64::from(LOG_MIB_MAX) << 20).unwrap();
        assert_eq!(work.log_room(1).unwrap_err().code, Code::Busy);
        drop(all);
        assert!(work.log_room(1).is_ok());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_full_queue_is_busy_and_what_nobody_waits_for_is_not_done() {
        let work = Arc::new(Work::start().unwrap());
        let done = Arc::new(AtomicUsize::new(0));
        // Nothing is ever sent: each job waits until the other end is dropped.
        let (open, gate) = sync_channel::<()>(0);
        let gate = Arc::new(Mutex::new(gate));
        let mut callers = Vec::new();
        // Both threads are held up, then the queue fills.
        loop {
            let (work, gate, done) = (work.clone(), gate.clone(), done.clone());
            let job = move || {
                let _ = gate.lock().unwrap().recv();
                done.fetch_add(1, Ordering::Relaxed)
            };
            let mut caller = Box::pin(async move { work.run(job).await });
            match futures::poll!(caller.as_mut()) {
                std::task::Poll::Ready(answer) => {
                    assert_eq!(answer.unwrap_err().code, Code::Busy);
                    break;
                }
                std::task::Poll::Pending => callers.push(caller),
            }
        }
        assert!((WAITING_MAX..=WAITING_MAX + THREADS).contains(&callers.len()), "{}", callers.len());
        // All but the first give up, then the gate opens.
        callers.truncate(THREADS);
        drop(open);
        for caller in callers {
            caller.await.unwrap();
        }
        assert_eq!(work.run(|| ()).await, Ok(()));
        let done = done.load(Ordering::Relaxed);
        assert!((THREADS..=2 * THREADS).contains(&done), "{done}");
    }
}
