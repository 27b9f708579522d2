//! What is told of each connection. A process of its own: what one thread's subscriber is told depends on all others.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use ambit_agent::recent::Id;
use ambit_proto::v1;
use std::collections::BTreeMap;
use std::time::Duration;
use support::stage::{SOON, Stage, ended, is_reset};
use support::told::Told;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

/// The records of both ends of one connection.
async fn two(told: &Told) -> Vec<BTreeMap<&'static str, String>> {
    let both = async {
        while told.0.lock().unwrap().len() < 2 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(SOON, both).await.expect("two records");
    std::mem::take(&mut *told.0.lock().unwrap())
}

#[tokio::test]
async fn records_count_every_byte_and_say_who_broke_off() {
    let told = Told::begin();
    let mut stage = Stage::set(116).await;
    // The first bytes go with OPEN, and some of the answer with OPENED; or they do not; or there are none.
    for (n, (sent, received, late)) in [(100, 50, false), (100, 50, true), (0, 50, false), (100_000, 40_000, false)]
        .into_iter()
        .cycle()
        .take(40)
        .enumerate()
    {
        let mut app = stage.call_db().await;
        if sent > 0 {
            app.write_all(&vec![1; sent]).await.unwrap();
        }
        let (mut pod, _) = stage.served().await;
        if late {
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
        pod.write_all(&vec![2; received]).await.unwrap();
        pod.read_exact(&mut vec![0; sent]).await.unwrap();
        app.read_exact(&mut vec![0; received]).await.unwrap();
        ended(app, pod).await;
        let told = two(&told).await;
        let counted = |record: &BTreeMap<&str, String>| ["flags", "sent", "received"].map(|f| record[f].clone());
        let expected = ["\"-\"".to_owned(), sent.to_string(), received.to_string()];
        assert_eq!(told.iter().map(counted).collect::<Vec<_>>(), [expected.clone(), expected], "connection {n}");
    }
    let mut app = stage.call_db().await;
    app.write_all(b"hello").await.unwrap();
    let (mut pod, _) = stage.served().await;
    pod.read_exact(&mut [0; 5]).await.unwrap();
    pod.set_zero_linger().unwrap();
    drop(pod);
    assert!(is_reset(app).await);
    let refused = told.clone();
    let told = two(&told).await;
    assert_eq!(told.iter().map(|record| record["flags"].as_str()).collect::<Vec<_>>(), ["\"UC\""; 2]);
    // Both ends remember it under the trace id in their records, and how it was judged.
    let ids = told.iter().map(|record| Id::of_trace(record["trace"].trim_matches('"')).unwrap()).collect::<Vec<_>>();
    assert_eq!(ids[0], ids[1]);
    let seen = stage.seen.clone();
    let remembered = |n: usize, id: Id| match &seen[n].recent().find(id)[..] {
        [row] => (row.place.clone(), row.revision, row.allowed, row.rule.clone(), row.flags.clone()),
        other => panic!("{other:?}"),
    };
    for (n, place) in ["calling", "called"].into_iter().enumerate() {
        let expected = (place.to_owned(), 1, true, "east/db".to_owned(), "UC".to_owned());
        assert_eq!(remembered(n, ids[0]), expected);
    }

    // The receiver refuses what the caller's cell still allows.
    stage.publish(|_| (), |e| (e.policies, e.revision) = (vec![], 2));
    assert!(is_reset(stage.call_db().await).await);
    let told = two(&refused).await;
    let id = Id::of_trace(told[0]["trace"].trim_matches('"')).unwrap();
    assert_eq!(remembered(0, id), ("calling".into(), 1, true, "east/db".into(), "UAEX".into()));
    assert_eq!(remembered(1, id), ("called".into(), 2, false, String::new(), "UAEX".into()));

    // The caller's own agent refuses: the called node is denied since the kernel let it through.
    let node = stage.east.node().to_string();
    let denial = v1::NodeDenial { trust_domain: "east".into(), node, generation: 1 };
    stage.publish(|w| (w.denials, w.revision) = (vec![denial], 3), |e| e.revision = 3);
    assert!(is_reset(stage.call_db().await).await);
    let one = async {
        while refused.0.lock().unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(SOON, one).await.expect("its record");
    let told = std::mem::take(&mut *refused.0.lock().unwrap());
    let id = Id::of_trace(told[0]["trace"].trim_matches('"')).unwrap();
    assert_eq!(remembered(0, id), ("calling".into(), 3, false, String::new(), "UAEX".into()));
    assert_eq!(seen[0].recent().find(id)[0].reason, "node_untrusted");
}
