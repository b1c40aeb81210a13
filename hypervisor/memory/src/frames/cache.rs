//! A core's own store of free frames.

use spin::Mutex;

/// Frames a core keeps at most.
pub const CACHE_FRAMES: usize = 64;
/// Frames moved at once between a core's cache and the pool.
pub const BATCH_FRAMES: usize = CACHE_FRAMES / 2;

/// A stack of free frames, by dense index.
pub struct Stack {
    frames: [u32; CACHE_FRAMES],
    len: usize,
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
}

/// One core's stack on cache lines of its own (128 bytes: processors fetch lines in pairs). Only its core
/// locks it in the common case, so the lock stays in that core's cache; another core does only when the pool
/// has run dry.
#[repr(align(128))]
pub struct CoreCache(pub Mutex<Stack>);

impl CoreCache {
    pub const fn new() -> Self {
        Self(Mutex::new(Stack { frames: [0; CACHE_FRAMES], len: 0 }))
    }
}
