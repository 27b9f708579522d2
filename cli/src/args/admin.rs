//! `ambit admin`.

use ambit_model::{AdminRole, ObjectName};
use clap::Subcommand;
use std::path::PathBuf;

#[derive(Debug, Subcommand)]
pub enum Admin {
    /// Administrators and their roles
    List,
    /// Gives roles: federation-admin, cluster-admin:NAME, operator, auditor
    Grant {
        name: ObjectName,
        #[arg(required = true, value_name = "ROLE")]
        roles: Vec<AdminRole>,
    },
    /// Takes roles away; no certificate is of use without one
    Revoke {
        name: ObjectName,
        #[arg(required_unless_present = "all", value_name = "ROLE")]
        roles: Vec<AdminRole>,
        /// All roles
        #[arg(long, conflicts_with = "roles")]
        all: bool,
    },
    /// Makes a key, has it certified for 8 h, and writes an administrator's folder
    Issue {
        name: ObjectName,
        /// A new folder, for context.json, admin.pem, admin.key and root.pem
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// Has a new key of one's own certified, and writes it in the place of the old one
    Renew,
    /// What each replica refused since it started: who, which method, why, how often
    Refusals,
}
