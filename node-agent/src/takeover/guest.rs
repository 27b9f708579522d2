//! The side of a new agent.

use super::{DENIALS, OUT, PREPARE_MAX, PROTOCOL, SLICE, Said, Sockets, TAKE_MAX, bad, broken, place, say, understood};
use crate::denials::Lane;
use crate::handover::Wire;
use crate::metrics::METRICS;
use ambit_model::Refusal;
use ambit_proto::v1;
use prost::Message;
use std::io;
use std::path::Path;
use std::sync::Arc;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::timeout;

/// Sockets of pods, of threads that carry, and a few.
const SOCKETS_MAX: usize = 2048;

/// What a new agent passes on of what its cell says, the newest of each kind.
#[derive(Clone, Debug)]
pub struct Relay {
    slice: Arc<watch::Sender<Option<v1::Slice>>>,
    denials: Arc<watch::Sender<Option<v1::Denials>>>,
}

impl Relay {
    /// Passes a slice on, while somebody listens.
    pub fn slice(&self, slice: &v1::Slice) {
        if self.slice.receiver_count() > 0 {
            self.slice.send_replace(Some(slice.clone()));
        }
    }
    /// The same for whom to refuse.
    pub fn denials(&self, denials: &v1::Denials) {
        if self.denials.receiver_count() > 0 {
            self.denials.send_replace(Some(denials.clone()));
        }
    }
}

/// A new agent, as it meets the one that serves.
#[derive(Debug)]
pub struct Guest {
    wire: Arc<Wire>,
}

/// Whether an agent serves this node.
pub async fn is_served(data_dir: &Path) -> bool {
    UnixStream::connect(place(data_dir)).await.is_ok()
}

/// Calls the agent that serves this node; none where none does.
///
/// # Errors
/// It refuses: [`Code::TakeOverRefused`].
pub async fn call(data_dir: &Path) -> Result<Option<Guest>, Refusal> {
    let layout = hex::encode(ambit_ebpf::map_layout());
    call_as(data_dir, PROTOCOL, layout).await
}

async fn call_as(data_dir: &Path, protocol: u32, layout: String) -> Result<Option<Guest>, Refusal> {
    let path = place(data_dir);
    let stream = match UnixStream::connect(&path).await {
        Ok(stream) => stream,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => return Ok(None),
        Err(e) => return Err(broken(e)),
    };
    let wire = Arc::new(Wire::new(stream));
    say(&wire, &Said::Hello { protocol, version: env!("CARGO_PKG_VERSION").into(), layout }).await?;
    // It may meet another one just now.
    let answer = timeout(PREPARE_MAX + TAKE_MAX, wire.next()).await.map_err(|e| broken(e.into()))?.map_err(broken)?;
    match answer.as_ref().map(understood).transpose()? {
        Some(Said::Welcome { version }) => {
            tracing::info!(version, "taking over from the agent that serves");
            Ok(Some(Guest { wire }))
        }
        Some(Said::Refused { code, expected, found }) => Err(bad(&expected, format!("{found} ({code})"))),
        Some(_) => Err(bad("welcome", "another word")),
        None => Err(bad("welcome", "its end: it is ending; start this agent again once it has")),
    }
}

impl Guest {
    /// Passes on what the cell says, and whether it puts this node out, until the other one has ended.
    pub fn relay(&self, lane: &Lane) -> Relay {
        let (mut lists, mut out) = (lane.watch(), false);
        let (slice, mut slices) = watch::channel(None::<v1::Slice>);
        let (denial, mut denials) = watch::channel(None::<v1::Denials>);
        let wire = self.wire.clone();
        tokio::spawn(async move {
            loop {
                let (kind, content) = tokio::select! {
                    // Whom to refuse comes first.
                    biased;
                    Ok(_) = lists.wait_for(|now| now.is_out() != out) => {
                        out = !out;
                        (OUT, Some(vec![u8::from(out)]))
                    }
                    Ok(()) = denials.changed() => (DENIALS, denials.borrow_and_update().as_ref().map(Message::encode_to_vec)),
                    Ok(()) = slices.changed() => (SLICE, slices.borrow_and_update().as_ref().map(Message::encode_to_vec)),
                    else => return,
                };
                // It has ended: nobody follows any more.
                if wire.send(kind, &content.unwrap_or_default(), None).await.is_err() {
                    return;
                }
            }
        });
        Relay { slice: Arc::new(slice), denials: Arc::new(denial) }
    }

    /// Asks for the sockets; from the answer on the kernel's tables are this process's to write. One that has died gives what
    /// it gave.
    ///
    /// # Errors
    /// It refuses, or says what makes no sense.
    pub async fn give(&self) -> Result<Sockets, Refusal> {
        let mut sockets = Sockets::new();
        if say(&self.wire, &Said::Give).await.is_err() {
            tracing::warn!("the former agent was gone before it handed anything over");
            return Ok(sockets);
        }
        loop {
            let frame = timeout(TAKE_MAX, self.wire.next()).await.map_err(|e| broken(e.into()))?;
            let Ok(Some(mut frame)) = frame else {
                tracing::warn!(sockets = sockets.len(), "the former agent died while it handed over");
                return Ok(sockets);
            };
            match (understood(&frame)?, frame.descriptor.take()) {
                (Said::Socket(socket), Some(fd)) if sockets.len() < SOCKETS_MAX => drop(sockets.insert(socket, fd)),
                (Said::Given { sockets: given }, None) if given == sockets.len() => return Ok(sockets),
                (Said::Refused { code, expected, found }, _) => {
                    return Err(bad(&expected, format!("{found} ({code})")));
                }
                (said, _) => return Err(bad("a socket, or that these were all", format!("{said:?}"))),
            }
        }
    }

    /// Says that this one serves: the other drains. One that is gone need not hear it.
    pub async fn serving(&self) {
        if say(&self.wire, &Said::Serving).await.is_err() {
            tracing::warn!("the former agent was gone before this one served");
        }
    }

    /// Waits for what became of the connections of the former agent, and counts them.
    pub async fn drained(&self) {
        let said = self.wire.next().await.ok().flatten().as_ref().map(understood);
        match said {
            Some(Ok(Said::Drained { ended, cut })) => {
                METRICS.drained.add(["ended"], ended as f64);
                METRICS.drained.add(["cut"], cut as f64);
                tracing::info!(ended, cut, "the former agent has drained");
            }
            said => {
                tracing::warn!(?said, "the former agent ended without a word; what it carried is lost and not counted")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handover::Frame;

    #[tokio::test]
    async fn what_the_cell_says_is_passed_on_with_whether_the_node_is_out() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (guest, host) = (Guest { wire: Arc::new(Wire::new(ours)) }, Wire::new(theirs));
        let lane = Lane::default();
        let relay = guest.relay(&lane);
        let next = async || {
            let Frame { kind, content, .. } = timeout(TAKE_MAX, host.next()).await.unwrap().unwrap().unwrap();
            (kind, content)
        };
        for out in [true, false] {
            lane.set_out(out);
            assert_eq!(next().await, (OUT, vec![u8::from(out)]));
        }
        let list = v1::Denials { revision: 3, ..Default::default() };
        relay.denials(&list);
        assert_eq!(next().await, (DENIALS, list.encode_to_vec()));
        let slice = v1::Slice { revision: 3, ..Default::default() };
        relay.slice(&slice);
        assert_eq!(next().await, (SLICE, slice.encode_to_vec()));
    }
}
