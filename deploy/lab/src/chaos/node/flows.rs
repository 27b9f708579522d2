//! Connections that are kept: how each of them ended, and when.

use crate::demo::{Demo, SECRET};
use crate::lab::LabError;
use crate::process;
use crate::state::Ready;
use serde::Deserialize;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

/// Where the echo is, for flows that are kept.
pub(super) const ECHO_PORT: u16 = 8081;
const ECHO: &str = "\
import socketserver
class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        while True:
            data = self.request.recv(65536)
            if not data: return
            self.request.sendall(data)
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
    request_queue_size = 1024
import sys
Server((sys.argv[1], int(sys.argv[2])), Echo).serve_forever()
";
/// Flows of two seconds one after another, and one that never ends by itself: a line for each that ended.
const FLOWS: &str = "\
import json, socket, sys, threading, time
to, mark = (sys.argv[1], int(sys.argv[2])), sys.argv[3].encode()
lock = threading.Lock()
def tell(kind, end):
    with lock: print(json.dumps({'t_ms': time.time() * 1000, 'kind': kind, 'end': end}), flush=True)
def once(life):
    try: s = socket.create_connection(to, 2)
    except PermissionError: return 'denied'
    except OSError: return 'unopened'
    s.settimeout(5)
    begun, served = time.time(), False
    try:
        while life is None or time.time() - begun < life:
            s.sendall(mark)
            got = b''
            while len(got) < len(mark):
                more = s.recv(4096)
                if not more: raise OSError
                got += more
            if got != mark: return 'corrupt'
            served = True
            time.sleep(.02)
        s.shutdown(socket.SHUT_WR)
        return 'closed' if s.recv(1) == b'' else 'corrupt'
    except OSError: return 'lost' if served else 'unopened'
    finally: s.close()
def flows(kind, life):
    while True:
        end = once(life)
        tell(kind, end)
        if end in ('denied', 'unopened'): time.sleep(.05)
for n in range(8): threading.Thread(target=flows, args=('short', 2), daemon=True).start()
flows('long', None)
";

/// How a flow ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum End {
    Closed,
    Lost,
    Unopened,
    Denied,
    Corrupt,
}

#[derive(Clone, Copy, Debug, Deserialize)]
pub(super) struct Flow {
    pub(super) t_ms: f64,
    pub(super) end: End,
}

/// Flows from a pod to an echo.
pub(super) struct Flows {
    child: Child,
    reader: Option<std::thread::JoinHandle<()>>,
    seen: Arc<Mutex<Vec<Flow>>>,
}

impl Flows {
    pub(super) fn start(demo: &Demo<'_>) -> Result<Flows, LabError> {
        let (lab, db, web) = (&demo.lab, demo.pod("west-n1", "db")?, demo.pod("east-n1", "web")?);
        let (to, port) = (db.address.to_string(), ECHO_PORT.to_string());
        let ready = Ready::Listening(SocketAddr::from((db.address, ECHO_PORT)));
        lab.start(
            "west-n1-echo",
            Some("west-n1"),
            lab.launch(&db.place(), &["python3", "-c", ECHO, &to, &port], &lab.folder("west-n1").join("echo.log")),
            ready,
        )?;
        let log = lab.folder("east-n1").join("flows.log");
        let launch = lab.launch(&web.place(), &["python3", "-u", "-c", FLOWS, &to, &port, SECRET], &log);
        let mut command = process::command(lab.name(), &launch)?;
        let started = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        let mut child = started.map_err(|source| LabError::Io { path: "python3".into(), source })?;
        let seen = Arc::new(Mutex::new(Vec::new()));
        let reader = child.stdout.take().map(|out| {
            let seen = Arc::clone(&seen);
            std::thread::spawn(move || {
                for line in BufReader::new(out).lines().map_while(Result::ok) {
                    if let Ok(flow) = serde_json::from_str(&line) {
                        seen.lock().unwrap_or_else(PoisonError::into_inner).push(flow);
                    }
                }
            })
        });
        Ok(Flows { child, reader, seen })
    }
    pub(super) fn now(&self) -> Vec<Flow> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Flows {
    fn drop(&mut self) {
        // Ours, by its handle.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(reader) = self.reader.take() {
            // It ends with the pipe.
            let _ = reader.join();
        }
    }
}
