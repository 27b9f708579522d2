//! What evidence is kept, of whom and since when, and what has to go.
//!
//! A node that sends more than its share loses its own oldest. Where all together are too much, those go that hold the
//! most: so that no node, however much it sends, takes from one that holds less.

use ambit_model::NodeId;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, SystemTime};

/// How much is kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct Caps {
    /// Of one node.
    pub(super) node_bytes: u64,
    /// Of all nodes together.
    pub(super) all_bytes: u64,
    /// How long.
    pub(super) age: Duration,
}

/// One object.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) sha256: [u8; 32],
    pub(super) bytes: u64,
    pub(super) since: SystemTime,
}

/// Names and sizes of the evidence kept.
pub(super) struct Stock {
    caps: Caps,
    /// Oldest first; no node has none.
    nodes: BTreeMap<NodeId, Share>,
    known: BTreeSet<[u8; 32]>,
    /// Who holds how much.
    by_bytes: BTreeSet<(u64, NodeId)>,
    bytes: u64,
}

#[derive(Default)]
struct Share {
    pieces: VecDeque<Piece>,
    bytes: u64,
}

impl Stock {
    pub(super) fn new(caps: Caps) -> Stock {
        Stock { caps, nodes: BTreeMap::new(), known: BTreeSet::new(), by_bytes: BTreeSet::new(), bytes: 0 }
    }

    /// Adds a piece (once), and names those that have to go for it.
    pub(super) fn add(&mut self, node: NodeId, piece: Piece) -> Vec<[u8; 32]> {
        if !self.known.insert(piece.sha256) {
            return Vec::new();
        }
        let share = self.nodes.entry(node).or_default();
        self.by_bytes.remove(&(share.bytes, node));
        share.pieces.push_back(piece);
        share.bytes = share.bytes.saturating_add(piece.bytes);
        self.by_bytes.insert((share.bytes, node));
        self.bytes = self.bytes.saturating_add(piece.bytes);
        let mut gone = Vec::new();
        while self.nodes.get(&node).is_some_and(|share| share.bytes > self.caps.node_bytes) {
            gone.extend(self.drop_oldest(node));
        }
        while self.bytes > self.caps.all_bytes
            && let Some((_, largest)) = self.by_bytes.last().copied()
        {
            gone.extend(self.drop_oldest(largest));
        }
        gone
    }

    /// Names what is too old at `now`.
    pub(super) fn expire(&mut self, now: SystemTime) -> Vec<[u8; 32]> {
        let age = self.caps.age;
        let old = |piece: &Piece| now.duration_since(piece.since).is_ok_and(|since| since > age);
        let nodes: Vec<NodeId> = self.nodes.keys().copied().collect();
        let mut gone = Vec::new();
        for node in nodes {
            while self.nodes.get(&node).and_then(|share| share.pieces.front()).is_some_and(old) {
                gone.extend(self.drop_oldest(node));
            }
        }
        gone
    }

    /// Number and bytes of what is kept.
    pub(super) fn usage(&self) -> (usize, u64) {
        (self.known.len(), self.bytes)
    }

    fn drop_oldest(&mut self, node: NodeId) -> Option<[u8; 32]> {
        let share = self.nodes.get_mut(&node)?;
        self.by_bytes.remove(&(share.bytes, node));
        let piece = share.pieces.pop_front();
        let bytes = piece.map_or(0, |piece| piece.bytes);
        share.bytes = share.bytes.saturating_sub(bytes);
        self.bytes = self.bytes.saturating_sub(bytes);
        if share.pieces.is_empty() {
            self.nodes.remove(&node);
        } else {
            self.by_bytes.insert((share.bytes, node));
        }
        let sha256 = piece?.sha256;
        self.known.remove(&sha256);
        Some(sha256)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPS: Caps = Caps { node_bytes: 40, all_bytes: 100, age: Duration::from_secs(10) };

    fn at(s: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(s)
    }
    fn piece(n: u8, bytes: u64, s: u64) -> Piece {
        Piece { sha256: [n; 32], bytes, since: at(s) }
    }
    fn numbers(gone: Vec<[u8; 32]>) -> Vec<u8> {
        gone.iter().map(|sha256| sha256[0]).collect()
    }

    #[test]
    fn a_share_is_bounded_and_what_is_too_much_is_taken_from_those_who_hold_most() {
        let (a, b, c) = (NodeId([1; 32]), NodeId([2; 32]), NodeId([3; 32]));
        let mut stock = Stock::new(CAPS);
        assert!(stock.add(a, piece(1, 30, 0)).is_empty());
        assert!(stock.add(a, piece(1, 30, 0)).is_empty(), "the same again is no more");
        assert_eq!(stock.usage(), (1, 30));
        assert_eq!(numbers(stock.add(a, piece(2, 11, 1))), [1], "more than one node may hold");
        for (node, n, bytes) in [(b, 3, 20), (b, 4, 20), (c, 5, 29)] {
            assert!(stock.add(node, piece(n, bytes, 2)).is_empty());
        }
        assert_eq!(stock.usage(), (4, 80));
        assert_eq!(numbers(stock.add(a, piece(6, 25, 3))), [3], "b holds most, not who came last");
        assert_eq!(stock.usage(), (4, 85));
        // A piece larger than a share is not kept, and takes nothing from others.
        assert_eq!(numbers(stock.add(c, piece(7, 41, 3))), [5, 7]);
        assert_eq!(stock.usage(), (3, 56));
    }

    #[test]
    fn what_is_old_goes() {
        let mut stock = Stock::new(CAPS);
        for n in 0..4 {
            stock.add(NodeId([n % 2; 32]), piece(n, 1, u64::from(n)));
        }
        assert!(stock.expire(at(10)).is_empty());
        assert_eq!(numbers(stock.expire(at(12))), [0, 1]);
        // A clock that went back makes nothing old.
        assert!(stock.expire(at(0)).is_empty());
        assert_eq!(numbers(stock.expire(at(100))), [2, 3]);
        assert_eq!(stock.usage(), (0, 0));
        assert!(stock.by_bytes.is_empty() && stock.nodes.is_empty());
    }
}
