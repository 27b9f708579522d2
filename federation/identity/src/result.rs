//! Attestation results: what the cell claims of a node now, as an EAR (draft-ietf-rats-ear) in a JWS (RFC 7515, EdDSA
//! as in RFC 8037), and how anyone checks it without a cell.
//!
//! A JWS signing input begins with `eyJ`, every other message that a record key signs with `ambit/`: none is the other.

use crate::json::once;
use crate::keys::internal;
use crate::record::{KeySet, RecordKey};
use ambit_model::trust::{CONTRAINDICATED, TrustVector, UNPROVED};
use ambit_model::{Code, Refusal, TrustDomain};
use ambit_state::Committed;
use ambit_state::committed::NodeResult;
use ambit_state::objects::NodeState;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

/// The profile that the claims keep to.
const PROFILE: &str = "tag:github.com,2023:veraison/ear";
/// Media type `application/eat+jwt` (RFC 9782), its prefix left out as RFC 7515 section 4.1.9 has it.
const TYP: &str = "eat+jwt";
/// Bytes of a result: claims of one node, with what its enrolment said of its boot.
pub const RESULT_BYTES_MAX: usize = 64 * 1024;
const FORMAT: &str = "ambit-attestation-result/1";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    alg: String,
    typ: String,
    kid: String,
}

/// SHA-256 of the key as a JWK (RFC 7638, with the members that RFC 8037 section 2 requires), base64url.
pub fn thumbprint(key: &[u8; 32]) -> String {
    let jwk = format!(r#"{{"crv":"Ed25519","kty":"OKP","x":"{}"}}"#, URL_SAFE_NO_PAD.encode(key));
    URL_SAFE_NO_PAD.encode(Sha256::digest(jwk))
}

impl RecordKey {
    /// Signs what is committed of a node as its attestation result: a compact JWS.
    pub fn sign_result(&self, result: &Committed<NodeResult>) -> Result<String, Refusal> {
        let header = Header { alg: "EdDSA".into(), typ: TYP.into(), kid: thumbprint(&self.public()) };
        let header = serde_json::to_vec(&header).map_err(|e| internal("a header", e))?;
        let claims = claims(result.get()).to_string();
        let input = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
        let signature = self.sign(input.as_bytes());
        Ok(format!("{input}.{}", URL_SAFE_NO_PAD.encode(signature)))
    }
}

/// The claims of a node's present standing. What its enrolment said of the boot is said again only while the machine
/// still shows that boot.
fn claims(r: &NodeResult) -> Value {
    let (row, standing) = (&r.row, &r.standing);
    let (vector, status) = trust(r);
    let hexes = r.boot.values.iter().map(|(n, v)| (n.to_string(), Value::from(hex::encode(v))));
    let pcrs: Map<String, Value> = hexes.collect();
    let mut node = json!({
        "ear.status": status,
        "ear.trustworthiness-vector": vector,
        "ear.appraisal-policy-id": standing.policy.to_string(),
        "ambit.node": r.node.to_string(),
        "ambit.cluster": row.cluster.as_str(),
        "ambit.state": state(r),
        "ambit.generation": row.generation.0,
        "ambit.policy": {
            "name": standing.policy.name.as_str(),
            "version": standing.policy.version,
            "sha256": r.policy_sha256.map(hex::encode),
        },
        "ambit.last-verdict-ms": standing.verdict.0,
        "ambit.verdicts": standing.rounds,
        "ambit.ek-class": row.ek.class,
        "ambit.ak-name": hex::encode(&row.ak.name),
        "ambit.firmware-version": format!("{:#018x}", row.ek.firmware_version),
        "ambit.bank": r.boot.bank.as_str(),
        "ambit.pcrs": pcrs,
        "ambit.counters": {
            "reset": standing.counters.resets,
            "restart": standing.counters.restarts,
            "clock_ms": standing.counters.clock,
        },
        "ambit.ima": { "entries": standing.ima.entries, "extended_as": standing.ima.form },
        "ambit.evidence-sha256": hex::encode(standing.evidence_sha256),
    });
    if let Some(node) = node.as_object_mut() {
        let enrolled: Value = serde_json::from_str(&row.claims).unwrap_or_default();
        if let Some(then) = enrolled.pointer("/submods/node") {
            // Of the leaf in use, which the last enrolment certified.
            node.extend(then.get("ambit.node-key").map(|home| ("ambit.node-key".into(), home.clone())));
            node.extend(boot_at_enrolment(then, &pcrs).map(|boot| ("ambit.boot".into(), boot.clone())));
        }
        if let NodeState::Untrusted(code) = row.state {
            node.insert("ambit.code".into(), code.as_str().into());
        }
    }
    json!({
        "eat_profile": PROFILE,
        "iat": r.stamp.0 / 1000,
        "iss": issuer(&r.trust_domain),
        "ear.verifier-id": { "developer": "ambit", "build": env!("CARGO_PKG_VERSION") },
        "ambit.index": r.index.0,
        "submods": { "node": node },
    })
}

fn issuer(td: &TrustDomain) -> String {
    format!("spiffe://{td}")
}

/// What the boot log told at the enrolment, if each boot PCR is still what it was then.
fn boot_at_enrolment<'a>(then: &'a Value, pcrs: &Map<String, Value>) -> Option<&'a Value> {
    let quoted = then.get("ambit.pcrs")?.as_object()?;
    let same = !pcrs.is_empty() && pcrs.iter().all(|(n, value)| quoted.get(n) == Some(value));
    then.get("ambit.boot").filter(|_| same)
}

fn state(r: &NodeResult) -> &'static str {
    if r.row.state == NodeState::Admitted && r.late { "late" } else { r.row.state.as_str() }
}

/// Vector and status. A node that is out is contraindicated whatever its last good verdict was; of one that does not
/// answer, or was released and has not come back, nothing is claimed.
fn trust(r: &NodeResult) -> (TrustVector, &'static str) {
    match r.row.state {
        NodeState::Admitted if r.late => (TrustVector::default(), "none"),
        NodeState::Admitted => (r.standing.trust, r.standing.trust.status()),
        NodeState::Untrusted(Code::NodeLate) | NodeState::Released => (TrustVector::default(), "none"),
        NodeState::Untrusted(code) => {
            let vector = spoken_against(code);
            (vector, vector.status())
        }
        // An operator's word says nothing of any part of the machine.
        NodeState::Banned | NodeState::Quarantined | NodeState::Evicted => (TrustVector::default(), "contraindicated"),
    }
}

/// The claim that a failure with this code speaks against; of the others nothing is claimed any more.
fn spoken_against(code: Code) -> TrustVector {
    let mut out = TrustVector::default();
    if matches!(code, Code::ImaFileNotAllowed | Code::ImaViolation | Code::ImaWeakDigest | Code::ImaLogMissing) {
        (out.executables, out.file_system) = (CONTRAINDICATED, CONTRAINDICATED);
    } else if matches!(
        code,
        Code::SecureBootOff
            | Code::BootVariableNotAllowed
            | Code::BootVariableRepeated
            | Code::DbxTooOld
            | Code::SbatTooOld
            | Code::MokListNotAllowed
            | Code::CommandLineNotAllowed
    ) {
        out.configuration = CONTRAINDICATED;
    } else if matches!(
        code,
        Code::BootFirmwareError
            | Code::BootAuthorityNotAllowed
            | Code::BootImageNotAllowed
            | Code::BootFileNotAllowed
            | Code::PcrNotAllowed
            | Code::BootEventNotCovered
            | Code::BootLogMissing
    ) {
        out.executables = CONTRAINDICATED;
    } else if matches!(
        code,
        Code::EkDenied | Code::EkWeak | Code::EkClassNotAccepted | Code::EkChainUntrusted | Code::EkNotExpected
    ) {
        out.hardware = CONTRAINDICATED;
    } else if matches!(code, Code::TpmStateForked | Code::ClockStepBack) {
        out.instance_identity = CONTRAINDICATED;
    } else {
        // What does not verify proves nothing of who sent it.
        out.instance_identity = UNPROVED;
    }
    out
}

/// What lies in the file: the result and what it takes to check it. Everything binary is hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportedResult {
    format: String,
    /// The JWS.
    pub result: String,
    /// The root-certified list of record keys.
    pub key_set_statement: String,
    /// The root's signature over that.
    pub key_set_signature: String,
    /// The root certificate, DER.
    pub root: String,
    /// Its trust domain.
    pub trust_domain: TrustDomain,
}

/// A result that verified: whose word it is, and the claims.
#[derive(Clone, Debug, PartialEq)]
pub struct VerifiedResult {
    /// The cell's trust domain.
    pub trust_domain: TrustDomain,
    /// SHA-256 of its root certificate.
    pub fingerprint: [u8; 32],
    /// Thumbprint of the record key that signed.
    pub kid: String,
    /// The EAR.
    pub claims: Value,
}

impl ExportedResult {
    /// A result with its key set (statement, signature) and root.
    pub fn new(td: &TrustDomain, result: String, key_set: (&[u8], &[u8]), root_der: &[u8]) -> Self {
        Self {
            format: FORMAT.to_owned(),
            result,
            key_set_statement: hex::encode(key_set.0),
            key_set_signature: hex::encode(key_set.1),
            root: hex::encode(root_der),
            trust_domain: td.clone(),
        }
    }

    /// The file's text.
    pub fn text(&self) -> Result<String, Refusal> {
        serde_json::to_string_pretty(self).map(|text| text + "\n").map_err(|e| internal("a result as JSON", e))
    }

    /// Checks a file's text against a root fingerprint that was learnt elsewhere.
    ///
    /// # Errors
    /// [`Code::ResultInvalid`] for everything that is not, from root to claims, what a cell of that root signed.
    pub fn verify(text: &str, fingerprint: &[u8; 32]) -> Result<VerifiedResult, Refusal> {
        let exported: Self = once(text.as_bytes()).map_err(|e| bad("an exported result", e.to_string()))?;
        if exported.format != FORMAT {
            return Err(bad(FORMAT, exported.format));
        }
        let root = unhex(&exported.root)?;
        let found = crate::fingerprint(&root);
        if found != *fingerprint {
            return Err(bad(format!("root {}", hex::encode(fingerprint)), format!("root {}", hex::encode(found))));
        }
        let (statement, signature) = (unhex(&exported.key_set_statement)?, unhex(&exported.key_set_signature)?);
        let keys = KeySet::verify(&exported.trust_domain, &root, &statement, &signature)
            .map_err(|refusal| bad(refusal.expected, refusal.found))?;
        let (kid, claims) = keys.verify_result(&exported.trust_domain, &exported.result)?;
        Ok(VerifiedResult { trust_domain: exported.trust_domain, fingerprint: found, kid, claims })
    }
}

impl KeySet {
    /// The thumbprint of the key that signed a result of `td`, and the claims. Errors: `result_invalid`.
    pub fn verify_result(&self, td: &TrustDomain, jws: &str) -> Result<(String, Value), Refusal> {
        if jws.len() > RESULT_BYTES_MAX {
            return Err(bad(format!("at most {RESULT_BYTES_MAX} bytes"), jws.len().to_string()));
        }
        let parts = || bad("a compact JWS: header, payload and signature", "other parts");
        let (input, signature) = jws.rsplit_once('.').ok_or_else(parts)?;
        let (header, payload) = input.split_once('.').ok_or_else(parts)?;
        let header: Header = once(&decode(header)?).map_err(|e| bad("a header", e.to_string()))?;
        // Never what the header would have: one algorithm, one type (RFC 8725, sections 3.1 and 3.11).
        if header.alg != "EdDSA" || header.typ != TYP {
            return Err(bad(format!("alg EdDSA, typ {TYP}"), format!("alg {}, typ {}", header.alg, header.typ)));
        }
        let key = self.keys().iter().find(|key| thumbprint(key) == header.kid);
        let key = key.ok_or_else(|| bad("a record key of the cell", header.kid.as_str()))?;
        if !crate::record::is_signed_by(key, input.as_bytes(), &decode(signature)?) {
            return Err(bad("a result signed by a record key of the cell", "another signature"));
        }
        let claims: Value = once(&decode(payload)?).map_err(|e| bad("claims", e.to_string()))?;
        let said = |name: &str| claims.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        if said("eat_profile") != PROFILE {
            return Err(bad(PROFILE, said("eat_profile")));
        }
        if said("iss") != issuer(td) {
            return Err(bad(issuer(td), said("iss")));
        }
        Ok((header.kid, claims))
    }
}

fn bad(expected: impl Into<String>, found: impl Into<String>) -> Refusal {
    Refusal::new(Code::ResultInvalid, expected, found)
}

fn unhex(text: &str) -> Result<Vec<u8>, Refusal> {
    hex::decode(text).map_err(|_| bad("hexadecimal digits", "others"))
}

fn decode(text: &str) -> Result<Vec<u8>, Refusal> {
    URL_SAFE_NO_PAD.decode(text).map_err(|_| bad("base64url without padding", "other characters"))
}
