//! Where connections to services go, as operators say it.

use super::{OrStatus, request_id};
use crate::authorise::{Actor, actor};
use crate::replica::Replica;
use ambit_model::{ClusterId, Code, ObjectName, Place, Refusal, TrustDomain};
use ambit_proto::v1;
use ambit_state::routing::{Route, RouteChange, Services};
use ambit_state::{Command, State};
use tonic::{Request, Response, Status};

/// Services of one request.
const SERVICES_MAX: usize = 256;

pub(crate) struct Traffic(pub(crate) Replica);

type Answer = Result<Response<v1::ClusterTraffic>, Status>;

#[tonic::async_trait]
impl v1::traffic_server::Traffic for Traffic {
    async fn set_region(&self, request: Request<v1::SetRegionRequest>) -> Answer {
        let (actor, m) = (actor(&request)?, request.into_inner());
        let cluster: ClusterId = m.cluster.parse().or_status()?;
        let region = if m.region.is_empty() { None } else { Some(m.region.parse::<ObjectName>().or_status()?) };
        self.change(actor, &m.request_id, &cluster, Route::Region(cluster.clone(), region), m.note).await
    }

    async fn drain_cluster(&self, request: Request<v1::ClusterWord>) -> Answer {
        self.drain(request, true).await
    }

    async fn undrain_cluster(&self, request: Request<v1::ClusterWord>) -> Answer {
        self.drain(request, false).await
    }

    async fn fail_over(&self, request: Request<v1::FailOverRequest>) -> Answer {
        let (actor, m) = (actor(&request)?, request.into_inner());
        let from: ClusterId = m.from.parse().or_status()?;
        let services = self.services(&m.services, m.all).or_status()?;
        let route = Route::FailOver { services, from: from.clone(), to: m.to.parse().or_status()? };
        self.change(actor, &m.request_id, &from, route, m.note).await
    }

    async fn fail_back(&self, request: Request<v1::FailBackRequest>) -> Answer {
        let (actor, m) = (actor(&request)?, request.into_inner());
        let from: ClusterId = m.from.parse().or_status()?;
        let services = self.services(&m.services, m.all).or_status()?;
        let route = Route::FailBack { services, from: from.clone() };
        self.change(actor, &m.request_id, &from, route, m.note).await
    }

    async fn show_cluster(&self, request: Request<v1::ShowClusterRequest>) -> Answer {
        let cluster: ClusterId = request.into_inner().cluster.parse().or_status()?;
        self.shown(&cluster).await
    }
}

impl Traffic {
    async fn drain(&self, request: Request<v1::ClusterWord>, drained: bool) -> Answer {
        let (actor, m) = (actor(&request)?, request.into_inner());
        let cluster: ClusterId = m.cluster.parse().or_status()?;
        self.change(actor, &m.request_id, &cluster, Route::Drain(cluster.clone(), drained), m.note).await
    }

    async fn change(&self, actor: Actor, id: &[u8], cluster: &ClusterId, route: Route, note: String) -> Answer {
        let id = request_id(id)?;
        let change = RouteChange { route, by: actor.name.clone(), note };
        let command = Command::Route(Box::new(change));
        self.0.propose(actor.client, id, command).await.or_status()?.outcome.or_status()?;
        self.shown(cluster).await
    }

    /// `name` is of this cell, `trust-domain/name` of whose it says.
    fn services(&self, names: &[String], all: bool) -> Result<Services, Refusal> {
        if all != names.is_empty() || names.len() > SERVICES_MAX {
            let expected = format!("1-{SERVICES_MAX} services by name, or all");
            return Err(Refusal::new(Code::BadRequest, expected, names.len().to_string()));
        }
        if all {
            return Ok(Services::All);
        }
        let own = self.0.local(|s| s.cell().map(|cell| cell.trust_domain.clone()));
        let own = own.ok_or_else(|| Refusal::new(Code::Unavailable, "a founded cell", "an empty one"))?;
        let name = |text: &String| match text.split_once('/') {
            Some((td, name)) => Ok((td.parse::<TrustDomain>()?, name.parse::<ObjectName>()?)),
            None => Ok((own.clone(), text.parse::<ObjectName>()?)),
        };
        names.iter().map(name).collect::<Result<_, Refusal>>().map(Services::These)
    }

    async fn shown(&self, cluster: &ClusterId) -> Answer {
        let found = self.0.read(|s| traffic(s, cluster)).await.or_status()?;
        let missing = || Refusal::new(Code::NotFound, "a cluster that this cell knows", cluster.as_str());
        found.map(Response::new).ok_or_else(missing).or_status()
    }
}

fn traffic(s: &State, cluster: &ClusterId) -> Option<v1::ClusterTraffic> {
    let (own, place) = (s.cell()?.trust_domain.clone(), s.place(cluster)?);
    let (owner, routing) = (place.0.clone(), s.routing());
    let traits = routing.clusters.get(&place).cloned().unwrap_or_default();
    let mut words = Vec::new();
    for says in [&owner].into_iter().chain((own != owner).then_some(&own)) {
        let Some(row) = s.traits_by(says, &place) else { continue };
        words.push(v1::TrafficWord {
            kind: "cluster".into(),
            in_force: row.drained || row.region.is_some(),
            said_by: says.to_string(),
            everywhere: *says == owner,
            version: row.version,
            by: row.word.by.clone(),
            stamp_ms: row.word.stamp.0,
            note: row.word.note.clone(),
            ..Default::default()
        });
    }
    let of_here = s.steers().filter(|((_, _, from), _)| *from == place);
    for ((says, service, _), row) in of_here {
        words.push(v1::TrafficWord {
            kind: "fail-over".into(),
            in_force: row.to.is_some(),
            service: format!("{}/{}", service.0, service.1),
            to: row.to.as_ref().map(|to: &Place| to.1.to_string()).unwrap_or_default(),
            said_by: says.to_string(),
            everywhere: *says == service.0,
            version: row.version,
            by: row.word.by.clone(),
            stamp_ms: row.word.stamp.0,
            note: row.word.note.clone(),
        });
    }
    Some(v1::ClusterTraffic {
        cluster: cluster.to_string(),
        trust_domain: owner.to_string(),
        region: traits.region.map(String::from).unwrap_or_default(),
        drained: traits.drained,
        words,
    })
}
