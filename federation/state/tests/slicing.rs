//! Whatever happens in a cell: a slicer that follows it says of every node what [`State::slice`] says.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use ambit_model::policy::Endpoint;
use ambit_model::record::{Head, Kind, Record};
use ambit_model::{Act, Entry, EntryExtras, Extras, Generation, Selector, Stamp, TrustDomain};
use ambit_policy::{Document, parse};
use ambit_state::command::{DocumentKind, DocumentsChange, IdVerb, NodeReport, NodeVerb, Nodes, Presence};
use ambit_state::routing::{Route, RouteChange, Services};
use ambit_state::slicing::Slicer;
use ambit_state::{Command, State};
use common::{Cell, admission, cluster, entry, node, pending};

/// So that a failed run names its seed.
struct Draw(u64);

impl Draw {
    fn next(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % below
    }
    fn of<'a>(&mut self, words: &[&'a str]) -> &'a str {
        words[self.next(words.len() as u64) as usize]
    }
    fn node(&mut self) -> u8 {
        self.next(NODES) as u8 + 1
    }
}

const NODES: u64 = 4;
const IDS: &[&str] = &["web", "db", "a/x", "a/y", "ops"];
const SETS: &[&str] = &[
    "spiffe://west/web",
    "spiffe://west/db",
    "spiffe://west/a/x",
    "spiffe://west/a/*",
    "spiffe://west/*",
    "cluster:west/prod",
    "group:west/g",
    "labels:west/k=v",
];
const CALLERS: &[&str] = &["spiffe://east/web", "spiffe://east/*", "cluster:east/prod", "group:west/none"];

/// A cell, its time, and the peer whose records it imports.
struct World {
    cell: Cell,
    now: u64,
    nonce: u8,
    seq: u64,
    hash: [u8; 32],
}

impl World {
    fn new() -> World {
        let mut cell = Cell::founded("west");
        cell.run(Command::RegisterCluster(cluster("prod"), vec![(common::ROOT.to_vec(), "lab".into())], 10_000))
            .unwrap();
        cell.run(Command::AllowEk(cluster("west"), (1..=NODES as u8).map(node).collect())).unwrap();
        World { cell, now: 1_000_000, nonce: 0, seq: 0, hash: [0; 32] }
    }

    /// Something; a cell may refuse it.
    fn step(&mut self, draw: &mut Draw) {
        self.now += draw.next(1_500);
        let command = match draw.next(17) {
            0..=2 => Command::PutEntries(vec![(self.entry(draw), Presence::Whatever)]),
            3 => Command::DeleteEntries(vec![format!("e{}", draw.next(8)).parse().unwrap()]),
            4..=7 => Command::ChangeDocuments(Box::new(documents(draw, self.now))),
            8 => {
                self.nonce = self.nonce.wrapping_add(1);
                Command::AdmitNode(admission(&self.cell, draw.node(), self.nonce, None))
            }
            9 => {
                let n = draw.node();
                let rows = (0..draw.next(3)).map(|_| endpoint(draw, "west", n)).collect();
                Command::NodeReports(vec![NodeReport::Endpoints(node(n), rows)])
            }
            10 => {
                let n = draw.node();
                let generation = self.cell.state.node(&node(n)).map_or(Generation(1), |row| row.generation);
                Command::NodeReports(vec![NodeReport::Address(node(n), generation, [10, 0, 0, n].into())])
            }
            11 => {
                let verbs = [NodeVerb::Quarantine, NodeVerb::Release, NodeVerb::Evict, NodeVerb::Ban, NodeVerb::Unban];
                Command::SetNodes(verbs[draw.next(5) as usize], Nodes::Ids(vec![node(draw.node())]))
            }
            12 => {
                let id = format!("spiffe://west/{}", draw.of(IDS)).parse().unwrap();
                Command::DenyId(id, [IdVerb::Revoke, IdVerb::Bar, IdVerb::Lift][draw.next(3) as usize])
            }
            13 => return self.import(draw),
            14 if self.seq == 0 => {
                let _ = self.cell.at(self.now, 0, Command::PutPeer("east".parse().unwrap(), pending(), None));
                Command::ApprovePeer("east".parse().unwrap(), [7; 32])
            }
            15 => match draw.next(12) {
                0 => Command::SuspendPeer("east".parse().unwrap(), "me".into()),
                1 => return self.remove_peer(),
                2..=6 => Command::ApprovePeer("east".parse().unwrap(), [7; 32]),
                _ => Command::Tick,
            },
            16 => Command::Route(Box::new(routed(draw))),
            _ => Command::Tick,
        };
        let _ = self.cell.at(self.now, 0, command);
    }

    /// Refused unless it is suspended; then it begins anew.
    fn remove_peer(&mut self) {
        let act = Act::RemoveTrustDomain("east".parse().unwrap());
        if self.cell.at(self.now, 0, Command::Act { act, approved: None, by: "me".into() }).is_ok() {
            (self.seq, self.hash) = (0, [0; 32]);
        }
    }

    fn entry(&self, draw: &mut Draw) -> Entry {
        let base = entry(&format!("e{}", draw.next(8)), draw.of(&["west", "west", "prod"]));
        let nodes = (0..draw.next(3).saturating_sub(1)).map(|_| node(draw.node())).collect();
        let mut selectors: Vec<Selector> = base.selectors.iter().cloned().collect();
        if draw.next(4) == 0 {
            selectors.push(draw.of(&["tpm:policy:servers", "tpm:policy:others"]).parse().unwrap());
        } else if draw.next(6) == 0 {
            selectors.push(format!("tpm:ek_hash:{}", node(draw.node())).parse().unwrap());
        }
        let extras = EntryExtras {
            expires_at: if draw.next(4) == 0 {
                Stamp(self.now + draw.next(20_000))
            } else {
                EntryExtras::NONE.expires_at
            },
            labels: (draw.next(3) == 0).then(|| ("k".parse().unwrap(), "v".parse().unwrap())).into_iter().collect(),
            ..EntryExtras::NONE
        };
        let spiffe_id = format!("spiffe://west/{}", draw.of(IDS)).parse().unwrap();
        Entry {
            spiffe_id,
            nodes,
            selectors: selectors.into_iter().collect(),
            extras: Extras::new(extras).unwrap(),
            ..base
        }
    }

    fn import(&mut self, draw: &mut Draw) {
        let origin: TrustDomain = "east".parse().unwrap();
        let (kind, key, payload) = match draw.next(3) {
            0 => (Kind::Cluster, draw.of(&["east", "prod-east"]).to_owned(), vec![1]),
            _ => {
                let row = endpoint(draw, "east", 9);
                (Kind::Endpoint, row.address.to_string(), postcard::to_stdvec(&row).unwrap())
            }
        };
        let (seq, prev_hash) = (self.seq + 1, self.hash);
        let record = Record { origin: origin.clone(), epoch: 1, seq, prev_hash, kind, key, payload };
        let head = Head { origin, epoch: 1, seq, hash: record.hash(), stamp: Stamp(1), nonce: [0; 16] };
        let hash = record.hash();
        if self.cell.at(self.now, 0, Command::Import(head, vec![record])).is_ok() {
            (self.seq, self.hash) = (seq, hash);
        }
    }
}

fn endpoint(draw: &mut Draw, td: &str, n: u8) -> Endpoint {
    Endpoint {
        spiffe_id: format!("spiffe://{td}/{}", draw.of(IDS)).parse().unwrap(),
        address: [10, if td == "west" { 1 } else { 2 }, 0, draw.next(6) as u8].into(),
        cluster: cluster(td),
        node_address: [10, 0, 0, n].into(),
        node: node(n),
        generation: Generation(1),
    }
}

fn routed(draw: &mut Draw) -> RouteChange {
    let mut place = || cluster(draw.of(&["west", "prod", "east"]));
    let (one, other) = (place(), place());
    let route = match draw.next(4) {
        0 => Route::Region(one, (draw.next(2) == 0).then(|| "eu-1".parse().unwrap())),
        1 => Route::Drain(one, draw.next(2) == 0),
        2 => Route::FailOver { services: Services::All, from: one, to: other },
        _ => Route::FailBack { services: Services::All, from: one },
    };
    RouteChange { route, by: "me".into(), note: String::new() }
}

fn documents(draw: &mut Draw, now: u64) -> DocumentsChange {
    let name = format!("p{}", draw.next(8));
    if draw.next(5) == 0 {
        let kinds = [DocumentKind::Policy, DocumentKind::Egress, DocumentKind::Service, DocumentKind::Group];
        let kind = kinds[draw.next(4) as usize];
        let name = match kind {
            DocumentKind::Policy | DocumentKind::Egress => name,
            DocumentKind::Service | DocumentKind::Group => "g".to_owned(),
        };
        return DocumentsChange { delete: vec![(kind, name.parse().unwrap())], ..Default::default() };
    }
    let text = match draw.next(11) {
        0 => format!("kind: Group\nmetadata: {{name: g}}\nspec: {{members: ['{}']}}", draw.of(&SETS[..6])),
        1 | 3 => format!(
            "kind: Service\nmetadata: {{name: g}}\nspec: {{address: 10.7.0.1, port: 80, backends: ['{}']}}",
            draw.of(&SETS[..5])
        ),
        2 => format!(
            "kind: Egress\nmetadata: {{name: {name}}}\nspec: {{from: ['{}'], to: [{}], ports: [80], transport: passthrough}}",
            draw.of(SETS),
            draw.of(&["10.0.0.0/8", "10.1.0.0/30, 10.7.0.1/32", "192.0.2.0/24", "0.0.0.0/0"])
        ),
        4 | 5 => {
            let action = draw.of(&["allow", "deny", "audit"]);
            let clear = if action == "allow" { ", transport: passthrough" } else { "" };
            let ranges = draw.of(&["'cidr:10.0.0.0/8'", "'cidr:10.1.0.0/30', 'cidr:10.0.0.2/32'", "'cidr:0.0.0.0/0'"]);
            format!(
                "kind: Policy\nmetadata: {{name: {name}}}\nspec: {{target: '{}', action: {action}, from: [{ranges}]{clear}}}",
                draw.of(SETS)
            )
        }
        _ => {
            let action = draw.of(&["allow", "allow", "allow", "deny", "audit"]);
            let from = if draw.next(4) == 0 && action == "allow" { draw.of(CALLERS) } else { draw.of(SETS) };
            let ports = draw.of(&["", ", ports: [80]", ", ports: [80, 443]"]);
            format!(
                "kind: Policy\nmetadata: {{name: {name}}}\nspec: {{target: '{}', action: {action}, from: ['{from}']{ports}}}",
                draw.of(SETS)
            )
        }
    };
    let mut change = DocumentsChange::default();
    for document in parse(&text).unwrap_or_default() {
        match document {
            Document::Policy(mut policy) => {
                if draw.next(4) == 0 {
                    policy.extras.expires_at = Stamp(now + draw.next(10_000));
                }
                change.policies.push(policy);
            }
            Document::Service(service) => change.services.push(service),
            Document::Group(group) => change.groups.push(group),
            Document::Egress(mut egress) => {
                if draw.next(4) == 0 {
                    egress.expires_at = Stamp(now + draw.next(10_000));
                }
                change.egress.push(egress);
            }
        }
    }
    change
}

/// What was different and what was not empty, so that nothing is proven of nothing.
fn check(slicer: &mut Slicer, state: &State, seed: u64, step: usize, seen: &mut [usize; 10]) {
    slicer.follow(state);
    slicer.settle();
    for n in 1..=NODES as u8 {
        let whole = state.slice(&node(n));
        assert_eq!(slicer.slice(&node(n)), whole, "seed {seed}, step {step}, node {n}");
        if let Some(s) = whole {
            let sizes = [
                s.entries.len(),
                s.policies.len(),
                s.endpoints.len(),
                s.services.len(),
                s.callers.len(),
                s.denials.len() + s.svid_denials.ids.len(),
                s.egress.len(),
                s.meshed.len(),
                s.policies.iter().filter(|(_, p)| !p.extras.unmeshed.is_empty()).count(),
                s.claimed.len(),
            ];
            seen.iter_mut().zip(sizes).for_each(|(seen, size)| *seen += size);
        }
    }
}

#[test]
fn a_slicer_says_of_every_node_what_the_state_says() {
    let mut seen = [0; 10];
    for seed in 0..80 {
        let (mut draw, mut world, mut slicer) = (Draw(seed), World::new(), Slicer::default());
        for step in 0..150 {
            world.step(&mut draw);
            // Now and then several steps are one for who follows.
            if draw.next(4) > 0 {
                check(&mut slicer, &world.cell.state, seed, step, &mut seen);
            }
            if draw.next(60) == 0 {
                // As after a leader's snapshot: another state, of the same rows.
                world.cell.state = State::import(world.cell.state.export()).unwrap();
                check(&mut slicer, &world.cell.state, seed, step, &mut seen);
            }
        }
    }
    assert!(seen.iter().all(|count| *count > 200), "{seen:?}");
}

#[test]
fn what_did_not_move_is_shared_with_the_revision_before() {
    let mut world = World::new();
    let mut slicer = Slicer::default();
    for n in 1..=2 {
        let admit = admission(&world.cell, n, n, None);
        world.cell.run(Command::AdmitNode(admit)).unwrap();
    }
    let on = |n: u8, id: &str| Entry { nodes: [node(n)].into(), ..entry(id, "west") };
    world.cell.run(Command::CreateEntries(vec![on(1, "web"), on(2, "db"), entry("ops", "west")])).unwrap();
    let mut class = |world: &World, n: u8| {
        slicer.follow(&world.cell.state);
        slicer.settle();
        let both = [1, 2].map(|n| slicer.portion(&node(n)).unwrap().class);
        both[usize::from(n) - 1].clone()
    };
    let allow = |target: &str| {
        let text = format!(
            "kind: Policy\nmetadata: {{name: p}}\nspec: {{target: 'spiffe://west/{target}', action: allow, from: ['spiffe://west/x']}}"
        );
        let Some(Document::Policy(policy)) = parse(&text).unwrap().pop() else { panic!("a policy") };
        Command::ChangeDocuments(Box::new(DocumentsChange { policies: vec![policy], ..Default::default() }))
    };
    let before = class(&world, 1);
    world.cell.run(allow("db")).unwrap();
    assert!(std::sync::Arc::ptr_eq(&before, &class(&world, 1)), "a policy about the other node");
    world.cell.run(allow("web")).unwrap();
    let after = class(&world, 1);
    assert!(!std::sync::Arc::ptr_eq(&before.policies, &after.policies));
    assert!(std::sync::Arc::ptr_eq(&before.entries, &after.entries));
}
