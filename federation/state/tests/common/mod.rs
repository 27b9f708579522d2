//! A cell's state machine without a cell: entries in, outcomes out.
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

pub(crate) mod documents;

use ambit_model::appraisal::PcrBank;
use ambit_model::{ClusterId, Code, Entry, NodeId, RaftIndex, Refusal, Selector, Stamp, SvidTtl};
use ambit_state::command::{Admission, Seen};
use ambit_state::objects::*;
use ambit_state::{Command, LogEntry, Reply, State};

pub(crate) struct Cell {
    pub(crate) state: State,
    pub(crate) index: u64,
    pub(crate) log: Vec<LogEntry>,
}

impl Cell {
    pub(crate) fn founded(td: &str) -> Cell {
        let mut cell = Cell { state: State::new(), index: 0, log: Vec::new() };
        let row = CellRow::founded(td.parse().unwrap(), td.as_bytes().to_vec());
        let member = Member {
            address: "127.0.0.1:1".into(),
            authority: "a1".into(),
            authority_not_after: Stamp(1_000_000_000),
            wrap_key: vec![],
            record_key: [1; 32],
        };
        cell.run(Command::FoundCell(row, 1, member, KeySetRow::default())).unwrap();
        cell.run(Command::RegisterCluster(cluster(td), vec![(ROOT.to_vec(), "lab".into())], 10_000)).unwrap();
        cell
    }
    pub(crate) fn at(&mut self, stamp: u64, request: u8, command: Command) -> Result<Reply, Refusal> {
        self.index += 1;
        let entry = LogEntry { stamp: Stamp(stamp), client: [9; 32], request: [request; 16], command };
        let entry = LogEntry::decode(&entry.encode().unwrap()).unwrap();
        self.log.push(entry.clone());
        self.state.apply(RaftIndex(self.index), &entry).outcome
    }
    pub(crate) fn run(&mut self, command: Command) -> Result<Reply, Refusal> {
        self.at(1_000_000, 0, command)
    }
}

/// A peer that asked and was not approved yet.
pub(crate) fn pending() -> PeerRow {
    PeerRow {
        state: PeerState::Pending,
        fingerprint: [7; 32],
        addresses: vec![],
        root_der: vec![1],
        bundle_sequence: 1,
        key_set: KeySetRow::default(),
        epoch: 0,
        seq: 0,
        hash: [0; 32],
        trouble: String::new(),
    }
}

/// The EK root of each cell's first cluster.
pub(crate) const ROOT: &[u8] = b"root";

pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    use sha2::Digest;
    sha2::Sha256::digest(bytes).into()
}
pub(crate) fn cluster(td: &str) -> ClusterId {
    td.parse().unwrap()
}
pub(crate) fn node(n: u8) -> NodeId {
    NodeId([n; 32])
}
pub(crate) fn entry(id: &str, td: &str) -> Entry {
    Entry {
        id: id.parse().unwrap(),
        spiffe_id: format!("spiffe://{td}/{id}").parse().unwrap(),
        cluster: cluster(td),
        nodes: Default::default(),
        selectors: [Selector::UnixUid(1000)].into(),
        ttl: SvidTtl::DEFAULT,
        federates_with: Default::default(),
        extras: Default::default(),
    }
}
pub(crate) fn admission(cell: &Cell, n: u8, nonce: u8, token: Option<[u8; 32]>) -> Admission {
    Admission {
        node: node(n),
        cluster: cluster("west"),
        nonce: [nonce; 32],
        deadline: Stamp(1_060_000),
        join_token: token,
        endorsement_revision: cell.state.cell().unwrap().endorsement_revision,
        policy_revision: cell.state.cell().unwrap().policy_revision,
        ak: AkFacts { name: vec![n], ..AkFacts::default() },
        ek: EkFacts { class: "lab".into(), root_sha256: Some(sha256(ROOT)), ..EkFacts::default() },
        seen: seen(u64::from(nonce)),
        key_hash: [n; 32],
        authority: "a1".into(),
        claims: "{}".into(),
    }
}
pub(crate) fn seen(clock: u64) -> Seen {
    Seen {
        counters: Counters { resets: 1, restarts: 0, clock },
        firmware_version: 7,
        ima: ImaPoint::default(),
        pcrs: Some(BootPcrs { bank: PcrBank::Sha256, values: Default::default() }),
        boot_pcrs_sha256: [1; 32],
        boot_log_sha256: [2; 32],
        policy: PolicyRef { name: "servers".parse().unwrap(), version: 1 },
        trust: Default::default(),
        evidence_sha256: [3; 32],
        evidence_depth: 0,
    }
}
pub(crate) fn code<T: std::fmt::Debug>(r: Result<T, Refusal>) -> Code {
    r.unwrap_err().code
}

/// An endpoint as the peer `east` exports it.
pub(crate) fn endpoint_of_east(id: &str, of: &str, last: u8) -> ambit_model::policy::Endpoint {
    ambit_model::policy::Endpoint {
        spiffe_id: format!("spiffe://east/{id}").parse().unwrap(),
        address: [10, 9, 0, last].into(),
        cluster: cluster(of),
        node_address: [10, 9, 1, 1].into(),
        node: node(1),
        generation: ambit_model::Generation(1),
    }
}
