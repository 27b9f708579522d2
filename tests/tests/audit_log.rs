//! The audit log of cells of real processes: whole on every replica through kills, altered records named, proofs checked
//! without a cell, heads cosigned by a peer, and all of it judged by somebody else's program.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_proto::v1;
use ambit_proto::v1::audit_client::AuditClient;
use ambit_tests::cell::{Cell, fresh};
use ambit_tests::operator::within;
use ambit_tests::peering::peer;
use ambit_tests::process::{Folder, binary, free_address, must_run, run, until};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// `ambit` as the cell's administrator: exit code, standard output, standard error.
fn ambit(cell: &Cell, args: &[&str]) -> (i32, String, String) {
    let program = binary("ambit").unwrap().display().to_string();
    let context = cell.admin_file("context.json").display().to_string();
    let out = run(&[&[program.as_str(), "--context", &context], args].concat()).unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (out.status.code().unwrap(), text(out.stdout), text(out.stderr))
}

fn ok(cell: &Cell, args: &[&str]) -> String {
    let (code, out, err) = ambit(cell, args);
    assert_eq!(code, 0, "{args:?}: {out}{err}");
    out
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// The context that `ambitd init` wrote names one replica: all of them.
fn name_all(cell: &Cell) {
    let file = cell.admin_file("context.json");
    let mut context = json(&std::fs::read_to_string(&file).unwrap());
    let all: Vec<String> = (1..=cell.size()).map(|n| cell.address(n).unwrap().to_string()).collect();
    context["addresses"] = all.into();
    std::fs::write(file, context.to_string()).unwrap();
}

/// Makes `count` records.
async fn busy(cell: &Cell, count: usize) {
    for _ in 0..count {
        let request = v1::CreateReplicaTokenRequest {
            request_id: fresh(),
            replica: 7,
            address: "127.0.0.1:1".into(),
            ttl_seconds: 60,
        };
        let call = |channel| {
            let request = request.clone();
            async move { v1::membership_client::MembershipClient::new(channel).create_replica_token(request).await }
        };
        cell.insist(call).await.unwrap();
    }
}

async fn head(cell: &Cell, replica: usize) -> Option<v1::AuditHeadResponse> {
    let mut client = AuditClient::new(cell.admin(replica).await.ok()?);
    Some(client.audit_head(v1::AuditHeadRequest {}).await.ok()?.into_inner())
}

fn size(head: &v1::AuditHeadResponse) -> u64 {
    head.checkpoint.lines().nth(1).unwrap().parse().unwrap()
}

/// All replicas that run hold all records.
async fn whole(cell: &Cell) -> u64 {
    within("all replicas have the audit log whole", async || {
        let mut sizes = std::collections::BTreeSet::new();
        for replica in cell.running() {
            let head = head(cell, replica).await?;
            sizes.insert((size(&head), head.have));
        }
        match sizes.into_iter().collect::<Vec<_>>().as_slice() {
            [(size, have)] if size == have => Some(*size),
            _ => None,
        }
    })
    .await
}

/// The same, once nothing comes any more: a young cell makes keys by itself.
async fn settled(cell: &Cell) -> u64 {
    let mut last = whole(cell).await;
    loop {
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        match whole(cell).await {
            size if size == last => return size,
            size => last = size,
        }
    }
}

fn entries(cell: &Cell, replica: usize) -> PathBuf {
    cell.seat_of(replica).unwrap().data.join("audit/1/entries")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_is_whole_on_every_replica_through_kills() {
    let mut cell = Cell::start("west", 3).await.unwrap();
    name_all(&cell);
    let remembered = cell.file("head").display().to_string();
    for round in 0..4 {
        let victim = round % 3 + 1;
        busy(&cell, 20).await;
        cell.kill(victim).unwrap();
        busy(&cell, 20).await;
        cell.restart(victim).unwrap();
        cell.wait_for("three replicas", |all| all.len() == 3).await.unwrap();
        let size = whole(&cell).await;
        let said = ok(&cell, &["audit", "verify", "--checkpoint", &remembered]);
        assert!(said.contains("3 replicas") && said.contains("unwitnessed"), "{said}");
        assert!(size >= 40 * (round as u64 + 1), "{size}");
    }
    let all: Vec<Vec<u8>> = (1..=3).map(|n| std::fs::read(entries(&cell, n)).unwrap()).collect();
    assert!(all[0] == all[1] && all[1] == all[2], "the same bytes");

    // What a snapshot covers is in no log of Raft any more: who joins takes it from another replica.
    ok(&cell, &["raft", "snapshot"]);
    cell.kill(3).unwrap();
    std::fs::remove_dir_all(cell.seat_of(3).unwrap().data.join("audit")).unwrap();
    cell.restart(3).unwrap();
    cell.wait_for("three replicas", |all| all.len() == 3).await.unwrap();
    whole(&cell).await;
    ok(&cell, &["audit", "verify", "--checkpoint", &remembered]);

    // A head that is remembered and was never this log's.
    let text = std::fs::read_to_string(&remembered).unwrap();
    let root = text.lines().nth(2).unwrap().to_owned();
    std::fs::write(&remembered, text.replace(&root, "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=")).unwrap();
    let (code, _, err) = ambit(&cell, &["audit", "verify", "--checkpoint", &remembered]);
    assert!(code == 5 && err.contains("audit_mismatch"), "{code} {err}");
    let words = ok(&cell, &["audit", "search", "--act", "token.*"]);
    assert!(words.lines().all(|line| line.contains("token.create replica")), "{words}");
    assert!(words.contains("spiffe://west/ambit/admin/founder"), "{words}");
    let none = ok(&cell, &["audit", "search", "--actor", "spiffe://west/ambit/admin/nobody"]);
    assert_eq!(none, "");
}

/// A cell of one replica has nobody to ask: what its files lost, its log of Raft makes again, also where tables of later are
/// there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_that_the_files_lost_are_made_again() {
    let mut cell = Cell::start("west", 1).await.unwrap();
    let remembered = cell.file("head").display().to_string();
    busy(&cell, 40).await;
    let size = settled(&cell).await;
    ok(&cell, &["audit", "verify", "--checkpoint", &remembered]);
    for lost in [1, 3_000, u64::MAX] {
        let replica = cell.process(1).unwrap();
        must_run(&["kill", "-TERM", &replica.id().to_string()]).unwrap();
        until("a replica that ended", || (!replica.is_alive()).then_some(()));
        cell.kill(1).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(entries(&cell, 1)).unwrap();
        let len = file.metadata().unwrap().len();
        file.set_len(len.saturating_sub(lost)).unwrap();
        cell.restart(1).unwrap();
        cell.wait_for("a replica", |all| all.len() == 1).await.unwrap();
        // A replica that starts may add one of its own.
        assert!(whole(&cell).await >= size);
        assert!(std::fs::metadata(entries(&cell, 1)).unwrap().len() >= len);
        ok(&cell, &["audit", "verify", "--checkpoint", &remembered]);
    }
}

/// Of one replica's files: a record of other words, one left out, and hashes that fit the other words.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_altered_record_is_named() {
    let mut cell = Cell::start("west", 3).await.unwrap();
    name_all(&cell);
    busy(&cell, 30).await;
    let size = settled(&cell).await;
    ok(&cell, &["raft", "snapshot"]);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let n = 12;
    let file = entries(&cell, 2);
    let right = std::fs::read(&file).unwrap();
    let starts: Vec<usize> = {
        let mut at = 0;
        let next = |at: &mut usize| {
            let start = *at;
            let len = right.get(start..start + 2)?;
            *at += 2 + usize::from(u16::from_be_bytes([len[0], len[1]]));
            Some(start)
        };
        std::iter::from_fn(|| next(&mut at)).collect()
    };
    assert_eq!(starts.len() as u64, size);
    let record = &right[starts[n] + 2..starts[n + 1]];
    let done = record.windows(4).position(|w| w == b"done").unwrap();
    let mut altered = right.clone();
    altered[starts[n] + 2 + done..][..4].copy_from_slice(b"dome");
    let dropped = [&right[..starts[n]], &right[starts[n + 1]..]].concat();
    for (bytes, said) in [(altered, "record 12 was altered"), (dropped, "record 12 was dropped")] {
        cell.kill(2).unwrap();
        std::fs::write(&file, bytes).unwrap();
        cell.restart(2).unwrap();
        cell.wait_for("three replicas", |all| all.len() == 3).await.unwrap();
        whole(&cell).await;
        let (code, out, err) = ambit(&cell, &["audit", "verify"]);
        assert!(code == 5 && err.contains("audit_mismatch") && err.contains("replica 2"), "{code} {out} {err}");
        assert!(err.contains(said), "{err}");
    }
    // With all hashes made to fit another replica's tell the record.
    cell.kill(2).unwrap();
    let mut altered = right.clone();
    altered[starts[n] + 2 + done..][..4].copy_from_slice(b"dome");
    std::fs::write(&file, &altered).unwrap();
    let hashes = file.with_file_name("hashes-0");
    let mut kept = std::fs::read(&hashes).unwrap();
    let forged = ambit_audit_leaf(&altered[starts[n] + 2..starts[n + 1]]);
    kept[32 * n..32 * n + 32].copy_from_slice(&forged);
    std::fs::write(&hashes, kept).unwrap();
    cell.restart(2).unwrap();
    cell.wait_for("three replicas", |all| all.len() == 3).await.unwrap();
    whole(&cell).await;
    let (code, _, err) = ambit(&cell, &["audit", "verify"]);
    assert!(code == 5 && err.contains("replica 2: record 12 was altered"), "{code} {err}");
}

/// RFC 6962, by hand.
fn ambit_audit_leaf(bytes: &[u8]) -> [u8; 32] {
    use sha2::Digest;
    sha2::Sha256::digest([&[0], bytes].concat()).into()
}

/// The root of RFC 6962 section 2.1, by hand.
fn root_of(records: &[Vec<u8>]) -> Vec<u8> {
    use sha2::Digest;
    match records {
        [one] => ambit_audit_leaf(one).to_vec(),
        all => {
            let mut k = 1;
            while k * 2 < all.len() {
                k *= 2;
            }
            sha2::Sha256::digest([&[1u8], root_of(&all[..k]).as_slice(), &root_of(&all[k..])].concat()).to_vec()
        }
    }
}

/// What a cell begins anew has a log of its own, which says what the one before was; its records stay where they are.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_incarnation_begins_a_log_of_its_own() {
    let mut cell = Cell::start("west", 3).await.unwrap();
    busy(&cell, 10).await;
    let size = settled(&cell).await;
    let remembered = cell.file("head").display().to_string();
    ok(&cell, &["audit", "verify", "--checkpoint", &remembered]);
    for replica in 1..=3 {
        cell.kill(replica).unwrap();
    }
    let out = cell.seat_of(1).unwrap().ambitd("recover", &["--i-accept-the-loss-of", "2,3"]).unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    cell.forget_others().unwrap();
    cell.restart(1).unwrap();
    let begun = within("a log of the incarnation", async || head(&cell, 1).await).await;
    assert!(begun.checkpoint.starts_with("west/ambit/audit/2\n"), "{}", begun.checkpoint);
    let first = ok(&cell, &["audit", "search", "--act", "audit.begin", "-o", "json"]);
    let first = json(first.lines().next().unwrap());
    let facts = &first["record"]["facts"];
    assert_eq!((&first["n"], &facts["before_epoch"]), (&0.into(), &"1".into()));
    assert_eq!(facts["before_size"], size.to_string());
    let bytes = std::fs::read(entries(&cell, 1)).unwrap();
    let (mut records, mut rest) = (Vec::new(), bytes.as_slice());
    while let [a, b, after @ ..] = rest {
        let (record, after) = after.split_at(usize::from(u16::from_be_bytes([*a, *b])));
        records.push(record.to_vec());
        rest = after;
    }
    assert_eq!(facts["before_root"], hex::encode(root_of(&records)));
    let (code, _, err) = ambit(&cell, &["audit", "verify", "--checkpoint", &remembered]);
    assert!(code == 5 && err.contains("another incarnation"), "{code} {err}");
    ok(&cell, &["audit", "verify"]);
}

/// A certificate of this cell, in its file.
fn minted(cell: &Cell, name: &str) -> PathBuf {
    let out = cell.file(name);
    std::fs::create_dir_all(&out).unwrap();
    let folder = out.display().to_string();
    ok(cell, &["svid", "mint", &format!("spiffe://west/{name}"), "--out", &folder]);
    out.join("svid.pem")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_issuance_is_proved_without_a_cell_and_witnessed_by_a_peer() {
    let (west, east) = tokio::join!(Cell::start("west", 1), Cell::start("east", 1));
    let (mut west, east) = (west.unwrap(), east.unwrap());
    let (web, db) = (minted(&west, "web"), minted(&west, "db"));
    peer(&west, &east).await.unwrap();
    let by = format!("east={}", hex::encode(east.fingerprint));
    within("a cosignature", async || {
        let head = head(&west, 1).await?;
        head.cosigned.first().is_some_and(|c| c.note.lines().nth(1) == head.checkpoint.lines().nth(1)).then_some(())
    })
    .await;
    let said = ok(&west, &["audit", "verify", "--witness", &by]);
    assert!(said.contains("witnessed by east"), "{said}");
    assert!(ok(&west, &["audit", "verify"]).contains("unwitnessed"), "a peer that nobody pinned");
    let (code, _, err) = ambit(&west, &["audit", "verify", "--witness", &format!("east={}", "00".repeat(32))]);
    assert!(code == 4 && err.contains("fingerprint_mismatch"), "{code} {err}");
    let (_, _, notes) = ambit(&east, &["audit", "status"]);
    assert!(notes.contains("cosigned here: west/ambit/audit/1"), "{notes}");

    let file = west.file("proof.json").display().to_string();
    ok(&west, &["audit", "prove", &web.display().to_string(), "--out", &file]);
    west.kill(1).unwrap();
    let root = hex::encode(west.fingerprint);
    let (web, db) = (web.display().to_string(), db.display().to_string());
    let check = ["audit", "verify", "--proof", &file, "--fingerprint", &root];
    let said = ok(&west, &[&check[..], &["--certificate", &web, "--witness", &by]].concat());
    assert!(said.contains("svid.mint spiffe://west/web done") && said.contains("witnessed: east at"), "{said}");
    let said = ok(&west, &[&check[..], &["--certificate", &web]].concat());
    assert!(said.contains("unwitnessed"), "{said}");
    let (code, _, err) = ambit(&west, &[&check[..], &["--certificate", &db]].concat());
    assert!(code == 5 && err.contains("audit_mismatch"), "{code} {err}");
    let (code, _, err) = ambit(&west, &["audit", "verify", "--proof", &file, "--fingerprint", &"00".repeat(32)]);
    assert!(code == 4 && err.contains("fingerprint_mismatch"), "{code} {err}");
    let text = std::fs::read_to_string(&file).unwrap();
    for (from, to) in [("spiffe://west/web", "spiffe://west/wen"), ("index ", "index 1"), ("audit/1\\n", "audit/2\\n")]
    {
        assert!(text.contains(from), "{from} in {text}");
        std::fs::write(&file, text.replacen(from, to, 1)).unwrap();
        let (code, _, err) = ambit(&west, &check);
        assert!(code == 5 && err.contains("audit_mismatch"), "{from}: {code} {err}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_are_followed_and_exported() {
    let cell = Cell::start("west", 1).await.unwrap();
    busy(&cell, 5).await;
    let out = cell.file("events").display().to_string();
    ok(&cell, &["audit", "export", "--act", "token.create", "--out", &out]);
    let events: Vec<Value> = std::fs::read_to_string(&out).unwrap().lines().map(json).collect();
    assert_eq!(events.len(), 5);
    for event in &events {
        assert_eq!((&event["specversion"], &event["type"]), (&"1.0".into(), &"com.ambit.audit.token.create".into()));
        assert_eq!(event["data"]["actor"]["user"]["name"], "spiffe://west/ambit/admin/founder");
        assert_eq!(event["data"]["class_uid"], 3004);
    }
    let said = ok(&cell, &["audit", "search", "--act", "audit.export"]);
    assert!(said.contains("act=token.create") && said.lines().count() == 1, "{said}");

    let channel = cell.admin(1).await.unwrap();
    let wanted = v1::WatchAuditRequest { follow: true, act: "token.*".into(), ..Default::default() };
    let mut stream = AuditClient::new(channel).watch_audit(wanted).await.unwrap().into_inner();
    let mut next = async || {
        let record = tokio::time::timeout(Duration::from_secs(10), stream.message()).await.unwrap().unwrap().unwrap();
        json(&String::from_utf8(record.record).unwrap())["act"].as_str().unwrap().to_owned()
    };
    for _ in 0..5 {
        assert_eq!(next().await, "token.create");
    }
    busy(&cell, 1).await;
    assert_eq!(next().await, "token.create");
}

/// The environment that `cargo xtask deps` makes of tests/interop/requirements.txt.
fn interop(program: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("interop");
    let path = folder.join("bin").join(program);
    assert!(path.exists(), "{}: run `cargo xtask deps` first", path.display());
    path
}

/// PyPI's aics-tlog, which shares nothing with us but the standards: heads, tiles, inclusion and consistency.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_third_party_verifies_the_log() {
    let (west, east) = tokio::join!(Cell::start("west", 1), Cell::start("east", 1));
    let (west, east) = (west.unwrap(), east.unwrap());
    peer(&west, &east).await.unwrap();
    let channel = west.admin(1).await.unwrap();
    let mut client = AuditClient::new(channel).max_decoding_message_size(64 << 20);
    let mut old = String::new();
    let mut told = serde_json::Map::new();
    for count in [7, 290] {
        busy(&west, count).await;
        let head = within("a cosignature", async || {
            let head = head(&west, 1).await?;
            head.cosigned
                .first()
                .is_some_and(|c| c.note.lines().nth(1) == head.checkpoint.lines().nth(1))
                .then_some(head)
        })
        .await;
        let size = size(&head);
        let mut records = Vec::new();
        while (records.len() as u64) < size {
            let request = v1::ReadAuditRequest { from: records.len() as u64, to: size, size: 0, epoch: 0 };
            records.extend(client.read_audit(request).await.unwrap().into_inner().records);
        }
        let mut inclusion = Vec::new();
        for n in [0, 3, size / 2, size - 1] {
            let what = Some(v1::prove_audit_request::What::N(n));
            let old_size = if old.is_empty() { 0 } else { old.lines().nth(1).unwrap().parse().unwrap() };
            let proof = client.prove_audit(v1::ProveAuditRequest { what, old_size }).await.unwrap().into_inner();
            let path: Vec<String> = proof.inclusion.iter().map(hex::encode).collect();
            let grown: Vec<String> = proof.consistency.iter().map(hex::encode).collect();
            let checkpoint = proof.head.unwrap().checkpoint;
            inclusion.push(serde_json::json!({
                "n": n, "record": hex::encode(&proof.record), "path": path, "grown": grown, "checkpoint": checkpoint,
            }));
        }
        let keys = |set: &v1::KeySet, root: &[u8], td: &str| {
            let td = td.parse().unwrap();
            let set = ambit_identity::KeySet::verify(&td, root, &set.statement, &set.signature).unwrap();
            set.keys().iter().map(hex::encode).collect::<Vec<_>>()
        };
        let cosigned = &head.cosigned[0];
        told.insert(
            if old.is_empty() { "first" } else { "second" }.into(),
            serde_json::json!({
                "note": cosigned.note,
                "records": records.iter().map(hex::encode).collect::<Vec<_>>(),
                "keys": keys(head.key_set.as_ref().unwrap(), &head.root_der, "west"),
                "witness": keys(cosigned.key_set.as_ref().unwrap(), &cosigned.root_der, "east"),
                "proofs": inclusion,
                "old": old,
            }),
        );
        old = head.checkpoint;
    }
    let file = west.file("told.json");
    std::fs::write(&file, Value::Object(told).to_string()).unwrap();
    let script = ambit_tests::root().unwrap().join("tests/interop/audit.py").display().to_string();
    let (python, file) = (interop("python").display().to_string(), file.display().to_string());
    let out = run(&[&python, &script, &file]).unwrap();
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{said}{}", String::from_utf8_lossy(&out.stderr));
    assert!(said.contains("8 inclusions, 4 consistencies, 2 checkpoints, 2 cosignatures, 12 lies refused"), "{said}");
}

/// Outsiders get the head and the hashes where the configuration says so, and no record.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outsiders_see_that_the_log_grows_and_not_what_is_in_it() {
    let (shown, hidden) = (free_address().unwrap(), free_address().unwrap());
    let endpoint =
        |at, audit| format!("[bundle_endpoint]\nlisten = \"{at}\"\nprofile = \"https_spiffe\"\naudit = {audit}\n");
    let west = Cell::configured(Folder::new().unwrap(), "west", 1, &endpoint(shown, true)).await.unwrap();
    let east = Cell::configured(Folder::new().unwrap(), "east", 1, &endpoint(hidden, false)).await.unwrap();
    busy(&west, 20).await;
    settled(&west).await;
    let head = head(&west, 1).await.unwrap();
    let size = size(&head);
    let fetch = |at: std::net::SocketAddr, path: &str| {
        let url = format!("https://{at}/audit/1/{path}");
        let out = run(&["curl", "--silent", "--insecure", "--fail", "--max-time", "10", &url]).unwrap();
        out.status.success().then_some(out.stdout)
    };
    assert_eq!(fetch(shown, "checkpoint").unwrap(), head.checkpoint.as_bytes());
    let request = v1::ReadAuditRequest { from: 0, to: size, size: 0, epoch: 0 };
    let read = AuditClient::new(west.admin(1).await.unwrap()).read_audit(request).await.unwrap().into_inner();
    let hashes: Vec<u8> = read.records.iter().flat_map(|record| ambit_audit_leaf(record)).collect();
    assert_eq!(fetch(shown, &format!("tile/0/000.p/{size}")).unwrap(), hashes);
    for path in
        [format!("tile/0/000.p/{}", size + 1), format!("tile/entries/000.p/{size}"), "tile/0/0".into(), "x".into()]
    {
        assert!(fetch(shown, &path).is_none(), "{path}");
    }
    assert!(fetch(hidden, "checkpoint").is_none() && east.size() == 1);
}
