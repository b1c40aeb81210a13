//! The memory map, as BIOS function E820 would report it.

use memory::Gpa;

use crate::load::RamLayout;

/// Where usable memory below 1 MiB ends and the extended BIOS data area begins.
pub const CONVENTIONAL_END: u64 = 0x9_fc00;
const HIGH_MEMORY: u64 = 0x10_0000;

/// What a range is (ACPI specification, "Address Range Types").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// RAM that the guest may use.
    Usable = 1,
    /// Not to be used.
    Reserved = 2,
}

/// One range of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First byte.
    pub start: Gpa,
    /// Length; never 0.
    pub bytes: u64,
    /// What it is.
    pub kind: Kind,
}

/// The map, by ascending address: three or four ranges.
pub fn map(ram: &RamLayout) -> impl Iterator<Item = Entry> + use<> {
    let entry = |start: u64, bytes: u64, kind| Entry { start: Gpa(start), bytes, kind };
    [
        entry(0, CONVENTIONAL_END, Kind::Usable),
        // Our tables, and what a PC keeps for its screen and its ROMs.
        entry(CONVENTIONAL_END, HIGH_MEMORY - CONVENTIONAL_END, Kind::Reserved),
        entry(HIGH_MEMORY, ram.low_bytes.saturating_sub(HIGH_MEMORY), Kind::Usable),
        entry(RamLayout::HIGH_START, ram.high_bytes, Kind::Usable),
    ]
    .into_iter()
    .filter(|entry| entry.bytes != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_ascend_without_overlap() {
        for ram in [RamLayout::split(2 << 20), RamLayout::split(3 << 30), RamLayout::split(9 << 30)] {
            let mut end = 0;
            for entry in map(&ram) {
                assert!(entry.start.0 >= end && entry.bytes > 0);
                end = entry.start.0 + entry.bytes;
            }
            assert_eq!(end, if ram.high_bytes == 0 { ram.low_bytes } else { (4 << 30) + ram.high_bytes });
            let usable: u64 =
                map(&ram).filter(|entry| entry.kind == Kind::Usable).map(|entry| entry.bytes).sum();
            assert_eq!(usable, ram.total_bytes() - (HIGH_MEMORY - CONVENTIONAL_END));
        }
    }
}
