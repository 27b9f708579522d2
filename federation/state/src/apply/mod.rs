//! One function per command. Each either refuses before its first change or changes everything it names.

mod act;
mod addresses;
mod appraisal;
mod attest;
mod audit;
mod authority;
mod cell;
mod deny;
mod documents;
mod downstream;
mod egress;
mod endorse;
mod external;
mod federation;
mod former;
mod grant;
mod incarnation;
pub(crate) mod issue;
pub(crate) mod jwt;
mod mint;
mod node;
mod node_address;
mod node_reports;
mod objects;
mod peer;
mod relationship;
mod roles;
mod root;
mod routing;
mod seal;
mod standby;

pub(crate) use audit::Event;
pub(crate) use documents::check as check_documents;
pub use incarnation::Beginning;
pub(crate) use issue::answer_again;
pub use node_reports::NODE_REPORTS_MAX;
pub use objects::ENDPOINTS_PER_NODE_MAX;

use crate::command::{Command, DocumentKind, LogEntry, Reply};
use crate::committed::Subject;
use crate::objects::CellRow;
use crate::state::State;
use ambit_model::record::{Kind, Record};
use ambit_model::{Code, RaftIndex, Refusal, Revision, Stamp};

/// What every command is applied under.
#[derive(Clone, Copy)]
pub(crate) struct At {
    pub(crate) index: RaftIndex,
    pub(crate) stamp: Stamp,
}

/// Applies a command; whatever it changed, a downstream authority does not outlive what it was given for. What came of it
/// is in the audit log before it is answered.
pub(crate) fn apply(s: &mut State, index: RaftIndex, stamp: Stamp, entry: &LogEntry) -> Result<Reply, Refusal> {
    let at = At { index, stamp };
    let reply = within(s, at, &entry.command);
    audit::record(s, at, entry, &reply);
    reply
}

/// Applies a command that is in another one, or that one itself.
fn within(s: &mut State, at: At, command: &Command) -> Result<Reply, Refusal> {
    let reply = perform(s, at, command);
    downstream::end_unfounded(s, at)?;
    reply
}

fn perform(s: &mut State, at: At, command: &Command) -> Result<Reply, Refusal> {
    seal::says_to_which_keys(s, command)?;
    change(s, at, command)
}

fn change(s: &mut State, at: At, command: &Command) -> Result<Reply, Refusal> {
    match command {
        Command::FoundCell(row, id, member, keys) => cell::found(s, row, *id, member, keys),
        Command::Tick => cell::tick(s, at),
        Command::CreateToken(sha256, row) => cell::create_token(s, sha256, row),
        Command::AdmitReplica { token, replica, issuer_key_hash, tls_key_hash } => {
            cell::admit_replica(s, at, token, *replica, issuer_key_hash, tls_key_hash)
        }
        Command::PutMember(id, member, keys) => cell::put_member(s, *id, member, keys),
        Command::RemoveMember(id) => cell::remove_member(s, at, *id),
        Command::RotateTicketKey(wrapped) => cell::rotate_ticket_key(s, at, wrapped),
        Command::RegisterCluster(id, roots, interval_ms) => cell::register_cluster(s, at, id, roots, *interval_ms),
        Command::AllowEk(cluster, nodes) => endorse::allow(s, at, cluster, nodes),
        Command::AdmitNode(admission) => node::admit(s, at, admission),
        Command::DenyNode { nonce, deadline, row, distrust } => node::deny(s, at, nonce, *deadline, row, *distrust),
        Command::SetNodes(verb, nodes) => attest::set_nodes(s, at, *verb, nodes),
        Command::CreateEntries(entries) => objects::create_entries(s, at, entries),
        Command::DeleteEntries(ids) => Ok(Reply::Items(objects::delete(s, at, ids))),
        Command::PutEntries(entries) => objects::put_entries(s, at, entries),
        Command::Issue { node, generation, authority, leaves } => {
            issue::leaves(s, at, node, *generation, authority, leaves)
        }
        Command::IssueAdmin { name, key_hash, authority } => {
            issue::admin(s, at, name, *key_hash, authority, Subject::Admin)
        }
        Command::ApplyDocuments { policies, services, by } => former::apply_documents(s, at, policies, services, by),
        Command::DeletePolicy(name) => former::delete(s, at, DocumentKind::Policy, name),
        Command::DeleteService(name) => former::delete(s, at, DocumentKind::Service, name),
        Command::ReportEndpoints(node, endpoints) => {
            objects::report_endpoints(s, at, node, endpoints).map(Reply::Items)
        }
        Command::PutPeer(td, row, token) => federation::put_peer(s, at, td, row, token.as_ref()),
        Command::ApprovePeer(td, fingerprint) => federation::approve(s, at, td, fingerprint),
        Command::Import(head, records) => federation::import(s, at, head, records),
        Command::StopPeer(td, trouble) => federation::stop(s, td, trouble),
        Command::SealReport(drill, sha256) => cell::seal_report(s, at, drill, *sha256),
        Command::PutVerdicts(verdicts) => attest::verdicts(s, at, verdicts),
        Command::Distrust(generation, revision, row) => attest::distrust(s, at, *generation, *revision, row),
        Command::DisallowEk(cluster, nodes) => endorse::disallow(s, at, cluster, nodes),
        Command::PutEkRoots { cluster, add, remove } => endorse::put_roots(s, at, cluster, add, remove),
        Command::PutEkDeny(add, remove) => endorse::put_denials(s, at, add, remove),
        Command::PutAppraisalPolicy { name, content, staged, by } => appraisal::put(s, at, name, content, *staged, by),
        Command::PromoteAppraisalPolicy(name) => appraisal::promote(s, at, name),
        Command::DeleteAppraisalPolicy(name) => appraisal::delete(s, at, name),
        Command::PutJwtAuthority(spki_der, wrapped) => jwt::put(s, at, spki_der, wrapped),
        Command::WrapJwtAuthority(kid, wrapped) => jwt::wrap(s, kid, wrapped),
        Command::IssueJwt { node, generation, kid, entry, audience_sha256 } => {
            issue::token(s, at, node, *generation, kid, entry, audience_sha256)
        }
        Command::ChangeRoles { admin, change, by } => roles::change(s, at, admin, change, by),
        Command::CertifyAdmin { admin, key_hash, authority } => roles::certify(s, at, admin, *key_hash, authority),
        Command::Within(clusters, command) => roles::within(s, at, clusters, command),
        Command::MintX509 { spiffe_id, dns_names, ttl, key_hash, authority, by } => {
            mint::x509(s, at, &mint::X509 { spiffe_id, dns_names, ttl: *ttl, key_hash: *key_hash, authority, by })
        }
        Command::MintJwt { spiffe_id, audience_sha256, ttl, kid, by } => {
            mint::jwt(s, at, spiffe_id, audience_sha256, *ttl, kid, by)
        }
        Command::DenyId(id, verb) => deny::id(s, at, id, *verb),
        Command::DenyLeaf(authority, serial) => deny::leaf(s, at, authority, serial),
        Command::RetireEntries(ids) => deny::retire_entries(s, at, ids),
        Command::RemoveEntries(items) => deny::remove_entries(s, at, items),
        Command::ReplaceEntries(entries) => deny::replace_entries(s, at, entries),
        Command::PutRelationship(td, url, profile, roots, by) => relationship::put(s, at, td, url, profile, roots, by),
        Command::RemoveRelationship(td) => act::remove_relationship_alone(s, at, td),
        // It says nothing of keys: those that are known stay.
        Command::TakeBundle(td, bundle) => {
            let known = s.peer_jwt(td).to_vec();
            relationship::take(s, at, td, bundle, &known)
        }
        Command::TakeBundleWithKeys(td, bundle, keys) => relationship::take(s, at, td, bundle, keys),
        Command::ConfirmBundle(td, sha256) => relationship::confirm(s, at, td, sha256),
        Command::RenewAuthority { replica, key_hash, lifetime_ms } => {
            authority::renew(s, at, *replica, key_hash, *lifetime_ms)
        }
        Command::WrapRoot(root, wrapped) => root::wrap(s, root, wrapped),
        Command::PrepareRoot(der, wrapped) => root::prepare(s, at, der, wrapped),
        Command::CrossSignRoot(root, der) => root::cross_sign(s, root, der),
        Command::ActivateRoot(root, keys) => root::activate(s, at, root, keys),
        Command::TaintRoot(root) => root::taint(s, at, root),
        Command::RevokeRoot(root) => act::revoke_root_alone(s, at, root),
        Command::TaintAuthority(id) => authority::taint(s, at, id),
        Command::RevokeAuthority(id) => authority::revoke(s, at, id),
        Command::DenyAuthority(id) => authority::deny_unknown(s, at, id),
        Command::OverKeySet(replaced, command) => cell::over_key_set(s, at, replaced, command),
        Command::Act { act, approved, by } => act::perform(s, at, act, approved.as_ref(), by),
        Command::ActivateJwtAuthority(kid) => jwt::activate_now(s, at, kid),
        Command::TaintJwtAuthority(kid) => jwt::taint(s, at, kid),
        Command::RevokeJwtAuthority(kid) => jwt::revoke(s, at, kid),
        Command::BreakGlass { admin, key_hash, authority, replica, approved } => act::break_glass(
            s,
            at,
            &act::BreakGlass { admin, key_hash: *key_hash, authority, replica: *replica, approved },
        ),
        Command::RegisterAddress(node, generation, address) => {
            node_address::register(s, at, node, *generation, *address).map(|()| Reply::Done)
        }
        Command::NodeReports(reports) => node_reports::take(s, at, reports),
        Command::NewDownstream { node, generation, serial, key_hash, lifetime_ms } => downstream::new(
            s,
            at,
            &downstream::Asked { node, generation: *generation, serial, key_hash, lifetime_ms: *lifetime_ms },
        ),
        Command::ChangeIdRoles { id, change, by } => roles::change_of_id(s, at, id, change, by),
        Command::AttestReplica(verdict) => seal::attest(s, at, verdict),
        Command::AttestedReplicasOnly(only) => seal::attested_only(s, *only),
        Command::SealRoots(seal) => seal::seal(s, seal),
        Command::DenyReplica(denial) => seal::deny(s, at, denial),
        Command::RequestExternal { csr, key_hash, wrapped } => external::request(s, at, csr, key_hash, wrapped),
        Command::WithdrawExternal(key_hash) => external::withdraw(s, key_hash),
        Command::ImportExternal(import) => external::import(s, at, import),
        Command::OverAuthority(root, key_hash, command) => external::over_authority(s, at, (root, key_hash), command),
        Command::ChangeDocuments(change) => documents::change(s, at, change),
        Command::RollbackDocuments { to, over, by, note } => documents::rollback(s, at, *to, *over, (by, note)),
        Command::SuspendPeer(td, by) => peer::suspend(s, at, td, by),
        Command::BeginAudit => audit::begin(s),
        // Being in the log is all that it does.
        Command::NoteExport { .. } => Ok(Reply::Done),
        Command::Witness(ask) => audit::witness(s, at, ask),
        Command::TakeCosignature(td, row) => audit::cosigned(s, td, row),
        Command::Route(change) => routing::change(s, at, change),
        Command::FailOver(signed, by) => grant::commit(s, at, signed, by),
        Command::ReleaseGrant(home, _) => grant::release(s, at, home),
        Command::TakeBack(_) => grant::take_back(s, at),
        Command::JudgeLate { origin, seq, keep, .. } => federation::judge_late(s, at, origin, *seq, *keep),
        Command::CertifyStandby { holder, replica, key_hash } => standby::certify(s, at, holder, *replica, key_hash),
        Command::WrappedTo(to, command) => {
            seal::are_wrap_keys(s, to, command)?;
            change(s, at, command)
        }
    }
}

/// The cell's own row, or a refusal while it is not founded.
pub(crate) fn cell_row(s: &State) -> Result<CellRow, Refusal> {
    s.cell().cloned().ok_or_else(|| Refusal::new(Code::Unavailable, "a founded cell", "an empty one"))
}

/// Marks that slices may have changed.
pub(crate) fn touch(s: &mut State, at: At) {
    if let Some(mut row) = s.cell().cloned() {
        row.revision = Revision(at.index.0);
        s.cell.put(&mut s.journal, 0, row);
    }
}

/// Appends a record to the chain that peers pull.
pub(crate) fn export(s: &mut State, kind: Kind, key: String, payload: Vec<u8>) {
    let Some(mut row) = s.cell().cloned() else { return };
    let record = Record {
        origin: row.trust_domain.clone(),
        epoch: row.epoch,
        seq: row.export_seq + 1,
        prev_hash: row.export_hash,
        kind,
        key,
        payload,
    };
    row.export_seq = record.seq;
    row.export_hash = record.hash();
    s.records.put(&mut s.journal, record.seq, record);
    s.cell.put(&mut s.journal, 0, row);
}

/// The payload of a record.
pub(crate) fn payload<T: serde::Serialize>(object: &T) -> Result<Vec<u8>, Refusal> {
    postcard::to_stdvec(object).map_err(|e| Refusal::new(Code::Internal, "an object that encodes", e.to_string()))
}
