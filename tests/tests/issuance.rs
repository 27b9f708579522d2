//! SVIDs from a cell of real replicas: tokens judged by software that nobody here wrote, entries' names and ends, budgets,
//! what administrators mint, and where the key of the tokens lies.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_identity::wrap::Purpose;
use ambit_identity::{JwtTrust, SvidKey, verify_jwt};
use ambit_model::{JwtAuthority, ReplicaId, Stamp};
use ambit_proto::status::from_status;
use ambit_proto::v1;
use ambit_proto::v1::bundle_registry_client::BundleRegistryClient;
use ambit_proto::v1::entry_registry_client::EntryRegistryClient;
use ambit_proto::v1::svid_client::SvidClient;
use ambit_tests::agent::{Admitted, Attending};
use ambit_tests::cell::{Cell, fresh};
use ambit_tests::machine::{Machine, register_cluster};
use ambit_tests::operator::{admit, create_entry, svid, within};
use ambit_tests::process::{must_run, run};
use ambit_tests::tpm::Maker;
use ambitd::raft::{Options, rebase};
use ambitd::replica::files::Files;
use base64::Engine as _;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const TD: &str = "west";

async fn put(cell: &Cell, entry: v1::Entry) -> String {
    let base = v1::Entry {
        spiffe_id: format!("spiffe://{TD}/{}", entry.id),
        cluster: TD.to_owned(),
        selectors: vec!["unix:uid:1000".to_owned()],
        ..entry
    };
    let items = vec![v1::EntryUpdate { entry: Some(base), expected_revision: 0, create: true }];
    let request = v1::BatchUpdateEntryRequest { request_id: fresh(), items };
    let call = |channel| {
        let request = request.clone();
        async move { EntryRegistryClient::new(channel).batch_update_entry(request).await }
    };
    cell.insist(call).await.map_or_else(|r| r.code.to_string(), |answer| answer.results[0].code.clone())
}

/// A token for an entry, asked for at one replica; or the code.
async fn token(
    cell: &Cell,
    me: &Admitted,
    replica: usize,
    entry: &str,
    audience: &[&str],
) -> Result<v1::NewJwtsvidResponse, String> {
    let audience = audience.iter().map(|one| (*one).to_owned()).collect();
    let request = v1::NewJwtsvidRequest { request_id: fresh(), entry_id: entry.to_owned(), audience };
    let channel = cell.channel_as(me.identity.clone(), replica).await.unwrap();
    let answer = SvidClient::new(channel).new_jwtsvid(request).await;
    answer.map(tonic::Response::into_inner).map_err(|s| from_status(&s).code.to_string())
}

async fn keys(cell: &Cell, replica: usize) -> Vec<v1::JwtAuthority> {
    let mut client = BundleRegistryClient::new(cell.admin(replica).await.unwrap());
    let request = v1::GetBundleRequest { trust_domain: TD.to_owned() };
    client.get_bundle(request).await.unwrap().into_inner().jwt_authorities
}

fn now() -> Stamp {
    let ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis();
    Stamp(u64::try_from(ms).unwrap())
}

/// What PyJWT says of a token: its claims as JSON, or the name of the exception.
fn pyjwt(token: &str, spki: &[u8], audience: &str) -> String {
    const JUDGE: &str = "
import base64, json, sys, jwt
from cryptography.hazmat.primitives.serialization import load_der_public_key
key = load_der_public_key(bytes.fromhex(sys.argv[2]))
try:
    print(json.dumps(jwt.decode(sys.argv[1], key, algorithms=['ES256'], audience=sys.argv[3],
                                options={'require': ['sub', 'aud', 'exp', 'iat', 'jti']}, leeway=2), sort_keys=True))
except jwt.InvalidTokenError as e:
    print(type(e).__name__)
";
    must_run(&["/usr/bin/python3", "-c", JUDGE, token, &hex::encode(spki), audience]).unwrap().trim().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_replica_signs_tokens_that_others_verify_and_none_holds_the_key_in_plain() {
    let mut cell = Cell::start(TD, 3).await.unwrap();
    let maker = Maker::new().unwrap();
    let machine = Arc::new(Machine::new(&maker, "m").await.unwrap());
    register_cluster(&cell, TD, &maker).await.unwrap();
    create_entry(&cell, "web", TD).await.unwrap();
    let me = admit(&cell, &machine, TD).await.unwrap();
    let _attending = Attending::start(&cell, machine.clone(), me.clone()).unwrap();
    // Replicas that joined after the authority was made are wrapped to by the leader's next tick.
    let mut tokens = Vec::new();
    for replica in 1..=3 {
        let one = within("a token of each replica", async || token(&cell, &me, replica, "web", &["a", "b"]).await.ok());
        tokens.push(one.await);
    }
    let known = keys(&cell, 2).await;
    assert_eq!(known.len(), 1, "{known:?}");
    let mut trust = JwtTrust::default();
    let authorities: Vec<JwtAuthority> = known.iter().map(Into::into).collect();
    trust.put(&TD.parse().unwrap(), &authorities).unwrap();
    for one in &tokens {
        let svid = verify_jwt(&one.token, "b", &trust, now()).unwrap();
        assert_eq!((svid.id().as_str(), one.spiffe_id.as_str()), ("spiffe://west/web", "spiffe://west/web"));
        assert_eq!(svid.not_after().0, one.expires_at_ms / 1000 * 1000);
        let left = one.expires_at_ms.saturating_sub(now().0);
        assert!((200_000..=301_000).contains(&left), "{left}");
        let theirs = pyjwt(&one.token, &known[0].spki_der, "b");
        assert!(theirs.contains(r#""sub": "spiffe://west/web""#), "{theirs}");
        assert_eq!(pyjwt(&one.token, &known[0].spki_der, "c"), "InvalidAudienceError");
        let (rest, signature) = one.token.rsplit_once('.').unwrap();
        let first = if signature.starts_with('A') { 'B' } else { 'A' };
        let forged = format!("{rest}.{first}{}", &signature[1..]);
        assert_eq!(pyjwt(&forged, &known[0].spki_der, "b"), "InvalidSignatureError");
    }
    let jti =
        |one: &v1::NewJwtsvidResponse| verify_jwt(&one.token, "b", &trust, now()).unwrap().claims()["jti"].clone();
    assert!(jti(&tokens[0]) != jti(&tokens[1]) && jti(&tokens[1]) != jti(&tokens[2]));

    let refused = async |entry: &str, audience: &[&str]| token(&cell, &me, 1, entry, audience).await.unwrap_err();
    assert_eq!(refused("web", &[]).await, "bad_request", "a token for nobody is for everybody");
    assert_eq!(refused("web", &[""]).await, "bad_request");
    assert_eq!(refused("web", &["a", "a"]).await, "bad_request");
    assert_eq!(refused("db", &["a"]).await, "entry_not_on_node");

    // Where the key lies: no replica's files hold it, but for what is wrapped to that replica.
    let out = cell.file("backup");
    let mut client = v1::membership_client::MembershipClient::new(cell.admin(1).await.unwrap());
    client.snapshot(v1::SnapshotRequest {}).await.unwrap();
    let mut pieces = client.backup(v1::BackupRequest {}).await.unwrap().into_inner();
    let mut backup = Vec::new();
    while let Some(piece) = pieces.message().await.unwrap() {
        backup.extend(prost::Message::encode_to_vec(&piece));
    }
    std::fs::write(&out, backup).unwrap();
    for replica in 1..=3 {
        cell.kill(replica).unwrap();
    }
    for replica in 1..=3 {
        let data = cell.seat_of(replica).unwrap().data.clone();
        let state = rebase::survey(&Options::new(ReplicaId(replica as u64), data.clone())).unwrap().whole.state;
        let wrapped = state.jwt_signer().unwrap().wrapped[&(replica as u64)].clone();
        let wrap = Files::create(&data).unwrap().wrap().unwrap();
        let private = wrap.unwrap_for(Purpose::JwtAuthority, &wrapped).unwrap();
        assert_eq!(private.len(), 32);
        assert!(wrap.unwrap(&wrapped).is_err(), "it opens as nothing else");
        let point = &known[0].spki_der[27..];
        for place in [data.as_path(), out.as_path()] {
            assert_eq!(holding(place, &private), 0, "{} holds the private number", place.display());
            assert!(holding(place, point) > 0, "the same search finds the public one in {}", place.display());
        }
    }
}

/// How many files below `place` hold these bytes, as they are or in hexadecimal.
fn holding(place: &Path, bytes: &[u8]) -> usize {
    if place.is_dir() {
        return std::fs::read_dir(place).unwrap().map(|entry| holding(&entry.unwrap().path(), bytes)).sum();
    }
    if !place.is_file() {
        // The socket that a killed replica left holds nothing.
        return 0;
    }
    let (content, text) = (std::fs::read(place).unwrap(), hex::encode(bytes));
    let has = |what: &[u8]| content.windows(what.len()).any(|window| window == what);
    usize::from(has(bytes) || has(text.as_bytes()))
}

async fn leaf(cell: &Cell, me: &Admitted, entry: &str) -> Result<(v1::X509svidResult, SvidKey), String> {
    let key = SvidKey::generate().unwrap();
    let items = vec![v1::NewX509svid { entry_id: entry.to_owned(), csr: key.csr().unwrap() }];
    let request = v1::BatchNewX509svidRequest { request_id: fresh(), items };
    let mut client = SvidClient::new(cell.channel_as(me.identity.clone(), 1).await.unwrap());
    match client.batch_new_x509svid(request).await {
        Ok(answer) => Ok((answer.into_inner().results.remove(0), key)),
        Err(status) => Err(from_status(&status).code.to_string()),
    }
}

fn openssl_text(folder: &Path, der: &[u8]) -> String {
    let file = folder.display().to_string();
    std::fs::write(folder, der).unwrap();
    must_run(&["openssl", "x509", "-inform", "DER", "-in", &file, "-noout", "-text"]).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_entries_say_is_in_their_svids_and_ends_with_them() {
    let cell = Cell::start(TD, 1).await.unwrap();
    let maker = Maker::new().unwrap();
    let machine = Arc::new(Machine::new(&maker, "m").await.unwrap());
    register_cluster(&cell, TD, &maker).await.unwrap();
    let me = admit(&cell, &machine, TD).await.unwrap();
    let _attending = Attending::start(&cell, machine.clone(), me.clone()).unwrap();
    let names = vec!["web.west.example".to_owned(), "*.web.west.example".to_owned()];
    let ends = now().0 + 8_000;
    let web = v1::Entry {
        id: "web".into(),
        hint: "front".into(),
        dns_names: names.clone(),
        ttl_seconds: 120,
        jwt_ttl_seconds: 30,
        federates_with: vec!["unknown.example".into()],
        ..Default::default()
    };
    assert_eq!(put(&cell, web.clone()).await, "ok", "a trust domain may be known later");
    assert_eq!(put(&cell, v1::Entry { id: "brief".into(), expires_at_ms: ends, ..Default::default() }).await, "ok");
    for bad in [
        v1::Entry { id: "bad".into(), dns_names: vec!["WEB".into()], ..Default::default() },
        v1::Entry { id: "bad".into(), dns_names: vec!["a".into(), "a".into()], ..Default::default() },
        v1::Entry { id: "bad".into(), jwt_ttl_seconds: 29, ..Default::default() },
        v1::Entry { id: "bad".into(), jwt_ttl_seconds: 3_601, ..Default::default() },
        v1::Entry { id: "bad".into(), hint: "a".repeat(257), ..Default::default() },
        v1::Entry { id: "bad".into(), expires_at_ms: 1, ..Default::default() },
    ] {
        assert_eq!(put(&cell, bad.clone()).await, "bad_request", "{bad:?}");
    }
    let request = v1::GetEntryRequest { id: "web".into() };
    let read = EntryRegistryClient::new(cell.admin(1).await.unwrap()).get_entry(request).await.unwrap().into_inner();
    assert_eq!((read.hint, read.dns_names, read.jwt_ttl_seconds), ("front".to_owned(), names, 30));

    let (issued, _) = leaf(&cell, &me, "web").await.unwrap();
    let text = openssl_text(&cell.file("leaf.der"), &issued.chain_der[0]);
    let sans = "URI:spiffe://west/web, DNS:web.west.example, DNS:*.web.west.example";
    assert!(text.contains(sans) && text.contains("Subject Alternative Name: critical"), "{text}");
    assert!(issued.not_after_ms <= now().0 + 120_000);
    let one = within("a token", async || token(&cell, &me, 1, "web", &["a"]).await.ok()).await;
    assert!(one.expires_at_ms <= now().0 + 30_000);

    let (brief, _) = leaf(&cell, &me, "brief").await.unwrap();
    assert_eq!((brief.code.as_str(), brief.not_after_ms), ("ok", ends));
    within("the end of the entry", async || {
        let gone = leaf(&cell, &me, "brief").await.is_ok_and(|(result, _)| result.code == "entry_not_on_node");
        let request = v1::GetEntryRequest { id: "brief".into() };
        let read = EntryRegistryClient::new(cell.admin(1).await.unwrap()).get_entry(request).await;
        (gone && read.is_err()).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_loops_is_told_to_wait_and_a_quiet_one_beside_it_is_served() {
    let cell = Cell::start(TD, 1).await.unwrap();
    let maker = Maker::new().unwrap();
    let machines = [Machine::new(&maker, "loud").await.unwrap(), Machine::new(&maker, "quiet").await.unwrap()];
    register_cluster(&cell, TD, &maker).await.unwrap();
    create_entry(&cell, "web", TD).await.unwrap();
    let (mut nodes, mut attending) = (Vec::new(), Vec::new());
    for machine in machines.map(Arc::new) {
        let me = admit(&cell, &machine, TD).await.unwrap();
        attending.push(Attending::start(&cell, machine, me.clone()).unwrap());
        nodes.push(me);
    }
    let [loud_one, quiet_one] = nodes.as_slice() else { panic!("two nodes") };
    let channel = cell.channel_as(loud_one.identity.clone(), 1).await.unwrap();
    let csr = SvidKey::generate().unwrap().csr().unwrap();
    let items = vec![v1::NewX509svid { entry_id: "web".into(), csr }; 256];
    let until = Instant::now() + Duration::from_secs(15);
    let (mut served, mut waits, mut worst) = (0, Vec::new(), Duration::ZERO);
    while Instant::now() < until && waits.len() < 200 {
        let request = v1::BatchNewX509svidRequest { request_id: fresh(), items: items.clone() };
        match SvidClient::new(channel.clone()).batch_new_x509svid(request).await {
            Ok(answer) => served += answer.into_inner().results.iter().filter(|r| r.code == "ok").count(),
            Err(status) => {
                assert_eq!(from_status(&status).code.as_str(), "busy");
                let after = status.metadata().get("grpc-retry-pushback-ms").unwrap().to_str().unwrap();
                waits.push(after.parse::<u64>().unwrap());
                let asked = Instant::now();
                assert_eq!(svid(&cell, quiet_one, "web").await.unwrap(), "ok");
                worst = worst.max(asked.elapsed());
            }
        }
    }
    // Its 4,096 at once are nearly all that a node may have; then one batch a second.
    assert!((3_800..4_200).contains(&served), "{served}");
    assert!(waits.len() >= 20, "{}", waits.len());
    assert!(waits.iter().all(|ms| (1..=1_300).contains(ms)), "{waits:?}");
    assert!(worst < Duration::from_secs(2), "{worst:?}");
    println!("served {served}, told to wait {} times, the quiet one waited {worst:?} at most", waits.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_administrator_mints_and_the_cell_keeps_who_did() {
    let cell = Cell::start(TD, 1).await.unwrap();
    let ambit = ambit_tests::process::binary("ambit").unwrap().display().to_string();
    let context = cell.admin_file("context.json").display().to_string();
    let cli = |args: &[&str]| run(&[&[ambit.as_str(), "--context", &context][..], args].concat()).unwrap();
    let folder = cell.file("minted").display().to_string();
    let out = cli(&["svid", "mint", "spiffe://west/ci", "--out", &folder, "--dns-name", "ci.example", "--ttl", "2m"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let file = |name: &str| format!("{folder}/{name}");
    must_run(&[
        "openssl",
        "verify",
        "-x509_strict",
        "-CAfile",
        &file("bundle.pem"),
        "-untrusted",
        &file("svid.pem"),
        &file("svid.pem"),
    ])
    .unwrap();
    must_run(&[&ambit, "svid", "verify", &file("svid.pem"), "--bundle", &file("bundle.pem")]).unwrap();
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(std::fs::metadata(file("svid.key")).unwrap().permissions().mode() & 0o777, 0o600);
    let again = cli(&["svid", "mint", "spiffe://west/ci", "--out", &folder]);
    assert!(!again.status.success(), "never over a key that is there");
    let other = cell.file("other").display().to_string();
    let admin = cli(&["svid", "mint", "spiffe://west/ambit/admin/eve", "--out", &other]);
    assert!(!admin.status.success() && String::from_utf8_lossy(&admin.stderr).contains("not_owner"));

    let minted = within("a token", async || {
        let out = cli(&["svid", "mint", "spiffe://west/ci", "--audience", "https://a.example"]);
        out.status.success().then(|| String::from_utf8(out.stdout).unwrap().trim().to_owned())
    })
    .await;
    let known = keys(&cell, 1).await;
    assert!(pyjwt(&minted, &known[0].spki_der, "https://a.example").contains("spiffe://west/ci"));
    // As a file, with the bundle as a document.
    let (token, document) = (cell.file("token").display().to_string(), cell.file("bundle.json").display().to_string());
    std::fs::write(&token, &minted).unwrap();
    let url = |bytes: &[u8]| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes);
    let (x, y) = known[0].spki_der[27..].split_at(32);
    let key = serde_json::json!({
        "kty": "EC", "use": "jwt-svid", "kid": known[0].kid, "crv": "P-256", "x": url(x), "y": url(y),
    });
    std::fs::write(&document, serde_json::json!({ "keys": [key] }).to_string()).unwrap();
    let bundle = format!("west={document}");
    let judged = |more: &[&str]| {
        let argv = [&[ambit.as_str(), "svid", "verify", &token, "--bundle", &bundle][..], more].concat();
        run(&argv).unwrap()
    };
    let good = judged(&["--audience", "https://a.example"]);
    assert!(good.status.success(), "{}", String::from_utf8_lossy(&good.stdout));
    for (more, exit, says) in [
        (&["--audience", "https://b.example"][..], 4, "jwt_audience"),
        (&["--audience", "https://a.example", "--at", "2039-01-01T00:00:00Z"], 4, "jwt_untrusted"),
        (&["--audience", "https://a.example", "--trust-domain", "east"], 4, "jwt_untrusted"),
        (&[], 2, "bad_request"),
    ] {
        let out = judged(more);
        let told = [out.stdout, out.stderr].concat();
        assert_eq!(out.status.code(), Some(exit), "{more:?}: {}", String::from_utf8_lossy(&told));
        assert!(String::from_utf8_lossy(&told).contains(says), "{more:?}: {}", String::from_utf8_lossy(&told));
    }
    let mut client = SvidClient::new(cell.admin(1).await.unwrap());
    let issued = client.list_issued(v1::ListIssuedRequest { limit: 0 }).await.unwrap().into_inner().issued;
    let rows: Vec<_> = issued.iter().map(|i| (i.kind.as_str(), i.spiffe_id.as_str(), i.subject.as_str())).collect();
    let by = "minted by spiffe://west/ambit/admin/founder";
    assert_eq!(rows, [("jwt", "spiffe://west/ci", by), ("x509", "spiffe://west/ci", by)]);
    // One who loops is told to wait, before anything is read or signed.
    let mut codes = BTreeSet::new();
    for n in 0..600 {
        let refused = match n % 2 {
            0 => client.mint_x509svid(v1::MintX509svidRequest::default()).await.map(drop).unwrap_err(),
            _ => client.mint_jwtsvid(v1::MintJwtsvidRequest::default()).await.map(drop).unwrap_err(),
        };
        codes.insert(from_status(&refused).code.to_string());
    }
    assert!(codes.contains("busy"), "{codes:?}");
}
