//! Callers without end: one user keeps the others out neither by connections nor by streams, and an agent that is out of
//! descriptors goes on when some are free again. Alone in its program, since it narrows the program's own limit.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use ambit_agent::issued::Issued;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use support::local::{Socket, call, stage};

/// Opens so many connections as a user, says how many stayed open, and holds them until told to end.
const CROWD: &str = r#"
import os, resource, socket, sys, time
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
path, count, uid = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if uid: os.setgid(uid); os.setuid(uid)
all = []
for _ in range(count):
    one = socket.socket(socket.AF_UNIX); one.connect(path); one.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"); all.append(one)
time.sleep(2)
closed = 0
for one in all:
    one.setblocking(False)
    try:
        while True:
            if not one.recv(65536): closed += 1; break
    except BlockingIOError: pass
    except ConnectionError: closed += 1
print(len(all) - closed, flush=True)
sys.stdin.read()
"#;

struct Crowd(Child, usize);

impl Crowd {
    fn come(socket: &Socket, count: usize, uid: u32) -> Crowd {
        let mut command = Command::new("python3");
        command.args(["-c", CROWD]).arg(socket.path()).args([count.to_string(), uid.to_string()]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Crowd(child, line.trim().parse().unwrap())
    }
    fn go(mut self) {
        self.0.stdin.take().unwrap().flush().unwrap();
        self.0.wait().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crowd_keeps_nobody_out_and_descriptors_come_back() {
    let mut stage = stage();
    let issued = Issued::default();
    issued.set_view(stage.west.view(stage.slice.clone()));
    issued.set_svids([("me".parse().unwrap(), Ok(stage.west.svid("me")))].into());
    let socket = Socket::serve("crowd", &issued);
    let served = || async {
        let mut stream = call(socket.channel().await, "/SpiffeWorkloadAPI/FetchX509SVID").await.ok()?;
        stream.message().await.ok()?
    };
    assert!(served().await.is_some());
    let crowd = Crowd::come(&socket, 400, 424_242);
    assert_eq!(crowd.1, 256, "of one user");
    assert!(served().await.is_some());
    crowd.go();

    // Root may have all; here there are not that many.
    let open = std::fs::read_dir("/proc/self/fd").unwrap().count() as u64;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, open + 60, hard).unwrap();
    let crowd = Crowd::come(&socket, 100, 0);
    crowd.go();
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    let until = Instant::now() + Duration::from_secs(20);
    while served().await.is_none() {
        assert!(Instant::now() < until, "the agent serves nobody any more");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
