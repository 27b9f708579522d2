//! `ambit attest`.

use clap::Subcommand;
use std::path::PathBuf;

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
