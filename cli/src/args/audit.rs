//! `ambit audit`.

use std::path::PathBuf;

#[derive(Debug, clap::Subcommand)]
pub enum Audit {
    /// The log's head, which replica has it whole, who cosigned it, and what this cell cosigned
    Status,
    /// Records that are all that is asked for, oldest first
    Search(Search),
    /// Records as they come, a line each
    Tail(Search),
    /// Fetches all records, and proves that they are the log that was signed; names the first one that is not
    Verify(Verify),
    /// That the issuance of a certificate, or a record, is in the log: a file that anyone checks without a cell
    Prove(Prove),
    /// Records as OCSF events in CloudEvents, a JSON object a line; that they were taken is recorded first
    Export {
        #[command(flatten)]
        search: Search,
        /// Where they go; `-` is standard output
        #[arg(long, value_name = "FILE", default_value = "-")]
        out: PathBuf,
    },
    /// Begins the log of a cell founded by a release without one, once every replica is of this release
    Begin,
}

#[derive(Debug, clap::Args)]
pub struct Search {
    /// Who: a SPIFFE ID; one that ends with `*` for all that begin so
    #[arg(long, default_value = "")]
    pub actor: String,
    /// What, such as `svid.issue` or `policy.*`
    #[arg(long, default_value = "")]
    pub act: String,
    /// To what: a name, an identity, a node, a serial
    #[arg(long, default_value = "")]
    pub object: String,
    /// `done` or `refused`
    #[arg(long, value_parser = ["done", "refused"])]
    pub outcome: Option<String>,
    /// The code of a refusal or a denial
    #[arg(long, default_value = "")]
    pub code: String,
    /// Not older than this: how long ago, or a time as 2026-11-23T14:03:26Z
    #[arg(long, value_name = "TIME")]
    pub since: Option<String>,
    /// Older than this
    #[arg(long, value_name = "TIME")]
    pub until: Option<String>,
    /// From this record on
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub from: u64,
}

#[derive(Debug, clap::Args)]
pub struct Verify {
    /// The head that was verified last: the log must have grown from it; it is written anew
    #[arg(long, value_name = "FILE", conflicts_with = "proof")]
    pub checkpoint: Option<PathBuf>,
    /// A peer whose cosignature counts, by its root's fingerprint, learnt out of band; repeat for more
    #[arg(long = "witness", value_name = "TRUST_DOMAIN=HEX")]
    pub witnesses: Vec<String>,
    /// Checks a file of `ambit audit prove`, without a cell
    #[arg(long, value_name = "FILE")]
    pub proof: Option<PathBuf>,
    /// The trust domain's root certificate (PEM), from elsewhere than the file
    #[arg(long, value_name = "root.pem", requires = "proof")]
    pub root: Option<PathBuf>,
    /// The trust domain's root fingerprint, from elsewhere than the file
    #[arg(long, value_name = "HEX", conflicts_with = "root", requires = "proof")]
    pub fingerprint: Option<String>,
    /// The certificate (PEM) that the file is to be about
    #[arg(long, value_name = "CERT.pem", requires = "proof")]
    pub certificate: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub struct Prove {
    /// A certificate (PEM) that the cell issued
    #[arg(required_unless_present = "record")]
    pub certificate: Option<PathBuf>,
    /// Instead, the record of this number
    #[arg(long, value_name = "N", conflicts_with = "certificate")]
    pub record: Option<u64>,
    /// Where the proof goes [default: standard output]
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}
