//! Foreign trust domains that are no cells: who is given their bundles, and what is taken.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use ambit_model::{Code, Entry, JwtAuthority, Refusal, Stamp, TrustDomain};
use ambit_state::objects::{EndpointProfile, TokenRow, TokenScope};
use ambit_state::{Command, FetchedBundle, Reply, State};
use common::{Cell, admission, cluster, code, entry, node, pending};

const URL: &str = "https://b.example.org/";

fn td() -> TrustDomain {
    "example.org".parse().unwrap()
}

fn put(td: &TrustDomain, roots: Vec<Vec<u8>>) -> Command {
    Command::PutRelationship(td.clone(), URL.into(), EndpointProfile::HttpsWeb, roots, "me".into())
}

fn take(cell: &mut Cell, url: &str, sequence: Option<u64>, roots: &[u8], sha256: u8) -> Result<(), Refusal> {
    let roots = roots.iter().map(|byte| vec![*byte]).collect();
    let bundle = FetchedBundle { url: url.into(), sequence, refresh_hint_s: 60, roots, sha256: [sha256; 32] };
    match cell.run(Command::TakeBundle(td(), bundle))? {
        Reply::Items(mut items) => items.remove(0),
        other => panic!("{other:?}"),
    }
}

fn keys(kids: &[&str]) -> Vec<JwtAuthority> {
    let key = |kid: &&str| JwtAuthority { kid: (*kid).to_owned(), spki_der: vec![1; 91], not_after: Stamp(u64::MAX) };
    kids.iter().map(key).collect()
}

/// The same with keys of JWT-SVIDs.
fn take_keys(cell: &mut Cell, sequence: u64, roots: &[u8], jwt: Vec<JwtAuthority>, sha256: u8) -> Result<(), Refusal> {
    let roots = roots.iter().map(|byte| vec![*byte]).collect();
    let sequence = Some(sequence);
    let bundle = FetchedBundle { url: URL.into(), sequence, refresh_hint_s: 60, roots, sha256: [sha256; 32] };
    match cell.run(Command::TakeBundleWithKeys(td(), bundle, jwt))? {
        Reply::Items(mut items) => items.remove(0),
        other => panic!("{other:?}"),
    }
}

fn kids(cell: &Cell, n: u8) -> Option<Vec<String>> {
    let slice = cell.state.slice(&node(n)).unwrap();
    slice.jwt_authorities.get(&td()).map(|keys| keys.iter().map(|key| key.kid.clone()).collect())
}

fn bundle_of(cell: &Cell, n: u8) -> Option<Vec<Vec<u8>>> {
    cell.state.slice(&node(n)).unwrap().bundles.get(&td()).map(|(_, roots)| roots.clone())
}

#[test]
fn only_nodes_whose_entries_federate_with_it_are_given_a_foreign_bundle() {
    let mut cell = Cell::founded("west");
    for n in [1, 2] {
        let token = TokenRow { scope: TokenScope::Node(cluster("west")), expires: Stamp(2_000_000), used: false };
        cell.run(Command::CreateToken([n; 32], token)).unwrap();
        let admission = admission(&cell, n, n, Some([n; 32]));
        cell.run(Command::AdmitNode(admission)).unwrap();
    }
    let web = Entry { federates_with: [td()].into(), nodes: [node(1)].into(), ..entry("web", "west") };
    // An entry may name it before its bundle is there: then it is absent.
    cell.run(Command::CreateEntries(vec![web, entry("db", "west")])).unwrap();
    assert_eq!(bundle_of(&cell, 1), None);
    cell.run(put(&td(), vec![])).unwrap();
    assert_eq!(bundle_of(&cell, 1), None, "nothing known is not an empty bundle");
    take(&mut cell, URL, Some(1), &[9], 1).unwrap();
    assert_eq!((bundle_of(&cell, 1), bundle_of(&cell, 2)), (Some(vec![vec![9]]), None));
    assert!(!cell.state.bundles().contains_key(&td()), "the cell itself trusts nobody of it");
    let again = State::import(cell.state.export()).unwrap();
    assert_eq!(again.digest(), cell.state.digest());
    cell.run(Command::RemoveRelationship(td())).unwrap();
    assert_eq!(bundle_of(&cell, 1), None);
}

#[test]
fn keys_of_tokens_come_with_the_bundle_to_the_same_nodes_and_go_by_the_same_rules() {
    let mut cell = Cell::founded("west");
    for n in [1, 2] {
        let token = TokenRow { scope: TokenScope::Node(cluster("west")), expires: Stamp(2_000_000), used: false };
        cell.run(Command::CreateToken([n; 32], token)).unwrap();
        let admission = admission(&cell, n, n, Some([n; 32]));
        cell.run(Command::AdmitNode(admission)).unwrap();
    }
    let web = Entry { federates_with: [td()].into(), nodes: [node(1)].into(), ..entry("web", "west") };
    cell.run(Command::CreateEntries(vec![web, entry("db", "west")])).unwrap();
    cell.run(put(&td(), vec![vec![9]])).unwrap();
    assert_eq!(kids(&cell, 1), Some(vec![]), "a bootstrap bundle has none");
    let told = |kids: &[&str]| Some(kids.iter().map(|kid| (*kid).to_owned()).collect::<Vec<_>>());
    let big = |kid: String, bytes| vec![JwtAuthority { spki_der: vec![1; bytes], kid, not_after: Stamp(u64::MAX) }];
    let many = (0..65).map(|n| keys(&[n.to_string().as_str()]).remove(0)).collect();
    for (what, sequence, roots, jwt, sha256, expected, then) in [
        ("the first", 5, &[9][..], keys(&["a"]), 1, Ok(()), told(&["a"])),
        ("the same", 5, &[9], keys(&["a"]), 1, Ok(()), told(&["a"])),
        ("older", 4, &[9], keys(&["b"]), 2, Err(Code::BundleRollback), told(&["a"])),
        ("another", 5, &[9], keys(&["b"]), 2, Err(Code::BundleEquivocation), told(&["a"])),
        ("without roots", 6, &[], keys(&["b"]), 2, Err(Code::BundleShrunk), told(&["a"])),
        ("too many", 6, &[9], many, 2, Err(Code::BadRequest), told(&[])),
        ("a long name", 6, &[9], big("a".repeat(129), 91), 2, Err(Code::BadRequest), told(&[])),
        ("no name", 6, &[9], big(String::new(), 91), 2, Err(Code::BadRequest), told(&[])),
        ("a huge key", 6, &[9], big("a".into(), 1101), 2, Err(Code::BadRequest), told(&[])),
        ("one more", 6, &[9], keys(&["a", "b"]), 2, Ok(()), told(&["a", "b"])),
        ("one less", 7, &[9], keys(&["b"]), 3, Ok(()), told(&["b"])),
        ("none, and another root", 8, &[8], vec![], 4, Err(Code::BundleShrunk), told(&["b"])),
        ("none again", 8, &[8], vec![], 4, Err(Code::BundleShrunk), told(&["b"])),
    ] {
        let revision = cell.state.slice(&node(1)).unwrap().revision;
        let outcome = take_keys(&mut cell, sequence, roots, jwt, sha256).map_err(|refusal| refusal.code);
        assert_eq!((outcome, kids(&cell, 1)), (expected, then), "{what}");
        assert_eq!(kids(&cell, 2), None, "{what}: for nobody else");
        let news = ["the first", "too many", "one more", "one less", "none, and another root"].contains(&what);
        assert_eq!(cell.state.slice(&node(1)).unwrap().revision != revision, news, "{what}: nodes hear of news only");
    }
    assert!(!cell.state.jwt_bundles().contains_key(&td()), "the cell itself believes nobody of it");
    assert_eq!(bundle_of(&cell, 1), Some(vec![vec![8]]), "the roots were taken");
    assert_eq!(code(cell.run(Command::ConfirmBundle(td(), [3; 32]))), Code::NotFound);
    cell.run(Command::ConfirmBundle(td(), [4; 32])).unwrap();
    assert_eq!((kids(&cell, 1), bundle_of(&cell, 1)), (Some(vec![]), Some(vec![vec![8]])), "revoked, and nothing else");
    take_keys(&mut cell, 9, &[8], keys(&["c"]), 5).unwrap();
    // A replica of the former release says nothing of keys.
    take(&mut cell, URL, Some(10), &[8], 6).unwrap();
    assert_eq!(kids(&cell, 1), told(&["c"]));
    // Everything is revoked.
    assert_eq!(take_keys(&mut cell, 11, &[], keys(&["d"]), 7).unwrap_err().code, Code::BundleShrunk);
    cell.run(Command::ConfirmBundle(td(), [7; 32])).unwrap();
    assert_eq!((kids(&cell, 1), bundle_of(&cell, 1)), (Some(vec![]), Some(vec![])));
    take_keys(&mut cell, 11, &[], keys(&["d"]), 7).unwrap();
    assert_eq!(kids(&cell, 1), told(&["d"]), "confirmed as it is");
    let again = State::import(cell.state.export()).unwrap();
    assert_eq!(again.digest(), cell.state.digest());
    // What it began with, written again, takes nothing back.
    cell.run(put(&td(), vec![vec![7]])).unwrap();
    assert_eq!((kids(&cell, 1), bundle_of(&cell, 1)), (told(&["d"]), Some(vec![])));
    // A relationship with another URL begins anew.
    let elsewhere = "https://c.example.org/".to_owned();
    let elsewhere = Command::PutRelationship(td(), elsewhere, EndpointProfile::HttpsWeb, vec![vec![9]], "me".into());
    for anew in [elsewhere, put(&td(), vec![vec![9]]), Command::RemoveRelationship(td())] {
        let removed = anew == Command::RemoveRelationship(td());
        assert!(!removed || !cell.state.peer_jwt(&td()).is_empty());
        cell.run(anew).unwrap();
        assert!(cell.state.peer_jwt(&td()).is_empty());
        let _ = take_keys(&mut cell, 12, &[9], keys(&["e"]), 8);
    }
    assert_eq!(kids(&cell, 1), None);
}

#[test]
fn more_keys_than_are_held_do_not_hold_up_the_roots() {
    let many = || (0..65).map(|n| keys(&[n.to_string().as_str()]).remove(0)).collect::<Vec<_>>();
    let long = || keys(&["a".repeat(129).as_str()]);
    for (what, jwt, still) in [("too many", many(), &["7"][..]), ("a long name", long(), &[])] {
        let mut cell = Cell::founded("west");
        cell.run(put(&td(), vec![vec![9]])).unwrap();
        take_keys(&mut cell, 5, &[8, 9], keys(&["a", "7"]), 1).unwrap();
        let trouble = |cell: &Cell| cell.state.relationships().next().unwrap().1.trouble.clone();
        // The same bundle twice: it is fetched again and again.
        for _ in 0..2 {
            assert_eq!(take_keys(&mut cell, 6, &[8], jwt.clone(), 2).unwrap_err().code, Code::BadRequest, "{what}");
            assert_eq!(cell.state.foreign_bundle(&td()), Some((6, vec![vec![8]])), "{what}: the removed root is gone");
            assert_eq!(cell.state.peer_jwt(&td()), keys(still), "{what}: of what was known, what is still named");
            assert_eq!(trouble(&cell), "bad_request", "{what}");
        }
        assert_eq!(take_keys(&mut cell, 7, &[], jwt, 3).unwrap_err().code, Code::BundleShrunk, "{what}");
        take_keys(&mut cell, 7, &[8], keys(&["b"]), 3).unwrap();
        assert_eq!((trouble(&cell).as_str(), cell.state.peer_jwt(&td())), ("", keys(&["b"]).as_slice()), "{what}");
        // More roots than are held are taken by nobody, and told of.
        let roots: Vec<u8> = (0..65).collect();
        assert_eq!(take_keys(&mut cell, 8, &roots, keys(&["b"]), 4).unwrap_err().code, Code::BadRequest);
        assert_eq!((trouble(&cell).as_str(), cell.state.foreign_bundle(&td()).unwrap().0), ("bad_request", 7));
    }
}

#[test]
fn what_is_fetched_is_never_older_other_or_empty() {
    let mut cell = Cell::founded("west");
    cell.run(put(&td(), vec![])).unwrap();
    assert_eq!(take(&mut cell, URL, Some(5), &[], 1).unwrap_err().code, Code::BundleShrunk, "the first is empty");
    take(&mut cell, URL, Some(5), &[9], 1).unwrap();
    for (what, url, sequence, roots, sha256, expected) in [
        ("the same", URL, Some(5), &[9][..], 1, Ok(())),
        ("older", URL, Some(4), &[9], 2, Err(Code::BundleRollback)),
        ("no sequence any more", URL, None, &[9], 2, Err(Code::BundleRollback)),
        ("another under the same sequence", URL, Some(5), &[8], 2, Err(Code::BundleEquivocation)),
        ("empty", URL, Some(6), &[], 2, Err(Code::BundleShrunk)),
        ("from elsewhere", "https://other/", Some(6), &[9], 2, Err(Code::StaleRevision)),
        ("later", URL, Some(6), &[8], 2, Ok(())),
    ] {
        let before = cell.state.foreign_bundle(&td());
        let outcome = take(&mut cell, url, sequence, roots, sha256).map_err(|refusal| refusal.code);
        assert_eq!(outcome, expected, "{what}");
        let row = cell.state.relationships().next().unwrap().1.clone();
        if outcome.is_err() {
            assert_eq!(cell.state.foreign_bundle(&td()), before, "{what} changed the bundle");
        } else {
            assert!(row.trouble.is_empty(), "{what}");
        }
    }
    assert_eq!(cell.state.foreign_bundle(&td()), Some((6, vec![vec![8]])));
    // A publisher without sequences can only be followed.
    let mut cell = Cell::founded("west");
    cell.run(put(&td(), vec![])).unwrap();
    take(&mut cell, URL, None, &[1], 1).unwrap();
    take(&mut cell, URL, None, &[2], 2).unwrap();
    take(&mut cell, URL, Some(1), &[3], 3).unwrap();
    assert_eq!(take(&mut cell, URL, None, &[2], 2).unwrap_err().code, Code::BundleRollback);
}

#[test]
fn a_trust_domain_is_a_peer_or_fetched_never_both() {
    let mut cell = Cell::founded("west");
    assert_eq!(code(cell.run(put(&"west".parse().unwrap(), vec![]))), Code::AlreadyExists);
    cell.run(Command::PutPeer("east".parse().unwrap(), pending(), None)).unwrap();
    assert_eq!(code(cell.run(put(&"east".parse().unwrap(), vec![]))), Code::AlreadyExists);
    cell.run(put(&td(), vec![])).unwrap();
    assert_eq!(code(cell.run(Command::PutPeer(td(), pending(), None))), Code::AlreadyExists);
    let spiffe = EndpointProfile::HttpsSpiffe("spiffe://example.org/s".parse().unwrap());
    let bare = Command::PutRelationship(td(), URL.into(), spiffe, vec![], "me".into());
    assert_eq!(code(cell.run(bare)), Code::BadRequest, "nobody could tell who answers");
}
