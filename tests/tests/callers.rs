//! A plain client outside of the mesh and real agents, replicas and programs: it reaches a workload where a policy says so of its
//! address, across an upgrade of the agent, and not after the policy is deleted.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_lab::{Lab, cell, net, topology};
use ambit_tests::small::{PORT, Small, served};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_secs(20);
const WAIT: Duration = Duration::from_secs(2);

/// From a machine of the lab, in clear text.
fn dial(lab: &Lab, from: &str, to: SocketAddr) -> std::io::Result<TcpStream> {
    let netns = lab.place(from).unwrap().netns;
    let tcp = net::inside(&netns, || TcpStream::connect_timeout(&to, WAIT)).unwrap()?;
    tcp.set_read_timeout(Some(WAIT)).unwrap();
    Ok(tcp)
}

/// What the workload answers.
fn asked(mut tcp: &TcpStream) -> std::io::Result<String> {
    tcp.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    tcp.read_to_string(&mut answer).map(|_| answer)
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < SOON, "never: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_client_outside_is_let_in_by_its_address_and_by_nothing_else() {
    let small = Small::shaped("testcallers", 1, 2, 1).unwrap();
    let lab = &small.lab;
    let pod = served(lab, "west", "west-n1", "spiffe://west/web").unwrap();
    let to = SocketAddr::from((pod.address, PORT));
    let ambit = |args: &[&str]| lab.ambit("west", args).unwrap();
    let write = |name: &str, text: &str| {
        let file = lab.folder("operator").join(name);
        std::fs::write(&file, text).unwrap();
        ambit(&["policy", "apply", "-f", &file.display().to_string()]);
    };
    until("the pod is guarded", || dial(lab, "operator", to).is_err());
    assert_eq!(dial(lab, "operator", to).unwrap_err().kind(), ErrorKind::ConnectionRefused, "no policy");

    let open = |range: &str| {
        format!(
            "kind: Policy\nmetadata: {{name: clients}}\nspec: {{target: spiffe://west/db, action: allow, from: ['cidr:{range}'], \
             ports: [{PORT}], transport: passthrough}}\n"
        )
    };
    let client = topology::OPERATOR;
    write("clients.yaml", &open(&format!("{client}/32")));
    until("the client is let in", || dial(lab, "operator", to).and_then(|tcp| asked(&tcp)).is_ok());
    let answer = asked(&dial(lab, "operator", to).unwrap()).unwrap();
    assert!(answer.contains("SimpleHTTP"), "{answer}");
    let told = ambit(&["explain", &client.to_string(), &format!("spiffe://west/db:{PORT}")]);
    assert!(told.contains("allowed") && told.contains("passthrough: in clear text"), "{told}");

    // Another machine, another port; and with the widest range still no node of the mesh.
    for from in ["west-r1", "west-n1", "west-n2"] {
        assert!(dial(lab, from, to).is_err(), "{from}");
    }
    assert!(dial(lab, "operator", SocketAddr::from((pod.address, PORT + 1))).is_err());
    write("clients.yaml", &open("0.0.0.0/0"));
    until("every machine outside is let in", || dial(lab, "west-r1", to).and_then(|tcp| asked(&tcp)).is_ok());
    for from in ["west-n1", "west-n2"] {
        assert!(dial(lab, from, to).and_then(|tcp| asked(&tcp)).is_err(), "{from}");
    }

    // What is open outlives an upgrade of the agent, and new connections are the new one's.
    let kept = dial(lab, "operator", to).unwrap();
    let before = small.process("west-n1-agent").unwrap();
    std::thread::scope(|scope| {
        let upgrade = scope.spawn(|| lab.upgrade_agent("west-n1", SOON));
        let log = || std::fs::read_to_string(lab.agent_log("west-n1")).unwrap();
        until("the new agent serves", || log().contains("this agent serves"));
        let answer = asked(&dial(lab, "operator", to).unwrap()).unwrap();
        assert!(answer.contains("SimpleHTTP"), "{answer}");
        let answer = asked(&kept).unwrap();
        assert!(answer.contains("SimpleHTTP"), "what was open: {answer}");
        upgrade.join().unwrap().unwrap();
    });
    assert_ne!(small.process("west-n1-agent").unwrap(), before);
    let answer = asked(&dial(lab, "operator", to).unwrap()).unwrap();
    assert!(answer.contains("SimpleHTTP"), "{answer}");
    let node = lab.spec().member("west-n1").unwrap();
    let url = format!("http://{}/metrics", cell::metrics(&node));
    let page = lab.must_run_in(&lab.place("west-n1").unwrap(), &["curl", "-sSf", &url], SOON).unwrap();
    assert!(page.contains("ambit_connections_total{direction=\"unmeshed\",result=\"ok\"}"), "{page}");

    // The policy goes, and with it what is open.
    let open = dial(lab, "operator", to).unwrap();
    (&open).write_all(b"GET / HT").unwrap();
    ambit(&["policy", "delete", "clients"]);
    until("it is cut", || matches!((&open).read(&mut [0; 16]), Err(e) if e.kind() == ErrorKind::ConnectionReset));
    // Refused, or without an answer: after an upgrade the pod may ask nobody for the way back before that one has asked for it.
    until("nobody is let in", || dial(lab, "operator", to).is_err());
}
