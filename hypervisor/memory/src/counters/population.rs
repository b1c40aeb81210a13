//! How many shadow pages live, or frames are in use, counted by all cores and asked for without a lock.
//!
//! Each core publishes two numbers that only grow: pages it has allocated and pages it has freed. A page may
//! be allocated on one core and freed on another, so a single signed number per core would not do: read
//! before the allocation on one core and after the release on the other, the sum is negative, whatever the
//! memory order.
//!
//! A query reads every `freed`, then every `allocated`, then every `freed` again. A release that the first
//! reading saw happened after its allocation, which the second reading therefore sees: allocated - freed is
//! never negative, and never below what lived at the turn from the first to the second reading. If nothing
//! was freed meanwhile, `allocated` grew one by one, so its sum is one that it had at some instant of the
//! reading: the answer is exact there. `tests/loom_counters.rs` tries all interleavings, and shows that each
//! part is needed.

#[cfg(not(loom))]
use core::sync::atomic::{AtomicU64, Ordering};
#[cfg(loom)]
use loom::sync::atomic::{AtomicU64, Ordering};

/// How often a query reads before it answers with a bracket.
const READINGS_MAX: usize = 3;

/// What one core publishes. It has one writer at a time: a core, or the holder of a lock.
pub(crate) struct Slot {
    allocated: AtomicU64,
    freed: AtomicU64,
}

impl Slot {
    pub(crate) fn new() -> Self {
        Self { allocated: AtomicU64::new(0), freed: AtomicU64::new(0) }
    }

    /// Publishes a count of allocated pages that is greater by one: a larger step would let "exact" name a
    /// number that never was.
    #[inline]
    pub(crate) fn publish_allocated(&self, count: u64) {
        self.allocated.store(count, Ordering::Release);
    }

    /// Publishes a count of freed pages, greater by any number. Release: who sees it sees the allocations
    /// that came before.
    #[inline]
    pub(crate) fn publish_freed(&self, count: u64) {
        self.freed.store(count, Ordering::Release);
    }
}

/// The answer to "how many live?".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Population {
    /// So many lived at one instant of the query.
    Exact(u64),
    /// Cores freed pages all the while; the number lay between these.
    Between {
        /// At least so many.
        low: u64,
        /// At most so many.
        high: u64,
    },
}

impl Population {
    /// The lower bound: itself if exact.
    #[must_use]
    pub const fn low(self) -> u64 {
        match self {
            Self::Exact(count) => count,
            Self::Between { low, .. } => low,
        }
    }

    /// The upper bound: itself if exact.
    #[must_use]
    pub const fn high(self) -> u64 {
        match self {
            Self::Exact(count) => count,
            Self::Between { high, .. } => high,
        }
    }
}

/// Adds up the slots that `slots` yields, the same ones each time.
pub(crate) fn query<'a, I: Iterator<Item = &'a Slot>>(slots: impl Fn() -> I) -> Population {
    let freed = || slots().fold(0u64, |sum, slot| sum.wrapping_add(slot.freed.load(Ordering::Acquire)));
    // Acquire here too: an allocation that re-uses a frame shows the release before it, so that the last
    // reading tells it.
    let allocated =
        || slots().fold(0u64, |sum, slot| sum.wrapping_add(slot.allocated.load(Ordering::Acquire)));
    let mut before = freed();
    let mut readings = 1;
    loop {
        let allocated = allocated();
        let after = freed();
        if before == after {
            return Population::Exact(allocated.wrapping_sub(before));
        }
        if readings == READINGS_MAX {
            // More may have been freed by the end than was allocated by the turn: signed, then clamped.
            let low = (allocated.wrapping_sub(after) as i64).max(0) as u64;
            return Population::Between { low, high: allocated.wrapping_sub(before) };
        }
        // The last reading of one round is the first of the next.
        before = after;
        readings += 1;
    }
}
