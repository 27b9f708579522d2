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
