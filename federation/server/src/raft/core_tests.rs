//! Three cores, a lossy network and crashes, all from one seed: no clock, no disk, no thread.

use super::*;
use raft::storage::MemStorage;
use std::collections::BTreeMap;

/// splitmix64, as in the core.
struct Dice(u64);
impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % sides
    }
}

struct Node {
    core: RaftCore<MemStorage>,
    disk: MemStorage,
    incarnation: u64,
    applied: u64,
}

fn config(id: u64, seed: u64) -> Config {
    Config { id, election_ticks: 10, heartbeat_ticks: 2, applied: 0, seed: seed ^ id }
}

fn disk() -> MemStorage {
    MemStorage::new_with_conf_state((vec![1, 2, 3], vec![]))
}

/// One frame on its way.
struct Flying {
    due: u64,
    from: u64,
    incarnation: u64,
    to: u64,
    bytes: Vec<u8>,
}

/// What every run must hold to (I1, I2).
#[derive(Default, PartialEq, Debug)]
struct Golden {
    leader_of: BTreeMap<u64, u64>,
    log: BTreeMap<u64, (u64, Vec<u8>)>,
    acked: Vec<u64>,
    crashes: u64,
}

struct Net {
    seed: u64,
    dice: Dice,
    now: u64,
    nodes: BTreeMap<u64, Node>,
    flying: Vec<Flying>,
    golden: Golden,
    next_value: u64,
}

impl Net {
    fn new(seed: u64) -> Self {
        let nodes = (1..=3).map(|id| {
            let disk = disk();
            let core = RaftCore::new(&config(id, seed), disk.clone()).unwrap();
            (id, Node { core, disk, incarnation: 1, applied: 0 })
        });
        let nodes = nodes.collect();
        let golden = Golden::default();
        Self { seed, dice: Dice(seed), now: 0, nodes, flying: Vec::new(), golden, next_value: 0 }
    }

    fn run(mut self, ticks: u64) -> Golden {
        for _ in 0..ticks {
            self.now += 1;
            let (due, later) = std::mem::take(&mut self.flying).into_iter().partition(|f| f.due <= self.now);
            self.flying = later;
            for Flying { from, incarnation, to, bytes, .. } in due {
                let node = self.nodes.get_mut(&to).unwrap();
                let _ = node.core.step(Input::Frame { from, incarnation, messages: vec![bytes.into()] });
                self.settle(to);
            }
            for id in 1..=3 {
                let node = self.nodes.get_mut(&id).unwrap();
                let _ = node.core.step(Input::Tick);
                if self.dice.roll(4) == 0 {
                    let value = self.next_value.to_be_bytes().to_vec();
                    if self.nodes.get_mut(&id).unwrap().core.step(Input::Propose(vec![value])).is_ok() {
                        self.next_value += 1;
                    }
                }
                self.settle(id);
            }
        }
        self.golden
    }

    fn settle(&mut self, id: u64) {
        loop {
            let node = self.nodes.get_mut(&id).unwrap();
            if node.core.role() == StateRole::Leader {
                let term = node.core.term();
                let known = *self.golden.leader_of.entry(term).or_insert(id);
                assert_eq!(known, id, "two leaders in term {term}, seed {}", self.seed);
            }
            let Some(work) = node.core.ready() else { return };
            let from = (id, node.incarnation);
            self.send(from, work.send);
            if self.dice.roll(200) == 0 {
                // The process dies between sending and writing: nothing of this batch is on its disk.
                self.restart(id);
                return;
            }
            let node = self.nodes.get_mut(&id).unwrap();
            let number = work.batch.number;
            {
                let mut disk = node.disk.wl();
                disk.append(&work.batch.entries).unwrap();
                if let Some(hard) = work.batch.hard_state {
                    disk.set_hardstate(hard);
                }
            }
            let receipt = FlushReceipt::simulated(number);
            let votes = work.after_flush.open(&receipt).unwrap();
            self.send(from, votes);
            self.apply(id, work.apply);
            let released = self.nodes.get_mut(&id).unwrap().core.persisted(&receipt);
            self.send(from, released.send);
            self.apply(id, released.apply);
            let node = self.nodes.get_mut(&id).unwrap();
            node.core.applied(node.applied);
        }
    }

    fn send(&mut self, (from, incarnation): (u64, u64), messages: Vec<Outgoing>) {
        for message in messages {
            if self.dice.roll(20) != 0 {
                let due = self.now + 1 + self.dice.roll(3);
                self.flying.push(Flying { due, from, incarnation, to: message.to, bytes: message.bytes });
            }
        }
    }

    fn apply(&mut self, id: u64, entries: Vec<Ordered>) {
        for entry in entries {
            let node = self.nodes.get_mut(&id).unwrap();
            assert_eq!(entry.index, node.applied + 1, "a gap, seed {}", self.seed);
            node.applied = entry.index;
            let value = match entry.content {
                Content::Command(bytes) => bytes.to_vec(),
                Content::Empty => Vec::new(),
                Content::Change(..) => unreachable!(),
            };
            let expected = self.golden.log.entry(entry.index).or_insert((entry.term, value.clone()));
            assert_eq!(*expected, (entry.term, value), "index {} differs, seed {}", entry.index, self.seed);
            self.golden.acked.push(entry.index);
        }
    }

    fn restart(&mut self, id: u64) {
        let old = self.nodes.remove(&id).unwrap();
        self.golden.crashes += 1;
        let (disk, incarnation) = (old.disk, old.incarnation + 1);
        let core = RaftCore::new(&config(id, self.seed ^ (incarnation << 8)), disk.clone()).unwrap();
        self.nodes.insert(id, Node { core, disk, incarnation, applied: 0 });
    }
}

#[test]
fn one_history_under_loss_reordering_and_crashes() {
    let (mut crashes, mut committed) = (0, 0);
    for seed in 0..40 {
        let golden = Net::new(seed).run(600);
        crashes += golden.crashes;
        committed += golden.log.len();
    }
    assert!(crashes > 40 && committed > 1000, "nothing happened: {crashes} crashes, {committed} committed");
}

#[test]
fn a_seed_repeats_itself_to_the_last_event() {
    assert_eq!(Net::new(7).run(600), Net::new(7).run(600));
    assert_ne!(Net::new(7).run(600), Net::new(8).run(600));
}

#[test]
fn frames_are_taken_from_their_sender_and_its_newest_incarnation_only() {
    let mut core = RaftCore::new(&config(1, 0), disk()).unwrap();
    let message = |kind, from, to| {
        let mut m = Message::default();
        m.set_msg_type(kind);
        (m.from, m.to, m.term) = (from, to, 1);
        Bytes::from(m.write_to_bytes().unwrap())
    };
    let beat = MessageType::MsgHeartbeat;
    for (incarnation, bytes, expected) in [
        (2, message(beat, 2, 1), Ok(())),
        (1, message(beat, 2, 1), Err(Rejected::OldIncarnation)),
        (2, message(beat, 3, 1), Err(Rejected::Malformed)),
        (2, message(beat, 2, 3), Err(Rejected::Malformed)),
        (2, message(MessageType::MsgPropose, 2, 1), Err(Rejected::Malformed)),
        (2, Bytes::from_static(b"garbage"), Err(Rejected::Malformed)),
        (3, message(beat, 2, 1), Ok(())),
        (2, message(beat, 2, 1), Err(Rejected::OldIncarnation)),
    ] {
        let input = Input::Frame { from: 2, incarnation, messages: vec![bytes.clone()] };
        assert_eq!(core.step(input), expected, "incarnation {incarnation}: {bytes:?}");
    }
    assert_eq!(core.step(Input::Propose(vec![vec![1]])), Err(Rejected::NotLeader(Some(2))));
}

#[test]
fn a_dead_leader_is_replaced_at_once_and_one_that_lives_is_not() {
    // Who is told that the leader is gone, and whether somebody else then leads within half an election timeout.
    for (told, replaced) in [(2, true), (1, false), (0, false)] {
        let mut cores: BTreeMap<u64, RaftCore<MemStorage>> =
            (1..=3).map(|id| (id, RaftCore::new(&config(id, 0), disk()).unwrap())).collect();
        cores.get_mut(&1).unwrap().step(Input::Campaign).unwrap();
        deliver(&mut cores);
        assert_eq!(cores[&3].leader(), Some(1));
        let dead = (told > 0).then(|| cores.remove(&1).unwrap());
        for id in [2, 3].into_iter().take(told) {
            cores.get_mut(&id).unwrap().step(Input::Gone(1)).unwrap();
        }
        for _ in 0..5 {
            for core in cores.values_mut() {
                core.step(Input::Tick).unwrap();
            }
            deliver(&mut cores);
        }
        let leads = |id: u64| cores.get(&id).is_some_and(|core| core.role() == StateRole::Leader);
        assert_eq!(leads(2) || leads(3), replaced, "{told} told");
        drop(dead);
    }
}

/// Everything ready is written, applied and delivered until nothing is left.
fn deliver(cores: &mut BTreeMap<u64, RaftCore<MemStorage>>) {
    loop {
        let mut flying = Vec::new();
        for (id, core) in cores.iter_mut() {
            while let Some(work) = core.ready() {
                let mut out = work.send;
                {
                    let mut disk = core.store().wl();
                    disk.append(&work.batch.entries).unwrap();
                    if let Some(hard) = work.batch.hard_state {
                        disk.set_hardstate(hard);
                    }
                }
                let receipt = FlushReceipt::simulated(work.batch.number);
                out.extend(work.after_flush.open(&receipt).unwrap());
                let released = core.persisted(&receipt);
                out.extend(released.send);
                if let Some(last) = work.apply.iter().chain(&released.apply).last() {
                    core.applied(last.index);
                }
                flying.extend(out.into_iter().map(|m| (*id, m)));
            }
        }
        if flying.is_empty() {
            return;
        }
        for (from, message) in flying {
            if let Some(core) = cores.get_mut(&message.to) {
                let _ = core.step(Input::Frame { from, incarnation: 1, messages: vec![message.bytes.into()] });
            }
        }
    }
}

#[test]
fn a_replica_without_a_vote_does_not_campaign() {
    let mut core = RaftCore::new(&config(4, 0), disk()).unwrap();
    assert_eq!(core.step(Input::Campaign), Err(Rejected::NotLeader(None)));
    for _ in 0..50 {
        core.step(Input::Tick).unwrap();
    }
    assert_eq!((core.role(), core.term()), (StateRole::Follower, 0));
}
