//! A relay between two agents of a stage: sees how many tunnels there are, can fall silent or break them off.

use super::stage::Stage;
use ambit_proto::v1;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::watch;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Does {
    Carry,
    Nothing,
    Break,
}

pub(crate) struct Between {
    at: Ipv4Addr,
    from: Ipv4Addr,
    opened: Arc<AtomicUsize>,
    does: watch::Sender<Does>,
}

impl Between {
    /// West's agent reaches east's by it from now on.
    pub(crate) async fn set(stage: &mut Stage, n: u8) -> Between {
        let (at, from) = (Ipv4Addr::new(127, 0, 82, n), Ipv4Addr::new(127, 0, 83, n));
        let (opened, to) = (Arc::new(AtomicUsize::new(0)), stage.hbone);
        let (does, watched) = watch::channel(Does::Carry);
        let listener = TcpListener::bind((at, to.port())).await.unwrap();
        let count = opened.clone();
        tokio::spawn(async move {
            loop {
                let (mut near, _) = listener.accept().await.unwrap();
                count.fetch_add(1, Ordering::Relaxed);
                let mut does = watched.clone();
                tokio::spawn(async move {
                    let socket = TcpSocket::new_v4().unwrap();
                    socket.bind((from, 0).into()).unwrap();
                    let mut far = socket.connect(to).await.unwrap();
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => return,
                        _ = does.wait_for(|does| *does != Does::Carry) => {}
                    }
                    // Whoever is gone from here says nothing: both sides' kernels go on.
                    let _ = does.wait_for(|does| *does == Does::Break).await;
                    near.set_zero_linger().unwrap();
                    far.set_zero_linger().unwrap();
                });
            }
        });
        let between = Between { at, from, opened, does };
        stage.publish(|w| between.west(w), |e| between.east(e));
        between
    }
    pub(crate) fn west(&self, slice: &mut v1::Slice) {
        slice.endpoints[0].node_address = self.at.to_string();
    }
    pub(crate) fn east(&self, slice: &mut v1::Slice) {
        slice.callers[0].address = self.from.to_string();
    }
    /// Tunnels that were ever opened.
    pub(crate) fn opened(&self) -> usize {
        self.opened.load(Ordering::Relaxed)
    }
    /// Carries nothing any more, and ends nothing.
    pub(crate) fn fall_silent(&self) {
        self.does.send_replace(Does::Nothing);
    }
    /// Breaks off both legs of each tunnel.
    pub(crate) fn break_off(&self) {
        self.does.send_replace(Does::Break);
    }
}
