//! Standby, grants and what follows from them, in three state machines that import each other's records. Signatures are
//! OpenSSL's.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

#[path = "common/approvers.rs"]
mod approvers;
mod common;

use ambit_model::act::{Act, Approval, Approved, Proposal};
use ambit_model::grant::{FailoverGrant, SignedGrant};
use ambit_model::record::{Head, Kind, Record};
use ambit_model::{Code, Generation, Refusal, Stamp, TrustDomain};
use ambit_state::command::{LeafRequest, NodeVerb, Nodes};
use ambit_state::grant::{Fences, GrantRecord, LeafFacts};
use ambit_state::{Command, Reply, State};
use approvers::Key;
use common::{Cell, admission, cluster, code, documents, entry, node};

const NOW: u64 = 1_000_000;
const HOUR: u64 = 3_600_000;
const ADMIN: &str = "spiffe://west/ambit/admin/founder";

fn td(name: &str) -> TrustDomain {
    name.parse().unwrap()
}

/// West, whose approvers are alice and bob, and its peers east and core.
struct Scene {
    west: Cell,
    east: Cell,
    core: Cell,
    alice: Key,
    bob: Key,
    nonce: u8,
}

impl Scene {
    fn new() -> Scene {
        let mut cells = ["west", "east", "core"].map(Cell::founded);
        for (cell, own) in cells.iter_mut().zip(["west", "east", "core"]) {
            for other in ["west", "east", "core"].into_iter().filter(|other| *other != own) {
                cell.run(Command::PutPeer(td(other), common::pending(), None)).unwrap();
                cell.run(Command::ApprovePeer(td(other), [7; 32])).unwrap();
            }
        }
        let [west, east, core] = cells;
        let mut scene = Scene { west, east, core, alice: Key::new(), bob: Key::new(), nonce: 0 };
        let add = Act::AddApprover("alice".parse().unwrap(), scene.alice.card());
        scene.west.run(Command::Act { act: add, approved: None, by: ADMIN.into() }).unwrap();
        let proposal = scene.proposal(Act::AddApprover("bob".parse().unwrap(), scene.bob.card()));
        scene.act(&proposal, &[0]).unwrap();
        scene.west.run(Command::AllowEk(cluster("west"), vec![node(1)])).unwrap();
        scene.west.run(Command::CreateEntries(vec![entry("db", "west")])).unwrap();
        let admit = admission(&scene.west, 1, 1, None);
        scene.west.run(Command::AdmitNode(admit)).unwrap();
        scene
    }
    fn proposal(&mut self, act: Act) -> Proposal {
        self.nonce += 1;
        Proposal { trust_domain: td("west"), epoch: 1, expires: Stamp(NOW + HOUR), nonce: [self.nonce; 16], act }
    }
    fn word(&self, proposal: &Proposal, by: &[usize]) -> Vec<Approval> {
        by.iter().map(|n| [&self.alice, &self.bob][*n].approve(proposal)).collect()
    }
    fn act(&mut self, proposal: &Proposal, by: &[usize]) -> Result<Reply, Refusal> {
        let Proposal { epoch, expires, nonce, act, .. } = proposal.clone();
        let approved = Approved { epoch, expires, nonce, approvals: self.word(proposal, by) };
        self.west.run(Command::Act { act, approved: Some(approved), by: ADMIN.into() })
    }
    fn name(&mut self, naming: &str) {
        let proposal = self.proposal(Act::NameStandby(naming.parse().unwrap()));
        self.act(&proposal, &[0, 1]).unwrap();
    }
    /// East is named so, and holds a grant of an hour in epoch 2, which nobody else has heard of.
    fn granted(naming: &str) -> Scene {
        let mut scene = Scene::new();
        scene.name(naming);
        scene.sync();
        let signed = scene.signed(scene.grant(2, NOW, HOUR), &[0, 1]);
        scene.east.run(fail_over(signed)).unwrap();
        scene
    }
    /// Everybody imports what everybody else decided, until nobody has news.
    fn sync(&mut self) {
        for _ in 0..3 {
            let Scene { west, east, core, .. } = self;
            pull(west, east);
            pull(west, core);
            pull(east, west);
            pull(east, core);
            pull(core, west);
            pull(core, east);
        }
    }
    fn grant(&self, epoch: u64, begins: u64, lasts: u64) -> FailoverGrant {
        let (home, holder) = (td("west"), td("east"));
        FailoverGrant { home, holder, epoch, begins: Stamp(begins), ends: Stamp(begins + lasts) }
    }
    fn signed(&mut self, grant: FailoverGrant, by: &[usize]) -> SignedGrant {
        let proposal = self.proposal(Act::FailOver(grant));
        SignedGrant { approvals: self.word(&proposal, by), proposal }
    }
    fn issue(&mut self, at: u64) -> Result<Reply, Refusal> {
        let leaf = LeafRequest { entry: "db".parse().unwrap(), key_hash: [3; 32] };
        let (node, generation) = (node(1), Generation(1));
        self.west.at(at, 0, Command::Issue { node, generation, authority: "a1".into(), leaves: vec![leaf] })
    }
}

fn pull(to: &mut Cell, from: &Cell) {
    let origin = from.state.cell().unwrap().trust_domain.clone();
    let after = to.state.peer(&origin).unwrap().seq;
    let records: Vec<Record> = from.state.records_after(after).cloned().collect();
    if let Some(last) = records.last() {
        let head = Head {
            origin,
            epoch: last.epoch,
            seq: last.seq,
            hash: last.hash(),
            stamp: from.state.stamp(),
            nonce: [0; 16],
        };
        let at = to.state.stamp().0;
        to.at(at.max(NOW), 0, Command::Import(head, records)).unwrap();
    }
}

/// All rows but the clock's, which counts entries.
fn bare(state: &State) -> Vec<ambit_state::TableWrite> {
    state.rows().filter(|row| row.table != 1).collect()
}

fn fail_over(signed: SignedGrant) -> Command {
    Command::FailOver(Box::new(signed), "spiffe://east/ambit/admin/founder".into())
}

/// Each bad grant by the code of its own, and none changes anything.
#[test]
fn every_bad_grant_is_refused_by_a_code_of_its_own_and_changes_nothing() {
    let mut scene = Scene::new();
    let early = scene.grant(2, NOW, HOUR);
    let early = scene.signed(early, &[0, 1]);
    assert_eq!(code(scene.east.run(fail_over(early))), Code::StandbyUnknown, "nobody is named yet");
    scene.name("east");
    scene.sync();
    let (day, second) = (24 * HOUR, 1_000);
    let good = scene.grant(2, NOW, 12 * HOUR);
    let over = FailoverGrant { holder: td("core"), ..good.clone() };
    for (what, grant, by, refused) in [
        ("one person's", good.clone(), vec![0], Code::ApprovalMissing),
        ("nobody's", good.clone(), vec![], Code::ApprovalMissing),
        ("one approver's who signed twice", good.clone(), vec![0, 0], Code::ApprovalRepeated),
        ("of a day and a second", scene.grant(2, NOW, day + second), vec![0, 1], Code::GrantWindow),
        ("of no time", scene.grant(2, NOW, 0), vec![0, 1], Code::GrantWindow),
        ("of half a second", scene.grant(2, NOW, 500), vec![0, 1], Code::GrantWindow),
        ("that is over", scene.grant(2, NOW - 60_000, 30_000), vec![0, 1], Code::GrantExpired),
        ("of the day after tomorrow", scene.grant(2, NOW + 2 * day, HOUR), vec![0, 1], Code::GrantWindow),
        ("of the home's own epoch", scene.grant(1, NOW, HOUR), vec![0, 1], Code::GrantReplayed),
        ("to another", over, vec![0, 1], Code::GrantHolder),
        ("of an epoch without end", scene.grant(u64::MAX, NOW, HOUR), vec![0, 1], Code::BadRequest),
    ] {
        let before = bare(&scene.east.state);
        let signed = scene.signed(grant, &by);
        assert_eq!(code(scene.east.run(fail_over(signed))), refused, "{what}");
        assert!(bare(&scene.east.state) == before, "{what}");
    }
    // Altered after it was signed, signed for another home, and by a key that is no approver's.
    let signed = scene.signed(good.clone(), &[0, 1]);
    let mut longer = signed.clone();
    longer.proposal.act = Act::FailOver(scene.grant(2, NOW, 13 * HOUR));
    assert_eq!(code(scene.east.run(fail_over(longer))), Code::ApprovalInvalid);
    let mut of_another = signed.clone();
    of_another.proposal.trust_domain = td("core");
    assert_eq!(code(scene.east.run(fail_over(of_another))), Code::BadRequest);
    let mut stranger = signed.clone();
    stranger.approvals[1] = Key::new().approve(&stranger.proposal);
    assert_eq!(code(scene.east.run(fail_over(stranger))), Code::ApprovalInvalid);
    // Committed where it is of no use.
    assert_eq!(code(scene.core.run(fail_over(signed.clone()))), Code::GrantHolder);
    let mut stale = signed.clone();
    stale.proposal.expires = Stamp(NOW - 1);
    stale.approvals = scene.word(&stale.proposal, &[0, 1]);
    assert_eq!(code(scene.east.run(fail_over(stale))), Code::GrantExpired, "what was proposed long ago");

    scene.east.run(fail_over(signed.clone())).unwrap();
    assert_eq!(code(scene.east.run(fail_over(signed))), Code::GrantReplayed, "the same once more");
    let same_epoch = scene.signed(scene.grant(2, NOW, HOUR), &[0, 1]);
    assert_eq!(code(scene.east.run(fail_over(same_epoch))), Code::GrantReplayed, "another of the same epoch");
    assert!(scene.east.state.holds(&td("west")).is_ok(), "without a witness it is in effect at once");
}

#[test]
fn a_standby_is_named_by_two_approvers_and_told_to_peers_with_whose_word_a_grant_takes() {
    let mut scene = Scene::new();
    let naming = Act::NameStandby("east with witness core and lease 8 s".parse().unwrap());
    for (by, refused) in
        [(vec![], Code::ApprovalMissing), (vec![1], Code::ApprovalMissing), (vec![1, 1], Code::ApprovalInvalid)]
    {
        let proposal = scene.proposal(naming.clone());
        assert_eq!(code(scene.act(&proposal, &by)), refused);
    }
    for (naming, refused) in [
        ("north", Code::PeerNotActive),
        ("west", Code::BadRequest),
        ("east with witness north and lease 8 s", Code::PeerNotActive),
        ("east with witness east and lease 8 s", Code::BadRequest),
        ("east with witness core and lease 901 s", Code::BadRequest),
    ] {
        let proposal = scene.proposal(Act::NameStandby(naming.parse().unwrap()));
        assert_eq!(code(scene.act(&proposal, &[0, 1])), refused, "{naming}");
    }
    let proposal = scene.proposal(Act::RemoveStandby);
    assert_eq!(code(scene.act(&proposal, &[0, 1])), Code::NotFound);
    scene.name("east with witness core and lease 8 s");
    assert!(!scene.west.state.own_standby().unwrap().settled);
    scene.sync();
    for cell in [&scene.east, &scene.core] {
        let row = cell.state.standbys().find(|(home, _)| **home == td("west")).unwrap().1;
        assert_eq!(row.naming.as_ref().unwrap().to_string(), "east with witness core and lease 8 s");
        let keys: Vec<_> = cell.state.approver_keys(&td("west")).unwrap().values().copied().collect();
        assert_eq!(keys, [scene.alice.public(), scene.bob.public()]);
        assert_eq!(cell.state.renews(&td("west"), 1), Ok(8_000));
    }
    assert!(scene.west.state.own_standby().unwrap().settled, "the standby has heard of it");
    assert_eq!(scene.core.state.renews(&td("east"), 1).unwrap_err().code, Code::StandbyUnknown);

    // Who is to be standby no more may still act on what it knows: the home signs under that lease too until it has heard.
    let proposal = scene.proposal(Act::RemoveStandby);
    scene.act(&proposal, &[0, 1]).unwrap();
    assert_eq!(scene.west.state.namings().len(), 1, "the former one");
    let proposal = scene.proposal(Act::NameStandby("core".parse().unwrap()));
    assert_eq!(code(scene.act(&proposal, &[0, 1])), Code::StandbyUnsettled);
    scene.sync();
    assert!(scene.west.state.namings().is_empty());
    assert_eq!(scene.east.state.renews(&td("west"), 1).unwrap_err().code, Code::StandbyUnknown);
    let signed = scene.signed(scene.grant(2, NOW, HOUR), &[0, 1]);
    assert_eq!(code(scene.east.run(fail_over(signed))), Code::StandbyUnknown);
    scene.act(&proposal, &[0, 1]).unwrap();
}

#[test]
fn with_a_witness_a_grant_takes_effect_when_the_witness_has_heard_and_the_lease_has_run_out() {
    let mut scene = Scene::granted("east with witness core and lease 8 s");
    let holds = |scene: &Scene| scene.east.state.holds(&td("west")).map(|(grant, _)| grant.epoch).map_err(|r| r.code);
    // From this entry on the standby renews nothing; the witness still does.
    assert_eq!(scene.east.state.renews(&td("west"), 1).unwrap_err().code, Code::EpochFenced);
    assert_eq!(scene.core.state.renews(&td("west"), 1), Ok(8_000));
    scene.east.at(NOW + HOUR / 2, 0, Command::Tick).unwrap();
    assert_eq!(holds(&scene), Err(Code::StandbyUngranted), "however long it waits");
    pull(&mut scene.core, &scene.east);
    assert_eq!(scene.core.state.renews(&td("west"), 1).unwrap_err().code, Code::EpochFenced);
    assert_eq!(holds(&scene), Err(Code::StandbyUngranted), "it has not heard that the witness has");
    pull(&mut scene.east, &scene.core);
    assert_eq!(scene.east.state.unrenewed(), [(td("west"), 2)]);
    // 8 s, and an eighth of it and a second.
    for (ms, held) in [(0, false), (8_000, false), (9_999, false), (10_000, true)] {
        scene.east.at(NOW + HOUR / 2 + ms, 0, Command::Tick).unwrap();
        assert_eq!(holds(&scene).is_ok(), held, "{ms}");
    }
    scene.east.at(NOW + HOUR, 0, Command::Tick).unwrap();
    assert_eq!(holds(&scene), Err(Code::StandbyUngranted), "it is over");
}

/// On its return the home is told by its peer, signs nothing, and takes its authority back once the grant is over.
#[test]
fn the_home_that_returns_signs_nothing_until_it_takes_its_authority_back_in_a_later_epoch() {
    let mut scene = Scene::granted("east");
    assert!(matches!(scene.issue(NOW).unwrap(), Reply::Leaves(l) if l[0].is_ok()), "it does not know yet");
    assert_eq!(code(scene.west.run(Command::TakeBack(ADMIN.into()))), Code::NotFound);
    // Whom it named since, and which of its approvers left, is no argument.
    let proposal = scene.proposal(Act::RemoveStandby);
    scene.act(&proposal, &[0, 1]).unwrap();
    let proposal = scene.proposal(Act::RemoveApprover("bob".parse().unwrap()));
    scene.act(&proposal, &[0, 1]).unwrap();
    scene.sync();
    assert_eq!(code(scene.issue(NOW)), Code::EpochFenced);
    assert_eq!(scene.west.state.fenced().unwrap().code, Code::EpochFenced);
    let admit = admission(&scene.west, 1, 2, None);
    assert_eq!(code(scene.west.run(Command::AdmitNode(admit))), Code::EpochFenced);
    assert_eq!(code(scene.west.run(Command::TakeBack(ADMIN.into()))), Code::EpochFenced, "the grant lasts");
    // Its administrators are certified all the same: somebody must take it back.
    let (name, key_hash, authority) = ("founder".to_owned(), [4; 32], "a1".to_owned());
    scene.west.run(Command::IssueAdmin { name, key_hash, authority }).unwrap();

    // Released before its end: a minute later the home may.
    assert_eq!(code(scene.core.run(Command::ReleaseGrant(td("west"), "me".into()))), Code::NotFound);
    scene.east.run(Command::ReleaseGrant(td("west"), "me".into())).unwrap();
    assert!(scene.east.state.holds(&td("west")).is_err());
    scene.sync();
    assert_eq!(code(scene.west.run(Command::TakeBack(ADMIN.into()))), Code::EpochFenced);
    scene.west.at(NOW + 60_000, 0, Command::TakeBack(ADMIN.into())).unwrap();
    assert_eq!((scene.west.state.cell().unwrap().epoch, scene.west.state.fenced()), (3, None));
    assert!(scene.west.state.tainted_authorities().contains("a1"), "what it signed before is issued anew");
    scene
        .west
        .at(NOW + 60_001, 0, Command::RenewAuthority { replica: 1, key_hash: [9; 32], lifetime_ms: HOUR })
        .unwrap();
    let (node, generation) = (node(1), Generation(1));
    let leaves = vec![LeafRequest { entry: "db".parse().unwrap(), key_hash: [3; 32] }];
    let authority = hex_of(&[9; 20]);
    let issue = Command::Issue { node, generation, authority, leaves };
    let Reply::Leaves(leaves) = scene.west.at(NOW + 60_002, 0, issue).unwrap() else { panic!("leaves") };
    assert_eq!(leaves[0].as_ref().unwrap().epoch, 3);
}

fn hex_of(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Of a fenced epoch bans and revocations are taken, always; the rest is listed, and kept or dropped by a verb.
#[test]
fn a_late_ban_is_taken_and_a_late_policy_waits_for_a_word() {
    let mut scene = Scene::granted("east");
    pull(&mut scene.core, &scene.east);
    // The home does not hear of it, and goes on.
    scene.west.run(Command::SetNodes(NodeVerb::Ban, Nodes::Ids([node(1)].into()))).unwrap();
    let yaml = "kind: Policy\nmetadata: {name: late}\nspec: {target: 'spiffe://west/db', action: allow, from: ['spiffe://east/web']}\n";
    documents::apply(&mut scene.west, yaml).unwrap();
    let proposal = scene.proposal(Act::RemoveApprover("bob".parse().unwrap()));
    scene.act(&proposal, &[0, 1]).unwrap();
    for n in 0..2 {
        let cell = if n == 0 { &mut scene.east } else { &mut scene.core };
        pull(cell, &scene.west);
        let banned = cell.state.node_denials().any(|((of, id), _)| *of == td("west") && *id == node(1));
        assert!(banned, "a ban of an older epoch is never dropped");
        assert_eq!(cell.state.policies().count(), 0);
        let late: Vec<_> = cell.state.late_records().map(|((of, seq), r)| (of.clone(), *seq, r.kind)).collect();
        assert!(late.iter().any(|(of, _, kind)| *of == td("west") && *kind == Kind::Policy), "{late:?}");
    }
    let seq = scene.east.state.late_records().find(|(_, r)| r.kind == Kind::Policy).unwrap().0.1;
    let judge = |keep| Command::JudgeLate { origin: td("west"), seq, keep, by: "me".into() };
    scene.east.run(judge(true)).unwrap();
    scene.core.run(judge(false)).unwrap();
    assert_eq!((scene.east.state.policies().count(), scene.core.state.policies().count()), (1, 0));
    assert_eq!(code(scene.east.run(judge(true))), Code::NotFound, "one word each");
    // Who approves for the home is said by its newest record, and by no administrator of a peer.
    let seq = scene.east.state.late_records().find(|(_, r)| r.kind == Kind::Approvers).unwrap().0.1;
    let judge = |keep| Command::JudgeLate { origin: td("west"), seq, keep, by: "me".into() };
    assert_eq!(code(scene.east.run(judge(true))), Code::BadRequest);
    assert!(scene.east.state.late_records().any(|((_, of), _)| *of == seq), "nothing was done");
    scene.east.run(judge(false)).unwrap();
}

/// Whoever has two keys of approvers, of former ones too, and a peer that tells it: the home is not stopped for good.
#[test]
fn a_grant_that_can_never_have_been_good_fences_no_home() {
    for (epoch, begins, fenced) in
        [(2, NOW, true), (u64::MAX, NOW, false), (1 << 30, NOW, false), (2, NOW + 30 * 24 * HOUR, false)]
    {
        let mut scene = Scene::new();
        scene.name("east");
        scene.sync();
        let signed = scene.signed(scene.grant(epoch, begins, HOUR), &[0, 1]);
        let peer = scene.west.state.peer(&td("east")).unwrap();
        let said = GrantRecord::Granted(signed);
        let (seq, prev_hash, payload) = (peer.seq + 1, peer.hash, postcard::to_stdvec(&said).unwrap());
        let record =
            Record { origin: td("east"), epoch: 1, seq, prev_hash, kind: Kind::Grant, key: "west".into(), payload };
        let (origin, hash, stamp) = (td("east"), record.hash(), Stamp(NOW));
        let head = Head { origin, epoch: 1, seq, hash, stamp, nonce: [0; 16] };
        scene.west.at(NOW, 0, Command::Import(head, vec![record])).unwrap();
        assert_eq!(scene.west.state.fenced().is_some(), fenced, "epoch {epoch} from {begins}");
    }
}

/// A peer that tells a grant is not believed for it.
#[test]
fn a_peer_judges_a_grant_by_itself_and_takes_none_that_is_not_good() {
    for (what, forge) in
        [("signed by one", 0), ("told by who does not hold it", 1), ("under the key of another home", 2), ("good", 3)]
    {
        let mut scene = Scene::new();
        scene.name("east");
        scene.sync();
        let by: &[usize] = if forge == 0 { &[0] } else { &[0, 1] };
        let signed = scene.signed(scene.grant(2, NOW, HOUR), by);
        let (origin, key) = match forge {
            1 => ("west", "west"),
            2 => ("east", "core"),
            _ => ("east", "west"),
        };
        let peer = scene.core.state.peer(&td(origin)).unwrap();
        let record = Record {
            origin: td(origin),
            epoch: 1,
            seq: peer.seq + 1,
            prev_hash: peer.hash,
            kind: Kind::Grant,
            key: key.into(),
            payload: postcard::to_stdvec(&GrantRecord::Granted(signed)).unwrap(),
        };
        let (seq, hash) = (record.seq, record.hash());
        let head = Head { origin: td(origin), epoch: 1, seq, hash, stamp: Stamp(NOW), nonce: [0; 16] };
        scene.core.run(Command::Import(head, vec![record])).unwrap();
        assert_eq!(scene.core.state.grants().count(), usize::from(forge == 3), "{what}");
        assert_eq!(scene.core.state.peer(&td(origin)).unwrap().seq, seq, "{what}: the chain goes on");
    }
}

/// By hand: which leaf passes the fence of the grant of epoch 2 from second 1,000 to 4,600.
#[test]
fn who_knows_a_grant_accepts_these_leaves_and_no_others() {
    let mut scene = Scene::granted("east");
    pull(&mut scene.core, &scene.east);
    let fences = scene.core.state.fences();
    let slack = ambit_state::NOT_BEFORE_SLACK_MS;
    let judge =
        |fences: &Fences, path: &str, epoch, bound, issued: u64, lasts: u64, standby: Option<&str>, now: u64| {
            let id = format!("spiffe://west{path}").parse().unwrap();
            let (not_before, not_after) = (Stamp(issued - slack), Stamp(issued + lasts));
            let standby = standby.map(td);
            fences
                .judge(&LeafFacts { id: &id, epoch, bound, not_before, not_after, standby }, Stamp(now))
                .map_err(|r| r.code)
        };
    let (fenced, ungranted) = (Err(Code::EpochFenced), Err(Code::StandbyUngranted));
    let (minute, after) = (60_000, NOW + 60_000);
    for (what, path, epoch, bound, issued, lasts, standby, now, expected) in [
        ("the home's of before", "/db", 1, Some(1), NOW - 1_000, HOUR, None, after, Ok(())),
        ("the home's of after", "/db", 1, Some(1), NOW, HOUR, None, after, fenced),
        ("of the grant's own epoch", "/db", 2, Some(2), after, HOUR, None, after, fenced),
        ("of an epoch taken back", "/db", 3, Some(3), after, HOUR, None, after, Ok(())),
        ("of no epoch that the root named", "/db", 0, None, after, HOUR, None, after, fenced),
        ("with a later epoch by its own word only", "/db", 1, Some(9), after, HOUR, None, after, fenced),
        ("a replica of the home", "/ambit/replica/1", 1, None, after, HOUR, None, after, Ok(())),
        ("a node of the home", "/ambit/node/x", 1, Some(1), after, HOUR, None, after, fenced),
        ("the holder's", "/db", 0, Some(2), after, minute, Some("east"), after, Ok(())),
        ("another's", "/db", 0, Some(2), after, minute, Some("core"), after, ungranted),
        ("the holder's, in another epoch", "/db", 0, Some(1), after, minute, Some("east"), after, ungranted),
        ("the holder's, bound to nothing", "/db", 0, None, after, minute, Some("east"), after, ungranted),
        ("the holder's, longer than the grant", "/db", 0, Some(2), after, HOUR, Some("east"), after, ungranted),
        ("the holder's, of before", "/db", 0, Some(2), NOW - 1, minute, Some("east"), after, ungranted),
        ("the holder's, when the grant is over", "/db", 0, Some(2), after, minute, Some("east"), NOW + HOUR, ungranted),
        ("the holder's, as a replica", "/ambit/replica/1", 0, Some(2), after, minute, Some("east"), after, ungranted),
    ] {
        assert_eq!(judge(&fences, path, epoch, bound, issued, lasts, standby, now), expected, "{what}");
    }
    // The last grant is kept for its epoch, and fences no longer than anything of before it can be in time.
    let over = NOW + HOUR + ambit_state::grant::FENCE_MS;
    for (at, fenced_still) in [(over, true), (over + 1, false)] {
        scene.core.at(at, 0, Command::Tick).unwrap();
        assert_eq!(scene.core.state.fences() != Fences::default(), fenced_still, "at {at}");
        assert_eq!(scene.core.state.grants().count(), 1);
    }
    // Who knows of no grant believes no standby, and every epoch.
    let none = Fences::default();
    assert_eq!(judge(&none, "/db", 0, Some(2), after, minute, Some("east"), after), ungranted);
    assert_eq!(judge(&none, "/db", 1, Some(1), after, HOUR, None, after), Ok(()));
}

#[test]
fn a_standby_is_certified_in_peace_and_loses_it_with_its_place() {
    let mut scene = Scene::new();
    let certify = |holder: &str, n: u8| Command::CertifyStandby { holder: td(holder), replica: 1, key_hash: [n; 32] };
    assert_eq!(code(scene.west.run(certify("east", 1))), Code::StandbyUnknown);
    scene.name("east");
    assert_eq!(code(scene.west.run(certify("core", 1))), Code::StandbyUnknown);
    let Reply::Standby(one) = scene.west.run(certify("east", 1)).unwrap() else { panic!("an authority") };
    assert_eq!(one.lifetime.not_after, Stamp(NOW + 14 * 24 * HOUR));
    assert_eq!(code(scene.west.run(certify("east", 1))), Code::AlreadyExists);
    scene.sync();
    let proposal = scene.proposal(Act::RemoveStandby);
    scene.act(&proposal, &[0, 1]).unwrap();
    let denied = scene.west.state.denied_authorities();
    assert!(denied.contains(&(td("west"), hex_of(&[1; 20]))), "{denied:?}");
    assert_eq!(scene.west.state.standby_authorities().count(), 0);
}
