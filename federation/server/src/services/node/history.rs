//! Why a node was trusted, or not, at an instant; and what is claimed of it now.

use super::Nodes;
use ambit_model::{Code, NodeId, Refusal, Stamp};
use ambit_proto::v1;
use ambit_state::State;
use ambit_state::objects::VerdictRow;

impl Nodes {
    /// The stretch of verdicts that `at_ms` (0: now) falls into.
    pub(super) async fn at(&self, id: &str, at_ms: u64) -> Result<v1::AttestationAtResponse, Refusal> {
        let id: NodeId = id.parse()?;
        let at = if at_ms == 0 { self.replica.now() } else { Stamp(at_ms) };
        let mut answer = self.replica.read(|s| answer(s, &id, at)).await??;
        let mut sha256 = [0u8; 32];
        if hex::decode_to_slice(&answer.evidence_sha256, &mut sha256).is_ok() && sha256 != [0; 32] {
            answer.evidence_kept = self.replica.find_blob(&sha256).await.is_ok();
        }
        Ok(answer)
    }

    /// The signed result of the node's present standing, as of a read that every acknowledged write came before.
    pub(super) async fn result(&self, id: &str) -> Result<v1::AttestationResultResponse, Refusal> {
        let id: NodeId = id.parse()?;
        let read = |s: &State| {
            let root_der = s.cell().map(|c| c.root_der.clone()).unwrap_or_default();
            Ok((s.node_result(&id)?, s.key_set().cloned().unwrap_or_default(), root_der))
        };
        let (result, keys, root_der) = self.replica.read(read).await??;
        let jws = self.replica.record().sign_result(&result)?;
        let (key_set, key_set_signature) = (keys.statement, keys.signature);
        Ok(v1::AttestationResultResponse { jws, key_set, key_set_signature, root_der })
    }
}

fn answer(s: &State, id: &NodeId, at: Stamp) -> Result<v1::AttestationAtResponse, Refusal> {
    let row = s.node(id).ok_or_else(|| Refusal::new(Code::NotFound, "a node of this cell", id.to_string()))?;
    let stretches: Vec<&VerdictRow> = s.verdicts(id).collect();
    let Some(stretch) = stretches.iter().rev().find(|v| v.since <= at) else {
        let first = stretches.first().map(|v| v.since.0).unwrap_or_default();
        return Err(Refusal::new(Code::NotFound, format!("an instant after {first} ms"), at.0.to_string()));
    };
    let present = stretch.until == Stamp(0);
    let standing = s.standing(id).filter(|_| present && stretch.outcome.is_ok());
    let (state, code, policy) = match &stretch.outcome {
        Ok(policy) => ("trusted", String::new(), Some(policy)),
        Err(code) => ("untrusted", code.to_string(), None),
    };
    let until = standing.map_or(stretch.until, |now| now.verdict);
    Ok(v1::AttestationAtResponse {
        node: id.to_string(),
        state: state.to_owned(),
        code,
        policy: policy.map(|p| p.name.to_string()).unwrap_or_default(),
        policy_version: policy.map(|p| p.version).unwrap_or_default(),
        since_ms: stretch.since.0,
        until_ms: until.0,
        verdicts: standing.map_or(stretch.rounds, |now| now.rounds),
        evidence_sha256: hex::encode(stretch.evidence_sha256),
        evidence_kept: false,
        attestation_result_json: if present { row.claims.clone() } else { String::new() },
        diverged: stretch.diverged.clone(),
        expected: stretch.expected.clone(),
        found: stretch.found.clone(),
    })
}
