//! The crate's one lock. In its own tests each acquisition is counted, so that they can say what takes none.

#[cfg(loom)]
use loom::sync::{Mutex, MutexGuard};
#[cfg(not(loom))]
use spin::{Mutex, MutexGuard};

/// A spin lock: not for NMI and machine-check handlers, which may interrupt its holder.
pub struct Lock<T>(Mutex<T>);

impl<T> Lock<T> {
    pub fn new(value: T) -> Self {
        Self(Mutex::new(value))
    }

    #[inline]
    pub fn lock(&self) -> MutexGuard<'_, T> {
        #[cfg(all(test, not(loom)))]
        count::acquired();
        let guard = self.0.lock();
        #[cfg(loom)]
        let guard = guard.expect("a model ends with its first panic");
        guard
    }
}

#[cfg(all(test, not(loom)))]
pub mod count {
    //! How often this thread has taken a lock of the crate.
    use std::cell::Cell;

    thread_local!(static ACQUIRED: Cell<u64> = const { Cell::new(0) });

    pub fn acquired() {
        ACQUIRED.set(ACQUIRED.get() + 1);
    }

    /// Locks taken by this thread while `work` ran.
    pub fn acquisitions<R>(work: impl FnOnce() -> R) -> (R, u64) {
        let before = ACQUIRED.get();
        let result = work();
        (result, ACQUIRED.get() - before)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::count::acquisitions;
    use super::*;
    use crate::{Claim, Counters, FrameAllocator, GuestId, Owner, Pfn, Population};

    #[test]
    fn the_query_takes_no_lock() {
        let counters = Counters::new(4);
        counters.writer(1).unwrap().shadow_page_allocated();
        assert_eq!(acquisitions(|| counters.shadow_pages()), (Population::Exact(1), 0));

        let shadow = Owner::Shadow(GuestId::new(0).unwrap());
        let frames = FrameAllocator::new(&[(Pfn(0), 2048)], 2, None);
        // The counter does count: a frame cannot be had without a lock.
        let (pfn, taken) = acquisitions(|| frames.alloc(0, shadow, Claim::Guest));
        assert!(pfn.is_some() && taken > 0);
        assert_eq!(acquisitions(|| frames.free_frames()), (2047, 0));
        assert_eq!(acquisitions(|| frames.pressure()).1, 0);
        assert_eq!(acquisitions(|| frames.shortfall_frames()), (0, 0));
        // Nor at the marks, where all frames are in the pool.
        while frames.alloc(1, shadow, Claim::Guest).is_some() {}
        let min_frames = frames.marks().min_frames();
        assert_eq!(acquisitions(|| frames.free_frames()), (min_frames, 0));
        assert_eq!(acquisitions(|| frames.pressure()).1, 0);
        assert_eq!(acquisitions(|| *Lock::new(7).lock()), (7, 1));
    }
}
