//! Questions to agents, on the streams that end at this replica, that wait for answers: how a connection was judged.

use ambit_model::NodeId;
use ambit_proto::v1;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::mpsc;

/// Rows of one answer; an agent sends at most eight.
const ROWS_MAX: usize = 8;
/// Bytes of any word in it: SPIFFE IDs have 2,048 at most.
const WORD_BYTES_MAX: usize = 4_096;

/// An agent's answer.
pub type Answer = (NodeId, Vec<v1::JudgedConnection>);

#[derive(Debug)]
struct Waiting {
    /// Who has yet to answer: once, and nobody else.
    asked: BTreeSet<NodeId>,
    answers: mpsc::Sender<Answer>,
}

/// All of them. Cloning shares.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    waiting: Arc<Mutex<BTreeMap<u64, Waiting>>>,
    next: Arc<AtomicU64>,
}

/// One question, as long as anybody waits for its answers.
#[derive(Debug)]
pub struct Finding {
    all: Findings,
    /// Its number.
    pub ask: u64,
    /// The answers; closed once all have answered.
    pub answers: mpsc::Receiver<Answer>,
}

impl Drop for Finding {
    fn drop(&mut self) {
        self.all.lock().remove(&self.ask);
    }
}

impl Findings {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A question to these nodes.
    pub fn begin(&self, asked: BTreeSet<NodeId>) -> Finding {
        let ask = self.next.fetch_add(1, Ordering::Relaxed);
        let (answer, answers) = mpsc::channel(asked.len().max(1));
        if !asked.is_empty() {
            self.lock().insert(ask, Waiting { asked, answers: answer });
        }
        Finding { all: self.clone(), ask, answers }
    }

    /// A node answers. What nobody asked it, and what is no answer, is dropped.
    pub fn answered(&self, node: NodeId, found: v1::FoundConnection) {
        let mut all = self.lock();
        let Some(waiting) = all.get_mut(&found.ask) else { return };
        if !waiting.asked.remove(&node) {
            return;
        }
        let rows = found.judged.into_iter().filter(is_clean).take(ROWS_MAX).collect();
        // There is room for each that was asked.
        let _ = waiting.answers.try_send((node, rows));
        if waiting.asked.is_empty() {
            all.remove(&found.ask);
        }
    }
}

/// Words that can be shown as they are.
fn is_clean(row: &v1::JudgedConnection) -> bool {
    let words = [&row.place, &row.source, &row.destination, &row.address, &row.rule, &row.reason, &row.flags];
    words.iter().all(|word| word.len() <= WORD_BYTES_MAX && !word.chars().any(char::is_control))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_was_asked_answers_once_and_nobody_else_does() {
        let (findings, node) = (Findings::default(), |n| NodeId([n; 32]));
        let mut finding = findings.begin([node(1), node(2)].into());
        let rows = |place: &str| vec![v1::JudgedConnection { place: place.into(), ..Default::default() }];
        let found = |ask, judged| v1::FoundConnection { ask, judged };
        findings.answered(node(3), found(finding.ask, rows("kernel")));
        findings.answered(node(1), found(finding.ask + 1, rows("kernel")));
        assert!(finding.answers.try_recv().is_err());
        let mut many = [rows("\u{1b}[2J"), rows(&"x".repeat(5_000))].concat();
        many.extend((0..20).flat_map(|_| rows("called")));
        findings.answered(node(1), found(finding.ask, many));
        findings.answered(node(1), found(finding.ask, rows("kernel")));
        let (from, told) = finding.answers.try_recv().unwrap();
        assert_eq!((from, told.len()), (node(1), ROWS_MAX));
        assert!(told.iter().all(|row| row.place == "called"));
        findings.answered(node(2), found(finding.ask, vec![]));
        assert_eq!(finding.answers.try_recv().unwrap(), (node(2), vec![]));
        assert_eq!(finding.answers.try_recv(), Err(mpsc::error::TryRecvError::Disconnected), "nobody is left");
        // Who waits no longer leaves nothing behind.
        drop((findings.begin([node(1)].into()), finding, findings.begin([].into())));
        assert!(findings.lock().is_empty());
    }
}
