//! Arguments of `ambit trust` that are about the root's key.

use super::Approvals;
use clap::{Args, Subcommand};
use std::path::PathBuf;

#[derive(Debug, Args)]
pub struct Shares {
    /// The root's fingerprint (64 hex digits); the active one's without it
    #[arg(long, value_name = "FINGERPRINT")]
    pub root: Option<String>,
    /// How many of the shares open the root together
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u8).range(2..=16))]
    pub threshold: u8,
    /// Who holds one: NAME=KEY, as `ambit trust holder-key` prints KEY; once for each
    #[arg(long = "holder", value_name = "NAME=KEY", required = true)]
    pub holders: Vec<String>,
    /// Folder for the encrypted shares, NAME.share each; only their holders can read them
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    #[command(flatten)]
    pub approvals: Approvals,
}

/// The cell's authority under a root that somebody else keeps.
#[derive(Debug, Subcommand)]
pub enum External {
    /// Makes a key for it in the cell, and the request that the outside CA signs; the same again prints the same
    Csr {
        /// Where the request goes; without it, standard output
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// Brings what the CA signed: the next certificate under the active root, or a new root, prepared, with its first
    Import(ImportExternal),
    /// Forgets the request and its key
    Withdraw,
}

#[derive(Debug, Args)]
pub struct ImportExternal {
    /// The certificate in PEM, then what leads from it to the root, nearest first
    #[arg(long, value_name = "FILE")]
    pub certificate: PathBuf,
    /// The root's certificate in PEM: never its key
    #[arg(long, value_name = "FILE")]
    pub root: PathBuf,
    /// Judge it, and change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Of a root that is new to the trust domain, in a cell with approvers
    #[command(flatten)]
    pub approvals: Approvals,
}

#[derive(Debug, Args)]
pub struct OpenShare {
    /// The holder's key
    #[arg(long, value_name = "FILE")]
    pub key: PathBuf,
    /// The encrypted share
    #[arg(long, value_name = "FILE")]
    pub share: PathBuf,
    /// Where the share goes in plain, for `ambitd restore --shares`
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
}
