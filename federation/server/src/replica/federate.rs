//! Bundles of foreign trust domains that are no cells, fetched by the leader (SPIFFE_Federation.md section 5): when each said
//! that it wants to be asked again, no oftener than once a minute, each at its own moment. What is fetched is judged by the
//! state machine. A failure waits for the next time like a success.

mod http;

pub use http::Place;

use super::{Replica, random};
use crate::raft::Role;
use ambit_identity::TrustStore;
use ambit_identity::bundle::document;
use ambit_identity::tls::{Expect, SharedTrust, Trust, client_config, web_client_config};
use ambit_model::bundle::{Bundle, Own};
use ambit_model::{Code, Refusal, TrustDomain};
use ambit_state::objects::{EndpointProfile, RelationshipRow};
use ambit_state::{Command, FetchedBundle, Reply};
use http::Answer;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

const LOOK: Duration = Duration::from_millis(500);
/// Whatever a bundle says (SPIFFE_Federation.md section 4.1 leaves it to us): a minute to a day.
const HINT_S_MIN: u64 = 60;
const HINT_S_MAX: u64 = 86_400;
const HINT_S_DEFAULT: u64 = 300;
/// Fetches under way.
const FETCHES_MAX: usize = 8;
const AUTHORITIES_BYTES_MAX: u64 = 8 << 20;

/// What this replica knows of its fetches; the bundles themselves are the cell's.
pub struct Fetcher {
    web_roots: PathBuf,
    /// By URL: the ETag of the document that was taken, so that it is not sent again.
    etags: Mutex<BTreeMap<String, String>>,
}

impl Fetcher {
    /// Authorities of the web are read from this file when they are needed.
    pub fn new(web_roots: PathBuf) -> Self {
        Self { web_roots, etags: Mutex::default() }
    }

    fn etag(&self, url: &str) -> Option<String> {
        self.etags.lock().unwrap_or_else(PoisonError::into_inner).get(url).cloned()
    }

    fn remember(&self, url: &str, etag: Option<String>) {
        let mut etags = self.etags.lock().unwrap_or_else(PoisonError::into_inner);
        match etag {
            Some(etag) => etags.insert(url.to_owned(), etag),
            None => etags.remove(url),
        };
    }

    fn keep_only(&self, relationships: &[(TrustDomain, String)]) {
        let mut etags = self.etags.lock().unwrap_or_else(PoisonError::into_inner);
        etags.retain(|url, _| relationships.iter().any(|(_, known)| known == url));
    }

    fn web(&self) -> Result<rustls::ClientConfig, Refusal> {
        use std::io::Read;
        let failed = |e: std::io::Error| {
            let expected = format!("authorities of the web in {} (web_roots)", self.web_roots.display());
            Refusal::new(Code::EndpointRefused, expected, e.to_string())
        };
        let mut pem = String::new();
        let file = std::fs::File::open(&self.web_roots).map_err(failed)?;
        file.take(AUTHORITIES_BYTES_MAX).read_to_string(&mut pem).map_err(failed)?;
        web_client_config(&pem, &[b"http/1.1"])
    }
}

/// Fetches while this replica leads, each relationship in its time.
pub async fn run(replica: Replica) {
    let mut due: BTreeMap<(TrustDomain, String), Instant> = BTreeMap::new();
    let mut fetches: JoinSet<(TrustDomain, String, u64)> = JoinSet::new();
    let mut every = tokio::time::interval(LOOK);
    loop {
        every.tick().await;
        while let Some(done) = fetches.try_join_next() {
            if let Ok((td, url, wait_s)) = done {
                due.insert((td, url), Instant::now() + jitter(wait_s));
            }
        }
        if replica.cell().status().role != Role::Leader {
            due.clear();
            continue;
        }
        let all: Vec<(TrustDomain, String)> =
            replica.local(|s| s.relationships().map(|(td, row)| (td.clone(), row.url.clone())).collect());
        due.retain(|key, _| all.contains(key));
        replica.fetcher().keep_only(&all);
        for (td, url) in all {
            // New ones at once.
            let at = due.get(&(td.clone(), url.clone())).copied().unwrap_or_else(Instant::now);
            if at > Instant::now() || fetches.len() >= FETCHES_MAX {
                continue;
            }
            // Not again until this one is done.
            due.insert((td.clone(), url.clone()), Instant::now() + Duration::from_secs(HINT_S_MAX));
            let replica = replica.clone();
            fetches.spawn(async move {
                if let Err(refusal) = refresh(&replica, &td).await {
                    tracing::warn!(trust_domain = %td, %refusal, "foreign bundle not taken");
                }
                let hint =
                    replica.local(|s| s.relationships().find(|(of, _)| **of == td).map(|(_, r)| r.refresh_hint_s));
                (td, url, hint.unwrap_or(HINT_S_DEFAULT))
            });
        }
    }
}

/// A tenth more or less, so that many readers do not come together.
fn jitter(hint_s: u64) -> Duration {
    let ms = hint_s.clamp(HINT_S_MIN, HINT_S_MAX) * 1_000;
    let drawn = u64::from(random::<1>().unwrap_or_default()[0]);
    // Never below a minute.
    Duration::from_millis((ms * 9 / 10 + ms * drawn / 1_280).max(HINT_S_MIN * 1_000))
}

/// Fetches one bundle now and has it judged. Ok: it is the one that holds, new or not.
pub async fn refresh(replica: &Replica, td: &TrustDomain) -> Result<(), Refusal> {
    let row = replica.local(|s| s.relationships().find(|(of, _)| *of == td).map(|(_, row)| row.clone()));
    let row = row.ok_or_else(|| Refusal::new(Code::NotFound, "a federation relationship", td.as_str()))?;
    let config = match &row.profile {
        EndpointProfile::HttpsWeb => replica.fetcher().web()?,
        EndpointProfile::HttpsSpiffe(id) => {
            let known = Bundle::<Own>::new(td.clone(), 0, row.roots.clone());
            let trust = SharedTrust::new(Trust::Bundles(TrustStore::new(&known)?));
            client_config(trust, Expect::Id(id.clone()), None, &[b"http/1.1"])?
        }
    };
    // What this replica has no ETag of is asked for whole.
    let etag = replica.fetcher().etag(&row.url).filter(|_| row.taken.0 != 0 && row.trouble.is_empty());
    let place = Place::parse(&row.url)?;
    match http::get(config, &place, etag.as_deref()).await? {
        Answer::Same => Ok(()),
        Answer::Document { text, etag } => {
            let taken = take(replica, td, &row, &text).await;
            replica.fetcher().remember(&row.url, etag.filter(|_| taken.is_ok()));
            taken
        }
    }
}

async fn take(replica: &Replica, td: &TrustDomain, row: &RelationshipRow, text: &str) -> Result<(), Refusal> {
    let read = document(text)?;
    let sha256: [u8; 32] = Sha256::digest(text).into();
    let known = replica.local(|s| s.peer_jwt(td) == read.jwt_authorities);
    if sha256 == row.sha256 && row.trouble.is_empty() && known {
        return Ok(());
    }
    let bundle = FetchedBundle {
        url: row.url.clone(),
        sequence: read.sequence,
        refresh_hint_s: read.refresh_hint_s.unwrap_or(HINT_S_DEFAULT).clamp(HINT_S_MIN, HINT_S_MAX),
        roots: read.roots,
        sha256,
    };
    let command = Command::TakeBundleWithKeys(td.clone(), bundle, read.jwt_authorities);
    match replica.propose_own(command).await?.outcome? {
        Reply::Items(mut items) if items.len() == 1 => items.remove(0),
        _ => Err(Refusal::new(Code::Internal, "one outcome", "another")),
    }
}
