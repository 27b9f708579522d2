//! Links that are cut, processes that die, and leases that bring them back.

use crate::support::{BINARY, Small, ambit_lab, text};
use ambit_lab::Ready;
use ambit_lab::fault::Fault;
use ambit_lab::net::reachable;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(15);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn links_are_cut_and_restored_between_sites_machines_and_pods() {
    let small = Small::up("netcut", 2, 2);
    let lab = &small.lab;
    let page = lab.folder("east-n1").join("page");
    std::fs::create_dir(&page).unwrap();
    std::fs::write(page.join("index.html"), "east-n1-web\n").unwrap();
    let page = page.display().to_string();
    let serve = ["python3", "-m", "http.server", "8080", "--directory", &page];
    let address: SocketAddr = "10.72.101.11:8080".parse().unwrap();
    let pod = lab.start_pod("east-n1", "web", &serve, Ready::Listening(address)).unwrap();
    assert_eq!(pod.address.to_string(), "10.72.101.11");
    let told: serde_json::Value =
        serde_json::from_slice(&std::fs::read(lab.pods_folder("east-n1").join("web.json")).unwrap()).unwrap();
    let expected = serde_json::json!({
        "cgroup": "web", "netns": "/run/netns/amb-netcut-east-n1-web", "address": "10.72.101.11", "uid": 1000
    });
    assert_eq!(told, expected);

    // The program runs in its pod's cgroup, as its user.
    let pid = lab.state().unwrap().process("east-n1-web").unwrap().id.pid;
    let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    assert!(cgroup.contains("0::/ambit-lab-netcut/east-n1/mesh/web"), "{cgroup}");
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.contains("Uid:\t1000\t1000") && status.contains("CapEff:\t0000000000000000"), "{status}");

    let client = lab.add_pod("west-n2", "client", 1000).unwrap();
    let limit = Duration::from_millis(700);
    let from = |role: &str| reachable(&lab.place(role).unwrap().netns, address, limit);
    let all = ["west-n1", "west-n2-client", "east-n2", "operator"];
    let seen = |up: [bool; 4]| wait_until(&format!("{all:?} reach {up:?}"), || all.map(from) == up);
    seen([true; 4]);
    for (target, up) in [
        ("east", [false, false, true, false]),
        ("east-n1", [false; 4]),
        ("west-n2", [true, false, true, true]),
        ("west:east", [false, false, true, true]),
    ] {
        lab.cut(target).unwrap();
        seen(up);
        assert_eq!(lab.leases().unwrap().len(), 1);
        assert_eq!(lab.restore(target).unwrap(), 1);
        seen([true; 4]);
    }
    lab.kill("router").unwrap();
    seen([false, false, true, false]);
    lab.start_again("router").unwrap();
    seen([true; 4]);

    probe_tells_who_answers(small.lab.name());
    lab.remove_pod("west-n2", &client.name).unwrap();
    assert!(!ambit_lab::net::path(&client.namespace).exists());
}

fn probe_tells_who_answers(lab: &str) {
    use std::io::{BufRead, BufReader};
    let args =
        ["probe", "--lab", lab, "--pod", "west-n2-client", "--target", "10.72.101.11:8080", "--interval-ms", "20"];
    let mut probe = std::process::Command::new(BINARY).args(args).stdout(std::process::Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(probe.stdout.take().unwrap()).lines().take(10);
    let lines: Vec<String> = lines.map(Result::unwrap).collect();
    probe.kill().unwrap();
    probe.wait().unwrap();
    assert!(lines.iter().all(|l| l.ends_with(r#""ok":true,"by":"east-n1-web","refused":false}"#)), "{lines:?}");
}

#[test]
fn a_fault_reverts_by_its_lease_though_its_injector_is_gone() {
    let small = Small::up("lease", 1, 1);
    let lab = &small.lab;
    let gate = || lab.state().unwrap().process("west-n1-tpm-gate").unwrap().id;
    let before = gate();
    // The injector is a process of its own that has ended when the lease does.
    let output = ambit_lab(&["inject", "--name", "lease", "kill", "west-n1-tpm-gate", "--lease", "2500ms"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(!before.alive());
    let status = ambit_lab(&["status", "--name", "lease"]);
    assert!(!status.status.success(), "a lab with a fault is not well");
    assert!(text(&status.stdout).contains("tpm-gate DEAD"), "{}", text(&status.stdout));
    wait_until("the gate is back", || gate() != before && gate().alive());
    wait_until("the lease and its keeper are gone", || {
        lab.leases().unwrap().is_empty()
            && lab.state().unwrap().processes.iter().all(|p| !p.name.starts_with("keeper-"))
    });
    wait_until("the lab is well", || ambit_lab(&["status", "--name", "lease"]).status.success());

    let measurer = lab.state().unwrap().process("west-n1-measurer").unwrap().id;
    lab.inject(Fault::Pause, "west-n1-measurer", Duration::from_millis(500)).unwrap();
    let state = || std::fs::read_to_string(format!("/proc/{}/stat", measurer.pid)).unwrap();
    wait_until("stopped", || state().contains(") T "));
    wait_until("continued", || !state().contains(") T "));

    for (action, target) in [("kill", "west-n9"), ("cut", "nowhere"), ("kill", "west-n1-nothing")] {
        let output = ambit_lab(&["inject", "--name", "lease", action, target]);
        assert!(text(&output.stderr).contains("not_found"), "{}", text(&output.stderr));
    }
    assert_eq!(lab.leases().unwrap(), [], "a refused fault leaves no lease");
}

#[test]
fn a_site_dies_whole_and_comes_back_in_order() {
    let small = Small::up("sitekill", 1, 1);
    let lab = &small.lab;
    let alive = || lab.state().unwrap().processes.iter().filter(|p| p.member.is_some() && p.id.alive()).count();
    assert_eq!(alive(), 5);
    lab.kill("west").unwrap();
    assert_eq!(alive(), 0);
    lab.start_again("west").unwrap();
    assert_eq!(alive(), 5);
    let netns = lab.spec().namespace("west-n1");
    let pcrs = ambit_lab::tpm::read_pcrs(&netns, ambit_lab::tpm_wire::Bank::Sha256).unwrap();
    assert_eq!(pcrs, ambit_lab::tpm::golden_pcrs(ambit_lab::tpm_wire::Bank::Sha256));
}

/// Whether a datagram from one machine reaches the other: TCP would need both ways.
fn hears(lab: &ambit_lab::Lab, from: &str, to: &str) -> bool {
    use std::net::UdpSocket;
    let address = lab.spec().member(to).unwrap().address();
    let netns = |role: &str| lab.spec().namespace(role);
    let ear = ambit_lab::net::inside(&netns(to), || UdpSocket::bind((address, 0))).unwrap().unwrap();
    ear.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let at = ear.local_addr().unwrap();
    let send = || UdpSocket::bind("0.0.0.0:0").and_then(|mouth| mouth.send_to(b"?", at));
    // A blackhole is told to the sender at once.
    ambit_lab::net::inside(&netns(from), send).unwrap().is_ok() && ear.recv(&mut [0; 8]).is_ok()
}

#[test]
fn a_cut_can_be_one_way_and_a_small_disk_full() {
    let small = Small::up("oneway", 1, 2);
    let lab = &small.lab;
    assert!(hears(lab, "west-n1", "west-n2") && hears(lab, "west-n2", "west-n1"));
    lab.cut("west-n1>west-n2").unwrap();
    assert!(!hears(lab, "west-n1", "west-n2"), "what the first sends is lost");
    assert!(hears(lab, "west-n2", "west-n1") && hears(lab, "west-n1", "west-r1"), "and nothing else");
    assert_eq!(lab.restore("west-n1>west-n2").unwrap(), 1);
    assert!(hears(lab, "west-n1", "west-n2"));
    assert!(lab.cut("west-n1>operator").is_err(), "no machine of the same site");

    let small_disk = lab.folder("west-r1").join("disk");
    let write = || std::fs::write(small_disk.join("file"), [1; 100]).map_err(|e| e.kind());
    assert!(lab.inject(Fault::Fill, "west-r1", Duration::from_secs(9)).is_err(), "there is no such disk");
    assert_eq!(lab.leases().unwrap(), []);
    lab.make_small_disk("west-r1", 4).unwrap();
    write().unwrap();
    lab.inject(Fault::Fill, "west-r1", Duration::from_secs(60)).unwrap();
    std::fs::remove_file(small_disk.join("file")).unwrap();
    std::fs::write(small_disk.join("last"), [1; 4096]).unwrap();
    assert_eq!(write(), Err(std::io::ErrorKind::StorageFull));
    assert_eq!(lab.restore("west-r1").unwrap(), 1);
    assert_eq!(write(), Ok(()));
}
