//! Acts that take approvers: who must sign, each refusal, and that a refusal changes nothing. Signatures are OpenSSL's.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

#[path = "common/approvers.rs"]
mod approvers;
mod common;

use ambit_model::act::{Act, Approval, Approved, ApproverCard, Proposal};
use ambit_model::{Code, Refusal, Stamp};
use ambit_state::objects::EndpointProfile;
use ambit_state::{Command, FetchedBundle, Reply, State};
use approvers::Key;
use common::{Cell, code, sha256};

const NOW: u64 = 1_000_000;
const ADMIN: &str = "spiffe://west/ambit/admin/founder";
const DAY_MS: u64 = 86_400_000;

fn add(name: &str, key: &Key) -> Act {
    Act::AddApprover(name.parse().unwrap(), key.card())
}
fn remove(name: &str) -> Act {
    Act::RemoveApprover(name.parse().unwrap())
}
fn proposal(act: &Act, nonce: u8) -> Proposal {
    let expires = Stamp(NOW + 3_600_000);
    Proposal { trust_domain: "west".parse().unwrap(), epoch: 1, expires, nonce: [nonce; 16], act: act.clone() }
}
fn command(act: &Act, approved: Option<Approved>) -> Command {
    Command::Act { act: act.clone(), approved, by: ADMIN.into() }
}
/// What a proposal becomes on its way to the cell, whose part of it the cell fills in itself.
fn approved(proposal: &Proposal, approvals: Vec<Approval>) -> Approved {
    Approved { epoch: proposal.epoch, expires: proposal.expires, nonce: proposal.nonce, approvals }
}
fn by(act: &Act, nonce: u8, keys: &[&Key]) -> Command {
    let proposal = proposal(act, nonce);
    command(act, Some(approved(&proposal, keys.iter().map(|key| key.approve(&proposal)).collect())))
}
fn names(cell: &Cell) -> Vec<&str> {
    cell.state.approvers().map(|(name, _)| name.as_str()).collect()
}
/// All rows but the clock's.
fn bare(state: &State) -> Vec<ambit_state::TableWrite> {
    state.rows().filter(|row| row.table != 1).collect()
}

/// A cell with a root that may be revoked: prepared, and under it nothing.
fn cell() -> (Cell, Act) {
    let mut cell = Cell::founded("west");
    cell.run(Command::PrepareRoot(b"next".to_vec(), [(1, vec![1])].into())).unwrap();
    (cell, Act::RevokeRoot(sha256(b"next")))
}

/// The same with two approvers, alice and bob, and the next number of a proposal.
fn two() -> (Cell, Act, Key, Key) {
    let (mut cell, revoke) = cell();
    let (alice, bob) = (Key::new(), Key::new());
    cell.run(command(&add("alice", &alice), None)).unwrap();
    cell.run(by(&add("bob", &bob), 1, &[&alice])).unwrap();
    (cell, revoke, alice, bob)
}

#[test]
fn who_must_sign_follows_from_how_many_there_are() {
    let (mut cell, revoke) = cell();
    let [alice, bob, carol] = [Key::new(), Key::new(), Key::new()];
    let mut check = |what: &str, command: Command, refused: Option<Code>, after: &[&str]| {
        let before = bare(&cell.state);
        let outcome = cell.run(command);
        assert_eq!(outcome.as_ref().err().map(|r| r.code), refused, "{what}: {outcome:?}");
        assert!(refused.is_none() || bare(&cell.state) == before, "{what} left something behind");
        assert_eq!(names(&cell), after, "{what}");
    };
    let stranger = by(&add("alice", &alice), 9, &[&alice]);
    check("none there, and one signs", stranger, Some(Code::ApprovalInvalid), &[]);
    check("none there to remove", command(&remove("alice"), None), Some(Code::NotFound), &[]);
    check("the first, by an administrator alone", command(&add("alice", &alice), None), None, &["alice"]);
    let one = &["alice"][..];
    check("the second, by nobody", command(&add("bob", &bob), None), Some(Code::ApprovalMissing), one);
    check("the second, by himself", by(&add("bob", &bob), 2, &[&bob]), Some(Code::ApprovalInvalid), one);
    for (what, command) in [
        ("one, in a command of the former release", Command::RevokeRoot(sha256(b"next"))),
        ("one, who did not sign", command(&revoke, None)),
        ("one, who signed", by(&revoke, 3, &[&alice])),
    ] {
        check(what, command, Some(Code::NeedsSecondApprover), one);
    }
    check("the second, by the first", by(&add("bob", &bob), 2, &[&alice]), None, &["alice", "bob"]);
    let both = &["alice", "bob"][..];
    check("a third, by one", by(&add("carol", &carol), 4, &[&alice]), Some(Code::ApprovalMissing), both);
    check("a third, by both", by(&add("carol", &carol), 4, &[&bob, &alice]), None, &["alice", "bob", "carol"]);
    let all = &["alice", "bob", "carol"][..];
    check("out, by one", by(&remove("bob"), 5, &[&alice]), Some(Code::ApprovalMissing), all);
    check("out, by two", by(&remove("bob"), 5, &[&alice, &carol]), None, &["alice", "carol"]);
    check("out, by two", by(&remove("alice"), 6, &[&alice, &carol]), None, &["carol"]);
    check("the last, by nobody", command(&remove("carol"), None), Some(Code::ApprovalMissing), &["carol"]);
    check("the last, by himself", by(&remove("carol"), 7, &[&carol]), None, &[]);
    check("and all is as before", Command::RevokeRoot(sha256(b"next")), None, &[]);
}

#[test]
fn every_way_not_to_have_two_approvers_is_refused_and_changes_nothing() {
    let (mut cell, revoke, alice, bob) = two();
    let [carol, stranger] = [Key::new(), Key::new()];
    cell.run(by(&add("carol", &carol), 2, &[&alice, &bob])).unwrap();
    cell.run(by(&remove("carol"), 3, &[&alice, &bob])).unwrap();
    let p = proposal(&revoke, 4);
    let of = |p: &Proposal| approved(p, vec![alice.approve(p), bob.approve(p)]);
    let signed = |what: &Proposal| approved(&p, vec![alice.approve(what), bob.approve(what)]);
    let with = |approvals: Vec<Approval>| approved(&p, approvals);
    let foreign = Proposal { trust_domain: "east".parse().unwrap(), ..p.clone() };
    let other_root = Proposal { act: Act::RevokeRoot([1; 32]), ..p.clone() };
    let another = Proposal { act: remove("bob"), ..p.clone() };
    let before_it_began_anew = Proposal { epoch: 0, ..p.clone() };
    let (a, b) = (alice.approve(&p), bob.approve(&p));
    use Code::{ApprovalExpired, ApprovalInvalid, ApprovalMissing};
    for (what, approved, code) in [
        ("nobody", with(vec![]), ApprovalMissing),
        ("one", with(vec![a.clone()]), ApprovalMissing),
        ("one signature twice", with(vec![a.clone(), a.clone()]), ApprovalInvalid),
        (
            "one's signature as another's",
            with(vec![a.clone(), Approval { key: bob.public(), ..a.clone() }]),
            ApprovalInvalid,
        ),
        ("two, and one of them twice", with(vec![a.clone(), b.clone(), a.clone()]), ApprovalInvalid),
        ("one and a stranger", with(vec![a.clone(), stranger.approve(&p)]), ApprovalInvalid),
        ("two and a stranger", with(vec![a.clone(), b.clone(), stranger.approve(&p)]), ApprovalInvalid),
        ("one and a former approver", with(vec![a.clone(), carol.approve(&p)]), ApprovalInvalid),
        ("another root", signed(&other_root), ApprovalInvalid),
        ("another act", signed(&another), ApprovalInvalid),
        ("another cell", signed(&foreign), ApprovalInvalid),
        ("another epoch than was signed", signed(&before_it_began_anew), ApprovalInvalid),
        ("another epoch", of(&before_it_began_anew), ApprovalInvalid),
        ("the epoch to come", of(&Proposal { epoch: 2, ..p.clone() }), ApprovalInvalid),
        ("another nonce than was signed", signed(&Proposal { nonce: [5; 16], ..p.clone() }), ApprovalInvalid),
        ("ended before it was asked", of(&Proposal { expires: Stamp(NOW - 1), ..p.clone() }), ApprovalExpired),
        ("ends in more than a day", of(&Proposal { expires: Stamp(NOW + DAY_MS + 1), ..p.clone() }), ApprovalExpired),
        ("ends later than was signed", Approved { expires: Stamp(NOW + DAY_MS), ..of(&p) }, ApprovalInvalid),
        (
            "a short signature",
            with(vec![a.clone(), Approval { signature: b.signature[..63].to_vec(), ..b.clone() }]),
            ApprovalInvalid,
        ),
        (
            "a signature and more",
            with(vec![a.clone(), Approval { signature: [&b.signature[..], &[0]].concat(), ..b.clone() }]),
            ApprovalInvalid,
        ),
        ("more than there can be", with(vec![a.clone(); 17]), ApprovalInvalid),
    ] {
        let before = bare(&cell.state);
        let outcome = cell.run(command(&revoke, Some(approved)));
        assert_eq!(outcome.as_ref().err().map(|r| r.code), Some(code), "{what}: {outcome:?}");
        assert!(bare(&cell.state) == before, "{what} left something behind");
    }
    for (what, command) in
        [("alone", command(&revoke, None)), ("by the former command", Command::RevokeRoot(sha256(b"next")))]
    {
        assert_eq!(cell.run(command).map_err(|r| r.code), Err(ApprovalMissing), "{what}");
    }
    cell.run(command(&revoke, Some(of(&p)))).unwrap();
    assert_eq!(cell.state.bundle_record().unwrap().roots.len(), 1);
}

/// Every bit of what two signed counts.
#[test]
fn whatever_is_changed_of_what_was_approved_it_is_refused_and_nothing_changes() {
    let (mut cell, revoke, alice, bob) = two();
    let p = proposal(&revoke, 4);
    let good = approved(&p, vec![alice.approve(&p), bob.approve(&p)]);
    let before = bare(&cell.state);
    let bytes = postcard::to_stdvec(&good).unwrap();
    let mut tried = 0;
    for bit in 0..bytes.len() * 8 {
        let mut bent = bytes.clone();
        bent[bit / 8] ^= 1 << (bit % 8);
        // What is no such message any more would not get here.
        let Ok((bent, [])) = postcard::take_from_bytes::<Approved>(&bent) else { continue };
        assert!(bent == good || cell.run(command(&revoke, Some(bent))).is_err(), "bit {bit}");
        tried += 1;
    }
    assert!(tried > 1_400, "{tried}");
    assert!(bare(&cell.state) == before);
    cell.run(command(&revoke, Some(good))).unwrap();
}

#[test]
fn what_was_signed_is_good_once_and_not_in_a_cell_that_began_anew() {
    let (mut cell, _, alice, bob) = two();
    let carol = Key::new();
    let add_carol = by(&add("carol", &carol), 2, &[&alice, &bob]);
    cell.at(NOW, 7, add_carol.clone()).unwrap();
    // The same request once more is answered as before; another with the same approvals is not.
    assert_eq!(cell.at(NOW, 7, add_carol.clone()), Ok(Reply::Done));
    cell.run(by(&remove("carol"), 3, &[&alice, &bob])).unwrap();
    let again = |cell: &mut Cell| -> Result<Reply, Refusal> { cell.run(add_carol.clone()) };
    assert_eq!(again(&mut cell).map_err(|r| r.code), Err(Code::ApprovalUsed));
    let read = State::import(cell.state.export()).unwrap();
    assert_eq!((read.digest(), read.acts().count()), (cell.state.digest(), 4));
    cell.state = read;
    assert_eq!(again(&mut cell).map_err(|r| r.code), Err(Code::ApprovalUsed));
    let done: Vec<(String, Vec<&str>)> = cell
        .state
        .acts()
        .map(|(_, row)| {
            let text = row.act.to_string();
            let words = text.split(' ').take(3).collect::<Vec<_>>().join(" ");
            (words, row.approved_by.iter().map(|name| name.as_str()).collect())
        })
        .collect();
    let both = vec!["alice", "bob"];
    let add = |name: &str| format!("add approver {name}");
    assert_eq!(
        done,
        [
            (add("alice"), vec![]),
            (add("bob"), vec!["alice"]),
            (add("carol"), both.clone()),
            ("remove approver carol".to_owned(), both)
        ]
    );
    // The end of the proposal is the end of the memory that is needed of it.
    let at_its_end = cell.at(NOW + 3_600_001, 0, add_carol);
    assert_eq!(at_its_end.map_err(|r| r.code), Err(Code::ApprovalExpired));
}

#[test]
fn one_person_is_one_approver() {
    let (mut cell, _, alice, bob) = two();
    let forged = ApproverCard { proof: bob.card().proof, ..Key::new().card() };
    // The neutral point: R = A and S = 0 verify for every message.
    let neutral: [u8; 32] = std::array::from_fn(|at| u8::from(at == 0));
    let anybodys = ApproverCard { key: neutral, proof: [neutral, [0; 32]].concat() };
    for (what, act, code) in [
        ("her key under another name", add("carol", &alice), Code::AlreadyExists),
        ("another key under her name", add("alice", &Key::new()), Code::AlreadyExists),
        ("a key that nobody showed to have", Act::AddApprover("carol".parse().unwrap(), forged), Code::BadRequest),
        ("a key of anybody's", Act::AddApprover("carol".parse().unwrap(), anybodys), Code::BadRequest),
    ] {
        let before = bare(&cell.state);
        assert_eq!(cell.run(by(&act, 9, &[&alice, &bob])).map_err(|r| r.code), Err(code), "{what}");
        assert!(bare(&cell.state) == before, "{what} left something behind");
    }
}

#[test]
fn what_is_not_possible_is_refused_before_anybody_is_asked_to_sign() {
    let (mut cell, _, alice, bob) = two();
    let active = Act::RevokeRoot(sha256(b"west"));
    for (what, command, code) in [
        ("the active root", command(&active, None), Code::RootState),
        ("the same, signed", by(&active, 9, &[&alice, &bob]), Code::RootState),
        ("no root", command(&Act::RevokeRoot([1; 32]), None), Code::NotFound),
        ("no approver", command(&remove("carol"), None), Code::NotFound),
    ] {
        assert_eq!(cell.run(command).map_err(|r| r.code), Err(code), "{what}");
    }
    // It was not used up: what is refused is not done.
    assert_eq!(cell.state.acts().count(), 2);
}

#[test]
fn an_administrator_of_a_cluster_proposes_none_of_it() {
    let (mut cell, revoke, alice, bob) = two();
    let ours = [common::cluster("west")].into();
    let within = Command::Within(ours, Box::new(by(&revoke, 9, &[&alice, &bob])));
    assert_eq!(cell.run(within).map_err(|r| r.code), Err(Code::PermissionDenied));
}

#[test]
fn acts_have_a_bound_and_none_that_could_be_repeated_is_forgotten() {
    let (mut cell, _, alice, bob) = two();
    let carol = Key::new();
    let mut nonce = 0u128;
    let mut act = |cell: &mut Cell, now: u64| {
        nonce += 1;
        let there = cell.state.approvers().count() == 3;
        let act = if there { remove("carol") } else { add("carol", &carol) };
        let p = Proposal { nonce: nonce.to_be_bytes(), expires: Stamp(now + 1_000), ..proposal(&act, 0) };
        cell.at(now, 0, command(&act, Some(approved(&p, vec![alice.approve(&p), bob.approve(&p)]))))
    };
    while cell.state.acts().count() < 1_000 {
        act(&mut cell, NOW).unwrap();
    }
    // The first, by no approval, can be repeated by nobody once its instant is over.
    act(&mut cell, NOW + 1).unwrap();
    let kept = |cell: &Cell| (cell.state.acts().count(), cell.state.acts().next().unwrap().0);
    let (count, first) = kept(&cell);
    assert_eq!(act(&mut cell, NOW + 2).map_err(|r| r.code), Err(Code::Busy));
    assert_eq!(kept(&cell), (count, first));
    act(&mut cell, NOW + 1_001).unwrap();
    // Bob's is the oldest, and what was signed for it is good for an hour.
    assert_eq!(kept(&cell), (1_000, first));
}

/// What a replica proposes that breaks glass for this administrator and key.
fn glass(admin: &str, key: u8, approved: Approved) -> Command {
    let (admin, authority) = (admin.parse().unwrap(), "a1".to_owned());
    Command::BreakGlass { admin, key_hash: [key; 32], authority, replica: 1, approved }
}
fn broken(admin: &str, key: u8) -> Act {
    Act::BreakGlass(admin.parse().unwrap(), [key; 32])
}

#[test]
fn glass_is_broken_under_one_approvers_word_and_for_what_it_names() {
    let (mut cell, _, alice, _bob) = two();
    let grant = |admin: &str| Command::ChangeRoles {
        admin: admin.parse().unwrap(),
        change: ambit_state::RoleChange::Grant([ambit_model::AdminRole::Operator].into()),
        by: ADMIN.into(),
    };
    cell.run(grant("olga")).unwrap();
    cell.run(grant("otto")).unwrap();
    let barred = "spiffe://west/ambit/admin/otto".parse().unwrap();
    cell.run(Command::DenyId(barred, ambit_state::IdVerb::Bar)).unwrap();
    let p = proposal(&broken("founder", 7), 9);
    let word = |of: &Proposal| approved(of, vec![alice.approve(of)]);
    let of = |act: &Act| word(&proposal(act, 8));
    let elsewhere = Proposal { trust_domain: "east".parse().unwrap(), ..p.clone() };
    let (past, next) = (Proposal { expires: Stamp(NOW - 1), ..p.clone() }, Proposal { epoch: 2, ..p.clone() });
    let late = Proposal { expires: Stamp(NOW + DAY_MS + 1), ..p.clone() };
    let other = |authority: &str| match glass("founder", 7, word(&p)) {
        Command::BreakGlass { admin, key_hash, replica, approved, .. } => {
            Command::BreakGlass { admin, key_hash, authority: authority.into(), replica, approved }
        }
        other => other,
    };
    let west = [common::cluster("west")].into();
    for (what, command, code) in [
        ("nobody's word", glass("founder", 7, approved(&p, vec![])), Code::ApprovalMissing),
        ("a stranger's", glass("founder", 7, approved(&p, vec![Key::new().approve(&p)])), Code::ApprovalInvalid),
        ("another key", glass("founder", 6, word(&p)), Code::ApprovalInvalid),
        ("another name", glass("olga", 7, word(&p)), Code::ApprovalInvalid),
        ("a word for another act", glass("founder", 7, of(&remove("bob"))), Code::ApprovalInvalid),
        ("another cell's", glass("founder", 7, word(&elsewhere)), Code::ApprovalInvalid),
        ("another epoch's", glass("founder", 7, word(&next)), Code::ApprovalInvalid),
        ("one that ended", glass("founder", 7, word(&past)), Code::ApprovalExpired),
        ("one without an end", glass("founder", 7, word(&late)), Code::ApprovalExpired),
        ("nobody who has a role", glass("eve", 7, of(&broken("eve", 7))), Code::PermissionDenied),
        ("one who is denied", glass("otto", 7, of(&broken("otto", 7))), Code::SvidRevoked),
        ("an intermediate of nobody's", other("a9"), Code::AuthorityMismatch),
        ("an administrator", command(&broken("founder", 7), Some(word(&p))), Code::BadRequest),
        ("one of a cluster", Command::Within(west, Box::new(glass("founder", 7, word(&p)))), Code::PermissionDenied),
    ] {
        let before = bare(&cell.state);
        assert_eq!(cell.run(command).map_err(|r| r.code), Err(code), "{what}");
        assert!(bare(&cell.state) == before, "{what} left something behind");
    }
    let leaf = match cell.run(glass("founder", 7, word(&p))) {
        Ok(Reply::Leaves(leaves)) => leaves[0].clone().unwrap(),
        other => panic!("{other:?}"),
    };
    assert_eq!((leaf.spiffe_id.as_str(), leaf.key_hash), (ADMIN, [7; 32]));
    assert_eq!(leaf.subject, ambit_state::Subject::BreakGlass(vec!["alice".parse().unwrap()]));
    assert!(leaf.lifetime.not_after.0 <= NOW + 8 * 3_600_000, "{leaf:?}");
    let (_, row) = cell.state.acts().next_back().unwrap();
    assert_eq!((row.act.event(), row.by.as_str()), ("break_glass", "spiffe://west/ambit/replica/1"));
    assert_eq!(row.approved_by, ["alice".parse().unwrap()]);
    // Once, whoever asks and however the request is numbered.
    for _ in 0..2 {
        assert_eq!(cell.run(glass("founder", 7, word(&p))).map_err(|r| r.code), Err(Code::ApprovalUsed));
    }
    let again = proposal(&broken("founder", 7), 10);
    cell.run(glass("founder", 7, word(&again))).unwrap();
}

#[test]
fn a_cell_without_approvers_breaks_no_glass() {
    let (mut cell, _) = cell();
    let key = Key::new();
    let p = proposal(&broken("founder", 7), 9);
    let command = glass("founder", 7, approved(&p, vec![key.approve(&p)]));
    assert_eq!(cell.run(command).map_err(|r| r.code), Err(Code::ApprovalMissing));
}

#[test]
fn a_foreign_trust_domain_is_removed_by_two_once_there_are_approvers() {
    let (mut cell, _) = cell();
    let [alice, bob] = [Key::new(), Key::new()];
    let td: ambit_model::TrustDomain = "far".parse().unwrap();
    let put = |td: &ambit_model::TrustDomain| {
        let (url, profile) = ("https://far/bundle".to_owned(), ambit_state::objects::EndpointProfile::HttpsWeb);
        Command::PutRelationship(td.clone(), url, profile, Vec::new(), ADMIN.into())
    };
    let act = Act::RemoveTrustDomain(td.clone());
    let former = || Command::RemoveRelationship(td.clone());
    // Without any approver as ever, by either command.
    for remove in [former(), command(&act, None)] {
        cell.run(put(&td)).unwrap();
        cell.run(remove).unwrap();
        assert_eq!(cell.state.relationships().count(), 0);
    }
    assert_eq!(cell.run(command(&act, None)).map_err(|r| r.code), Err(Code::NotFound));
    cell.run(put(&td)).unwrap();
    cell.run(command(&add("alice", &alice), None)).unwrap();
    for one in [former(), command(&act, None), by(&act, 3, &[&alice])] {
        assert_eq!(cell.run(one).map_err(|r| r.code), Err(Code::NeedsSecondApprover));
    }
    cell.run(by(&add("bob", &bob), 1, &[&alice])).unwrap();
    for one in [former(), command(&act, None), by(&act, 4, &[&alice])] {
        assert_eq!(cell.run(one).map_err(|r| r.code), Err(Code::ApprovalMissing));
    }
    assert_eq!(cell.state.relationships().count(), 1);
    cell.run(by(&act, 5, &[&alice, &bob])).unwrap();
    assert_eq!(cell.state.relationships().count(), 0);
}

/// To put another over it would be to remove it.
#[test]
fn a_relationship_is_not_put_over_where_its_removal_takes_two() {
    let td = || "example.org".parse::<ambit_model::TrustDomain>().unwrap();
    let put = |url: &str, profile: &EndpointProfile, roots: &[u8]| {
        let roots = roots.iter().map(|byte| vec![*byte]).collect();
        Command::PutRelationship(td(), url.into(), profile.clone(), roots, "another".into())
    };
    let (url, web) = ("https://b.example.org/", &EndpointProfile::HttpsWeb);
    let spiffe = &EndpointProfile::HttpsSpiffe("spiffe://example.org/s".parse().unwrap());
    for (n, spoken) in [(0, false), (1, true), (2, true)] {
        for (what, command, same) in [
            ("the same", put(url, spiffe, &[9]), true),
            ("another URL", put("https://c.example.org/", spiffe, &[9]), false),
            ("another profile", put(url, web, &[9]), false),
            ("another profile, no roots", put(url, web, &[]), false),
            ("other roots than to begin with", put(url, spiffe, &[8]), true),
            ("more roots than to begin with", put(url, spiffe, &[9, 8]), true),
        ] {
            let (mut cell, _) = cell();
            cell.run(put(url, spiffe, &[7])).unwrap();
            let (sequence, roots) = (Some(7), vec![vec![9]]);
            let bundle = FetchedBundle { url: url.into(), sequence, refresh_hint_s: 60, roots, sha256: [1; 32] };
            cell.run(Command::TakeBundle(td(), bundle)).unwrap();
            let (alice, bob) = (Key::new(), Key::new());
            if n > 0 {
                cell.run(self::command(&add("alice", &alice), None)).unwrap();
            }
            if n > 1 {
                cell.run(by(&add("bob", &bob), 1, &[&alice])).unwrap();
            }
            let before = bare(&cell.state);
            let refused = cell.run(command).err().map(|refusal| refusal.code);
            assert_eq!(refused, (spoken && !same).then_some(Code::AlreadyExists), "{what}, {n} approvers");
            assert_eq!(bare(&cell.state) == before, spoken || same, "{what}, {n} approvers");
        }
    }
    // A new one is put as ever, and one that two removed.
    let (mut cell, _, alice, bob) = two();
    cell.run(put(url, web, &[])).unwrap();
    assert_eq!(code(cell.run(put(url, spiffe, &[9]))), Code::AlreadyExists);
    cell.run(by(&Act::RemoveTrustDomain(td()), 2, &[&alice, &bob])).unwrap();
    cell.run(put(url, spiffe, &[9])).unwrap();
}
