//! Where connections to services go, as operators say it beside the documents: where clusters are, which of them get no new
//! connections, and which stand in for others.
//!
//! None of it allows anything: whom a caller may reach is said by policies alone.

use crate::id::{ClusterId, ObjectName, TrustDomain};
use crate::time::Stamp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A cluster, and whose it is: names are unique within a trust domain only.
pub type Place = (TrustDomain, ClusterId);
/// A service, and whose it is.
pub type ServiceName = (TrustDomain, ObjectName);

/// An operator's word.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Word {
    /// Whose.
    pub by: String,
    /// When.
    pub stamp: Stamp,
    /// Why, in a few words.
    pub note: String,
}

/// What a cell says of a cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterTraits {
    /// Rises by one with each change.
    pub version: u64,
    /// Where it is; of clusters in one region each is nearer to the others than one elsewhere. None was said of most.
    pub region: Option<ObjectName>,
    /// No new connection to a service goes to it.
    pub drained: bool,
    /// Of the last change.
    pub word: Word,
}

/// What would go to one cluster goes to another, until an operator takes that back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Steer {
    /// Rises by one with each change.
    pub version: u64,
    /// Where to; none: it was taken back.
    pub to: Option<Place>,
    /// Of the last change.
    pub word: Word,
}

/// As rows and records hold it: what comes after this release is another variant, never another meaning.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Versioned<T> {
    /// As of this release.
    V1(T),
}

impl<T> Versioned<T> {
    /// What is held.
    pub fn get(&self) -> &T {
        let Self::V1(value) = self;
        value
    }
}

/// What counts of a cluster where an endpoint is chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Traits {
    /// See [`ClusterTraits::region`].
    pub region: Option<ObjectName>,
    /// See [`ClusterTraits::drained`].
    pub drained: bool,
}

/// What counts where an endpoint is chosen. A cluster of which nothing is said is not in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Routing {
    /// Of clusters.
    pub clusters: BTreeMap<Place, Traits>,
    /// Of a service and a cluster: which one stands in for it.
    pub steers: BTreeMap<(ServiceName, Place), Place>,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows in stores and records at peers: a change of these bytes is a change of format, and takes another variant.
    #[test]
    fn stored_bytes_are_what_they_were() {
        let word = Word { by: "ann".into(), stamp: Stamp(5), note: "n".into() };
        let traits = ClusterTraits { version: 2, region: Some("eu-1".parse().unwrap()), drained: true, word };
        let bytes = postcard::to_stdvec(&Versioned::V1(traits.clone())).unwrap();
        assert_eq!(hex::encode(&bytes), "0002010465752d310103616e6e05016e");
        assert_eq!(postcard::from_bytes::<Versioned<ClusterTraits>>(&bytes).unwrap().get(), &traits);
        let steer = Steer { version: 1, to: None, word: Word::default() };
        assert_eq!(hex::encode(postcard::to_stdvec(&Versioned::V1(steer)).unwrap()), "000100000000");
    }
}
