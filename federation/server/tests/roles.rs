//! What a certificate makes of its holder, by the state and the moment of the call, not of the handshake.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

use ambit_identity::{Csr, IssuingKey, PeerSvid, Root, SvidKey, Trust, TrustStore, verify_svid};
use ambit_model::bundle::{Bundle, Own};
use ambit_model::{Code, Lifetime, RaftIndex, Stamp, TrustDomain};
use ambit_state::objects::{CellRow, KeySetRow, Member, PeerRow, PeerState, TokenRow, TokenScope};
use ambit_state::{Applied, Command, LogEntry, State};
use ambit_transport::Caller;
use ambitd::authorise::authorise;
use ambitd::replica::trust_of;
use rustls_pki_types::CertificateDer;
use sha2::{Digest, Sha256};

const NOW: Stamp = Stamp(1_800_000_000_000);
const RAFT: &str = "/ambit.v1.Raft/Propose";
const RENEW: &str = "/ambit.v1.Membership/RenewAuthority";
const PULL: &str = "/ambit.v1.PeerLink/Pull";

struct Domain {
    name: TrustDomain,
    root: Root,
    issuer: IssuingKey,
}

fn domain(name: &str) -> Domain {
    let name: TrustDomain = name.parse().unwrap();
    let root = Root::create(&name, NOW, [1; 16]).unwrap();
    let issuer = issuer(&root);
    Domain { name, root, issuer }
}

fn issuer(root: &Root) -> IssuingKey {
    let key = SvidKey::generate().unwrap();
    let csr = Csr::parse(&key.csr().unwrap()).unwrap();
    let lifetime = Lifetime { not_before: NOW.minus_ms(60_000), not_after: NOW.plus_ms(86_400_000) };
    IssuingKey::new(key, root.found(1, &csr, lifetime).unwrap()).unwrap()
}

/// A replica's certificate of an hour.
fn replica_chain(d: &Domain, issuer: &IssuingKey, number: u64) -> Vec<CertificateDer<'static>> {
    let csr = Csr::parse(&SvidKey::generate().unwrap().csr().unwrap()).unwrap();
    let lifetime = Lifetime { not_before: NOW.minus_ms(60_000), not_after: NOW.plus_ms(3_600_000) };
    issuer.replica_leaf(number, &d.name, lifetime, &csr).unwrap()
}

/// The same, verified as at a handshake.
fn replica(d: &Domain, issuer: &IssuingKey, number: u64) -> Caller {
    let chain = replica_chain(d, issuer, number);
    let trust = TrustStore::new(&Bundle::<Own>::new(d.name.clone(), 1, vec![d.root.der().to_vec()])).unwrap();
    let svid: PeerSvid = verify_svid(&chain, &trust, NOW).unwrap();
    Caller { svid: Some(svid), remote: "127.0.0.1:1".parse().unwrap() }
}

fn run(state: &mut State, command: Command) {
    run_committed(state, command).outcome.unwrap();
}

fn run_committed(state: &mut State, command: Command) -> Applied {
    let entry = LogEntry { stamp: NOW, client: [0; 32], request: [0; 16], command };
    let index = RaftIndex(state.applied().0 + 1);
    state.apply(index, &entry)
}

fn founded(d: &Domain) -> State {
    let mut state = State::new();
    let row = CellRow::founded(d.name.clone(), d.root.der().to_vec());
    run(&mut state, Command::FoundCell(row, 1, member(&d.issuer), KeySetRow::default()));
    state
}

fn member(issuer: &IssuingKey) -> Member {
    Member {
        address: String::new(),
        authority: issuer.authority().to_owned(),
        authority_not_after: issuer.not_after(),
        wrap_key: vec![],
        record_key: [0; 32],
    }
}

fn code(path: &str, caller: &Caller, own: &Domain, state: &State, now: Stamp) -> Option<Code> {
    authorise(path, Some(caller), &own.name, || state, now).err().map(|r| r.code)
}

#[test]
fn a_replica_is_a_member_by_its_own_authority_and_only_while_it_is_one() {
    let west = domain("west");
    let mut state = founded(&west);
    let member = replica(&west, &west.issuer, 1);
    assert_eq!(code(RAFT, &member, &west, &state, NOW), None);
    let another_key = replica(&west, &issuer(&west.root), 1);
    assert_eq!(
        code(RENEW, &another_key, &west, &state, NOW),
        Some(Code::PermissionDenied),
        "not the member's authority"
    );
    let another_number = replica(&west, &west.issuer, 2);
    assert_eq!(code(RAFT, &another_number, &west, &state, NOW), Some(Code::PermissionDenied), "nobody's number");
    assert_eq!(code(RAFT, &member, &west, &State::new(), NOW), None, "a joiner hears its cell before its first entry");
    run(&mut state, Command::RemoveMember(1));
    assert_eq!(code(RAFT, &member, &west, &state, NOW), Some(Code::PermissionDenied), "removed");
}

#[test]
fn a_replica_that_renewed_unheard_of_speaks_of_raft_and_of_nothing_else() {
    let west = domain("west");
    let mut state = founded(&west);
    let renewed = issuer(&west.root);
    let caller = replica(&west, &renewed, 1);
    let propose = code(RAFT, &caller, &west, &state, NOW);
    assert_eq!(propose, None, "the root named it: whoever was away hears of the renewal from this very replica");
    assert_eq!(code(RENEW, &caller, &west, &state, NOW), Some(Code::PermissionDenied));
    let posing = replica(&west, &renewed, 2);
    assert_eq!(code(RAFT, &posing, &west, &state, NOW), Some(Code::PermissionDenied), "another's number");
    let east = domain("east");
    assert_eq!(code(RAFT, &replica(&east, &east.issuer, 1), &west, &state, NOW), Some(Code::PermissionDenied));
    // Heard of, it is judged by what is known of it.
    let key_hash = SvidKey::generate().unwrap().spki_sha256();
    run(&mut state, Command::RenewAuthority { replica: 1, key_hash, lifetime_ms: 86_400_000 });
    let former = replica(&west, &west.issuer, 1);
    assert_eq!(code(RENEW, &former, &west, &state, NOW), None, "the former is its own still");
    let own = west.issuer.authority().to_owned();
    run(&mut state, Command::TaintAuthority(own.clone()));
    assert_eq!(code(RENEW, &former, &west, &state, NOW), None, "and has to renew under it");
    run(&mut state, Command::RevokeAuthority(own));
    for path in [RAFT, RENEW] {
        assert_eq!(code(path, &former, &west, &state, NOW), Some(Code::SvidRevoked), "{path}");
    }
    run(&mut state, Command::RemoveMember(1));
    assert_eq!(code(RAFT, &caller, &west, &state, NOW), Some(Code::PermissionDenied), "removed");
}

/// Who has the key of an authority high up signs with an intermediate that the cell never heard of.
#[test]
fn a_connection_ends_with_any_authority_above_its_certificate() {
    let west = domain("west");
    let mut state = founded(&west);
    let high = Root::create(&west.name, NOW, [2; 16]).unwrap();
    let prepare = Command::PrepareRoot(high.der().to_vec(), [(1, vec![1])].into());
    let prepared = run_committed(&mut state, prepare).into_root().unwrap();
    let thief = issuer(&high).under(vec![west.root.cross_sign(&prepared, high.der()).unwrap()]);
    let caller = replica(&west, &thief, 1);
    assert_eq!(code(RAFT, &caller, &west, &state, NOW), None, "as one that renewed unheard of");
    // While it is in the bundle its name is in the chains of all. Given up, it is refused as what is not known.
    let deny = Command::DenyAuthority(ambit_identity::name_of(high.der()).unwrap());
    let refused = run_committed(&mut state, deny.clone()).outcome.unwrap_err();
    assert_eq!(refused.code, Code::RootState);
    run(&mut state, Command::RevokeRoot(Sha256::digest(high.der()).into()));
    run(&mut state, deny);
    for path in [RAFT, RENEW] {
        assert_eq!(code(path, &caller, &west, &state, NOW), Some(Code::SvidRevoked), "{path}");
    }
    let member = replica(&west, &west.issuer, 1);
    assert_eq!(code(RENEW, &member, &west, &state, NOW), None, "whoever is not under it");
}

#[test]
fn a_replica_that_was_removed_is_not_the_one_that_has_its_number_now() {
    let west = domain("west");
    let mut state = founded(&west);
    let former = replica(&west, &west.issuer, 1);
    run(&mut state, Command::RemoveMember(1));
    let token =
        TokenRow { scope: TokenScope::Replica(1, "127.0.0.1:1".into()), expires: NOW.plus_ms(60_000), used: false };
    run(&mut state, Command::CreateToken([7; 32], token));
    let key = SvidKey::generate().unwrap();
    let [issuer_key_hash, tls_key_hash] = [key.spki_sha256(); 2];
    let admit = Command::AdmitReplica { token: [7; 32], replica: 1, issuer_key_hash, tls_key_hash };
    let admission = run_committed(&mut state, admit).into_replica().unwrap();
    let csr = Csr::parse(&key.csr().unwrap()).unwrap();
    let present = IssuingKey::new(key, west.root.intermediate(&admission, &csr).unwrap()).unwrap();
    run(&mut state, Command::PutMember(1, member(&present), KeySetRow::default()));
    assert_eq!(code(RAFT, &replica(&west, &present, 1), &west, &state, NOW), None, "the machine that has it now");
    for path in [RAFT, RENEW] {
        assert_eq!(code(path, &former, &west, &state, NOW), Some(Code::PermissionDenied), "{path}");
    }
}

#[test]
fn a_certificate_that_ended_on_an_open_connection_is_worth_nothing() {
    let west = domain("west");
    let state = founded(&west);
    let member = replica(&west, &west.issuer, 1);
    let late = NOW.plus_ms(3_600_001);
    assert_eq!(code(RAFT, &member, &west, &state, late), Some(Code::Unauthenticated));
}

#[test]
fn a_bundle_of_a_peer_that_cannot_be_used_holds_up_nobody_else() {
    let [west, east, north] = ["west", "east", "north"].map(domain);
    let roots = |d: &Domain| (d.name.clone(), (1, vec![d.root.der().to_vec()]));
    let bundles = [roots(&west), roots(&north), (east.name.clone(), (1, vec![b"no certificate".to_vec()]))];
    let denied = (west.name.clone(), west.issuer.authority().to_owned());
    let trust = trust_of(bundles.into(), [denied].into(), Default::default(), &west.name).unwrap();
    let Trust::Bundles(trust) = trust else { panic!("bundles") };
    let judged = |d: &Domain, issuer: &IssuingKey| verify_svid(&replica_chain(d, issuer, 1), &trust, NOW);
    assert!(judged(&west, &issuer(&west.root)).is_ok() && judged(&north, &north.issuer).is_ok());
    assert_eq!(judged(&east, &east.issuer).unwrap_err().code, Code::TrustDomainUnknown);
    assert_eq!(judged(&west, &west.issuer).unwrap_err().code, Code::SvidUntrusted, "denied all the same");
    let own = [(west.name.clone(), (1, vec![b"no certificate".to_vec()])), roots(&north)];
    assert!(
        trust_of(own.into(), [].into(), Default::default(), &west.name).is_err(),
        "without its own it knows nobody"
    );
}

#[test]
fn only_an_active_peer_pulls() {
    let (west, east) = (domain("west"), domain("east"));
    let mut state = founded(&west);
    let caller = replica(&east, &east.issuer, 1);
    assert_eq!(code(PULL, &caller, &west, &state, NOW), Some(Code::PermissionDenied), "unknown");
    let row = PeerRow {
        state: PeerState::Pending,
        fingerprint: [7; 32],
        addresses: vec![],
        root_der: east.root.der().to_vec(),
        bundle_sequence: 1,
        key_set: KeySetRow::default(),
        epoch: 0,
        seq: 0,
        hash: [0; 32],
        trouble: String::new(),
    };
    run(&mut state, Command::PutPeer(east.name.clone(), row, None));
    assert_eq!(code(PULL, &caller, &west, &state, NOW), Some(Code::PermissionDenied), "pending");
    run(&mut state, Command::ApprovePeer(east.name.clone(), [7; 32]));
    assert_eq!(code(PULL, &caller, &west, &state, NOW), None);
    assert_eq!(code(RAFT, &caller, &west, &state, NOW), Some(Code::PermissionDenied), "a peer is no replica of ours");
    run(&mut state, Command::StopPeer(east.name.clone(), "x".into()));
    assert_eq!(code(PULL, &caller, &west, &state, NOW), Some(Code::PermissionDenied), "stopped");
}
