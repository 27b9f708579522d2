//! What a run proves: the counts, and where one is not zero, the evidence in a folder that outlives the lab.

use super::clients::Seen;
use super::observe::Views;
use super::{Done, LeaderKill};
use crate::chaos::linear::{self, Op};
use crate::lab::{Lab, LabError, chain, make_folder, write_file};
use crate::net;
use crate::topology::Kind;
use ambit::ask;
use ambit::cell::Cell;
use ambit::context::Context;
use ambit::drill::ledger::{self, Write};
use ambit_model::{Refusal, refusal::Code};
use ambit_proto::v1;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long the cell may take to list what it issued.
const LIST_MAX: Duration = Duration::from_secs(20);
/// More records than this a cell does not list.
const ISSUED_MAX: usize = 10_000;

/// All that was found.
pub(super) struct Found {
    pub(super) done: Done,
    pub(super) seen: Seen,
    pub(super) views: Views,
    pub(super) ledger: Result<Vec<Write>, LabError>,
    pub(super) issued: Result<BTreeSet<String>, LabError>,
}

/// The counts.
#[derive(Default)]
pub(super) struct Verdict {
    kills: u32,
    acknowledged: u64,
    lost: u64,
    duplicated: u64,
    histories: usize,
    operations: usize,
    non_linearizable: usize,
    duplicate_serials: usize,
    /// What else must not be: two leaders of a term, two states of an index, answers that no fault explains.
    others: Vec<String>,
    failed: Option<LabError>,
}

impl Verdict {
    /// The last line.
    pub(super) fn line(&self) -> String {
        format!(
            "{} kills, {} acknowledged writes, {} lost, {} duplicated, {} histories ({} operations), \
             {} non-linearizable, {} duplicate serials",
            self.kills,
            self.acknowledged,
            self.lost,
            self.duplicated,
            self.histories,
            self.operations,
            self.non_linearizable,
            self.duplicate_serials
        )
    }
    /// An error unless everything holds and something was proven.
    pub(super) fn judge(mut self) -> Result<(), LabError> {
        if let Some(failed) = self.failed.take() {
            return Err(failed);
        }
        if let Some(first) = self.others.first() {
            return Err(Refusal::new(Code::Internal, "answers that a correct cell gives", first.clone()).into());
        }
        if self.holds() {
            return Ok(());
        }
        let expected = "acknowledged writes kept, each once, linearizable histories and serials that differ";
        Err(Refusal::new(Code::Internal, expected, self.line()).into())
    }
    fn holds(&self) -> bool {
        let broken = self.lost + self.duplicated;
        let proven = self.acknowledged > 0 && self.operations > 0;
        proven && broken == 0 && self.non_linearizable == 0 && self.duplicate_serials == 0
    }
}

/// Serial numbers of all certificates that the cell has records of.
pub(super) fn issued(lab: &Lab, site: &str) -> Result<BTreeSet<String>, LabError> {
    let context = lab.cell(site)?.context();
    let work = || -> Result<BTreeSet<String>, Refusal> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|e| Refusal::new(Code::Internal, "a runtime", e.to_string()))?;
        let cell = Cell::open(Context::read(&context)?, LIST_MAX)?;
        let request = v1::ListIssuedRequest { limit: 0 };
        let listed = runtime.block_on(async { ask!(cell, Svid.list_issued(request)) })?;
        Ok(listed.issued.into_iter().map(|i| i.serial).collect())
    };
    Ok(net::inside(&lab.operator().netns, work)??)
}

/// Judges, tells, and keeps the evidence of what is wrong.
pub(super) fn reach(lab: &Lab, say: &crate::demo::Say, seed: u64, found: Found) -> Result<Verdict, LabError> {
    let Found { done, seen, views, ledger, issued } = found;
    let mut failed = done.failed;
    // A cell that does not list its entries may still have answered wrongly before: the histories are judged.
    let ledger = ledger.unwrap_or_else(|e| {
        failed.get_or_insert(e);
        Vec::new()
    });
    let issued = issued.map_err(|e| {
        failed.get_or_insert(e);
    });
    let figures = ledger::figures(&ledger);
    let mut verdict = Verdict {
        kills: done.kills,
        acknowledged: figures.acked + seen.acknowledged,
        lost: figures.lost,
        duplicated: figures.duplicated,
        histories: seen.ops.len(),
        operations: seen.ops.values().map(Vec::len).sum(),
        failed,
        ..Verdict::default()
    };
    let evidence = Evidence { folder: std::env::temp_dir().join(format!("ambit-chaos-{seed}")) };
    say.step(&format!(
        "entries: {} created, {} acknowledged, {} of them sent more than once; {} there without an acknowledgement",
        figures.sent, figures.acked, figures.repeated, figures.unacked_present
    ));
    say.step(&format!(
        "registers: {} writes acknowledged, {} given up, {} sent again after their answer; {} lists answered",
        seen.acknowledged, seen.unanswered, seen.repeated, seen.lists
    ));
    for (register, ops) in &seen.ops {
        if let Some(path) = history(&evidence, *register, ops)? {
            verdict.non_linearizable += 1;
            say.step(&format!("register {register} is not linearizable: {}", path.display()));
        }
    }
    let distinct: BTreeSet<_> = seen.leaves.iter().collect();
    verdict.duplicate_serials = seen.leaves.len() - distinct.len();
    say.step(&format!("certificates: {} issued, each verified to the root", seen.leaves.len()));
    let known = issued.ok().filter(|issued| issued.len() < ISSUED_MAX);
    let unrecorded = known.map_or(0, |known| seen.leaves.iter().filter(|(_, serial)| !known.contains(serial)).count());
    if unrecorded > 0 {
        verdict.others.push(format!("{unrecorded} certificates of which the cell has no record"));
    }
    verdict.others.extend(views.findings);
    verdict.others.extend(seen.surprises);
    verdict.others.iter().for_each(|what| say.step(&format!("must not be: {what}")));
    tell_outages(say, &done.leader_kills, &ledger);
    if !verdict.holds() || verdict.failed.is_some() || !verdict.others.is_empty() {
        keep(lab, &evidence, &verdict, &ledger)?;
        say.step(&format!("evidence, and the replicas' logs: {}", evidence.folder.display()));
    }
    Ok(verdict)
}

/// From the moment when a leader was gone to the first acknowledgement of a write sent after it.
fn tell_outages(say: &crate::demo::Say, leader_kills: &[LeaderKill], ledger: &[Write]) {
    for (whole, cell) in [(true, "of a whole cell"), (false, "while another replica still caught up")] {
        let kills = leader_kills.iter().filter(|kill| kill.whole == whole);
        let mut outages: Vec<u64> = kills.filter_map(|kill| outage_ms(kill.at_ms, ledger)).collect();
        outages.sort_unstable();
        if let (Some(median), Some(most)) = (outages.get(outages.len() / 2), outages.last()) {
            say.step(&format!(
                "without acknowledged writes after a kill of the leader {cell} ({}): median {:.2} s, most {:.2} s",
                outages.len(),
                *median as f64 / 1000.0,
                *most as f64 / 1000.0
            ));
        }
    }
}

fn outage_ms(at_ms: u64, ledger: &[Write]) -> Option<u64> {
    let after = ledger.iter().filter(|w| w.sent_ms >= at_ms).filter_map(|w| w.acked_ms);
    after.min().map(|first| first.saturating_sub(at_ms))
}

/// Where a history is not linearizable, the file that shows it.
fn history(evidence: &Evidence, register: u64, ops: &[Op]) -> Result<Option<PathBuf>, LabError> {
    let (why, window) = match linear::check(ops) {
        linear::Verdict::Linearizable => return Ok(None),
        linear::Verdict::Not(window) => ("no order explains these operations, the fewest that show it", window),
        linear::Verdict::Undecided => ("too much was under way at once to judge; all operations", Vec::new()),
    };
    let mut text = format!("register {register}: {why}. Times in seconds.\n\n");
    window.iter().for_each(|op| text.push_str(&format!("{op}\n")));
    text.push_str("\nThe whole history:\n\n");
    let mut sorted = ops.to_vec();
    sorted.sort_unstable();
    sorted.iter().for_each(|op| text.push_str(&format!("{op}\n")));
    evidence.write(&format!("register-{register}.txt"), text.as_bytes()).map(Some)
}

fn keep(lab: &Lab, evidence: &Evidence, verdict: &Verdict, ledger: &[Write]) -> Result<(), LabError> {
    let mut text = verdict.line() + "\n";
    verdict.others.iter().for_each(|what| text.push_str(&format!("must not be: {what}\n")));
    if let Some(failed) = &verdict.failed {
        text.push_str(&format!("ended early: {}\n", chain(failed)));
    }
    let wrong = ledger.iter().filter(|w| w.ran_again || w.listed > 1 || (w.acked_ms.is_some() && w.listed == 0));
    wrong.for_each(|w| text.push_str(&format!("write {w}\n")));
    evidence.write("verdict.txt", text.as_bytes())?;
    for member in lab.spec().members().iter().filter(|m| matches!(m.kind, Kind::Replica(_))) {
        let log = lab.folder(&member.role()).join("ambitd.log");
        evidence.copy(&log, &format!("{}.log", member.role()))?;
    }
    Ok(())
}

/// A folder that is made when there is something to put into it.
struct Evidence {
    folder: PathBuf,
}

impl Evidence {
    fn write(&self, name: &str, bytes: &[u8]) -> Result<PathBuf, LabError> {
        make_folder(&self.folder)?;
        let path = self.folder.join(name);
        write_file(&path, bytes)?;
        Ok(path)
    }
    fn copy(&self, from: &Path, name: &str) -> Result<(), LabError> {
        let to = self.folder.join(name);
        std::fs::copy(from, &to).map(drop).map_err(|source| LabError::Io { path: from.into(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_ends_with_the_first_answer_to_a_write_sent_in_it() {
        let write = |text: &str| text.parse::<Write>().unwrap();
        let ledger = ["0 90 105 1 1", "1 110 500 2 1", "2 130 480 1 1", "3 490 495 1 1"].map(write);
        assert_eq!(outage_ms(100, &ledger), Some(380));
        assert_eq!(outage_ms(485, &ledger), Some(10));
        assert_eq!(outage_ms(600, &ledger), None);
    }

    #[test]
    fn a_history_that_no_order_explains_is_written_down_window_first() {
        use crate::chaos::linear::Did;
        let op = |client, call_us, did| Op { client, call_us, back_us: Some(call_us + 1), did };
        let write = |n: u64| op(1, n * 10, Did::Write(n));
        let mut ops: Vec<Op> = (1..=50).map(write).collect();
        let evidence = Evidence { folder: std::env::temp_dir().join(format!("ambit-verdict-{}", std::process::id())) };
        assert_eq!(history(&evidence, 3, &ops).unwrap(), None);
        assert!(!evidence.folder.exists(), "nothing is written where nothing is wrong");
        ops.push(op(2, 505, Did::Read(Some(20))));
        let path = history(&evidence, 3, &ops).unwrap().unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_dir_all(&evidence.folder).unwrap();
        let (window, whole) = text.split_once("The whole history:").unwrap();
        assert!(window.contains("client 2   read  20") && window.contains("client 1   wrote 20"), "{window}");
        assert!(window.lines().count() < 9 && whole.lines().count() > 50, "{text}");
    }

    #[test]
    fn any_count_but_zero_is_a_failure_and_so_is_nothing_proven() {
        let good = || Verdict { acknowledged: 5, operations: 9, ..Verdict::default() };
        assert!(good().judge().is_ok());
        assert!(Verdict::default().judge().is_err());
        for bad in [
            Verdict { lost: 1, ..good() },
            Verdict { duplicated: 1, ..good() },
            Verdict { non_linearizable: 1, ..good() },
            Verdict { duplicate_serials: 1, ..good() },
            Verdict { others: vec!["two leaders".into()], ..good() },
        ] {
            assert!(bad.judge().is_err());
        }
    }
}
