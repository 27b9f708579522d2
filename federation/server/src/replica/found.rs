//! `ambitd init` and `ambitd join`: how a replica gets its keys and its place.

use super::attest::Prover;
use super::authority::above_in;
use super::files::{Card, Files, write_private};
use super::keyring::Keyring;
use super::{random, wall_clock};
use crate::config::Config;
use crate::raft::{self, Cell, Network, Options};
use crate::store::StoreError;
use ambit_identity::keys::certificates_to_pem;
use ambit_identity::tls::{Expect, SharedTrust, Trust};
use ambit_identity::{Csr, IssuingKey, KeySet, RecordKey, Root, SvidKey, fingerprint};
use ambit_model::{Code, Lifetime, Refusal, ReplicaId, TrustDomain};
use ambit_proto::status::from_status;
use ambit_proto::v1;
use ambit_state::Command;
use ambit_state::objects::{CellRow, KeySetRow, Member};
use ambit_tpm::{Attester, TpmWrapKey};
use ambit_transport::{Dialer, Identity};
use rustls_pki_types::CertificateDer;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tonic::transport::Channel;

const WEEK_MS: u64 = 7 * 24 * 3_600_000;
const ADMIN_MS: u64 = 8 * 3_600_000;
/// The founding entry commits within an election or two; a disk that needs longer is broken.
const FOUND_TIMEOUT: Duration = Duration::from_secs(20);

/// Options of the Raft group from the configuration.
pub fn raft_options(config: &Config, replica: u64) -> Result<Options, Refusal> {
    let mut options = Options::new(ReplicaId(replica), config.data_dir.clone());
    options.election_timeout = config.raft.election_timeout();
    options.heartbeat = config.raft.heartbeat();
    options.seed = u64::from_be_bytes(random()?);
    Ok(options)
}

/// Why a store does not start, with its causes.
pub(super) fn start_failed(e: raft::StartError) -> Refusal {
    let code = match &e {
        raft::StartError::Store(StoreError::Damaged { .. }) => Code::StoreDamaged,
        raft::StartError::Store(
            StoreError::Io { .. } | StoreError::Engine { .. } | StoreError::Locked(_) | StoreError::Newer { .. },
        ) => Code::StoreUnusable,
        _ => Code::ConfigInvalid,
    };
    let mut text = e.to_string();
    let mut source = std::error::Error::source(&e);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    Refusal::new(code, "a replica's store that can start", text)
}

fn already() -> Refusal {
    Refusal::new(Code::AlreadyExists, "an empty data_dir", "one that holds a replica's identity")
}

/// Founds a cell: root, first replica, administrator. Returns the root's fingerprint.
pub async fn init(config: &Config, td: &TrustDomain, replica: u64, admin_out: &Path) -> Result<[u8; 32], Refusal> {
    let files = Files::create(&config.data_dir)?;
    if files.exist() {
        return Err(already());
    }
    let now = wall_clock();
    let lifetime = Lifetime { not_before: now.minus_ms(60_000), not_after: now.plus_ms(WEEK_MS) };
    let mut serial: [u8; 16] = random()?;
    serial[0] = 0x40 | (serial[0] & 0x3f);
    let root = Root::create(td, now, serial)?;
    let key = SvidKey::generate()?;
    let csr = Csr::parse(&key.csr()?)?;
    let issuer = IssuingKey::new(key, root.found(replica, &csr, lifetime)?)?;
    let (record, keyring) = (RecordKey::generate()?, Keyring::create(config, &files).await?);
    let (statement, signature) = KeySet::certify(&root, td, 1, vec![record.public()])?;
    let member = Member {
        address: config.listen.to_string(),
        authority: issuer.authority().to_owned(),
        authority_not_after: issuer.not_after(),
        wrap_key: keyring.public()?,
        record_key: record.public(),
    };
    files.put_root(&root)?;
    files.put_issuer(&issuer)?;
    files.put_tls(&SvidKey::generate()?)?;
    files.put_record(&record)?;
    found_cell(config, td, replica, &root, member, KeySetRow { statement, signature }).await?;
    put_admin(admin_out, config, td, &root, &issuer)?;
    files.put_card(&Card { trust_domain: td.clone(), replica, epoch: 1, members: Vec::new() })?;
    Ok(fingerprint(root.der()))
}

/// Commits the founding entry in a one-voter group.
async fn found_cell(
    config: &Config,
    td: &TrustDomain,
    replica: u64,
    root: &Root,
    member: Member,
    keys: KeySetRow,
) -> Result<(), Refusal> {
    let alone = Network {
        directory: Arc::new(|_| None),
        channels: Arc::new(|id, _| {
            Box::pin(async move { Err(Refusal::new(Code::Unavailable, "another replica", format!("{id}: none yet"))) })
        }),
    };
    let cell = Cell::bootstrap(raft_options(config, replica)?, alone).map_err(start_failed)?;
    let row = CellRow::founded(td.clone(), root.der().to_vec());
    let propose = cell.propose([0; 32], random()?, Command::FoundCell(row, replica, member, keys));
    let applied = tokio::time::timeout(FOUND_TIMEOUT, propose)
        .await
        .map_err(|_| Refusal::new(Code::Unavailable, "the founding entry committed", "nothing in 20 s"))??;
    applied.outcome?;
    // All replicas that join are of this release or a later one. An older cell's log is begun by an administrator.
    cell.propose(super::own_client(replica), random()?, Command::BeginAudit).await?.outcome?;
    cell.shutdown().await;
    Ok(())
}

/// The administrator's folder: context, certificate, key, root.
pub(super) fn put_admin(
    out: &Path,
    config: &Config,
    td: &TrustDomain,
    root: &Root,
    issuer: &IssuingKey,
) -> Result<(), Refusal> {
    std::fs::create_dir_all(out).map_err(|e| {
        Refusal::new(Code::ConfigInvalid, format!("a writable folder {}", out.display()), e.to_string())
    })?;
    let key = SvidKey::generate()?;
    let now = wall_clock();
    let lifetime = Lifetime { not_before: now.minus_ms(60_000), not_after: now.plus_ms(ADMIN_MS) };
    let chain = issuer.founding_admin("founder", td, lifetime, &Csr::parse(&key.csr()?)?)?;
    let context = serde_json::json!({
        "trust_domain": td.as_str(),
        "fingerprint": hex::encode(fingerprint(root.der())),
        "addresses": [config.listen.to_string()],
    });
    write_private(&out.join("admin.pem"), certificates_to_pem(chain.iter().map(AsRef::as_ref)).as_bytes())?;
    write_private(&out.join("admin.key"), key.pem().as_bytes())?;
    write_private(&out.join("root.pem"), certificates_to_pem([root.der().as_ref()]).as_bytes())?;
    write_private(&out.join("context.json"), context.to_string().as_bytes())
}

/// What `ambitd join` was told.
pub struct Join<'a> {
    /// The cell's trust domain.
    pub trust_domain: &'a TrustDomain,
    /// Root fingerprint, compared out of band.
    pub fingerprint: [u8; 32],
    /// The replica that keeps the root.
    pub via: SocketAddr,
    /// This replica's number.
    pub replica: u64,
    /// The one-time token.
    pub token: &'a str,
}

/// Fetches this replica's intermediate and the members; the replica serves from its first `run`.
pub async fn join(config: &Config, j: &Join<'_>) -> Result<(), Refusal> {
    let files = Files::create(&config.data_dir)?;
    if files.exist() {
        return Err(already());
    }
    let trust = SharedTrust::new(Trust::Pinned(j.trust_domain.clone(), j.fingerprint));
    let dialer = Dialer::new(trust, Identity::default());
    let channel = dialer.channel(j.via, Expect::ReplicaOf(j.trust_domain.clone())).await?;
    let (issuer_key, tls) = (SvidKey::generate()?, SvidKey::generate()?);
    let (record, keyring) = (RecordKey::generate()?, Keyring::create(config, &files).await?);
    if let Some((attester, wrap_key)) = keyring.in_tpm() {
        attest(config, j, &tls, attester, wrap_key, channel.clone()).await?;
    }
    let request = v1::ReplicaJoinRequest {
        token: j.token.to_owned(),
        replica: j.replica,
        address: config.listen.to_string(),
        tls_csr: tls.csr()?,
        issuer_csr: issuer_key.csr()?,
        wrap_key: keyring.public()?,
        record_key: record.public().to_vec(),
        request_id: Vec::new(),
    };
    let answer = v1::membership_client::MembershipClient::new(channel)
        .replica_join(request)
        .await
        .map_err(|s| from_status(&s))?
        .into_inner();
    // While a root is replaced either may be pinned: the others show both.
    let mut roots = std::iter::once(&answer.root_der).chain(&answer.roots_der);
    let Some(pinned) = roots.find(|der| fingerprint(der) == j.fingerprint) else {
        let found = hex::encode(fingerprint(&answer.root_der));
        return Err(Refusal::new(Code::FingerprintMismatch, hex::encode(j.fingerprint), found));
    };
    let issuer = IssuingKey::new(issuer_key, CertificateDer::from(answer.intermediate_der))?
        .under(above_in(answer.above_der, answer.cross_der));
    files.put_root_der(pinned)?;
    files.put_issuer(&issuer)?;
    files.put_tls(&tls)?;
    files.put_record(&record)?;
    raft::prepare_join(&raft_options(config, j.replica)?).map_err(start_failed)?;
    let members = answer.members.into_iter().map(|m| (m.id, m.address)).collect();
    files.put_card(&Card { trust_domain: j.trust_domain.clone(), replica: j.replica, epoch: answer.epoch, members })
}

/// A cell that has no rules for its replicas yet judges none; whether it takes one unattested is for it to say.
async fn attest(
    config: &Config,
    j: &Join<'_>,
    tls: &SvidKey,
    attester: &Attester,
    wrap_key: &TpmWrapKey,
    channel: Channel,
) -> Result<(), Refusal> {
    let (boot_log, ima_log) = (config.boot_log.as_path(), config.ima_log.as_path());
    match (Prover { attester, wrap_key, tls, boot_log, ima_log, token: j.token })
        .prove(channel)
        .await
        .and_then(|judged| judged)
    {
        Err(refusal) if matches!(refusal.code, Code::AppraisalPolicyMissing | Code::NotFound) => {
            tracing::warn!(%refusal, "this replica joins unattested: it attests once there is a policy");
            Ok(())
        }
        outcome => outcome,
    }
}
