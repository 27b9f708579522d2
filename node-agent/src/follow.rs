//! A stream that tells a workload, or who speaks for it, everything that it may know, again with every change.
//!
//! SPIFFE_Workload_API.md section 4.3: every message is the full set, the first comes at once; section 4.4: what is absent
//! is withdrawn. The same holds for the Broker API and, in its own messages, for Envoy's SDS.

use crate::answers::{self, Answer};
use crate::cgroup::MeshRoot;
use crate::denials::Denials;
use crate::issued::{Interest, Issued, Known};
use crate::metrics::METRICS;
use crate::places::Place;
use crate::process::{Facts, Process};
use ambit_model::{EntryId, Selector};
use prost::Message;
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tonic::Status;
use zeroize::Zeroizing;

/// How long a caller waits for an SVID that the cell is issuing just now, before it is told to come back.
const COMING_MAX: Duration = Duration::from_secs(10);
/// How long one that has some of its SVIDs waits for the rest. Issuing takes milliseconds; a cell that is away must not
/// hold back what is held.
const PART_MAX: Duration = Duration::from_secs(1);

/// Why a stream ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The process ended, or runs another program, as somebody else or elsewhere; or it was never identified.
    Ended,
    /// The agent has no word from its cell yet.
    Starting,
    /// No entry recognises the process.
    Nobody,
    /// An entry does, but the cell does not issue.
    NotIssued,
}

impl Why {
    /// For the count of calls.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ended => "ended",
            Self::Starting => "starting",
            Self::Nobody => "refused",
            Self::NotIssued => "unavailable",
        }
    }
}

/// A workload and what it is recognised by.
#[derive(Debug)]
pub struct Workload {
    process: Arc<Process>,
    facts: Facts,
    selectors: BTreeSet<Selector>,
    hashed: bool,
}

impl Workload {
    /// The uid that counts for it.
    pub fn uid(&self) -> u32 {
        self.facts.uid
    }

    /// The process as `facts` tell it, for as long as it is so.
    pub fn new(process: Arc<Process>, facts: Facts, mesh: &MeshRoot) -> Self {
        let selectors = facts.selectors(mesh);
        Self { process, facts, selectors, hashed: false }
    }

    /// What it is recognised by, as far as the entries of `known` ask: hashing its program costs.
    async fn recognise(&mut self, known: &Known) -> &BTreeSet<Selector> {
        let asked = known.view.as_ref().is_some_and(|view| view.asks_sha256(&self.selectors));
        if asked
            && !self.hashed
            && let Some(program) = self.facts.program.clone()
        {
            self.hashed = true;
            let digest = self.process.clone().program_sha256(program).await;
            self.selectors.extend(digest.map(Selector::UnixSha256));
        }
        &self.selectors
    }
}

impl Workload {
    /// Asked last: what was found is of a process that lived until here, and was until here what it was recognised as.
    fn ends<T>(&self, known: &Known, answer: Answer<T>) -> Result<Answer<T>, Why> {
        match answer {
            _ if !self.process.still_is(&self.facts) => Err(Why::Ended),
            _ if known.view.is_none() => Err(Why::Starting),
            Answer::Nobody => Err(Why::Nobody),
            answer => Ok(answer),
        }
    }
}

/// Follows what one workload may know.
#[derive(Debug)]
pub struct Follower {
    issued: Issued,
    changes: watch::Receiver<Known>,
    workload: Workload,
    interest: Interest,
}

impl Follower {
    /// Begins with what is known now.
    pub fn new(issued: &Issued, workload: Workload) -> Self {
        let mut changes = issued.watch();
        changes.mark_changed();
        Self { issued: issued.clone(), changes, workload, interest: Interest::none() }
    }

    /// What holds now; the SVIDs that are wanted for it are asked for.
    pub async fn look<T>(
        &mut self,
        answer: impl FnOnce(&Known, &BTreeSet<Selector>) -> Answer<T>,
    ) -> Result<Answer<T>, Why> {
        let known = self.changes.borrow_and_update().clone();
        let found = self.workload.recognise(&known).await;
        let entries: BTreeSet<EntryId> = answers::entries(&known, found).iter().map(|e| e.id.clone()).collect();
        let answer = answer(&known, found);
        let before = std::mem::replace(&mut self.interest, Interest::none());
        self.interest = self.issued.interest(entries, before);
        self.workload.ends(&known, answer)
    }

    /// Returns when something is known that was not looked at yet, or the workload has ended; false if nothing will be told
    /// any more.
    pub async fn changed(&mut self) -> bool {
        tokio::select! {
            () = self.issued.course().drained_a_while() => false,
            changed = self.changes.changed() => changed.is_ok(),
            () = self.workload.process.ended() => true,
        }
    }
}

/// What holds now for `workload`, once.
pub async fn once<T>(
    issued: &Issued,
    workload: &mut Workload,
    answer: impl FnOnce(&Known, &BTreeSet<Selector>) -> Answer<T>,
) -> Result<Answer<T>, Why> {
    let known = issued.now();
    let answer = answer(&known, workload.recognise(&known).await);
    workload.ends(&known, answer)
}

/// When what is there in part goes out, and when a caller is told to come back.
#[derive(Debug)]
pub struct Patience {
    began: Instant,
    waits: bool,
}

impl Default for Patience {
    fn default() -> Self {
        Self { began: Instant::now(), waits: true }
    }
}

/// What to do with an answer.
#[derive(Debug, PartialEq, Eq)]
pub enum Step<T> {
    /// Send it.
    Send(T),
    /// Wait for a change, at most until then.
    Wait(Option<Instant>),
    /// End.
    End(Why),
}

impl Patience {
    /// Decides on `answer` at `now`, after something was `sent` or nothing yet.
    pub fn step<T>(&mut self, answer: Answer<T>, sent: bool, now: Instant) -> Step<T> {
        let waits = match &answer {
            Answer::Coming => true,
            Answer::Part(_) => !sent,
            Answer::Set(_) | Answer::Nobody => false,
        };
        if waits && !self.waits {
            self.began = now;
        }
        self.waits = waits;
        match answer {
            Answer::Set(set) => Step::Send(set),
            // One that was told more must hear at once what is withdrawn.
            Answer::Part(part) if sent || now >= self.began + PART_MAX => Step::Send(part),
            Answer::Part(_) => Step::Wait(Some(self.began + PART_MAX)),
            Answer::Coming if now >= self.began + COMING_MAX => Step::End(Why::NotIssued),
            Answer::Coming => Step::Wait(Some(self.began + COMING_MAX)),
            Answer::Nobody => Step::End(Why::Nobody),
        }
    }
}

/// Whether whoever opened a stream may go on hearing.
pub enum Leave {
    /// It speaks for itself, and what it may know is looked at each time.
    Own,
    /// It speaks for others, as long as it may.
    While {
        /// Asked before each message; until when the answer holds if nobody is denied meanwhile.
        check: Box<dyn Fn() -> Result<Instant, Status> + Send>,
        /// Whom the cell refuses.
        denials: watch::Receiver<Arc<Denials>>,
    },
}

impl Leave {
    fn ask(&mut self) -> Result<Option<Instant>, Status> {
        match self {
            Self::Own => Ok(None),
            Self::While { check, denials } => {
                denials.mark_unchanged();
                check().map(Some)
            }
        }
    }
    async fn changed(&mut self) {
        match self {
            Self::Own => std::future::pending().await,
            // Without a list to come, what was checked holds until its end.
            Self::While { denials, .. } => match denials.changed().await {
                Ok(()) => {}
                Err(_) => std::future::pending().await,
            },
        }
    }
}

/// One server stream of full sets.
pub struct Stream<T> {
    /// For the count of calls.
    pub method: &'static str,
    /// Whose.
    pub follower: Follower,
    /// The message for what is known.
    pub answer: fn(&Known, &BTreeSet<Selector>) -> Answer<T>,
    /// The status for an end.
    pub refuse: fn(Why) -> Status,
    /// Whether whoever called may still do so.
    pub leave: Leave,
    /// Where messages go.
    pub send: mpsc::Sender<Result<T, Status>>,
    /// Held while it is open.
    pub place: Place,
}

impl<T: Message> Stream<T> {
    /// Runs until either side ends it.
    pub async fn run(mut self) {
        let (mut last, mut patience) = (None, Patience::default());
        loop {
            let leave_ends = match self.leave.ask() {
                Ok(ends) => ends,
                Err(status) => return self.end("forbidden", status).await,
            };
            let step = match self.follower.look(self.answer).await {
                Ok(answer) => patience.step(answer, last.is_some(), Instant::now()),
                Err(why) => Step::End(why),
            };
            let until = match step {
                Step::End(why) => {
                    let status = (self.refuse)(why);
                    return self.end(why.as_str(), status).await;
                }
                Step::Wait(until) => until,
                Step::Send(set) => {
                    let now = Some(digest(&set));
                    if std::mem::replace(&mut last, now) != now {
                        METRICS.workload_api.inc([self.method, "ok"]);
                        if self.send.send(Ok(set)).await.is_err() {
                            return;
                        }
                    }
                    None
                }
            };
            tokio::select! {
                more = self.follower.changed() => if !more { return },
                () = self.leave.changed() => {}
                () = self.send.closed() => return,
                () = until_then(until.into_iter().chain(leave_ends).min()) => {}
            }
        }
    }

    async fn end(self, result: &'static str, status: Status) {
        METRICS.workload_api.inc([self.method, result]);
        let _ = self.send.send(Err(status)).await;
    }
}

/// Of what was sent last no more than this is kept: it may hold keys. The same set is the same bytes.
fn digest(message: &impl Message) -> [u8; 32] {
    Sha256::digest(Zeroizing::new(message.encode_to_vec())).into()
}

/// Waits until `at`; without one for ever.
pub async fn until_then(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_goes_out_soon_and_what_is_withdrawn_at_once() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        // Milliseconds, what is known of one that was sent something, and what is done.
        let mut patience = Patience { began: start, waits: true };
        for (ms, answer, step) in [
            (0, Answer::Set(1), Step::Send(1)),
            (5, Answer::Part(2), Step::Send(2)),
            (6, Answer::Coming, Step::Wait(Some(at(10_006)))),
            (9_000, Answer::Coming, Step::Wait(Some(at(10_006)))),
            (10_006, Answer::Coming, Step::End(Why::NotIssued)),
        ] {
            assert_eq!(patience.step(answer, true, at(ms)), step, "{ms}");
        }
        let mut patience = Patience { began: start, waits: true };
        for (ms, step) in [(0, Step::Wait(Some(at(1000)))), (999, Step::Wait(Some(at(1000)))), (1000, Step::Send(2))] {
            assert_eq!(patience.step(Answer::Part(2), false, at(ms)), step, "{ms}");
        }
        assert_eq!(patience.step(Answer::<u8>::Nobody, true, at(0)), Step::End(Why::Nobody));
    }
}
