//! What the root's form `sealed` rests on: replicas attested, with wrap keys that their TPMs certified, and recovery shares.

use crate::authorities::{RootId, RootRow};
use crate::objects::{Counters, DenialRow, Member, PolicyRef};
use crate::state::State;
use ambit_model::bundle::RootState;
use ambit_model::{ClusterId, NodeId, ObjectName, Refusal, Revision, Stamp};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The cluster whose endorsements are those of replicas, and the appraisal policy that judges them. A machine in it is never
/// admitted as a node, nor one outside of it attested as a replica.
pub const REPLICAS: &str = "replica";

/// The root's form once its key is wrapped to TPMs only.
pub const SEALED: &str = "sealed";

/// [`REPLICAS`] as the cluster that it is.
///
/// # Errors
/// None that a build that passes its tests leads to.
pub fn replicas_cluster() -> Result<ClusterId, Refusal> {
    REPLICAS.parse()
}

/// What a replica's TPM proved in the exchange of attestation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttestedReplica {
    /// SHA-256 of the EK.
    pub ek: NodeId,
    /// The AK's name, by which the TPM certified the wrap key.
    pub ak_name: Vec<u8>,
    /// The point of the wrap key, which is in that TPM.
    pub wrap_key: Vec<u8>,
    /// SHA-256 of SPKI of the TLS key, which the quote is over.
    pub tls_key_hash: [u8; 32],
    /// SHA-256 of the token with which it is to join; none for a replica of the cell.
    pub token: Option<[u8; 32]>,
    /// The policies that judged it.
    pub policy_revision: Revision,
    /// SHA-256 of the EK root; none for an EK that the allow-list alone vouches for.
    pub ek_root_sha256: Option<[u8; 32]>,
    /// hardware, virtual or lab.
    pub ek_class: String,
    /// Vendor.
    pub manufacturer: String,
    /// Model.
    pub model: String,
    /// As quoted.
    pub firmware_version: u64,
    /// As quoted: a later quote of this EK goes on from here.
    pub counters: Counters,
    /// What accepted it.
    pub policy: PolicyRef,
    /// SHA-256 of the evidence's body.
    pub evidence_sha256: [u8; 32],
    /// When.
    pub stamp: Stamp,
    /// Whether it stands. Bad evidence leaves the row, as a copy of the TPM must not get behind its counters.
    pub stands: bool,
}

/// A good verdict on a replica, made by the server from a proof of the verifier only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaVerdict {
    /// Which replica.
    pub replica: u64,
    /// The nonce to consume.
    pub nonce: [u8; 32],
    /// Until when it is remembered.
    pub deadline: Stamp,
    /// Judged under.
    pub endorsement_revision: Revision,
    /// What was proved; the stamp is set here.
    pub attested: AttestedReplica,
}

/// Bad evidence of a replica, after a good HMAC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaDenial {
    /// The nonce to consume.
    pub nonce: [u8; 32],
    /// Until when it is remembered.
    pub deadline: Stamp,
    /// The reason, and the TPM.
    pub row: DenialRow,
    /// Which replica showed it, where its certificate said so.
    pub replica: Option<u64>,
    /// Judged under.
    pub endorsement_revision: Revision,
    /// Judged under.
    pub policy_revision: Revision,
}

/// Recovery shares that were made of a root's key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharesRow {
    /// How many open the root.
    pub threshold: u8,
    /// To whom they went.
    pub holders: Vec<ObjectName>,
    /// When.
    pub made: Stamp,
}

/// What the cell has settled about its replicas and its root.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealingRow {
    /// No replica joins that is not attested.
    pub attested_only: bool,
    /// By root.
    pub shares: BTreeMap<RootId, SharesRow>,
}

/// Everything that is wrapped to replicas, wrapped anew to the attested keys of all of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seal {
    /// Replica -> the wrap key that is meant.
    pub to: BTreeMap<u64, Vec<u8>>,
    /// Root -> its key, for each replica.
    pub roots: BTreeMap<RootId, BTreeMap<u64, Vec<u8>>>,
    /// JWT authority, by kid -> its key, for each replica.
    pub jwt: BTreeMap<String, BTreeMap<u64, Vec<u8>>>,
}

impl State {
    /// What a replica's TPM proved last, as long as it stands.
    pub fn attested_replica(&self, id: u64) -> Option<&AttestedReplica> {
        self.attested_replicas.get(&id).filter(|row| row.stands)
    }
    /// Whether a replica ever was attested: before that, a replica of the former release may have to read the log.
    pub fn has_attested(&self) -> bool {
        self.attested_replicas.len() > 0 || self.is_sealed()
    }
    /// By the TPM: the replica whose it is, and what it proved last, whether or not that stands.
    pub fn attested_ek(&self, ek: &NodeId) -> Option<(u64, &AttestedReplica)> {
        self.attested_replicas.iter().find(|(_, row)| row.ek == *ek).map(|(id, row)| (*id, row))
    }
    /// Whether what is wrapped to this replica goes to a key that its attested TPM certified.
    pub fn wraps_to_tpm(&self, id: u64, member: &Member) -> bool {
        self.attested_replica(id).is_some_and(|row| row.wrap_key == member.wrap_key)
    }
    /// To whom secrets of the cell are wrapped, with the keys: all replicas, or, where the root is sealed, those with such a key.
    pub fn wrap_keys(&self) -> BTreeMap<u64, Vec<u8>> {
        let sealed = self.is_sealed();
        let wrapped_to = self.members().filter(|(id, member)| !sealed || self.wraps_to_tpm(*id, member));
        wrapped_to.map(|(id, member)| (id, member.wrap_key.clone())).collect()
    }
    /// Replicas without such a key.
    pub fn unattested(&self) -> Vec<u64> {
        self.members().filter(|(id, member)| !self.wraps_to_tpm(*id, member)).map(|(id, _)| id).collect()
    }
    /// What the cell has settled.
    pub fn sealing(&self) -> SealingRow {
        self.sealing.get(&0).cloned().unwrap_or_default()
    }
    /// Whether only attested replicas join: because an operator says so, or because the root is sealed.
    pub fn attested_only(&self) -> bool {
        self.is_sealed() || self.sealing.get(&0).is_some_and(|row| row.attested_only)
    }
    /// Whether the root's key was wrapped to TPMs only.
    pub fn is_sealed(&self) -> bool {
        self.cell().is_some_and(|cell| cell.root_form == SEALED)
    }
    /// What keeps the root from being sealed, in words.
    pub fn seal_lacks(&self) -> Vec<String> {
        let mut lacks: Vec<String> =
            self.unattested().iter().map(|id| format!("replica {id} has no attested wrap key in a TPM")).collect();
        let unshared = self.unshared();
        let approvers = self.approvers().count();
        if !unshared.is_empty() && approvers < 2 {
            lacks.push(format!("recovery shares take two approvers, and there are {approvers} (ambit approver add)"));
        }
        if self.external_request().is_some() && !self.is_sealed() {
            lacks.push(
                "a key that waits for its external certificate (ambit trust external import, or withdraw)".into(),
            );
        }
        let unshared = unshared.iter().map(hex::encode);
        lacks.extend(unshared.map(|id| format!("root {id} has no recovery shares (ambit trust shares)")));
        lacks
    }
    /// Roots that nobody could open once all TPMs are lost.
    fn unshared(&self) -> Vec<RootId> {
        let shares = self.sealing().shares;
        let lacking = |id: &RootId, row: &RootRow| row.state != RootState::Revoked && !shares.contains_key(id);
        self.roots().into_iter().filter(|(id, row)| lacking(id, row)).map(|(id, _)| id).collect()
    }
    /// The root's form as every status shows it: `sealed` only where each replica's wrap key is in an attested TPM, and people
    /// have shares of each root, that of a rotation too.
    pub fn root_form(&self) -> String {
        let form = self.cell().map(|cell| cell.root_form.clone()).unwrap_or_default();
        let external = self.active_root().is_some_and(|(id, _)| self.external(&id).is_some());
        let form = if external { format!("external, its authority {form}") } else { form };
        let sealed = self.is_sealed();
        let lacking: Vec<String> = self.unattested().iter().map(u64::to_string).collect();
        match (sealed, lacking.is_empty()) {
            (true, true) => match self.unshared().first() {
                None => form,
                Some(id) => format!("{form} (root {} has no recovery shares: ambit trust shares)", hex::encode(id)),
            },
            (_, false) => format!("{form} (unsealed: no attested TPM key at replica {})", lacking.join(", ")),
            (false, true) => format!("{form} (unsealed: ambit trust seal)"),
        }
    }
}
