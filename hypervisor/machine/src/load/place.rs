//! Who gets which part of guest RAM.

use alloc::vec::Vec;

use memory::{Gpa, GuestMemory, PAGE_SIZE, Unbacked};

use super::RamLayout;
use super::error::Fault;
use super::firmware::e820;

/// Kernels and their files are placed from here on, unless they name a place below.
const HIGH_MEMORY: u64 = 1 << 20;
/// The first page is the BIOS data area; nothing is loaded there.
const LOWEST: u64 = PAGE_SIZE;

/// A half-open range of guest physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    start: u64,
    end: u64,
}

/// The RAM taken so far.
pub(super) struct Plan {
    ram: RamLayout,
    taken: Vec<Range>,
}

impl Plan {
    pub(super) const fn new(ram: RamLayout) -> Self {
        Self { ram, taken: Vec::new() }
    }

    pub(super) const fn ram(&self) -> &RamLayout {
        &self.ram
    }

    /// The end of low RAM.
    pub(super) const fn low_end(&self) -> u64 {
        self.ram.low_bytes
    }

    /// Takes a fixed place, which must be usable RAM and free. An empty one takes nothing.
    pub(super) fn claim(&mut self, start: u64, bytes: u64) -> Result<(), Fault> {
        let outside = Fault::OutsideRam { start: Gpa(start), bytes, low_end: Gpa(self.low_end()) };
        let end = start.checked_add(bytes).ok_or(outside)?;
        if bytes == 0 {
            return Ok(());
        }
        let high_end = RamLayout::HIGH_START.saturating_add(self.ram.high_bytes);
        let usable = [
            (LOWEST, e820::CONVENTIONAL_END),
            (HIGH_MEMORY, self.low_end()),
            (RamLayout::HIGH_START, high_end),
        ];
        if !usable.iter().any(|&(first, last)| start >= first && end <= last) {
            return Err(outside);
        }
        let range = Range { start, end };
        if self.overlapping(range).is_some() {
            return Err(Fault::Overlap { start: Gpa(start), bytes });
        }
        self.taken.push(range);
        Ok(())
    }

    /// Takes the lowest free place at or above `from` (and 1 MiB) in low RAM. `align`: a power of two.
    pub(super) fn lowest(&mut self, bytes: u64, align: u64, from: u64) -> Result<u64, Fault> {
        let no_room = Fault::NoRoom { bytes, below: Gpa(self.low_end()) };
        let mut start = from.max(HIGH_MEMORY).checked_next_multiple_of(align).ok_or(no_room)?;
        loop {
            let end = start.checked_add(bytes).filter(|&end| end <= self.low_end()).ok_or(no_room)?;
            match self.overlapping(Range { start, end }) {
                // Strictly upward, so every taken range is met at most once.
                Some(met) => start = met.end.checked_next_multiple_of(align).ok_or(no_room)?,
                None => {
                    self.take(start, end);
                    return Ok(start);
                }
            }
        }
    }

    /// Takes the highest free place of low RAM, above 1 MiB, that ends at or below `below`.
    /// `align`: a power of two.
    pub(super) fn highest(&mut self, bytes: u64, align: u64, below: u64) -> Result<u64, Fault> {
        let limit = below.min(self.low_end());
        let no_room = Fault::NoRoom { bytes, below: Gpa(limit) };
        let mut end = limit;
        loop {
            let start = end.checked_sub(bytes).map(|start| start & !(align - 1));
            let start = start.filter(|&start| start >= HIGH_MEMORY).ok_or(no_room)?;
            match self.overlapping(Range { start, end: start + bytes }) {
                Some(met) => end = met.start,
                None => {
                    self.take(start, start + bytes);
                    return Ok(start);
                }
            }
        }
    }

    fn take(&mut self, start: u64, end: u64) {
        if start < end {
            self.taken.push(Range { start, end });
        }
    }

    fn overlapping(&self, range: Range) -> Option<Range> {
        self.taken.iter().copied().find(|taken| taken.start < range.end && range.start < taken.end)
    }
}

/// Writes `bytes` zeros at `start`.
pub(super) fn zero(memory: &dyn GuestMemory, start: u64, bytes: u64) -> Result<(), Unbacked> {
    static ZEROS: [u8; 4096] = [0; 4096];
    let mut done = 0;
    while done < bytes {
        let step = (bytes - done).min(ZEROS.len() as u64);
        memory.write(Gpa(start + done), &ZEROS[..step as usize])?;
        done += step;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn fixed_places_must_be_usable_and_free() {
        let mut plan = Plan::new(RamLayout { low_bytes: 4 * MIB, high_bytes: 2 * MIB });
        for (start, bytes) in [
            (0, 16),
            (0x9_f000, 0x1000),
            (0xc_0000, 1),
            (0xf_ffff, 2),
            (4 * MIB - 1, 2),
            (3 << 30, 1),
            ((4 << 30) - 1, 1),
            ((4 << 30) + 2 * MIB, 1),
            (u64::MAX, 2),
            (1, u64::MAX),
        ] {
            assert!(matches!(plan.claim(start, bytes), Err(Fault::OutsideRam { .. })), "{start:#x}");
        }
        plan.claim(0x1000, 0x1000).unwrap();
        plan.claim(MIB, 3 * MIB).unwrap();
        plan.claim(4 << 30, 2 * MIB).unwrap();
        assert!(matches!(plan.claim(2 * MIB, 1), Err(Fault::Overlap { .. })));
        plan.claim(2 * MIB, 0).unwrap();
    }

    #[test]
    fn free_places_go_around_taken_ones() {
        let mut plan = Plan::new(RamLayout::split(8 * MIB));
        plan.claim(2 * MIB, MIB).unwrap();
        assert_eq!(plan.lowest(MIB + 1, 4096, 0), Ok(3 * MIB));
        assert_eq!(plan.lowest(MIB, 4096, 0), Ok(MIB));
        assert_eq!(plan.highest(MIB, 4096, u64::MAX), Ok(7 * MIB));
        assert_eq!(plan.highest(MIB, 4096, 6 * MIB + 5), Ok(5 * MIB));
        assert!(matches!(plan.highest(4 * MIB, 4096, u64::MAX), Err(Fault::NoRoom { .. })));
        assert!(matches!(plan.lowest(4 * MIB, 4096, 0), Err(Fault::NoRoom { .. })));
        assert!(matches!(plan.lowest(1, 4096, u64::MAX), Err(Fault::NoRoom { .. })));
        assert!(matches!(plan.lowest(u64::MAX, 4096, 0), Err(Fault::NoRoom { .. })));
        assert!(matches!(plan.highest(u64::MAX, 4096, 0), Err(Fault::NoRoom { .. })));
    }

    #[test]
    fn the_largest_guest_overflows_nothing() {
        let mut plan = Plan::new(RamLayout {
            low_bytes: RamLayout::LOW_BYTES_MAX,
            high_bytes: RamLayout::HIGH_BYTES_MAX,
        });
        assert_eq!(plan.highest(4096, 4096, u64::MAX), Ok((3 << 30) - 4096));
        plan.claim((1 << 46) - 1, 1).unwrap();
    }
}
