//! Where connections to services go, as operators and peers say it.

use super::{At, cell_row, export, payload, touch};
use crate::command::Reply;
use crate::routing::{Route, RouteChange, Services, SteerKey, TraitsKey, place_of};
use crate::state::State;
use ambit_model::record::Kind;
use ambit_model::routing::{ClusterTraits, Place, ServiceName, Steer, Versioned, Word};
use ambit_model::{ClusterId, Code, ObjectName, Refusal, Service, TrustDomain};
use std::collections::BTreeSet;

/// What one cell says of services, in force or taken back.
pub(super) const STEERS_MAX: usize = 1_000;
/// Bytes of a note.
const NOTE_MAX: usize = 200;

pub(super) fn change(s: &mut State, at: At, asked: &RouteChange) -> Result<Reply, Refusal> {
    if asked.note.len() > NOTE_MAX || asked.note.chars().any(char::is_control) {
        let expected = format!("a note of one line and at most {NOTE_MAX} bytes");
        return Err(Refusal::new(Code::BadRequest, expected, format!("{} bytes", asked.note.len())));
    }
    let word = Word { by: asked.by.clone(), stamp: at.stamp, note: asked.note.clone() };
    match &asked.route {
        Route::Region(cluster, region) => set_region(s, at, cluster, region.as_ref(), word),
        Route::Drain(cluster, drained) => drain(s, at, cluster, *drained, word),
        Route::FailOver { services, from, to } => fail_over(s, at, services, (from, to), &word),
        Route::FailBack { services, from } => fail_back(s, at, services, from, &word),
    }
}

fn known(s: &State, cluster: &ClusterId) -> Result<Place, Refusal> {
    s.place(cluster).ok_or_else(|| Refusal::new(Code::NotFound, "a cluster that this cell knows", cluster.as_str()))
}

fn set_region(
    s: &mut State,
    at: At,
    cluster: &ClusterId,
    region: Option<&ObjectName>,
    word: Word,
) -> Result<Reply, Refusal> {
    let (own, place) = (cell_row(s)?.trust_domain, known(s, cluster)?);
    if place.0 != own {
        return Err(Refusal::new(Code::NotOwner, "a cluster of this cell", format!("{cluster} of {}", place.0)));
    }
    let before = s.traits_by(&own, &place).cloned().unwrap_or_default();
    if before.region.as_ref() == region {
        return Ok(Reply::Done);
    }
    put_traits(s, at, &own, &place, ClusterTraits { region: region.cloned(), word, ..before })
}

fn drain(s: &mut State, at: At, cluster: &ClusterId, drained: bool, word: Word) -> Result<Reply, Refusal> {
    let (own, place) = (cell_row(s)?.trust_domain, known(s, cluster)?);
    let before = s.traits_by(&own, &place).cloned().unwrap_or_default();
    if before.drained == drained {
        return Ok(Reply::Done);
    }
    put_traits(s, at, &own, &place, ClusterTraits { drained, word, ..before })
}

fn put_traits(
    s: &mut State,
    at: At,
    own: &TrustDomain,
    place: &Place,
    traits: ClusterTraits,
) -> Result<Reply, Refusal> {
    let row = Versioned::V1(ClusterTraits { version: traits.version + 1, ..traits });
    // A word about another's cluster is for the callers here.
    if place.0 == *own {
        export(s, Kind::Cluster, place.1.to_string(), payload(&(own, &row))?);
    }
    s.traits.put(&mut s.journal, (own.clone(), place.clone()), row);
    touch(s, at);
    Ok(Reply::Done)
}

fn fail_over(
    s: &mut State,
    at: At,
    services: &Services,
    (from, to): (&ClusterId, &ClusterId),
    word: &Word,
) -> Result<Reply, Refusal> {
    let (own, from, to) = (cell_row(s)?.trust_domain, known(s, from)?, known(s, to)?);
    if from == to {
        return Err(Refusal::new(Code::BadRequest, "two clusters", from.1.as_str()));
    }
    let names = match services {
        Services::All => can_fail_over(s, &from, &to)?,
        Services::These(names) => all_there(s, names, &to)?,
    };
    for name in &names {
        goes_round(s, &own, name, &from, &to)?;
    }
    let new = names.iter().filter(|name| !s.steers.contains(&(own.clone(), (*name).clone(), from.clone()))).count();
    let held = s.steers.iter().filter(|((says, ..), _)| *says == own).count();
    if held + new > STEERS_MAX {
        let expected = format!("at most {STEERS_MAX} services and clusters that were ever failed over");
        return Err(Refusal::new(Code::Busy, expected, (held + new).to_string()));
    }
    for name in names {
        put_steer(s, &(own.clone(), name, from.clone()), Some(&to), word)?;
    }
    touch(s, at);
    Ok(Reply::Done)
}

/// Services that have endpoints in both.
fn can_fail_over(s: &State, from: &Place, to: &Place) -> Result<Vec<ServiceName>, Refusal> {
    let both = |service: &Service| runs_in(s, service, from) && runs_in(s, service, to);
    let names: Vec<_> = s.services().filter(|(_, row)| both(&row.object)).map(|(name, _)| name.clone()).collect();
    if names.is_empty() {
        let expected = format!("services with endpoints in both {} and {}", from.1, to.1);
        return Err(Refusal::new(Code::NotFound, expected, "none"));
    }
    Ok(names)
}

/// These, each of which has an endpoint to go to.
fn all_there(s: &State, names: &[ServiceName], to: &Place) -> Result<Vec<ServiceName>, Refusal> {
    let names: BTreeSet<&ServiceName> = names.iter().collect();
    for name in &names {
        let shown = format!("{}/{}", name.0, name.1);
        let service = s.service(name).map(|row| &row.object);
        let service = service.ok_or_else(|| Refusal::new(Code::NotFound, "a service that this cell knows", &*shown))?;
        if !runs_in(s, service, to) {
            let expected = format!("a service with an endpoint in {}, where its calls would go", to.1);
            return Err(Refusal::new(Code::NotFound, expected, shown));
        }
    }
    if names.is_empty() {
        return Err(Refusal::new(Code::BadRequest, "one service at least, or all", "none"));
    }
    Ok(names.into_iter().cloned().collect())
}

fn runs_in(s: &State, service: &Service, place: &Place) -> bool {
    let here = |endpoint: &ambit_model::Endpoint| {
        place_of(endpoint) == *place && service.backends.iter().any(|set| set.contains(&endpoint.spiffe_id))
    };
    s.endpoints().any(|(_, row)| here(&row.object))
}

/// Clusters that stand in for each other in a circle would leave a service without any.
fn goes_round(s: &State, own: &TrustDomain, name: &ServiceName, from: &Place, to: &Place) -> Result<(), Refusal> {
    let (mut at, mut way) = (to.clone(), vec![from.1.as_str().to_owned()]);
    for _ in 0..=s.steers.len() {
        way.push(at.1.to_string());
        if at == *from {
            let expected =
                format!("clusters that do not stand in for each other in a circle (fail back {} first)", to.1);
            let found = format!("{}/{}: {}", name.0, name.1, way.join(" -> "));
            return Err(Refusal::new(Code::BadRequest, expected, found));
        }
        let next = s.steers.get(&(own.clone(), name.clone(), at)).and_then(|row| row.get().to.clone());
        let Some(next) = next else { return Ok(()) };
        at = next;
    }
    Ok(())
}

fn fail_back(s: &mut State, at: At, services: &Services, from: &ClusterId, word: &Word) -> Result<Reply, Refusal> {
    let (own, from) = (cell_row(s)?.trust_domain, known(s, from)?);
    let over = |(says, _, place): &SteerKey, steer: &Steer| *says == own && *place == from && steer.to.is_some();
    let all: BTreeSet<SteerKey> =
        s.steers.iter().filter(|(key, row)| over(key, row.get())).map(|(key, _)| key.clone()).collect();
    let keys: BTreeSet<SteerKey> = match services {
        Services::All => all.clone(),
        Services::These(names) => names.iter().map(|name| (own.clone(), name.clone(), from.clone())).collect(),
    };
    let missing = keys.difference(&all).next().map(|(_, name, _)| format!("{}/{}", name.0, name.1));
    if keys.is_empty() || missing.is_some() {
        let expected = format!("services that this cell failed over from {}", from.1);
        return Err(Refusal::new(Code::NotFound, expected, missing.unwrap_or_else(|| "none".into())));
    }
    for key in keys {
        put_steer(s, &key, None, word)?;
    }
    touch(s, at);
    Ok(Reply::Done)
}

fn put_steer(s: &mut State, key: &SteerKey, to: Option<&Place>, word: &Word) -> Result<(), Refusal> {
    let before = s.steers.get(key).map(|row| row.get().clone());
    if before.as_ref().is_some_and(|before| before.to.as_ref() == to) {
        return Ok(());
    }
    let version = before.map_or(0, |before| before.version) + 1;
    let row = Versioned::V1(Steer { version, to: to.cloned(), word: word.clone() });
    let (own, service, from) = key;
    if service.0 == *own {
        export(s, Kind::Steer, format!("{}/{}/{}", service.1, from.0, from.1), payload(&row)?);
    }
    s.steers.put(&mut s.journal, key.clone(), row);
    Ok(())
}

/// What follows the trust domain in a record of a cluster; none of a release that said no more, or that says what is not known here.
pub(super) fn traits_in(rest: &[u8]) -> Option<ClusterTraits> {
    let (_, rest) = postcard::take_from_bytes::<TrustDomain>(rest).ok()?;
    postcard::from_bytes::<Versioned<ClusterTraits>>(rest).ok().map(|row| row.get().clone())
}

/// The service and the cluster that the key of a record names.
pub(super) fn steer_key(origin: &TrustDomain, key: &str) -> Result<SteerKey, Refusal> {
    let bad = || Refusal::new(Code::RecordChainBroken, "a key of service, trust domain and cluster", key);
    let mut parts = key.split('/');
    let (Some(name), Some(td), Some(cluster), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
        return Err(bad());
    };
    Ok((origin.clone(), (origin.clone(), name.parse()?), (td.parse()?, cluster.parse()?)))
}

/// A peer's word about a cluster of its own.
pub(super) fn take_traits(s: &mut State, origin: &TrustDomain, cluster: &ClusterId, traits: ClusterTraits) {
    let place = (origin.clone(), cluster.clone());
    if s.place(cluster).as_ref() == Some(&place) {
        let key: TraitsKey = (origin.clone(), place);
        s.traits.put(&mut s.journal, key, Versioned::V1(traits));
    }
}

/// A peer's word about a service of its own.
pub(super) fn take_steer(s: &mut State, key: SteerKey, steer: Steer) {
    let held = s.steers.iter().filter(|((says, ..), _)| *says == key.0).count();
    if held < STEERS_MAX || s.steers.contains(&key) {
        s.steers.put(&mut s.journal, key, Versioned::V1(steer));
    }
}
