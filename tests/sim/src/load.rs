//! What clients ask for: this product's own commands, as its services would make them from what a replica shows.

use crate::card::Card;
use crate::dice::Dice;
use crate::template::Seat;
use ambit_model::appraisal::PcrBank;
use ambit_model::policy::{Action, Endpoint, Peers, Policy};
use ambit_model::{ClusterId, Entry, Generation, NodeId, ObjectName, Refusal, Selector, Stamp, SvidTtl, TrustDomain};
use ambit_state::command::{Admission, LeafRequest, NodeReport, RoundVerdict, Seen};
use ambit_state::objects::{
    AkFacts, BootPcrs, CellRow, Counters, EkFacts, ImaPoint, Member, NodeState, PeerRow, PolicyRef,
};
use ambit_state::{Command, DocumentsChange, NodeVerb, Nodes, State};
use std::net::Ipv4Addr;

/// Machines that enrol.
pub(crate) const NODES: u8 = 4;
/// Policies that are written again and again.
const POLICIES: u64 = 3;
const AUTHORITY: &str = "a1";
/// As the server's tickets.
const TICKET_MS: u64 = 60_000;
/// Numbers of a cell's machines begin here, times the cell's number.
const MACHINES: u8 = 16;

/// A machine as it knows itself: its counters never go back.
#[derive(Clone, Copy, Debug)]
struct Machine {
    id: NodeId,
    clock: u64,
}

#[derive(Clone, Debug)]
pub(crate) struct Load {
    cell: TrustDomain,
    machines: Vec<Machine>,
    made: u64,
    /// Of the last admission, as one ticket sealed them: an attacker tries them again.
    ticket: ([u8; 32], Stamp),
    /// Whether operators put nodes out. Where the question is whether honest nodes stay in, none does.
    strict: bool,
}

impl Load {
    pub(crate) fn new(seat: &Seat, strict: bool) -> Load {
        let machines = (1..=NODES).map(|n| Machine { id: node(seat.number, n), clock: 0 }).collect();
        Load { cell: seat.name.clone(), machines, made: 0, ticket: ([7; 32], Stamp(0)), strict }
    }

    /// The founding, and what operators set up before anything else.
    pub(crate) fn setup(
        seat: &Seat,
        card: Option<&Card>,
        peers: Vec<(TrustDomain, PeerRow)>,
    ) -> Result<Vec<Command>, Refusal> {
        let cell = &seat.name;
        let row = CellRow::founded(
            cell.clone(),
            card.map_or_else(|| cell.as_str().as_bytes().to_vec(), |card| card.root_der.clone()),
        );
        let member = member(card.and_then(|card| card.keys.first()).map_or([1; 32], |key| key.public()));
        let key_set = card.map(|card| card.key_set.clone()).unwrap_or_default();
        let mut all = vec![
            Command::FoundCell(row, 1, member, key_set),
            Command::RegisterCluster(cluster(cell)?, Vec::new(), 10_000),
            Command::AllowEk(cluster(cell)?, (1..=NODES).map(|n| node(seat.number, n)).collect()),
            Command::CreateEntries(vec![entry(cell, "db")?, entry(cell, "web")?]),
        ];
        for (peer, row) in peers {
            let fingerprint = row.fingerprint;
            all.extend([Command::PutPeer(peer.clone(), row, None), Command::ApprovePeer(peer, fingerprint)]);
        }
        Ok(all)
    }

    /// The next wish, seen from a replica's own state.
    pub(crate) fn command(&mut self, dice: &mut Dice, state: &State) -> Result<Command, Refusal> {
        self.made += 1;
        let at = usize::try_from(dice.below(self.machines.len() as u64)).unwrap_or(0);
        let Some(id) = self.machines.get(at).map(|m| m.id) else { return Ok(Command::Tick) };
        let known = state.node(&id).map(|row| (row.generation, row.state));
        Ok(match dice.below(22) {
            0..=3 => Command::CreateEntries(vec![entry(&self.cell, &format!("e{}", self.made))?]),
            4 => Command::DeleteEntries(vec![format!("e{}", dice.below(self.made + 1)).parse()?]),
            5..=8 => match known {
                Some((_, NodeState::Admitted)) if dice.below(3) != 0 => self.round(at, state),
                _ => self.admission(at, dice, state)?,
            },
            9..=13 => issue(id, known.map_or(Generation(1), |(generation, _)| generation), dice)?,
            20..=21 => reports(&self.cell, id, known.map_or(Generation(1), |(generation, _)| generation), dice)?,
            14..=15 if self.strict => Command::SetNodes(verb(dice, known), Nodes::Ids(vec![id])),
            _ => {
                let name: ObjectName = format!("p{}", dice.below(POLICIES)).parse()?;
                let policy = Policy {
                    name,
                    target: Peers::Id(format!("spiffe://{}/db", self.cell).parse()?),
                    action: Action::Allow,
                    from: vec![Peers::Domain("east".parse()?)],
                    ports: vec![(self.made % 60_000) as u16 + 1],
                    extras: Default::default(),
                };
                let change = DocumentsChange { policies: vec![policy], by: "sim".into(), ..DocumentsChange::default() };
                Command::ChangeDocuments(Box::new(change))
            }
        })
    }

    /// Evidence that a verifier accepted, under the revisions that this replica shows.
    fn admission(&mut self, at: usize, dice: &mut Dice, state: &State) -> Result<Command, Refusal> {
        let (endorsements, policies) =
            state.cell().map(|c| (c.endorsement_revision, c.policy_revision)).unwrap_or_default();
        let Some(machine) = self.machines.get_mut(at) else { return Ok(Command::Tick) };
        machine.clock += 1;
        if dice.below(5) != 0 {
            self.ticket = (dice.bytes(), state.stamp().plus_ms(TICKET_MS));
        }
        Ok(Command::AdmitNode(Admission {
            node: machine.id,
            cluster: cluster(&self.cell)?,
            nonce: self.ticket.0,
            deadline: self.ticket.1,
            join_token: None,
            endorsement_revision: endorsements,
            policy_revision: policies,
            ak: AkFacts { name: machine.id.0.to_vec(), ..AkFacts::default() },
            ek: EkFacts { class: "lab".into(), ..EkFacts::default() },
            seen: seen(machine.clock, true)?,
            key_hash: dice.bytes(),
            authority: AUTHORITY.into(),
            claims: "{}".into(),
        }))
    }

    /// The next step of an operator and a machine who want a leaf, whatever was before.
    pub(crate) fn towards_leaf(&mut self, dice: &mut Dice, state: &State) -> Result<Command, Refusal> {
        let Some(id) = self.machines.first().map(|m| m.id) else { return Ok(Command::Tick) };
        let verb = |verb| Command::SetNodes(verb, Nodes::Ids(vec![id]));
        Ok(match state.node(&id).map(|row| (row.generation, row.state)) {
            Some((_, NodeState::Banned)) => verb(NodeVerb::Unban),
            Some((_, NodeState::Quarantined | NodeState::Untrusted(_))) => verb(NodeVerb::Release),
            Some((_, NodeState::Admitted)) if state.is_late(&id) => self.round(0, state),
            Some((generation, NodeState::Admitted)) => issue(id, generation, dice)?,
            Some((_, NodeState::Evicted | NodeState::Released)) | None => self.admission(0, dice, state)?,
        })
    }

    /// A good verdict of a round.
    pub(crate) fn round(&mut self, at: usize, state: &State) -> Command {
        let Some(machine) = self.machines.get_mut(at) else { return Command::Tick };
        machine.clock += 1;
        let (Some(row), Ok(seen)) = (state.node(&machine.id), seen(machine.clock, false)) else {
            return Command::Tick;
        };
        let policy_revision = state.cell().map(|c| c.policy_revision).unwrap_or_default();
        Command::PutVerdicts(vec![RoundVerdict { node: machine.id, generation: row.generation, policy_revision, seen }])
    }
}

/// Mostly what makes sense of the node as it is seen.
fn verb(dice: &mut Dice, known: Option<(Generation, NodeState)>) -> NodeVerb {
    match known.map(|(_, state)| state) {
        Some(NodeState::Banned) => NodeVerb::Unban,
        Some(NodeState::Quarantined | NodeState::Untrusted(_)) => NodeVerb::Release,
        _ => match dice.below(4) {
            0 => NodeVerb::Quarantine,
            1 => NodeVerb::Evict,
            _ => NodeVerb::Ban,
        },
    }
}

/// A replica's row.
pub(crate) fn member(record_key: [u8; 32]) -> Member {
    Member {
        address: "127.0.0.1:1".into(),
        authority: AUTHORITY.into(),
        // No run outlasts it, with whatever clock.
        authority_not_after: Stamp(u64::MAX / 2),
        wrap_key: Vec::new(),
        record_key,
    }
}

/// What a node says on its stream: its address, and a workload, which another node may have told of before.
fn reports(cell: &TrustDomain, node: NodeId, generation: Generation, dice: &mut Dice) -> Result<Command, Refusal> {
    let node_address = Ipv4Addr::new(10, 0, node.0[0], node.0[1]);
    let endpoint = Endpoint {
        spiffe_id: format!("spiffe://{cell}/web").parse()?,
        address: Ipv4Addr::new(10, 1, 0, dice.below(NODES.into()) as u8).into(),
        cluster: cluster(cell)?,
        node_address,
        node,
        generation,
    };
    let address = NodeReport::Address(node, generation, node_address);
    Ok(Command::NodeReports(vec![address, NodeReport::Endpoints(node, vec![endpoint])]))
}

fn issue(node: NodeId, generation: Generation, dice: &mut Dice) -> Result<Command, Refusal> {
    let leaves = vec![LeafRequest { entry: "db".parse()?, key_hash: dice.bytes() }];
    Ok(Command::Issue { node, generation, authority: AUTHORITY.into(), leaves })
}

/// A cell of one cluster, of the same name.
fn cluster(cell: &TrustDomain) -> Result<ClusterId, Refusal> {
    cell.as_str().parse()
}

fn node(cell: u8, n: u8) -> NodeId {
    NodeId([cell.saturating_mul(MACHINES) + n; 32])
}

fn entry(cell: &TrustDomain, id: &str) -> Result<Entry, Refusal> {
    Ok(Entry {
        id: id.parse()?,
        spiffe_id: format!("spiffe://{cell}/{id}").parse()?,
        cluster: cluster(cell)?,
        nodes: Default::default(),
        selectors: [Selector::UnixUid(1000)].into(),
        ttl: SvidTtl::DEFAULT,
        federates_with: Default::default(),
        extras: Default::default(),
    })
}

fn seen(clock: u64, says_boot: bool) -> Result<Seen, Refusal> {
    Ok(Seen {
        counters: Counters { resets: 1, restarts: 0, clock },
        firmware_version: 7,
        ima: ImaPoint::default(),
        pcrs: says_boot.then(|| BootPcrs { bank: PcrBank::Sha256, values: Default::default() }),
        boot_pcrs_sha256: [1; 32],
        boot_log_sha256: [2; 32],
        policy: PolicyRef { name: "servers".parse()?, version: 1 },
        trust: Default::default(),
        evidence_sha256: [3; 32],
        evidence_depth: 0,
    })
}
