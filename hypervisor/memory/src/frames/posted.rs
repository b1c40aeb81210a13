//! What the pool's lock guards, as it is posted for those who do not take the lock: the pool's number and the marks.

#[cfg(not(loom))]
use core::hint::spin_loop;
#[cfg(not(loom))]
use core::sync::atomic::{AtomicU64, Ordering};
#[cfg(loom)]
use loom::hint::spin_loop;
#[cfg(loom)]
use loom::sync::atomic::{AtomicU64, Ordering};

use super::Marks;
use super::defect::{Defect, has};
use crate::counters::population::Slot;

/// Set in the pool's number while any cache is open. Without it the number is all that is free, whatever the marks are
/// or were.
const CACHES_OPEN: u64 = 1 << 63;

/// What changes with frames, on lines of its own.
#[repr(align(128))]
struct Pooled {
    frames: AtomicU64,
    slot: Slot,
}

/// What hardly ever changes.
#[repr(align(128))]
struct SharedMarks {
    /// Odd while the marks are written.
    version: AtomicU64,
    min_frames: AtomicU64,
    low_frames: AtomicU64,
    high_frames: AtomicU64,
}

/// Written by the holder of the pool's lock.
pub struct Posted {
    pooled: Pooled,
    marks: SharedMarks,
}

/// What a reader finds.
#[derive(Clone, Copy)]
pub struct Seen {
    /// Frames in the pool.
    pub pooled: u64,
    /// They are all that is free: no cache is open.
    pub all: bool,
    pub marks: Marks,
}

impl Posted {
    /// `pooled` frames in the pool, no cache open.
    pub fn new(pooled: u64, marks: Marks) -> Self {
        Self {
            pooled: Pooled { frames: AtomicU64::new(pooled), slot: Slot::new() },
            marks: SharedMarks {
                version: AtomicU64::new(0),
                min_frames: AtomicU64::new(marks.min_frames()),
                low_frames: AtomicU64::new(marks.low_frames()),
                high_frames: AtomicU64::new(marks.high_frames()),
            },
        }
    }

    /// Frames taken straight from the pool for use, and put straight back into it.
    pub fn slot(&self) -> &Slot {
        &self.pooled.slot
    }

    pub fn post_pooled(&self, frames: u64, caches_open: bool) {
        let open = if caches_open { CACHES_OPEN } else { 0 };
        self.pooled.frames.store(frames | open, Ordering::Release);
    }

    /// Posts the marks for the `number`-th time, from 1.
    pub fn post_marks(&self, marks: Marks, number: u64) {
        self.marks.version.store(2 * number - 1, Ordering::Relaxed);
        // Release: who finds one of these finds the odd version, or a later one.
        self.marks.min_frames.store(marks.min_frames(), Ordering::Release);
        self.marks.low_frames.store(marks.low_frames(), Ordering::Release);
        self.marks.high_frames.store(marks.high_frames(), Ordering::Release);
        self.marks.version.store(2 * number, Ordering::Release);
    }

    /// Frames in the pool, and whether they are all that is free.
    pub fn pooled(&self) -> (u64, bool) {
        let frames = self.pooled.frames.load(Ordering::Acquire);
        (frames & !CACHES_OPEN, frames & CACHES_OPEN == 0)
    }

    /// The number, and marks that were in force when it was posted or before it was posted anew. Where both change the marks
    /// go down first and up last, so it may be a number too high for the marks, never one too low.
    pub fn read(&self) -> Seen {
        loop {
            let version = self.marks.version.load(Ordering::Acquire);
            let marks = Marks::new(
                self.marks.min_frames.load(Ordering::Acquire),
                self.marks.low_frames.load(Ordering::Acquire),
                self.marks.high_frames.load(Ordering::Acquire),
            );
            let (pooled, all) = self.pooled();
            let one_time = version.is_multiple_of(2) && self.marks.version.load(Ordering::Relaxed) == version;
            if (one_time || has(Defect::VersionNotLookedAt))
                && let Ok(marks) = marks
            {
                return Seen { pooled, all, marks };
            }
            spin_loop();
        }
    }
}
