//! `ambit federation`.

use super::Approvals;
use ambit_model::{SpiffeId, TrustDomain};
use clap::Subcommand;
use std::path::PathBuf;

#[derive(Debug, Subcommand)]
pub enum Federation {
    /// Foreign trust domains that are no cells, and the bundles taken of them
    List,
    /// Writes a relationship; trust domain, URL and profile are each said, and none follows from another
    Put(FederationPut),
    /// Ends a relationship: its bundle goes
    Remove {
        trust_domain: TrustDomain,
        #[command(flatten)]
        approvals: Approvals,
    },
    /// Fetches a bundle now
    Refresh { trust_domain: TrustDomain },
    /// Says that an empty bundle, which revokes everything of its trust domain, is meant
    Confirm {
        trust_domain: TrustDomain,
        /// The held bundle's SHA-256 (ambit federation list)
        #[arg(long, value_name = "HEX")]
        sha256: String,
    },
}

#[derive(Debug, clap::Args)]
pub struct FederationPut {
    pub trust_domain: TrustDomain,
    /// Its bundle endpoint
    #[arg(long, value_name = "https://HOST/PATH")]
    pub url: String,
    /// How the endpoint is authenticated
    #[arg(long, value_enum)]
    pub profile: FederationProfile,
    /// With https-spiffe: who answers there
    #[arg(long, value_name = "ID", required_if_eq("profile", "https-spiffe"))]
    pub endpoint_spiffe_id: Option<SpiffeId>,
    /// The bundle to begin with (SPIFFE bundle in JSON, or roots in PEM), learnt out of band
    #[arg(long, value_name = "FILE", required_if_eq("profile", "https-spiffe"))]
    pub bootstrap: Option<PathBuf>,
}

/// See [`FederationPut::profile`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum FederationProfile {
    HttpsWeb,
    HttpsSpiffe,
}
