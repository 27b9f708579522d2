//! `ambit deny`.

use ambit_model::SpiffeId;
use clap::Subcommand;

#[derive(Debug, Subcommand)]
pub enum Deny {
    /// Refuses an identity everywhere: its SVIDs, its live connections, and new SVIDs for it; until it is lifted
    Id { id: SpiffeId },
    /// Lets a denied identity have new SVIDs again; those issued before stay refused
    Lift { id: SpiffeId },
    /// Identities and SVIDs that are refused, those of peers too
    List,
}

/// Which SVIDs are revoked: all of an identity so far, or one.
#[derive(Debug, clap::Args)]
pub struct SvidRevoke {
    /// All SVIDs of this identity that were issued so far; new ones may be had at once
    #[arg(required_unless_present = "serial")]
    pub id: Option<SpiffeId>,
    /// One SVID, by its serial in hexadecimal digits (ambit identity list)
    #[arg(long, value_name = "HEX", conflicts_with = "id", requires = "authority")]
    pub serial: Option<String>,
    /// The key identifier of the authority that issued it
    #[arg(long, value_name = "HEX", requires = "serial")]
    pub authority: Option<String>,
}
