//! What a cell tells its peers is told by more than half of its voters: the replica that answers a pull asks the others to sign
//! what it is about to say. Each signs only what its own applied state says.
//!
//! Never: a write to the log, or a signature on what another replica knows and this one does not.

use super::Replica;
use super::pull::{Answer, Page};
use ambit_identity::CoSignature;
use ambit_model::record::Claim;
use ambit_model::{Code, Refusal, ReplicaId};
use ambit_proto::status::from_status;
use ambit_proto::v1;
use ambit_proto::v1::co_signer_client::CoSignerClient;
use ambit_state::State;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use std::collections::{BTreeMap, VecDeque};
use std::sync::PoisonError;
use std::time::Duration;

/// Pulls under way whose floors are remembered: a thousand peers pull once a second, and one takes two.
const FLOORS_MAX: usize = 8_192;
/// A replica that does not say within this what it signs is away: the puller waits 4 s in all, one of them for news.
const ANSWER_MAX: Duration = Duration::from_secs(1);
/// Times that a page is read anew because a voter knew more.
const ROUNDS: usize = 3;
/// How long the replica that answers may be behind a voter.
const CATCH_UP: Duration = Duration::from_millis(500);

/// How far this replica knew the cell's records to go when it first heard of each pull. A pull's nonce is older than whoever
/// speaks of it: what goes as far as this says all that there was when the pull was sent (I12).
#[derive(Debug, Default)]
pub struct Floors {
    by_nonce: BTreeMap<[u8; 16], u64>,
    oldest: VecDeque<[u8; 16]>,
}

impl Floors {
    /// The floor of a pull: `now` where it is new here.
    fn of(&mut self, nonce: [u8; 16], now: u64) -> u64 {
        if let Some(known) = self.by_nonce.get(&nonce) {
            return *known;
        }
        if self.oldest.len() >= FLOORS_MAX
            && let Some(gone) = self.oldest.pop_front()
        {
            self.by_nonce.remove(&gone);
        }
        self.by_nonce.insert(nonce, now);
        self.oldest.push_back(nonce);
        now
    }
}

/// What a voter says to a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is so.
    Sign,
    /// There was more when the pull arrived: a claim to be the end has to go as far as this.
    GoOn(u64),
}

/// Whether a voter signs a claim: what its own state, read after a quorum confirmed it as of now, says of the same origin,
/// epoch, sequence and hash, with a stamp that has been. A state that a quorum did not confirm may be old, and with it all
/// that it knows of no more records.
///
/// # Errors
/// [`Code::Unavailable`] where this replica has not applied so far; [`Code::RecordSignature`] where it applied something
/// else.
pub fn judge(state: &State, floors: &mut Floors, claim: &Claim) -> Result<Verdict, Refusal> {
    #[cfg(ambit_mutant)]
    if ambit_state::mutant::is("cosign-unchecked") {
        return Ok(Verdict::Sign);
    }
    let cell = state.cell().ok_or_else(|| Refusal::new(Code::Unavailable, "a founded cell", "an empty one"))?;
    let head = &claim.head;
    let wrong = |expected: String, found: String| Err(Refusal::new(Code::RecordSignature, expected, found));
    if (&head.origin, head.epoch) != (&cell.trust_domain, cell.epoch) {
        let expected = format!("{} in epoch {}", cell.trust_domain, cell.epoch);
        return wrong(expected, format!("{} in epoch {}", head.origin, head.epoch));
    }
    if head.seq > cell.export_seq || head.stamp > state.stamp() {
        let expected = format!("records up to {} at {} (ms)", cell.export_seq, state.stamp().0);
        return Err(Refusal::new(Code::Unavailable, expected, format!("{} at {}", head.seq, head.stamp.0)));
    }
    let own = match head.seq {
        0 => Some([0; 32]),
        seq if seq == cell.export_seq => Some(cell.export_hash),
        seq => state.records_after(seq - 1).next().filter(|record| record.seq == seq).map(|record| record.hash()),
    };
    if own != Some(head.hash) {
        return wrong(format!("sequence {} as applied here", head.seq), "another hash".to_owned());
    }
    let floor = if claim.is_the_end { floors.of(head.nonce, cell.export_seq) } else { head.seq };
    #[cfg(ambit_mutant)]
    let floor = if ambit_state::mutant::is("cosign-without-floor") { head.seq } else { floor };
    Ok(if head.seq >= floor { Verdict::Sign } else { Verdict::GoOn(floor) })
}

impl Replica {
    /// A voter's part: its signature on the claim of another replica of the cell.
    pub async fn cosign(&self, claim: &Claim) -> Result<v1::CoSignResponse, Refusal> {
        self.cell().read_barrier().await?;
        let judged = self.local(|s| {
            let mut floors = self.inner.floors.lock().unwrap_or_else(PoisonError::into_inner);
            judge(s, &mut floors, claim)
        })?;
        Ok(match judged {
            Verdict::Sign => v1::CoSignResponse { signature: self.record().sign_claim(claim), floor: 0 },
            Verdict::GoOn(floor) => v1::CoSignResponse { signature: Vec::new(), floor },
        })
    }

    /// The answer to a pull under the signatures of a majority: `read` makes the page, again where voters knew more.
    pub(crate) async fn cosigned(&self, read: impl Fn() -> Result<Page, Refusal>) -> Result<Answer, Refusal> {
        let mut page = read()?;
        for _ in 0..ROUNDS {
            let (signatures, floor) = self.gather(&page).await;
            let (signed, wanted) = page.count(&signatures);
            if signed >= wanted || floor == 0 {
                return page.into_answer(self.record(), signatures);
            }
            self.catch_up(floor).await;
            page = read()?;
        }
        Err(Refusal::new(Code::Unavailable, "voters that agree where the records end", "each time another end"))
    }

    /// Signatures of this replica and of others, up to a majority; and the highest floor of those that knew more.
    async fn gather(&self, page: &Page) -> (Vec<CoSignature>, u64) {
        let mut signatures: Vec<CoSignature> = page.own(self.record()).into_iter().collect();
        let claim = postcard::to_stdvec(page.claim()).unwrap_or_default();
        let others: Vec<(u64, [u8; 32])> = self.local(|s| s.members().map(|(id, m)| (id, m.record_key)).collect());
        let others = others.into_iter().filter(|(id, key)| *id != self.id() && page.voters().contains(key));
        let mut asked: FuturesUnordered<_> = others
            .map(|(id, key)| {
                let claim = claim.clone();
                async move { (id, key, self.ask(id, claim).await) }
            })
            .collect();
        let mut floor = 0;
        while page.count(&signatures).0 < page.count(&signatures).1 {
            let Some((id, key, said)) = asked.next().await else { break };
            match said {
                Ok(v1::CoSignResponse { floor: 0, signature }) => {
                    // One that does not hold is as good as none, and must not take the place of one that does.
                    let named = page.named(&key, signature);
                    let more: Vec<CoSignature> = signatures.iter().cloned().chain(named).collect();
                    if page.count(&more).0 > page.count(&signatures).0 {
                        signatures = more;
                    } else {
                        tracing::warn!(replica = id, "signed something else");
                    }
                }
                Ok(v1::CoSignResponse { floor: more, .. }) => floor = floor.max(more),
                Err(refusal) => tracing::debug!(replica = id, %refusal, "did not sign a head"),
            }
        }
        (signatures, floor)
    }

    async fn ask(&self, id: u64, claim: Vec<u8>) -> Result<v1::CoSignResponse, Refusal> {
        let asked = async {
            let channel = self.cell().channel_to(ReplicaId(id)).await?;
            let answer = CoSignerClient::new(channel).co_sign(v1::CoSignRequest { claim }).await;
            answer.map(tonic::Response::into_inner).map_err(|status| from_status(&status))
        };
        let silence = |_| Refusal::new(Code::Unavailable, "a signature", format!("replica {id} is silent"));
        tokio::time::timeout(ANSWER_MAX, asked).await.map_err(silence)?
    }

    async fn catch_up(&self, floor: u64) {
        let mut applied = self.cell().watch_applied();
        let there = async {
            while !self.local(|s| super::pull::has_news(s, floor.saturating_sub(1))) {
                if applied.changed().await.is_err() {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(CATCH_UP, there).await;
    }
}

#[cfg(test)]
#[path = "cosign_tests.rs"]
mod tests;
