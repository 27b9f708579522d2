//! Writes against a cell of real replicas: exactly once, and none lost with the leader.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_model::refusal::Class;
use ambit_proto::status::from_status;
use ambit_proto::v1;
use ambit_proto::v1::entry_registry_client::EntryRegistryClient;
use ambit_tests::cell::{Cell, fresh};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tonic::transport::Channel;

/// Writes of the second test, and how many are acknowledged before the leader dies.
const WRITES: usize = 300;
const BEFORE_DEATH: usize = 100;
/// Writers at once.
const WRITERS: usize = 4;
const PATIENCE: Duration = Duration::from_secs(30);

async fn register(cell: &Cell) {
    let request = v1::RegisterClusterRequest { request_id: fresh(), name: "west".into(), ..Default::default() };
    let call = |channel| {
        let request = request.clone();
        async move { v1::cluster_registry_client::ClusterRegistryClient::new(channel).register_cluster(request).await }
    };
    cell.insist(call).await.unwrap();
}

fn creation(id: &str) -> v1::BatchCreateEntryRequest {
    let entry = v1::Entry {
        id: id.into(),
        spiffe_id: format!("spiffe://west/{id}"),
        cluster: "west".into(),
        selectors: vec!["unix:uid:1000".into()],
        ..Default::default()
    };
    v1::BatchCreateEntryRequest { request_id: fresh(), entries: vec![entry] }
}

/// What one creation was answered: `ok`, or an item's code, or the code of the whole request.
async fn create(channel: Channel, request: v1::BatchCreateEntryRequest) -> String {
    match EntryRegistryClient::new(channel).batch_create_entry(request).await {
        Ok(answer) => answer.into_inner().results.remove(0).code,
        Err(status) => from_status(&status).code.to_string(),
    }
}

async fn entries(cell: &Cell, replica: usize) -> BTreeSet<String> {
    let mut client = EntryRegistryClient::new(cell.admin(replica).await.unwrap());
    let listed = client.list_entries(v1::ListEntriesRequest::default()).await.unwrap().into_inner().entries;
    let ids: BTreeSet<String> = listed.iter().map(|e| e.id.clone()).collect();
    assert_eq!(ids.len(), listed.len(), "an entry twice");
    ids
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_request_id_has_one_effect_through_all_replicas_at_once() {
    let cell = Cell::start("west", 3).await.unwrap();
    register(&cell).await;
    let mut channels = Vec::new();
    for replica in 1..=3 {
        channels.push(cell.admin(replica).await.unwrap());
    }
    for round in 0..20 {
        let request = creation(&format!("e{round}"));
        let calls = channels.iter().cycle().take(9).map(|c| tokio::spawn(create(c.clone(), request.clone())));
        for call in calls.collect::<Vec<_>>() {
            // A second effect would be refused: the entry exists.
            assert_eq!(call.await.unwrap(), "ok", "round {round}");
        }
        // The same creation as a new request is another matter, and the same id for another creation is an error.
        let again = v1::BatchCreateEntryRequest { request_id: fresh(), ..request.clone() };
        assert_eq!(create(channels[round % 3].clone(), again).await, "already_exists");
        let reused = v1::BatchCreateEntryRequest { request_id: request.request_id, ..creation("another") };
        assert_eq!(create(channels[round % 3].clone(), reused).await, "request_id_reused");
    }
    for replica in 1..=3 {
        assert_eq!(entries(&cell, replica).await.len(), 20, "replica {replica}");
    }
    for bad in [vec![], vec![1; 15], vec![0; 16], vec![1; 17]] {
        let request = v1::BatchCreateEntryRequest { request_id: bad, ..creation("bad") };
        assert_eq!(create(channels[0].clone(), request).await, "bad_request");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_acknowledged_write_is_lost_or_doubled_when_the_leader_dies() {
    let mut cell = Cell::start("west", 3).await.unwrap();
    register(&cell).await;
    let leader = cell.leader().await.unwrap();
    let mut channels = Vec::new();
    for replica in 1..=3 {
        channels.push(cell.admin(replica).await.unwrap());
    }
    let (next, acknowledged) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..WRITERS {
        let (channels, next, acknowledged) = (channels.clone(), next.clone(), acknowledged.clone());
        writers.spawn(async move {
            let (mut at, mut retried) = (writer, 0usize);
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                if n >= WRITES {
                    return retried;
                }
                let (request, until) = (creation(&format!("w{n}")), Instant::now() + PATIENCE);
                loop {
                    let code = create(channels[at % 3].clone(), request.clone()).await;
                    if code == "ok" {
                        break;
                    }
                    // `already_exists` here would be a second effect of one request.
                    let passing = ambit_model::Code::from_text(&code).is_some_and(|c| c.class() == Class::Unavailable);
                    assert!(passing && Instant::now() < until, "w{n}: {code}");
                    (at, retried) = (at + 1, retried + 1);
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                acknowledged.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    while acknowledged.load(Ordering::Relaxed) < BEFORE_DEATH {
        assert!(writers.try_join_next().is_none(), "a writer ended early");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    cell.kill(leader).unwrap();
    let killed = Instant::now();
    let mut retried = 0;
    while let Some(writer) = writers.join_next().await {
        retried += writer.unwrap();
    }
    println!("{WRITES} writes, {retried} retries, done {:?} after the leader's death", killed.elapsed());
    assert!(retried > 0, "the leader's death went unnoticed: it came too late to prove anything");

    let wanted: BTreeSet<String> = (0..WRITES).map(|n| format!("w{n}")).collect();
    for replica in cell.running() {
        assert_eq!(entries(&cell, replica).await, wanted, "replica {replica}");
    }
    // The dead one comes back, catches up, and holds the very same state.
    cell.restart(leader).unwrap();
    cell.wait_for_voters().await.unwrap();
    assert_eq!(entries(&cell, leader).await, wanted);
    cell.wait_for("equal digests at one index", |all| {
        all.iter().all(|s| s.applied_index == all[0].applied_index && s.digest == all[0].digest)
    })
    .await
    .unwrap();
}

/// What the first replica committed only it can sign; whoever retries elsewhere gets a certificate all the same, and two
/// retries at one replica get the same one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_retried_at_another_replica_is_issued_there() {
    let cell = Cell::start("west", 3).await.unwrap();
    let csr = ambit_identity::SvidKey::generate().unwrap().csr().unwrap();
    let request = v1::RenewAdminRequest { request_id: fresh(), csr };
    let before = issued(&cell).await;
    let mut answers = Vec::new();
    for replica in [1, 2, 3, 2] {
        let mut client = v1::svid_client::SvidClient::new(cell.admin(replica).await.unwrap());
        answers.push(client.renew_admin(request.clone()).await.unwrap().into_inner());
    }
    let leaves: BTreeSet<&[u8]> = answers.iter().map(|a| a.chain_der[0].as_slice()).collect();
    assert_eq!(leaves.len(), 4, "signed anew each time");
    assert_eq!(answers[1].not_after_ms, answers[3].not_after_ms);
    assert_eq!(issued(&cell).await - before, 3, "one for each replica that was asked");
}

async fn issued(cell: &Cell) -> usize {
    let mut client = v1::svid_client::SvidClient::new(cell.admin(1).await.unwrap());
    client.list_issued(v1::ListIssuedRequest { limit: 100 }).await.unwrap().into_inner().issued.len()
}

/// Two who change one entry: the second is told that the first was there; lists are filtered and come in pages.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn entries_are_updated_by_revision_and_listed_by_page() {
    let cell = Cell::start("west", 1).await.unwrap();
    register(&cell).await;
    let mut client = EntryRegistryClient::new(cell.admin(1).await.unwrap());
    for n in 0..25 {
        let mut request = creation(&format!("e{n:02}"));
        if n % 5 == 0 {
            request.entries[0].selectors.push("cgroup:web".into());
        }
        assert_eq!(create(cell.admin(1).await.unwrap(), request).await, "ok");
    }
    let read = client.get_entry(v1::GetEntryRequest { id: "e03".into() }).await.unwrap().into_inner();
    assert!(read.revision > 0);
    let update = |ttl_seconds, expected_revision, create| v1::BatchUpdateEntryRequest {
        request_id: fresh(),
        items: vec![v1::EntryUpdate {
            entry: Some(v1::Entry { ttl_seconds, ..read.clone() }),
            expected_revision,
            create,
        }],
    };
    let code = async |client: &mut EntryRegistryClient<Channel>, request| match client.batch_update_entry(request).await
    {
        Ok(answer) => answer.into_inner().results.remove(0).code,
        Err(status) => from_status(&status).code.to_string(),
    };
    assert_eq!(code(&mut client, update(120, read.revision, false)).await, "ok");
    assert_eq!(code(&mut client, update(180, read.revision, false)).await, "stale_revision");
    assert_eq!(code(&mut client, update(180, read.revision, true)).await, "bad_request");
    let now = client.get_entry(v1::GetEntryRequest { id: "e03".into() }).await.unwrap().into_inner();
    assert_eq!((now.ttl_seconds, now.revision > read.revision), (120, true));

    // One item that cannot be read, and one that is not as expected, do not take the others along.
    let codes = |answer: v1::BatchEntryResponse| answer.results.into_iter().map(|r| (r.id, r.code)).collect::<Vec<_>>();
    let told = |all: &[(&str, &str)]| all.iter().map(|(id, code)| ((*id).into(), (*code).into())).collect::<Vec<_>>();
    let mut mixed = creation("m1");
    mixed.entries.extend(creation("M 2").entries.into_iter().chain(creation("m3").entries));
    let answer = client.batch_create_entry(mixed).await.unwrap().into_inner();
    assert_eq!(codes(answer), told(&[("m1", "ok"), ("M 2", "bad_request"), ("m3", "ok")]));
    let removal = |id: &str, expected_revision| v1::EntryRemoval { id: id.into(), expected_revision };
    let delete = |items| v1::BatchDeleteEntryRequest { request_id: fresh(), items };
    let items = vec![removal("m1", 0), removal("m1", 0), removal("m3", 1), removal("M 2", 0), removal("m9", 1)];
    let answer = client.batch_delete_entry(delete(items)).await.unwrap().into_inner();
    let outcomes =
        [("m1", "ok"), ("m1", "not_found"), ("m3", "stale_revision"), ("M 2", "bad_request"), ("m9", "not_found")];
    assert_eq!(codes(answer), told(&outcomes));
    let m3 = client.get_entry(v1::GetEntryRequest { id: "m3".into() }).await.unwrap().into_inner();
    let answer = client.batch_delete_entry(delete(vec![removal("m3", m3.revision)])).await.unwrap().into_inner();
    assert_eq!(codes(answer), told(&[("m3", "ok")]));
    let answer = client.batch_delete_entry(delete(vec![removal("M 2", 0)])).await.unwrap().into_inner();
    assert_eq!((answer.revision, codes(answer)), (0, told(&[("M 2", "bad_request")])));

    let mut page = v1::ListEntriesRequest { page_size: 10, ..Default::default() };
    let mut seen = Vec::new();
    let mut pages = 0;
    loop {
        let answer = client.list_entries(page.clone()).await.unwrap().into_inner();
        seen.extend(answer.entries.into_iter().map(|e| e.id));
        pages += 1;
        if answer.next_after_id.is_empty() {
            break;
        }
        page.after_id = answer.next_after_id;
    }
    assert_eq!((seen.len(), pages), (25, 3));
    let ids = async |client: &mut EntryRegistryClient<Channel>, request| {
        let listed = client.list_entries(request).await.unwrap().into_inner().entries;
        listed.into_iter().map(|e| e.id).collect::<Vec<_>>()
    };
    let web = v1::ListEntriesRequest { selectors: vec!["cgroup:web".into()], page_size: 4, ..Default::default() };
    assert_eq!(ids(&mut client, web).await, ["e00", "e05", "e10", "e15"]);
    let one = v1::ListEntriesRequest { spiffe_id: "spiffe://west/e07".into(), ..Default::default() };
    assert_eq!(ids(&mut client, one).await, ["e07"]);
    let all = v1::ListEntriesRequest { spiffe_id: "spiffe://west/*".into(), ..Default::default() };
    assert_eq!(ids(&mut client, all).await.len(), 25);
    let none = v1::ListEntriesRequest { cluster: "east".into(), ..Default::default() };
    assert!(ids(&mut client, none).await.is_empty());
    let bad = v1::ListEntriesRequest { spiffe_id: "west/*".into(), ..Default::default() };
    assert_eq!(from_status(&client.list_entries(bad).await.unwrap_err()).code.as_str(), "bad_request");
}
