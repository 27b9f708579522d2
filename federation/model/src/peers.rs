//! Sets of identities, as policies and services name them.

use crate::id::{ClusterId, ObjectName, SpiffeId, TrustDomain};
use crate::refusal::{Code, Refusal};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

/// Labels that an entry must have, all of them.
pub type Labels = BTreeMap<ObjectName, String>;

/// Labels of one set, or of one entry.
pub(crate) const LABELS_MAX: usize = 8;
/// Bytes of a label's value.
const LABEL_BYTES_MAX: usize = 63;
/// What a document may say.
const FORMS: &str = "spiffe://td/path, spiffe://td/prefix/*, spiffe://td/*, cluster:td/name, group:td/name or \
                     labels:td/key=value&key=value";

/// A set of SPIFFE identities. It never spans two trust domains, but for a group, whose members are judged one by one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Peers {
    /// Exactly one identity.
    Id(SpiffeId),
    /// `spiffe://td/prefix/*`: every identity of the trust domain below the path, which ends in `/`.
    Below(TrustDomain, String),
    /// `spiffe://td/*`: every identity of the trust domain.
    Domain(TrustDomain),
    /// `cluster:td/name`: the identities that run in that cluster of the trust domain.
    Cluster(TrustDomain, ClusterId),
    /// `group:td/name`: whom that cell's group of this name names.
    Group(TrustDomain, ObjectName),
    /// `labels:td/key=value&key=value`: the identities whose entries have all these labels.
    Labelled(TrustDomain, Labels),
    /// What a cell found one of the three before to be, as it tells its agents. No document says it.
    Ids(TrustDomain, BTreeSet<SpiffeId>),
}

impl Peers {
    /// The trust domain that the set lies in; of a group, the one whose cell wrote it.
    pub fn trust_domain(&self) -> TrustDomain {
        match self {
            Self::Id(id) => id.trust_domain(),
            Self::Below(td, _)
            | Self::Domain(td)
            | Self::Cluster(td, _)
            | Self::Group(td, _)
            | Self::Labelled(td, _)
            | Self::Ids(td, _) => td.clone(),
        }
    }

    /// Whether `id` is in the set. Of one that only a cell can resolve nobody is known to be.
    pub fn contains(&self, id: &SpiffeId) -> bool {
        match self {
            Self::Id(mine) => mine == id,
            Self::Below(td, path) => id.path().starts_with(path.as_str()) && id.trust_domain() == *td,
            Self::Domain(td) => id.trust_domain() == *td,
            Self::Cluster(..) | Self::Group(..) | Self::Labelled(..) => false,
            // Whose a set is, is what it may speak of: a record could name others in it.
            Self::Ids(td, ids) => ids.contains(id) && id.trust_domain() == *td,
        }
    }

    /// Whether only a cell can say who is in it.
    pub fn is_named(&self) -> bool {
        matches!(self, Self::Cluster(..) | Self::Group(..) | Self::Labelled(..))
    }

    /// Whether a document can say it. A record of a peer may hold any text, and what a cell says to its agents only.
    pub fn is_written(&self) -> bool {
        match self {
            Self::Below(_, path) => crate::id::is_prefix(path),
            Self::Ids(..) => false,
            Self::Id(_) | Self::Domain(_) | Self::Cluster(..) | Self::Group(..) | Self::Labelled(..) => true,
        }
    }

    /// Whether every identity of `other` is in this set, as far as their texts say.
    pub fn covers(&self, other: &Peers) -> bool {
        match (self, other) {
            (mine, Self::Id(id)) => mine.contains(id),
            (Self::Domain(_), Self::Group(..)) => false,
            (Self::Domain(td), other) => other.trust_domain() == *td,
            (Self::Below(td, path), Self::Below(other, below)) => td == other && below.starts_with(path.as_str()),
            (mine, other) => mine == other,
        }
    }

    /// As a document writes it, or as a cell tells an agent: `ids:td /path /path`.
    ///
    /// # Errors
    /// [`Code::BadRequest`]; also for a set that the cell should have resolved.
    pub fn from_wire(text: &str) -> Result<Self, Refusal> {
        let Some(rest) = text.strip_prefix("ids:") else {
            let set: Self = text.parse()?;
            return if set.is_named() {
                Err(Refusal::new(Code::BadRequest, "a set that is resolved", text))
            } else {
                Ok(set)
            };
        };
        let mut words = rest.split(' ');
        let td: TrustDomain = words.next().unwrap_or_default().parse()?;
        let ids = words.map(|path| format!("spiffe://{td}{path}").parse::<SpiffeId>()).collect::<Result<_, _>>()?;
        Ok(Self::Ids(td, ids))
    }
}

/// As a document writes it.
impl FromStr for Peers {
    type Err = Refusal;
    fn from_str(s: &str) -> Result<Self, Refusal> {
        let bad = || Refusal::new(Code::BadRequest, FORMS, s);
        if let Some(rest) = s.strip_prefix("spiffe://") {
            let Some(head) = rest.strip_suffix("/*") else { return Ok(Self::Id(s.parse()?)) };
            return match head.split_once('/') {
                None => Ok(Self::Domain(head.parse()?)),
                Some(_) => {
                    let prefix: SpiffeId = format!("spiffe://{head}").parse()?;
                    Ok(Self::Below(prefix.trust_domain(), format!("{}/", prefix.path())))
                }
            };
        }
        let (kind, rest) = s.split_once(':').ok_or_else(bad)?;
        let (td, name) = rest.split_once('/').ok_or_else(bad)?;
        match kind {
            "cluster" => Ok(Self::Cluster(td.parse()?, name.parse()?)),
            "group" => Ok(Self::Group(td.parse()?, name.parse()?)),
            "labels" => Ok(Self::Labelled(td.parse()?, labels(name)?)),
            _ => Err(bad()),
        }
    }
}

/// `key=value&key=value`, each key once.
fn labels(text: &str) -> Result<Labels, Refusal> {
    let mut found = Labels::new();
    for pair in text.split('&') {
        let (key, value) = label(pair)?;
        if found.insert(key, value).is_some() || found.len() > LABELS_MAX {
            return Err(Refusal::new(Code::BadRequest, format!("1-{LABELS_MAX} labels, each key once"), text));
        }
    }
    Ok(found)
}

/// One label, `key=value`: the key is a name, the value 1-63 characters of `[a-zA-Z0-9._-]`.
///
/// # Errors
/// [`Code::BadRequest`].
pub fn label(text: &str) -> Result<(ObjectName, String), Refusal> {
    let good = |v: &&str| {
        (1..=LABEL_BYTES_MAX).contains(&v.len())
            && v.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
    };
    let read = text.split_once('=').and_then(|(key, value)| Some((key.parse().ok()?, Some(value).filter(good)?)));
    let expected = "key=value, the value of 1-63 characters from a-z A-Z 0-9 . - _";
    read.map(|(key, value)| (key, value.to_owned())).ok_or_else(|| Refusal::new(Code::BadRequest, expected, text))
}

impl fmt::Display for Peers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => write!(f, "{id}"),
            Self::Below(td, path) => write!(f, "spiffe://{td}{path}*"),
            Self::Domain(td) => write!(f, "spiffe://{td}/*"),
            Self::Cluster(td, name) => write!(f, "cluster:{td}/{name}"),
            Self::Group(td, name) => write!(f, "group:{td}/{name}"),
            Self::Labelled(td, labels) => {
                write!(f, "labels:{td}/")?;
                let mut between = "";
                for (key, value) in labels {
                    write!(f, "{between}{key}={value}")?;
                    between = "&";
                }
                Ok(())
            }
            Self::Ids(td, ids) => {
                write!(f, "ids:{td}")?;
                ids.iter().try_for_each(|id| write!(f, " {}", id.path()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_written_as_they_are_read() {
        for text in [
            "spiffe://west/a",
            "spiffe://west/a/*",
            "spiffe://west/*",
            "cluster:west/prod",
            "group:west/ops",
            "labels:west/app=db&tier=back",
        ] {
            assert_eq!(text.parse::<Peers>().unwrap().to_string(), text);
        }
        for text in ["ids:west /a /b/c", "ids:west"] {
            assert!(text.parse::<Peers>().is_err(), "{text}: no document says it");
            assert_eq!(Peers::from_wire(text).unwrap().to_string(), text);
        }
        for text in
            ["cluster:west", "cluster:West/a", "labels:west/", "labels:west/a=1&a=2", "labels:west/a=", "x:west/a"]
        {
            assert!(text.parse::<Peers>().is_err() && Peers::from_wire(text).is_err(), "{text}");
        }
        for text in ["cluster:west/prod", "group:west/ops", "ids:west a", "ids:west /a/"] {
            assert!(Peers::from_wire(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_prefix_that_no_text_gives_is_told() {
        for (path, written) in [
            ("/a/", true),
            ("/a/b.c/", true),
            ("/", false),
            ("//", false),
            ("", false),
            ("/a", false),
            ("a/", false),
            ("/a//", false),
            ("/../", false),
            ("/a b/", false),
            ("/a*/", false),
        ] {
            let set = Peers::Below("west".parse().unwrap(), path.into());
            assert_eq!(set.is_written(), written, "{path}");
            assert_eq!(set.to_string().parse::<Peers>().is_ok_and(|read| read == set), written, "{path}");
        }
        assert!(!Peers::from_wire("ids:west /a").unwrap().is_written());
    }

    #[test]
    fn a_set_covers_what_its_text_says() {
        for (wide, narrow, covers) in [
            ("spiffe://w/*", "spiffe://w/a", true),
            ("spiffe://w/*", "spiffe://w/a/*", true),
            ("spiffe://w/*", "cluster:w/a", true),
            ("spiffe://w/*", "group:w/a", false),
            ("spiffe://w/*", "spiffe://e/a", false),
            ("spiffe://w/a/*", "spiffe://w/a/b/*", true),
            ("spiffe://w/a/*", "spiffe://w/ab/*", false),
            ("spiffe://w/a/*", "spiffe://w/a", false),
            ("spiffe://w/a/b/*", "spiffe://w/a/*", false),
            ("cluster:w/a", "cluster:w/a", true),
            ("cluster:w/a", "spiffe://w/a", false),
        ] {
            assert_eq!(wide.parse::<Peers>().unwrap().covers(&narrow.parse().unwrap()), covers, "{wide} {narrow}");
        }
    }
}
