//! What a cell shows to its peers: its root, and the record key that the root certified. Real keys, made once for all
//! (`ambit-sim --make-cards > tests/sim/cards.txt`): entries hold them, and the same seed is to write the same entries. They
//! open nothing but simulated cells.

use crate::host::EPOCH_MS;
use ambit_identity::{KeySet, RecordKey, Root};
use ambit_model::{Code, Refusal, Stamp, TrustDomain};
use ambit_state::objects::{KeySetRow, PeerRow, PeerState};
use sha2::{Digest as _, Sha256};
use std::rc::Rc;

pub(crate) struct Card {
    pub(crate) name: TrustDomain,
    pub(crate) root_der: Vec<u8>,
    /// Of its replicas.
    pub(crate) keys: Vec<Rc<RecordKey>>,
    /// All of them vote.
    pub(crate) key_set: KeySetRow,
    /// Once it began anew with one replica, which has the first of the keys.
    pub(crate) anew: KeySetRow,
}

/// The cells that know each other.
pub(crate) const PEERED: [&str; 3] = ["west", "east", "core"];

/// A card per line: whose and which, root (DER), three record keys (PKCS#8), key set and its signature, the same once it began
/// anew.
const CARDS: &str = include_str!("../cards.txt");

/// Of each of [`PEERED`] the one that it has, and the one that a forger shows in its name.
pub fn made() -> Result<String, Refusal> {
    let lines = PEERED.iter().flat_map(|name| ["own", "forged"].map(|which| (name, which))).map(|(name, which)| {
        let td: TrustDomain = name.parse()?;
        let root = Root::create(&td, Stamp(EPOCH_MS), [1; 16])?;
        let keys = [RecordKey::generate()?, RecordKey::generate()?, RecordKey::generate()?];
        let all = keys.iter().map(RecordKey::public).collect();
        let set = KeySet::certify(&root, &td, KeySet::seq_after(0, 1), all)?;
        let anew = KeySet::certify(&root, &td, KeySet::seq_after(1, 2), vec![keys[0].public()])?;
        let mut parts = vec![hex::encode(root.der())];
        parts.extend(keys.iter().map(|key| hex::encode(key.pkcs8())));
        parts.extend([set.0, set.1, anew.0, anew.1].map(hex::encode));
        Ok(format!("{name} {which} {}\n", parts.join(" ")))
    });
    lines.collect()
}

impl Card {
    /// The cell's own, or the one that a forger shows.
    pub(crate) fn of(name: &str, which: &str) -> Result<Card, Refusal> {
        let unreadable = || Refusal::new(Code::Internal, "a card (ambit-sim --make-cards)", format!("{name} {which}"));
        let line = CARDS.lines().find_map(|line| line.strip_prefix(&format!("{name} {which} ")));
        let parts = line.ok_or_else(unreadable)?.split(' ').map(hex::decode).collect::<Result<Vec<_>, _>>();
        let [root_der, first, second, third, statement, signature, anew, anew_signature] =
            <[Vec<u8>; 8]>::try_from(parts.map_err(|_| unreadable())?).map_err(|_| unreadable())?;
        let keys = [first, second, third].into_iter().map(|key| RecordKey::from_pkcs8(&key).map(Rc::new));
        Ok(Card {
            name: name.parse()?,
            root_der,
            keys: keys.collect::<Result<_, _>>()?,
            key_set: KeySetRow { statement, signature },
            anew: KeySetRow { statement: anew, signature: anew_signature },
        })
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
