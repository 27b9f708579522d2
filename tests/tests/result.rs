//! What a verdict decides beyond the node itself: which entries are issued on it, and what is claimed of it, signed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_identity::SvidKey;
use ambit_proto::v1;
use ambit_proto::v1::appraisal_client::AppraisalClient;
use ambit_proto::v1::node_attestation_client::NodeAttestationClient;
use ambit_tests::cell::{Cell, fresh};
use ambit_tests::machine::{Lies, Machine, apply_policy, golden_policy, join_token, node_identity, register_cluster};
use ambit_tests::process::{binary, run};
use ambit_tests::tpm::Maker;
use serde_json::Value;
use std::collections::BTreeMap;
use tonic::transport::Channel;

/// Creates entries of `west`, each recognised by a uid and by what it asks of its node; the code of each.
async fn create(cell: &Cell, asked: &[(&str, &[String])]) -> Vec<String> {
    let entry = |(id, selectors): &(&str, &[String])| v1::Entry {
        id: (*id).to_owned(),
        spiffe_id: format!("spiffe://west/{id}"),
        cluster: "west".into(),
        selectors: selectors.to_vec(),
        ..Default::default()
    };
    let entries = asked.iter().map(entry).collect();
    let request = v1::BatchCreateEntryRequest { request_id: fresh(), entries };
    let mut client = v1::entry_registry_client::EntryRegistryClient::new(cell.admin(1).await.unwrap());
    let results = client.batch_create_entry(request).await.unwrap().into_inner().results;
    results.into_iter().map(|status| status.code).collect()
}

/// Asks for an SVID of each entry as this node; the code of each.
async fn issue(node: Channel, ids: &[&str]) -> BTreeMap<String, String> {
    let item =
        |id: &&str| v1::NewX509svid { entry_id: (*id).to_owned(), csr: SvidKey::generate().unwrap().csr().unwrap() };
    let request = v1::BatchNewX509svidRequest { request_id: fresh(), items: ids.iter().map(item).collect() };
    let results =
        v1::svid_client::SvidClient::new(node).batch_new_x509svid(request).await.unwrap().into_inner().results;
    ids.iter().map(|id| (*id).to_owned()).zip(results.into_iter().map(|r| r.code)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_entry_is_issued_only_where_the_nodes_last_verdict_shows_what_it_asks() {
    let cell = Cell::start("west", 1).await.unwrap();
    let maker = Maker::new().unwrap();
    let machine = Machine::new(&maker, "n1").await.unwrap();
    register_cluster(&cell, "west", &maker).await.unwrap();
    let token = join_token(&cell, "west").await.unwrap();

    let uid = || "unix:uid:1000".to_owned();
    let pcrs = ambit_lab::tpm::golden_pcrs(ambit_lab::tpm_wire::Bank::Sha256);
    let pcr_7 = format!("tpm:pcr:sha256:7:{}", hex::encode(&pcrs[7]));
    let other_7 = format!("tpm:pcr:sha256:7:{}", "00".repeat(32));
    let policy = |name: &str| format!("tpm:policy:{name}");
    let asked: &[(&str, &[String])] = &[
        ("plain", &[uid()]),
        ("west", &[uid(), policy("west")]),
        ("other", &[uid(), policy("other")]),
        ("ek", &[uid(), format!("tpm:ek_hash:{}", machine.node())]),
        ("stranger", &[uid(), format!("tpm:ek_hash:{}", "ab".repeat(32))]),
        ("boot", &[uid(), pcr_7.clone()]),
        ("elsewhere", &[uid(), other_7]),
        ("both", &[uid(), pcr_7, policy("west")]),
    ];
    assert_eq!(create(&cell, asked).await, vec!["ok"; asked.len()]);
    assert_eq!(create(&cell, &[("nobody", &[policy("west")])]).await, ["bad_request"], "a node is no workload");
    let ids: Vec<&str> = asked.iter().map(|(id, _)| *id).collect();
    let expected = |fitting: &[&str]| -> BTreeMap<String, String> {
        let code = |id: &&str| if fitting.contains(id) { "ok" } else { "entry_not_on_node" };
        ids.iter().map(|id| ((*id).to_owned(), code(id).to_owned())).collect()
    };

    let enrol = async |token: &str| {
        let (verdict, answer) = machine.enrol(&cell, 1, "west", token, &Lies::default()).await.unwrap().unwrap();
        cell.channel_as(node_identity(&verdict, &answer.key).unwrap(), 1).await.unwrap()
    };
    let node = enrol(&token).await;
    assert_eq!(issue(node, &ids).await, expected(&["plain", "west", "ek", "boot", "both"]));

    // The policy no longer accepts, another does: what the first one's nodes were given is theirs no more.
    let (yaml, _) = golden_policy("other", "west").unwrap();
    apply_policy(&cell, &yaml, false).await.unwrap();
    let mut policies = AppraisalClient::new(cell.admin(1).await.unwrap());
    let gone = v1::AppraisalPolicyRef { request_id: fresh(), name: "west".into() };
    policies.delete_appraisal_policy(gone).await.unwrap();
    let node = enrol("").await;
    assert_eq!(issue(node, &ids).await, expected(&["plain", "other", "ek", "boot"]));
}

/// Exit code and standard output (standard error where it failed).
fn ambit(args: &[&str]) -> (i32, String) {
    let program = binary("ambit").unwrap().display().to_string();
    let out = run(&[&[program.as_str()], args].concat()).unwrap();
    let said = if out.status.success() { out.stdout } else { out.stderr };
    (out.status.code().unwrap(), String::from_utf8(said).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_result_leaves_the_cell_signed_and_is_believed_without_it() {
    let mut cell = Cell::start("west", 3).await.unwrap();
    let maker = Maker::new().unwrap();
    let machine = Machine::new(&maker, "n1").await.unwrap();
    register_cluster(&cell, "west", &maker).await.unwrap();
    let token = join_token(&cell, "west").await.unwrap();
    machine.enrol(&cell, 1, "west", &token, &Lies::default()).await.unwrap().unwrap();

    let context = cell.admin_file("context.json").display().to_string();
    let (file, root) = (cell.file("result.json"), cell.admin_file("root.pem").display().to_string());
    let path = file.display().to_string();
    let export = ["--context", &context, "node", "result", &machine.node()[..12], "--out", &path, "-o", "json"];
    let (code, said) = ambit(&export);
    assert_eq!(code, 0, "{said}");
    let node = |said: &str| serde_json::from_str::<Value>(said).unwrap()["claims"]["submods"]["node"].clone();
    let claims = node(&said);
    for (name, value) in [
        ("ambit.node", machine.node()),
        ("ambit.cluster", "west".into()),
        ("ambit.ek-class", "lab".into()),
        ("ear.status", "warning".into()),
        ("ear.appraisal-policy-id", "west@1".into()),
    ] {
        assert_eq!(claims[name], value, "{name}");
    }
    assert_eq!(claims["ambit.boot"]["secure_boot"], true);

    // An operator's word shows in the next result at once, whichever replica is asked; the one before stays what it was.
    let (out, other) = (cell.file("banned.json"), hex::encode([7; 32]));
    let ban = v1::NodeSelection { request_id: fresh(), ids: vec![machine.node()], cluster: String::new() };
    let mut client = NodeAttestationClient::new(cell.admin(2).await.unwrap());
    client.ban_node(ban).await.unwrap();
    for number in 1..=3 {
        let mut client = NodeAttestationClient::new(cell.admin(number).await.unwrap());
        let request = v1::AttestationResultRequest { id: machine.node() };
        let reply = client.attestation_result(request).await.unwrap().into_inner();
        let key_set = (reply.key_set.as_slice(), reply.key_set_signature.as_slice());
        let exported = ambit_identity::ExportedResult::new(&cell.trust_domain, reply.jws, key_set, &reply.root_der);
        std::fs::write(&out, exported.text().unwrap()).unwrap();
        let (code, said) =
            ambit(&["node", "result", "--verify", &out.display().to_string(), "--root", &root, "-o", "json"]);
        assert_eq!(code, 0, "replica {number}: {said}");
        assert_eq!(
            (&node(&said)["ear.status"], &node(&said)["ambit.state"]),
            (&Value::from("contraindicated"), &Value::from("banned"))
        );
    }

    for number in cell.running() {
        cell.kill(number).unwrap();
    }
    let verify = |file: &str, by: &[&str]| ambit(&[&["node", "result", "--verify", file], by].concat());
    let fingerprint = hex::encode(cell.fingerprint);
    for by in [["--root", root.as_str()], ["--fingerprint", fingerprint.as_str()]] {
        let (code, said) = verify(&path, &by);
        assert_eq!(code, 0, "{said}");
        assert!(said.starts_with("signed by west, root ") && said.contains("status: warning at "), "{said}");
    }
    let (code, said) = verify(&path, &["--fingerprint", &other]);
    assert_eq!((code, said.starts_with("error[result_invalid]")), (4, true), "{said}");
    let text = std::fs::read_to_string(&file).unwrap();
    let payload = text.find("\"result\": \"").unwrap() + 200;
    let altered = format!(
        "{}{}{}",
        &text[..payload],
        if &text[payload..=payload] == "A" { "B" } else { "A" },
        &text[payload + 1..]
    );
    std::fs::write(&file, altered).unwrap();
    let (code, said) = verify(&path, &["--root", &root]);
    assert_eq!((code, said.starts_with("error[result_invalid]")), (4, true), "{said}");
}
