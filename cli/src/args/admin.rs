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
    /// Has a new key of one's own certified, and writes it in the place of the old one; any verb does so past half of its life
    Renew,
    /// Makes a key, and prints the request for it, where another way than one's own certificate leads to its certificate
    Request,
    /// Puts the certificate for that key in its place
    Install {
        /// PEM, as ambitd admin break-glass prints it; `-` reads standard input
        #[arg(value_name = "FILE")]
        certificate: PathBuf,
    },
    /// What each replica refused since it started: who, which method, why, how often
    Refusals,
}
