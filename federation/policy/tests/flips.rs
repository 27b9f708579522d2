//! What a change flips, at once and when something ends.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_model::{Moment, SpiffeId, Stamp};
use ambit_policy::{Document, PolicySet, flips, known_in, parse};
use std::collections::BTreeSet;

const NOW: Moment = Moment { committed: Stamp(1_000), latest: Stamp(1_000) };

fn known(names: &[&str]) -> BTreeSet<SpiffeId> {
    names.iter().map(|name| format!("spiffe://{name}").parse().unwrap()).collect()
}

/// Each line: `name action from ports [end, seconds]`, about calls to `west/db`.
fn set(lines: &str) -> PolicySet {
    let mut set = PolicySet::new(["west".parse().unwrap(), "east".parse().unwrap()].into());
    for line in lines.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let words: Vec<_> = line.split_whitespace().collect();
        let [name, action, from, ports] = words[..4].try_into().unwrap();
        let expires = words.get(4).map_or(String::new(), |s| format!(", expires: 1970-01-01T00:00:{s}Z"));
        let spec = format!(
            "{{target: spiffe://west/db, action: {action}, from: ['spiffe://{from}'], ports: [{ports}]{expires}}}"
        );
        let text = format!("{{kind: Policy, metadata: {{name: {name}}}, spec: {spec}}}");
        let documents = parse(&text).unwrap();
        let [Document::Policy(policy)] = documents.as_slice() else { panic!("{documents:?}") };
        set.insert("west".parse().unwrap(), policy.clone());
    }
    set
}

fn told(before: &str, after: &str) -> Vec<String> {
    let found = flips(&set(before), &set(after), &known(&["west/a", "west/b", "west/db"]), NOW);
    let at = |at: Option<Stamp>| at.map_or(String::new(), |at| format!(" at {}", at.0 / 1_000));
    let text = |f: &ambit_policy::Flip| format!("{} +{} -{}{}", f.source.path(), f.opened, f.closed, at(f.at));
    found.pairs.iter().map(text).collect()
}

#[test]
fn what_ends_later_counts_as_what_ends_at_once() {
    let open = "open allow west/a 80";
    for (what, before, after, want) in [
        ("nothing", open, open, &[][..]),
        ("an allow", "", open, &["/a +80 -none"]),
        ("taken away", open, "", &["/a +none -80"]),
        // The same allow, that ends in a second: nothing flips now, and then all of it.
        ("given an end", open, "open allow west/a 80 02", &["/a +none -80 at 2"]),
        ("given an earlier end", "open allow west/a 80 09", "open allow west/a 80 02", &["/a +none -80 at 2"]),
        ("given a later end", "open allow west/a 80 02", "open allow west/a 80 09", &["/a +80 -none at 2"]),
        // A deny that ends opens: it opened before the change too, and later.
        (
            "a deny given an end",
            "open allow west/a 80\nno deny west/a 80",
            "open allow west/a 80\nno deny west/a 80 03",
            &["/a +80 -none at 3"],
        ),
        // One that stays is taken away behind another that ends: nothing flips now.
        (
            "what covers it taken away",
            "open allow west/a 80\nbrief allow west/* 80 05",
            "brief allow west/* 80 05",
            &["/a +none -80 at 5"],
        ),
        // What flips at once is counted once, whatever becomes of it later.
        ("a brief allow", "", "brief allow west/a 80 05", &["/a +80 -none"]),
        // Two ends between which it is open, and that neither alone shows.
        ("a gap", "", "open allow west/a 80 09\nno deny west/a 80 04", &["/a +80 -none at 4"]),
        (
            "an audit that ends",
            "open allow west/a 80\nsee audit west/a 80",
            "open allow west/a 80\nsee audit west/a 80 02",
            &[],
        ),
        ("one that was over", "old allow west/a 80 01", "", &[]),
    ] {
        assert_eq!(told(before, after), want, "{what}");
    }
}

#[test]
fn pairs_are_counted_by_what_becomes_of_them() {
    let before = "open allow west/a 80\nweb allow west/b 80";
    let found = flips(
        &set(before),
        &set("open allow west/a 443\nweb allow west/b 80 02"),
        &known(&["west/a", "west/b", "west/db"]),
        NOW,
    );
    assert_eq!((found.pairs.len(), found.counts(), found.compared), (2, (1, 2), 2));
}

#[test]
fn who_is_in_a_set_is_found_without_asking_everybody() {
    let known = known(&["east/a", "west/a", "west/a/-", "west/a/b", "west/a/z/9", "west/a0", "west/b", "west-2/a"]);
    for (set, action, want) in [
        ("spiffe://west/a", "allow", "/a"),
        ("spiffe://west/nobody", "allow", ""),
        ("spiffe://west/a/*", "allow", "/a/- /a/b /a/z/9"),
        ("spiffe://west/*", "allow", "/a /a/- /a/b /a/z/9 /a0 /b"),
        ("ids:west /b /c", "allow", "/b"),
        ("cluster:east/prod", "allow", ""),
        ("cluster:east/prod", "deny", "/a"),
    ] {
        let action =
            if action == "deny" { ambit_model::policy::Action::Deny } else { ambit_model::policy::Action::Allow };
        let set = set.parse().or_else(|_| ambit_model::policy::Peers::from_wire(set)).unwrap();
        let found: Vec<_> = known_in(&known, &set, action).map(SpiffeId::path).collect();
        assert_eq!(found.join(" "), want, "{set}");
    }
}
