//! Where connections come in: sockets that the former agent handed over where they are at the right place, else new ones.

use crate::takeover::{self, Socket, Sockets};
use ambit_model::{Code, Refusal};
use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use tokio::net::TcpSocket;

use crate::config::Config;

/// Tunnels that wait for accept, on each thread.
const BACKLOG: u32 = 1024;

/// All but those of pods.
#[derive(Debug)]
pub(super) struct Listeners {
    pub(super) tunnels: Vec<TcpListener>,
    pub(super) workload: UnixListener,
    pub(super) broker: Option<UnixListener>,
    pub(super) metrics: TcpListener,
    pub(super) takeover: UnixListener,
}

/// Sockets of pods, by pod and network namespace.
pub(super) type Captures = BTreeMap<(String, (u64, u64)), TcpListener>;

pub(super) fn start(expected: &str, error: io::Error) -> Refusal {
    Refusal::new(Code::ConfigInvalid, expected, error.to_string())
}

impl Listeners {
    /// For `carriers` threads; takes out of `handed` what it uses.
    pub(super) fn open(config: &Config, carriers: usize, handed: &mut Sockets) -> Result<Self, Refusal> {
        let tunnels = inherited_tunnels(config.hbone_listen, handed);
        let tunnels = if tunnels.is_empty() { shared(config.hbone_listen, carriers) } else { Ok(tunnels) };
        let metrics = handed.remove(&Socket::Metrics).map(TcpListener::from);
        let metrics = metrics.filter(|l| l.local_addr().ok() == Some(config.metrics_listen));
        let metrics = metrics.map_or_else(|| TcpListener::bind(config.metrics_listen), Ok);
        let broker = config.broker_socket.as_deref().map(|path| local(path, 0o600, handed.remove(&Socket::Broker)));
        let takeover = at_path(&takeover::place(&config.data_dir), handed.remove(&Socket::TakeOver));
        let all = Self {
            tunnels: tunnels.map_err(|e| start("'hbone_listen' to be free", e))?,
            workload: local(&config.workload_socket, 0o777, handed.remove(&Socket::Workload))
                .map_err(|e| start("a usable 'workload_socket'", e))?,
            broker: broker.transpose().map_err(|e| start("a usable 'broker_socket'", e))?,
            metrics: metrics.map_err(|e| start("'metrics_listen' to be free", e))?,
            takeover: takeover
                .map_or_else(|| takeover::listen(&config.data_dir), Ok)
                .map_err(|e| start("a usable 'data_dir'", e))?,
        };
        all.set_nonblocking().map_err(|e| start("sockets that do not block", e))?;
        Ok(all)
    }

    fn set_nonblocking(&self) -> io::Result<()> {
        self.tunnels.iter().chain([&self.metrics]).try_for_each(|l| l.set_nonblocking(true))?;
        [&self.workload, &self.takeover].into_iter().chain(&self.broker).try_for_each(|l| l.set_nonblocking(true))
    }

    /// The same sockets once more, to be handed over one day.
    pub(super) fn again(&self) -> io::Result<Sockets> {
        let mut all = Sockets::new();
        for (n, listener) in (0u16..).zip(&self.tunnels) {
            all.insert(Socket::Tunnels(n), listener.try_clone()?.into());
        }
        all.insert(Socket::Workload, self.workload.try_clone()?.into());
        if let Some(broker) = &self.broker {
            all.insert(Socket::Broker, broker.try_clone()?.into());
        }
        all.insert(Socket::Metrics, self.metrics.try_clone()?.into());
        all.insert(Socket::TakeOver, self.takeover.try_clone()?.into());
        Ok(all)
    }
}

/// Those of pods that were handed over.
pub(super) fn captures(handed: Sockets) -> Captures {
    let captures = handed.into_iter().filter_map(|(socket, fd)| match socket {
        Socket::Capture { pod, netns } => Some(((pod, netns), TcpListener::from(fd))),
        Socket::Tunnels(_)
        | Socket::Workload
        | Socket::Broker
        | Socket::Metrics
        | Socket::TakeOver
        | Socket::Annex
        | Socket::AtPods(_)
        | Socket::Strangers(_) => None,
    });
    captures.collect()
}

/// All of them, also where there are other threads now: what waits in one that nobody serves would wait for ever.
fn inherited_tunnels(at: SocketAddr, handed: &mut Sockets) -> Vec<TcpListener> {
    let is_tunnel = |socket: &Socket| matches!(socket, Socket::Tunnels(_));
    let names: Vec<Socket> = handed.keys().filter(|socket| is_tunnel(socket)).cloned().collect();
    let all = names.iter().filter_map(|name| handed.remove(name)).map(TcpListener::from);
    all.filter(|listener| listener.local_addr().ok() == Some(at)).collect()
}

/// Listeners that share an address: the kernel spreads connections over them (SO_REUSEPORT), and nobody of another user
/// can join them.
fn shared(at: SocketAddr, count: usize) -> io::Result<Vec<TcpListener>> {
    // Another agent could: an address that is in use is refused, as without sharing.
    drop(TcpListener::bind(at)?);
    let mut at = at;
    let mut all = Vec::with_capacity(count);
    for _ in 0..count {
        let socket = if at.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.set_reuseaddr(true)?;
        socket.set_reuseport(true)?;
        socket.bind(at)?;
        let listener = socket.listen(BACKLOG)?;
        // The first one chooses the port where it is left open.
        at = listener.local_addr()?;
        all.push(listener.into_std()?);
    }
    Ok(all)
}

fn at_path(path: &Path, handed: Option<OwnedFd>) -> Option<UnixListener> {
    let listener = handed.map(UnixListener::from)?;
    let is_there = listener.local_addr().is_ok_and(|at| at.as_pathname() == Some(path));
    // Bound there once, and the name still there: it might have been removed since.
    (is_there && path.exists()).then_some(listener)
}

/// The Workload API's is for every workload: who may have what is decided by what the kernel says of the caller. The
/// Broker API's is for who runs as root, or is let to it by who does.
fn local(path: &Path, mode: u32, handed: Option<OwnedFd>) -> io::Result<UnixListener> {
    if let Some(listener) = at_path(path, handed) {
        return Ok(listener);
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    Ok(listener)
}
