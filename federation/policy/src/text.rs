//! Documents in a line, for plans and histories.

use ambit_model::policy::{Egress, Group, Policy, Service};
use ambit_model::{Stamp, utc};
use std::fmt::Display;

fn list<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(", ")
}

/// `allow spiffe://east/web to spiffe://west/db on 5432 until 2026-12-31T00:00:00Z`.
pub fn policy_text(policy: &Policy) -> String {
    let ranges = policy.extras.unmeshed.iter().map(|range| format!("cidr:{range}"));
    let from = list(policy.from.iter().map(ToString::to_string).chain(ranges));
    let ports = if policy.ports.is_empty() { "every port".to_owned() } else { list(&policy.ports) };
    let mut text = format!("{} {from} to {} on {ports}", policy.action.as_str(), policy.target);
    if policy.extras.protocols != ambit_model::PolicyExtras::default().protocols {
        text.push_str(&format!(" over {}", list(policy.extras.protocols.iter().map(|protocol| protocol.as_str()))));
    }
    if let Some(transport) = policy.transport() {
        text.push_str(&format!(", {}: in clear text, carried by the agent", transport.as_str()));
    }
    if policy.extras.expires_at != Stamp(u64::MAX) {
        text.push_str(&format!(" until {}", utc::text(policy.extras.expires_at.0)));
    }
    text
}

/// `10.96.0.1:80 to spiffe://west/shop, spiffe://east/shop, local-first`; with weights `spiffe://west/shop (weight 90), ...`.
pub fn service_text(service: &Service) -> String {
    let weight = |at: usize| service.weights.get(at).map_or_else(String::new, |weight| format!(" (weight {weight})"));
    let backends = list(service.backends.iter().enumerate().map(|(at, set)| format!("{set}{}", weight(at))));
    format!("{} to {backends}, {}", service.address.at(service.port), service.order.as_str())
}

/// `spiffe://west/web to 192.0.2.0/24 on 443, passthrough: in clear text, carried by the agent`.
pub fn egress_text(egress: &Egress) -> String {
    let ports = if egress.ports.is_empty() { "every port".to_owned() } else { list(&egress.ports) };
    let (from, to, transport) = (list(&egress.from), list(&egress.to), egress.transport.as_str());
    let mut text = format!("{from} to {to} on {ports}, {transport}: in clear text, carried by the agent");
    if egress.expires_at != Stamp(u64::MAX) {
        text.push_str(&format!(" until {}", utc::text(egress.expires_at.0)));
    }
    text
}

/// `spiffe://west/ops/*, cluster:west/prod`.
pub fn group_text(group: &Group) -> String {
    list(&group.members)
}
