//! `ambit watch`.

#[derive(Debug, clap::Args)]
pub struct Watch {
    /// Of these kinds only
    #[arg(value_enum, value_name = "KIND")]
    pub kinds: Vec<WatchedKind>,
    /// What came after this revision, as a `synced` line or a write told it; 0: all objects first
    #[arg(long, default_value_t = 0, value_name = "REVISION")]
    pub after: u64,
    /// Ends once everything was told
    #[arg(long)]
    pub once: bool,
    /// Begins with what a replica knows, even if it knows of no leader; `synced` then tells the age
    #[arg(long)]
    pub stale_ok: bool,
}

/// What can be watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum WatchedKind {
    Node,
    Entry,
    Service,
    Group,
    Policy,
    Egress,
}

impl WatchedKind {
    /// As on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            WatchedKind::Node => "node",
            WatchedKind::Entry => "entry",
            WatchedKind::Service => "service",
            WatchedKind::Group => "group",
            WatchedKind::Policy => "policy",
            WatchedKind::Egress => "egress",
        }
    }
}
