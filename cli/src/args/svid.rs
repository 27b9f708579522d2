//! `ambit svid`.

use clap::Subcommand;
use std::path::PathBuf;

#[derive(Debug, Subcommand)]
pub enum Svid {
    /// Whether an X.509-SVID or a JWT-SVID is valid: exit code 0, or 4 with the reason
    Verify(SvidVerify),
    /// Certifies a new key, or signs a token, for an identity that no node speaks for. The cell keeps who did it
    Mint(SvidMint),
    /// Every rule of the standard that the certificates of a file break; exit code 4 if one of them must hold
    Lint {
        /// A chain, leaf first (PEM), or one certificate (PEM or DER)
        file: PathBuf,
    },
}

#[derive(Debug, clap::Args)]
pub struct SvidMint {
    /// An identity of this trust domain, outside /ambit/
    pub spiffe_id: ambit_model::SpiffeId,
    /// Folder for svid.pem, svid.key (mode 600) and bundle.pem; none of them may be there
    #[arg(long, value_name = "FOLDER", required_unless_present = "audience")]
    pub out: Option<PathBuf>,
    /// A JWT-SVID for this recipient, printed, instead of a certificate; repeat for more
    #[arg(long, value_name = "RECIPIENT", conflicts_with = "out")]
    pub audience: Vec<String>,
    /// A DNS name that the certificate carries beside the SPIFFE ID
    #[arg(long = "dns-name", value_name = "NAME", conflicts_with = "audience")]
    pub dns_names: Vec<String>,
    /// Lifetime: of a certificate 1m to 1h (1h), of a token 30s to 1h (5m)
    #[arg(long, value_name = "TIME")]
    pub ttl: Option<crate::duration::Millis>,
}

#[derive(Debug, clap::Args)]
pub struct SvidVerify {
    /// The chain, leaf first (PEM), one certificate (PEM or DER), or a token
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
    /// Of a token: to whom it is presented
    #[arg(long, value_name = "RECIPIENT")]
    pub audience: Option<String>,
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
