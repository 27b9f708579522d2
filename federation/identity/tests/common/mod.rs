//! A cell's log as far as the tests of what is issued need it.
#![allow(dead_code, reason = "each test file uses its part")]

use ambit_model::appraisal::PcrBank;
use ambit_model::{NodeId, Revision, Stamp, TrustDomain};
use ambit_state::Command;
use ambit_state::command::{Admission, Seen};
use ambit_state::objects::*;

pub(crate) const NOW: Stamp = Stamp(1_800_000_000_000);
pub(crate) const NODE: NodeId = NodeId([7; 32]);

/// A cell of one replica that signs under `authority`, with one cluster.
pub(crate) fn founding(td: TrustDomain, root_der: Vec<u8>, authority: &str, ends: Stamp) -> [Command; 3] {
    let member = Member {
        address: String::new(),
        authority: authority.into(),
        authority_not_after: ends,
        wrap_key: vec![],
        record_key: [0; 32],
    };
    let cluster: ambit_model::ClusterId = "c".parse().unwrap();
    [
        Command::FoundCell(CellRow::founded(td, root_der), 1, member, KeySetRow::default()),
        Command::RegisterCluster(cluster.clone(), vec![], 30_000),
        Command::AllowEk(cluster, vec![NODE]),
    ]
}

/// Lets [`NODE`] in, right after [`founding`].
pub(crate) fn admission(authority: &str, key_hash: [u8; 32]) -> Command {
    Command::AdmitNode(Admission {
        node: NODE,
        cluster: "c".parse().unwrap(),
        nonce: [1; 32],
        deadline: NOW.plus_ms(1000),
        join_token: None,
        endorsement_revision: Revision(3),
        policy_revision: Revision(0),
        ak: AkFacts::default(),
        ek: EkFacts::default(),
        seen: Seen {
            counters: Counters::default(),
            firmware_version: 1,
            ima: ImaPoint::default(),
            pcrs: Some(BootPcrs { bank: PcrBank::Sha256, values: Default::default() }),
            boot_pcrs_sha256: [1; 32],
            boot_log_sha256: [1; 32],
            policy: PolicyRef { name: "any".parse().unwrap(), version: 1 },
            trust: Default::default(),
            evidence_sha256: [0; 32],
            evidence_depth: 0,
        },
        key_hash,
        authority: authority.into(),
        claims: String::new(),
    })
}
