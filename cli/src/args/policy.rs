//! `ambit policy` and `ambit explain`.

use crate::duration::Millis;
use clap::Subcommand;
use std::path::PathBuf;

#[derive(Debug, Subcommand)]
pub enum Policy {
    /// Checks documents without a cell
    Lint {
        /// The file; `-` reads standard input
        file: PathBuf,
    },
    /// Runs the `kind: PolicyTest` documents of a file without a cell; ends 1 where a case comes out otherwise
    Test {
        /// The file with the tests, and perhaps policies; `-` reads standard input
        file: PathBuf,
        /// A file of the policies that are tested; repeat for more
        #[arg(short = 'f', long = "file", value_name = "FILE")]
        policies: Vec<PathBuf>,
    },
    /// Shows what a change would open and close between known identities; ends 5 above --max-flips
    Plan {
        /// The file to apply; `-` reads standard input
        #[arg(short, long, required_unless_present_any = ["delete", "rollback"])]
        file: Option<PathBuf>,
        /// The object to delete
        #[arg(long, value_name = "NAME", conflicts_with_all = ["file", "rollback"])]
        delete: Option<String>,
        /// Of what kind it is: policy, service, group or egress
        #[arg(long, default_value = "policy", value_parser = ["policy", "service", "group", "egress"])]
        kind: String,
        /// The change to go back to (ambit policy history)
        #[arg(long, value_name = "REVISION", conflicts_with = "file")]
        rollback: Option<u64>,
        #[command(flatten)]
        reach: Reached,
    },
    /// Sends documents to the cell; all or none take effect
    Apply {
        /// The file; `-` reads standard input
        #[arg(short, long)]
        file: PathBuf,
        #[command(flatten)]
        reach: Reached,
    },
    /// Removes one object
    Delete {
        name: String,
        /// policy, service, group or egress
        #[arg(long, default_value = "policy", value_parser = ["policy", "service", "group", "egress"])]
        kind: String,
        #[command(flatten)]
        reach: Reached,
    },
    /// Makes policies, services, groups and egress of this cell what they were right after a change
    Rollback {
        /// Which change (ambit policy history)
        revision: u64,
        #[command(flatten)]
        reach: Reached,
    },
    /// Changes of policies, services, groups and egress of this cell, newest first
    History {
        /// How many; 0 for all that is remembered
        #[arg(long, default_value_t = 20)]
        limit: u32,
    },
    /// Who may call a workload, or an address outside of the mesh, of those that are known, and by which documents
    #[command(name = "who-can")]
    WhoCan {
        /// The workload's SPIFFE ID or an address, and perhaps a port ([IPv6]:PORT)
        #[arg(value_name = "SPIFFE|ADDRESS[:PORT]")]
        destination: String,
    },
    /// Who called whom in the last day, newest first, as the nodes of the cell saw it
    Flows {
        /// How many; 0 for as many as one answer holds
        #[arg(long, default_value_t = 100)]
        limit: u32,
    },
    /// Policies that speak of no pair of known identities, and why
    Unused {
        /// Also those by which nothing was judged that was seen in this time, such as 12h; a day at most
        #[arg(long, value_name = "TIME")]
        within: Option<Millis>,
    },
    /// Policies, services, groups and egress that the cell knows, imported ones too
    List,
    /// Which agents hold the cell's revision in their kernel; ends 5 where one does not
    Status {
        /// Wait, at most --timeout, until all do
        #[arg(long)]
        wait: bool,
    },
    /// Why SRC may or may not reach DST:PORT
    Explain(Explain),
}

/// How far a change may reach.
#[derive(Debug, clap::Args)]
pub struct Reached {
    /// Refuse to change the connections of more pairs of known identities than this; `any` changes at once, without a plan,
    /// and the history tells it
    #[arg(long, value_name = "N|any", default_value = "100")]
    pub max_flips: MaxFlips,
}

/// A limit that somebody set, or none on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MaxFlips {
    /// At most so many pairs.
    Pairs(u64),
    /// As many as there are, and more than can be counted.
    Any,
}

impl std::str::FromStr for MaxFlips {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "any" => Ok(Self::Any),
            number => number.parse().map(Self::Pairs).map_err(|_| "expected a number of pairs, or any".to_owned()),
        }
    }
}

#[derive(Debug, clap::Args)]
pub struct Explain {
    /// The caller's SPIFFE ID, or the IPv4 address of one outside of the mesh
    #[arg(value_name = "SRC")]
    pub source: String,
    /// The target's SPIFFE ID (or address) and port
    #[arg(value_name = "DST:PORT")]
    pub destination: Destination,
    /// As it was then (2026-11-23T14:03:26Z), as far as changes are remembered
    #[arg(long, value_name = "TIME")]
    pub at: Option<String>,
    /// And how this connection was judged, by its id in agents' records: a trace id, or a whole traceparent
    #[arg(long, value_name = "ID")]
    pub connection: Option<String>,
}

/// What is called: a name and a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    pub name: String,
    pub port: u16,
}

impl std::str::FromStr for Destination {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let bad = || "expected a SPIFFE ID or an address ([IPv6]), a colon and a port of 1-65535".to_owned();
        let (name, port) = s.rsplit_once(':').ok_or_else(bad)?;
        let port: u16 = port.parse().map_err(|_| bad())?;
        // Brackets tell where an IPv6 address ends and a port begins (RFC 3986, 3.2.2).
        let within = name.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        let name = match within {
            Some(address) if address.parse::<std::net::Ipv6Addr>().is_ok() => address,
            None if !name.starts_with("spiffe:") && name.contains(':') => return Err(bad()),
            Some(_) => return Err(bad()),
            None => name,
        };
        if name.is_empty() || port == 0 { Err(bad()) } else { Ok(Destination { name: name.to_owned(), port }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv6_address_is_in_brackets() {
        let read = |text: &str| text.parse::<Destination>().map(|to| (to.name, to.port));
        for (text, name, port) in [
            ("spiffe://west/db:80", "spiffe://west/db", 80),
            ("10.0.0.1:443", "10.0.0.1", 443),
            ("[fd00::1]:443", "fd00::1", 443),
        ] {
            assert_eq!(read(text), Ok((name.to_owned(), port)));
        }
        for bad in ["fd00::1:443", "[fd00::1]", "[fd00::1]:0", "[db]:1", "[]:1", "10.0.0.1", "spiffe://west/db"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
