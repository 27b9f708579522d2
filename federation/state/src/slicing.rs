//! Slices of many nodes, at the cost of what changed: what is the same for all nodes is made once for each revision, what is
//! the same for all nodes that may run the same entries once for all of these, and what did not move is not made again.
//!
//! [`State::slice`] says the same of one node and one moment, and is what this is tested by. It never holds the state up:
//! under its lock [`Slicer::follow`] only shares rows; all work is [`Slicer::settle`]'s and [`Slicer::portion`]'s, later.

mod class;
mod places;
mod rules;

pub use class::{Class, Own};

use crate::denied::SvidDenials;
use crate::slice::{Bundles, Slice};
use crate::state::State;
use ambit_model::policy::Endpoint;
use ambit_model::{ClusterId, Generation, JwtAuthority, NodeId, Revision, Routing, SpiffeId, Stamp, TrustDomain};
use class::Known;
use places::Places;
use rules::Rules;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Which nodes are alike: the cluster, and the shapes (see [`Places`]) of entries that fit them.
type Kind = (ClusterId, Vec<usize>);

/// Whom to refuse, whoever the node is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Refused {
    /// See [`Slice::denials`].
    pub nodes: BTreeMap<(TrustDomain, NodeId), Generation>,
    /// See [`Slice::svid_denials`].
    pub svids: SvidDenials,
    /// See [`Slice::authority_denials`].
    pub authorities: BTreeSet<(TrustDomain, String)>,
}

/// Tells whether whom to refuse may have changed: equal marks of one process mean that it did not.
#[derive(Clone, Debug)]
pub struct RefusedMark(Arc<()>, [u64; 4]);

impl PartialEq for RefusedMark {
    fn eq(&self, other: &RefusedMark) -> bool {
        Arc::ptr_eq(&self.0, &other.0) && self.1 == other.1
    }
}

impl State {
    /// See [`RefusedMark`].
    pub fn refused_mark(&self) -> RefusedMark {
        let tables = [
            self.node_denials.version(),
            self.id_denials.version(),
            self.leaf_denials.version(),
            self.authority_denials.version(),
        ];
        RefusedMark(self.journal.origin.clone(), tables)
    }

    /// Whom to refuse.
    pub fn refused(&self) -> Refused {
        Refused {
            nodes: self.node_denials().map(|(key, generation)| (key.clone(), *generation)).collect(),
            svids: self.svid_denials(),
            authorities: self.denied_authorities(),
        }
    }
}

/// What every node gets, and what is small.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct General {
    /// See [`Slice::trust_domain`].
    pub trust_domain: Option<TrustDomain>,
    /// Own roots and those of peers.
    pub bundles: Bundles,
    /// Keys of JWT-SVIDs by trust domain.
    pub jwt: BTreeMap<TrustDomain, Vec<JwtAuthority>>,
    /// Of foreign trust domains that are no cells.
    foreign: BTreeMap<TrustDomain, Foreign>,
    /// See [`Slice::tainted`].
    pub tainted: BTreeSet<String>,
    /// See [`Slice::tainted_jwt`].
    pub tainted_jwt: BTreeSet<String>,
    known: BTreeSet<TrustDomain>,
    /// See [`Slice::routing`].
    pub routing: Routing,
}

/// Bundle, where one is known, and JWT keys.
type Foreign = (Option<(u64, Vec<Vec<u8>>)>, Vec<JwtAuthority>);

/// What moved since the last [`Slicer::settle`].
#[derive(Clone, Copy, Debug, Default)]
struct Moved {
    general: bool,
    /// Nodes, and what their verdicts show.
    nodes: bool,
    entries: bool,
    rules: bool,
    endpoints: bool,
    services: bool,
    addresses: bool,
    identities: bool,
}

/// What one node needs: what it shares with those that are alike, and its own.
#[derive(Clone, Debug)]
pub struct Portion {
    /// Shared.
    pub class: Arc<Class>,
    /// Of this node alone.
    pub own: Own,
}

/// See the module.
#[derive(Default)]
pub struct Slicer {
    /// The tables that slices are made of, of one moment.
    frozen: State,
    /// The state that they are of.
    origin: Option<Arc<()>>,
    revision: Revision,
    imported: BTreeMap<TrustDomain, u64>,
    general: Arc<General>,
    refused: Arc<Refused>,
    refused_mark: Option<RefusedMark>,
    places: Places,
    rules: Rules,
    known: Known,
    classes: BTreeMap<Kind, Arc<Class>>,
    /// Classes asked for since the last settling; the others are forgotten by the next.
    fresh: BTreeMap<Kind, Arc<Class>>,
    moved: Moved,
}

impl Slicer {
    /// Takes over what the state is now. Rows are shared, so that the state is free again within milliseconds.
    pub fn follow(&mut self, s: &State) {
        let same = self.origin.as_ref().is_some_and(|origin| Arc::ptr_eq(origin, &s.journal.origin));
        let (before, now) = (self.frozen.stamp(), s.stamp());
        let f = &mut self.frozen;
        f.clock.follow(&s.clock, same);
        f.cell.follow(&s.cell, same);
        f.peers.follow(&s.peers, same);
        f.clusters.follow(&s.clusters, same);
        let entries = [f.entries.follow(&s.entries, same), f.id_denials.follow(&s.id_denials, same)];
        let nodes =
            [f.nodes.follow(&s.nodes, same), f.standings.follow(&s.standings, same), f.boots.follow(&s.boots, same)];
        let rules =
            [f.policies.follow(&s.policies, same), f.groups.follow(&s.groups, same), f.egress.follow(&s.egress, same)];
        let endpoints = f.endpoints.follow(&s.endpoints, same) | f.former.follow(&s.former, same);
        // Those whose time is over are there until the next tick and given to nobody.
        let ended = s.expiring.range(..).next().is_some_and(|(end, _)| *end <= now);
        let moved = &mut self.moved;
        moved.entries |= !same || entries.contains(&true) || ended;
        moved.nodes |= nodes.contains(&true);
        moved.endpoints |= endpoints;
        moved.services |= f.services.follow(&s.services, same);
        moved.addresses |= f.node_addresses.follow(&s.node_addresses, same);
        moved.identities |= f.identities.follow(&s.identities, same);
        moved.rules |= rules.contains(&true) || !same || s.policy_ends_in(before, now);
        let general = s.general();
        if general != *self.general {
            moved.general = true;
            moved.rules |= general.known != self.general.known;
            self.general = Arc::new(general);
        }
        let mark = s.refused_mark();
        if self.refused_mark.as_ref() != Some(&mark) {
            (self.refused, self.refused_mark) = (Arc::new(s.refused()), Some(mark));
        }
        self.imported = s.imported();
        self.revision = s.cell().map(|cell| cell.revision).unwrap_or_default();
        self.origin = Some(s.journal.origin.clone());
    }

    /// Makes anew what moved and is the same for all.
    pub fn settle(&mut self) {
        let moved = std::mem::take(&mut self.moved);
        let now = self.frozen.moment();
        if moved.entries {
            self.frozen.index_entries();
            self.places = Places::of(&self.frozen);
        } else if moved.nodes || moved.addresses {
            self.places.forget_nodes();
        }
        // Sets that have names are whom entries and endpoints say to be in them.
        let rules = moved.rules || (self.rules.has_named() && (moved.entries || moved.endpoints));
        if rules {
            self.rules = Rules::of(&self.frozen, now);
            self.known.forget_inside();
        }
        if moved.endpoints || moved.services || moved.addresses {
            self.known = Known::of(&self.frozen);
        }
        let classes = std::mem::take(&mut self.fresh);
        let keep = !moved.entries && !moved.identities && !moved.general;
        self.classes = if keep { classes } else { BTreeMap::new() };
        if rules || moved.endpoints || moved.services || moved.addresses || moved.nodes {
            // Where only these moved, what a class is made of stays, and is judged anew.
            let stale = std::mem::take(&mut self.classes);
            for (kind, class) in stale {
                let class = class.again(self, rules, moved.endpoints || moved.services);
                self.classes.insert(kind, class);
            }
        }
    }

    /// The revision that everything is of.
    pub fn revision(&self) -> Revision {
        self.revision
    }
    /// The cell's time then.
    pub fn stamp(&self) -> Stamp {
        self.frozen.stamp()
    }
    /// How far peers were imported.
    pub fn imported(&self) -> &BTreeMap<TrustDomain, u64> {
        &self.imported
    }
    /// What every node gets.
    pub fn general(&self) -> &Arc<General> {
        &self.general
    }
    /// Whom every node refuses.
    pub fn refused(&self) -> &Arc<Refused> {
        &self.refused
    }

    /// What a node needs; none where it is not known.
    pub fn portion(&mut self, id: &NodeId) -> Option<Portion> {
        self.frozen.cell()?;
        let kind = self.places.kind_of(&self.frozen, id)?;
        let known = self.fresh.get(&kind).or_else(|| self.classes.get(&kind)).cloned();
        let class = known.unwrap_or_else(|| Arc::new(Class::new(self, &kind)));
        self.fresh.insert(kind, class.clone());
        let own = Own::of(self, &class, id);
        Some(Portion { class, own })
    }

    /// As [`State::slice`] of what was followed last.
    pub fn slice(&mut self, id: &NodeId) -> Option<Slice> {
        let Portion { class, own } = self.portion(id)?;
        let (general, refused) = (&self.general, &self.refused);
        let mut endpoints: BTreeMap<_, &Endpoint> = BTreeMap::new();
        endpoints.extend(class.endpoints.iter().map(|(key, row)| (key.clone(), row)));
        endpoints.extend(own.endpoints.iter().map(|(key, row)| (key.clone(), row)));
        let mut services = class.services.as_ref().clone();
        services.extend(own.services.iter().cloned());
        let numbers = class.numbers.iter().chain(class.far_numbers.iter()).chain(&own.numbers);
        Some(Slice {
            revision: self.revision,
            stamp: self.stamp(),
            trust_domain: general.trust_domain.clone()?,
            cluster: class.cluster.clone(),
            bundles: class.bundles.as_ref().clone(),
            jwt_authorities: class.jwt.as_ref().clone(),
            entries: class.entries.iter().map(|row| row.entry.clone()).collect(),
            policies: class.policies.as_ref().clone(),
            services: services.into_iter().map(|((origin, _), service)| (origin, service)).collect(),
            endpoints: endpoints.into_values().cloned().collect(),
            callers: class.callers.as_ref().clone(),
            identities: numbers.cloned().collect(),
            denials: refused.nodes.clone(),
            svid_denials: refused.svids.clone(),
            imported: self.imported.clone(),
            tainted: general.tainted.clone(),
            tainted_jwt: general.tainted_jwt.clone(),
            authority_denials: refused.authorities.clone(),
            egress: class.egress.as_ref().clone(),
            meshed: class.meshed.as_ref().clone(),
            claimed: class.claimed.as_ref().clone(),
            routing: general.routing.clone(),
        })
    }
}

impl State {
    fn general(&self) -> General {
        let foreign = |(td, _): (&TrustDomain, _)| (td.clone(), (self.foreign_bundle(td), self.peer_jwt(td).to_vec()));
        General {
            trust_domain: self.cell().map(|cell| cell.trust_domain.clone()),
            bundles: self.bundles(),
            jwt: self.jwt_bundles(),
            foreign: self.relationships().map(foreign).collect(),
            tainted: self.tainted_authorities(),
            tainted_jwt: self.tainted_jwt(),
            known: self.known_domains(),
            routing: self.routing(),
        }
    }

    /// Makes the entries' indexes anew, of a state whose rows were taken over.
    fn index_entries(&mut self) {
        (self.giving, self.asking, self.expiring) = Default::default();
        let rows: Vec<_> = self.entries.shared().cloned().collect();
        for row in rows {
            self.index_entry(&row.entry, true);
        }
    }
}

/// Of identities in order, those in a set. Of a set that nobody resolved none are.
pub(crate) fn within<'a, T>(
    sorted: &'a [T],
    id: impl Fn(&T) -> &SpiffeId + Copy + 'a,
    set: &'a ambit_model::policy::Peers,
) -> Box<dyn Iterator<Item = &'a T> + 'a> {
    use ambit_model::policy::Peers;
    let run = move |prefix: String, whole: bool| {
        let from = sorted.partition_point(|one| id(one).as_str() < prefix.as_str());
        let rest = sorted.get(from..).unwrap_or_default().iter();
        rest.take_while(
            move |one| if whole { id(one).as_str() == prefix } else { id(one).as_str().starts_with(&prefix) },
        )
    };
    match set {
        Peers::Id(one) => Box::new(run(one.as_str().to_owned(), true)),
        Peers::Ids(_, ids) => {
            let of_its_own = ids.iter().filter(|one| set.contains(one));
            Box::new(of_its_own.flat_map(move |one| run(one.as_str().to_owned(), true)))
        }
        Peers::Below(td, path) => Box::new(run(format!("spiffe://{td}{path}"), false)),
        Peers::Domain(td) => Box::new(run(format!("spiffe://{td}/"), false)),
        Peers::Cluster(..) | Peers::Group(..) | Peers::Labelled(..) => Box::new(std::iter::empty()),
    }
}
