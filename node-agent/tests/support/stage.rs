//! Two agents' carrying halves over loopback, for tests of tunnels: real SVIDs of two trust domains, real TLS, real sockets
//! in a namespace entered by setns. What the kernel part would say of a captured connection is an argument.

use super::{Cell, allow};
use ambit_agent::clock::Clock;
use ambit_agent::course::Course;
use ambit_agent::denials::Lane;
use ambit_agent::hbone::{self, Dial, Dialed, Door, Mode, Native, Origin, TunnelError};
use ambit_agent::health::{self, Health};
use ambit_agent::inbound::Inbound;
use ambit_agent::issued::Svid;
use ambit_agent::netns::{Annex, Netns, NetnsThread};
use ambit_agent::outbound::{Captured, Outbound};
use ambit_agent::plane::{Credentials, LocalPod, Plane};
use ambit_agent::pods::Pod;
use ambit_agent::seen::Seen;
use ambit_agent::view::{View, Workload};
use ambit_identity::{SharedTrust, Trust, TrustStore};
use ambit_model::NumericIdentity;
use ambit_proto::v1;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::timeout;

pub(crate) const SOON: Duration = Duration::from_secs(5);
/// Of east's node, which calls nobody.
pub(crate) const HERE: Ipv4Addr = Ipv4Addr::LOCALHOST;

pub(crate) fn trust(view: &View) -> SharedTrust {
    let mut store = TrustStore::new(&view.own).unwrap();
    for bundle in &view.foreign {
        store.add_foreign(bundle).unwrap();
    }
    SharedTrust::new(Trust::Bundles(store))
}

/// A pod of this very namespace: setns needs root, and says so.
pub(crate) fn pod(view: &View, entry: &v1::Entry, address: Ipv4Addr) -> Arc<LocalPod> {
    assert!(nix::unistd::geteuid().is_root(), "this test enters network namespaces: run it as root");
    let path = Path::new("/proc/self/ns/net");
    let pod = Pod {
        name: entry.id.clone(),
        cgroup: entry.id.clone(),
        cgroup_id: 1,
        netns: path.into(),
        netns_id: (0, 0),
        address,
        uid: 0,
        address6: None,
    };
    let entry = view.entries.iter().find(|e| e.id.as_str() == entry.id).unwrap().clone();
    let workload = Workload { pod, entry, number: NumericIdentity(256) };
    Arc::new(LocalPod { workload, netns: Netns::open(path).unwrap() })
}

pub(crate) fn plane(view: Arc<View>, pods: Vec<Arc<LocalPod>>, svids: &[Arc<Svid>], address: Ipv4Addr) -> Arc<Plane> {
    let trust = trust(&view);
    let credentials: Vec<_> =
        svids.iter().map(|s| Arc::new(Credentials::new(s.clone(), trust.clone()).unwrap())).collect();
    Arc::new(Plane::new(view, pods, credentials, trust, address))
}

/// West's `web` calls east's `db` at `db_address`; east's agent listens on `hbone`, and west's node is at `home`.
pub(crate) struct Stage {
    pub(crate) home: Ipv4Addr,
    pub(crate) west: Cell,
    pub(crate) east: Cell,
    pub(crate) web: Arc<LocalPod>,
    pub(crate) web_entry: v1::Entry,
    pub(crate) db_entry: v1::Entry,
    pub(crate) web_svid: Arc<Svid>,
    pub(crate) db_svid: Arc<Svid>,
    pub(crate) db: TcpListener,
    pub(crate) hbone: SocketAddr,
    pub(crate) west_plane: watch::Sender<Option<Arc<Plane>>>,
    pub(crate) east_plane: watch::Sender<Option<Arc<Plane>>>,
    pub(crate) west_denials: Lane,
    pub(crate) east_denials: Lane,
    pub(crate) east_clock: Arc<Clock>,
    /// Of east's agent, and of west's.
    pub(crate) east_course: Course,
    pub(crate) west_course: Course,
    pub(crate) health: Health,
    pub(crate) annex: Annex,
    pub(crate) outbound: Outbound,
    /// Of west's agent, and of east's.
    pub(crate) seen: [Seen; 2],
}

impl Stage {
    /// Addresses end in `n`, so that tests of one process do not meet.
    pub(crate) async fn set(n: u8) -> Stage {
        let (mut west, mut east) = (Cell::founded("west", 1), Cell::founded("east", 2));
        let web_entry = west.entry("web", &["cgroup:web"], &[]);
        let db_entry = east.entry("db", &["cgroup:db"], &[]);
        let (web_svid, db_svid) = (west.svid("web"), east.svid("db"));
        let db = TcpListener::bind((Ipv4Addr::new(127, 0, 77, n), 0)).await.unwrap();
        let hbone = TcpListener::bind((Ipv4Addr::new(127, 0, 78, n), 0)).await.unwrap();
        let at = hbone.local_addr().unwrap();
        let (west_plane, west_rx) = watch::channel(None);
        let (east_plane, east_rx) = watch::channel(None);
        let (west_denials, east_denials) = (Lane::default(), Lane::default());
        let clock = Arc::new(Clock::default());
        let inbound = Inbound::new(east_rx, east_denials.clone(), NetnsThread::start().unwrap(), clock.clone());
        let (east_course, west_course) = (Course::default(), Course::default());
        let seen = [Seen::default(), Seen::default()];
        tokio::spawn(inbound.in_course(east_course.clone()).seen_by(seen[1].clone()).serve(hbone));
        let health = Health::new(None, west_denials.clone());
        // As the annex stands beside its pods: here all are in one namespace.
        let annex = Annex::new(NetnsThread::start().unwrap(), Netns::open(Path::new("/proc/self/ns/net")).unwrap());
        let outbound =
            Outbound::new(west_rx, west_denials.clone(), health.clone(), clock.clone(), annex.clone(), at.port());
        let outbound = outbound.in_course(west_course.clone()).seen_by(seen[0].clone());
        tokio::spawn(outbound.clone().cut_denied());
        let mut stage = Stage {
            home: Ipv4Addr::new(127, 0, 76, n),
            web: pod(
                &west.view(v1::Slice { entries: vec![web_entry.clone()], ..west.slice(0, &[]) }),
                &web_entry,
                Ipv4Addr::new(127, 0, 74, n),
            ),
            west,
            east,
            web_entry,
            db_entry,
            web_svid,
            db_svid,
            db,
            hbone: at,
            west_plane,
            east_plane,
            west_denials,
            east_denials,
            east_clock: clock,
            east_course,
            west_course,
            health,
            annex,
            outbound,
            seen,
        };
        stage.publish(|_| (), |_| ());
        stage
    }
    /// East's agent at the door of db's pod, on the port of the other one.
    pub(crate) async fn open_pod_door(&self) -> SocketAddr {
        let at = SocketAddr::from((*self.db_at().ip(), self.hbone.port()));
        let (plane, denials) = (self.east_plane.subscribe(), self.east_denials.clone());
        let inbound = Inbound::new(plane, denials, NetnsThread::start().unwrap(), self.east_clock.clone());
        tokio::spawn(inbound.serve_at(Door::Pod, TcpListener::bind(at).await.unwrap()));
        at
    }
    /// Web's, as west's node reports it.
    pub(crate) fn web_endpoint(&self) -> v1::Endpoint {
        v1::Endpoint {
            spiffe_id: self.west.id("web"),
            address: self.web.workload.pod.address.to_string(),
            cluster: "west".into(),
            node_address: self.home.to_string(),
            node: self.west.node().to_string(),
            generation: 1,
        }
    }
    pub(crate) fn db_at(&self) -> SocketAddrV4 {
        let SocketAddr::V4(at) = self.db.local_addr().unwrap() else { panic!("IPv4") };
        at
    }
    pub(crate) fn endpoint(&self, node_address: &str) -> v1::Endpoint {
        v1::Endpoint {
            spiffe_id: self.east.id("db"),
            address: self.db_at().ip().to_string(),
            cluster: "east".into(),
            node_address: node_address.into(),
            node: self.east.node().to_string(),
            generation: 1,
        }
    }
    /// Where west's node is since this generation of it.
    pub(crate) fn caller(&self, generation: u64, address: &str) -> v1::NodeAddress {
        let (trust_domain, node) = ("west".to_owned(), self.west.node().to_string());
        v1::NodeAddress { trust_domain, node, generation, address: address.into() }
    }
    /// Publishes both planes; by default both cells allow web -> db on every port.
    pub(crate) fn publish(&mut self, west: impl FnOnce(&mut v1::Slice), east: impl FnOnce(&mut v1::Slice)) {
        let policy = allow("db", "spiffe://east/db", "spiffe://west/web", &[]);
        let mut w = self.west.slice(1, &[&self.east]);
        w.entries = vec![self.web_entry.clone()];
        w.policies = vec![policy.clone()];
        w.endpoints = vec![self.endpoint(&self.hbone.ip().to_string())];
        west(&mut w);
        let mut e = self.east.slice(1, &[&self.west]);
        e.entries = vec![self.db_entry.clone()];
        e.policies = vec![policy];
        e.callers = vec![self.caller(1, &self.home.to_string())];
        east(&mut e);
        let (w, e) = (self.west.view(w), self.east.view(e));
        // As the stream does: whom to refuse is known before the plane is made.
        assert!(self.west_denials.offer(w.denials.clone()) && self.east_denials.offer(e.denials.clone()));
        let (web, svid) = (vec![self.web.clone()], std::slice::from_ref(&self.web_svid));
        self.west_plane.send_replace(Some(plane(w, web, svid, self.home)));
        let db = pod(&e, &self.db_entry, *self.db_at().ip());
        self.east_plane.send_replace(Some(plane(e, vec![db], std::slice::from_ref(&self.db_svid), HERE)));
    }
    /// A tunnel to east's agent in web's name, from this address.
    pub(crate) async fn dial(&self, from: Ipv4Addr, mode: Mode) -> Result<Dialed, TunnelError> {
        let plane = self.west_plane.borrow().clone().unwrap();
        let (name, config) = health::credentials(&plane, self.web.id(), &self.east.id("db").parse().unwrap())?;
        let (node, holder, trust) = (self.hbone, self.east.node(), plane.trust.current());
        hbone::dial(Dial { from: Origin::Node(from), node, holder, name, config, trust }, mode).await
    }
    /// A native one, from web's node.
    pub(crate) async fn native(&self) -> Native {
        match self.dial(self.home, Mode::Any).await.unwrap() {
            Dialed::Native(native) => *native,
            Dialed::Hbone(_) => panic!("our own agents agree on the native mode"),
        }
    }
    /// An application's connection, captured with this record.
    pub(crate) async fn call(&self, captured: Option<Captured>) -> TcpStream {
        let capture = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let app = TcpStream::connect(capture.local_addr().unwrap()).await.unwrap();
        let (tcp, _) = capture.accept().await.unwrap();
        let (outbound, web) = (self.outbound.clone(), self.web.clone());
        tokio::spawn(async move { outbound.take(&web, tcp, captured).await });
        app
    }
    pub(crate) async fn call_db(&self) -> TcpStream {
        self.call(Some(Captured { asked: self.db_at().into(), endpoint: self.db_at().into() })).await
    }
    /// West's agent probes what it avoids, until this is aborted.
    pub(crate) fn probe(&self) -> tokio::task::JoinHandle<()> {
        let (plane, denials) = (self.west_plane.subscribe(), self.west_denials.clone());
        tokio::spawn(self.health.clone().probe(plane, denials, self.annex.clone()))
    }
    /// Nobody is avoided any more.
    pub(crate) async fn healthy(&self) {
        let healthy = async {
            while !self.health.unhealthy().is_empty() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(SOON, healthy).await.expect("healthy again");
    }
    pub(crate) async fn served(&self) -> (TcpStream, SocketAddr) {
        timeout(SOON, self.db.accept()).await.expect("the pod is reached").unwrap()
    }
}

pub(crate) async fn is_reset(mut app: TcpStream) -> bool {
    let read = timeout(SOON, app.read(&mut [0; 16])).await.expect("an end, not silence");
    matches!(read, Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset)
}

pub(crate) async fn round_trip(app: &mut TcpStream, pod: &mut TcpStream, bytes: usize) {
    let sent: Vec<u8> = (0..bytes).map(|i| (i % 251) as u8).collect();
    let (mut there, mut back) = (vec![0; bytes], vec![0; bytes]);
    timeout(SOON, async {
        let _ = tokio::join!(app.write_all(&sent), pod.read_exact(&mut there));
        let _ = tokio::join!(pod.write_all(&there), app.read_exact(&mut back));
    })
    .await
    .expect("bytes flow");
    assert!(there == sent && back == sent);
}

/// Both ends in order, and the agents have seen it.
pub(crate) async fn ended(mut app: TcpStream, mut pod: TcpStream) {
    app.shutdown().await.unwrap();
    assert_eq!(timeout(SOON, pod.read(&mut [0; 1])).await.expect("FIN crosses").unwrap(), 0);
    pod.shutdown().await.unwrap();
    assert_eq!(timeout(SOON, app.read(&mut [0; 1])).await.expect("and back").unwrap(), 0);
    tokio::time::sleep(Duration::from_millis(20)).await;
}
