use super::*;
use crate::raft::{Cell, Network, found};
use ambit_model::{Code, Refusal};
use ambit_state::Command;
use std::sync::Arc;

fn nobody() -> Network {
    Network {
        directory: Arc::new(|_| None),
        channels: Arc::new(|id, _| {
            Box::pin(async move { Err(Refusal::new(Code::Unavailable, "another replica", id.to_string())) })
        }),
    }
}

fn options(name: &str) -> Options {
    let dir = std::env::temp_dir().join(format!("ambit-rebase-{name}-{}", std::process::id()));
    let _ = fs::remove_dir_all(&dir);
    Options::new(ReplicaId(1), dir)
}

fn report(n: u8) -> Command {
    Command::SealReport("ledger".to_owned(), [n; 32])
}

/// A founded cell of one with `n` reports in its log; digest and index as the running replica had them.
async fn written(options: &Options, n: u8) -> ([u8; 32], u64) {
    found(options).unwrap();
    let cell = Cell::open(options.clone(), nobody()).unwrap();
    for i in 0..n {
        if i == n / 2 {
            cell.snapshot_now().await.unwrap();
        }
        cell.propose([1; 32], [i + 1; 16], report(i)).await.unwrap().outcome.unwrap();
    }
    let seen = (cell.state().digest(), cell.state().applied().0);
    cell.shutdown().await;
    seen
}

async fn reports(options: &Options) -> (usize, u64, Vec<ReplicaId>) {
    let cell = Cell::open(options.clone(), nobody()).unwrap();
    cell.propose([2; 32], [9; 16], report(255)).await.unwrap().outcome.unwrap();
    let seen = (cell.state().reports().count(), cell.state().applied().0, cell.status().voters);
    cell.shutdown().await;
    seen
}

#[tokio::test]
async fn snapshot_and_log_without_the_tables_are_the_whole_state() {
    let options = options("survey");
    let (digest, index) = written(&options, 9).await;
    // I14: tables are never the only copy, and not asked here.
    fs::remove_dir_all(options.data_dir.join("tables")).unwrap();
    let found = survey(&options).unwrap();
    assert_eq!((found.whole.state.digest(), found.whole.state.applied().0), (digest, index));
    assert_eq!((found.last, found.whole.membership), (index, Membership::of_founder(1)));
    let other = Options { id: ReplicaId(2), ..options.clone() };
    assert!(matches!(survey(&other), Err(StartError::Store(StoreError::OtherReplica { .. }))));
    fs::remove_dir_all(&options.data_dir).unwrap();
}

#[test]
fn a_snapshot_whose_rows_are_not_the_state_it_says_is_damage() {
    let mut state = State::new();
    state.skip(RaftIndex(7));
    let header = |index, digest| Header { index, term: 2, membership: Membership::of_founder(1), digest, chunks: 0 };
    // Every checksum holds: what was written is another state, or another index.
    for (index, digest, good) in [(7, state.digest(), true), (7, [0; 32], false), (8, state.digest(), false)] {
        let bytes = snapshot::encode(header(index, digest), state.export()).unwrap();
        let whole = snapshot::decode(&bytes).and_then(Whole::of);
        assert_eq!(whole.is_ok(), good, "{index} {}", hex::encode(digest));
    }
}

#[tokio::test]
async fn a_store_that_runs_is_not_read() {
    let options = options("running");
    found(&options).unwrap();
    let cell = Cell::open(options.clone(), nobody()).unwrap();
    assert!(survey(&options).is_err(), "two processes on one folder");
    cell.shutdown().await;
    assert!(survey(&options).is_ok());
    fs::remove_dir_all(&options.data_dir).unwrap();
}

/// The new store goes in its place by renames; the machine may stop before any of them.
#[tokio::test]
async fn a_refounding_that_is_cut_off_anywhere_is_finished_and_never_mixed() {
    let names = |dir: &Path| {
        let mut all: Vec<_> =
            fs::read_dir(dir).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
        all.sort();
        all
    };
    for cut in 0..=7 {
        let options = options(&format!("cut-{cut}"));
        let dir = &options.data_dir;
        let (_, index) = written(&options, 4).await;
        let mut whole = survey(&options).unwrap().whole;
        whole.state.skip(RaftIndex(1 << 40));
        // The moves of `finish`, as far as they got.
        found_on(&Folder(dir.join(STAGE)), options.id, &whole).unwrap();
        fs::write(dir.join(STAGE).join("aside"), "before").unwrap();
        fs::create_dir(dir.join("before")).unwrap();
        let out = PARTS.iter().map(|part| (dir.join(part), dir.join("before").join(part)));
        let staged = ["snapshot", "log.mark", "log"].iter();
        let back = staged.map(|part| (dir.join(STAGE).join(part), dir.join(part)));
        for (from, to) in out.chain(back).take(cut) {
            fs::rename(from, to).unwrap();
        }
        assert!(unfinished(dir));
        assert!(finish(dir).unwrap() && !unfinished(dir) && !finish(dir).unwrap(), "cut {cut}");
        assert_eq!(names(&dir.join("before")), ["log", "log.mark", "snapshot", "tables"], "cut {cut}");
        let (count, applied, voters) = reports(&options).await;
        assert_eq!((count, voters), (5, vec![ReplicaId(1)]), "cut {cut}");
        assert!(applied > 1 << 40 && index < 1 << 40, "cut {cut}");
        fs::remove_dir_all(dir).unwrap();
    }
}

#[tokio::test]
async fn nothing_is_founded_on_a_store_and_no_old_store_is_overwritten() {
    let options = options("exists");
    written(&options, 2).await;
    let whole = survey(&options).unwrap().whole;
    let exists = |outcome: Result<(), StartError>| matches!(outcome, Err(StartError::Store(StoreError::Exists(_))));
    assert!(exists(found_on(&Folder(options.data_dir.clone()), options.id, &whole)));
    fs::create_dir(options.data_dir.join("before")).unwrap();
    assert!(exists(refound(&options.data_dir, options.id, &whole, "before").map(drop)));
    assert_eq!(reports(&options).await.0, 3);
    fs::remove_dir_all(&options.data_dir).unwrap();
}
