//! What the tables hold that the processor reads: nothing but what it may find there.

use std::collections::HashSet;
use std::format;
use std::vec::Vec;

use memory::{Gfn, Pfn, TableMemory};

use super::machine::Machine;
use crate::Role;
use crate::pages::PageId;
use crate::paging::bits;
use crate::spte::MMIO;

/// Bits that no spte ever has: PWT, PCD, G, PAT at level 1, those that software and other features own.
const NEVER: u64 = 1 << 3 | 1 << 4 | 1 << 8 | 7 << 9 | 0x7ff0_0000_0000_0000;

/// Every spte that is not 0, by the shadow page that holds it: its guest table, role, index and value.
pub fn sptes(machine: &Machine) -> Vec<(Gfn, Role, usize, u64)> {
    let mmu = &machine.mmu;
    let live = (0..mmu.pages.capacity()).map(PageId).map(|id| &mmu.pages[id]).filter(|page| page.live);
    live.flat_map(|page| {
        used(machine, page.table)
            .map(|index| (page.gfn, page.role, index, machine.host.frames.load(page.table, index)))
    })
    .collect()
}

/// The entries of a table that are not 0.
pub fn used(machine: &Machine, table: Pfn) -> impl Iterator<Item = usize> + use<> {
    let used = machine.host.frames.used(table);
    (0..8).flat_map(move |word| {
        let mut set = used[word];
        core::iter::from_fn(move || {
            let bit = set.trailing_zeros() as usize;
            set &= set.wrapping_sub(1);
            (bit < 64).then_some(word << 6 | bit)
        })
    })
}

/// Every spte maps nothing, by one of the two fixed values, or one of the guest's own pages, or points to a live
/// table; and has no bit besides.
pub fn scan(machine: &Machine) {
    let mmu = &machine.mmu;
    let live = (0..mmu.pages.capacity()).map(PageId).map(|id| &mmu.pages[id]).filter(|page| page.live);
    let tables: HashSet<Pfn> = live.map(|page| page.table).collect();
    for (gfn, role, index, raw) in sptes(machine) {
        let place = || format!("spte {raw:#x} at {index} of the shadow of {gfn:?}, {role:?}");
        if raw == MMIO {
            continue;
        }
        assert!(raw & bits::P != 0, "H21: maps nothing, yet holds something: {}", place());
        let level = role.level();
        let pat = if level == 1 { bits::PS } else { 0 };
        assert_eq!(raw & (NEVER | pat), 0, "H32: {}", place());
        let split = mmu.config.split_executable && level > 1 && raw & bits::PS != 0;
        assert!(!split || raw & bits::NX != 0, "H22: large and executable: {}", place());
        let frame = Pfn((raw & bits::FRAME) >> 12);
        if level == 1 || raw & bits::PS != 0 {
            assert!(machine.host.owned(frame).is_some(), "H10: not this guest's: {}", place());
            assert!(level == 1 || frame.0.is_multiple_of(512), "PAT or a bad frame: {}", place());
        } else {
            assert!(tables.contains(&frame), "points to no live table: {}", place());
        }
    }
    for &frame in &mmu.retired {
        assert_eq!(used(machine, frame).next(), None, "H21: a zapped table maps nothing");
    }
}
