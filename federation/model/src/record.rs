//! Signed, hash-chained records: how what one cell decides reaches another.

use crate::id::TrustDomain;
use crate::time::Stamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// What a record speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Kind {
    /// A cluster of the origin; key = its name. The payload is the trust domain and, where more is said, the traits: former
    /// releases read nothing of it.
    Cluster,
    /// The origin's bundle; key = trust domain.
    Bundle,
    /// A policy; key = its name.
    Policy,
    /// A service; key = its name.
    Service,
    /// An endpoint; key = address.
    Endpoint,
    /// A node that is no longer trusted, with its generation; key = node id.
    NodeDenial,
    /// The origin's keys of JWT-SVIDs, with the sequence of the bundle that they came with; key = trust domain.
    JwtKeys,
    /// SVIDs of an identity of the origin that are refused; key = SPIFFE ID.
    IdDenial,
    /// One SVID of the origin that is refused; key = authority, slash, serial in hexadecimal digits.
    LeafDenial,
    /// An intermediate whose leaves are refused, until it ended; key = its name.
    AuthorityDenial,
    /// Where tunnels of a node of the origin come from; key = node id.
    NodeAddress,
    /// A group of identities that policies of the origin use; key = its name.
    Group,
    /// A service of the origin whose calls go to another cluster; key = service, slash, trust domain and cluster that they would
    /// go to.
    Steer,
    /// Whom the origin names for the case that it is lost ([`crate::Naming`]); key = trust domain.
    Standby,
    /// Keys of the origin's approvers, by name; key = trust domain.
    Approvers,
    /// Another cell's authority, granted to the origin ([`crate::SignedGrant`]); key = that cell's trust domain.
    Grant,
    /// What the origin has taken in of another cell ([`crate::Seen`]); key = that cell's trust domain.
    Seen,
}

/// One decision of its origin. An empty payload removes the object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The cell's trust domain; the cell is the only writer of what it originates.
    pub origin: TrustDomain,
    /// Rises when authority over the origin moves.
    pub epoch: u64,
    /// 1, 2, 3, ... without a gap.
    pub seq: u64,
    /// [`Record::hash`] of the one before; zeros for the first.
    pub prev_hash: [u8; 32],
    /// What it speaks of.
    pub kind: Kind,
    /// Which object.
    pub key: String,
    /// The object as postcard bytes of the model type, or empty for "removed".
    pub payload: Vec<u8>,
}

impl Record {
    /// SHA-256 over every field, each length-prefixed, under the context `ambit/record/v1`.
    pub fn hash(&self) -> [u8; 32] {
        let mut h = Sha256::new();
        h.update(b"ambit/record/v1");
        field(&mut h, self.origin.as_str().as_bytes());
        h.update(self.epoch.to_be_bytes());
        h.update(self.seq.to_be_bytes());
        h.update(self.prev_hash);
        h.update([self.kind as u8]);
        field(&mut h, self.key.as_bytes());
        field(&mut h, &self.payload);
        h.finalize().into()
    }
}

fn field(h: &mut Sha256, bytes: &[u8]) {
    h.update((bytes.len() as u64).to_be_bytes());
    h.update(bytes);
}

/// The end of an origin's chain at one moment; what is signed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// As in [`Record`].
    pub origin: TrustDomain,
    /// As in [`Record`].
    pub epoch: u64,
    /// Sequence of the last record; 0 where there is none.
    pub seq: u64,
    /// Hash of the last record; zeros where there is none.
    pub hash: [u8; 32],
    /// The origin's time when it was made.
    pub stamp: Stamp,
    /// The puller's nonce, echoed, so that age is counted from the pull (I12).
    pub nonce: [u8; 16],
}

impl Head {
    /// The bytes that a record key signs, under the context `ambit/head/v1`.
    pub fn signed_bytes(&self) -> Vec<u8> {
        self.signed_under(b"ambit/head/v1")
    }
    fn signed_under(&self, context: &[u8]) -> Vec<u8> {
        let mut out = context.to_vec();
        out.extend((self.origin.as_str().len() as u64).to_be_bytes());
        out.extend(self.origin.as_str().as_bytes());
        out.extend(self.epoch.to_be_bytes());
        out.extend(self.seq.to_be_bytes());
        out.extend(self.hash);
        out.extend(self.stamp.0.to_be_bytes());
        out.extend(self.nonce);
        out
    }
}

/// What a majority of the origin's voters sign for one pull.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// Where the answer ends.
    pub head: Head,
    /// Whether there was no more when the pull arrived: without this nothing follows about how old the rest is (I12).
    pub is_the_end: bool,
}

impl Claim {
    /// The bytes that record keys sign, under the context `ambit/head/v2`.
    pub fn signed_bytes(&self) -> Vec<u8> {
        let mut out = self.head.signed_under(b"ambit/head/v2");
        out.push(u8::from(self.is_the_end));
        out
    }
}
