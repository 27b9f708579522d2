//! What is said of each command. Not said: good verdicts of rounds, and addresses and endpoints that nodes report. They
//! decide nothing by themselves, come by the hundred a second, and what they bring about (a node put out) is said.

use super::Event;
use crate::command::{Command, DocumentKind, IdVerb, NodeVerb, Reply, RoleChange};
use crate::committed::{Issuance, JwtIssuance, Subject};
use crate::objects::TokenScope;
use crate::routing::{Route, Services};
use crate::state::State;
use ambit_model::{Act, AdminRole, Code, NodeId, ObjectName, Refusal, TrustDomain};
use std::collections::BTreeSet;
use std::fmt::Display;

type Answer = Result<Reply, Refusal>;

/// Who may have proposed it, as far as the command says.
pub(super) fn names(command: &Command, td: &TrustDomain) -> Vec<String> {
    let of_node = |node: &NodeId| vec![format!("spiffe://{td}/ambit/node/{node}")];
    match command {
        Command::Issue { node, .. } | Command::IssueJwt { node, .. } | Command::NewDownstream { node, .. } => {
            of_node(node)
        }
        Command::MintX509 { by, .. }
        | Command::MintJwt { by, .. }
        | Command::ChangeRoles { by, .. }
        | Command::ChangeIdRoles { by, .. }
        | Command::Act { by, .. }
        | Command::RollbackDocuments { by, .. }
        | Command::PutAppraisalPolicy { by, .. }
        | Command::SuspendPeer(_, by)
        | Command::PutRelationship(_, _, _, _, by)
        | Command::NoteExport { by, .. } => vec![by.clone()],
        Command::ChangeDocuments(change) => vec![change.by.clone()],
        Command::Route(change) => vec![change.by.clone()],
        Command::FailOver(_, by)
        | Command::ReleaseGrant(_, by)
        | Command::TakeBack(by)
        | Command::JudgeLate { by, .. } => vec![by.clone()],
        Command::ImportExternal(import) => vec![import.by.clone()],
        Command::Within(_, inner)
        | Command::OverKeySet(_, inner)
        | Command::WrappedTo(_, inner)
        | Command::OverAuthority(_, _, inner) => names(inner, td),
        _ => Vec::new(),
    }
}

/// The events of a command that answered this.
#[allow(clippy::too_many_lines, reason = "one row for each command: a table")]
pub(super) fn events(s: &State, command: &Command, reply: &Answer) -> Vec<Event> {
    let one = |act: &'static str, object: &dyn Display| vec![Event::new(act, object.to_string()).or(reply)];
    match command {
        Command::Tick | Command::RegisterAddress(..) | Command::ReportEndpoints(..) | Command::NodeReports(_) => {
            Vec::new()
        }
        Command::PutVerdicts(_) => Vec::new(),
        Command::Within(_, inner)
        | Command::OverKeySet(_, inner)
        | Command::WrappedTo(_, inner)
        | Command::OverAuthority(_, _, inner) => events(s, inner, reply),
        Command::BeginAudit => {
            vec![if reply.is_ok() { super::began(s) } else { Event::new("audit.begin", "").or(reply) }]
        }
        Command::NoteExport { what, .. } => one("audit.export", what),
        // Two cells that cosign each other would have to cosign that they did, for ever: done, it is told in `ambit audit
        // status`; a head that does not follow is said.
        Command::Witness(ask) => match reply {
            Err(refusal) if refusal.code == Code::AuditUnwitnessed => vec![
                Event::new("audit.cosign", crate::audit::origin(&ask.peer, ask.epoch))
                    .with("size", ask.size.to_string())
                    .with("root", hex::encode(ask.root))
                    .or(reply),
            ],
            _ => Vec::new(),
        },
        Command::TakeCosignature(..) => Vec::new(),
        Command::FoundCell(row, ..) => one("cell.found", &row.trust_domain),
        Command::CreateToken(_, row) => match &row.scope {
            TokenScope::Node(cluster) => one("token.create", &format!("node of cluster {cluster}")),
            TokenScope::Replica(n, _) => one("token.create", &format!("replica {n}")),
            TokenScope::Peer(td, _) => one("token.create", &format!("peer {td}")),
        },
        Command::AdmitReplica { replica, .. } => one("replica.admit", replica),
        Command::PutMember(id, ..) => one("replica.put", id),
        Command::RemoveMember(id) => one("replica.remove", id),
        Command::AttestReplica(verdict) => one("replica.attest", &verdict.replica),
        Command::DenyReplica(denial) => {
            let event = Event::new("replica.refuse", denial.row.node.to_string());
            vec![event.refused(&denial.row.code)]
        }
        Command::AttestedReplicasOnly(only) => one("replicas.require_attested", only),
        Command::RotateTicketKey(_) => one("ticket_key.rotate", &""),
        Command::RegisterCluster(id, ..) => one("cluster.register", id),
        Command::AllowEk(cluster, nodes) => each(nodes, reply, |node| said_of("ek.allow", node, cluster)),
        Command::DisallowEk(cluster, nodes) => each(nodes, reply, |node| said_of("ek.disallow", node, cluster)),
        Command::PutEkRoots { cluster, .. } => one("ek_roots.put", cluster),
        Command::PutEkDeny(add, remove) => {
            let mut all = each(add, reply, |(name, _)| Event::new("ek_deny.put", name.as_str()));
            all.extend(each(remove, reply, |name| Event::new("ek_deny.remove", name.as_str())));
            all
        }
        Command::AdmitNode(a) => {
            let event = Event::new("node.admit", a.node.to_string())
                .with("cluster", a.cluster.as_str())
                .with("policy", format!("{}@{}", a.seen.policy.name, a.seen.policy.version))
                .with("evidence_sha256", hex::encode(a.seen.evidence_sha256));
            match reply {
                Ok(Reply::Admitted(generation, leaf)) => {
                    vec![event.with("generation", generation.to_string()), issued("svid.issue", leaf)]
                }
                _ => vec![event.or(reply)],
            }
        }
        Command::DenyNode { row, .. } => {
            vec![Event::new("node.refuse", row.node.to_string()).refused(&row.code)]
        }
        // Done, it is said by what becomes of the nodes.
        Command::Distrust(_, _, row) => refused("node.distrust", &row.node, reply),
        Command::SetNodes(verb, nodes) => {
            let object = match nodes {
                crate::Nodes::Ids(ids) => ids.first().map(ToString::to_string).unwrap_or_default(),
                crate::Nodes::Cluster(cluster) => format!("cluster {cluster}"),
            };
            refused(node_verb(*verb), &object, reply)
        }
        Command::CreateEntries(entries) => items(entries, reply, |e| entry("entry.create", e)),
        Command::PutEntries(entries) | Command::ReplaceEntries(entries) => {
            items(entries, reply, |(e, _)| entry("entry.put", e))
        }
        Command::DeleteEntries(ids) | Command::RetireEntries(ids) => {
            items(ids, reply, |id| Event::new("entry.delete", id.as_str()))
        }
        Command::RemoveEntries(all) => items(all, reply, |(id, _)| Event::new("entry.delete", id.as_str())),
        Command::Issue { node, leaves, .. } => match reply {
            Ok(Reply::Leaves(done)) => done
                .iter()
                .zip(leaves)
                .map(|(leaf, asked)| match leaf {
                    Ok(leaf) => issued("svid.issue", leaf),
                    Err(refusal) => said_of_entry(node, asked.entry.as_str()).refused(refusal.code.as_str()),
                })
                .collect(),
            _ => vec![Event::new("svid.issue", format!("node {node}")).or(reply)],
        },
        Command::IssueAdmin { name, .. } => leaf("svid.issue", name, reply),
        Command::CertifyAdmin { admin, .. } => leaf("svid.issue", admin, reply),
        Command::BreakGlass { admin, .. } => leaf("break_glass.issue", admin, reply),
        Command::MintX509 { spiffe_id, .. } => leaf("svid.mint", spiffe_id, reply),
        Command::IssueJwt { entry, .. } => token("token.issue", entry, reply),
        Command::MintJwt { spiffe_id, .. } => token("token.mint", spiffe_id, reply),
        Command::NewDownstream { node, serial, .. } => vec![
            match reply {
                Ok(Reply::Downstream(d)) => Event::new("downstream.issue", d.entry.as_str())
                    .with("serial", hex::encode(d.serial))
                    .with("key_sha256", hex::encode(d.key_hash)),
                _ => Event::new("downstream.issue", format!("node {node}")).or(reply),
            }
            .with("shown_serial", hex::encode(serial)),
        ],
        Command::ApplyDocuments { policies, services, .. } => {
            let mut all = each(policies, reply, |p| Event::new("policy.write", p.name.as_str()));
            all.extend(each(services, reply, |p| Event::new("service.write", p.name.as_str())));
            all
        }
        Command::DeletePolicy(name) => one("policy.delete", name),
        Command::DeleteService(name) => one("service.delete", name),
        Command::ChangeDocuments(change) => documents(change, reply),
        Command::RollbackDocuments { to, .. } => one("documents.rollback", to),
        Command::Route(change) => vec![route(&change.route).or(reply)],
        Command::FailOver(signed, _) => vec![grant(signed).or(reply)],
        Command::ReleaseGrant(home, _) => one("grant.release", home),
        Command::TakeBack(_) => one("grant.take_back", &""),
        Command::JudgeLate { origin, seq, keep, .. } => {
            let act = if *keep { "late_record.keep" } else { "late_record.drop" };
            vec![Event::new(act, origin.as_str()).with("seq", seq.to_string()).or(reply)]
        }
        Command::CertifyStandby { holder, replica, key_hash } => vec![
            Event::new("standby.certify", holder.as_str())
                .with("replica", replica.to_string())
                .with("key_sha256", hex::encode(key_hash))
                .or(reply),
        ],
        Command::PutAppraisalPolicy { name, content, staged, .. } => vec![
            Event::new("appraisal_policy.put", name.as_str())
                .with("sha256", hex::encode(content.sha256))
                .with("staged", staged.to_string())
                .or(reply),
        ],
        Command::PromoteAppraisalPolicy(name) => one("appraisal_policy.promote", name),
        Command::DeleteAppraisalPolicy(name) => one("appraisal_policy.delete", name),
        Command::ChangeRoles { admin, change, .. } => vec![roles(admin.as_str(), change).or(reply)],
        Command::ChangeIdRoles { id, change, .. } => vec![roles(id.as_str(), change).or(reply)],
        Command::DenyId(id, verb) => one(id_verb(*verb), id),
        Command::DenyLeaf(authority, serial) => one("svid.revoke", &format!("{authority}/{}", hex::encode(serial))),
        Command::PutPeer(td, row, _) => {
            vec![Event::new("peer.register", td.as_str()).with("fingerprint", hex::encode(row.fingerprint)).or(reply)]
        }
        Command::ApprovePeer(td, fingerprint) => {
            vec![Event::new("peer.approve", td.as_str()).with("fingerprint", hex::encode(fingerprint)).or(reply)]
        }
        Command::Import(head, records) => vec![
            Event::new("peer.import", head.origin.as_str())
                .with("epoch", head.epoch.to_string())
                .with("seq", head.seq.to_string())
                .with("head", hex::encode(head.hash))
                .with("records", records.len().to_string())
                .or(reply),
        ],
        Command::StopPeer(td, _) => one("peer.stop", td),
        Command::SuspendPeer(td, _) => one("peer.suspend", td),
        Command::PutRelationship(td, ..) => one("trust_domain.put", td),
        Command::RemoveRelationship(td) => one("trust_domain.remove", td),
        Command::TakeBundle(td, bundle) | Command::TakeBundleWithKeys(td, bundle, _) => {
            vec![Event::new("bundle.import", td.as_str()).with("sha256", hex::encode(bundle.sha256)).or(reply)]
        }
        Command::ConfirmBundle(td, sha256) => {
            vec![Event::new("bundle.approve", td.as_str()).with("sha256", hex::encode(sha256)).or(reply)]
        }
        Command::SealReport(drill, sha256) => {
            vec![Event::new("drill.report", drill.clone()).with("sha256", hex::encode(sha256)).or(reply)]
        }
        Command::RenewAuthority { replica, key_hash, .. } => vec![
            Event::new("authority.renew", format!("replica {replica}"))
                .with("key_sha256", hex::encode(key_hash))
                .or(reply),
        ],
        Command::TaintAuthority(id) => one("authority.taint", id),
        Command::RevokeAuthority(id) | Command::DenyAuthority(id) => one("authority.revoke", id),
        Command::WrapRoot(root, _) => one("root.wrap", &hex::encode(root)),
        Command::PrepareRoot(..) => {
            let object = match reply {
                Ok(Reply::Root(root)) => hex::encode(root.root),
                _ => String::new(),
            };
            one("root.prepare", &object)
        }
        Command::CrossSignRoot(root, _) => one("root.cross_sign", &hex::encode(root)),
        Command::ActivateRoot(root, _) => one("root.activate", &hex::encode(root)),
        Command::TaintRoot(root) => one("root.taint", &hex::encode(root)),
        Command::RevokeRoot(root) => one("root.revoke", &hex::encode(root)),
        Command::SealRoots(_) => one("roots.seal", &""),
        Command::RequestExternal { key_hash, .. } => one("external.request", &hex::encode(key_hash)),
        Command::WithdrawExternal(key_hash) => one("external.withdraw", &hex::encode(key_hash)),
        Command::ImportExternal(_) => one("external.put", &""),
        Command::PutJwtAuthority(..) => one("jwt_authority.prepare", &""),
        Command::WrapJwtAuthority(kid, _) => one("jwt_authority.wrap", kid),
        Command::ActivateJwtAuthority(kid) => one("jwt_authority.activate", kid),
        Command::TaintJwtAuthority(kid) => one("jwt_authority.taint", kid),
        Command::RevokeJwtAuthority(kid) => one("jwt_authority.revoke", kid),
        Command::Act { act, approved, .. } => {
            let event = Event::new(act_name(act), act.to_string()).or(reply);
            let approvals = approved.as_ref().map_or(0, |approved| approved.approvals.len());
            vec![event.with("approvals", approvals.to_string())]
        }
    }
}

/// One for each, all with the outcome of the whole.
fn each<T>(all: &[T], reply: &Answer, event: impl Fn(&T) -> Event) -> Vec<Event> {
    all.iter().map(|one| event(one).or(reply)).collect()
}

/// One for each, with its own outcome.
fn items<T>(all: &[T], reply: &Answer, event: impl Fn(&T) -> Event) -> Vec<Event> {
    match reply {
        Ok(Reply::Items(outcomes)) => all.iter().zip(outcomes).map(|(one, outcome)| event(one).or(outcome)).collect(),
        _ => each(all, reply, event),
    }
}

/// Only where it was refused.
fn refused(act: &'static str, object: &dyn Display, reply: &Answer) -> Vec<Event> {
    if reply.is_ok() { Vec::new() } else { vec![Event::new(act, object.to_string()).or(reply)] }
}

fn said_of(act: &'static str, node: &NodeId, cluster: &ambit_model::ClusterId) -> Event {
    Event::new(act, node.to_string()).with("cluster", cluster.as_str())
}

fn said_of_entry(node: &NodeId, entry: &str) -> Event {
    Event::new("svid.issue", format!("entry {entry}")).with("node", node.to_string())
}

fn entry(act: &'static str, entry: &ambit_model::Entry) -> Event {
    Event::new(act, entry.id.as_str())
        .with("spiffe_id", entry.spiffe_id.as_str())
        .with("cluster", entry.cluster.as_str())
}

fn subject(event: Event, subject: &Subject) -> Event {
    match subject {
        Subject::Workload(id, revision) | Subject::NamedWorkload(id, revision, _) => {
            event.with("entry", format!("{id}@{revision}"))
        }
        Subject::BreakGlass(approvers) => {
            let names: Vec<&str> = approvers.iter().map(ObjectName::as_str).collect();
            event.with("approvers", names.join(","))
        }
        Subject::Node | Subject::Admin | Subject::Minted(..) => event,
    }
}

fn issued(act: &'static str, leaf: &Issuance) -> Event {
    let event = Event::new(act, leaf.spiffe_id.as_str())
        .with("serial", hex::encode(leaf.serial))
        .with("authority", leaf.authority.clone())
        .with("key_sha256", hex::encode(leaf.key_hash))
        .with("not_after_ms", leaf.lifetime.not_after.0.to_string());
    let event = match &leaf.binding {
        Some((node, generation)) => event.with("node", format!("{node}@{generation}")),
        None => event,
    };
    subject(event, &leaf.subject)
}

fn leaf(act: &'static str, whose: &dyn Display, reply: &Answer) -> Vec<Event> {
    match reply {
        Ok(Reply::Leaves(leaves)) => {
            let said = |leaf: &Result<Issuance, Refusal>| match leaf {
                Ok(leaf) => issued(act, leaf),
                Err(refusal) => Event::new(act, whose.to_string()).refused(refusal.code.as_str()),
            };
            leaves.iter().map(said).collect()
        }
        _ => vec![Event::new(act, whose.to_string()).or(reply)],
    }
}

fn token(act: &'static str, whose: &dyn Display, reply: &Answer) -> Vec<Event> {
    let said = |token: &JwtIssuance| {
        let event = Event::new(act, token.spiffe_id.as_str())
            .with("jti", hex::encode(token.jti))
            .with("kid", token.kid.clone())
            .with("audience_sha256", hex::encode(token.audience_sha256))
            .with("not_after_ms", token.not_after.0.to_string());
        subject(event, &token.subject)
    };
    match reply {
        Ok(Reply::Token(token)) => vec![said(token)],
        _ => vec![Event::new(act, whose.to_string()).or(reply)],
    }
}

fn documents(change: &crate::DocumentsChange, reply: &Answer) -> Vec<Event> {
    let write = |act: &'static str, name: &ObjectName| Event::new(act, name.as_str()).or(reply);
    let policies = change.policies.iter().map(|p| write("policy.write", &p.name));
    let services = change.services.iter().map(|p| write("service.write", &p.name));
    let groups = change.groups.iter().map(|p| write("group.write", &p.name));
    let egress = change.egress.iter().map(|p| write("egress.write", &p.name));
    let deleted = change.delete.iter().map(|(kind, name)| {
        let act = match kind {
            DocumentKind::Policy => "policy.delete",
            DocumentKind::Service => "service.delete",
            DocumentKind::Group => "group.delete",
            DocumentKind::Egress => "egress.delete",
        };
        write(act, name)
    });
    policies.chain(services).chain(groups).chain(egress).chain(deleted).collect()
}

fn grant(signed: &ambit_model::grant::SignedGrant) -> Event {
    let event = Event::new("grant.commit", signed.proposal.trust_domain.as_str());
    let event = event.with("approvals", signed.approvals.len().to_string());
    match signed.grant() {
        Ok(grant) => event
            .with("holder", grant.holder.as_str())
            .with("epoch", grant.epoch.to_string())
            .with("ends_ms", grant.ends.0.to_string()),
        Err(_) => event,
    }
}

fn route(route: &Route) -> Event {
    let of = |event: Event, services: &Services| match services {
        Services::All => event.with("services", "all"),
        Services::These(names) => {
            let names: Vec<String> = names.iter().map(|(td, name)| format!("{td}/{name}")).collect();
            event.with("services", names.join(","))
        }
    };
    match route {
        Route::Region(cluster, region) => {
            Event::new("cluster.region", cluster.as_str()).with("region", region.as_ref().map_or("", |r| r.as_str()))
        }
        Route::Drain(cluster, true) => Event::new("cluster.drain", cluster.as_str()),
        Route::Drain(cluster, false) => Event::new("cluster.resume", cluster.as_str()),
        Route::FailOver { services, from, to } => {
            of(Event::new("cluster.fail_over", from.as_str()).with("to", to.as_str()), services)
        }
        Route::FailBack { services, from } => of(Event::new("cluster.fail_back", from.as_str()), services),
    }
}

fn roles(who: &str, change: &RoleChange) -> Event {
    let names = |roles: &BTreeSet<AdminRole>| roles.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    match change {
        RoleChange::Grant(roles) => Event::new("roles.grant", who).with("roles", names(roles)),
        RoleChange::Revoke(roles) => Event::new("roles.revoke", who).with("roles", names(roles)),
        RoleChange::RevokeAll => Event::new("roles.revoke", who).with("roles", "all"),
    }
}

fn node_verb(verb: NodeVerb) -> &'static str {
    match verb {
        NodeVerb::Ban => "node.ban",
        NodeVerb::Unban => "node.unban",
        NodeVerb::Quarantine => "node.quarantine",
        NodeVerb::Release => "node.release",
        NodeVerb::Evict => "node.evict",
    }
}

fn id_verb(verb: IdVerb) -> &'static str {
    match verb {
        IdVerb::Revoke => "identity.revoke",
        IdVerb::Bar => "identity.bar",
        IdVerb::Lift => "identity.lift",
    }
}

fn act_name(act: &Act) -> &'static str {
    match act {
        Act::RevokeRoot(_) => "root.revoke",
        Act::AddApprover(..) => "approver.create",
        Act::RemoveApprover(_) => "approver.remove",
        Act::RemoveTrustDomain(_) => "trust_domain.remove",
        Act::BreakGlass(..) => "break_glass.issue",
        Act::ShareRoot { .. } => "root.share",
        Act::ImportRoot(..) => "root.put",
        Act::NameStandby(_) => "standby.put",
        Act::RemoveStandby => "standby.remove",
        Act::FailOver(_) => "grant.commit",
    }
}
