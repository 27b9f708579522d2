//! The attestation result as EAR-shaped claims (draft-ietf-rats-ear; trustworthiness vector of draft-ietf-rats-ar4si).

use crate::appraisal::{Accepted, ImaAccepted};
use crate::chain::{NodeEvidence, Verified};
use crate::ek::EkClass;
use ambit_model::trust::{AFFIRMING, NO_CLAIM, WARNING};
use ambit_model::{Stamp, TrustVector};
use serde_json::{Value, json};

/// AR4SI, executables: what was booted is recognised and approved; what runs since is not judged.
const APPROVED_BOOT: i8 = 3;
/// Events listed under one rule: the full list is in the evidence.
const EVENTS_SHOWN_MAX: usize = 16;

/// The vector of a machine whose EK is of `class` (none: nobody asked) and which `appraisal` accepts.
pub fn trust_vector(class: Option<EkClass>, appraisal: Option<(&Accepted, &ImaAccepted)>) -> TrustVector {
    let hardware = match class {
        Some(EkClass::Hardware) => AFFIRMING,
        Some(EkClass::Virtual | EkClass::Lab | EkClass::Listed) => WARNING,
        None => NO_CLAIM,
    };
    let instance_identity = if class.is_some() { AFFIRMING } else { NO_CLAIM };
    let mut out = TrustVector { instance_identity, hardware, ..TrustVector::default() };
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

impl Verified<NodeEvidence> {
    /// The trustworthiness vector that this evidence gives.
    pub fn trust_vector(&self) -> TrustVector {
        trust_vector(Some(self.ek_class), Some((&self.appraised.boot, &self.appraised.ima)))
    }

    /// The claims as JSON text, with the policy that accepted the node.
    pub fn claims_json(&self, at: Stamp) -> String {
        self.claims(at, Some((&self.appraised.boot, &self.appraised.ima)))
    }

    fn claims(&self, at: Stamp, appraisal: Option<(&Accepted, &ImaAccepted)>) -> String {
        let vector = trust_vector(Some(self.ek_class), appraisal);
        let pcrs: serde_json::Map<_, _> =
            self.pcrs.iter().map(|(n, v)| (n.to_string(), hex::encode(v).into())).collect();
        let mut node = json!({
            "ear.status": vector.status(),
            "ear.trustworthiness-vector": vector,
            "ambit.node": self.node.to_string(),
            "ambit.cluster": self.cluster.as_str(),
            "ambit.ek-class": self.ek_class.as_str(),
            "ambit.ak-name": hex::encode(&self.ak_name),
            "ambit.node-key": if self.svid_key_in_tpm { "tpm" } else { "memory" },
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
    fn what_nobody_asked_is_not_claimed() {
        for (class, status) in [(None, "none"), (Some(EkClass::Lab), "warning"), (Some(EkClass::Hardware), "affirming")]
        {
            assert_eq!(trust_vector(class, None).status(), status, "{class:?}");
        }
        let names = json!(trust_vector(None, None));
        let expected = ["configuration", "executables", "file-system", "hardware", "instance-identity"];
        assert_eq!(names.as_object().unwrap().keys().collect::<Vec<_>>(), expected, "as AR4SI writes them");
    }
}
