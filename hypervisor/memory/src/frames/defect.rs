//! Deliberate defects of the stock, for models that show that they find them. Only in those models `has` asks which one
//! is switched on; elsewhere it is false, and nothing of them is compiled.

/// What is done wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Defect {
    /// A claim goes by the pool's number while caches hold frames.
    CachesNotClosed,
    /// The frames of a cache that is closed are not counted as the pool's.
    FramesNotRaised,
    /// A closed cache takes a frame that is put back.
    ClosedCacheTakes,
    /// A cache opens whatever the pool has.
    OpenedAtTheMark,
    /// A cache is filled whatever the pool has left then.
    FilledPastTheMark,
    /// The marks are raised over the pool's number while caches are open.
    MarksOverOpenCaches,
    /// A frame from the pool is counted as in use while the pool's number has it still.
    CountedFirst,
    /// The pool's number is taken for all that is free if it is not above the mark, which may be a later one.
    PoolTakenForAll,
    /// Once the caches are closed, the pool's number is read without its lock.
    ReadAfterUnlock,
    /// The pool's number and the marks are read without a look at whether the marks changed meanwhile.
    VersionNotLookedAt,
}

#[cfg(all(test, loom))]
mod switch {
    use core::cell::Cell;

    use super::Defect;

    // The model's threads all run on the one that started it.
    std::thread_local! {
        static SWITCHED_ON: Cell<Option<Defect>> = const { Cell::new(None) };
    }

    pub fn has(defect: Defect) -> bool {
        SWITCHED_ON.get() == Some(defect)
    }

    /// Runs `f` with `defect` switched on for this thread.
    pub fn with<R>(defect: Defect, f: impl FnOnce() -> R) -> R {
        SWITCHED_ON.set(Some(defect));
        let result = f();
        SWITCHED_ON.set(None);
        result
    }
}

#[cfg(all(test, loom))]
pub use switch::{has, with};

/// No defect is ever switched on.
#[cfg(not(all(test, loom)))]
#[inline(always)]
pub const fn has(_: Defect) -> bool {
    false
}
