//! What a cell shows to its peers: its root, and the record key that the root certified. Real keys, made once a process; no
//! choice of a run depends on their bytes.

use crate::host::EPOCH_MS;
use ambit_identity::{KeySet, RecordKey, Root};
use ambit_model::{Refusal, Stamp, TrustDomain};
use ambit_state::objects::{KeySetRow, PeerRow, PeerState};
use sha2::{Digest as _, Sha256};
use std::rc::Rc;

pub(crate) struct Card {
    pub(crate) name: TrustDomain,
    pub(crate) root_der: Vec<u8>,
    pub(crate) key: Rc<RecordKey>,
    pub(crate) key_set: KeySetRow,
}

impl Card {
    pub(crate) fn make(name: &str) -> Result<Card, Refusal> {
        let name: TrustDomain = name.parse()?;
        let root = Root::create(&name, Stamp(EPOCH_MS), [1; 16])?;
        let key = RecordKey::generate()?;
        let (statement, signature) = KeySet::certify(&root, &name, 1, vec![key.public()])?;
        let key_set = KeySetRow { statement, signature };
        Ok(Card { name, root_der: root.der().to_vec(), key: Rc::new(key), key_set })
    }

    /// As a peer keeps it.
    pub(crate) fn row(&self) -> PeerRow {
        PeerRow {
            state: PeerState::Pending,
            // Operators compare it, pulls do not: of the name, so that the same seed writes the same entries.
            fingerprint: Sha256::digest(self.name.as_str().as_bytes()).into(),
            addresses: Vec::new(),
            root_der: self.root_der.clone(),
            bundle_sequence: (1 << 40) | 1,
            key_set: self.key_set.clone(),
            epoch: 0,
            seq: 0,
            hash: [0; 32],
            trouble: String::new(),
        }
    }
}
