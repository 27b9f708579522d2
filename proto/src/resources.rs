//! A slice as a set of resources, and what leads from one set to another: the same code makes, applies and checks deltas at
//! both ends of an agent's stream.

mod slice;

use crate::v1::{Delta, Resource, ResourceKind, ResourceName};
use ambit_model::{Code, Refusal};
use sha2::{Digest as _, Sha256};
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Bytes of resources in one part of a delta, beside the one that exceeds it: the message stays well below the 4 MiB that
/// gRPC takes.
const PART_BYTES: usize = 1 << 20;
/// What one agent holds at most, bytes of keys and bodies: 200,000 entries of 1 KiB.
pub const SET_BYTES_MAX: usize = 256 << 20;

/// The digest of a set, as on the wire.
pub type SetDigest = [u8; 32];

/// SHA-256 of one resource, in lanes: what it adds to the digest of a set, and takes away when it goes.
type Share = [u64; 4];

/// One resource.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Its kind; one that is not known here counts like any other.
    kind: i32,
    key: String,
    body: Vec<u8>,
    share: Share,
}

impl Item {
    /// A resource of this kind and key.
    pub fn new(kind: ResourceKind, key: String, body: Vec<u8>) -> Item {
        Item::of(kind.into(), key, body)
    }

    fn of(kind: i32, key: String, body: Vec<u8>) -> Item {
        let mut hash = Sha256::new();
        hash.update(kind.to_be_bytes());
        hash.update((key.len() as u64).to_be_bytes());
        hash.update(&key);
        hash.update(&body);
        let mut share = Share::default();
        for (lane, bytes) in share.iter_mut().zip(hash.finalize().chunks_exact(8)) {
            *lane = bytes.iter().fold(0, |lane, byte| lane << 8 | u64::from(*byte));
        }
        Item { kind, key, body, share }
    }

    fn name(&self) -> (i32, &str) {
        (self.kind, &self.key)
    }

    fn bytes(&self) -> usize {
        self.key.len() + self.body.len()
    }

    /// Whether it says whom to refuse.
    pub fn is_denial(&self) -> bool {
        is_denial(self.kind)
    }

    fn message(&self) -> Resource {
        Resource { kind: self.kind, key: self.key.clone(), body: self.body.clone() }
    }
}

/// Resources, each kind and key once, in their order. Cloning shares.
#[derive(Clone, Debug, Default)]
pub struct Set {
    items: Arc<Vec<Arc<Item>>>,
    lanes: Share,
    bytes: usize,
}

impl PartialEq for Set {
    fn eq(&self, other: &Set) -> bool {
        self.items == other.items
    }
}

impl FromIterator<Arc<Item>> for Set {
    /// Of two with one name the later stays.
    fn from_iter<I: IntoIterator<Item = Arc<Item>>>(items: I) -> Set {
        let mut items: Vec<Arc<Item>> = items.into_iter().collect();
        items.sort_by(|a, b| a.name().cmp(&b.name()));
        items.reverse();
        items.dedup_by(|a, b| a.name() == b.name());
        items.reverse();
        Set::sorted(items)
    }
}

impl Set {
    fn sorted(items: Vec<Arc<Item>>) -> Set {
        let (mut lanes, mut bytes) = (Share::default(), 0);
        for item in &items {
            bytes += item.bytes();
            for (lane, part) in lanes.iter_mut().zip(item.share) {
                *lane = lane.wrapping_add(part);
            }
        }
        Set { items: Arc::new(items), lanes, bytes }
    }

    /// Its digest; zeros for none.
    pub fn digest(&self) -> SetDigest {
        let mut out = SetDigest::default();
        for (bytes, lane) in out.chunks_exact_mut(8).zip(self.lanes) {
            bytes.copy_from_slice(&lane.to_be_bytes());
        }
        out
    }

    /// How many resources.
    pub fn len(&self) -> usize {
        self.items.len()
    }
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }
    /// Bytes of keys and bodies.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
    /// All, in the order of kind and key.
    pub fn items(&self) -> &[Arc<Item>] {
        &self.items
    }

    /// Whether both are one in memory.
    pub fn shares(&self, other: &Set) -> bool {
        Arc::ptr_eq(&self.items, &other.items)
    }
    /// The same set with these.
    #[must_use]
    pub fn with(&self, items: impl IntoIterator<Item = Item>) -> Set {
        let named = |item: Item| ((item.kind, item.key.clone()), Some(Arc::new(item)));
        self.changed(items.into_iter().map(named).collect())
    }

    /// The same set with other denials.
    #[must_use]
    pub fn with_denials_of(&self, other: &Set) -> Set {
        // Their kinds are the first in the order.
        let theirs = other.items.iter().take_while(|item| item.is_denial());
        Set::sorted(theirs.chain(self.items.iter().skip_while(|item| item.is_denial())).cloned().collect())
    }

    /// Whether both refuse the same.
    pub fn refuses_as(&self, other: &Set) -> bool {
        let denials = |set: &Set| set.items.iter().take_while(|item| item.is_denial()).count();
        let (mine, theirs) = (denials(self), denials(other));
        mine == theirs && self.items.iter().zip(other.items.iter()).take(mine).all(|(a, b)| same(a, b))
    }

    /// What leads from `base` to this set, in parts, also where that is nothing. Without a base: everything.
    pub fn delta(&self, base: Option<&Set>, revision: u64, stamp_ms: u64) -> Vec<Delta> {
        let nothing = Set::default();
        let (put, gone) = difference(base.unwrap_or(&nothing), self);
        let over = base.map(|base| base.digest().to_vec()).unwrap_or_default();
        let empty = || Delta { revision, stamp_ms, base: over.clone(), ..Delta::default() };
        let (mut parts, mut part, mut bytes) = (Vec::new(), empty(), 0);
        part.gone = gone.iter().map(|item| ResourceName { kind: item.kind, key: item.key.clone() }).collect();
        for item in put {
            if bytes >= PART_BYTES {
                part.more = true;
                parts.push(std::mem::replace(&mut part, empty()));
                bytes = 0;
            }
            bytes += item.bytes();
            part.put.push(item.message());
        }
        part.digest = self.digest().to_vec();
        parts.push(part);
        parts
    }

    /// The set after these changes of it.
    fn changed(&self, changes: Changes) -> Set {
        let mut items = Vec::with_capacity(self.items.len() + changes.len());
        let mut news = changes.into_iter().peekable();
        for old in self.items.iter() {
            while let Some((_, new)) = news.next_if(|((kind, key), _)| (*kind, key.as_str()) < old.name()) {
                items.extend(new);
            }
            match news.next_if(|((kind, key), _)| (*kind, key.as_str()) == old.name()) {
                Some((_, new)) => items.extend(new),
                None => items.push(old.clone()),
            }
        }
        items.extend(news.filter_map(|(_, new)| new));
        Set::sorted(items)
    }
}

fn same(a: &Arc<Item>, b: &Arc<Item>) -> bool {
    Arc::ptr_eq(a, b) || (a.share == b.share && a.name() == b.name())
}

/// What of `new` is not in `old`, and what of `old` has no place in `new`.
fn difference<'a>(old: &'a Set, new: &'a Set) -> (Vec<&'a Arc<Item>>, Vec<&'a Arc<Item>>) {
    let (mut put, mut gone) = (Vec::new(), Vec::new());
    if Arc::ptr_eq(&old.items, &new.items) {
        return (put, gone);
    }
    let (mut was, mut is) = (old.items.iter().peekable(), new.items.iter().peekable());
    loop {
        let order = match (was.peek(), is.peek()) {
            // Most of it: what did not move is shared.
            (Some(a), Some(b)) if Arc::ptr_eq(a, b) => {
                was.next();
                is.next();
                continue;
            }
            (Some(a), Some(b)) => a.name().cmp(&b.name()),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => return (put, gone),
        };
        match order {
            Ordering::Less => gone.extend(was.next()),
            Ordering::Greater => put.extend(is.next()),
            Ordering::Equal => {
                if let (Some(a), Some(b)) = (was.next(), is.next())
                    && !same(a, b)
                {
                    put.push(b);
                }
            }
        }
    }
}

/// What an agent holds, and a delta of which not all parts came.
#[derive(Clone, Debug, Default)]
pub struct Held {
    set: Set,
    revision: u64,
    holds: u64,
    /// What was held is not to be relied on: only a delta over nothing is taken.
    lost: bool,
    pending: Option<Pending>,
}

#[derive(Clone, Debug)]
struct Pending {
    base: Vec<u8>,
    revision: u64,
    denials_only: bool,
    bytes: usize,
    changes: Changes,
}

/// What comes under each name, or that it goes.
type Changes = BTreeMap<(i32, String), Option<Arc<Item>>>;

/// What came of a part of a delta.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// The rest is to come.
    Part,
    /// All resources are of the delta's revision now.
    All,
    /// Whom to refuse is, and nothing else.
    Denials,
    /// It is older than what is held, or over what was lost.
    Dropped,
}

impl Held {
    /// What is held whole.
    pub fn set(&self) -> &Set {
        &self.set
    }
    /// The newest revision of which anything is, or was, held: nothing older is taken (I7).
    pub fn revision(&self) -> u64 {
        self.revision
    }
    /// A heartbeat said that what is held is all there is to hold at this revision.
    pub fn confirm(&mut self, revision: u64) {
        self.holds = self.holds.max(revision);
    }
    /// The newest revision that was said of.
    pub fn holds(&self) -> u64 {
        self.holds
    }
    /// The digest to name on a new stream; empty where nothing is held.
    pub fn digest(&self) -> Vec<u8> {
        if self.lost || self.set.is_empty() { Vec::new() } else { self.set.digest().to_vec() }
    }

    /// A new stream begins: parts of a delta that broke off are dropped.
    pub fn resume(&mut self) {
        self.pending = None;
    }

    /// Takes one part.
    ///
    /// # Errors
    /// [`Code::BadRequest`] where it is not over what is held, its parts do not belong together, or it does not lead to
    /// the digest that it names. What was held is lost then: everything is to be asked for.
    pub fn take(&mut self, part: Delta) -> Result<Taken, Refusal> {
        if part.revision < self.revision || (self.lost && !part.base.is_empty()) {
            return Ok(Taken::Dropped);
        }
        let taken = self.take_part(part);
        if taken.is_err() {
            (self.lost, self.pending) = (true, None);
        }
        taken
    }

    fn take_part(&mut self, part: Delta) -> Result<Taken, Refusal> {
        let mut pending = self.pending.take().unwrap_or_else(|| Pending::of(&part));
        let all = part.base.is_empty();
        if !all && part.base != self.set.digest() {
            return bad(format!("a delta over {}", hex::encode(self.set.digest())), hex::encode(part.base));
        }
        let (more, digest) = (part.more, pending.digest_of(&part)?);
        pending.add(part)?;
        if more {
            self.pending = Some(pending);
            return Ok(Taken::Part);
        }
        let over = if all { Set::default() } else { self.set.clone() };
        let set = over.changed(pending.changes);
        if digest != set.digest() {
            return bad(format!("resources of digest {}", hex::encode(digest)), hex::encode(set.digest()));
        }
        if set.bytes > SET_BYTES_MAX {
            return bad(format!("resources of at most {SET_BYTES_MAX} bytes"), set.bytes.to_string());
        }
        (self.set, self.revision, self.lost) = (set, pending.revision, false);
        Ok(if pending.denials_only { Taken::Denials } else { Taken::All })
    }
}

impl Pending {
    fn of(part: &Delta) -> Pending {
        let Delta { base, revision, denials_only, .. } = part;
        let (base, changes) = (base.clone(), Changes::new());
        Pending { base, revision: *revision, denials_only: *denials_only, bytes: 0, changes }
    }

    /// The digest of a part that belongs to it.
    fn digest_of(&self, part: &Delta) -> Result<Vec<u8>, Refusal> {
        if (&self.base, self.revision, self.denials_only) != (&part.base, part.revision, part.denials_only) {
            return bad("the next part of the delta that was begun".into(), format!("one of {}", part.revision));
        }
        Ok(part.digest.clone())
    }

    fn add(&mut self, part: Delta) -> Result<(), Refusal> {
        for name in part.gone {
            self.bytes += name.key.len();
            self.changes.insert((name.kind, name.key), None);
        }
        for Resource { kind, key, body } in part.put {
            self.bytes += key.len() + body.len();
            self.changes.insert((kind, key.clone()), Some(Arc::new(Item::of(kind, key, body))));
        }
        if self.bytes > SET_BYTES_MAX {
            return bad(format!("a delta of at most {SET_BYTES_MAX} bytes"), self.bytes.to_string());
        }
        if self.denials_only && self.changes.keys().any(|(kind, _)| !is_denial(*kind)) {
            return bad("denials only".into(), "other resources with them".into());
        }
        Ok(())
    }
}

fn bad<T>(expected: String, found: String) -> Result<T, Refusal> {
    Err(Refusal::new(Code::BadRequest, expected, found))
}

fn is_denial(kind: i32) -> bool {
    (ResourceKind::NodeDenial.into()..=ResourceKind::LeafDenial.into()).contains(&kind)
}
