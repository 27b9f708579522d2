//! `ambit cluster`.

use super::Approvals;
use crate::duration::Millis;
use ambit_model::TrustDomain;
use clap::{Subcommand, ValueEnum};
use std::path::PathBuf;

#[derive(Debug, Subcommand)]
pub enum Cluster {
    /// Registers a cluster with this cell as its home
    Register {
        name: String,
        /// A manufacturer's EK root certificate (PEM) and its class: hardware, virtual or lab; repeat for more
        #[arg(long = "ek-root", value_name = "FILE.pem:CLASS", required = true)]
        ek_roots: Vec<EkRoot>,
        /// How often its nodes are asked for a quote: 1s to 60s
        #[arg(long, default_value = "30s", value_name = "TIME")]
        attest_every: Millis,
        /// Where it is, as you call it: clusters of one region are nearer to each other than others
        #[arg(long, default_value = "")]
        region: String,
    },
    /// What makes a TPM one of the cluster's: EK roots, allow-list, deny-list
    Endorsements {
        name: String,
        /// The allow-list alone, as `ambit node allow --csv` reads it
        #[arg(long)]
        csv: bool,
    },
    /// Adds and removes EK roots of a cluster; nodes under a removed root are untrusted at once
    EkRoots {
        name: String,
        #[arg(long, value_name = "FILE.pem:CLASS", required_unless_present = "remove")]
        add: Vec<EkRoot>,
        /// SHA-256 of the root certificate
        #[arg(long, value_name = "HEX")]
        remove: Vec<String>,
    },
    /// Denies TPMs by maker, model and firmware, whatever vouches for them; nodes that have one are untrusted at once
    EkDeny {
        /// The rule's name
        name: String,
        /// TCG vendor id, as in EK certificates: id:494E5443
        #[arg(long, default_value = "")]
        manufacturer: String,
        /// The exact model, as in EK certificates
        #[arg(long, default_value = "")]
        model: String,
        /// Firmware versions below this one, as quotes show it: 0x0007000200000000; none: every version
        #[arg(long, default_value = "", value_name = "HEX")]
        firmware_below: String,
        #[arg(long, default_value = "")]
        reason: String,
        /// Removes the rule
        #[arg(long, conflicts_with_all = ["manufacturer", "model", "firmware_below", "reason"])]
        remove: bool,
    },
    /// Own and imported clusters with their states
    List,
    /// Makes a one-time token with which another cell may register here; prints it alone on standard output
    Token {
        /// The trust domain of the cell that will use it
        #[arg(long)]
        trust_domain: String,
        /// The root fingerprint that the cell must prove
        #[arg(long, value_name = "HEX")]
        fingerprint: String,
        /// How long the token may be used
        #[arg(long, default_value = "10m", value_name = "TIME")]
        ttl: Millis,
    },
    /// Says where a cluster of this cell is: calls go to its own cluster first, then to its region, then elsewhere
    Region {
        name: String,
        #[arg(required_unless_present = "none")]
        region: Option<String>,
        /// Nothing is said any more
        #[arg(long, conflicts_with = "region")]
        none: bool,
        #[command(flatten)]
        note: Note,
    },
    /// One cluster: where it is, and what is said of calls to it, by whom
    Show { name: String },
    /// Lets no new connection to a service go to a cluster; open ones go on. Of a peer's cluster: from this cell's callers
    Drain {
        name: String,
        #[command(flatten)]
        note: Note,
    },
    /// Ends a drain
    #[command(visible_alias = "resume")]
    Undrain {
        name: String,
        #[command(flatten)]
        note: Note,
    },
    /// Sends calls to a service that would go to one cluster to another, until `fail-back`
    FailOver {
        #[command(flatten)]
        calls: Calls,
        /// The cluster to which they go instead
        #[arg(long)]
        to: String,
        #[command(flatten)]
        note: Note,
    },
    /// Ends a fail-over: calls go to the cluster again
    FailBack {
        #[command(flatten)]
        calls: Calls,
        #[command(flatten)]
        note: Note,
    },
    /// Forgets all nodes of a cluster of this cell at once; they may enrol afresh
    Evict {
        name: String,
        /// The cluster's name once more
        #[arg(long, value_name = "NAME")]
        confirm: String,
    },
    /// Whom this cell names for the case that it is lost
    #[command(subcommand)]
    Standby(Standby),
    /// At a standby: commits that a lost home's authority is this cell's, as two of the home's approvers signed it. Without
    /// approvals the proposal is printed that they are to sign
    Grant {
        /// The lost cell's trust domain
        home: TrustDomain,
        /// How long, from now on: at most a day
        #[arg(long = "for", value_name = "TIME", conflicts_with = "files")]
        lasts: Option<Millis>,
        #[command(flatten)]
        approvals: Approvals,
    },
    /// At a standby: gives a home's authority back before the grant's end
    Release { home: TrustDomain },
    /// At a home that is back: takes its authority back, in a later epoch, once no grant of it lasts
    TakeBack,
    /// What becomes of a record that a home made after its authority was granted away (ambit cluster standby show)
    Late { origin: TrustDomain, seq: u64, what: LateWord },
}

/// What becomes of a late record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LateWord {
    /// It is taken as if it had come in time
    Keep,
    /// It is dropped here
    Drop,
}

#[derive(Debug, Subcommand)]
pub enum Standby {
    /// Names an active peer that may be granted this cell's authority, should it be lost. Takes two approvers
    Set {
        standby: TrustDomain,
        /// Another active peer: this cell signs only while it or the standby renews its lease
        #[arg(long, value_name = "PEER")]
        witness: Option<TrustDomain>,
        /// How long this cell signs after it was last renewed: 4s to 15m, and at most a quarter of the shortest SVID
        #[arg(long, value_name = "TIME", requires = "witness")]
        lease: Option<Millis>,
        #[command(flatten)]
        approvals: Approvals,
    },
    /// Standbys, grants, intermediates of standbys and late records, as this cell knows them
    Show,
    /// Nobody may be granted this cell's authority any more. Takes two approvers
    Remove {
        #[command(flatten)]
        approvals: Approvals,
    },
}

/// Which calls a verb is about.
#[derive(Debug, clap::Args)]
pub struct Calls {
    /// A service (of a peer's: trust-domain/name), and the cluster that its calls go to; with --all the cluster alone
    #[arg(required = true, num_args = 1..=2, value_names = ["SERVICE", "FROM"])]
    pub of: Vec<String>,
    /// Calls to every service of which the verb can be said now
    #[arg(long)]
    pub all: bool,
}

/// Why.
#[derive(Debug, clap::Args)]
pub struct Note {
    /// Why, in one line; it is kept, and shown with who said it
    #[arg(long, default_value = "")]
    pub note: String,
}

/// A root of EK certificates with its class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EkRoot {
    pub file: PathBuf,
    pub class: String,
}

impl std::str::FromStr for EkRoot {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s.rsplit_once(':') {
            Some((file, class @ ("hardware" | "virtual" | "lab"))) if !file.is_empty() => {
                Ok(EkRoot { file: file.into(), class: class.to_owned() })
            }
            _ => Err("expected FILE.pem:hardware, FILE.pem:virtual or FILE.pem:lab".to_owned()),
        }
    }
}
