//! Their side: etcd as Debian packages it, three members, its v3 API over tonic.

use super::load::Client;
use super::{MEMBERS, System, VALUE_BYTES};
use crate::process::{Folder, Started, free_ports, must_run};
use anyhow::{Context, Result, bail};
use hyper_util::rt::TokioIo;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, SanType,
};
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Request, Status};

const PATIENCE: Duration = Duration::from_secs(30);

/// The messages of etcd's `rpc.proto` and `kv.proto` that are used here, by their field numbers.
mod wire {
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Header {
        #[prost(uint64, tag = "2")]
        pub(super) member_id: u64,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct PutRequest {
        #[prost(bytes = "vec", tag = "1")]
        pub(super) key: Vec<u8>,
        #[prost(bytes = "vec", tag = "2")]
        pub(super) value: Vec<u8>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct PutResponse {
        #[prost(message, optional, tag = "1")]
        pub(super) header: Option<Header>,
    }
    /// `serializable` (7) is left out: false, a linearizable read.
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct RangeRequest {
        #[prost(bytes = "vec", tag = "1")]
        pub(super) key: Vec<u8>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct KeyValue {
        #[prost(bytes = "vec", tag = "1")]
        pub(super) key: Vec<u8>,
        #[prost(bytes = "vec", tag = "5")]
        pub(super) value: Vec<u8>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct RangeResponse {
        #[prost(message, repeated, tag = "2")]
        pub(super) kvs: Vec<KeyValue>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct StatusRequest {}
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct StatusResponse {
        #[prost(message, optional, tag = "1")]
        pub(super) header: Option<Header>,
        #[prost(uint64, tag = "4")]
        pub(super) leader: u64,
    }
}

/// Certificates of all members and the client, who trust one CA.
struct Pki {
    ca: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
    client: Arc<rustls::ClientConfig>,
}

struct Member {
    argv: Vec<String>,
    log: PathBuf,
    address: SocketAddr,
    process: Option<Started>,
}

pub(super) struct Etcd {
    members: Vec<Member>,
    pki: Option<Pki>,
    // After the processes, which write in it.
    _folder: Folder,
}

/// What the package's program says of itself.
pub(super) fn version() -> Result<String> {
    let told = must_run(&["etcd", "--version"]).context("etcd (Debian package etcd-server; `cargo xtask deps`)")?;
    Ok(told.lines().next().unwrap_or_default().replace("etcd Version: ", "etcd "))
}

impl Etcd {
    /// Three members, with mutual TLS for clients and between members, or in plaintext. The timers are ours.
    pub(super) async fn start(tls: bool) -> Result<Etcd> {
        let folder = Folder::new()?;
        let pki = if tls { Some(Pki::new(&folder)?) } else { None };
        let scheme = if tls { "https" } else { "http" };
        let port = free_ports(u16::try_from(2 * MEMBERS)?)?;
        let at = |n: usize| format!("{scheme}://127.0.0.1:{}", usize::from(port) + n);
        let cluster: Vec<String> = (0..MEMBERS).map(|n| format!("m{n}={}", at(2 * n + 1))).collect();
        let mut members = Vec::new();
        for n in 0..MEMBERS {
            let mut argv: Vec<String> = ["etcd", "--logger=zap", "--log-outputs=stderr"].map(String::from).to_vec();
            argv.extend([
                format!("--name=m{n}"),
                format!("--data-dir={}", folder.path(&format!("m{n}")).display()),
                format!("--listen-client-urls={}", at(2 * n)),
                format!("--advertise-client-urls={}", at(2 * n)),
                format!("--listen-peer-urls={}", at(2 * n + 1)),
                format!("--initial-advertise-peer-urls={}", at(2 * n + 1)),
                format!("--initial-cluster={}", cluster.join(",")),
                format!("--heartbeat-interval={}", super::HEARTBEAT_MS),
                format!("--election-timeout={}", super::ELECTION_MS),
            ]);
            argv.extend(pki.iter().flat_map(Pki::flags));
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port + u16::try_from(2 * n)?));
            members.push(Member { argv, log: folder.path(&format!("m{n}.log")), address, process: None });
        }
        let mut etcd = Etcd { members, pki, _folder: folder };
        for n in 1..=MEMBERS {
            etcd.restart(n)?;
        }
        etcd.leader().await?;
        Ok(etcd)
    }

    fn member(&self, number: usize) -> Result<&Member> {
        number.checked_sub(1).and_then(|at| self.members.get(at)).with_context(|| format!("member {number}"))
    }
    fn member_mut(&mut self, number: usize) -> Result<&mut Member> {
        number.checked_sub(1).and_then(|at| self.members.get_mut(at)).with_context(|| format!("member {number}"))
    }

    /// The leader, if every member that runs is or names the same one.
    async fn agreed_leader(&self) -> Result<usize> {
        let (mut leader, mut named) = (None, Vec::new());
        for (n, member) in (1..).zip(&self.members) {
            if member.process.is_none() {
                continue;
            }
            let status = self.connect(n).await?.status().await?;
            named.push(status.leader);
            if status.header.is_some_and(|h| h.member_id == status.leader) {
                leader = Some(n);
            }
        }
        named.dedup();
        if named.len() > 1 {
            bail!("members name {named:?}");
        }
        leader.context("no leader")
    }
}

impl System for Etcd {
    type Client = Kv;

    async fn connect(&self, member: usize) -> Result<Kv> {
        let at = self.member(member)?.address;
        let tls = self.pki.as_ref().map(|pki| TlsConnector::from(pki.client.clone()));
        let connect = move |_: Uri| {
            let tls = tls.clone();
            async move {
                let tcp = TcpStream::connect(at).await?;
                tcp.set_nodelay(true)?;
                let stream: Box<dyn Stream> = match tls {
                    Some(tls) => Box::new(tls.connect(ServerName::IpAddress(at.ip().into()), tcp).await?),
                    None => Box::new(tcp),
                };
                Ok::<_, std::io::Error>(TokioIo::new(stream))
            }
        };
        let endpoint = Endpoint::from_shared(format!("http://{at}"))?.connect_timeout(Duration::from_secs(3));
        let channel = endpoint.connect_with_connector(tower::service_fn(connect)).await?;
        Ok(Kv { channel })
    }
    async fn leader(&self) -> Result<usize> {
        let until = Instant::now() + PATIENCE;
        loop {
            match self.agreed_leader().await {
                Err(_) if Instant::now() < until => tokio::time::sleep(Duration::from_millis(30)).await,
                outcome => return outcome,
            }
        }
    }
    fn kill(&mut self, member: usize) -> Result<()> {
        self.member_mut(member)?.process.take().map(drop).with_context(|| format!("member {member} was down already"))
    }
    fn restart(&mut self, number: usize) -> Result<()> {
        let member = self.member_mut(number)?;
        let argv: Vec<&str> = member.argv.iter().map(String::as_str).collect();
        member.process = Some(Started::start(&argv, &member.log)?);
        Ok(())
    }
    fn process(&mut self, number: usize) -> Result<&mut Started> {
        self.member_mut(number)?.process.as_mut().with_context(|| format!("member {number} is down"))
    }
}

/// With or without TLS.
trait Stream: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin {}
impl<T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin> Stream for T {}

/// A connection to one member.
#[derive(Clone)]
pub(super) struct Kv {
    channel: Channel,
}

impl Kv {
    async fn call<Q, A>(&mut self, path: &'static str, message: Q) -> Result<A, Status>
    where
        Q: prost::Message + Default + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let mut grpc = tonic::client::Grpc::new(&mut self.channel);
        grpc.ready().await.map_err(|e| Status::unavailable(e.to_string()))?;
        let codec = tonic_prost::ProstCodec::<Q, A>::default();
        let path = PathAndQuery::from_static(path);
        Ok(grpc.unary(Request::new(message), path, codec).await?.into_inner())
    }
    async fn status(&mut self) -> Result<wire::StatusResponse, Status> {
        self.call("/etcdserverpb.Maintenance/Status", wire::StatusRequest {}).await
    }
}

impl Client for Kv {
    async fn put(&mut self, n: u64) -> Result<(), Status> {
        let request = wire::PutRequest { key: key(n), value: vec![b'x'; VALUE_BYTES] };
        self.call::<_, wire::PutResponse>("/etcdserverpb.KV/Put", request).await.map(drop)
    }
    async fn get(&mut self, n: u64) -> Result<(), Status> {
        let answer: wire::RangeResponse =
            self.call("/etcdserverpb.KV/Range", wire::RangeRequest { key: key(n) }).await?;
        match answer.kvs.first() {
            Some(kv) if kv.key == key(n) && kv.value.len() == VALUE_BYTES => Ok(()),
            _ => Err(Status::aborted("another value")),
        }
    }
}

fn key(n: u64) -> Vec<u8> {
    format!("bench-{n:09}").into_bytes()
}

impl Pki {
    fn new(folder: &Folder) -> Result<Pki> {
        let (ca_key, key) =
            (KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?, KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?);
        let mut params = named("bench CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let ca = params.self_signed(&ca_key)?;
        let mut leaf = named("member");
        leaf.subject_alt_names = vec![SanType::IpAddress(Ipv4Addr::LOCALHOST.into())];
        leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let leaf = leaf.signed_by(&key, &Issuer::new(params, ca_key))?;
        let write = |name: &str, pem: String| {
            let path = folder.path(name);
            std::fs::write(&path, pem).map(|()| path)
        };
        let mut roots = RootCertStore::empty();
        roots.add(ca.der().clone())?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let chain: Vec<CertificateDer<'static>> = vec![leaf.der().clone()];
        let private = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        let mut client = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, private)?;
        client.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Pki {
            ca: write("ca.pem", ca.pem())?,
            certificate: write("member.pem", leaf.pem())?,
            key: write("member.key", key.serialize_pem())?,
            client: Arc::new(client),
        })
    }

    fn flags(&self) -> Vec<String> {
        let (ca, certificate, key) = (self.ca.display(), self.certificate.display(), self.key.display());
        ["", "peer-"]
            .iter()
            .flat_map(|of| {
                [
                    format!("--{of}trusted-ca-file={ca}"),
                    format!("--{of}cert-file={certificate}"),
                    format!("--{of}key-file={key}"),
                    format!("--{of}client-cert-auth"),
                ]
            })
            .collect()
    }
}

fn named(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}
