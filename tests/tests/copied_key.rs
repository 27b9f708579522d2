//! A workload's SVID and key, copied to another attested node: refused there by whoever it calls, in its own cluster and in
//! another cell's, and good at home. The caller is openssl with bytes written by hand, not our agent.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_lab::{Lab, Place, Pod, Ready, cell, topology};
use ambit_tests::process::{SOON, binary, until};
use ambit_tests::small::{PORT, Small, entry, peered, served};
use sha2::{Digest, Sha256};
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// HBONE.
const TUNNEL: u16 = 15008;

/// What a thief takes from `web` of west-n1: key, leaf and intermediate, as files.
struct Loot {
    folder: PathBuf,
}

impl Loot {
    fn taken(lab: &Lab) -> Loot {
        let folder = lab.folder("west-n1").join("taken");
        std::fs::create_dir_all(&folder).unwrap();
        let (agent, socket) = (binary("ambit-agent").unwrap(), lab.workload_socket("west-n1"));
        let argv = ["fetch", "--socket", socket.to_str().unwrap(), "--out", folder.to_str().unwrap()];
        let place = Place { uid: None, ..lab.place("west-n1-web").unwrap() };
        until("web's SVID", || {
            let told = lab.run_in(&place, &[&[agent.to_str().unwrap()], &argv[..]].concat(), SOON).unwrap();
            told.status.success().then_some(())
        });
        let chain = std::fs::read_to_string(folder.join("svid.pem")).unwrap();
        let end = chain.find("-----END CERTIFICATE-----\n").unwrap() + "-----END CERTIFICATE-----\n".len();
        std::fs::write(folder.join("above.pem"), &chain[end..]).unwrap();
        Loot { folder }
    }

    /// The status that `called` on this node answers to a CONNECT to its pod, from a place of the lab; none where there is no
    /// answer: the tunnel was refused.
    fn used(&self, lab: &Lab, from: &str, node: &str, called: &str, pod: &Pod) -> Option<u8> {
        let request = self.folder.join("request");
        std::fs::write(&request, connect(&format!("{}:{PORT}", pod.address))).unwrap();
        let file = |name: &str| self.folder.join(name).display().to_string();
        let at = SocketAddr::from((lab.spec().member(node).unwrap().address(), TUNNEL));
        let name = format!("{}.ambit.internal", &hex::encode(Sha256::digest(called.as_bytes()))[..32]);
        let script = format!(
            "(cat {}; sleep 2) | openssl s_client -quiet -alpn h2 -connect {at} -servername {name} -cert {} -key {} \
             -cert_chain {}",
            file("request"),
            file("svid.pem"),
            file("svid.key"),
            file("above.pem"),
        );
        let out = lab.run_in(&lab.place(from).unwrap(), &["bash", "-c", &script], SOON).unwrap();
        let status = status(&out.stdout);
        println!("{from} -> {node} {called}: {status:?}; {}", String::from_utf8_lossy(&out.stderr).trim());
        status
    }
}

/// An HTTP/2 client's first bytes and a CONNECT on stream 1 (RFC 9113 section 3.4, 8.5; RFC 7541 6.2.2).
fn connect(authority: &str) -> Vec<u8> {
    let mut block = vec![0x02, 7];
    block.extend(b"CONNECT");
    block.extend([0x01, u8::try_from(authority.len()).unwrap()]);
    block.extend(authority.as_bytes());
    let mut out = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    out.extend([0, 0, 0, 4, 0, 0, 0, 0, 0]);
    out.extend([0, 0, u8::try_from(block.len()).unwrap(), 1, 4, 0, 0, 0, 1]);
    out.write_all(&block).unwrap();
    out
}

/// The first byte of the header block that answers stream 1: 0x88 stands for 200 (RFC 7541 appendix A).
fn status(mut answer: &[u8]) -> Option<u8> {
    while let [a, b, c, kind, _, _, _, _, stream, rest @ ..] = answer {
        let length = usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c);
        if (*kind, *stream) == (1, 1) {
            return rest.first().copied();
        }
        answer = rest.get(length..)?;
    }
    None
}

const OK: Option<u8> = Some(0x88);

/// How often a node refused a tunnel for where it came from.
fn refusals(lab: &Lab, node: &str) -> u64 {
    let member = lab.spec().member(node).unwrap();
    let (_, page) = lab.page(node, cell::metrics(&member), "/metrics").unwrap();
    let line = "ambit_tls_handshakes_total{result=\"failed\",reason=\"node_address_mismatch\"} ";
    page.lines().find_map(|l| l.strip_prefix(line)).map_or(0, |n| n.parse().unwrap())
}

fn logged(log: &Path, words: &[&str]) -> bool {
    let log = std::fs::read_to_string(log).unwrap();
    log.lines().any(|line| words.iter().all(|word| line.contains(word)))
}

#[test]
fn a_copied_svid_is_refused_from_another_attested_node_in_its_own_and_in_another_cell() {
    let small = Small::shaped("testcopied", 2, 3, 1).unwrap();
    let lab = &small.lab;
    peered(lab).unwrap();
    entry(lab, "west", "web").unwrap();
    lab.start_pod("west-n1", "web", &["sleep", "600"], Ready::Started).unwrap();
    let near = served(lab, "west", "west-n3", "spiffe://west/web").unwrap();
    let far = served(lab, "east", "east-n1", "spiffe://west/web").unwrap();
    let loot = Loot::taken(lab);
    for (node, called, pod) in [("west-n3", "spiffe://west/db", &near), ("east-n1", "spiffe://east/db", &far)] {
        // At home first: what is refused afterwards is refused for its place alone.
        until("web is let in from its own node", || (loot.used(lab, "west-n1", node, called, pod) == OK).then_some(()));
        let before = refusals(lab, node);
        // Another node of its cluster, one of the other's, and a machine of the cluster that is no node.
        for thief in ["west-n2", "east-n2", "west-r1"] {
            assert_eq!(loot.used(lab, thief, node, called, pod), None, "{thief} to {node}");
        }
        assert_eq!(refusals(lab, node), before + 3);
        let elsewhere = lab.spec().member("west-n2").unwrap().address().to_string();
        assert!(logged(&lab.agent_log(node), &["node_address_mismatch", "spiffe://west/web", &elsewhere]), "{node}");
        assert_eq!(loot.used(lab, "west-n1", node, called, pod), OK, "and is good at home still");
    }
    drop(small);
    assert!(!topology::root("testcopied").exists());
}
