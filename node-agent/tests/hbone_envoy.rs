//! Envoy, which nobody of this project wrote and which Istio's waypoints are, as an HBONE peer of the agent: as a caller
//! and as the called. Its configuration is that of `tests/interop/README.md`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use ambit_agent::issued::Svid;
use ambit_identity::SvidKey;
use ambit_identity::keys::certificates_to_pem;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use support::local::{Folder, interop};
use support::stage::{Stage, is_reset, round_trip};
use tokio::net::{TcpListener, TcpStream};

const CALLER: &str = include_str!("../../tests/interop/envoy-caller.yaml");
const CALLED: &str = include_str!("../../tests/interop/envoy-called.yaml");
const START_MAX: Duration = Duration::from_secs(30);

/// A running Envoy, killed with the test.
struct Envoy {
    child: Child,
    folder: Folder,
}

impl Envoy {
    /// One that shows `svid` and trusts both trust domains; each name in its configuration becomes its value.
    async fn start(stage: &Stage, template: &str, svid: &Svid, at: SocketAddr, values: &[(&str, String)]) -> Envoy {
        let folder = Folder::new("hbone-envoy");
        let pem = |chain: &[Vec<u8>]| certificates_to_pem(chain.iter().map(Vec::as_slice));
        let roots = [stage.west.bundle(), stage.east.bundle()].map(|b| pem(&b.roots_der)).concat();
        let key = SvidKey::from_pkcs8(&svid.key_pkcs8).unwrap().pem();
        let mut config = template.to_owned();
        let files = [
            ("CHAIN", folder.write("svid.pem", pem(&svid.chain_der))),
            ("KEY", folder.write("svid.key", key.as_bytes())),
            ("ROOTS", folder.write("bundle.pem", roots)),
        ];
        for (name, path) in files {
            config = config.replace(name, &path.display().to_string());
        }
        for (name, value) in values {
            config = config.replace(name, value);
        }
        let config = folder.write("envoy.yaml", config);
        let log = std::fs::File::create(folder.join("log")).unwrap();
        let child = Command::new(interop("../lib/python3.11/site-packages/envoy/_bin/envoy"))
            .args(["--concurrency", "1", "--disable-hot-restart", "--log-level", "warning", "--config-path"])
            .arg(config)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut envoy = Envoy { child, folder };
        let until = std::time::Instant::now() + START_MAX;
        while TcpStream::connect(at).await.is_err() {
            let ended = envoy.child.try_wait().unwrap();
            assert!(ended.is_none() && std::time::Instant::now() < until, "{ended:?}\n{}", envoy.log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        envoy
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }
}

impl Drop for Envoy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port(at: Ipv4Addr) -> u16 {
    std::net::TcpListener::bind((at, 0)).unwrap().local_addr().unwrap().port()
}

/// Envoy's configuration as a caller of `db` from `from`, which dials `agent`.
fn calling(stage: &Stage, port: u16, from: Ipv4Addr, agent: SocketAddr) -> [(&'static str, String); 6] {
    [
        ("LISTEN_PORT", port.to_string()),
        ("TARGET", stage.db_at().to_string()),
        ("AGENT_ADDRESS", agent.ip().to_string()),
        ("AGENT_PORT", agent.port().to_string()),
        ("SOURCE_ADDRESS", from.to_string()),
        ("WORKLOAD_ID", stage.db_svid.id.to_string()),
    ]
}

#[tokio::test]
async fn envoy_calls_a_workload_at_its_own_address_and_the_agent_answers() {
    let mut stage = Stage::set(121).await;
    let (port, pod) = (free_port(Ipv4Addr::LOCALHOST), stage.open_pod_door().await);
    let at = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    // From the calling pod's address, as its node reported it.
    let web = stage.web_endpoint();
    stage.publish(|_| (), |e| e.endpoints = vec![web.clone()]);
    let values = calling(&stage, port, stage.web.workload.pod.address, pod);
    let envoy = Envoy::start(&stage, CALLER, &stage.web_svid.clone(), at, &values).await;
    // What looked whether it is up was a connection too.
    let _ = tokio::time::timeout(Duration::from_secs(2), stage.db.accept()).await;
    for _ in 0..3 {
        let mut app = TcpStream::connect(at).await.unwrap();
        let served = tokio::time::timeout(Duration::from_secs(5), stage.db.accept()).await;
        let (mut pod, _) = served.unwrap_or_else(|_| panic!("{}", envoy.log())).unwrap();
        round_trip(&mut app, &mut pod, 300_000).await;
    }
    // The policy decides about it as about our own.
    stage.publish(
        |_| (),
        |e| {
            e.endpoints = vec![web];
            e.policies.clear();
        },
    );
    let mut app = TcpStream::connect(at).await.unwrap();
    let read = tokio::time::timeout(Duration::from_secs(5), tokio::io::AsyncReadExt::read(&mut app, &mut [0; 1])).await;
    assert!(matches!(read.expect("an end"), Ok(0) | Err(_)), "{}", envoy.log());
    assert!(tokio::time::timeout(Duration::from_millis(200), stage.db.accept()).await.is_err(), "the pod saw nothing");
}

#[tokio::test]
async fn a_workload_calls_what_envoy_serves_at_a_pods_address_or_at_a_nodes() {
    for (n, at_pod) in [(122, true), (123, false)] {
        let mut stage = Stage::set(n).await;
        // No agent of ours is there: at the pod's address as Istio's agents listen, or in the place of ours.
        let node = Ipv4Addr::new(127, 0, 84, n);
        let listens = if at_pod { *stage.db_at().ip() } else { node };
        let at = SocketAddr::from((listens, stage.hbone.port()));
        // West's agent dials the port of the stage.
        drop(TcpListener::bind(at).await.unwrap());
        let values = [
            ("LISTEN_ADDRESS", listens.to_string()),
            ("LISTEN_PORT", at.port().to_string()),
            ("WORKLOAD_ADDRESS", stage.db_at().ip().to_string()),
            ("WORKLOAD_PORT", stage.db_at().port().to_string()),
            ("CALLER_ID", stage.web_svid.id.to_string()),
        ];
        let envoy = Envoy::start(&stage, CALLED, &stage.db_svid.clone(), at, &values).await;
        stage.publish(|w| w.endpoints[0].node_address = node.to_string(), |_| ());
        for _ in 0..3 {
            let mut app = stage.call_db().await;
            let (mut pod, _) = stage.served().await;
            round_trip(&mut app, &mut pod, 300_000).await;
        }
        assert_eq!(stage.outbound.tunnels(), 1, "{}", envoy.log());
        drop(envoy);
        assert!(is_reset(stage.call_db().await).await, "nobody is there");
    }
}
