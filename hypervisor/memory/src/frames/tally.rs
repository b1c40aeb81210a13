//! Frames taken into use and put back, counted where the lock for it is held anyway.

use crate::counters::population::Slot;

/// The two numbers that a [`Slot`] publishes, kept by whoever holds the lock: publishing only stores them.
#[derive(Default)]
pub struct Tally {
    taken: u64,
    put: u64,
}

impl Tally {
    /// Counts `frames` as in use, one by one: a block counts as 512 frames taken in a row, and an exact answer may
    /// name any number on the way.
    #[inline]
    pub fn take(&mut self, slot: &Slot, frames: u64) {
        for _ in 0..frames {
            self.taken += 1;
            slot.publish_allocated(self.taken);
        }
    }

    /// Counts `frames` as free again, at once. Before the lock is released: who takes one of them next shows
    /// this, too.
    #[inline]
    pub fn put(&mut self, slot: &Slot, frames: u64) {
        self.put += frames;
        slot.publish_freed(self.put);
    }
}
