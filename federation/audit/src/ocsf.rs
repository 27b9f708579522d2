//! Records as auditors take them: OCSF 1.x events in CloudEvents 1.0 envelopes, one JSON object to a line.
//!
//! Classes: Authentication (3002) where somebody was admitted or refused as who it is; Account Change (3001) where an
//! administrator's roles change; Entity Management (3004) where an object of the cell was made, changed or removed;
//! API Activity (6003) for everything else. Every field comes from the record: nothing is added that the log does not hold.

use crate::record::{Outcome, Record};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Version of OCSF that the fields are of.
const OCSF: &str = "1.3.0";

/// Class, its name, category, its name, activity, its name.
type Class = (u32, &'static str, u32, &'static str, u32, &'static str);

const IAM: (u32, &str) = (3, "Identity & Access Management");
const APP: (u32, &str) = (6, "Application Activity");

fn class(act: &str) -> Class {
    let (object, verb) = act.split_once('.').unwrap_or((act, ""));
    let iam = |uid, name, activity, text| (uid, name, IAM.0, IAM.1, activity, text);
    let app = |activity, text| (6003, "API Activity", APP.0, APP.1, activity, text);
    match (object, verb) {
        ("node" | "replica", "admit" | "refuse" | "distrust") => iam(3002, "Authentication", 1, "Logon"),
        ("svid" | "token", "issue" | "mint") => iam(3002, "Authentication", 3, "Authentication Ticket"),
        ("roles", "grant") => iam(3001, "Account Change", 7, "Attach Policy"),
        ("roles", _) => iam(3001, "Account Change", 8, "Detach Policy"),
        (_, "create" | "register" | "prepare" | "request" | "begin" | "found") => {
            iam(3004, "Entity Management", 1, "Create")
        }
        (_, "put" | "write" | "change" | "promote" | "activate" | "renew" | "approve" | "rollback") => {
            iam(3004, "Entity Management", 3, "Update")
        }
        (_, "delete" | "remove" | "revoke" | "retire" | "withdraw") => iam(3004, "Entity Management", 4, "Delete"),
        (_, "import" | "export" | "read") => app(2, "Read"),
        _ => app(99, "Other"),
    }
}

/// Record number `n` of the log of this origin as one event.
pub fn event(origin: &str, n: u64, record: &Record, leaf_sha256: &str) -> Value {
    let (class_uid, class_name, category_uid, category_name, activity_id, activity_name) = class(&record.act);
    let done = record.outcome == Outcome::Done;
    let at = OffsetDateTime::from_unix_timestamp_nanos(i128::from(record.stamp_ms) * 1_000_000);
    let time = at.ok().and_then(|at| at.format(&Rfc3339).ok()).unwrap_or_default();
    let user = json!({ "name": record.actor, "uid": record.actor, "type_id": 99, "type": "SPIFFE ID" });
    let mut data = json!({
        "activity_id": activity_id,
        "activity_name": activity_name,
        "category_uid": category_uid,
        "category_name": category_name,
        "class_uid": class_uid,
        "class_name": class_name,
        "type_uid": u64::from(class_uid) * 100 + u64::from(activity_id),
        "severity_id": if done { 1 } else { 3 },
        "severity": if done { "Informational" } else { "Medium" },
        "status_id": if done { 1 } else { 2 },
        "status": if done { "Success" } else { "Failure" },
        "time": record.stamp_ms,
        "actor": { "user": user },
        "metadata": {
            "version": OCSF,
            "product": { "name": "Ambit", "vendor_name": "Ambit" },
            "log_name": origin,
            "uid": n.to_string(),
            "sequence": n,
        },
        "unmapped": {
            "act": record.act, "object": record.object, "epoch": record.epoch, "raft_index": record.index,
            "leaf_sha256": leaf_sha256, "facts": record.facts,
        },
    });
    if !record.code.is_empty() {
        data["status_code"] = json!(record.code);
    }
    let entity = json!({ "name": record.object, "type": record.act.split('.').next().unwrap_or_default() });
    match class_uid {
        3002 => {
            data["user"] = json!({ "name": record.object, "uid": record.object });
            data["service"] = json!({ "name": origin });
        }
        3001 => data["user"] = json!({ "name": record.object, "uid": record.object }),
        3004 => data["entity"] = entity,
        _ => {
            data["api"] = json!({ "operation": record.act, "service": { "name": origin } });
            data["resources"] = json!([entity]);
            // Required by the class; a mesh calls by identity, and addresses are not recorded.
            data["src_endpoint"] = json!({ "name": record.actor });
        }
    }
    json!({
        "specversion": "1.0",
        "id": format!("{origin}/{n}"),
        "source": format!("//{origin}"),
        "type": format!("com.ambit.audit.{}", record.act),
        "subject": record.object,
        "time": time,
        "datacontenttype": "application/json",
        "data": data,
    })
}
