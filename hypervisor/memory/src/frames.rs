//! The host's frames: who owns each, how many are free (exactly), and the marks that say when to reclaim.
//!
//! Single frames come through a cache per core; whole 2 MiB blocks, for guests' memory, and frames below
//! 4 GiB come from the pool under its lock. The free count is one atomic number: a frame is claimed by
//! lowering it *before* the frame is taken out (or, in the pool, under its lock), and given back by raising
//! it *after* the frame is in its place. So there is always a free frame for each claim, the marks hold exactly, and a claim that was
//! granted cannot fail.
//!
//! Locks: the pool's before a core's cache; never two caches. Nothing here may be called by NMI or machine
//! check handlers. Contents of frames are never touched.

mod bitset;
mod cache;
mod map;
mod marks;
mod owner;
mod pool;
mod reservation;

use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use spin::{Mutex, MutexGuard};

use crate::address::{BLOCK_PAGES, PAGE_SHIFT, Pfn};
use cache::{BATCH_FRAMES, CoreCache};
use map::FrameMap;
use pool::Pool;

pub use marks::{Marks, MarksError, Pressure};
pub use owner::{FrameState, GuestId, Owner};
pub use reservation::{NeedFrames, Reservation};

/// First frame at 4 GiB.
const FOUR_GIB: Pfn = Pfn(1 << (32 - PAGE_SHIFT));
/// How often a claimed frame is looked for before the count must be wrong.
const SEARCHES_MAX: u32 = 1 << 20;

/// On whose account frames are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// New work: refused when it would leave fewer than `min` frames free.
    Guest,
    /// Work already begun, which must come to its end: may use the last frame.
    Begun,
}

/// Why a frame was not freed. Each is an error of ours: the frame stays as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FreeError {
    /// The frame was never the allocator's.
    Absent(Pfn),
    /// The frame is free already.
    Double(Pfn),
    /// The frame belongs to someone else.
    Foreign {
        /// The frame.
        pfn: Pfn,
        /// Whose it is.
        owner: Owner,
    },
    /// The frame does not begin a 2 MiB block.
    Unaligned(Pfn),
}

impl fmt::Display for FreeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent(pfn) => write!(f, "frame {pfn} is not the allocator's to free"),
            Self::Double(pfn) => write!(f, "frame {pfn} was freed twice"),
            Self::Foreign { pfn, owner } => {
                write!(f, "frame {pfn} was freed by another than its owner, {owner}")
            }
            Self::Unaligned(pfn) => write!(f, "frame {pfn} does not begin a 2 MiB block"),
        }
    }
}

impl core::error::Error for FreeError {}

/// The free count, alone on its cache lines: it is the one thing all cores write.
#[repr(align(128))]
struct FreeCount(AtomicU64);

/// The marks, read by every claim and hardly ever written.
#[repr(align(128))]
struct SharedMarks {
    min_frames: AtomicU64,
    low_frames: AtomicU64,
    high_frames: AtomicU64,
}

/// All frames of the host that are not set aside for good.
pub struct FrameAllocator {
    free: FreeCount,
    marks: SharedMarks,
    map: FrameMap,
    /// [`FrameState`] of each frame, packed, by dense index.
    states: Vec<AtomicU16>,
    caches: Vec<CoreCache>,
    pool: Mutex<Pool>,
    /// Dense indices of blocks below this one lie below 4 GiB.
    low_blocks: usize,
    total_frames: u64,
}

impl FrameAllocator {
    /// Takes charge of `regions` (first frame, frames; in any order, overlaps count once) for cores
    /// `0..cores`. `None`, or marks that do not [fit](Marks::fits) the memory there is, stand for
    /// [`Marks::for_memory`].
    #[must_use]
    pub fn new(regions: &[(Pfn, u64)], cores: usize, marks: Option<Marks>) -> Self {
        let map = FrameMap::new(regions);
        let states: Vec<AtomicU16> =
            (0..map.frames()).map(|_| AtomicU16::new(FrameState::Absent.pack())).collect();
        let mut pool = Pool::new(map.blocks());
        let total_frames = set_free(&map, &states, &mut pool, regions);
        let marks = marks
            .and_then(|marks| marks.fits(total_frames).ok())
            .unwrap_or_else(|| Marks::for_memory(total_frames));
        Self {
            free: FreeCount(AtomicU64::new(total_frames)),
            marks: SharedMarks {
                min_frames: AtomicU64::new(marks.min_frames()),
                low_frames: AtomicU64::new(marks.low_frames()),
                high_frames: AtomicU64::new(marks.high_frames()),
            },
            low_blocks: map.blocks_below(FOUR_GIB),
            map,
            states,
            caches: (0..cores).map(|_| CoreCache::new()).collect(),
            pool: Mutex::new(pool),
            total_frames,
        }
    }

    /// Heap bytes that [`FrameAllocator::new`] needs for `regions` and `cores`, within a few KiB; a little
    /// over 2 bytes a frame.
    #[must_use]
    pub fn table_bytes(regions: &[(Pfn, u64)], cores: usize) -> usize {
        let map = FrameMap::new(regions);
        map.frames() * size_of::<AtomicU16>()
            + map.blocks() * Pool::BYTES_PER_BLOCK
            + cores * size_of::<CoreCache>()
            + regions.len() * 64
    }

    /// A frame for `owner`, from `core`'s cache if it has one; `None` if the marks do not allow it.
    #[must_use]
    pub fn alloc(&self, core: usize, owner: Owner, claim: Claim) -> Option<Pfn> {
        self.claim(1, claim).ok()?;
        Some(self.take_claimed(core, owner))
    }

    /// A frame below 4 GiB; `None` if there is none or the marks do not allow it.
    #[must_use]
    pub fn alloc_below_4g(&self, owner: Owner, claim: Claim) -> Option<Pfn> {
        self.alloc_from_pool(1, claim, owner, |pool| pool.take(self.low_blocks))
    }

    /// 512 contiguous frames, 2 MiB-aligned, as a [`Claim::Guest`]; the first of them. `None` if no block is
    /// whole or the marks do not allow it.
    #[must_use]
    pub fn alloc_block(&self, owner: Owner) -> Option<Pfn> {
        self.alloc_from_pool(BLOCK_PAGES, Claim::Guest, owner, Pool::take_block)
    }

    /// Gives a frame back through `core`'s cache.
    ///
    /// # Errors
    /// [`FreeError`] when it is not `owner`'s.
    pub fn free(&self, core: usize, pfn: Pfn, owner: Owner) -> Result<(), FreeError> {
        let index = self.map.index(pfn).ok_or(FreeError::Absent(pfn))?;
        self.disown(index, owner)?;
        self.put(core, index);
        self.free.0.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    /// Gives back the 512 frames of the 2 MiB block that `first` begins: all or none.
    ///
    /// # Errors
    /// [`FreeError`] for the first frame that is not `owner`'s.
    pub fn free_block(&self, first: Pfn, owner: Owner) -> Result<(), FreeError> {
        if !first.0.is_multiple_of(BLOCK_PAGES) {
            return Err(FreeError::Unaligned(first));
        }
        let base = self.map.index(first).ok_or(FreeError::Absent(first))?;
        let end = base + BLOCK_PAGES as u32 - 1;
        for index in base..=end {
            if let Err(error) = self.disown(index, owner) {
                (base..index).for_each(|index| self.set_state(index, FrameState::Owned(owner)));
                return Err(error);
            }
        }
        self.pool.lock().put_block(base);
        self.free.0.fetch_add(BLOCK_PAGES, Ordering::AcqRel);
        Ok(())
    }

    /// Free frames at this moment, exactly.
    #[must_use]
    pub fn free_frames(&self) -> u64 {
        self.free.0.load(Ordering::Acquire)
    }

    /// All frames of the allocator, free or not.
    #[must_use]
    pub fn total_frames(&self) -> u64 {
        self.total_frames
    }

    /// The marks now in force.
    #[must_use]
    pub fn marks(&self) -> Marks {
        let load = |mark: &AtomicU64| mark.load(Ordering::Relaxed);
        let SharedMarks { min_frames, low_frames, high_frames } = &self.marks;
        Marks::new(load(min_frames), load(low_frames), load(high_frames))
            .unwrap_or_else(|_| Marks::for_memory(self.total_frames))
    }

    /// Changes the marks: a budget for shadow pages is made by raising them, once guests have their memory.
    /// Claims made meanwhile may see some marks old and some new.
    ///
    /// # Errors
    /// [`MarksError::TooHigh`] if the machine has too few frames.
    pub fn set_marks(&self, marks: Marks) -> Result<(), MarksError> {
        let marks = marks.fits(self.total_frames)?;
        self.marks.min_frames.store(marks.min_frames(), Ordering::Relaxed);
        self.marks.low_frames.store(marks.low_frames(), Ordering::Relaxed);
        self.marks.high_frames.store(marks.high_frames(), Ordering::Relaxed);
        Ok(())
    }

    /// How the free count stands to the marks.
    #[must_use]
    pub fn pressure(&self) -> Pressure {
        let free = self.free_frames();
        if free > self.marks.low_frames.load(Ordering::Relaxed) {
            Pressure::Plenty
        } else if free > self.marks.min_frames.load(Ordering::Relaxed) {
            Pressure::Low
        } else {
            Pressure::Min
        }
    }

    /// Frames that reclaim still has to free until it may stop: up to the high mark.
    #[must_use]
    pub fn shortfall_frames(&self) -> u64 {
        self.marks.high_frames.load(Ordering::Relaxed).saturating_sub(self.free_frames())
    }

    /// What is known of a frame.
    #[must_use]
    pub fn state(&self, pfn: Pfn) -> FrameState {
        self.map.index(pfn).map_or(FrameState::Absent, |index| self.state_at(index))
    }

    /// Whose a frame is; `None` if it is free or not the allocator's.
    #[must_use]
    pub fn owner(&self, pfn: Pfn) -> Option<Owner> {
        match self.state(pfn) {
            FrameState::Owned(owner) => Some(owner),
            FrameState::Absent | FrameState::Free => None,
        }
    }

    /// The frames that `owner` has, by looking at every frame: for the report of leaks when a guest has
    /// ended, not for exit paths.
    pub fn frames_of(&self, owner: Owner) -> impl Iterator<Item = Pfn> + '_ {
        let owned = FrameState::Owned(owner).pack();
        (0u32..)
            .zip(&self.states)
            .filter(move |(_, state)| state.load(Ordering::Relaxed) == owned)
            .map(|(index, _)| self.map.pfn(index))
    }

    /// How many frames `owner` has; as slow as [`FrameAllocator::frames_of`].
    #[must_use]
    pub fn owned_by(&self, owner: Owner) -> u64 {
        self.frames_of(owner).count() as u64
    }

    /// Lowers the free count by `frames`, if the marks allow it. Whoever has a claim will find its frames.
    fn claim(&self, frames: u64, claim: Claim) -> Result<(), NeedFrames> {
        let keep = match claim {
            Claim::Guest => self.marks.min_frames.load(Ordering::Relaxed),
            Claim::Begun => 0,
        };
        let needed = keep.saturating_add(frames);
        let mut free = self.free.0.load(Ordering::Relaxed);
        loop {
            if free < needed {
                return Err(NeedFrames(needed - free));
            }
            let lowered =
                self.free.0.compare_exchange_weak(free, free - frames, Ordering::AcqRel, Ordering::Relaxed);
            match lowered {
                Ok(_) => return Ok(()),
                Err(now) => free = now,
            }
        }
    }

    /// A frame for a claim that was granted: from `core`'s cache, else from the pool, else from whichever
    /// cache has it.
    fn take_claimed(&self, core: usize, owner: Owner) -> Pfn {
        let cached = self.caches.get(core).and_then(|cache| cache.0.lock().pop());
        let index = cached.unwrap_or_else(|| self.refill(core));
        self.set_state(index, FrameState::Owned(owner));
        self.map.pfn(index)
    }

    /// Finds a frame for a claim that was granted, and fills `core`'s cache while at it.
    #[cold]
    fn refill(&self, core: usize) -> u32 {
        for _ in 0..SEARCHES_MAX {
            let mut pool = self.pool.lock();
            let frame = pool.take(usize::MAX).or_else(|| {
                self.drain_caches(&mut pool);
                pool.take(usize::MAX)
            });
            if let Some(index) = frame {
                self.fill_cache(core, &mut pool);
                return index;
            }
            // Another core took the frame of a cache not yet drained after one was freed into a cache
            // already drained: it is found in the next round.
            drop(pool);
            core::hint::spin_loop();
        }
        panic!("the free count says {} frames after a claim, but none is to be found", self.free_frames());
    }

    fn fill_cache(&self, core: usize, pool: &mut MutexGuard<'_, Pool>) {
        let Some(cache) = self.caches.get(core) else { return };
        let mut stack = cache.0.lock();
        for _ in 1..BATCH_FRAMES {
            let Some(index) = pool.take(usize::MAX) else { return };
            if let Err(index) = stack.push(index) {
                pool.put(index);
                return;
            }
        }
    }

    /// Moves every core's cached frames into the pool.
    fn drain_caches(&self, pool: &mut MutexGuard<'_, Pool>) {
        for cache in &self.caches {
            let mut stack = cache.0.lock();
            while let Some(index) = stack.pop() {
                pool.put(index);
            }
        }
    }

    /// Keeps a frame in `core`'s cache; a full cache first gives half of its frames to the pool.
    fn put(&self, core: usize, index: u32) {
        let Some(cache) = self.caches.get(core) else { return self.pool.lock().put(index) };
        if cache.0.lock().push(index).is_ok() {
            return;
        }
        let mut pool = self.pool.lock();
        let mut stack = cache.0.lock();
        for _ in 0..BATCH_FRAMES {
            if let Some(index) = stack.pop() {
                pool.put(index);
            }
        }
        if let Err(index) = stack.push(index) {
            pool.put(index);
        }
    }

    /// Takes `frames` frames from the pool by `take`, which returns the first of them, and claims them; the
    /// caches are emptied into the pool if it does not find them at once. Here the claim comes second, or
    /// the count would be wrong while frames that may not exist are looked for; the pool's lock keeps those
    /// who search with a granted claim from missing the frames in hand.
    fn alloc_from_pool(
        &self,
        frames: u64,
        claim: Claim,
        owner: Owner,
        take: impl Fn(&mut Pool) -> Option<u32>,
    ) -> Option<Pfn> {
        let mut pool = self.pool.lock();
        let first = take(&mut pool).or_else(|| {
            self.drain_caches(&mut pool);
            take(&mut pool)
        })?;
        let taken = first..=first + (frames as u32 - 1);
        if self.claim(frames, claim).is_err() {
            taken.for_each(|index| pool.put(index));
            return None;
        }
        drop(pool);
        taken.for_each(|index| self.set_state(index, FrameState::Owned(owner)));
        Some(self.map.pfn(first))
    }

    /// Marks `owner`'s frame free. The exchange makes one of two cores that free a frame at once fail.
    fn disown(&self, index: u32, owner: Owner) -> Result<(), FreeError> {
        let owned = FrameState::Owned(owner).pack();
        let free = FrameState::Free.pack();
        let exchanged =
            self.states[index as usize].compare_exchange(owned, free, Ordering::AcqRel, Ordering::Relaxed);
        let Err(found) = exchanged else { return Ok(()) };
        let pfn = self.map.pfn(index);
        Err(match FrameState::unpack(found) {
            FrameState::Absent => FreeError::Absent(pfn),
            FrameState::Free => FreeError::Double(pfn),
            FrameState::Owned(owner) => FreeError::Foreign { pfn, owner },
        })
    }

    fn state_at(&self, index: u32) -> FrameState {
        FrameState::unpack(self.states[index as usize].load(Ordering::Relaxed))
    }

    fn set_state(&self, index: u32, state: FrameState) {
        self.states[index as usize].store(state.pack(), Ordering::Release);
    }
}

/// Marks the frames of `regions` free and puts them into the pool, each once; how many they are. Whole
/// blocks go in at once: an emulated machine takes its time over a million single frames.
fn set_free(map: &FrameMap, states: &[AtomicU16], pool: &mut Pool, regions: &[(Pfn, u64)]) -> u64 {
    let absent = |index: u32| states[index as usize].load(Ordering::Relaxed) == FrameState::Absent.pack();
    let set = |index: u32| states[index as usize].store(FrameState::Free.pack(), Ordering::Relaxed);
    let mut total_frames = 0;
    for range in regions.iter().flat_map(|&region| map.ranges(region)) {
        if range.clone().count() as u64 == BLOCK_PAGES && range.clone().all(absent) {
            pool.put_block(*range.start());
            range.for_each(set);
            total_frames += BLOCK_PAGES;
        } else {
            for index in range.filter(|&index| absent(index)) {
                set(index);
                pool.put(index);
                total_frames += 1;
            }
        }
    }
    total_frames
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(number: u16) -> GuestId {
        GuestId::new(number).unwrap()
    }

    fn allocator(pages: u64, marks: (u64, u64, u64)) -> FrameAllocator {
        let marks = Marks::new(marks.0, marks.1, marks.2).unwrap();
        FrameAllocator::new(&[(Pfn(0x1000), pages)], 2, Some(marks))
    }

    #[test]
    fn claims_stop_at_the_mark_and_begun_work_goes_on_to_the_last_frame() {
        let frames = allocator(100, (10, 20, 30));
        let shadow = Owner::Shadow(guest(0));
        assert_eq!(frames.pressure(), Pressure::Plenty);
        let taken: Vec<_> = core::iter::from_fn(|| frames.alloc(0, shadow, Claim::Guest)).collect();
        assert_eq!((taken.len(), frames.free_frames()), (90, 10));
        assert_eq!(frames.pressure(), Pressure::Min);
        assert_eq!(frames.shortfall_frames(), 20);
        assert!((0..10).all(|_| frames.alloc(1, shadow, Claim::Begun).is_some()));
        assert_eq!(frames.alloc(1, shadow, Claim::Begun), None);
        assert_eq!((frames.free_frames(), frames.owned_by(shadow)), (0, 100));
        for &pfn in &taken[..11] {
            frames.free(1, pfn, shadow).unwrap();
        }
        assert_eq!(frames.pressure(), Pressure::Low);
        assert!(frames.alloc(0, shadow, Claim::Guest).is_some());
        assert!(frames.alloc(0, shadow, Claim::Guest).is_none());
    }

    #[test]
    fn wrong_frees_are_reported_and_change_nothing() {
        let frames = allocator(1000, (1, 2, 3));
        let (mine, other) = (Owner::Shadow(guest(1)), Owner::Memory(guest(1)));
        let pfn = frames.alloc(0, mine, Claim::Guest).unwrap();
        assert_eq!(frames.free(0, pfn, other), Err(FreeError::Foreign { pfn, owner: mine }));
        assert_eq!(frames.owner(pfn), Some(mine));
        assert_eq!(frames.free(1, pfn, mine), Ok(()));
        assert_eq!(frames.free(0, pfn, mine), Err(FreeError::Double(pfn)));
        for pfn in [Pfn(0), Pfn(0x1000 + 1000), Pfn(u64::MAX)] {
            assert_eq!(frames.free(0, pfn, mine), Err(FreeError::Absent(pfn)));
            assert_eq!(frames.state(pfn), FrameState::Absent);
        }
        assert_eq!(frames.free_block(Pfn(0x1001), mine), Err(FreeError::Unaligned(Pfn(0x1001))));
        assert_eq!(frames.free_frames(), 1000);
    }

    #[test]
    fn a_block_with_a_foreign_frame_is_not_freed_at_all() {
        let frames = allocator(1024, (1, 2, 3));
        let (mine, other) = (Owner::Memory(guest(0)), Owner::Hypervisor);
        let first = frames.alloc_block(mine).unwrap();
        let inner = Pfn(first.0 + 300);
        frames.free(0, inner, mine).unwrap();
        assert_eq!(frames.free_block(first, mine), Err(FreeError::Double(inner)));
        assert_eq!(frames.owned_by(mine), 511);
        // The other block is whole, so the frame just freed is what a core takes first.
        assert_eq!(frames.alloc(0, other, Claim::Guest), Some(inner));
        assert_eq!(frames.free_block(first, mine), Err(FreeError::Foreign { pfn: inner, owner: other }));
        assert_eq!(frames.frames_of(other).collect::<Vec<_>>(), [inner]);
    }

    #[test]
    fn single_frames_leave_whole_blocks_for_guests() {
        let frames = allocator(10 * 512, (1, 2, 3));
        let shadow = Owner::Shadow(guest(0));
        for core in 0..400 {
            assert!(frames.alloc(core % 2, shadow, Claim::Guest).is_some());
        }
        let blocks: Vec<_> = core::iter::from_fn(|| frames.alloc_block(Owner::Memory(guest(0)))).collect();
        assert_eq!(blocks.len(), 9);
    }

    #[test]
    fn frames_in_caches_are_not_lost_to_blocks_and_other_cores() {
        let frames = allocator(512 + 64, (0, 1, 2));
        let shadow = Owner::Shadow(guest(0));
        let taken: Vec<_> = (0..576).map(|_| frames.alloc(0, shadow, Claim::Begun).unwrap()).collect();
        taken.iter().for_each(|&pfn| frames.free(0, pfn, shadow).unwrap());
        // Core 0's cache now holds frames of the only whole block.
        let block = frames.alloc_block(Owner::Memory(guest(0))).unwrap();
        assert_eq!(block, Pfn(0x1000));
        assert!((0..64).all(|_| frames.alloc(1, shadow, Claim::Begun).is_some()));
        assert_eq!(frames.free_frames(), 0);
    }

    #[test]
    fn frames_below_4g_are_found_and_spared() {
        let regions = [(Pfn(FOUR_GIB.0 - 512), 512), (FOUR_GIB, 512)];
        let frames = FrameAllocator::new(&regions, 1, Some(Marks::new(0, 1, 2).unwrap()));
        let owner = Owner::Hypervisor;
        let single = frames.alloc(0, owner, Claim::Guest).unwrap();
        assert!(single >= FOUR_GIB);
        assert!((0..512).all(|_| frames.alloc_below_4g(owner, Claim::Guest).unwrap() < FOUR_GIB));
        assert_eq!(frames.alloc_below_4g(owner, Claim::Guest), None);
        assert_eq!(frames.free_frames(), 511);
    }

    #[test]
    fn a_reservation_is_all_or_none_and_returns_what_is_left() {
        let frames = allocator(100, (90, 91, 92));
        let shadow = Owner::Shadow(guest(3));
        let mut reserved = frames.reserve::<8>(0, shadow, Claim::Guest, 8).unwrap();
        assert_eq!(frames.free_frames(), 92);
        assert_eq!(frames.reserve::<8>(0, shadow, Claim::Guest, 4).err(), Some(NeedFrames(2)));
        let (a, b) = (reserved.take().unwrap(), reserved.take().unwrap());
        assert_ne!(a, b);
        assert_eq!(reserved.left(), 6);
        reserved.release();
        assert_eq!((frames.free_frames(), frames.owned_by(shadow)), (98, 2));
        let mut none = frames.reserve::<8>(0, shadow, Claim::Begun, 0).unwrap();
        assert_eq!(none.take(), None);
    }

    #[test]
    fn overlapping_regions_count_once() {
        let regions = [(Pfn(0x200), 700), (Pfn(0x100), 0x300), (Pfn(0x200), 512), (Pfn(9), 0)];
        let frames = FrameAllocator::new(&regions, 1, None);
        assert_eq!(frames.free_frames(), 0x100 + 700);
        let taken = core::iter::from_fn(|| frames.alloc(0, Owner::Hypervisor, Claim::Begun)).count();
        assert_eq!(taken, 0x100 + 700);
        assert_eq!(FrameAllocator::new(&[], 0, None).alloc(0, Owner::Hypervisor, Claim::Begun), None);
    }

    #[test]
    fn tables_cost_little_over_two_bytes_a_frame() {
        let regions = [(Pfn(0), 1 << 20)];
        let bytes = FrameAllocator::table_bytes(&regions, 2);
        assert!(bytes < (1 << 20) * 5 / 2, "{bytes}");
    }

    #[test]
    fn marks_can_be_raised_to_make_a_budget() {
        let frames = allocator(100, (1, 2, 3));
        frames.set_marks(Marks::new(50, 60, 70).unwrap()).unwrap();
        assert_eq!(frames.marks(), Marks::new(50, 60, 70).unwrap());
        assert!(frames.set_marks(Marks::new(50, 60, 100).unwrap()).is_err());
        let taken = core::iter::from_fn(|| frames.alloc(0, Owner::Hypervisor, Claim::Guest)).count();
        assert_eq!(taken, 50);
    }
}
