//! Administrators: who they are, what they may do, and their certificates.

use super::{OrStatus, approvers, request_id};
use crate::authorise::{Actor, actor};
use crate::replica::Replica;
use ambit_identity::Csr;
use ambit_model::{Act, AdminRole, Code, ObjectName, Refusal, SpiffeId};
use ambit_proto::v1;
use ambit_state::objects::{ActRow, AdminRow};
use ambit_state::{Command, FOUNDER, RoleChange, State};
use std::collections::BTreeSet;
use tonic::{Request, Response, Status};

pub(crate) struct Administrators(pub(crate) Replica);

#[tonic::async_trait]
impl v1::administrators_server::Administrators for Administrators {
    async fn list_admins(&self, _: Request<v1::ListAdminsRequest>) -> Result<Response<v1::ListAdminsResponse>, Status> {
        let admins = self.0.read(listing).await.or_status()?;
        Ok(Response::new(v1::ListAdminsResponse { admins }))
    }

    async fn change_roles(&self, request: Request<v1::ChangeRolesRequest>) -> Result<Response<v1::Admin>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let id = request_id(&m.request_id)?;
        if m.name.starts_with("spiffe://") {
            return self.change_of_id(actor, id, &m).await.map(Response::new).or_status();
        }
        let admin: ObjectName = m.name.parse().or_status()?;
        let command = Command::ChangeRoles { admin: admin.clone(), change: change(&m).or_status()?, by: actor.name };
        self.0.propose(actor.client, id, command).await.or_status()?.outcome.or_status()?;
        let written =
            self.0.local(|s| s.admins().find(|(name, _)| **name == admin).map(|(n, row)| message(s, n.as_str(), row)));
        written.map(Response::new).ok_or_else(|| Refusal::new(Code::Internal, "the row written", "none")).or_status()
    }

    async fn certify_admin(
        &self,
        request: Request<v1::CertifyAdminRequest>,
    ) -> Result<Response<v1::CertifyAdminResponse>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let csr = Csr::parse(&m.csr).or_status()?;
        let authority = self.0.issuer().authority().to_owned();
        let id = super::svid::signed_here(request_id(&m.request_id)?, &authority);
        let admin = m.name.parse().or_status()?;
        let command = Command::CertifyAdmin { admin, key_hash: csr.spki_sha256(), authority };
        let applied = self.0.propose(actor.client, id, command).await.or_status()?;
        let (chain_der, not_after_ms) = super::svid::one_leaf(&self.0, applied, &csr).or_status()?;
        let root_der = self.0.local(|s| s.cell().map(|c| c.root_der.clone()).unwrap_or_default());
        Ok(Response::new(v1::CertifyAdminResponse { chain_der, not_after_ms, root_der }))
    }

    async fn list_approvers(
        &self,
        _: Request<v1::ListApproversRequest>,
    ) -> Result<Response<v1::ListApproversResponse>, Status> {
        self.0.read(approvers::listing).await.map(Response::new).or_status()
    }

    async fn add_approver(
        &self,
        request: Request<v1::AddApproverRequest>,
    ) -> Result<Response<v1::ListApproversResponse>, Status> {
        let (actor, m) = (actor(&request)?, request.into_inner());
        let act = Act::AddApprover(m.name.parse().or_status()?, m.public.parse().or_status()?);
        approvers::perform(&self.0, actor, &m.request_id, act, m.approved).await
    }

    async fn remove_approver(
        &self,
        request: Request<v1::RemoveApproverRequest>,
    ) -> Result<Response<v1::ListApproversResponse>, Status> {
        let (actor, m) = (actor(&request)?, request.into_inner());
        let act = Act::RemoveApprover(m.name.parse().or_status()?);
        approvers::perform(&self.0, actor, &m.request_id, act, m.approved).await
    }
}

impl Administrators {
    /// Of whoever shows an SVID of an entry that is marked `admin`.
    async fn change_of_id(&self, actor: Actor, id: [u8; 16], m: &v1::ChangeRolesRequest) -> Result<v1::Admin, Refusal> {
        let who: SpiffeId = m.name.parse()?;
        let command = Command::ChangeIdRoles { id: who.clone(), change: change(m)?, by: actor.name };
        self.0.propose(actor.client, id, command).await?.outcome?;
        Ok(self.0.local(|s| {
            // Without a role there is no row.
            let row = s.id_admins().find(|(id, _)| **id == who).map(|(_, row)| row.clone()).unwrap_or_default();
            message(s, who.as_str(), &row)
        }))
    }
}

fn change(m: &v1::ChangeRolesRequest) -> Result<RoleChange, Refusal> {
    let roles = |texts: &[String]| texts.iter().map(|t| t.parse()).collect::<Result<BTreeSet<AdminRole>, _>>();
    match (m.grant.as_slice(), m.revoke.as_slice(), m.revoke_all) {
        ([_, ..], [], false) => Ok(RoleChange::Grant(roles(&m.grant)?)),
        ([], [_, ..], false) => Ok(RoleChange::Revoke(roles(&m.revoke)?)),
        ([], [], true) => Ok(RoleChange::RevokeAll),
        ([], [], false) => Err(Refusal::new(Code::BadRequest, "roles to grant or to revoke, or all", "none")),
        _ => Err(Refusal::new(Code::BadRequest, "roles to grant or to revoke, or all", "more than one of them")),
    }
}

/// The founder stands among them, also where no row says so.
fn listing(s: &State) -> Vec<v1::Admin> {
    let unwritten = s.admins().all(|(name, _)| name.as_str() != FOUNDER);
    let founder = AdminRow { roles: s.admin_roles(FOUNDER), ..AdminRow::default() };
    let founder = unwritten.then(|| v1::Admin { changed_by: "ambitd init".into(), ..message(s, FOUNDER, &founder) });
    let named = s.admins().map(|(name, row)| message(s, name.as_str(), row));
    founder.into_iter().chain(named).chain(s.id_admins().map(|(id, row)| message(s, id.as_str(), row))).collect()
}

fn message(s: &State, name: &str, row: &AdminRow) -> v1::Admin {
    let glass = |row: &ActRow| matches!(&row.act, Act::BreakGlass(admin, _) if admin.as_str() == name);
    let last = s.acts().map(|(_, row)| row).rfind(|row| glass(row));
    let told = |row: &ActRow| {
        let names: Vec<&str> = row.approved_by.iter().map(ObjectName::as_str).collect();
        format!("by {}, approved by {}", row.by, names.join(", "))
    };
    v1::Admin {
        name: name.to_owned(),
        roles: row.roles.iter().map(ToString::to_string).collect(),
        changed_by: row.changed_by.clone(),
        changed_ms: row.changed.0,
        break_glass_ms: last.map_or(0, |row| row.stamp.0),
        break_glass: last.map(told).unwrap_or_default(),
    }
}
