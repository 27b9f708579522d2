//! Foreign trust domains that are no cells: who is given their bundles, and what is taken.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use ambit_model::{Code, Entry, Refusal, Stamp, TrustDomain};
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
