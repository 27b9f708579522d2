//! The state: typed tables, and how an entry is taken in.

use crate::apply::{self, At};
use crate::audit::{AuditEntry, AuditRow, CosignedRow, WitnessedRow};
use crate::authorities::{AuthorityRow, DownstreamRow, PeerRoots, RootId, RootRow};
use crate::command::{LogEntry, Reply};
use crate::committed::{
    Committed, DownstreamAuthority, Issuance, JwtIssuance, PreparedRoot, ReplicaAdmission, ReplicaAuthority,
    SealedReport, StandbyAuthority,
};
use crate::external::{ExternalRequest, ExternalRow};
use crate::grant::{ApproverKeys, GrantRow, LateRecord, StandbyRow};
use crate::objects::*;
use crate::routing::{SteerKey, TraitsKey};
use crate::sealing::{AttestedReplica, SealingRow};
use crate::table::{Journal, Packed, Table, TableWrite};
use ambit_model::policy::NodeAddress;
use ambit_model::record::Record;
use ambit_model::routing::{ClusterTraits, Steer, Versioned};
use ambit_model::{
    Address, ClusterId, Code, EntryId, Generation, IdDenial, LeafDenial, NodeId, ObjectName, RaftIndex, Refusal,
    SpiffeId, Stamp, TrustDomain,
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::Ipv4Addr;

/// An object's key: whose it is and its name.
pub type OwnedName = (TrustDomain, ObjectName);

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Clock {
    pub(crate) stamp: Stamp,
    pub(crate) applied: u64,
    /// Time without a leader so far, milliseconds: deadlines of attestation stand still in it (I22).
    pub(crate) unled_ms: u64,
}

/// Everything a cell has agreed on. Iteration order is key order everywhere.
pub struct State {
    pub(crate) journal: Journal,
    pub(crate) clock: Table<u8, Clock>,
    pub(crate) cell: Table<u8, CellRow>,
    pub(crate) members: Table<u64, Member>,
    pub(crate) admissions: Table<u64, ReplicaAdmission>,
    pub(crate) tokens: Table<[u8; 32], TokenRow>,
    pub(crate) key_set: Table<u8, KeySetRow>,
    pub(crate) ticket_keys: Table<u64, TicketKeyRow>,
    pub(crate) clusters: Table<ClusterId, ClusterRow>,
    pub(crate) allowed_eks: Table<(ClusterId, NodeId), bool>,
    pub(crate) nonces: Table<[u8; 32], Stamp>,
    pub(crate) nodes: Table<NodeId, NodeRow>,
    pub(crate) denials: Table<u64, DenialRow>,
    pub(crate) entries: Table<EntryId, EntryRow>,
    pub(crate) issued: Table<[u8; 16], Issuance>,
    pub(crate) policies: Table<OwnedName, PolicyRow>,
    pub(crate) services: Table<OwnedName, ServiceRow>,
    pub(crate) endpoints: Table<(TrustDomain, Address), EndpointRow>,
    pub(crate) identities: Table<SpiffeId, u32>,
    pub(crate) node_denials: Table<(TrustDomain, NodeId), Generation>,
    pub(crate) foreign_clusters: Table<ClusterId, ForeignCluster>,
    pub(crate) peers: Table<TrustDomain, PeerRow>,
    pub(crate) records: Table<u64, Record>,
    pub(crate) reports: Table<u64, SealedReport>,
    pub(crate) dedupe: Packed<RequestKey, DedupeRow>,
    pub(crate) standings: Table<NodeId, Standing>,
    pub(crate) verdicts: Table<(NodeId, u64), VerdictRow>,
    pub(crate) ek_denials: Table<ObjectName, EkDenyRow>,
    pub(crate) appraisal_policies: Table<ObjectName, AppraisalPolicyRow>,
    /// The PCRs of each node's boot, as of its standing.
    pub(crate) boots: Table<NodeId, BootPcrs>,
    /// Beginnings of incarnations after the first, by epoch.
    pub(crate) incarnations: Table<u64, IncarnationRow>,
    /// By the index that made them.
    pub(crate) jwt_authorities: Table<u64, JwtAuthorityRow>,
    /// Keys of JWT-SVIDs of peers.
    pub(crate) peer_jwt: Table<TrustDomain, JwtKeys>,
    pub(crate) admins: Table<ObjectName, AdminRow>,
    /// Tokens that administrators minted, by index.
    pub(crate) minted_tokens: Table<u64, JwtIssuance>,
    /// SVIDs refused by identity, by who says so.
    pub(crate) id_denials: Table<(TrustDomain, SpiffeId), IdDenial>,
    /// Leaves refused: whose they are, their authority, their serial.
    pub(crate) leaf_denials: Table<(TrustDomain, String, Vec<u8>), LeafDenial>,
    /// Foreign trust domains that are no cells.
    pub(crate) relationships: Table<TrustDomain, RelationshipRow>,
    /// Roots of the own trust domain; none while it has the one that it was founded with.
    pub(crate) roots: Table<RootId, RootRow>,
    /// Intermediates by name; none for one that its replica joined with and never renewed.
    pub(crate) authorities: Table<String, AuthorityRow>,
    /// Roots of peers that changed since they registered.
    pub(crate) peer_roots: Table<TrustDomain, PeerRoots>,
    /// Intermediates whose leaves are refused, each the trust domain's that said so, until when.
    pub(crate) authority_denials: Table<(TrustDomain, String), Stamp>,
    pub(crate) approvers: Table<ObjectName, ApproverRow>,
    /// Acts that took approvers, by index.
    pub(crate) acts: Table<u64, ActRow>,
    /// Identities that administrators of clusters deny, by the cluster whose share of denials they take.
    pub(crate) id_shares: Table<SpiffeId, ClusterId>,
    /// Where tunnels of nodes come from, each the trust domain's that says so.
    pub(crate) node_addresses: Table<(TrustDomain, NodeId), NodeAddress>,
    /// Downstream authorities by name.
    pub(crate) downstreams: Table<String, DownstreamRow>,
    /// Administrators by the identity of their entry.
    pub(crate) id_admins: Table<SpiffeId, AdminRow>,
    /// What replicas' TPMs proved.
    pub(crate) attested_replicas: Table<u64, AttestedReplica>,
    /// What the cell has settled about its replicas and its root; one row.
    pub(crate) sealing: Table<u8, SealingRow>,
    /// The admission of each own node that registered its address last: one registers once.
    pub(crate) registrations: Table<NodeId, Generation>,
    /// Authorities of the cell under external roots: root, and the index that imported it.
    pub(crate) externals: Table<(RootId, u64), ExternalRow>,
    /// The key that waits for its certificate; one row.
    pub(crate) external_requests: Table<u8, ExternalRequest>,
    /// Sets of identities that policies use by name.
    pub(crate) groups: Table<OwnedName, GroupRow>,
    /// Changes of documents of this cell, by index; the oldest go.
    pub(crate) document_changes: Table<u64, DocumentsRow>,
    /// Where workloads may connect to outside of the mesh; of this cell only.
    pub(crate) egress: Table<OwnedName, EgressRow>,
    /// Addresses that the mesh has left, and until when they are not outside of it.
    pub(crate) former: Table<Ipv4Addr, Stamp>,
    /// The audit log's size and right edge; one row.
    pub(crate) audit: Table<u8, AuditRow>,
    /// What this cell cosigned of peers' audit logs, by incarnation.
    pub(crate) witnessed: Table<(TrustDomain, u64), WitnessedRow>,
    /// What peers cosigned of this cell's audit log last.
    pub(crate) cosigned: Table<TrustDomain, CosignedRow>,
    /// Records made and not yet taken ([`State::take_audited`]): an effect, and no state.
    pub(crate) audited: Vec<AuditEntry>,
    /// What the command that is being applied brought about beside its answer.
    pub(crate) noted: Vec<apply::Event>,
    /// What is said of clusters, by who says it.
    pub(crate) traits: Table<TraitsKey, Versioned<ClusterTraits>>,
    /// Which cluster stands in for which, by who says it.
    pub(crate) steers: Table<SteerKey, Versioned<Steer>>,
    /// Whom cells name for the case that they are lost, by home.
    pub(crate) standbys: Table<TrustDomain, StandbyRow>,
    /// Keys of peers' approvers, by home.
    pub(crate) approver_keys: Table<TrustDomain, ApproverKeys>,
    /// Grants of cells' authority: home and epoch.
    pub(crate) grants: Table<(TrustDomain, u64), GrantRow>,
    /// Records of fenced epochs that wait for an operator's word: origin and sequence.
    pub(crate) late: Table<(TrustDomain, u64), LateRecord>,
    /// Intermediates of this cell's standby, by name.
    pub(crate) standby_authorities: Table<String, StandbyAuthority>,
    /// `issued` by node, where it is bound to one, and end, in memory only: neither counting a node's leaves nor a tick
    /// must cost a walk over everybody's.
    pub(crate) leaves: BTreeMap<Option<NodeId>, BTreeSet<(Stamp, [u8; 16])>>,
    /// Entries by the identity that they give, in memory only: whose an identity is must not cost a walk over all entries.
    pub(crate) giving: BTreeMap<SpiffeId, BTreeSet<EntryId>>,
    /// Entries with node selectors by cluster, in memory only: a verdict must not cost a walk over all entries.
    pub(crate) asking: BTreeMap<ClusterId, BTreeSet<EntryId>>,
    /// Entries that end, by when, in memory only: a tick must not cost a walk over all entries.
    pub(crate) expiring: BTreeSet<(Stamp, EntryId)>,
    /// Policies that end, by when, in memory only: no entry of the log must cost a walk over all policies.
    pub(crate) policy_ends: BTreeMap<Stamp, BTreeSet<OwnedName>>,
    /// Egress documents that end, in the same way.
    pub(crate) egress_ends: BTreeMap<Stamp, BTreeSet<OwnedName>>,
    /// Requests remembered, oldest first, in memory only: forgetting those whose time is over must not cost a walk over
    /// all of them, every second.
    pub(crate) dedupe_by_age: VecDeque<(Stamp, RequestKey)>,
}

/// A caller and its request id.
pub(crate) type RequestKey = ([u8; 32], [u8; 16]);

/// Calls a macro with every table of the state, in table-id order.
macro_rules! each_table {
    ($s:expr, $f:ident) => {
        $f!(
            $s.clock,
            $s.cell,
            $s.members,
            $s.admissions,
            $s.tokens,
            $s.key_set,
            $s.ticket_keys,
            $s.clusters,
            $s.allowed_eks,
            $s.nonces,
            $s.nodes,
            $s.denials,
            $s.entries,
            $s.issued,
            $s.policies,
            $s.services,
            $s.endpoints,
            $s.identities,
            $s.node_denials,
            $s.foreign_clusters,
            $s.peers,
            $s.records,
            $s.reports,
            $s.dedupe,
            $s.standings,
            $s.verdicts,
            $s.ek_denials,
            $s.appraisal_policies,
            $s.boots,
            $s.incarnations,
            $s.jwt_authorities,
            $s.peer_jwt,
            $s.admins,
            $s.minted_tokens,
            $s.id_denials,
            $s.leaf_denials,
            $s.relationships,
            $s.roots,
            $s.authorities,
            $s.peer_roots,
            $s.authority_denials,
            $s.approvers,
            $s.acts,
            $s.id_shares,
            $s.node_addresses,
            $s.downstreams,
            $s.id_admins,
            $s.attested_replicas,
            $s.sealing,
            $s.registrations,
            $s.externals,
            $s.external_requests,
            $s.groups,
            $s.document_changes,
            $s.egress,
            $s.former,
            $s.audit,
            $s.witnessed,
            $s.cosigned,
            $s.traits,
            $s.steers,
            $s.standbys,
            $s.approver_keys,
            $s.grants,
            $s.late,
            $s.standby_authorities
        )
    };
}

/// What applying one entry gave.
#[derive(Debug)]
pub struct Applied {
    /// Where.
    pub index: RaftIndex,
    /// Whose request.
    pub client: [u8; 32],
    /// Which request.
    pub request: [u8; 16],
    /// [`LogEntry::command_sha256`]: who asked for something else under the same id is not answered by it.
    pub command: [u8; 32],
    /// What it answered.
    pub outcome: Result<Reply, Refusal>,
}

impl Applied {
    /// The leaves that this entry permits to be signed, each once.
    pub fn into_issuances(self) -> Result<Vec<Result<Committed<Issuance>, Refusal>>, Refusal> {
        match self.outcome? {
            Reply::Leaves(items) => Ok(items.into_iter().map(|i| i.map(Committed::new)).collect()),
            Reply::Admitted(_, one) => Ok(vec![Ok(Committed::new(*one))]),
            _ => Err(Refusal::new(Code::Internal, "an issuance", "another outcome")),
        }
    }
    /// The replica whose intermediate may be signed.
    pub fn into_replica(self) -> Result<Committed<ReplicaAdmission>, Refusal> {
        match self.outcome? {
            Reply::Replica(one) => Ok(Committed::new(*one)),
            _ => Err(Refusal::new(Code::Internal, "a replica's admission", "another outcome")),
        }
    }
    /// The token that may be signed.
    pub fn into_token(self) -> Result<Committed<JwtIssuance>, Refusal> {
        match self.outcome? {
            Reply::Token(one) => Ok(Committed::new(*one)),
            _ => Err(Refusal::new(Code::Internal, "a token", "another outcome")),
        }
    }
    /// The replica whose next intermediate may be signed.
    pub fn into_authority(self) -> Result<Committed<ReplicaAuthority>, Refusal> {
        match self.outcome? {
            Reply::Authority(one) => Ok(Committed::new(*one)),
            _ => Err(Refusal::new(Code::Internal, "a replica's intermediate", "another outcome")),
        }
    }
    /// The downstream authority that may be signed.
    pub fn into_downstream(self) -> Result<Committed<DownstreamAuthority>, Refusal> {
        match self.outcome? {
            Reply::Downstream(one) => Ok(Committed::new(*one)),
            _ => Err(Refusal::new(Code::Internal, "a downstream authority", "another outcome")),
        }
    }
    /// The standby's intermediate that may be signed.
    pub fn into_standby(self) -> Result<Committed<StandbyAuthority>, Refusal> {
        match self.outcome? {
            Reply::Standby(one) => Ok(Committed::new(*one)),
            _ => Err(Refusal::new(Code::Internal, "a standby's intermediate", "another outcome")),
        }
    }
    /// The root that may be certified by the one before it.
    pub fn into_root(self) -> Result<Committed<PreparedRoot>, Refusal> {
        match self.outcome? {
            Reply::Root(one) => Ok(Committed::new(*one)),
            _ => Err(Refusal::new(Code::Internal, "a prepared root", "another outcome")),
        }
    }
    /// The report that may be signed.
    pub fn into_report(self) -> Result<Committed<SealedReport>, Refusal> {
        match self.outcome? {
            Reply::Report(one) => Ok(Committed::new(*one)),
            _ => Err(Refusal::new(Code::Internal, "a sealed report", "another outcome")),
        }
    }
}

impl Default for State {
    fn default() -> Self {
        Self::new()
    }
}

impl State {
    /// The state before the first entry.
    pub fn new() -> Self {
        let mut next = 0u8;
        let mut id = || {
            next += 1;
            next
        };
        Self {
            journal: Journal::default(),
            clock: Table::new(id()),
            cell: Table::new(id()),
            members: Table::new(id()),
            admissions: Table::new(id()),
            tokens: Table::new(id()),
            key_set: Table::new(id()),
            ticket_keys: Table::new(id()),
            clusters: Table::new(id()),
            allowed_eks: Table::new(id()),
            nonces: Table::new(id()),
            nodes: Table::new(id()),
            denials: Table::new(id()),
            entries: Table::new(id()),
            issued: Table::new(id()),
            policies: Table::new(id()),
            services: Table::new(id()),
            endpoints: Table::new(id()),
            identities: Table::new(id()),
            node_denials: Table::new(id()),
            foreign_clusters: Table::new(id()),
            peers: Table::new(id()),
            records: Table::new(id()),
            reports: Table::new(id()),
            dedupe: Packed::new(id()),
            standings: Table::new(id()),
            verdicts: Table::new(id()),
            ek_denials: Table::new(id()),
            appraisal_policies: Table::new(id()),
            boots: Table::new(id()),
            incarnations: Table::new(id()),
            jwt_authorities: Table::new(id()),
            peer_jwt: Table::new(id()),
            admins: Table::new(id()),
            minted_tokens: Table::new(id()),
            id_denials: Table::new(id()),
            leaf_denials: Table::new(id()),
            relationships: Table::new(id()),
            roots: Table::new(id()),
            authorities: Table::new(id()),
            peer_roots: Table::new(id()),
            authority_denials: Table::new(id()),
            approvers: Table::new(id()),
            acts: Table::new(id()),
            id_shares: Table::new(id()),
            node_addresses: Table::new(id()),
            downstreams: Table::new(id()),
            id_admins: Table::new(id()),
            attested_replicas: Table::new(id()),
            sealing: Table::new(id()),
            registrations: Table::new(id()),
            externals: Table::new(id()),
            external_requests: Table::new(id()),
            groups: Table::new(id()),
            document_changes: Table::new(id()),
            egress: Table::new(id()),
            former: Table::new(id()),
            audit: Table::new(id()),
            witnessed: Table::new(id()),
            cosigned: Table::new(id()),
            audited: Vec::new(),
            noted: Vec::new(),
            traits: Table::new(id()),
            steers: Table::new(id()),
            standbys: Table::new(id()),
            approver_keys: Table::new(id()),
            grants: Table::new(id()),
            late: Table::new(id()),
            standby_authorities: Table::new(id()),
            leaves: BTreeMap::new(),
            giving: BTreeMap::new(),
            asking: BTreeMap::new(),
            expiring: BTreeSet::new(),
            policy_ends: BTreeMap::new(),
            egress_ends: BTreeMap::new(),
            dedupe_by_age: VecDeque::new(),
        }
    }

    /// Takes in one committed entry. Never fails: a refused command is an outcome, the same on every replica.
    pub fn apply(&mut self, index: RaftIndex, entry: &LogEntry) -> Applied {
        let before = self.stamp();
        let stamp = self.advance(index, entry.stamp);
        if self.policy_ends_in(before, stamp) {
            apply::touch(self, At { index, stamp });
        }
        let command = entry.command_sha256();
        let outcome = self.once(index, stamp, entry, command);
        Applied { index, client: entry.client, request: entry.request, command, outcome }
    }

    /// Moves the clock to `index` and, where it is later, to `stamp`; the time that holds there.
    pub(crate) fn advance(&mut self, index: RaftIndex, stamp: Stamp) -> Stamp {
        let clock = self.clock_row();
        // Stamps never go backwards, whatever a leader wrote (I15).
        let stamp = stamp.max(clock.stamp);
        let step = stamp.0.saturating_sub(clock.stamp.0);
        // A leader writes at least a tick a second: a longer step is time in which nobody led and no verdict could be.
        #[cfg(ambit_mutant)]
        let step = if crate::mutant::is("outage-counts") { 0 } else { step };
        let unled = if clock.stamp != Stamp(0) && step > crate::UNLED_STEP_MS { step } else { 0 };
        let unled_ms = clock.unled_ms.saturating_add(unled);
        self.clock.put(&mut self.journal, 0, Clock { stamp, applied: index.0, unled_ms });
        stamp
    }

    /// Exactly once per (client, request): a repeated request is answered from memory (I10).
    fn once(
        &mut self,
        index: RaftIndex,
        stamp: Stamp,
        entry: &LogEntry,
        command_sha256: [u8; 32],
    ) -> Result<Reply, Refusal> {
        if entry.request == [0u8; 16] {
            return apply::apply(self, index, stamp, entry);
        }
        let key = (entry.client, entry.request);
        #[cfg(ambit_mutant)]
        if crate::mutant::is("no-dedupe") {
            return apply::apply(self, index, stamp, entry);
        }
        #[cfg(ambit_mutant)]
        if crate::mutant::is("dedupe-of-leaves-only") && !matches!(entry.command, crate::command::Command::Issue { .. })
        {
            return apply::apply(self, index, stamp, entry);
        }
        if let Some(row) = self.dedupe.get(&key) {
            if row.command_sha256 == command_sha256 {
                let reply = row.outcome?;
                return apply::answer_again(self, At { index, stamp }, &entry.command, reply);
            }
            return Err(Refusal::new(Code::RequestIdReused, "the same command under the same request id", "another"));
        }
        let outcome = apply::apply(self, index, stamp, entry);
        let row = DedupeRow { stamp, command_sha256, outcome: outcome.clone() };
        self.dedupe.put(&mut self.journal, key, &row);
        self.dedupe_by_age.push_back((stamp, key));
        outcome
    }

    /// Notes that `index` was taken in without a command (an empty Raft entry).
    pub fn skip(&mut self, index: RaftIndex) {
        let clock = self.clock_row();
        self.clock.put(&mut self.journal, 0, Clock { applied: index.0, ..clock });
    }

    pub(crate) fn clock_row(&self) -> Clock {
        self.clock.get(&0).copied().unwrap_or_default()
    }
    /// The last entry taken in.
    pub fn applied(&self) -> RaftIndex {
        RaftIndex(self.clock_row().applied)
    }
    /// The time of the last entry taken in.
    pub fn stamp(&self) -> Stamp {
        self.clock_row().stamp
    }
    /// Changes since the last call, for the table store.
    pub fn take_writes(&mut self) -> Vec<TableWrite> {
        self.journal.take()
    }
    /// SHA-256 over all rows; equal on every replica at the same index.
    pub fn digest(&self) -> [u8; 32] {
        self.journal.digest()
    }
    /// The whole state, table by table in key order, row by row: encoded at once it would take as much memory again.
    pub fn rows(&self) -> impl Iterator<Item = TableWrite> {
        macro_rules! chain {
            ($($t:expr),*) => {{
                let tables: Vec<Box<dyn Iterator<Item = TableWrite> + '_>> = vec![$( Box::new($t.export()) ),*];
                tables.into_iter().flatten()
            }};
        }
        each_table!(self, chain)
    }
    /// How many [`State::rows`] there are.
    pub fn row_count(&self) -> usize {
        macro_rules! sum {
            ($($t:expr),*) => {{ [$( $t.len() ),*].into_iter().sum() }};
        }
        each_table!(self, sum)
    }
    /// [`State::rows`], all of them.
    pub fn export(&self) -> Vec<TableWrite> {
        self.rows().collect()
    }
    /// The state with these rows. A row that is not readable refuses the whole.
    pub fn import(rows: Vec<TableWrite>) -> Result<State, Refusal> {
        let mut state = State::new();
        for row in rows {
            let Some(value) = row.value else { continue };
            let mut n = 0u8;
            let mut found = false;
            macro_rules! load {
                ($($t:expr),*) => {{ $(
                    n += 1;
                    if row.table == n { $t.load(&mut state.journal, &row.key, &value)?; found = true; }
                )* }};
            }
            each_table!(state, load);
            if !found {
                return Err(Refusal::new(Code::Internal, format!("a table of 1-{n}"), row.table.to_string()));
            }
        }
        #[cfg(ambit_mutant)]
        if crate::mutant::is("restore-forgets-denials") {
            state.node_denials.prune(&mut state.journal, |_, _| true);
            let banned = |row: &NodeRow| row.state != NodeState::Admitted;
            let out: Vec<_> =
                state.nodes().filter(|(_, row)| banned(row)).map(|(id, row)| (*id, row.clone())).collect();
            for (id, row) in out {
                state.nodes.put(&mut state.journal, id, NodeRow { state: NodeState::Admitted, ..row });
            }
        }
        state.journal.take();
        for issuance in state.issued.iter().map(|(_, i)| i) {
            let (node, leaf) = crate::apply::issue::indexed(issuance);
            state.leaves.entry(node).or_default().insert(leaf);
        }
        let entries: Vec<_> = state.entries().map(|row| row.entry.clone()).collect();
        for entry in entries {
            state.index_entry(&entry, true);
        }
        let ends: Vec<_> = state.policies().map(|(name, row)| (row.object.extras.expires_at, name.clone())).collect();
        ends.into_iter().for_each(|(end, name)| state.index_policy_end(&name, end, true));
        let ends: Vec<_> = state.egress().map(|(name, row)| (row.object.expires_at, name.clone())).collect();
        ends.into_iter().for_each(|(end, name)| state.index_egress_end(&name, end, true));
        let mut by_age: Vec<_> = state.dedupe.iter().map(|(key, row)| (row.stamp, *key)).collect();
        by_age.sort_unstable();
        state.dedupe_by_age = by_age.into();
        Ok(state)
    }
}
