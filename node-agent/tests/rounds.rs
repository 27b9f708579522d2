//! Rounds of re-attestation over a real stream, from a real (software) TPM; quotes are judged by tpm2-tools and by hand.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use ambit_agent::metrics::METRICS;
use ambit_agent::reattest::Turn;
use ambit_model::policy::Endpoint;
use ambit_model::{Generation, Revision};
use ambit_proto::v1;
use ambit_proto::v1::server_message::Body as Down;
use sha2::{Digest, Sha256};
use std::time::{Duration, Instant};
use support::Cell;
use support::agent::Agent;
use support::replica::{Replica, Stream};
use support::tpm::Swtpm;
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(20);
const MASK: u32 = 0x47ff;

struct Stage {
    tpm: Swtpm,
    replica: Replica,
    agent: Agent,
    stream: Stream,
}

impl Stage {
    async fn set() -> Stage {
        let tpm = Swtpm::start();
        tpm.write("boot_log", &pattern(100_000, 3));
        tpm.write("ima_log", &pattern(300_000, 5));
        let (replica, mut streams) = Replica::start(Cell::founded("west", 1), tpm.dir.clone()).await;
        let agent = Agent::start(&replica, &tpm);
        let stream = timeout(SOON, streams.recv()).await.expect("a stream").unwrap();
        Stage { tpm, replica, agent, stream }
    }
    async fn slice(&mut self, revision: u64) -> Duration {
        let begun = Instant::now();
        self.stream.send(Down::Slice(self.replica.with_cell(|cell| cell.slice(revision, &[])))).await;
        let taken = self.agent.desired.wait_for(|v| v.as_ref().is_some_and(|v| v.revision == Revision(revision)));
        timeout(SOON, taken).await.expect("the slice is taken").unwrap();
        begun.elapsed()
    }
    /// What the quote must be over, by PLAN and not by the code under test.
    fn data(&self, nonce: &[u8; 32], generation: u64, ak_public: &[u8]) -> String {
        let ak_name = [&[0x00, 0x0b][..], &Sha256::digest(ak_public)].concat();
        let mut hash = Sha256::new();
        hash.update(b"ambit/round/v1");
        hash.update(nonce);
        hash.update(self.replica.with_cell(|cell| cell.node()).0);
        hash.update(generation.to_be_bytes());
        hash.update(b"\x04west");
        hash.update(Sha256::digest(ak_name));
        hex::encode(hash.finalize())
    }
    fn checkquote(&self, quote: &v1::QuoteAnswer, ak_public: &[u8], data: &str) -> bool {
        self.tpm.write("ak.pub", &[&(ak_public.len() as u16).to_be_bytes()[..], ak_public].concat());
        self.tpm.write("quote.msg", &quote.quote);
        self.tpm.write("quote.sig", &quote.signature);
        let files = ["-u", "ak.pub", "-m", "quote.msg", "-s", "quote.sig", "-g", "sha256", "-q", data];
        self.tpm.tool("tpm2_checkquote", &files).status.success()
    }
}

fn pattern(bytes: usize, step: usize) -> Vec<u8> {
    (0..bytes).map(|i| (i * step % 251) as u8).collect()
}

fn request(nonce: u8, change: impl FnOnce(&mut v1::QuoteRequest)) -> Down {
    let mut request = v1::QuoteRequest {
        nonce: vec![nonce; 32],
        bank: "sha256".into(),
        pcr_mask: MASK,
        ima_offset: 0,
        boot_log: false,
        answer_within_ms: 15_000,
    };
    change(&mut request);
    Down::Quote(request)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_round_is_answered_with_a_bound_quote_and_the_logs_behind_it() {
    let mut stage = Stage::set().await;
    let ak_public = stage.agent.attester.identity().await.unwrap().ak_public;
    stage.slice(1).await;
    stage.stream.send(request(7, |r| (r.ima_offset, r.boot_log) = (1000, true))).await;
    let (quote, _) = stage.stream.quote().await;
    // News of this node while its logs are on their way: they wait for the last byte.
    stage.agent.endpoints.send_replace(Some(vec![Endpoint {
        spiffe_id: "spiffe://west/web".parse().unwrap(),
        address: "10.0.0.1".parse().unwrap(),
        cluster: "west".parse().unwrap(),
        node_address: "127.0.0.1".parse().unwrap(),
        node: stage.replica.with_cell(|cell| cell.node()),
        generation: Generation(1),
    }]));
    assert_eq!((quote.nonce.as_slice(), quote.trouble.as_str()), (&[7; 32][..], ""));
    assert_eq!((quote.boot_log_len, quote.ima_log_len), (100_000, 299_000));
    let (boot, ima) = stage.stream.logs(&quote).await;
    assert!(boot == pattern(100_000, 3) && ima == pattern(300_000, 5)[1000..]);
    let news = timeout(SOON, stage.stream.next()).await.unwrap();
    assert!(matches!(news, v1::agent_message::Body::Endpoints(r) if r.endpoints.len() == 1), "after the answer");

    // Bound to this nonce, this node, this admission, this AK; over exactly the PCRs sent.
    let generation = stage.stream.generation;
    let data = stage.data(&[7; 32], generation, &ak_public);
    assert!(stage.checkquote(&quote, &ak_public, &data));
    for other in [stage.data(&[8; 32], generation, &ak_public), stage.data(&[7; 32], generation + 1, &ak_public)] {
        assert!(!stage.checkquote(&quote, &ak_public, &other), "the check can fail");
    }
    let indices: Vec<u32> = quote.pcrs.iter().map(|p| p.index).collect();
    assert_eq!(indices, (0..=10).chain([14]).collect::<Vec<_>>());
    let values: Vec<u8> = quote.pcrs.iter().flat_map(|p| p.value.clone()).collect();
    assert!(quote.quote.ends_with(&Sha256::digest(values)), "pcrDigest is the last of TPMS_ATTEST");

    // A log that grew, one that is shorter than the offset, one that is gone: the cell judges them, not the node.
    stage.tpm.write("ima_log", &pattern(300_010, 5));
    for (offset, expected) in [(300_000, &pattern(300_010, 5)[300_000..]), (300_010, &[]), (1 << 40, &[])] {
        stage.stream.send(request(9, |r| r.ima_offset = offset)).await;
        let (quote, _) = stage.stream.quote().await;
        assert_eq!((quote.boot_log_len, quote.trouble.as_str()), (0, ""), "{offset}");
        assert_eq!(stage.stream.logs(&quote).await.1, expected, "{offset}");
    }
    std::fs::remove_file(stage.tpm.file("ima_log")).unwrap();
    stage.stream.send(request(9, |r| r.boot_log = true)).await;
    let (quote, _) = stage.stream.quote().await;
    assert_eq!((quote.boot_log_len, quote.ima_log_len, quote.trouble.as_str()), (100_000, 0, ""));
    stage.stream.logs(&quote).await;

    // More than the bound is not sent, nor half of it.
    let file = std::fs::File::create(stage.tpm.file("ima_log")).unwrap();
    file.set_len(ambit_verify::IMA_LOG_BYTES_MAX + 1001).unwrap();
    stage.stream.send(request(9, |r| r.ima_offset = 1000)).await;
    let (quote, _) = stage.stream.quote().await;
    assert!(quote.quote.is_empty() && quote.trouble.starts_with("evidence_too_large"), "{}", quote.trouble);

    // What no TPM quotes is no reason to end the stream.
    type Spoil = fn(&mut v1::QuoteRequest);
    let spoils: [Spoil; 5] = [
        |r| r.nonce.truncate(31),
        |r| r.bank = "sha1".into(),
        |r| r.pcr_mask = 0,
        |r| r.pcr_mask = 1 << 24,
        |r| r.bank.clear(),
    ];
    for spoil in spoils {
        stage.stream.send(request(9, spoil)).await;
        let (quote, _) = stage.stream.quote().await;
        let rest = (quote.quote.len(), quote.signature.len(), quote.pcrs.len(), quote.ima_log_len);
        assert!(quote.trouble.starts_with("the request asks") && rest == (0, 0, 0, 0), "{quote:?}");
    }
    let page = METRICS.page();
    for line in ["ambit_agent_quote_age_seconds ", "ambit_agent_quote_answers_total{result=\"bad_request\"} 5"] {
        assert!(page.contains(line), "{line}: {page}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hung_tpm_makes_late_and_holds_up_nothing_else() {
    let mut stage = Stage::set().await;
    stage.slice(1).await;
    stage.tpm.hang();
    let begun = Instant::now();
    let soon = |nonce| request(nonce, |r| r.answer_within_ms = 3000);
    stage.stream.send(soon(1)).await;
    // Slices and denials are taken while the TPM hangs.
    assert!(stage.slice(2).await < Duration::from_secs(2));
    let denial = v1::NodeDenial { node: "ab".repeat(32), generation: 1, trust_domain: "west".into() };
    stage.stream.send(Down::Denials(v1::Denials { revision: 3, denials: vec![denial], ..Default::default() })).await;
    let denied = stage
        .agent
        .denials
        .until(|d| d.lists(&"west".parse().unwrap(), &"ab".repeat(32).parse().unwrap(), Generation(1)));
    timeout(Duration::from_secs(1), denied).await.expect("the denial is in force");
    assert!(begun.elapsed() < Duration::from_millis(2700), "all that while the round was open");
    // Of those that wait only the newest is answered.
    stage.stream.send(soon(2)).await;
    stage.stream.send(soon(3)).await;
    for nonce in [1, 3] {
        let (quote, _) = stage.stream.quote().await;
        assert_eq!((quote.nonce[0], quote.quote.len()), (nonce, 0));
        assert!(quote.trouble.contains("in the time allowed"), "{}", quote.trouble);
        if nonce == 1 {
            assert!(begun.elapsed() < Duration::from_secs(3), "the cell hears of it in time: {:?}", begun.elapsed());
        }
    }
    // A slice made before the denials does not undo them; a later one speaks for itself.
    stage.slice(2).await;
    assert_eq!(stage.agent.denials.now().revision(), Revision(3));
    stage.slice(4).await;
    assert_eq!(*stage.agent.denials.now(), ambit_agent::denials::Denials::parse(Revision(4), &[], &[]).unwrap());
    // What is measured while the TPM quotes is in the log that follows: it is read after the quote, never before.
    stage.stream.send(request(4, |_| ())).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    stage.tpm.write("ima_log", &pattern(300_100, 5));
    stage.tpm.go_on();
    let (quote, _) = stage.stream.quote().await;
    assert_eq!((quote.nonce[0], quote.trouble.as_str(), quote.ima_log_len), (4, "", 300_100));
    assert!(!quote.quote.is_empty() && METRICS.quotes.value(["replaced"]) >= 1.0);
}

/// A later quote must not overtake an earlier one on its way to the cell: it would look like two holders of one TPM.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_quote_is_made_between_another_and_its_verdict() {
    let tpm = Swtpm::start();
    tpm.write("ima_log", b"");
    let (replica, mut streams) = Replica::start(Cell::founded("west", 1), tpm.dir.clone()).await;
    let turn = Turn::default();
    let held = turn.take().await;
    let agent = Agent::start_with(&replica, &tpm, turn);
    let early = timeout(Duration::from_secs(2), streams.recv()).await;
    assert!(early.is_err() && replica.begun().len() == 1, "an enrolment waits before it quotes");
    drop(held);
    let mut stream = timeout(SOON, streams.recv()).await.expect("a stream").unwrap();
    let held = agent.turn.take().await;
    stream.send(request(1, |r| r.answer_within_ms = 1000)).await;
    let (quote, _) = stream.quote().await;
    assert!(quote.trouble.contains("in the time allowed"), "a round waits: {}", quote.trouble);
    drop(held);
    stream.send(request(2, |_| ())).await;
    assert_eq!(stream.quote().await.0.trouble, "");
    // An enrolment holds its turn until the verdict has come.
    replica.hold_verdicts(true);
    replica.refuse(Some(ambit_model::Code::NodeLate));
    stream.end(ambit_model::Code::NodeLate).await;
    while replica.begun().len() < 2 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    replica.refuse(None);
    timeout(SOON, replica.evidence_came()).await.expect("evidence");
    assert!(timeout(Duration::from_millis(500), agent.turn.take()).await.is_err(), "held");
    replica.hold_verdicts(false);
    timeout(SOON, streams.recv()).await.expect("a stream").unwrap();
    timeout(SOON, agent.turn.take()).await.expect("given back");
}
