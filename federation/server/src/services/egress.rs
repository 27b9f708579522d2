//! Questions about what is outside of the mesh: who may connect to an address there, by which document, and which are of no use.

use super::who::{allowed, change_to, party, with_agents};
use crate::replica::Replica;
use ambit_model::policy::{Action, closed_at};
use ambit_model::{Address, Code, ObjectName, Refusal, SpiffeId, Stamp, utc};
use ambit_policy::{EgressFlip, EgressSet, known_in};
use ambit_proto::convert::egress_message;
use ambit_proto::v1;
use ambit_state::State;
use ambit_state::objects::EgressRow;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// Where the address is that was asked about.
pub(super) enum Told {
    /// In the mesh: the workload that answers there.
    Inside(SpiffeId),
    /// Outside, and so answered.
    Outside(Box<v1::ExplainResponse>),
}

/// One document.
pub(super) fn message(row: &EgressRow) -> v1::Egress {
    v1::Egress { written_by: row.written_by.clone(), revision: row.revision.0, ..egress_message(&row.object) }
}

/// A caller and a range in the place of a pair of identities.
pub(super) fn flip_message(flip: &EgressFlip) -> v1::Flip {
    v1::Flip {
        source: flip.source.to_string(),
        destination: format!("{}/{}", flip.range.0, flip.range.1),
        opened: flip.opened.to_string(),
        closed: flip.closed.to_string(),
        at_ms: flip.at.map_or(0, |at| at.0),
    }
}

/// The verdict of an address, and the document behind it.
pub(super) async fn explain(
    replica: &Replica,
    asked: (&SpiffeId, Address, u16),
    at: Option<Stamp>,
) -> Result<Told, Refusal> {
    match replica.read(|s| judged(s, asked, at)).await?? {
        (Told::Inside(id), _) => Ok(Told::Inside(id)),
        (Told::Outside(answer), nodes) => Ok(Told::Outside(Box::new(with_agents(replica, *answer, nodes).await))),
    }
}

fn judged(
    s: &State,
    (src, at_address, port): (&SpiffeId, Address, u16),
    at: Option<Stamp>,
) -> Result<(Told, BTreeSet<String>), Refusal> {
    if let Some((_, row)) = s.endpoints().find(|(_, row)| row.object.address == at_address) {
        return Ok((Told::Inside(row.object.spiffe_id.clone()), BTreeSet::new()));
    }
    if let Some(((origin, name), _)) = s.services().find(|(_, row)| row.object.address == at_address) {
        let found = format!("{at_address}, which is service {origin}/{name}: ask of its backends");
        return Err(Refusal::new(Code::BadRequest, "a workload, or an address outside of the mesh", found));
    }
    let Some(to) = at_address.v4() else { return Ok((Told::Outside(Box::new(of_ipv6(s, src))), BTreeSet::new())) };
    let (set, now) = match at {
        None => (s.egress_set(), s.moment()),
        Some(at) => {
            let (change, then) = change_to(s, at)?;
            (s.egress_set_after(&change), then)
        }
    };
    let (source, nodes) = party(s, src);
    let left = s.left_until(to);
    let rule = set.evaluate(src, to, port, now).filter(|_| left.is_none());
    let own = s.cell().map(|cell| cell.trust_domain.clone());
    let named = |name: &ObjectName| own.as_ref().map(|own| format!("{own}/{name}")).unwrap_or_default();
    let row = own.as_ref().zip(rule.filter(|_| at.is_none()));
    let row = row.and_then(|(own, rule)| s.egress_of(&(own.clone(), rule.name.clone())));
    let reason = match (rule, closed_at(IpAddr::V4(to)), left) {
        (Some(_), _, _) => "allowed by egress".to_owned(),
        (None, Some(why), _) => format!("denied: {why}; no document opens it"),
        (None, None, Some(until)) => {
            let until = utc::text(until.0);
            format!("denied: a workload of the mesh had this address; no document opens it until {until}")
        }
        (None, None, None) => "denied by default: outside of the mesh, and no egress allows it".to_owned(),
    };
    let nearest = rule.is_none().then(|| set.nearest(src, to, port)).flatten();
    // One that falls short in nothing is not what it is denied for.
    let nearest = nearest.filter(|(_, differs)| !differs.is_empty());
    let answer = v1::ExplainResponse {
        allowed: rule.is_some(),
        rule: rule.map(|rule| named(&rule.name)).unwrap_or_default(),
        reason,
        nearest: nearest.map(|(near, differs)| format!("{}: {differs}", named(&near.name))).unwrap_or_default(),
        revision: s.cell().map(|cell| cell.revision.0).unwrap_or_default(),
        written_by: row.map(|row| row.written_by.clone()).unwrap_or_default(),
        written_revision: row.map_or(0, |row| row.revision.0),
        expires_at_ms: rule.map(|rule| rule.expires_at.0).filter(|end| *end != u64::MAX).unwrap_or_default(),
        source: Some(source),
        transport: rule.map(|rule| rule.transport.as_str().to_owned()).unwrap_or_default(),
        ..Default::default()
    };
    Ok((Told::Outside(Box::new(answer)), nodes))
}

/// No document names a range of IPv6.
fn of_ipv6(s: &State, src: &SpiffeId) -> v1::ExplainResponse {
    v1::ExplainResponse {
        reason: "denied: outside of the mesh, and no egress is of IPv6".to_owned(),
        revision: s.cell().map(|cell| cell.revision.0).unwrap_or_default(),
        source: Some(party(s, src).0),
        ..Default::default()
    }
}

/// Who may connect to the address, of those that are known.
pub(super) async fn who_can(replica: &Replica, to: Address, port: Option<u16>) -> Result<v1::WhoCanResponse, Refusal> {
    let ground = |s: &State| {
        let meshed = s.endpoints().any(|(_, row)| row.object.address == to)
            || s.services().any(|(_, row)| row.object.address == to);
        let rows: BTreeMap<ObjectName, EgressRow> =
            s.egress().map(|((_, name), row)| (name.clone(), row.clone())).collect();
        let left = to.v4().is_some_and(|to| s.left_until(to).is_some());
        (s.egress_set(), rows, s.known_identities(), s.moment(), meshed, left)
    };
    let (set, rows, known, now, meshed, left) = replica.read(ground).await?;
    if meshed {
        let expected = "an address outside of the mesh (ask of the workload behind it by its SPIFFE ID)";
        return Err(Refusal::new(Code::BadRequest, expected, to.to_string()));
    }
    // No document names a range of IPv6.
    let Some(to) = to.v4() else { return Ok(v1::WhoCanResponse::default()) };
    let answered = tokio::task::spawn_blocking(move || {
        if left || closed_at(IpAddr::V4(to)).is_some() {
            return v1::WhoCanResponse::default();
        }
        let mut answer = allowed(&known, port, |source| set.ports(source, (to, 32), now));
        // As they are written.
        let of_port =
            |row: &&EgressRow| port.is_none_or(|port| row.object.ports.is_empty() || row.object.ports.contains(&port));
        let rules = set.containing((to, 32)).into_iter().filter_map(|egress| rows.get(&egress.name));
        answer.egress = rules.filter(of_port).map(message).collect();
        answer
    });
    answered.await.map_err(|e| Refusal::new(Code::Internal, "an answer about egress", e.to_string()))
}

/// Documents that open nothing to anybody who is known, and why.
pub(super) fn unused(s: &State, known: &BTreeSet<SpiffeId>) -> Vec<v1::UnusedPolicy> {
    let (set, now): (EgressSet, _) = (s.egress_set(), s.moment());
    let why = |name: &ObjectName, row: &EgressRow| {
        if row.object.is_over(now) {
            return Some(format!("it is over since {}", utc::text(row.object.expires_at.0)));
        }
        let Some(egress) = set.get(name) else { return Some("nobody is in what it names".to_owned()) };
        let anybody = egress.from.iter().any(|set| known_in(known, set, Action::Allow).next().is_some());
        (!anybody).then(|| "none of its callers is known".to_owned())
    };
    let unused = s.egress().filter_map(|((origin, name), row)| {
        Some(v1::UnusedPolicy {
            why: why(name, row)?,
            kind: "Egress".to_owned(),
            origin: origin.to_string(),
            name: name.to_string(),
            revision: row.revision.0,
            written_by: row.written_by.clone(),
        })
    });
    unused.collect()
}
