//! A machine that is gone, without a word, while a tunnel to it is idle, owed an acknowledgement or held up by its slow reader.
//! Machines are namespaces of this test's own, with a link that is cut.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use ambit_agent::native::{self, Begun};
use ambit_agent::netns::{Netns, NetnsThread};
use ambit_agent::pump::{self, Carried, End};
use ambit_agent::secure::{self, Secured};
use ambit_agent::{health, silence};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::ops::Range;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use support::stage::{SOON, Stage};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;

fn ip(line: &str) {
    let done = Command::new("ip").args(line.split(' ')).output().expect("ip (Debian package iproute2)");
    assert!(done.status.success(), "ip {line}: {}", String::from_utf8_lossy(&done.stderr));
}

/// Two machines.
struct Wire {
    names: [String; 2],
    addresses: [Ipv4Addr; 2],
}

impl Wire {
    fn lay(n: u8) -> Wire {
        let names = ["a", "b"].map(|end| format!("amb-t{}-{n}{end}", std::process::id()));
        let wire = Wire { names, addresses: [1, 2].map(|host| Ipv4Addr::new(10, 99, n, host)) };
        wire.names.iter().for_each(|name| ip(&format!("netns add {name}")));
        let [a, b] = &wire.names;
        ip(&format!("-n {a} link add wire type veth peer name wire netns {b}"));
        for (name, address) in wire.names.iter().zip(wire.addresses) {
            ip(&format!("-n {name} addr add {address}/24 dev wire"));
            ip(&format!("-n {name} link set wire up"));
        }
        wire
    }
    /// The second machine hears and says nothing any more. The first one's link stays up, as it does beyond a switch.
    fn cut(&self) {
        ip(&format!("-n {} link set wire address 02:00:00:00:00:99 arp off", self.names[1]));
    }
    fn machine(&self, n: usize) -> Netns {
        Netns::open(&Path::new("/run/netns").join(&self.names[n])).unwrap()
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = Command::new("ip").args(["netns", "del", name]).status();
        }
    }
}

/// A connection that is carried in a tunnel over a wire.
struct Carrying {
    wire: Wire,
    app: TcpStream,
    /// The end of the tunnel on the other machine, which reads nothing.
    _far: Secured,
    carried: JoinHandle<Carried>,
}

impl Carrying {
    async fn set(stage: &Stage, n: u8) -> Carrying {
        let (wire, thread) = (Wire::lay(n), NetnsThread::start().unwrap());
        let [near, far] = wire.addresses;
        let listener = thread.listen(&wire.machine(1), SocketAddrV4::new(far, 15008)).await.unwrap();
        listener.set_nonblocking(true).unwrap();
        let listener = TcpListener::from_std(listener).unwrap();
        let socket = thread.socket(&wire.machine(0), SocketAddrV4::new(near, 0)).await.unwrap();
        let dialing = socket.connect(SocketAddr::from((far, 15008)));
        let (tcp, accepted) = tokio::join!(dialing, listener.accept());
        let (tcp, mut accepted) = (tcp.unwrap(), accepted.unwrap().0);
        silence::tune(&tcp).unwrap();
        let db = stage.east.id("db").parse().unwrap();
        let (west, east) = (stage.west_plane.borrow().clone().unwrap(), stage.east_plane.borrow().clone().unwrap());
        let (name, config) = health::credentials(&west, stage.web.id(), &db).unwrap();
        let server = east.credentials_of(&db).unwrap().server.clone();
        let accepting = async {
            let (hello, _) = secure::hello(&mut accepted).await.unwrap();
            secure::accept(accepted, hello, server).await.unwrap()
        };
        let (tunnel, far) = tokio::join!(secure::connect(tcp, config, name), accepting);
        let mut tunnel = tunnel.unwrap();
        let captured = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let app = TcpStream::connect(captured.local_addr().unwrap()).await.unwrap();
        let (mut tcp, _) = captured.accept().await.unwrap();
        pump::break_off_unless_ended(&tcp).unwrap();
        let carried = tokio::spawn(async move {
            native::carry(&mut tcp, &mut tunnel, Begun::default(), std::future::pending()).await
        });
        Carrying { wire, app, _far: far, carried }
    }

    /// Since the wire was cut, seconds.
    async fn ends_within(self, seconds: Range<u64>) {
        let begun = Instant::now();
        let carried = timeout(Duration::from_secs(seconds.end), self.carried).await;
        let carried = carried.unwrap_or_else(|_| panic!("not found out in {seconds:?} s")).unwrap();
        assert_eq!(carried.end, End::Far);
        assert!(begun.elapsed() > Duration::from_secs(seconds.start), "too soon: {:?}", begun.elapsed());
        let read = timeout(SOON, self.app.readable()).await.map(|_| self.app.try_read(&mut [0; 1]));
        assert_eq!(read.unwrap().unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    }
}

#[tokio::test]
async fn a_machine_that_is_gone_is_found_out_and_a_slow_one_is_left_alone() {
    assert!(nix::unistd::geteuid().is_root(), "this test makes network namespaces: run it as root");
    let stage = Stage::set(141).await;
    let (idle, mut owed, mut held) =
        (Carrying::set(&stage, 1).await, Carrying::set(&stage, 2).await, Carrying::set(&stage, 3).await);
    let idle = async {
        idle.wire.cut();
        idle.ends_within(2..9).await;
    };
    let owed = async {
        owed.wire.cut();
        owed.app.write_all(b"anybody there?").await.unwrap();
        // And its end, after which nothing more is sent.
        owed.app.shutdown().await.unwrap();
        owed.ends_within(3..9).await;
    };
    let held = async {
        let chunk = vec![7; 1 << 20];
        while timeout(Duration::from_secs(1), held.app.write_all(&chunk)).await.is_ok() {}
        tokio::time::sleep(Duration::from_secs(6)).await;
        assert!(!held.carried.is_finished(), "whoever answers probes is there");
        held.wire.cut();
        // Probes come ever more seldom, and two go unanswered.
        held.ends_within(3..60).await;
    };
    tokio::join!(idle, owed, held);
}
