//! What comes from those who proved nothing yet: floods, streams that drip, connections that never finish. It costs the
//! cell little, and an honest machine beside it is served (reference/tpm.md, section 10, case 46).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_identity::tls::Expect;
use ambit_model::{Code, NodeId};
use ambit_proto::status::from_status;
use ambit_proto::v1::evidence_request::Part;
use ambit_proto::v1::node_attestation_client::NodeAttestationClient;
use ambit_proto::v1::{self, begin_response};
use ambit_tests::cell::{Cell, fresh, refusal};
use ambit_tests::machine::{Lies, Machine, evidence, golden_policy, join_token, put_list, register_cluster};
use ambit_tests::soft_tpm::maker::{CaKind, Maker as SoftMaker};
use ambit_tests::soft_tpm::{EkKind, SoftTpm};
use ambit_tests::table::row;
use ambit_tests::tpm::Maker;
use ambit_transport::Identity;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

struct Bench {
    cell: Cell,
    maker: Maker,
    machine: Machine,
    token: String,
}

impl Bench {
    async fn new() -> Bench {
        let cell = Cell::start("west", 1).await.unwrap();
        let maker = Maker::new().unwrap();
        let machine = Machine::new(&maker, "honest").await.unwrap();
        register_cluster(&cell, "west", &maker).await.unwrap();
        let token = join_token(&cell, "west").await.unwrap();
        Bench { cell, maker, machine, token }
    }
    /// An honest machine enrols, whatever else goes on.
    async fn enrols(&self) {
        let started = Instant::now();
        let done = self.machine.enrol(&self.cell, 1, "west", &self.token, &Lies::default()).await.unwrap();
        let generation = done.map(|(verdict, _)| verdict.generation);
        assert!(generation.is_ok(), "{generation:?}");
        println!("an honest machine beside it enrolled in {:?}", started.elapsed());
    }
}

/// A port here from where all goes on to `to`, as from the address `from`.
async fn as_from(from: IpAddr, to: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let here = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            tokio::spawn(async move {
                let socket = TcpSocket::new_v4()?;
                socket.bind(SocketAddr::new(from, 0))?;
                let mut far = socket.connect(to).await?;
                tokio::io::copy_bidirectional(&mut near, &mut far).await
            });
        }
    });
    here
}

/// A cluster whose machines have P-384 EKs, the dearest to make a credential for, and a Begin of one that is expected.
async fn dear_begin(cell: &Cell) -> v1::BeginRequest {
    let maker = SoftMaker::new(CaKind::P384).unwrap();
    let tpm = SoftTpm::new(EkKind::P384, &maker).unwrap();
    let request = v1::RegisterClusterRequest {
        request_id: fresh(),
        name: "dear".into(),
        ek_root_classes: vec!["lab".into()],
        ek_roots_der: vec![maker.root.clone()],
        attest_interval_s: 10,
    };
    let admin = cell.admin(1).await.unwrap();
    v1::cluster_registry_client::ClusterRegistryClient::new(admin.clone()).register_cluster(request).await.unwrap();
    let (yaml, list) = golden_policy("dear", "dear").unwrap();
    put_list(cell, &list).await.unwrap();
    ambit_tests::machine::apply_policy(cell, &yaml, false).await.unwrap();
    let node_ids = vec![NodeId(tpm.node).to_string()];
    let allow = v1::AllowEkRequest { request_id: fresh(), cluster: "dear".into(), node_ids };
    NodeAttestationClient::new(admin).allow_ek(allow).await.unwrap();
    v1::BeginRequest {
        cluster: "dear".into(),
        ek_certificate: tpm.ek_certificate.clone(),
        ek_intermediates: vec![maker.intermediate.clone()],
        ek_public: tpm.ek_public.clone(),
        ak_public: tpm.ak_public.clone(),
        agent_nonce: [fresh(), fresh()].concat(),
        join_token: String::new(),
    }
}

/// `answered` for a challenge, else the code.
async fn begin(channel: Channel, request: v1::BeginRequest) -> String {
    match NodeAttestationClient::new(channel).begin(request).await.map(|answer| answer.into_inner().result) {
        Ok(Some(begin_response::Result::Challenge(_))) => "answered".into(),
        Ok(Some(begin_response::Result::Denied(denied))) => denied.code,
        Ok(None) => "nothing".into(),
        Err(status) => from_status(&status).code.to_string(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_begins_from_one_address_cost_what_its_budget_allows() {
    let bench = Bench::new().await;
    let request = dear_begin(&bench.cell).await;
    let relay = as_from("127.0.0.2".parse().unwrap(), bench.cell.address(1).unwrap()).await;
    let dialer = bench.cell.dialer(Identity::new(None));
    let expect = || Expect::ReplicaOf("west".parse().unwrap());
    // The ticket key of a cell that was just founded may take a second.
    let channel = dialer.channel(relay, expect()).await.unwrap();
    while begin(channel.clone(), request.clone()).await != "answered" {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }

    let started = Instant::now();
    let mut calls = JoinSet::new();
    for _ in 0..10 {
        let channel = dialer.channel(relay, expect()).await.unwrap();
        for _ in 0..1_000 {
            calls.spawn(begin(channel.clone(), request.clone()));
        }
    }
    let honest = async {
        bench.enrols().await;
    };
    let flood = async {
        let mut counts = BTreeMap::<String, u32>::new();
        while let Some(code) = calls.join_next().await {
            *counts.entry(code.unwrap()).or_default() += 1;
        }
        (counts, started.elapsed())
    };
    let ((), (counts, took)) = tokio::join!(honest, flood);
    println!("10,000 Begins from one address in {took:?}: {counts:?}");
    // 200 at once and 20 a second: those beyond are told so before any of their bytes is looked at.
    let granted = 200 + 20 * (took.as_secs() as u32 + 1);
    let answered = counts.get("answered").copied().unwrap_or(0);
    assert!(answered > 100 && answered <= granted, "{answered} of {granted}");
    assert_eq!(answered + counts["busy"], 10_000, "{counts:?}");
    row(46, "10,000 Begins with a P-384 EK at once from one address", "busy").unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handshake_that_comes_byte_by_byte_is_hung_up_on() {
    let bench = Bench::new().await;
    let to = bench.cell.address(1).unwrap();
    // The head of a TLS record that holds a ClientHello of 512 bytes, and then zeros.
    let hello = [&[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3][..], &[0; 505]].concat();
    let mut dripping = JoinSet::new();
    for _ in 0..40 {
        let hello = hello.clone();
        dripping.spawn(async move {
            let (mut read, mut write) = TcpStream::connect(to).await.unwrap().into_split();
            let started = Instant::now();
            let drip = async {
                for byte in hello {
                    if write.write_all(&[byte]).await.is_err() {
                        break;
                    }
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            };
            let mut answer = Vec::new();
            tokio::select! {
                () = drip => {}
                _ = read.read_to_end(&mut answer) => {}
            }
            started.elapsed()
        });
    }
    bench.enrols().await;
    let longest = dripping.join_all().await.into_iter().max().unwrap();
    println!("40 handshakes, a byte each 100 ms: the last hung up on after {longest:?}");
    assert!(longest < Duration::from_secs(20), "{longest:?}; whole, it would have taken 51 s");
    row(46, "40 handshakes that come byte by byte", "hung up on after 5 s").unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_says_nothing_ends() {
    let bench = Bench::new().await;
    let (_held, nothing) = mpsc::channel::<v1::EvidenceRequest>(1);
    let mut client = NodeAttestationClient::new(bench.cell.anonymous(1).await.unwrap());
    let answer = client.evidence(ReceiverStream::new(nothing)).await;
    assert_eq!(refusal(answer).unwrap().code, Code::EvidenceMalformed);
    row(46, "a stream that says nothing", "evidence_malformed").unwrap();
}

/// Whoever can open a credential holds a stream no longer than its ticket lives, and its nonce is spent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logs_that_come_byte_by_byte_end_with_the_ticket() {
    let bench = Bench::new().await;
    let slow = Machine::new(&bench.maker, "slow").await.unwrap();
    let begun = slow.begin(bench.cell.anonymous(1).await.unwrap(), "west", &bench.token).await.unwrap().unwrap();
    let answer = slow.answer(&begun, &Lies::default()).await.unwrap();
    let begun =
        bench.machine.begin(bench.cell.anonymous(1).await.unwrap(), "west", &bench.token).await.unwrap().unwrap();
    let late = bench.machine.answer(&begun, &Lies::default()).await.unwrap();
    let (drops, stream) = mpsc::channel(1);
    let frames = answer.frames.clone();
    tokio::spawn(async move {
        for frame in frames {
            let Some(Part::Chunk(bytes)) = frame.part else {
                drops.send(frame).await.ok()?;
                continue;
            };
            for byte in bytes {
                drops.send(v1::EvidenceRequest { part: Some(Part::Chunk(vec![byte])) }).await.ok()?;
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        Some(())
    });
    let started = Instant::now();
    let mut client = NodeAttestationClient::new(bench.cell.anonymous(1).await.unwrap());
    let ended = client.evidence(ReceiverStream::new(stream)).await.unwrap().into_inner().result;
    let took = started.elapsed();
    println!("a byte each 50 ms: ended after {took:?}");
    let Some(v1::evidence_response::Result::Denied(denied)) = ended else { panic!("{ended:?}") };
    assert_eq!(denied.code, "evidence_malformed");
    assert!(took < Duration::from_secs(75), "{took:?}");
    row(46, "logs that come byte by byte", "evidence_malformed").unwrap();
    let again = evidence(bench.cell.anonymous(1).await.unwrap(), &answer.frames).await.unwrap();
    assert!(matches!(again.unwrap_err().code.as_str(), "ticket_expired" | "nonce_consumed"));
    let late = evidence(bench.cell.anonymous(1).await.unwrap(), &late.frames).await.unwrap();
    assert_eq!(late.unwrap_err().code, "ticket_expired");
    row(4, "honest evidence after a minute", "ticket_expired").unwrap();
    bench.enrols().await;
}
