//! `ambit node result`: attestation results, out of a cell and into whoever relies on them.

use super::Session;
use super::node::full_id;
use crate::args::Claimed;
use crate::ask;
use crate::context::read_bounded;
use crate::exit::file_refusal;
use crate::output::{Answer, Form, pretty};
use crate::when::utc;
use ambit_identity::result::RESULT_BYTES_MAX;
use ambit_identity::{ExportedResult, VerifiedResult};
use ambit_model::Refusal;
use ambit_proto::v1;
use serde_json::{Value, json};
use std::path::Path;

/// A result with its key set and root, in hexadecimal.
const FILE_BYTES_MAX: u64 = 4 * RESULT_BYTES_MAX as u64;

pub(super) async fn run(session: &Session, claimed: Claimed) -> Result<Answer, Refusal> {
    match &claimed.verify {
        Some(file) => {
            let root = super::trust::pinned(claimed.root.as_deref(), claimed.fingerprint.as_deref())?;
            let verified = ExportedResult::verify(&read_bounded(file, FILE_BYTES_MAX)?, &root)?;
            Ok(Answer::ok(shown(session.form, &verified)))
        }
        None => export(session, claimed.id.as_deref().unwrap_or_default(), claimed.out.as_deref()).await,
    }
}

async fn export(session: &Session, id: &str, out: Option<&Path>) -> Result<Answer, Refusal> {
    let cell = session.cell()?;
    let request = v1::AttestationResultRequest { id: full_id(&cell, id).await? };
    let reply = ask!(cell, NodeAttestation.attestation_result(request))?;
    let key_set = (reply.key_set.as_slice(), reply.key_set_signature.as_slice());
    let text = ExportedResult::new(&cell.context().trust_domain, reply.jws, key_set, &reply.root_der).text()?;
    // What this cell says is to be believed by its own root, or it is not worth a file.
    let verified = ExportedResult::verify(&text, &cell.context().fingerprint)?;
    match out {
        None => Ok(Answer::ok(text.trim_end().to_owned())),
        Some(file) => {
            std::fs::write(file, &text).map_err(|e| file_refusal(file, &e))?;
            Ok(Answer::ok(shown(session.form, &verified)))
        }
    }
}

fn shown(form: Form, v: &VerifiedResult) -> String {
    let fingerprint = hex::encode(v.fingerprint);
    if form == Form::Json {
        return pretty(&json!({
            "trust_domain": v.trust_domain.as_str(), "fingerprint": fingerprint, "kid": v.kid, "claims": v.claims,
        }));
    }
    let node = v.claims.pointer("/submods/node").unwrap_or(&Value::Null);
    let text = |name: &str| node.get(name).and_then(Value::as_str).unwrap_or("-").to_owned();
    let vector = node.get("ear.trustworthiness-vector").unwrap_or(&Value::Null);
    let verdict_ms = node.get("ambit.last-verdict-ms").and_then(Value::as_u64).unwrap_or_default();
    let said_ms = v.claims.get("iat").and_then(Value::as_u64).unwrap_or_default().saturating_mul(1000);
    format!(
        "signed by {}, root {fingerprint}\n  node: {} of {}, {}\n  status: {} at {}, {vector}\n  policy: {}, last good verdict {}",
        v.trust_domain,
        text("ambit.node"),
        text("ambit.cluster"),
        text("ambit.state"),
        text("ear.status"),
        utc(said_ms),
        text("ear.appraisal-policy-id"),
        utc(verdict_ms),
    )
}
