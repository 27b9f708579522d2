//! Sockets that belong to a pod's network namespace. One thread of our own enters namespaces; no other ever does.
//!
//! A socket belongs to the namespace in which it was *created*, so it can be handed to the runtime afterwards.

use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, SockaddrIn6, bind, listen, setsockopt, socket, sockopt,
};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// Jobs take microseconds; a longer queue than this means the thread is gone or the machine is.
const QUEUE: usize = 256;
/// Connections that wait for accept in one pod.
const BACKLOG: i32 = 1024;
/// Sockets made in one visit to a namespace: a visit costs two switches of thread and two of namespace, a socket little.
const SOCKETS: usize = 8;

/// An open namespace: holding it keeps the pod's name from being reused under us.
#[derive(Clone, Debug)]
pub struct Netns(Arc<Opened>);

#[derive(Debug)]
struct Opened {
    file: OwnedFd,
    /// What the kernel part names it by, once a socket told it.
    cookie: OnceLock<u64>,
    /// Sockets of this namespace that nobody uses yet: fewer than [`SOCKETS`] for each visit that is under way.
    spare: Mutex<Vec<OwnedFd>>,
}

impl Netns {
    /// Opens the namespace at `path`.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self::of(std::fs::File::open(path)?.into()))
    }

    /// One that is open already.
    pub fn of(file: OwnedFd) -> Self {
        Self(Arc::new(Opened { file, cookie: OnceLock::new(), spare: Mutex::default() }))
    }

    fn spare(&self) -> MutexGuard<'_, Vec<OwnedFd>> {
        self.0.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.file.as_fd()
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// Handle of the thread.
#[derive(Clone, Debug)]
pub struct NetnsThread {
    jobs: SyncSender<Job>,
}

impl NetnsThread {
    /// Starts the thread; it ends when the last handle is dropped.
    pub fn start() -> io::Result<Self> {
        let (jobs, queue): (SyncSender<Job>, Receiver<Job>) = sync_channel(QUEUE);
        let home = std::fs::File::open("/proc/self/ns/net")?;
        std::thread::Builder::new().name("ambit-netns".to_owned()).stack_size(256 * 1024).spawn(move || {
            for job in queue {
                job();
                // A thread that stayed would keep the namespace of a pod that ended, and its guard with it.
                if let Err(error) = setns(&home, CloneFlags::CLONE_NEWNET) {
                    tracing::error!(%error, "the namespace thread did not come home");
                }
            }
        })?;
        Ok(Self { jobs })
    }

    /// Runs `act` inside `ns`. If the namespace cannot be entered, `act` does not run at all.
    pub async fn run<T: Send + 'static>(
        &self,
        ns: &Netns,
        act: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let (reply, answer) = tokio::sync::oneshot::channel();
        let ns = ns.clone();
        let job: Job = Box::new(move || {
            let entered = setns(&ns, CloneFlags::CLONE_NEWNET).map_err(io::Error::from);
            // The caller may have given up meanwhile; then nobody wants the answer.
            let _ = reply.send(entered.and_then(|()| act()));
        });
        self.jobs.try_send(job).map_err(|e| match e {
            TrySendError::Full(_) => io::Error::new(io::ErrorKind::ResourceBusy, "too many sockets asked at once"),
            TrySendError::Disconnected(_) => io::Error::other("the namespace thread has ended"),
        })?;
        answer.await.map_err(|_| io::Error::other("the namespace thread has ended"))?
    }

    /// A TCP listener in `ns`. The address need not exist there: what reaches it is steered by the kernel part.
    /// At a v4-mapped one it takes both families.
    pub async fn listen(&self, ns: &Netns, at: impl Into<SocketAddr>) -> io::Result<std::net::TcpListener> {
        let at = at.into();
        self.run(ns, move || {
            let fd = match at {
                SocketAddr::V4(_) => tcp()?,
                SocketAddr::V6(_) => tcp6()?,
            };
            setsockopt(&fd, sockopt::ReuseAddr, &true)?;
            setsockopt(&fd, sockopt::IpFreebind, &true)?;
            match at {
                SocketAddr::V4(at) => bind(fd.as_raw_fd(), &SockaddrIn::from(at))?,
                SocketAddr::V6(at) => {
                    // Whatever the pod has for `net.ipv6.bindv6only`.
                    setsockopt(&fd, sockopt::Ipv6V6Only, &false)?;
                    bind(fd.as_raw_fd(), &SockaddrIn6::from(at))?;
                }
            }
            listen(&fd, Backlog::new(BACKLOG)?)?;
            Ok(std::net::TcpListener::from(fd))
        })
        .await
    }

    /// A TCP socket in `ns`, bound to `source` (its port is chosen at connect: `IP_BIND_ADDRESS_NO_PORT`). A socket stays in
    /// the namespace in which it was made, whoever binds and connects it.
    pub async fn socket(&self, ns: &Netns, source: SocketAddrV4) -> io::Result<tokio::net::TcpSocket> {
        let fd = self.fresh(ns).await?;
        setsockopt(&fd, sockopt::IpFreebind, &true)?;
        bound(fd, source)
    }

    /// The same with its port chosen now, so that it is known before it connects; and the namespace's cookie.
    pub async fn bound_socket(&self, ns: &Netns, source: Ipv4Addr) -> io::Result<(tokio::net::TcpSocket, u64)> {
        let fd = self.fresh(ns).await?;
        let known = ns.0.cookie.get().copied();
        let cookie = known.map_or_else(|| ambit_ebpf::netns_cookie(&fd), Ok)?;
        ns.0.cookie.get_or_init(|| cookie);
        setsockopt(&fd, sockopt::IpFreebind, &true)?;
        bind(fd.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(source, 0)))?;
        Ok((tokio::net::TcpSocket::from_std_stream(std::net::TcpStream::from(fd)), cookie))
    }

    /// A TCP socket of IPv6 in `ns`, bound to `source`, and where: its port is chosen now.
    pub async fn socket6(&self, ns: &Netns, source: SocketAddrV6) -> io::Result<(tokio::net::TcpSocket, SocketAddrV6)> {
        let fd = self.run(ns, tcp6).await?;
        setsockopt(&fd, sockopt::IpFreebind, &true)?;
        bind(fd.as_raw_fd(), &SockaddrIn6::from(source))?;
        let socket = tokio::net::TcpSocket::from_std_stream(std::net::TcpStream::from(fd));
        match socket.local_addr()? {
            SocketAddr::V6(at) => Ok((socket, at)),
            SocketAddr::V4(at) => Err(io::Error::other(format!("bound to {at}"))),
        }
    }

    async fn fresh(&self, ns: &Netns) -> io::Result<OwnedFd> {
        let spare = ns.spare().pop();
        if let Some(fd) = spare {
            return Ok(fd);
        }
        let made = self.run(ns, || (0..SOCKETS).map(|_| tcp()).collect::<io::Result<Vec<_>>>());
        let mut made = made.await?;
        let fd = made.pop().ok_or_else(|| io::Error::other("no socket"))?;
        ns.spare().extend(made);
        Ok(fd)
    }
}

/// The agent's annex ([`ambit_ebpf::Annex`]), where its sockets for HBONE at pods' addresses live. Cloning shares.
#[derive(Clone, Debug)]
pub struct Annex {
    thread: NetnsThread,
    netns: Netns,
}

impl Annex {
    /// Sockets in `netns`, made by `thread`.
    pub fn new(thread: NetnsThread, netns: Netns) -> Self {
        Self { thread, netns }
    }

    /// Listeners on every address that packets come in for; they share the port.
    pub async fn listeners(&self, port: u16, count: usize) -> io::Result<Vec<std::net::TcpListener>> {
        self.listeners_at(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port), count).await
    }

    async fn listeners_at(&self, at: SocketAddrV4, count: usize) -> io::Result<Vec<std::net::TcpListener>> {
        let listener = move || {
            let fd = tcp()?;
            setsockopt(&fd, sockopt::ReuseAddr, &true)?;
            setsockopt(&fd, sockopt::ReusePort, &true)?;
            setsockopt(&fd, sockopt::IpTransparent, &true)?;
            bind(fd.as_raw_fd(), &SockaddrIn::from(at))?;
            listen(&fd, Backlog::new(BACKLOG)?)?;
            Ok(std::net::TcpListener::from(fd))
        };
        self.thread.run(&self.netns, move || (0..count).map(|_| listener()).collect()).await
    }

    /// Listeners of callers by address, whatever they call: what reaches them is steered there by the kernel part
    /// ([`ambit_ebpf::Kernel::let_in`]), and nothing else does.
    pub async fn strangers(&self, count: usize) -> io::Result<Vec<std::net::TcpListener>> {
        self.listeners_at(SocketAddrV4::new(Ipv4Addr::LOCALHOST, ambit_ebpf::CAPTURE_PORT), count).await
    }

    /// The namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// A TCP socket bound to `from`, a pod's address, which no device there has.
    pub async fn socket(&self, from: Ipv4Addr) -> io::Result<tokio::net::TcpSocket> {
        let fd = self.thread.fresh(&self.netns).await?;
        setsockopt(&fd, sockopt::IpTransparent, &true)?;
        bound(fd, SocketAddrV4::new(from, 0))
    }
}

/// To an address; the port is chosen at connect.
fn bound(fd: OwnedFd, source: SocketAddrV4) -> io::Result<tokio::net::TcpSocket> {
    setsockopt(&fd, sockopt::IpBindAddressNoPort, &true)?;
    bind(fd.as_raw_fd(), &SockaddrIn::from(source))?;
    Ok(tokio::net::TcpSocket::from_std_stream(std::net::TcpStream::from(fd)))
}

fn tcp() -> io::Result<OwnedFd> {
    of_family(AddressFamily::Inet)
}

fn tcp6() -> io::Result<OwnedFd> {
    of_family(AddressFamily::Inet6)
}

fn of_family(family: AddressFamily) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket(family, SockType::Stream, flags, None)?)
}
