//! Load of the dataplane benchmark, once it is inside a pod or on a node: a server that echoes and swallows, and clients
//! that send in bulk, ask and wait, or connect anew each time. Blocking threads: what is measured is between them.

use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

/// The server gives back what it gets here.
pub const ECHO_PORT: u16 = 7001;
/// The server swallows what it gets here and says at the end how much it was.
pub const SINK_PORT: u16 = 7002;
/// One request, and its answer.
const REQUEST_BYTES: usize = 64;
/// Written at once in bulk, as iperf3 does.
const BULK_BYTES: usize = 128 * 1024;
/// A thread does nothing but copy; a thousand of them shall not weigh.
const STACK_BYTES: usize = 64 * 1024;
/// A load that hangs is a failed one.
const STUCK: Duration = Duration::from_secs(20);

/// What the clients do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// Each connection sends as fast as it can.
    Bulk,
    /// Each connection asks and waits for the answer.
    Echo,
    /// Each client connects, asks once and closes.
    Connect,
    /// Connections that asked once, and stay open until standard input ends.
    Idle,
}

/// What they saw.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Seen {
    /// Bytes arrived, requests answered, or connections made.
    pub units: u64,
    /// From the first to the last.
    pub seconds: f64,
    /// Of a request or a connection, half are faster; microseconds.
    pub p50_us: f64,
    /// And 99 of 100.
    pub p99_us: f64,
}

/// Serves until it is killed.
pub fn serve() -> io::Result<()> {
    let listen = |port| TcpListener::bind(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port));
    let (echo_at, sink_at) = (listen(ECHO_PORT)?, listen(SINK_PORT)?);
    spawn(move || accept(&sink_at, sink))?;
    accept(&echo_at, echo)
}

fn accept(listener: &TcpListener, each: fn(TcpStream) -> io::Result<()>) -> io::Result<()> {
    loop {
        let (stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        spawn(move || each(stream))?;
    }
}

fn spawn<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<thread::JoinHandle<T>> {
    thread::Builder::new().stack_size(STACK_BYTES).spawn(work)
}

fn echo(mut stream: TcpStream) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            n => stream.write_all(buffer.get(..n).unwrap_or_default())?,
        }
    }
}

fn sink(mut stream: TcpStream) -> io::Result<()> {
    let (mut buffer, mut total) = (vec![0; BULK_BYTES], 0u64);
    loop {
        match stream.read(&mut buffer)? {
            0 => return stream.write_all(&total.to_be_bytes()),
            n => total += n as u64,
        }
    }
}

/// Loads the server at `address` with `count` clients for `time`, and writes what they saw as a line of JSON.
pub fn run(kind: Kind, to: SocketAddrV4, count: usize, time: Duration) -> io::Result<()> {
    if kind == Kind::Idle {
        return idle(to, count);
    }
    let begun = Instant::now();
    let client: fn(SocketAddrV4, Instant) -> io::Result<Vec<u64>> = match kind {
        Kind::Bulk => bulk,
        Kind::Echo => ask,
        Kind::Connect | Kind::Idle => connect,
    };
    let clients: Vec<_> = (0..count).map(|_| spawn(move || client(to, begun + time))).collect::<io::Result<_>>()?;
    let mut all = Vec::new();
    for client in clients {
        all.extend(client.join().map_err(|_| io::Error::other("a client ended badly"))??);
    }
    let seconds = begun.elapsed().as_secs_f64();
    let units = if kind == Kind::Bulk { all.iter().sum() } else { all.len() as u64 };
    all.sort_unstable();
    let at = |part: f64| all.get((all.len() as f64 * part) as usize).map_or(0.0, |ns| *ns as f64 / 1e3);
    let seen = Seen { units, seconds, p50_us: at(0.5), p99_us: at(0.99) };
    writeln!(io::stdout(), "{}", serde_json::to_string(&seen).map_err(io::Error::other)?)
}

fn open(to: SocketAddrV4) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(STUCK))?;
    stream.set_write_timeout(Some(STUCK))?;
    Ok(stream)
}

/// Bytes that arrived.
fn bulk(to: SocketAddrV4, until: Instant) -> io::Result<Vec<u64>> {
    let (mut stream, bytes) = (open(to)?, vec![7; BULK_BYTES]);
    while Instant::now() < until {
        stream.write_all(&bytes)?;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut total = [0; 8];
    stream.read_exact(&mut total)?;
    Ok(vec![u64::from_be_bytes(total)])
}

fn once(stream: &mut TcpStream) -> io::Result<()> {
    let mut answer = [0; REQUEST_BYTES];
    stream.write_all(&[7; REQUEST_BYTES])?;
    stream.read_exact(&mut answer)
}

/// Nanoseconds of each request.
fn ask(to: SocketAddrV4, until: Instant) -> io::Result<Vec<u64>> {
    let (mut stream, mut times) = (open(to)?, Vec::new());
    while Instant::now() < until {
        let begun = Instant::now();
        once(&mut stream)?;
        times.push(begun.elapsed().as_nanos() as u64);
    }
    Ok(times)
}

/// Nanoseconds of each connection, from connect to its answer.
fn connect(to: SocketAddrV4, until: Instant) -> io::Result<Vec<u64>> {
    let mut times = Vec::new();
    while Instant::now() < until {
        let begun = Instant::now();
        once(&mut open(to)?)?;
        times.push(begun.elapsed().as_nanos() as u64);
    }
    Ok(times)
}

fn idle(to: SocketAddrV4, count: usize) -> io::Result<()> {
    let mut open_streams = Vec::with_capacity(count);
    for _ in 0..count {
        let mut stream = open(to)?;
        once(&mut stream)?;
        open_streams.push(stream);
    }
    writeln!(io::stdout(), "open")?;
    io::stdout().flush()?;
    io::stdin().read_to_end(&mut Vec::new()).map(drop)
}
