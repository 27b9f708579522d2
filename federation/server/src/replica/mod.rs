//! One replica: its keys, its place in the cell, and what all services share.

pub mod agents;
pub mod attest;
pub mod audit;
pub mod authority;
pub mod backup;
pub mod blobs;
pub mod budget;
pub mod cosign;
pub mod cuts;
pub mod evidence;
pub mod federate;
pub mod files;
pub mod findings;
pub mod found;
pub mod issuing;
pub mod jwt;
pub mod key_set;
pub mod keyring;
pub mod lease;
pub mod local;
pub mod peering;
pub mod policies;
pub mod propagation;
pub mod pull;
pub mod recover;
pub mod reports;
pub mod restore;
pub mod run;
pub mod seal;
pub mod seen;
pub mod standby;
pub mod ticket;
pub mod upkeep;
pub mod verdicts;
pub mod work;

use crate::authorise::{Client, Reach, Refusals};
use crate::raft::Cell;
use agents::Agents;
use ambit_identity::document::OidcIssuer;
use ambit_identity::tls::{SharedTrust, Trust};
use ambit_identity::{RecordKey, TrustStore};
use ambit_model::bundle::{Bundle, Foreign, Own};
use ambit_model::{Code, Refusal, Stamp, TrustDomain};
use ambit_state::grant::Fences;
use ambit_state::{Applied, Bundles, Command, State};
use ambit_transport::{Dialer, Identity};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::watch;

/// A replica further than this from the cell's time signs nothing.
const CLOCK_SKEW_MS_MAX: u64 = 30_000;

thread_local! {
    /// Whether this thread reads the state; kept in debug builds, where a read within a read is caught.
    static READING: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// What the services of one replica share. Cheap to clone.
#[derive(Clone)]
pub struct Replica {
    inner: Arc<Inner>,
}

struct Inner {
    cell: Cell,
    trust_domain: TrustDomain,
    id: u64,
    address: String,
    data_dir: std::path::PathBuf,
    /// The other replicas as `join` was told; replicated state replaces it.
    told: Vec<(u64, String)>,
    issuers: authority::Issuers,
    /// How long the intermediates last that it asks for, milliseconds.
    lifetime_ms: u64,
    files: files::Files,
    /// What it shows in handshakes.
    identity: Identity,
    record: RecordKey,
    keyring: keyring::Keyring,
    logs: attest::Logs,
    trust: SharedTrust,
    dialer: Dialer,
    agents: Agents,
    seen: seen::Seen,
    findings: findings::Findings,
    remembered: cuts::Remembered,
    board: cuts::Board,
    blobs: blobs::Blobs,
    work: work::Work,
    verdicts: verdicts::Verdicts,
    reports: reports::Reports,
    ticket_keys: ticket::OpenKeys,
    oidc_issuer: Option<OidcIssuer>,
    jwt_keys: jwt::OpenJwtKeys,
    issuance_budgets: issuing::Budgets,
    policies: policies::Policies,
    /// The cell's revision, once trust follows it: what streams wait for, instead of every entry applied.
    revision: watch::Sender<u64>,
    propagation: propagation::Propagation,
    /// What was refused here.
    refusals: Refusals,
    /// Fetches foreign bundles, where this replica leads.
    fetcher: federate::Fetcher,
    /// How old what is known of each peer is; known where pulling happens.
    heard: Mutex<pull::Heard>,
    /// How far records went when each pull was heard of.
    floors: Mutex<cosign::Floors>,
    /// By which of our roots and keys each peer said that it verifies, and when.
    peers_hold: Mutex<BTreeMap<TrustDomain, (Held, Instant)>>,
    /// Under which this replica signs, where the cell has a witness.
    lease: Mutex<ambit_state::lease::Lease>,
}

/// By what somebody verifies.
#[derive(Clone, Debug, Default)]
pub struct Held {
    /// SHA-256 of roots.
    pub roots: Vec<[u8; 32]>,
    /// JWT authorities.
    pub kids: Vec<String>,
}

impl Replica {
    /// The Raft group.
    pub fn cell(&self) -> &Cell {
        &self.inner.cell
    }
    /// The cell's trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.inner.trust_domain
    }
    /// This replica's number.
    pub fn id(&self) -> u64 {
        self.inner.id
    }
    /// This replica's own address.
    pub fn address(&self) -> &str {
        &self.inner.address
    }
    /// This replica's record key.
    pub fn record(&self) -> &RecordKey {
        &self.inner.record
    }
    /// The keys to which others wrap.
    pub fn keyring(&self) -> &keyring::Keyring {
        &self.inner.keyring
    }
    /// Bundles as of the last applied entry.
    pub fn trust(&self) -> &SharedTrust {
        &self.inner.trust
    }
    /// Dials as this replica.
    pub fn dialer(&self) -> &Dialer {
        &self.inner.dialer
    }
    /// Agents whose streams end here.
    pub fn agents(&self) -> &Agents {
        &self.inner.agents
    }
    /// Questions to agents here that wait for answers.
    pub fn findings(&self) -> &findings::Findings {
        &self.inner.findings
    }
    /// Who called whom, as nodes told it here.
    pub fn seen(&self) -> &seen::Seen {
        &self.inner.seen
    }
    /// What agents were sent lately.
    pub fn remembered(&self) -> &cuts::Remembered {
        &self.inner.remembered
    }
    /// What each node needs now.
    pub fn board(&self) -> &cuts::Board {
        &self.inner.board
    }
    /// Evidence bodies and allow-lists.
    pub fn blobs(&self) -> &blobs::Blobs {
        &self.inner.blobs
    }
    /// Where judging is done.
    pub fn work(&self) -> &work::Work {
        &self.inner.work
    }
    /// Where good verdicts of rounds go.
    pub fn verdicts(&self) -> &verdicts::Verdicts {
        &self.inner.verdicts
    }
    /// Where what nodes say of themselves goes.
    pub fn reports(&self) -> &reports::Reports {
        &self.inner.reports
    }
    /// Fetches foreign bundles.
    pub fn fetcher(&self) -> &federate::Fetcher {
        &self.inner.fetcher
    }
    /// How long changes of documents take to nodes' kernels.
    pub fn propagation(&self) -> &propagation::Propagation {
        &self.inner.propagation
    }
    /// What was refused here.
    pub fn refusals(&self) -> &Refusals {
        &self.inner.refusals
    }
    /// Ticket keys, unwrapped.
    pub fn ticket_keys(&self) -> &ticket::OpenKeys {
        &self.inner.ticket_keys
    }
    /// What nodes may have signed.
    pub fn issuance_budgets(&self) -> &issuing::Budgets {
        &self.inner.issuance_budgets
    }
    /// Whom tokens name as their maker.
    pub fn oidc_issuer(&self) -> Option<&OidcIssuer> {
        self.inner.oidc_issuer.as_ref()
    }
    /// JWT authorities, unwrapped.
    pub fn jwt_keys(&self) -> &jwt::OpenJwtKeys {
        &self.inner.jwt_keys
    }
    /// Changes of anything that a slice is made of.
    pub fn watch_revision(&self) -> watch::Receiver<u64> {
        self.inner.revision.subscribe()
    }
    /// Work that outlives the stream that began it; it ends with the replica.
    pub fn background(&self, task: impl Future<Output = ()> + Send + 'static) {
        tokio::spawn(task);
    }
    /// Notes a pull that brought all there was, by when it was sent.
    pub fn heard(&self, peer: &TrustDomain, sent: Instant) {
        self.inner.heard.lock().unwrap_or_else(PoisonError::into_inner).note(peer, sent);
    }
    /// Age of what is known of a peer, ms; none where this replica does not pull.
    pub fn age_ms(&self, peer: &TrustDomain) -> Option<u64> {
        let heard = self.inner.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.age(peer, Instant::now()).map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX))
    }

    /// Notes by what of ours a peer verifies.
    pub fn peer_holds(&self, peer: TrustDomain, held: Held) {
        let mut hold = self.inner.peers_hold.lock().unwrap_or_else(PoisonError::into_inner);
        hold.insert(peer, (held, Instant::now()));
    }
    /// What peers said here that they verify by, and how long ago.
    pub fn peers_hold(&self) -> Vec<(TrustDomain, Held, Duration)> {
        let hold = self.inner.peers_hold.lock().unwrap_or_else(PoisonError::into_inner);
        hold.iter().map(|(td, (held, at))| (td.clone(), held.clone(), at.elapsed())).collect()
    }

    /// Commits and applies a command of `client` under its own request id.
    pub async fn propose(
        &self,
        client: impl Into<Client>,
        request: [u8; 16],
        command: Command,
    ) -> Result<Applied, Refusal> {
        let Client { id, reach } = client.into();
        let command = match reach {
            Reach::Whole => command,
            Reach::Clusters(clusters) => Command::Within(clusters, Box::new(command)),
        };
        self.cell().propose(id, request, command).await
    }
    /// Commits a command of this replica's own, which nobody retries.
    pub async fn propose_own(&self, command: Command) -> Result<Applied, Refusal> {
        self.cell().propose(own_client(self.id()), fresh(), command).await
    }
    /// Reads the state as of an index that covers every acknowledged write (I3).
    pub async fn read<T>(&self, f: impl FnOnce(&State) -> T) -> Result<T, Refusal> {
        self.cell().read_barrier().await?;
        Ok(self.local(f))
    }
    /// Reads this replica's own state, which may be behind. Never from within another read: it would wait for a writer
    /// that waits for the outer one, for ever.
    pub fn local<T>(&self, f: impl FnOnce(&State) -> T) -> T {
        debug_assert!(!READING.replace(true), "a read of the state from within another");
        let read = f(&self.cell().state());
        READING.set(false);
        read
    }
    /// Refuses to sign where this machine's clock and the cell's time are too far apart (I15): one of them is wrong.
    pub fn check_clock(&self) -> Result<(), Refusal> {
        let (cell, here) = (self.local(State::stamp).0, wall_clock().0);
        if cell.abs_diff(here) <= CLOCK_SKEW_MS_MAX {
            return Ok(());
        }
        let expected = format!("this machine's clock within {} s of the cell's time", CLOCK_SKEW_MS_MAX / 1000);
        Err(Refusal::new(Code::IssuerUnavailable, expected, format!("{} ms apart", cell.abs_diff(here))))
    }
    /// How long ago, by this machine's clock, the last entry applied here was stamped. A leader writes one each second.
    pub fn behind_ms(&self) -> u64 {
        wall_clock().0.saturating_sub(self.local(State::stamp).0)
    }
    /// The later of the cell's time and this machine's.
    pub fn now(&self) -> Stamp {
        self.local(State::stamp).max(wall_clock())
    }
}

/// This machine's clock. Only drivers ask it.
pub fn wall_clock() -> Stamp {
    Stamp(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX)))
}

/// Random bytes from the system.
pub fn random<const N: usize>() -> Result<[u8; N], Refusal> {
    let mut out = [0u8; N];
    aws_lc_rs::rand::fill(&mut out).map_err(|e| Refusal::new(Code::Internal, "random bytes", e.to_string()))?;
    Ok(out)
}

/// The namespace of a replica's own request ids.
fn own_client(replica: u64) -> [u8; 32] {
    Sha256::digest(format!("replica {replica}")).into()
}

/// A request id of this replica's own.
fn fresh() -> [u8; 16] {
    // Without randomness nothing else works either; zeros mean "never retried" to the state machine.
    random().unwrap_or_default()
}

/// Own and foreign roots, from [`State::bundles`], whom [`State::denied_authorities`] refuses, and what [`State::fences`] does. A foreign bundle that
/// cannot be used is left out: nobody of that trust domain is taken for who it says, and the others are not held up.
pub fn trust_of(
    mut bundles: Bundles,
    denied: BTreeSet<(TrustDomain, String)>,
    fences: Fences,
    own: &TrustDomain,
) -> Result<Trust, Refusal> {
    let (sequence, roots) = bundles.remove(own).unwrap_or_default();
    let mut store = TrustStore::new(&Bundle::<Own>::new(own.clone(), sequence, roots))?;
    for (td, (sequence, roots)) in bundles {
        if let Err(refusal) = store.add_foreign(&Bundle::<Foreign>::new(td.clone(), sequence, roots)) {
            tracing::error!(trust_domain = %td, %refusal, "foreign bundle not taken");
        }
    }
    store.deny_authorities(denied);
    store.fence(fences);
    Ok(Trust::Bundles(store))
}
