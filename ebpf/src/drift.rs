//! Whether the tables in force are still those that were put there.

use crate::error::KernelError;
use crate::kernel::Kernel;
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use sha2::{Digest, Sha256};

/// A table in force that is not what was put there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drift {
    /// Which.
    pub map: &'static str,
    /// Entries that it should have.
    pub expected: u64,
    /// Entries that it has. As many as expected, and some of them are others.
    pub found: u64,
}

/// A digest of a table's entries that does not depend on their order, so that one of them can be exchanged, and the table
/// be read without sorting it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sum {
    entries: u64,
    sum: u128,
}

impl Sum {
    pub(crate) fn of<'a>(rows: impl IntoIterator<Item = (&'a [u8], &'a [u8])>) -> Self {
        let mut sum = Self::default();
        rows.into_iter().for_each(|(key, value)| sum.add(key, value));
        sum
    }

    fn add(&mut self, key: &[u8], value: &[u8]) {
        self.entries += 1;
        self.sum = self.sum.wrapping_add(hashed(key, value));
    }

    /// The value of one key was exchanged.
    pub(crate) fn exchange(&mut self, key: &[u8], before: &[u8], after: &[u8]) {
        self.sum = self.sum.wrapping_sub(hashed(key, before)).wrapping_add(hashed(key, after));
    }
}

/// Keys of one table are of one length, so this says where the key ends.
fn hashed(key: &[u8], value: &[u8]) -> u128 {
    let hash = Sha256::new().chain_update(key).chain_update(value).finalize();
    hash.first_chunk().copied().map_or(0, u128::from_le_bytes)
}

/// What was put into the tables in force.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct InForce {
    pub(crate) verdicts: Sum,
    pub(crate) endpoints: Sum,
    pub(crate) services: Sum,
    pub(crate) ranges: Sum,
    pub(crate) callers: Sum,
    pub(crate) endpoints6: Sum,
    pub(crate) services6: Sum,
}

impl InForce {
    /// Of the table of endpoints with this name.
    pub(crate) fn endpoints_of(&mut self, name: &str) -> &mut Sum {
        if name == "endpoints6" { &mut self.endpoints6 } else { &mut self.endpoints }
    }

    fn each(&self) -> [(&'static str, Sum); 7] {
        let Self { verdicts, endpoints, services, ranges, callers, endpoints6, services6 } = *self;
        [
            ("verdicts", verdicts),
            ("endpoints", endpoints),
            ("services", services),
            ("ranges", ranges),
            ("callers", callers),
            ("endpoints6", endpoints6),
            ("services6", services6),
        ]
    }
}

impl Kernel {
    /// Reads the tables in force and names those that are not what `install`, `relabel` and `set_service_health` of this
    /// handle made of them. Before its first `install` there is nothing to compare with, and none is named.
    ///
    /// Costs about 0.3 microseconds of CPU time for each entry; changes wait meanwhile, decisions do not.
    pub fn drift(&self) -> Result<Vec<Drift>, KernelError> {
        let in_force = self.lock();
        let Some(put) = *in_force else { return Ok(Vec::new()) };
        let mut drifted = Vec::new();
        for (map, expected) in put.each() {
            let found = match self.live_table(map)? {
                Some(table) => sum_of(&table, map)?,
                None => Sum::default(),
            };
            if found != expected {
                drifted.push(Drift { map, expected: expected.entries, found: found.entries });
            }
        }
        Ok(drifted)
    }
}

fn sum_of(table: &MapHandle, map: &'static str) -> Result<Sum, KernelError> {
    // One batch with a place to spare: the kernel refuses a batch that cannot hold a whole bucket.
    let rows = table.lookup_batch(table.max_entries() + 1, MapFlags::ANY, MapFlags::ANY);
    let mut sum = Sum::default();
    rows.map_err(|e| KernelError::bpf(format!("read map {map}"), e))?.for_each(|(key, value)| sum.add(&key, &value));
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_knows_no_order_and_takes_exchanges() {
        let rows: [(&[u8], &[u8]); 3] = [(b"a", b"1"), (b"b", b"2"), (b"c", b"3")];
        let all = Sum::of(rows);
        assert_eq!(Sum::of(rows.into_iter().rev()), all);
        assert_ne!(Sum::of(rows.into_iter().take(2)), all);
        let mut other = all;
        other.exchange(b"b", b"2", b"9");
        assert_eq!(other, Sum::of([rows[0], (b"b", b"9"), rows[2]]));
        assert_ne!(other, all);
        other.exchange(b"b", b"9", b"2");
        assert_eq!(other, all);
    }
}
