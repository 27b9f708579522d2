//! What nodes that may run the same entries have in common, and what one of them has beside.

use super::{General, Kind, Slicer, within};
use crate::egress;
use crate::objects::EntryRow;
use crate::slice::Bundles;
use crate::state::{OwnedName, State};
use crate::table::Row;
use ambit_model::policy::{Action, Egress, Endpoint, NodeAddress, Peers, Policy, Service};
use ambit_model::{Address, ClusterId, JwtAuthority, NodeId, SpiffeId, TrustDomain};
use ambit_policy::{Index, PolicySet};
use std::cell::{OnceCell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::Arc;

/// An endpoint's key.
type Place = (TrustDomain, Address);

/// Endpoints and services as they are asked for.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// Identities with endpoints, in order.
    identities: Vec<(SpiffeId, Vec<Place>)>,
    /// Endpoints that own nodes reported.
    by_node: BTreeMap<NodeId, Vec<Place>>,
    /// Every IPv4 address that the mesh knows.
    addresses: BTreeSet<Ipv4Addr>,
    /// Of these, those in the ranges of some documents: nodes with the same documents share them.
    inside: RefCell<Vec<Inside>>,
    /// Every address that is of the mesh.
    claimed: BTreeSet<Ipv4Addr>,
}

/// Documents, and what is in their ranges.
type Inside = (Arc<Vec<Egress>>, Arc<Vec<Ipv4Addr>>);

impl Known {
    pub(super) fn of(s: &State) -> Known {
        let own = s.cell().map(|cell| &cell.trust_domain);
        let (mut identities, mut by_node) = (BTreeMap::<_, Vec<_>>::new(), BTreeMap::<_, Vec<_>>::new());
        for (key, row) in s.endpoints.iter() {
            identities.entry(row.object.spiffe_id.clone()).or_default().push(key.clone());
            if Some(&key.0) == own {
                by_node.entry(row.object.node).or_default().push(key.clone());
            }
        }
        let (addresses, claimed) = (s.meshed_addresses(), s.claimed_addresses());
        Known { identities: identities.into_iter().collect(), by_node, addresses, inside: RefCell::default(), claimed }
    }

    /// With documents that are made anew nobody shares what was found for the former ones.
    pub(super) fn forget_inside(&self) {
        self.inside.borrow_mut().clear();
    }

    /// Addresses of the mesh in the ranges of these documents.
    fn inside(&self, egress: &Arc<Vec<Egress>>) -> Arc<Vec<Ipv4Addr>> {
        let mut known = self.inside.borrow_mut();
        if let Some((_, found)) = known.iter().find(|(of, _)| of == egress) {
            return found.clone();
        }
        let found = Arc::new(egress::inside(&self.addresses, egress::ranges(egress)));
        known.push((egress.clone(), found.clone()));
        found
    }
}

/// What nodes of one cluster that may run the same entries have in common. Parts that did not move are shared with the
/// class of the revision before.
#[derive(Clone, Debug)]
pub struct Class {
    /// See [`crate::Slice::cluster`].
    pub cluster: ClusterId,
    /// What they may run, by id.
    pub entries: Arc<Vec<Row<EntryRow>>>,
    /// The identities of these, in order.
    local: Arc<Vec<SpiffeId>>,
    /// The numbers of these.
    pub numbers: Arc<Vec<(SpiffeId, u32)>>,
    /// With those that entries federate with.
    pub bundles: Arc<Bundles>,
    /// In the same way.
    pub jwt: Arc<BTreeMap<TrustDomain, Vec<JwtAuthority>>>,
    /// Policies that concern local identities.
    pub policies: Arc<Vec<(TrustDomain, Policy)>>,
    /// Endpoints that local identities may reach.
    pub endpoints: Arc<BTreeMap<Place, Endpoint>>,
    /// Numbers of identities of these that are not local.
    pub far_numbers: Arc<Vec<(SpiffeId, u32)>>,
    /// Services that these are behind.
    pub services: Arc<BTreeMap<OwnedName, Service>>,
    /// See [`crate::Slice::callers`].
    pub callers: Arc<BTreeMap<(TrustDomain, NodeId), NodeAddress>>,
    /// Egress documents that concern local identities.
    pub egress: Arc<Vec<Egress>>,
    /// See [`crate::Slice::meshed`].
    pub meshed: Arc<Vec<Ipv4Addr>>,
    /// See [`crate::Slice::claimed`].
    pub claimed: Arc<Vec<Ipv4Addr>>,
}

impl Class {
    pub(super) fn new(of: &Slicer, (cluster, shapes): &Kind) -> Class {
        let shapes = shapes.iter().filter_map(|at| of.places.shape(*at));
        let mut entries: Vec<Row<EntryRow>> = shapes.flat_map(|shape| shape.entries.iter().cloned()).collect();
        entries.sort_unstable_by(|a, b| a.entry.id.cmp(&b.entry.id));
        let mut local: Vec<SpiffeId> = entries.iter().map(|row| row.entry.spiffe_id.clone()).collect();
        local.sort_unstable();
        local.dedup();
        let (bundles, jwt) = bundles(&of.general, &entries);
        let class = Class {
            cluster: cluster.clone(),
            entries: Arc::new(entries),
            numbers: Arc::new(numbers(&of.frozen, local.iter())),
            local: Arc::new(local),
            bundles: Arc::new(bundles),
            jwt: Arc::new(jwt),
            policies: Arc::default(),
            endpoints: Arc::default(),
            far_numbers: Arc::default(),
            services: Arc::default(),
            callers: Arc::default(),
            egress: Arc::default(),
            meshed: Arc::default(),
            claimed: Arc::default(),
        };
        class.judged(of, true, true)
    }

    /// The same entries under the policies, endpoints and nodes of now: shared where nothing came of it.
    pub(super) fn again(self: Arc<Class>, of: &Slicer, rules: bool, endpoints: bool) -> Arc<Class> {
        let now = self.judged(of, rules, endpoints);
        if now.is(&self) { self } else { Arc::new(now) }
    }

    /// Whether every part is shared.
    fn is(&self, other: &Class) -> bool {
        Arc::ptr_eq(&self.policies, &other.policies)
            && Arc::ptr_eq(&self.endpoints, &other.endpoints)
            && Arc::ptr_eq(&self.far_numbers, &other.far_numbers)
            && Arc::ptr_eq(&self.services, &other.services)
            && Arc::ptr_eq(&self.callers, &other.callers)
            && Arc::ptr_eq(&self.egress, &other.egress)
            && Arc::ptr_eq(&self.meshed, &other.meshed)
            && Arc::ptr_eq(&self.claimed, &other.claimed)
    }

    fn judged(&self, of: &Slicer, rules: bool, endpoints: bool) -> Class {
        let mut class = self.clone();
        if rules {
            put(&mut class.policies, of.rules.concerning(&class.local));
            put(&mut class.egress, of.rules.egress(&class.local));
        }
        // An endpoint is reached by what all policies say, not only by those that changed here.
        if rules || endpoints {
            let reached = class.reached(of);
            put(&mut class.endpoints, reached);
            let ids: BTreeSet<&SpiffeId> = class.endpoints.values().map(|e| &e.spiffe_id).collect();
            let far = ids.iter().copied().filter(|id| class.local.binary_search(id).is_err());
            let far = numbers(&of.frozen, far);
            put(&mut class.far_numbers, far);
            let services = services_of(&of.frozen, &ids);
            put(&mut class.services, services);
            let meshed = of.known.inside(&class.egress);
            if class.meshed != meshed {
                class.meshed = meshed;
            }
        }
        let callers = class.callers(of);
        put(&mut class.callers, callers);
        // Of most nodes no workload is open to any address, which is seen at once.
        let policies = class.policies.iter().map(|(origin, policy)| (origin, policy));
        let claimed = egress::inside(&of.known.claimed, egress::callers(policies, &class.local));
        put(&mut class.claimed, claimed);
        class
    }

    fn allows(&self) -> impl Iterator<Item = &Policy> {
        self.policies.iter().map(|(_, policy)| policy).filter(|policy| policy.action == Action::Allow)
    }

    /// Its policies, compiled: of connections of local identities they say what all policies do.
    fn compiled(&self, of: &Slicer) -> Index {
        let mut set = PolicySet::new(of.general.known.clone());
        for (origin, policy) in self.policies.iter() {
            set.insert(origin.clone(), policy.clone());
        }
        set.compile()
    }

    /// Endpoints whose identity some local one may call.
    fn reached(&self, of: &Slicer) -> BTreeMap<Place, Endpoint> {
        let (now, mut found) = (of.frozen.moment(), BTreeMap::new());
        let (mut seen, index) = (BTreeSet::new(), OnceCell::new());
        for policy in self.allows() {
            for (dst, places) in within(&of.known.identities, |(id, _)| id, &policy.target) {
                let index = || index.get_or_init(|| self.compiled(of));
                if seen.contains(dst) || !self.has_caller(policy, |src| !index().ports(src, dst, now).is_empty()) {
                    continue;
                }
                seen.insert(dst);
                let rows = places.iter().filter_map(|key| Some((key.clone(), of.frozen.endpoints.get(key)?)));
                found.extend(rows.map(|(key, row)| (key, row.object.clone())));
            }
        }
        found
    }

    fn has_caller(&self, policy: &Policy, may_call: impl Fn(&SpiffeId) -> bool) -> bool {
        policy.from.iter().flat_map(|set| within(&self.local, |id| id, set)).any(may_call)
    }

    /// As [`State::callers`].
    fn callers(&self, of: &Slicer) -> BTreeMap<(TrustDomain, NodeId), NodeAddress> {
        let s = &of.frozen;
        let Some(own) = s.cell().map(|cell| &cell.trust_domain) else { return BTreeMap::new() };
        let here = |policy: &&Policy| within(&self.local, |id| id, &policy.target).next().is_some();
        let from: BTreeSet<&Peers> = self.allows().filter(here).flat_map(|policy| &policy.from).collect();
        let shapes: BTreeSet<usize> =
            from.iter().flat_map(|set| within(of.places.given(), |(id, _)| id, set)).map(|(_, shape)| *shape).collect();
        let mut found = BTreeMap::new();
        for shape in shapes {
            for node in of.places.nodes(s, shape).iter() {
                found.extend(s.node_addresses.get(&(own.clone(), *node)).map(|row| ((own.clone(), *node), *row)));
            }
        }
        let domains: BTreeSet<TrustDomain> = from.iter().map(|set| set.trust_domain()).collect();
        let theirs = domains.iter().filter(|td| *td != own).flat_map(|td| s.addresses_of(td));
        found.extend(theirs.map(|(key, row)| (key.clone(), *row)));
        found
    }
}

/// Puts what is new in the place of what was, where it differs.
fn put<T: PartialEq>(place: &mut Arc<T>, new: T) {
    if **place != new {
        *place = Arc::new(new);
    }
}

fn bundles(general: &General, entries: &[Row<EntryRow>]) -> (Bundles, BTreeMap<TrustDomain, Vec<JwtAuthority>>) {
    let (mut bundles, mut jwt) = (general.bundles.clone(), general.jwt.clone());
    let named: BTreeSet<&TrustDomain> = entries.iter().flat_map(|row| &row.entry.federates_with).collect();
    for td in named {
        let Some((bundle, keys)) = general.foreign.get(td) else { continue };
        if let Some(bundle) = bundle {
            bundles.entry(td.clone()).or_insert_with(|| bundle.clone());
        }
        jwt.entry(td.clone()).or_insert_with(|| keys.clone());
    }
    (bundles, jwt)
}

fn numbers<'a>(s: &State, ids: impl Iterator<Item = &'a SpiffeId>) -> Vec<(SpiffeId, u32)> {
    ids.filter_map(|id| s.identities.get(id).map(|number| (id.clone(), *number))).collect()
}

fn services_of(s: &State, ids: &BTreeSet<&SpiffeId>) -> BTreeMap<OwnedName, Service> {
    if ids.is_empty() {
        return BTreeMap::new();
    }
    let behind = |service: &Service| ids.iter().any(|id| service.backends.iter().any(|set| set.contains(id)));
    let found = s.told_services().filter(|(_, row)| behind(&row.object));
    found.map(|(name, row)| (name.clone(), row.object.clone())).collect()
}

/// What a node needs beside its class: the endpoints that run on it, whoever may call them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Own {
    /// Endpoints.
    pub endpoints: Vec<((TrustDomain, Address), Endpoint)>,
    /// Services that these are behind.
    pub services: Vec<(OwnedName, Service)>,
    /// Numbers of identities of these.
    pub numbers: Vec<(SpiffeId, u32)>,
}

impl Own {
    pub(super) fn of(of: &Slicer, class: &Class, id: &NodeId) -> Own {
        let here = of.known.by_node.get(id).into_iter().flatten();
        let beside = here.filter(|key| !class.endpoints.contains_key(key));
        let rows = beside.filter_map(|key| Some((key.clone(), of.frozen.endpoints.get(key)?.object.clone())));
        let endpoints: Vec<_> = rows.collect();
        let ids: BTreeSet<&SpiffeId> = endpoints.iter().map(|(_, e)| &e.spiffe_id).collect();
        let services = services_of(&of.frozen, &ids).into_iter();
        let services = services.filter(|(name, _)| !class.services.contains_key(name)).collect();
        let known = |id: &SpiffeId| {
            let far = class.far_numbers.binary_search_by(|(far, _)| far.cmp(id)).is_ok();
            far || class.local.binary_search(id).is_ok()
        };
        let numbers = numbers(&of.frozen, ids.into_iter().filter(|id| !known(id)));
        Own { endpoints, services, numbers }
    }
}
