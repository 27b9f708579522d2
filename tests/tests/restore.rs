//! Backup, the loss of everything, and a cell that begins anew: from a backup, and from what one replica still had.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_proto::v1;
use ambit_proto::v1::entry_registry_client::EntryRegistryClient;
use ambit_proto::v1::membership_client::MembershipClient;
use ambit_tests::agent::{Admitted, Agent, RoundLies};
use ambit_tests::cell::{Cell, Seat, refusal};
use ambit_tests::machine::{Answer, Lies, Machine, evidence, join_token, register_cluster};
use ambit_tests::operator::{admit, create_entry, node, say, svid, within};
use ambit_tests::process::{Started, binary, must_run, run};
use ambit_tests::tpm::Maker;
use sha2::{Digest, Sha256};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::{Duration, Instant};

/// Long against elections of 300 ms: whoever disturbs has done it by then.
const QUIET: Duration = Duration::from_secs(3);

/// `ambit` with this context: exit code, standard output, standard error.
fn ambit(context: &Path, args: &[&str]) -> (i32, String, String) {
    let program = binary("ambit").unwrap().display().to_string();
    let context = context.display().to_string();
    let out = run(&[&[program.as_str(), "--context", &context, "--output", "json"], args].concat()).unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (out.status.code().unwrap(), text(out.stdout), text(out.stderr))
}

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// The code with which `ambitd` refused.
fn refused(out: &Output) -> String {
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success(), "accepted, where a refusal was due");
    said.split("error[").nth(1).and_then(|rest| rest.split(']').next()).unwrap_or(&said).to_owned()
}

fn printed(out: &Output) -> String {
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout.clone()).unwrap()
}

/// What follows `name:` on its line.
fn field(text: &str, name: &str) -> String {
    let line = text.lines().find(|l| l.starts_with(name)).unwrap_or_else(|| panic!("no {name} in {text}"));
    line[name.len()..].trim_start_matches(':').trim().to_owned()
}

/// The state's digest as the documents define it, from the bytes of a backup and with none of our code: the sum, in four
/// lanes of 64 bits, of the SHA-256 of every row, hashed once more. Rows lie in frames of length, CRC and postcard.
fn digest_of(file: &[u8]) -> String {
    fn number(bytes: &mut &[u8]) -> usize {
        let (mut value, mut shift) = (0usize, 0);
        loop {
            let byte = bytes[0];
            *bytes = &bytes[1..];
            value |= usize::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                return value;
            }
        }
    }
    fn take<'a>(bytes: &mut &'a [u8]) -> &'a [u8] {
        let len = number(bytes);
        let (taken, rest) = bytes.split_at(len);
        *bytes = rest;
        taken
    }
    let at = file.windows(8).position(|w| w == b"AMBSNP01").unwrap() + 8;
    let mut rest = &file[at..];
    let mut frame = || {
        let len = u32::from_le_bytes(rest[..4].try_into().unwrap()) as usize;
        let body = &rest[8..8 + len];
        rest = &rest[8 + len..];
        body
    };
    let header = frame();
    // The header ends with the number of chunks; fewer than 128 here, so one byte.
    let chunks = usize::from(*header.last().unwrap());
    let mut lanes = [0u64; 4];
    for _ in 0..chunks {
        let mut chunk = frame();
        for _ in 0..number(&mut chunk) {
            let table = chunk[0];
            chunk = &chunk[1..];
            let (key, value) = (take(&mut chunk), take(&mut chunk));
            let mut h = Sha256::new();
            h.update([table]);
            h.update((key.len() as u64).to_be_bytes());
            h.update(key);
            h.update(value);
            for (lane, part) in lanes.iter_mut().zip(h.finalize().chunks(8)) {
                *lane = lane.wrapping_add(u64::from_be_bytes(part.try_into().unwrap()));
            }
        }
    }
    let mut h = Sha256::new();
    lanes.iter().for_each(|lane| h.update(lane.to_be_bytes()));
    hex::encode(h.finalize())
}

/// What an operator keeps: a backup, and the root's key apart from it.
struct Kept {
    backup: PathBuf,
    root_key: PathBuf,
}

impl Kept {
    fn restore(&self, cell: &Cell, seat: &Seat, fingerprint: &[u8; 32], backup: &Path, admin: &Path) -> Output {
        let show = |path: &Path| path.display().to_string();
        let (backup, key, admin) = (show(backup), show(&self.root_key), show(admin));
        let print = hex::encode(fingerprint);
        let who = ["--trust-domain", cell.trust_domain.as_str(), "--fingerprint", &print];
        let what = ["--snapshot", backup.as_str(), "--root-key", &key, "--admin-out", &admin];
        seat.ambitd("restore", &[&who[..], &what[..]].concat()).unwrap()
    }
}

fn keep(cell: &Cell, name: &str) -> (Kept, serde_json::Value) {
    let backup = cell.file(name);
    let (exit, out, said) =
        ambit(&cell.admin_file("context.json"), &["raft", "snapshot", "--out", &backup.display().to_string()]);
    assert_eq!(exit, 0, "{said}");
    let root_key = cell.file(&format!("{name}.root.key"));
    std::fs::copy(cell.seat_of(1).unwrap().data.join("identity/root.key"), &root_key).unwrap();
    (Kept { backup, root_key }, json(&out))
}

fn is_empty(seat: &Seat) -> bool {
    !seat.data.exists() || std::fs::read_dir(&seat.data).unwrap().next().is_none()
}

/// What was before the backup, and counts after it or must not.
struct Before {
    good: Machine,
    me: Admitted,
    bad: Machine,
    banned: Admitted,
    maker: Maker,
    unspent: String,
    answered_late: Answer,
}

impl Before {
    async fn of(cell: &Cell) -> Before {
        let maker = Maker::new().unwrap();
        let (good, bad) = (Machine::new(&maker, "good").await.unwrap(), Machine::new(&maker, "bad").await.unwrap());
        register_cluster(cell, "west", &maker).await.unwrap();
        create_entry(cell, "web", "west").await.unwrap();
        let (me, banned) = (admit(cell, &good, "west").await.unwrap(), admit(cell, &bad, "west").await.unwrap());
        say(cell, "ban", &[bad.node()]).await.unwrap();
        assert_eq!(svid(cell, &me, "web").await.unwrap(), "ok");
        let unspent = join_token(cell, "west").await.unwrap();
        let begun = good.begin(cell.anonymous(1).await.unwrap(), "west", "").await.unwrap().unwrap();
        let answered_late = good.answer(&begun, &Lies::default()).await.unwrap();
        Before { good, me, bad, banned, maker, unspent, answered_late }
    }

    /// The ban holds, tokens and tickets are void, and nobody gets anything before a verdict of this incarnation.
    async fn counts(&self, cell: &Cell) {
        assert_eq!(node(cell, &self.bad.node()).await.unwrap().state, "banned");
        assert_eq!(svid(cell, &self.banned, "web").await.unwrap(), "node_banned");
        assert_eq!(svid(cell, &self.me, "web").await.unwrap(), "node_late");
        let frames = &self.answered_late.frames;
        let stale = within("a ticket key", async || evidence(cell.anonymous(1).await.ok()?, frames).await.ok()).await;
        assert_eq!(stale.unwrap_err().code, "ticket_invalid");
        let third = Machine::new(&self.maker, "third").await.unwrap();
        let denied = third.enrol(cell, 1, "west", &self.unspent, &Lies::default()).await.unwrap().map(|_| ());
        let code = denied.unwrap_err().code;
        assert!(code == "join_token_invalid" || code == "ek_not_expected", "{code}");
        attests(cell, &self.good, &self.me).await;
        assert_eq!(svid(cell, &self.me, "late").await.unwrap(), "entry_not_on_node");
        let anew = admit(cell, &self.good, "west").await.unwrap();
        assert_eq!(anew.generation, (1 << 32) + 1, "no lost incarnation gave this number");
    }
}

/// With one answered round a node is served again.
async fn attests(cell: &Cell, machine: &Machine, me: &Admitted) {
    let mut agent = Agent::open(cell, 1, me.identity.clone()).await.unwrap();
    agent.answer(machine, me, &RoundLies::default()).await.unwrap();
    within("an SVID after the round", async || (svid(cell, me, "web").await.unwrap() == "ok").then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cell_comes_back_from_a_backup_with_the_same_digest_and_trusts_nobody_unasked() {
    let mut cell = Cell::start("west", 3).await.unwrap();
    let before = Before::of(&cell).await;
    let (kept, shown) = keep(&cell, "west.backup");
    let file = std::fs::read(&kept.backup).unwrap();
    let digest = digest_of(&file);
    assert_eq!(shown["digest"], digest.as_str());
    assert_eq!((shown["bytes"].as_u64(), shown["allow_lists"].as_u64()), (Some(file.len() as u64), Some(1)));
    given_to_administrators_only(&cell, &kept, &before).await;
    // What comes after the backup is lost with the cell.
    create_entry(&cell, "late", "west").await.unwrap();
    let last = cell.status(1).await.unwrap().revision;
    let (saved, old_config) = (cell.file("saved-r2"), cell.seat_of(2).unwrap().config.clone());
    for number in 1..=3 {
        cell.kill(number).unwrap();
        let data = &cell.seat_of(number).unwrap().data;
        if number == 2 {
            copy(data, &saved);
        }
        std::fs::remove_dir_all(data).unwrap();
    }

    refusals(&cell, &kept, &file);
    let admin = cell.file("new-admin");
    let started = Instant::now();
    let out = printed(&kept.restore(&cell, cell.seat_of(1).unwrap(), &cell.fingerprint, &kept.backup, &admin));
    println!("{out}\nrestored within {:?} of the command's start", started.elapsed());
    assert_eq!(field(&out, "restored"), format!("index {}, digest {digest}", shown["index"]));
    assert!(field(&out, "time").ends_with(" ms") && field(&out, "given up") == "2,3", "{out}");
    assert!(!out.contains("missing"), "the allow-list came along: {out}");
    let full = kept.restore(&cell, cell.seat_of(1).unwrap(), &cell.fingerprint, &kept.backup, &admin);
    assert_eq!(refused(&full), "already_exists");

    cell.forget_others().unwrap();
    cell.administered_by(&admin).unwrap();
    cell.restart(1).unwrap();
    cell.wait_for_voters().await.unwrap();
    let status = cell.status(1).await.unwrap();
    assert_eq!((status.epoch, status.members.len()), (2, 1));
    assert!(status.revision > last, "agents keep the highest revision they saw: {} then {last}", status.revision);
    let trail = &status.incarnations[0];
    assert_eq!((trail.cause.as_str(), hex::encode(&trail.from_digest)), ("restored", digest));
    assert_eq!(trail.given_up, [2, 3]);
    let rows = json(&ambit(&admin.join("context.json"), &["raft", "status"]).1);
    assert!(rows[0]["incarnation"].as_str().unwrap().starts_with("restored 20"), "{rows}");
    assert_eq!((rows[0]["epoch"].as_u64(), rows[0]["lag"].as_u64()), (Some(2), Some(0)), "{rows}");

    before.counts(&cell).await;
    old_replica_disturbs_nobody(&cell, &old_config, &saved).await;
    cell.add(2).await.unwrap();
    cell.wait_for("equal digests at one index", |all| {
        all.len() == 2 && all.iter().all(|s| s.applied_index == all[0].applied_index && s.digest == all[0].digest)
    })
    .await
    .unwrap();
}

fn copy(from: &Path, to: &Path) {
    must_run(&["cp", "-a", &from.display().to_string(), &to.display().to_string()]).unwrap();
}

/// A backup is a new file of its owner's; a node gets none.
async fn given_to_administrators_only(cell: &Cell, kept: &Kept, before: &Before) {
    assert_eq!(std::fs::metadata(&kept.backup).unwrap().permissions().mode() & 0o777, 0o600);
    let out = kept.backup.display().to_string();
    let again = ambit(&cell.admin_file("context.json"), &["raft", "snapshot", "--out", &out]);
    assert!(again.0 == 1 && again.2.contains("already_exists"), "{again:?}");
    let channel = cell.channel_as(before.me.identity.clone(), 1).await.unwrap();
    let answer = MembershipClient::new(channel).backup(v1::BackupRequest {}).await;
    assert_eq!(refusal(answer).unwrap().code.as_str(), "permission_denied");
}

/// Every way in which a restore is refused; each leaves the machine as empty as it was.
fn refusals(cell: &Cell, kept: &Kept, file: &[u8]) {
    let (seat, admin) = (cell.seat_of(1).unwrap(), cell.file("never"));
    let context = cell.admin_file("context.json");
    let cases: [(&str, Vec<u8>); 4] = [
        ("truncated", file[..file.len() / 2].to_vec()),
        ("cut by a byte", file[..file.len() - 1].to_vec()),
        ("no backup at all", b"AMBSNP01 is the store's own".to_vec()),
        ("longer", [file, b"x"].concat()),
    ];
    let flips = (0..8).map(|n| {
        let mut bad = file.to_vec();
        bad[n * (file.len() - 1) / 7] ^= 1 << n;
        ("bit flipped", bad)
    });
    let bad = cell.file("bad.backup");
    for (what, bytes) in cases.into_iter().chain(flips) {
        std::fs::write(&bad, bytes).unwrap();
        assert_eq!(refused(&kept.restore(cell, seat, &cell.fingerprint, &bad, &admin)), "backup_damaged", "{what}");
        let (exit, _, said) = ambit(&context, &["raft", "restore", "--snapshot", &bad.display().to_string()]);
        assert!(exit == 2 && said.contains("backup_damaged"), "{what}: {said}");
    }
    let (exit, out, said) = ambit(&context, &["raft", "restore", "--snapshot", &kept.backup.display().to_string()]);
    assert!(exit == 0 && said.contains("ambitd restore"), "{said}");
    assert_eq!(json(&out)["digest"], digest_of(file).as_str());
    assert_eq!(refused(&kept.restore(cell, seat, &[9; 32], &kept.backup, &admin)), "fingerprint_mismatch");

    let loose = Kept { backup: kept.backup.clone(), root_key: cell.file("loose.key") };
    std::fs::copy(&kept.root_key, &loose.root_key).unwrap();
    std::fs::set_permissions(&loose.root_key, std::fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(refused(&loose.restore(cell, seat, &cell.fingerprint, &kept.backup, &admin)), "config_invalid");
    assert!(is_empty(seat) && !admin.exists(), "a refusal leaves nothing behind");
}

/// A replica of the lost incarnation, with its keys and its log, is started where it was.
async fn old_replica_disturbs_nobody(cell: &Cell, config: &Path, saved: &Path) {
    let text = std::fs::read_to_string(config).unwrap();
    let data = text.lines().find_map(|l| l.strip_prefix("data_dir = ")).unwrap();
    let moved = cell.file("old.toml");
    std::fs::write(&moved, text.replace(data, &format!("\"{}\"", saved.display()))).unwrap();
    let program = binary("ambitd").unwrap().display().to_string();
    let before = cell.status(1).await.unwrap();
    let mut old =
        Started::start(&[&program, "run", "--config", &moved.display().to_string()], &cell.file("old.log")).unwrap();
    tokio::time::sleep(QUIET).await;
    assert!(old.is_alive(), "{}", std::fs::read_to_string(cell.file("old.log")).unwrap());
    let after = cell.status(1).await.unwrap();
    assert_eq!((before.term, before.leader), (after.term, after.leader));
    assert!(after.applied_index > before.applied_index, "it goes on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_of_another_cell_or_with_another_root_is_refused() {
    let (west, east) = tokio::join!(Cell::start("west", 1), Cell::start("east", 1));
    let (west, east) = (west.unwrap(), east.unwrap());
    let ((of_west, _), (of_east, _)) = (keep(&west, "backup"), keep(&east, "backup"));
    let (seat, admin) = (west.seat("fresh").unwrap(), west.file("never"));
    let other = of_west.restore(&west, &seat, &west.fingerprint, &of_east.backup, &admin);
    assert_eq!(refused(&other), "fingerprint_mismatch");
    let root = Kept { backup: of_west.backup.clone(), root_key: of_east.root_key.clone() };
    assert_eq!(refused(&root.restore(&west, &seat, &west.fingerprint, &root.backup, &admin)), "authority_mismatch");
    let missing = Kept { backup: of_west.backup.clone(), root_key: west.file("nowhere") };
    assert_eq!(refused(&missing.restore(&west, &seat, &west.fingerprint, &root.backup, &admin)), "config_invalid");
    assert!(is_empty(&seat));
    let context = west.admin_file("context.json");
    let (exit, _, said) = ambit(&context, &["raft", "restore", "--snapshot", &of_east.backup.display().to_string()]);
    assert!(exit == 4 && said.contains("fingerprint_mismatch"), "{said}");
    // A cell that never lost anything has nothing to recover.
    let (exit, _, said) = ambit(&context, &["raft", "recover"]);
    assert!(exit == 5 && said.contains("recover_unsafe"), "{said}");
    drop(east);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_replica_of_three_goes_on_alone_and_only_where_there_is_no_other_way() {
    let mut cell = Cell::start("west", 3).await.unwrap();
    let maker = Maker::new().unwrap();
    let machine = Machine::new(&maker, "n").await.unwrap();
    register_cluster(&cell, "west", &maker).await.unwrap();
    create_entry(&cell, "web", "west").await.unwrap();
    let me = admit(&cell, &machine, "west").await.unwrap();
    for n in 0..20 {
        create_entry(&cell, &format!("e{n}"), "west").await.unwrap();
    }
    cell.wait_for("all caught up", |all| all.iter().all(|s| s.applied_index == all[0].applied_index)).await.unwrap();
    let recover = |cell: &Cell, args: &[&str]| cell.seat_of(1).unwrap().ambitd("recover", args).unwrap();
    let loss = ["--i-accept-the-loss-of", "2,3"];

    assert_eq!(refused(&recover(&cell, &loss)), "recover_unsafe", "it runs");
    cell.kill(1).unwrap();
    assert_eq!(refused(&recover(&cell, &loss)), "recover_unsafe", "the others are a majority");
    cell.kill(2).unwrap();
    let one_answers = recover(&cell, &loss);
    assert_eq!(refused(&one_answers), "recover_unsafe", "with the third it is a majority");
    assert!(String::from_utf8_lossy(&one_answers.stderr).contains("replicas 3 answer"));
    cell.kill(3).unwrap();
    let look = recover(&cell, &[]);
    assert_eq!(refused(&look), "recover_unconfirmed");
    let found = String::from_utf8_lossy(&look.stdout).into_owned();
    println!("{found}");
    assert_eq!(field(&found, "replica"), "1 of voters 1,2,3, learners none");
    assert!(String::from_utf8_lossy(&look.stderr).contains("--i-accept-the-loss-of 2,3"));
    for wrong in ["2", "3", "1,2,3", "2,3,4"] {
        assert_eq!(refused(&recover(&cell, &["--i-accept-the-loss-of", wrong])), "recover_unconfirmed", "{wrong}");
    }
    damage_is_refused(&cell, &loss);
    // None of the refusals changed anything: the digest is that of the first look.
    let out = printed(&recover(&cell, &loss));
    println!("{out}");
    assert_eq!(field(&out, "digest"), field(&found, "digest"));
    assert!(field(&out, "recovered").ends_with(&field(&found, "digest")), "{out}");
    assert!(cell.seat_of(1).unwrap().data.join("before-epoch-2/log").is_dir(), "the old store is kept");
    assert_eq!(refused(&recover(&cell, &loss)), "recover_unsafe", "a cell of one has its majority");

    cell.forget_others().unwrap();
    cell.restart(1).unwrap();
    cell.wait_for_voters().await.unwrap();
    let status = cell.status(1).await.unwrap();
    let trail = &status.incarnations[0];
    assert_eq!((trail.cause.as_str(), trail.given_up.as_slice(), status.epoch), ("recovered", &[2u64, 3][..], 2));
    let rows = json(&ambit(&cell.admin_file("context.json"), &["raft", "status"]).1);
    assert!(rows[0]["incarnation"].as_str().unwrap().contains("given up 2,3"), "{rows}");
    let entries = entries(&cell).await;
    assert!((0..20).all(|n| entries.contains(&format!("e{n}"))), "every acknowledged write is there: {entries:?}");
    assert_eq!(svid(&cell, &me, "web").await.unwrap(), "node_late");
    attests(&cell, &machine, &me).await;
    cell.add(2).await.unwrap();
    cell.add(3).await.unwrap();
    create_entry(&cell, "after", "west").await.unwrap();
}

/// In a copy of the stopped replica's folder: bits of the log and of the snapshot, and a replica that never got its place.
fn damage_is_refused(cell: &Cell, loss: &[&str]) {
    let seat = cell.seat_of(1).unwrap();
    for (name, part) in [("log", "log"), ("snapshot", "snapshot")] {
        let place = cell.seat(&format!("damaged-{name}")).unwrap();
        copy(&seat.data, &place.data);
        let mut files: Vec<_> = std::fs::read_dir(place.data.join(part)).unwrap().map(|f| f.unwrap().path()).collect();
        files.retain(|f| f.extension().is_some_and(|e| e == "raftlog" || e == "snapshot"));
        files.sort();
        let file = files.first().unwrap_or_else(|| panic!("a file in {part}"));
        let mut bytes = std::fs::read(file).unwrap();
        let used = bytes.iter().rposition(|b| *b != 0).unwrap();
        bytes[used / 2] ^= 0x20;
        std::fs::write(file, bytes).unwrap();
        assert_eq!(refused(&place.ambitd("recover", loss).unwrap()), "store_damaged", "{name}");
    }
    assert_eq!(refused(&cell.seat("nobody").unwrap().ambitd("recover", loss).unwrap()), "config_invalid");
}

async fn entries(cell: &Cell) -> Vec<String> {
    let mut client = EntryRegistryClient::new(cell.admin(1).await.unwrap());
    let listed = client.list_entries(v1::ListEntriesRequest::default()).await.unwrap().into_inner().entries;
    listed.into_iter().map(|e| e.id).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_goes_where_it_is_sent_and_a_removed_leader_disturbs_nobody() {
    let cell = Cell::start("west", 3).await.unwrap();
    let context = cell.admin_file("context.json");
    let leader = cell.leader().await.unwrap();
    let other = (1..=3).find(|n| *n != leader && *n != 1).unwrap();
    let (exit, _, said) = ambit(&context, &["raft", "transfer", "--to", &other.to_string()]);
    assert_eq!((exit, cell.leader().await.unwrap()), (0, other), "{said}");
    let (exit, _, said) = ambit(&context, &["raft", "transfer", "--to", "9"]);
    assert!(exit == 2 && said.contains("bad_request"), "{said}");

    let (exit, _, said) = ambit(&context, &["raft", "remove", "--replica", &other.to_string()]);
    assert_eq!(exit, 0, "{said}");
    let settled = within("two members and a leader", async || {
        let s = cell.status(1).await.ok()?;
        (s.members.len() == 2 && s.leader != 0 && s.leader != other as u64).then_some(s)
    })
    .await;
    // It still runs, with its keys and its log.
    tokio::time::sleep(QUIET).await;
    let after = cell.status(1).await.unwrap();
    assert_eq!((after.term, after.leader), (settled.term, settled.leader), "no election since");
    assert!(after.applied_index > settled.applied_index);
    assert_eq!(after.membership_version, settled.membership_version);
    let (exit, _, said) = ambit(&context, &["raft", "remove", "--replica", &other.to_string()]);
    assert!(exit == 1 && said.contains("not_found"), "{said}");
}
