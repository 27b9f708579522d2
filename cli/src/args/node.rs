//! `ambit node`.

use crate::duration::Millis;
use clap::Subcommand;
use std::path::PathBuf;

#[derive(Debug, Subcommand)]
pub enum Node {
    /// Makes a one-time join token; prints it alone on standard output
    Token {
        #[arg(long)]
        cluster: String,
        /// How long the token may be used
        #[arg(long, default_value = "1h", value_name = "TIME")]
        ttl: Millis,
    },
    /// Puts EKs on a cluster's allow-list
    Allow {
        #[arg(long)]
        cluster: String,
        /// SHA-256 of the EK public key (SPKI DER), 64 hexadecimal digits
        #[arg(required_unless_present = "csv", value_name = "NODE_ID")]
        nodes: Vec<String>,
        /// One EK a line, its digest first; `-` reads standard input
        #[arg(long, value_name = "FILE")]
        csv: Option<PathBuf>,
    },
    /// Takes EKs off a cluster's allow-list; nodes that are here by it are untrusted at once
    Disallow {
        #[arg(long)]
        cluster: String,
        #[arg(required = true, value_name = "NODE_ID")]
        nodes: Vec<String>,
    },
    /// Nodes, their verdicts and what they hold
    List,
    /// What the cell knows of a node: verdict, denials, expected and found
    Explain {
        /// The node id, or its first 8 digits or more; none: every denial kept
        id: Option<String>,
    },
    /// Why a node was trusted, or not, now or at an instant
    Attest {
        id: String,
        /// 2026-11-23T14:03:26Z, or how long ago: 90s, 2h
        #[arg(long, value_name = "TIME")]
        at: Option<String>,
    },
    /// Exports what the cell claims of a node now, signed; with --verify checks such a file, without a cell
    Result(Claimed),
    /// Refuses nodes for good; `unban` ends it
    Ban(Selected),
    /// Ends a ban: the node may enrol again, by a new attestation
    Unban(Selected),
    /// Puts nodes aside until they are released
    Quarantine(Selected),
    /// Ends a quarantine or a distrust: the node may enrol again, by a new attestation
    Release(Selected),
    /// Forgets nodes, so that they may enrol afresh, with another AK too
    Evict(Selected),
}

#[derive(Debug, clap::Args)]
pub struct Claimed {
    /// The node id, or its first 8 digits or more
    #[arg(required_unless_present = "verify", conflicts_with = "verify")]
    pub id: Option<String>,
    /// Where the result goes [default: standard output]
    #[arg(long, value_name = "FILE", conflicts_with = "verify")]
    pub out: Option<PathBuf>,
    /// Checks this result instead
    #[arg(long, value_name = "FILE")]
    pub verify: Option<PathBuf>,
    /// The trust domain's root certificate (PEM), from elsewhere than the result
    #[arg(long, value_name = "root.pem", requires = "verify", conflicts_with = "id")]
    pub root: Option<PathBuf>,
    /// The trust domain's root fingerprint, from elsewhere than the result
    #[arg(long, value_name = "HEX", requires = "verify", conflicts_with_all = ["root", "id"])]
    pub fingerprint: Option<String>,
}

/// Which nodes a verb is about: all of them, or none where it cannot be said of one.
#[derive(Debug, clap::Args)]
pub struct Selected {
    /// Node ids, or their first 8 digits or more
    #[arg(required_unless_present = "cluster", value_name = "NODE_ID")]
    pub ids: Vec<String>,
    /// Instead: every node of a cluster of which the verb can be said
    #[arg(long, conflicts_with = "ids")]
    pub cluster: Option<String>,
}
