//! From the cell to a workload and through an outage: who comes back is told the same, a cell that is away takes nothing
//! from anybody until it runs out, and the agent says how things stand.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use ambit_agent::clock::Clock;
use ambit_agent::denials::Lane;
use ambit_agent::issued::Issued;
use ambit_agent::state::{self, State};
use ambit_agent::svids::Issuance;
use ambit_identity::{SharedTrust, Trust, TrustStore};
use ambit_model::{Generation, Stamp};
use ambit_proto::v1;
use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;
use support::issuer::Issuer;
use support::local::{Socket, call, uid};
use support::{Cell, now};
use tokio::sync::watch;
use tonic::{Code, Status, Streaming};

const FETCH: &str = "/SpiffeWorkloadAPI/FetchX509SVID";

async fn next(stream: &mut Streaming<Bytes>) -> Result<Bytes, Status> {
    let message = tokio::time::timeout(Duration::from_secs(30), stream.message()).await.expect("a message")?;
    Ok(message.expect("no end"))
}

#[tokio::test]
async fn an_outage_takes_nothing_until_it_runs_out_and_who_comes_back_is_told_the_same() {
    let mut west = Cell::founded("west", 1);
    let entries = vec![west.entry("me", &[&uid()], &[])];
    let view = west.view(v1::Slice { entries, ..west.slice(1, &[]) });
    let trust = SharedTrust::new(Trust::Bundles(TrustStore::new(&view.own).unwrap()));
    let (issued, clock) = (Issued::default(), Arc::new(Clock::default()));
    issued.set_view(view);
    let (_node, node) = watch::channel(Some((west.node(), Generation(1))));
    let served = Issuer::serve(west).await;
    let (cell, channel) = watch::channel(Some(served.channel.clone()));
    let issuance =
        Issuance { issued: issued.clone(), trust, clock: clock.clone(), denials: Lane::default(), node, channel };
    let running = tokio::spawn(issuance.run());
    let socket = Socket::serve("outage", &issued);
    let told = |age| State::of(&issued.now(), cell.borrow().is_some(), age, Default::default(), clock.now());

    let mut stream = call(socket.channel().await, FETCH).await.unwrap();
    let first = next(&mut stream).await.unwrap();
    assert_eq!(served.issuer.asked(), 1);
    // Everybody goes, and somebody comes back.
    drop(stream);
    issued.wanted().wait_for(|wanted| wanted.is_empty()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    let mut stream = call(socket.channel().await, FETCH).await.unwrap();
    assert_eq!((next(&mut stream).await.unwrap(), served.issuer.asked()), (first.clone(), 0));

    // The cell is away, past the time of renewal.
    cell.send_replace(None);
    clock.seen(Stamp(now().0 + 2_700_000));
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let mut second = call(socket.channel().await, FETCH).await.unwrap();
    assert_eq!(next(&mut second).await.unwrap(), first);
    let state = told(Some(Duration::from_secs(2700)));
    assert_eq!((state.cell, state.svids, state.overdue), (state::Cell::Away, 1, 1));
    assert!((880.0..900.0).contains(&state.left_s.unwrap()), "{state:?}");
    // It is back: renewed, for both.
    cell.send_replace(Some(served.channel.clone()));
    let renewed = next(&mut stream).await.unwrap();
    assert_ne!(renewed, first);
    assert_eq!((next(&mut second).await.unwrap(), told(None).cell), (renewed, state::Cell::Connected));

    // Away again, until nothing is good any more.
    cell.send_replace(None);
    clock.seen(Stamp(now().0 + 3_700_000));
    assert_eq!(next(&mut stream).await.unwrap_err().code(), Code::Unavailable);
    let state = told(None);
    assert_eq!((state.cell, state.svids, state.left_s), (state::Cell::Away, 0, None));
    let mut late = call(socket.channel().await, FETCH).await.unwrap();
    assert_eq!(next(&mut late).await.unwrap_err().code(), Code::Unavailable);
    running.abort();
}
