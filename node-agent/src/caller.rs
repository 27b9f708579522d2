//! Who is at the other end of a Unix socket: uid, gid and cgroup, read from the kernel when the connection is accepted.

use ambit_model::Selector;
use nix::{getsockopt_impl, sockopt_impl};
use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixStream;
use tokio::net::unix::UCred;
use tonic::transport::server::Connected;

sockopt_impl!(
    /// A pidfd of the peer (Linux 6.5): names the process itself, not a number that another may get.
    PeerPidFd, GetOnly, libc::SOL_SOCKET, libc::SO_PEERPIDFD, OwnedFd
);

/// Who calls. One that could not be identified is nobody: no selectors, no process.
#[derive(Clone, Debug, Default)]
pub struct Caller {
    /// What it was recognised by.
    pub selectors: BTreeSet<Selector>,
    process: Option<Arc<AsyncFd<OwnedFd>>>,
}

/// Where the mesh's cgroups are, as `/proc/<pid>/cgroup` writes it: relative to the cgroup2 mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshRoot(PathBuf);

impl MeshRoot {
    /// Finds the cgroup2 mount that `cgroup_root` lies on.
    pub fn find(cgroup_root: &Path) -> io::Result<Self> {
        Self::in_mounts(&std::fs::read_to_string("/proc/mounts")?, cgroup_root)
            .ok_or_else(|| io::Error::other(format!("{} is not on a cgroup2 mount", cgroup_root.display())))
    }
    fn in_mounts(mounts: &str, cgroup_root: &Path) -> Option<Self> {
        mounts
            .lines()
            .filter_map(|line| {
                let mut words = line.split(' ');
                let (at, kind) = (words.nth(1)?, words.next()?);
                (kind == "cgroup2").then(|| cgroup_root.strip_prefix(at).ok()).flatten()
            })
            .min_by_key(|below| below.as_os_str().len())
            .map(|below| Self(Path::new("/").join(below)))
    }
    /// The mesh cgroup that a process is in, given its `/proc/<pid>/cgroup`.
    fn cgroup_of<'a>(&self, proc_cgroup: &'a str) -> Option<&'a str> {
        let path = proc_cgroup.lines().find_map(|l| l.strip_prefix("0::"))?;
        Path::new(path).strip_prefix(&self.0).ok()?.components().next()?.as_os_str().to_str()
    }
}

impl Caller {
    /// Reads the selectors of the process behind `stream`; of a process that is gone, none. Needs `SO_PEERPIDFD` (Linux
    /// 6.5): without it nothing tells the process that connected from one that got its number later, so nobody is
    /// identified. (Start times do not: a process that began between connect and accept could bear the number too.)
    pub fn of(stream: &UnixStream, mesh: &MeshRoot) -> io::Result<Self> {
        let pidfd = nix::sys::socket::getsockopt(&stream, PeerPidFd).map_err(|e| {
            io::Error::new(io::Error::from(e).kind(), format!("no pidfd of the caller (SO_PEERPIDFD, Linux 6.5): {e}"))
        });
        Self::known_by(pidfd, stream.peer_cred()?, mesh)
    }

    fn known_by(pidfd: io::Result<OwnedFd>, cred: UCred, mesh: &MeshRoot) -> io::Result<Self> {
        #[allow(
            deprecated,
            reason = "its successor is unsafe for types that may lie about their descriptor; OwnedFd does not"
        )]
        let process = AsyncFd::with_interest(pidfd?, Interest::READABLE)?;
        let mut selectors = BTreeSet::from([Selector::UnixUid(cred.uid()), Selector::UnixGid(cred.gid())]);
        if let Some(pid) = cred.pid() {
            let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
            if let Some(name) = mesh.cgroup_of(&text) {
                selectors.extend(format!("cgroup:{name}").parse::<Selector>().ok());
            }
        }
        let caller = Self { selectors, process: Some(Arc::new(process)) };
        // If the process has exited, the number may already be another's and what was read may be too.
        Ok(if caller.has_ended() { Self::default() } else { caller })
    }

    /// Whether the process that connected is gone. Who holds its socket now is somebody else.
    pub fn has_ended(&self) -> bool {
        // A question that the kernel does not answer counts as the end.
        self.process.as_ref().is_none_or(|process| exited(process.get_ref()).unwrap_or(true))
    }

    /// Waits until it is gone.
    pub async fn ended(&self) {
        while !self.has_ended() {
            let Some(process) = &self.process else { return };
            // A pidfd becomes readable when its process ends (pidfd_open(2)).
            match process.readable().await {
                Ok(_still_readable) if self.has_ended() => return,
                Ok(mut spurious) => spurious.clear_ready(),
                Err(_) => return,
            }
        }
    }
}

fn exited(pidfd: &OwnedFd) -> io::Result<bool> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    Ok(poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO)? > 0)
}

/// A connection together with its caller, for tonic.
#[derive(Debug)]
pub struct Identified {
    stream: UnixStream,
    caller: Arc<Caller>,
}

impl Identified {
    /// Identifies the peer of `stream` now.
    pub fn accept(stream: UnixStream, mesh: &MeshRoot) -> Self {
        let caller = Caller::of(&stream, mesh).unwrap_or_else(|error| {
            tracing::warn!(%error, "caller not identified");
            Caller::default()
        });
        Self { stream, caller: Arc::new(caller) }
    }
}

impl Connected for Identified {
    type ConnectInfo = Arc<Caller>;
    fn connect_info(&self) -> Self::ConnectInfo {
        self.caller.clone()
    }
}

impl AsyncRead for Identified {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Identified {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_cgroup_below_the_mesh_counts() {
        let mounts = "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        let mesh = MeshRoot::in_mounts(mounts, Path::new("/sys/fs/cgroup/unified/n1/mesh")).unwrap();
        assert_eq!(mesh, MeshRoot("/n1/mesh".into()));
        assert_eq!(MeshRoot::in_mounts(mounts, Path::new("/tmp/mesh")), None);
        for (text, name) in [
            ("1:cpu:/x\n0::/n1/mesh/web\n", Some("web")),
            ("0::/n1/mesh/web/inner/deeper\n", Some("web")),
            ("0::/n1/mesh\n", None),
            ("0::/n1/meshes/web\n", None),
            ("0::/n2/mesh/web\n", None),
            ("4:name=x:/n1/mesh/web\n", None),
            ("", None),
        ] {
            assert_eq!(mesh.cgroup_of(text), name, "{text:?}");
        }
    }

    #[tokio::test]
    async fn the_peer_of_a_socket_is_this_process() {
        let (here, _there) = UnixStream::pair().unwrap();
        let caller = Caller::of(&here, &MeshRoot("/nowhere/mesh".into())).unwrap();
        let uid = nix::unistd::geteuid().as_raw();
        assert!(caller.selectors.contains(&Selector::UnixUid(uid)), "{caller:?}");
        assert!(!caller.has_ended());
    }

    #[tokio::test]
    async fn without_a_pidfd_and_after_its_end_a_process_is_nobody() {
        let mesh = MeshRoot("/nowhere/mesh".into());
        let (here, _there) = UnixStream::pair().unwrap();
        let old_kernel = Err(io::Error::from_raw_os_error(libc::ENOPROTOOPT));
        assert!(Caller::known_by(old_kernel, here.peer_cred().unwrap(), &mesh).is_err());
        assert!(Caller::default().has_ended());

        let path = std::env::temp_dir().join(format!("ambit-caller-{}.sock", std::process::id()));
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let script = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); sys.stdin.read()";
        let mut child = std::process::Command::new("python3")
            .args(["-c", script])
            .arg(&path)
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let caller = Caller::of(&stream, &mesh).unwrap();
        assert!(!caller.has_ended() && !caller.selectors.is_empty());
        let waiting = tokio::time::timeout(std::time::Duration::from_millis(200), caller.ended()).await;
        assert!(waiting.is_err(), "it lives");
        drop(child.stdin.take());
        tokio::time::timeout(std::time::Duration::from_secs(10), caller.ended()).await.expect("it ended");
        assert!(caller.has_ended());
        child.wait().unwrap();
        // Its number is free now: what /proc says of it is not of the caller.
        assert!(Caller::of(&stream, &mesh).map_or(true, |late| late.selectors.is_empty()));
        std::fs::remove_file(&path).unwrap();
    }
}
