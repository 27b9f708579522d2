//! Real agents of one node that take over from each other, or fail to: real TPM (software), real kernel part, a cell whose
//! answers the test dictates. Needs root and fails without it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use nix::sys::signal::Signal;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use support::process::{Node, applied, ready};

/// So many slices come at once to an agent that takes over.
const SLICES: u64 = 60;

/// Connects all the time to where an agent listens, and counts who is refused.
struct Probes {
    stop: Arc<AtomicBool>,
    counted: Vec<std::thread::JoinHandle<(u32, u32)>>,
}

impl Probes {
    fn start(node: &Node) -> Probes {
        let stop = Arc::new(AtomicBool::new(false));
        let unix = node.tpm.file("workload.sock");
        let probe = |connect: Box<dyn Fn() -> bool + Send>| {
            let stop = stop.clone();
            std::thread::spawn(move || {
                let (mut tried, mut refused) = (0, 0);
                while !stop.load(Ordering::Relaxed) {
                    tried += 1;
                    refused += u32::from(!connect());
                    std::thread::sleep(Duration::from_millis(2));
                }
                (tried, refused)
            })
        };
        let (hbone, metrics) = (node.hbone, node.metrics);
        let page = move || {
            let Ok(mut stream) = TcpStream::connect(metrics) else { return false };
            let asked = stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
            let mut answer = String::new();
            asked.is_ok() && stream.read_to_string(&mut answer).is_ok() && answer.ends_with("ok\n")
        };
        let counted = vec![
            probe(Box::new(move || TcpStream::connect(hbone).is_ok())),
            probe(Box::new(move || UnixStream::connect(&unix).is_ok())),
            probe(Box::new(page)),
        ];
        Probes { stop, counted }
    }
    fn end(self) -> Vec<(u32, u32)> {
        self.stop.store(true, Ordering::Relaxed);
        self.counted.into_iter().map(|probe| probe.join().unwrap()).collect()
    }
}

fn hello(protocol: u32, layout: &str) -> String {
    format!("{{\"hello\":{{\"protocol\":{protocol},\"version\":\"9\",\"layout\":\"{layout}\"}}}}")
}

/// Python that asks the agent which serves for all it has, says what it got, and then does what follows.
fn other(node: &Node) -> String {
    format!(
        "import socket, struct, sys, time\ns = socket.socket(socket.AF_UNIX)\ns.connect('{}')\n\
         for word in (b'{}', b'\"give\"'):\n s.sendall(struct.pack('>IB', len(word), 0) + word)\n\
         got = b''\nwhile b'given' not in got: got += s.recv(4096)\nprint(got, flush=True)\n",
        node.tpm.state().join("takeover/agent.sock").display(),
        hello(2, &hex::encode(ambit_ebpf::map_layout()))
    )
}

/// Told to end while another has the tables, an agent waits for what becomes of that: whoever serves then hears the cell.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_is_told_to_end_in_the_middle_waits_for_the_other() {
    let mut node = Node::make().await;
    let config = node.config.clone();
    let (mut serving, _stream) = node.served("serving", &config).await;
    let script = other(&node) + "time.sleep(3)\n";
    let mut half = Command::new("python3").args(["-c", &script]).stdout(Stdio::piped()).spawn().unwrap();
    let mut told = String::new();
    BufReader::new(half.stdout.take().unwrap()).read_line(&mut told).unwrap();
    assert!(told.contains("given"), "{told}");
    serving.signal(Signal::SIGTERM);
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert!(serving.runs() && !serving.said("draining"), "{}", std::fs::read_to_string(&serving.log).unwrap());
    half.wait().unwrap();
    assert_eq!(serving.ended().await, Some(0));
    assert!(serving.said("another agent did not take over") && serving.said("draining"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agents_follow_each_other_and_no_connect_is_refused() {
    let mut node = Node::make().await;
    let config = node.config.clone();
    let (mut serving, mut stream) = node.served("agent-0", &config).await;
    // By accident nobody takes over.
    let mut second = node.agent("second", &config, &[]);
    assert_eq!(second.ended().await, Some(1));
    assert!(second.said("agent_running"), "{}", std::fs::read_to_string(&second.log).unwrap());
    assert!(serving.runs());
    let probes = Probes::start(&node);
    for upgrade in 1..=3 {
        let before = node.programs();
        let next = node.agent(&format!("agent-{upgrade}"), &config, &["--take-over"]);
        let newer = node.stream().await;
        assert!(newer.generation > stream.generation, "an admission of its own");
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(node.programs(), before, "nothing is touched before it has its slice");
        // Policy changes all the time: what comes while the sockets do must not stop either.
        for revision in 1..=SLICES {
            node.slice(&newer, revision).await;
        }
        next.says("this agent serves").await;
        assert_eq!(serving.ended().await, Some(0), "the former one has drained");
        next.says("the former agent has drained").await;
        let after = node.programs();
        assert!(before.iter().zip(&after).all(|(b, a)| a != b), "every program replaced: {before:?} {after:?}");
        ready(&node).await;
        applied(&node, SLICES).await;
        (serving, stream) = (next, newer);
    }
    let counted = probes.end();
    println!("connects tried and refused, of tunnels, Workload API and health: {counted:?}");
    assert!(counted.iter().all(|(tried, refused)| *tried > 100 && *refused == 0), "{counted:?}");
    // It is told to end, with nothing to drain: at once.
    serving.signal(Signal::SIGTERM);
    assert_eq!(serving.ended().await, Some(0));
    assert!(TcpStream::connect(node.hbone).is_err() && TcpStream::connect(node.metrics).is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_goes_wrong_leaves_the_agent_that_serves_in_its_place() {
    let mut node = Node::make().await;
    let config = node.config.clone();
    let (mut serving, stream) = node.served("serving", &config).await;
    let probes = Probes::start(&node);
    let socket = node.tpm.state().join("takeover/agent.sock");

    // Words that are none, another protocol, another layout of maps.
    let said = |words: &[&str]| {
        let mut stream = UnixStream::connect(&socket).unwrap();
        for word in words {
            let frame = [&(word.len() as u32).to_be_bytes()[..], &[0], word.as_bytes()].concat();
            stream.write_all(&frame).unwrap();
        }
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    };
    let layout = hex::encode(ambit_ebpf::map_layout());
    for (words, expected) in [
        (vec!["{}".to_owned()], "a word of this protocol"),
        (vec![hello(1, &layout)], "protocol 2 of taking over"),
        (vec![hello(2, &"ab".repeat(32))], "maps of layout"),
        (vec!["\"give\"".to_owned()], "hello"),
    ] {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        assert!(said(&words).contains(expected), "{expected}: {}", said(&words));
    }
    assert!(!serving.said("another agent takes over"));

    // One that says hello, has the sockets, and dies.
    let before = node.programs();
    let script = other(&node);
    // Another process: the agent ends whoever might write the kernel's tables.
    let hung = |more: &str| Command::new("python3").args(["-c", &format!("{script}{more}")]).output().unwrap();
    let died = hung("");
    let told = String::from_utf8_lossy(&died.stdout).into_owned();
    assert!(told.contains("tunnels") && told.contains("given"), "{died:?}");
    // It had no stream, so the one that serves has kept its own.
    serving.says("another agent did not take over").await;
    node.slice(&stream, 2).await;
    applied(&node, 2).await;
    assert_ne!(node.programs(), before, "its own programs are put in force again");

    // One that is killed while it waits for its slice.
    let waiting = node.agent("waiting", &config, &["--take-over"]);
    let _theirs = node.stream().await;
    node.slice(&stream, 3).await;
    applied(&node, 3).await;
    drop(waiting);
    node.slice(&stream, 4).await;
    applied(&node, 4).await;

    // One whose kernel part fails: its pins lie on no BPF file system.
    let elsewhere = config.replace(&node.pins.display().to_string(), &node.tpm.file("pins").display().to_string());
    let mut half = node.agent("half", &elsewhere, &["--take-over"]);
    let theirs = node.stream().await;
    node.slice(&theirs, 5).await;
    assert_eq!(half.ended().await, Some(1));
    let stream = node.stream().await;
    node.slice(&stream, 6).await;
    applied(&node, 6).await;

    assert!(serving.runs());
    let counted = probes.end();
    assert!(counted.iter().all(|(tried, refused)| *tried > 100 && *refused == 0), "{counted:?}");
    // And after all that one takes over.
    let next = node.agent("next", &config, &["--take-over"]);
    let newer = node.stream().await;
    node.slice(&newer, 6).await;
    next.says("this agent serves").await;
    assert_eq!(serving.ended().await, Some(0));
}
