//! Roots and intermediates: the steps of a rotation as rows of entries and outcomes, and what follows at a peer.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use ambit_model::bundle::{BundleRecord, RootEntry, RootState};
use ambit_model::record::{Head, Kind, Record};
use ambit_model::{Code, Generation, Refusal, Stamp};
use ambit_state::authorities::AuthorityState;
use ambit_state::command::LeafRequest;
use ambit_state::objects::{KeySetRow, Member};
use ambit_state::{Command, Reply};
use common::*;
use std::collections::BTreeMap;

const DAY_MS: u64 = 86_400_000;

fn keys(n: u8) -> KeySetRow {
    KeySetRow { statement: vec![n], signature: vec![n] }
}
fn wrapped() -> BTreeMap<u64, Vec<u8>> {
    [(1, vec![1])].into()
}
fn renew(key: u8) -> Command {
    Command::RenewAuthority { replica: 1, key_hash: [key; 32], lifetime_ms: DAY_MS }
}
fn name(key: u8) -> String {
    format!("{key:02x}").repeat(20)
}
/// Roots by state, each by its first byte.
fn roots(cell: &Cell) -> Vec<(u8, &'static str)> {
    let bundle = cell.state.bundle_record().unwrap();
    bundle.roots.iter().map(|r| (r.der[0], r.state.as_str())).collect()
}
fn sequence(cell: &Cell) -> u64 {
    cell.state.cell().unwrap().bundle_sequence & 0xff
}
/// The cell's first root, as `common` founds it.
fn first() -> [u8; 32] {
    sha256(b"west")
}

#[test]
fn a_root_goes_down_its_steps_one_at_a_time_and_never_back() {
    let mut cell = Cell::founded("west");
    let (next, other) = (b"next root".to_vec(), b"other root".to_vec());
    let (n, o) = (sha256(&next), sha256(&other));
    let prepare = |der: &[u8]| Command::PrepareRoot(der.to_vec(), wrapped());
    assert_eq!((roots(&cell), sequence(&cell)), (vec![(b'w', "active")], 1));
    for (what, command, refused) in [
        ("not wrapped to each", Command::PrepareRoot(next.clone(), BTreeMap::new()), Some(Code::BadRequest)),
        ("the active one", prepare(b"west"), Some(Code::RootState)),
        ("unknown", Command::ActivateRoot(n, keys(2)), Some(Code::NotFound)),
        ("prepared", prepare(&next), None),
        ("the same again", prepare(&next), None),
        ("a second one", prepare(&other), Some(Code::RootState)),
        ("not certified", Command::ActivateRoot(n, keys(2)), Some(Code::RootState)),
        ("taint before it is old", Command::TaintRoot(first()), Some(Code::RootState)),
        ("revoke the active one", Command::RevokeRoot(first()), Some(Code::RootState)),
        ("certified", Command::CrossSignRoot(n, vec![9]), None),
        ("activated", Command::ActivateRoot(n, keys(2)), None),
        ("certified late", Command::CrossSignRoot(n, vec![8]), Some(Code::RootState)),
        ("again", Command::ActivateRoot(n, keys(2)), Some(Code::RootState)),
        ("a third meanwhile", prepare(&other), Some(Code::RootState)),
        ("a replica is under it", Command::TaintRoot(first()), Some(Code::AuthorityInUse)),
        ("revoke what is old", Command::RevokeRoot(first()), Some(Code::RootState)),
        ("renewed", renew(5), None),
        ("tainted", Command::TaintRoot(first()), None),
        ("taint the active one", Command::TaintRoot(n), Some(Code::RootState)),
        ("revoked", Command::RevokeRoot(first()), None),
        ("again", Command::RevokeRoot(first()), Some(Code::RootState)),
        ("never back", prepare(b"west"), Some(Code::RootState)),
        ("the next rotation", prepare(&other), None),
        ("given up", Command::RevokeRoot(o), None),
        ("never back", prepare(&other), Some(Code::RootState)),
    ] {
        let outcome = cell.run(command);
        assert_eq!(outcome.as_ref().err().map(|r| r.code), refused, "{what}: {outcome:?}");
    }
    assert_eq!(roots(&cell), [(b'n', "active")]);
    // A connection knows its intermediate and no root.
    let web = "spiffe://west/web".parse().unwrap();
    assert_eq!(cell.state.authority("a1").unwrap().state, AuthorityState::Revoked);
    assert!(cell.state.svid_denied(&web, "a1", &[1]) && !cell.state.svid_denied(&web, &name(5), &[1]));
    // Prepared, activated, tainted, revoked, prepared, revoked.
    assert_eq!(sequence(&cell), 7);
    assert_eq!(cell.state.cell().unwrap().root_der, next);
    let told: Vec<u64> = cell
        .state
        .records_after(0)
        .filter(|r| r.kind == Kind::Bundle)
        .map(|r| postcard::from_bytes::<BundleRecord>(&r.payload).unwrap().sequence & 0xff)
        .collect();
    assert_eq!(told, [2, 3, 4, 5, 6, 7], "peers hear of each change, once");
}

#[test]
fn who_has_not_heard_of_the_new_root_gets_the_key_set_that_the_former_certified() {
    let mut cell = Cell::founded("west");
    let next = b"next root".to_vec();
    let n = sha256(&next);
    cell.run(Command::PrepareRoot(next, wrapped())).unwrap();
    cell.run(Command::CrossSignRoot(n, vec![9])).unwrap();
    let by = |cell: &Cell, held: &[[u8; 32]]| cell.state.key_set_for(held).unwrap().statement.clone();
    assert_eq!(by(&cell, &[first()]), Vec::<u8>::new());
    cell.run(Command::ActivateRoot(n, keys(2))).unwrap();
    for (held, statement) in
        [(vec![first()], vec![]), (vec![first(), n], vec![2]), (vec![n], vec![2]), (vec![], vec![2])]
    {
        assert_eq!(by(&cell, &held), statement, "{held:?}");
    }
    cell.run(renew(5)).unwrap();
    cell.run(Command::TaintRoot(first())).unwrap();
    assert_eq!(by(&cell, &[first()]), Vec::<u8>::new(), "relied on still");
    cell.run(Command::RevokeRoot(first())).unwrap();
    assert_eq!(by(&cell, &[first()]), [2]);
}

fn issue(authority: String) -> Command {
    let leaf = LeafRequest { entry: "web".parse().unwrap(), key_hash: [4; 32] };
    Command::Issue { node: node(1), generation: Generation(1), authority, leaves: vec![leaf] }
}

/// A cell with an admitted node and an entry for it.
fn serving() -> Cell {
    let mut cell = Cell::founded("west");
    cell.run(Command::CreateEntries(vec![entry("web", "west")])).unwrap();
    cell.run(Command::AllowEk(cluster("west"), vec![node(1)])).unwrap();
    let admission = admission(&cell, 1, 1, None);
    cell.run(Command::AdmitNode(admission)).unwrap();
    cell
}

#[test]
fn a_renewed_replica_signs_under_both_intermediates_until_the_former_ends() {
    let mut cell = serving();
    let Reply::Authority(authority) = cell.run(renew(5)).unwrap() else { panic!("no authority") };
    assert_eq!((authority.root, authority.key_hash, authority.epoch), (first(), [5; 32], 1));
    assert_eq!(authority.lifetime.not_after, Stamp(1_000_000 + DAY_MS));
    assert_eq!(cell.state.member(1).unwrap().authority, name(5));
    for (what, outcome, refused) in [
        ("the same key", cell.run(renew(5)).map(drop), Some(Code::AlreadyExists)),
        (
            "a month",
            cell.run(Command::RenewAuthority { replica: 1, key_hash: [6; 32], lifetime_ms: 30 * DAY_MS }).map(drop),
            Some(Code::BadRequest),
        ),
        (
            "a stranger",
            cell.run(Command::RenewAuthority { replica: 2, key_hash: [6; 32], lifetime_ms: DAY_MS }).map(drop),
            Some(Code::NotFound),
        ),
        ("by the former", cell.run(issue("a1".into())).map(drop), None),
        ("by the new", cell.run(issue(name(5))).map(drop), None),
        ("by none", cell.run(issue(name(6))).map(drop), Some(Code::AuthorityMismatch)),
    ] {
        assert_eq!(outcome.err().map(|r| r.code), refused, "{what}");
    }
    // The former ended, by its own row and not by the replica's present one.
    let late = 1_000_000_000;
    assert_eq!(
        code(cell.at(late, 0, Command::RenewAuthority { replica: 1, key_hash: [5; 32], lifetime_ms: DAY_MS })),
        Code::AlreadyExists
    );
    for n in 10..26 {
        cell.at(late, 0, renew(n)).unwrap();
    }
    assert_eq!(code(cell.at(late, 0, renew(26))), Code::Busy, "intermediates of one replica are bounded");
    cell.at(late + 10 * DAY_MS, 0, Command::Tick).unwrap();
    let left: Vec<String> = cell.state.authorities().into_keys().collect();
    assert_eq!(left, [name(25)], "the present one stays, whatever its end; the others are forgotten");
}

#[test]
fn leaves_of_a_short_intermediate_end_a_tenth_before_it_and_of_a_day_five_minutes() {
    for (life, margin) in [(DAY_MS, 300_000), (20_000, 5_000)] {
        let mut cell = serving();
        cell.run(Command::RenewAuthority { replica: 1, key_hash: [5; 32], lifetime_ms: life }).unwrap();
        let Reply::Leaves(leaves) = cell.run(issue(name(5))).unwrap() else { panic!("no leaves") };
        let end = leaves[0].as_ref().unwrap().lifetime.not_after;
        // With the half minute by which it begins early: a tenth of fifty seconds.
        assert_eq!(end, Stamp((1_000_000 + life - margin).min(1_000_000 + 3_600_000)), "{life}");
    }
}

#[test]
fn what_is_tainted_signs_no_more_and_is_told_to_nodes_and_what_is_revoked_is_refused_everywhere() {
    let mut cell = serving();
    let tainted = |cell: &Cell| cell.state.slice(&node(1)).unwrap().tainted.into_iter().collect::<Vec<_>>();
    assert_eq!(code(cell.run(Command::RevokeAuthority("a1".into()))), Code::RootState);
    cell.run(Command::TaintAuthority("a1".into())).unwrap();
    assert_eq!(tainted(&cell), ["a1"]);
    assert_eq!(code(cell.run(issue("a1".into()))), Code::AuthorityMismatch);
    assert_eq!(code(cell.run(Command::RevokeAuthority("a1".into()))), Code::AuthorityInUse);
    cell.run(renew(5)).unwrap();
    cell.run(issue(name(5))).unwrap();
    cell.run(Command::RevokeAuthority("a1".into())).unwrap();
    assert_eq!(cell.state.authority("a1").unwrap().state, AuthorityState::Revoked);
    let denied: Vec<_> = cell.state.slice(&node(1)).unwrap().authority_denials.into_iter().collect();
    assert_eq!(denied, [("west".parse().unwrap(), "a1".to_owned())]);
    let told: Vec<&Record> = cell.state.records_after(0).filter(|r| r.kind == Kind::AuthorityDenial).collect();
    assert_eq!((told.len(), told[0].key.as_str()), (1, "a1"));
    // Kept until it ended and no clock takes it for valid any more.
    cell.at(1_000_000_000 + 299_000, 0, Command::Tick).unwrap();
    assert_eq!(cell.state.authority_denials().count(), 1);
    cell.at(1_000_000_000 + 301_000, 0, Command::Tick).unwrap();
    assert_eq!(cell.state.authority_denials().count(), 0);
}

#[test]
fn a_replica_that_joins_meanwhile_is_under_the_root_that_was_active_when_it_was_admitted() {
    use ambit_state::objects::{TokenRow, TokenScope};
    let mut cell = Cell::founded("west");
    let next = b"next root".to_vec();
    let n = sha256(&next);
    let admit = |cell: &mut Cell, replica: u64| {
        let token = [replica as u8; 32];
        let scope = TokenScope::Replica(replica, "127.0.0.1:2".into());
        cell.run(Command::CreateToken(token, TokenRow { scope, expires: Stamp(2_000_000), used: false })).unwrap();
        let (issuer_key_hash, tls_key_hash) = ([replica as u8; 32], [9; 32]);
        cell.run(Command::AdmitReplica { token, replica, issuer_key_hash, tls_key_hash }).unwrap();
    };
    let put = |cell: &mut Cell, replica: u64| {
        let member = Member {
            address: "127.0.0.1:2".into(),
            authority: name(replica as u8),
            authority_not_after: Stamp(1_000_000 + DAY_MS),
            wrap_key: vec![],
            record_key: [2; 32],
        };
        cell.run(Command::PutMember(replica, member, keys(3))).unwrap();
    };
    admit(&mut cell, 2);
    cell.run(Command::PrepareRoot(next, [(1, vec![1])].into())).unwrap();
    cell.run(Command::CrossSignRoot(n, vec![9])).unwrap();
    cell.run(Command::ActivateRoot(n, keys(2))).unwrap();
    put(&mut cell, 2);
    admit(&mut cell, 3);
    put(&mut cell, 3);
    let root = |cell: &Cell, n: u8| cell.state.authority(&name(n)).unwrap().root;
    assert_eq!((root(&cell, 2), root(&cell, 3)), (first(), n));
    cell.run(renew(5)).unwrap();
    assert_eq!(code(cell.run(Command::TaintRoot(first()))), Code::AuthorityInUse, "replica 2");
    // A replica that is lost is under it no more; it opens no root any more either.
    cell.run(Command::WrapRoot(n, [(2, vec![2]), (3, vec![3])].into())).unwrap();
    cell.run(Command::RemoveMember(2)).unwrap();
    assert_eq!(cell.state.roots()[&n].wrapped.keys().copied().collect::<Vec<_>>(), [1, 3]);
    assert_eq!(code(cell.run(Command::WrapRoot(n, [(2, vec![2])].into()))), Code::NotFound);
    cell.run(Command::TaintRoot(first())).unwrap();
}

/// A replica of this number, admitted and recorded.
fn join(cell: &mut Cell, replica: u64, key: u8) {
    admit(cell, replica, key);
    record(cell, replica, key).unwrap();
}

fn admit(cell: &mut Cell, replica: u64, key: u8) {
    use ambit_state::objects::{TokenRow, TokenScope};
    let token = [key; 32];
    let scope = TokenScope::Replica(replica, "127.0.0.1:2".into());
    cell.run(Command::CreateToken(token, TokenRow { scope, expires: Stamp(2_000_000), used: false })).unwrap();
    let (issuer_key_hash, tls_key_hash) = ([key; 32], [9; 32]);
    cell.run(Command::AdmitReplica { token, replica, issuer_key_hash, tls_key_hash }).unwrap();
}

fn record(cell: &mut Cell, replica: u64, key: u8) -> Result<Reply, Refusal> {
    let authority_not_after = Stamp(1_000_000 + DAY_MS);
    let member = Member {
        address: "127.0.0.1:2".into(),
        authority: name(key),
        authority_not_after,
        wrap_key: vec![],
        record_key: [2; 32],
    };
    cell.run(Command::PutMember(replica, member, keys(3)))
}

#[test]
fn a_removal_that_is_refused_changes_nothing() {
    let mut cell = Cell::founded("west");
    join(&mut cell, 2, 20);
    cell.run(Command::RemoveMember(2)).unwrap();
    // Sent once more, when the number is promised to the next already.
    admit(&mut cell, 2, 22);
    assert_eq!(code(cell.run(Command::RemoveMember(2))), Code::NotFound);
    record(&mut cell, 2, 22).unwrap();
    assert!(cell.state.speaks_for(&name(22), 2));
}

#[test]
fn a_replica_that_goes_leaves_nothing_that_speaks_for_whoever_has_its_number_next() {
    let mut cell = Cell::founded("west");
    join(&mut cell, 2, 20);
    cell.run(Command::RenewAuthority { replica: 2, key_hash: [21; 32], lifetime_ms: DAY_MS }).unwrap();
    let speaks = |cell: &Cell, key: u8| cell.state.speaks_for(&name(key), 2);
    assert!(speaks(&cell, 20) && speaks(&cell, 21) && !cell.state.speaks_for(&name(21), 1));
    cell.run(Command::RemoveMember(2)).unwrap();
    for key in [20, 21] {
        assert_eq!(cell.state.authority(&name(key)).unwrap().state, AuthorityState::Tainted, "in the same entry");
    }
    join(&mut cell, 2, 22);
    assert!(!speaks(&cell, 20) && !speaks(&cell, 21) && speaks(&cell, 22));
    // Its own former ones speak for it while they are in time, tainted or not: it may be about to renew.
    cell.run(Command::TaintAuthority(name(22))).unwrap();
    assert!(speaks(&cell, 22));
    cell.run(Command::RenewAuthority { replica: 2, key_hash: [23; 32], lifetime_ms: DAY_MS }).unwrap();
    assert!(speaks(&cell, 22) && speaks(&cell, 23) && cell.state.speaks_for("a1", 1));
    cell.run(Command::RevokeAuthority(name(22))).unwrap();
    assert!(!speaks(&cell, 22));
}

#[test]
fn a_key_set_is_not_put_over_one_that_it_was_not_made_from() {
    let mut cell = Cell::founded("west");
    let next = b"next root".to_vec();
    let n = sha256(&next);
    cell.run(Command::PrepareRoot(next, wrapped())).unwrap();
    cell.run(Command::CrossSignRoot(n, vec![9])).unwrap();
    let made_from = cell.state.key_set().unwrap().sha256();
    let over = |command| Command::OverKeySet(made_from, Box::new(command));
    let member = cell.state.member(1).unwrap().clone();
    // A replica was recorded meanwhile, whose key the next root certified not.
    cell.run(over(Command::PutMember(1, member.clone(), keys(7)))).unwrap();
    assert_eq!(code(cell.run(over(Command::ActivateRoot(n, keys(2))))), Code::StaleRevision);
    assert_eq!(code(cell.run(over(Command::PutMember(1, member, keys(8))))), Code::StaleRevision);
    assert_eq!((cell.state.key_set().unwrap().clone(), roots(&cell)[0].0), (keys(7), b'w'));
    let made_from = cell.state.key_set().unwrap().sha256();
    cell.run(Command::OverKeySet(made_from, Box::new(Command::ActivateRoot(n, keys(2))))).unwrap();
}

#[test]
fn a_root_that_no_certificate_can_be_is_not_taken_from_a_peer() {
    let mut peer = Peer::active();
    for (sequence, der) in [(2, vec![]), (3, vec![2; 8 * 1024 + 1])] {
        let roots = [vec![1], der].map(|der| RootEntry { state: state_of(&der), der }).into();
        peer.says(Kind::Bundle, "east", postcard::to_stdvec(&BundleRecord { sequence, roots }).unwrap());
        assert_eq!(peer.holds(), [1]);
    }
}

fn state_of(der: &[u8]) -> RootState {
    if *der == [1] { RootState::Active } else { RootState::Prepared }
}

/// A peer's records of its bundle, and what the importer makes of them.
struct Peer {
    cell: Cell,
    seq: u64,
    hash: [u8; 32],
}

impl Peer {
    fn active() -> Peer {
        let mut cell = Cell::founded("west");
        cell.run(Command::PutPeer("east".parse().unwrap(), pending(), None)).unwrap();
        cell.run(Command::ApprovePeer("east".parse().unwrap(), [7; 32])).unwrap();
        Peer { cell, seq: 0, hash: [0; 32] }
    }
    fn says(&mut self, kind: Kind, key: &str, payload: Vec<u8>) {
        let origin: ambit_model::TrustDomain = "east".parse().unwrap();
        self.seq += 1;
        let (seq, prev_hash) = (self.seq, self.hash);
        let record = Record { origin: origin.clone(), epoch: 1, seq, prev_hash, kind, key: key.into(), payload };
        self.hash = record.hash();
        let head = Head { origin, epoch: 1, seq, hash: self.hash, stamp: Stamp(1), nonce: [0; 16] };
        self.cell.run(Command::Import(head, vec![record])).unwrap();
    }
    fn bundle(&mut self, sequence: u64, roots: &[(u8, RootState)]) {
        let roots = roots.iter().map(|(n, state)| RootEntry { der: vec![*n], state: *state }).collect();
        self.says(Kind::Bundle, "east", postcard::to_stdvec(&BundleRecord { sequence, roots }).unwrap());
    }
    fn holds(&self) -> Vec<u8> {
        self.cell.state.peer_roots(&"east".parse().unwrap()).iter().map(|der| der[0]).collect()
    }
}

#[test]
fn a_peers_bundle_only_goes_forward_and_what_left_it_never_comes_back() {
    use RootState::{Active, Old, Prepared, Revoked, Tainted};
    let mut peer = Peer::active();
    for (what, sequence, roots, holds) in [
        ("prepared", 2, vec![(1, Active), (2, Prepared)], vec![1, 2]),
        ("a former sequence", 2, vec![(1, Active), (3, Prepared)], vec![1, 2]),
        ("activated", 3, vec![(2, Active), (1, Old)], vec![2, 1]),
        ("shrunk to nothing", 4, vec![], vec![2, 1]),
        ("none active", 5, vec![(2, Old)], vec![2, 1]),
        ("two active", 6, vec![(2, Active), (1, Active)], vec![2, 1]),
        ("a revoked one in it", 7, vec![(2, Active), (1, Revoked)], vec![2, 1]),
        ("tainted", 8, vec![(2, Active), (1, Tainted)], vec![2, 1]),
        ("revoked", 9, vec![(2, Active)], vec![2]),
        ("back", 10, vec![(2, Active), (1, Old)], vec![2]),
        ("back in force", 11, vec![(1, Active)], vec![2]),
        ("the next", 12, vec![(2, Active), (3, Prepared)], vec![2, 3]),
    ] {
        peer.bundle(sequence, &roots);
        assert_eq!(peer.holds(), holds, "{what}");
    }
    let row = peer.cell.state.peer(&"east".parse().unwrap()).unwrap();
    assert_eq!((row.fingerprint, row.bundle_sequence), (sha256(&[2]), 12));
    // As release 0.1 told of a restored cell: a sequence and no roots.
    peer.says(Kind::Bundle, "east", postcard::to_stdvec(&(2u64 << 40 | 1)).unwrap());
    assert_eq!(peer.holds(), [2, 3]);
}

#[test]
fn a_peer_denies_its_own_intermediates_by_name_and_nothing_else() {
    let mut peer = Peer::active();
    let until = postcard::to_stdvec(&Stamp(5_000_000)).unwrap();
    peer.says(Kind::AuthorityDenial, &name(7), until.clone());
    peer.says(Kind::AuthorityDenial, "no key identifier", until);
    let denied: Vec<_> = peer.cell.state.denied_authorities().into_iter().collect();
    assert_eq!(denied, [("east".parse().unwrap(), name(7))]);
}

#[test]
fn the_whole_of_it_survives_a_snapshot() {
    let mut cell = serving();
    let next = b"next root".to_vec();
    cell.run(Command::PrepareRoot(next.clone(), wrapped())).unwrap();
    cell.run(Command::CrossSignRoot(sha256(&next), vec![9])).unwrap();
    cell.run(Command::ActivateRoot(sha256(&next), keys(2))).unwrap();
    cell.run(renew(5)).unwrap();
    cell.run(Command::TaintRoot(first())).unwrap();
    let read = ambit_state::State::import(cell.state.export()).unwrap();
    assert_eq!(read.digest(), cell.state.digest());
    assert_eq!(read.tainted_authorities(), ["a1".to_owned()].into());
    assert_eq!(read.bundle_record(), cell.state.bundle_record());
}
