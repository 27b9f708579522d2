//! What is told of each connection. A process of its own: what one thread's subscriber is told depends on all others.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use support::stage::{SOON, Stage, ended, is_reset};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;
use tracing_subscriber::layer::SubscriberExt;

/// The records so far.
#[derive(Clone, Default)]
struct Told(Arc<Mutex<Vec<BTreeMap<&'static str, String>>>>);

impl Told {
    /// Those of both ends of one connection.
    async fn two(&self) -> Vec<BTreeMap<&'static str, String>> {
        let both = async {
            while self.0.lock().unwrap().len() < 2 {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        timeout(SOON, both).await.expect("two records");
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

struct Fields(BTreeMap<&'static str, String>);

impl tracing::field::Visit for Fields {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        self.0.insert(field.name(), format!("{value:?}"));
    }
}

impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for Told {
    fn on_event(&self, event: &tracing::Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
        if event.metadata().target() == "ambit::connection" {
            let mut fields = Fields(BTreeMap::new());
            event.record(&mut fields);
            self.0.lock().unwrap().push(fields.0);
        }
    }
}

#[tokio::test]
async fn records_count_every_byte_and_say_who_broke_off() {
    let told = Told::default();
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(told.clone())).unwrap();
    let stage = Stage::set(116).await;
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
        let told = told.two().await;
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
    let told = told.two().await;
    assert_eq!(told.iter().map(|record| record["flags"].as_str()).collect::<Vec<_>>(), ["\"UC\""; 2]);
}
