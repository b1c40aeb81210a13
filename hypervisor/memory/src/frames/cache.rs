//! A core's own store of free frames.

use super::defect::{Defect, has};
use super::tally::Tally;
use crate::counters::population::Slot;
use crate::lock::Lock;

/// Frames a core keeps at most. Loom tries every order of few steps: it fills and empties small caches.
pub const CACHE_FRAMES: usize = if cfg!(loom) { 4 } else { 64 };
/// Frames moved at once between a core's cache and the pool: as many as have their states on one cache line.
pub const BATCH_FRAMES: usize = CACHE_FRAMES / 2;

/// A stack of free frames, by dense index.
pub struct Stack {
    len: usize,
    /// Whether it takes frames. While it does not, it is empty, and frames go straight to the pool.
    pub open: bool,
    tally: Tally,
    frames: [u32; CACHE_FRAMES],
}

impl Stack {
    pub fn pop(&mut self) -> Option<u32> {
        self.len = self.len.checked_sub(1)?;
        Some(self.frames[self.len])
    }

    /// Keeps a frame; gives it back if there is no room.
    pub fn push(&mut self, index: u32) -> Result<(), u32> {
        let place = self.frames.get_mut(self.len).ok_or(index)?;
        *place = index;
        self.len += 1;
        Ok(())
    }

    /// How many frames more it has room for.
    pub fn room(&self) -> usize {
        CACHE_FRAMES - self.len
    }
}

/// One core's stack on cache lines of its own (128 bytes: processors fetch lines in pairs). Only its core
/// locks it in the common case, so the lock stays in that core's cache; another core does only to close it.
#[repr(align(128))]
pub struct CoreCache {
    /// Frames taken out of the stack for use and put back into it, for all to read.
    pub slot: Slot,
    pub stack: Lock<Stack>,
}

impl CoreCache {
    /// Closed, and so empty.
    pub fn new() -> Self {
        let stack = Stack { len: 0, open: false, tally: Tally::default(), frames: [0; CACHE_FRAMES] };
        Self { slot: Slot::new(), stack: Lock::new(stack) }
    }

    /// Takes a frame into use; `None` if the stack is empty, as a closed one is.
    #[inline]
    pub fn take(&self) -> Option<u32> {
        let mut stack = self.stack.lock();
        let index = stack.pop()?;
        stack.tally.take(&self.slot, 1);
        Some(index)
    }

    /// Puts a frame back into use by others; whether there was room for it.
    #[inline]
    pub fn put(&self, index: u32) -> bool {
        let mut stack = self.stack.lock();
        let closed = !stack.open && !has(Defect::ClosedCacheTakes);
        if closed || stack.push(index).is_err() {
            return false;
        }
        stack.tally.put(&self.slot, 1);
        true
    }
}
