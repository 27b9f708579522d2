//! Objects as they change: resumed at any replica, in bounded memory for each follower.
//!
//! Who reads slowly holds nothing up: what it misses is looked up again when it has room, and where that is no longer
//! known, it is told the whole state anew, page by page.

use super::OrStatus;
use crate::authorise::authorise;
use crate::raft::Since;
use crate::replica::Replica;
use ambit_model::{Code, Refusal, TrustDomain};
use ambit_proto::convert::service_message;
use ambit_proto::status::to_status;
use ambit_proto::v1;
use ambit_proto::v1::watch_event::Event;
use ambit_state::objects::NodeState;
use ambit_state::{ObjectKey, ObjectKind, State};
use ambit_transport::Caller;
use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::Instant;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// As the table of roles names it.
const METHOD: &str = "/ambit.v1.Watch/Watch";
/// Followers at one replica.
const FOLLOWERS_MAX: usize = 256;
/// Events that a follower has not read.
const QUEUE: usize = 64;
/// Objects read under one lock.
const PAGE: usize = 512;
/// A follower to whom nothing was told for this long is told how far it is.
const BOOKMARK: Duration = Duration::from_secs(10);
/// Who reads nothing at all for this long has lost its place: there are not many, and who may have one is asked again only
/// where something is read.
const STALLED_MAX: Duration = Duration::from_secs(60);
/// A replica that is behind what was told elsewhere may take this long to come up to it.
const CATCH_UP_MAX: Duration = Duration::from_secs(5);

type Told = Result<v1::WatchEvent, Status>;

pub(crate) struct Watches {
    replica: Replica,
    places: Arc<Semaphore>,
}

impl Watches {
    pub(crate) fn new(replica: Replica) -> Watches {
        Watches { replica, places: Arc::new(Semaphore::new(FOLLOWERS_MAX)) }
    }
}

#[tonic::async_trait]
impl v1::watch_server::Watch for Watches {
    type WatchStream = Pin<Box<dyn Stream<Item = Told> + Send>>;

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let caller = request.extensions().get::<Caller>().cloned();
        let m = request.into_inner();
        let kinds = kinds(&m.kinds).or_status()?;
        let busy = || Refusal::new(Code::Busy, format!("at most {FOLLOWERS_MAX} followers at a replica"), "more");
        let place = self.places.clone().try_acquire_owned().map_err(|_| busy()).or_status()?;
        let changed = self.replica.cell().changes().watch();
        // Who was told more elsewhere than is known here hears from a leader whether that is so.
        let knows_less = *changed.borrow() < m.after_revision;
        if !m.stale_ok || knows_less {
            let index = self.replica.cell().read_barrier().await.or_status()?;
            self.noted(index.0).await.or_status()?;
        }
        let (down, queue) = mpsc::channel::<Told>(QUEUE);
        let follower = Follower { replica: self.replica.clone(), kinds, caller, down, changed, _place: place };
        tokio::spawn(follower.run(m.after_revision));
        Ok(Response::new(Box::pin(ReceiverStream::new(queue))))
    }
}

impl Watches {
    /// Changes are noted just after they can be read: a follower that begins must see both.
    async fn noted(&self, index: u64) -> Result<(), Refusal> {
        let mut noted = self.replica.cell().changes().watch();
        let caught_up = tokio::time::timeout(CATCH_UP_MAX, noted.wait_for(|noted| *noted >= index)).await;
        match caught_up {
            Ok(Ok(_)) => Ok(()),
            _ => Err(Refusal::new(Code::Unavailable, format!("this replica at {index}"), "behind")),
        }
    }
}

fn kinds(named: &[String]) -> Result<Vec<ObjectKind>, Refusal> {
    if named.is_empty() {
        return Ok(ObjectKind::ALL.into());
    }
    let known = || ObjectKind::ALL.map(ObjectKind::as_str).join(", ");
    let unknown = |name: &String| Refusal::new(Code::BadRequest, format!("a kind of {}", known()), name.clone());
    named.iter().map(|name| ObjectKind::from_text(name).ok_or_else(|| unknown(name))).collect()
}

struct Follower {
    replica: Replica,
    kinds: Vec<ObjectKind>,
    caller: Option<Caller>,
    down: mpsc::Sender<Told>,
    changed: watch::Receiver<u64>,
    _place: OwnedSemaphorePermit,
}

/// The far end is gone, or was told why it ends.
struct Ended;

impl Follower {
    async fn run(mut self, after: u64) {
        let _ = self.follow(after).await;
    }

    async fn follow(&mut self, after: u64) -> Result<(), Ended> {
        let mut told = after;
        let mut first = true;
        let mut bookmark = Instant::now() + BOOKMARK;
        loop {
            let since = match told {
                0 => Since::Forgotten(*self.changed.borrow()),
                _ => self.replica.cell().changes().since(told),
            };
            let news = match since {
                Since::Forgotten(upto) => {
                    self.whole(upto, told).await?;
                    told = upto;
                    true
                }
                Since::Changed(upto, keys) => {
                    let keys: BTreeSet<ObjectKey> =
                        keys.into_iter().filter(|key| self.kinds.contains(&key.kind())).collect();
                    let any = !keys.is_empty();
                    let keys: Vec<ObjectKey> = keys.into_iter().collect();
                    for page in keys.chunks(PAGE) {
                        self.still_may()?;
                        self.tell(page, upto).await?;
                    }
                    told = upto;
                    any
                }
            };
            if news || first || Instant::now() >= bookmark {
                let synced = v1::WatchSynced { age_ms: self.replica.behind_ms() };
                self.send(told, Event::Synced(synced)).await?;
                bookmark = Instant::now() + BOOKMARK;
                first = false;
            }
            self.wait(bookmark).await?;
        }
    }

    /// Until something is noted, the next bookmark is due, or nobody listens any more. Whoever may not open the stream
    /// any more is told nothing further on it, and is asked before each page: its certificate ended or was revoked, or it
    /// lost its role.
    async fn wait(&mut self, bookmark: Instant) -> Result<(), Ended> {
        tokio::select! {
            changed = self.changed.changed() => changed.map_err(|_| Ended)?,
            () = tokio::time::sleep_until(bookmark) => {}
            () = self.down.closed() => return Err(Ended),
        }
        self.still_may()
    }

    fn still_may(&self) -> Result<(), Ended> {
        let (caller, own) = (self.caller.as_ref(), self.replica.trust_domain());
        let still = authorise(METHOD, caller, own, || self.replica.cell().state(), self.replica.now());
        still.map(drop).map_err(|refusal| {
            // Whoever does not read is not waited for.
            let _ = self.down.try_send(Err(to_status(&refusal)));
            Ended
        })
    }

    /// All objects, page by page. What changes meanwhile came after `upto`, and is told again.
    async fn whole(&self, upto: u64, told: u64) -> Result<(), Ended> {
        let why = match told {
            0 => "first",
            before if before > upto => "unknown",
            _ => "behind",
        };
        self.send(upto, Event::Reset(v1::WatchReset { why: why.to_owned() })).await?;
        let mut last = None;
        loop {
            self.still_may()?;
            let page = self.replica.local(|s| s.objects_after(last.as_ref(), &self.kinds, PAGE));
            if page.is_empty() {
                return Ok(());
            }
            self.tell(&page, upto).await?;
            last = page.last().cloned();
        }
    }

    async fn tell(&self, keys: &[ObjectKey], revision: u64) -> Result<(), Ended> {
        let events: Vec<Event> = self.replica.local(|s| {
            let known = s.known_domains();
            keys.iter().map(|key| event(s, key, &known)).collect()
        });
        for event in events {
            self.send(revision, event).await?;
        }
        Ok(())
    }

    async fn send(&self, revision: u64, event: Event) -> Result<(), Ended> {
        let sent = self.down.send(Ok(v1::WatchEvent { revision, event: Some(event) }));
        match tokio::time::timeout(STALLED_MAX, sent).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Ended),
        }
    }
}

/// The object as it stands, or that it is gone.
fn event(s: &State, key: &ObjectKey, known: &BTreeSet<TrustDomain>) -> Event {
    let gone = |name: String| Event::Gone(v1::WatchGone { kind: key.kind().as_str().to_owned(), name });
    match key {
        ObjectKey::Node(id) => s.node(id).map_or_else(
            || gone(id.to_string()),
            |n| {
                let code = match n.state {
                    NodeState::Untrusted(code) => code.to_string(),
                    _ => String::new(),
                };
                Event::Node(v1::WatchedNode {
                    id: id.to_string(),
                    cluster: n.cluster.to_string(),
                    generation: n.generation.0,
                    state: n.state.as_str().to_owned(),
                    code,
                })
            },
        ),
        ObjectKey::Entry(id) => {
            s.entry(id).map_or_else(|| gone(id.to_string()), |row| Event::Entry(super::entry::message(row)))
        }
        ObjectKey::Service(name) => s.service(name).map_or_else(
            || gone(format!("{}/{}", name.0, name.1)),
            |row| Event::Service(service_message(&name.0, &row.object)),
        ),
        ObjectKey::Group(name) => s.group(name).map_or_else(
            || gone(format!("{}/{}", name.0, name.1)),
            |row| Event::Group(super::policy::group(name, row)),
        ),
        ObjectKey::Egress(name) => s
            .egress_of(name)
            .map_or_else(|| gone(format!("{}/{}", name.0, name.1)), |row| Event::Egress(super::egress::message(row))),
        ObjectKey::Policy(name) => s.policy(name).map_or_else(
            || gone(format!("{}/{}", name.0, name.1)),
            |row| Event::Policy(super::policy::message(name, row, known)),
        ),
    }
}
