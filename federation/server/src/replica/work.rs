//! CPU work of verification, kept off the threads that serve and apply: so much at once, so much waiting, then `busy`.

use ambit_model::{Code, Refusal};
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::{Semaphore, SemaphorePermit};

/// Judged at once: one core stays for Raft and for serving.
const AT_ONCE: usize = 2;
/// Waiting; at 0.1-4 ms each the last of them waits a few seconds at worst.
const WAITING_MAX: usize = 2_048;
/// Logs held while they are read and judged, in MiB, over all streams.
const LOG_MIB_MAX: u32 = 192;

/// The bounds.
pub struct Work {
    running: Semaphore,
    waiting: AtomicUsize,
    logs: Semaphore,
}

impl Default for Work {
    fn default() -> Self {
        Self {
            running: Semaphore::new(AT_ONCE),
            waiting: AtomicUsize::new(0),
            logs: Semaphore::new(LOG_MIB_MAX as usize),
        }
    }
}

/// Counts one who waits, and stops counting when dropped: a caller may give up at any await.
struct Waits<'a>(&'a AtomicUsize);

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Work {
    /// Runs `f` on a thread of its own kind.
    pub async fn run<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> Result<T, Refusal> {
        let before = self.waiting.fetch_add(1, Ordering::Relaxed);
        let waits = Waits(&self.waiting);
        if before >= WAITING_MAX {
            return Err(Refusal::new(Code::Busy, format!("at most {WAITING_MAX} judgements waiting"), "more"));
        }
        let ending = |e: String| Refusal::new(Code::Unavailable, "a running replica", e);
        let permit = self.running.acquire().await.map_err(|e| ending(e.to_string()))?;
        drop(waits);
        let done = tokio::task::spawn_blocking(f).await;
        drop(permit);
        done.map_err(|e| Refusal::new(Code::Internal, "a judgement", e.to_string()))
    }

    /// Room for logs of `bytes` together, held until dropped. At once or not at all.
    pub fn log_room(&self, bytes: u64) -> Result<SemaphorePermit<'_>, Refusal> {
        let mib = u32::try_from(bytes.div_ceil(1 << 20)).unwrap_or(u32::MAX);
        let busy = |_| Refusal::new(Code::Busy, format!("logs of {LOG_MIB_MAX} MiB at once"), "more");
        self.logs.try_acquire_many(mib).map_err(busy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_is_bounded_and_a_caller_that_gives_up_leaves_no_trace() {
        let work = Work::default();
        assert_eq!(work.run(|| 7).await.unwrap(), 7);
        assert!(work.run(|| panic!("a judgement that fails")).await.is_err());
        assert_eq!(work.run(|| 8).await.unwrap(), 8, "and the place is free again");
        let all = work.log_room(u64::from(LOG_MIB_MAX) << 20).unwrap();
        assert_eq!(work.log_room(1).unwrap_err().code, Code::Busy);
        drop(all);
        assert!(work.log_room(1).is_ok());
        work.waiting.store(WAITING_MAX, Ordering::Relaxed);
        assert_eq!(work.run(|| ()).await.unwrap_err().code, Code::Busy);
        assert_eq!(work.waiting.load(Ordering::Relaxed), WAITING_MAX);
    }
}
