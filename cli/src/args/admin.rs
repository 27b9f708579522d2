//! `ambit admin`.

use ambit_model::{AdminRole, ObjectName, Refusal, SpiffeId};
use clap::Subcommand;
use std::path::PathBuf;

#[derive(Debug, Subcommand)]
pub enum Admin {
    /// Administrators and their roles
    List,
    /// Gives roles: federation-admin, cluster-admin:NAME, operator, auditor
    Grant {
        /// An administrator's name, or the SPIFFE ID of entries that are marked `admin`
        name: Administrator,
        #[arg(required = true, value_name = "ROLE")]
        roles: Vec<AdminRole>,
    },
    /// Takes roles away; no certificate is of use without one
    Revoke {
        /// As of `grant`
        name: Administrator,
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

/// Whoever has roles.
#[derive(Clone, Debug)]
pub enum Administrator {
    /// The name in a certificate below /ambit/admin/.
    Name(ObjectName),
    /// The SPIFFE ID of entries that are marked `admin`.
    Id(SpiffeId),
}

impl std::str::FromStr for Administrator {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        if s.starts_with("spiffe://") { s.parse().map(Self::Id) } else { s.parse().map(Self::Name) }
    }
}
impl std::fmt::Display for Administrator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Name(name) => name.fmt(f),
            Self::Id(id) => id.fmt(f),
        }
    }
}
