//! The attestation result as EAR-shaped claims (draft-ietf-rats-ear; trustworthiness vector of draft-ietf-rats-ar4si).

use crate::chain::{NodeEvidence, Verified};
use crate::ek::EkClass;
use ambit_model::Stamp;
use serde_json::json;

/// AR4SI: affirming.
const AFFIRMING: i8 = 2;
/// AR4SI: a warning: genuine, but of a kind that policy should not take for hardware.
const WARNING: i8 = 32;
/// AR4SI: no claim made.
const NO_CLAIM: i8 = 0;

impl Verified<NodeEvidence> {
    /// The claims as JSON text. `executables` and `configuration` claim nothing until a policy appraises the logs.
    pub fn claims_json(&self, at: Stamp) -> String {
        let hardware = match self.ek_class {
            EkClass::Hardware => AFFIRMING,
            EkClass::Virtual | EkClass::Lab | EkClass::Listed => WARNING,
        };
        let status = if hardware == AFFIRMING { "affirming" } else { "warning" };
        let pcrs: serde_json::Map<_, _> =
            self.pcrs.iter().map(|(n, v)| (n.to_string(), hex::encode(v).into())).collect();
        json!({
            "eat_profile": "tag:github.com,2023:veraison/ear",
            "iat": at.0 / 1000,
            "ear.verifier-id": { "developer": "ambit", "build": env!("CARGO_PKG_VERSION") },
            "submods": { "node": {
                "ear.status": status,
                "ear.trustworthiness-vector": {
                    "instance-identity": AFFIRMING,
                    "hardware": hardware,
                    "executables": NO_CLAIM,
                    "configuration": NO_CLAIM,
                },
                "ambit.node": self.node.to_string(),
                "ambit.cluster": self.cluster.as_str(),
                "ambit.ek-class": self.ek_class.as_str(),
                "ambit.ak-name": hex::encode(&self.ak_name),
                "ambit.bank": self.bank.as_str(),
                "ambit.pcrs": pcrs,
                "ambit.counters": {
                    "reset": self.counters.reset,
                    "restart": self.counters.restart,
                    "clock_ms": self.counters.clock_ms,
                    "safe": self.counters.safe,
                },
                "ambit.firmware-version": format!("{:#018x}", self.firmware_version),
                "ambit.boot": {
                    "events": self.boot.events,
                    "secure_boot": self.boot.secure_boot,
                    "kernel_cmdline": self.boot.kernel_cmdline,
                },
                "ambit.ima": {
                    "entries": self.appraised.ima.entries,
                    "violations": self.appraised.ima_violations,
                    "extended_as": self.appraised.ima.form.as_str(),
                },
                "ambit.evidence-sha256": hex::encode(self.evidence_sha256),
                "ambit.endorsement-revision": self.endorsement_revision.0,
                "ambit.policy-revision": self.policy_revision.0,
            }},
        })
        .to_string()
    }
}
