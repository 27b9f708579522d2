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
    let holds_revision = held.holds();
    v1::Subscribe { deltas: true, have_revision, have_digest, holds_revision, ..v1::Subscribe::default() }
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
fn an_acknowledgement_is_news_of_what_was_sent_since_and_never_of_what_was_there() {
    let remembered = Remembered::default();
    let mut held = Held::default();
    let mut feed = Feed::new(&subscribe(&held), &remembered);
    assert_eq!(feed.acknowledged(4), None, "of a former stream");
    take(&mut held, feed.all(&cut(5, &["a"], &[])).unwrap());
    assert_eq!(feed.acknowledged(5), None, "a start");
    take(&mut held, feed.all(&cut(8, &["b"], &[])).unwrap());
    assert_eq!(feed.acknowledged(5), None, "again");
    assert_eq!((feed.acknowledged(8), feed.acknowledged(8)), (Some(6..=8), None));
    // Nothing to this node until 11; 13 and 15 are acknowledged together, and so is 16, which brings nothing.
    for (revision, entry) in [(11, "b"), (13, "c"), (15, "d"), (16, "d")] {
        take(&mut held, feed.all(&cut(revision, &[entry], &[])).unwrap());
    }
    assert_eq!((feed.acknowledged(15), feed.applied()), (Some(12..=15), 16));
    take(&mut held, feed.all(&cut(18, &["e"], &[])).unwrap());
    take(&mut held, feed.all(&cut(20, &["f"], &[])).unwrap());
    assert_eq!((feed.acknowledged(18), feed.acknowledged(u64::MAX)), (Some(17..=18), Some(19..=20)));
    // Whom to refuse is one thing, the rest of that revision another.
    take(&mut held, feed.denials(&cut(21, &[], &[1])).unwrap());
    take(&mut held, feed.all(&cut(21, &["f"], &[1])).unwrap());
    assert_eq!(feed.acknowledged(21), None);
    take(&mut held, feed.denials(&cut(22, &[], &[2])).unwrap());
    take(&mut held, feed.all(&cut(22, &["g"], &[2])).unwrap());
    assert_eq!(feed.acknowledged(22), Some(22..=22));

    // It comes back elsewhere: with what it has, with what it was told is all until 29, and after it missed something.
    let mut feed = Feed::new(&subscribe(&held), &remembered);
    take(&mut held, feed.all(&cut(25, &["g"], &[2])).unwrap());
    assert_eq!((feed.acknowledged(22), feed.acknowledged(25)), (None, None));
    held.confirm(29);
    let mut feed = Feed::new(&subscribe(&held), &remembered);
    take(&mut held, feed.all(&cut(30, &["h"], &[2])).unwrap());
    assert_eq!((feed.acknowledged(25), feed.acknowledged(30)), (None, Some(30..=30)));
    let mut feed = Feed::new(&subscribe(&held), &remembered);
    take(&mut held, feed.all(&cut(40, &["i"], &[2])).unwrap());
    assert_eq!(feed.acknowledged(40), Some(31..=40));
    // What it lost it had.
    feed.lost().unwrap();
    let mut held = Held::default();
    take(&mut held, feed.all(&cut(40, &["i"], &[2])).unwrap());
    assert_eq!(feed.acknowledged(40), None);
    // No number that an agent may say is too high.
    let hello = v1::Subscribe { have_revision: u64::MAX, holds_revision: u64::MAX, ..subscribe(&held) };
    assert_eq!(Feed::new(&hello, &remembered).acknowledged(u64::MAX), None);
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
    // It does not say what it comes with, so that the first slice may be no news to it.
    assert_eq!(feed.acknowledged(6), None);
    assert_eq!(slices(feed.all(&cut(9, &["b"], &[1, 2])).unwrap()), (9, 1, 2));
    assert_eq!(feed.acknowledged(9), Some(8..=9));
}
