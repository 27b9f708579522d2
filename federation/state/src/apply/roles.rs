//! Administrators: their roles, their certificates, and what those of one cluster may touch.

use super::{At, cell_row, issue};
use crate::command::{Command, DocumentKind, DocumentsChange, Nodes, Reply, RoleChange};
use crate::committed::Subject;
use crate::objects::{AdminRow, TokenScope};
use crate::routing::Route;
use crate::state::State;
use ambit_model::policy::{Action, Egress, Labels, Peers, Policy, Service};
use ambit_model::{AdminRole, ClusterId, Code, Entry, EntryId, NodeId, ObjectName, Refusal, SpiffeId, TrustDomain};
use std::collections::BTreeSet;

/// Rows of administrators; people, and programs that act for them.
const ADMINS_MAX: usize = 1_000;
/// Roles of one.
const ROLES_MAX: usize = 64;

pub(super) fn change(
    s: &mut State,
    at: At,
    admin: &ObjectName,
    change: &RoleChange,
    by: &str,
) -> Result<Reply, Refusal> {
    let roles = changed(s, s.admin_roles(admin.as_str()), change)?;
    if roles.len() > ROLES_MAX || (s.admins.len() >= ADMINS_MAX && !s.admins.contains(admin)) {
        let expected = format!("at most {ADMINS_MAX} administrators of {ROLES_MAX} roles");
        return Err(Refusal::new(Code::Busy, expected, "more"));
    }
    let falls = !roles.contains(&AdminRole::FederationAdmin);
    if falls && s.is_last_federation_admin(admin.as_str()) {
        let expected = "another federation-admin (ambit admin grant) before the last one goes";
        return Err(Refusal::new(Code::LastAdmin, expected, admin.as_str()));
    }
    let row = AdminRow { roles, changed_by: by.to_owned(), changed: at.stamp };
    s.admins.put(&mut s.journal, admin.clone(), row);
    Ok(Reply::Done)
}

/// The same for whoever shows an SVID of this identity. None of them is ever the last federation-admin: the entry, its node
/// or the identity may go at any time.
pub(super) fn change_of_id(
    s: &mut State,
    at: At,
    id: &SpiffeId,
    change: &RoleChange,
    by: &str,
) -> Result<Reply, Refusal> {
    let own = cell_row(s)?.trust_domain;
    if id.trust_domain() != own || id.path().starts_with("/ambit/") {
        return Err(Refusal::new(Code::NotOwner, format!("an identity of {own} outside /ambit/"), id.as_str()));
    }
    let roles = changed(s, s.id_admins.get(id).map(|row| row.roles.clone()).unwrap_or_default(), change)?;
    if roles.len() > ROLES_MAX || (s.id_admins.len() >= ADMINS_MAX && !s.id_admins.contains(id)) {
        let expected = format!("at most {ADMINS_MAX} administrators of {ROLES_MAX} roles");
        return Err(Refusal::new(Code::Busy, expected, "more"));
    }
    if roles.is_empty() {
        s.id_admins.remove(&mut s.journal, id);
    } else {
        s.id_admins.put(&mut s.journal, id.clone(), AdminRow { roles, changed_by: by.to_owned(), changed: at.stamp });
    }
    Ok(Reply::Done)
}

fn changed(s: &State, mut roles: BTreeSet<AdminRole>, change: &RoleChange) -> Result<BTreeSet<AdminRole>, Refusal> {
    match change {
        RoleChange::Grant(more) => {
            for role in more {
                if let AdminRole::ClusterAdmin(cluster) = role
                    && !s.clusters.contains(cluster)
                {
                    return Err(Refusal::new(Code::NotFound, "a cluster of this cell", cluster.as_str()));
                }
            }
            roles.extend(more.iter().cloned());
        }
        RoleChange::Revoke(less) => roles.retain(|role| !less.contains(role)),
        RoleChange::RevokeAll => roles.clear(),
    }
    Ok(roles)
}

pub(super) fn certify(
    s: &mut State,
    at: At,
    admin: &ObjectName,
    key_hash: [u8; 32],
    authority: &str,
) -> Result<Reply, Refusal> {
    certifiable(s, admin)?;
    issue::admin(s, at, admin.as_str(), key_hash, authority, Subject::Admin)
}

/// Whether this administrator may have a certificate at all.
pub(super) fn certifiable(s: &State, admin: &ObjectName) -> Result<(), Refusal> {
    if s.admin_roles(admin.as_str()).is_empty() {
        return Err(Refusal::new(
            Code::PermissionDenied,
            "an administrator with a role (ambit admin grant)",
            admin.as_str(),
        ));
    }
    let id = cell_row(s)?.trust_domain.member(&format!("/ambit/admin/{admin}"))?;
    if s.barred(&id) {
        return Err(Refusal::new(Code::SvidRevoked, "an identity that is not denied", id.as_str()));
    }
    Ok(())
}

/// Applies what an administrator of these clusters asks, on the very state that it is judged by.
pub(super) fn within(
    s: &mut State,
    at: At,
    clusters: &BTreeSet<ClusterId>,
    command: &Command,
) -> Result<Reply, Refusal> {
    check(s, &Scope { own: &cell_row(s)?.trust_domain, clusters }, command)?;
    let shares = super::deny::room_within(s, command)?;
    let reply = super::within(s, at, command)?;
    super::deny::charge(s, shares);
    Ok(reply)
}

/// The clusters that somebody administers.
struct Scope<'a> {
    own: &'a TrustDomain,
    clusters: &'a BTreeSet<ClusterId>,
}

impl Scope<'_> {
    fn refuse(&self, found: impl Into<String>) -> Refusal {
        let names: Vec<&str> = self.clusters.iter().map(ClusterId::as_str).collect();
        Refusal::new(Code::PermissionDenied, format!("what is of the clusters {} only", names.join(", ")), found)
    }
    fn cluster(&self, cluster: &ClusterId) -> Result<(), Refusal> {
        if self.clusters.contains(cluster) { Ok(()) } else { Err(self.refuse(format!("cluster {cluster}"))) }
    }
    /// A node that nobody knows is left to the command, which refuses it.
    fn node(&self, s: &State, id: &NodeId) -> Result<(), Refusal> {
        s.node(id).map_or(Ok(()), |node| self.cluster(&node.cluster))
    }
    /// What the entry is to be, and what it is now.
    fn entry(&self, s: &State, entry: &Entry) -> Result<(), Refusal> {
        self.cluster(&entry.cluster)?;
        let before = s.entry(&entry.id).map(|row| &row.entry);
        if let Some(before) = before {
            self.cluster(&before.cluster)?;
        }
        // Who writes such an entry decides who administers the cell, or issues for all of the trust domain.
        if std::iter::once(entry).chain(before).any(|entry| entry.extras.is_privileged()) {
            return Err(self.refuse(format!("entry {}, which is marked admin or downstream", entry.id)));
        }
        // Policies of the whole cell may go by them: who sets one takes what they give, and who sheds one is free of what they
        // deny. So they stay on the identity that they were given to, for as long as they were given.
        let none = Labels::new();
        if entry.extras.labels != *before.map_or(&none, |before| &before.extras.labels) {
            return Err(self.refuse(format!("labels of entry {}", entry.id)));
        }
        let sheds = |before: &&Entry| {
            let held = (&before.spiffe_id, before.extras.expires_at) == (&entry.spiffe_id, entry.extras.expires_at);
            !before.extras.labels.is_empty() && !held
        };
        if before.is_some_and(|before| sheds(&before)) {
            return Err(self.refuse(format!("identity and end of entry {}, which has labels", entry.id)));
        }
        self.identity(s, &entry.spiffe_id)
    }
    /// An entry that nobody knows is left to the command, which refuses it.
    fn gone(&self, s: &State, id: &EntryId) -> Result<(), Refusal> {
        let Some(entry) = s.entry(id).map(|row| &row.entry) else { return Ok(()) };
        self.cluster(&entry.cluster)?;
        if entry.extras.labels.is_empty() { Ok(()) } else { Err(self.refuse(format!("entry {id}, which has labels"))) }
    }
    /// Below `/cluster/NAME/` an identity of this trust domain is that cluster's. Any other is whose entries hold it: nobody
    /// takes on an identity that another cluster's workload has.
    fn identity(&self, s: &State, id: &SpiffeId) -> Result<(), Refusal> {
        if id.trust_domain() != *self.own {
            return Err(self.refuse(id.as_str()));
        }
        if let Some(rest) = id.path().strip_prefix("/cluster/") {
            let name = rest.split('/').next().unwrap_or_default();
            return if self.clusters.iter().any(|c| c.as_str() == name) {
                Ok(())
            } else {
                Err(self.refuse(id.as_str()))
            };
        }
        let foreign = s.entries_of(id).find(|row| !self.clusters.contains(&row.entry.cluster));
        foreign.map_or(Ok(()), |row| Err(self.refuse(format!("{id}, which is of cluster {}", row.entry.cluster))))
    }
    /// A set of identities is ours if each that can ever be in it is: one with an entry of ours, or those below
    /// `/cluster/NAME/`.
    fn peers(&self, s: &State, peers: &Peers) -> Result<(), Refusal> {
        match peers {
            Peers::Id(id) => {
                self.identity(s, id)?;
                let named = id.path().starts_with("/cluster/");
                let held = named || s.entries_of(id).next().is_some();
                if held { Ok(()) } else { Err(self.refuse(format!("{id}, which no entry holds"))) }
            }
            Peers::Below(td, path) => {
                let below = |c: &ClusterId| td == self.own && path.starts_with(&format!("/cluster/{c}/"));
                if self.clusters.iter().any(below) { Ok(()) } else { Err(self.refuse(peers.to_string())) }
            }
            Peers::Cluster(td, cluster) if td == self.own => self.cluster(cluster),
            Peers::Domain(_) | Peers::Cluster(..) | Peers::Group(..) | Peers::Labelled(..) | Peers::Ids(..) => {
                Err(self.refuse(peers.to_string()))
            }
        }
    }
    fn policy(&self, s: &State, policy: &Policy) -> Result<(), Refusal> {
        self.peers(s, &policy.target)?;
        match &policy.target {
            Peers::Cluster(_, cluster) if policy.action != Action::Allow => self.whole(s, cluster),
            _ => Ok(()),
        }
    }
    /// What narrows calls to a cluster narrows them to whoever is in it, wherever else that identity runs: that is ours only
    /// where none of them is of another cluster too.
    fn whole(&self, s: &State, cluster: &ClusterId) -> Result<(), Refusal> {
        let inside = s.entries().map(|row| &row.entry).filter(|entry| entry.cluster == *cluster);
        let ids: BTreeSet<&SpiffeId> = inside.map(|entry| &entry.spiffe_id).collect();
        ids.into_iter().try_for_each(|id| self.identity(s, id))
    }
    /// Who opens the way out opens it to callers of ours only.
    fn egress(&self, s: &State, egress: &Egress) -> Result<(), Refusal> {
        egress.from.iter().try_for_each(|set| self.peers(s, set))
    }
    fn service(&self, s: &State, service: &Service) -> Result<(), Refusal> {
        service.backends.iter().try_for_each(|backend| self.peers(s, backend))
    }
}

/// Whether everything that the command would touch is of the scope. What is not named here is not theirs to ask.
fn check(s: &State, scope: &Scope<'_>, command: &Command) -> Result<(), Refusal> {
    match command {
        Command::CreateEntries(entries) => entries.iter().try_for_each(|e| scope.entry(s, e)),
        Command::PutEntries(entries) | Command::ReplaceEntries(entries) => {
            entries.iter().try_for_each(|(e, _)| scope.entry(s, e))
        }
        Command::DenyId(id, _) => scope.peers(s, &Peers::Id(id.clone())),
        Command::DeleteEntries(ids) | Command::RetireEntries(ids) => ids.iter().try_for_each(|id| scope.gone(s, id)),
        Command::RemoveEntries(items) => items.iter().try_for_each(|(id, _)| scope.gone(s, id)),
        Command::SetNodes(_, Nodes::Ids(ids)) => ids.iter().try_for_each(|id| scope.node(s, id)),
        Command::SetNodes(_, Nodes::Cluster(cluster)) => scope.cluster(cluster),
        Command::Route(change) => match &change.route {
            Route::Region(cluster, _) | Route::Drain(cluster, _) => scope.cluster(cluster),
            Route::FailOver { .. } | Route::FailBack { .. } => Err(scope.refuse("calls of the whole cell")),
        },
        Command::CreateToken(_, row) => match &row.scope {
            TokenScope::Node(cluster) => scope.cluster(cluster),
            TokenScope::Replica(..) | TokenScope::Peer(..) => Err(scope.refuse("a token of the cell")),
        },
        Command::AllowEk(cluster, nodes) | Command::DisallowEk(cluster, nodes) => {
            scope.cluster(cluster)?;
            nodes.iter().try_for_each(|id| scope.node(s, id))
        }
        Command::ApplyDocuments { policies, services, .. } => written(s, scope, policies, services),
        Command::DeletePolicy(name) => former_policy(s, scope, name),
        Command::DeleteService(name) => former_service(s, scope, name),
        Command::ChangeDocuments(change) => documents(s, scope, change),
        Command::PutAppraisalPolicy { name, content, .. } => {
            content.clusters.iter().try_for_each(|cluster| scope.cluster(cluster))?;
            appraisal(s, scope, name)
        }
        Command::PromoteAppraisalPolicy(name) | Command::DeleteAppraisalPolicy(name) => appraisal(s, scope, name),
        _ => Err(scope.refuse("what concerns the whole cell")),
    }
}

/// What the policies and services are to be, and what they are now.
fn written(s: &State, scope: &Scope<'_>, policies: &[Policy], services: &[Service]) -> Result<(), Refusal> {
    for policy in policies {
        scope.policy(s, policy)?;
        former_policy(s, scope, &policy.name)?;
    }
    for service in services {
        scope.service(s, service)?;
        former_service(s, scope, &service.name)?;
    }
    Ok(())
}

fn documents(s: &State, scope: &Scope<'_>, change: &DocumentsChange) -> Result<(), Refusal> {
    written(s, scope, &change.policies, &change.services)?;
    // Policies of other clusters may go by it.
    if let Some(group) = change.groups.first() {
        return Err(scope.refuse(format!("group {}, which policies of the whole cell may use", group.name)));
    }
    for egress in &change.egress {
        scope.egress(s, egress)?;
        former_egress(s, scope, &egress.name)?;
    }
    change.delete.iter().try_for_each(|(kind, name)| match kind {
        DocumentKind::Policy => former_policy(s, scope, name),
        DocumentKind::Service => former_service(s, scope, name),
        DocumentKind::Egress => former_egress(s, scope, name),
        DocumentKind::Group => Err(scope.refuse(format!("group {name}, which policies of the whole cell may use"))),
    })
}

fn former_policy(s: &State, scope: &Scope<'_>, name: &ObjectName) -> Result<(), Refusal> {
    s.policy(&(scope.own.clone(), name.clone())).map_or(Ok(()), |row| scope.policy(s, &row.object))
}

fn former_service(s: &State, scope: &Scope<'_>, name: &ObjectName) -> Result<(), Refusal> {
    s.service(&(scope.own.clone(), name.clone())).map_or(Ok(()), |row| scope.service(s, &row.object))
}

fn former_egress(s: &State, scope: &Scope<'_>, name: &ObjectName) -> Result<(), Refusal> {
    s.egress_of(&(scope.own.clone(), name.clone())).map_or(Ok(()), |row| scope.egress(s, &row.object))
}

/// The appraisal policy of this name, as far as there is one, governs our nodes only.
fn appraisal(s: &State, scope: &Scope<'_>, name: &ObjectName) -> Result<(), Refusal> {
    let known = s.appraisal_policies().filter(|(n, _)| *n == name).map(|(_, row)| row);
    let versions = known.flat_map(|row| std::iter::once(&row.current).chain(&row.previous));
    versions.flat_map(|version| &version.clusters).try_for_each(|cluster| scope.cluster(cluster))
}
