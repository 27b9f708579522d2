//! Two versions of a policy, field by field.

use super::to_yaml;
use ambit_model::AppraisalPolicy;
use serde_norway::Value;
use std::collections::BTreeSet;

/// One difference.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Change {
    /// The field, as in the YAML: `spec.keys.db`.
    pub field: String,
    /// What only the old policy says.
    pub removed: Option<String>,
    /// What only the new policy says.
    pub added: Option<String>,
}

/// What differs, in the order of fields. Lists are compared as sets, element by element.
pub fn diff(old: &AppraisalPolicy, new: &AppraisalPolicy) -> Vec<Change> {
    let leaves = |policy: &AppraisalPolicy| {
        let mut out = BTreeSet::new();
        // What `to_yaml` writes is YAML: its round trip is tested.
        if let Ok(value) = serde_norway::from_str::<Value>(&to_yaml(policy)) {
            collect(&value, String::new(), &mut out);
        }
        out
    };
    let (old, new) = (leaves(old), leaves(new));
    let one = |(field, value): &(String, String), gone: bool| {
        let value = Some(value.clone());
        let (removed, added) = if gone { (value, None) } else { (None, value) };
        Change { field: field.clone(), removed, added }
    };
    let removed = old.difference(&new).map(|leaf| one(leaf, true));
    let mut out: Vec<Change> = removed.chain(new.difference(&old).map(|leaf| one(leaf, false))).collect();
    out.sort();
    out
}

fn collect(value: &Value, path: String, out: &mut BTreeSet<(String, String)>) {
    match value {
        Value::Mapping(map) => {
            for (key, value) in map {
                let key = text(key);
                collect(value, if path.is_empty() { key } else { format!("{path}.{key}") }, out);
            }
        }
        Value::Sequence(items) if items.is_empty() => {
            out.insert((path, "[]".to_owned()));
        }
        Value::Sequence(items) => items.iter().for_each(|item| collect(item, path.clone(), out)),
        other => {
            out.insert((path, text(other)));
        }
    }
}

fn text(value: &Value) -> String {
    match value {
        Value::String(s) => s.clone(),
        Value::Number(n) => n.to_string(),
        Value::Bool(b) => b.to_string(),
        Value::Null | Value::Sequence(_) | Value::Mapping(_) | Value::Tagged(_) => String::new(),
    }
}
