//! Cells of real `ambitd` processes on 127.0.0.1, with their administrator.

use crate::process::{Folder, Started, binary, free_address, must_run, run};
use ambit_identity::keys::certificates_from_pem;
use ambit_identity::tls::certified;
use ambit_identity::{Expect, SharedTrust, SvidKey, Trust};
use ambit_model::refusal::Class;
use ambit_model::{Code, Refusal, TrustDomain};
use ambit_proto::status::from_status;
use ambit_proto::v1;
use ambit_proto::v1::membership_client::MembershipClient;
use ambit_transport::{Dialer, Identity};
use anyhow::{Context, Result, bail, ensure};
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Output;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tonic::transport::Channel;
use tonic::{Response, Status};

/// A cell on two loaded cores forms, elects and recovers well within this.
const PATIENCE: Duration = Duration::from_secs(30);
/// Elections are quick where a test does not ask for other.
const ELECTION_MS: u64 = 300;

/// Where one replica lives: its configuration, addresses and data.
#[derive(Debug)]
pub struct Seat {
    /// The configuration file.
    pub config: PathBuf,
    /// gRPC.
    pub listen: SocketAddr,
    /// `/metrics`.
    pub metrics: SocketAddr,
    /// Keys, log, tables.
    pub data: PathBuf,
    /// What its process prints.
    pub log: PathBuf,
}

impl Seat {
    /// Chooses addresses and writes the configuration, with `more` lines in front of its tables.
    pub fn new(folder: &Folder, name: &str, more: &str) -> Result<Seat> {
        Seat::patient(folder, name, more, ELECTION_MS)
    }
    /// The same, with this election timeout.
    fn patient(folder: &Folder, name: &str, more: &str, election_ms: u64) -> Result<Seat> {
        let (listen, metrics) = (free_address()?, free_address()?);
        let (config, data) = (folder.path(&format!("{name}.toml")), folder.path(name));
        let text = format!(
            "data_dir = \"{}\"\nlisten = \"{listen}\"\nmetrics_listen = \"{metrics}\"\n{more}\n\
             [raft]\nelection_timeout_ms = {election_ms}\nheartbeat_ms = 50\n",
            data.display()
        );
        std::fs::write(&config, text)?;
        Ok(Seat { config, listen, metrics, data, log: folder.path(&format!("{name}.log")) })
    }
    /// Runs `ambitd VERB --config F args` to its end.
    pub fn ambitd(&self, verb: &str, args: &[&str]) -> Result<Output> {
        let (program, config) = (binary("ambitd")?.display().to_string(), self.config.display().to_string());
        run(&[&[program.as_str(), verb, "--config", &config], args].concat())
    }
    /// Starts `ambitd run`.
    pub fn start(&self) -> Result<Started> {
        let (program, config) = (binary("ambitd")?.display().to_string(), self.config.display().to_string());
        Started::start(&[&program, "run", "--config", &config], &self.log)
    }
}

struct Replica {
    seat: Seat,
    process: Option<Started>,
}

/// A running cell.
pub struct Cell {
    /// Its trust domain.
    pub trust_domain: TrustDomain,
    /// Its root's fingerprint.
    pub fingerprint: [u8; 32],
    replicas: Vec<Replica>,
    admin: Dialer,
    election_ms: u64,
    /// Further lines of each replica's configuration.
    more: String,
    // After the processes, which write in it.
    folder: Folder,
}

impl Cell {
    /// Founds a cell and lets further replicas join until it has `replicas`, all of them voters.
    pub async fn start(trust_domain: &str, replicas: usize) -> Result<Cell> {
        Cell::patient(trust_domain, replicas, ELECTION_MS).await
    }

    /// The same, of replicas that wait so long for their leader.
    pub async fn patient(trust_domain: &str, replicas: usize, election_ms: u64) -> Result<Cell> {
        Cell::made(Folder::new()?, trust_domain, replicas, election_ms, "").await
    }

    /// The same as [`Cell::start`], with further lines in front of the tables of each configuration, which may name files of
    /// `folder`.
    pub async fn configured(folder: Folder, trust_domain: &str, replicas: usize, more: &str) -> Result<Cell> {
        Cell::made(folder, trust_domain, replicas, ELECTION_MS, more).await
    }

    async fn made(folder: Folder, trust_domain: &str, replicas: usize, election_ms: u64, more: &str) -> Result<Cell> {
        let td: TrustDomain = trust_domain.parse()?;
        let more = more.to_owned();
        let seat = Seat::patient(&folder, "r1", &more, election_ms)?;
        let out = folder.path("admin").display().to_string();
        let made = seat.ambitd("init", &["--trust-domain", trust_domain, "--replica", "1", "--admin-out", &out])?;
        ensure!(made.status.success(), "ambitd init: {}", String::from_utf8_lossy(&made.stderr));
        let printed = String::from_utf8(made.stdout)?;
        let hex = printed.trim().strip_prefix("root fingerprint: ").context("the fingerprint line")?;
        let mut fingerprint = [0; 32];
        hex::decode_to_slice(hex, &mut fingerprint)?;
        let admin = admin_dialer(&folder.path("admin"), &td, fingerprint)?;
        let process = Some(seat.start()?);
        let first = Replica { seat, process };
        let mut cell = Cell { trust_domain: td, fingerprint, replicas: vec![first], admin, election_ms, more, folder };
        cell.wait_for_voters().await?;
        for number in 2..=replicas {
            cell.add(number).await?;
        }
        Ok(cell)
    }

    /// Replicas that join from here on have these lines instead.
    pub fn configure(&mut self, more: &str) {
        more.clone_into(&mut self.more);
    }

    /// Lets the replica with the next number join.
    pub async fn add(&mut self, number: usize) -> Result<()> {
        let joined = self.joined(number, &format!("r{number}")).await?;
        self.replicas.push(joined);
        self.wait_for_voters().await
    }

    /// Another machine joins in the place of one that was removed.
    pub async fn replace(&mut self, number: usize) -> Result<()> {
        let joined = self.joined(number, &format!("r{number}-new")).await?;
        *number.checked_sub(1).and_then(|at| self.replicas.get_mut(at)).context("a replica")? = joined;
        self.wait_for_voters().await
    }

    async fn joined(&self, number: usize, name: &str) -> Result<Replica> {
        let seat = Seat::patient(&self.folder, name, &self.more, self.election_ms)?;
        let token = self.replica_token(number as u64, seat.listen).await?;
        let out = self.join(&seat, number as u64, &hex::encode(self.fingerprint), &token)?;
        ensure!(out.status.success(), "ambitd join: {}", String::from_utf8_lossy(&out.stderr));
        let process = Some(seat.start()?);
        Ok(Replica { seat, process })
    }

    /// Pins what the administrator's context names now, and speaks with its certificate.
    pub fn read_context(&mut self) -> Result<()> {
        let folder = self.folder.path("admin");
        let context: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(folder.join("context.json"))?)?;
        hex::decode_to_slice(context["fingerprint"].as_str().context("a fingerprint")?, &mut self.fingerprint)?;
        self.administered_by(&folder)
    }

    /// A one-time token for a further replica.
    pub async fn replica_token(&self, number: u64, listen: SocketAddr) -> Result<String, Refusal> {
        let request_id = fresh();
        let answer = self
            .insist(|channel| {
                let address = listen.to_string();
                let request = v1::CreateReplicaTokenRequest {
                    request_id: request_id.clone(),
                    replica: number,
                    address,
                    ttl_seconds: 600,
                };
                async move { MembershipClient::new(channel).create_replica_token(request).await }
            })
            .await?;
        Ok(answer.token)
    }

    /// Runs `ambitd join` through the first replica.
    pub fn join(&self, seat: &Seat, number: u64, fingerprint: &str, token: &str) -> Result<Output> {
        let (number, via) = (number.to_string(), self.address(1)?.to_string());
        let who = ["--trust-domain", self.trust_domain.as_str(), "--replica", &number];
        let how = ["--via", via.as_str(), "--fingerprint", fingerprint, "--token", token];
        seat.ambitd("join", &[&who[..], &how[..]].concat())
    }

    /// A place for one more replica of this cell.
    pub fn seat(&self, name: &str) -> Result<Seat> {
        Seat::new(&self.folder, name, "")
    }

    /// Where its replicas live.
    pub fn folder(&self) -> &Folder {
        &self.folder
    }

    /// How many replicas there are, running or not. They are numbered from 1.
    pub fn size(&self) -> usize {
        self.replicas.len()
    }
    fn replica(&self, number: usize) -> Result<&Replica> {
        number.checked_sub(1).and_then(|at| self.replicas.get(at)).with_context(|| format!("replica {number}"))
    }
    /// Where a replica serves gRPC.
    pub fn address(&self, number: usize) -> Result<SocketAddr> {
        Ok(self.replica(number)?.seat.listen)
    }
    /// Where a replica serves its metrics.
    pub fn metrics(&self, number: usize) -> Result<SocketAddr> {
        Ok(self.replica(number)?.seat.metrics)
    }
    /// A path of the administrator's folder.
    pub fn admin_file(&self, name: &str) -> PathBuf {
        self.folder.path("admin").join(name)
    }
    /// A path for a test's own files.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path(name)
    }
    /// The process of a replica.
    pub fn process(&mut self, number: usize) -> Result<&mut Started> {
        let replica = number.checked_sub(1).and_then(|at| self.replicas.get_mut(at)).context("a replica")?;
        replica.process.as_mut().with_context(|| format!("replica {number} is down"))
    }
    /// `kill -9`.
    pub fn kill(&mut self, number: usize) -> Result<()> {
        let replica = number.checked_sub(1).and_then(|at| self.replicas.get_mut(at)).context("a replica")?;
        replica.process.take().map(drop).with_context(|| format!("replica {number} was down already"))
    }
    /// Starts a killed replica again.
    pub fn restart(&mut self, number: usize) -> Result<()> {
        let replica = number.checked_sub(1).and_then(|at| self.replicas.get_mut(at)).context("a replica")?;
        ensure!(replica.process.is_none(), "replica {number} runs");
        replica.process = Some(replica.seat.start()?);
        Ok(())
    }
    /// Where a replica lives.
    pub fn seat_of(&self, number: usize) -> Result<&Seat> {
        Ok(&self.replica(number)?.seat)
    }
    /// From now on the cell is its first replica alone: the others are stopped, and nothing is left of them.
    pub fn forget_others(&mut self) -> Result<()> {
        for gone in self.replicas.drain(1..) {
            drop(gone.process);
            if gone.seat.data.exists() {
                std::fs::remove_dir_all(&gone.seat.data)?;
            }
        }
        Ok(())
    }
    /// Who speaks as the administrator from now on: what `ambitd restore` left in `folder`.
    pub fn administered_by(&mut self, folder: &std::path::Path) -> Result<()> {
        self.admin = admin_dialer(folder, &self.trust_domain, self.fingerprint)?;
        Ok(())
    }
    /// The numbers of the replicas that run.
    pub fn running(&self) -> Vec<usize> {
        (1..=self.size()).filter(|n| self.replica(*n).is_ok_and(|r| r.process.is_some())).collect()
    }

    /// A channel as the administrator.
    pub async fn admin(&self, number: usize) -> Result<Channel, Refusal> {
        self.dial(&self.admin, number).await
    }
    /// A channel without a certificate, as a machine before its enrolment.
    pub async fn anonymous(&self, number: usize) -> Result<Channel, Refusal> {
        self.dial(&self.dialer(Identity::default()), number).await
    }
    /// A channel as somebody else.
    pub async fn channel_as(&self, identity: Identity, number: usize) -> Result<Channel, Refusal> {
        self.dial(&self.dialer(identity), number).await
    }
    /// The administrator's certificate and key.
    pub fn admin_identity(&self) -> Result<Identity> {
        admin_identity(&self.folder.path("admin"))
    }
    /// Dials this cell's replicas as somebody.
    pub fn dialer(&self, identity: Identity) -> Dialer {
        Dialer::new(SharedTrust::new(Trust::Pinned(self.trust_domain.clone(), self.fingerprint)), identity)
    }
    async fn dial(&self, dialer: &Dialer, number: usize) -> Result<Channel, Refusal> {
        let at = self.address(number).map_err(|e| Refusal::new(Code::NotFound, "a replica", e.to_string()))?;
        dialer.channel(at, Expect::ReplicaOf(self.trust_domain.clone())).await
    }

    /// Calls as the administrator at one replica after the other, until one of them says yes or no. The same request
    /// goes to all of them, so that its request id does its work.
    pub async fn insist<T, F, Fut>(&self, mut call: F) -> Result<T, Refusal>
    where
        F: FnMut(Channel) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let until = Instant::now() + PATIENCE;
        let mut number = 1;
        loop {
            let outcome = match self.admin(number).await {
                Ok(channel) => call(channel).await.map(Response::into_inner).map_err(|s| from_status(&s)),
                Err(refusal) => Err(refusal),
            };
            match outcome {
                Err(r) if r.code.class() == Class::Unavailable && Instant::now() < until => {
                    number = number % self.size() + 1;
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                outcome => return outcome,
            }
        }
    }

    /// What a replica says of itself.
    pub async fn status(&self, number: usize) -> Result<v1::StatusResponse, Refusal> {
        let channel = self.admin(number).await?;
        let answer = MembershipClient::new(channel).status(v1::StatusRequest {}).await;
        answer.map(Response::into_inner).map_err(|s| from_status(&s))
    }

    /// Waits until `good` holds of the status of every replica that runs.
    pub async fn wait_for(&self, what: &str, good: impl Fn(&[v1::StatusResponse]) -> bool) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        loop {
            let mut all = Vec::new();
            for number in self.running() {
                all.extend(self.status(number).await.ok());
            }
            if all.len() == self.running().len() && good(&all) {
                return Ok(());
            }
            if Instant::now() > until {
                bail!("{what}: not within {PATIENCE:?}; last seen: {all:?}");
            }
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }

    /// Waits until every replica is a voter and all who run name one leader.
    pub async fn wait_for_voters(&self) -> Result<()> {
        let size = self.size();
        self.wait_for("every replica a voter, one leader", |all| {
            let leader = all.first().map_or(0, |s| s.leader);
            let voters = |s: &v1::StatusResponse| s.members.iter().filter(|m| m.voter).count();
            leader != 0 && all.iter().all(|s| s.leader == leader && voters(s) == size)
        })
        .await
    }

    /// The leader's number, once those who run agree on one of them.
    pub async fn leader(&self) -> Result<usize> {
        let running = self.running();
        let agreed = |all: &[v1::StatusResponse]| {
            let leader = all.first().map_or(0, |s| s.leader);
            running.contains(&(leader as usize)) && all.iter().all(|s| s.leader == leader)
        };
        self.wait_for("one leader", agreed).await?;
        let number = self.running().first().copied().context("a running replica")?;
        Ok(usize::try_from(self.status(number).await?.leader)?)
    }

    /// A replica's metrics page.
    pub fn metrics_page(&self, number: usize) -> Result<String> {
        let url = format!("http://{}/metrics", self.metrics(number)?);
        must_run(&["curl", "--silent", "--fail", "--max-time", "5", &url])
    }
}

fn admin_dialer(folder: &std::path::Path, td: &TrustDomain, fingerprint: [u8; 32]) -> Result<Dialer> {
    let trust = SharedTrust::new(Trust::Pinned(td.clone(), fingerprint));
    Ok(Dialer::new(trust, admin_identity(folder)?))
}

/// The administrator that `ambitd init` left in `folder`.
pub fn admin_identity(folder: &std::path::Path) -> Result<Identity> {
    let chain = certificates_from_pem(&std::fs::read_to_string(folder.join("admin.pem"))?)?;
    let key = SvidKey::from_pem(&std::fs::read_to_string(folder.join("admin.key"))?)?;
    Ok(Identity::new(Some(certified(chain, &key)?)))
}

/// A request id that no other request of any test has.
pub fn fresh() -> Vec<u8> {
    static COUNT: AtomicU64 = AtomicU64::new(1);
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
    let unique = (u64::from(std::process::id()) << 32) + COUNT.fetch_add(1, Ordering::Relaxed);
    [unique.to_be_bytes(), nanos.to_be_bytes()].concat()
}

/// The refusal in an answer that must be one.
pub fn refusal<T>(answer: Result<Response<T>, Status>) -> Result<Refusal> {
    match answer {
        Ok(_) => bail!("accepted, where a refusal was due"),
        Err(status) => Ok(from_status(&status)),
    }
}
