//! The real thing: the demonstration to its end, a lab with its cells under bad input, and what is left of them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_lab::process::ProcessId;
use ambit_lab::{Lab, Member, Place, cell, cgroup, down, net, process, topology};
use ambit_tests::process::{Folder, binary, must_run, run};
use ambit_tests::secrets;
use ambit_tests::small::{Small, needs_root};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Every figure of the closing table.
const FIGURES: [&str; 23] = [
    "lab ready",
    "cell west formed",
    "cell east formed",
    "peers registered, both ways",
    "enrol west-n1, without TPM time",
    "enrol west-n2, without TPM time",
    "enrol east-n1, without TPM time",
    "enrol east-n2, without TPM time",
    "policy change -> enforced in the other cluster",
    "file altered -> calls refused (lab)",
    "stray failed calls before that",
    "release -> calls again, by a new attestation",
    "leader-loss: RTO",
    "leader-loss: acknowledged writes lost",
    "leader-loss: writes duplicated",
    "cluster-loss: RTO",
    "cluster-loss: acknowledged writes lost",
    "cluster-loss: writes duplicated",
    "cluster-loss: failed calls",
    "cluster-loss: fail-back after west's return",
    "resident memory of a replica, debug build",
    "resident memory of an agent, debug build",
    "whole demo",
];
/// `nobody` of Debian.
const NOBODY: u32 = 65534;
/// A command of a moment.
const COMMAND_MAX: Duration = Duration::from_secs(20);
/// What a port may take to hang up on garbage before the test goes on without its answer.
const ANSWER_MAX: Duration = Duration::from_millis(150);

#[test]
fn the_demo_ends_well_with_every_figure_and_leaves_nothing() {
    needs_root().unwrap();
    down::down("testdemo").unwrap();
    let folder = Folder::new().unwrap();
    let json = folder.path("demo.json");
    // A demo that hangs is ended, as one whose test is killed; its guardian then cleans up.
    let program = binary("ambit-lab").unwrap().display().to_string();
    let leash = ["setpriv", "--pdeathsig", "TERM", "--", "timeout", "--kill-after", "5", "240"];
    let demo = [program.as_str(), "demo", "--json", json.to_str().unwrap(), "--name", "testdemo"];
    let logs = folder.path("logs");
    let out = run(&[&leash[..], &demo, &["--logs", logs.to_str().unwrap()]].concat()).unwrap();
    let told = text(&out.stdout);
    assert!(out.status.success(), "{told}{}", text(&out.stderr));
    assert!(!told.contains('\u{1b}'), "colour, where there is no terminal");
    for figure in FIGURES {
        assert!(told.contains(figure), "the table lacks {figure}: {told}");
    }
    println!("{}", told.split_once("Figures of this run").unwrap().1);

    let figures: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    let figures = figures["figures"].as_array().unwrap();
    let names: Vec<&str> = figures.iter().map(|f| f["name"].as_str().unwrap()).collect();
    assert_eq!(names, FIGURES);
    for figure in figures {
        // Times and their targets are told above, never judged: this machine may be loaded.
        assert!(figure["ours"].as_f64().is_some_and(|ours| ours >= 0.0), "{figure}");
        let name = figure["name"].as_str().unwrap();
        if name.ends_with("lost") || name.ends_with("duplicated") {
            assert_eq!(figure["ours"].as_f64(), Some(0.0), "{figure}");
            assert_eq!(figure["met"].as_bool(), Some(true), "{figure}");
        }
    }
    assert_eq!(traces("testdemo"), [""; 0]);
    // What each kind of process wrote on the whole way is searched for private keys, here and when the folder goes.
    for (log, least) in [("west-r1-ambitd.log", 2_000), ("east-n1-agent.log", 2_000)] {
        let written = std::fs::metadata(logs.join(log)).unwrap().len();
        assert!(written > least, "{written} bytes of {log}");
    }
    assert_eq!(secrets::in_logs(&logs).unwrap(), [""; 0]);
}

#[test]
fn a_lab_with_its_cell_serves_clean_metrics_and_withstands_garbage() {
    let small = Small::up("testsmall").unwrap();
    let lab = &small.lab;
    let members = lab.spec().members();
    for member in &members {
        metrics_are_clean(lab, member);
    }
    lab.start_pod("west-n1", "web", &["sleep", "600"], ambit_lab::Ready::Started).unwrap();
    let agents: Vec<ProcessId> = ["west-n1-agent", "west-n2-agent"].map(|name| running(lab, name)).into();
    for node in members.iter().filter(|m| lab.workload_socket(&m.role()).exists()) {
        garbage_on_every_port(lab, node);
    }
    in_the_pod(lab, "west-n1-web");
    the_wire_stays_guarded(lab, lab.spec().member("west-n1").as_ref().unwrap(), "web");
    for (name, before) in ["west-n1-agent", "west-n2-agent"].iter().zip(agents) {
        assert!(before.alive(), "{name} died: {}", process::log_tail(&lab.agent_log("west-n1")));
        assert_eq!(running(lab, name), before);
    }
    for node in ["west-n1", "west-n2"] {
        // Not just alive: it still does its work.
        lab.wait_enrolled(node, COMMAND_MAX).unwrap();
    }
    for member in &members {
        metrics_are_clean(lab, member);
    }
    drop(small);
    assert_eq!(traces("testsmall"), [""; 0]);
}

#[test]
fn an_agent_that_cannot_start_says_why_and_makes_nothing() {
    needs_root().unwrap();
    let folder = Folder::new().unwrap();
    let data = folder.path("data");
    let good = format!(
        "cluster = \"west\"\ntrust_domain = \"west\"\nfingerprint = \"{}\"\nservers = [\"127.0.0.1:1\"]\n\
         node_address = \"127.0.0.1\"\ntcti = \"swtpm:host=127.0.0.1,port=1\"\nboot_log = \"/b\"\nima_log = \"/i\"\n\
         metrics_listen = \"127.0.0.1:0\"\nhbone_listen = \"127.0.0.1:0\"\ncgroup_root = \"{root}/cgroup\"\n\
         pin_dir = \"{root}/pins\"\npods_dir = \"{root}/pods\"\nworkload_socket = \"{root}/socket\"\n\
         data_dir = \"{root}/data\"\n",
        "ab".repeat(32),
        root = data.parent().unwrap().display(),
    );
    let config = folder.path("agent.toml");
    let agent = binary("ambit-agent").unwrap();
    for (text, words) in [
        (format!("{good}boot_lgo = \"/b\"\n"), ["config_unknown_key", "boot_lgo", "boot_log"]),
        (good.replace("servers = [\"127.0.0.1:1\"]", "servers = []"), ["config_invalid", "servers", "0"]),
        ("\u{0}garbage".to_owned(), ["config_invalid", "expected", "found"]),
    ] {
        std::fs::write(&config, text).unwrap();
        refused(Command::new(&agent).args(["run", "--config"]).arg(&config), &words);
        assert!(!data.exists() && !folder.path("socket").exists(), "half-made");
    }
    // As nobody, from a place that nobody can reach.
    let open = Folder::new().unwrap();
    let (copy, config) = (open.path("ambit-agent"), open.path("agent.toml"));
    std::fs::copy(&agent, &copy).unwrap();
    std::fs::write(&config, &good).unwrap();
    for path in [&open.path("."), &config] {
        must_run(&["chmod", "a+rX", path.to_str().unwrap()]).unwrap();
    }
    let mut nobody = Command::new(&copy);
    nobody.args(["run", "--config"]).arg(&config).uid(NOBODY).gid(NOBODY);
    refused(&mut nobody, &["needs_root", "root", "65534"]);
    assert!(!data.exists(), "half-made");
}

fn running(lab: &Lab, name: &str) -> ProcessId {
    lab.state().unwrap().process(name).unwrap_or_else(|| panic!("no {name}")).id
}

/// `promtool check metrics` judges form and names.
fn metrics_are_clean(lab: &Lab, member: &Member) {
    let role = member.role();
    let url = format!("http://{}/metrics", cell::metrics(member));
    let page = lab.must_run_in(&lab.place(&role).unwrap(), &["curl", "-sSf", &url], COMMAND_MAX).unwrap();
    assert!(page.contains("ambit_"), "{role}: {page}");
    let mut promtool = Command::new("promtool");
    promtool.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut promtool = promtool.spawn().expect("promtool (package prometheus; `cargo xtask deps`)");
    promtool.stdin.take().unwrap().write_all(page.as_bytes()).unwrap();
    let out = promtool.wait_with_output().unwrap();
    let said = format!("{}{}", text(&out.stdout), text(&out.stderr));
    assert!(out.status.success() && said.trim().is_empty(), "{role}: {said}\n{page}");
}

/// What comes to a port from someone who does not speak its language, or stops in mid-word.
fn garbage() -> Vec<Vec<u8>> {
    // Noise that is the same in every run.
    let noise = |n: usize| (0..n).scan(0x9e37_79b9_u32, |x, _| next(x)).collect::<Vec<u8>>();
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    vec![
        Vec::new(),
        vec![0],
        vec![0xff; 64 << 10],
        noise(256 << 10),
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n".to_vec(),
        [b"GET /".as_slice(), &vec![b'a'; 1 << 20], b" HTTP/1.1\r\n\r\n"].concat(),
        b"CONNECT 10.71.101.11:8080 HTTP/1.1\r\n\r\n".to_vec(),
        // A TLS record that promises more than it holds, and a ClientHello that is none.
        [&[0x16, 3, 1, 0x40, 0], noise(100).as_slice()].concat(),
        [&[0x16, 3, 1, 0, 100, 1, 0, 0, 96], noise(96).as_slice()].concat(),
        // HTTP/2: a frame of the greatest length, and a header block that does not decode.
        [preface.as_slice(), &[0xff, 0xff, 0xff, 1, 4, 0, 0, 0, 1], &noise(1000)].concat(),
        [preface.as_slice(), &[0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 100, 1, 5, 0, 0, 0, 1], &noise(100)].concat(),
    ]
}

/// xorshift32.
fn next(x: &mut u32) -> Option<u8> {
    *x ^= *x << 13;
    *x ^= *x >> 17;
    *x ^= *x << 5;
    Some(x.to_le_bytes()[0])
}

fn garbage_on_every_port(lab: &Lab, node: &Member) {
    let role = node.role();
    let hbone: SocketAddr = (node.address(), 15008).into();
    let place = lab.place(&role).unwrap();
    for address in [hbone, cell::metrics(node)] {
        tcp_garbage(&place, address);
    }
    let socket = lab.workload_socket(&role);
    for bytes in garbage() {
        let stream = UnixStream::connect(&socket).unwrap();
        stream.set_read_timeout(Some(ANSWER_MAX)).unwrap();
        stream.set_write_timeout(Some(ANSWER_MAX)).unwrap();
        send(stream, &bytes);
    }
    // Half-open connections, more than the descriptors that a careless loop would survive quickly.
    let held = net::inside(&place.netns, || {
        (0..200).filter_map(|_| TcpStream::connect_timeout(&hbone, COMMAND_MAX).ok()).count()
    });
    assert_eq!(held.unwrap(), 200, "{role}");
}

/// The agent also listens inside each pod.
fn in_the_pod(lab: &Lab, pod: &str) {
    let place = Place { uid: None, ..lab.place(pod).unwrap() };
    let deadline = Instant::now() + COMMAND_MAX;
    let listeners = loop {
        let told = lab.must_run_in(&place, &["ss", "-Hltn4"], COMMAND_MAX).unwrap();
        let found: Vec<SocketAddr> = told.lines().filter_map(|l| l.split_whitespace().nth(3)?.parse().ok()).collect();
        if !found.is_empty() || Instant::now() > deadline {
            break found;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    assert!(!listeners.is_empty(), "the agent listens in its pods");
    for address in listeners {
        tcp_garbage(&place, address);
        // And from one of its workloads; whether the kernel lets it connect there is not asked here.
        let noise = format!("head -c 100000 /dev/urandom > /dev/tcp/{}/{}", address.ip(), address.port());
        lab.run_in(&place, &["timeout", "5", "bash", "-c", &noise], COMMAND_MAX).unwrap();
    }
}

/// A socket that no mesh cgroup governs gets nothing out of the pod, and the agent puts the packet program back where it is lost.
fn the_wire_stays_guarded(lab: &Lab, node: &Member, pod: &str) {
    let place = lab.place(&format!("{}-{pod}", node.role())).unwrap();
    let hbone = SocketAddr::new(node.address().into(), 15008);
    let gets_out = || {
        net::inside(&place.netns, || TcpStream::connect_timeout(&hbone, Duration::from_millis(500)).is_ok()).unwrap()
    };
    assert!(!gets_out(), "a socket from outside the mesh reached {hbone} from the pod");
    let pin = lab.pins(&node.role()).join("pods").join(pod).join("veth-0");
    std::fs::remove_file(&pin).unwrap();
    let deadline = Instant::now() + COMMAND_MAX;
    while !pin.exists() {
        assert!(Instant::now() < deadline, "the packet program was not put back");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(!gets_out(), "the packet program is back, and lets a socket from outside the mesh reach {hbone}");
}

fn tcp_garbage(place: &Place, address: SocketAddr) {
    for bytes in garbage() {
        let told = net::inside(&place.netns, || {
            TcpStream::connect_timeout(&address, COMMAND_MAX).map(|stream| {
                stream.set_read_timeout(Some(ANSWER_MAX)).unwrap();
                stream.set_write_timeout(Some(ANSWER_MAX)).unwrap();
                send(stream, &bytes);
            })
        });
        match told.unwrap() {
            // Hung up before a word: the listener in a pod takes captured connections only.
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => {}
            told => told.unwrap_or_else(|e| panic!("{address} takes no connection: {e}")),
        }
    }
}

/// Whether the far end hangs up in between is its own affair.
fn send(mut stream: impl Read + Write, bytes: &[u8]) {
    let _ = stream.write_all(bytes);
    let mut answer = [0; 4096];
    let _ = stream.read(&mut answer);
}

/// Runs what must be refused, with all that a refusal tells.
fn refused(command: &mut Command, words: &[&str]) {
    let Output { status, stdout, stderr } = command.stdin(Stdio::null()).output().unwrap();
    let said = format!("{}{}", text(&stdout), text(&stderr));
    assert!(!status.success(), "{said}");
    for word in words {
        assert!(said.contains(word), "'{word}' is not in: {said}");
    }
}

/// Every trace of a lab on this machine.
fn traces(name: &str) -> Vec<String> {
    let mut found = net::list(name);
    let places: [PathBuf; 3] = [cgroup::top(name).unwrap(), cgroup::pins(name), topology::root(name)];
    found.extend(places.iter().filter(|p: &&PathBuf| p.exists()).map(|p| p.display().to_string()));
    let lock = Path::new(topology::RUN_DIR).join(format!(".{name}.lock"));
    found.extend(lock.exists().then(|| lock.display().to_string()));
    found.extend(process::marked(name).iter().map(|id| format!("process {}", id.pid)));
    // A process that lost its marker would still name a folder of the lab.
    let root = topology::root(name).display().to_string();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let line = text(&std::fs::read(entry.path().join("cmdline")).unwrap_or_default()).replace('\0', " ");
        found.extend(line.contains(&root).then(|| format!("process {:?} {line}", entry.file_name())));
    }
    found
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
