//! `ambit entry`.

use crate::duration::Millis;
use clap::Subcommand;
use std::path::PathBuf;

#[derive(Debug, Subcommand)]
pub enum Entry {
    /// Registers workloads, from a file or from options
    Create(EntryCreate),
    /// Writes entries over what they are, from a file or from options
    Update(EntryUpdate),
    /// Entries of this cell
    List(EntryList),
    /// Removes entries
    Delete(EntryDelete),
}

#[derive(Debug, clap::Args)]
pub struct EntryDelete {
    #[arg(required = true)]
    pub ids: Vec<String>,
    /// Only if the entry is still as this revision wrote it
    #[arg(long, value_name = "REVISION")]
    pub expect_revision: Option<std::num::NonZeroU64>,
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
    /// Only those that may have a downstream authority
    #[arg(long)]
    pub downstream: bool,
    /// Only those whose holders are administrators
    #[arg(long)]
    pub admin: bool,
    /// Those that federate with this trust domain, or with this group
    #[arg(long, default_value = "", value_name = "TRUST_DOMAIN|GROUP")]
    pub federates_with: String,
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
    /// unix:uid:N, unix:gid:N, unix:supplementary_gid:N, unix:path:/FILE, unix:sha256:HEX, cgroup:NAME, systemd:unit:NAME or
    /// container:id:HEX; of its node: tpm:ek_hash:HEX, tpm:pcr:BANK:N:HEX or tpm:policy:NAME.
    /// All must hold, at least one is of the workload
    #[arg(long = "selector", required_unless_present = "file", value_name = "SELECTOR")]
    pub selectors: Vec<String>,
    /// A node that may run it; none: every admitted node of the cluster
    #[arg(long = "node", value_name = "NODE_ID", conflicts_with = "file")]
    pub nodes: Vec<String>,
    /// Lifetime of its SVIDs, 60s to 1h
    #[arg(long, value_name = "TIME", conflicts_with = "file")]
    pub ttl: Option<Millis>,
    /// A trust domain whose bundle the workload also gets; it may be known later
    #[arg(long = "federates-with", value_name = "TRUST_DOMAIN", conflicts_with = "file")]
    pub federates_with: Vec<String>,
    /// A federation group whose bundles the workload also gets; it may come to be later
    #[arg(long = "federates-with-group", value_name = "GROUP", conflicts_with = "file")]
    pub federates_with_groups: Vec<String>,
    /// What policies may find it by (`labels:td/key=value`); repeat for more
    #[arg(long = "label", value_name = "KEY=VALUE", conflicts_with = "file")]
    pub labels: Vec<String>,
    /// Whoever shows an SVID of it may have a downstream authority, which issues SVIDs of the trust domain by itself
    #[arg(long, conflicts_with = "file")]
    pub downstream: bool,
    /// Whoever shows an SVID of it is an administrator, with the roles that its SPIFFE ID was given
    #[arg(long, conflicts_with = "file")]
    pub admin: bool,
    /// Tells the workload which of its identities this is
    #[arg(long, default_value = "", conflicts_with = "file")]
    pub hint: String,
    /// A DNS name that its X.509-SVIDs carry beside the SPIFFE ID
    #[arg(long = "dns-name", value_name = "NAME", conflicts_with = "file")]
    pub dns_names: Vec<String>,
    /// Lifetime of its JWT-SVIDs, 30s to 1h; 5m where nothing is said
    #[arg(long, value_name = "TIME", conflicts_with = "file")]
    pub jwt_ttl: Option<Millis>,
    /// When the entry ends: 2026-11-23T14:03:26Z
    #[arg(long, value_name = "TIME", conflicts_with = "file")]
    pub expires_at: Option<String>,
}
