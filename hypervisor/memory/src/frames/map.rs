//! Frame numbers to dense indices and back: the tables of the allocator have no entries for the machine's
//! holes.

use alloc::vec::Vec;
use core::ops::RangeInclusive;

use crate::address::{BLOCK_PAGES, Pfn};

/// log2 of the pages in a block.
const BLOCK_SHIFT: u32 = BLOCK_PAGES.trailing_zeros();
/// Blocks that 32-bit frame indices reach: 16 TiB of memory.
const BLOCKS_MAX: u64 = 1 << (32 - BLOCK_SHIFT);
/// Physical addresses have 52 bits at most (SDM volume 3, Paging, "Physical-address width").
const PFN_LIMIT: u64 = 1 << (52 - 12);

/// Consecutive 2 MiB blocks that hold memory.
struct Segment {
    first_block: u64,
    blocks: u64,
    /// Dense number of the first block.
    base: u64,
}

/// The machine's blocks that hold memory of ours, numbered without gaps and ascending.
pub struct FrameMap {
    segments: Vec<Segment>,
    blocks: u64,
}

impl FrameMap {
    /// Maps the blocks that the regions (first frame, frames) touch. What lies beyond the frame numbers or
    /// sizes that the allocator can name is left out.
    pub fn new(regions: &[(Pfn, u64)]) -> Self {
        let mut ranges: Vec<(u64, u64)> = regions
            .iter()
            .filter_map(|&region| clip(region))
            .map(|(first, end)| (first >> BLOCK_SHIFT, end.div_ceil(BLOCK_PAGES)))
            .collect();
        ranges.sort_unstable();
        let mut map = Self { segments: Vec::new(), blocks: 0 };
        for (first, end) in ranges {
            map.append(first, end);
        }
        map
    }

    fn append(&mut self, first: u64, end: u64) {
        let covered = self.segments.last().map_or(0, |last| last.first_block + last.blocks);
        let from = first.max(covered);
        let blocks = end.saturating_sub(from).min(BLOCKS_MAX - self.blocks);
        if blocks == 0 {
            return;
        }
        match self.segments.last_mut() {
            Some(last) if from == covered => last.blocks += blocks,
            _ => self.segments.push(Segment { first_block: from, blocks, base: self.blocks }),
        }
        self.blocks += blocks;
    }

    /// Dense index of a frame; `None` if its block holds no memory of ours.
    pub fn index(&self, pfn: Pfn) -> Option<u32> {
        let block = pfn.0 >> BLOCK_SHIFT;
        let after = self.segments.partition_point(|segment| segment.first_block <= block);
        let segment = &self.segments[after.checked_sub(1)?];
        let offset = block - segment.first_block;
        (offset < segment.blocks)
            .then(|| (((segment.base + offset) << BLOCK_SHIFT) | (pfn.0 % BLOCK_PAGES)) as u32)
    }

    /// The frame with a dense index below `frames()`.
    pub fn pfn(&self, index: u32) -> Pfn {
        let block = u64::from(index) >> BLOCK_SHIFT;
        let after = self.segments.partition_point(|segment| segment.base <= block);
        let segment = &self.segments[after - 1];
        Pfn(((segment.first_block + block - segment.base) << BLOCK_SHIFT) | (u64::from(index) % BLOCK_PAGES))
    }

    /// How many blocks there are.
    pub fn blocks(&self) -> usize {
        self.blocks as usize
    }

    /// How many frames those blocks have, whether ours or not.
    pub fn frames(&self) -> usize {
        self.blocks() << BLOCK_SHIFT
    }

    /// How many of the blocks begin below `limit`.
    pub fn blocks_below(&self, limit: Pfn) -> usize {
        let limit = limit.0.div_ceil(BLOCK_PAGES);
        let below = |segment: &Segment| limit.saturating_sub(segment.first_block).min(segment.blocks);
        self.segments.iter().map(below).sum::<u64>() as usize
    }

    /// Dense indices of a region's frames, as one range for each block it touches, those left out skipped.
    pub fn ranges(&self, region: (Pfn, u64)) -> impl Iterator<Item = RangeInclusive<u32>> + '_ {
        let (mut next, end) = clip(region).unwrap_or((0, 0));
        core::iter::from_fn(move || {
            let first = self.index(Pfn(next)).filter(|_| next < end)?;
            let stop = end.min((next | (BLOCK_PAGES - 1)) + 1);
            let frames = stop - next;
            next = stop;
            Some(first..=first + (frames as u32 - 1))
        })
    }
}

/// A region as (first, end) frame numbers, cut to those a processor can address; `None` if nothing is left.
fn clip((first, pages): (Pfn, u64)) -> Option<(u64, u64)> {
    let end = first.0.saturating_add(pages).min(PFN_LIMIT);
    (first.0 < end).then_some((first.0, end))
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn overlapping_touching_and_split_regions_are_numbered_once() {
        let regions =
            [(Pfn(0x100000), 1024), (Pfn(1), 600), (Pfn(700), 10), (Pfn(0x100100), 100), (Pfn(5), 0)];
        let map = FrameMap::new(&regions);
        assert_eq!(map.blocks(), 4);
        assert_eq!(map.segments.len(), 2);
        for index in 0..map.frames() as u32 {
            assert_eq!(map.index(map.pfn(index)), Some(index));
        }
        assert_eq!(map.index(Pfn(1024)), None);
        assert_eq!(map.index(Pfn(0x100000 + 1024)), None);
        assert_eq!(map.index(Pfn(u64::MAX)), None);
        assert_eq!(map.blocks_below(Pfn(0x100000)), 2);
        assert_eq!(map.blocks_below(Pfn(0x100200)), 3);
        assert_eq!(map.blocks_below(Pfn(u64::MAX)), 4);
        let ranges = |region| map.ranges(region).collect::<Vec<_>>();
        assert_eq!(ranges((Pfn(1), 600)), [1..=511, 512..=600]);
        assert_eq!(ranges((Pfn(0x100000), 1024)), [1024..=1535, 1536..=2047]);
        assert_eq!(ranges((Pfn(5), 0)), []);
    }

    #[test]
    fn absurd_regions_are_cut() {
        assert_eq!(FrameMap::new(&[]).blocks(), 0);
        assert_eq!(FrameMap::new(&[(Pfn(u64::MAX), 2), (Pfn(PFN_LIMIT), 9)]).blocks(), 0);
        let map = FrameMap::new(&[(Pfn(0), u64::MAX)]);
        assert_eq!(map.blocks() as u64, BLOCKS_MAX);
        assert_eq!(map.index(Pfn(u64::from(u32::MAX))), Some(u32::MAX));
        assert_eq!(map.index(Pfn(1 << 32)), None);
        assert_eq!(map.ranges((Pfn(0xffff_fff0), u64::MAX)).last(), Some(0xffff_fff0..=u32::MAX));
    }
}
