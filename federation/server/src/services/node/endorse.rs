//! The endorsement store, as operators see it.

use super::Nodes;
use crate::authorise::actor;
use crate::services::{OrStatus, request_id};
use ambit_model::{ClusterId, Code, NodeId, ObjectName, Refusal};
use ambit_proto::v1;
use ambit_state::objects::EkDenyRow;
use ambit_state::{Command, State};
use ambit_verify::{EkDenyRule, EkMake};
use tonic::{Request, Response, Status};

/// EKs in one call; longer lists come in several.
const EKS_MAX: usize = 10_000;
/// Roots and rules in one call.
const ITEMS_MAX: usize = 256;
/// A vendor id, a model, a reason.
const TEXT_BYTES_MAX: usize = 256;

impl Nodes {
    pub(super) async fn change_allow_list(
        &self,
        request: Request<v1::AllowEkRequest>,
        command: fn(ClusterId, Vec<NodeId>) -> Command,
    ) -> Result<Response<v1::AllowEkResponse>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let id = request_id(&m.request_id)?;
        if m.node_ids.is_empty() || m.node_ids.len() > EKS_MAX {
            let found = m.node_ids.len().to_string();
            return Err(Refusal::new(Code::BadRequest, format!("1-{EKS_MAX} node ids"), found)).or_status();
        }
        let nodes: Vec<NodeId> = m.node_ids.iter().map(|n| n.parse()).collect::<Result<_, _>>().or_status()?;
        let allowed = nodes.len() as u32;
        let command = command(m.cluster.parse().or_status()?, nodes);
        self.replica.propose(actor.client, id, command).await.or_status()?.outcome.or_status()?;
        Ok(Response::new(v1::AllowEkResponse { allowed }))
    }

    pub(super) async fn change_roots(
        &self,
        request: Request<v1::PutEkRootsRequest>,
    ) -> Result<Response<v1::EndorsementsResponse>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let id = request_id(&m.request_id)?;
        let cluster: ClusterId = m.cluster.parse().or_status()?;
        let (ders, classes) = m.add.into_iter().map(|r| (r.der, r.class)).unzip();
        let add = crate::services::cluster::ek_roots(ders, classes).or_status()?;
        let remove: Vec<[u8; 32]> = m
            .remove_sha256
            .iter()
            .map(|t| crate::services::parse_fingerprint(t))
            .collect::<Result<_, _>>()
            .or_status()?;
        if remove.len() > ITEMS_MAX {
            return Err(Refusal::new(Code::BadRequest, format!("at most {ITEMS_MAX} roots"), "more")).or_status();
        }
        let command = Command::PutEkRoots { cluster: cluster.clone(), add, remove };
        self.replica.propose(actor.client, id, command).await.or_status()?.outcome.or_status()?;
        self.endorsements(cluster.as_str()).await.or_status().map(Response::new)
    }

    pub(super) async fn change_deny_list(
        &self,
        request: Request<v1::PutEkDenyRequest>,
    ) -> Result<Response<v1::EndorsementsResponse>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let id = request_id(&m.request_id)?;
        if m.add.len() + m.remove.len() > ITEMS_MAX {
            return Err(Refusal::new(Code::BadRequest, format!("at most {ITEMS_MAX} rules"), "more")).or_status();
        }
        let add = m.add.into_iter().map(rule).collect::<Result<_, _>>().or_status()?;
        let remove: Vec<ObjectName> = m.remove.iter().map(|n| n.parse()).collect::<Result<_, _>>().or_status()?;
        let command = Command::PutEkDeny(add, remove);
        self.replica.propose(actor.client, id, command).await.or_status()?.outcome.or_status()?;
        self.endorsements("").await.or_status().map(Response::new)
    }

    /// Roots and allow-list of one cluster, and the cell's deny-list; with no cluster the deny-list alone.
    pub(super) async fn endorsements(&self, cluster: &str) -> Result<v1::EndorsementsResponse, Refusal> {
        let of: Option<ClusterId> = if cluster.is_empty() { None } else { Some(cluster.parse()?) };
        self.replica.read(|s| message(s, of.as_ref())).await?
    }
}

fn message(s: &State, of: Option<&ClusterId>) -> Result<v1::EndorsementsResponse, Refusal> {
    let mut out = v1::EndorsementsResponse {
        revision: s.cell().map(|c| c.endorsement_revision.0).unwrap_or_default(),
        denied: s.ek_denials().map(|(name, row)| rule_message(name, row)).collect(),
        ..Default::default()
    };
    if let Some(id) = of {
        let row = s.cluster(id);
        let row = row.ok_or_else(|| Refusal::new(Code::NotFound, "a cluster of this cell", id.as_str()))?;
        let root = |(der, class): &(Vec<u8>, String)| v1::EkRootMessage { der: der.clone(), class: class.clone() };
        out.cluster = id.to_string();
        out.roots = row.ek_roots.iter().map(root).collect();
        out.allowed = s.allowed_eks(id).map(NodeId::to_string).collect();
    }
    Ok(out)
}

/// `firmware_below` is hexadecimal with `0x`, as quotes and claims show the version, or empty for every version.
fn rule(m: v1::EkDenyRule) -> Result<(ObjectName, EkDenyRow), Refusal> {
    let bad = |expected: &str, found: &str| Refusal::new(Code::BadRequest, expected, found);
    for text in [&m.manufacturer, &m.model, &m.reason] {
        if text.len() > TEXT_BYTES_MAX || text.chars().any(char::is_control) {
            return Err(bad("a short line of text", text));
        }
    }
    let firmware_below = match m.firmware_below.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16)
            .map_err(|_| bad("a version such as 0x0007000200000000", &m.firmware_below))?,
        None if m.firmware_below.is_empty() => u64::MAX,
        None => return Err(bad("a version such as 0x0007000200000000", &m.firmware_below)),
    };
    // Refuses a rule that would deny every TPM.
    EkDenyRule::new(&m.name, &m.manufacturer, &m.model, firmware_below)?;
    let manufacturer = if m.manufacturer.is_empty() { m.manufacturer } else { EkMake::vendor_id(&m.manufacturer)? };
    let row = EkDenyRow { manufacturer, model: m.model, firmware_below, reason: m.reason };
    Ok((m.name.parse()?, row))
}

fn rule_message(name: &ObjectName, row: &EkDenyRow) -> v1::EkDenyRule {
    let all = row.firmware_below == u64::MAX;
    v1::EkDenyRule {
        name: name.to_string(),
        manufacturer: row.manufacturer.clone(),
        model: row.model.clone(),
        firmware_below: if all { String::new() } else { format!("{:#018x}", row.firmware_below) },
        reason: row.reason.clone(),
    }
}
