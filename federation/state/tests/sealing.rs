//! Replicas attested and the root sealed to their TPMs: rows of entries and outcomes.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use ambit_model::act::{Approval, Approved, ApproverCard, Proposal, ShareHolder};
use ambit_model::{Act, Code, Stamp};
use ambit_state::objects::*;
use ambit_state::sealing::{AttestedReplica, ReplicaDenial, ReplicaVerdict, Seal};
use ambit_state::{Command, JwtDue, State};
use common::*;
use openssl::pkey::PKey;
use openssl::sign::Signer;
use std::collections::BTreeMap;

const REPLICAS: &str = "replica";

fn key(n: u8) -> Vec<u8> {
    vec![n; 65]
}
fn first() -> [u8; 32] {
    sha256(b"west")
}

/// A cell whose replicas may attest with these EKs.
fn cell() -> Cell {
    let mut cell = Cell::founded("west");
    cell.run(Command::RegisterCluster(cluster(REPLICAS), vec![(ROOT.to_vec(), "lab".into())], 10_000)).unwrap();
    cell.run(Command::AllowEk(cluster(REPLICAS), vec![node(1), node(2)])).unwrap();
    cell
}
fn verdict(cell: &Cell, replica: u64, n: u8, nonce: u8) -> ReplicaVerdict {
    let row = cell.state.cell().unwrap();
    ReplicaVerdict {
        replica,
        nonce: [nonce; 32],
        deadline: Stamp(1_060_000),
        endorsement_revision: row.endorsement_revision,
        attested: AttestedReplica {
            ek: node(n),
            ak_name: vec![n],
            wrap_key: key(n),
            tls_key_hash: [2; 32],
            token: None,
            policy_revision: row.policy_revision,
            ek_root_sha256: Some(sha256(ROOT)),
            ek_class: "lab".into(),
            manufacturer: "IBM".into(),
            model: "swtpm".into(),
            firmware_version: 7,
            counters: Counters { resets: 1, restarts: 0, clock: u64::from(nonce) },
            policy: PolicyRef { name: REPLICAS.parse().unwrap(), version: 1 },
            evidence_sha256: [3; 32],
            stamp: Stamp(0),
            stands: false,
        },
    }
}
fn attest(verdict: ReplicaVerdict) -> Command {
    Command::AttestReplica(Box::new(verdict))
}
fn token(cell: &mut Cell, replica: u64) -> [u8; 32] {
    let sha256 = [replica as u8; 32];
    let scope = TokenScope::Replica(replica, "127.0.0.1:2".into());
    cell.run(Command::CreateToken(sha256, TokenRow { scope, expires: Stamp(2_000_000), used: false })).unwrap();
    sha256
}
fn admit(replica: u64, token: [u8; 32]) -> Command {
    Command::AdmitReplica { token, replica, issuer_key_hash: [1; 32], tls_key_hash: [2; 32] }
}
fn member(n: u8) -> Member {
    Member {
        address: "127.0.0.1:2".into(),
        authority: "a2".into(),
        authority_not_after: Stamp(1_000_000_000),
        wrap_key: key(n),
        record_key: [n; 32],
    }
}
fn put(replica: u64, n: u8) -> Command {
    Command::PutMember(replica, member(n), KeySetRow::default())
}
/// Ed25519 keys of the approvers that there may be, and what they sign.
const APPROVERS: [&str; 2] = ["alice", "bob"];
fn signed(n: usize, message: &[u8]) -> Vec<u8> {
    let key = PKey::private_key_from_raw_bytes(&[n as u8 + 1; 32], openssl::pkey::Id::ED25519).unwrap();
    Signer::new_without_digest(&key).unwrap().sign_oneshot_to_vec(message).unwrap()
}
fn public(n: usize) -> [u8; 32] {
    let key = PKey::private_key_from_raw_bytes(&[n as u8 + 1; 32], openssl::pkey::Id::ED25519).unwrap();
    key.raw_public_key().unwrap().try_into().unwrap()
}
/// The act, with the word of the first so many.
fn approved(act: Act, by: usize) -> Command {
    let nonce = sha256(act.to_string().as_bytes())[..16].try_into().unwrap();
    let (epoch, expires) = (1, Stamp(2_000_000));
    let proposal = Proposal { trust_domain: "west".parse().unwrap(), epoch, expires, nonce, act: act.clone() };
    let message = proposal.statement().unwrap();
    let approvals = (0..by).map(|n| Approval { key: public(n), signature: signed(n, &message) }).collect();
    let approved = (by > 0).then_some(Approved { epoch, expires, nonce, approvals });
    Command::Act { act, approved, by: "ada".into() }
}
fn add_approver(n: usize) -> Command {
    let card = ApproverCard { key: public(n), proof: signed(n, &ApproverCard::proved(&public(n))) };
    approved(Act::AddApprover(APPROVERS[n].parse().unwrap(), card), n)
}
fn share(threshold: u8, names: &[&str]) -> Command {
    share_by(2, threshold, names)
}
fn share_by(approvers: usize, threshold: u8, names: &[&str]) -> Command {
    let holder = |(n, name): (usize, &&str)| ShareHolder { name: name.parse().unwrap(), key: key(n as u8) };
    let holders = names.iter().enumerate().map(holder).collect();
    approved(Act::ShareRoot { root: first(), threshold, holders }, approvers)
}
fn seal(to: &[(u64, u8)]) -> Seal {
    let wrapped: BTreeMap<u64, Vec<u8>> = to.iter().map(|(id, _)| (*id, vec![0xee])).collect();
    let to = to.iter().map(|(id, n)| (*id, key(*n))).collect();
    Seal { to, roots: [(first(), wrapped)].into(), jwt: BTreeMap::new() }
}
type Made = fn(BTreeMap<u64, Vec<u8>>) -> Command;
/// Wrapped to these keys of these replicas.
fn wrapped_to(to: &[(u64, u8)], command: impl Fn(BTreeMap<u64, Vec<u8>>) -> Command) -> Command {
    let wrapped = to.iter().map(|(id, _)| (*id, vec![0xdd])).collect();
    Command::WrappedTo(to.iter().map(|(id, n)| (*id, key(*n))).collect(), Box::new(command(wrapped)))
}
fn sealed() -> Cell {
    let mut cell = cell();
    let v = verdict(&cell, 1, 1, 1);
    cell.run(attest(v)).unwrap();
    (0..2).for_each(|n| drop(cell.run(add_approver(n)).unwrap()));
    cell.run(share(2, &["al", "bo", "cy"])).unwrap();
    cell.run(Command::SealRoots(Box::new(seal(&[(1, 1)])))).unwrap();
    cell
}

#[test]
fn a_replica_is_attested_by_what_was_judged_now_of_a_tpm_that_an_operator_named() {
    let mut cell = cell();
    let token = token(&mut cell, 2);
    let honest = verdict(&cell, 1, 1, 1);
    type Row = (&'static str, Code, fn(&mut ReplicaVerdict));
    let rows: &[Row] = &[
        ("too late", Code::TicketExpired, |v| v.deadline = Stamp(999_999)),
        ("by other rules of endorsement", Code::StaleAppraisal, |v| v.endorsement_revision.0 -= 1),
        ("by another policy revision", Code::StaleAppraisal, |v| v.attested.policy_revision.0 += 1),
        ("a TPM that nobody named", Code::EkNotExpected, |v| v.attested.ek = node(9)),
        ("another policy", Code::AppraisalPolicyMissing, |v| v.attested.policy.name = "servers".parse().unwrap()),
        ("no replica of the cell", Code::NotFound, |v| v.replica = 2),
        ("a token for one that is there", Code::AlreadyExists, |v| v.attested.token = Some([2; 32])),
        ("a token of another replica", Code::JoinTokenInvalid, |v| (v.replica, v.attested.token) = (3, Some([2; 32]))),
        ("an unknown token", Code::JoinTokenInvalid, |v| (v.replica, v.attested.token) = (2, Some([8; 32]))),
    ];
    for (what, expected, change) in rows {
        let mut verdict = honest.clone();
        change(&mut verdict);
        let before = cell.state.digest();
        assert_eq!(code(cell.run(attest(verdict))), *expected, "{what}");
        // Only the index and the time moved.
        assert!(cell.state.attested_replica(1).is_none(), "{what}");
        assert_ne!(before, cell.state.digest());
    }
    cell.run(attest(honest.clone())).unwrap();
    assert_eq!(cell.state.member(1).unwrap().wrap_key, key(1), "from here on it is wrapped to the TPM");
    assert_eq!(code(cell.run(attest(honest))), Code::NonceConsumed);
    // Of the same TPM no earlier quote counts, and no other replica has it.
    let mut back = verdict(&cell, 1, 1, 2);
    back.attested.counters.clock = 1;
    assert_eq!(code(cell.run(attest(back))), Code::ClockStepBack);
    let mut two = verdict(&cell, 2, 1, 3);
    two.attested.token = Some(token);
    assert_eq!(code(cell.run(attest(two))), Code::AlreadyExists);
    let mut two = verdict(&cell, 2, 2, 4);
    two.attested.token = Some(token);
    cell.run(attest(two)).unwrap();
    assert!(cell.state.member(2).is_none(), "attested, and to join yet");
}

#[test]
fn where_it_is_required_only_the_attested_join_with_the_very_key() {
    let mut cell = cell();
    assert_eq!(code(cell.run(Command::AttestedReplicasOnly(true))), Code::ReplicaUnattested, "it would not be let in");
    let v = verdict(&cell, 1, 1, 1);
    cell.run(attest(v)).unwrap();
    cell.run(Command::AttestedReplicasOnly(true)).unwrap();
    let token = token(&mut cell, 2);
    assert_eq!(code(cell.run(admit(2, token))), Code::ReplicaUnattested);
    assert!(!cell.state.token(&token).unwrap().used, "refused before its first change");
    let mut v = verdict(&cell, 2, 2, 2);
    v.attested.token = Some(token);
    cell.run(attest(v)).unwrap();
    cell.run(admit(2, token)).unwrap();
    assert_eq!(code(cell.run(put(2, 7))), Code::ReplicaUnattested, "another key");
    cell.run(put(2, 2)).unwrap();
    assert!(cell.state.unattested().is_empty());
    cell.run(Command::AttestedReplicasOnly(false)).unwrap();
    assert!(!cell.state.attested_only());
}

/// What was attested lets in who attested: with his token, his TLS key, by the policies of now, and until his token ends.
#[test]
fn evidence_serves_the_join_that_it_was_shown_for_and_no_other() {
    let ready = || {
        let mut cell = cell();
        let v = verdict(&cell, 1, 1, 1);
        cell.run(attest(v)).unwrap();
        cell.run(Command::AttestedReplicasOnly(true)).unwrap();
        let token = token(&mut cell, 2);
        let mut v = verdict(&cell, 2, 2, 2);
        v.attested.token = Some(token);
        cell.run(attest(v)).unwrap();
        let scope = TokenScope::Replica(2, "127.0.0.1:2".into());
        cell.run(Command::CreateToken([8; 32], TokenRow { scope, expires: Stamp(9_000_000), used: false })).unwrap();
        (cell, token)
    };
    let (mut cell, first_token) = ready();
    assert_eq!(code(cell.run(admit(2, [8; 32]))), Code::ReplicaUnattested, "a later token of the same number");
    let other_key =
        Command::AdmitReplica { token: first_token, replica: 2, issuer_key_hash: [1; 32], tls_key_hash: [7; 32] };
    assert_eq!(code(cell.run(other_key)), Code::ReplicaUnattested, "another machine's TLS key");
    assert!(!cell.state.token(&first_token).unwrap().used);
    cell.run(admit(2, first_token)).unwrap();
    // Another machine attests with the other token before the first is recorded: what it proved is not the first's.
    let mut other = verdict(&cell, 2, 2, 3);
    (other.attested.token, other.attested.tls_key_hash) = (Some([8; 32]), [7; 32]);
    cell.run(attest(other)).unwrap();
    assert_eq!(code(cell.run(put(2, 2))), Code::ReplicaUnattested);

    let (mut cell, token) = ready();
    let content = PolicyVersion { version: 0, sha256: [1; 32], canonical: vec![1], clusters: [cluster("west")].into() };
    let by = "ada".into();
    let policy = Command::PutAppraisalPolicy { name: "servers".parse().unwrap(), content, staged: false, by };
    cell.run(policy).unwrap();
    assert_eq!(code(cell.run(admit(2, token))), Code::StaleAppraisal, "by policies of before");

    let (mut cell, token) = ready();
    cell.at(2_000_000, 1, Command::Tick).unwrap();
    assert!(cell.state.attested_replica(2).is_some(), "as long as the token");
    cell.at(2_000_001, 2, Command::Tick).unwrap();
    assert!(cell.state.attested_replica(2).is_none() && cell.state.attested_replica(1).is_some());
    assert!(cell.state.token(&token).is_some(), "the token itself is remembered longer");

    // Where any may join, what another proved is not shown as the joiner's.
    let (mut cell, _) = ready();
    cell.run(Command::AttestedReplicasOnly(false)).unwrap();
    cell.run(admit(2, [8; 32])).unwrap();
    cell.run(put(2, 2)).unwrap();
    assert_eq!(cell.state.unattested(), [2]);
}

#[test]
fn a_machine_of_the_replicas_is_no_node() {
    let mut cell = cell();
    let mut a = admission(&cell, 1, 1, None);
    a.cluster = cluster(REPLICAS);
    assert_eq!(code(cell.run(Command::AdmitNode(a))), Code::PermissionDenied);
}

#[test]
fn the_root_is_sealed_when_nothing_lacks_and_to_all_of_now() {
    let mut cell = cell();
    let seal_roots = |seal: Seal| Command::SealRoots(Box::new(seal));
    assert_eq!(cell.state.root_form(), "file (unsealed: no attested TPM key at replica 1)");
    let lacks = cell.state.seal_lacks();
    let words = ["replica 1 has no attested", "take two approvers, and there are 0", "has no recovery shares"];
    assert!(lacks.len() == 3 && lacks.iter().zip(words).all(|(lack, word)| lack.contains(word)), "{lacks:?}");
    assert_eq!(code(cell.run(seal_roots(seal(&[(1, 1)])))), Code::SealIncomplete, "nothing attested");
    let v = verdict(&cell, 1, 1, 1);
    cell.run(attest(v)).unwrap();
    assert_eq!(cell.state.root_form(), "file (unsealed: ambit trust seal)");
    assert_eq!(code(cell.run(seal_roots(seal(&[(1, 1)])))), Code::SealIncomplete, "no shares");
    for there_are in 0..2 {
        let what = format!("with {there_are} approvers an administrator splits no root");
        assert_eq!(code(cell.run(share_by(0, 2, &["al", "bo"]))), Code::NeedsSecondApprover, "{what}");
        cell.run(add_approver(there_are)).unwrap();
    }
    for signed in 0..2 {
        assert_eq!(code(cell.run(share_by(signed, 2, &["al", "bo"]))), Code::ApprovalMissing);
    }
    assert_eq!(cell.state.seal_lacks().len(), 1, "who approves is there, the shares are not");
    for (what, command) in [
        ("one opens it", share(1, &["al", "bo"])),
        ("more than there are", share(3, &["al", "bo"])),
        ("one person twice", share(2, &["al", "al"])),
    ] {
        assert_eq!(code(cell.run(command)), Code::BadRequest, "{what}");
    }
    cell.run(share(2, &["al", "bo", "cy"])).unwrap();
    assert_eq!(code(cell.run(seal_roots(seal(&[(1, 2)])))), Code::StaleRevision, "another key of the replica");
    assert_eq!(code(cell.run(seal_roots(seal(&[(1, 1), (2, 2)])))), Code::StaleRevision, "a replica more");
    let mut none = seal(&[(1, 1)]);
    none.roots.clear();
    assert_eq!(code(cell.run(seal_roots(none))), Code::StaleRevision, "a root less");
    let mut half = seal(&[(1, 1)]);
    half.roots.values_mut().for_each(BTreeMap::clear);
    assert_eq!(code(cell.run(seal_roots(half))), Code::StaleRevision, "not to every replica");
    cell.run(seal_roots(seal(&[(1, 1)]))).unwrap();
    assert_eq!(cell.state.root_form(), "sealed");
    assert_eq!(cell.state.roots()[&first()].wrapped, [(1, vec![0xee])].into());
    assert!(cell.state.attested_only());
    assert_eq!(code(cell.run(Command::AttestedReplicasOnly(false))), Code::SealIncomplete);
}

#[test]
fn what_is_sealed_is_wrapped_to_no_file_and_shown_as_unsealed_where_a_tpm_is_expected_no_more() {
    let mut cell = sealed();
    let token = token(&mut cell, 2);
    assert_eq!(code(cell.run(admit(2, token))), Code::ReplicaUnattested);
    let wrap = |n| wrapped_to(&[(1, n)], |wrapped| Command::WrapRoot(first(), wrapped));
    cell.run(wrap(1)).unwrap();
    cell.run(Command::DisallowEk(cluster(REPLICAS), vec![node(1)])).unwrap();
    assert_eq!(cell.state.root_form(), "sealed (unsealed: no attested TPM key at replica 1)");
    assert_eq!(code(cell.run(wrap(1))), Code::ReplicaUnattested);
}

/// As after a rotation, for which people have no shares yet.
#[test]
fn a_root_without_shares_shows_in_the_form() {
    let mut cell = sealed();
    assert_eq!(cell.state.root_form(), "sealed");
    cell.run(wrapped_to(&[(1, 1)], |wrapped| Command::PrepareRoot(b"next".to_vec(), wrapped))).unwrap();
    let next = hex::encode(sha256(b"next"));
    assert_eq!(cell.state.root_form(), format!("sealed (root {next} has no recovery shares: ambit trust shares)"));
}

#[test]
fn endorsements_that_change_put_replicas_out_too() {
    let rule =
        EkDenyRow { manufacturer: "IBM".into(), model: "swtpm".into(), firmware_below: u64::MAX, reason: "".into() };
    for command in [
        Command::PutEkRoots { cluster: cluster(REPLICAS), add: vec![], remove: vec![sha256(ROOT)] },
        Command::PutEkDeny(vec![("weak".parse().unwrap(), rule)], vec![]),
    ] {
        let mut cell = sealed();
        cell.run(command).unwrap();
        assert_eq!(cell.state.unattested(), [1]);
    }
    // Another cluster's list is nothing to a replica.
    let mut cell = sealed();
    cell.run(Command::DisallowEk(cluster("west"), vec![node(1)])).unwrap();
    assert!(cell.state.unattested().is_empty());
}

#[test]
fn a_removed_replica_is_attested_no_more_and_a_snapshot_keeps_who_is() {
    let mut cell = sealed();
    let token = token(&mut cell, 2);
    let mut v = verdict(&cell, 2, 2, 2);
    v.attested.token = Some(token);
    cell.run(attest(v)).unwrap();
    cell.run(admit(2, token)).unwrap();
    cell.run(put(2, 2)).unwrap();
    let copy = State::import(cell.state.export()).unwrap();
    assert_eq!(copy.digest(), cell.state.digest());
    assert!(copy.unattested().is_empty() && copy.is_sealed());
    cell.run(Command::RemoveMember(2)).unwrap();
    assert!(cell.state.attested_replica(2).is_none());
}

/// Whatever wraps a secret names the keys, of now and in attested TPMs: a new root is sealed like the one before.
#[test]
fn every_secret_of_a_sealed_cell_is_wrapped_to_attested_keys_of_now() {
    let all: [(&str, Made); 5] = [
        ("a root", |wrapped| Command::PrepareRoot(b"next".to_vec(), wrapped)),
        ("the root", |wrapped| Command::WrapRoot(first(), wrapped)),
        ("a JWT authority", |wrapped| Command::PutJwtAuthority(b"spki".to_vec(), wrapped)),
        ("the JWT authority", |wrapped| Command::WrapJwtAuthority("kid".into(), wrapped)),
        ("a ticket key", Command::RotateTicketKey),
    ];
    for (what, made) in all {
        let mut cell = sealed();
        let bare = made([(1, vec![0xdd])].into());
        assert_eq!(code(cell.run(bare)), Code::ReplicaUnattested, "{what} to nobody knows whom");
        assert_eq!(code(cell.run(wrapped_to(&[(1, 7)], made))), Code::StaleRevision, "{what} to a key of before");
        assert_eq!(code(cell.run(wrapped_to(&[(9, 1)], made))), Code::NotFound, "{what} to a stranger");
        let other = Command::WrappedTo([(1, key(1))].into(), Box::new(made([(2, vec![1])].into())));
        assert_eq!(code(cell.run(other)), Code::BadRequest, "{what} to others than it says");
        // What was wrapped before the replica's key changed is refused whether or not anything is sealed.
        let mut open = self::cell();
        let before = Command::WrappedTo([(1, vec![])].into(), Box::new(made([(1, vec![0xdd])].into())));
        let v = verdict(&open, 1, 1, 1);
        open.run(attest(v)).unwrap();
        assert_eq!(code(open.run(before)), Code::StaleRevision, "{what}, made before the replica attested");
        let named = cell.run(wrapped_to(&[(1, 1)], made));
        assert!(named.is_ok() || what == "the JWT authority", "{what}: {named:?}");
        cell.run(Command::DisallowEk(cluster(REPLICAS), vec![node(1)])).unwrap();
        assert_eq!(code(cell.run(wrapped_to(&[(1, 1)], made))), Code::ReplicaUnattested, "{what} to no TPM");
    }
    let mut cell = sealed();
    assert_eq!(code(cell.run(Command::WrappedTo(BTreeMap::new(), Box::new(Command::Tick)))), Code::BadRequest);
    // A root that nobody could open is none.
    cell.run(Command::DisallowEk(cluster(REPLICAS), vec![node(1)])).unwrap();
    let prepare = wrapped_to(&[], |wrapped| Command::PrepareRoot(b"next".to_vec(), wrapped));
    assert_eq!(code(cell.run(prepare)), Code::ReplicaUnattested);
}

/// A replica that comes with another key in its TPM is wrapped to anew, by those who can; alone it keeps what it has.
#[test]
fn what_was_wrapped_to_a_former_key_is_wrapped_anew() {
    let mut cell = sealed();
    let token = token(&mut cell, 2);
    let mut v = verdict(&cell, 2, 2, 2);
    v.attested.token = Some(token);
    cell.run(attest(v)).unwrap();
    cell.run(admit(2, token)).unwrap();
    cell.run(put(2, 2)).unwrap();
    let with_key = |cell: &Cell, n: u8, nonce| {
        let mut v = verdict(cell, 2, 2, nonce);
        v.attested.wrap_key = key(n);
        attest(v)
    };
    let made: [(&str, Made); 3] = [
        ("a root", |wrapped| Command::WrapRoot(first(), wrapped)),
        ("a JWT authority", |wrapped| Command::PutJwtAuthority(b"spki".to_vec(), wrapped)),
        ("a ticket key", Command::RotateTicketKey),
    ];
    made.iter().for_each(|(_, made)| drop(cell.run(wrapped_to(&[(1, 1), (2, 2)], made)).unwrap()));
    let held = |cell: &Cell| {
        let jwt: Vec<Vec<u64>> =
            cell.state.jwt_authorities().map(|row| row.wrapped.keys().copied().collect()).collect();
        let tickets: Vec<Vec<u64>> =
            cell.state.ticket_keys().map(|(_, row)| row.wrapped.keys().copied().collect()).collect();
        (cell.state.roots()[&first()].wrapped.keys().copied().collect::<Vec<u64>>(), jwt, tickets)
    };
    // The same key again changes nothing.
    let same = with_key(&cell, 2, 3);
    cell.run(same).unwrap();
    assert_eq!(held(&cell), (vec![1, 2], vec![vec![1, 2]], vec![vec![1, 2]]));
    let other = with_key(&cell, 8, 4);
    cell.run(other).unwrap();
    assert_eq!(held(&cell), (vec![1], vec![vec![1]], vec![vec![1]]));
    assert!(matches!(cell.state.jwt_due(), JwtDue::Wrap(_, ids) if ids == [2]));
    assert_eq!(cell.state.member(2).unwrap().wrap_key, key(8));

    // Who opens a sealed root alone takes no other key: it would be lost.
    let mut v = verdict(&cell, 1, 1, 5);
    v.attested.wrap_key = key(9);
    assert_eq!(code(cell.run(attest(v))), Code::SealIncomplete);
    assert_eq!(cell.state.member(1).unwrap().wrap_key, key(1));
    let mut open = self::cell();
    open.run(Command::WrapRoot(first(), [(1, vec![0xdd])].into())).unwrap();
    let v = verdict(&open, 1, 1, 1);
    open.run(attest(v)).unwrap();
    assert_eq!(open.state.roots()[&first()].wrapped.len(), 1, "unsealed, it has the file with its former key still");
}

/// Bad evidence by the rules of now takes a replica's attestation away, whether its certificate or its TPM says whose it is.
#[test]
fn a_replica_that_shows_bad_evidence_is_attested_no_more() {
    let denial = |cell: &Cell, replica, n| {
        let row = cell.state.cell().unwrap();
        let (endorsement_revision, policy_revision) = (row.endorsement_revision, row.policy_revision);
        let (diverged, expected, found) = (String::new(), String::new(), String::new());
        let code = Code::BootLogPcrMismatch.to_string();
        let row = DenialRow { stamp: Stamp(1_000_000), node: node(n), code, diverged, expected, found };
        let (nonce, deadline) = ([9; 32], Stamp(1_060_000));
        ReplicaDenial { nonce, deadline, row, replica, endorsement_revision, policy_revision }
    };
    let deny = |denial| Command::DenyReplica(Box::new(denial));
    for (what, replica, n) in [("its certificate", Some(1), 2), ("its TPM", None, 1)] {
        let mut cell = sealed();
        let bad = denial(&cell, replica, n);
        cell.run(deny(bad.clone())).unwrap();
        assert_eq!(cell.state.root_form(), "sealed (unsealed: no attested TPM key at replica 1)", "{what}");
        assert!(cell.state.wrap_keys().is_empty() && cell.state.roots()[&first()].wrapped.len() == 1);
        assert_eq!(code(cell.run(deny(bad))), Code::NonceConsumed);
        // A copy of its TPM, whose counters are behind, is what it was: no replica. The TPM itself goes on.
        let mut copy = verdict(&cell, 1, 1, 77);
        copy.attested.counters.clock = 1;
        assert_eq!(code(cell.run(attest(copy))), Code::ClockStepBack, "{what}");
        let itself = verdict(&cell, 1, 1, 78);
        cell.run(attest(itself)).unwrap();
        assert!(cell.state.unattested().is_empty());
    }
    let mut cell = sealed();
    let stranger = denial(&cell, None, 2);
    cell.run(deny(stranger)).unwrap();
    for change in [(1, 0), (0, 1)] {
        let mut bad = denial(&cell, Some(1), 1);
        bad.nonce = [20 + change.0 as u8; 32];
        bad.policy_revision.0 += change.0;
        bad.endorsement_revision.0 += change.1;
        cell.run(deny(bad)).unwrap();
    }
    assert!(cell.state.unattested().is_empty(), "another's, or judged by other rules");
}
