//! Re-attestation: the questions of one agent's stream, and what becomes of the answers (design.md section 3).
//!
//! *Failed* evidence puts the node out at once; the word is carried to the log until the log has it. *No* evidence does
//! not: a node that stays silent becomes late by the deadlines of the state machine, which count time with a leader only.

use crate::replica::evidence::{Body, CHAIN_MAX};
use crate::replica::policies::Governing;
use crate::replica::work::Lane;
use crate::replica::{Replica, random};
use crate::services::logs::Logs;
use ambit_model::refusal::Class;
use ambit_model::{Code, Generation, NodeId, Refusal, Revision, Stamp};
use ambit_proto::v1;
use ambit_state::Command;
use ambit_state::command::{RoundVerdict, Seen};
use ambit_state::objects::{DenialRow, NodeRow, Standing};
use ambit_verify::{BOOT_LOG_BYTES_MAX, Bank, Denial, IMA_LOG_BYTES_MAX, KnownNode, Round, RoundQuote};
use ambit_verify::{Before, RoundLogs};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// A discrete TPM behind a busy machine answers well within this.
const ANSWER_MAX: Duration = Duration::from_secs(20);
/// After an answer that could not be judged for reasons of our own.
const RETRY: Duration = Duration::from_secs(1);
/// After a judgement by policies that were replaced meanwhile: this replica has the new ones soon, if not yet.
const STALE_RETRY: Duration = Duration::from_millis(100);
/// Between attempts to put a failed node out, while there is no leader to take the word.
const WORD_RETRY: Duration = Duration::from_millis(250);
/// The part of an interval by which rounds of different nodes are spread.
const JITTER: f64 = 0.2;
/// Firmware and boot (0-7), grub and kernel (8, 9), IMA (10), shim (14).
pub(crate) const PCR_MASK: u32 = 0x47ff;

/// The rounds of one stream.
pub(super) struct Rounds {
    replica: Replica,
    node: NodeId,
    generation: Generation,
    known: Option<Arc<KnownNode>>,
    /// The policy revision at which the whole logs were judged on this stream.
    whole_at: Option<Revision>,
    /// Why the next round must be whole, with what it means if it never comes.
    suspicion: Option<(Revision, Denial)>,
    next: Next,
}

enum Next {
    /// Nothing is open; ask then.
    Ask(Instant),
    /// Asked; an answer is wanted by then.
    Answer(Instant, Box<Open>),
    /// Being judged.
    Verdict(oneshot::Receiver<Finished>),
}

/// A question and as much of its answer as has come.
struct Open {
    round: Round,
    whole: bool,
    governing: Arc<Governing>,
    standing: Standing,
    row: NodeRow,
    answer: Option<v1::QuoteAnswer>,
    logs: Logs,
}

/// What came of a round.
enum Finished {
    Good {
        whole_at: Revision,
    },
    /// Judge the whole logs before deciding; what the delta alone says.
    Whole(Revision, Denial),
    Again(Refusal),
    Out(Refusal),
}

/// What the stream is to do.
pub(super) enum Todo {
    Send(v1::QuoteRequest),
    End(Refusal),
    Nothing,
}

impl Rounds {
    pub(super) fn new(replica: Replica, node: NodeId, generation: Generation) -> Self {
        let mut rounds = Self {
            replica,
            node,
            generation,
            known: None,
            whole_at: None,
            suspicion: None,
            next: Next::Ask(Instant::now()),
        };
        rounds.next = Next::Ask(rounds.due());
        rounds
    }

    /// Waits for the next thing to do. May be dropped and called again at any time.
    pub(super) async fn next(&mut self) -> Todo {
        match &mut self.next {
            Next::Ask(at) | Next::Answer(at, _) => {
                tokio::time::sleep_until(*at).await;
            }
            Next::Verdict(finished) => {
                let gone = |_| Finished::Again(Refusal::new(Code::Internal, "a judgement", "none"));
                let finished = finished.await.unwrap_or_else(gone);
                return self.finish(finished);
            }
        }
        if matches!(self.next, Next::Answer(..)) {
            return self.unanswered("silence");
        }
        match self.ask() {
            Ok((request, open)) => {
                self.next = Next::Answer(Instant::now() + ANSWER_MAX, Box::new(open));
                Todo::Send(request)
            }
            Err(refusal) => {
                tracing::warn!(node = %self.node, %refusal, "node not asked for a quote");
                self.next = Next::Ask(Instant::now() + RETRY);
                Todo::Nothing
            }
        }
    }

    /// When the next round is due: an interval after the last verdict, spread.
    fn due(&self) -> Instant {
        let (interval, age) = self.replica.local(|s| {
            let cluster = s.node(&self.node).and_then(|n| s.cluster(&n.cluster));
            let interval = cluster.map_or(ambit_state::ATTEST_INTERVAL_MS, |c| c.attest_interval_ms);
            let age = s.standing(&self.node).map_or(0, |st| s.led_ms().saturating_sub(st.led_ms));
            (interval, age)
        });
        let interval = (interval as f64 * (1.0 - JITTER * fraction())) as u64;
        super::agent::in_company(Instant::now() + Duration::from_millis(interval.saturating_sub(age)))
    }

    fn ask(&mut self) -> Result<(v1::QuoteRequest, Open), Refusal> {
        let known = self.replica.local(|s| Some((s.node(&self.node)?.clone(), s.standing(&self.node)?.clone())));
        let (row, standing) = known.ok_or_else(|| Refusal::new(Code::NodeUnknown, "an enrolled node", "none"))?;
        let governing = self.replica.governing(&row.cluster)?;
        if self.known.is_none() {
            let (public, signer) = (&row.ak.public, row.ak.qualified_signer.clone());
            let known = KnownNode::parse(self.node, row.cluster.clone(), self.generation, public, signer)?;
            self.known = Some(Arc::new(known));
        }
        let rests_on_old = !governing.is_current(&standing.policy) && self.whole_at != Some(governing.revision);
        let whole = self.suspicion.is_some()
            || rests_on_old
            || !governing.accepts(&standing.policy)
            || standing.evidence_depth >= CHAIN_MAX;
        let round = Round::new(random()?, Bank::Sha256, PCR_MASK)?;
        let request = v1::QuoteRequest {
            nonce: round.nonce().to_vec(),
            bank: Bank::Sha256.as_str().to_owned(),
            pcr_mask: PCR_MASK,
            ima_offset: if whole { 0 } else { standing.ima.offset },
            boot_log: whole,
            answer_within_ms: ANSWER_MAX.as_millis() as u64,
        };
        Ok((request, Open { round, whole, governing, standing, row, answer: None, logs: Logs::default() }))
    }

    /// Takes the first part of an answer.
    pub(super) fn answer(&mut self, answer: v1::QuoteAnswer) -> Result<Todo, Refusal> {
        let unasked = || Refusal::new(Code::BadRequest, "an answer to the question asked", "another");
        let Next::Answer(_, open) = &mut self.next else { return Err(unasked()) };
        if open.answer.is_some() || answer.nonce != open.round.nonce() {
            return Err(unasked());
        }
        if !answer.trouble.is_empty() {
            // Bounded: it comes from the node.
            let trouble: String = answer.trouble.chars().take(200).collect();
            return Ok(self.unanswered(&trouble));
        }
        for (what, len, max) in
            [("boot log", answer.boot_log_len, BOOT_LOG_BYTES_MAX), ("IMA log", answer.ima_log_len, IMA_LOG_BYTES_MAX)]
        {
            if len > max {
                return Err(Refusal::new(
                    Code::EvidenceTooLarge,
                    format!("a {what} of at most {max} bytes"),
                    len.to_string(),
                ));
            }
        }
        let announced = answer.boot_log_len.saturating_add(answer.ima_log_len);
        open.logs = Logs::in_room(self.replica.work().log_room(Lane::of_round(announced)));
        open.answer = Some(answer);
        Ok(self.judge_if_whole())
    }

    /// Takes a piece of the logs that were announced.
    pub(super) fn chunk(&mut self, bytes: Vec<u8>) -> Result<Todo, Refusal> {
        let unasked = || Refusal::new(Code::BadRequest, "the bytes that were announced", "others");
        let Next::Answer(_, open) = &mut self.next else { return Err(unasked()) };
        let answer = open.answer.as_ref().ok_or_else(unasked)?;
        open.logs.take(answer, &bytes)?;
        Ok(self.judge_if_whole())
    }

    fn judge_if_whole(&mut self) -> Todo {
        let Next::Answer(at, _) = &self.next else { return Todo::Nothing };
        let at = *at;
        let Next::Answer(_, open) = std::mem::replace(&mut self.next, Next::Ask(at)) else { return Todo::Nothing };
        let come = |a: &v1::QuoteAnswer| open.logs.are_all_of(a);
        if !open.answer.as_ref().is_some_and(come) {
            self.next = Next::Answer(at, open);
            return Todo::Nothing;
        }
        if !open.logs.were_kept() {
            tracing::debug!(node = %self.node, "no room for logs: round to be repeated");
            self.next = Next::Ask(Instant::now() + RETRY.mul_f64(1.0 + fraction()));
            return Todo::Nothing;
        }
        let Some(known) = self.known.clone() else { return Todo::Nothing };
        let (tell, finished) = oneshot::channel();
        let judgement =
            Judgement { replica: self.replica.clone(), node: self.node, generation: self.generation, known };
        // Not the stream's task: a stream that breaks takes no verdict with it.
        self.replica.background(async move {
            let _ = tell.send(judgement.of(*open).await);
        });
        self.next = Next::Verdict(finished);
        Todo::Nothing
    }

    fn finish(&mut self, finished: Finished) -> Todo {
        match finished {
            Finished::Good { whole_at } => {
                (self.whole_at, self.suspicion) = (Some(whole_at), None);
                self.next = Next::Ask(self.due());
                Todo::Nothing
            }
            Finished::Whole(revision, denial) => {
                self.suspicion = Some((revision, denial));
                self.next = Next::Ask(Instant::now());
                Todo::Nothing
            }
            Finished::Again(refusal) => {
                tracing::debug!(node = %self.node, %refusal, "round to be repeated");
                let wait = if refusal.code == Code::StaleAppraisal { STALE_RETRY } else { RETRY };
                self.next = Next::Ask(Instant::now() + wait);
                Todo::Nothing
            }
            Finished::Out(refusal) => Todo::End(refusal),
        }
    }

    /// No evidence came. Alone that only makes a node late; where a round before gave a reason for doubt and the whole
    /// logs were the way out, the doubt stands.
    fn unanswered(&mut self, why: &str) -> Todo {
        tracing::info!(node = %self.node, why, "no quote");
        let Some((revision, denial)) = self.suspicion.take() else {
            self.next = Next::Ask(Instant::now() + RETRY);
            return Todo::Nothing;
        };
        let (tell, finished) = oneshot::channel();
        let (replica, node, generation) = (self.replica.clone(), self.node, self.generation);
        self.replica.background(async move {
            let _ = tell.send(put_out(&replica, node, generation, (revision, &denial)).await);
        });
        self.next = Next::Verdict(finished);
        Todo::Nothing
    }
}

/// Evenly from 0 to 1.
fn fraction() -> f64 {
    u64::from_be_bytes(random().unwrap_or_default()) as f64 / u64::MAX as f64
}

/// Judging one answer, apart from the stream that brought it.
struct Judgement {
    replica: Replica,
    node: NodeId,
    generation: Generation,
    known: Arc<KnownNode>,
}

impl Judgement {
    async fn of(self, open: Open) -> Finished {
        let Open { round, whole, governing, standing, row, answer, logs } = open;
        let Logs { boot: boot_log, ima: ima_log, room: _room, .. } = logs;
        let Some(answer) = answer else {
            return Finished::Again(Refusal::new(Code::Internal, "an answer", "none"));
        };
        let pcrs: Vec<(u32, Vec<u8>)> = answer.pcrs.into_iter().map(|p| (p.index, p.value)).collect();
        let quote = RoundQuote { quote: answer.quote, signature: answer.signature, pcrs };
        let mut body = Body {
            node: self.node,
            before: if whole { None } else { Some(standing.evidence_sha256) },
            ek_class: row.ek.class.clone(),
            bank: Bank::Sha256.as_str().to_owned(),
            ak_public: row.ak.public.clone(),
            quote: quote.quote.clone(),
            signature: quote.signature.clone(),
            pcrs: quote.pcrs.iter().cloned().collect(),
            boot_log: boot_log.clone(),
            ima_offset: if whole { 0 } else { standing.ima.offset },
            ima_log: ima_log.clone(),
        };
        let boot_log_sha256 = if whole { ambit_verify::hash::sha256(&boot_log) } else { standing.boot_log_sha256 };
        let (known, policies, class) = (self.known.clone(), governing.clone(), row.ek.class.clone());
        // Of a whole round the policy before decides nothing; any stands in for one that governs no more.
        let position = governing.index_of(&standing.policy).unwrap_or(0);
        let before = match (crate::services::node::checkpoint(&standing), governing.compiled.get(position)) {
            (Ok(ima), Some(policy)) => Before {
                counters: crate::services::node::counters(&standing),
                boot_pcrs_sha256: standing.boot_pcrs_sha256,
                ima,
                policy: policy.clone(),
            },
            (Err(refusal), _) => return Finished::Again(refusal),
            (_, None) => return Finished::Again(Refusal::new(Code::Internal, "a policy that governs", "none")),
        };
        let judged = self.replica.work().run(move || {
            let fresh = round.quote(&known, quote).map_err(Denial::from)?;
            let unknown = || Refusal::new(Code::Internal, "a known EK class", class.clone());
            let class = ambit_verify::EkClass::from_text(&class).ok_or_else(unknown)?;
            let logs = match whole {
                true => RoundLogs::Whole { boot_log: &boot_log, ima_log: &ima_log },
                false => RoundLogs::Grown { ima_log: &ima_log },
            };
            fresh.appraise(&before, class, logs, &policies.compiled)
        });
        let evidence = match judged.await {
            Err(refusal) => return Finished::Again(refusal),
            Ok(Err(denial)) if !whole && wants_whole(&denial, &governing) => {
                return Finished::Whole(governing.revision, denial);
            }
            Ok(Err(denial)) => {
                if whole && let Err(refusal) = self.replica.keep_evidence(&body).await {
                    tracing::warn!(node = %self.node, %refusal, "evidence of a failure not kept");
                }
                return put_out(&self.replica, self.node, self.generation, (governing.revision, &denial)).await;
            }
            Ok(Ok(evidence)) => evidence,
        };
        let policy = governing.versions.get(evidence.appraised.position).map(|(policy, _)| policy.clone());
        let Some(policy) = policy else {
            return Finished::Again(Refusal::new(Code::Internal, "a policy that governs", "none"));
        };
        // What the quote does not cover is nobody's word; the next round sends it again.
        body.cut(evidence.appraised.checkpoint.offset);
        // Nothing new in the logs: the body before says all.
        let (evidence_sha256, evidence_depth) = if whole || !body.ima_log.is_empty() {
            match self.replica.keep_evidence(&body).await {
                Ok(sha256) => (sha256, if whole { 0 } else { standing.evidence_depth.saturating_add(1) }),
                Err(refusal) => return Finished::Again(refusal),
            }
        } else {
            (standing.evidence_sha256, standing.evidence_depth)
        };
        let counters = evidence.counters;
        let same_boot = evidence.boot_pcrs_sha256 == standing.boot_pcrs_sha256;
        let pcrs = (!same_boot).then(|| crate::services::node::boot_pcrs(evidence.bank, &evidence.pcrs));
        let verdict = RoundVerdict {
            node: self.node,
            generation: self.generation,
            policy_revision: governing.revision,
            seen: Seen {
                counters: crate::services::node::stored(&counters),
                firmware_version: evidence.firmware_version,
                ima: crate::services::node::point(&evidence.appraised.checkpoint),
                pcrs,
                boot_pcrs_sha256: evidence.boot_pcrs_sha256,
                boot_log_sha256,
                policy,
                trust: evidence.trust,
                evidence_sha256,
                evidence_depth,
            },
        };
        match self.replica.verdicts().put(verdict).await {
            Ok(()) => Finished::Good { whole_at: governing.revision },
            Err(r) if r.code.class() == Class::Unavailable && r.code != Code::NodeLate => Finished::Again(r),
            Err(r) if matches!(r.code, Code::StaleAppraisal | Code::ClockStepBack) => Finished::Again(r),
            Err(refusal) => Finished::Out(refusal),
        }
    }
}

/// Whether the whole logs may still show that all is well: another boot, or a policy that was not asked.
fn wants_whole(denial: &Denial, governing: &Governing) -> bool {
    let appraised = matches!(denial.refusal.code, Code::ImaFileNotAllowed | Code::ImaViolation);
    denial.refusal.code == Code::BootLogMissing || (appraised && governing.versions.len() > 1)
}

/// Carries the word to the log until the log has it, or has moved on. Returns what the node is told.
async fn put_out(
    replica: &Replica,
    node: NodeId,
    generation: Generation,
    (revision, denial): (Revision, &Denial),
) -> Finished {
    // Trouble of our own says nothing about the machine.
    if denial.refusal.code.class() == Class::Unavailable {
        return Finished::Again(denial.refusal.clone());
    }
    tracing::warn!(%node, code = %denial.refusal.code, diverged = denial.diverged, "node untrusted: its evidence failed");
    let row = DenialRow {
        stamp: Stamp(0),
        node,
        code: denial.refusal.code.to_string(),
        diverged: denial.diverged.clone().unwrap_or_default(),
        expected: denial.refusal.expected.clone(),
        found: denial.refusal.found.clone(),
    };
    loop {
        let outcome = match replica.propose_own(Command::Distrust(generation, revision, row.clone())).await {
            Ok(applied) => applied.outcome.map(drop),
            Err(refusal) => Err(refusal),
        };
        match outcome {
            Err(r) if r.code.class() == Class::Unavailable => tokio::time::sleep(WORD_RETRY).await,
            // The policies changed while it was judged: what they say now is asked anew.
            Err(r) if r.code == Code::StaleAppraisal => return Finished::Again(r),
            // Out already, or of another admission by now: then this evidence says nothing more.
            Err(_) | Ok(()) => {
                return Finished::Out(Refusal::new(Code::NodeUntrusted, "", denial.refusal.code.as_str()));
            }
        }
    }
}
