//! What waits to go up on the stream: at most one of each kind, the newer in place of the older, so that a slow cell
//! costs no memory and a long answer holds up nothing that comes down.

use crate::reattest::Answer;
use ambit_proto::v1::agent_message::Body as Up;
use ambit_proto::v1::{AgentMessage, FoundConnection, Nack};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Answers about connections that wait: they are of people who ask.
const FOUND_MAX: usize = 8;

/// What the stream itself looks up at the moment of sending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fresh {
    /// The endpoints that run here.
    Endpoints,
    /// What became of the newest view.
    Outcome,
    /// What is in force and shown here.
    Holding,
    /// Who called whom.
    Seen,
}

/// The next thing to send.
#[derive(Debug)]
pub enum Next {
    /// This message.
    Message(Up),
    /// The newest of this.
    Look(Fresh),
}

/// The box of one stream.
#[derive(Debug)]
pub struct Outbox {
    endpoints: bool,
    outcome: bool,
    holding: bool,
    seen: bool,
    nack: Option<Nack>,
    /// Answers about connections; who asked for more than fit here gets none.
    found: Vec<FoundConnection>,
    answer: Option<Answer>,
    /// Since when the far end takes nothing of it.
    since: Instant,
}

impl Default for Outbox {
    fn default() -> Self {
        Self {
            endpoints: false,
            outcome: false,
            holding: false,
            seen: false,
            nack: None,
            found: Vec::new(),
            answer: None,
            since: Instant::now(),
        }
    }
}

impl Outbox {
    /// Endpoints, the outcome or what is held changed.
    pub fn fresh(&mut self, what: Fresh) {
        self.begin();
        match what {
            Fresh::Endpoints => self.endpoints = true,
            Fresh::Outcome => self.outcome = true,
            Fresh::Holding => self.holding = true,
            Fresh::Seen => self.seen = true,
        }
    }

    /// A slice was refused.
    pub fn nack(&mut self, nack: Nack) {
        self.begin();
        self.nack = Some(nack);
    }

    /// What is remembered of a connection.
    pub fn found(&mut self, found: FoundConnection) {
        self.begin();
        if self.found.len() < FOUND_MAX {
            self.found.push(found);
        }
    }

    /// The answer to a round. There is one at a time: see [`Outbox::answers`].
    pub fn answer(&mut self, answer: Answer) {
        self.begin();
        self.answer = Some(answer);
    }

    /// Whether an answer waits or is on its way.
    pub fn answers(&self) -> bool {
        self.answer.is_some()
    }

    /// Whether there is anything to send.
    pub fn is_empty(&self) -> bool {
        let looks = self.endpoints || self.outcome || self.holding || self.seen;
        !looks && self.nack.is_none() && self.found.is_empty() && self.answer.is_none()
    }

    /// A place in `up`, or none where the far end takes nothing for `silence_max` or is gone.
    pub async fn place<'a>(
        &self,
        up: &'a mpsc::Sender<AgentMessage>,
        silence_max: Duration,
    ) -> Option<mpsc::Permit<'a, AgentMessage>> {
        let place = tokio::time::timeout_at(self.since + silence_max, up.reserve()).await;
        place.ok().and_then(Result::ok)
    }

    /// Takes what comes next. An answer that was begun is finished first: nothing may come between its parts.
    pub fn take(&mut self) -> Option<Next> {
        self.since = Instant::now();
        let begun = self.answer.as_ref().is_some_and(Answer::is_begun);
        if !begun && let Some(short) = self.take_short() {
            return Some(short);
        }
        let answer = self.answer.as_mut()?;
        let message = answer.next_message();
        if answer.is_sent() {
            self.answer = None;
        }
        message.map(Next::Message)
    }

    fn take_short(&mut self) -> Option<Next> {
        if let Some(nack) = self.nack.take() {
            return Some(Next::Message(Up::Nack(nack)));
        }
        if std::mem::take(&mut self.outcome) {
            return Some(Next::Look(Fresh::Outcome));
        }
        if std::mem::take(&mut self.holding) {
            return Some(Next::Look(Fresh::Holding));
        }
        if std::mem::take(&mut self.endpoints) {
            return Some(Next::Look(Fresh::Endpoints));
        }
        if let Some(found) = self.found.pop() {
            return Some(Next::Message(Up::Found(found)));
        }
        std::mem::take(&mut self.seen).then_some(Next::Look(Fresh::Seen))
    }

    fn begin(&mut self) {
        if self.is_empty() {
            self.since = Instant::now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(next: Option<Next>) -> String {
        match next {
            Some(Next::Message(Up::Quote(_))) => "quote".into(),
            Some(Next::Message(Up::LogChunk(c))) => format!("chunk {}", c.len()),
            Some(Next::Message(Up::Nack(n))) => format!("nack {}", n.revision),
            Some(Next::Look(what)) => format!("{what:?}"),
            other => format!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn nothing_comes_between_the_parts_of_an_answer_and_news_replace_older_news() {
        let mut outbox = Outbox::default();
        outbox.answer(Answer::for_tests(vec![1; 10], vec![2; crate::reattest::CHUNK_BYTES + 1]));
        outbox.fresh(Fresh::Endpoints);
        assert_eq!(shown(outbox.take()), "Endpoints", "before an answer that was not begun");
        assert_eq!(shown(outbox.take()), "quote");
        outbox.nack(Nack { revision: 3, ..Nack::default() });
        outbox.fresh(Fresh::Outcome);
        outbox.fresh(Fresh::Outcome);
        outbox.nack(Nack { revision: 4, ..Nack::default() });
        let rest: Vec<_> = (0..6).map(|_| shown(outbox.take())).collect();
        assert_eq!(rest, ["chunk 10", "chunk 65536", "chunk 1", "nack 4", "Outcome", "None"]);
        assert!(outbox.is_empty() && !outbox.answers());
        // Who asks for more connections than there is room for holds up nothing.
        (0..100).for_each(|ask| outbox.found(FoundConnection { ask, judged: vec![] }));
        outbox.nack(Nack { revision: 5, ..Nack::default() });
        assert_eq!(shown(outbox.take()), "nack 5");
        assert_eq!(std::iter::from_fn(|| outbox.take()).count(), FOUND_MAX);
    }

    #[tokio::test]
    async fn a_far_end_that_takes_nothing_is_given_up() {
        let (up, mut queue) = mpsc::channel(1);
        let max = Duration::from_millis(400);
        let mut outbox = Outbox::default();
        tokio::time::sleep(2 * max).await;
        outbox.fresh(Fresh::Endpoints);
        outbox.place(&up, max).await.expect("room").send(AgentMessage::default());
        outbox.take();
        outbox.fresh(Fresh::Endpoints);
        let begun = Instant::now();
        tokio::time::sleep(max * 3 / 4).await;
        // News do not put off the end.
        outbox.fresh(Fresh::Outcome);
        assert!(outbox.place(&up, max).await.is_none());
        assert!(begun.elapsed() < max * 3 / 2, "{:?}", begun.elapsed());
        queue.recv().await.unwrap();
        assert!(outbox.place(&up, max).await.is_some());
    }
}
