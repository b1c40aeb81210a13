//! The frames that no core's cache holds: a bit per frame, sorted by how free their 2 MiB block is.

use alloc::vec;
use alloc::vec::Vec;

use super::bitset::BitSet;
use crate::address::BLOCK_PAGES;

/// Free frames of a whole block.
const WHOLE: u16 = BLOCK_PAGES as u16;
/// Words of a block's bitmap.
const WORDS: usize = BLOCK_PAGES as usize / 64;

/// Free frames, by dense index. Single frames come from blocks already broken as long as there are any, so
/// that whole blocks stay for guests; both come from high addresses first, so that frames below 4 GiB stay
/// for those who need them.
pub struct Pool {
    /// A set bit for each free frame of a block.
    bitmaps: Vec<[u64; WORDS]>,
    /// How many of a block's frames are free.
    free: Vec<u16>,
    /// Blocks of which all frames are free.
    whole: BitSet,
    /// Blocks of which some, but not all, frames are free.
    broken: BitSet,
}

impl Pool {
    /// A pool of `blocks` blocks, with no frame in it.
    pub fn new(blocks: usize) -> Self {
        Self {
            bitmaps: vec![[0; WORDS]; blocks],
            free: vec![0; blocks],
            whole: BitSet::new(blocks),
            broken: BitSet::new(blocks),
        }
    }

    /// Heap bytes for each block.
    pub const BYTES_PER_BLOCK: usize = 8 * WORDS + 2 + 1;

    /// Gives a frame to the pool. It is not in it already: the owner table has seen to that.
    pub fn put(&mut self, index: u32) {
        let (block, word, bit) = place(index);
        self.bitmaps[block][word] |= bit;
        self.recount(block, self.free[block] + 1);
    }

    /// Takes a frame from one of the first `limit` blocks.
    pub fn take(&mut self, limit: usize) -> Option<u32> {
        let block = self.broken.last_below(limit).or_else(|| self.whole.last_below(limit))?;
        let bitmap = &mut self.bitmaps[block];
        let word = bitmap.iter().position(|&word| word != 0)?;
        let bit = bitmap[word].trailing_zeros();
        bitmap[word] &= bitmap[word] - 1;
        self.recount(block, self.free[block] - 1);
        Some((block as u32 * WORDS as u32 + word as u32) * 64 + bit)
    }

    /// Takes a whole block; its first frame.
    pub fn take_block(&mut self) -> Option<u32> {
        let block = self.whole.last_below(usize::MAX)?;
        self.bitmaps[block] = [0; WORDS];
        self.recount(block, 0);
        Some(block as u32 * u32::from(WHOLE))
    }

    /// Gives back a whole block by its first frame. None of its frames is in the pool.
    pub fn put_block(&mut self, first: u32) {
        let (block, ..) = place(first);
        self.bitmaps[block] = [u64::MAX; WORDS];
        self.recount(block, WHOLE);
    }

    fn recount(&mut self, block: usize, free: u16) {
        let old = core::mem::replace(&mut self.free[block], free);
        let class = |free| match free {
            0 => None,
            WHOLE => Some(true),
            _ => Some(false),
        };
        if class(old) == class(free) {
            return;
        }
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
}

/// Block, word of its bitmap, and bit in the word of a frame.
fn place(index: u32) -> (usize, usize, u64) {
    let index = index as usize;
    (index / WHOLE as usize, index % WHOLE as usize / 64, 1 << (index % 64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full(blocks: usize) -> Pool {
        let mut pool = Pool::new(blocks);
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
    fn a_limit_is_kept() {
        let mut pool = full(2);
        assert!((0..512).all(|_| pool.take(1).is_some_and(|index| index < 512)));
        assert_eq!(pool.take(1), None);
        assert_eq!(pool.take(0), None);
        pool.put_block(0);
        assert_eq!(pool.take(1), Some(0));
    }
}
