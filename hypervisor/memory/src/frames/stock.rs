//! The free frames, by dense index: the pool, the cores' caches, the marks, and how many frames there are.
//!
//! `pooled` is the number of frames in the pool. A cache takes frames only while it is open, and **while any
//! cache is open, `pooled` is above the `low` mark**. So a core that finds a frame in its own cache needs to
//! ask nobody: more than `low` frames are free beside it. Whoever would lower `pooled` to `low` or below,
//! under the pool's lock, first closes every cache and moves its frames to the pool; from then on `pooled` is the
//! number of free frames, and claims are granted or refused by it exactly. A cache opens again, by its own
//! core, when the pool is well above the mark.
//!
//! In the common case a frame comes from, and goes to, its core's cache: that touches the core's own lines
//! alone, and `pooled` changes once for every batch. Near the marks every frame costs the pool's lock: there
//! reclaim, which costs far more, sets the pace.
//!
//! `stock/interleavings.rs` tries all of this in every order, and shows that each part is needed.

use alloc::vec::Vec;
use core::iter;

use super::cache::{BATCH_FRAMES, CACHE_FRAMES, CoreCache};
use super::defect::{Defect, has};
use super::pool::Pool;
use super::posted::{Posted, Seen};
use super::tally::Tally;
use super::{Claim, Marks, MarksError, Pressure};
use crate::counters::population::{self, Population};
use crate::lock::Lock;

/// How far above `low` the pool has to be for a closed cache to open: closing all of them is paid for by as
/// many frames, at least, that leave the pool between.
const REOPEN_FRAMES: u64 = 2 * CACHE_FRAMES as u64;

/// The pool, with what its lock guards beside it, away from what every claim reads. Its holder goes by the numbers here;
/// others see them as they were [posted](Posted) last.
#[repr(align(128))]
struct Guarded {
    pool: Pool,
    /// Frames in the pool.
    pooled: u64,
    marks: Marks,
    /// How often marks were posted since the first.
    marks_posted: u64,
    tally: Tally,
    /// Caches that are open.
    open: usize,
    /// The marks are a budget: they move with what is taken and put back beside it, but `min` not below this.
    budget_least_frames: Option<u64>,
    /// Frames that were taken out of the budget for all that: as many come back without moving the marks.
    owed_to_budget: u64,
}

/// All free frames.
pub struct Stock {
    posted: Posted,
    guarded: Lock<Guarded>,
    caches: Vec<CoreCache>,
    total_frames: u64,
}

impl Stock {
    /// Heap bytes for each core.
    pub const BYTES_PER_CORE: usize = size_of::<CoreCache>();

    /// The stock of the `total_frames` frames in `pool`, with caches for cores `0..cores`.
    pub fn new(pool: Pool, total_frames: u64, cores: usize, marks: Marks) -> Self {
        Self {
            posted: Posted::new(total_frames, marks),
            guarded: Lock::new(Guarded {
                pool,
                pooled: total_frames,
                marks,
                marks_posted: 0,
                tally: Tally::default(),
                open: 0,
                budget_least_frames: None,
                owed_to_budget: 0,
            }),
            caches: (0..cores).map(|_| CoreCache::new()).collect(),
            total_frames,
        }
    }

    /// Takes a frame, the budget's if there is one; `None` if the marks do not allow it.
    #[inline]
    pub fn take(&self, core: usize, claim: Claim) -> Option<u32> {
        let cached = self.caches.get(core).and_then(CoreCache::take);
        cached.or_else(|| self.take_pooled(core, claim))
    }

    #[inline(never)]
    fn take_pooled(&self, core: usize, claim: Claim) -> Option<u32> {
        let mut guarded = self.guarded.lock();
        self.admit(&mut guarded, 1, claim)?;
        let index = guarded.pool.take(usize::MAX).expect("the pool has as many frames as it counts");
        self.count_taken(&mut guarded, 1);
        self.refill(core, &mut guarded);
        Some(index)
    }

    /// The same from one of the first `limit` blocks; `None` also if there is none.
    pub fn take_below(&self, limit: usize, claim: Claim) -> Option<u32> {
        let mut guarded = self.guarded.lock();
        self.admit(&mut guarded, 1, claim)?;
        let index = self.search(&mut guarded, |pool| pool.take(limit))?;
        self.count_taken(&mut guarded, 1);
        Some(index)
    }

    /// What `find` finds in the pool, if need be once the caches' frames are there too.
    fn search(&self, guarded: &mut Guarded, find: impl Fn(&mut Pool) -> Option<u32>) -> Option<u32> {
        find(&mut guarded.pool).or_else(|| {
            self.close_caches(guarded);
            find(&mut guarded.pool)
        })
    }

    /// Takes `frames` frames, the first of which `find` finds in the pool. Under a budget they are not the budget's, as long
    /// as there are others: the marks go down with what is free. `None` if there are none or the marks do not allow it.
    pub fn take_beside(
        &self,
        frames: u64,
        claim: Claim,
        find: impl Fn(&mut Pool) -> Option<u32>,
    ) -> Option<u32> {
        let mut guarded = self.guarded.lock();
        let min_frames = guarded.marks.min_frames();
        let beside_budget =
            guarded.budget_least_frames.is_some_and(|least_frames| min_frames >= least_frames + frames);
        if !beside_budget {
            self.admit(&mut guarded, frames, claim)?;
        }
        let first = self.search(&mut guarded, find)?;
        if beside_budget {
            let marks = guarded.marks.moved(|mark| mark - frames);
            self.store_marks(&mut guarded, marks);
        } else if guarded.budget_least_frames.is_some() {
            guarded.owed_to_budget += frames;
        }
        self.count_taken(&mut guarded, frames);
        Some(first)
    }

    /// Puts a frame back, into `core`'s cache if it can.
    #[inline]
    pub fn put(&self, core: usize, index: u32) {
        if self.caches.get(core).is_none_or(|cache| !cache.put(index)) {
            self.put_pooled(core, index);
        }
    }

    #[inline(never)]
    fn put_pooled(&self, core: usize, index: u32) {
        let mut guarded = self.guarded.lock();
        guarded.pool.put(index);
        self.count_put(&mut guarded, 1);
        let Some(cache) = self.caches.get(core) else { return };
        let least_frames = guarded.marks.low_frames().saturating_add(REOPEN_FRAMES);
        let well_above = guarded.pooled > least_frames || has(Defect::OpenedAtTheMark);
        let mut stack = cache.stack.lock();
        if stack.room() == 0 {
            let spilled = guarded.pool.put_all(iter::from_fn(|| stack.pop()).take(BATCH_FRAMES));
            self.raise(&mut guarded, spilled);
        } else if !stack.open && well_above {
            stack.open = true;
            guarded.open += 1;
            self.publish(&guarded);
        }
    }

    /// Puts `frames` frames back that were taken beside a budget; `give` gives them to the pool.
    pub fn put_beside(&self, frames: u64, give: impl FnOnce(&mut Pool)) {
        let mut guarded = self.guarded.lock();
        give(&mut guarded.pool);
        self.count_put(&mut guarded, frames);
        if guarded.budget_least_frames.is_some() {
            let owed = frames.min(guarded.owed_to_budget);
            guarded.owed_to_budget -= owed;
            let marks = guarded.marks.moved(|mark| mark + frames - owed);
            self.store_marks(&mut guarded, marks);
        }
    }

    /// Makes sure that `frames` frames can leave the pool: either it stays above `low`, or all caches are
    /// closed and the marks allow it. `None` if they do not.
    fn admit(&self, guarded: &mut Guarded, frames: u64, claim: Claim) -> Option<()> {
        if guarded.pooled > guarded.marks.low_frames().saturating_add(frames) {
            return Some(());
        }
        if !has(Defect::CachesNotClosed) {
            self.close_caches(guarded);
        }
        let keep = match claim {
            Claim::Guest => guarded.marks.min_frames(),
            Claim::Begun => 0,
        };
        (guarded.pooled >= keep.saturating_add(frames)).then_some(())
    }

    /// Moves a batch into `core`'s cache if the pool stays above `low`; opens the cache if the pool is well
    /// above it.
    fn refill(&self, core: usize, guarded: &mut Guarded) {
        let Some(cache) = self.caches.get(core) else { return };
        let batch = BATCH_FRAMES as u64;
        let above = guarded.pooled.saturating_sub(guarded.marks.low_frames());
        if above <= batch && !has(Defect::FilledPastTheMark) {
            return;
        }
        let mut stack = cache.stack.lock();
        if !stack.open {
            if above <= batch + REOPEN_FRAMES {
                return;
            }
            stack.open = true;
            guarded.open += 1;
        }
        if stack.room() < BATCH_FRAMES {
            return;
        }
        guarded.pooled -= batch;
        self.publish(guarded);
        let group = guarded.pool.take_group();
        for place in 0..BATCH_FRAMES as u32 {
            let index = group.map(|first| first + place).or_else(|| guarded.pool.take(usize::MAX));
            let index = index.expect("the pool has as many frames as it counts");
            stack.push(index).expect("there is room for a batch");
        }
    }

    /// Closes every cache and moves its frames to the pool.
    fn close_caches(&self, guarded: &mut Guarded) {
        if guarded.open == 0 {
            return;
        }
        for cache in &self.caches {
            let mut stack = cache.stack.lock();
            if !stack.open {
                continue;
            }
            stack.open = false;
            let moved = guarded.pool.put_all(iter::from_fn(|| stack.pop()));
            if !has(Defect::FramesNotRaised) {
                self.raise(guarded, moved);
            }
        }
        guarded.open = 0;
        self.publish(guarded);
    }

    /// Counts frames that have left the pool for use. `pooled` first: it is never more than what is free.
    fn count_taken(&self, guarded: &mut Guarded, frames: u64) {
        if has(Defect::CountedFirst) {
            guarded.tally.take(self.posted.slot(), frames);
        }
        guarded.pooled -= frames;
        self.publish(guarded);
        if !has(Defect::CountedFirst) {
            guarded.tally.take(self.posted.slot(), frames);
        }
    }

    fn count_put(&self, guarded: &mut Guarded, frames: u64) {
        guarded.tally.put(self.posted.slot(), frames);
        self.raise(guarded, frames);
    }

    fn raise(&self, guarded: &mut Guarded, frames: u64) {
        guarded.pooled += frames;
        self.publish(guarded);
    }

    /// Shows the others what the pool has.
    fn publish(&self, guarded: &Guarded) {
        self.posted.post_pooled(guarded.pooled, guarded.open > 0);
    }

    fn store_marks(&self, guarded: &mut Guarded, marks: Marks) {
        guarded.marks = marks;
        guarded.marks_posted += 1;
        self.posted.post_marks(marks, guarded.marks_posted);
    }

    /// The number that all cores read: it changes by batches alone while plenty is free.
    #[cfg(all(test, not(loom)))]
    pub fn shared_number(&self) -> u64 {
        self.posted.pooled().0
    }

    /// Frames in use, by the counts of all who take and put frames.
    fn in_use(&self) -> Population {
        let slots = || iter::once(self.posted.slot()).chain(self.caches.iter().map(|cache| &cache.slot));
        population::query(slots)
    }

    /// Free frames; see [`super::FrameAllocator::free_frames`].
    pub fn free_frames(&self) -> u64 {
        let (pooled, all) = self.posted.pooled();
        if all || has(Defect::PoolTakenForAll) && pooled <= self.marks().low_frames() {
            return pooled;
        }
        match self.in_use() {
            Population::Exact(used) => self.total_frames - used,
            // Frames used again during the query count twice: the pool's are free in any case.
            Population::Between { high, .. } => {
                self.total_frames.saturating_sub(high).max(self.posted.pooled().0)
            }
        }
    }

    /// All frames, free or not.
    pub fn total_frames(&self) -> u64 {
        self.total_frames
    }

    /// How the free count stands to the marks: exactly, since the pool holds all free frames at `low` and
    /// below.
    pub fn pressure(&self) -> Pressure {
        let Seen { pooled, marks, .. } = self.posted.read();
        if pooled > marks.low_frames() {
            Pressure::Plenty
        } else if pooled > marks.min_frames() {
            Pressure::Low
        } else {
            Pressure::Min
        }
    }

    /// Frames missing to the high mark. Where only a bracket could be told, the caches are closed and the
    /// pool counted.
    pub fn shortfall_frames(&self) -> u64 {
        let Seen { pooled, all, marks } = self.posted.read();
        let high_frames = marks.high_frames();
        if all || pooled >= high_frames {
            return high_frames.saturating_sub(pooled);
        }
        let free = match self.in_use() {
            Population::Exact(used) => self.total_frames - used,
            Population::Between { .. } => {
                let mut guarded = self.guarded.lock();
                self.close_caches(&mut guarded);
                if has(Defect::ReadAfterUnlock) {
                    drop(guarded);
                    return high_frames.saturating_sub(self.posted.pooled().0);
                }
                guarded.pooled
            }
        };
        high_frames.saturating_sub(free)
    }

    /// The marks now in force.
    pub fn marks(&self) -> Marks {
        self.posted.read().marks
    }

    /// Changes the marks. `budget_least_frames`: they are a budget, and follow the blocks down to this `min` mark.
    ///
    /// # Errors
    /// [`MarksError::TooHigh`] if there are too few frames.
    pub fn set_marks(&self, marks: Marks, budget_least_frames: Option<u64>) -> Result<(), MarksError> {
        let marks = marks.fits(self.total_frames)?;
        let mut guarded = self.guarded.lock();
        guarded.budget_least_frames = budget_least_frames;
        guarded.owed_to_budget = 0;
        if guarded.pooled <= marks.low_frames() && !has(Defect::MarksOverOpenCaches) {
            self.close_caches(&mut guarded);
        }
        self.store_marks(&mut guarded, marks);
        Ok(())
    }
}

#[cfg(all(test, loom))]
mod interleavings;
