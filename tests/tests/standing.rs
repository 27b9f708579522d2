//! What operators say of nodes, and what is kept of their evidence: verbs, endorsements that end, policies tried against
//! what was seen, allow-lists on every replica.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_model::Refusal;
use ambit_proto::status::from_status;
use ambit_proto::v1;
use ambit_proto::v1::agent_message::Body as Up;
use ambit_proto::v1::appraisal_client::AppraisalClient;
use ambit_proto::v1::node_attestation_client::NodeAttestationClient;
use ambit_tests::agent::{Admitted, Agent, RoundLies};
use ambit_tests::cell::{Cell, fresh, refusal};
use ambit_tests::machine::{Lies, Machine, golden_policy, put_list, register_cluster};
use ambit_tests::operator::{admit, attestation_at, becomes, create_entry, node, say, svid, test_policy, within};
use ambit_tests::table::row;
use ambit_tests::tpm::Maker;
use tonic::transport::Channel;

/// What the machine is answered that enrols with what it has: `ok`, or the code.
async fn enrols(cell: &Cell, machine: &Machine, cluster: &str) -> String {
    let outcome = machine.enrol(cell, 1, cluster, "", &Lies::default()).await.unwrap();
    outcome.map_or_else(|denied| denied.code, |_| "ok".into())
}

fn code<T: std::fmt::Debug>(outcome: Result<T, Refusal>) -> String {
    outcome.map_or_else(|refusal| refusal.code.to_string(), |rows| format!("{rows:?}"))
}

async fn state(cell: &Cell, machine: &Machine) -> String {
    node(cell, &machine.node()).await.unwrap().state
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn verbs_are_about_all_nodes_named_or_none() {
    let cell = Cell::start("west", 1).await.unwrap();
    let maker = Maker::new().unwrap();
    let (a, b) = (Machine::new(&maker, "a").await.unwrap(), Machine::new(&maker, "b").await.unwrap());
    register_cluster(&cell, "west", &maker).await.unwrap();
    create_entry(&cell, "web", "west").await.unwrap();
    let (me, _) = (admit(&cell, &a, "west").await.unwrap(), admit(&cell, &b, "west").await.unwrap());
    let (ida, idb) = (a.node(), b.node());
    let mut agent = Agent::open(&cell, 1, me.identity.clone()).await.unwrap();
    agent.answer(&a, &me, &RoundLies::default()).await.unwrap();
    let trusted_ms = within("a verdict", async || Some(node(&cell, &ida).await.ok()?.last_verdict_ms)).await;

    let nobody = "0".repeat(64);
    assert_eq!(code(say(&cell, "quarantine", &[ida.clone(), nobody]).await), "not_found");
    assert_eq!(code(say(&cell, "release", &[ida.clone(), idb.clone()]).await), "bad_request");
    assert_eq!((state(&cell, &a).await.as_str(), state(&cell, &b).await.as_str()), ("admitted", "admitted"));
    assert_eq!(svid(&cell, &me, "web").await.unwrap(), "ok");

    let rows = say(&cell, "quarantine", &[ida.clone(), idb.clone()]).await.unwrap();
    assert!(rows.len() == 2 && rows.iter().all(|n| n.state == "quarantined"), "{rows:?}");
    assert_eq!(agent.ended().await.unwrap().code.as_str(), "node_quarantined");
    assert_eq!(svid(&cell, &me, "web").await.unwrap(), "node_quarantined");
    assert_eq!(enrols(&cell, &a, "west").await, "node_quarantined");

    say(&cell, "ban", std::slice::from_ref(&ida)).await.unwrap();
    assert_eq!(enrols(&cell, &a, "west").await, "node_banned");
    assert_eq!(code(say(&cell, "release", &[idb.clone(), ida.clone()]).await), "bad_request");
    assert_eq!((state(&cell, &a).await.as_str(), state(&cell, &b).await.as_str()), ("banned", "quarantined"));
    assert_eq!(code(say(&cell, "unban", &[ida.clone(), idb.clone()]).await), "bad_request");

    // Each opposite lets a new generation in, and revives nothing of the old one.
    say(&cell, "unban", std::slice::from_ref(&ida)).await.unwrap();
    say(&cell, "release", std::slice::from_ref(&idb)).await.unwrap();
    for machine in [&a, &b] {
        assert_eq!(state(&cell, machine).await, "released");
        assert_eq!(enrols(&cell, machine, "west").await, "ok");
        let now = node(&cell, &machine.node()).await.unwrap();
        assert_eq!((now.state.as_str(), now.generation), ("admitted", 2));
    }
    assert_eq!(svid(&cell, &me, "web").await.unwrap(), "node_untrusted");
    say(&cell, "evict", std::slice::from_ref(&ida)).await.unwrap();
    assert_eq!(enrols(&cell, &a, "west").await, "ek_not_expected");
    assert_eq!(admit(&cell, &a, "west").await.unwrap().generation, 3);

    // What was so then is still told.
    let at = async |at_ms: u64| attestation_at(&cell, 1, &ida, at_ms).await;
    let then = at(trusted_ms).await.unwrap();
    assert_eq!((then.state.as_str(), then.policy.as_str(), then.code.as_str()), ("trusted", "west", ""));
    // Each word of an operator began a stretch of its own; the first of them at the quarantine.
    let mut stretches = vec![at(0).await.unwrap()];
    while let Ok(before) = at(stretches.last().unwrap().since_ms - 1).await {
        stretches.push(before);
    }
    let told: Vec<String> = stretches.iter().rev().map(|s| format!("{} {}", s.state, s.code)).collect();
    let (trusted, out) = ("trusted ".to_owned(), |code: &str| format!("untrusted {code}"));
    let wanted = [trusted.clone(), out("node_quarantined"), trusted.clone(), out("node_untrusted"), trusted];
    assert_eq!(told, wanted);
    let early = at(stretches.last().unwrap().since_ms - 1).await.unwrap_err();
    assert_eq!(from_status(early.downcast_ref().unwrap()).code.as_str(), "not_found");
}

/// Admitted, attested and served; then what vouched for its EK ends by `change`.
async fn ends(cell: &Cell, machine: &Machine, me: &Admitted, why: &str, change: impl AsyncFnOnce()) {
    let mut agent = Agent::open(cell, 1, me.identity.clone()).await.unwrap();
    agent.answer(machine, me, &RoundLies::default()).await.unwrap();
    let entry = format!("web-{}", me.cluster);
    assert_eq!(svid(cell, me, &entry).await.unwrap(), "ok", "{why}");
    change().await;
    let told = agent.ended().await.unwrap();
    assert!(told.code.as_str() == "node_untrusted" && told.to_string().contains(why), "{told}");
    becomes(cell, &machine.node(), "untrusted", why).await;
    assert_eq!(svid(cell, me, &entry).await.unwrap(), "node_untrusted", "{why}");
    assert_eq!(enrols(cell, machine, &me.cluster).await, "node_untrusted", "{why}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endorsement_that_ends_ends_the_trust_it_gave() {
    let cell = Cell::start("west", 1).await.unwrap();
    let maker = Maker::new().unwrap();
    let mut machines = Vec::new();
    for name in ["listed", "rooted", "denied"] {
        machines.push(Machine::new(&maker, name).await.unwrap());
    }
    let [listed, rooted, denied] = &machines[..] else { panic!() };
    for cluster in ["west", "east"] {
        register_cluster(&cell, cluster, &maker).await.unwrap();
        create_entry(&cell, &format!("web-{cluster}"), cluster).await.unwrap();
    }
    let mut admin = NodeAttestationClient::new(cell.admin(1).await.unwrap());
    let eks = || v1::AllowEkRequest { request_id: fresh(), cluster: "west".into(), node_ids: vec![listed.node()] };
    admin.allow_ek(eks()).await.unwrap();

    let (verdict, answer) = listed.enrol(&cell, 1, "west", "", &Lies::default()).await.unwrap().unwrap();
    let me = Admitted::by(&verdict, &answer, "west").unwrap();
    let mut by = admin.clone();
    ends(&cell, listed, &me, "ek_not_expected", async || drop(by.disallow_ek(eks()).await.unwrap())).await;
    row(25, "EK taken off the allow-list while enrolled", "ek_not_expected").unwrap();

    let me = admit(&cell, rooted, "east").await.unwrap();
    let mut by = admin.clone();
    let roots = by.list_endorsements(v1::ListEndorsementsRequest { cluster: "east".into() }).await.unwrap();
    let roots = roots.into_inner().roots;
    let remove = roots.iter().map(|r| hex::encode(ambit_identity::fingerprint(&r.der))).collect();
    let change =
        v1::PutEkRootsRequest { request_id: fresh(), cluster: "east".into(), add: vec![], remove_sha256: remove };
    ends(&cell, rooted, &me, "ek_chain_untrusted", async || drop(by.put_ek_roots(change).await.unwrap())).await;
    row(25, "EK root removed while enrolled", "ek_chain_untrusted").unwrap();

    let me = admit(&cell, denied, "west").await.unwrap();
    let rule =
        v1::EkDenyRule { name: "swtpm".into(), model: "swtpm".into(), reason: "a test".into(), ..Default::default() };
    let add = v1::PutEkDenyRequest { request_id: fresh(), add: vec![rule], remove: vec![] };
    let mut by = admin.clone();
    ends(&cell, denied, &me, "ek_denied", async || drop(by.put_ek_deny(add).await.unwrap())).await;
    row(25, "model of TPM denied while enrolled", "ek_denied").unwrap();
    // Taking the rule back does not undo what it did; that takes an operator's word and a new attestation.
    let remove = v1::PutEkDenyRequest { request_id: fresh(), add: vec![], remove: vec!["swtpm".into()] };
    say(&cell, "release", &[denied.node()]).await.unwrap();
    assert_eq!(enrols(&cell, denied, "west").await, "ek_denied");
    admin.put_ek_deny(remove).await.unwrap();
    assert_eq!(enrols(&cell, denied, "west").await, "ok");
    assert_eq!(svid(&cell, &me, "web-west").await.unwrap(), "node_untrusted");
}

/// A copy of the node's key, with an address of its own: refused by every replica, whatever it has heard, and the node's own
/// stream goes on. What starts anew has a new admission, and with it the node moves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_admission_has_the_address_that_it_registered_first() {
    let cell = Cell::start("west", 3).await.unwrap();
    let maker = Maker::new().unwrap();
    let machine = Machine::new(&maker, "n1").await.unwrap();
    register_cluster(&cell, "west", &maker).await.unwrap();
    let me = admit(&cell, &machine, "west").await.unwrap();
    let mut own = Agent::open_from(&cell, 1, me.identity.clone(), "10.9.0.21").await.unwrap();
    own.answer(&machine, &me, &RoundLies::default()).await.unwrap();
    for replica in [1, 2, 3, 2] {
        let thief = Agent::open_from(&cell, replica, me.identity.clone(), "10.9.0.66").await;
        assert_eq!(thief.err().map(|r| r.code.as_str()), Some("node_address_mismatch"), "at {replica}");
    }
    let counted = |page: String| page.contains("ambit_refusals_total{code=\"node_address_mismatch\"} 2\n");
    assert!(counted(cell.metrics_page(2).unwrap()));
    own.answer(&machine, &me, &RoundLies::default()).await.unwrap();
    // The node itself, at another replica.
    let mut moved = Agent::open_from(&cell, 2, me.identity.clone(), "10.9.0.21").await.unwrap();
    moved.asked().await.unwrap();
    // Nor may a stream bring its callers elsewhere with an endpoint.
    let endpoint = v1::Endpoint {
        spiffe_id: "spiffe://west/web".into(),
        address: "10.9.1.11".into(),
        cluster: "west".into(),
        node_address: "10.9.0.66".into(),
        node: machine.node(),
        generation: 1,
    };
    moved.send(vec![Up::Endpoints(v1::EndpointReport { endpoints: vec![endpoint] })]).await;
    assert_eq!(moved.ended().await.unwrap().code.as_str(), "node_address_mismatch");
    let again = admit(&cell, &machine, "west").await.unwrap();
    let mut anew = Agent::open_from(&cell, 3, again.identity.clone(), "10.9.0.22").await.unwrap();
    anew.answer(&machine, &again, &RoundLies::default()).await.unwrap();
    let former = Agent::open_from(&cell, 3, me.identity.clone(), "10.9.0.21").await;
    assert_eq!(former.err().map(|r| r.code.as_str()), Some("svid_untrusted"));
}

fn blob(cell: &Cell, replica: usize, kind: &str, sha256: &str) -> bool {
    cell.file(&format!("r{replica}")).join("blobs").join(kind).join(sha256).is_file()
}

async fn list(cell: &Cell, cluster: &str, node: &str, on: bool) {
    let request = v1::AllowEkRequest { request_id: fresh(), cluster: cluster.into(), node_ids: vec![node.into()] };
    let mut client = NodeAttestationClient::new(cell.admin(1).await.unwrap());
    match on {
        true => client.allow_ek(request).await.unwrap(),
        false => client.disallow_ek(request).await.unwrap(),
    };
}

/// Being known is not being expected: what an operator took back while a node was out is missing when it comes again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_made_a_node_expected_must_hold_when_it_comes_again() {
    let cell = Cell::start("west", 1).await.unwrap();
    let maker = Maker::new().unwrap();
    let (listed, joined) =
        (Machine::new(&maker, "listed").await.unwrap(), Machine::new(&maker, "joined").await.unwrap());
    register_cluster(&cell, "west", &maker).await.unwrap();
    register_cluster(&cell, "east", &maker).await.unwrap();
    let id = listed.node();
    list(&cell, "west", &id, true).await;
    assert_eq!(enrols(&cell, &listed, "west").await, "ok");
    say(&cell, "quarantine", std::slice::from_ref(&id)).await.unwrap();
    list(&cell, "west", &id, false).await;
    say(&cell, "release", std::slice::from_ref(&id)).await.unwrap();
    assert_eq!(enrols(&cell, &listed, "west").await, "ek_not_expected");
    row(25, "off the allow-list while it was out, then released", "ek_not_expected").unwrap();

    let me = admit(&cell, &joined, "west").await.unwrap();
    assert_eq!(enrols(&cell, &joined, "west").await, "ok");
    let mut bare = joined.begin_request("west", "");
    bare.ek_certificate.clear();
    let begun = joined.begin_with(cell.anonymous(1).await.unwrap(), bare).await.unwrap();
    assert_eq!(begun.err().unwrap().code, "ek_chain_untrusted");
    row(22, "joined with an EK certificate, and comes again without", "ek_chain_untrusted").unwrap();

    // What changes for others in between makes nobody begin anew.
    let begun = joined.begin(cell.anonymous(1).await.unwrap(), "west", "").await.unwrap().unwrap();
    list(&cell, "west", &"7".repeat(64), true).await;
    let answer = joined.answer(&begun, &Lies::default()).await.unwrap();
    let verdict = ambit_tests::machine::evidence(cell.anonymous(1).await.unwrap(), &answer.frames).await.unwrap();
    assert_eq!(verdict.unwrap().generation, me.generation + 2);

    // Another cluster's policy refuses what this machine booted: that says nothing against it at home.
    let (yaml, _) = golden_policy("east", "east").unwrap();
    let other = yaml.replace("      - \"/vmlinuz console=ttyS0", "      - \"/vmlinuz quiet console=ttyS0");
    assert_ne!(yaml, other);
    ambit_tests::machine::apply_policy(&cell, &other, false).await.unwrap();
    list(&cell, "east", &joined.node(), true).await;
    assert_eq!(enrols(&cell, &joined, "east").await, "command_line_not_allowed");
    assert_eq!(state(&cell, &joined).await, "admitted");

    // A ban brings nobody back to mind who was forgotten.
    let id = joined.node();
    for verb in ["evict", "ban", "unban"] {
        say(&cell, verb, std::slice::from_ref(&id)).await.unwrap();
    }
    assert_eq!(enrols(&cell, &joined, "west").await, "ek_not_expected");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn policies_are_tried_against_evidence_that_every_replica_keeps() {
    let mut cell = Cell::start("west", 3).await.unwrap();
    let maker = Maker::new().unwrap();
    let machine = Machine::new(&maker, "n1").await.unwrap();
    register_cluster(&cell, "west", &maker).await.unwrap();
    let me = admit(&cell, &machine, "west").await.unwrap();
    assert_eq!(me.generation, 1);
    let why = attestation_at(&cell, 2, &machine.node(), 0).await.unwrap();
    for replica in 1..=3 {
        within("the evidence", async || blob(&cell, replica, "evidence", &why.evidence_sha256).then_some(())).await;
    }
    assert!(why.evidence_kept);

    let (golden, _) = golden_policy("west", "west").unwrap();
    let other = golden.replace("      - \"/vmlinuz console=ttyS0", "      - \"/vmlinuz quiet console=ttyS0");
    assert_ne!(golden, other);
    // The replica that admitted is gone; its evidence is not.
    cell.kill(1).unwrap();
    let judged = async |cell: &Cell, yaml: &str| {
        within("a judgement", async || test_policy(cell, 2, yaml).await.ok()?.pop()).await
    };
    let accepted = judged(&cell, &golden).await;
    assert_eq!((accepted.verdict.as_str(), accepted.node), ("accepted", machine.node()), "{}", accepted.code);
    let denied = judged(&cell, &other).await;
    assert_eq!((denied.verdict.as_str(), denied.code.as_str()), ("denied", "command_line_not_allowed"));
    assert!(denied.diverged.contains("PCR 8"), "{denied:?}");
    // Trying changes nothing.
    assert_eq!(attestation_at(&cell, 3, &machine.node(), 0).await.unwrap().state, "trusted");

    let request = v1::LearnAppraisalPolicyRequest { node: machine.node(), name: "learnt".into() };
    let mut admin = AppraisalClient::new(cell.admin(3).await.unwrap());
    let learnt = admin.learn_appraisal_policy(request).await.unwrap().into_inner();
    if !learnt.ima_list.is_empty() {
        put_list(&cell, &learnt.ima_list).await.unwrap();
    }
    assert_eq!(judged(&cell, &learnt.yaml).await.verdict, "accepted");
}

async fn put(channel: Channel, keep: &str, bytes: Vec<u8>) -> Result<tonic::Response<v1::BlobRef>, tonic::Status> {
    let mut chunks = vec![v1::BlobChunk { bytes: vec![], keep: keep.into() }];
    chunks.extend(bytes.chunks(256 * 1024).map(|c| v1::BlobChunk { bytes: c.to_vec(), keep: String::new() }));
    AppraisalClient::new(channel).put_blob(tokio_stream::iter(chunks)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn allow_lists_come_from_operators_and_reach_a_replica_that_joins_later() {
    let mut cell = Cell::start("west", 1).await.unwrap();
    let maker = Maker::new().unwrap();
    let machine = Machine::new(&maker, "n1").await.unwrap();
    register_cluster(&cell, "west", &maker).await.unwrap();
    let me = admit(&cell, &machine, "west").await.unwrap();
    let (_, list) = golden_policy("west", "west").unwrap();
    assert!(!list.is_empty());

    let admin = cell.admin(1).await.unwrap();
    let kept = put(admin.clone(), "allow-list", list.clone()).await.unwrap().into_inner();
    assert_eq!((kept.sha256.clone(), kept.bytes), (hex::encode(ambit_identity::fingerprint(&list)), list.len() as u64));
    let mut got = AppraisalClient::new(admin.clone()).get_blob(kept.clone()).await.unwrap().into_inner();
    let mut back = Vec::new();
    while let Some(chunk) = got.message().await.unwrap() {
        back.extend(chunk.bytes);
    }
    assert_eq!(back, list);
    let node = cell.channel_as(me.identity.clone(), 1).await.unwrap();
    let rows = [
        (admin.clone(), "evidence", list.clone(), "permission_denied"),
        (admin.clone(), "anything", list.clone(), "bad_request"),
        (admin.clone(), "allow-list", b"\xffno list".to_vec(), "appraisal_policy_malformed"),
        (admin.clone(), "allow-list", vec![b'\n'; 16 * 1024 * 1024 + 1], "evidence_too_large"),
        (node, "allow-list", list.clone(), "permission_denied"),
        (cell.anonymous(1).await.unwrap(), "allow-list", list.clone(), "unauthenticated"),
    ];
    for (channel, keep, bytes, code) in rows {
        let len = bytes.len();
        assert_eq!(refusal(put(channel, keep, bytes).await).unwrap().code.as_str(), code, "{len} bytes as {keep}");
    }
    let nothing = v1::BlobRef { sha256: "0".repeat(64), bytes: 0 };
    let missing = AppraisalClient::new(admin).get_blob(nothing).await;
    assert_eq!(refusal(missing).unwrap().code.as_str(), "blob_missing");

    cell.add(2).await.unwrap();
    within("the list at the new replica", async || blob(&cell, 2, "lists", &kept.sha256).then_some(())).await;
    let again = machine.enrol(&cell, 2, "west", "", &Lies::default()).await.unwrap().unwrap();
    assert_eq!(again.0.generation, 2);
}
