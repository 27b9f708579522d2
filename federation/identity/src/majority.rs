//! How many of a cell's replicas have to say a thing before others believe it: more than half of those that vote, each by its
//! own record key. One stolen replica says nothing for its cell.

use crate::record::is_signed_by;
use std::collections::BTreeSet;

/// A replica's signature on what its cell says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CoSignature {
    /// Whose: place of its key in the key set.
    pub key_index: u32,
    /// Ed25519, 64 bytes.
    pub signature: Vec<u8>,
}

/// The least number that is more than half.
pub fn majority(voters: usize) -> usize {
    voters / 2 + 1
}

/// How many of the voters signed exactly this: each key once, however often it comes and under whatever index.
pub fn signers(voters: &[[u8; 32]], message: &[u8], signatures: &[CoSignature]) -> usize {
    let named = signatures.iter().filter_map(|one| {
        let key = voters.get(usize::try_from(one.key_index).ok()?)?;
        is_signed_by(key, message, &one.signature).then_some(key)
    });
    named.collect::<BTreeSet<_>>().len()
}
