//! What is asked of the state, table by table.

use crate::committed::{Issuance, JwtIssuance, SealedReport};
use crate::objects::*;
use crate::state::{OwnedName, State};
use ambit_model::policy::NodeAddress;
use ambit_model::record::Record;
use ambit_model::{ClusterId, EntryId, Generation, NodeId, ObjectName, SpiffeId, TrustDomain};
use std::collections::BTreeSet;
use std::ops::Bound;

impl State {
    /// The cell, once founded.
    pub fn cell(&self) -> Option<&CellRow> {
        self.cell.get(&0)
    }
    /// All replicas.
    pub fn members(&self) -> impl Iterator<Item = (u64, &Member)> {
        self.members.iter().map(|(k, v)| (*k, v))
    }
    /// One replica.
    pub fn member(&self, id: u64) -> Option<&Member> {
        self.members.get(&id)
    }
    /// Beginnings of incarnations after the first, by epoch.
    pub fn incarnations(&self) -> impl DoubleEndedIterator<Item = (u64, &IncarnationRow)> {
        self.incarnations.iter().map(|(epoch, row)| (*epoch, row))
    }
    /// Who approves, by name.
    pub fn approvers(&self) -> impl Iterator<Item = (&ObjectName, &ApproverRow)> {
        self.approvers.iter()
    }
    /// Acts that took approvers, by index.
    pub fn acts(&self) -> impl DoubleEndedIterator<Item = (u64, &ActRow)> {
        self.acts.iter().map(|(index, row)| (*index, row))
    }
    /// The root-certified record keys.
    pub fn key_set(&self) -> Option<&KeySetRow> {
        self.key_set.get(&0)
    }
    /// Ticket keys by number; the highest seals, the others open until their tickets end.
    pub fn ticket_keys(&self) -> impl DoubleEndedIterator<Item = (u64, &TicketKeyRow)> {
        self.ticket_keys.iter().map(|(k, v)| (*k, v))
    }
    /// A token by its SHA-256.
    pub fn token(&self, sha256: &[u8; 32]) -> Option<&TokenRow> {
        self.tokens.get(sha256)
    }
    /// Clusters served by this cell.
    pub fn clusters(&self) -> impl Iterator<Item = (&ClusterId, &ClusterRow)> {
        self.clusters.iter()
    }
    /// One cluster.
    pub fn cluster(&self, id: &ClusterId) -> Option<&ClusterRow> {
        self.clusters.get(id)
    }
    /// Clusters of peers.
    pub fn foreign_clusters(&self) -> impl Iterator<Item = (&ClusterId, &ForeignCluster)> {
        self.foreign_clusters.iter()
    }
    /// Whether the EK is on the cluster's allow-list.
    pub fn ek_allowed(&self, cluster: &ClusterId, node: &NodeId) -> bool {
        self.allowed_eks.contains(&(cluster.clone(), *node))
    }
    /// All nodes.
    pub fn nodes(&self) -> impl Iterator<Item = (&NodeId, &NodeRow)> {
        self.nodes.iter()
    }
    /// One node.
    pub fn node(&self, id: &NodeId) -> Option<&NodeRow> {
        self.nodes.get(id)
    }
    /// A node's standing, if it was ever admitted.
    pub fn standing(&self, id: &NodeId) -> Option<&Standing> {
        self.standings.get(id)
    }
    /// Milliseconds in which this cell had a leader: what deadlines of attestation run on.
    pub fn led_ms(&self) -> u64 {
        let clock = self.clock_row();
        clock.stamp.0.saturating_sub(clock.unled_ms)
    }
    /// Whether no verdict came for three intervals, or none since this incarnation of the cell began: then nothing new is
    /// issued to the node.
    pub fn is_late(&self, id: &NodeId) -> bool {
        if !self.attested_since_began(id) {
            return true;
        }
        let interval = self.node(id).and_then(|n| self.cluster(&n.cluster)).map_or(0, |c| c.attest_interval_ms);
        let age = |s: &Standing| self.led_ms().saturating_sub(s.led_ms);
        self.standing(id).is_none_or(|s| age(s) > interval.saturating_mul(crate::LATE_INTERVALS))
    }
    /// Stretches of verdicts on a node, oldest first.
    pub fn verdicts(&self, id: &NodeId) -> impl Iterator<Item = &VerdictRow> {
        let of = *id;
        self.verdicts.from((of, 0)).take_while(move |((node, _), _)| *node == of).map(|(_, row)| row)
    }
    /// Leaves of these nodes up to the generation are refused; a node is the trust domain's that denied it.
    pub fn node_denials(&self) -> impl Iterator<Item = (&(TrustDomain, NodeId), &Generation)> {
        self.node_denials.iter()
    }
    /// Where tunnels of nodes come from; a node is the trust domain's that says so.
    pub fn node_addresses(&self) -> impl Iterator<Item = (&(TrustDomain, NodeId), &NodeAddress)> {
        self.node_addresses.iter()
    }
    /// The same of a node of this cell, once it registered one.
    pub fn node_address(&self, id: &NodeId) -> Option<&NodeAddress> {
        self.node_addresses.get(&(self.cell()?.trust_domain.clone(), *id))
    }
    /// Rules of the EK deny-list.
    pub fn ek_denials(&self) -> impl Iterator<Item = (&ObjectName, &EkDenyRow)> {
        self.ek_denials.iter()
    }
    /// EKs on a cluster's allow-list.
    pub fn allowed_eks(&self, cluster: &ClusterId) -> impl Iterator<Item = &NodeId> {
        let of = cluster.clone();
        let from = self.allowed_eks.from((of.clone(), NodeId([0; 32])));
        from.take_while(move |((c, _), _)| *c == of).map(|((_, node), _)| node)
    }
    /// Appraisal policies by name.
    pub fn appraisal_policies(&self) -> impl Iterator<Item = (&ObjectName, &AppraisalPolicyRow)> {
        self.appraisal_policies.iter()
    }
    /// Refused enrolments and rounds, oldest first.
    pub fn denials(&self) -> impl DoubleEndedIterator<Item = (&u64, &DenialRow)> {
        self.denials.iter()
    }
    /// All entries.
    pub fn entries(&self) -> impl Iterator<Item = &EntryRow> {
        self.entries.iter().map(|(_, v)| v)
    }
    /// Entries after this id, or from the first.
    pub fn entries_after(&self, after: Option<&EntryId>) -> impl Iterator<Item = &EntryRow> {
        let begin = after.map_or(Bound::Unbounded, |id| Bound::Excluded(id.clone()));
        self.entries.range((begin, Bound::Unbounded)).map(|(_, v)| v)
    }
    /// One entry.
    pub fn entry(&self, id: &EntryId) -> Option<&EntryRow> {
        self.entries.get(id)
    }
    /// Entries that give an identity.
    pub fn entries_giving(&self, id: &SpiffeId) -> impl Iterator<Item = &EntryRow> {
        self.entries_of(id)
    }
    /// The kernel's number of an identity, once it has one.
    pub fn number_of(&self, id: &SpiffeId) -> Option<u32> {
        self.identities.get(id).copied()
    }
    /// Records of leaves that may still be valid.
    pub fn issued(&self) -> impl DoubleEndedIterator<Item = &Issuance> {
        self.issued.iter().map(|(_, v)| v)
    }
    /// Tokens that administrators minted, oldest first.
    pub fn minted_tokens(&self) -> impl DoubleEndedIterator<Item = &JwtIssuance> {
        self.minted_tokens.iter().map(|(_, token)| token)
    }
    /// Policies of this cell and its peers.
    pub fn policies(&self) -> impl Iterator<Item = (&OwnedName, &PolicyRow)> {
        self.policies.iter()
    }
    /// Services of this cell and its peers.
    pub fn services(&self) -> impl Iterator<Item = (&OwnedName, &ServiceRow)> {
        self.services.iter()
    }
    /// One policy.
    pub fn policy(&self, name: &OwnedName) -> Option<&PolicyRow> {
        self.policies.get(name)
    }
    /// One service.
    pub fn service(&self, name: &OwnedName) -> Option<&ServiceRow> {
        self.services.get(name)
    }
    /// Endpoints of this cell and its peers.
    pub fn endpoints(&self) -> impl Iterator<Item = (&TrustDomain, &EndpointRow)> {
        self.endpoints.iter().map(|((td, _), v)| (td, v))
    }
    /// Peers.
    pub fn peers(&self) -> impl Iterator<Item = (&TrustDomain, &PeerRow)> {
        self.peers.iter()
    }
    /// One peer.
    pub fn peer(&self, td: &TrustDomain) -> Option<&PeerRow> {
        self.peers.get(td)
    }
    /// Exported records after `seq`.
    pub fn records_after(&self, seq: u64) -> impl Iterator<Item = &Record> {
        self.records.from(seq.saturating_add(1)).map(|(_, r)| r)
    }
    /// Sealed drill reports.
    pub fn reports(&self) -> impl Iterator<Item = &SealedReport> {
        self.reports.iter().map(|(_, v)| v)
    }
    /// Trust domains that this cell can verify: its own and those of peers that it believes.
    pub fn known_domains(&self) -> BTreeSet<TrustDomain> {
        let own = self.cell().map(|c| c.trust_domain.clone());
        let peers = self.peers().filter(|(_, p)| p.state.is_believed()).map(|(td, _)| td.clone());
        own.into_iter().chain(peers).collect()
    }
}
