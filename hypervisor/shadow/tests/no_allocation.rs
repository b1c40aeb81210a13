//! An MMU takes all of its memory when it is made: whatever happens afterwards allocates nothing.

mod guest;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use guest::{FLAGS, Guest, LARGE, READ, WRITE};
use memory::{Gfn, Gva};
use shadow::paging::bits;
use shadow::walk::{load_pdptes, walk};
use shadow::{Access, Fill, Kind, Mode, Paging};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, which counts for each thread.
struct Counting;

#[global_allocator]
static HEAP: Counting = Counting;

// SAFETY: every call is passed on as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's contract is the system's.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract is the system's.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// How often `operation` takes memory.
fn allocations(operation: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.get();
    operation();
    ALLOCATIONS.get() - before
}

/// Asserts that none of what a guest makes the MMU do allocates.
fn nothing_allocates(guest: &mut Guest, what: &str, operation: impl FnOnce(&mut Guest)) {
    assert_eq!(allocations(|| operation(guest)), 0, "{what}");
}

const MIB: u64 = 1 << 20;
/// The tables of the guest, in its RAM.
const ROOT: u64 = 0x1_0000;
const PDPT: u64 = 0x1_8000;
const DIRECTORY: u64 = 0x1_9000;
const LEAVES: u64 = 0x1_a000;
/// The first address that [`LEAVES`] translates.
const SMALL: u64 = 1 << 39;
/// The first address of a page of 1 GiB.
const HUGE: u64 = SMALL + (1 << 30);
/// Pages of the cache: few enough for reclaim to run.
const PAGES_MAX: u32 = 64;

fn four_level(guest: &Guest) -> Paging {
    let paging = guest.identity(ROOT);
    guest.poke(ROOT + 8, PDPT | FLAGS);
    guest.poke(PDPT, DIRECTORY | FLAGS);
    guest.poke(PDPT + 8, LARGE);
    guest.poke(DIRECTORY, LEAVES | FLAGS);
    guest.poke_all(LEAVES, 512, |i| (2 * MIB + i * 0x1000) | FLAGS);
    // One page is no RAM, some were never used, some are read-only.
    guest.poke(LEAVES + 8 * 511, 1 << 32 | FLAGS);
    guest.poke_all(LEAVES, 32, |i| (2 * MIB + i * 0x1000) | FLAGS & !(bits::A | bits::D));
    guest.poke_all(LEAVES + 8 * 64, 32, |i| (4 * MIB + i * 0x1000) | FLAGS & !bits::W);
    paging
}

fn new_guest() -> (Guest, Paging) {
    let guest = Guest::new(8, PAGES_MAX, 4 * PAGES_MAX as usize);
    let paging = four_level(&guest);
    (guest, paging)
}

/// Faults at some of the small pages, also where the translation is there already.
fn fill_small(guest: &mut Guest, access: Access) {
    for i in 0..64 {
        guest.ready();
        assert_eq!(guest.fault(SMALL + i * 0x1000, access), Fill::Filled);
    }
}

#[test]
fn an_allocation_would_be_seen() {
    assert_eq!(allocations(|| drop(std::hint::black_box(Vec::<u8>::with_capacity(1)))), 1);
}

#[test]
fn a_cache_that_grows_would_be_seen() {
    assert!(
        allocations(|| {
            new_guest();
        }) > 0
    );
}

#[test]
fn four_level_fills_take_no_memory() {
    let (mut guest, paging) = new_guest();
    nothing_allocates(&mut guest, "4-level", |guest| {
        guest.load(paging);
        fill_small(guest, READ);
        fill_small(guest, WRITE);
        guest.ready();
        assert!(matches!(guest.fault(SMALL + 511 * 0x1000, READ), Fill::Mmio(_)), "no RAM");
        guest.ready();
        assert_eq!(guest.fault(6 * MIB, WRITE), Fill::Filled, "a large page");
        guest.ready();
        assert_eq!(guest.fault(0, WRITE), Fill::Filled, "one that is split for the tables in it");
        guest.ready();
        assert_eq!(guest.fault(HUGE + 3 * MIB, READ), Fill::Filled, "a piece of 1 GiB");
        let user = Access { kind: Kind::Fetch, user: true, smap_overridden: false };
        guest.ready();
        assert_eq!(guest.fault(SMALL + 100 * 0x1000, user), Fill::Filled);
        assert!(
            walk(&guest.cpu.paging, &guest.host.ram, Gva(2 << 39), READ).is_err(),
            "the guest's own fault"
        );
    });
}

#[test]
fn tables_that_fall_behind_take_no_memory() {
    let (mut guest, paging) = new_guest();
    nothing_allocates(&mut guest, "unsync, INVLPG, sync", |guest| {
        guest.load(paging);
        for round in 0..4 {
            fill_small(guest, READ);
            // The guest writes its tables at every level, through the pages that map them.
            for table in [LEAVES, DIRECTORY, PDPT, ROOT] {
                guest.ready();
                assert_eq!(guest.fault(table, WRITE), Fill::Filled);
            }
            guest.poke_all(LEAVES, 64, |i| (4 * MIB + (i + round) * 0x1000) | FLAGS);
            guest.mmu.invlpg(&guest.host, &mut guest.cpu, Gva(SMALL));
            guest.load(paging);
            guest.mmu.before_write(&guest.host, Gfn(LEAVES >> 12));
            guest.poke_all(LEAVES, 64, |_| 0);
            guest.mmu.flush(&guest.host, &mut guest.cpu);
            guest.poke_all(LEAVES, 64, |i| (2 * MIB + i * 0x1000) | FLAGS);
        }
        assert!(
            guest.mmu.stats().syncs > 0
                && guest.mmu.stats().unsyncs > 0
                && guest.mmu.stats().invlpgs_looked > 0
        );
    });
}

#[test]
fn shorter_modes_take_no_memory() {
    let (mut guest, paging) = new_guest();
    let (pdpt, directory, leaves) = (0x2_0000, 0x2_1000, 0x2_2000);
    guest.poke(pdpt, directory | bits::P);
    guest.poke(directory, leaves | FLAGS & !bits::D);
    guest.poke(directory + 16, (4 * MIB) | LARGE);
    guest.poke_all(leaves, 512, |i| (2 * MIB + i * 0x1000) | FLAGS);
    // 32-bit tables: two entries in each word. The second entry of the directory is a page of 4 MiB.
    let (short, short_leaves) = (0x2_3000, 0x2_4000);
    guest.poke(short, ((4 * MIB) | LARGE) << 32 | short_leaves | FLAGS);
    guest.poke_all(short_leaves, 512, |i| {
        let page = |i: u64| (2 * MIB + i * 0x1000) | FLAGS;
        page(2 * i + 1) << 32 | page(2 * i)
    });
    nothing_allocates(&mut guest, "PAE, 32-bit, off", |guest| {
        let pdptes = load_pdptes(&guest.host.ram, pdpt, 40).expect("no reserved bit");
        let pae = Paging { mode: Mode::Pae, cr3: pdpt, pdptes, ..paging };
        let two_level = Paging { mode: Mode::TwoLevel, cr3: short, pse: true, nxe: false, ..paging };
        let off = Paging { mode: Mode::Off, cr3: 0, ..two_level };
        for paging in [pae, two_level, off, pae, two_level] {
            guest.load(paging);
            for gva in [0, 0x1f_f000, 5 * MIB, 4 * MIB] {
                for access in [READ, WRITE] {
                    guest.ready();
                    assert_eq!(guest.fault(gva, access), Fill::Filled, "{gva:#x} in {paging:?}");
                }
            }
        }
        // An address that is no RAM.
        guest.load(off);
        guest.ready();
        assert!(matches!(guest.fault(0xfee0_0000, WRITE), Fill::Mmio(_)));
    });
}

#[test]
fn the_end_of_shadow_pages_takes_no_memory() {
    let (mut guest, paging) = new_guest();
    nothing_allocates(&mut guest, "reclaim, zap, release", |guest| {
        // More roots, with a leaf table each, than the cache has room for: reclaim runs by itself.
        for round in 0..3 * u64::from(PAGES_MAX) {
            let root = 6 * MIB + round % 80 * 0x1000;
            guest.poke(root, PDPT | FLAGS);
            guest.load(Paging { cr3: root, ..paging });
            guest.ready();
            assert_eq!(guest.fault(round % 64 * 0x1000, WRITE), Fill::Filled);
        }
        assert!(guest.mmu.stats().reclaimed > 0);
        guest.mmu.reclaim(&guest.host, u32::MAX);
        guest.ready();
        guest.mmu.drop_root(&mut guest.cpu);
        guest.mmu.zap_all(&guest.host);
        guest.ready();
        assert_eq!(guest.mmu.live_pages(), 0);
        while guest.mmu.take_back().is_some() {}
    });
}
