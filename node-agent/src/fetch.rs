//! `ambit-agent fetch`: a Workload API client that writes what it gets, as a workload without one would.

use ambit_identity::keys::certificates_to_pem;
use ambit_proto::workload::X509svidRequest;
use ambit_proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use anyhow::{Context, bail};
use hyper_util::rt::TokioIo;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use tokio::net::UnixStream;

/// Fetches the caller's first X.509-SVID and writes `svid.pem` (chain), `svid.key` (0600) and `bundle.pem` to `out`.
pub async fn fetch(socket: &Path, out: &Path) -> anyhow::Result<String> {
    let path = socket.to_owned();
    let connect = move |_: tonic::transport::Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    };
    let channel = tonic::transport::Endpoint::from_static("http://workload")
        .connect_with_connector(tower::service_fn(connect))
        .await
        .with_context(|| format!("no Workload API at {}", socket.display()))?;
    let mut request = tonic::Request::new(X509svidRequest {});
    request.metadata_mut().insert("workload.spiffe.io", tonic::metadata::MetadataValue::from_static("true"));
    let mut stream = SpiffeWorkloadApiClient::new(channel).fetch_x509svid(request).await?.into_inner();
    let Some(answer) = stream.message().await? else { bail!("the stream ended without an answer") };
    let Some(svid) = answer.svids.into_iter().next() else { bail!("no SVID in the answer") };
    let pem = |ders: &[u8]| anyhow::Ok(certificates_to_pem(split(ders)?));
    write(&out.join("svid.pem"), pem(&svid.x509_svid)?.as_bytes())?;
    write(&out.join("bundle.pem"), pem(&svid.bundle)?.as_bytes())?;
    let key = ambit_identity::SvidKey::from_pkcs8(&svid.x509_svid_key)?.pem();
    write(&out.join("svid.key"), key.as_bytes())?;
    Ok(svid.spiffe_id)
}

/// Concatenated DER certificates (Workload API section 5.2.1): each begins with SEQUENCE and a two-byte length.
fn split(mut ders: &[u8]) -> anyhow::Result<Vec<&[u8]>> {
    let mut all = Vec::new();
    while !ders.is_empty() {
        let [0x30, 0x82, high, low, ..] = *ders else { bail!("not a certificate") };
        let length = 4 + usize::from(high) * 256 + usize::from(low);
        let (one, rest) = ders.split_at_checked(length).context("a certificate cut short")?;
        all.push(one);
        ders = rest;
    }
    Ok(all)
}

fn write(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    use std::io::Write;
    let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(bytes).with_context(|| format!("writing {}", path.display()))
}
