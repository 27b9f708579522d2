//! Which SVIDs are refused, whoever asks: callers of the cell, slices, CRLs.

use crate::committed::{Committed, Issuance, RevokedLeaves};
use crate::state::State;
use ambit_model::{IdDenial, LeafDenial, SpiffeId, Stamp, TrustDomain};
use std::collections::BTreeMap;

/// Leaves in one CRL; 40 bytes each.
const CRL_LEAVES_MAX: usize = 100_000;

/// Whom to refuse beside nodes, as a slice carries it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SvidDenials {
    /// By identity.
    pub ids: Vec<(SpiffeId, IdDenial)>,
    /// Whose, authority, serial.
    pub leaves: Vec<(TrustDomain, String, Vec<u8>)>,
}

impl State {
    /// Whether no SVID is issued for the identity, and all that it shows are refused.
    pub fn barred(&self, id: &SpiffeId) -> bool {
        // Asked for every entry of every slice: most cells deny nobody.
        self.id_denials.len() > 0 && self.denials_of(id).any(|denial| denial.barred)
    }

    /// Whether an SVID is refused: by its authority, by its identity, or by itself. The caller has verified it.
    pub fn svid_denied(&self, id: &SpiffeId, authority: &str, serial: &[u8]) -> bool {
        self.authority_denied(&id.trust_domain(), authority) || self.svid_denied_since(id, authority, serial).is_some()
    }

    /// Whether whatever is under this authority is refused. Only `origin` decides about its authorities.
    pub fn authority_denied(&self, origin: &TrustDomain, authority: &str) -> bool {
        self.authority_denials.len() > 0 && self.authority_denials.contains(&(origin.clone(), authority.to_owned()))
    }

    fn svid_denied_since(&self, id: &SpiffeId, authority: &str, serial: &[u8]) -> Option<Stamp> {
        if self.id_denials.len() + self.leaf_denials.len() == 0 {
            return None;
        }
        let by_id = self.denials_of(id).find(|denial| denial.covers(serial)).map(|denial| denial.since);
        let key = (id.trust_domain(), authority.to_owned(), serial.to_vec());
        by_id.or_else(|| self.leaf_denials.get(&key).map(|denial| denial.since))
    }

    /// A trust domain speaks of its own identities; this cell may refuse any.
    fn denials_of<'a>(&'a self, id: &SpiffeId) -> impl Iterator<Item = &'a IdDenial> {
        let (theirs, own) = (id.trust_domain(), self.cell().map(|cell| cell.trust_domain.clone()));
        let own = own.filter(|own| *own != theirs).and_then(|own| self.id_denials.get(&(own, id.clone())));
        self.id_denials.get(&(theirs, id.clone())).into_iter().chain(own)
    }

    /// Denials of identities, by who says so.
    pub fn id_denials(&self) -> impl Iterator<Item = (&(TrustDomain, SpiffeId), &IdDenial)> {
        self.id_denials.iter()
    }
    /// Denials of single leaves.
    pub fn leaf_denials(&self) -> impl Iterator<Item = (&(TrustDomain, String, Vec<u8>), &LeafDenial)> {
        self.leaf_denials.iter()
    }

    /// What agents are told. Two denials of one identity become one.
    pub fn svid_denials(&self) -> SvidDenials {
        let mut ids: BTreeMap<&SpiffeId, IdDenial> = BTreeMap::new();
        for ((_, id), denial) in self.id_denials.iter() {
            let both = |known: &IdDenial| IdDenial { barred: known.barred || denial.barred, ..known.then(*denial) };
            let row = ids.get(id).map_or(*denial, both);
            ids.insert(id, row);
        }
        let ids = ids.into_iter().map(|(id, denial)| (id.clone(), denial)).collect();
        SvidDenials { ids, leaves: self.leaf_denials.iter().map(|(key, _)| key.clone()).collect() }
    }

    /// What the CRL of an authority of this cell says now.
    pub fn revoked_leaves(&self, authority: &str) -> Committed<RevokedLeaves> {
        let mut leaves: BTreeMap<Vec<u8>, Stamp> = self
            .issued()
            .filter(|leaf| leaf.authority == authority)
            .filter_map(|leaf| Some((leaf.serial.to_vec(), self.issuance_denied(leaf)?)))
            .collect();
        // Only this cell says which of its own leaves are refused.
        let own = self.cell().map(|cell| cell.trust_domain.clone());
        let first = own.clone().map(|own| (own, authority.to_owned(), Vec::new()));
        let rows = first.into_iter().flat_map(|first| self.leaf_denials.from(first));
        for ((_, _, serial), denial) in rows.take_while(|((td, of, _), _)| Some(td) == own.as_ref() && of == authority)
        {
            leaves.entry(serial.clone()).or_insert(denial.since);
        }
        let leaves = leaves.into_iter().take(CRL_LEAVES_MAX).collect();
        let revision = self.cell().map(|cell| cell.revision).unwrap_or_default();
        Committed::new(RevokedLeaves { authority: authority.to_owned(), revision, stamp: self.stamp(), leaves })
    }

    /// Since when a leaf on record is refused: by its node, its identity, or itself.
    fn issuance_denied(&self, leaf: &Issuance) -> Option<Stamp> {
        let out = |node, generation| self.denied(node).is_some_and(|denied| generation <= denied);
        match &leaf.binding {
            // When a node was put out its history says; for a CRL it is enough that it is.
            Some((node, generation)) if out(node, *generation) => Some(leaf.lifetime.not_before),
            _ => self.svid_denied_since(&leaf.spiffe_id, &leaf.authority, &leaf.serial),
        }
    }
}
