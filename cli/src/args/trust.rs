//! Arguments of `ambit trust` that are about the root's key.

use super::Approvals;
use clap::Args;
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
