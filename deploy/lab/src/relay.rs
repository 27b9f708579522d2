//! The floor of the dataplane benchmark: a relay that only copies. One thread, epoll, no TLS, no policy, no record; two of
//! them in a row move what two agents would, over as many sockets, from namespace to namespace as they do.

use crate::net;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, connect, socket};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

const BUFFER_BYTES: usize = 64 * 1024;
/// Sockets that are made for one question, as the agent does.
const SOCKETS: usize = 8;
const EVENTS: usize = 64;

/// One direction's source, its goal, and what the goal did not take yet.
struct Way {
    from: TcpStream,
    /// Descriptor of the goal, which is the source of the other way.
    to: u64,
    waiting: Vec<u8>,
    ended: bool,
}

/// Sockets of another namespace: a thread that stays there makes them.
struct Sockets {
    ask: SyncSender<()>,
    made: Receiver<io::Result<Vec<OwnedFd>>>,
    spare: Vec<OwnedFd>,
}

impl Sockets {
    fn of(namespace: String) -> Self {
        let ((ask, asked), (make, made)) = (sync_channel::<()>(1), sync_channel(1));
        std::thread::spawn(move || {
            let one = || socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None);
            let some = || Ok((0..SOCKETS).map(|_| one()).collect::<Result<Vec<_>, _>>()?);
            let told = make.clone();
            let serve = move || asked.into_iter().try_for_each(|()| make.send(some()));
            if let Err(error) = net::inside(&namespace, serve) {
                // Nobody may be there to hear it.
                let _ = told.send(Err(io::Error::other(error)));
            }
        });
        Self { ask, made, spare: Vec::new() }
    }

    /// Blocking: on this machine it takes microseconds, and costs least.
    fn connect(&mut self, to: SocketAddrV4) -> io::Result<TcpStream> {
        if self.spare.is_empty() {
            // Where the thread has ended, its error waits.
            let _ = self.ask.send(());
            self.spare = self.made.recv().map_err(io::Error::other)??;
        }
        let fd = self.spare.pop().ok_or_else(|| io::Error::other("no socket"))?;
        connect(fd.as_raw_fd(), &SockaddrIn::from(to))?;
        Ok(TcpStream::from(fd))
    }
}

struct Relay {
    sockets: Sockets,
    epoll: Epoll,
    listeners: BTreeMap<u64, (TcpListener, SocketAddrV4)>,
    ways: BTreeMap<u64, Way>,
    buffer: Vec<u8>,
}

/// Relays from each first address here to its second in `namespace`, until it is killed.
pub fn run(namespace: String, pairs: &[(SocketAddrV4, SocketAddrV4)]) -> io::Result<()> {
    let (epoll, sockets) = (Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?, Sockets::of(namespace));
    let mut relay =
        Relay { sockets, epoll, listeners: BTreeMap::new(), ways: BTreeMap::new(), buffer: vec![0; BUFFER_BYTES] };
    for (at, to) in pairs {
        let listener = TcpListener::bind(at)?;
        listener.set_nonblocking(true)?;
        let key = key(&listener);
        relay.epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, key))?;
        relay.listeners.insert(key, (listener, *to));
    }
    let mut events = [EpollEvent::empty(); EVENTS];
    loop {
        let n = match relay.epoll.wait(&mut events, EpollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => 0,
            ready => ready?,
        };
        for event in events.iter().take(n) {
            relay.turn(event.data(), event.events())?;
        }
    }
}

fn key(socket: &impl AsRawFd) -> u64 {
    socket.as_raw_fd() as u64
}

impl Relay {
    fn turn(&mut self, key: u64, ready: EpollFlags) -> io::Result<()> {
        if self.listeners.contains_key(&key) {
            return self.accept(key);
        }
        let moved = if ready.contains(EpollFlags::EPOLLOUT) { self.flush(key) } else { Ok(()) };
        let input = EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR;
        let moved = if ready.intersects(input) { moved.and_then(|()| self.copy(key)) } else { moved };
        let over = moved.is_err() || self.ways.get(&key).is_some_and(|w| w.ended && self.ended(w.to));
        if over && let Some(way) = self.ways.remove(&key) {
            self.ways.remove(&way.to);
        }
        Ok(())
    }

    fn ended(&self, key: u64) -> bool {
        self.ways.get(&key).is_none_or(|way| way.ended && way.waiting.is_empty())
    }

    fn accept(&mut self, key: u64) -> io::Result<()> {
        let Some((listener, to)) = self.listeners.get(&key) else { return Ok(()) };
        loop {
            let near = match listener.accept() {
                Ok((near, _)) => near,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(e),
            };
            let Ok(far) = self.sockets.connect(*to) else { continue };
            let keys = (self::key(&near), self::key(&far));
            for (socket, key, other) in [(near, keys.0, keys.1), (far, keys.1, keys.0)] {
                socket.set_nodelay(true)?;
                socket.set_nonblocking(true)?;
                self.epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, key))?;
                self.ways.insert(key, Way { from: socket, to: other, waiting: Vec::new(), ended: false });
            }
        }
    }

    /// One read and one write; what is not taken waits, and so does its source.
    fn copy(&mut self, key: u64) -> io::Result<()> {
        let Some(way) = self.ways.get(&key).filter(|way| way.waiting.is_empty() && !way.ended) else { return Ok(()) };
        let n = match (&way.from).read(&mut self.buffer) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            read => read?,
        };
        let to = way.to;
        let goal = self.ways.get(&to).ok_or(io::ErrorKind::NotConnected)?;
        let bytes = self.buffer.get(..n).unwrap_or_default();
        let taken = match (&goal.from).write(bytes) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => 0,
            written => written?,
        };
        if n == 0 {
            goal.from.shutdown(Shutdown::Write)?;
            self.watch(key, EpollFlags::empty())?;
        }
        let rest = bytes.get(taken..).unwrap_or_default().to_vec();
        if !rest.is_empty() {
            self.watch(key, EpollFlags::empty())?;
            self.watch(to, EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT)?;
        }
        if let Some(way) = self.ways.get_mut(&key) {
            (way.ended, way.waiting) = (n == 0, rest);
        }
        Ok(())
    }

    /// The goal takes more: what waits for it goes on.
    fn flush(&mut self, goal: u64) -> io::Result<()> {
        let Some(source) = self.ways.get(&goal).map(|way| way.to) else { return Ok(()) };
        let (Some(way), Some(to)) = (self.ways.get(&source), self.ways.get(&goal)) else { return Ok(()) };
        let taken = match (&to.from).write(&way.waiting) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => 0,
            written => written?,
        };
        let ended = to.ended;
        if let Some(way) = self.ways.get_mut(&source) {
            way.waiting.drain(..taken);
            if way.waiting.is_empty() {
                self.watch(source, EpollFlags::EPOLLIN)?;
                self.watch(goal, if ended { EpollFlags::empty() } else { EpollFlags::EPOLLIN })?;
            }
        }
        Ok(())
    }

    fn watch(&self, key: u64, flags: EpollFlags) -> io::Result<()> {
        match self.ways.get(&key) {
            Some(way) => Ok(self.epoll.modify(&way.from, &mut EpollEvent::new(flags, key))?),
            None => Ok(()),
        }
    }
}
