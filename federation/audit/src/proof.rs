//! Inclusion and consistency: how they are made from stored hashes, and how they are verified (RFC 9162 section 2.1.3.2 and
//! 2.1.4.2, whose trees are RFC 6962's).

use crate::tree::{Hash, SIZE_MAX, empty_root, node_hash};
use ambit_model::{Code, Refusal};

/// Hashes of complete subtrees, wherever they are kept.
pub trait Nodes {
    /// What went wrong where they are kept.
    type Error;
    /// The root of the complete subtree of 2^`level` entries that begins at entry `index` * 2^`level`.
    fn node(&self, level: u32, index: u64) -> Result<Hash, Self::Error>;
}

/// The root of entries `[from, to)`, where `from` is a multiple of the least power of two that is not below `to - from`.
fn range<N: Nodes>(nodes: &N, from: u64, to: u64) -> Result<Hash, N::Error> {
    let len = to - from;
    if len.is_power_of_two() {
        let level = len.trailing_zeros();
        return nodes.node(level, from >> level);
    }
    let half = split(len);
    Ok(node_hash(&range(nodes, from, from + half)?, &range(nodes, from + half, to)?))
}

/// The largest power of two below `n`, which is above 1.
fn split(n: u64) -> u64 {
    1 << (63 - (n - 1).leading_zeros())
}

/// The root of the first `size` entries.
pub fn root<N: Nodes>(nodes: &N, size: u64) -> Result<Hash, N::Error> {
    if size == 0 { Ok(empty_root()) } else { range(nodes, 0, size) }
}

/// The path from entry `index` to the root of the first `size`, from below; `index` is below `size`.
pub fn inclusion<N: Nodes>(nodes: &N, index: u64, size: u64) -> Result<Vec<Hash>, N::Error> {
    let (mut from, mut to, mut path) = (0, size, Vec::new());
    while to - from > 1 {
        let middle = from + split(to - from);
        if index < middle {
            path.push(range(nodes, middle, to)?);
            to = middle;
        } else {
            path.push(range(nodes, from, middle)?);
            from = middle;
        }
    }
    path.reverse();
    Ok(path)
}

/// That the first `old` of `new` entries are what they were; `0 < old <= new`, and for equal sizes nothing.
pub fn consistency<N: Nodes>(nodes: &N, old: u64, new: u64) -> Result<Vec<Hash>, N::Error> {
    let (mut from, mut to, mut path, mut whole) = (0, new, Vec::new(), true);
    while old != to {
        let middle = from + split(to - from);
        if old <= middle {
            path.push(range(nodes, middle, to)?);
            to = middle;
        } else {
            path.push(range(nodes, from, middle)?);
            from = middle;
            whole = false;
        }
    }
    if !whole {
        path.push(range(nodes, from, to)?);
    }
    path.reverse();
    Ok(path)
}

fn mismatch(expected: impl Into<String>, found: impl Into<String>) -> Refusal {
    Refusal::new(Code::AuditMismatch, expected, found)
}

/// Whether the entry with this leaf hash is the one at `index` of the tree of `size` with this root.
///
/// # Errors
/// [`Code::AuditMismatch`].
pub fn verify_inclusion(leaf: &Hash, index: u64, size: u64, path: &[Hash], root: &Hash) -> Result<(), Refusal> {
    if index >= size || size > SIZE_MAX {
        return Err(mismatch(format!("an index below {size}"), index.to_string()));
    }
    let (mut f, mut s, mut r) = (index, size - 1, *leaf);
    for p in path {
        if s == 0 {
            return Err(mismatch("an inclusion proof as long as the tree is high", "a longer one"));
        }
        if f & 1 == 1 || f == s {
            r = node_hash(p, &r);
            while f & 1 == 0 && f != 0 {
                f >>= 1;
                s >>= 1;
            }
        } else {
            r = node_hash(&r, p);
        }
        f >>= 1;
        s >>= 1;
    }
    if s != 0 {
        return Err(mismatch("an inclusion proof as long as the tree is high", "a shorter one"));
    }
    if r != *root {
        return Err(mismatch(format!("the root {}", hex::encode(root)), format!("{} by the proof", hex::encode(r))));
    }
    Ok(())
}

/// Whether the tree of `new` entries begins with the one of `old` entries.
///
/// # Errors
/// [`Code::AuditMismatch`].
pub fn verify_consistency(old: u64, new: u64, old_root: &Hash, new_root: &Hash, path: &[Hash]) -> Result<(), Refusal> {
    if old > new || new > SIZE_MAX {
        return Err(mismatch(format!("a log of at least {old} entries"), new.to_string()));
    }
    if old == new || old == 0 {
        let same = if old == new { old_root == new_root } else { *old_root == empty_root() };
        return match (same, path) {
            (true, []) => Ok(()),
            (true, _) => Err(mismatch("an empty proof", "a longer one")),
            (false, _) => Err(mismatch(
                format!("the root {} at size {old}", hex::encode(old_root)),
                format!("{} at size {new}", hex::encode(new_root)),
            )),
        };
    }
    let short = || mismatch("a consistency proof as long as the trees are high", "another length");
    // A tree whose size is a power of two is a node of the larger one, and so left out of its own proof.
    let mut rest = path.iter();
    let first = if old.is_power_of_two() { *old_root } else { *rest.next().ok_or_else(short)? };
    let (mut f, mut s) = (old - 1, new - 1);
    while f & 1 == 1 {
        f >>= 1;
        s >>= 1;
    }
    let (mut was, mut is) = (first, first);
    for c in rest {
        if s == 0 {
            return Err(short());
        }
        if f & 1 == 1 || f == s {
            was = node_hash(c, &was);
            is = node_hash(c, &is);
            while f & 1 == 0 && f != 0 {
                f >>= 1;
                s >>= 1;
            }
        } else {
            is = node_hash(&is, c);
        }
        f >>= 1;
        s >>= 1;
    }
    if s != 0 {
        return Err(short());
    }
    for (size, expected, found) in [(old, old_root, was), (new, new_root, is)] {
        if found != *expected {
            let expected = format!("the root {} at size {size}", hex::encode(expected));
            return Err(mismatch(expected, format!("{} by the proof", hex::encode(found))));
        }
    }
    Ok(())
}
