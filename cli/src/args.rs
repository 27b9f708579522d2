//! The command tree. Everything a user can type is declared here and nowhere else; nouns with much to say have a file each.

mod admin;
mod approver;
mod attest;
mod audit;
mod cluster;
mod deny;
mod entry;
mod federation;
mod node;
mod policy;
mod svid;
mod trust;
mod watch;

pub use admin::{Admin, Administrator};
pub use approver::{Approvals, Approve, Approver};
pub use attest::{Appraise, Attest, AttestPolicy, LearnPolicy};
pub use audit::{Audit, Prove as AuditProve, Search as AuditSearch, Verify as AuditVerify};
pub use cluster::{Calls, Cluster, EkRoot, LateWord, Standby};
pub use deny::{Deny, SvidRevoke};
pub use entry::{Entry, EntryCreate, EntryList, EntryUpdate};
pub use federation::{Federation, FederationProfile, FederationPut};
pub use node::{Claimed, Node, Selected};
pub use policy::{Destination, Explain, MaxFlips, Policy, Reached};
pub use svid::{BundleFile, Svid, SvidMint, SvidUsage, SvidVerify};
pub use trust::{External, ImportExternal, OpenShare, Shares};
pub use watch::{Watch, WatchedKind};

use crate::duration::Millis;
use crate::output::Form;
use ambit_model::TrustDomain;
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
    /// The administrator's context.json, with his certificate and key beside it (admin.pem)
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
    /// SVIDs checked to the letter of the SPIFFE standard, without a cell; and minted or revoked, at one
    #[command(subcommand)]
    Svid(Svid),
    /// Objects as they change, a line each; goes on at another replica where one is lost
    Watch(Watch),
    /// Reads SPIRE's ClusterStaticEntry, ClusterSPIFFEID and ClusterFederatedTrustDomain as entries and relationships
    Apply(Apply),
    /// Foreign trust domains that are no cells, and their bundles
    #[command(subcommand)]
    Federation(Federation),
    /// Identities that are refused everywhere
    #[command(subcommand)]
    Deny(Deny),
    /// Administrators: roles, certificates, and who was refused what
    #[command(subcommand)]
    Admin(Admin),
    /// People without whom no administrator does what cannot be undone, such as revoking a root
    #[command(subcommand)]
    Approver(Approver),
    /// Signs a proposal as an approver, after it was read and confirmed; prints what to give to the verb that wrote it
    Approve(Approve),
    /// The log of everything that the cell committed: searched, verified, proved and exported
    #[command(subcommand)]
    Audit(Audit),
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

#[derive(Debug, clap::Args)]
pub struct Apply {
    /// The file; `-` reads standard input
    #[arg(short, long)]
    pub file: PathBuf,
    /// The cluster of entries that name a node, or nothing, as their parent
    #[arg(long)]
    pub cluster: Option<ambit_model::ClusterId>,
    /// Only say whether all of it can be said here
    #[arg(long)]
    pub dry_run: bool,
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
    /// Confirms a pending peer's fingerprint, or that of one that is suspended
    Approve {
        trust_domain: String,
        #[arg(long, value_name = "HEX")]
        fingerprint: String,
    },
    /// Believes nobody of it, here and on every node of the cell, until it is approved again
    Suspend { trust_domain: TrustDomain },
    /// Forgets a peer that is suspended or pending, with all that it said but whom it denied
    Remove {
        trust_domain: TrustDomain,
        #[command(flatten)]
        approvals: Approvals,
    },
    /// Peers, their states and the age of what they said
    List,
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
    /// Roots and intermediates, who holds and who shows what; ends 5 where something is under way or wrong
    Check,
    /// A new root: prepare, activate, taint, revoke, waiting for everybody in between; goes on where it was broken off
    Rotate {
        /// A new key of JWT-SVIDs instead: all tokens that were signed before are refused in the end
        #[arg(long)]
        jwt: bool,
        /// How long to wait for everybody at each step
        #[arg(long, default_value = "10m", value_name = "TIME")]
        wait: Millis,
        /// Go on after that without those who are missing: they will be cut off
        #[arg(long)]
        without_acks: bool,
        /// Say what comes next and who is missing, and change nothing
        #[arg(long)]
        dry_run: bool,
        /// To a root with a key in the cell, also where the active root is external
        #[arg(long, conflicts_with = "jwt")]
        own: bool,
    },
    /// A root that somebody else keeps, such as an organisation's offline CA: the cell has an authority under it
    #[command(subcommand)]
    External(External),
    /// Has whatever is under the old root, an intermediate or an old JWT key issued anew
    Taint {
        /// A root's fingerprint (64 hex digits), an intermediate's key identifier (40) or a JWT key's kid (32)
        authority: String,
        /// Change nothing
        #[arg(long)]
        dry_run: bool,
    },
    /// Has whatever is under a tainted root, intermediate or JWT key refused, everywhere and for ever
    Revoke {
        /// A root's fingerprint (64 hex digits), an intermediate's key identifier (40) or a JWT key's kid (32)
        authority: String,
        /// Also while somebody shows something that is under it
        #[arg(long)]
        without_acks: bool,
        /// Say who does, and change nothing
        #[arg(long)]
        dry_run: bool,
        /// An intermediate that the cell has no row of, given after the backup that it was restored from
        #[arg(long, conflicts_with = "without_acks")]
        unknown: bool,
        /// Of a root's revocation, in a cell with approvers
        #[command(flatten)]
        approvals: Approvals,
    },
    /// Wraps the root's key to the TPMs of all replicas and to nothing else; no file of theirs opens it any more
    Seal {
        /// Say what lacks, and change nothing
        #[arg(long)]
        dry_run: bool,
    },
    /// Splits the root's key among people, for the day on which all its TPMs are lost
    Shares(Shares),
    /// Makes a key for somebody who is to hold a share; prints what it is encrypted to
    HolderKey {
        /// Where the key goes; keep it
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Opens an encrypted share with its holder's key
    OpenShare(OpenShare),
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
    /// Lets only replicas join whose TPM proved what they booted
    RequireAttested {
        /// Lets others join again; refused while the root is sealed
        #[arg(long)]
        off: bool,
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
    /// The drills of a folder
    List {
        #[arg(default_value = "deploy/drills")]
        folder: PathBuf,
    },
    /// Checks a drill file and prints what it says: who is touched, for how long, what is measured
    Validate { file: PathBuf },
    /// Whether a drill would run here and now, and whom it would touch; harms nothing, ends 5 where it would be refused
    Plan(DrillPlan),
    /// Follows the drill that runs in a lab
    Watch {
        #[arg(long, default_value = "demo")]
        lab: String,
    },
    /// Calls off the drill that runs in a lab, and waits until everything is back
    Abort {
        #[arg(long, default_value = "demo")]
        lab: String,
    },
    /// Runs a drill; ends 0 where every objective is met, 5 where its guard refuses
    Run(DrillRun),
    /// Reports of drills
    #[command(subcommand)]
    Report(Report),
}

#[derive(Debug, clap::Args)]
pub struct DrillPlan {
    pub file: PathBuf,
    /// The lab that would inject the faults
    #[arg(long, default_value = "demo")]
    pub lab: String,
    /// The context.json of one more cell that the drill names; repeat for more
    #[arg(long = "cell", value_name = "FILE")]
    pub cells: Vec<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub struct DrillRun {
    pub file: PathBuf,
    /// So many times, one after the other; reports are numbered, and the figures told as p50, p99 and max
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub repeat: u16,
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
        /// A sealing trust domain's root certificate (PEM), from elsewhere than the report; repeat for each that must have sealed it
        #[arg(long, value_name = "root.pem", required_unless_present = "fingerprint")]
        root: Vec<PathBuf>,
        /// A sealing trust domain's root fingerprint, from elsewhere than the report; repeat likewise
        #[arg(long, value_name = "HEX")]
        fingerprint: Vec<String>,
    },
    /// A report as one page of HTML, with charts, that needs nothing else; check the report first
    Html {
        file: PathBuf,
        /// Where the page goes [default: the report's name, with .html]
        #[arg(long, value_name = "OUT.html")]
        out: Option<PathBuf>,
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
            ("ambit cluster standby set east", true),
            ("ambit cluster standby set east --witness core --lease 5s", true),
            ("ambit cluster standby set east --lease 5s", false),
            ("ambit cluster grant west --for 12h", true),
            ("ambit cluster grant west --for 12h --approval a.json", false),
            ("ambit cluster late west 7 keep", true),
            ("ambit cluster late west 7 forget", false),
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
            ("ambit attest policy diff a.yaml", false),
            ("ambit federation put example.org --url https://b.example.org/ --profile https-web", true),
            ("ambit federation put example.org --url https://b.example.org/", false),
            ("ambit federation put example.org --url https://b.example.org/ --profile https-spiffe", false),
            ("ambit federation put Example.org --url https://b.example.org/ --profile https-web", false),
            ("ambit apply -f spire.yaml --cluster west --dry-run", true),
            ("ambit approver keygen --out alice.key", true),
            ("ambit approver add alice --public ab", false),
            ("ambit approver remove alice --approval a.json --approval b.json", true),
            ("ambit approve p.json", false),
            ("ambit approve p.json --key alice.key", true),
            ("ambit trust revoke ab --approval a.json --approval b.json", true),
            ("ambit apply spire.yaml", false),
            ("ambit deny id spiffe://west/web", true),
            ("ambit deny id web", false),
            ("ambit svid revoke spiffe://west/web", true),
            ("ambit svid revoke --serial 40aa --authority 00ff", true),
            ("ambit svid revoke --serial 40aa", false),
            ("ambit svid revoke spiffe://west/web --serial 40aa --authority 00ff", false),
            ("ambit svid revoke", false),
            ("ambit admin grant alice operator cluster-admin:west", true),
            ("ambit admin grant alice", false),
            ("ambit admin grant alice root", false),
            ("ambit admin grant Alice operator", false),
            ("ambit admin revoke alice --all", true),
            ("ambit admin revoke alice operator --all", false),
            ("ambit admin revoke alice", false),
            ("ambit audit search --act svid.issue --outcome refused --since 2h", true),
            ("ambit audit search --outcome lost", false),
            ("ambit audit verify --witness east=00 --checkpoint head", true),
            ("ambit audit verify --root root.pem", false),
            ("ambit audit verify --proof p.json --root root.pem --certificate c.pem", true),
            ("ambit audit prove", false),
            ("ambit audit prove c.pem --out p.json", true),
            ("ambit audit prove --record 7", true),
            ("ambit cluster fail-over shop west --to east --note drill", true),
            ("ambit cluster fail-over --all west --to east", true),
            ("ambit cluster fail-over shop west", false),
            ("ambit cluster fail-over --to east", false),
            ("ambit cluster fail-back east/shop west", true),
            ("ambit cluster fail-back a b c", false),
            ("ambit cluster region west eu-1", true),
            ("ambit cluster region west --none", true),
            ("ambit cluster region west eu-1 --none", false),
            ("ambit cluster region west", false),
            ("ambit cluster drain west --note why", true),
            ("ambit cluster resume west", true),
            ("ambit cluster evict west", false),
            ("ambit cluster evict west --confirm west", true),
            ("ambit", false),
        ] {
            let read = Args::try_parse_from(line.split(' '));
            assert_eq!(read.is_ok(), good, "{line}: {:?}", read.err().map(|e| e.to_string()));
        }
    }
}
