//! Cell to cell: registration by strangers with a token, and pulls by active peers.

use super::{OrStatus, request_id};
use crate::authorise::{Role, actor, role_of};
use crate::replica::audit::hashes;
use crate::replica::budget::Budget;
use crate::replica::pull::{self, Answer, Page};
use crate::replica::{Held, Replica, peering};
use ambit_audit::Note;
use ambit_identity::{CoSignature, Csr};
use ambit_model::{Code, Refusal, TrustDomain};
use ambit_proto::v1;
use ambit_state::audit::{Turn, WitnessAsk};
use ambit_state::objects::{KeySetRow, PeerRow, TokenScope};
use ambit_state::{Command, State};
use sha2::{Digest, Sha256};
use tonic::{Request, Response, Status};

/// Records in one answer; the importer refuses more.
const PULL_MAX: u32 = 1_000;
/// A trust domain has two roots while it rotates, and at most eight keys of JWT-SVIDs.
const HELD_MAX: usize = 8;
/// A kid is 32 hexadecimal digits.
const KID_BYTES_MAX: usize = 128;

pub(crate) struct PeerLink {
    replica: Replica,
    budget: Budget,
}

#[allow(non_snake_case, reason = "reads like the other services where they are listed")]
pub(crate) fn PeerLink(replica: Replica) -> PeerLink {
    PeerLink { replica, budget: Budget::default() }
}

#[tonic::async_trait]
impl v1::peer_link_server::PeerLink for PeerLink {
    async fn hello(&self, request: Request<v1::HelloRequest>) -> Result<Response<v1::HelloResponse>, Status> {
        self.budget.take(actor(&request)?.remote).or_status()?;
        peering::hello(&self.replica, request.into_inner()).await.or_status().map(Response::new)
    }

    async fn prove(&self, request: Request<v1::ProveRequest>) -> Result<Response<v1::ProveResponse>, Status> {
        self.budget.take(actor(&request)?.remote).or_status()?;
        let m = request.into_inner();
        // The session is unique, so it names the request: a retry has its effect once.
        let session: [u8; 32] = Sha256::digest(&m.session).into();
        let mut request_id = [0u8; 16];
        request_id.copy_from_slice(&session[..16]);
        let (td, row, token) = peering::prove(&self.replica, m).await.or_status()?;
        // Judged again at apply; judged here first, so that a stranger's bytes do not reach the log.
        if !self.replica.local(|s| opens(s, &token, &td, &row)) {
            let known = self.replica.read(|s| opens(s, &token, &td, &row)).await.or_status()?;
            if !known {
                let expected = "a cluster token of this trust domain and fingerprint";
                return Err(Refusal::new(Code::ClusterTokenInvalid, expected, "another")).or_status();
            }
        }
        let client: [u8; 32] = Sha256::digest(format!("peering {td}")).into();
        let command = Command::PutPeer(td, row, Some(token));
        self.replica.propose(client, request_id, command).await.or_status()?.outcome.or_status()?;
        Ok(Response::new(v1::ProveResponse { state: "pending".into() }))
    }

    async fn pull(&self, request: Request<v1::PullRequest>) -> Result<Response<v1::PullResponse>, Status> {
        let actor = actor(&request)?;
        let m = request.into_inner();
        let long = m.kids_held.iter().any(|kid| kid.len() > KID_BYTES_MAX);
        if long || m.roots_held.len() > HELD_MAX || m.kids_held.len() > HELD_MAX {
            let found = format!("{} and {}", m.roots_held.len(), m.kids_held.len());
            return Err(Refusal::new(Code::BadRequest, format!("at most {HELD_MAX} roots and keys"), found))
                .or_status();
        }
        let nonce: [u8; 16] = m
            .nonce
            .as_slice()
            .try_into()
            .map_err(|_| Refusal::new(Code::BadRequest, "a nonce of 16 bytes", m.nonce.len().to_string()))
            .or_status()?;
        let held: Vec<[u8; 32]> = m.roots_held.iter().filter_map(|id| id.as_slice().try_into().ok()).collect();
        if let Role::Peer(td) = actor.role {
            self.replica.peer_holds(td, Held { roots: held.clone(), kids: m.kids_held });
        }
        // A replica that lags would show a head that goes back; it answers `unavailable` instead.
        self.replica.cell().read_barrier().await.or_status()?;
        self.wait_for_news(m.after_seq).await;
        let read = || {
            self.replica.local(|s| {
                // It may have waited while it was suspended, or its SVID denied.
                match role_of(actor.svid.as_ref(), self.replica.trust_domain(), || s)? {
                    Role::Peer(_) => Page::read(s, m.after_seq, nonce, m.limit.clamp(1, PULL_MAX), &held),
                    role => Err(Refusal::new(Code::PeerNotActive, "an active peer", format!("{role:?}"))),
                }
            })
        };
        self.replica.cosigned(read).await.or_status().map(|answer| Response::new(to_wire(answer)))
    }

    async fn cosign_audit(
        &self,
        request: Request<v1::CosignAuditRequest>,
    ) -> Result<Response<v1::CosignAuditResponse>, Status> {
        let actor = actor(&request)?;
        let Role::Peer(td) = actor.role else {
            return Err(Refusal::new(Code::PeerNotActive, "an active peer", actor.name)).or_status();
        };
        let ask = cosign_ask(&self.replica, td.clone(), request.into_inner()).or_status()?;
        // Committed before it is signed: whichever replica is asked next knows it.
        self.replica.cell().read_barrier().await.or_status()?;
        let (epoch, size, root) = (ask.epoch, ask.size, ask.root);
        let wanted = |size| v1::CosignAuditResponse { size, line: String::new(), key_set: None };
        match self.replica.local(|s| s.witness_turn(&ask)).or_status()? {
            Turn::From(size) => return Ok(Response::new(wanted(size))),
            Turn::Known => {}
            Turn::Commit => {
                self.replica.propose_own(Command::Witness(Box::new(ask))).await.or_status()?.outcome.or_status()?;
            }
        }
        let (head, keys) =
            self.replica.local(|s| (s.witnessed_head(&td, epoch), s.key_set().cloned().unwrap_or_default()));
        let head = head.filter(|head| (head.get().size, head.get().root) == (size, root));
        let overtaken = || Refusal::new(Code::Unavailable, "a head that is still the last", "one overtaken");
        let head = head.ok_or_else(overtaken).or_status()?;
        let line = self.replica.record().cosign(self.replica.trust_domain(), &head, self.replica.now()).text();
        let key_set = Some(v1::KeySet { statement: keys.statement, signature: keys.signature });
        Ok(Response::new(v1::CosignAuditResponse { size, line, key_set }))
    }

    async fn renew_lease(
        &self,
        request: Request<v1::RenewLeaseRequest>,
    ) -> Result<Response<v1::RenewLeaseResponse>, Status> {
        let (actor, m) = (actor(&request)?, request.into_inner());
        let Role::Peer(home) = actor.role else {
            return Err(Refusal::new(Code::PeerNotActive, "an active peer", actor.name)).or_status();
        };
        // Of a state as new as the question: a replica that lags may not know that the lease is renewed no more.
        let renews = self.replica.read(|s| s.renews(&home, m.epoch)).await.or_status()?;
        let lease_ms = renews.or_status()?;
        Ok(Response::new(v1::RenewLeaseResponse { nonce: m.nonce, epoch: m.epoch, lease_ms }))
    }

    async fn certify_standby(
        &self,
        request: Request<v1::CertifyStandbyRequest>,
    ) -> Result<Response<v1::CertifyStandbyResponse>, Status> {
        let (actor, m) = (actor(&request)?, request.into_inner());
        let Role::Peer(holder) = actor.role else {
            return Err(Refusal::new(Code::PeerNotActive, "an active peer", actor.name)).or_status();
        };
        let csr = Csr::parse(&m.csr).or_status()?;
        let id = request_id(&m.request_id)?;
        let signed = self.replica.certify_standby(actor.client, id, (holder, m.replica), &csr).await.or_status()?;
        let (intermediate, above) = signed;
        let above_der = above.all().into_iter().map(|der| der.to_vec()).collect();
        Ok(Response::new(v1::CertifyStandbyResponse { intermediate_der: intermediate.to_vec(), above_der }))
    }
}

/// What a peer shows of its audit log, once its signature was verified.
fn cosign_ask(replica: &Replica, td: TrustDomain, m: v1::CosignAuditRequest) -> Result<WitnessAsk, Refusal> {
    let set = m.key_set.unwrap_or_default();
    let set = KeySetRow { statement: set.statement, signature: set.signature };
    let ask = replica.local(|s| pull::Ask::new(s, td.clone(), [0; 16], 1));
    let ask = ask.ok_or_else(|| Refusal::new(Code::PeerNotActive, "an active peer", td.as_str()))?;
    let note = Note::parse(&m.checkpoint)?;
    let epoch = ask.key_set(&set)?.verify_checkpoint(&note)?;
    let (size, root, proof) = (note.checkpoint.size, note.checkpoint.root, hashes(&m.proof)?);
    Ok(WitnessAsk { peer: td, epoch, old: m.old_size, size, root, proof })
}

/// Whether the token, used or not, is for this cell: "used" is told by apply.
fn opens(s: &State, token: &[u8; 32], td: &TrustDomain, row: &PeerRow) -> bool {
    let scope = TokenScope::Peer(td.clone(), row.fingerprint);
    s.token(token).is_some_and(|t| t.scope == scope && t.expires >= s.stamp())
}

impl PeerLink {
    async fn wait_for_news(&self, after: u64) {
        let mut applied = self.replica.cell().watch_applied();
        let news = async {
            while !self.replica.local(|s| pull::has_news(s, after)) {
                if applied.changed().await.is_err() {
                    return;
                }
            }
        };
        // Nothing new is an answer too: the head says so, freshly stamped.
        let _ = tokio::time::timeout(pull::WAIT, news).await;
    }
}

fn to_wire(answer: Answer) -> v1::PullResponse {
    let signed = |one: CoSignature| v1::CoSignature { key_index: one.key_index, signature: one.signature };
    v1::PullResponse {
        records: answer.records,
        head: answer.head,
        key_index: answer.signature.key_index,
        signature: answer.signature.signature,
        key_set: Some(v1::KeySet { statement: answer.key_set.statement, signature: answer.key_set.signature }),
        claim: answer.claim,
        cosignatures: answer.signatures.into_iter().map(signed).collect(),
    }
}

/// Asked by other replicas of this cell.
pub(crate) struct CoSigner(pub(crate) Replica);

#[tonic::async_trait]
impl v1::co_signer_server::CoSigner for CoSigner {
    async fn co_sign(&self, request: Request<v1::CoSignRequest>) -> Result<Response<v1::CoSignResponse>, Status> {
        let claim = request.into_inner().claim;
        let read = match postcard::take_from_bytes(&claim) {
            Ok((claim, [])) => Ok(claim),
            Ok(_) | Err(_) => Err(Refusal::new(Code::BadRequest, "a claim", format!("{} bytes", claim.len()))),
        };
        self.0.cosign(&read.or_status()?).await.or_status().map(Response::new)
    }
}
