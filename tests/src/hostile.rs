//! A small HTTPS server of the test's own: says what it is told to say, to whoever asks, and keeps what it was asked.

use anyhow::{Context, Result};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

/// What every request is answered, byte for byte.
type Script = Arc<Mutex<Vec<u8>>>;

/// Ends with its value.
pub struct Endpoint {
    /// Where it listens.
    pub at: SocketAddr,
    script: Script,
    asked: Arc<Mutex<Vec<String>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Endpoint {
    /// Serves with this certificate.
    pub async fn start(config: rustls::ServerConfig) -> Result<Endpoint> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let at = listener.local_addr().context("an address")?;
        let (script, asked) = (Script::default(), Arc::new(Mutex::new(Vec::new())));
        let (acceptor, said, heard) = (TlsAcceptor::from(Arc::new(config)), script.clone(), asked.clone());
        let task = tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let (acceptor, said, heard) = (acceptor.clone(), said.clone(), heard.clone());
                tokio::spawn(async move {
                    let Ok(mut tls) = acceptor.accept(tcp).await else { return };
                    let mut request = vec![0; 16 * 1024];
                    let Ok(n) = tls.read(&mut request).await else { return };
                    let text = String::from_utf8_lossy(&request[..n]).into_owned();
                    heard.lock().unwrap_or_else(PoisonError::into_inner).push(text);
                    let answer = said.lock().unwrap_or_else(PoisonError::into_inner).clone();
                    let _ = tls.write_all(&answer).await;
                    let _ = tls.shutdown().await;
                });
            }
        });
        Ok(Endpoint { at, script, asked, task })
    }
    /// From now on says a document.
    pub fn serve(&self, document: &str, headers: &str) {
        let length = document.len();
        self.say(&format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n{headers}Connection: close\r\n\r\n{document}"
        ));
    }
    /// From now on says this.
    pub fn say(&self, text: &str) {
        *self.script.lock().unwrap_or_else(PoisonError::into_inner) = text.as_bytes().to_vec();
    }
    /// The requests so far.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
