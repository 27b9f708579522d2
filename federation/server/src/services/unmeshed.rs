//! Questions about callers outside of the mesh, whom nothing but an address names: whether one may call, and by which policy.

use super::plan::SHOWN_MAX;
use super::who::{Asked, Ground, aside, asked_of, told_of, with_agents};
use crate::replica::Replica;
use ambit_model::policy::closed_at;
use ambit_model::{Code, Refusal, utc};
use ambit_policy::{Explanation, UnmeshedFlip, UnmeshedFlips};
use ambit_proto::v1;
use ambit_state::State;
use std::net::{IpAddr, Ipv4Addr};

/// A range and a target in the place of a pair of identities.
pub(super) fn flip_message(flip: &UnmeshedFlip) -> v1::Flip {
    v1::Flip {
        source: format!("cidr:{}/{}", flip.range.0, flip.range.1),
        destination: flip.destination.to_string(),
        opened: flip.opened.to_string(),
        closed: flip.closed.to_string(),
        at_ms: flip.at.map_or(0, |at| at.0),
    }
}

/// Those that an answer shows.
pub(super) fn shown(flips: &UnmeshedFlips) -> impl Iterator<Item = v1::Flip> + '_ {
    flips.pairs.iter().take(SHOWN_MAX).map(flip_message)
}

/// Why nobody comes in from this address, whatever policies say; none where somebody may.
fn claimed(s: &State, from: Ipv4Addr) -> Option<String> {
    if let Some(why) = closed_at(IpAddr::V4(from)) {
        return Some(format!("denied: {why}; no policy lets it in"));
    }
    if let Some((_, row)) = s.endpoints().find(|(_, row)| row.object.address == from) {
        let id = &row.object.spiffe_id;
        return Some(format!(
            "denied: {id} has this address, and comes as who it is or not at all (ask by its SPIFFE ID)"
        ));
    }
    if let Some(((origin, name), _)) = s.services().find(|(_, row)| row.object.address == from) {
        return Some(format!("denied: this is the address of service {origin}/{name}, from which nobody calls"));
    }
    if s.node_addresses().any(|(_, home)| home.address == from) {
        return Some("denied: this is the address of a node of the mesh, from which nobody is let in by it".to_owned());
    }
    let until = s.left_until(from)?;
    let until = utc::text(until.0);
    Some(format!("denied: a workload of the mesh had this address; no policy lets it in until {until}"))
}

/// The verdict of a caller at this address, what is behind it, and whether the nodes of the target hold it.
pub(super) async fn explain(replica: &Replica, from: Ipv4Addr, asked: Asked) -> Result<v1::ExplainResponse, Refusal> {
    let found = replica.read(|s| Ok::<_, Refusal>((asked_of(s, &asked)?, claimed(s, from)))).await??;
    let ((ground, ends, nodes), claimed): ((Ground, _, _), _) = found;
    let v1::ExplainResponse { revision, destination, .. } = ends;
    let explained = aside(move || {
        let explained: Explanation = ground.set.explain_unmeshed(from, &asked.destination, asked.port, ground.now);
        told_of(&ground, &asked, &explained)
    });
    let mut answer = v1::ExplainResponse { revision, destination, ..explained.await? };
    if let Some(reason) = claimed {
        let v1::ExplainResponse { revision, destination, .. } = answer;
        answer = v1::ExplainResponse { reason, revision, destination, ..Default::default() };
    }
    Ok(with_agents(replica, answer, nodes).await)
}

/// A caller that is written as an address, if it is one.
///
/// # Errors
/// [`Code::BadRequest`] for an IPv6 one: nobody comes in so.
pub(super) fn address(source: &str) -> Result<Option<Ipv4Addr>, Refusal> {
    match source.parse::<IpAddr>() {
        Ok(IpAddr::V4(address)) => Ok(Some(address)),
        Ok(IpAddr::V6(_)) => Err(Refusal::new(Code::BadRequest, "a SPIFFE ID, or an IPv4 address", source)),
        Err(_) => Ok(None),
    }
}
