use super::*;
use ambit_model::record::Head;
use ambit_model::{RaftIndex, Stamp, TrustDomain};
use ambit_state::objects::{CellRow, KeySetRow, Member};
use ambit_state::{Command, LogEntry};

/// A cell that exported a record for each of its clusters, one entry each.
struct Cell {
    state: State,
    index: u64,
}

impl Cell {
    fn founded() -> Cell {
        let td: TrustDomain = "west".parse().unwrap();
        let member = Member {
            address: String::new(),
            authority: String::new(),
            authority_not_after: Stamp(0),
            wrap_key: Vec::new(),
            record_key: [1; 32],
        };
        let mut cell = Cell { state: State::new(), index: 0 };
        cell.run(Command::FoundCell(CellRow::founded(td, vec![1]), 1, member, KeySetRow::default()));
        cell
    }
    fn run(&mut self, command: Command) {
        self.index += 1;
        let entry = LogEntry { stamp: Stamp(1_000 * self.index), client: [0; 32], request: [0; 16], command };
        self.state.apply(RaftIndex(self.index), &entry).outcome.unwrap();
    }
    fn export(&mut self, more: u64) {
        for _ in 0..more {
            let name = format!("c{}", self.index).parse().unwrap();
            self.run(Command::RegisterCluster(name, Vec::new(), 10_000));
        }
    }
    /// What is true of it after `seq` records.
    fn claim(&self, seq: u64, nonce: u8, is_the_end: bool) -> Claim {
        let cell = self.state.cell().unwrap();
        let hash = match seq {
            0 => [0; 32],
            seq => self.state.records_after(seq - 1).next().unwrap().hash(),
        };
        let (origin, epoch, stamp) = (cell.trust_domain.clone(), cell.epoch, self.state.stamp());
        Claim { head: Head { origin, epoch, seq, hash, stamp, nonce: [nonce; 16] }, is_the_end }
    }
    fn end(&self) -> u64 {
        self.state.cell().unwrap().export_seq
    }
}

/// Whatever is changed in a claim that is true, it is not signed.
#[test]
fn only_what_the_own_state_says_is_signed() {
    let mut cell = Cell::founded();
    cell.export(4);
    let end = cell.end();
    assert!(end >= 4);
    for seq in 0..=end {
        let claim = cell.claim(seq, 1, false);
        let judged = |claim: &Claim| judge(&cell.state, &mut Floors::default(), claim);
        assert_eq!(judged(&claim), Ok(Verdict::Sign), "sequence {seq}");
        let head = || claim.head.clone();
        let flipped = |bit: usize| {
            let mut hash = claim.head.hash;
            hash[bit / 8] ^= 1 << (bit % 8);
            Head { hash, ..head() }
        };
        let mut wrong = vec![
            Head { origin: "east".parse().unwrap(), ..head() },
            Head { epoch: claim.head.epoch + 1, ..head() },
            Head { epoch: claim.head.epoch - 1, ..head() },
            Head { stamp: Stamp(claim.head.stamp.0 + 1), ..head() },
            Head { seq: end + 1, ..head() },
            Head { seq: u64::MAX, ..head() },
        ];
        wrong.extend((0..=end).filter(|other| *other != seq).map(|seq| Head { seq, ..head() }));
        wrong.extend((0..256).map(flipped));
        for head in wrong {
            let other = Claim { head, is_the_end: false };
            assert!(judged(&other).is_err(), "{other:?}");
        }
    }
}

/// For every end that is claimed and every pace at which records come in between: signed where nothing was held back that
/// there was when the pull was first heard of.
#[test]
fn an_end_holds_nothing_back_that_there_was_when_the_pull_came() {
    for (before, between) in (0..4u64).flat_map(|before| (0..4u64).map(move |between| (before, between))) {
        let mut cell = Cell::founded();
        cell.export(before);
        let floor = cell.end();
        let mut floors = Floors::default();
        // Whatever is said first, the pull is heard of.
        let first = judge(&cell.state, &mut floors, &cell.claim(0, 1, true));
        assert_eq!(first, Ok(if floor == 0 { Verdict::Sign } else { Verdict::GoOn(floor) }));
        cell.export(between);
        for seq in 0..=cell.end() {
            let judged = judge(&cell.state, &mut floors, &cell.claim(seq, 1, true));
            let expected = if seq < floor { Verdict::GoOn(floor) } else { Verdict::Sign };
            assert_eq!(judged, Ok(expected), "{seq} of {floor}+{between}");
            // Another pull came later.
            let later = judge(&cell.state, &mut Floors::default(), &cell.claim(seq, 2, true));
            let expected = if seq < cell.end() { Verdict::GoOn(cell.end()) } else { Verdict::Sign };
            assert_eq!(later, Ok(expected));
        }
    }
}

#[test]
fn floors_are_bounded_and_the_oldest_goes() {
    let mut floors = Floors::default();
    let nonce = |n: usize| {
        let mut nonce = [0; 16];
        nonce[..8].copy_from_slice(&(n as u64).to_be_bytes());
        nonce
    };
    for n in 0..FLOORS_MAX + 10 {
        assert_eq!(floors.of(nonce(n), n as u64), n as u64);
    }
    assert_eq!((floors.by_nonce.len(), floors.oldest.len()), (FLOORS_MAX, FLOORS_MAX));
    assert_eq!(floors.of(nonce(FLOORS_MAX), 0), FLOORS_MAX as u64, "remembered");
    assert_eq!(floors.of(nonce(0), 7), 7, "forgotten: as of now");
}
