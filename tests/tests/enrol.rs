//! Enrolment against real replicas and real TPMs (swtpm): what is admitted, and every refusal with its code.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_agent::clock::Clock;
use ambit_agent::config::Config;
use ambit_agent::enrol::enrol;
use ambit_agent::reattest::Turn;
use ambit_identity::tls::{SharedTrust, Trust};
use ambit_lab::tpm::{BOOT_LOG, IMA_LOG};
use ambit_model::refusal::Class;
use ambit_proto::status::from_status;
use ambit_proto::v1;
use ambit_proto::v1::node_attestation_client::NodeAttestationClient;
use ambit_tests::agent::Agent;
use ambit_tests::cell::{Cell, fresh, refusal};
use ambit_tests::machine::{
    Answer, Lies, Machine, apply_policy, evidence, explain, golden_policy, join_token, node_identity, register_cluster,
};
use ambit_tests::process::must_run;
use ambit_tests::tpm::Maker;
use ambit_tpm::Attester;
use ambit_transport::Identity;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// Enrolment may take this long without its TPM (issue A), in a debug build on two loaded cores.
const ENROL_MAX: Duration = Duration::from_millis(1_500);

fn denied<T>(outcome: Result<T, v1::Denied>) -> v1::Denied {
    match outcome {
        Ok(_) => panic!("admitted, where a denial was due"),
        Err(denied) => denied,
    }
}

async fn nodes(cell: &Cell, replica: usize) -> Vec<v1::Node> {
    let mut client = NodeAttestationClient::new(cell.admin(replica).await.unwrap());
    client.list_nodes(v1::ListNodesRequest {}).await.unwrap().into_inner().nodes
}

/// The agent's own code, with the key of the node's SVID in its TPM: the cell says so, and only that TPM opens the stream.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_key_in_the_tpm_is_certified_and_opens_the_stream() {
    let cell = Cell::start("west", 1).await.unwrap();
    let maker = Maker::new().unwrap();
    let tpm = maker.tpm("n1").unwrap();
    register_cluster(&cell, "west", &maker).await.unwrap();
    let file = |name: &str, bytes: &[u8]| {
        std::fs::write(cell.file(name), bytes).unwrap();
        cell.file(name)
    };
    let path = |path: std::path::PathBuf| path.display().to_string();
    let config = Config::parse(&format!(
        "cluster = 'west'\ntrust_domain = 'west'\nfingerprint = '{}'\nservers = ['{}']\nnode_address = '127.0.0.1'\n\
         tcti = '{}'\nboot_log = '{}'\nima_log = '{}'\njoin_token_file = '{}'\nnode_key = 'tpm'\n\
         metrics_listen = '127.0.0.1:0'\nhbone_listen = '127.0.0.1:0'\ncgroup_root = '/unused'\npin_dir = '/unused'\n\
         data_dir = '/unused'\npods_dir = '/unused'\nworkload_socket = '/unused'\n",
        hex::encode(cell.fingerprint),
        cell.address(1).unwrap(),
        tpm.tcti(),
        path(file("boot_log", BOOT_LOG)),
        path(file("ima_log", IMA_LOG)),
        path(file("token", join_token(&cell, "west").await.unwrap().as_bytes())),
    ))
    .unwrap();
    let attester = Attester::open(&tpm.tcti(), &tpm.state()).unwrap();
    let trust = SharedTrust::new(Trust::Pinned(cell.trust_domain.clone(), cell.fingerprint));
    let me = enrol(&config, &attester, &Turn::default(), &Clock::default(), &trust).await.unwrap();

    let told = explain(&cell, 1, &me.node.to_string()).await.unwrap();
    let claims: serde_json::Value = serde_json::from_str(&told.attestation_result_json).unwrap();
    assert_eq!(claims["submods"]["node"]["ambit.node-key"], "tpm");
    let identity = Identity::new(Some(me.identity.clone()));
    let mut agent = Agent::open(&cell, 1, identity.clone()).await.unwrap();
    agent.asked().await.unwrap();
    // The same leaf and handle without its TPM: no signature, no connection.
    drop(tpm);
    let refusal = Agent::open(&cell, 1, identity).await.err().unwrap();
    assert!(refusal.to_string().contains("an answer of the TPM"), "{refusal}");
}

/// `bytes` with the byte after the first `at` changed.
fn changed_after(bytes: &[u8], at: &[u8]) -> Vec<u8> {
    let place = bytes.windows(at.len()).position(|window| window == at).expect("the place is in the log");
    let mut out = bytes.to_vec();
    out[place + at.len()] ^= 0x01;
    out
}

fn utf16(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_enrols_through_any_two_replicas_and_its_evidence_serves_once() {
    let cell = Cell::start("west", 3).await.unwrap();
    let maker = Maker::new().unwrap();
    let machine = Machine::new(&maker, "n1").await.unwrap();
    register_cluster(&cell, "west", &maker).await.unwrap();
    let token = join_token(&cell, "west").await.unwrap();

    let started = Instant::now();
    let begun = machine.begin(cell.anonymous(1).await.unwrap(), "west", &token).await.unwrap().unwrap();
    let mut outside_tpm = started.elapsed();
    let answer = machine.answer(&begun, &Lies::default()).await.unwrap();
    let started = Instant::now();
    let verdict = evidence(cell.anonymous(2).await.unwrap(), &answer.frames).await.unwrap().unwrap();
    outside_tpm += started.elapsed();
    println!("enrolment: {outside_tpm:?} without, {:?} in the TPM", answer.in_tpm);
    assert!(outside_tpm < ENROL_MAX, "{outside_tpm:?}");

    assert_eq!((verdict.node_id.as_str(), verdict.generation), (machine.node().as_str(), 1));
    let claims: serde_json::Value = serde_json::from_str(&verdict.attestation_result_json).unwrap();
    let claims = &claims["submods"]["node"];
    assert_eq!(claims["ambit.ek-class"], "lab");
    assert_eq!(claims["ear.status"], "warning", "a lab TPM is never affirmed as hardware");
    assert_eq!(claims["ambit.boot"]["secure_boot"], true);
    openssl_verifies(&cell, &verdict);

    // The other replicas know it, and it can call as a node.
    let listed = nodes(&cell, 3).await;
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].state.as_str(), listed[0].ek_class.as_str()), ("admitted", "lab"));
    let node = node_identity(&verdict, &answer.key).unwrap();
    let mut svid = v1::svid_client::SvidClient::new(cell.channel_as(node, 3).await.unwrap());
    let request = v1::BatchNewX509svidRequest { request_id: fresh(), items: Vec::new() };
    assert_eq!(refusal(svid.batch_new_x509svid(request).await).unwrap().code.as_str(), "bad_request");

    // The same frames again: at the replica that admitted, at the others, and at once.
    for replica in [2, 1, 3, 2] {
        let again = evidence(cell.anonymous(replica).await.unwrap(), &answer.frames).await.unwrap();
        assert_eq!(denied(again).code, "nonce_consumed", "replica {replica}");
    }
    // A second enrolment is the next generation of the same node, and its token is not asked for.
    let (second, _) = machine.enrol(&cell, 3, "west", "", &Lies::default()).await.unwrap().unwrap();
    assert_eq!((second.node_id, second.generation), (machine.node(), 2));
    assert_eq!(nodes(&cell, 1).await.len(), 1);
}

/// Policies that change between challenge and answer: those of the end judge, and the result says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_enrolment_is_judged_by_the_policies_of_its_end() {
    let cell = Cell::start("west", 1).await.unwrap();
    let maker = Maker::new().unwrap();
    let machine = Machine::new(&maker, "n1").await.unwrap();
    register_cluster(&cell, "west", &maker).await.unwrap();
    let token = join_token(&cell, "west").await.unwrap();
    let (yaml, _) = golden_policy("west", "west").unwrap();
    let other = yaml.replace("      - \"/vmlinuz console=ttyS0", "      - \"/vmlinuz quiet console=ttyS0");
    assert_ne!(yaml, other);
    let judged_once = async |policy: &str| {
        let begun = machine.begin(cell.anonymous(1).await.unwrap(), "west", &token).await.unwrap().unwrap();
        let answer = machine.answer(&begun, &Lies::default()).await.unwrap();
        apply_policy(&cell, policy, false).await.unwrap();
        evidence(cell.anonymous(1).await.unwrap(), &answer.frames).await.unwrap()
    };
    let revision = |verdict: &v1::Verdict| {
        let claims: serde_json::Value = serde_json::from_str(&verdict.attestation_result_json).unwrap();
        let node = &claims["submods"]["node"];
        (node["ambit.policy"]["version"].clone(), node["ambit.policy-revision"].as_u64().unwrap())
    };

    assert_eq!(denied(judged_once(&other).await).code, "command_line_not_allowed");
    let third = judged_once(&yaml).await.unwrap();
    let (again, _) = machine.enrol(&cell, 1, "west", "", &Lies::default()).await.unwrap().unwrap();
    assert_eq!(revision(&third), revision(&again), "by nothing else than where it began under the same");
    assert_eq!(revision(&third).0, 3);
}

/// With OpenSSL, which knows nothing of us: chain, purpose and time.
fn openssl_verifies(cell: &Cell, verdict: &v1::Verdict) {
    let [leaf, intermediate] = verdict.svid_chain_der.as_slice() else { panic!("leaf and intermediate") };
    let pem = |name: &str, der: &[u8]| {
        let path = cell.file(name);
        std::fs::write(&path, ambit_identity::keys::certificates_to_pem([der])).unwrap();
        path.display().to_string()
    };
    let (leaf, intermediate) = (pem("leaf.pem", leaf), pem("intermediate.pem", intermediate));
    let root = cell.admin_file("root.pem").display().to_string();
    let verify = ["openssl", "verify", "-x509_strict", "-purpose", "sslclient", "-CAfile", &root];
    let said = must_run(&[&verify[..], &["-untrusted", &intermediate, &leaf]].concat()).unwrap();
    assert!(said.trim().ends_with(": OK"), "{said}");
    let text = must_run(&["openssl", "x509", "-noout", "-ext", "subjectAltName", "-in", &leaf]).unwrap();
    assert!(text.contains(&format!("URI:spiffe://west/ambit/node/{}", verdict.node_id)), "{text}");
}

/// One row per lie: what the node is told, and what operators are told besides.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_lie_has_its_code_and_only_operators_learn_what_was_expected() {
    let cell = Cell::start("west", 1).await.unwrap();
    let maker = Maker::new().unwrap();
    let machine = Machine::new(&maker, "liar").await.unwrap();
    register_cluster(&cell, "west", &maker).await.unwrap();
    let token = join_token(&cell, "west").await.unwrap();

    let cmdline = changed_after(BOOT_LOG, b"kernel_cmdline: ");
    // The variable's value follows its name: Secure Boot reported as off.
    let secure_boot = changed_after(BOOT_LOG, &utf16("SecureBoot"));
    let cut = BOOT_LOG[..BOOT_LOG.len() - 200].to_vec();
    let lie = Lies::default;
    let rows: Vec<(&str, Lies, &str, &str)> = vec![
        (
            "kernel command line",
            Lies { boot_log: Some(cmdline), ..lie() },
            "boot_log_event_altered",
            "(EV_IPL) of PCR 8",
        ),
        (
            "SecureBoot variable",
            Lies { boot_log: Some(secure_boot), ..lie() },
            "boot_log_event_altered",
            "(EV_EFI_VARIABLE_DRIVER_CONFIG) of PCR 7",
        ),
        ("log cut inside an event", Lies { boot_log: Some(cut), ..lie() }, "boot_log_malformed", ""),
        ("no boot log", Lies { boot_log: Some(Vec::new()), ..lie() }, "boot_log_missing", ""),
        (
            "last events left out",
            Lies { boot_log: Some(without_last_event()), ..lie() },
            "boot_log_pcr_mismatch",
            "PCR",
        ),
        (
            "IMA entry changed",
            Lies { ima_log: Some(changed_after(IMA_LOG, b"sha256:\0")), ..lie() },
            "ima_log_mismatch",
            "IMA entry 1",
        ),
        ("another nonce", Lies { other_nonce: true, ..lie() }, "quote_nonce", ""),
        ("fewer PCRs", Lies { fewer_pcrs: true, ..lie() }, "quote_selection", ""),
    ];
    let count = rows.len();
    for (what, lies, code, diverged) in rows {
        let told = denied(machine.enrol(&cell, 1, "west", &token, &lies).await.unwrap());
        assert!(told.code.starts_with(code), "{what}: {told:?}");
        assert!(told.diverged.contains(diverged), "{what}: {told:?}");
        assert!(!told.remedy.is_empty(), "{what}");
        let known = explain(&cell, 1, &machine.node()).await.unwrap();
        let last = known.denials.last().unwrap();
        assert_eq!((&last.code, &last.diverged, &last.remedy), (&told.code, &told.diverged, &told.remedy), "{what}");
        assert!(!last.expected.is_empty() && !last.found.is_empty(), "{what}: {last:?}");
        assert_ne!(last.expected, last.found, "{what}");
        // The place may be told; digests and the like would teach an attacker what to send.
        let said = format!("{told:?}");
        let hex = |word: &&str| word.len() >= 40 && word.chars().all(|c| c.is_ascii_hexdigit());
        for word in [&last.expected, &last.found].into_iter().flat_map(|text| text.split_whitespace()).filter(hex) {
            assert!(!said.contains(word), "{what}: the node was told '{word}'");
        }
        println!("{what}: {} {}; expected {}; found {}", last.code, last.diverged, last.expected, last.found);
        assert!(known.node.is_none(), "{what}: nothing was admitted");
    }
    // Without a good HMAC nothing is written down: a stranger must not fill the log.
    let told = denied(machine.enrol(&cell, 1, "west", &token, &Lies { other_secret: true, ..lie() }).await.unwrap());
    assert_eq!(told.code, "activation_failed");
    assert_eq!(explain(&cell, 1, &machine.node()).await.unwrap().denials.len(), count);

    // Evidence that was denied is used up too.
    let begun = machine.begin(cell.anonymous(1).await.unwrap(), "west", &token).await.unwrap().unwrap();
    let answer = machine.answer(&begun, &Lies { other_nonce: true, ..lie() }).await.unwrap();
    for code in ["quote_nonce", "nonce_consumed", "nonce_consumed"] {
        assert_eq!(denied(evidence(cell.anonymous(1).await.unwrap(), &answer.frames).await.unwrap()).code, code);
    }
    // None of it burnt the token: the honest machine is admitted with it.
    let (verdict, _) = machine.enrol(&cell, 1, "west", &token, &lie()).await.unwrap().unwrap();
    assert_eq!(verdict.generation, 1);
}

/// The golden log without its last extending event.
fn without_last_event() -> Vec<u8> {
    // An event ends where a shorter prefix still parses.
    let ends = (1..2_000).map(|n| BOOT_LOG.len() - n);
    let full = ambit_lab::boot_log::parse(BOOT_LOG).unwrap().len();
    let shorter = ends.map(|end| &BOOT_LOG[..end]).find(|log| {
        ambit_lab::boot_log::parse(log).is_ok_and(|events| events.len() < full && events.last().unwrap().pcr < 10)
    });
    shorter.unwrap().to_vec()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ek_must_be_endorsed_and_expected() {
    let cell = Cell::start("west", 1).await.unwrap();
    let (maker, stranger) = (Maker::new().unwrap(), Maker::new().unwrap());
    let machine = Machine::new(&maker, "n1").await.unwrap();
    let foreign = Machine::new(&stranger, "n2").await.unwrap();
    register_cluster(&cell, "west", &maker).await.unwrap();
    register_cluster(&cell, "other", &maker).await.unwrap();
    let honest = Lies::default();
    let begin = async |machine: &Machine, cluster: &str, token: &str| {
        denied(machine.begin(cell.anonymous(1).await.unwrap(), cluster, token).await.unwrap()).code
    };
    // Each is refused at Begin: no credential is made for it.
    assert_eq!(begin(&machine, "west", "").await, "ek_not_expected");
    assert_eq!(begin(&machine, "west", "join-0000").await, "join_token_invalid");
    assert_eq!(begin(&machine, "west", &"x".repeat(100_000)).await, "join_token_invalid");
    assert_eq!(begin(&machine, "west", "../../../../etc/passwd").await, "join_token_invalid");
    assert_eq!(begin(&machine, "nowhere", "").await, "not_found");
    let token = join_token(&cell, "west").await.unwrap();
    assert_eq!(begin(&foreign, "west", &token).await, "ek_chain_untrusted");
    assert_eq!(begin(&machine, "other", &token).await, "join_token_invalid");
    let explained = explain(&cell, 1, &machine.node()).await.unwrap_err();
    assert_eq!(from_status(explained.downcast_ref().unwrap()).code.as_str(), "not_found");

    let (verdict, answer) = machine.enrol(&cell, 1, "west", &token, &honest).await.unwrap().unwrap();
    assert_eq!(verdict.generation, 1);
    assert_eq!(begin(&foreign, "west", &token).await, "join_token_used");

    // An EK on the list needs no token; one nobody listed still does.
    let listed = Machine::new(&maker, "n3").await.unwrap();
    assert_eq!(begin(&listed, "west", "").await, "ek_not_expected");
    let mut admin = NodeAttestationClient::new(cell.admin(1).await.unwrap());
    let node_ids = vec![listed.node()];
    admin.allow_ek(v1::AllowEkRequest { request_id: fresh(), cluster: "west".into(), node_ids }).await.unwrap();
    assert_eq!(listed.enrol(&cell, 1, "west", "", &honest).await.unwrap().unwrap().0.generation, 1);

    // Put out and let in again: what was certified before stays refused, on every call.
    let old = node_identity(&verdict, &answer.key).unwrap();
    let nodes = || v1::NodeSelection { request_id: fresh(), ids: vec![machine.node()], cluster: String::new() };
    assert_eq!(admin.evict_node(nodes()).await.unwrap().into_inner().nodes[0].state, "evicted");
    assert_eq!(begin(&machine, "west", "").await, "ek_not_expected");
    let token = join_token(&cell, "west").await.unwrap();
    let (again, answer) = machine.enrol(&cell, 1, "west", &token, &honest).await.unwrap().unwrap();
    assert_eq!(again.generation, 2);
    let request = || v1::BatchNewX509svidRequest { request_id: fresh(), items: Vec::new() };
    let mut as_old = v1::svid_client::SvidClient::new(cell.channel_as(old, 1).await.unwrap());
    assert_eq!(refusal(as_old.batch_new_x509svid(request()).await).unwrap().code.as_str(), "node_untrusted");
    let new = node_identity(&again, &answer.key).unwrap();
    let mut as_new = v1::svid_client::SvidClient::new(cell.channel_as(new, 1).await.unwrap());
    assert_eq!(refusal(as_new.batch_new_x509svid(request()).await).unwrap().code.as_str(), "bad_request");
    // Banned is for good.
    assert_eq!(admin.ban_node(nodes()).await.unwrap().into_inner().nodes[0].state, "banned");
    let token = join_token(&cell, "west").await.unwrap();
    let told = denied(machine.enrol(&cell, 1, "west", &token, &honest).await.unwrap());
    assert_eq!(told.code, "node_banned");
}

/// How many machines compete, and how many answers they send in all.
const MACHINES: usize = 6;
const ANSWERS: usize = 100;

/// One token, 100 answers at once over all replicas, the leader killed in between: exactly one node is admitted.
///
/// Real here: 3 ambitd processes, 6 TPMs, 100 sessions with a quote each, sent at once. Not 100 machines: the answers
/// are those of 6, so the winner may well be admitted again by its later answers (it is known then, and its token is
/// no longer asked for). What must never happen is a second *node*.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_token_admits_one_node_however_many_try_at_once() {
    let mut cell = Cell::start("west", 3).await.unwrap();
    let maker = Maker::new().unwrap();
    let mut machines = Vec::new();
    for n in 0..MACHINES {
        machines.push(Machine::new(&maker, &format!("m{n}")).await.unwrap());
    }
    register_cluster(&cell, "west", &maker).await.unwrap();
    let token = join_token(&cell, "west").await.unwrap();
    let mut prepared: Vec<(String, Answer)> = Vec::new();
    for n in 0..ANSWERS {
        let machine = &machines[n % MACHINES];
        let channel = cell.anonymous(n % 3 + 1).await.unwrap();
        let begun = machine.begin(channel, "west", &token).await.unwrap().unwrap();
        prepared.push((machine.node(), machine.answer(&begun, &Lies::default()).await.unwrap()));
    }

    let leader = cell.leader().await.unwrap();
    let mut channels = Vec::new();
    for replica in 1..=3 {
        channels.push(cell.anonymous(replica).await.unwrap());
    }
    let until = Instant::now() + Duration::from_secs(20);
    let mut calls = tokio::task::JoinSet::new();
    for (n, (node, answer)) in prepared.into_iter().enumerate() {
        let channels = channels.clone();
        calls.spawn(async move {
            let mut at = n;
            loop {
                match evidence(channels[at % 3].clone(), &answer.frames).await {
                    Ok(outcome) => return (node, outcome.map(|v| v.node_id).map_err(|d| d.code)),
                    // A dead or leaderless replica: the same answer goes to the next.
                    Err(status) => {
                        let refusal = from_status(&status);
                        assert_eq!(refusal.code.class(), Class::Unavailable, "{refusal}");
                        assert!(Instant::now() < until, "{refusal}");
                    }
                }
                at += 1;
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
    }
    // Midway: some are answered, most are not.
    let mut outcomes: Vec<(String, Result<String, String>)> = Vec::new();
    for _ in 0..10 {
        outcomes.push(calls.join_next().await.unwrap().unwrap());
    }
    cell.kill(leader).unwrap();
    while let Some(outcome) = calls.join_next().await {
        outcomes.push(outcome.unwrap());
    }
    assert_eq!(outcomes.len(), ANSWERS);
    cell.restart(leader).unwrap();
    cell.wait_for_voters().await.unwrap();

    let mut counts = BTreeMap::new();
    for (_, outcome) in &outcomes {
        *counts.entry(outcome.as_ref().map_or_else(|code| code.as_str(), |_| "admitted")).or_insert(0) += 1;
    }
    println!("{counts:?}");
    let listed = nodes(&cell, leader).await;
    assert_eq!(listed.len(), 1, "one token, one node: {listed:?}");
    let winner = &listed[0].id;
    for replica in 1..=3 {
        assert_eq!(nodes(&cell, replica).await, listed, "replica {replica}");
    }
    let verdicts: BTreeSet<&String> = outcomes.iter().filter_map(|(_, outcome)| outcome.as_ref().ok()).collect();
    assert!(verdicts.iter().all(|node| *node == winner), "{verdicts:?}");
    for (node, outcome) in &outcomes {
        let Err(code) = outcome else { continue };
        // The winner's own further answers may be out of order; one whose answer got lost with the leader is used up.
        let fits = if node == winner {
            ["nonce_consumed", "clock_step_back"].contains(&code.as_str())
        } else {
            code == "join_token_used"
        };
        assert!(fits, "{node}: {code}");
    }
}
