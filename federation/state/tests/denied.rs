//! Revoking SVIDs: what is refused, from when on, for how long, and who is told.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use ambit_model::policy::Endpoint;
use ambit_model::record::{Head, Kind, Record};
use ambit_model::{Code, Entry, EntryExtras, Extras, Generation, IdDenial, Revision, SpiffeId, Stamp, SvidTtl};
use ambit_state::command::{LeafRequest, Presence};
use ambit_state::committed::Subject;
use ambit_state::objects::{TokenRow, TokenScope};
use ambit_state::{Command, IdVerb, Issuance, Reply, State};
use common::{Cell, admission, cluster, code, entry, node, pending};

const NOW: u64 = 1_000_000;
/// An hour, and the margin for clocks.
const KEPT_MS: u64 = 3_600_000 + 300_000;

/// A cell with an admitted node and the entries `web` and `db`.
fn cell() -> Cell {
    let mut cell = Cell::founded("west");
    let token = TokenRow { scope: TokenScope::Node(cluster("west")), expires: Stamp(2 * NOW), used: false };
    cell.run(Command::CreateToken([1; 32], token)).unwrap();
    let admission = admission(&cell, 1, 1, Some([1; 32]));
    cell.run(Command::AdmitNode(admission)).unwrap();
    cell.run(Command::CreateEntries(vec![entry("web", "west"), entry("db", "west")])).unwrap();
    cell
}

fn id(text: &str) -> SpiffeId {
    text.parse().unwrap()
}

fn leaf(cell: &mut Cell, of: &str) -> Result<Issuance, Code> {
    let leaves = vec![LeafRequest { entry: of.parse().unwrap(), key_hash: [4; 32] }];
    let issue = Command::Issue { node: node(1), generation: Generation(1), authority: "a1".into(), leaves };
    match cell.run(issue).unwrap() {
        Reply::Leaves(mut leaves) => leaves.remove(0).map_err(|refusal| refusal.code),
        other => panic!("{other:?}"),
    }
}

fn denied(state: &State, leaf: &Issuance) -> bool {
    state.svid_denied(&leaf.spiffe_id, &leaf.authority, &leaf.serial)
}

fn endpoint(of: &str, last: u8) -> Endpoint {
    Endpoint {
        spiffe_id: id(&format!("spiffe://west/{of}")),
        address: [10, 0, 0, last].into(),
        cluster: cluster("west"),
        node_address: [10, 9, 0, 1].into(),
        node: node(1),
        generation: Generation(1),
    }
}

fn retire(ids: &[&str]) -> Command {
    Command::RemoveEntries(ids.iter().map(|id| (id.parse().unwrap(), Presence::There)).collect())
}

fn replace(entry: Entry) -> Command {
    Command::ReplaceEntries(vec![(entry, Presence::There)])
}

#[test]
fn what_was_issued_under_a_deleted_entry_is_refused_and_told_before_anything_else() {
    let mut cell = cell();
    let (web, db) = (leaf(&mut cell, "web").unwrap(), leaf(&mut cell, "db").unwrap());
    cell.run(Command::ReportEndpoints(node(1), vec![endpoint("web", 1), endpoint("db", 2)])).unwrap();
    let before = cell.state.cell().unwrap().export_seq;
    // One that is not as it was read stays, and nothing of it is revoked.
    let stale = ("db".parse().unwrap(), Presence::At(Revision(1_000)));
    let there = |id: &str| (id.parse().unwrap(), Presence::There);
    let outcome = cell.run(Command::RemoveEntries(vec![there("web"), there("ghost"), stale, there("web")])).unwrap();
    let Reply::Items(items) = outcome else { panic!("{outcome:?}") };
    let codes: Vec<_> = items.into_iter().map(|item| item.err().map(|r| r.code)).collect();
    assert_eq!(codes, [None, Some(Code::NotFound), Some(Code::StaleRevision), Some(Code::NotFound)]);
    assert!(denied(&cell.state, &web) && !denied(&cell.state, &db));
    let told: Vec<(Kind, String)> = cell.state.records_after(before).map(|r| (r.kind, r.key.clone())).collect();
    assert_eq!(told, [(Kind::IdDenial, "spiffe://west/web".to_owned()), (Kind::Endpoint, "10.0.0.1".to_owned())]);
    let slice = cell.state.slice(&node(1)).unwrap();
    assert_eq!(slice.svid_denials.ids.len(), 1);
    assert_eq!(slice.endpoints, [endpoint("db", 2)]);
    // The same identity, registered anew, has SVIDs that are good; what was refused stays so.
    cell.run(Command::CreateEntries(vec![entry("web", "west")])).unwrap();
    let anew = leaf(&mut cell, "web").unwrap();
    assert!(!denied(&cell.state, &anew) && denied(&cell.state, &web));
    // Kept until no clock can take the last of them for valid, and forgotten then.
    cell.at(NOW + KEPT_MS, 0, Command::Tick).unwrap();
    assert!(denied(&cell.state, &web));
    let again = State::import(cell.state.export()).unwrap();
    assert!(denied(&again, &web) && again.digest() == cell.state.digest());
    cell.at(NOW + KEPT_MS + 1, 0, Command::Tick).unwrap();
    assert!(!denied(&cell.state, &web) && cell.state.id_denials().count() == 0);
}

fn ends(expires_at: Stamp) -> Extras {
    Extras::new(EntryExtras { expires_at, ..EntryExtras::NONE }).unwrap()
}

#[test]
fn an_update_revokes_where_it_changes_who_may_have_the_identity() {
    let nodes = [node(1)].into();
    for (what, new, revokes) in [
        ("another identity", Entry { spiffe_id: id("spiffe://west/other"), ..entry("web", "west") }, true),
        ("other selectors", Entry { selectors: ["cgroup:web".parse().unwrap()].into(), ..entry("web", "west") }, true),
        ("other nodes", Entry { nodes, ..entry("web", "west") }, true),
        ("another lifetime", Entry { ttl: SvidTtl::try_from(60).unwrap(), ..entry("web", "west") }, false),
        ("other bundles", Entry { federates_with: ["east".parse().unwrap()].into(), ..entry("web", "west") }, false),
        ("an end to come", Entry { extras: ends(Stamp(3 * NOW)), ..entry("web", "west") }, true),
        ("nothing", entry("web", "west"), false),
    ] {
        let mut cell = cell();
        let web = leaf(&mut cell, "web").unwrap();
        cell.run(Command::ReportEndpoints(node(1), vec![endpoint("web", 1)])).unwrap();
        let moves = new.spiffe_id != web.spiffe_id;
        cell.run(replace(new)).unwrap();
        assert_eq!(denied(&cell.state, &web), revokes, "{what}");
        assert_eq!(cell.state.endpoints().count(), usize::from(!moves), "{what}: endpoints of the former identity");
        let anew = leaf(&mut cell, "web").unwrap();
        assert!(!denied(&cell.state, &anew), "{what}");
    }
    // Refused whole: nothing is revoked.
    let mut cell = cell();
    let web = leaf(&mut cell, "web").unwrap();
    let foreign = Entry { spiffe_id: id("spiffe://east/web"), ..entry("web", "west") };
    cell.run(replace(foreign)).unwrap();
    assert!(!denied(&cell.state, &web));
}

#[test]
fn an_identity_of_two_entries_keeps_what_the_other_gave() {
    let mut cell = cell();
    let twin = Entry { spiffe_id: id("spiffe://west/web"), ..entry("twin", "west") };
    cell.run(Command::CreateEntries(vec![twin])).unwrap();
    let (web, twin) = (leaf(&mut cell, "web").unwrap(), leaf(&mut cell, "twin").unwrap());
    cell.run(retire(&["web"])).unwrap();
    assert!(denied(&cell.state, &web) && !denied(&cell.state, &twin));
    assert_eq!((cell.state.id_denials().count(), cell.state.leaf_denials().count()), (0, 1));
    cell.run(retire(&["twin"])).unwrap();
    assert!(denied(&cell.state, &twin));
    assert_eq!(cell.state.id_denials().count(), 1);
}

#[test]
fn an_entry_that_comes_to_make_more_than_a_workload_revokes_what_it_gave_before() {
    let with = |change: fn(&mut EntryExtras)| {
        let mut extras = EntryExtras::NONE;
        change(&mut extras);
        Entry { extras: Extras::new(extras).unwrap(), nodes: [node(1)].into(), ..entry("web", "west") }
    };
    let (plain, admin) = (with(|_| ()), with(|e| e.admin = true));
    let downstream = with(|e| e.downstream = true);
    for (what, was, is, revokes) in [
        ("admin", &plain, &admin, true),
        ("downstream", &plain, &downstream, true),
        ("admin, from downstream", &downstream, &admin, true),
        ("downstream, from admin", &admin, &downstream, true),
        ("admin as before", &admin, &admin, false),
        ("no more than a workload", &admin, &plain, false),
    ] {
        for shared in [false, true] {
            let mut cell = cell();
            let twin = Entry { spiffe_id: id("spiffe://west/web"), ..entry("twin", "west") };
            cell.run(Command::CreateEntries(if shared { vec![twin] } else { vec![] })).unwrap();
            cell.run(replace(was.clone())).unwrap();
            let web = leaf(&mut cell, "web").unwrap();
            cell.run(replace(is.clone())).unwrap();
            assert_eq!(denied(&cell.state, &web), revokes, "{what}, {shared}");
            let anew = leaf(&mut cell, "web").unwrap();
            assert!(!denied(&cell.state, &anew), "{what}, {shared}");
        }
    }
}

#[test]
fn leaves_with_dns_names_go_with_their_entry_as_all_others_do() {
    let mut extras = EntryExtras::NONE;
    extras.dns_names = vec!["web.west.example".parse().unwrap()];
    let named = Entry { extras: Extras::new(extras).unwrap(), ..entry("web", "west") };
    let other = Entry { selectors: ["cgroup:web".parse().unwrap()].into(), ..named.clone() };
    for (what, command) in [("deleted", retire(&["web"])), ("other selectors", replace(other))] {
        let mut cell = cell();
        let twin = Entry { spiffe_id: id("spiffe://west/web"), ..entry("twin", "west") };
        cell.run(Command::CreateEntries(vec![twin])).unwrap();
        cell.run(replace(named.clone())).unwrap();
        let (web, twin) = (leaf(&mut cell, "web").unwrap(), leaf(&mut cell, "twin").unwrap());
        assert!(matches!(web.subject, Subject::NamedWorkload(..)));
        cell.run(command).unwrap();
        assert!(denied(&cell.state, &web) && !denied(&cell.state, &twin), "{what}");
    }
}

#[test]
fn a_barred_identity_has_nothing_until_it_is_lifted_and_what_it_had_stays_refused() {
    let mut cell = cell();
    let web = leaf(&mut cell, "web").unwrap();
    cell.run(Command::ReportEndpoints(node(1), vec![endpoint("web", 1)])).unwrap();
    let say = |verb| Command::DenyId(id("spiffe://west/web"), verb);
    assert_eq!(code(cell.run(say(IdVerb::Lift))), Code::NotFound);
    cell.run(say(IdVerb::Bar)).unwrap();
    assert!(denied(&cell.state, &web) && cell.state.endpoints().count() == 0);
    assert!(cell.state.svid_denied(&web.spiffe_id, "another", &[255; 16]), "whatever it shows");
    assert_eq!(leaf(&mut cell, "web").unwrap_err(), Code::EntryNotOnNode);
    assert!(!cell.state.slice(&node(1)).unwrap().entries.iter().any(|e| e.id.as_str() == "web"));
    // Neither a revocation nor time ends it.
    cell.run(say(IdVerb::Revoke)).unwrap();
    cell.at(NOW + 10 * KEPT_MS, 0, Command::Tick).unwrap();
    assert!(cell.state.barred(&web.spiffe_id));
    cell.run(say(IdVerb::Lift)).unwrap();
    assert!(!cell.state.barred(&web.spiffe_id) && denied(&cell.state, &web));

    let mut cell = self::cell();
    let web = leaf(&mut cell, "web").unwrap();
    cell.run(say(IdVerb::Revoke)).unwrap();
    let anew = leaf(&mut cell, "web").unwrap();
    assert!(denied(&cell.state, &web) && !denied(&cell.state, &anew));
    let replica = Command::DenyId(id("spiffe://west/ambit/replica/1"), IdVerb::Bar);
    assert_eq!(code(cell.run(replica)), Code::BadRequest);
}

#[test]
fn one_leaf_is_refused_by_authority_and_serial_and_stands_in_the_crl() {
    let mut cell = cell();
    let (web, db) = (leaf(&mut cell, "web").unwrap(), leaf(&mut cell, "db").unwrap());
    let deny = |authority: &str, serial: &[u8]| Command::DenyLeaf(authority.into(), serial.to_vec());
    assert_eq!(code(cell.run(deny("nobody", &web.serial))), Code::AuthorityMismatch);
    for serial in [&[][..], &[1; 21]] {
        assert_eq!(code(cell.run(deny("a1", serial))), Code::BadRequest);
    }
    cell.run(deny("a1", &web.serial)).unwrap();
    assert!(denied(&cell.state, &web) && !denied(&cell.state, &db));
    assert!(!cell.state.svid_denied(&id("spiffe://east/web"), "a1", &web.serial), "of another trust domain");
    // What no record tells of is refused as long as its issuer lives.
    cell.run(deny("a1", &[7; 16])).unwrap();
    let until: Vec<u64> = cell.state.leaf_denials().map(|(_, denial)| denial.until.0).collect();
    assert_eq!(until, [1_000_000_000 + 300_000, web.lifetime.not_after.0 + 300_000]);
    // DER writes a zero before a first bit that is set; it is the same number.
    let zero_first = [&[0], web.serial.as_slice()].concat();
    cell.run(deny("a1", &zero_first)).unwrap();
    assert_eq!(cell.state.leaf_denials().count(), 2);
    cell.run(retire(&["db"])).unwrap();
    let crl = |cell: &Cell, of: &str| {
        let mut serials: Vec<Vec<u8>> =
            cell.state.revoked_leaves(of).get().leaves.iter().map(|(s, _)| s.clone()).collect();
        serials.sort();
        serials
    };
    assert!(!cell.state.svid_denials().leaves.is_empty());
    let mut all = vec![web.serial.to_vec(), db.serial.to_vec(), vec![7; 16]];
    all.sort();
    assert_eq!(crl(&cell, "a1"), all);
    assert!(crl(&cell, "a2").is_empty());
    // A node that is out takes all its leaves along, its own too.
    cell.run(Command::SetNodes(ambit_state::NodeVerb::Ban, ambit_state::Nodes::Ids(vec![node(1)]))).unwrap();
    assert_eq!(crl(&cell, "a1").len(), 4);
}

#[test]
fn a_leaf_of_a_former_intermediate_is_refused_by_name_and_all_of_one_that_is_revoked() {
    let mut cell = cell();
    let (web, db) = (leaf(&mut cell, "web").unwrap(), leaf(&mut cell, "db").unwrap());
    cell.run(Command::RenewAuthority { replica: 1, key_hash: [5; 32], lifetime_ms: 86_400_000 }).unwrap();
    cell.run(Command::DenyLeaf("a1".into(), web.serial.to_vec())).unwrap();
    assert!(denied(&cell.state, &web) && !denied(&cell.state, &db));
    cell.run(Command::TaintAuthority("a1".into())).unwrap();
    assert!(!denied(&cell.state, &db), "tainted is not revoked");
    cell.run(Command::RevokeAuthority("a1".into())).unwrap();
    assert!(denied(&cell.state, &db), "on connections that were open before, too");
    assert!(!cell.state.svid_denied(&id("spiffe://east/db"), "a1", &db.serial), "of another trust domain");
}

#[test]
fn the_denial_of_an_administrator_lasts_as_long_as_their_certificates() {
    let mut cell = cell();
    let operator = [ambit_model::AdminRole::Operator].into();
    let (admin, by) = ("ada".parse().unwrap(), String::new());
    cell.run(Command::ChangeRoles { admin, change: ambit_state::RoleChange::Grant(operator), by }).unwrap();
    let certify = Command::CertifyAdmin { admin: "ada".parse().unwrap(), key_hash: [4; 32], authority: "a1".into() };
    let Reply::Leaves(mut leaves) = cell.run(certify).unwrap() else { panic!("no leaf") };
    let ada = leaves.remove(0).unwrap();
    cell.run(Command::DenyId(ada.spiffe_id.clone(), IdVerb::Revoke)).unwrap();
    cell.at(ada.lifetime.not_after.0 + 300_000, 0, Command::Tick).unwrap();
    assert!(denied(&cell.state, &ada));
    cell.at(ada.lifetime.not_after.0 + 300_001, 0, Command::Tick).unwrap();
    assert_eq!(cell.state.id_denials().count(), 0);
}

#[test]
fn the_last_federation_admin_is_not_denied_and_a_restore_lets_the_founder_in() {
    let mut cell = cell();
    let say = |of: &str, verb| Command::DenyId(id(&format!("spiffe://west/ambit/admin/{of}")), verb);
    let change =
        |admin: &str, change| Command::ChangeRoles { admin: admin.parse().unwrap(), change, by: String::new() };
    let roles = || [ambit_model::AdminRole::FederationAdmin].into();
    for verb in [IdVerb::Bar, IdVerb::Revoke] {
        assert_eq!(code(cell.run(say("founder", verb))), Code::LastAdmin);
    }
    cell.run(change("ada", ambit_state::RoleChange::Grant(roles()))).unwrap();
    cell.run(say("founder", IdVerb::Bar)).unwrap();
    // Who is denied is no other one.
    assert_eq!(code(cell.run(say("ada", IdVerb::Bar))), Code::LastAdmin);
    assert_eq!(code(cell.run(change("ada", ambit_state::RoleChange::RevokeAll))), Code::LastAdmin);
    let founder = id("spiffe://west/ambit/admin/founder");
    let member = cell.state.member(1).unwrap().clone();
    let mut restored = State::import(cell.state.export()).unwrap();
    let cause = ambit_state::objects::Cause::Restored;
    let begin = ambit_state::Beginning { cause, replica: 1, member, admit: None, past_epoch: 0, keys: None };
    restored.begin_incarnation(Stamp(NOW), begin).unwrap();
    assert!(cell.state.barred(&founder) && !restored.barred(&founder));
    // What they had when they were barred stays refused; what this incarnation issues is not.
    let denial = |state: &State| *state.id_denials().next().unwrap().1;
    assert_eq!(denial(&restored), IdDenial { barred: false, ..denial(&cell.state) });
}

#[test]
fn denials_are_bounded_a_peers_use_none_of_the_cells_own_and_a_clusters_administrator_leaves_some() {
    let mut cell = cell();
    let deny = |n: usize| Command::DenyId(id(&format!("spiffe://west/cluster/west/{n}")), IdVerb::Revoke);
    let within = |command| Command::Within([cluster("west")].into(), Box::new(command));
    // A thousand at once: entries come and go.
    let fill = |cell: &mut Cell, thousand: usize| {
        let entries: Vec<Entry> = (0..1_000).map(|n| entry(&format!("e{}", thousand * 1_000 + n), "west")).collect();
        let ids = entries.iter().map(|entry| entry.id.clone()).collect();
        cell.run(Command::CreateEntries(entries)).unwrap();
        Command::RetireEntries(ids)
    };
    for thousand in 0..18 {
        let retire = fill(&mut cell, thousand);
        cell.run(within(retire)).unwrap();
    }
    assert_eq!(code(cell.run(within(deny(1)))), Code::Busy);
    assert_eq!(code(cell.run(within(retire(&["web"])))), Code::Busy);
    for thousand in 18..20 {
        let retire = fill(&mut cell, thousand);
        cell.run(retire).unwrap();
    }
    assert_eq!(code(cell.run(deny(1))), Code::Busy);
    cell.run(Command::DenyId(id("spiffe://west/e1"), IdVerb::Bar)).unwrap();
    // Nothing is half done: the entry is there, and what was issued under it is good.
    let web = leaf(&mut cell, "web").unwrap();
    for command in [retire(&["web"]), replace(Entry { spiffe_id: id("spiffe://west/new"), ..entry("web", "west") })] {
        assert_eq!(code(cell.run(command)), Code::Busy);
    }
    assert!(!denied(&cell.state, &web) && cell.state.entry(&"web".parse().unwrap()).is_some());
}

#[test]
fn single_leaves_of_entries_leave_room_for_those_that_an_operator_names() {
    let mut cell = cell();
    for n in 0u32..18_000 {
        cell.run(Command::DenyLeaf("a1".into(), [[7; 12].as_slice(), &n.to_be_bytes()].concat())).unwrap();
    }
    let another = Entry { spiffe_id: id("spiffe://west/web"), ..entry("another", "west") };
    cell.run(Command::CreateEntries(vec![another])).unwrap();
    let web = leaf(&mut cell, "web").unwrap();
    // It would be one more leaf, as the other entry's are good; without room all of the identity so far is refused.
    cell.run(retire(&["web"])).unwrap();
    assert!(denied(&cell.state, &web));
    assert_eq!((cell.state.leaf_denials().count(), cell.state.id_denials().count()), (18_000, 1));
    cell.run(Command::DenyLeaf("a1".into(), vec![8; 16])).unwrap();
}

fn record(seq: u64, prev_hash: [u8; 32], kind: Kind, key: &str, payload: Vec<u8>) -> Record {
    Record { origin: "east".parse().unwrap(), epoch: 1, seq, prev_hash, kind, key: key.into(), payload }
}

#[test]
fn a_peer_denies_its_own_identities_only_and_takes_nothing_back() {
    let mut cell = cell();
    cell.run(Command::PutPeer("east".parse().unwrap(), pending(), None)).unwrap();
    cell.run(Command::ApprovePeer("east".parse().unwrap(), [7; 32])).unwrap();
    let web = leaf(&mut cell, "web").unwrap();
    let all = |up_to: u8, barred| {
        let denial = IdDenial { up_to: [up_to; 16], barred, since: Stamp(NOW), until: Stamp(NOW + KEPT_MS) };
        postcard::to_stdvec(&denial).unwrap()
    };
    let leaf_denial = ambit_model::LeafDenial { since: Stamp(1), until: Stamp(2 * NOW) };
    let leaf_denial = postcard::to_stdvec(&leaf_denial).unwrap();
    let mut prev = [0; 32];
    for (seq, (kind, key, payload)) in [
        (Kind::IdDenial, "spiffe://west/web", all(255, true)),
        (Kind::IdDenial, "spiffe://east/db", all(5, false)),
        (Kind::IdDenial, "spiffe://east/db", all(3, false)),
        (Kind::IdDenial, "spiffe://east/db", vec![]),
        (Kind::LeafDenial, &format!("{}/07", "a1".repeat(20)), leaf_denial.clone()),
        (Kind::LeafDenial, "a1/07", leaf_denial.clone()),
        (Kind::LeafDenial, &format!("{}/0088", "a1".repeat(20)), leaf_denial.clone()),
        (Kind::LeafDenial, &format!("{}/{}", "a1".repeat(20), "07".repeat(21)), leaf_denial.clone()),
        (Kind::LeafDenial, &format!("{}/", "a1".repeat(20)), leaf_denial),
    ]
    .into_iter()
    .enumerate()
    {
        let record = record(seq as u64 + 1, prev, kind, key, payload);
        prev = record.hash();
        let head = Head {
            origin: "east".parse().unwrap(),
            epoch: 1,
            seq: record.seq,
            hash: prev,
            stamp: Stamp(NOW),
            nonce: [0; 16],
        };
        cell.run(Command::Import(head, vec![record])).unwrap();
    }
    assert!(!denied(&cell.state, &web) && !cell.state.barred(&web.spiffe_id));
    let db = id("spiffe://east/db");
    assert!(cell.state.svid_denied(&db, "x", &[5; 16]) && !cell.state.svid_denied(&db, "x", &[6; 16]));
    let other = id("spiffe://east/other");
    assert!(cell.state.svid_denied(&other, &"a1".repeat(20), &[7]) && !cell.state.svid_denied(&other, "a1", &[7]));
    assert!(cell.state.svid_denied(&other, &"a1".repeat(20), &[0x88]), "the number, not how DER writes it");
    assert_eq!(cell.state.leaf_denials().count(), 2, "keys that no intermediate has, serials that no leaf has");
    assert!(!cell.state.svid_denied(&web.spiffe_id, "a1", &web.serial));
    // This cell may refuse more than a peer does, here; of their serials it knows nothing.
    assert_eq!(code(cell.run(Command::DenyId(db.clone(), IdVerb::Revoke))), Code::NotOwner);
    cell.run(Command::DenyId(db.clone(), IdVerb::Bar)).unwrap();
    assert!(cell.state.svid_denied(&db, "x", &[6; 16]) && cell.state.svid_denials().ids.len() == 1);
    assert!(!cell.state.records_after(0).any(|r| r.kind == Kind::IdDenial), "and does not speak for it");
}

#[test]
fn a_clusters_administrator_leaves_the_other_clusters_their_share() {
    let mut cell = cell();
    cell.run(Command::RegisterCluster(cluster("east"), vec![(common::ROOT.to_vec(), "lab".into())], 10_000)).unwrap();
    let deny = |of: &str, n: usize, verb| {
        let command = Command::DenyId(id(&format!("spiffe://west/cluster/{of}/{n}")), verb);
        Command::Within([cluster(of)].into(), Box::new(command))
    };
    // Half of the eighteen thousand each. Of entries that went no path tells any more whose they were.
    for thousand in 0..9 {
        let entries: Vec<Entry> = (0..1_000).map(|n| entry(&format!("e{}", thousand * 1_000 + n), "west")).collect();
        let ids = entries.iter().map(|entry| entry.id.clone()).collect();
        cell.run(Command::CreateEntries(entries)).unwrap();
        cell.run(Command::Within([cluster("west")].into(), Box::new(Command::RetireEntries(ids)))).unwrap();
    }
    assert_eq!(code(cell.run(deny("west", 1, IdVerb::Revoke))), Code::Busy);
    cell.run(deny("east", 1, IdVerb::Bar)).unwrap();
    cell.run(deny("east", 1, IdVerb::Lift)).unwrap();
    // Who administers the whole cell takes no cluster's share.
    cell.run(Command::DenyId(id("spiffe://west/cluster/west/2"), IdVerb::Revoke)).unwrap();
    let mut again = State::import(cell.state.export()).unwrap();
    std::mem::swap(&mut again, &mut cell.state);
    assert_eq!(code(cell.run(deny("west", 1, IdVerb::Revoke))), Code::Busy);
    // A share comes back with the denials that end.
    cell.at(NOW + KEPT_MS + 1, 0, Command::Tick).unwrap();
    cell.at(NOW + KEPT_MS + 1, 0, deny("west", 1, IdVerb::Revoke)).unwrap();
}
