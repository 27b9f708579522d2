//! JWT authorities through their life, and tokens as they are committed.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use ambit_model::record::Head;
use ambit_model::{Audience, Code, Generation, JwtTtl, Refusal, Stamp, TrustDomain};
use ambit_state::command::{NodeVerb, Nodes};
use ambit_state::objects::*;
use ambit_state::{
    Command, ISSUER_MARGIN_MS, JWT_PUBLISHED_MIN_MS, JWT_PUBLISHED_MS, JWT_SIGNS_MS, JwtDue, JwtIssuance, Reply, State,
    UNATTESTED_MAX_MS,
};
use common::{Cell, admission, cluster, code, entry, node, pending};
use std::collections::BTreeMap;

/// When the cells of these tests begin.
const T: u64 = 1_000_000;

/// A public key of a size that keys have; the state does not read it.
fn spki(n: u8) -> Vec<u8> {
    vec![n; 91]
}
fn kid(n: u8) -> String {
    ambit_model::jwt::kid_of(&spki(n))
}
fn to(ids: &[u64]) -> BTreeMap<u64, Vec<u8>> {
    ids.iter().map(|id| (*id, vec![*id as u8])).collect()
}
fn put(n: u8, ids: &[u64]) -> Command {
    Command::PutJwtAuthority(spki(n), to(ids))
}
/// Names of the authorities, each with its state.
fn life(cell: &Cell) -> Vec<(String, &'static str)> {
    cell.state.jwt_authorities().map(|row| (row.kid.clone(), row.state.as_str())).collect()
}
fn sequence(cell: &Cell) -> u64 {
    cell.state.cell().unwrap().bundle_sequence
}
fn join(cell: &mut Cell, stamp: u64, id: u64) {
    let token = TokenRow { scope: TokenScope::Replica(id, String::new()), expires: Stamp(u64::MAX), used: false };
    cell.at(stamp, 0, Command::CreateToken([id as u8; 32], token)).unwrap();
    let admit =
        Command::AdmitReplica { token: [id as u8; 32], replica: id, issuer_key_hash: [1; 32], tls_key_hash: [2; 32] };
    cell.at(stamp, 0, admit).unwrap();
    let member = Member { authority: format!("a{id}"), ..cell.state.member(1).unwrap().clone() };
    cell.at(stamp, 0, Command::PutMember(id, member, KeySetRow::default())).unwrap();
}

#[test]
fn an_authority_is_published_before_it_signs_and_until_its_last_token_ended() {
    let mut west = Cell::founded("west");
    assert_eq!(west.state.jwt_due(), JwtDue::Prepare);
    let (before, records) = (sequence(&west), west.state.records_after(0).count());
    west.at(T, 0, put(1, &[1])).unwrap();
    assert_eq!(life(&west), [(kid(1), "active")], "the first signs at once");
    assert_eq!((sequence(&west), west.state.records_after(0).count()), (before + 1, records + 1));
    assert_eq!(west.state.jwt_due(), JwtDue::Nothing);

    let prepare = T + JWT_SIGNS_MS - JWT_PUBLISHED_MS;
    west.at(prepare - 1, 0, Command::Tick).unwrap();
    assert_eq!(west.state.jwt_due(), JwtDue::Nothing);
    west.at(prepare, 0, Command::Tick).unwrap();
    assert_eq!(west.state.jwt_due(), JwtDue::Prepare);
    // A leader that is late by an hour.
    let made = prepare + 3_600_000;
    west.at(made, 0, put(2, &[1])).unwrap();
    assert_eq!(life(&west), [(kid(1), "active"), (kid(2), "prepared")]);
    assert_eq!(code(west.at(made, 0, put(3, &[1]))), Code::AlreadyExists, "one at a time");
    assert_eq!(code(west.at(made, 0, put(2, &[1]))), Code::AlreadyExists);
    let published = west.state.slice(&node(1)).map(|slice| slice.jwt_authorities);
    assert_eq!(published, None, "there is no such node");
    let td: TrustDomain = "west".parse().unwrap();
    assert_eq!(west.state.jwt_bundles()[&td].len(), 2);

    west.at(made + JWT_PUBLISHED_MS - 1, 0, Command::Tick).unwrap();
    assert_eq!(life(&west), [(kid(1), "active"), (kid(2), "prepared")], "published for a day first");
    let sequence_then = sequence(&west);
    let switch = made + JWT_PUBLISHED_MS;
    west.at(switch, 0, Command::Tick).unwrap();
    assert_eq!(life(&west), [(kid(1), "old"), (kid(2), "active")]);
    assert_eq!(sequence(&west), sequence_then + 1);
    let old = west.state.jwt_authorities().next().unwrap().clone();
    let last_token = switch + u64::from(JwtTtl::CEILING_S) * 1_000;
    assert!(old.not_after >= Stamp(last_token) && old.wrapped.is_empty(), "{old:?}");
    west.at(last_token, 0, Command::Tick).unwrap();
    assert_eq!(life(&west), [(kid(1), "old"), (kid(2), "active")]);
    west.at(last_token + ISSUER_MARGIN_MS + 1, 0, Command::Tick).unwrap();
    assert_eq!(life(&west), [(kid(2), "active")]);
    let restored = State::import(west.state.export()).unwrap();
    assert_eq!(restored.digest(), west.state.digest());
}

#[test]
fn without_a_leader_that_rotates_an_authority_ends_and_the_next_signs_at_once() {
    let mut west = Cell::founded("west");
    west.at(T, 0, put(1, &[1])).unwrap();
    west.at(T + 2 * JWT_SIGNS_MS + 1, 0, Command::Tick).unwrap();
    assert_eq!(life(&west), []);
    west.at(T + 2 * JWT_SIGNS_MS + 2, 0, put(2, &[1])).unwrap();
    assert_eq!(life(&west), [(kid(2), "active")]);
}

#[test]
fn a_replica_that_joins_is_wrapped_to_and_one_that_leaves_ends_what_it_knew() {
    let mut west = Cell::founded("west");
    west.at(T, 0, put(1, &[1])).unwrap();
    join(&mut west, T, 2);
    assert_eq!(west.state.jwt_due(), JwtDue::Wrap(kid(1), vec![2]));
    let (before, wrap) = (sequence(&west), |n, ids: &[u64]| Command::WrapJwtAuthority(kid(n), to(ids)));
    assert_eq!(code(west.at(T, 0, wrap(9, &[2]))), Code::NotFound);
    assert_eq!(code(west.at(T, 0, wrap(1, &[3]))), Code::NotFound, "no such replica");
    west.at(T, 0, wrap(1, &[2])).unwrap();
    assert_eq!((west.state.jwt_due(), sequence(&west)), (JwtDue::Nothing, before), "the bundle is the same");

    let prepared = T + JWT_SIGNS_MS - 1_000;
    west.at(prepared, 0, put(2, &[1, 2])).unwrap();
    west.at(prepared, 0, Command::RemoveMember(2)).unwrap();
    assert_eq!(life(&west), [(kid(1), "active")], "what was only prepared goes");
    assert_eq!(west.state.jwt_signer().unwrap().wrapped, to(&[1]));
    assert_eq!(west.state.jwt_due(), JwtDue::Prepare);
    west.at(prepared, 0, put(3, &[1])).unwrap();
    west.at(prepared + JWT_PUBLISHED_MIN_MS - 1, 0, Command::Tick).unwrap();
    assert_eq!(life(&west), [(kid(1), "active"), (kid(3), "prepared")]);
    west.at(prepared + JWT_PUBLISHED_MIN_MS, 0, Command::Tick).unwrap();
    assert_eq!(life(&west), [(kid(1), "old"), (kid(3), "active")], "soon, not in a day");
}

#[test]
fn operators_take_an_authority_down_its_steps_one_at_a_time_and_never_back() {
    let mut west = Cell::founded("west");
    let (activate, taint, revoke) = (
        |n| Command::ActivateJwtAuthority(kid(n)),
        |n| Command::TaintJwtAuthority(kid(n)),
        |n| Command::RevokeJwtAuthority(kid(n)),
    );
    let wrap = |n| Command::WrapJwtAuthority(kid(n), to(&[1]));
    west.at(T, 0, put(1, &[1])).unwrap();
    let (first, records) = (sequence(&west), west.state.records_after(0).count());
    for (what, command, refused) in [
        ("none of that name", activate(9), Some(Code::NotFound)),
        ("none of that name", taint(9), Some(Code::NotFound)),
        ("none of that name", revoke(9), Some(Code::NotFound)),
        ("activate what signs", activate(1), Some(Code::RootState)),
        ("taint what signs", taint(1), Some(Code::RootState)),
        ("revoke what signs", revoke(1), Some(Code::RootState)),
        ("prepared", put(2, &[1]), None),
        ("a second one", put(3, &[1]), Some(Code::AlreadyExists)),
        ("taint what never signed", taint(2), Some(Code::RootState)),
        ("activated", activate(2), None),
        ("again", activate(2), Some(Code::RootState)),
        ("the former again", activate(1), Some(Code::RootState)),
        ("revoke what is old", revoke(1), Some(Code::RootState)),
        ("tainted", taint(1), None),
        ("again", taint(1), Some(Code::RootState)),
        ("wrap what is tainted", wrap(1), Some(Code::RootState)),
        ("activate what is tainted", activate(1), Some(Code::RootState)),
        ("revoked", revoke(1), None),
        ("again", revoke(1), Some(Code::RootState)),
        ("wrap what is revoked", wrap(1), Some(Code::RootState)),
        ("activate what is revoked", activate(1), Some(Code::RootState)),
        ("never back", put(1, &[1]), Some(Code::AlreadyExists)),
        ("prepared", put(3, &[1]), None),
        ("given up", revoke(3), None),
        ("never back", put(3, &[1]), Some(Code::AlreadyExists)),
    ] {
        let outcome = west.at(T + 1, 0, command);
        assert_eq!(outcome.as_ref().err().map(|r| r.code), refused, "{what}: {outcome:?}");
    }
    assert_eq!(life(&west), [(kid(1), "revoked"), (kid(2), "active"), (kid(3), "revoked")]);
    // Prepared, activated, tainted, revoked, prepared, revoked: each is another bundle, and a record for peers.
    assert_eq!((sequence(&west), west.state.records_after(0).count()), (first + 6, records + 6));
    let td: TrustDomain = "west".parse().unwrap();
    let published: Vec<String> = west.state.jwt_bundles()[&td].iter().map(|a| a.kid.clone()).collect();
    assert_eq!(published, [kid(2)], "what is revoked is published nowhere");
    let gone = west.state.jwt_authorities().find(|row| row.kid == kid(1)).unwrap().clone();
    assert!(gone.spki_der.is_empty() && gone.wrapped.is_empty(), "{gone:?}");
    assert_eq!(west.state.jwt_due(), JwtDue::Nothing);

    // It is forgotten once no token of it could be valid, which is no other bundle.
    let (before, end) = (sequence(&west), T + 1 + 1_000 * u64::from(JwtTtl::CEILING_S) + ISSUER_MARGIN_MS);
    west.at(end, 0, Command::Tick).unwrap();
    assert_eq!(life(&west).len(), 3);
    west.at(end + 1, 0, Command::Tick).unwrap();
    assert_eq!((life(&west), sequence(&west)), (vec![(kid(2), "active")], before));
    let restored = State::import(west.state.export()).unwrap();
    assert_eq!(restored.digest(), west.state.digest());
}

#[test]
fn an_operator_replaces_a_key_at_once_and_what_was_signed_by_it_is_to_be_had_anew() {
    let mut west = with_node();
    west.run(put(2, &[1])).unwrap();
    assert_eq!(token(west.run(ask(1, 2, "db"))), Err(Code::AuthorityMismatch), "it signs nothing yet");
    west.run(Command::ActivateJwtAuthority(kid(2))).unwrap();
    assert_eq!(token(west.run(ask(1, 1, "db"))), Err(Code::AuthorityMismatch), "it signs nothing more");
    assert_eq!(token(west.run(ask(1, 2, "db"))).unwrap().kid, kid(2));
    let former = west.state.jwt_authorities().next().unwrap().clone();
    assert_eq!((former.leaves, former.wrapped.len()), (Stamp(T), 0));
    assert_eq!(west.state.jwt_signer().unwrap().leaves, Stamp(T + JWT_SIGNS_MS), "the next by time, from here on");

    let said = |cell: &Cell| {
        let slice = cell.state.slice(&node(1)).unwrap();
        let td: TrustDomain = "west".parse().unwrap();
        (slice.tainted_jwt.into_iter().collect::<Vec<_>>(), slice.jwt_authorities[&td].len())
    };
    assert_eq!(said(&west), (vec![], 2));
    let revision = west.state.slice(&node(1)).unwrap().revision;
    west.run(Command::TaintJwtAuthority(kid(1))).unwrap();
    assert_eq!(said(&west), (vec![kid(1)], 2), "still believed, and to be had anew");
    west.run(Command::RevokeJwtAuthority(kid(1))).unwrap();
    assert_eq!(said(&west), (vec![], 1));
    assert!(west.state.slice(&node(1)).unwrap().revision > revision);
}

#[test]
fn revoked_ones_leave_room_for_new_ones_and_are_not_remembered_without_bound() {
    let mut west = Cell::founded("west");
    west.run(put(0, &[1])).unwrap();
    for n in 1..=8 {
        let prepared = west.run(put(n, &[1]));
        if n == 8 {
            assert_eq!(code(prepared), Code::Busy, "eight are published");
            break;
        }
        prepared.unwrap();
        west.run(Command::ActivateJwtAuthority(kid(n))).unwrap();
    }
    for n in 0..7 {
        west.run(Command::TaintJwtAuthority(kid(n))).unwrap();
        west.run(Command::RevokeJwtAuthority(kid(n))).unwrap();
    }
    for n in 8..=100 {
        west.run(put(n, &[1])).unwrap();
        west.run(Command::RevokeJwtAuthority(kid(n))).unwrap();
    }
    let life = life(&west);
    assert_eq!((life.len(), life.last().cloned()), (65, Some((kid(100), "revoked"))));
    assert!(life.contains(&(kid(7), "active")), "{life:?}");
}

#[test]
fn authorities_are_bounded_and_belong_to_replicas() {
    let mut west = Cell::founded("west");
    for bad in [
        Command::PutJwtAuthority(vec![], to(&[1])),
        Command::PutJwtAuthority(vec![0; 2_000], to(&[1])),
        Command::PutJwtAuthority(spki(1), BTreeMap::new()),
        Command::PutJwtAuthority(spki(1), to(&[1, 2])),
    ] {
        assert!(west.run(bad).is_err());
    }
    assert_eq!(life(&west), []);
}

fn with_node() -> Cell {
    let mut west = Cell::founded("west");
    west.run(put(1, &[1])).unwrap();
    west.run(Command::AllowEk(cluster("west"), vec![node(1)])).unwrap();
    let admit = admission(&west, 1, 1, None);
    west.run(Command::AdmitNode(admit)).unwrap();
    west.run(Command::CreateEntries(vec![entry("db", "west")])).unwrap();
    west
}

fn ask(generation: u64, n: u8, id: &str) -> Command {
    let audience = Audience::new(vec!["a".into()]).unwrap().sha256();
    let (entry, generation) = (id.parse().unwrap(), Generation(generation));
    Command::IssueJwt { node: node(1), generation, kid: kid(n), entry, audience_sha256: audience }
}

fn token(reply: Result<Reply, Refusal>) -> Result<JwtIssuance, Code> {
    match reply {
        Ok(Reply::Token(token)) => Ok(*token),
        Ok(other) => panic!("{other:?}"),
        Err(refusal) => Err(refusal.code),
    }
}

#[test]
fn a_token_is_committed_for_a_trusted_node_and_an_entry_that_fits_it() {
    let mut west = with_node();
    let first = token(west.run(ask(1, 1, "db"))).unwrap();
    assert_eq!((first.spiffe_id.as_str(), first.kid.clone()), ("spiffe://west/db", kid(1)));
    assert_eq!((first.stamp, first.not_after), (Stamp(T), Stamp(T + JwtTtl::DEFAULT.ms())));
    assert_eq!(first.binding, Some((node(1), Generation(1))));
    let second = token(west.run(ask(1, 1, "db"))).unwrap();
    assert_ne!(first.jti, second.jti);
    assert!(west.state.issued().all(|leaf| leaf.serial != first.jti), "and no certificate has it");

    assert_eq!(token(west.run(ask(1, 2, "db"))), Err(Code::AuthorityMismatch));
    assert_eq!(token(west.run(ask(2, 1, "db"))), Err(Code::NodeUntrusted), "no such generation");
    assert_eq!(token(west.run(ask(1, 1, "web"))), Err(Code::EntryNotOnNode));
    // I10, I4: the same request gets the same token, as long as what it rests on stands.
    let again = token(west.at(T, 7, ask(1, 1, "db"))).unwrap();
    assert_eq!(token(west.at(T, 7, ask(1, 1, "db"))).unwrap(), again);
    west.run(Command::DeleteEntries(vec!["db".parse().unwrap()])).unwrap();
    assert_eq!(token(west.at(T, 7, ask(1, 1, "db"))), Err(Code::EntryNotOnNode));
    west.run(Command::CreateEntries(vec![entry("db", "west")])).unwrap();
    assert!(token(west.at(T, 8, ask(1, 1, "db"))).is_ok());
    west.run(Command::SetNodes(NodeVerb::Ban, Nodes::Ids(vec![node(1)]))).unwrap();
    assert_eq!(token(west.at(T, 8, ask(1, 1, "db"))), Err(Code::NodeBanned));
    assert_eq!(token(west.run(ask(1, 1, "db"))), Err(Code::NodeBanned));
}

#[test]
fn a_token_ends_before_its_verdict_and_its_authority_do() {
    // The cluster's interval is 10 s: three of them without a verdict, and nothing new is issued. So a verdict bounds a
    // token only where the interval is long.
    let mut west = Cell::founded("west");
    west.run(put(1, &[1])).unwrap();
    west.run(Command::RegisterCluster(cluster("slow"), vec![(common::ROOT.to_vec(), "lab".into())], 3_600_000))
        .unwrap();
    west.run(Command::AllowEk(cluster("slow"), vec![node(1)])).unwrap();
    let mut admit = admission(&west, 1, 1, None);
    admit.cluster = cluster("slow");
    west.run(Command::AdmitNode(admit)).unwrap();
    let mut slow = entry("db", "west");
    slow.cluster = cluster("slow");
    west.run(Command::CreateEntries(vec![slow])).unwrap();
    let late = T + UNATTESTED_MAX_MS - 60_000;
    let bounded = token(west.at(late, 0, ask(1, 1, "db"))).unwrap();
    assert_eq!(bounded.not_after, Stamp(T + UNATTESTED_MAX_MS), "I6");
    assert_eq!(token(west.at(T + UNATTESTED_MAX_MS, 0, ask(1, 1, "db"))), Err(Code::NodeUntrusted));
}

#[test]
fn a_peer_learns_the_keys_of_this_cell_and_never_older_ones() {
    let (mut east, mut west, td) =
        (Cell::founded("east"), Cell::founded("west"), "east".parse::<TrustDomain>().unwrap());
    east.run(put(1, &[1])).unwrap();
    west.run(Command::PutPeer(td.clone(), pending(), None)).unwrap();
    west.run(Command::ApprovePeer(td.clone(), [7; 32])).unwrap();
    let pull = |east: &Cell, west: &mut Cell| {
        let after = west.state.peer(&td).unwrap().seq;
        let records: Vec<_> = east.state.records_after(after).cloned().collect();
        let last = records.last().unwrap();
        let (seq, hash) = (last.seq, last.hash());
        let head = Head { origin: td.clone(), epoch: 1, seq, hash, stamp: Stamp(T), nonce: [0; 16] };
        west.run(Command::Import(head, records)).unwrap();
    };
    pull(&east, &mut west);
    let known = |cell: &Cell| {
        let keys = cell.state.jwt_bundles();
        keys.get(&td).into_iter().flatten().map(|a| a.kid.clone()).collect::<Vec<_>>()
    };
    assert_eq!(known(&west), [kid(1)]);
    east.at(T + JWT_SIGNS_MS, 0, put(2, &[1])).unwrap();
    pull(&east, &mut west);
    assert_eq!(known(&west), [kid(1), kid(2)]);
    east.at(T + JWT_SIGNS_MS, 0, Command::ActivateJwtAuthority(kid(2))).unwrap();
    east.at(T + JWT_SIGNS_MS, 0, Command::TaintJwtAuthority(kid(1))).unwrap();
    pull(&east, &mut west);
    assert_eq!(known(&west), [kid(1), kid(2)], "tainted is believed still");
    east.at(T + JWT_SIGNS_MS, 0, Command::RevokeJwtAuthority(kid(1))).unwrap();
    pull(&east, &mut west);
    assert_eq!(known(&west), [kid(2)]);
    // The same keys again under an older sequence are passed over: what was revoked does not come back.
    let older = JwtKeys { sequence: 1, authorities: vec![] };
    let record = |kind, key: &str, payload: Vec<u8>, west: &Cell| {
        let peer = west.state.peer(&td).unwrap();
        ambit_model::record::Record {
            origin: td.clone(),
            epoch: 1,
            seq: peer.seq + 1,
            prev_hash: peer.hash,
            kind,
            key: key.to_owned(),
            payload,
        }
    };
    for (key, keys) in [("east", older), ("west", JwtKeys { sequence: u64::MAX, authorities: vec![] })] {
        let bytes = postcard::to_stdvec(&keys).unwrap();
        let one = record(ambit_model::record::Kind::JwtKeys, key, bytes, &west);
        let (seq, hash) = (one.seq, one.hash());
        let head = Head { origin: td.clone(), epoch: 1, seq, hash, stamp: Stamp(T), nonce: [0; 16] };
        west.run(Command::Import(head, vec![one])).unwrap();
        assert_eq!(known(&west), [kid(2)], "{key}");
    }
    let own: TrustDomain = "west".parse().unwrap();
    assert_eq!(west.state.jwt_bundles()[&own], [], "a peer does not speak for us");
}
