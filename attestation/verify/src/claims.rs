//! The attestation result as EAR-shaped claims (draft-ietf-rats-ear; trustworthiness vector of draft-ietf-rats-ar4si).

use crate::appraisal::{Accepted, ImaAccepted};
use crate::chain::{NodeEvidence, Verified};
use crate::ek::EkClass;
use ambit_model::Stamp;
use serde_json::{Value, json};

/// AR4SI: affirming.
const AFFIRMING: i8 = 2;
/// AR4SI, executables: what was booted is recognised and approved; what runs since is not judged.
const APPROVED_BOOT: i8 = 3;
/// AR4SI: a warning: genuine, but of a kind that policy should not take for hardware; or unsafe settings.
const WARNING: i8 = 32;
/// AR4SI: no claim made.
const NO_CLAIM: i8 = 0;
/// Events listed under one rule: the full list is in the evidence.
const EVENTS_SHOWN_MAX: usize = 16;

/// The trustworthiness vector of an attestation result (AR4SI section 2.3), as far as this verifier judges it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrustVector {
    /// Whether it is the very machine that enrolled.
    pub instance_identity: i8,
    /// What vouches for its TPM.
    pub hardware: i8,
    /// What was booted, and what runs.
    pub executables: i8,
    /// Whether Secure Boot and the command line are as the policy has them.
    pub configuration: i8,
    /// The files that were opened for execution.
    pub file_system: i8,
}

impl TrustVector {
    /// The vector of a machine whose EK is of `class` (none: nobody asked) and which `appraisal` accepts.
    pub fn new(class: Option<EkClass>, appraisal: Option<(&Accepted, &ImaAccepted)>) -> TrustVector {
        let hardware = match class {
            Some(EkClass::Hardware) => AFFIRMING,
            Some(EkClass::Virtual | EkClass::Lab | EkClass::Listed) => WARNING,
            None => NO_CLAIM,
        };
        let mut out = TrustVector {
            instance_identity: if class.is_some() { AFFIRMING } else { NO_CLAIM },
            hardware,
            executables: NO_CLAIM,
            configuration: NO_CLAIM,
            file_system: NO_CLAIM,
        };
        if let Some((boot, ima)) = appraisal {
            out.executables = if ima.is_judged { AFFIRMING } else { APPROVED_BOOT };
            out.configuration = if boot.policy.policy().secure_boot_any { WARNING } else { AFFIRMING };
            out.file_system = match (ima.is_judged, ima.excepted) {
                (false, _) => NO_CLAIM,
                (true, 0) => AFFIRMING,
                (true, _) => WARNING,
            };
        }
        out
    }

    /// The tier of the worst claim: `affirming`, `warning`, `contraindicated`, or `none` where nothing is claimed.
    pub fn status(&self) -> &'static str {
        let claims = [self.instance_identity, self.hardware, self.executables, self.configuration, self.file_system];
        match claims.into_iter().max().unwrap_or(NO_CLAIM) {
            96.. => "contraindicated",
            32..=95 => "warning",
            2..=31 => "affirming",
            _ => "none",
        }
    }

    /// As in an EAR.
    pub fn to_json(&self) -> Value {
        json!({
            "instance-identity": self.instance_identity,
            "hardware": self.hardware,
            "executables": self.executables,
            "configuration": self.configuration,
            "file-system": self.file_system,
        })
    }
}

impl Verified<NodeEvidence> {
    /// The claims as JSON text, with the policy that accepted the node.
    pub fn claims_json(&self, at: Stamp) -> String {
        self.claims(at, Some((&self.appraised.boot, &self.appraised.ima)))
    }

    fn claims(&self, at: Stamp, appraisal: Option<(&Accepted, &ImaAccepted)>) -> String {
        let vector = TrustVector::new(Some(self.ek_class), appraisal);
        let pcrs: serde_json::Map<_, _> =
            self.pcrs.iter().map(|(n, v)| (n.to_string(), hex::encode(v).into())).collect();
        let mut node = json!({
            "ear.status": vector.status(),
            "ear.trustworthiness-vector": vector.to_json(),
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
                "entries": self.appraised.checkpoint.entries,
                "violations": self.appraised.violations,
                "extended_as": self.appraised.checkpoint.form.as_str(),
            },
            "ambit.evidence-sha256": hex::encode(self.evidence_sha256),
            "ambit.endorsement-revision": self.endorsement_revision.0,
            "ambit.policy-revision": self.policy_revision.0,
        });
        if let Some((boot, ima)) = appraisal
            && let Some(claims) = node.as_object_mut()
        {
            let policy = boot.policy.reference();
            claims.insert("ear.appraisal-policy-id".into(), policy.name.clone().into());
            claims.insert("ambit.policy".into(), policy_json(&policy));
            claims.insert("ambit.rules".into(), rules_json(boot));
            let files = json!({ "judged": ima.is_judged, "listed": ima.listed, "excepted": ima.excepted });
            claims.insert("ambit.files".into(), files);
        }
        json!({
            "eat_profile": "tag:github.com,2023:veraison/ear",
            "iat": at.0 / 1000,
            "ear.verifier-id": { "developer": "ambit", "build": env!("CARGO_PKG_VERSION") },
            "submods": { "node": node },
        })
        .to_string()
    }
}

/// Name, version and SHA-256 of a policy.
pub fn policy_json(policy: &crate::appraisal::PolicyRef) -> Value {
    json!({ "name": policy.name, "version": policy.version, "sha256": hex::encode(policy.sha256) })
}

/// Which rule consumed which events, each list kept short.
pub fn rules_json(boot: &Accepted) -> Value {
    let rules = boot.consumed.iter().map(|c| {
        let shown = c.events.get(..EVENTS_SHOWN_MAX).unwrap_or(&c.events);
        (c.rule.clone(), json!(shown))
    });
    Value::Object(rules.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_is_that_of_the_worst_claim() {
        let sound = TrustVector { instance_identity: 2, hardware: 2, executables: 3, configuration: 2, file_system: 0 };
        assert_eq!(sound.status(), "affirming");
        assert_eq!(TrustVector { configuration: 32, ..sound }.status(), "warning");
        assert_eq!(TrustVector { executables: 96, hardware: 32, ..sound }.status(), "contraindicated");
        assert_eq!(TrustVector::new(None, None).status(), "none");
        assert_eq!(TrustVector::new(Some(EkClass::Lab), None).status(), "warning");
        assert_eq!(TrustVector::new(Some(EkClass::Hardware), None).status(), "affirming");
    }
}
