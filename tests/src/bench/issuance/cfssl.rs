//! Their side: cfssl as Debian packages it, one process, its HTTP API without TLS, its CA in memory.

use crate::process::{Folder, Started, free_address, must_run};
use anyhow::{Context, Result, bail, ensure};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256};
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const PATIENCE: Duration = Duration::from_secs(20);
/// An answer with one certificate is about a kilobyte.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

pub(super) struct Cfssl {
    process: Started,
    at: SocketAddr,
    // After the process, which reads in it.
    _folder: Folder,
}

/// What the package's program says of itself.
pub(super) fn version() -> Result<String> {
    let told = must_run(&["cfssl", "version"]).context("cfssl (Debian package golang-cfssl; `cargo xtask deps`)")?;
    let line = told.lines().find_map(|line| line.strip_prefix("Version:")).unwrap_or_default();
    Ok(format!("cfssl {}", line.trim()))
}

impl Cfssl {
    /// One server with a P-256 CA that makes leaves as ours are: an hour, both usages.
    pub(super) async fn start() -> Result<Cfssl> {
        let folder = Folder::new()?;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "bench");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let file = |name: &str| folder.path(name).display().to_string();
        let (ca, ca_key, config) = (file("ca.pem"), file("ca.key"), file("config.json"));
        std::fs::write(&ca, params.self_signed(&key)?.pem())?;
        std::fs::write(&ca_key, key.serialize_pem())?;
        let profile = serde_json::json!({ "signing": { "default": {
            "expiry": "1h", "usages": ["digital signature", "server auth", "client auth"],
        } } });
        std::fs::write(&config, profile.to_string())?;
        let at = free_address()?;
        let (host, port) = (at.ip().to_string(), at.port().to_string());
        let listen = ["-address", &host, "-port", &port, "-loglevel", "4"];
        let files = ["-ca", &ca, "-ca-key", &ca_key, "-config", &config];
        let argv = [&["cfssl", "serve"][..], &listen, &files].concat();
        let process = Started::start(&argv, &folder.path("log"))?;
        let started = Instant::now();
        while TcpStream::connect(at).await.is_err() {
            ensure!(started.elapsed() < PATIENCE, "cfssl does not listen within {PATIENCE:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(Cfssl { process, at, _folder: folder })
    }

    pub(super) fn id(&self) -> u32 {
        self.process.id()
    }

    pub(super) async fn connect(&self) -> Result<Connection> {
        let stream = TcpStream::connect(self.at).await?;
        stream.set_nodelay(true)?;
        Ok(Connection { stream, host: self.at.to_string(), buffer: Vec::new() })
    }
}

/// One kept connection, HTTP/1.1.
pub(super) struct Connection {
    stream: TcpStream,
    host: String,
    buffer: Vec<u8>,
}

impl Connection {
    /// Has one request signed.
    pub(super) async fn sign(&mut self, csr_pem: &str) -> Result<()> {
        let body = serde_json::json!({ "certificate_request": csr_pem }).to_string();
        let head = format!(
            "POST /api/v1/cfssl/sign HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            self.host,
            body.len()
        );
        self.stream.write_all(&[head.as_bytes(), body.as_bytes()].concat()).await?;
        let answer = self.answer().await?;
        let answer: serde_json::Value = serde_json::from_slice(&answer)?;
        let certificate = answer["result"]["certificate"].as_str().unwrap_or_default();
        ensure!(answer["success"] == true && certificate.contains("BEGIN CERTIFICATE"), "{answer}");
        Ok(())
    }

    async fn answer(&mut self) -> Result<Vec<u8>> {
        self.buffer.clear();
        loop {
            ensure!(self.buffer.len() < ANSWER_BYTES_MAX, "an answer of more than {ANSWER_BYTES_MAX} bytes");
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                bail!("the connection ended");
            }
            let Some(end) = self.buffer.windows(4).position(|window| window == b"\r\n\r\n") else { continue };
            let head = String::from_utf8_lossy(self.buffer.get(..end).unwrap_or_default()).to_ascii_lowercase();
            let length =
                head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse::<usize>().ok());
            let length = length.with_context(|| format!("a length: {head}"))?;
            if let Some(body) = self.buffer.get(end + 4..end + 4 + length) {
                return Ok(body.to_vec());
            }
        }
    }
}
