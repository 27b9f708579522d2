//! Envoy, which nobody of this project wrote, with its secrets from the agent: two trust domains, each for its own.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use ambit_agent::issued::{Issued, Svid, Svids};
use ambit_identity::SvidKey;
use ambit_identity::keys::certificates_to_pem;
use ambit_proto::v1;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::Cell;
use support::local::{Folder, Socket, interop, uid};

const CONFIG: &str = r#"
node: { id: test, cluster: test, metadata: { METADATA } }
static_resources:
  clusters:
  - name: agent
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: { http2_protocol_options: {} }
    load_assignment:
      cluster_name: agent
      endpoints: [{ lb_endpoints: [{ endpoint: { address: { pipe: { path: "SOCKET" } } } }] }]
  listeners:
  - name: mtls
    address: { socket_address: { address: 127.0.0.1, port_value: PORT } }
    filter_chains:
    - transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          common_tls_context:
            tls_certificate_sds_secret_configs: [{ name: default, sds_config: &agent {
              resource_api_version: V3, api_config_source: {
                api_type: API, transport_api_version: V3, grpc_services: [{ envoy_grpc: { cluster_name: agent } }] } } }]
            validation_context_sds_secret_config: { name: ROOTS, sds_config: *agent }
      filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: test
          http_filters:
          - name: envoy.filters.http.router
            typed_config: { "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes: [{ match: { prefix: / }, direct_response: { status: 200, body: { inline_string: hello } } }]
"#;

/// A running Envoy, killed with the test.
struct Envoy {
    child: Child,
    port: u16,
    log: PathBuf,
}

impl Envoy {
    /// One that asks for its secrets by `api`, GRPC or DELTA_GRPC.
    fn start(folder: &Folder, socket: &Socket, api: &str, roots: &str, metadata: &str) -> Envoy {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let config = CONFIG
            .replace("SOCKET", &socket.path().display().to_string())
            .replace("PORT", &port.to_string())
            .replace("api_type: API", &format!("api_type: {api}"))
            .replace("ROOTS", roots)
            .replace("METADATA", metadata);
        let (config, log) = (folder.write(&format!("{roots}.yaml"), config), folder.join(&format!("{roots}.log")));
        let output = std::fs::File::create(&log).unwrap();
        // The program itself, not the script that starts it: what is attested and killed is one process.
        let program = interop("../lib/python3.11/site-packages/envoy/_bin/envoy");
        let child = Command::new(program)
            .args(["--concurrency", "1", "--disable-hot-restart", "--log-level", "warning", "--config-path"])
            .arg(config)
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap();
        Envoy { child, port, log }
    }

    /// What `client` (certificate chain and key) gets; none if the connection fails.
    fn get(&self, client: Option<&(PathBuf, PathBuf)>) -> Option<String> {
        let url = format!("https://127.0.0.1:{}/", self.port);
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--insecure", "--max-time", "5", "--write-out", " %{http_code}", &url]);
        if let Some((chain, key)) = client {
            curl.arg("--cert").arg(chain).arg("--key").arg(key);
        }
        let done = curl.output().unwrap();
        done.status.success().then(|| String::from_utf8(done.stdout).unwrap())
    }

    /// The certificate that it shows (DER), and whether openssl finds it good by `roots`.
    fn shows(&self, roots: &Path) -> (Vec<u8>, bool) {
        let at = format!("127.0.0.1:{}", self.port);
        let done = Command::new("openssl")
            .args(["s_client", "-connect", &at, "-x509_strict", "-CAfile"])
            .arg(roots)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&done.stdout).into_owned();
        let pem = said.find("-----BEGIN").map(|at| said[at..].to_owned()).unwrap_or_default();
        let shown = ambit_identity::keys::certificates_from_pem(&pem).unwrap_or_default();
        let leaf = shown.first().map(|der| der.to_vec()).unwrap_or_default();
        (leaf, said.contains("Verify return code: 0 (ok)"))
    }

    fn until(&mut self, what: &str, mut holds: impl FnMut(&Envoy) -> bool) {
        let until = Instant::now() + Duration::from_secs(30);
        while !holds(self) {
            let ended = self.child.try_wait().unwrap();
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            assert!(ended.is_none() && Instant::now() < until, "{what}: {ended:?}\n{log}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Envoy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A trust domain that is openssl's alone.
struct Foreign {
    folder: Folder,
}

impl Foreign {
    fn of(td: &str) -> Foreign {
        let foreign = Foreign { folder: Folder::new(td) };
        foreign.openssl(&format!(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca.key -out ca.pem -days 2 -subj /O={td} \
             -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign \
             -addext subjectAltName=URI:spiffe://{td}"
        ));
        foreign.openssl("x509 -in ca.pem -outform DER -out ca.der");
        foreign
    }
    fn openssl(&self, args: &str) {
        let done = Command::new("openssl").args(args.split_whitespace()).current_dir(self.folder.join("")).output();
        let done = done.unwrap();
        assert!(done.status.success(), "openssl {args}: {}", String::from_utf8_lossy(&done.stderr));
    }
    fn root(&self) -> Vec<u8> {
        std::fs::read(self.folder.join("ca.der")).unwrap()
    }
    /// A leaf with whatever identity, signed by this trust domain's authority.
    fn signs(&self, name: &str, id: &str) -> (PathBuf, PathBuf) {
        let extensions = format!(
            "subjectAltName=critical,URI:{id}\nbasicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n\
             extendedKeyUsage=serverAuth,clientAuth\n"
        );
        self.folder.write("extensions", extensions);
        let (key, csr, pem) = (format!("{name}.key"), format!("{name}.csr"), format!("{name}.pem"));
        self.openssl(&format!(
            "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout {key} -out {csr} -subj /"
        ));
        self.openssl(&format!("x509 -req -in {csr} -CA ca.pem -CAkey ca.key -days 1 -extfile extensions -out {pem}"));
        (self.folder.join(&pem), self.folder.join(&key))
    }
}

/// An SVID as files.
fn written(folder: &Folder, name: &str, svid: &Svid) -> (PathBuf, PathBuf) {
    let chain = certificates_to_pem(svid.chain_der.iter().map(Vec::as_slice));
    let key = SvidKey::from_pkcs8(&svid.key_pkcs8).unwrap().pem();
    (folder.write(&format!("{name}.pem"), chain), folder.write(&format!("{name}.key"), key.as_bytes()))
}

fn svids(name: &str, svid: &Arc<Svid>) -> Svids {
    [(name.parse().unwrap(), Ok(svid.clone()))].into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn envoy_lets_in_each_trust_domain_for_itself_and_rotates_without_a_restart() {
    secrets_are_told_to_envoy("GRPC").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn envoy_that_asks_for_increments_does_too() {
    secrets_are_told_to_envoy("DELTA_GRPC").await;
}

async fn secrets_are_told_to_envoy(api: &str) {
    let (mut west, east, folder) = (Cell::founded("west", 1), Foreign::of("east"), Folder::new("envoy"));
    let envoy = west.entry("envoy", &[&uid()], &["east"]);
    let client = west.entry("client", &["unix:uid:424242"], &[]);
    let mut slice = west.slice(1, &[]);
    slice.entries = vec![envoy, client];
    slice.bundles.push(v1::Bundle {
        trust_domain: "east".into(),
        sequence: 1,
        roots_der: vec![east.root()],
        ..v1::Bundle::default()
    });
    let (issued, first) = (Issued::default(), west.svid("envoy"));
    issued.set_view(west.view(slice.clone()));
    issued.set_svids(svids("envoy", &first));
    let socket = Socket::serve("envoy", &issued);
    let roots = folder.write("west.pem", certificates_to_pem([west.bundle().roots_der[0].as_slice()]));
    let ours = written(&folder, "client", &west.svid("client"));
    let theirs = east.signs("good", "spiffe://east/client");
    let ok = Some("hello 200".to_owned());

    let mut envoy = Envoy::start(&folder, &socket, api, "ALL", "");
    envoy.until("the right client", |envoy| envoy.get(Some(&ours)) == ok);
    for (case, client, answer) in [
        ("own trust domain", Some(ours.clone()), ok.clone()),
        ("federated trust domain", Some(theirs.clone()), ok.clone()),
        ("own trust domain, forged by the federated one", Some(east.signs("forged", "spiffe://west/client")), None),
        ("unknown trust domain", Some(east.signs("unknown", "spiffe://north/client")), None),
        ("no certificate", None, None),
    ] {
        assert_eq!(envoy.get(client.as_ref()), answer, "{case}");
    }
    assert_eq!(envoy.shows(&roots), (first.chain_der[0].clone(), true), "the SVID that was issued, good for openssl");

    let second = west.svid("envoy");
    issued.set_svids(svids("envoy", &second));
    envoy.until("the new SVID", |envoy| envoy.shows(&roots) == (second.chain_der[0].clone(), true));
    assert_eq!(envoy.get(Some(&ours)), ok);
    // East's bundle is withdrawn.
    slice.bundles.pop();
    issued.set_view(west.view(v1::Slice { revision: 2, ..slice }));
    envoy.until("east refused", |envoy| envoy.get(Some(&theirs)).is_none());
    assert_eq!(envoy.get(Some(&ours)), ok);

    // One that wants the plain form: what chains to the own roots.
    let mut plain = Envoy::start(&folder, &socket, api, "ROOTCA", "disable_spiffe_cert_validation: true");
    plain.until("the right client of the plain one", |envoy| envoy.get(Some(&ours)) == ok);
    assert_eq!((plain.get(Some(&theirs)), plain.get(None)), (None, None));
}
