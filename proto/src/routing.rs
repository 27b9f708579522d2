//! Where connections to services go, as slices say it.

use crate::v1;
use ambit_model::routing::{Place, Routing, Traits};
use ambit_model::{Code, Refusal};

/// As messages.
pub fn routing_messages(routing: &Routing) -> (Vec<v1::ClusterOf>, Vec<v1::Steered>) {
    let cluster = |((trust_domain, cluster), traits): (&Place, &Traits)| v1::ClusterOf {
        trust_domain: trust_domain.to_string(),
        cluster: cluster.to_string(),
        region: traits.region.as_ref().map(ToString::to_string).unwrap_or_default(),
        drained: traits.drained,
    };
    let steers = routing.steers.iter().map(|(((origin, service), from), to)| v1::Steered {
        origin: origin.to_string(),
        service: service.to_string(),
        from_trust_domain: from.0.to_string(),
        from: from.1.to_string(),
        to_trust_domain: to.0.to_string(),
        to: to.1.to_string(),
    });
    (routing.clusters.iter().map(cluster).collect(), steers.collect())
}

/// From messages.
///
/// # Errors
/// [`Code::BadRequest`] where a name is none, or one is there twice.
pub fn routing(clusters: &[v1::ClusterOf], steers: &[v1::Steered]) -> Result<Routing, Refusal> {
    let twice = |what: &str, name: &str| Refusal::new(Code::BadRequest, format!("each {what} once"), name);
    let mut routing = Routing::default();
    for m in clusters {
        let region = if m.region.is_empty() { None } else { Some(m.region.parse()?) };
        let traits = Traits { region, drained: m.drained };
        if routing.clusters.insert((m.trust_domain.parse()?, m.cluster.parse()?), traits).is_some() {
            return Err(twice("cluster", &m.cluster));
        }
    }
    for m in steers {
        let service = (m.origin.parse()?, m.service.parse()?);
        let (from, to) = ((m.from_trust_domain.parse()?, m.from.parse()?), (m.to_trust_domain.parse()?, m.to.parse()?));
        if routing.steers.insert((service, from), to).is_some() {
            return Err(twice("service and cluster", &m.service));
        }
    }
    Ok(routing)
}
