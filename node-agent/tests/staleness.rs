//! A node whose cell is not heard, or not heard of anything new: a real agent, real TPM (software), real kernel part, a cell whose
//! words the test chooses. Needs root and fails without it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use ambit_agent::agent::{self, Stop};
use ambit_agent::config::Config;
use ambit_agent::staleness::StaleAfter;
use ambit_proto::v1;
use ambit_proto::v1::server_message::Body as Down;
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use std::time::{Duration, Instant};
use support::process::{Node, applied, page, ready};
use support::replica::Stream;

/// Less than can be set by a file.
const AFTER_S: u64 = 15;

/// Until when the kernel judges, from now: as programs of eBPF read it.
fn lease(node: &Node) -> Duration {
    let config = MapHandle::from_pinned_path(node.pins.join("maps/config")).unwrap();
    let until = config.lookup(&0u32.to_ne_bytes(), MapFlags::ANY).unwrap().unwrap();
    let until = Duration::from_nanos(u64::from_ne_bytes(until.try_into().unwrap()));
    until.saturating_sub(ambit_ebpf::boot_time().unwrap())
}

/// A replica speaks, whose leader wrote this last.
async fn beat(stream: &Stream, committed_ms: u64) {
    let beat = v1::Heartbeat { stamp_ms: support::now().0, revision: 1, committed_ms };
    stream.send(Down::Heartbeat(beat)).await;
}

async fn is(node: &Node, good_for: &str) {
    let expected = format!("\"good_for\":\"{good_for}\"");
    page(node, "/state", |page| page.contains(&expected)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_kernel_judges_no_longer_than_the_cells_word_is_good_for() {
    let mut node = Node::make().await;
    let mut config = Config::parse(&format!("{}fail_mode = 'strict'\n", node.config)).unwrap();
    config.stale_after_s = StaleAfter(Duration::from_secs(AFTER_S));
    // It ends with this process.
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async { agent::run(config, false, Stop::listen().unwrap()).await })
    });
    let stream = node.stream().await;
    node.slice(&stream, 1).await;
    ready(&node).await;
    applied(&node, 1).await;
    let at = 1_800_000_000_000;
    let heard = Instant::now();
    beat(&stream, at).await;
    is(&node, "all").await;
    let granted = lease(&node);
    assert!(granted > Duration::ZERO && granted <= Duration::from_secs(AFTER_S), "{granted:?}");
    // Its replica hears the leader no more, and goes on beating.
    while heard.elapsed() < Duration::from_secs(AFTER_S - 3) {
        beat(&stream, at).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert!(
            lease(&node) <= Duration::from_secs(AFTER_S).saturating_sub(heard.elapsed() - Duration::from_millis(500))
        );
    }
    is(&node, "all").await;
    while heard.elapsed() < Duration::from_secs(AFTER_S + 2) {
        beat(&stream, at).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    assert_eq!(lease(&node), Duration::ZERO);
    is(&node, "nothing").await;
    page(&node, "/metrics", |page| page.contains("\nambit_agent_stale 1\n")).await;
    // Somebody leads it again.
    beat(&stream, at + 1).await;
    is(&node, "all").await;
    let begun = Instant::now();
    while lease(&node) < Duration::from_secs(AFTER_S - 5) {
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", lease(&node));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    page(&node, "/metrics", |page| page.contains("\nambit_agent_stale 0\n")).await;
}

/// It may be that only this one is cut off.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_tells_nothing_new_is_left_for_another() {
    let mut node = Node::make().await;
    let config = node.config.clone();
    let (_agent, stream) = node.served("agent", &config).await;
    let begun = Instant::now();
    let again = loop {
        beat(&stream, 1_800_000_000_000).await;
        let next = tokio::time::timeout(Duration::from_secs(1), node.streams.recv()).await;
        if let Ok(next) = next {
            break next.unwrap();
        }
        assert!(begun.elapsed() < Duration::from_secs(50), "it stays");
    };
    assert!(begun.elapsed() >= Duration::from_secs(29), "too soon: {:?}", begun.elapsed());
    assert_eq!(again.generation, stream.generation, "by the same admission");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_it_is_static_the_kernel_judges_for_ever() {
    let mut node = Node::make().await;
    let config = format!("{}fail_mode = 'static'\n", node.config);
    let (mut agent, _stream) = node.served("agent", &config).await;
    let century = Duration::from_secs(100 * 365 * 24 * 3600);
    assert!(lease(&node) > century);
    agent.child.kill().unwrap();
    agent.child.wait().unwrap();
    assert!(lease(&node) > century, "also without an agent");
    // The next one is to do otherwise: what its kernel was let do for ever ends in a minute, though the cell is not heard.
    let closed = node.config.clone();
    let _agent = node.agent("closed", &closed, &[]);
    let _stream = node.stream().await;
    let begun = Instant::now();
    while lease(&node) > Duration::from_secs(60) {
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", lease(&node));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(lease(&node) > Duration::from_secs(30));
}
