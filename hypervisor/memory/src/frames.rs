//! The host's frames: who owns each, how many are free (exactly), and the marks that say when to reclaim.
//!
//! Single frames come through a cache per core; whole 2 MiB blocks, for guests' memory, and frames below
//! 4 GiB come from the pool under its lock. While plenty is free, a frame is taken and given back on lines that
//! no other core writes; near the marks all free frames are in the pool, whose number is then the free count:
//! `frames/stock.rs` says how, and why the marks hold exactly and no granted claim can fail.
//!
//! The states of the 32 frames that a cache takes at once lie on one cache line as long as the pool has such
//! a group. Frames given back on other cores than those that took them mix the groups in time, and then a line is
//! written by more than one core: sorting them would cost more.
//!
//! Locks: the pool's before a core's cache; never two caches. Nothing here may be called by NMI or machine
//! check handlers. Contents of frames are touched by what `frames/poison.rs` adds alone.

mod bitset;
mod cache;
mod defect;
mod map;
mod marks;
mod owner;
mod poison;
mod pool;
mod posted;
mod stock;
mod tally;

use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicU16, Ordering};

use crate::address::{BLOCK_PAGES, PAGE_SHIFT, Pfn};
use cache::BATCH_FRAMES;
use map::FrameMap;
use pool::Pool;
use stock::Stock;

pub use marks::{Marks, MarksError, Pressure};
use owner::{FREE, POISONED};
pub use owner::{FrameState, GuestId, Owner};
pub use poison::{POISON, WriteAfterFree};

/// First frame at 4 GiB.
const FOUR_GIB: Pfn = Pfn(1 << (32 - PAGE_SHIFT));

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

/// The states of a batch of frames, on one cache line.
#[repr(align(64))]
struct StateLine([AtomicU16; BATCH_FRAMES]);
const _: () = assert!(size_of::<StateLine>() == 64);

/// [`FrameState`] of each frame, packed, by dense index.
struct States(Vec<StateLine>);

impl States {
    /// States of `frames` frames (whole blocks), all absent.
    fn new(frames: usize) -> Self {
        let absent = || StateLine([const { AtomicU16::new(FrameState::Absent.pack()) }; BATCH_FRAMES]);
        Self((0..frames / BATCH_FRAMES).map(|_| absent()).collect())
    }

    fn at(&self, index: u32) -> &AtomicU16 {
        &self.0[index as usize / BATCH_FRAMES].0[index as usize % BATCH_FRAMES]
    }

    fn iter(&self) -> impl Iterator<Item = &AtomicU16> {
        self.0.iter().flat_map(|line| &line.0)
    }
}

/// All frames of the host that are not set aside for good.
pub struct FrameAllocator {
    map: FrameMap,
    states: States,
    stock: Stock,
    /// Dense indices of blocks below this one lie below 4 GiB.
    low_blocks: usize,
}

impl FrameAllocator {
    /// Takes charge of `regions` (first frame, frames; in any order, overlaps count once) for cores
    /// `0..cores`. `None`, or marks that do not [fit](Marks::fits) the memory there is, stand for
    /// [`Marks::for_memory`].
    #[must_use]
    pub fn new(regions: &[(Pfn, u64)], cores: usize, marks: Option<Marks>) -> Self {
        let map = FrameMap::new(regions);
        let states = States::new(map.frames());
        let low_blocks = map.blocks_below(FOUR_GIB);
        let mut pool = Pool::new(map.blocks(), low_blocks);
        let total_frames = set_free(&map, &states, &mut pool, regions);
        let marks = marks
            .and_then(|marks| marks.fits(total_frames).ok())
            .unwrap_or_else(|| Marks::for_memory(total_frames));
        Self { low_blocks, map, states, stock: Stock::new(pool, total_frames, cores, marks) }
    }

    /// Heap bytes that [`FrameAllocator::new`] needs for `regions` and `cores`, within a few KiB; a little
    /// over 2 bytes a frame.
    #[must_use]
    pub fn table_bytes(regions: &[(Pfn, u64)], cores: usize) -> usize {
        let map = FrameMap::new(regions);
        map.frames() * size_of::<AtomicU16>()
            + map.blocks() * Pool::BYTES_PER_BLOCK
            + cores * Stock::BYTES_PER_CORE
            + regions.len() * 64
    }

    /// A frame for `owner`, for a shadow page from `core`'s cache if it has one; `None` if the marks do not allow it.
    #[must_use]
    pub fn alloc(&self, core: usize, owner: Owner, claim: Claim) -> Option<Pfn> {
        let index = self.take(core, owner, claim)?;
        Some(self.hand_out(index, owner))
    }

    fn take(&self, core: usize, owner: Owner, claim: Claim) -> Option<u32> {
        if let Owner::Shadow(_) = owner {
            self.stock.take(core, claim)
        } else {
            self.stock.take_beside(1, claim, |pool| pool.take(usize::MAX))
        }
    }

    /// A frame below 4 GiB for `guest`'s shadow pages; `None` if there is none or the marks do not allow it.
    #[must_use]
    pub fn alloc_below_4g(&self, guest: GuestId, claim: Claim) -> Option<Pfn> {
        let index = self.stock.take_below(self.low_blocks, claim)?;
        Some(self.hand_out(index, Owner::Shadow(guest)))
    }

    /// 512 contiguous frames for `guest`'s memory, 2 MiB-aligned, as a [`Claim::Guest`]; the first of them. `None` if no block is
    /// whole or the marks do not allow it.
    #[must_use]
    pub fn alloc_block(&self, guest: GuestId) -> Option<Pfn> {
        let first = self.stock.take_beside(BLOCK_PAGES, Claim::Guest, Pool::take_block)?;
        (first..first + BLOCK_PAGES as u32).for_each(|index| _ = self.hand_out(index, Owner::Memory(guest)));
        Some(self.map.pfn(first))
    }

    /// Gives a frame back, a shadow page's through `core`'s cache.
    ///
    /// # Errors
    /// [`FreeError`] when it is not `owner`'s.
    pub fn free(&self, core: usize, pfn: Pfn, owner: Owner) -> Result<(), FreeError> {
        self.free_as(FREE, core, pfn, owner)
    }

    fn free_as(&self, state: u16, core: usize, pfn: Pfn, owner: Owner) -> Result<(), FreeError> {
        let index = self.map.index(pfn).ok_or(FreeError::Absent(pfn))?;
        self.disown(index, owner, state)?;
        if let Owner::Shadow(_) = owner {
            self.stock.put(core, index);
        } else {
            self.stock.put_beside(1, |pool| pool.put(index));
        }
        Ok(())
    }

    /// Gives back the 512 frames of the 2 MiB block that `first` begins: all or none.
    ///
    /// # Errors
    /// [`FreeError`] for the first frame that is not of `guest`'s memory.
    pub fn free_block(&self, first: Pfn, guest: GuestId) -> Result<(), FreeError> {
        self.free_block_as(FREE, first, guest)
    }

    fn free_block_as(&self, state: u16, first: Pfn, guest: GuestId) -> Result<(), FreeError> {
        let owner = Owner::Memory(guest);
        if !first.0.is_multiple_of(BLOCK_PAGES) {
            return Err(FreeError::Unaligned(first));
        }
        let base = self.map.index(first).ok_or(FreeError::Absent(first))?;
        let end = base + BLOCK_PAGES as u32 - 1;
        for index in base..=end {
            if let Err(error) = self.disown(index, owner, state) {
                (base..index).for_each(|index| _ = self.hand_out(index, owner));
                return Err(error);
            }
        }
        self.stock.put_beside(BLOCK_PAGES, |pool| pool.put_block(base));
        Ok(())
    }

    /// Free frames at one moment of the call, exactly. If cores gave frames back all the while, and more than
    /// `low` are free, no moment can be told: then at least so many were free at one. Takes no lock.
    #[must_use]
    pub fn free_frames(&self) -> u64 {
        self.stock.free_frames()
    }

    /// All frames of the allocator, free or not.
    #[must_use]
    pub fn total_frames(&self) -> u64 {
        self.stock.total_frames()
    }

    /// The marks now in force.
    #[must_use]
    pub fn marks(&self) -> Marks {
        self.stock.marks()
    }

    /// Changes the marks. A claim sees all of the old marks or all of the new ones; [`FrameAllocator::pressure`] and
    /// [`FrameAllocator::shortfall_frames`], asked meanwhile, may mix them.
    ///
    /// # Errors
    /// [`MarksError::TooHigh`] if the machine has too few frames.
    pub fn set_marks(&self, marks: Marks) -> Result<(), MarksError> {
        self.stock.set_marks(marks, None)
    }

    /// Makes a budget of marks: shadow pages have what lies between what is free now and `min`. What others own is beside
    /// it: the marks go down and up with their frames, but for the last `least_frames` free ones. While such a frame goes or
    /// comes, [`FrameAllocator::pressure`] and the like may see a number that is too high for the marks; no claim does.
    ///
    /// # Errors
    /// [`MarksError::TooHigh`] if the machine has too few frames.
    pub fn set_budget(&self, marks: Marks, least_frames: u64) -> Result<(), MarksError> {
        self.stock.set_marks(marks, Some(least_frames))
    }

    /// How the free count stands to the marks, exactly. Takes no lock.
    #[must_use]
    pub fn pressure(&self) -> Pressure {
        self.stock.pressure()
    }

    /// Frames that reclaim still has to free until it may stop, up to the high mark, exactly.
    #[must_use]
    pub fn shortfall_frames(&self) -> u64 {
        self.stock.shortfall_frames()
    }

    /// What is known of a frame.
    #[must_use]
    pub fn state(&self, pfn: Pfn) -> FrameState {
        self.map.index(pfn).map_or(FrameState::Absent, |index| {
            FrameState::unpack(self.states.at(index).load(Ordering::Relaxed))
        })
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
            .zip(self.states.iter())
            .filter(move |(_, state)| state.load(Ordering::Relaxed) == owned)
            .map(|(index, _)| self.map.pfn(index))
    }

    /// How many frames `owner` has; as slow as [`FrameAllocator::frames_of`].
    #[must_use]
    pub fn owned_by(&self, owner: Owner) -> u64 {
        self.frames_of(owner).count() as u64
    }

    /// Makes a frame that was taken `owner`'s.
    fn hand_out(&self, index: u32, owner: Owner) -> Pfn {
        self.states.at(index).store(FrameState::Owned(owner).pack(), Ordering::Release);
        self.map.pfn(index)
    }

    /// Marks `owner`'s frame free, by one of the two states for it. The exchange makes one of two cores that free
    /// a frame at once fail.
    fn disown(&self, index: u32, owner: Owner, free: u16) -> Result<(), FreeError> {
        let owned = FrameState::Owned(owner).pack();
        let exchanged =
            self.states.at(index).compare_exchange(owned, free, Ordering::AcqRel, Ordering::Relaxed);
        let Err(found) = exchanged else { return Ok(()) };
        let pfn = self.map.pfn(index);
        Err(match FrameState::unpack(found) {
            FrameState::Absent => FreeError::Absent(pfn),
            FrameState::Free => FreeError::Double(pfn),
            FrameState::Owned(owner) => FreeError::Foreign { pfn, owner },
        })
    }
}

/// Marks the frames of `regions` free and puts them into the pool, each once; how many they are. Whole
/// blocks go in at once: an emulated machine takes its time over a million single frames.
fn set_free(map: &FrameMap, states: &States, pool: &mut Pool, regions: &[(Pfn, u64)]) -> u64 {
    let absent = |index: u32| states.at(index).load(Ordering::Relaxed) == FrameState::Absent.pack();
    let set = |index: u32| states.at(index).store(FREE, Ordering::Relaxed);
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

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::lock::count::acquisitions;

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
        assert_eq!(frames.free_block(Pfn(0x1001), guest(1)), Err(FreeError::Unaligned(Pfn(0x1001))));
        assert_eq!(frames.free_frames(), 1000);
    }

    #[test]
    fn a_block_with_a_foreign_frame_is_not_freed_at_all() {
        let frames = allocator(1024, (1, 2, 3));
        let (mine, other) = (Owner::Memory(guest(0)), Owner::Shadow(guest(0)));
        let first = frames.alloc_block(guest(0)).unwrap();
        let inner = Pfn(first.0 + 300);
        frames.free(0, inner, mine).unwrap();
        assert_eq!(frames.free_block(first, guest(0)), Err(FreeError::Double(inner)));
        assert_eq!(frames.owned_by(mine), 511);
        // The other block is whole, so the frame just freed is what a core takes first.
        assert_eq!(frames.alloc(0, other, Claim::Guest), Some(inner));
        assert_eq!(frames.free_block(first, guest(0)), Err(FreeError::Foreign { pfn: inner, owner: other }));
        assert_eq!(frames.frames_of(other).collect::<Vec<_>>(), [inner]);
    }

    #[test]
    fn single_frames_leave_whole_blocks_for_guests() {
        let frames = allocator(10 * 512, (1, 2, 3));
        let shadow = Owner::Shadow(guest(0));
        for core in 0..400 {
            assert!(frames.alloc(core % 2, shadow, Claim::Guest).is_some());
        }
        let blocks: Vec<_> = core::iter::from_fn(|| frames.alloc_block(guest(0))).collect();
        assert_eq!(blocks.len(), 9);
    }

    #[test]
    fn frames_in_caches_are_not_lost_to_blocks_and_other_cores() {
        let frames = allocator(512 + 64, (0, 1, 2));
        let shadow = Owner::Shadow(guest(0));
        let taken: Vec<_> = (0..576).map(|_| frames.alloc(0, shadow, Claim::Begun).unwrap()).collect();
        taken.iter().for_each(|&pfn| frames.free(0, pfn, shadow).unwrap());
        // Core 0's cache now holds frames of the only whole block.
        let block = frames.alloc_block(guest(0)).unwrap();
        assert_eq!(block, Pfn(0x1000));
        assert!((0..64).all(|_| frames.alloc(1, shadow, Claim::Begun).is_some()));
        assert_eq!(frames.free_frames(), 0);
    }

    #[test]
    fn frames_below_4g_are_found_and_spared() {
        let regions = [(Pfn(FOUR_GIB.0 - 512), 512), (FOUR_GIB, 512)];
        let frames = FrameAllocator::new(&regions, 1, Some(Marks::new(0, 1, 2).unwrap()));
        let owner = Owner::Shadow(guest(0));
        let single = frames.alloc(0, owner, Claim::Guest).unwrap();
        assert!(single >= FOUR_GIB);
        assert!((0..512).all(|_| frames.alloc_below_4g(guest(0), Claim::Guest).unwrap() < FOUR_GIB));
        assert_eq!(frames.alloc_below_4g(guest(0), Claim::Guest), None);
        assert_eq!(frames.free_frames(), 511);
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

    #[test]
    fn blocks_are_beside_a_budget() {
        let frames = allocator(8 * 512, (1, 2, 3));
        let shadow = Owner::Shadow(guest(0));
        let first = frames.alloc_block(guest(0)).unwrap();
        // 100 of the 3584 that are free are the budget.
        frames.set_budget(Marks::new(3484, 3490, 3496).unwrap(), 50).unwrap();
        let taken: Vec<_> = core::iter::from_fn(|| frames.alloc(0, shadow, Claim::Guest)).take(60).collect();
        assert_eq!((frames.pressure(), taken.len()), (Pressure::Plenty, 60));
        // A guest ends: its RAM is free, and the budget what it was.
        frames.free_block(first, guest(0)).unwrap();
        assert_eq!((frames.free_frames(), frames.marks().min_frames()), (4036, 3996));
        // Others come, as many as there are blocks but for one that is broken.
        let blocks: Vec<_> = core::iter::from_fn(|| frames.alloc_block(guest(0))).collect();
        assert_eq!((blocks.len(), frames.marks().min_frames()), (7, 3996 - 7 * 512));
        let more = core::iter::from_fn(|| frames.alloc(0, shadow, Claim::Guest)).count();
        assert_eq!(more, 40, "the budget is what it was");
        assert_eq!(frames.alloc_block(guest(0)), None);
        blocks.into_iter().for_each(|block| frames.free_block(block, guest(0)).unwrap());
        assert_eq!(frames.marks().min_frames(), 3996);
    }

    #[test]
    fn single_frames_of_others_are_beside_a_budget() {
        let frames = allocator(8 * 512, (1, 2, 3));
        let (vcpu, shadow) = (Owner::Hypervisor, Owner::Shadow(guest(0)));
        let early = frames.alloc(0, vcpu, Claim::Begun).unwrap();
        frames.set_budget(Marks::new(3995, 4000, 4010).unwrap(), 50).unwrap();
        let late = frames.alloc(0, vcpu, Claim::Begun).unwrap();
        for pfn in [early, late] {
            frames.free(1, pfn, vcpu).unwrap();
        }
        assert_eq!((frames.free_frames(), frames.marks().min_frames()), (4096, 3996));
        assert_eq!(core::iter::from_fn(|| frames.alloc(0, shadow, Claim::Guest)).count(), 100);
    }

    #[test]
    fn a_block_out_of_the_budget_comes_back_into_it() {
        let frames = allocator(8 * 512, (1, 2, 3));
        // All that is free is the budget: blocks can come out of nothing else.
        let marks = Marks::new(50, 60, 70).unwrap();
        frames.set_budget(marks, 50).unwrap();
        for _ in 0..3 {
            let blocks: Vec<_> = core::iter::from_fn(|| frames.alloc_block(guest(0))).collect();
            assert_eq!(blocks.len(), 7);
            blocks.into_iter().for_each(|block| frames.free_block(block, guest(0)).unwrap());
            assert_eq!((frames.marks(), frames.free_frames()), (marks, 8 * 512));
        }
    }

    #[test]
    fn in_the_common_case_a_frame_costs_its_cores_lock_and_nothing_shared() {
        let frames = allocator(4096, (10, 20, 30));
        let shadow = Owner::Shadow(guest(0));
        // The first frame brings a batch.
        let first = frames.alloc(0, shadow, Claim::Guest).unwrap();
        let shared = frames.stock.shared_number();
        let (taken, locks) = acquisitions(|| {
            let taken: [Pfn; BATCH_FRAMES] = core::array::from_fn(|_| {
                let pfn = frames.alloc(0, shadow, Claim::Guest).unwrap();
                assert_eq!(frames.stock.shared_number(), shared);
                pfn
            });
            for pfn in taken {
                frames.free(0, pfn, shadow).unwrap();
                assert_eq!(frames.stock.shared_number(), shared);
            }
            taken
        });
        // A lock each, and no more: its own cache's, since without the cache the pool's number changes.
        assert_eq!(locks, 2 * BATCH_FRAMES as u64);
        assert_eq!((frames.free_frames(), frames.owned_by(shadow)), (4095, 1));
        // One line of states.
        let line = |pfn: Pfn| frames.map.index(pfn).unwrap() / BATCH_FRAMES as u32;
        assert!(taken.iter().all(|&pfn| line(pfn) == line(taken[0]) && line(pfn) != line(first)));
    }

    #[test]
    fn raised_marks_call_in_what_the_caches_hold() {
        let frames = allocator(1000, (1, 2, 3));
        let pfn = [0, 1].map(|core| frames.alloc(core, Owner::Shadow(guest(0)), Claim::Guest).unwrap());
        assert_eq!(frames.stock.shared_number(), 1000 - 2 - 2 * BATCH_FRAMES as u64);
        frames.set_marks(Marks::new(900, 990, 998).unwrap()).unwrap();
        assert_eq!((frames.stock.shared_number(), frames.pressure()), (998, Pressure::Plenty));
        assert_eq!((frames.free_frames(), frames.shortfall_frames()), (998, 0));
        // And they stay closed.
        frames.free(0, pfn[0], Owner::Shadow(guest(0))).unwrap();
        assert_eq!(frames.stock.shared_number(), 999);
    }

    #[test]
    fn between_the_marks_the_caches_count_too() {
        let frames = allocator(1000, (100, 200, 900));
        let taken: Vec<_> =
            (0..150).map(|_| frames.alloc(0, Owner::Shadow(guest(0)), Claim::Guest).unwrap()).collect();
        assert!(frames.stock.shared_number() < 850);
        assert_eq!((frames.free_frames(), frames.shortfall_frames()), (850, 50));
        for pfn in taken {
            frames.free(1, pfn, Owner::Shadow(guest(0))).unwrap();
        }
        assert_eq!((frames.free_frames(), frames.shortfall_frames()), (1000, 0));
    }
}
