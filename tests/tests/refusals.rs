//! Bad input to a real replica: configuration, founding and joining, policies, and garbage on every port.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_identity::tls::client_config;
use ambit_identity::{Expect, SharedTrust, Trust};
use ambit_model::Refusal;
use ambit_proto::status::from_status;
use ambit_proto::v1;
use ambit_proto::v1::policy_registry_client::PolicyRegistryClient;
use ambit_tests::cell::{Cell, Seat, fresh, refusal};
use ambit_tests::process::{Folder, must_run};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::process::Output;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The refusal that a command printed; it must have failed.
fn refused(out: Output) -> String {
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1), "{said}{}", String::from_utf8_lossy(&out.stdout));
    let at = said.find("error[").unwrap_or_else(|| panic!("no refusal in: {said}"));
    let said = said[at..].to_owned();
    assert!(said.contains("expected ") && said.contains("found ") && said.contains("\ntry: "), "{said}");
    said
}

#[track_caller]
fn holds(said: &str, words: &[&str]) {
    for word in words {
        assert!(said.contains(word), "'{word}' is not in: {said}");
    }
}

#[test]
fn a_configuration_that_is_not_understood_stops_every_verb() {
    let folder = Folder::new().unwrap();
    let seat = Seat::new(&folder, "typo", "lisen = \"127.0.0.1:1\"").unwrap();
    let admin = folder.path("admin").display().to_string();
    let init = ["--trust-domain", "west", "--admin-out", admin.as_str()];
    holds(&refused(seat.ambitd("init", &init).unwrap()), &["error[config_unknown_key]", "lisen"]);
    holds(&refused(seat.ambitd("run", &[]).unwrap()), &["error[config_unknown_key]", "lisen"]);
    assert!(!seat.data.exists() && !folder.path("admin").exists(), "nothing half-made");

    let text = std::fs::read_to_string(Seat::new(&folder, "good", "").unwrap().config).unwrap();
    let rows = [
        (text.replace("listen = \"127.0.0.1:", "listen = \"nowhere:"), "nowhere"),
        (text.replace("heartbeat_ms = 50", "heartbeat_ms = 200"), "at most a third"),
        (text.replace("heartbeat_ms = 50", "heartbeat_ms = 0"), "at most a third"),
        (text.replace("election_timeout_ms = 300", "election_timeout_ms = -1"), "-1"),
        (text.replace("data_dir", "# data_dir"), "data_dir"),
        ("\u{0}\u{1}garbage".into(), "config_invalid"),
    ];
    for (text, word) in rows {
        std::fs::write(&seat.config, text).unwrap();
        holds(&refused(seat.ambitd("run", &[]).unwrap()), &["error[config_invalid]", word]);
    }
    std::fs::remove_file(&seat.config).unwrap();
    holds(&refused(seat.ambitd("run", &[]).unwrap()), &["error[config_invalid]", "typo.toml"]);
}

#[test]
fn a_replica_is_founded_once_and_guards_its_keys() {
    let folder = Folder::new().unwrap();
    let seat = Seat::new(&folder, "r1", "").unwrap();
    let admin = folder.path("admin").display().to_string();
    let init = ["--trust-domain", "west", "--admin-out", admin.as_str()];
    let before = refused(seat.ambitd("run", &[]).unwrap());
    holds(&before, &["error[config_invalid]", "ambitd init", "ambitd join"]);
    assert!(seat.ambitd("init", &init).unwrap().status.success());
    let root = std::fs::read(folder.path("admin").join("root.pem")).unwrap();
    holds(&refused(seat.ambitd("init", &init).unwrap()), &["error[already_exists]"]);
    assert_eq!(std::fs::read(folder.path("admin").join("root.pem")).unwrap(), root, "the root was replaced");

    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let identity = seat.data.join("identity");
    assert_eq!(mode(&identity), 0o700);
    let keys: Vec<_> = std::fs::read_dir(&identity)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "key") || path.ends_with("issuer.pem"))
        .collect();
    assert!(keys.len() >= 5, "{keys:?}");
    for key in keys.iter().chain([&folder.path("admin").join("admin.key")]) {
        assert_eq!(mode(key), 0o600, "{}", key.display());
    }
    // What a crash between writing and renaming leaves is a key as well.
    let half = identity.join("issuer.pem.new");
    std::fs::copy(identity.join("issuer.pem"), &half).unwrap();
    for key in keys.into_iter().chain([half]) {
        std::fs::set_permissions(&key, PermissionsExt::from_mode(0o640)).unwrap();
        let said = refused(seat.ambitd("run", &[]).unwrap());
        holds(&said, &["error[config_invalid]", "mode 640", key.file_name().unwrap().to_str().unwrap()]);
        std::fs::set_permissions(&key, PermissionsExt::from_mode(0o600)).unwrap();
    }
    let address_taken = std::net::TcpListener::bind(seat.listen).unwrap();
    holds(&refused(seat.ambitd("run", &[]).unwrap()), &["error[config_invalid]", &seat.listen.to_string()]);
    drop(address_taken);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_joins_with_its_own_token_once() {
    let cell = Cell::start("west", 1).await.unwrap();
    let seat = cell.seat("r2").unwrap();
    let token = cell.replica_token(2, seat.listen).await.unwrap();
    let print = hex::encode(cell.fingerprint);
    let join = |seat: &Seat, number, print: &str, token: &str| cell.join(seat, number, print, token).unwrap();
    holds(&refused(join(&seat, 2, &"ab".repeat(32), &token)), &["error[fingerprint_mismatch]", "abababab"]);
    holds(&refused(join(&seat, 2, "abab", &token)), &["error[bad_request]", "64 hexadecimal digits"]);
    holds(&refused(join(&seat, 2, &print, "replica-0000")), &["error[join_token_invalid]"]);
    holds(&refused(join(&seat, 3, &print, &token)), &["error[join_token_invalid]"]);
    let elsewhere = cell.seat("elsewhere").unwrap();
    holds(&refused(join(&elsewhere, 2, &print, &token)), &["error[join_token_invalid]"]);
    // None of these burnt it, or left something that `run` would take for a replica.
    holds(&refused(seat.ambitd("run", &[]).unwrap()), &["error[config_invalid]", "ambitd join"]);
    // Five at once with the one token, each from a folder of its own: one gets in.
    let text = std::fs::read_to_string(&seat.config).unwrap();
    let mut seats = vec![seat];
    for n in 1..5 {
        let (config, data) = (cell.file(&format!("rival{n}.toml")), cell.file(&format!("rival{n}")));
        let first = &seats[0];
        let text = text.replace(&first.data.display().to_string(), &data.display().to_string());
        std::fs::write(&config, text).unwrap();
        seats.push(Seat { config, data, listen: first.listen, metrics: first.metrics, log: cell.file("rivals.log") });
    }
    let outcomes: Vec<Output> = std::thread::scope(|scope| {
        let joins: Vec<_> = seats.iter().map(|seat| scope.spawn(|| join(seat, 2, &print, &token))).collect();
        joins.into_iter().map(|join| join.join().unwrap()).collect()
    });
    let (won, lost): (Vec<_>, Vec<_>) = outcomes.into_iter().zip(&seats).partition(|(out, _)| out.status.success());
    assert_eq!(won.len(), 1);
    for (out, seat) in lost {
        let said = refused(out);
        // The token is burnt before the place is taken; either is found first.
        assert!(said.contains("error[join_token_used]") || said.contains("error[already_exists]"), "{said}");
        holds(&refused(seat.ambitd("run", &[]).unwrap()), &["error[config_invalid]", "ambitd join"]);
    }
    // The winner's folder and then its token again.
    let winner = won[0].1;
    holds(&refused(join(winner, 2, &print, &token)), &["error[already_exists]", "data_dir"]);
    std::fs::remove_dir_all(&winner.data).unwrap();
    holds(&refused(join(winner, 2, &print, &token)), &["error[already_exists]", "a replica number not in use"]);
    for (number, listen) in [(0, "127.0.0.1:1"), (8, "127.0.0.1:1"), (2, "127.0.0.1"), (2, "a.example:1")] {
        let request = v1::CreateReplicaTokenRequest {
            request_id: fresh(),
            replica: number,
            address: listen.into(),
            ttl_seconds: 60,
        };
        let mut members = v1::membership_client::MembershipClient::new(cell.admin(1).await.unwrap());
        let refused = refusal(members.create_replica_token(request).await).unwrap();
        assert_eq!(refused.code.as_str(), "bad_request", "{number} {listen}");
    }
}

const ALLOW: &str = "kind: Policy\nmetadata: {name: web-to-db}\nspec:\n  target: spiffe://west/db\n  action: allow\n  \
                     from: [spiffe://east/web]\n  ports: [8080]\n";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn policies_are_taken_whole_or_not_at_all() {
    let cell = Cell::start("west", 1).await.unwrap();
    let mut policies = PolicyRegistryClient::new(cell.admin(1).await.unwrap());
    let apply = |yaml: &str| v1::ApplyRequest { request_id: fresh(), yaml: yaml.to_owned(), ..Default::default() };

    // Of a trust domain that nobody vouches for: accepted, shown, denies.
    let applied = policies.apply(apply(ALLOW)).await.unwrap().into_inner();
    assert!(applied.objects[0].changed);
    assert_eq!(applied.objects[0].unresolved, ["east"]);
    let listed = policies.list(v1::ListPoliciesRequest {}).await.unwrap().into_inner();
    assert!(!listed.policies[0].resolved);
    let question = |source: &str| v1::ExplainRequest {
        source: source.into(),
        destination: "spiffe://west/db".into(),
        port: 8080,
        at_ms: 0,
    };
    let answer = policies.explain(question("spiffe://east/web")).await.unwrap().into_inner();
    assert!(!answer.allowed, "{answer:?}");
    assert!(answer.nearest.contains("web-to-db") && answer.nearest.contains("east"), "{answer:?}");
    assert_eq!(refusal(policies.explain(question("http://east/web")).await).unwrap().code.as_str(), "bad_request");

    let good = ALLOW.replace("web-to-db", "second").replace("east", "west");
    let rows = [
        (ALLOW.replace("spiffe://west/db", "spiffe://east/db"), "not_owner", "east"),
        (ALLOW.replace("ports: [8080]", "paths: [/admin]"), "policy_layer7", "`paths`"),
        (ALLOW.replace("kind: Policy", "kind: ["), "policy_malformed", "line 1"),
        (ALLOW.replace("8080", "0"), "policy_malformed", "1-65535"),
        ("\u{7f}: {{{".into(), "policy_malformed", "line 1"),
        (format!("{good}---\n{}", ALLOW.replace("[8080]", "[]")), "policy_malformed", "line"),
        (format!("{good}---\n{}", ALLOW.replace("spiffe://west/db", "spiffe://east/db")), "not_owner", "east"),
        (ALLOW.replace("[8080]", "[8080]\n  protocols: [udp]"), "policy_unenforceable", "web-to-db"),
        (ALLOW.replace("[spiffe://east/web]", "['cidr:10.0.0.0/8']"), "policy_malformed", "transport: passthrough"),
        (
            ALLOW.replace("from: [spiffe://east/web]", "transport: passthrough\n  from: ['cidr:127.0.0.0/8']"),
            "policy_unenforceable",
            "cidr:127.0.0.0/8, which is loopback",
        ),
        (ALLOW.replace("spiffe://east/web", "cluster:west/nowhere"), "not_found", "nowhere"),
    ];
    for (yaml, code, word) in rows {
        let refused = refusal(policies.apply(apply(&yaml)).await).unwrap();
        assert_eq!(refused.code.as_str(), code, "{yaml}: {refused}");
        assert!(!refused.expected.is_empty() && refused.found.contains(word), "{refused}");
    }
    let listed = policies.list(v1::ListPoliciesRequest {}).await.unwrap().into_inner();
    assert_eq!(listed.policies.len(), 1, "a refused set left something: {listed:?}");
}

/// Resident memory may grow by this much under garbage: buffers of a few hundred connections, no more.
const GROWTH_BYTES_MAX: u64 = 48 << 20;
const OVERSIZE: usize = 5 << 20;
/// Half-open connections from one address: more than the handshakes that a replica has under way at once.
const HALF_OPEN: usize = 600;
/// A replica is dialled within this, or taken for dead.
const DIAL_MAX: Duration = Duration::from_secs(2);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_on_a_port_costs_nobody_else_anything() {
    let mut cell = Cell::start("west", 1).await.unwrap();
    let (grpc, metrics) = (cell.address(1).unwrap(), cell.metrics(1).unwrap());
    let mut policies = PolicyRegistryClient::new(cell.admin(1).await.unwrap()).max_encoding_message_size(OVERSIZE * 2);
    cell.metrics_page(1).unwrap();
    let before = cell.process(1).unwrap().resident().unwrap();

    for port in [grpc, metrics] {
        for seed in 0..40u64 {
            send(port, &noise(seed, 1 + (seed as usize * 997) % 20_000)).await;
        }
        // A TLS record that promises more than comes, an HTTP/2 preface in the clear, HTTP/1, and a request without end.
        send(port, &[0x16, 0x03, 0x01, 0x40, 0x00, 0x01]).await;
        send(port, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00").await;
        let said = send(port, b"GET /ambit.v1.Membership/Status HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(!said.windows(6).any(|w| w == b"200 OK"), "{}", String::from_utf8_lossy(&said));
        send(port, &[b"GET /metrics HTTP/1.1\r\nX: ".as_slice(), &vec![b'a'; OVERSIZE]].concat()).await;
        send(
            port,
            &[b"POST /metrics HTTP/1.1\r\nContent-Length: 5242880\r\n\r\n".as_slice(), &vec![0; OVERSIZE]].concat(),
        )
        .await;
    }
    http1_inside_tls(&cell, grpc).await;

    let mut half_open = Vec::new();
    for _ in 0..HALF_OPEN {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
        let mut stream = socket.connect(grpc).await.unwrap();
        // May be closed by then.
        let _ = stream.write_all(&[0x16, 0x03, 0x01, 0x02, 0x00, 0x01, 0x00]).await;
        half_open.push(stream);
    }
    let asked = Instant::now();
    cell.status(1).await.expect("somebody else is answered meanwhile");
    assert!(asked.elapsed() < DIAL_MAX, "{:?}", asked.elapsed());
    println!("answered in {:?} beside {HALF_OPEN} half-open handshakes", asked.elapsed());

    // Over a good connection: a message of 5 MiB, with and without a certificate.
    let yaml = format!("# {}\n{ALLOW}", "x".repeat(OVERSIZE));
    let request = v1::ApplyRequest { request_id: fresh(), yaml, ..Default::default() };
    let status = policies.apply(request).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::OutOfRange, "{status:?}");
    let chunk = v1::EvidenceRequest { part: Some(v1::evidence_request::Part::Chunk(vec![0; OVERSIZE])) };
    let mut stranger = v1::node_attestation_client::NodeAttestationClient::new(cell.anonymous(1).await.unwrap())
        .max_encoding_message_size(OVERSIZE * 2);
    let status = stranger.evidence(tokio_stream::iter([chunk])).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::OutOfRange, "{status:?}");
    // Within the size, but not a header: refused with a code.
    let chunk = v1::EvidenceRequest { part: Some(v1::evidence_request::Part::Chunk(vec![0; 1_000])) };
    let refused: Refusal = from_status(&stranger.evidence(tokio_stream::iter([chunk])).await.unwrap_err());
    assert_eq!(refused.code.as_str(), "evidence_malformed");

    drop(half_open);
    let process = cell.process(1).unwrap();
    assert!(process.is_alive(), "ambitd died");
    let after = process.resident().unwrap();
    println!("resident: {} KiB before, {} KiB after", before >> 10, after >> 10);
    assert!(after < before + GROWTH_BYTES_MAX, "{before} -> {after}");
    // The same connection as at the start still serves.
    let listed = policies.list(v1::ListPoliciesRequest {}).await.unwrap().into_inner();
    assert!(listed.policies.is_empty());
    assert!(must_run(&["curl", "-sf", &format!("http://{metrics}/healthz")]).unwrap().contains("ok"));
}

/// The same bytes for the same seed (xorshift64*).
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        out.extend(state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    out.truncate(len);
    out
}

/// Sends and reads what comes back, at most a second long; the far end may close whenever it likes.
async fn send(to: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut answer = Vec::new();
    let talk = async {
        let (mut read, mut write) = TcpStream::connect(to).await.expect("the port listens").into_split();
        let reading = async { read.read_to_end(&mut answer).await };
        let writing = async {
            let sent = write.write_all(bytes).await;
            write.shutdown().await.and(sent)
        };
        let _ = tokio::join!(reading, writing);
    };
    let _ = tokio::time::timeout(Duration::from_secs(1), talk).await;
    answer
}

/// A good handshake and then HTTP/1: closed without an answer that could be taken for one.
async fn http1_inside_tls(cell: &Cell, to: SocketAddr) {
    let trust = SharedTrust::new(Trust::Pinned(cell.trust_domain.clone(), cell.fingerprint));
    for alpn in [&[b"h2".as_slice()][..], &[b"http/1.1"], &[]] {
        let expect = Expect::ReplicaOf(cell.trust_domain.clone());
        let config = client_config(trust.clone(), expect, None, alpn).unwrap();
        let tcp = TcpStream::connect(to).await.unwrap();
        let name = tokio_rustls::rustls::pki_types::ServerName::IpAddress(to.ip().into());
        let Ok(mut tls) = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, tcp).await else {
            assert_eq!(alpn, &[b"http/1.1"], "only another protocol ends the handshake");
            continue;
        };
        let _ = tls.write_all(b"GET /grpc.health.v1.Health/Check HTTP/1.1\r\nHost: x\r\n\r\n").await;
        let mut answer = Vec::new();
        let _ = tokio::time::timeout(Duration::from_secs(1), tls.read_to_end(&mut answer)).await;
        assert!(!answer.windows(6).any(|w| w == b"200 OK"), "{}", String::from_utf8_lossy(&answer));
    }
}
