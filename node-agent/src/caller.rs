//! Who is at the other end of a Unix socket: the process that connected, as the kernel names it.

use crate::cgroup::MeshRoot;
use crate::places::Place;
use crate::process::{Facts, Process};
use nix::{getsockopt_impl, sockopt_impl};
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::net::unix::UCred;
use tonic::transport::server::Connected;

sockopt_impl!(
    /// A pidfd of the peer (Linux 6.5): names the process itself, not a number that another may get.
    PeerPidFd, GetOnly, libc::SOL_SOCKET, libc::SO_PEERPIDFD, OwnedFd
);

/// Who calls.
#[derive(Clone, Debug)]
pub struct Caller {
    process: Arc<Process>,
    /// Effective when it connected.
    uid: u32,
    gid: u32,
    mesh: Arc<MeshRoot>,
}

impl Caller {
    /// The process behind `stream`; an error if it is gone. Needs `SO_PEERPIDFD` (Linux 6.5): without it nothing tells the
    /// process that connected from one that got its number later, so nobody is identified. (Start times do not: a process
    /// that began between connect and accept could bear the number too.)
    pub fn of(stream: &UnixStream, mesh: &Arc<MeshRoot>) -> io::Result<Self> {
        let pidfd = nix::sys::socket::getsockopt(&stream, PeerPidFd).map_err(|e| {
            io::Error::new(io::Error::from(e).kind(), format!("no pidfd of the caller (SO_PEERPIDFD, Linux 6.5): {e}"))
        });
        Self::known_by(pidfd, stream.peer_cred()?, mesh)
    }

    fn known_by(pidfd: io::Result<OwnedFd>, cred: UCred, mesh: &Arc<MeshRoot>) -> io::Result<Self> {
        // Of a process outside our pid namespace there is no number, and nothing can be read.
        let pid = cred.pid().filter(|pid| *pid > 0).ok_or_else(|| io::Error::other("the caller has no number here"))?;
        let process = Arc::new(Process::of(pidfd?, pid)?);
        Ok(Self { process, uid: cred.uid(), gid: cred.gid(), mesh: mesh.clone() })
    }

    /// The process.
    pub fn process(&self) -> &Arc<Process> {
        &self.process
    }
    /// The mesh of this node.
    pub fn mesh(&self) -> &MeshRoot {
        &self.mesh
    }
    /// What it is now; an error if it no longer runs as whom it connected as.
    pub fn facts(&self) -> io::Result<Facts> {
        let facts = self.process.facts()?;
        if (facts.uid, facts.gid) != (self.uid, self.gid) {
            return Err(io::Error::other("the process changed its ids after it connected"));
        }
        Ok(facts)
    }
}

/// A connection together with its caller, for tonic. Nobody is one that could not be identified.
#[derive(Debug)]
pub struct Identified {
    stream: UnixStream,
    caller: Option<Caller>,
    /// Held while it is open.
    _place: Place,
}

impl Identified {
    /// Identifies the peer of `stream` now.
    pub fn accept(stream: UnixStream, place: Place, mesh: &Arc<MeshRoot>) -> Self {
        let caller =
            Caller::of(&stream, mesh).inspect_err(|error| tracing::debug!(%error, "caller not identified")).ok();
        Self { stream, caller, _place: place }
    }
}

impl Connected for Identified {
    type ConnectInfo = Option<Caller>;
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
    use ambit_model::Selector;
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;
    use std::process::{Child, Command, Stdio};

    fn mesh() -> Arc<MeshRoot> {
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
        let mount = mounts.lines().find(|l| l.split(' ').nth(2) == Some("cgroup2")).expect("a cgroup2 mount");
        Arc::new(MeshRoot::find(&Path::new(mount.split(' ').nth(1).unwrap()).join("no-such-mesh")).unwrap())
    }

    /// A child that connects to the socket at `path` and lives until its standard input ends.
    fn connecting(path: &Path) -> Child {
        let script = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); sys.stdin.read()";
        Command::new("python3").args(["-c", script]).arg(path).stdin(Stdio::piped()).spawn().unwrap()
    }

    fn listener(name: &str) -> (tokio::net::UnixListener, std::path::PathBuf) {
        let path = std::env::temp_dir().join(format!("ambit-{name}-{}.sock", std::process::id()));
        let _ = std::fs::remove_file(&path);
        (tokio::net::UnixListener::bind(&path).unwrap(), path)
    }

    #[tokio::test]
    async fn the_peer_of_a_socket_is_this_process() {
        let (here, _there) = UnixStream::pair().unwrap();
        let caller = Caller::of(&here, &mesh()).unwrap();
        assert!(!caller.process().has_ended());
        let selectors = caller.facts().unwrap().selectors(caller.mesh());
        let me = std::env::current_exe().unwrap().canonicalize().unwrap();
        let mine =
            [Selector::UnixUid(nix::unistd::geteuid().as_raw()), Selector::UnixGid(nix::unistd::getegid().as_raw())];
        for selector in mine.into_iter().chain([format!("unix:path:{}", me.display()).parse().unwrap()]) {
            assert!(selectors.contains(&selector), "{selector} not in {selectors:?}");
        }
        // sha256sum of coreutils is the other opinion.
        let said = Command::new("sha256sum").arg(&me).output().unwrap().stdout;
        let digest = caller.process().clone().program_sha256(me.clone()).await.unwrap();
        assert_eq!(hex::encode(digest), String::from_utf8_lossy(&said[..64]));
        assert_eq!(caller.process().clone().program_sha256("/usr/bin/env".into()).await, None, "another program");
    }

    #[tokio::test]
    async fn a_program_that_is_not_the_file_of_its_path_has_neither_path_nor_hash() {
        let (listener, path) = listener("program");
        let program = path.with_extension("python");
        let (mesh, python) = (mesh(), std::fs::canonicalize(which("python3")).unwrap());
        let library = python.parent().unwrap().with_file_name("lib");
        let script = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); sys.stdin.read()";
        // In place; gone since; another file in its place; a bind mount that only the process sees.
        for (case, named) in [("there", true), ("gone", false), ("replaced", false), ("mounted", false)] {
            std::fs::copy(&python, &program).unwrap();
            let mount = "mount --bind \"$2\" \"$0\" && exec \"$0\" -c \"$3\" \"$1\"";
            let mut command = if case == "mounted" {
                std::fs::write(&program, "this is no program").unwrap();
                let mut command = Command::new("unshare");
                command.args(["--mount", "sh", "-c", mount]).arg(&program).arg(&path).arg(&python).arg(script);
                command
            } else {
                let mut command = Command::new(&program);
                command.args(["-c", script]).arg(&path);
                command
            };
            let python_home = python.parent().unwrap().parent().unwrap();
            command.env("LD_LIBRARY_PATH", &library).env("PYTHONHOME", python_home).stdin(Stdio::piped());
            let mut child = command.spawn().unwrap();
            let (stream, _) = listener.accept().await.unwrap();
            let caller = Caller::of(&stream, &mesh).unwrap();
            if case != "there" && case != "mounted" {
                std::fs::remove_file(&program).unwrap();
            }
            if case == "replaced" {
                std::fs::copy(&python, &program).unwrap();
            }
            let facts = caller.facts().unwrap();
            let expected = named.then(|| program.clone());
            assert_eq!(facts.program, expected, "{case}");
            let digest = caller.process().clone().program_sha256(program.clone()).await;
            assert_eq!(digest.is_some(), named, "{case}");
            drop(child.stdin.take());
            child.wait().unwrap();
            let _ = std::fs::remove_file(&program);
        }
        std::fs::remove_file(&path).unwrap();
    }

    fn which(program: &str) -> std::path::PathBuf {
        let told = Command::new(program).args(["-c", "import sys; print(sys.executable)"]).output().unwrap();
        String::from_utf8(told.stdout).unwrap().trim().into()
    }

    #[tokio::test]
    async fn without_a_pidfd_and_after_its_end_a_process_is_nobody() {
        let mesh = mesh();
        let (here, _there) = UnixStream::pair().unwrap();
        let old_kernel = Err(io::Error::from_raw_os_error(libc::ENOPROTOOPT));
        assert!(Caller::known_by(old_kernel, here.peer_cred().unwrap(), &mesh).is_err());

        let (listener, path) = listener("caller");
        let mut child = connecting(&path);
        let (stream, _) = listener.accept().await.unwrap();
        let caller = Caller::of(&stream, &mesh).unwrap();
        assert!(!caller.process().has_ended() && caller.facts().is_ok());
        let process = caller.process();
        let waiting = tokio::time::timeout(std::time::Duration::from_millis(200), process.ended()).await;
        assert!(waiting.is_err(), "it lives");
        drop(child.stdin.take());
        tokio::time::timeout(std::time::Duration::from_secs(10), process.ended()).await.expect("it ended");
        assert!(process.has_ended() && caller.facts().is_err());
        child.wait().unwrap();
        assert!(Caller::of(&stream, &mesh).is_err());
        std::fs::remove_file(&path).unwrap();
    }

    /// Each time one process connects and ends, and another one gets its number: before the connection is accepted, and
    /// after. The other one is never taken for the caller, though the number of the caller is its own.
    #[tokio::test]
    async fn a_number_used_again_gives_nobody_anothers_identity() {
        let (mesh, (listener, path)) = (mesh(), listener("reuse"));
        let mut reused = 0;
        for attempt in 0..400 {
            if reused == 40 {
                break;
            }
            let mut first = connecting(&path);
            let pid = i32::try_from(first.id()).unwrap();
            let (stream, _) = listener.accept().await.unwrap();
            let early = attempt % 2 == 0;
            let caller = early.then(|| Caller::of(&stream, &mesh).unwrap());
            drop(first.stdin.take());
            first.wait().unwrap();
            // Linux gives the next number after this one, unless somebody else is faster.
            std::fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).unwrap();
            let mut second = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
            if i32::try_from(second.id()).unwrap() == pid {
                reused += 1;
                assert_eq!(stream.peer_cred().unwrap().pid(), Some(pid), "the socket still tells the number");
                assert!(std::fs::metadata(format!("/proc/{pid}")).unwrap().ino() > 0, "and somebody has it");
                match &caller {
                    Some(caller) => assert!(caller.process().has_ended() && caller.facts().is_err()),
                    None => assert!(Caller::of(&stream, &mesh).is_err()),
                }
            }
            second.kill().unwrap();
            second.wait().unwrap();
        }
        std::fs::remove_file(&path).unwrap();
        assert_eq!(reused, 40, "the number was hardly ever given again");
    }
}
