//! The agent's local services in a test: a cell whose workload is this very process, and its sockets.

use super::Cell;
use ambit_agent::cgroup::MeshRoot;
use ambit_agent::issued::Issued;
use ambit_agent::tokens::Tokens;
use ambit_agent::workload_api::WorkloadApi;
use ambit_proto::v1;
use bytes::{Buf, BufMut, Bytes};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use tokio::net::UnixListener;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::Channel;

/// A folder that goes away with the test.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new(name: &str) -> Folder {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("ambit-{name}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }
    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
    pub(crate) fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        std::fs::write(self.join(name), bytes).unwrap();
        self.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A served Workload API that goes away with the test.
pub(crate) struct Socket {
    folder: Folder,
    task: tokio::task::JoinHandle<()>,
}

impl Socket {
    pub(crate) fn serve(name: &str, issued: &Issued) -> Socket {
        // Without a cell: no token.
        Socket::with(name, issued, Tokens::new(tokio::sync::watch::channel(None).1, Arc::default()))
    }
    pub(crate) fn with(name: &str, issued: &Issued, tokens: Tokens) -> Socket {
        let folder = Folder::new(name);
        let listener = UnixListener::bind(folder.join("socket")).unwrap();
        let everyone = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        std::fs::set_permissions(folder.join("socket"), everyone).unwrap();
        let serving = WorkloadApi::new(issued.clone(), tokens).serve(listener, mesh());
        Socket { folder, task: tokio::spawn(async move { serving.await.unwrap() }) }
    }
    pub(crate) fn path(&self) -> PathBuf {
        self.folder.join("socket")
    }
    pub(crate) fn endpoint(&self) -> String {
        format!("unix:{}", self.path().display())
    }
    pub(crate) async fn channel(&self) -> Channel {
        tonic::transport::Endpoint::from_shared(self.endpoint()).unwrap().connect().await.unwrap()
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Where cgroups of the unified hierarchy are made.
pub(crate) fn cgroups() -> PathBuf {
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    let mount = mounts.lines().find(|l| l.split(' ').nth(2) == Some("cgroup2")).expect("a cgroup2 mount");
    mount.split(' ').nth(1).unwrap().into()
}

/// A mesh without pods.
pub(crate) fn mesh() -> MeshRoot {
    MeshRoot::find(&cgroups().join("no-such-mesh")).unwrap()
}

/// The selector of this process.
pub(crate) fn uid() -> String {
    format!("unix:uid:{}", nix::unistd::geteuid())
}

/// West, whose workload `me` is this very process, federated with east; north is no peer of `me`.
pub(crate) struct Stage {
    pub(crate) west: Cell,
    pub(crate) east: Cell,
    pub(crate) slice: v1::Slice,
}

pub(crate) fn stage() -> Stage {
    let (mut west, east, north) = (Cell::founded("west", 1), Cell::founded("east", 2), Cell::founded("north", 3));
    let me = west.entry("me", &[&uid()], &["east"]);
    let other = west.entry("other", &["unix:uid:424242"], &[]);
    let mut slice = west.slice(1, &[&east, &north]);
    slice.entries = vec![me, other];
    Stage { west, east, slice }
}

/// The environment that `cargo xtask deps` makes of tests/interop/requirements.txt.
pub(crate) fn interop(program: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("interop");
    let requirements = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("tests").join("interop/requirements.txt");
    let wanted = std::fs::read_to_string(requirements).unwrap();
    let found = std::fs::read_to_string(folder.join("installed")).unwrap_or_default();
    assert!(found == wanted, "{} is not what is required: cargo xtask deps", folder.display());
    folder.join("bin").join(program)
}

/// Messages as they are on the wire.
#[derive(Clone, Copy, Default)]
pub(crate) struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Raw;
    type Decoder = Raw;
    fn encoder(&mut self) -> Raw {
        Raw
    }
    fn decoder(&mut self) -> Raw {
        Raw
    }
}
impl Encoder for Raw {
    type Item = Bytes;
    type Error = tonic::Status;
    fn encode(&mut self, item: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), tonic::Status> {
        to.put(item);
        Ok(())
    }
}
impl Decoder for Raw {
    type Item = Bytes;
    type Error = tonic::Status;
    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, tonic::Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

/// Calls any method with an empty message and the header.
pub(crate) async fn call(channel: Channel, method: &'static str) -> Result<tonic::Streaming<Bytes>, tonic::Status> {
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.unwrap();
    let mut request = tonic::Request::new(Bytes::new());
    request.metadata_mut().insert("workload.spiffe.io", "true".parse().unwrap());
    let method = http::uri::PathAndQuery::from_static(method);
    Ok(client.server_streaming(request, method, Raw).await?.into_inner())
}
