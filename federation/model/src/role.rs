//! What an administrator may do. Roles are rows that a cell agrees on, never what a certificate says of itself: taking one
//! away takes effect with the next call, not when a certificate ends.

use crate::id::ClusterId;
use crate::refusal::{Code, Refusal};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// One role of an administrator. Written `federation-admin`, `cluster-admin:NAME`, `operator`, `auditor`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum AdminRole {
    /// Everything that an administrator can do: membership, roots, peers, roles, drills.
    FederationAdmin,
    /// Entries, nodes and policies of this cluster, and of no other.
    ClusterAdmin(ClusterId),
    /// Reads, and dry runs of drills.
    Operator,
    /// The audit stream and what was refused.
    Auditor,
}

const CLUSTER_ADMIN: &str = "cluster-admin:";

impl fmt::Display for AdminRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FederationAdmin => f.write_str("federation-admin"),
            Self::ClusterAdmin(cluster) => write!(f, "{CLUSTER_ADMIN}{cluster}"),
            Self::Operator => f.write_str("operator"),
            Self::Auditor => f.write_str("auditor"),
        }
    }
}

impl FromStr for AdminRole {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        match s {
            "federation-admin" => Ok(Self::FederationAdmin),
            "operator" => Ok(Self::Operator),
            "auditor" => Ok(Self::Auditor),
            _ => match s.strip_prefix(CLUSTER_ADMIN) {
                Some(cluster) => Ok(Self::ClusterAdmin(cluster.parse()?)),
                None => {
                    let forms = "a role federation-admin, cluster-admin:NAME, operator or auditor";
                    Err(Refusal::new(Code::BadRequest, forms, s))
                }
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_are_written_as_they_are_read() {
        for (text, good) in [
            ("federation-admin", true),
            ("cluster-admin:west", true),
            ("operator", true),
            ("auditor", true),
            ("cluster-admin", false),
            ("cluster-admin:", false),
            ("cluster-admin:West", false),
            ("cluster-admin:*", false),
            ("Operator", false),
            ("admin", false),
            ("", false),
        ] {
            let read = text.parse::<AdminRole>();
            assert_eq!(read.is_ok(), good, "{text}");
            assert!(read.is_err() || read.unwrap().to_string() == text, "{text}");
        }
    }
}
