//! Processes in mesh cgroups that connect wherever they are told, and numbers that say where.

use crate::node::{self, Node, Worker};
use ambit_agent::pods::Pod;
use ambit_model::SpiffeId;
use std::net::IpAddr;

/// SplitMix64: the same numbers on every run, so that a failure is a seed.
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % n as u64).unwrap()
    }
    pub(crate) fn of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len())]
    }
}

pub(crate) fn uri(short: &str) -> String {
    format!("spiffe://{short}")
}

/// Reads `host:port` words a line, and answers each with A (allowed), D (denied) or the error's name.
const DIALLER: &str = r#"
for line in sys.stdin:
    out = []
    for word in line.split():
        host, port = word.rsplit(':', 1)
        s = socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET)
        e = s.connect_ex((host, int(port)))
        s.close()
        out.append({errno.ECONNREFUSED: 'A', errno.EPERM: 'D'}.get(e) or errno.errorcode.get(e, 'connected'))
    print(' '.join(out), flush=True)
"#;

pub(crate) struct Caller {
    pub(crate) id: SpiffeId,
    pub(crate) pod: Pod,
    worker: Worker,
}

pub(crate) fn callers(node: &Node, ids: &[&str]) -> Vec<Caller> {
    let caller = |(n, id): (usize, &&str)| {
        let name = format!("caller{n}");
        let pod = Pod {
            cgroup_id: node.cgroup(&name),
            cgroup: name.clone(),
            netns: "/proc/self/ns/net".into(),
            netns_id: (1, 2),
            address: node::POD,
            address6: None,
            uid: 1000,
            name: name.clone(),
        };
        Caller { id: uri(id).parse().unwrap(), pod, worker: node.worker(&name, DIALLER) }
    };
    ids.iter().enumerate().map(caller).collect()
}

impl Caller {
    /// Connects to each; every fourth of IPv4 by its v4-mapped address.
    pub(crate) fn ask<A: Copy + Into<IpAddr>>(&mut self, to: &[(A, u16)]) {
        let name = |n: usize, host: IpAddr| match host {
            IpAddr::V4(host) if n.is_multiple_of(4) => format!("::ffff:{host}"),
            host => host.to_string(),
        };
        let words = to.iter().enumerate().map(|(n, (host, port))| format!("{}:{port} ", name(n, (*host).into())));
        self.worker.ask(&words.collect::<String>());
    }

    /// What came of each.
    pub(crate) fn answers(&mut self, asked: usize) -> Vec<String> {
        let answers: Vec<String> = self.worker.answer().split_whitespace().map(str::to_owned).collect();
        assert_eq!(answers.len(), asked);
        answers
    }
}
