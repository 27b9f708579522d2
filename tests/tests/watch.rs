//! Following objects as they change: over a replica's death, from any replica, and by one who does not read.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_proto::v1::entry_registry_client::EntryRegistryClient;
use ambit_proto::v1::watch_client::WatchClient;
use ambit_proto::v1::{self, watch_event::Event};
use ambit_tests::cell::{Cell, fresh, refusal};
use std::collections::BTreeMap;
use std::time::Duration;
use tonic::Streaming;

const PATIENCE: Duration = Duration::from_secs(20);

/// What a follower knows by what it was told.
#[derive(Default)]
struct Known {
    entries: BTreeMap<String, v1::Entry>,
    revision: u64,
    /// Milliseconds, of the last `synced`.
    age_ms: u64,
    /// Events besides `synced` and `reset`, and what each reset said.
    told: usize,
    resets: Vec<String>,
}

impl Known {
    fn take(&mut self, event: v1::WatchEvent) -> bool {
        match event.event.unwrap() {
            Event::Reset(reset) => {
                self.entries.clear();
                self.resets.push(reset.why);
                return false;
            }
            Event::Synced(synced) => {
                self.age_ms = synced.age_ms;
                assert!(event.revision >= self.revision, "{} after {}", event.revision, self.revision);
                self.revision = event.revision;
                return true;
            }
            Event::Entry(entry) => drop(self.entries.insert(entry.id.clone(), entry)),
            Event::Gone(gone) => {
                assert_eq!(gone.kind, "entry");
                self.entries.remove(&gone.name);
            }
            other => panic!("{other:?}, and entries were asked for"),
        }
        self.told += 1;
        false
    }
    /// Reads up to the first `synced` that tells at least this revision.
    async fn read(&mut self, events: &mut Streaming<v1::WatchEvent>, revision: u64) {
        let read = async {
            while let Some(event) = events.message().await.unwrap() {
                if self.take(event) && self.revision >= revision {
                    return;
                }
            }
            panic!("the stream ended");
        };
        tokio::time::timeout(PATIENCE, read).await.unwrap();
    }
    fn ids(&self) -> Vec<&str> {
        self.entries.keys().map(String::as_str).collect()
    }
}

async fn watch(cell: &Cell, replica: usize, after_revision: u64) -> Streaming<v1::WatchEvent> {
    let request = v1::WatchRequest { kinds: vec!["entry".into()], after_revision, stale_ok: false };
    WatchClient::new(cell.admin(replica).await.unwrap()).watch(request).await.unwrap().into_inner()
}

/// Creates entries; the revision at which they stand. A kilobyte each, so that no stream's buffers hold many.
async fn put(cell: &Cell, ids: &[String], ttl_seconds: u32) -> u64 {
    let path = "x".repeat(1_000);
    let entries = ids.iter().map(|id| v1::Entry {
        id: id.clone(),
        spiffe_id: format!("spiffe://west/{id}/{path}"),
        cluster: "west".into(),
        selectors: vec!["unix:uid:1000".into()],
        ttl_seconds,
        ..Default::default()
    });
    let request = v1::BatchCreateEntryRequest { request_id: fresh(), entries: entries.collect() };
    let call = |channel| {
        let request = request.clone();
        async move { EntryRegistryClient::new(channel).batch_create_entry(request).await }
    };
    let answer = cell.insist(call).await.unwrap();
    assert!(answer.results.iter().all(|r| r.code == "ok"), "{:?}", answer.results);
    answer.revision
}

async fn delete(cell: &Cell, ids: &[String]) -> u64 {
    let items = ids.iter().map(|id| v1::EntryRemoval { id: id.clone(), expected_revision: 0 }).collect();
    let request = v1::BatchDeleteEntryRequest { request_id: fresh(), items };
    let call = |channel| {
        let request = request.clone();
        async move { EntryRegistryClient::new(channel).batch_delete_entry(request).await }
    };
    cell.insist(call).await.unwrap().revision
}

async fn registered(replicas: usize) -> Cell {
    let cell = Cell::start("west", replicas).await.unwrap();
    let request = v1::RegisterClusterRequest {
        request_id: fresh(),
        name: "west".into(),
        ek_root_classes: vec![],
        ek_roots_der: vec![],
        attest_interval_s: 10,
    };
    let call = |channel| {
        let request = request.clone();
        async move { v1::cluster_registry_client::ClusterRegistryClient::new(channel).register_cluster(request).await }
    };
    cell.insist(call).await.unwrap();
    cell
}

fn names(range: std::ops::Range<usize>) -> Vec<String> {
    range.map(|n| format!("e{n:05}")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_goes_on_at_another_replica_and_is_told_each_change_once_more_at_most() {
    let mut cell = registered(3).await;
    for half in [0..600, 600..1_200] {
        put(&cell, &names(half), 60).await;
    }
    let mut known = Known::default();
    let mut events = watch(&cell, 1, 0).await;
    known.read(&mut events, 1).await;
    assert_eq!((known.entries.len(), known.resets.as_slice()), (1_200, &["first".to_owned()][..]));

    let revision = delete(&cell, &names(0..1)).await;
    known.read(&mut events, revision).await;
    assert_eq!(known.entries.len(), 1_199);

    // It loses its replica, misses some changes, and goes on at each of the others.
    cell.kill(1).unwrap();
    let revision = put(&cell, &["late".to_owned()], 60).await;
    let revision = revision.max(delete(&cell, &names(1..3)).await);
    for replica in [2, 3] {
        let mut here = Known { entries: known.entries.clone(), revision: known.revision, ..Known::default() };
        let mut events = watch(&cell, replica, known.revision).await;
        here.read(&mut events, revision).await;
        assert_eq!((here.told, here.resets.len()), (3, 0), "replica {replica}: one new, two gone");
        assert_eq!(here.entries.len(), 1_198);
        assert!(here.ids().contains(&"late") && !here.ids().contains(&"e00001"));
        // Nothing new: it is told so at once.
        let mut again = Known { revision, ..Known::default() };
        again.read(&mut watch(&cell, replica, here.revision).await, here.revision).await;
        assert_eq!((again.told, again.resets.len()), (0, 0));
    }

    // A replica that was started again knows no changes, only what there is.
    cell.restart(1).unwrap();
    let mut behind = Known { entries: known.entries.clone(), ..Known::default() };
    let after = known.revision;
    let mut events = loop {
        let request = v1::WatchRequest { kinds: vec!["entry".into()], after_revision: after, stale_ok: false };
        if let Ok(channel) = cell.admin(1).await
            && let Ok(answer) = WatchClient::new(channel).watch(request).await
        {
            break answer.into_inner();
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    behind.read(&mut events, revision).await;
    assert_eq!(behind.entries.len(), 1_198);
    assert!(behind.resets.iter().all(|why| why == "behind"), "{:?}", behind.resets);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_read_holds_up_nobody_and_is_told_the_whole_anew() {
    let cell = registered(1).await;
    put(&cell, &names(0..10), 60).await;
    let (mut slow, mut quick) = (watch(&cell, 1, 0).await, watch(&cell, 1, 0).await);
    let (mut behind, mut ahead) = (Known::default(), Known::default());
    behind.read(&mut slow, 1).await;
    ahead.read(&mut quick, 1).await;

    // More changes than a replica remembers, of more entries than a stream's buffers hold.
    let mut revision = 0;
    for round in 0..6 {
        for at in (0..4_000).step_by(1_000) {
            if round > 0 {
                delete(&cell, &names(at..at + 1_000)).await;
            }
            revision = put(&cell, &names(at + 10 * usize::from(round == 0 && at == 0)..at + 1_000), 60 + round).await;
        }
        ahead.read(&mut quick, revision).await;
    }
    assert_eq!((ahead.entries.len(), ahead.resets.len()), (4_000, 1), "who reads is told each change");

    behind.read(&mut slow, revision).await;
    assert_eq!(behind.resets, ["first", "behind"]);
    assert_eq!(behind.entries, ahead.entries);
    assert!(behind.entries.values().all(|e| e.ttl_seconds == 65));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_followed_is_refused_and_an_unknown_revision_is_said() {
    let cell = registered(1).await;
    let revision = put(&cell, &names(0..2), 60).await;
    let mut client = WatchClient::new(cell.admin(1).await.unwrap());
    let request = v1::WatchRequest { kinds: vec!["pod".into()], after_revision: 0, stale_ok: false };
    let refused = refusal(client.watch(request).await).unwrap();
    assert_eq!(refused.code.as_str(), "bad_request");
    assert!(refused.expected.contains("node, entry, service, group, policy"), "{refused}");
    let mut known = Known::default();
    known.read(&mut watch(&cell, 1, revision + 1_000_000).await, 1).await;
    assert_eq!((known.resets.as_slice(), known.entries.len()), (&["unknown".to_owned()][..], 2));
}

/// The last replica of three: what it knows may be followed, and how old it is is said as it grows older.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_leader_what_is_told_says_its_age_and_nothing_older_is_told_for_news() {
    let mut cell = registered(3).await;
    let revision = put(&cell, &names(0..2), 60).await;
    let mut known = Known::default();
    let mut events = watch(&cell, 1, 0).await;
    known.read(&mut events, revision).await;
    assert!(known.age_ms < 5_000, "{}", known.age_ms);
    for replica in [2, 3] {
        cell.kill(replica).unwrap();
    }
    let mut client = WatchClient::new(cell.admin(1).await.unwrap());
    let ask = |after_revision, stale_ok| v1::WatchRequest { kinds: vec!["entry".into()], after_revision, stale_ok };

    let mut alone = Known::default();
    let mut stale = client.watch(ask(0, true)).await.unwrap().into_inner();
    alone.read(&mut stale, 1).await;
    assert_eq!(alone.entries, known.entries);
    // A stream that began with a leader says it as well, and each later word is of a greater age.
    let (age, age_alone) = (known.age_ms, alone.age_ms);
    known.read(&mut events, 1).await;
    alone.read(&mut stale, 1).await;
    assert!(
        known.age_ms > age && alone.age_ms > age_alone + 5_000,
        "{age} to {}, {age_alone} to {}",
        known.age_ms,
        alone.age_ms
    );

    // A revision that was told elsewhere is not answered with a state before it.
    for (after, stale_ok) in [(revision + 1_000_000, true), (0, false)] {
        let refused = refusal(client.watch(ask(after, stale_ok)).await).unwrap();
        assert_eq!(refused.code.as_str(), "unavailable", "{refused}");
    }
}

/// Somebody who watches while the right to is taken: what is written from then on is not told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_ends_with_the_role_or_the_certificate_that_opened_it() {
    let cell = registered(1).await;
    let context = cell.admin_file("context.json").display().to_string();
    let ambit = |args: &[&str]| {
        let program = ambit_tests::process::binary("ambit").unwrap().display().to_string();
        ambit_tests::process::must_run(&[&[program.as_str(), "--context", &context], args].concat()).unwrap();
    };
    for (name, taken, code) in [
        ("dora", &["admin", "revoke", "dora", "--all"][..], "permission_denied"),
        ("emil", &["deny", "id", "spiffe://west/ambit/admin/emil"][..], "svid_revoked"),
    ] {
        let folder = cell.file(name);
        ambit(&["admin", "grant", name, "operator"]);
        ambit(&["admin", "issue", name, "--out", &folder.display().to_string()]);
        let channel = cell.channel_as(ambit_tests::cell::admin_identity(&folder).unwrap(), 1).await.unwrap();
        let request = v1::WatchRequest { kinds: vec!["entry".into()], after_revision: 0, stale_ok: false };
        let mut events = WatchClient::new(channel).watch(request).await.unwrap().into_inner();
        let mut known = Known::default();
        let revision = put(&cell, &[format!("before-{name}")], 60).await;
        known.read(&mut events, revision).await;
        ambit(taken);
        put(&cell, &[format!("after-{name}")], 60).await;
        let ended = async {
            loop {
                match events.message().await {
                    Ok(event) => known.take(event.expect("an end that says why")),
                    Err(status) => return ambit_proto::status::from_status(&status),
                };
            }
        };
        let refused = tokio::time::timeout(PATIENCE, ended).await.unwrap();
        assert_eq!(refused.code.as_str(), code, "{refused}");
        let ids = known.ids();
        assert!(
            ids.contains(&format!("before-{name}").as_str()) && !ids.iter().any(|id| *id == format!("after-{name}")),
            "{ids:?}"
        );
    }
}

/// As an operator sees it: `ambit watch` outlives the replica it began at.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_line_goes_on_where_it_ended() {
    let mut cell = registered(3).await;
    put(&cell, &names(0..2), 60).await;
    let ambit = ambit_tests::process::binary("ambit").unwrap().display().to_string();
    let context = cell.admin_file("context.json");
    let mut known: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&context).unwrap()).unwrap();
    known["addresses"] = (1..=3).map(|n| cell.address(n).unwrap().to_string()).collect();
    std::fs::write(&context, known.to_string()).unwrap();
    let context = context.display().to_string();
    let ask = |more: &[&str]| {
        let line = [&[ambit.as_str(), "--context", &context, "watch", "entry"], more].concat();
        ambit_tests::process::must_run(&line).unwrap()
    };
    let lines = ask(&["--once", "-o", "json"]);
    let lines: Vec<serde_json::Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let words: Vec<&str> = lines.iter().map(|line| line["event"].as_str().unwrap()).collect();
    assert_eq!(words, ["reset", "entry", "entry", "synced"]);
    let after = lines[3]["revision"].as_u64().unwrap().to_string();

    let out = cell.file("watched");
    let argv = [ambit.as_str(), "--context", &context, "--timeout", "20s", "watch", "entry", "--after", &after];
    let mut watching = ambit_tests::process::Started::start(&argv, &out).unwrap();
    let says = async |what: &str| {
        let started = std::time::Instant::now();
        while !std::fs::read_to_string(&out).unwrap().contains(what) {
            assert!(started.elapsed() < PATIENCE, "no '{what}' in {}", std::fs::read_to_string(&out).unwrap());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    put(&cell, &["before".to_owned()], 60).await;
    says("entry    before").await;
    cell.kill(1).unwrap();
    put(&cell, &["after".to_owned()], 60).await;
    says("entry    after").await;
    let said = std::fs::read_to_string(&out).unwrap();
    assert!(said.contains("going on after revision") && !said.contains("reset"), "{said}");
    assert!(watching.is_alive());
}
