//! Many streams of the Workload API at once, opened inside a pod, each over a connection of its own, as by as many programs.

use crate::lab::LabError;
use ambit_model::Refusal;
use ambit_model::refusal::Code;
use ambit_proto::workload::X509svidRequest;
use ambit_proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use hyper_util::rt::TokioIo;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tonic::metadata::MetadataValue;
use tonic::transport::Endpoint;

/// One stream heard of this hint.
struct Heard {
    stream: usize,
    hint: String,
    at_ms: u128,
}

/// Opens `count` streams; a line for each hint once the last of them heard of it: the hint, and when the first and the last
/// did, in milliseconds since the Unix epoch. Until the agent ends the streams.
///
/// # Errors
/// A stream that cannot be opened.
pub fn run(socket: &Path, count: usize) -> Result<(), LabError> {
    let failed = |source| LabError::Io { path: socket.to_owned(), source };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    runtime.block_on(async {
        let (tell, mut told) = mpsc::channel(count.max(1));
        for stream in 0..count {
            open(socket.to_owned(), stream, tell.clone()).await?;
        }
        drop(tell);
        let mut heard: BTreeMap<String, (u128, BTreeSet<usize>)> = BTreeMap::new();
        while let Some(Heard { stream, hint, at_ms }) = told.recv().await {
            let (first, by) = heard.entry(hint.clone()).or_insert_with(|| (at_ms, BTreeSet::new()));
            if by.insert(stream) && by.len() == count {
                writeln!(std::io::stdout(), "{hint} {first} {at_ms}").map_err(failed)?;
            }
        }
        Ok(())
    })
}

async fn open(socket: PathBuf, stream: usize, tell: mpsc::Sender<Heard>) -> Result<(), LabError> {
    let broken = |what: &dyn std::fmt::Display| {
        Refusal::new(Code::Unavailable, "a stream of the Workload API", what.to_string())
    };
    let dial = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let channel =
        Endpoint::from_static("http://workload").connect_with_connector(dial).await.map_err(|e| broken(&e))?;
    let mut client = SpiffeWorkloadApiClient::new(channel);
    let mut request = tonic::Request::new(X509svidRequest {});
    request.metadata_mut().insert("workload.spiffe.io", MetadataValue::from_static("true"));
    let mut answers = client.fetch_x509svid(request).await.map_err(|s| broken(&s))?.into_inner();
    tokio::spawn(async move {
        // The connection lives as long as its stream.
        let _client = client;
        while let Ok(Some(message)) = answers.message().await {
            let at_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis());
            let hint = message.svids.into_iter().next().map(|svid| svid.hint).unwrap_or_default();
            if tell.send(Heard { stream, hint, at_ms }).await.is_err() {
                return;
            }
        }
    });
    Ok(())
}
