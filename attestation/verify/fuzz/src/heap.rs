//! The allocator of every program that links this crate: the system's, counting what each thread holds.
//!
//! libFuzzer's own limit on allocations needs a sanitizer's runtime, which stable Rust has not; and a count per run,
//! against the input's length, says more than one limit for all.
#![allow(unsafe_code, reason = "GlobalAlloc is an unsafe trait")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

#[global_allocator]
static COUNTING: Counting = Counting;

struct Counting;

/// Bytes held by this thread since the count was reset (less than zero where it frees what is older), and their peak.
#[derive(Clone, Copy)]
struct Held {
    now: isize,
    peak: isize,
}

thread_local! {
    static HELD: Cell<Held> = const { Cell::new(Held { now: 0, peak: 0 }) };
}

fn count(change: isize) {
    // Not while a thread ends: its locals are gone, and nothing is measured there.
    let _ = HELD.try_with(|held| {
        let Held { now, peak } = held.get();
        let now = now.wrapping_add(change);
        held.set(Held { now, peak: peak.max(now) });
    });
}

fn signed(bytes: usize) -> isize {
    isize::try_from(bytes).unwrap_or(isize::MAX)
}

// SAFETY: every call goes to the system's allocator unchanged; counting allocates nothing and cannot unwind.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(signed(layout.size()));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(signed(layout.size()));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-signed(layout.size()));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both may be held while it copies.
        count(signed(size));
        // SAFETY: the caller's promises are passed on.
        let moved = unsafe { System.realloc(pointer, layout, size) };
        count(-signed(layout.size()));
        moved
    }
}

/// What `run` gives, and the most bytes of Rust's heap that this thread held for it at once.
pub(crate) fn peak<T>(run: impl FnOnce() -> T) -> (T, usize) {
    HELD.with(|held| held.set(Held { now: 0, peak: 0 }));
    let out = run();
    let peak = HELD.with(|held| held.get().peak);
    (out, usize::try_from(peak).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_at_once_is_counted() {
        let (_, none) = peak(|| ());
        assert_eq!(none, 0);
        let (_, one_by_one) = peak(|| (0..10).for_each(|_| drop(std::hint::black_box(vec![0u8; 1000]))));
        assert_eq!(one_by_one, 1000);
        let (kept, all) = peak(|| (0..10).map(|_| vec![0u8; 1000]).collect::<Vec<_>>());
        assert!((10_000..11_000).contains(&all), "{all}");
        drop(kept);
        let (_, grown) = peak(|| {
            let mut v = vec![1u8; 1000];
            v.reserve_exact(4000);
            std::hint::black_box(v);
        });
        assert_eq!(grown, 6000, "old and new at once");
    }
}
