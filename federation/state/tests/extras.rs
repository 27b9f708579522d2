//! What some entries say beside the rest (hint, DNS names, TTLs, an end), and what administrators mint.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use ambit_model::{Audience, Code, Entry, EntryExtras, Extras, Generation, JwtTtl, Stamp, SvidTtl};
use ambit_state::command::{LeafRequest, Presence};
use ambit_state::{Command, Issuance, JwtIssuance, Reply, State};
use common::{Cell, admission, cluster, code, entry, node};

const T: u64 = 1_000_000;

fn cell() -> Cell {
    let mut west = Cell::founded("west");
    let key = Command::PutJwtAuthority(vec![1; 91], [(1, vec![1])].into());
    west.run(key).unwrap();
    west.run(Command::AllowEk(cluster("west"), vec![node(1)])).unwrap();
    let admit = admission(&west, 1, 1, None);
    west.run(Command::AdmitNode(admit)).unwrap();
    west
}

fn with(id: &str, extras: EntryExtras) -> Entry {
    Entry { extras: Extras::new(extras).unwrap(), ..entry(id, "west") }
}

fn statuses(reply: Result<Reply, ambit_model::Refusal>) -> Vec<Option<Code>> {
    let Ok(Reply::Items(items)) = reply else { panic!("items") };
    items.into_iter().map(|item| item.err().map(|r| r.code)).collect()
}

fn leaf(west: &mut Cell, stamp: u64, request: u8, id: &str) -> Result<Issuance, Code> {
    let leaves = vec![LeafRequest { entry: id.parse().unwrap(), key_hash: [3; 32] }];
    let issue = Command::Issue { node: node(1), generation: Generation(1), authority: "a1".into(), leaves };
    let Ok(Reply::Leaves(mut leaves)) = west.at(stamp, request, issue) else { panic!("leaves") };
    leaves.remove(0).map_err(|r| r.code)
}

fn token(west: &mut Cell, stamp: u64, id: &str) -> Result<JwtIssuance, Code> {
    let kid = west.state.jwt_signer().unwrap().kid.clone();
    let (entry, audience_sha256) = (id.parse().unwrap(), [7; 32]);
    match west.at(stamp, 0, Command::IssueJwt { node: node(1), generation: Generation(1), kid, entry, audience_sha256 })
    {
        Ok(Reply::Token(token)) => Ok(*token),
        Ok(other) => panic!("{other:?}"),
        Err(refusal) => Err(refusal.code),
    }
}

#[test]
fn what_an_entry_says_is_what_is_committed() {
    let mut west = cell();
    let names = vec!["web.west.example".parse().unwrap(), "*.web.west.example".parse().unwrap()];
    let said = EntryExtras { dns_names: names.clone(), jwt_ttl: JwtTtl::try_from(30).unwrap(), ..EntryExtras::NONE };
    west.run(Command::CreateEntries(vec![with("web", said), entry("db", "west")])).unwrap();
    assert_eq!(leaf(&mut west, T, 0, "web").unwrap().subject.dns_names(), names);
    assert_eq!(leaf(&mut west, T, 0, "db").unwrap().subject.dns_names(), []);
    assert_eq!(token(&mut west, T, "web").unwrap().not_after, Stamp(T + 30_000));
    assert_eq!(token(&mut west, T, "db").unwrap().not_after, Stamp(T + 300_000));
    // Another name is another leaf: what was committed before is not given again.
    assert!(leaf(&mut west, T, 7, "web").is_ok());
    let renamed = EntryExtras { dns_names: names[..1].to_vec(), ..EntryExtras::NONE };
    west.run(Command::PutEntries(vec![(with("web", renamed), Presence::There)])).unwrap();
    assert_eq!(leaf(&mut west, T, 7, "web"), Err(Code::EntryNotOnNode));
    // A restored replica knows all of it.
    assert_eq!(State::import(west.state.export()).unwrap().digest(), west.state.digest());
}

#[test]
fn an_entry_ends_with_all_that_was_issued_under_it() {
    let mut west = cell();
    let ending = |id, at| with(id, EntryExtras { expires_at: Stamp(at), ..EntryExtras::NONE });
    let create = Command::CreateEntries(vec![ending("over", T), ending("web", T + 10_000), ending("db", T + 20_000)]);
    assert_eq!(statuses(west.run(create)), [Some(Code::BadRequest), None, None]);
    assert_eq!(leaf(&mut west, T, 0, "web").unwrap().lifetime.not_after, Stamp(T + 10_000));
    assert_eq!(token(&mut west, T, "web").unwrap().not_after, Stamp(T + 10_000));
    assert_eq!(west.state.slice(&node(1)).unwrap().entries.len(), 2);
    // Its end moves with the entry.
    let later = Command::PutEntries(vec![(ending("db", T + 12_000), Presence::There)]);
    assert_eq!(statuses(west.at(T + 1, 0, later)), [None]);
    let before = west.state.cell().unwrap().revision;

    assert_eq!(leaf(&mut west, T + 10_000, 0, "web"), Err(Code::EntryNotOnNode), "also before a tick takes it away");
    assert_eq!(token(&mut west, T + 10_000, "web"), Err(Code::EntryNotOnNode));
    let mut restored = State::import(west.state.export()).unwrap();
    west.at(T + 10_000, 0, Command::Tick).unwrap();
    let ids = |state: &State| state.entries().map(|row| row.entry.id.to_string()).collect::<Vec<_>>();
    assert_eq!(ids(&west.state), ["db"]);
    assert!(west.state.cell().unwrap().revision > before, "slices are made anew");
    west.at(T + 12_000, 0, Command::Tick).unwrap();
    assert_eq!(ids(&west.state), [""; 0]);
    for entry in &west.log[west.log.len() - 2..] {
        let next = ambit_model::RaftIndex(restored.applied().0 + 1);
        restored.apply(next, entry);
    }
    assert_eq!(restored.digest(), west.state.digest(), "I13");
}

#[test]
fn what_is_minted_leaves_a_row_with_who_did_it() {
    let mut west = cell();
    let mint = |id: &str, authority: &str| Command::MintX509 {
        spiffe_id: id.parse().unwrap(),
        dns_names: vec!["ci.west.example".parse().unwrap()],
        ttl: SvidTtl::try_from(60).unwrap(),
        key_hash: [5; 32],
        authority: authority.into(),
        by: "spiffe://west/ambit/admin/ann".into(),
    };
    let kid = west.state.jwt_signer().unwrap().kid.clone();
    let mint_jwt = |id: &str, kid: &str| Command::MintJwt {
        spiffe_id: id.parse().unwrap(),
        audience_sha256: Audience::new(vec!["a".into()]).unwrap().sha256(),
        ttl: JwtTtl::try_from(30).unwrap(),
        kid: kid.into(),
        by: "spiffe://west/ambit/admin/ann".into(),
    };
    for bad in ["spiffe://east/ci", "spiffe://west/ambit/admin/ann", "spiffe://west/ambit/replica/1"] {
        assert_eq!(code(west.run(mint(bad, "a1"))), Code::NotOwner, "{bad}");
        assert_eq!(code(west.run(mint_jwt(bad, &kid))), Code::NotOwner, "{bad}");
    }
    assert_eq!(code(west.run(mint("spiffe://west/ci", "a2"))), Code::AuthorityMismatch);
    assert_eq!(code(west.run(mint_jwt("spiffe://west/ci", "k"))), Code::AuthorityMismatch);

    let Ok(Reply::Leaves(leaves)) = west.run(mint("spiffe://west/ci", "a1")) else { panic!("leaves") };
    let minted = leaves[0].as_ref().unwrap();
    assert_eq!((minted.lifetime.not_after, minted.binding), (Stamp(T + 60_000), None));
    assert_eq!(minted.subject.dns_names().len(), 1);
    assert!(west.state.issued().any(|row| row.subject.text() == "minted by spiffe://west/ambit/admin/ann"));
    let Ok(Reply::Token(token)) = west.run(mint_jwt("spiffe://west/ci", &kid)) else { panic!("token") };
    assert_eq!(token.not_after, Stamp(T + 30_000));
    let rows: Vec<_> = west.state.minted_tokens().map(|row| (row.jti, row.subject.text())).collect();
    assert_eq!(rows, [(token.jti, "minted by spiffe://west/ambit/admin/ann".to_owned())]);
}
