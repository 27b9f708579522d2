//! JWT-SVIDs for workloads: asked of the cell for one entry and audience, and kept until half of their life is over; longer
//! where the cell is away. What is kept is verified again each time it is handed out: a key that was revoked since, or an
//! entry that has another identity now, ends it. What a tainted key signed is asked for anew.
//!
//! Never: a token for an audience that was not asked for, or one that does not verify by the own bundle.

use crate::backoff::random;
use crate::clock::Clock;
use crate::metrics::METRICS;
use crate::svids::withdraws;
use ambit_identity::{JwtSvid, JwtTrust, verify_jwt};
use ambit_model::{Audience, Code, EntryId, Refusal, SpiffeId, Stamp};
use ambit_proto::status::from_status;
use ambit_proto::v1::NewJwtsvidRequest;
use ambit_proto::v1::svid_client::SvidClient;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{Semaphore, watch};
use tonic::transport::Channel;
use zeroize::Zeroizing;

/// Tokens kept. What was handed out longest ago goes first.
const KEPT_MAX: usize = 1000;
/// Asked for at once: a cell answers in milliseconds, and one that does not must not gather requests here.
const ASKING_MAX: usize = 32;
/// New ones for one entry: so many at once, and again that many in ten seconds. One workload that asks for ever new
/// audiences must not use up what the cell grants this node.
const PER_ENTRY_MAX: f64 = 50.0;
const PER_ENTRY_REFILL_MS: f64 = 10_000.0;
/// One Raft commit, or a few elections.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// The tokens of this node. Cloning shares.
#[derive(Clone)]
pub struct Tokens {
    channel: watch::Receiver<Option<Channel>>,
    clock: Arc<Clock>,
    kept: Arc<Mutex<Kept>>,
    asking: Arc<Semaphore>,
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokens").finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Kept {
    tokens: BTreeMap<(EntryId, [u8; 32]), Token>,
    budgets: BTreeMap<EntryId, Budget>,
    uses: u64,
}

#[derive(Clone)]
struct Token {
    text: Arc<Zeroizing<String>>,
    kid: String,
    since: Stamp,
    not_after: Stamp,
    used: u64,
}

/// What is left to ask for, as of a time.
struct Budget {
    left: f64,
    at: Stamp,
}

impl Tokens {
    /// Tokens that come by `channel`.
    pub fn new(channel: watch::Receiver<Option<Channel>>, clock: Arc<Clock>) -> Self {
        Self { channel, clock, kept: Arc::default(), asking: Arc::new(Semaphore::new(ASKING_MAX)) }
    }

    /// The time by which tokens are judged.
    pub fn now(&self) -> Stamp {
        self.clock.now()
    }

    /// A token of `entry`, whose identity is `id`, for `audience`; `trust` holds the own bundle, of which the keys `tainted`
    /// are soon revoked.
    pub async fn token(
        &self,
        entry: &EntryId,
        id: &SpiffeId,
        audience: &Audience,
        trust: &JwtTrust,
        tainted: &BTreeSet<String>,
    ) -> Result<Arc<Zeroizing<String>>, Refusal> {
        let key = (entry.clone(), audience.sha256());
        let now = self.clock.now();
        let kept = self.lock().find(&key).filter(|token| checked(&token.text, id, audience, trust, now).is_ok());
        if let Some(fresh) = kept.as_ref().filter(|token| now < token.half() && !tainted.contains(&token.kid)) {
            return Ok(fresh.text.clone());
        }
        match self.ask(entry, id, audience, trust).await {
            Ok(token) => {
                METRICS.svids.inc(["jwt_ok"]);
                let text = token.text.clone();
                self.lock().keep(key, token);
                Ok(text)
            }
            Err(refusal) if withdraws(&refusal) => {
                METRICS.svids.inc(["jwt_denied"]);
                self.lock().tokens.remove(&key);
                Err(refusal)
            }
            // The cell is away: what is kept is good until it ends.
            Err(refusal) => {
                METRICS.svids.inc(["jwt_unavailable"]);
                kept.map(|token| token.text).ok_or(refusal)
            }
        }
    }

    async fn ask(
        &self,
        entry: &EntryId,
        id: &SpiffeId,
        audience: &Audience,
        trust: &JwtTrust,
    ) -> Result<Token, Refusal> {
        let busy = || Refusal::new(Code::Busy, "a JWT-SVID", "too many asked for");
        if !self.lock().may_ask(entry, self.clock.now()) {
            return Err(busy());
        }
        let _turn = self.asking.try_acquire().map_err(|_| busy())?;
        let channel = self.channel.borrow().clone();
        let channel = channel.ok_or_else(|| Refusal::new(Code::Unavailable, "a stream to the cell", "none"))?;
        let request_id = [random().to_le_bytes(), random().to_le_bytes()].concat();
        let audience_asked = audience.recipients().to_vec();
        let request = NewJwtsvidRequest { request_id, entry_id: entry.to_string(), audience: audience_asked };
        let mut client = SvidClient::new(channel);
        let answer = tokio::time::timeout(ANSWER_MAX, client.new_jwtsvid(request)).await;
        let late = |_| Refusal::new(Code::Unavailable, "an answer", format!("none in {ANSWER_MAX:?}"));
        let text = Arc::new(Zeroizing::new(answer.map_err(late)?.map_err(|s| from_status(&s))?.into_inner().token));
        let now = self.clock.now();
        let token = checked(&text, id, audience, trust, now)
            .map_err(|refusal| Refusal::new(Code::Internal, "the token that was asked for", refusal.to_string()))?;
        Ok(Token { text, kid: token.kid().to_owned(), since: now, not_after: token.not_after(), used: 0 })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A token that says `id` to exactly this audience, by `trust`.
fn checked(text: &str, id: &SpiffeId, audience: &Audience, trust: &JwtTrust, now: Stamp) -> Result<JwtSvid, Refusal> {
    let first = audience.recipients().first().map(String::as_str).unwrap_or_default();
    let token = verify_jwt(text, first, trust, now)?;
    if token.id() != id {
        return Err(Refusal::new(Code::JwtUntrusted, id.as_str(), token.id().as_str()));
    }
    if token.audience() != audience.recipients() {
        return Err(Refusal::new(Code::JwtAudience, audience.recipients().join(", "), token.audience().join(", ")));
    }
    Ok(token)
}

impl Token {
    fn half(&self) -> Stamp {
        self.since.plus_ms(self.not_after.0.saturating_sub(self.since.0) / 2)
    }
}

impl Kept {
    fn find(&mut self, key: &(EntryId, [u8; 32])) -> Option<Token> {
        self.uses += 1;
        let token = self.tokens.get_mut(key)?;
        token.used = self.uses;
        Some(token.clone())
    }

    fn keep(&mut self, key: (EntryId, [u8; 32]), token: Token) {
        self.uses += 1;
        self.tokens.insert(key, Token { used: self.uses, ..token });
        while self.tokens.len() > KEPT_MAX {
            let oldest = self.tokens.iter().min_by_key(|(_, token)| token.used).map(|(key, _)| key.clone());
            let Some(oldest) = oldest else { return };
            self.tokens.remove(&oldest);
        }
    }

    /// Takes one from the entry's budget.
    fn may_ask(&mut self, entry: &EntryId, now: Stamp) -> bool {
        let full = |budget: &Budget| {
            let more = now.0.saturating_sub(budget.at.0) as f64 * PER_ENTRY_MAX / PER_ENTRY_REFILL_MS;
            (budget.left + more).min(PER_ENTRY_MAX)
        };
        // One that is full again says nothing.
        self.budgets.retain(|_, budget| full(budget) < PER_ENTRY_MAX);
        let left = self.budgets.get(entry).map_or(PER_ENTRY_MAX, full);
        if left < 1.0 {
            return false;
        }
        self.budgets.insert(entry.clone(), Budget { left: left - 1.0, at: now });
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_entry_gets_its_budget_and_no_more_until_time_passes() {
        let (mut kept, web, db) = (Kept::default(), "web".parse().unwrap(), "db".parse().unwrap());
        let asked = |kept: &mut Kept, entry: &EntryId, ms| (0..100).filter(|_| kept.may_ask(entry, Stamp(ms))).count();
        assert_eq!((asked(&mut kept, &web, 0), asked(&mut kept, &web, 0)), (50, 0));
        assert_eq!(asked(&mut kept, &db, 0), 50, "another's");
        assert_eq!((asked(&mut kept, &web, 1000), asked(&mut kept, &web, 1000)), (5, 0));
        assert_eq!(asked(&mut kept, &web, 60_000), 50);
        kept.may_ask(&db, Stamp(200_000));
        assert_eq!(kept.budgets.len(), 1, "those that are full again are forgotten");
    }

    #[test]
    fn what_was_handed_out_longest_ago_goes_first() {
        let mut kept = Kept::default();
        let key = |n: usize| (format!("e{n}").parse::<EntryId>().unwrap(), [0; 32]);
        let token =
            || Token { text: Arc::default(), kid: String::new(), since: Stamp(0), not_after: Stamp(100), used: 0 };
        for n in 0..KEPT_MAX {
            kept.keep(key(n), token());
        }
        assert!(kept.find(&key(0)).is_some());
        kept.keep(key(KEPT_MAX), token());
        assert_eq!(
            (kept.tokens.len(), kept.find(&key(1)).is_some(), kept.find(&key(0)).is_some()),
            (KEPT_MAX, false, true)
        );
        assert_eq!(token().half(), Stamp(50));
    }
}
