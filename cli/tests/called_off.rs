//! An operator's signal ends a drill at once and reverts it. Alone in its program: signals reach the whole process.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

mod cell;

use ambit::cell::Cell;
use ambit::context::Context;
use ambit::drill::lab::Lab;
use cell::FakeCell;
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

/// The outage lasts until it is healed; the kill itself calls the drill off.
const LAB: &str = "#!/bin/sh
cd \"$(dirname \"$0\")\"
echo \"$2\" >> orders
case \"$2\" in kill) touch killed; kill -TERM PARENT ;; restart) rm -f killed ;; esac
";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_reverts_within_two_seconds() {
    let cell = FakeCell::start("signal").await;
    let program = cell.folder.join("fake-lab");
    std::fs::write(&program, LAB.replace("PARENT", &std::process::id().to_string())).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o700)).unwrap();
    let lab = Lab::new(program, "demo".into(), cell.folder.clone());
    let west = Cell::open(Context::read(&cell.context()).unwrap(), Duration::from_secs(3)).unwrap();
    let cells = BTreeMap::from([("west".to_owned(), west)]);
    let spec = include_str!("../../deploy/drills/leader-loss.yaml").replace("window: 2s", "window: 300ms");

    let begun = Instant::now();
    let sealed = ambit::drill::run::run(&spec, &lab, &cells).await.unwrap();
    assert_eq!(sealed.report.outcome, "aborted: the operator called it off");
    let marks = sealed.report.marks.unwrap();
    assert!(marks.healed_ms - marks.injected_ms < 2000, "{marks:?}");
    assert!(!cell.folder.join("killed").exists(), "the fault stands");
    assert_eq!(std::fs::read_to_string(cell.folder.join("orders")).unwrap(), "kill\nrestart\n");
    assert!(begun.elapsed() < Duration::from_secs(10));
}
