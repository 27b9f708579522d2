//! Two cells that become peers, and people who administer a cell.

use crate::cell::{Cell, fresh};
use ambit_identity::keys::certificates_from_pem;
use ambit_identity::tls::certified;
use ambit_identity::{Csr, SvidKey};
use ambit_model::{Lifetime, Refusal, Stamp};
use ambit_proto::status::from_status;
use ambit_proto::v1;
use ambit_proto::v1::administrators_client::AdministratorsClient;
use ambit_proto::v1::cluster_registry_client::ClusterRegistryClient;
use ambit_transport::Identity;
use anyhow::{Context, Result, ensure};
use std::time::{Duration, Instant};
use tonic::transport::Channel;

const PATIENCE: Duration = Duration::from_secs(15);

async fn registry(cell: &Cell) -> Result<ClusterRegistryClient<Channel>> {
    Ok(ClusterRegistryClient::new(cell.admin(1).await?))
}

/// `east` registers with `west`, and both approve.
pub async fn peer(west: &Cell, east: &Cell) -> Result<()> {
    let request = v1::CreateClusterTokenRequest {
        request_id: fresh(),
        trust_domain: east.trust_domain.to_string(),
        fingerprint: hex::encode(east.fingerprint),
        ttl_seconds: 60,
    };
    let token = registry(west).await?.create_cluster_token(request).await?.into_inner().token;
    let request = v1::RegisterPeerRequest {
        request_id: fresh(),
        addresses: vec![west.address(1)?.to_string()],
        trust_domain: west.trust_domain.to_string(),
        fingerprint: hex::encode(west.fingerprint),
        token,
    };
    let until = Instant::now() + PATIENCE;
    loop {
        match registry(east).await?.register_peer(request.clone()).await.map_err(|s| from_status(&s)) {
            Ok(_) => break,
            // A cell seals its sessions with a ticket key, which it makes within a second of its founding.
            Err(r) if r.expected.contains("ticket key") && Instant::now() < until => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(refusal) => return Err(refusal.into()),
        }
    }
    for (cell, other) in [(west, east), (east, west)] {
        let (trust_domain, fingerprint) = (other.trust_domain.to_string(), hex::encode(other.fingerprint));
        let request = v1::ApprovePeerRequest { request_id: fresh(), trust_domain, fingerprint };
        registry(cell).await?.approve_peer(request).await?;
    }
    Ok(())
}

/// Changes the roles of an administrator.
pub async fn change_roles(cell: &Cell, request: v1::ChangeRolesRequest) -> Result<v1::Admin, Refusal> {
    let call = |channel| {
        let request = request.clone();
        async move { AdministratorsClient::new(channel).change_roles(request).await }
    };
    cell.insist(call).await
}

/// Gives roles.
pub async fn grant(cell: &Cell, name: &str, roles: &[&str]) -> Result<v1::Admin, Refusal> {
    let grant = roles.iter().map(|role| (*role).to_owned()).collect();
    change_roles(
        cell,
        v1::ChangeRolesRequest { request_id: fresh(), name: name.to_owned(), grant, ..Default::default() },
    )
    .await
}

/// Takes all roles away.
pub async fn revoke_all(cell: &Cell, name: &str) -> Result<v1::Admin, Refusal> {
    let name = name.to_owned();
    change_roles(cell, v1::ChangeRolesRequest { request_id: fresh(), name, revoke_all: true, ..Default::default() })
        .await
}

/// A certificate for an administrator, whom the founder asks for.
pub async fn certify(cell: &Cell, name: &str) -> Result<Identity> {
    let key = SvidKey::generate()?;
    let request = v1::CertifyAdminRequest { request_id: fresh(), name: name.to_owned(), csr: key.csr()? };
    let answer = AdministratorsClient::new(cell.admin(1).await?).certify_admin(request).await?.into_inner();
    crate::machine::identity(&answer.chain_der, &key)
}

/// A new administrator with these roles.
pub async fn administrator(cell: &Cell, name: &str, roles: &[&str]) -> Result<Identity> {
    let admin = grant(cell, name, roles).await?;
    ensure!(admin.roles.len() == roles.len(), "{admin:?}");
    certify(cell, name).await
}

/// The TLS identity of a replica of the cell, made from the keys in its folder.
pub fn replica_identity(cell: &Cell, number: u64) -> Result<Identity> {
    let folder = cell.seat_of(usize::try_from(number)?)?.data.join("identity");
    let read = |name: &str| std::fs::read(folder.join(name)).with_context(|| format!("{name} of replica {number}"));
    let text = String::from_utf8(read("issuer.pem")?)?;
    let intermediate = certificates_from_pem(&text)?.into_iter().next().context("an intermediate")?;
    let issuer = ambit_identity::IssuingKey::new(SvidKey::from_pem(&text)?, intermediate)?;
    let now = Stamp(u64::try_from(std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_millis())?);
    let key = SvidKey::generate()?;
    let lifetime = Lifetime { not_before: now.minus_ms(60_000), not_after: now.plus_ms(3_600_000) };
    let chain = issuer.replica_leaf(number, &cell.trust_domain, lifetime, &Csr::parse(&key.csr()?)?)?;
    Ok(Identity::new(Some(certified(chain, &key)?)))
}
