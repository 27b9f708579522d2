//! Clusters and peers, as operators register them.

use super::{OrStatus, new_token, parse_fingerprint, request_id, standby, token_expiry};
use crate::authorise::{Actor, actor};
use crate::replica::{Replica, peering};
use ambit_model::{Act, ClusterId, Code, Refusal, Routing, TrustDomain};
use ambit_proto::{convert, v1};
use ambit_state::objects::{NodeState, PeerState, TokenRow, TokenScope};
use ambit_state::{Command, State};
use std::net::SocketAddr;
use tonic::{Request, Response, Status};

/// EK roots of one cluster: every TPM maker there is, several times over.
const EK_ROOTS_MAX: usize = 256;
/// A peer not heard for this long is shown as degraded.
const DEGRADED_MS: u64 = 10_000;

pub(crate) struct Clusters(pub(crate) Replica);

#[tonic::async_trait]
impl v1::cluster_registry_server::ClusterRegistry for Clusters {
    async fn register_cluster(
        &self,
        request: Request<v1::RegisterClusterRequest>,
    ) -> Result<Response<v1::Cluster>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let id = request_id(&m.request_id)?;
        let name: ClusterId = m.name.parse().or_status()?;
        let roots = ek_roots(m.ek_roots_der, m.ek_root_classes).or_status()?;
        let interval_ms = attest_interval_ms(m.attest_interval_s).or_status()?;
        let command = Command::RegisterCluster(name.clone(), roots, interval_ms);
        self.0.propose(actor.client, id, command).await.or_status()?.outcome.or_status()?;
        let all = self.0.local(|s| own_clusters(s, self.0.id()));
        all.into_iter()
            .find(|c| c.name == name.as_str())
            .map(Response::new)
            .ok_or_else(|| Refusal::new(Code::Internal, "the cluster registered", "none"))
            .or_status()
    }

    async fn list_clusters(
        &self,
        request: Request<v1::ListClustersRequest>,
    ) -> Result<Response<v1::ListClustersResponse>, Status> {
        if let Some(channel) = self.0.leader_channel().await.or_status()? {
            let mut leader = v1::cluster_registry_client::ClusterRegistryClient::new(channel);
            return leader.list_clusters(request.into_inner()).await;
        }
        let mut clusters = self.0.read(|s| own_clusters(s, self.0.id())).await.or_status()?;
        clusters.extend(self.0.local(|s| self.foreign(s)));
        Ok(Response::new(v1::ListClustersResponse { clusters }))
    }

    async fn create_cluster_token(
        &self,
        request: Request<v1::CreateClusterTokenRequest>,
    ) -> Result<Response<v1::CreateClusterTokenResponse>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let id = request_id(&m.request_id)?;
        let td: TrustDomain = m.trust_domain.parse().or_status()?;
        let fingerprint = parse_fingerprint(&m.fingerprint).or_status()?;
        let (token, sha256) = new_token("cluster").or_status()?;
        let scope = TokenScope::Peer(td, fingerprint);
        let row = TokenRow { scope, expires: token_expiry(&self.0, m.ttl_seconds).or_status()?, used: false };
        self.0.propose(actor.client, id, Command::CreateToken(sha256, row)).await.or_status()?.outcome.or_status()?;
        Ok(Response::new(v1::CreateClusterTokenResponse { token, fingerprint: hex::encode(self.0.fingerprint()) }))
    }

    async fn register_peer(&self, request: Request<v1::RegisterPeerRequest>) -> Result<Response<v1::Peer>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let id = request_id(&m.request_id)?;
        let td: TrustDomain = m.trust_domain.parse().or_status()?;
        let fingerprint = parse_fingerprint(&m.fingerprint).or_status()?;
        let addresses: Vec<SocketAddr> = m
            .addresses
            .iter()
            .map(|a| a.parse().map_err(|_| Refusal::new(Code::BadRequest, "ip:port", a.clone())))
            .collect::<Result<_, _>>()
            .or_status()?;
        let row = peering::register(&self.0, &addresses, &td, &fingerprint, &m.token).await.or_status()?;
        let command = Command::PutPeer(td.clone(), row, None);
        self.0.propose(actor.client, id, command).await.or_status()?.outcome.or_status()?;
        self.one_peer(&td).or_status()
    }

    async fn approve_peer(&self, request: Request<v1::ApprovePeerRequest>) -> Result<Response<v1::Peer>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let id = request_id(&m.request_id)?;
        let td: TrustDomain = m.trust_domain.parse().or_status()?;
        let command = Command::ApprovePeer(td.clone(), parse_fingerprint(&m.fingerprint).or_status()?);
        self.0.propose(actor.client, id, command).await.or_status()?.outcome.or_status()?;
        self.one_peer(&td).or_status()
    }

    async fn list_peers(
        &self,
        request: Request<v1::ListPeersRequest>,
    ) -> Result<Response<v1::ListPeersResponse>, Status> {
        if let Some(channel) = self.0.leader_channel().await.or_status()? {
            let mut leader = v1::cluster_registry_client::ClusterRegistryClient::new(channel);
            return leader.list_peers(request.into_inner()).await;
        }
        self.0.cell().read_barrier().await.or_status()?;
        Ok(Response::new(v1::ListPeersResponse { peers: self.0.local(|s| self.peers(s)) }))
    }

    async fn suspend_peer(&self, request: Request<v1::PeerRef>) -> Result<Response<v1::Peer>, Status> {
        let (actor, m) = (actor(&request)?, request.into_inner());
        let id = request_id(&m.request_id)?;
        let td: TrustDomain = m.trust_domain.parse().or_status()?;
        let command = Command::SuspendPeer(td.clone(), actor.name);
        self.0.propose(actor.client, id, command).await.or_status()?.outcome.or_status()?;
        self.one_peer(&td).or_status()
    }

    async fn remove_peer(&self, request: Request<v1::RemovePeerRequest>) -> Result<Response<v1::Peer>, Status> {
        let (actor, m) = (actor(&request)?, request.into_inner());
        let id = request_id(&m.request_id)?;
        let td: TrustDomain = m.trust_domain.parse().or_status()?;
        let before = self.one_peer(&td);
        let approved = convert::approved(m.approved).or_status()?;
        let act = Act::RemoveTrustDomain(td.clone());
        let command = Command::Act { act, approved, by: actor.name };
        self.0.propose(actor.client, id, command).await.or_status()?.outcome.or_status()?;
        // A request that is sent again finds it gone already.
        let gone = || v1::Peer { trust_domain: td.to_string(), state: "removed".into(), ..Default::default() };
        Ok(before.unwrap_or_else(|_| Response::new(gone())))
    }

    async fn list_standbys(
        &self,
        request: Request<v1::ListStandbysRequest>,
    ) -> Result<Response<v1::ListStandbysResponse>, Status> {
        actor(&request)?;
        self.0.cell().read_barrier().await.or_status()?;
        Ok(Response::new(standby::listing(&self.0)))
    }

    async fn name_standby(
        &self,
        request: Request<v1::NameStandbyRequest>,
    ) -> Result<Response<v1::ListStandbysResponse>, Status> {
        let (actor, m) = (actor(&request)?, request.into_inner());
        let act = standby::naming(&m.naming).or_status()?;
        let approved = convert::approved(m.approved).or_status()?;
        let by = actor.name.clone();
        self.change(actor, &m.request_id, Command::Act { act, approved, by }).await
    }

    async fn commit_grant(
        &self,
        request: Request<v1::CommitGrantRequest>,
    ) -> Result<Response<v1::ListStandbysResponse>, Status> {
        let (actor, m) = (actor(&request)?, request.into_inner());
        let signed = standby::signed(&m.act, m.approved).or_status()?;
        let by = actor.name.clone();
        self.change(actor, &m.request_id, Command::FailOver(Box::new(signed), by)).await
    }

    async fn release_grant(
        &self,
        request: Request<v1::HomeRequest>,
    ) -> Result<Response<v1::ListStandbysResponse>, Status> {
        let (actor, m) = (actor(&request)?, request.into_inner());
        let (home, by) = (m.home.parse().or_status()?, actor.name.clone());
        self.change(actor, &m.request_id, Command::ReleaseGrant(home, by)).await
    }

    async fn take_back(&self, request: Request<v1::HomeRequest>) -> Result<Response<v1::ListStandbysResponse>, Status> {
        let (actor, m) = (actor(&request)?, request.into_inner());
        if m.home != self.0.trust_domain().as_str() {
            let found = m.home;
            return Err(Refusal::new(Code::BadRequest, self.0.trust_domain().as_str(), found)).or_status();
        }
        let by = actor.name.clone();
        self.change(actor, &m.request_id, Command::TakeBack(by)).await
    }

    async fn judge_late(
        &self,
        request: Request<v1::JudgeLateRequest>,
    ) -> Result<Response<v1::ListStandbysResponse>, Status> {
        let (actor, m) = (actor(&request)?, request.into_inner());
        let (origin, by) = (m.origin.parse().or_status()?, actor.name.clone());
        let command = Command::JudgeLate { origin, seq: m.seq, keep: m.keep, by };
        self.change(actor, &m.request_id, command).await
    }
}

/// 0 is the default. Below a second a TPM cannot follow; beyond a minute a machine that was changed is trusted too long.
fn attest_interval_ms(seconds: u32) -> Result<u64, Refusal> {
    match seconds {
        0 => Ok(ambit_state::ATTEST_INTERVAL_MS),
        1..=60 => Ok(u64::from(seconds) * 1_000),
        more => Err(Refusal::new(Code::BadRequest, "an attestation interval of 1-60 s", more.to_string())),
    }
}

pub(crate) fn ek_roots(ders: Vec<Vec<u8>>, classes: Vec<String>) -> Result<Vec<(Vec<u8>, String)>, Refusal> {
    if ders.len() != classes.len() || ders.len() > EK_ROOTS_MAX {
        let found = format!("{} roots, {} classes", ders.len(), classes.len());
        return Err(Refusal::new(
            Code::BadRequest,
            format!("at most {EK_ROOTS_MAX} EK roots, each with a class"),
            found,
        ));
    }
    for (der, class) in ders.iter().zip(&classes) {
        ambit_verify::ek::check_root(der)?;
        if ambit_verify::EkClass::from_text(class).is_none() {
            return Err(Refusal::new(Code::BadRequest, "class hardware, virtual or lab", class.clone()));
        }
    }
    Ok(ders.into_iter().zip(classes).collect())
}

fn own_clusters(s: &State, replica: u64) -> Vec<v1::Cluster> {
    let Some(cell) = s.cell() else { return Vec::new() };
    let fingerprint = hex::encode(ambit_identity::fingerprint(&cell.root_der));
    let routing = s.routing();
    s.clusters()
        .map(|(id, _)| v1::Cluster {
            name: id.to_string(),
            trust_domain: cell.trust_domain.to_string(),
            home: format!("this cell (replica {replica})"),
            state: "active".into(),
            nodes: s.nodes().filter(|(_, n)| n.cluster == *id && n.state == NodeState::Admitted).count() as u32,
            fingerprint: fingerprint.clone(),
            age_ms: 0,
            sequence: cell.export_seq,
            ..traffic(s, &routing, id)
        })
        .collect()
}

/// Where it is, and whether it gets no new connections; all else is empty.
fn traffic(s: &State, routing: &Routing, id: &ClusterId) -> v1::Cluster {
    let traits = s.place(id).and_then(|place| routing.clusters.get(&place).cloned()).unwrap_or_default();
    let region = traits.region.map(String::from).unwrap_or_default();
    v1::Cluster { region, drained: traits.drained, ..v1::Cluster::default() }
}

impl Clusters {
    /// Commits a change of who speaks for whom, and answers with how it stands then.
    async fn change(
        &self,
        actor: Actor,
        id: &[u8],
        command: Command,
    ) -> Result<Response<v1::ListStandbysResponse>, Status> {
        let id = request_id(id)?;
        self.0.propose(actor.client, id, command).await.or_status()?.outcome.or_status()?;
        Ok(Response::new(standby::listing(&self.0)))
    }

    fn foreign(&self, s: &State) -> Vec<v1::Cluster> {
        let (peers, routing) = (self.peers(s), s.routing());
        s.foreign_clusters()
            .filter_map(|(id, row)| {
                let peer = peers.iter().find(|p| p.trust_domain == row.origin.as_str())?;
                Some(v1::Cluster {
                    name: id.to_string(),
                    trust_domain: peer.trust_domain.clone(),
                    home: format!("peer {}", peer.trust_domain),
                    state: peer.state.clone(),
                    nodes: 0,
                    fingerprint: peer.fingerprint.clone(),
                    age_ms: peer.age_ms,
                    sequence: peer.imported_seq,
                    ..traffic(s, &routing, id)
                })
            })
            .collect()
    }

    fn peers(&self, s: &State) -> Vec<v1::Peer> {
        s.peers()
            .map(|(td, row)| {
                // What this replica does not pull it does not know the age of; it then shows the worst.
                let age_ms = self.0.age_ms(td).unwrap_or(u64::MAX);
                let state = match row.state {
                    PeerState::Pending => "pending",
                    PeerState::Stopped => "stopped",
                    PeerState::Suspended => "suspended",
                    PeerState::Active if age_ms > DEGRADED_MS => "degraded",
                    PeerState::Active => "active",
                };
                v1::Peer {
                    trust_domain: td.to_string(),
                    state: state.into(),
                    fingerprint: hex::encode(row.fingerprint),
                    addresses: row.addresses.clone(),
                    imported_seq: row.seq,
                    age_ms,
                    trouble: row.trouble.clone(),
                }
            })
            .collect()
    }

    fn one_peer(&self, td: &TrustDomain) -> Result<Response<v1::Peer>, Refusal> {
        self.0
            .local(|s| self.peers(s))
            .into_iter()
            .find(|p| p.trust_domain == td.as_str())
            .map(Response::new)
            .ok_or_else(|| Refusal::new(Code::Internal, "the peer registered", "none"))
    }
}
