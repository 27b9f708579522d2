//! TPMs: golden PCRs, the measurer, the gate.

use crate::support::Small;
use ambit_lab::ima::{self, Record};
use ambit_lab::tpm;
use ambit_lab::tpm_wire::Bank;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(20);

#[test]
fn a_nodes_pcrs_are_those_of_the_real_boot_in_three_banks() {
    let small = Small::up("tpmgolden", 1, 1);
    let netns = small.lab.spec().namespace("west-n1");
    for bank in [Bank::Sha1, Bank::Sha256, Bank::Sha384] {
        assert_eq!(tpm::read_pcrs(&netns, bank).unwrap(), tpm::golden_pcrs(bank), "{bank:?}");
    }
    // The EK certificate in NV chains to the lab's manufacturer: read and verified by tools that are not ours.
    let node = small.lab.place("west-n1").unwrap();
    let cert = small.lab.folder("west-n1").join("ek.der").display().to_string();
    let tcti = "swtpm:host=127.0.0.1,port=2321";
    small.lab.must_run_in(&node, &["tpm2_nvread", "-T", tcti, "-C", "o", "-o", &cert, "0x1c00002"], LIMIT).unwrap();
    let pem = format!("{cert}.pem");
    small.lab.must_run_in(&node, &["openssl", "x509", "-inform", "DER", "-in", &cert, "-out", &pem], LIMIT).unwrap();
    let [root, issuing] = small.lab.manufacturer().certificates().map(|p| p.display().to_string());
    // The SAN is critical and holds only a directoryName, which openssl does not know.
    let verify = ["openssl", "verify", "-ignore_critical", "-CAfile", &root, "-untrusted", &issuing, &pem];
    let said = small.lab.must_run_in(&node, &verify, LIMIT).unwrap();
    assert!(said.contains(": OK"), "{said}");
}

#[test]
fn what_the_measurer_logs_is_what_it_extends() {
    let small = Small::up("tpmmeasure", 1, 1);
    let lab = &small.lab;
    let replay_meets_pcr = |records: usize| {
        let deadline = Instant::now() + LIMIT;
        loop {
            let log = ima::parse(&std::fs::read(lab.ima_log("west-n1")).unwrap()).unwrap();
            let pcr = tpm::read_pcrs(&lab.spec().namespace("west-n1"), Bank::Sha256).unwrap().swap_remove(10);
            if log.len() == records && ima::replay_sha256(&log) == pcr[..] {
                return log;
            }
            assert!(Instant::now() < deadline, "{} records; PCR 10 {}", log.len(), hex::encode(pcr));
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    let path = lab.measure("west-n1", "tool", b"first").unwrap();
    let log = replay_meets_pcr(42);
    assert_eq!(log.last().and_then(Record::digest_and_path).unwrap().1, path.to_str().unwrap());
    // The same file is measured once, a changed one again.
    lab.measure("west-n1", "tool", b"second").unwrap();
    replay_meets_pcr(43);

    // The measurer dies with a record written and not extended; its successor catches up and measures nothing twice.
    lab.kill("west-n1-measurer").unwrap();
    let orphan = Record::ima_ng(&[9; 32], "/lost");
    let mut bytes = std::fs::read(lab.ima_log("west-n1")).unwrap();
    bytes.extend(orphan.encode());
    std::fs::write(lab.ima_log("west-n1"), bytes).unwrap();
    lab.start_again("west-n1-measurer").unwrap();
    replay_meets_pcr(44);

    // The machine's TPM loses power: it comes back where its logs say it was.
    lab.kill("west-n1-swtpm").unwrap();
    lab.start_again("west-n1-swtpm").unwrap();
    lab.measure("west-n1", "other", b"third").unwrap();
    replay_meets_pcr(45);
}

#[test]
fn clients_of_one_tpm_take_turns() {
    let small = Small::up("tpmgate", 1, 1);
    let node = small.lab.place("west-n1").unwrap();
    let children: Vec<_> = (0..8)
        .map(|_| {
            let argv = ["tpm2_getrandom", "-T", "swtpm:host=127.0.0.1,port=2321", "--hex", "16"];
            let launch = small.lab.launch(&node, &argv, "/dev/null".as_ref());
            let mut command: Command = ambit_lab::process::command(small.lab.name(), &launch).unwrap();
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    // One client holds a connection open all the while: a turn is a command, not a connection.
    let netns = small.lab.spec().namespace("west-n1");
    let holder = ambit_lab::net::inside(&netns, || std::net::TcpStream::connect("127.0.0.1:2321")).unwrap().unwrap();
    let outputs: Vec<_> = children.into_iter().map(|c| c.wait_with_output().unwrap()).collect();
    drop(holder);
    let mut numbers: Vec<_> = outputs.iter().map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).collect();
    assert!(numbers.iter().all(|n| n.len() == 32), "{outputs:?}");
    numbers.sort();
    numbers.dedup();
    assert_eq!(numbers.len(), 8, "random numbers repeat");
}

#[test]
fn what_a_killed_client_left_loaded_is_flushed() {
    let small = Small::up("tpmflush", 1, 1);
    let node = small.lab.place("west-n1").unwrap();
    let netns = small.lab.spec().namespace("west-n1");
    let context = small.lab.folder("west-n1").join("primary.ctx").display().to_string();
    let argv = ["tpm2_createprimary", "-T", "swtpm:host=127.0.0.1,port=2321", "-G", "ecc", "-c", &context];
    for _ in 0..3 {
        small.lab.must_run_in(&node, &argv, LIMIT).unwrap();
    }
    let full = small.lab.run_in(&node, &argv, LIMIT).unwrap();
    assert!(!full.status.success(), "an swtpm has three slots");
    assert_eq!(tpm::flush(&netns).unwrap(), 3);
    small.lab.must_run_in(&node, &argv, LIMIT).unwrap();
}
