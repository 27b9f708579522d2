//! `ambit approver` and `ambit approve`.

use ambit_model::{ApproverCard, ObjectName, TrustDomain};
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// What approvers said of a proposal; a verb that lacks it prints the proposal.
#[derive(Debug, Args)]
pub struct Approvals {
    /// What an approver signed (ambit approve); repeat for more. Without any, the proposal to be signed is printed where
    /// one is needed
    #[arg(long = "approval", value_name = "FILE")]
    pub files: Vec<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum Approver {
    /// Makes an approver's key; prints what he hands out, alone on standard output
    Keygen {
        /// A new file, of mode 0600
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Asks one more person from now on; the first at once, a further one with approvals
    Add {
        name: ObjectName,
        /// As ambit approver keygen prints it
        #[arg(long, value_name = "HEX")]
        public: ApproverCard,
        #[command(flatten)]
        approvals: Approvals,
    },
    /// Asks this one no more
    Remove {
        name: ObjectName,
        #[command(flatten)]
        approvals: Approvals,
    },
    /// Who is asked
    List,
    /// What was done with approvers, or for want of any, without: newest first
    Acts,
}

#[derive(Debug, Args)]
pub struct Approve {
    /// The proposal; `-` reads standard input
    #[arg(value_name = "REQUEST.json")]
    pub proposal: PathBuf,
    /// The approver's key
    #[arg(long, value_name = "FILE")]
    pub key: PathBuf,
    /// What others signed already, to be counted
    #[arg(long = "approval", value_name = "FILE")]
    pub others: Vec<PathBuf>,
    /// Signs without asking; what is signed is told first all the same
    #[arg(long)]
    pub yes: bool,
    /// The cell that the act is for; without this and the epoch, the context's, which is asked
    #[arg(long, value_name = "NAME", requires = "epoch")]
    pub trust_domain: Option<TrustDomain>,
    /// The cell's epoch (ambit raft status)
    #[arg(long, requires = "trust_domain")]
    pub epoch: Option<u64>,
}
