//! Numbers and choices for generated cases.
#![allow(dead_code, reason = "each test uses some of it")]

/// A small generator of our own: the same numbers on every run, so that a failure is a seed.
pub(crate) struct Draw(pub(crate) u64);

impl Draw {
    pub(crate) fn next(&mut self) -> u64 {
        // xorshift64* (Marsaglia, Vigna).
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 32
    }
    pub(crate) fn of<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.next() as usize % items.len()]
    }
    pub(crate) fn some<T: Clone>(&mut self, items: &[T], most: u64) -> Vec<T> {
        (0..1 + self.next() % most).map(|_| self.of(items).clone()).collect()
    }
}
