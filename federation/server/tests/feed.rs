//! What goes down on a stream, and what the agent's end makes of it.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test that cannot go on fails")]

use ambit_proto::resources::{Held, Set, Taken};
use ambit_proto::v1;
use ambit_proto::v1::server_message::Body;
use ambitd::replica::cuts::{Cut, Feed, Remembered};

fn cut(revision: u64, entries: &[&str], denied: &[u64]) -> Cut {
    let entry = |id: &&str| v1::Entry { id: (*id).to_owned(), ..v1::Entry::default() };
    let denial = |n: &u64| v1::NodeDenial { trust_domain: "west".into(), node: n.to_string(), generation: 1 };
    let entries = entries.iter().map(entry).collect();
    let slice = v1::Slice { entries, denials: denied.iter().map(denial).collect(), ..v1::Slice::default() };
    Cut { revision, stamp_ms: 1, set: Set::from(&slice), ..Cut::default() }
}

fn subscribe(held: &Held) -> v1::Subscribe {
    let (have_revision, have_digest) = (held.revision(), held.digest());
    v1::Subscribe { deltas: true, have_revision, have_digest, ..v1::Subscribe::default() }
}

/// What the agent makes of it.
fn take(held: &mut Held, bodies: Vec<Body>) -> Vec<Taken> {
    let taken = bodies.into_iter().map(|body| match body {
        Body::Delta(part) => held.take(part).unwrap(),
        other => panic!("{other:?}"),
    });
    taken.collect()
}

fn bytes(bodies: &[Body]) -> usize {
    use prost::Message;
    bodies.iter().map(|body| v1::ServerMessage { body: Some(body.clone()) }.encoded_len()).sum()
}

#[test]
fn an_agent_is_sent_what_changed_and_everything_once_it_lost_what_it_held() {
    let remembered = Remembered::default();
    let mut held = Held::default();
    let mut feed = Feed::new(&subscribe(&held), &remembered);
    assert_eq!(take(&mut held, feed.all(&cut(5, &["a", "b"], &[])).unwrap()), [Taken::All]);
    assert!(feed.all(&cut(6, &["a", "b"], &[])).unwrap().is_empty(), "nothing changed");
    assert_eq!((feed.holds(), feed.applied()), (6, 0));
    feed.acknowledged(5);
    assert_eq!(feed.applied(), 6, "what it has is what it needs");
    let denials = feed.denials(&cut(7, &[], &[1])).unwrap();
    assert_eq!(take(&mut held, denials), [Taken::Denials]);
    assert!(feed.denials(&cut(7, &[], &[1])).unwrap().is_empty(), "once");
    assert!(feed.all(&cut(6, &["a"], &[])).unwrap().is_empty(), "made before the denial");
    // All that changed is whom to refuse: that it is all has to be said.
    assert_eq!(take(&mut held, feed.all(&cut(7, &["a", "b"], &[1])).unwrap()), [Taken::All]);
    assert_eq!(feed.applied(), 5, "7 is not acknowledged");
    for n in 0..=3 {
        assert_eq!(feed.lost().is_ok(), n < 3);
    }
    let mut held = Held::default();
    let all = feed.all(&cut(7, &["a", "b"], &[1])).unwrap();
    assert_eq!((take(&mut held, all), held.set().len()), (vec![Taken::All], 4));
}

#[test]
fn who_comes_back_is_sent_what_changed_since_if_anybody_here_remembers_what_it_holds() {
    let remembered = Remembered::default();
    let many: Vec<String> = (0..1_000).map(|n| format!("entry-{n}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let (mut held, first) = (Held::default(), cut(5, &many, &[]));
    let everything = Feed::new(&subscribe(&held), &remembered).all(&first).unwrap();
    let weight = bytes(&everything);
    take(&mut held, everything);
    let next = cut(9, &many[1..], &[]);
    // Nobody knows it, then this replica does: it sent it, or cut the same for itself.
    let all = Feed::new(&subscribe(&held), &remembered).all(&next).unwrap();
    assert!(bytes(&all) > weight * 9 / 10);
    let same = Feed::new(&subscribe(&held), &remembered).all(&Cut { revision: 8, ..first.clone() }).unwrap();
    assert!(bytes(&same) < 200, "another replica, where nothing changed");
    remembered.note(&first.set);
    let delta = Feed::new(&subscribe(&held), &remembered).all(&next).unwrap();
    assert!(bytes(&delta) < 200, "{}", bytes(&delta));
    take(&mut held, delta);
    assert_eq!(held.set(), &next.set);
    // A replica that is behind what the agent holds says nothing until it has come up to it.
    remembered.note(&next.set);
    let mut behind = Feed::new(&subscribe(&held), &remembered);
    assert!(behind.all(&first).unwrap().is_empty() && behind.denials(&cut(8, &[], &[1])).unwrap().is_empty());
    assert_eq!(take(&mut held, behind.all(&cut(9, &many[1..], &[])).unwrap()), [Taken::All], "that nothing changed");
}

#[test]
fn an_agent_of_a_former_release_is_sent_whole_slices_and_lists() {
    let mut feed = Feed::new(&v1::Subscribe { have_revision: 9, ..v1::Subscribe::default() }, &Remembered::default());
    let slices = |bodies: Vec<Body>| match bodies.as_slice() {
        [Body::Slice(slice)] => (slice.revision, slice.entries.len(), slice.denials.len()),
        other => panic!("{other:?}"),
    };
    assert_eq!(slices(feed.all(&cut(5, &["a"], &[])).unwrap()), (5, 1, 0));
    match feed.denials(&cut(6, &[], &[1, 2])).unwrap().as_slice() {
        [Body::Denials(list)] => assert_eq!((list.revision, list.denials.len()), (6, 2)),
        other => panic!("{other:?}"),
    }
    assert_eq!(slices(feed.all(&cut(6, &["a"], &[1, 2])).unwrap()), (6, 1, 2));
    assert!(feed.all(&cut(7, &["a"], &[1, 2])).unwrap().is_empty());
}
