//! Replicas: status, joining, promotion, removal.

use super::{OrStatus, new_token, request_id, token_expiry, token_sha256};
use crate::authorise::{Role, actor};
use crate::raft::Role as RaftRole;
use crate::replica::Replica;
use crate::replica::budget::Budget;
use crate::replica::key_set;
use ambit_identity::Csr;
use ambit_model::{Code, Refusal, ReplicaId};
use ambit_proto::v1;
use ambit_state::objects::{Cause, IncarnationRow, KeySetRow, Member, TokenRow, TokenScope};
use ambit_state::{Command, State};
use sha2::{Digest, Sha256};
use std::sync::Arc;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// Pieces of a backup that wait for its reader: a mebibyte.
const BACKUP_PIECES: usize = 4;
/// Cells are of 1, 3 or 5; seven leaves room for replacing.
pub(crate) const REPLICA_MAX: u64 = 7;

/// A key set made anew so often when another came in between: roots are activated by hand, and joins are one at a time.
const KEY_SET_TRIES: usize = 4;

pub(crate) struct Membership {
    replica: Replica,
    budget: Budget,
    /// One join at a time: each certifies a key set that follows the one before. Only the root's keeper serves joins.
    joining: tokio::sync::Mutex<()>,
    /// One backup at a time: each holds the state once more, and its bytes.
    backing_up: Arc<Semaphore>,
}

#[allow(non_snake_case, reason = "reads like the other services where they are listed")]
pub(crate) fn Membership(replica: Replica) -> Membership {
    Membership {
        replica,
        budget: Budget::default(),
        joining: tokio::sync::Mutex::new(()),
        backing_up: Arc::new(Semaphore::new(1)),
    }
}

#[tonic::async_trait]
impl v1::membership_server::Membership for Membership {
    async fn status(&self, _: Request<v1::StatusRequest>) -> Result<Response<v1::StatusResponse>, Status> {
        Ok(Response::new(self.status_message()))
    }

    async fn create_replica_token(
        &self,
        request: Request<v1::CreateReplicaTokenRequest>,
    ) -> Result<Response<v1::CreateReplicaTokenResponse>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let id = request_id(&m.request_id)?;
        if m.replica == 0 || m.replica > REPLICA_MAX {
            return Err(Refusal::new(Code::BadRequest, format!("a replica of 1-{REPLICA_MAX}"), m.replica.to_string()))
                .or_status();
        }
        address(&m.address).or_status()?;
        let (token, sha256) = new_token("replica").or_status()?;
        let scope = TokenScope::Replica(m.replica, m.address);
        let row = TokenRow { scope, expires: token_expiry(&self.replica, m.ttl_seconds).or_status()?, used: false };
        self.replica
            .propose(actor.client, id, Command::CreateToken(sha256, row))
            .await
            .or_status()?
            .outcome
            .or_status()?;
        Ok(Response::new(v1::CreateReplicaTokenResponse { token }))
    }

    async fn replica_join(
        &self,
        request: Request<v1::ReplicaJoinRequest>,
    ) -> Result<Response<v1::ReplicaJoinResponse>, Status> {
        self.budget.take(actor(&request)?.remote).or_status()?;
        let _one = self.joining.lock().await;
        self.join(request.into_inner()).await.or_status().map(Response::new)
    }

    async fn promote(&self, request: Request<v1::PromoteRequest>) -> Result<Response<v1::StatusResponse>, Status> {
        let role = actor(&request)?.role;
        let id = ReplicaId(request.into_inner().replica);
        // A replica may ask for itself only.
        if role != Role::Replica(id.0) && !matches!(role, Role::Admin(..)) {
            return Err(Refusal::new(
                Code::PermissionDenied,
                format!("replica {id} or an administrator"),
                format!("{role:?}"),
            ))
            .or_status();
        }
        let status = self.replica.cell().status();
        if !status.voters.contains(&id) {
            if !status.learners.contains(&id) {
                self.replica.cell().add_learner(id).await.or_status()?;
            }
            self.replica.cell().promote(id).await.or_status()?;
        }
        Ok(Response::new(self.status_message()))
    }

    async fn renew_authority(
        &self,
        request: Request<v1::RenewAuthorityRequest>,
    ) -> Result<Response<v1::RenewAuthorityResponse>, Status> {
        // For itself and no other: the number is that in its certificate.
        let Role::Replica(replica) = actor(&request)?.role else {
            return Err(Refusal::new(Code::PermissionDenied, "a replica of this cell", "another")).or_status();
        };
        let m = request.into_inner();
        let csr = Csr::parse(&m.issuer_csr).or_status()?;
        let id = request_id(&m.request_id)?;
        let (intermediate, above) = self.replica.renew_of(replica, &csr, m.lifetime_ms, id).await.or_status()?;
        let (above_der, cross_der) = above.told();
        let intermediate_der = intermediate.to_vec();
        Ok(Response::new(v1::RenewAuthorityResponse { intermediate_der, cross_der, above_der }))
    }

    async fn require_attested_replicas(
        &self,
        request: Request<v1::RequireAttestedReplicasRequest>,
    ) -> Result<Response<v1::StatusResponse>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let id = request_id(&m.request_id)?;
        let command = Command::AttestedReplicasOnly(m.required);
        self.replica.propose(actor.client, id, command).await.or_status()?.outcome.or_status()?;
        Ok(Response::new(self.status_message()))
    }

    async fn transfer_leader(
        &self,
        request: Request<v1::TransferLeaderRequest>,
    ) -> Result<Response<v1::StatusResponse>, Status> {
        self.replica.cell().transfer_leader(ReplicaId(request.into_inner().to)).await.or_status()?;
        Ok(Response::new(self.status_message()))
    }

    async fn remove_voter(
        &self,
        request: Request<v1::RemoveVoterRequest>,
    ) -> Result<Response<v1::StatusResponse>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let id = request_id(&m.request_id)?;
        self.replica.cell().remove(ReplicaId(m.replica)).await.or_status()?;
        self.replica
            .propose(actor.client, id, Command::RemoveMember(m.replica))
            .await
            .or_status()?
            .outcome
            .or_status()?;
        Ok(Response::new(self.status_message()))
    }

    async fn snapshot(&self, _: Request<v1::SnapshotRequest>) -> Result<Response<v1::SnapshotResponse>, Status> {
        let (index, digest) = self.replica.cell().snapshot_now().await.or_status()?;
        Ok(Response::new(v1::SnapshotResponse { index: index.0, digest: digest.to_vec() }))
    }

    type BackupStream = ReceiverStream<Result<v1::BackupPiece, Status>>;

    async fn backup(&self, _: Request<v1::BackupRequest>) -> Result<Response<Self::BackupStream>, Status> {
        let busy = || Refusal::new(Code::Busy, "one backup of a replica at a time", "another on its way");
        let one = self.backing_up.clone().try_acquire_owned().map_err(|_| busy()).or_status()?;
        let prepared = self.replica.prepare_backup().await.or_status()?;
        let (pieces, queue) = mpsc::channel(BACKUP_PIECES);
        tokio::spawn(async move {
            prepared.send(&pieces).await;
            drop(one);
        });
        Ok(Response::new(ReceiverStream::new(queue)))
    }
}

fn address(text: &str) -> Result<std::net::SocketAddr, Refusal> {
    text.parse().map_err(|_| Refusal::new(Code::BadRequest, "ip:port", text))
}

/// All replicas, with their part in Raft as this replica sees it.
fn members(s: &State, voters: &[ReplicaId], leader: Option<ReplicaId>, own: (u64, RaftRole)) -> Vec<v1::Member> {
    s.members()
        .map(|(id, m)| {
            let voter = voters.contains(&ReplicaId(id));
            let role = match (leader == Some(ReplicaId(id)), voter) {
                (true, _) => "leader",
                (false, _) if id == own.0 && own.1 == RaftRole::Candidate => "candidate",
                (false, true) => "follower",
                (false, false) => "learner",
            };
            v1::Member {
                id,
                address: m.address.clone(),
                role: role.into(),
                voter,
                authority: m.authority.clone(),
                intermediate_not_after_ms: m.authority_not_after.0,
                attested_ek: s.attested_replica(id).map(|row| row.ek.to_string()).unwrap_or_default(),
                attested_policy: s.attested_replica(id).map(|row| row.policy.to_string()).unwrap_or_default(),
            }
        })
        .collect()
}

fn incarnation((epoch, row): (u64, &IncarnationRow)) -> v1::Incarnation {
    v1::Incarnation {
        epoch,
        cause: match row.cause {
            Cause::Restored => "restored".into(),
            Cause::Recovered => "recovered".into(),
        },
        began_ms: row.began.0,
        from_index: row.from_index.0,
        from_digest: row.from_digest.to_vec(),
        replica: row.replica,
        given_up: row.given_up.clone(),
    }
}

impl Membership {
    fn status_message(&self) -> v1::StatusResponse {
        let (status, fingerprint) = (self.replica.cell().status(), hex::encode(self.replica.fingerprint()));
        self.replica.local(|s| {
            let cell = s.cell();
            v1::StatusResponse {
                trust_domain: self.replica.trust_domain().to_string(),
                fingerprint,
                replica: self.replica.id(),
                leader: status.leader.map(|l| l.0).unwrap_or_default(),
                term: status.term,
                commit_index: status.commit.0,
                applied_index: s.applied().0,
                revision: cell.map(|c| c.revision.0).unwrap_or_default(),
                digest: s.digest().to_vec(),
                members: members(s, &status.voters, status.leader, (self.replica.id(), status.role)),
                root_form: s.root_form(),
                stamp_ms: s.stamp().0,
                epoch: cell.map(|c| c.epoch).unwrap_or_default(),
                membership_version: status.membership_version,
                incarnations: s.incarnations().map(incarnation).collect(),
                attested_replicas_only: s.attested_only(),
                approvers: u32::try_from(s.approvers().count()).unwrap_or(u32::MAX),
            }
        })
    }

    /// Token burnt and place reserved in one entry; then the root signs, then the member is recorded with the key set.
    async fn join(&self, m: v1::ReplicaJoinRequest) -> Result<v1::ReplicaJoinResponse, Refusal> {
        // Whoever cannot sign commits nothing.
        drop(self.replica.active_root().await?);
        let (issuer, tls) = (Csr::parse(&m.issuer_csr)?, Csr::parse(&m.tls_csr)?);
        let record_key: [u8; 32] =
            m.record_key.as_slice().try_into().map_err(|_| {
                Refusal::new(Code::BadRequest, "a record key of 32 bytes", m.record_key.len().to_string())
            })?;
        // Only a usable wrap key may be recorded: every ticket key will be wrapped to it.
        ambit_identity::wrap::wrap(&m.wrap_key, &[0; 32])?;
        let token = token_sha256(&m.token);
        let at = self.replica.local(|s| match s.token(&token).map(|t| t.scope.clone()) {
            Some(TokenScope::Replica(n, at)) if n == m.replica => Some(at),
            Some(_) | None => None,
        });
        if at.as_deref() != Some(m.address.as_str()) {
            return Err(Refusal::new(
                Code::JoinTokenInvalid,
                "the replica and the address that the token is for",
                m.address,
            ));
        }
        // A request of its own each time: a joiner makes new keys for each attempt, and the token says that it was used.
        let client: [u8; 32] = Sha256::digest([b"replica-join".as_slice(), &token].concat()).into();
        let request = crate::replica::random()?;
        let command = Command::AdmitReplica {
            token,
            replica: m.replica,
            issuer_key_hash: issuer.spki_sha256(),
            tls_key_hash: tls.spki_sha256(),
        };
        let admission = self.replica.propose(client, request, command).await?.into_replica()?;
        let not_after = admission.get().lifetime.not_after;
        let authority = ambit_identity::authority::authority_id(&issuer);
        // The root that was active when it was admitted: what is recorded of the intermediate follows from that.
        let root = self.replica.local(|s| s.root_at(admission.get()));
        let root = root.ok_or_else(|| Refusal::new(Code::IssuerUnavailable, "an active root", "none"))?;
        let root = self.replica.open_root(&root).await?;
        let intermediate = root.intermediate(&admission, &issuer)?;
        let member =
            Member { address: m.address, authority, authority_not_after: not_after, wrap_key: m.wrap_key, record_key };
        self.put(m.replica, member).await?;
        let status = self.replica.cell().status();
        let (members, epoch, roots_der) = self.replica.local(|s| {
            let own = (self.replica.id(), status.role);
            let roots = s.bundle_record().map(|bundle| bundle.roots).unwrap_or_default();
            let members = members(s, &status.voters, status.leader, own);
            (members, s.cell().map(|c| c.epoch).unwrap_or_default(), roots.into_iter().map(|root| root.der).collect())
        });
        let (above_der, cross_der) = self.replica.above(&root).told();
        Ok(v1::ReplicaJoinResponse {
            trust_domain: self.replica.trust_domain().to_string(),
            tls_chain_der: Vec::new(),
            intermediate_der: intermediate.to_vec(),
            root_der: root.der().to_vec(),
            members,
            epoch,
            roots_der,
            cross_der,
            above_der,
        })
    }

    /// Records the replica, its record key in the key set. Where that changed meanwhile, from the one in force.
    async fn put(&self, replica: u64, member: Member) -> Result<(), Refusal> {
        let mut tries = 0;
        loop {
            tries += 1;
            let (replaced, keys) = self.next_key_set(member.record_key).await?;
            let put = Command::PutMember(replica, member.clone(), keys);
            let outcome = self.replica.propose_own(Command::OverKeySet(replaced, Box::new(put))).await?.outcome;
            match outcome {
                Err(refusal) if refusal.code == Code::StaleRevision && tries < KEY_SET_TRIES => {}
                outcome => return outcome.map(drop),
            }
        }
    }

    /// The key set with one more key, which does not vote yet, and what it is made from.
    async fn next_key_set(&self, new: [u8; 32]) -> Result<([u8; 32], KeySetRow), Refusal> {
        let listed = key_set::present(&self.replica, Some(new));
        key_set::certify(&self.replica, &self.replica.active_root().await?, listed)
    }
}
