//! What nodes need, as resources. What did not move since the last edition is not encoded again.

use super::messages;
use ambit_model::policy::{Egress, Policy};
use ambit_model::{NodeId, SpiffeId, TrustDomain};
use ambit_proto::convert::{egress_message, node_address_message, policy_message, service_message};
use ambit_proto::resources::{Item, Set};
use ambit_proto::routing::routing_messages;
use ambit_proto::v1::ResourceKind;
use ambit_state::objects::EntryRow;
use ambit_state::slicing::{Class, General, Own, Portion, Refused, Slicer};
use ambit_state::{Bundles, Row};
use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::sync::Arc;

/// Encoded resources, shared.
type Items = Arc<Vec<Arc<Item>>>;

/// What was made of a part, by the part's address; the part is kept along, so that no other can have it.
struct Kept<T, M> {
    now: HashMap<usize, (Arc<T>, M)>,
    before: HashMap<usize, (Arc<T>, M)>,
}

impl<T, M> Default for Kept<T, M> {
    fn default() -> Self {
        Self { now: HashMap::new(), before: HashMap::new() }
    }
}

impl<T, M: Clone> Kept<T, M> {
    fn of(&mut self, part: &Arc<T>, make: impl FnOnce(&T) -> M) -> M {
        let at = Arc::as_ptr(part).addr();
        let before = &mut self.before;
        let made = self.now.entry(at).or_insert_with(|| {
            before.remove(&at).unwrap_or_else(|| {
                let made = make(part);
                (part.clone(), made)
            })
        });
        made.1.clone()
    }

    /// What was made of a part, if it is known.
    fn get(&self, part: &Arc<T>) -> Option<M> {
        let at = Arc::as_ptr(part).addr();
        self.now.get(&at).or_else(|| self.before.get(&at)).map(|(_, made)| made.clone())
    }

    fn put(&mut self, part: &Arc<T>, made: M) {
        self.now.insert(Arc::as_ptr(part).addr(), (part.clone(), made));
    }

    /// What was not asked for since the last turn goes.
    fn turn(&mut self) {
        self.before = std::mem::take(&mut self.now);
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Shelf {
    refused: Kept<Refused, Items>,
    general: Kept<General, Items>,
    bundles: Kept<Bundles, Items>,
    entries: Kept<Vec<Row<EntryRow>>, Items>,
    numbers: Kept<Vec<(SpiffeId, u32)>, Items>,
    policies: Kept<Vec<(TrustDomain, Policy)>, Items>,
    egress: Kept<Vec<Egress>, Items>,
    /// Addresses: those to which nobody gets in clear, and those from which nobody comes so.
    meshed: Kept<Vec<Ipv4Addr>, Items>,
    claimed: Kept<Vec<Ipv4Addr>, Items>,
    classes: Kept<Class, Whole>,
    nodes: HashMap<NodeId, (Set, Own, Set)>,
}

/// The set of a class, and what it was made of beside the class.
#[derive(Clone)]
struct Whole {
    refused: Arc<Refused>,
    general: Arc<General>,
    set: Set,
}

impl Shelf {
    /// What each of these nodes needs; nodes that are not known are left out.
    pub(super) fn sets(&mut self, slicer: &mut Slicer, nodes: &[NodeId]) -> HashMap<NodeId, Set> {
        self.turn();
        let (refused, general) = (slicer.refused().clone(), slicer.general().clone());
        let mut before = std::mem::take(&mut self.nodes);
        let mut sets = HashMap::with_capacity(nodes.len());
        for node in nodes {
            let Some(Portion { class, own }) = slicer.portion(node) else { continue };
            let shared = self.class(&class, &refused, &general);
            let set = match before.remove(node) {
                _ if own == Own::default() => shared.clone(),
                Some((was, of, set)) if was.shares(&shared) && of == own => set,
                _ => shared.with(own_items(&own)),
            };
            self.nodes.insert(*node, (shared, own, set.clone()));
            sets.insert(*node, set);
        }
        sets
    }

    fn turn(&mut self) {
        self.refused.turn();
        self.general.turn();
        self.bundles.turn();
        self.entries.turn();
        self.numbers.turn();
        self.policies.turn();
        self.egress.turn();
        self.meshed.turn();
        self.claimed.turn();
        self.classes.turn();
    }

    fn class(&mut self, class: &Arc<Class>, refused: &Arc<Refused>, general: &Arc<General>) -> Set {
        // Another node of this edition asked for it.
        if let Some((_, whole)) = self.classes.now.get(&Arc::as_ptr(class).addr()) {
            return whole.set.clone();
        }
        let whole = self.classes.get(class);
        let same = |w: &Whole| Arc::ptr_eq(&w.refused, refused) && Arc::ptr_eq(&w.general, general);
        let set = match whole.filter(same) {
            // Its parts are kept as long as it is.
            Some(whole) => whole.set,
            None => Set::default(),
        };
        let items = self.parts(class, refused, general);
        let set = if set.is_empty() { items.iter().flat_map(|part| part.iter().cloned()).collect() } else { set };
        let whole = Whole { refused: refused.clone(), general: general.clone(), set: set.clone() };
        self.classes.put(class, whole);
        set
    }

    /// All of it, in parts that are encoded where they are new.
    fn parts(&mut self, class: &Arc<Class>, refused: &Arc<Refused>, general: &Arc<General>) -> Vec<Items> {
        let number = |(id, number): &(SpiffeId, u32)| Item::identity(id.as_str(), *number);
        let cell = general.trust_domain.as_ref().map_or("", |td| td.as_str());
        let small = (class.services.iter().map(|((origin, _), s)| Item::service(&service_message(origin, s))))
            .chain(class.endpoints.values().map(|e| Item::endpoint(&e.into())))
            .chain(class.callers.iter().map(|row| Item::caller(&node_address_message(row))))
            .chain(class.far_numbers.iter().map(number));
        // Nearly in the order of their kinds: so it is nearly sorted.
        vec![
            self.refused.of(refused, |refused| shared(refused_items(refused))),
            shared([Item::cell(cell, class.cluster.as_str())]),
            self.bundles
                .of(&class.bundles, |bundles| shared(messages::bundles(bundles, &class.jwt).map(|m| Item::bundle(&m)))),
            self.general.of(general, |general| shared(general_items(general))),
            self.entries.of(&class.entries, |rows| shared(rows.iter().map(|row| Item::entry(&(&row.entry).into())))),
            self.policies
                .of(&class.policies, |policies| shared(policies.iter().map(|(origin, p)| policy_item(origin, p)))),
            shared(small),
            self.numbers.of(&class.numbers, |numbers| shared(numbers.iter().map(number))),
            self.egress.of(&class.egress, |all| shared(all.iter().map(|e| Item::egress(&egress_message(e))))),
            self.meshed.of(&class.meshed, |all| shared(all.iter().map(|address| Item::meshed(&address.to_string())))),
            self.claimed
                .of(&class.claimed, |all| shared(all.iter().map(|address| Item::claimed(&address.to_string())))),
        ]
    }
}

fn policy_item(origin: &TrustDomain, policy: &Policy) -> Item {
    let message = policy_message(origin, policy);
    if policy.extras.unmeshed.is_empty() { Item::policy(&message) } else { Item::unmeshed(&message) }
}

fn general_items(general: &General) -> Vec<Item> {
    let named = |kind: ResourceKind| move |name: &String| Item::new(kind, name.clone(), Vec::new());
    let authorities = general.tainted.iter().map(named(ResourceKind::TaintedAuthority));
    let (clusters, steers) = routing_messages(&general.routing);
    authorities
        .chain(general.tainted_jwt.iter().map(named(ResourceKind::TaintedJwt)))
        .chain(clusters.iter().map(Item::cluster))
        .chain(steers.iter().map(Item::steer))
        .collect()
}

fn shared(items: impl IntoIterator<Item = Item>) -> Items {
    Arc::new(items.into_iter().map(Arc::new).collect())
}

/// Whom to refuse.
pub(super) fn refused_items(refused: &Refused) -> Vec<Item> {
    let (ids, leaves) = messages::svid_denials(&refused.svids);
    let nodes = refused.nodes.iter().map(messages::denial_message);
    let authorities = refused.authorities.iter().map(messages::authority_message);
    nodes
        .map(|m| Item::node_denial(&m))
        .chain(authorities.map(|m| Item::authority_denial(&m)))
        .chain(ids.iter().map(Item::id_denial))
        .chain(leaves.iter().map(Item::leaf_denial))
        .collect()
}

fn own_items(own: &Own) -> Vec<Item> {
    let endpoints = own.endpoints.iter().map(|(_, e)| Item::endpoint(&e.into()));
    let services = own.services.iter().map(|((origin, _), s)| Item::service(&service_message(origin, s)));
    let numbers = own.numbers.iter().map(|(id, number)| Item::identity(id.as_str(), *number));
    endpoints.chain(services).chain(numbers).collect()
}
