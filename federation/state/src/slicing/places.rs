//! Where entries fit: those that are alike in it are one shape, which is asked once.

use crate::callers::named_by;
use crate::objects::EntryRow;
use crate::state::State;
use crate::table::Row;
use ambit_model::{ClusterId, NodeId, Selector, SpiffeId};
use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// What entries of one shape have in common.
type Common = (ClusterId, BTreeSet<NodeId>, Vec<Selector>);

/// All shapes.
#[derive(Debug, Default)]
pub(super) struct Places {
    shapes: Vec<Shape>,
    /// Shapes that name their nodes, by node, and the others, by cluster.
    naming: BTreeMap<NodeId, Vec<usize>>,
    general: BTreeMap<ClusterId, Vec<usize>>,
    /// Identities that are given, and by which shape, in order.
    given: Vec<(SpiffeId, usize)>,
    /// Shapes that fit a node, as far as that was asked.
    kinds: BTreeMap<NodeId, Vec<usize>>,
}

#[derive(Debug)]
pub(super) struct Shape {
    /// In the order of their ids; those that are given to nobody are not here.
    pub(super) entries: Vec<Row<EntryRow>>,
    /// Nodes that it fits, of those with an address, once asked.
    nodes: OnceCell<Arc<BTreeSet<NodeId>>>,
}

impl Places {
    pub(super) fn of(s: &State) -> Places {
        let mut numbers: BTreeMap<Common, usize> = BTreeMap::new();
        let mut places = Places::default();
        for row in s.entries.shared().filter(|row| s.is_given(&row.entry)) {
            let entry = &row.entry;
            let common = (entry.cluster.clone(), entry.nodes.clone(), entry.node_selectors().cloned().collect());
            let next = places.shapes.len();
            let at = *numbers.entry(common).or_insert(next);
            if at == next {
                places.shapes.push(Shape { entries: Vec::new(), nodes: OnceCell::new() });
                match named_by(entry) {
                    Some(nodes) => nodes.into_iter().for_each(|n| places.naming.entry(n).or_default().push(at)),
                    None => places.general.entry(entry.cluster.clone()).or_default().push(at),
                }
            }
            if let Some(shape) = places.shapes.get_mut(at) {
                shape.entries.push(row.clone());
            }
            places.given.push((entry.spiffe_id.clone(), at));
        }
        places.given.sort_unstable();
        places.given.dedup();
        places
    }

    /// Nodes changed, or what their verdicts show, or where they are.
    pub(super) fn forget_nodes(&mut self) {
        self.kinds.clear();
        for shape in &mut self.shapes {
            shape.nodes = OnceCell::new();
        }
    }

    /// Its cluster and the shapes that fit it; none where it is not known.
    pub(super) fn kind_of(&mut self, s: &State, id: &NodeId) -> Option<super::Kind> {
        let cluster = &s.node(id)?.cluster;
        if let Some(shapes) = self.kinds.get(id) {
            return Some((cluster.clone(), shapes.clone()));
        }
        let asked = self.naming.get(id).into_iter().chain(self.general.get(cluster)).flatten();
        let fit = |at: &&usize| self.sample(**at).is_some_and(|row| s.fits_there(&row.entry, id));
        let shapes: BTreeSet<usize> = asked.filter(fit).copied().collect();
        let shapes: Vec<usize> = shapes.into_iter().collect();
        self.kinds.insert(*id, shapes.clone());
        Some((cluster.clone(), shapes))
    }

    pub(super) fn shape(&self, at: usize) -> Option<&Shape> {
        self.shapes.get(at)
    }

    fn sample(&self, at: usize) -> Option<&Row<EntryRow>> {
        self.shapes.get(at)?.entries.first()
    }

    /// Identities that are given, each with a shape that gives it, in order.
    pub(super) fn given(&self) -> &[(SpiffeId, usize)] {
        &self.given
    }

    /// The nodes with an address that entries of this shape may run on.
    pub(super) fn nodes(&self, s: &State, at: usize) -> Arc<BTreeSet<NodeId>> {
        let (Some(shape), Some(row)) = (self.shapes.get(at), self.sample(at)) else { return Arc::default() };
        let find = || {
            let fits = |node: &NodeId| s.fits_there(&row.entry, node);
            let nodes = match named_by(&row.entry) {
                Some(named) => named.into_iter().filter(fits).collect(),
                None => {
                    let own = s.cell().map(|cell| cell.trust_domain.clone());
                    let all =
                        own.into_iter().flat_map(|own| s.addresses_of(&own).map(|((_, n), _)| *n).collect::<Vec<_>>());
                    all.filter(fits).collect()
                }
            };
            Arc::new(nodes)
        };
        shape.nodes.get_or_init(find).clone()
    }
}
