//! What the replicas say of themselves, and what they must never say: two leaders of one term, two states at one index
//! (I2).

use ambit_proto::v1;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// An answer older than this says nothing of now.
const FRESH: Duration = Duration::from_millis(1_500);
/// A replica that is further behind its leader still catches up, and must not be the majority's last hope.
const LAG_MAX: u64 = 200;
/// Digests remembered: minutes of them.
const DIGESTS_MAX: usize = 50_000;
/// Findings told; the first of them matter.
const FINDINGS_MAX: usize = 20;

/// The last answer of each replica, by the order of their addresses.
#[derive(Default)]
pub(super) struct Views {
    last: BTreeMap<usize, (Instant, v1::StatusResponse)>,
    leaders: BTreeMap<u64, u64>,
    digests: BTreeMap<u64, Vec<u8>>,
    /// What must never be, and was.
    pub(super) findings: Vec<String>,
}

impl Views {
    /// Takes in an answer of the replica at the address `at`.
    pub(super) fn take(&mut self, at: usize, asked: Instant, view: v1::StatusResponse) {
        if view.leader == view.replica && view.leader != 0 {
            let leader = *self.leaders.entry(view.term).or_insert(view.leader);
            if leader != view.leader {
                self.found(format!("term {} has two leaders: replicas {leader} and {}", view.term, view.leader));
            }
        }
        if let Some(known) = self.digests.insert(view.applied_index, view.digest.clone())
            && known != view.digest
        {
            let (index, known, digest) = (view.applied_index, hex::encode(known), hex::encode(&view.digest));
            self.found(format!("two states at index {index}: {known} and {digest} (replica {})", view.replica));
        }
        while self.digests.len() > DIGESTS_MAX {
            self.digests.pop_first();
        }
        self.last.insert(at, (asked, view));
    }
    /// Nothing that the replica at this address said counts any more: it was killed.
    pub(super) fn forget(&mut self, at: usize) {
        self.last.remove(&at);
    }
    /// The leader's place among the addresses, and its number: of those who say so, the one of the latest term.
    pub(super) fn leader(&self) -> Option<(usize, u64)> {
        let leads = self.fresh().filter(|(_, view)| view.leader == view.replica && view.leader != 0);
        leads.max_by_key(|(_, view)| view.term).map(|(at, view)| (at, view.replica))
    }
    /// The number of the replica at this address, as it last said.
    pub(super) fn number(&self, at: usize) -> Option<u64> {
        self.last.get(&at).map(|(_, view)| view.replica)
    }
    /// Whether all of `replicas` follow one leader closely and vote, asked after `since`.
    pub(super) fn whole(&self, replicas: usize, since: Instant) -> Result<(), String> {
        let now: Vec<_> = self.last.values().filter(|(asked, _)| *asked > since).map(|(_, view)| view).collect();
        let leader = self.leader().map(|(_, number)| number).unwrap_or_default();
        let commit = now.iter().map(|view| view.commit_index).max().unwrap_or_default();
        let state = |view: &&v1::StatusResponse| {
            let voters = view.members.iter().filter(|m| m.voter).count();
            let (replica, leader, applied) = (view.replica, view.leader, view.applied_index);
            format!("replica {replica}: leader {leader}, {voters} voters, applied {applied} of {commit}")
        };
        let good = |view: &&v1::StatusResponse| {
            view.leader == leader
                && view.applied_index + LAG_MAX >= commit
                && view.members.iter().filter(|m| m.voter).count() == replicas
                && view.members.len() == replicas
        };
        if leader != 0 && now.len() == replicas && now.iter().all(good) {
            return Ok(());
        }
        let told: Vec<String> = now.iter().map(state).collect();
        Err(format!("{} of {replicas} answer: {}", now.len(), told.join("; ")))
    }

    fn fresh(&self) -> impl Iterator<Item = (usize, &v1::StatusResponse)> {
        let fresh = self.last.iter().filter(|(_, (asked, _))| asked.elapsed() < FRESH);
        fresh.map(|(at, (_, view))| (*at, view))
    }
    fn found(&mut self, what: String) {
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(what);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(replica: u64, leader: u64, term: u64, applied: u64, digest: u8) -> v1::StatusResponse {
        let members = (1..=3).map(|id| v1::Member { id, voter: true, ..Default::default() }).collect();
        let (commit_index, digest) = (applied, vec![digest]);
        v1::StatusResponse {
            replica,
            leader,
            term,
            applied_index: applied,
            commit_index,
            digest,
            members,
            ..Default::default()
        }
    }

    #[test]
    fn two_leaders_and_two_states_are_found_and_a_change_of_leader_is_not() {
        let (mut views, now) = (Views::default(), Instant::now());
        views.take(0, now, view(1, 1, 4, 10, 7));
        views.take(1, now, view(2, 1, 4, 10, 7));
        views.take(1, now, view(2, 2, 5, 11, 8));
        assert_eq!((views.findings.len(), views.leader()), (0, Some((1, 2))));
        views.take(2, now, view(3, 3, 5, 11, 9));
        assert_eq!(views.findings.len(), 2, "{:?}", views.findings);
    }

    #[test]
    fn a_cell_is_whole_when_all_follow_one_leader() {
        let (mut views, before) = (Views::default(), Instant::now());
        let now = before + Duration::from_millis(1);
        views.take(0, now, view(1, 1, 4, 1_000, 7));
        views.take(1, now, view(2, 1, 4, 900, 6));
        assert!(views.whole(3, before).is_err(), "one is missing");
        views.take(2, now, view(3, 1, 4, 500, 5));
        assert!(views.whole(3, before).is_err(), "one is far behind");
        views.take(2, now, view(3, 1, 4, 800, 4));
        assert_eq!(views.whole(3, before), Ok(()));
        views.take(2, now, view(3, 0, 5, 900, 6));
        assert!(views.whole(3, before).is_err(), "one has no leader");
    }
}
