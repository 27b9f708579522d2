//! Re-attestation over the agent's stream, against real replicas and real TPMs: what a round proves, and what each lie in
//! one makes of the node.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_lab::ima::Record;
use ambit_lab::tpm::IMA_LOG;
use ambit_proto::v1;
use ambit_proto::v1::agent_message::Body as Up;
use ambit_proto::v1::appraisal_client::AppraisalClient;
use ambit_tests::agent::{Admitted, Agent, Attending, RoundLies};
use ambit_tests::cell::{Cell, fresh};
use ambit_tests::machine::{Lies, Machine, apply_policy, explain, golden_policy, register_cluster};
use ambit_tests::operator::{admit, attestation_at, becomes, create_entry, node, svid, within};
use ambit_tests::table::row;
use ambit_tests::tpm::Maker;
use std::sync::Arc;

struct Bench {
    cell: Cell,
    maker: Maker,
}

impl Bench {
    /// A cell with one node of cluster `west` in.
    async fn new() -> (Bench, Machine, Admitted) {
        let cell = Cell::start("west", 1).await.unwrap();
        let maker = Maker::new().unwrap();
        let machine = Machine::new(&maker, "first").await.unwrap();
        register_cluster(&cell, "west", &maker).await.unwrap();
        let me = admit(&cell, &machine, "west").await.unwrap();
        (Bench { cell, maker }, machine, me)
    }
    async fn another(&self, name: &str) -> (Machine, Admitted) {
        let machine = Machine::new(&self.maker, name).await.unwrap();
        let me = admit(&self.cell, &machine, "west").await.unwrap();
        (machine, me)
    }
    async fn open(&self, me: &Admitted) -> Agent {
        Agent::open(&self.cell, 1, me.identity.clone()).await.unwrap()
    }
}

fn honest() -> RoundLies {
    RoundLies::default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_answer_is_a_verdict_on_the_same_admission() {
    let (bench, mut machine, me) = Bench::new().await;
    let (cell, id) = (&bench.cell, machine.node());
    let admitted = node(cell, &id).await.unwrap();
    let mut agent = bench.open(&me).await;
    let mut nonces = std::collections::BTreeSet::new();
    let mut last = admitted.last_verdict_ms;
    for _ in 0..3 {
        let request = agent.answer(&machine, &me, &honest()).await.unwrap();
        assert!(nonces.insert(request.nonce.clone()), "a nonce twice");
        assert_eq!((request.bank.as_str(), request.pcr_mask), ("sha256", 0x47ff));
        // All that ran so far is judged, the boot is known.
        assert_eq!((request.ima_offset, request.boot_log), (IMA_LOG.len() as u64, false));
        last =
            within("a verdict", async || Some(node(cell, &id).await.ok()?.last_verdict_ms).filter(|now| *now > last))
                .await;
    }
    let now = node(cell, &id).await.unwrap();
    assert_eq!((now.generation, now.state.as_str(), now.policy.as_str()), (1, "admitted", "west@1"));
    let why = attestation_at(cell, 1, &id, 0).await.unwrap();
    assert_eq!((why.state.as_str(), why.policy.as_str(), why.policy_version), ("trusted", "west", 1));
    assert_eq!((why.until_ms, why.verdicts), (last, 4), "{why:?}");
    assert_eq!(why.since_ms, admitted.last_verdict_ms);

    // A machine that was reset says nothing of its boot until its whole logs were judged.
    machine.reboot().unwrap();
    assert!(!agent.answer(&machine, &me, &honest()).await.unwrap().boot_log);
    let whole = agent.answer(&machine, &me, &honest()).await.unwrap();
    assert_eq!((whole.boot_log, whole.ima_offset), (true, 0));
    let reset = within("the reset", async || node(cell, &id).await.ok().filter(|n| n.resets > admitted.resets)).await;
    assert_eq!((reset.state.as_str(), reset.generation), ("admitted", 1));
    assert!(!agent.answer(&machine, &me, &honest()).await.unwrap().boot_log);
}

/// Answers with this lie: the node is out at once with the code, and is told it.
async fn caught(bench: &Bench, machine: &Machine, me: &Admitted, lies: &RoundLies, code: &str) {
    let mut agent = bench.open(me).await;
    agent.answer(machine, me, lies).await.unwrap();
    is_out(bench, &mut agent, machine, code).await;
}

async fn is_out(bench: &Bench, agent: &mut Agent, machine: &Machine, code: &str) {
    let told = agent.ended().await.unwrap();
    assert_eq!(told.code.as_str(), "node_untrusted", "{code}: {told}");
    assert!(told.to_string().contains(code), "{code}: {told}");
    let out = node(&bench.cell, &machine.node()).await.unwrap();
    assert_eq!((out.state.as_str(), out.code.as_str()), ("untrusted", code));
    let denials = explain(&bench.cell, 1, &machine.node()).await.unwrap().denials;
    assert_eq!(denials.len(), 1, "{denials:?}");
    assert!(denials[0].code == code && !denials[0].expected.is_empty() && !denials[0].found.is_empty(), "{denials:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quote_of_another_question_is_the_end_of_trust() {
    let (bench, first, me) = Bench::new().await;
    caught(&bench, &first, &me, &RoundLies { other_nonce: true, ..honest() }, "quote_nonce").await;
    row(1, "round quoted over another nonce", "quote_nonce").unwrap();

    let (machine, me) = bench.another("fewer").await;
    caught(&bench, &machine, &me, &RoundLies { fewer_pcrs: true, ..honest() }, "quote_selection").await;
    row(16, "round quoted over one PCR less", "quote_selection").unwrap();

    let (machine, me) = bench.another("relabelled").await;
    let relabel = RoundLies {
        header: Some(|a| {
            let value = std::mem::take(&mut a.pcrs[4].value);
            a.pcrs[4].value = std::mem::replace(&mut a.pcrs[5].value, value);
        }),
        ..honest()
    };
    caught(&bench, &machine, &me, &relabel, "quote_pcr_digest").await;
    row(15, "round with the values of two PCRs exchanged", "quote_pcr_digest").unwrap();

    // Another key of the very same TPM, over the right data.
    let (machine, me) = bench.another("rekeyed").await;
    let mut agent = bench.open(&me).await;
    let request = agent.asked().await.unwrap();
    let right = machine.round(&me, &request, &honest()).await.unwrap();
    let other = machine.rekeyed().await.unwrap();
    let theirs = other.round(&me, &request, &honest()).await.unwrap();
    let signed = |messages: &[Up]| match &messages[0] {
        Up::Quote(answer) => answer.clone(),
        _ => panic!("an answer comes first"),
    };
    let answer = v1::QuoteAnswer { signature: signed(&theirs).signature, ..signed(&right) };
    agent.send(vec![Up::Quote(answer)]).await;
    is_out(&bench, &mut agent, &other, "quote_signature").await;
    row(2, "round signed by another key of the TPM", "quote_signature").unwrap();

    // A quote kept from an earlier round, under the new round's nonce.
    let (machine, me) = bench.another("replayed").await;
    let mut agent = bench.open(&me).await;
    let request = agent.asked().await.unwrap();
    let old = machine.round(&me, &request, &honest()).await.unwrap();
    agent.send(old.clone()).await;
    let request = agent.asked().await.unwrap();
    let again = v1::QuoteAnswer { nonce: request.nonce, ..signed(&old) };
    agent.send(vec![Up::Quote(again)]).await;
    is_out(&bench, &mut agent, &machine, "quote_nonce").await;
    row(2, "round answered with the quote of the round before", "quote_nonce").unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_nobody_asked_for_ends_the_stream_and_not_the_trust() {
    let (bench, machine, me) = Bench::new().await;
    let id = machine.node();
    let unasked = async |agent: &mut Agent, messages: Vec<Up>, code: &str| {
        agent.send(messages).await;
        assert_eq!(agent.ended().await.unwrap().code.as_str(), code);
        let still = node(&bench.cell, &id).await.unwrap();
        assert_eq!((still.state.as_str(), still.generation), ("admitted", 1));
    };
    let mut agent = bench.open(&me).await;
    unasked(&mut agent, vec![Up::Quote(v1::QuoteAnswer { nonce: vec![7; 32], ..Default::default() })], "bad_request")
        .await;
    let mut agent = bench.open(&me).await;
    let request = agent.asked().await.unwrap();
    let answer = machine.round(&me, &request, &honest()).await.unwrap();
    agent.send(answer.clone()).await;
    agent.asked().await.unwrap();
    unasked(&mut agent, answer, "bad_request").await;
    row(2, "the same answer to a later round", "bad_request").unwrap();

    let mut agent = bench.open(&me).await;
    agent.asked().await.unwrap();
    unasked(&mut agent, vec![Up::LogChunk(vec![0; 100])], "bad_request").await;
    let mut agent = bench.open(&me).await;
    let nonce = agent.asked().await.unwrap().nonce;
    let long = v1::QuoteAnswer { nonce, ima_log_len: 1 << 30, ..Default::default() };
    unasked(&mut agent, vec![Up::Quote(long)], "evidence_too_large").await;
    row(40, "round that announces an IMA log of 1 GiB", "evidence_too_large").unwrap();
    // Of two streams of one node the newer is served.
    let (mut old, mut new) = (bench.open(&me).await, bench.open(&me).await);
    assert_eq!(old.ended().await.unwrap().code.as_str(), "unavailable");
    new.answer(&machine, &me, &honest()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_ran_on_a_node_decides_and_other_nodes_are_told() {
    let (bench, machine, me) = Bench::new().await;
    let (_, other) = bench.another("other").await;
    let mut watching = bench.open(&other).await;
    watching.asked().await.unwrap();
    create_entry(&bench.cell, "web", "west").await.unwrap();
    assert_eq!(svid(&bench.cell, &me, "web").await.unwrap(), "ok");

    let mut agent = bench.open(&me).await;
    agent.answer(&machine, &me, &honest()).await.unwrap();
    machine.runs(&[0x11; 32], "/usr/bin/intruder").unwrap();
    agent.answer(&machine, &me, &honest()).await.unwrap();
    is_out(&bench, &mut agent, &machine, "ima_file_not_allowed").await;
    row(39, "round with a file that is on no list", "ima_file_not_allowed").unwrap();
    let told = watching.denials().await.unwrap();
    assert_eq!((told[0].node.as_str(), told[0].generation), (machine.node().as_str(), 1));
    let known = explain(&bench.cell, 1, &machine.node()).await.unwrap();
    assert!(known.denials[0].diverged.contains("/usr/bin/intruder"), "{:?}", known.denials);
    assert_eq!(svid(&bench.cell, &me, "web").await.unwrap(), "node_untrusted");
    let why = attestation_at(&bench.cell, 1, &machine.node(), 0).await.unwrap();
    assert_eq!((why.state.as_str(), why.code.as_str()), ("untrusted", "ima_file_not_allowed"));

    // The file ran, and the log shows a harmless one in its place.
    let (machine, me) = bench.another("altered").await;
    machine.runs(&[0x22; 32], "/usr/bin/intruder").unwrap();
    let listed = ambit_lab::ima::parse(IMA_LOG).unwrap();
    let (digest, path) = listed[2].digest_and_path().unwrap();
    let harmless = Record::ima_ng(digest.try_into().unwrap(), path).encode();
    let lies = RoundLies { ima_log: Some([IMA_LOG, &harmless].concat()), ..honest() };
    caught(&bench, &machine, &me, &lies, "ima_log_mismatch").await;
    row(39, "round with an IMA entry altered", "ima_log_mismatch").unwrap();
    // Or nothing at all.
    let (machine, me) = bench.another("silent").await;
    machine.runs(&[0x22; 32], "/usr/bin/intruder").unwrap();
    let lies = RoundLies { ima_log: Some(IMA_LOG.to_vec()), ..honest() };
    caught(&bench, &machine, &me, &lies, "ima_log_mismatch").await;
    row(39, "round with an IMA entry left out", "ima_log_mismatch").unwrap();
    // A PCR of the boot that no log accounts for: the whole logs are asked for, and do not explain it.
    let (machine, me) = bench.another("booted").await;
    machine.extend(8, &Record::ima_ng(&[1; 32], "/x").digests()).unwrap();
    let mut agent = bench.open(&me).await;
    assert!(!agent.answer(&machine, &me, &honest()).await.unwrap().boot_log);
    assert!(agent.answer(&machine, &me, &honest()).await.unwrap().boot_log);
    is_out(&bench, &mut agent, &machine, "boot_log_pcr_mismatch").await;
    row(35, "round after PCR 8 was extended with no event", "boot_log_pcr_mismatch").unwrap();
}

/// Who enrolled since has the newer leaf; who still shows the older one must enrol, which tells a copied TPM from an answer
/// that got lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_stream_of_an_older_admission_ends_and_speaks_against_nobody() {
    let (bench, machine, me) = Bench::new().await;
    let mut old = bench.open(&me).await;
    old.answer(&machine, &me, &honest()).await.unwrap();
    let again = admit(&bench.cell, &machine, "west").await.unwrap();
    assert_eq!(old.ended().await.unwrap().code.as_str(), "svid_untrusted");
    let refused = Agent::open(&bench.cell, 1, me.identity.clone()).await;
    let refused = match refused {
        Ok(mut agent) => agent.ended().await.unwrap(),
        Err(refused) => refused,
    };
    assert_eq!(refused.code.as_str(), "svid_untrusted");
    let row = node(&bench.cell, &machine.node()).await.unwrap();
    assert_eq!((row.state.as_str(), row.generation), ("admitted", 2));
    bench.open(&again).await.answer(&machine, &again, &honest()).await.unwrap();
}

/// A copied virtual machine: both hold one TPM's keys, and the TPM's counters cannot serve two.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_holders_of_one_tpm_state_are_found_out() {
    let (bench, machine, me) = Bench::new().await;
    let before = node(&bench.cell, &machine.node()).await.unwrap();
    let mut agent = bench.open(&me).await;
    agent.answer(&machine, &me, &honest()).await.unwrap();
    agent.asked().await.unwrap();
    let copy = machine.copied().await.unwrap();
    let mut second = bench.open(&me).await;
    within("the copy's verdict", async || {
        second.answer(&copy, &me, &honest()).await.unwrap();
        node(&bench.cell, &copy.node()).await.ok().filter(|n| n.resets > before.resets)
    })
    .await;
    caught(&bench, &machine, &me, &honest(), "tpm_state_forked").await;
    row(45, "copied vTPM: the original answers after its copy", "tpm_state_forked").unwrap();
    // The copy is out with it.
    assert_eq!(second.ended().await.unwrap().code.class(), ambit_model::Code::Unavailable.class());
    let refused = Agent::open(&bench.cell, 1, me.identity.clone()).await.err().unwrap();
    assert_eq!(refused.code.as_str(), "node_untrusted");
    let told = copy.enrol(&bench.cell, 1, "west", "", &Lies::default()).await.unwrap().err().unwrap();
    assert_eq!(told.code, "node_untrusted");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_without_a_quote_is_late_and_nothing_worse() {
    let (bench, troubled, me) = Bench::new().await;
    let (silent, quiet) = bench.another("silent").await;
    create_entry(&bench.cell, "web", "west").await.unwrap();
    let _held = bench.open(&quiet).await;
    let mut agent = bench.open(&me).await;
    let late = async |id: &str| node(&bench.cell, id).await.ok().filter(|n| n.late);
    let trouble = |nonce| Up::Quote(v1::QuoteAnswer { nonce, trouble: "the TPM is busy".into(), ..Default::default() });
    while late(&troubled.node()).await.is_none() {
        let nonce = agent.asked().await.unwrap().nonce;
        agent.send(vec![trouble(nonce)]).await;
    }
    within("the silent node late", async || late(&silent.node()).await).await;
    for (machine, me) in [(&troubled, &me), (&silent, &quiet)] {
        let row = node(&bench.cell, &machine.node()).await.unwrap();
        assert_eq!((row.state.as_str(), row.code.as_str()), ("admitted", ""));
        assert!(explain(&bench.cell, 1, &machine.node()).await.unwrap().denials.is_empty());
        assert_eq!(svid(&bench.cell, me, "web").await.unwrap(), "node_late");
    }
    row(47, "a node that stops attesting, after three intervals", "node_late").unwrap();
    // One good quote and it is as before; or it begins anew by itself.
    agent.answer(&troubled, &me, &honest()).await.unwrap();
    within("in time again", async || node(&bench.cell, &troubled.node()).await.ok().filter(|n| !n.late)).await;
    assert_eq!(svid(&bench.cell, &me, "web").await.unwrap(), "ok");
    let (again, _) = silent.enrol(&bench.cell, 1, "west", "", &Lies::default()).await.unwrap().unwrap();
    assert_eq!(again.generation, 2);
}

async fn promote(cell: &Cell, name: &str) -> v1::AppraisalPolicyMessage {
    let request = v1::AppraisalPolicyRef { request_id: fresh(), name: name.into() };
    AppraisalClient::new(cell.admin(1).await.unwrap()).promote_appraisal_policy(request).await.unwrap().into_inner()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_policy_judges_what_booted_long_ago() {
    let (bench, machine, me) = Bench::new().await;
    let (cell, id) = (&bench.cell, machine.node());
    let (yaml, _) = golden_policy("west", "west").unwrap();
    let wider = yaml.replace("    - lab\n", "    - lab\n    - virtual\n");
    let other_line = yaml.replace("      - \"/vmlinuz console=ttyS0", "      - \"/vmlinuz quiet console=ttyS0");
    assert!(wider != yaml && other_line != yaml);

    let mut agent = bench.open(&me).await;
    agent.answer(&machine, &me, &honest()).await.unwrap();
    apply_policy(cell, &wider, false).await.unwrap();
    within("judged whole under the new version", async || {
        agent.answer(&machine, &me, &honest()).await.unwrap();
        node(cell, &id).await.ok().filter(|n| n.policy == "west@2")
    })
    .await;
    let first = attestation_at(cell, 1, &id, node(cell, &id).await.unwrap().last_verdict_ms).await.unwrap();
    assert_eq!(first.policy_version, 2);

    // Staged, the old boot stays accepted by the version before.
    let staged = apply_policy(cell, &other_line, true).await.unwrap();
    assert_eq!((staged.version, staged.previous_version), (3, 2));
    let asked = within("a whole round", async || {
        Some(agent.answer(&machine, &me, &honest()).await.unwrap()).filter(|request| request.boot_log)
    })
    .await;
    assert_eq!(asked.ima_offset, 0);
    agent.answer(&machine, &me, &honest()).await.unwrap();
    let still = node(cell, &id).await.unwrap();
    assert_eq!((still.state.as_str(), still.policy.as_str()), ("admitted", "west@2"));
    let listed = AppraisalClient::new(cell.admin(1).await.unwrap())
        .list_appraisal_policies(v1::ListAppraisalPoliciesRequest { name: "west".into() })
        .await
        .unwrap()
        .into_inner()
        .policies;
    assert_eq!((listed[0].nodes, listed[0].nodes_on_previous), (0, 1));
    drop(agent);

    // Promoted, it is not.
    let answering = Attending::start(cell, Arc::new(machine), me).unwrap();
    assert_eq!(promote(cell, "west").await.previous_version, 0);
    let out = becomes(cell, &id, "untrusted", "command_line_not_allowed").await;
    assert_eq!(out.generation, 1);
    within("the agent is told", async || {
        answering.said().iter().any(|r| r.code.as_str() == "node_untrusted").then_some(())
    })
    .await;
}
