//! Writes after free: in debug builds a free frame holds a pattern, and whoever takes it looks for it.

use core::fmt;
use core::sync::atomic::Ordering;

use super::{Claim, FREE, FrameAllocator, FreeError, GuestId, Owner, POISONED};
use crate::access::TableMemory;
use crate::address::{BLOCK_PAGES, Pfn};

/// What fills a free frame. As a table entry it is present and has reserved bits set, as an address it is not
/// canonical: to use it is noticed, too.
pub const POISON: u64 = 0xdbdb_dbdb_dbdb_dbdb;

/// A free frame was written to by someone who still thought it his.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteAfterFree {
    /// The frame.
    pub pfn: Pfn,
    /// The first of its 512 words that was written.
    pub index: usize,
    /// What it holds.
    pub found: u64,
}

impl fmt::Display for WriteAfterFree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pfn, index, found } = self;
        write!(f, "frame {pfn} was written to while it was free: word {index} holds {found:#x}")
    }
}

impl core::error::Error for WriteAfterFree {}

fn verify(tables: &impl TableMemory, pfn: Pfn) -> Result<(), WriteAfterFree> {
    let words = (0..512).map(|index| (index, tables.load(pfn, index)));
    match words.into_iter().find(|&(_, found)| found != POISON) {
        Some((index, found)) => Err(WriteAfterFree { pfn, index, found }),
        None => Ok(()),
    }
}

impl FrameAllocator {
    /// [`FrameAllocator::alloc`]; in debug builds a frame that was filled with [`POISON`] when it became free
    /// has to hold it still. Frames that became free otherwise are not looked at.
    ///
    /// # Panics
    /// In debug builds, with [`WriteAfterFree`]: our own error, or a device's.
    #[must_use]
    pub fn alloc_checked(
        &self,
        tables: &impl TableMemory,
        core: usize,
        owner: Owner,
        claim: Claim,
    ) -> Option<Pfn> {
        if !cfg!(debug_assertions) {
            return self.alloc(core, owner, claim);
        }
        let index = self.take(core, owner, claim)?;
        let was_poisoned = self.states.at(index).load(Ordering::Acquire) == POISONED;
        let pfn = self.hand_out(index, owner);
        if was_poisoned && let Err(error) = verify(tables, pfn) {
            panic!("{error}");
        }
        Some(pfn)
    }

    /// [`FrameAllocator::free`]; in debug builds the frame is filled with [`POISON`] first.
    ///
    /// # Errors
    /// [`FreeError`] when it is not `owner`'s: then it is not filled.
    pub fn free_poisoned(
        &self,
        tables: &impl TableMemory,
        core: usize,
        pfn: Pfn,
        owner: Owner,
    ) -> Result<(), FreeError> {
        if !cfg!(debug_assertions) || self.owner(pfn) != Some(owner) {
            return self.free(core, pfn, owner);
        }
        tables.fill(pfn, POISON);
        self.free_as(POISONED, core, pfn, owner)
    }

    /// [`FrameAllocator::free_block`]; in debug builds its frames are filled with [`POISON`] first.
    ///
    /// # Errors
    /// [`FreeError`] for the first frame that is not of `guest`'s memory: then none is filled.
    pub fn free_block_poisoned(
        &self,
        tables: &impl TableMemory,
        first: Pfn,
        guest: GuestId,
    ) -> Result<(), FreeError> {
        let owner = Owner::Memory(guest);
        let frames = || (first.0..first.0.saturating_add(BLOCK_PAGES)).map(Pfn);
        let whole = first.0.is_multiple_of(BLOCK_PAGES);
        if !cfg!(debug_assertions) || !whole || frames().any(|pfn| self.owner(pfn) != Some(owner)) {
            return self.free_block_as(FREE, first, guest);
        }
        frames().for_each(|pfn| tables.fill(pfn, POISON));
        self.free_block_as(POISONED, first, guest)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::frames::{GuestId, Marks};
    use std::cell::RefCell;
    use std::collections::HashMap;

    /// Frames by number, of zeros.
    #[derive(Default)]
    struct Tables(RefCell<HashMap<(Pfn, usize), u64>>);

    impl TableMemory for Tables {
        fn load(&self, pfn: Pfn, index: usize) -> u64 {
            self.0.borrow().get(&(pfn, index)).copied().unwrap_or(0)
        }
        fn store(&self, pfn: Pfn, index: usize, value: u64) {
            self.0.borrow_mut().insert((pfn, index), value);
        }
        fn swap(&self, pfn: Pfn, index: usize, value: u64) -> u64 {
            self.0.borrow_mut().insert((pfn, index), value).unwrap_or(0)
        }
        fn fill(&self, pfn: Pfn, value: u64) {
            (0..512).for_each(|index| self.store(pfn, index, value));
        }
    }

    const SHADOW: Owner = Owner::Shadow(GuestId::new(1).unwrap());

    fn one_frame() -> FrameAllocator {
        FrameAllocator::new(&[(Pfn(0x77), 1)], 1, Some(Marks::for_memory(1)))
    }

    #[test]
    fn a_frame_that_nobody_wrote_to_is_taken_again() {
        let (frames, tables) = (one_frame(), Tables::default());
        // The first time there is nothing to look for.
        for _ in 0..2 {
            let pfn = frames.alloc_checked(&tables, 0, SHADOW, Claim::Begun).unwrap();
            frames.free_poisoned(&tables, 0, pfn, SHADOW).unwrap();
            assert_eq!(frames.free_poisoned(&tables, 0, pfn, SHADOW), Err(FreeError::Double(pfn)));
            assert!((0..512).all(|index| tables.load(pfn, index) == POISON));
        }
    }

    #[test]
    #[should_panic(expected = "frame 0x77 was written to while it was free: word 511 holds 0x1")]
    fn a_write_after_free_is_found_and_names_the_frame() {
        let (frames, tables) = (one_frame(), Tables::default());
        let pfn = frames.alloc_checked(&tables, 0, SHADOW, Claim::Begun).unwrap();
        frames.free_poisoned(&tables, 0, pfn, SHADOW).unwrap();
        tables.store(pfn, 511, 1);
        let _ = frames.alloc_checked(&tables, 0, SHADOW, Claim::Begun);
    }

    #[test]
    fn a_frame_used_by_another_meanwhile_is_not_looked_at() {
        let (frames, tables) = (one_frame(), Tables::default());
        let pfn = frames.alloc(0, SHADOW, Claim::Begun).unwrap();
        frames.free_poisoned(&tables, 0, pfn, SHADOW).unwrap();
        assert_eq!(frames.alloc(0, Owner::Hypervisor, Claim::Begun), Some(pfn));
        tables.store(pfn, 3, 9);
        frames.free(0, pfn, Owner::Hypervisor).unwrap();
        assert_eq!(frames.alloc_checked(&tables, 0, SHADOW, Claim::Begun), Some(pfn));
    }

    #[test]
    fn what_is_not_the_owners_is_not_filled() {
        let (frames, tables) = (one_frame(), Tables::default());
        let pfn = frames.alloc(0, SHADOW, Claim::Begun).unwrap();
        let foreign = Err(FreeError::Foreign { pfn, owner: SHADOW });
        assert_eq!(frames.free_poisoned(&tables, 0, pfn, Owner::Hypervisor), foreign);
        assert_eq!(tables.load(pfn, 0), 0);
    }

    #[test]
    fn a_blocks_frames_are_watched_one_by_one() {
        let frames = FrameAllocator::new(&[(Pfn(0x200), 512)], 1, Some(Marks::new(0, 1, 2).unwrap()));
        let tables = Tables::default();
        let block = frames.alloc_block(GuestId::new(0).unwrap()).unwrap();
        frames.free_block_poisoned(&tables, block, GuestId::new(0).unwrap()).unwrap();
        assert!(block.0 == 0x200 && tables.load(Pfn(0x3ff), 511) == POISON);
        let taken = || frames.alloc_checked(&tables, 0, SHADOW, Claim::Begun);
        assert_eq!(core::iter::from_fn(taken).count(), 512);
        assert_eq!(
            frames.free_block_poisoned(&tables, Pfn(0x201), GuestId::new(0).unwrap()),
            Err(FreeError::Unaligned(Pfn(0x201)))
        );
    }
}
