//! What goes down on one agent's stream: deltas over what was sent before, or, to agents of former releases, whole slices.
//! Decides only; the stream's service sends.

use super::{Cut, Remembered};
use ambit_model::{Code, Refusal};
use ambit_proto::resources::Set;
use ambit_proto::v1;
use ambit_proto::v1::server_message::Body;
use std::ops::RangeInclusive;

/// How often one stream is sent everything because its agent lost what it held: beyond that something is wrong with it that
/// sending again does not mend.
const LOST_MAX: u32 = 3;

/// What one stream was sent, and at which revisions that same content still held.
#[derive(Default)]
pub struct Feed {
    deltas: bool,
    /// What the agent holds once it read what was sent; none: it is sent everything.
    sent: Option<Set>,
    /// The digest that it came with, while nobody here remembered what that is of.
    have: Vec<u8>,
    /// The revision that is acknowledged once it is in the kernel; none before anything was sent.
    revision: Option<u64>,
    /// The highest revision at which what was sent last is still what the node needs.
    holds: u64,
    acked: u64,
    /// The newest revision sent that brought the agent anything.
    brought: u64,
    /// Up to here an acknowledgement is no news: the agent had it before, or nothing in it was for this node. None before an
    /// agent that came with nothing was sent anything.
    covered: Option<u64>,
    /// Whom to refuse went ahead, and the rest of that revision is to follow, also where it did not change.
    ahead: bool,
    lost: u32,
    /// The newest revision of which the agent was told anything, here or elsewhere: nothing older is told.
    floor: u64,
}

impl Feed {
    /// For an agent that subscribed so.
    pub fn new(subscribe: &v1::Subscribe, remembered: &Remembered) -> Feed {
        if !subscribe.deltas {
            return Feed::default();
        }
        // Something follows, if only the word that nothing changed: the agent may have been told whom to refuse, and not the rest.
        let sent = remembered.find(&subscribe.have_digest);
        let (have, floor) = (subscribe.have_digest.clone(), subscribe.have_revision);
        let covered = (!have.is_empty()).then_some(floor.max(subscribe.holds_revision));
        Feed { deltas: true, sent, have, ahead: true, floor, covered, ..Feed::default() }
    }

    /// The revision up to which the agent was told all.
    pub fn holds(&self) -> u64 {
        self.holds
    }

    /// The revision that counts as applied: what the agent has in its kernel counts for every revision at which its slice
    /// stayed the same.
    pub fn applied(&self) -> u64 {
        if self.revision.is_some_and(|sent| self.acked >= sent) { self.holds } else { self.acked }
    }

    /// This revision is in the agent's kernel. Returns the revisions that it is the news of, if any: see
    /// [`Propagation`](crate::replica::propagation).
    pub fn acknowledged(&mut self, revision: u64) -> Option<RangeInclusive<u64>> {
        self.acked = self.acked.max(revision);
        let news = self.covered?.saturating_add(1)..=self.acked.min(self.brought);
        self.cover(self.applied().min(self.holds));
        (!news.is_empty()).then_some(news)
    }

    fn cover(&mut self, revision: u64) {
        self.covered = self.covered.max(Some(revision));
    }

    /// The agent holds nothing any more.
    ///
    /// # Errors
    /// [`Code::Unavailable`] where that happens again and again.
    pub fn lost(&mut self) -> Result<(), Refusal> {
        self.lost += 1;
        if self.lost > LOST_MAX {
            let found = format!("what was sent lost {} times", self.lost);
            return Err(Refusal::new(Code::Unavailable, "an agent that keeps what it is sent", found));
        }
        (self.sent, self.have, self.holds) = (None, Vec::new(), 0);
        Ok(())
    }

    /// What brings the agent to `cut`.
    ///
    /// # Errors
    /// As [`Cut::whole`].
    pub fn all(&mut self, cut: &Cut) -> Result<Vec<Body>, Refusal> {
        if cut.revision < self.floor {
            return Ok(Vec::new());
        }
        (self.holds, self.floor) = (cut.revision, cut.revision);
        if self.sent.is_none() && self.have == cut.set.digest() {
            self.sent = Some(cut.set.clone());
        }
        let same = self.sent.as_ref().is_some_and(|sent| sent.digest() == cut.set.digest());
        // A start is no news, nor is what changes nothing once all that was sent is acknowledged.
        if self.covered.is_none() || (same && self.acked >= self.brought) {
            self.cover(cut.revision);
        }
        if !same {
            self.brought = cut.revision;
        }
        if same && !self.ahead {
            return Ok(Vec::new());
        }
        let bodies = if self.deltas {
            let parts = cut.set.delta(self.sent.as_ref(), cut.revision, cut.stamp_ms);
            parts.into_iter().map(Body::Delta).collect()
        } else {
            vec![Body::Slice(cut.whole()?)]
        };
        (self.sent, self.revision, self.ahead) = (Some(cut.set.clone()), Some(cut.revision), false);
        Ok(bodies)
    }

    /// Whom to refuse, ahead of all else: nothing where that did not change, or where nothing was sent yet.
    ///
    /// # Errors
    /// As [`Cut::whole`].
    pub fn denials(&mut self, cut: &Cut) -> Result<Vec<Body>, Refusal> {
        let Some(sent) = self.sent.as_ref().filter(|sent| cut.revision >= self.floor && !sent.refuses_as(&cut.set))
        else {
            return Ok(Vec::new());
        };
        let next = sent.with_denials_of(&cut.set);
        let bodies = if self.deltas {
            let parts = next.delta(Some(sent), cut.revision, cut.stamp_ms);
            parts.into_iter().map(|part| Body::Delta(v1::Delta { denials_only: true, ..part })).collect()
        } else {
            vec![Body::Denials(cut.denials()?)]
        };
        (self.sent, self.ahead, self.floor) = (Some(next), true, cut.revision);
        Ok(bodies)
    }

    /// What the agent holds once it read what was sent.
    pub fn sent(&self) -> Option<&Set> {
        self.sent.as_ref()
    }
}
