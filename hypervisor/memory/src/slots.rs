//! A guest's memory slots: where its RAM lies in host memory.
//!
//! RAM is made of 2 MiB blocks, each contiguous and aligned in host memory, so that a large guest page can
//! be mapped by a large spte. It starts at gpa 0, ends below 3 GiB, and goes on at 4 GiB; everything else is
//! MMIO or a hole.

use alloc::vec::Vec;
use core::fmt;

use crate::address::{BLOCK_PAGES, BLOCK_SIZE, Gfn, Gpa, Hpa, Pfn};

/// log2 of the pages in a block.
const BLOCK_SHIFT: u32 = BLOCK_PAGES.trailing_zeros();
/// Blocks that fit below 3 GiB, where the hole for MMIO begins.
const LOW_BLOCKS_MAX: u64 = (3 << 30) / BLOCK_SIZE;
/// Number of the first block at 4 GiB, where RAM goes on.
const HIGH_FIRST_BLOCK: u64 = (4 << 30) / BLOCK_SIZE;
/// Blocks of the largest guest: 1 TiB.
pub const BLOCKS_MAX: u64 = (1 << 40) / BLOCK_SIZE;

/// Why a list of blocks is no guest's RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotsError {
    /// The guest page is not the first of a 2 MiB block.
    UnalignedGuest(Gfn),
    /// The host page is not the first of a 2 MiB block.
    UnalignedHost(Pfn),
    /// RAM must begin here, or go on here: blocks are missing, listed twice, or lie in the MMIO hole.
    NotContiguous {
        /// The block that was found.
        found: Gfn,
        /// The block that had to come instead.
        expected: Gfn,
    },
    /// Two blocks of the guest would share one block of host memory.
    Shared(Pfn),
    /// More blocks than [`BLOCKS_MAX`].
    TooLarge(u64),
}

impl fmt::Display for SlotsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnalignedGuest(gfn) => write!(f, "guest page {gfn} does not begin a 2 MiB block"),
            Self::UnalignedHost(pfn) => write!(f, "host page {pfn} does not begin a 2 MiB block"),
            Self::NotContiguous { found, expected } => {
                write!(f, "guest RAM has a block at page {found} where page {expected} has to come")
            }
            Self::Shared(pfn) => write!(f, "host block {pfn} is listed twice for one guest"),
            Self::TooLarge(blocks) => write!(f, "{blocks} blocks of 2 MiB are more than {BLOCKS_MAX}"),
        }
    }
}

impl core::error::Error for SlotsError {}

/// The memory slots of one guest: gfn to pfn, and a dense numbering of its pages.
///
/// Two lists, so that the look at the first, which answers for most guests always, is one comparison and one load.
#[derive(Clone, Debug, Default)]
pub struct Slots {
    /// Host base of each block below 3 GiB, by guest block number.
    low: Vec<Pfn>,
    /// Host base of each block from 4 GiB on.
    high: Vec<Pfn>,
}

impl Slots {
    /// Builds the slots from (first gfn of a block, first pfn of a block), in any order.
    ///
    /// # Errors
    /// [`SlotsError`] when blocks are not aligned, not those that [`block_gfns`] names, or shared.
    pub fn new(blocks: &[(Gfn, Pfn)]) -> Result<Self, SlotsError> {
        if blocks.len() as u64 > BLOCKS_MAX {
            return Err(SlotsError::TooLarge(blocks.len() as u64));
        }
        let mut sorted = blocks.to_vec();
        sorted.sort_unstable();
        let mut low_blocks = 0;
        let mut expected = Gfn(0);
        for &(gfn, pfn) in &sorted {
            if !gfn.0.is_multiple_of(BLOCK_PAGES) {
                return Err(SlotsError::UnalignedGuest(gfn));
            }
            if !pfn.0.is_multiple_of(BLOCK_PAGES) {
                return Err(SlotsError::UnalignedHost(pfn));
            }
            let at_four_gib = gfn.0 >> BLOCK_SHIFT == HIGH_FIRST_BLOCK && low_blocks > 0;
            let in_hole = gfn.0 >> BLOCK_SHIFT == LOW_BLOCKS_MAX;
            if (gfn != expected && !at_four_gib) || in_hole {
                return Err(SlotsError::NotContiguous { found: gfn, expected });
            }
            if gfn.0 >> BLOCK_SHIFT < HIGH_FIRST_BLOCK {
                low_blocks += 1;
            }
            expected = Gfn(gfn.0 + BLOCK_PAGES);
        }
        let mut low: Vec<Pfn> = sorted.iter().map(|&(_, pfn)| pfn).collect();
        let mut hosts = low.clone();
        hosts.sort_unstable();
        if let Some(pair) = hosts.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(SlotsError::Shared(pair[0]));
        }
        let high = low.split_off(low_blocks);
        Ok(Self { low, high })
    }

    /// Position in `high` of the guest block `block`: far past the end for one below 4 GiB.
    #[inline]
    fn high_position(block: u64) -> usize {
        block.wrapping_sub(HIGH_FIRST_BLOCK) as usize
    }

    /// The host page behind `gfn`; `None` if it is no RAM.
    #[inline]
    #[must_use]
    pub fn pfn(&self, gfn: Gfn) -> Option<Pfn> {
        Some(Pfn(self.block(gfn)?.0 | (gfn.0 % BLOCK_PAGES)))
    }

    /// The host address behind `gpa`; `None` if it is no RAM.
    #[inline]
    #[must_use]
    pub fn hpa(&self, gpa: Gpa) -> Option<Hpa> {
        Some(Hpa(self.block(gpa.page())?.address().0 | (gpa.0 % BLOCK_SIZE)))
    }

    /// First host page of the contiguous 2 MiB block that contains `gfn`; `None` if it is no RAM.
    #[inline]
    #[must_use]
    pub fn block(&self, gfn: Gfn) -> Option<Pfn> {
        let block = gfn.0 >> BLOCK_SHIFT;
        match self.low.get(block as usize) {
            Some(&base) => Some(base),
            None => self.high.get(Self::high_position(block)).copied(),
        }
    }

    /// Number of the page among this guest's RAM pages, `0..pages()`, for arrays with one entry per page.
    #[inline]
    #[must_use]
    pub fn index(&self, gfn: Gfn) -> Option<usize> {
        Some(self.page(gfn)?.0)
    }

    /// Number and host page of `gfn` in one: [`Slots::index`] and [`Slots::pfn`].
    #[inline]
    #[must_use]
    pub fn page(&self, gfn: Gfn) -> Option<(usize, Pfn)> {
        let (block, within) = (gfn.0 >> BLOCK_SHIFT, gfn.0 % BLOCK_PAGES);
        if let Some(base) = self.low.get(block as usize) {
            return Some((gfn.0 as usize, Pfn(base.0 | within)));
        }
        let position = Self::high_position(block);
        let base = self.high.get(position)?;
        Some((((self.low.len() + position) << BLOCK_SHIFT) | within as usize, Pfn(base.0 | within)))
    }

    /// The page with number `index`: the inverse of [`Slots::index`].
    #[inline]
    #[must_use]
    pub fn gfn_at(&self, index: usize) -> Option<Gfn> {
        (index < self.pages()).then(|| {
            let block = block_at(index as u64 >> BLOCK_SHIFT, self.low.len() as u64);
            Gfn((block << BLOCK_SHIFT) | (index as u64 % BLOCK_PAGES))
        })
    }

    /// RAM pages of this guest (4 KiB units).
    #[inline]
    #[must_use]
    pub fn pages(&self) -> usize {
        (self.low.len() + self.high.len()) << BLOCK_SHIFT
    }

    /// Every block: (its first gfn, its first pfn), in guest order.
    pub fn blocks(&self) -> impl ExactSizeIterator<Item = (Gfn, Pfn)> + '_ {
        let low_blocks = self.low.len();
        (0..low_blocks + self.high.len()).map(move |i| {
            let pfn = if i < low_blocks { self.low[i] } else { self.high[i - low_blocks] };
            (Gfn(block_at(i as u64, low_blocks as u64) << BLOCK_SHIFT), pfn)
        })
    }

    /// The ranges of RAM, for the guest's memory map: (first address, bytes), ascending, none empty, at
    /// most two.
    pub fn layout(&self) -> impl Iterator<Item = (Gpa, u64)> + use<> {
        [(0, self.low.len() as u64), (HIGH_FIRST_BLOCK, self.high.len() as u64)]
            .into_iter()
            .filter(|&(_, blocks)| blocks > 0)
            .map(|(first, blocks)| (Gpa(first * BLOCK_SIZE), blocks * BLOCK_SIZE))
    }
}

/// Guest block number of the `position`-th block when `low_blocks` of them lie below 3 GiB.
fn block_at(position: u64, low_blocks: u64) -> u64 {
    if position < low_blocks { position } else { position - low_blocks + HIGH_FIRST_BLOCK }
}

/// The first gfn of each block of a guest with `memory_bytes` of RAM, ascending. A size that is no multiple
/// of 2 MiB is rounded up, one above [`BLOCKS_MAX`] blocks is cut to that.
pub fn block_gfns(memory_bytes: u64) -> impl ExactSizeIterator<Item = Gfn> {
    let blocks = memory_bytes.div_ceil(BLOCK_SIZE).min(BLOCKS_MAX) as u32;
    (0..blocks).map(|i| Gfn(block_at(u64::from(i), LOW_BLOCKS_MAX) << BLOCK_SHIFT))
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;

    /// Slots of a size, whose host blocks go backwards so that none is where its neighbour would be.
    fn slots(memory_bytes: u64) -> Slots {
        let gfns = block_gfns(memory_bytes);
        let last = gfns.len() as u64;
        let list: Vec<_> = gfns.zip(1..).map(|(gfn, i)| (gfn, Pfn((last + 7 - i) * BLOCK_PAGES))).collect();
        Slots::new(&list).unwrap()
    }

    #[test]
    fn ram_stops_at_three_gib_and_goes_on_at_four() {
        let slots = slots(5 * GIB);
        assert!(slots.pfn(Gfn(3 * GIB / 4096 - 1)).is_some());
        assert_eq!(slots.pfn(Gfn(3 * GIB / 4096)), None);
        assert_eq!(slots.pfn(Gfn(4 * GIB / 4096 - 1)), None);
        assert!(slots.pfn(Gfn(4 * GIB / 4096)).is_some());
        assert!(slots.pfn(Gfn(6 * GIB / 4096 - 1)).is_some());
        assert_eq!(slots.pfn(Gfn(6 * GIB / 4096)), None);
        let layout: Vec<_> = slots.layout().collect();
        assert_eq!(layout, [(Gpa(0), 3 * GIB), (Gpa(4 * GIB), 2 * GIB)]);
    }

    #[test]
    fn a_small_guest_has_one_range() {
        let slots = slots(128 << 20);
        assert_eq!(slots.layout().collect::<Vec<_>>(), [(Gpa(0), 128 << 20)]);
        assert_eq!(slots.pages(), 32768);
        assert_eq!(slots.pfn(Gfn(32768)), None);
        assert_eq!(slots.hpa(Gpa(0x1234)), Some(Hpa(slots.block(Gfn(1)).unwrap().address().0 + 0x1234)));
    }

    #[test]
    fn no_ram_at_all_backs_nothing() {
        let slots = Slots::new(&[]).unwrap();
        assert_eq!(slots.pages(), 0);
        assert_eq!(slots.layout().count(), 0);
        assert_eq!(slots.pfn(Gfn(0)), None);
        assert_eq!(slots.gfn_at(0), None);
    }

    /// H9 and H11: a guest's frame number is an allegation of 64 bits; it is neither cut nor wrapped.
    #[test]
    fn every_high_bit_of_a_gfn_is_looked_at() {
        let slots = slots(5 * GIB);
        for bit in 21..64 {
            for low in [0, 1, 0x10_0000] {
                let gfn = Gfn((1 << bit) | low);
                assert_eq!((slots.pfn(gfn), slots.index(gfn), slots.block(gfn)), (None, None, None), "{gfn}");
            }
        }
        assert_eq!(slots.pfn(Gfn(u64::MAX)), None);
    }

    #[test]
    fn bad_lists_are_refused() {
        let block = |n: u64| (Gfn(n * 512), Pfn((n + 10) * 512));
        let not_contiguous =
            |found, expected| SlotsError::NotContiguous { found: Gfn(found), expected: Gfn(expected) };
        for (list, error) in [
            (vec![(Gfn(1), Pfn(0))], SlotsError::UnalignedGuest(Gfn(1))),
            (vec![(Gfn(0), Pfn(3))], SlotsError::UnalignedHost(Pfn(3))),
            (vec![block(1)], not_contiguous(512, 0)),
            (vec![block(0), block(2)], not_contiguous(1024, 512)),
            (vec![block(0), block(0)], not_contiguous(0, 512)),
            (vec![block(HIGH_FIRST_BLOCK)], not_contiguous(HIGH_FIRST_BLOCK * 512, 0)),
            (vec![(Gfn(0), Pfn(512)), (Gfn(512), Pfn(512))], SlotsError::Shared(Pfn(512))),
        ] {
            assert_eq!(Slots::new(&list).unwrap_err(), error);
        }
        let into_the_hole: Vec<_> = (0..=LOW_BLOCKS_MAX).map(block).collect();
        let hole = LOW_BLOCKS_MAX * 512;
        assert_eq!(Slots::new(&into_the_hole).unwrap_err(), not_contiguous(hole, hole));
    }

    proptest! {
        #[test]
        fn pfn_agrees_with_a_search_through_the_list(
            blocks in 1u64..4000,
            gfns in prop::collection::vec(prop_oneof![0u64..0x30_0000, any::<u64>()], 64),
        ) {
            let slots = slots(blocks * BLOCK_SIZE);
            let list: Vec<_> = slots.blocks().collect();
            prop_assert_eq!(list.len() as u64, blocks);
            for gfn in gfns.into_iter().map(Gfn) {
                let found = list.iter().find(|(first, _)| first.0 == gfn.0 & !511).map(|(_, pfn)| *pfn);
                prop_assert_eq!(slots.block(gfn), found);
                prop_assert_eq!(slots.pfn(gfn), found.map(|base| Pfn(base.0 + gfn.0 % 512)));
                prop_assert_eq!(slots.index(gfn).is_some(), found.is_some());
                if let Some(index) = slots.index(gfn) {
                    prop_assert!(index < slots.pages());
                    prop_assert_eq!(slots.gfn_at(index), Some(gfn));
                }
            }
        }

        #[test]
        fn the_numbering_is_dense(blocks in 1u64..2000, index in any::<prop::sample::Index>()) {
            let slots = slots(blocks * BLOCK_SIZE);
            let index = index.index(slots.pages());
            let gfn = slots.gfn_at(index).unwrap();
            prop_assert_eq!(slots.index(gfn), Some(index));
            prop_assert_eq!(slots.gfn_at(slots.pages()), None);
            let bytes: u64 = slots.layout().map(|(_, bytes)| bytes).sum();
            prop_assert_eq!(bytes, slots.pages() as u64 * 4096);
        }
    }
}
