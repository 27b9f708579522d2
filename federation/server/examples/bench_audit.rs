//! What the audit log costs an issuance: `cargo xtask bench audit`. The very state machine and the very files, with the log
//! and without it in turn, on one thread; CPU time by the kernel's account, so that other load does not count.
#![allow(clippy::print_stdout, reason = "a measurement prints")]

use ambit_model::appraisal::PcrBank;
use ambit_model::{ClusterId, Code, Entry, NodeId, RaftIndex, Refusal, Selector, Stamp, SvidTtl};
use ambit_state::command::{Admission, LeafRequest, Seen};
use ambit_state::objects::*;
use ambit_state::{Command, LogEntry, State};
use ambitd::store::Bodies;
use ambitd::store::audit::AuditFiles;
use sha2::{Digest, Sha256};
use std::path::PathBuf;

/// Issuances of one round: as many as a node may have at once.
const ISSUANCES: usize = 4_000;
const ROUNDS: usize = 7;
const NODE: NodeId = NodeId([1; 32]);

fn main() -> Result<(), Refusal> {
    let build = if cfg!(debug_assertions) { "debug: compare, do not quote" } else { "release" };
    println!(
        "cost of the audit log per issued leaf, CPU time of applying ({build}; one thread, {ROUNDS} rounds in turn)"
    );
    println!(
        "{:>16} {:>12} {:>12} {:>12} {:>12} {:>12}",
        "leaves an entry", "without", "with", "log", "files", "bytes"
    );
    let mut figures = 0;
    for leaves in [1, 16] {
        let (mut without, mut with, mut files) = (Vec::new(), Vec::new(), Vec::new());
        let mut bytes = 0;
        for _ in 0..ROUNDS {
            without.push(round(false, leaves)?.state_us);
            let row = round(true, leaves)?;
            with.push(row.state_us);
            files.push(row.files_us);
            bytes = row.bytes;
        }
        let (without, with, files) = (median(without), median(with), median(files));
        let log = with - without;
        println!("{leaves:>16} {without:>9.1} us {with:>9.1} us {log:>9.1} us {files:>9.1} us {bytes:>12}");
        figures += 4;
    }
    println!(
        "with: state and records, appended and not synced (a snapshot syncs them); bytes: record, length and leaf hash"
    );
    if let Ok(load) = std::fs::read_to_string("/proc/loadavg") {
        println!("load average {}", load.split(' ').take(3).collect::<Vec<_>>().join(" "));
    }
    println!("{figures} figures, {figures} met");
    Ok(())
}

struct Row {
    state_us: f64,
    files_us: f64,
    bytes: usize,
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all.get(all.len() / 2).copied().unwrap_or_default()
}

/// Time of this thread on a core so far, microseconds.
fn cpu_us() -> Result<f64, Refusal> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let ns = text.split(' ').next().and_then(|ns| ns.parse::<f64>().ok());
    ns.map(|ns| ns / 1e3).ok_or_else(|| Refusal::new(Code::Internal, "/proc/thread-self/schedstat", text))
}

struct Folder(PathBuf);
impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn round(log: bool, leaves: usize) -> Result<Row, Refusal> {
    let folder = Folder(std::env::temp_dir().join(format!("ambit-bench-audit-{}", std::process::id())));
    let files = AuditFiles::at(&folder.0);
    let mut cell = Cell { state: State::new(), index: 0 };
    cell.begin(log)?;
    cell.state.take_audited();
    let (mut state_us, mut files_us, mut bytes) = (0.0, 0.0, 0);
    for n in 0..ISSUANCES / leaves {
        let asked = |i: usize| Ok(LeafRequest { entry: format!("e{i}").parse()?, key_hash: [4; 32] });
        let requests = (0..leaves).map(asked).collect::<Result<Vec<_>, Refusal>>()?;
        let generation = cell.state.node(&NODE).map(|row| row.generation).unwrap_or_default();
        let command = Command::Issue { node: NODE, generation, authority: "a1".into(), leaves: requests };
        let entry = cell.entry(command, n as u64 + 1);
        let began = cpu_us()?;
        let outcome = cell.state.apply(RaftIndex(cell.index), &entry).outcome;
        cell.state.take_writes();
        let applied = cpu_us()?;
        let audited = cell.state.take_audited();
        bytes += audited.iter().map(|entry| entry.bytes.len() + 2 + 32).sum::<usize>();
        let files_began = cpu_us()?;
        let unwritten = |e: ambitd::store::StoreError| Refusal::new(Code::Internal, "records written", e.to_string());
        files.append(audited).map_err(unwritten)?;
        files_us += cpu_us()? - files_began;
        state_us += applied - began;
        outcome?;
    }
    let count = ISSUANCES as f64;
    Ok(Row { state_us: state_us / count, files_us: files_us / count, bytes: bytes / ISSUANCES })
}

struct Cell {
    state: State,
    index: u64,
}

impl Cell {
    fn entry(&mut self, command: Command, request: u64) -> LogEntry {
        self.index += 1;
        let name = format!("spiffe://west/ambit/node/{NODE}");
        let mut id = [0; 16];
        id[..8].copy_from_slice(&request.to_be_bytes());
        LogEntry { stamp: Stamp(1_000_000), client: Sha256::digest(name).into(), request: id, command }
    }
    fn run(&mut self, command: Command) -> Result<(), Refusal> {
        let entry = self.entry(command, 0);
        self.state.apply(RaftIndex(self.index), &entry).outcome.map(drop)
    }
    fn begin(&mut self, log: bool) -> Result<(), Refusal> {
        let member = Member {
            address: "127.0.0.1:1".into(),
            authority: "a1".into(),
            authority_not_after: Stamp(1_000_000_000),
            wrap_key: Vec::new(),
            record_key: [1; 32],
        };
        let cluster: ClusterId = "west".parse()?;
        self.run(Command::FoundCell(
            CellRow::founded("west".parse()?, b"west".to_vec()),
            1,
            member,
            KeySetRow::default(),
        ))?;
        if log {
            self.run(Command::BeginAudit)?;
        }
        self.run(Command::RegisterCluster(cluster.clone(), vec![(b"root".to_vec(), "lab".into())], 10_000))?;
        self.run(Command::AllowEk(cluster.clone(), vec![NODE]))?;
        let now = self.state.cell().map(|cell| (cell.endorsement_revision, cell.policy_revision)).unwrap_or_default();
        self.run(Command::AdmitNode(Admission {
            node: NODE,
            cluster: cluster.clone(),
            nonce: [1; 32],
            deadline: Stamp(1_060_000),
            join_token: None,
            endorsement_revision: now.0,
            policy_revision: now.1,
            ak: AkFacts { name: vec![1], ..AkFacts::default() },
            ek: EkFacts {
                class: "lab".into(),
                root_sha256: Some(Sha256::digest(b"root").into()),
                ..EkFacts::default()
            },
            seen: Seen {
                counters: Counters { resets: 1, restarts: 0, clock: 1 },
                firmware_version: 7,
                ima: ImaPoint::default(),
                pcrs: Some(BootPcrs { bank: PcrBank::Sha256, values: Default::default() }),
                boot_pcrs_sha256: [1; 32],
                boot_log_sha256: [2; 32],
                policy: PolicyRef { name: "servers".parse()?, version: 1 },
                trust: Default::default(),
                evidence_sha256: [3; 32],
                evidence_depth: 0,
            },
            key_hash: [1; 32],
            authority: "a1".into(),
            claims: "{}".into(),
        }))?;
        let entry = |i: usize| {
            Ok(Entry {
                id: format!("e{i}").parse()?,
                spiffe_id: format!("spiffe://west/ns/production/sa/service-{i}").parse()?,
                cluster: cluster.clone(),
                nodes: Default::default(),
                selectors: [Selector::UnixUid(1000)].into(),
                ttl: SvidTtl::DEFAULT,
                federates_with: Default::default(),
                extras: Default::default(),
            })
        };
        self.run(Command::CreateEntries((0..16).map(entry).collect::<Result<_, Refusal>>()?))
    }
}
