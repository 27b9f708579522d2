//! Answers to the cell's rounds of re-attestation: a quote in time, then the logs it covers (design.md section 3).
//!
//! What cannot be quoted in time is said so: the cell then knows a node that is late from one that lies. One round is
//! answered at a time, and a TPM that does not come back is asked nothing more until it does.

use crate::enrol::Enrolled;
use crate::kernel::chain as causes;
use crate::logs;
use crate::metrics::METRICS;
use ambit_model::{ClusterId, Refusal};
use ambit_proto::v1::agent_message::Body as Up;
use ambit_proto::v1::{PcrValue, QuoteAnswer, QuoteRequest};
use ambit_tpm::{Attester, Bank, Quote, TpmError};
use ambit_verify::transcript::round_data;
use ambit_verify::{BOOT_LOG_BYTES_MAX, IMA_LOG_BYTES_MAX, PCR_MASK_ALL};
use bytes::Bytes;
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Logs travel in pieces of this size.
pub const CHUNK_BYTES: usize = 64 * 1024;
/// Real TPMs sign in 0.2-0.6 s and may be busy with another's command: less would make honest nodes late.
const WITHIN_MIN: Duration = Duration::from_secs(1);
/// Longer than any interval between rounds: whoever allows more has forgotten the round.
const WITHIN_MAX: Duration = Duration::from_secs(60);
/// What is told to the cell of a trouble.
const TROUBLE_CHARS_MAX: usize = 256;

/// A request, and when it came.
#[derive(Clone, Debug)]
pub struct Asked {
    /// As it came.
    pub request: QuoteRequest,
    /// By our clock: the time allowed runs from here, also while an earlier round is answered.
    pub at: Instant,
}

impl Asked {
    /// When to give up: a tenth before the time is over, so that the cell still hears why.
    fn until(&self) -> tokio::time::Instant {
        let within = Duration::from_millis(self.request.answer_within_ms).clamp(WITHIN_MIN, WITHIN_MAX);
        tokio::time::Instant::from_std(self.at + within - within / 10)
    }
}

/// Why a round has no quote.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error("the request asks for what no TPM quotes: {0}")]
    Request(&'static str),
    #[error("the TPM gave no quote in the time allowed")]
    Time,
    #[error("{}", causes(.0))]
    Tpm(#[from] TpmError),
    #[error("{0}")]
    Log(#[from] Refusal),
    #[error("the quoting task ended: {0}")]
    Task(#[from] tokio::task::JoinError),
}

impl Trouble {
    /// For figures.
    fn label(&self) -> &'static str {
        match self {
            Self::Request(_) => "bad_request",
            Self::Time => "timeout",
            Self::Tpm(_) => "tpm",
            Self::Log(_) => "log",
            Self::Task(_) => "internal",
        }
    }
}

/// An answer, message by message.
#[derive(Debug)]
pub struct Answer {
    header: Option<QuoteAnswer>,
    logs: VecDeque<Bytes>,
}

impl Answer {
    fn new(mut header: QuoteAnswer, boot_log: Vec<u8>, ima_log: Vec<u8>) -> Self {
        (header.boot_log_len, header.ima_log_len) = (boot_log.len() as u64, ima_log.len() as u64);
        Self { header: Some(header), logs: [boot_log.into(), ima_log.into()].into() }
    }

    #[cfg(test)]
    pub(crate) fn for_tests(boot_log: Vec<u8>, ima_log: Vec<u8>) -> Self {
        Self::new(QuoteAnswer::default(), boot_log, ima_log)
    }

    fn trouble(nonce: Vec<u8>, trouble: &Trouble) -> Self {
        let trouble = trouble.to_string().chars().take(TROUBLE_CHARS_MAX).collect();
        Self::new(QuoteAnswer { nonce, trouble, ..Default::default() }, vec![], vec![])
    }

    /// The next message of it; none may be sent between two of them.
    pub fn next_message(&mut self) -> Option<Up> {
        if let Some(header) = self.header.take() {
            return Some(Up::Quote(header));
        }
        while let Some(log) = self.logs.front_mut() {
            if log.is_empty() {
                self.logs.pop_front();
                continue;
            }
            let chunk = log.split_to(CHUNK_BYTES.min(log.len()));
            return Some(Up::LogChunk(chunk.to_vec()));
        }
        None
    }

    /// Whether its first message was taken.
    pub fn is_begun(&self) -> bool {
        self.header.is_none()
    }

    /// Whether every message of it was taken.
    pub fn is_sent(&self) -> bool {
        self.header.is_none() && self.logs.iter().all(Bytes::is_empty)
    }
}

/// The right to quote. One quote at a time leaves this node, and none is made between an enrolment's and its verdict: to a
/// cell that sees the later of two first, the earlier is a copy's (`clock_step_back`). Cloning shares.
#[derive(Clone, Debug)]
pub struct Turn(Arc<Semaphore>);

impl Default for Turn {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(1)))
    }
}

impl Turn {
    /// Waits for it. It is given back when dropped; none only where the process ends.
    pub async fn take(&self) -> Option<OwnedSemaphorePermit> {
        self.0.clone().acquire_owned().await.ok()
    }
}

/// What a round is answered with. Cloning shares.
#[derive(Clone, Debug)]
pub struct Rounds {
    attester: Attester,
    boot_log: PathBuf,
    ima_log: PathBuf,
    cluster: ClusterId,
    /// Held while the TPM quotes, also past the time allowed: a hung TPM must not gather requests.
    turn: Turn,
}

impl Rounds {
    /// Quotes with `attester` as a node of `cluster`, whose logs are at these paths.
    pub fn new(attester: Attester, turn: Turn, cluster: ClusterId, boot_log: PathBuf, ima_log: PathBuf) -> Self {
        Self { attester, boot_log, ima_log, cluster, turn }
    }

    /// The answer to one round, in the time allowed, whatever the TPM does. `me` is the admission whose leaf the stream
    /// shows: the quote is bound to its generation.
    pub async fn answer(self, me: Arc<Enrolled>, asked: Asked) -> Answer {
        let nonce = asked.request.nonce.clone();
        let made = tokio::time::timeout_at(asked.until(), self.evidence(&me, asked.request));
        match made.await.unwrap_or(Err(Trouble::Time)) {
            Ok(answer) => {
                METRICS.quotes.inc(["ok"]);
                METRICS.last_quote.now();
                answer
            }
            Err(trouble) => {
                METRICS.quotes.inc([trouble.label()]);
                tracing::warn!(%trouble, "round not answered with a quote");
                Answer::trouble(nonce, &trouble)
            }
        }
    }

    async fn evidence(&self, me: &Enrolled, request: QuoteRequest) -> Result<Answer, Trouble> {
        let nonce: [u8; 32] =
            request.nonce.as_slice().try_into().map_err(|_| Trouble::Request("a nonce of 32 bytes"))?;
        let bank = Bank::from_text(&request.bank).ok_or(Trouble::Request("another bank than sha256 or sha384"))?;
        if request.pcr_mask == 0 || request.pcr_mask & !PCR_MASK_ALL != 0 {
            return Err(Trouble::Request("PCRs out of 0-23, or none"));
        }
        let data = round_data(&nonce, &me.node, me.generation, &self.cluster, &me.ak_name);
        let quote = self.quote(bank, request.pcr_mask, data).await?;
        // After the quote, so that the log holds at least what PCR 10 does; the verifier takes the prefix that matches.
        let (boot_path, ima_path) = (self.boot_log.clone(), self.ima_log.clone());
        let read = move || {
            let boot = if request.boot_log { logs::read(&boot_path, 0, BOOT_LOG_BYTES_MAX)? } else { vec![] };
            Ok::<_, Refusal>((boot, logs::read(&ima_path, request.ima_offset, IMA_LOG_BYTES_MAX)?))
        };
        let (boot_log, ima_log) = tokio::task::spawn_blocking(read).await??;
        let header = QuoteAnswer {
            nonce: nonce.to_vec(),
            quote: quote.attest,
            signature: quote.signature,
            pcrs: quote.pcrs.into_iter().map(|(index, value)| PcrValue { index, value }).collect(),
            ..Default::default()
        };
        Ok(Answer::new(header, boot_log, ima_log))
    }

    /// The quote. The task outlives a caller whose time is over and keeps the turn until the TPM has answered.
    async fn quote(&self, bank: Bank, mask: u32, data: [u8; 32]) -> Result<Quote, Trouble> {
        let turn = self.turn.take().await;
        let attester = self.attester.clone();
        let quoting = tokio::spawn(async move {
            let begun = Instant::now();
            let quote = attester.quote(bank, mask, data).await;
            drop(turn);
            if quote.is_ok() {
                METRICS.quote_time.observe(begun.elapsed());
            }
            quote
        });
        Ok(quoting.await??)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(mut answer: Answer) -> Vec<String> {
        let mut out = Vec::new();
        while let Some(message) = answer.next_message() {
            out.push(match message {
                Up::Quote(q) => format!("quote {} {} {}", q.boot_log_len, q.ima_log_len, q.trouble),
                Up::LogChunk(bytes) => format!("{} x {:?}", bytes.len(), bytes.first()),
                other => format!("{other:?}"),
            });
        }
        assert!(answer.is_sent());
        out
    }

    #[test]
    fn an_answer_goes_out_as_header_then_boot_log_then_ima_log_in_bounded_chunks() {
        let of =
            |boot: usize, ima: usize| messages(Answer::new(QuoteAnswer::default(), vec![b'b'; boot], vec![b'i'; ima]));
        assert_eq!(of(0, 0), ["quote 0 0 "]);
        assert_eq!(of(0, 5), ["quote 0 5 ", "5 x Some(105)"]);
        assert_eq!(
            of(CHUNK_BYTES, CHUNK_BYTES + 1),
            ["quote 65536 65537 ", "65536 x Some(98)", "65536 x Some(105)", "1 x Some(105)"]
        );
        let long = Refusal::new(ambit_model::Code::Internal, "x".repeat(1000), "");
        let told = messages(Answer::trouble(vec![1], &Trouble::Log(long)));
        assert_eq!(told.len(), 1);
        assert!(told[0].starts_with("quote 0 0 internal: expected xxx") && told[0].len() < 300, "{told:?}");
    }

    #[test]
    fn the_time_allowed_is_bounded_both_ways_and_leaves_time_to_say_so() {
        let at = Instant::now();
        for (asked_ms, gives_up_ms) in [(0, 900), (10_000, 9000), (u64::MAX, 54_000)] {
            let asked = Asked { request: QuoteRequest { answer_within_ms: asked_ms, ..Default::default() }, at };
            assert_eq!(asked.until().into_std() - at, Duration::from_millis(gives_up_ms), "{asked_ms}");
        }
    }
}
