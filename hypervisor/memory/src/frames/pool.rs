//! The frames that no core's cache holds: a bit per frame, sorted by how free their 2 MiB block is.

use alloc::vec;
use alloc::vec::Vec;

use super::bitset::BitSet;
use super::cache::BATCH_FRAMES;
use crate::address::BLOCK_PAGES;

/// Free frames of a whole block.
const WHOLE: u16 = BLOCK_PAGES as u16;
/// Groups of a block: the frames whose states share a cache line.
const GROUPS: usize = BLOCK_PAGES as usize / BATCH_FRAMES;
/// The bits of a group of which all frames are free.
const FULL: u32 = u32::MAX >> (u32::BITS as usize - BATCH_FRAMES);

/// Free frames, by dense index. Single frames come from blocks already broken as long as there are any, so
/// that whole blocks stay for guests; but from blocks below 4 GiB only once there are no others, so that those stay
/// for who needs them.
pub struct Pool {
    /// Blocks below this one lie below 4 GiB.
    low_blocks: usize,
    /// A set bit for each free frame of a block, by group.
    bitmaps: Vec<[u32; GROUPS]>,
    /// How many of a block's frames are free.
    free: Vec<u16>,
    /// Blocks of which all frames are free.
    whole: BitSet,
    /// Blocks of which some, but not all, frames are free.
    broken: BitSet,
    /// Those of the broken blocks that have a full group.
    grouped: BitSet,
}

impl Pool {
    /// A pool of `blocks` blocks, the first `low_blocks` of them below 4 GiB, with no frame in it.
    pub fn new(blocks: usize, low_blocks: usize) -> Self {
        Self {
            low_blocks,
            bitmaps: vec![[0; GROUPS]; blocks],
            free: vec![0; blocks],
            whole: BitSet::new(blocks),
            broken: BitSet::new(blocks),
            grouped: BitSet::new(blocks),
        }
    }

    /// Heap bytes for each block.
    pub const BYTES_PER_BLOCK: usize = 4 * GROUPS + 2 + 1;

    /// Gives a frame to the pool. It is not in it already: the owner table has seen to that.
    pub fn put(&mut self, index: u32) {
        let (block, group, bit) = place(index);
        self.put_bits(block, group, bit);
    }

    /// Gives several frames to the pool, those of one group that come one after the other at once; how many.
    pub fn put_all(&mut self, frames: impl Iterator<Item = u32>) -> u64 {
        let mut count = 0;
        let mut run = None;
        for index in frames {
            count += 1;
            let (block, group, bit) = place(index);
            run = match run {
                Some((b, g, bits)) if (b, g) == (block, group) => Some((b, g, bits | bit)),
                Some((b, g, bits)) => {
                    self.put_bits(b, g, bits);
                    Some((block, group, bit))
                }
                None => Some((block, group, bit)),
            };
        }
        if let Some((block, group, bits)) = run {
            self.put_bits(block, group, bits);
        }
        count
    }

    fn put_bits(&mut self, block: usize, group: usize, bits: u32) {
        self.bitmaps[block][group] |= bits;
        self.recount(block, self.free[block] + bits.count_ones() as u16);
    }

    /// Takes a frame from one of the first `limit` blocks, if it can be from a group that is not full.
    pub fn take(&mut self, limit: usize) -> Option<u32> {
        let block = self.next_block(limit)?;
        let groups = &mut self.bitmaps[block];
        let broken = groups.iter().position(|&bits| bits != 0 && bits != FULL);
        let group = broken.or_else(|| groups.iter().position(|&bits| bits != 0))?;
        let bit = groups[group].trailing_zeros();
        groups[group] &= groups[group] - 1;
        self.recount(block, self.free[block] - 1);
        Some(first_of(block, group) + bit)
    }

    /// The one of the first `limit` blocks of which a frame is to be taken.
    fn next_block(&self, limit: usize) -> Option<usize> {
        let last = |set: &BitSet| set.last_below(limit);
        let high = |set: &BitSet| last(set).filter(|&block| block >= self.low_blocks);
        high(&self.broken)
            .or_else(|| high(&self.whole))
            .or_else(|| last(&self.broken))
            .or_else(|| last(&self.whole))
    }

    /// Takes all frames of a full group; the first of them. `None` if there is none, or none without breaking a whole
    /// block while others are broken already.
    pub fn take_group(&mut self) -> Option<u32> {
        let next = self.next_block(usize::MAX)?;
        let alike = |&block: &usize| (block >= self.low_blocks) == (next >= self.low_blocks);
        let whole = self.free[next] == WHOLE;
        let block = if whole { next } else { self.grouped.last_below(usize::MAX).filter(alike)? };
        let group = self.bitmaps[block].iter().position(|&bits| bits == FULL)?;
        self.bitmaps[block][group] = 0;
        self.recount(block, self.free[block] - BATCH_FRAMES as u16);
        Some(first_of(block, group))
    }

    /// Takes a whole block; its first frame.
    pub fn take_block(&mut self) -> Option<u32> {
        let block = self.whole.last_below(usize::MAX)?;
        self.bitmaps[block] = [0; GROUPS];
        self.recount(block, 0);
        Some(first_of(block, 0))
    }

    /// Gives back a whole block by its first frame. None of its frames is in the pool.
    pub fn put_block(&mut self, first: u32) {
        let (block, ..) = place(first);
        self.bitmaps[block] = [FULL; GROUPS];
        self.recount(block, WHOLE);
    }

    /// Sorts a block by how many of its frames are free now.
    fn recount(&mut self, block: usize, free: u16) {
        let old = core::mem::replace(&mut self.free[block], free);
        let class = |free| match free {
            0 => None,
            WHOLE => Some(true),
            _ => Some(false),
        };
        if class(old) != class(free) {
            match class(old) {
                Some(true) => self.whole.remove(block),
                Some(false) => self.broken.remove(block),
                None => {}
            }
            match class(free) {
                Some(true) => self.whole.insert(block),
                Some(false) => self.broken.insert(block),
                None => {}
            }
        }
        let grouped = class(free) == Some(false) && self.bitmaps[block].contains(&FULL);
        if grouped { self.grouped.insert(block) } else { self.grouped.remove(block) }
    }
}

/// Block, group and bit in the group of a frame.
fn place(index: u32) -> (usize, usize, u32) {
    let index = index as usize;
    (index / WHOLE as usize, index % WHOLE as usize / BATCH_FRAMES, 1 << (index % BATCH_FRAMES))
}

/// The first frame of a group.
fn first_of(block: usize, group: usize) -> u32 {
    ((block * GROUPS + group) * BATCH_FRAMES) as u32
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn full(blocks: usize) -> Pool {
        let mut pool = Pool::new(blocks, 0);
        (0..blocks as u32 * 512).for_each(|index| pool.put(index));
        pool
    }

    #[test]
    fn single_frames_break_one_block_at_a_time() {
        let mut pool = full(3);
        let taken: Vec<u32> = (0..512).map(|_| pool.take(usize::MAX).unwrap()).collect();
        assert!(taken.iter().all(|index| index / 512 == 2));
        assert_eq!(pool.take_block(), Some(512));
        assert_eq!(pool.take_block(), Some(0));
        assert_eq!(pool.take(usize::MAX), None);
        taken.into_iter().for_each(|index| pool.put(index));
        assert_eq!(pool.take_block(), Some(1024));
    }

    #[test]
    fn blocks_below_4_gib_are_broken_last_and_eaten_last() {
        let mut pool = Pool::new(3, 2);
        (0..3 * 512).for_each(|index| pool.put(index));
        // Somebody needs one from below.
        assert_eq!(pool.take(2).map(|index| index / 512), Some(1));
        assert_eq!(pool.take_group().map(|index| index / 512), Some(2));
        assert!((0..480).all(|_| pool.take(usize::MAX).is_some_and(|index| index / 512 == 2)));
        assert_eq!(pool.take_group().map(|index| index / 512), Some(1));
        assert!((0..479).all(|_| pool.take(usize::MAX).is_some_and(|index| index / 512 == 1)));
        assert_eq!(pool.take(usize::MAX).map(|index| index / 512), Some(0));
    }

    #[test]
    fn a_limit_is_kept() {
        let mut pool = full(2);
        assert!((0..512).all(|_| pool.take(1).is_some_and(|index| index < 512)));
        assert_eq!(pool.take(1), None);
        assert_eq!(pool.take(0), None);
        pool.put_block(0);
        assert_eq!(pool.take(1), Some(0));
    }

    #[test]
    fn a_group_is_found_wherever_it_is_and_single_frames_spare_it() {
        let mut pool = full(3);
        let group = pool.take_group().unwrap();
        assert_eq!((group / 512, group % 32), (2, 0));
        // From the broken block as long as it has full groups, though singles break one of them.
        let single = pool.take(usize::MAX).unwrap();
        assert!((1..31).all(|_| pool.take(usize::MAX).unwrap() / 32 == single / 32));
        let groups: Vec<u32> = core::iter::from_fn(|| pool.take_group()).collect();
        assert!(groups.len() == 14 && groups.iter().all(|group| group / 512 == 2));
        // The one frame left comes before a whole block is broken.
        assert_eq!(pool.take(usize::MAX).map(|index| index / 32), Some(single / 32));
        assert_eq!(pool.take_group(), Some(512));
        // A group is full again when its last frame is back.
        assert!((group..group + 31).all(|index| {
            pool.put(index);
            pool.grouped.last_below(usize::MAX) == Some(1)
        }));
        pool.put(group + 31);
        assert_eq!(pool.take_group(), Some(group));
    }
}
