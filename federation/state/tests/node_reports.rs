//! Reports of many nodes in one entry: each is as if it had come alone.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use ambit_model::policy::Endpoint;
use ambit_model::{Code, Generation, Stamp};
use ambit_state::command::NodeReport;
use ambit_state::{Command, ENDPOINTS_PER_NODE_MAX, LogEntry, NODE_REPORTS_MAX, Reply};
use common::{Cell, admission, cluster, code, entry, node};

/// West with three admitted nodes, each of which may run `web`.
fn west() -> Cell {
    let mut west = Cell::founded("west");
    west.run(Command::AllowEk(cluster("west"), (1..=3).map(node).collect())).unwrap();
    west.run(Command::CreateEntries(vec![entry("web", "west")])).unwrap();
    for n in 1..=3 {
        let a = admission(&west, n, n, None);
        west.run(Command::AdmitNode(a)).unwrap();
    }
    west
}

fn endpoint(id: &str, n: u8, last: u8) -> Endpoint {
    Endpoint {
        spiffe_id: format!("spiffe://west/{id}").parse().unwrap(),
        address: [10, 1, 0, last].into(),
        cluster: cluster("west"),
        node_address: [10, 0, 0, n].into(),
        node: node(n),
        generation: Generation(1),
    }
}

fn address(n: u8, generation: u64, last: u8) -> NodeReport {
    NodeReport::Address(node(n), Generation(generation), [10, 0, 0, last].into())
}

/// What came of each: of an endpoint its refusal's code, or none.
fn take(west: &mut Cell, reports: Vec<NodeReport>) -> Vec<Result<Vec<Option<Code>>, Code>> {
    let Ok(Reply::Reports(each)) = west.run(Command::NodeReports(reports)) else { panic!("reports") };
    let codes = |items: Vec<Result<(), _>>| items.into_iter().map(|i| i.err().map(|r: ambit_model::Refusal| r.code));
    each.into_iter().map(|one| one.map(|items| codes(items).collect()).map_err(|r| r.code)).collect()
}

/// Addresses and endpoints, as the cell has them and as it tells peers.
fn known(west: &Cell) -> Vec<String> {
    let addresses = west.state.node_addresses().map(|((_, n), row)| format!("{} at {}", n.0[0], row.address));
    let endpoints =
        west.state.endpoints().map(|(_, row)| format!("{} on {}", row.object.address, row.object.node.0[0]));
    let told = west.state.records_after(0).map(|record| format!("{:?} {}", record.kind, record.key));
    addresses.chain(endpoints).chain(told).collect()
}

#[test]
fn each_report_is_as_if_it_had_come_alone_and_fails_no_other() {
    let reports = || {
        vec![
            address(1, 1, 1),
            address(9, 1, 9),
            address(2, 7, 2),
            NodeReport::Endpoints(node(1), vec![endpoint("web", 1, 1), endpoint("db", 1, 2), endpoint("web", 1, 1)]),
            NodeReport::Endpoints(node(3), vec![endpoint("web", 3, 7); ENDPOINTS_PER_NODE_MAX + 1]),
            // Another's address, which it was given in this very entry.
            NodeReport::Endpoints(node(2), vec![endpoint("web", 2, 1), endpoint("web", 2, 3)]),
            // A copy of the first node's key.
            address(1, 1, 66),
            address(2, 1, 2),
            NodeReport::Endpoints(node(9), vec![]),
            NodeReport::Endpoints(node(2), vec![endpoint("web", 2, 4)]),
        ]
    };
    let mut west = self::west();
    let outcomes = take(&mut west, reports());
    let want = [
        Ok(vec![]),
        Err(Code::NodeUntrusted),
        Err(Code::SvidUntrusted),
        Ok(vec![None, Some(Code::EntryNotOnNode), Some(Code::AlreadyExists)]),
        Err(Code::Busy),
        Ok(vec![Some(Code::AlreadyExists), None]),
        Err(Code::NodeAddressMismatch),
        Ok(vec![]),
        Err(Code::NodeUntrusted),
        Ok(vec![None]),
    ];
    assert_eq!(outcomes, want);
    let mut alone = self::west();
    let one_by_one: Vec<_> = reports().into_iter().flat_map(|report| take(&mut alone, vec![report])).collect();
    assert_eq!((one_by_one, known(&alone)), (outcomes, known(&west)));
    // And as the commands of before did it.
    let mut former = self::west();
    for report in reports() {
        let _ = former.run(match report {
            NodeReport::Address(node, generation, address) => Command::RegisterAddress(node, generation, address),
            NodeReport::Endpoints(node, endpoints) => Command::ReportEndpoints(node, endpoints),
        });
    }
    assert_eq!((known(&former), former.state.cell()), (known(&alone), alone.state.cell()));
}

#[test]
fn an_entry_of_more_than_any_replica_makes_is_refused_whole() {
    let mut west = west();
    let before = known(&west);
    let all = (0..=NODE_REPORTS_MAX).map(|_| address(1, 1, 1)).collect();
    assert_eq!(code(west.run(Command::NodeReports(all))), Code::BadRequest);
    assert_eq!(known(&west), before);
}

/// Logs of former builds hold commands by their numbers.
#[test]
fn commands_keep_their_numbers() {
    let number = |command| {
        let entry = LogEntry { stamp: Stamp(0), client: [0; 32], request: [0; 16], command };
        entry.encode().unwrap()[1 + 1 + 32 + 16]
    };
    assert_eq!(number(Command::Tick), 1);
    assert_eq!(number(Command::RegisterAddress(node(1), Generation(1), [10, 0, 0, 1].into())), 66);
    assert_eq!(number(Command::RemoveEntries(vec![])), 81);
    assert_eq!(number(Command::NodeReports(vec![])), 82);
}
