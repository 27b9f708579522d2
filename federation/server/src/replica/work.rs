//! CPU work of verification, kept off the threads that serve and apply: so much at once, so much waiting, then `busy`.

use ambit_model::{Code, Refusal};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

/// Judged at once: one core stays for Raft and for serving.
const THREADS: usize = 2;
/// Waiting; at 0.1-4 ms each the last of them waits a few seconds at worst.
const WAITING_MAX: usize = 2_048;
const MIB: u64 = 1 << 20;

/// Whose logs share one room. Few nodes with much to show must not keep the many with little waiting until they are late,
/// nor machines that ask to be let in those that are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// Logs of a round, a mebibyte at most: nearly all of them.
    Small,
    /// Longer logs of a round.
    Large,
    /// Logs of an enrolment.
    Enrolment,
}

impl Lane {
    /// The lane of a round's logs by what is announced, in bytes.
    pub fn of_round(bytes: u64) -> Lane {
        if bytes <= MIB { Lane::Small } else { Lane::Large }
    }

    /// What is held at once in MiB, over all streams. The longest logs allowed fit into the two that take them.
    const fn mib_max(self) -> u32 {
        match self {
            Lane::Small => 32,
            Lane::Large | Lane::Enrolment => 96,
        }
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// Threads that judge, fed by a bounded queue: while something waits in it they do not sleep, and a judgement takes less
/// than putting a thread to sleep and waking it. They end with it.
pub struct Work {
    queue: SyncSender<Job>,
    small: Arc<Semaphore>,
    large: Arc<Semaphore>,
    enrolment: Arc<Semaphore>,
}

/// Room for logs while they are read and judged. Nothing is held for what was only announced: it grows with what came.
pub struct LogRoom {
    lane: Lane,
    free: Arc<Semaphore>,
    held: Option<OwnedSemaphorePermit>,
}

impl LogRoom {
    /// Room for `bytes` in all. At once or not at all.
    pub fn grow(&mut self, bytes: u64) -> Result<(), Refusal> {
        let held = self.held.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let more = usize::try_from(bytes.div_ceil(MIB)).unwrap_or(usize::MAX).saturating_sub(held);
        if more == 0 {
            return Ok(());
        }
        let busy = || Refusal::new(Code::Busy, format!("logs of {} MiB at once", self.lane.mib_max()), "more");
        let more = u32::try_from(more).map_err(|_| busy())?;
        let permit = self.free.clone().try_acquire_many_owned(more).map_err(|_| busy())?;
        match &mut self.held {
            Some(held) => held.merge(permit),
            None => self.held = Some(permit),
        }
        Ok(())
    }
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
        let room = |lane: Lane| Arc::new(Semaphore::new(lane.mib_max() as usize));
        let (small, large, enrolment) = (room(Lane::Small), room(Lane::Large), room(Lane::Enrolment));
        Ok(Work { queue, small, large, enrolment })
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

    /// Room for logs in this lane: none yet.
    pub fn log_room(&self, lane: Lane) -> LogRoom {
        let free = match lane {
            Lane::Small => &self.small,
            Lane::Large => &self.large,
            Lane::Enrolment => &self.enrolment,
        };
        LogRoom { lane, free: free.clone(), held: None }
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
    }

    #[tokio::test]
    async fn room_grows_with_what_came_and_lanes_do_not_meet() {
        let work = Work::start().unwrap();
        let (mut first, mut second) = (work.log_room(Lane::Large), work.log_room(Lane::Large));
        first.grow(0).unwrap();
        first.grow(1).unwrap();
        first.grow(MIB).unwrap();
        second.grow(u64::from(Lane::Large.mib_max() - 1) * MIB).unwrap();
        assert_eq!(first.grow(MIB + 1).unwrap_err().code, Code::Busy);
        assert_eq!(first.grow(u64::MAX).unwrap_err().code, Code::Busy);
        for lane in [Lane::Small, Lane::Enrolment] {
            work.log_room(lane).grow(u64::from(lane.mib_max()) * MIB).unwrap();
        }
        drop(second);
        first.grow(u64::from(Lane::Large.mib_max()) * MIB).unwrap();
        assert_eq!(work.log_room(Lane::Large).grow(1).unwrap_err().code, Code::Busy);
        drop(first);
        work.log_room(Lane::Large).grow(1).unwrap();
        let longest = ambit_verify::BOOT_LOG_BYTES_MAX + ambit_verify::IMA_LOG_BYTES_MAX;
        assert!(u64::from(Lane::Enrolment.mib_max()) * MIB >= longest && Lane::of_round(longest) == Lane::Large);
        assert_eq!((Lane::of_round(MIB), Lane::of_round(MIB + 1)), (Lane::Small, Lane::Large));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_full_queue_is_busy_and_what_nobody_waits_for_is_not_done() {
        let work = Arc::new(Work::start().unwrap());
        let (held, gate) = std::sync::mpsc::sync_channel::<()>(0);
        let (done, gate) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(gate)));
        let mut callers = Vec::new();
        // Both threads are held up, then the queue fills.
        loop {
            let (work, gate, done) = (work.clone(), gate.clone(), done.clone());
            let job = move || {
                // Until the sender is dropped.
                gate.lock().unwrap().recv().unwrap_err();
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
        drop(held);
        for caller in callers {
            caller.await.unwrap();
        }
        assert_eq!(work.run(|| ()).await, Ok(()));
        let done = done.load(Ordering::Relaxed);
        assert!((THREADS..=2 * THREADS).contains(&done), "{done}");
    }
}
