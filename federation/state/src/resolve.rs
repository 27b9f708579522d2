//! Who is in the sets of a policy, as far as this cell can tell.
//!
//! What comes out of here agents can always be told, whatever a peer's record held: one record must not keep a node on an old
//! slice. A set that the cell cannot tell for sure closes: an allow of it means nobody, a deny or audit all of its trust domain.

use crate::command::{DocumentKind, DocumentsChange};
use crate::objects::ServiceRow;
use crate::state::{OwnedName, State};
use ambit_model::policy::{Action, Egress, Labels, Peers, Policy, PolicyExtras, Service};
use ambit_model::{ClusterId, Code, Entry, ObjectName, Refusal, SpiffeId, TrustDomain};
use ambit_policy::{BACKENDS_MAX, FROM_MAX, PORTS_MAX};
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

/// Bytes of what this cell's policies name by cluster, labels or group, as agents are told it: half of what an agent takes as
/// one slice. What does not fit, because sets grew, is closed, the last by name first.
const SETS_BYTES_MAX: usize = 8 << 20;
/// The same of all policies of one peer: 7,000 of the usual size.
const PEER_BYTES_MAX: usize = 1 << 20;

/// And of all egress documents.
const EGRESS_BYTES_MAX: usize = 2 << 20;

/// What a set takes in a slice beside its names.
const SET_BYTES: usize = 16;

/// Finds who is in a set, each set once.
pub(crate) struct Resolver<'a> {
    state: &'a State,
    own: Option<&'a TrustDomain>,
    /// A change that was not made.
    change: Option<&'a DocumentsChange>,
    known: RefCell<BTreeMap<(Peers, Meant), Found>>,
    /// Of [`SETS_BYTES_MAX`] or [`PEER_BYTES_MAX`], by whose policies they are.
    spent: RefCell<BTreeMap<TrustDomain, usize>>,
    /// Of [`EGRESS_BYTES_MAX`].
    spent_on_egress: RefCell<usize>,
}

/// Who is meant by a set; an identity may have several entries, and run in several places.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Meant {
    /// By an allow: who is in it with everything that it has.
    Surely,
    /// By the target of what narrows: who is in it with something.
    Target,
    /// By the callers of what narrows: the same, and nobody who may be in it is left out.
    Callers,
}

/// Who is in a set; none where this cell cannot tell.
type Found = Option<BTreeSet<SpiffeId>>;

impl<'a> Resolver<'a> {
    pub(crate) fn new(state: &'a State, change: Option<&'a DocumentsChange>) -> Self {
        let own = state.cell().map(|cell| &cell.trust_domain);
        Self {
            state,
            own,
            change,
            known: RefCell::default(),
            spent: RefCell::default(),
            spent_on_egress: RefCell::default(),
        }
    }

    /// The policy as it decides, under the name of its record; none where it decides nothing.
    pub(crate) fn policy<'p>(
        &self,
        origin: &TrustDomain,
        name: &ObjectName,
        policy: &'p Policy,
    ) -> Option<Cow<'p, Policy>> {
        let own = self.own == Some(origin);
        if own && !has_named(policy) {
            return Some(Cow::Borrowed(policy));
        }
        let policy = if own { Cow::Borrowed(policy) } else { as_written(name, policy)? };
        let resolved = if has_named(&policy) { Cow::Owned(self.sets_of(&policy)) } else { policy.clone() };
        let fits = self.spend(origin, bytes(&resolved), if own { SETS_BYTES_MAX } else { PEER_BYTES_MAX });
        let resolved = if fits { resolved } else { Cow::Owned(self.closed(&policy, own)) };
        (!resolved.from.is_empty() || !resolved.extras.unmeshed.is_empty()).then_some(resolved)
    }

    fn spend(&self, origin: &TrustDomain, bytes: usize, most: usize) -> bool {
        let mut spent = self.spent.borrow_mut();
        let spent = spent.entry(origin.clone()).or_default();
        let fits = spent.saturating_add(bytes) <= most;
        *spent += if fits { bytes } else { 0 };
        fits
    }

    /// Whether agents can be told all that the policies of this cell name.
    ///
    /// # Errors
    /// [`Code::Busy`], with the figures.
    pub(crate) fn check_room<'p>(&self, policies: impl Iterator<Item = &'p Policy>) -> Result<(), Refusal> {
        let named = policies.filter(|policy| has_named(policy)).map(|policy| (bytes(&self.sets_of(policy)), policy));
        let (mut all, mut largest) = (0_usize, None);
        for (bytes, policy) in named {
            all = all.saturating_add(bytes);
            if largest.is_none_or(|(most, _)| bytes > most) {
                largest = Some((bytes, policy));
            }
        }
        match largest {
            Some((bytes, policy)) if all > SETS_BYTES_MAX => {
                let expected = format!(
                    "at most {SETS_BYTES_MAX} bytes of identities that policies name by cluster, labels or group (name a path)"
                );
                let sets = policy.from.iter().chain([&policy.target]).filter(|set| set.is_named());
                let sets: Vec<String> = sets.map(ToString::to_string).collect();
                let found = format!("{all} bytes, {bytes} of them in policy {}: {}", policy.name, sets.join(", "));
                Err(Refusal::new(Code::Busy, expected, found))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// The document as it decides; none where it allows nobody anything. An egress document allows, so its sets mean whom an
    /// allow's do.
    pub(crate) fn egress(&self, egress: &Egress) -> Option<Egress> {
        let mut spent = self.spent_on_egress.borrow_mut();
        let from: Vec<Peers> = egress.from.iter().flat_map(|set| self.callers(set, Meant::Surely)).collect();
        let bytes = from.iter().map(set_bytes).sum::<usize>();
        let nobody = |set: &Peers| matches!(set, Peers::Ids(_, ids) if ids.is_empty());
        if spent.saturating_add(bytes) > EGRESS_BYTES_MAX || from.iter().all(nobody) {
            return None;
        }
        *spent += bytes;
        Some(Egress { from, ..egress.clone() })
    }

    /// As [`Resolver::check_room`], of egress documents.
    ///
    /// # Errors
    /// [`Code::Busy`], with the figures.
    pub(crate) fn check_egress_room<'p>(&self, documents: impl Iterator<Item = &'p Egress>) -> Result<(), Refusal> {
        let sets = documents.flat_map(|egress| egress.from.iter().flat_map(|set| self.callers(set, Meant::Surely)));
        let bytes: usize = sets.map(|set| set_bytes(&set)).sum();
        if bytes <= EGRESS_BYTES_MAX {
            return Ok(());
        }
        let expected = format!("at most {EGRESS_BYTES_MAX} bytes of callers in egress documents (name a path)");
        Err(Refusal::new(Code::Busy, expected, bytes.to_string()))
    }

    fn sets_of(&self, policy: &Policy) -> Policy {
        let (target, callers) = meant(policy);
        let from = policy.from.iter().flat_map(|set| self.callers(set, callers)).collect();
        Policy { target: self.set(&policy.target, target), from, ..policy.clone() }
    }

    /// A caller's set; a group is its members.
    fn callers(&self, set: &Peers, meant: Meant) -> Vec<Peers> {
        let Peers::Group(td, name) = set else { return vec![self.set(set, meant)] };
        match self.members(td, name) {
            Some(members) => members.iter().map(|member| self.set(member, meant)).collect(),
            None => vec![closed(set, meant)],
        }
    }

    /// The policy with its sets closed, at least those that have names.
    fn closed(&self, policy: &Policy, named_only: bool) -> Policy {
        let (target, callers) = meant(policy);
        let one = |set: &Peers, meant| if named_only && !set.is_named() { set.clone() } else { closed(set, meant) };
        let all = |set: &Peers| match set {
            // However many its members are, they are of a few trust domains.
            Peers::Group(td, name) => self.members(td, name).map_or_else(
                || vec![closed(set, callers)],
                |members| members.iter().map(|member| closed(member, callers)).collect(),
            ),
            set => vec![one(set, callers)],
        };
        let from: BTreeSet<Peers> = policy.from.iter().flat_map(all).collect();
        Policy { target: one(&policy.target, target), from: from.into_iter().collect(), ..policy.clone() }
    }

    fn members(&self, td: &TrustDomain, name: &ObjectName) -> Option<&'a [Peers]> {
        if let Some(change) = self.change.filter(|_| self.own == Some(td)) {
            if let Some(group) = change.groups.iter().find(|group| group.name == *name) {
                return Some(&group.members);
            }
            if change.delete.contains(&(DocumentKind::Group, name.clone())) {
                return None;
            }
        }
        self.state.groups.get(&(td.clone(), name.clone())).map(|row| row.object.members.as_slice())
    }

    fn set(&self, set: &Peers, meant: Meant) -> Peers {
        if !set.is_named() {
            // A member of a peer's group may be any text.
            return if set.is_written() { set.clone() } else { closed(set, meant) };
        }
        let key = (set.clone(), meant);
        let known = self.known.borrow().get(&key).cloned();
        let ids = known.unwrap_or_else(|| {
            let found = self.find(set, meant);
            self.known.borrow_mut().insert(key, found.clone());
            found
        });
        ids.map_or_else(|| closed(set, meant), |ids| Peers::Ids(set.trust_domain(), ids))
    }

    fn find(&self, set: &Peers, meant: Meant) -> Found {
        match set {
            Peers::Cluster(td, cluster) if self.own == Some(td) => {
                Some(self.of_entries(meant, |e| e.cluster == *cluster))
            }
            // Who will call is not known before it runs; who can be called has an endpoint.
            Peers::Cluster(..) if meant == Meant::Callers => None,
            Peers::Cluster(td, cluster) => Some(self.of_endpoints(td, cluster, meant)),
            Peers::Labelled(td, labels) if self.own == Some(td) => Some(self.of_entries(meant, |e| has(e, labels))),
            // A peer's labels are its own affair, and a group is resolved above.
            Peers::Labelled(..) | Peers::Group(..) => None,
            Peers::Id(_) | Peers::Below(..) | Peers::Domain(_) | Peers::Ids(..) => None,
        }
    }

    fn of_entries(&self, meant: Meant, fits: impl Fn(&Entry) -> bool) -> BTreeSet<SpiffeId> {
        let is_in = |id: &&SpiffeId| {
            let mut given =
                self.state.entries_of(id).map(|row| &row.entry).filter(|e| self.state.is_given(e)).peekable();
            given.peek().is_some() && if meant == Meant::Surely { given.all(&fits) } else { given.any(&fits) }
        };
        self.state.giving.keys().filter(is_in).cloned().collect()
    }

    fn of_endpoints(&self, td: &TrustDomain, cluster: &ClusterId, meant: Meant) -> BTreeSet<SpiffeId> {
        let (mut within, mut elsewhere) = (BTreeSet::new(), BTreeSet::new());
        let from = (td.clone(), ambit_model::Address::FIRST);
        let rows = self.state.endpoints.range((Bound::Included(from), Bound::Unbounded));
        for (_, row) in rows.take_while(|((origin, _), _)| origin == td) {
            let place = if row.object.cluster == *cluster { &mut within } else { &mut elsewhere };
            place.insert(row.object.spiffe_id.clone());
        }
        if meant == Meant::Surely { within.difference(&elsewhere).cloned().collect() } else { within }
    }
}

fn meant(policy: &Policy) -> (Meant, Meant) {
    match policy.action {
        Action::Allow => (Meant::Surely, Meant::Surely),
        Action::Deny | Action::Audit => (Meant::Target, Meant::Callers),
    }
}

fn has(entry: &Entry, labels: &Labels) -> bool {
    labels.iter().all(|(key, value)| entry.extras.labels.get(key) == Some(value))
}

pub(crate) fn has_named(policy: &Policy) -> bool {
    policy.from.iter().chain([&policy.target]).any(Peers::is_named)
}

/// Of its sets, as a slice says them.
fn bytes(policy: &Policy) -> usize {
    policy.from.iter().chain([&policy.target]).map(set_bytes).sum()
}

fn set_bytes(set: &Peers) -> usize {
    let names = match set {
        Peers::Id(id) => id.as_str().len(),
        Peers::Ids(td, ids) => td.as_str().len() + ids.iter().map(|id| id.path().len() + 1).sum::<usize>(),
        Peers::Below(td, path) => td.as_str().len() + path.len(),
        Peers::Domain(td) | Peers::Cluster(td, _) | Peers::Group(td, _) | Peers::Labelled(td, _) => td.as_str().len(),
    };
    names + SET_BYTES
}

/// What stands for a set that cannot be told.
fn closed(set: &Peers, meant: Meant) -> Peers {
    let td = set.trust_domain();
    if meant == Meant::Surely { Peers::Ids(td, BTreeSet::new()) } else { Peers::Domain(td) }
}

/// A peer's policy as a document could say it: what no document says allows nothing, and narrows by all that it may mean.
fn as_written<'p>(name: &ObjectName, policy: &'p Policy) -> Option<Cow<'p, Policy>> {
    // Whom a workload knows by address alone its own cell says.
    if !policy.extras.unmeshed.is_empty() {
        if policy.from.is_empty() {
            return None;
        }
        let extras = PolicyExtras { unmeshed: Vec::new(), ..policy.extras.clone() };
        let of_the_mesh = Policy { extras, ..policy.clone() };
        return as_written(name, &of_the_mesh).map(|policy| Cow::Owned(policy.into_owned()));
    }
    let sets = || policy.from.iter().chain([&policy.target]);
    let ports = policy.ports.len() <= PORTS_MAX && !policy.ports.contains(&0);
    let few = policy.from.len() <= FROM_MAX;
    let written = ports && few && sets().all(Peers::is_written);
    if written && policy.name == *name {
        return Some(Cow::Borrowed(policy));
    }
    let mut policy = Policy { name: name.clone(), ..policy.clone() };
    if !written {
        let (target, callers) = meant(&policy);
        if policy.action == Action::Allow {
            return None;
        }
        let one = |set: &Peers, meant, good| if good && set.is_written() { set.clone() } else { closed(set, meant) };
        let from: BTreeSet<Peers> = policy.from.iter().map(|set| one(set, callers, few)).collect();
        (policy.target, policy.from) = (one(&policy.target, target, true), from.into_iter().collect());
        if !ports {
            policy.ports.clear();
        }
    }
    Some(Cow::Owned(policy))
}

impl State {
    /// Services that agents can be told: this cell's, and of peers' those that a document could say.
    pub(crate) fn told_services(&self) -> impl Iterator<Item = (&OwnedName, &ServiceRow)> {
        let own = self.cell().map(|cell| &cell.trust_domain);
        self.services().filter(move |(key, row)| Some(&key.0) == own || is_service(key, &row.object))
    }
}

/// Whether agents can be told a peer's service.
fn is_service((_, name): &OwnedName, service: &Service) -> bool {
    let backend = |set: &Peers| set.is_written() && !set.is_named();
    service.name == *name
        && service.port > 0
        && service.backends.len() <= BACKENDS_MAX
        && service.is_weighted_well()
        && service.backends.iter().all(backend)
}
