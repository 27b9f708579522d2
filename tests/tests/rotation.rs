//! Authorities renewed and replaced under steady handshakes between two cells: real replicas, real software TPMs, and
//! nodes that follow their cells. No handshake fails.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says that it failed by panicking")]

use ambit_proto::v1;
use ambit_proto::v1::local_authority_client::LocalAuthorityClient;
use ambit_proto::v1::membership_client::MembershipClient;
use ambit_tests::cell::{Cell, fresh};
use ambit_tests::machine::{Machine, join_token, register_cluster};
use ambit_tests::node::{Greetings, Node};
use ambit_tests::operator::{create_entry, within};
use ambit_tests::peering::peer;
use ambit_tests::process::{Folder, binary, run};
use ambit_tests::tpm::Maker;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A cell of a lab, whose intermediates last half a minute.
const BRIEF: &str = "authority.lifetime_s = 30\nauthority.lab = true\n";
/// How long a cell of these is watched: no intermediate that it began with is left.
const WATCHED: Duration = Duration::from_secs(70);

/// A running node of a cell, in a cluster of the cell's name, as the workload `web`.
async fn node(cell: &Cell, maker: &Maker, name: &str) -> Node {
    let td = cell.trust_domain.to_string();
    let machine = Machine::new(maker, name).await.unwrap();
    register_cluster(cell, &td, maker).await.unwrap();
    create_entry(cell, "web", &td).await.unwrap();
    let token = join_token(cell, &td).await.unwrap();
    let node = Node::start(cell, machine, &td, token, "web").unwrap();
    within("an SVID", async || node.is_ready().then_some(())).await;
    node
}

/// Each replica's present intermediate.
async fn authorities(cell: &Cell) -> BTreeMap<u64, (String, u64)> {
    let status = cell.status(cell.running()[0]).await.unwrap();
    status.members.into_iter().map(|m| (m.id, (m.authority, m.intermediate_not_after_ms))).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cell_outlives_its_intermediates_and_every_replica_renews_by_itself() {
    let mut cell = Cell::configured(Folder::new().unwrap(), "west", 3, BRIEF).await.unwrap();
    // What a cell begins with lasts a week; what it renews to, half a minute.
    let brief = |s: &v1::StatusResponse| s.members.iter().all(|m| m.intermediate_not_after_ms < s.stamp_ms + 60_000);
    cell.wait_for("every replica renewed once", |all| all.iter().all(brief)).await.unwrap();
    let maker = Maker::new().unwrap();
    let node = Arc::new(node(&cell, &maker, "m1").await);
    let greetings = Greetings::start(vec![(node.clone(), node.clone())]);
    let started = Instant::now();
    let mut seen: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    let mut away = false;
    while started.elapsed() < WATCHED {
        for (replica, (authority, _)) in authorities(&cell).await {
            let seen = seen.entry(replica).or_default();
            if seen.last() != Some(&authority) {
                seen.push(authority);
            }
        }
        // Where the root's key came from is gone for the second half: any other can sign.
        if !away && started.elapsed() > WATCHED / 2 {
            cell.kill(1).unwrap();
            away = true;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let (done, failed) = greetings.end().await;
    let (issued, signers, refused) = node.history();
    let renewals: BTreeMap<u64, usize> = seen.iter().map(|(n, all)| (*n, all.len() - 1)).collect();
    println!("{done} handshakes, {} failed; {issued} SVIDs; renewals {renewals:?}; refused: {refused:?}", failed.len());
    assert!(failed.is_empty() && done > 500, "{failed:?}");
    assert!(renewals[&2] >= 3 && renewals[&3] >= 3, "{seen:?}");
    assert!(signers.len() >= 3, "{signers:?}");
    // Replica 1 was away for longer than its intermediate had left, and now all of them are: they begin again by themselves.
    cell.kill(2).unwrap();
    cell.kill(3).unwrap();
    tokio::time::sleep(Duration::from_secs(31)).await;
    for replica in 1..=3 {
        cell.restart(replica).unwrap();
    }
    if let Err(e) = cell.wait_for_voters().await {
        let log = std::fs::read_to_string(&cell.seat_of(3).unwrap().log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        panic!("{e:#}\n{}", lines[lines.len().saturating_sub(30)..].join("\n"));
    }
    cell.wait_for("all renewed", |all| {
        all.iter().all(|s| s.members.iter().all(|m| m.intermediate_not_after_ms > s.stamp_ms))
    })
    .await
    .unwrap();
}

fn ambit(cell: &Cell, args: &[&str]) -> std::process::Output {
    let (program, context) = (binary("ambit").unwrap().display().to_string(), cell.admin_file("context.json"));
    run(&[&[program.as_str(), "--context", &context.display().to_string()], args].concat()).unwrap()
}

/// `ambit trust rotate`, while the test goes on.
fn rotate(cell: &Cell) -> tokio::task::JoinHandle<std::process::Output> {
    let (program, context) = (binary("ambit").unwrap().display().to_string(), cell.admin_file("context.json"));
    let context = context.display().to_string();
    tokio::task::spawn_blocking(move || {
        run(&[&program, "--context", &context, "trust", "rotate", "--wait", "90s"]).unwrap()
    })
}

fn said(out: &std::process::Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stderr), String::from_utf8_lossy(&out.stdout))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn roots_of_both_cells_are_replaced_and_a_replica_lost_meanwhile_and_no_handshake_fails() {
    let (west, east) = tokio::join!(Cell::start("west", 3), Cell::start("east", 1));
    let (mut west, mut east) = (west.unwrap(), east.unwrap());
    peer(&west, &east).await.unwrap();
    let maker = Maker::new().unwrap();
    let (web, db) = (node(&west, &maker, "m1").await, node(&east, &maker, "m2").await);
    let (web, db) = (Arc::new(web), Arc::new(db));
    within("bundles on both sides", async || {
        (web.greet(&db).await.is_ok() && db.greet(&web).await.is_ok()).then_some(())
    })
    .await;
    let greetings = Greetings::start(vec![(web.clone(), db.clone()), (db.clone(), web.clone())]);
    let began = Instant::now();

    // A replica is lost, and while it is, nothing is activated: it would not know the root.
    let lost = authorities(&west).await[&3].0.clone();
    west.kill(3).unwrap();
    let refused = ambit(&west, &["trust", "rotate", "--wait", "3s"]);
    assert_eq!(refused.status.code(), Some(5), "{}", said(&refused));
    assert!(said(&refused).contains("acks_missing") && said(&refused).contains("replica 3"), "{}", said(&refused));
    let remove = v1::RemoveVoterRequest { request_id: fresh(), replica: 3 };
    let removed = west.insist(|channel| {
        let remove = remove.clone();
        async move { MembershipClient::new(channel).remove_voter(remove).await }
    });
    removed.await.unwrap();
    let rotating = rotate(&west);
    west.replace(3).await.unwrap();
    let rotated = rotating.await.unwrap();
    assert!(rotated.status.success(), "{}", said(&rotated));
    println!("west: {}", said(&rotated));
    let rotated = rotate(&east).await.unwrap();
    assert!(rotated.status.success(), "{}", said(&rotated));
    println!("east: {}", said(&rotated));
    for cell in [&mut west, &mut east] {
        let former = cell.fingerprint;
        cell.read_context().unwrap();
        assert_ne!(cell.fingerprint, former);
        cell.wait_for_voters().await.unwrap();
    }

    // What the lost replica signed went with its root: refused by name on connections that were begun before, too.
    let revoked = ambit(&west, &["trust", "revoke", &lost]);
    assert!(said(&revoked).contains("root_state") && said(&revoked).contains("found revoked"), "{}", said(&revoked));
    let check = ambit(&west, &["trust", "check"]);
    assert!(check.status.success(), "{}", said(&check));
    tokio::time::sleep(Duration::from_secs(1)).await;

    let (done, failed) = greetings.end().await;
    println!("{done} handshakes in {:.1} s, {} failed", began.elapsed().as_secs_f64(), failed.len());
    assert!(failed.is_empty() && done > 300, "{failed:?}");
    // Both sides are known by their new roots only, and were issued leaves under them.
    for (node, cell) in [(&web, &west), (&db, &east)] {
        let (_, signers, refused) = node.history();
        let now: Vec<String> = authorities(cell).await.into_values().map(|(authority, _)| authority).collect();
        assert!(signers.last().is_some_and(|last| now.contains(last)), "{signers:?} of {now:?}, {refused:?}");
        assert!(signers.len() >= 2, "{signers:?}");
    }

    // A node that falls silent is waited for as long as it is relied on, and no longer.
    drop(web);
    let missing = async || {
        let mut client = LocalAuthorityClient::new(west.admin(1).await.unwrap());
        let state = client.get_x509_authority_state(v1::X509AuthorityStateRequest::default()).await.ok()?.into_inner();
        Some(state.roots.into_iter().find(|root| root.state == "active")?.missing)
    };
    within("the silent node is missing", async || {
        missing().await?.iter().any(|m| m.starts_with("node ")).then_some(())
    })
    .await;
    within("nobody waits for it", async || missing().await?.is_empty().then_some(())).await;
}
