//! The command tree. Everything a user can type is declared here and nowhere else.

use crate::duration::Millis;
use crate::output::Form;
use clap::{Parser, Subcommand};
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;

/// Ambit: an attested, federated ambient mesh.
///
/// Exit codes: 0 ok, 1 failed, 2 usage, 3 unreachable, 4 denied, 5 drift or guard.
#[derive(Debug, Parser)]
#[command(name = "ambit", version, disable_help_subcommand = true)]
pub struct Args {
    /// The administrator's context.json, with admin.pem and admin.key beside it
    /// [env: AMBIT_CONTEXT] [default: ~/.config/ambit/context.json]
    #[arg(long, global = true, value_name = "FILE")]
    pub context: Option<PathBuf>,
    /// The form of the answer
    #[arg(short, long, global = true, value_enum, default_value = "table")]
    pub output: Form,
    /// How long to try, all replicas together
    #[arg(long, global = true, default_value = "10s", value_name = "TIME")]
    pub timeout: Millis,
    #[command(subcommand)]
    pub verb: Verb,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// One screen: the cell, its clusters, nodes, peers and drift
    Status,
    /// Checks the cell from outside, and says what to do about each finding
    Check,
    /// Clusters and the tokens by which cells register
    #[command(subcommand)]
    Cluster(Cluster),
    /// Other cells
    #[command(subcommand)]
    Peer(Peer),
    /// Machines enrolled by their TPM
    #[command(subcommand)]
    Node(Node),
    /// Registrations of workloads
    #[command(subcommand)]
    Entry(Entry),
    /// Certificates issued
    #[command(subcommand)]
    Identity(Identity),
    /// The trust domain's bundle and fingerprint
    #[command(subcommand)]
    Trust(Trust),
    /// What may speak to what
    #[command(subcommand)]
    Policy(Policy),
    /// Why SRC may or may not reach DST:PORT
    Explain(Explain),
    /// The replicas of the cell
    #[command(subcommand)]
    Raft(Raft),
    /// What a machine must have booted, and whether it did
    #[command(subcommand)]
    Attest(Attest),
    /// X.509-SVIDs checked to the letter of the SPIFFE standard, without a cell
    #[command(subcommand)]
    Svid(Svid),
    /// Objects as they change, a line each; goes on at another replica where one is lost
    Watch(Watch),
    /// The one-machine lab (runs ambit-lab)
    #[command(disable_help_flag = true)]
    Lab {
        /// Passed on to ambit-lab untouched
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Rehearsed disaster, measured and sealed
    #[command(subcommand)]
    Drill(Drill),
}

#[derive(Debug, Subcommand)]
pub enum Svid {
    /// Whether an X.509-SVID is valid: exit code 0, or 4 with the reason
    Verify(SvidVerify),
    /// Every rule of the standard that the certificates of a file break; exit code 4 if one of them must hold
    Lint {
        /// A chain, leaf first (PEM), or one certificate (PEM or DER)
        file: PathBuf,
    },
}

#[derive(Debug, clap::Args)]
pub struct SvidVerify {
    /// The chain, leaf first (PEM), or one certificate (PEM or DER)
    pub file: PathBuf,
    /// A SPIFFE bundle or bundle map (JSON), or roots (PEM); whose it is: TD=FILE, or its roots say; repeat for more
    #[arg(long = "bundle", value_name = "[TD=]FILE", required = true)]
    pub bundles: Vec<BundleFile>,
    /// An identity of this trust domain; also whose a lone bundle is that does not say
    #[arg(long, value_name = "TD")]
    pub trust_domain: Option<ambit_model::TrustDomain>,
    /// At this instant instead of now: 2026-11-23T14:03:26Z
    #[arg(long, value_name = "TIME")]
    pub at: Option<String>,
    /// The end at which it is presented
    #[arg(long, value_enum, default_value = "client")]
    pub usage: SvidUsage,
}

/// See [`SvidVerify::usage`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum SvidUsage {
    Client,
    Server,
}

/// A bundle and, where it is said, whose it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BundleFile {
    pub trust_domain: Option<ambit_model::TrustDomain>,
    pub file: PathBuf,
}

impl std::str::FromStr for BundleFile {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        if let Some((td, file)) = s.split_once('=')
            && let Ok(td) = td.parse()
        {
            return Ok(BundleFile { trust_domain: Some(td), file: file.into() });
        }
        Ok(BundleFile { trust_domain: None, file: s.into() })
    }
}

#[derive(Debug, clap::Args)]
pub struct Watch {
    /// Of these kinds only
    #[arg(value_enum, value_name = "KIND")]
    pub kinds: Vec<WatchedKind>,
    /// What came after this revision, as a `synced` line or a write told it; 0: all objects first
    #[arg(long, default_value_t = 0, value_name = "REVISION")]
    pub after: u64,
    /// Ends once everything was told
    #[arg(long)]
    pub once: bool,
    /// Begins with what a replica knows, even if it knows of no leader; `synced` then tells the age
    #[arg(long)]
    pub stale_ok: bool,
}

/// What can be watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum WatchedKind {
    Node,
    Entry,
    Service,
    Policy,
}

impl WatchedKind {
    /// As on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            WatchedKind::Node => "node",
            WatchedKind::Entry => "entry",
            WatchedKind::Service => "service",
            WatchedKind::Policy => "policy",
        }
    }
}

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

#[derive(Debug, Subcommand)]
pub enum Peer {
    /// Asks this cell to register with another, using that cell's token
    Register {
        /// The other cell's address; repeat for more
        #[arg(long = "address", value_name = "IP:PORT", required = true)]
        addresses: Vec<SocketAddr>,
        #[arg(long)]
        trust_domain: String,
        /// The other cell's root fingerprint, learnt out of band
        #[arg(long, value_name = "HEX")]
        fingerprint: String,
        #[arg(long)]
        token: String,
    },
    /// Confirms a pending peer's fingerprint
    Approve {
        trust_domain: String,
        #[arg(long, value_name = "HEX")]
        fingerprint: String,
    },
    /// Peers, their states and the age of what they said
    List,
}

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

#[derive(Debug, Subcommand)]
pub enum Entry {
    /// Registers workloads, from a file or from options
    Create(EntryCreate),
    /// Writes entries over what they are, from a file or from options
    Update(EntryUpdate),
    /// Entries of this cell
    List(EntryList),
    /// Removes entries
    Delete {
        #[arg(required = true)]
        ids: Vec<String>,
    },
}

#[derive(Debug, clap::Args)]
pub struct EntryUpdate {
    #[command(flatten)]
    pub written: EntryCreate,
    /// Only if the entry is still as this revision wrote it
    #[arg(long, value_name = "REVISION", conflicts_with_all = ["file", "create"])]
    pub expect_revision: Option<std::num::NonZeroU64>,
    /// Also where there is none
    #[arg(long)]
    pub create: bool,
}

#[derive(Debug, clap::Args)]
pub struct EntryList {
    /// Of this cluster
    #[arg(long, default_value = "")]
    pub cluster: String,
    /// This SPIFFE ID, or all under spiffe://td/path/*
    #[arg(long, default_value = "", value_name = "SPIFFE_ID")]
    pub spiffe_id: String,
    /// With all of these selectors
    #[arg(long = "selector", value_name = "SELECTOR")]
    pub selectors: Vec<String>,
}

#[derive(Debug, clap::Args)]
pub struct EntryCreate {
    /// Documents `kind: Entry`, separated by `---`; `-` reads standard input
    #[arg(short, long, value_name = "FILE.yaml", conflicts_with_all = ["id", "spiffe_id", "cluster", "selectors"])]
    pub file: Option<PathBuf>,
    #[arg(long, required_unless_present = "file")]
    pub id: Option<String>,
    #[arg(long, required_unless_present = "file", value_name = "SPIFFE_ID")]
    pub spiffe_id: Option<String>,
    #[arg(long, required_unless_present = "file")]
    pub cluster: Option<String>,
    /// unix:uid:N, unix:gid:N or cgroup:NAME; of its node: tpm:ek_hash:HEX, tpm:pcr:BANK:N:HEX or tpm:policy:NAME.
    /// All must hold, at least one is of the workload
    #[arg(long = "selector", required_unless_present = "file", value_name = "SELECTOR")]
    pub selectors: Vec<String>,
    /// A node that may run it; none: every admitted node of the cluster
    #[arg(long = "node", value_name = "NODE_ID", conflicts_with = "file")]
    pub nodes: Vec<String>,
    /// Lifetime of its SVIDs, 60s to 1h
    #[arg(long, value_name = "TIME", conflicts_with = "file")]
    pub ttl: Option<Millis>,
    /// A trust domain whose bundle the workload also gets
    #[arg(long = "federates-with", value_name = "TRUST_DOMAIN", conflicts_with = "file")]
    pub federates_with: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub enum Identity {
    /// Records of certificates issued, newest first
    List {
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
        limit: u32,
    },
}

#[derive(Debug, Subcommand)]
pub enum Trust {
    /// The bundle of a trust domain (default: the cell's own) with its fingerprint
    Show {
        trust_domain: Option<String>,
        /// Print the roots as PEM, nothing else
        #[arg(long)]
        pem: bool,
    },
}

#[derive(Debug, Subcommand)]
pub enum Policy {
    /// Checks documents without a cell
    Lint {
        /// The file; `-` reads standard input
        file: PathBuf,
    },
    /// Sends documents to the cell; all or none take effect
    Apply {
        /// The file; `-` reads standard input
        #[arg(short, long)]
        file: PathBuf,
    },
    /// Removes one object
    Delete {
        name: String,
        /// policy or service
        #[arg(long, default_value = "policy", value_parser = ["policy", "service"])]
        kind: String,
    },
    /// Policies and services that the cell knows, imported ones too
    List,
    /// Which agents hold the cell's revision in their kernel; ends 5 where one does not
    Status {
        /// Wait, at most --timeout, until all do
        #[arg(long)]
        wait: bool,
    },
    /// Why SRC may or may not reach DST:PORT
    Explain(Explain),
}

#[derive(Debug, Subcommand)]
pub enum Attest {
    /// Judges a folder of raw evidence as the server judges a node; ends 0 affirming, 4 denied
    Appraise(Appraise),
    /// Appraisal policies
    #[command(subcommand)]
    Policy(AttestPolicy),
    /// Why a node was refused or lost trust: what diverged, expected, found, and what to do
    Explain { id: String },
}

#[derive(Debug, Subcommand)]
pub enum AttestPolicy {
    /// Checks a policy without a cell, and warns of what is probably not meant
    Lint { file: PathBuf },
    /// What two policies say differently, field by field; ends 5 where they differ
    Diff { old: PathBuf, new: PathBuf },
    /// Writes a policy that accepts one machine, and those that boot as it does: from a folder, or from a node's evidence
    Learn(LearnPolicy),
    /// Sends a policy to the cell; its IMA allow-lists first
    Apply {
        /// The file; `-` reads standard input
        #[arg(short, long)]
        file: PathBuf,
        /// An IMA allow-list that the policy names by its SHA-256, unless the cell has it; repeat for more
        #[arg(long = "ima-list", value_name = "FILE")]
        ima_lists: Vec<PathBuf>,
        /// Keep what the policy said before as acceptable too, until it is promoted
        #[arg(long)]
        staged: bool,
    },
    /// Policies of the cell: versions, clusters, and how many nodes rest on which
    List,
    /// One policy of the cell as YAML
    Show { name: String },
    /// Ends a staged roll-out: what the policy said before is accepted no longer
    Promote { name: String },
    /// Removes a policy of the cell
    Delete { name: String },
    /// What a policy would say of every node now, from the evidence kept; ends 5 where it would deny one
    Test {
        /// The file; `-` reads standard input
        #[arg(short, long)]
        file: PathBuf,
        /// An IMA allow-list that the policy names, unless the cell has it; repeat for more
        #[arg(long = "ima-list", value_name = "FILE")]
        ima_lists: Vec<PathBuf>,
        /// This node only
        #[arg(long, value_name = "NODE_ID")]
        node: Option<String>,
        /// From the evidence of that instant: 2026-11-23T14:03:26Z, or how long ago: 90s, 2h
        #[arg(long, value_name = "TIME")]
        at: Option<String>,
    },
}

#[derive(Debug, clap::Args)]
pub struct Appraise {
    /// The folder: binary_bios_measurements, ima_binary_runtime_measurements, pcrs.sha256, quote.tpms_attest,
    /// quote.tpmt_signature, ak.tpmt_public, ek.tpm2b_public, ek-*.nv.der
    pub folder: PathBuf,
    /// An appraisal policy; repeat for more, of which one must accept
    #[arg(long = "policy", value_name = "FILE", required = true)]
    pub policies: Vec<PathBuf>,
    /// The qualifying data that the quote must hold
    #[arg(long, value_name = "HEX")]
    pub nonce: Option<String>,
    /// Roots (and intermediates) that the EK certificate must chain to
    #[arg(long, value_name = "PEM")]
    pub roots: Option<PathBuf>,
    /// What the roots vouch for; without it a policy's rule about classes is not judged
    #[arg(long, value_parser = ["hardware", "virtual", "lab"], requires = "roots")]
    pub class: Option<String>,
    /// An IMA allow-list that a policy names by its SHA-256; repeat for more
    #[arg(long = "ima-list", value_name = "FILE")]
    pub ima_lists: Vec<PathBuf>,
    /// The folder of a good boot, to name the first event that differs from it
    #[arg(long, value_name = "DIR")]
    pub reference: Option<PathBuf>,
    /// Believe logs that no quote proves; the verdict then says unquoted, not affirming
    #[arg(long)]
    pub unquoted: bool,
}

#[derive(Debug, clap::Args)]
pub struct LearnPolicy {
    /// The node to learn from, by the evidence that the cell keeps
    #[arg(value_name = "NODE_ID", required_unless_present = "from", conflicts_with = "from")]
    pub node: Option<String>,
    /// The folder to learn from, with files as in `attest appraise`
    #[arg(long, value_name = "DIR")]
    pub from: Option<PathBuf>,
    /// The policy's name
    #[arg(long, default_value = "learnt")]
    pub name: String,
    /// A cluster that it shall govern; repeat for more
    #[arg(long = "cluster", value_name = "NAME", default_value = "default", conflicts_with = "node")]
    pub clusters: Vec<String>,
    /// Where the IMA allow-list goes; without it the files stand in the policy
    #[arg(long, value_name = "OUT")]
    pub ima_list: Option<PathBuf>,
    /// The qualifying data that the quote must hold
    #[arg(long, value_name = "HEX", conflicts_with = "node")]
    pub nonce: Option<String>,
    /// Roots (and intermediates) that the EK certificate must chain to
    #[arg(long, value_name = "PEM", conflicts_with = "node")]
    pub roots: Option<PathBuf>,
    /// What vouches for the machine's TPM
    #[arg(long, conflicts_with = "node", value_parser = ["hardware", "virtual", "lab", "listed"])]
    pub class: Option<String>,
}

#[derive(Debug, clap::Args)]
pub struct Explain {
    /// The caller's SPIFFE ID
    #[arg(value_name = "SRC")]
    pub source: String,
    /// The target's SPIFFE ID (or address) and port
    #[arg(value_name = "DST:PORT")]
    pub destination: Destination,
}

/// What is called: a name and a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    pub name: String,
    pub port: u16,
}

impl std::str::FromStr for Destination {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let bad = || "expected a SPIFFE ID or an address, a colon and a port of 1-65535".to_owned();
        let (name, port) = s.rsplit_once(':').ok_or_else(bad)?;
        let port: u16 = port.parse().map_err(|_| bad())?;
        if name.is_empty() || port == 0 { Err(bad()) } else { Ok(Destination { name: name.to_owned(), port }) }
    }
}

#[derive(Debug, Subcommand)]
pub enum Raft {
    /// Replicas, leader, term and indexes as each replica sees them
    Status,
    /// Makes the one-time token of a new replica; prints it alone on standard output
    Add {
        #[arg(long, value_name = "N")]
        replica: u64,
        #[arg(long, value_name = "IP:PORT")]
        address: SocketAddr,
        /// How long the token may be used
        #[arg(long, default_value = "10m", value_name = "TIME")]
        ttl: Millis,
    },
    /// Takes a replica out of the cell
    Remove {
        #[arg(long, value_name = "N")]
        replica: u64,
    },
    /// Hands leadership to another replica
    Transfer {
        #[arg(long, value_name = "N")]
        to: u64,
    },
    /// Makes every replica's log shorter by a snapshot, or, with --out, writes a backup of the cell to a file
    Snapshot {
        /// The backup: every write acknowledged before is in it, no private key is
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// Checks a backup and prints the command that restores it, to be run on an empty machine
    Restore {
        #[arg(long, value_name = "FILE")]
        snapshot: PathBuf,
    },
    /// Where the majority is lost: who answers, what is at stake, and the command to run on the one replica to go on with
    Recover,
}

#[derive(Debug, Subcommand)]
pub enum Drill {
    /// Checks a drill file and prints its plan: who is touched, for how long, what is measured
    Validate { file: PathBuf },
    /// Runs a drill; ends 0 where every objective is met, 5 where its guard refuses
    Run(DrillRun),
    /// Reports of drills
    #[command(subcommand)]
    Report(Report),
}

#[derive(Debug, clap::Args)]
pub struct DrillRun {
    pub file: PathBuf,
    /// Where the sealed report goes [default: drill-NAME.json]
    #[arg(long, value_name = "OUT.json")]
    pub report: Option<PathBuf>,
    /// The lab that injects the faults and knows the contexts of its cells
    #[arg(long, default_value = "demo")]
    pub lab: String,
    /// The context.json of one more cell that the drill names; repeat for more
    #[arg(long = "cell", value_name = "FILE")]
    pub cells: Vec<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum Report {
    /// Checks a report without a cell: its seal, its figures, whose it is
    Verify {
        file: PathBuf,
        /// The trust domain's root certificate (PEM), from elsewhere than the report
        #[arg(long, value_name = "root.pem", required_unless_present = "fingerprint")]
        root: Option<PathBuf>,
        /// The trust domain's root fingerprint, from elsewhere than the report
        #[arg(long, value_name = "HEX", conflicts_with = "root")]
        fingerprint: Option<String>,
    },
    /// Reports that the cell has sealed
    List,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_tree_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn odd_lines_are_refused_and_good_ones_read() {
        for (line, good) in [
            ("ambit status -o json", true),
            ("ambit cluster register west --ek-root ca.pem:lab --ek-root v.pem:hardware", true),
            ("ambit cluster register west --ek-root ca.pem:unknown", false),
            ("ambit cluster register west", false),
            ("ambit explain spiffe://west/web spiffe://east/db:5432", true),
            ("ambit explain spiffe://west/web spiffe://east/db", false),
            ("ambit explain spiffe://west/web spiffe://east/db:0", false),
            ("ambit node allow --cluster west", false),
            ("ambit node allow --cluster west --csv eks.csv", true),
            ("ambit attest policy learn --from dir", true),
            ("ambit attest policy learn 0123456789 --ima-list out", true),
            ("ambit attest policy learn", false),
            ("ambit attest policy learn 0123456789 --from dir", false),
            ("ambit attest policy apply -f p.yaml --ima-list l --staged", true),
            ("ambit attest policy test -f p.yaml --node 0123456789 --at 2h", true),
            ("ambit node quarantine --cluster west", true),
            ("ambit node release 0123456789", true),
            ("ambit node ban", false),
            ("ambit node ban 0123456789 --cluster west", false),
            ("ambit node attest 0123456789 --at 90s", true),
            ("ambit cluster ek-deny old --model X --firmware-below 0x01", true),
            ("ambit cluster ek-deny old --remove --model X", false),
            ("ambit entry create -f e.yaml", true),
            ("ambit entry create --id a", false),
            ("ambit node result 0123456789ab --out r.json", true),
            ("ambit node result --verify r.json --root root.pem -o json", true),
            ("ambit node result", false),
            ("ambit node result 0123456789ab --verify r.json", false),
            ("ambit node result 0123456789ab --root root.pem", false),
            ("ambit node result --verify r.json --root root.pem --fingerprint ab", false),
            ("ambit entry create --id a --spiffe-id spiffe://w/a --cluster c --selector unix:uid:1 --ttl 90s", true),
            ("ambit entry create -f e.yaml --id a", false),
            ("ambit policy status --wait --timeout 3s", true),
            ("ambit policy status --timeout 3", false),
            ("ambit lab up --sites 2 -o json --help", true),
            ("ambit drill report verify r.json", false),
            ("ambit drill report verify r.json --fingerprint 00", true),
            ("ambit raft add --replica 2 --address 10.71.0.12:7443", true),
            ("ambit raft add --replica 2 --address west-2", false),
            ("ambit attest appraise dir", false),
            ("ambit attest appraise dir --policy p.yaml -o json --nonce 00 --roots ca.pem", true),
            ("ambit attest appraise dir --policy p.yaml --class lab", false),
            ("ambit attest policy learn --from dir", true),
            ("ambit attest policy diff a.yaml", false),
            ("ambit", false),
        ] {
            let read = Args::try_parse_from(line.split(' '));
            assert_eq!(read.is_ok(), good, "{line}: {:?}", read.err().map(|e| e.to_string()));
        }
    }
}
