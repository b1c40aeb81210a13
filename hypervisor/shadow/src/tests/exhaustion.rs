//! Frames, descriptors, references and lists at their limits: never half-way, never without bound.

use memory::{Gpa, Gva, Pfn, TableMemory};

use super::guest::{BLOCKS, FLAGS, PD, PDPT, PML4, PT, TOP, guest, guest_on};
use crate::model::machine::{Landed, Machine, READ, WRITE, config, identity};
use crate::pages::{PAGES_MAX, PageId, SpteId};
use crate::paging::bits;
use crate::{
    Access, FRAMES_PER_OPERATION, Fill, Flush, Mmu, Mode, PAGES_MIN, PAGES_PER_OPERATION, Paging, Short,
    VcpuMmu, walk,
};

/// Takes the stash down, or fills it up, to `frames`.
fn stash(machine: &mut Machine, frames: usize) {
    while machine.mmu.stash_frames() > frames {
        machine.mmu.take_back();
    }
    while machine.mmu.stash_frames() < frames {
        machine.next_frame += 1;
        machine.mmu.provide(Pfn(machine.next_frame)).unwrap();
    }
}

/// One walk and one fill; whether it was refused, and then did nothing.
fn fill_once(machine: &mut Machine, gva: Gva, access: Access) -> Fill {
    let found = walk::walk(&machine.cpu.paging, &machine.host.ram, gva, access).unwrap();
    let before = machine.state();
    let outcome = machine.mmu.fill(&machine.host, &machine.cpu, gva, access, &found);
    if outcome == Fill::Short {
        assert_eq!(machine.state(), before, "nothing was done");
    }
    machine.audit();
    outcome
}

#[test]
fn h06_a_fill_with_every_size_of_stash() {
    // Paths of one to four new tables, and one that splits a large page because the tables lie in it.
    for gva in [TOP, 0x40_0000, 0x1_0000, 0x5000] {
        for frames in 0..=FRAMES_PER_OPERATION + 2 {
            let mut machine = guest();
            stash(&mut machine, frames);
            let outcome = fill_once(&mut machine, Gva(gva), WRITE);
            if frames < FRAMES_PER_OPERATION {
                assert_eq!(outcome, Fill::Short, "{frames} frames");
                assert_eq!(machine.hardware(Gva(gva), READ), None);
            } else {
                assert_eq!(outcome, Fill::Filled, "{frames} frames");
                assert!(machine.hardware(Gva(gva), WRITE).is_some());
            }
        }
    }
}

#[test]
fn h06_a_fill_of_five_levels_with_the_least_stash() {
    let mut machine = guest();
    machine.poke(0x3_0000, PML4 | FLAGS);
    machine.set_paging(Paging { mode: Mode::FiveLevel, cr3: 0x3_0000, ..machine.cpu.paging });
    stash(&mut machine, FRAMES_PER_OPERATION);
    assert_eq!(fill_once(&mut machine, Gva(TOP), WRITE), Fill::Filled);
    assert!(machine.hardware(Gva(TOP), WRITE).is_some());
}

#[test]
fn h06_a_change_of_root_with_every_size_of_stash() {
    for frames in 0..=FRAMES_PER_OPERATION + 2 {
        let mut machine = guest();
        machine.access(Gva(TOP), READ);
        let home = machine.cpu.paging;
        let table = machine.cpu.root_table();
        machine.poke(0x1_a000, 0x1_1000 | FLAGS);
        stash(&mut machine, frames);
        let before = machine.state();
        machine.cpu.paging = Paging { cr3: 0x1_a000, ..home };
        let result = machine.mmu.load_root(&machine.host, &mut machine.cpu, Flush::All);
        machine.audit();
        if frames < FRAMES_PER_OPERATION {
            assert_eq!(result, Err(Short), "{frames} frames");
            assert_eq!(machine.state(), before, "nothing was done");
            assert_eq!(machine.cpu.root_table(), table);
        } else {
            assert_eq!(result, Ok(()), "{frames} frames");
        }
        // A root that is there needs none.
        stash(&mut machine, 0);
        machine.cpu.paging = home;
        assert_eq!(machine.mmu.load_root(&machine.host, &mut machine.cpu, Flush::All), Ok(()));
        assert_eq!(machine.cpu.root_table(), table);
        machine.audit();
    }
}

#[test]
fn h06_the_arena_nearly_full() {
    for left in 0..=PAGES_PER_OPERATION + 1 {
        let mut machine = guest_on(Machine::new(BLOCKS, PAGES_MIN));
        // Leaf tables until as many descriptors are left as wanted.
        let mut n = 1;
        while machine.mmu.pages_left() > left {
            machine.poke(0x4_0000 + n * 0x1000, 0x20_0000 | FLAGS);
            machine.poke(PD + 8 * n, (0x4_0000 + n * 0x1000) | FLAGS);
            stash(&mut machine, FRAMES_PER_OPERATION);
            if fill_once(&mut machine, Gva(TOP + (n << 21)), READ) == Fill::Short {
                break;
            }
            n += 1;
        }
        stash(&mut machine, 2 * FRAMES_PER_OPERATION);
        let left = machine.mmu.pages_left();
        let outcome = fill_once(&mut machine, Gva(0x40_0000), WRITE);
        assert_eq!(outcome == Fill::Short, left < PAGES_PER_OPERATION, "{left} descriptors left");
        // Whatever was refused goes after a reclaim.
        assert_eq!(machine.access(Gva(0x40_0000), WRITE), Landed::Ram(Gpa(0x40_0000)));
        machine.audit();
    }
}

#[test]
fn h06_a_guest_makes_progress_with_the_least_frames() {
    // So many frames in all, and no more: what an access needs beyond the stash, reclaim must give.
    for frames in FRAMES_PER_OPERATION + 2..3 * FRAMES_PER_OPERATION {
        let mut machine = guest();
        machine.mmu.drop_root(&mut machine.cpu);
        machine.mmu.zap_all(&machine.host);
        machine.release();
        stash(&mut machine, frames);
        machine.mmu.load_root(&machine.host, &mut machine.cpu, Flush::All).unwrap();
        for i in 0..200_u64 {
            let gva = Gva([TOP, 0x40_0000, 0x1_0000][i as usize % 3] + (i * 7 % 256) * 0x1000);
            let mut tries = 0;
            while machine.hardware(gva, WRITE).is_none() {
                tries += 1;
                assert!(tries < 4, "{frames} frames: no progress");
                if fill_once(&mut machine, gva, WRITE) == Fill::Short {
                    machine.mmu.reclaim(&machine.host, PAGES_PER_OPERATION);
                    machine.release();
                }
            }
            assert_eq!(machine.mmu.frames(), frames as u64, "none lost, none made");
        }
    }
}

#[test]
fn h08_a_root_shared_by_all_vcpus_goes_when_the_last_one_leaves() {
    let mut machine = guest();
    let mut others: Vec<VcpuMmu> = (1..=255).map(VcpuMmu::new).collect();
    let root = machine.cpu.root_table();
    for other in &mut others {
        other.paging = machine.cpu.paging;
        machine.mmu.load_root(&machine.host, other, Flush::All).unwrap();
        assert_eq!(other.root_table(), root);
    }
    machine.mmu.drop_root(&mut machine.cpu);
    while let Some(mut other) = others.pop() {
        assert_eq!(machine.mmu.reclaim(&machine.host, 10), 0, "{} vCPUs run on it", others.len() + 1);
        machine.mmu.drop_root(&mut other);
        machine.mmu.drop_root(&mut other); // once is enough
    }
    assert_eq!(machine.mmu.reclaim(&machine.host, 10), 1);
    machine.audit();
}

#[test]
fn h08_an_sptes_number_holds_the_last_one_of_the_largest_arena() {
    // The links are the references, so they cannot saturate; but their numbers must not run into each other.
    let last = SpteId::new(PageId(PAGES_MAX - 1), 511);
    assert_eq!((last.page(), last.index()), (PageId(PAGES_MAX - 1), 511));
    assert_eq!(last.0 >> 31, 0, "the highest bit tells a head from an element");
    let slots = &Machine::new(1, 0).host.slots;
    assert_eq!(
        Mmu::new(config(0, 1), slots).pages_left(),
        PAGES_MIN,
        "what is asked for is brought into range"
    );
}

/// A guest with `tables` leaf tables, at the first entries of the page directory, all of whose entries map
/// `page`, present in the shadow; beside them `PT`, at the last.
fn aliases(tables: u64, page: u64, writable: bool) -> Machine {
    let mut machine = Machine::new(BLOCKS, 1024);
    let paging = identity(&machine, PML4, BLOCKS);
    machine.poke(PML4 + 8, PDPT | FLAGS);
    machine.poke(PDPT, PD | FLAGS);
    for table in 0..tables {
        let at = 0x20_0000 + table * 0x1000;
        machine.poke(PD + 8 * table, at | FLAGS);
        for i in 0..512 {
            machine.poke(at + 8 * i, page | if writable { FLAGS } else { FLAGS & !bits::W });
        }
    }
    machine.poke(PD + 8 * 511, PT | FLAGS);
    machine.poke(PT, 0x60_0000 | FLAGS);
    machine.set_paging(paging);
    for i in 0..tables * 512 {
        machine.access(Gva(TOP + i * 0x1000), READ);
    }
    machine
}

/// Words loaded from tables and links by `operation`.
fn loads(machine: &mut Machine, operation: impl FnOnce(&mut Machine)) -> u64 {
    machine.host.frames.loads.set(0);
    operation(machine);
    machine.host.frames.loads.get()
}

#[test]
fn h23_the_cost_of_one_alias_does_not_depend_on_the_others() {
    let cost = |tables: u64| {
        let mut machine = aliases(tables, 0x60_0000, true);
        // One in the middle goes, and comes back: its table falls behind, INVLPG looks at that entry alone.
        let middle = tables / 2 * 512 + 256;
        let entry = 0x20_0000 + 8 * middle;
        machine.device_store(entry, 0);
        let gone = loads(&mut machine, |machine| machine.invlpg(Gva(TOP + middle * 0x1000)));
        assert!(matches!(machine.access(Gva(TOP + middle * 0x1000), READ), Landed::Fault(_)));
        machine.device_store(entry, 0x60_0000 | FLAGS);
        machine.ready();
        let back = loads(&mut machine, |machine| {
            fill(machine, Gva(TOP + middle * 0x1000));
        });
        (gone, back)
    };
    let few = cost(4);
    assert!(few.0 < 32 && few.1 < 128, "{few:?}");
    assert_eq!(cost(100), few, "51200 aliases cost what 2048 do");
}

fn fill(machine: &mut Machine, gva: Gva) {
    let found = walk::walk(&machine.cpu.paging, &machine.host.ram, gva, READ).unwrap();
    assert_eq!(machine.mmu.fill(&machine.host, &machine.cpu, gva, READ, &found), Fill::Filled);
}

#[test]
fn h23_zapping_one_table_of_aliases_costs_its_own_entries() {
    for tables in [1, 16, 100] {
        let mut machine = aliases(tables, 0x60_0000, true);
        // To choose, the sweep looks at a few words of each page in the cache.
        let choice = 8 * u64::from(machine.mmu.live_pages());
        let cost = loads(&mut machine, |machine| {
            assert_eq!(machine.mmu.reclaim(&machine.host, 1), 1);
        });
        assert!(cost <= choice + 512 * 8, "{cost} loads with {tables} tables");
    }
}

#[test]
fn h23_protecting_a_table_costs_at_most_its_aliases() {
    // A CR3 write protects the tables that fell behind: linear in their aliases, and no worse.
    let mut costs = Vec::new();
    for tables in [1, 32, 128] {
        let mut machine = aliases(tables, PT, false);
        machine.access(Gva(TOP + (511 << 21)), READ);
        machine.store(Gva(PT + 8), 0x61_0000 | FLAGS);
        let paging = machine.cpu.paging;
        let cost = loads(&mut machine, |machine| machine.set_paging(paging));
        let aliases = tables * 512;
        assert!(cost <= 2 * aliases + 2048, "{cost} loads for {aliases} aliases");
        costs.push(cost);
    }
    assert!(costs.is_sorted());
}

#[test]
fn h23_aliases_take_no_memory_beside_their_tables() {
    let machine = aliases(100, 0x60_0000, true);
    assert!(machine.mmu.live_pages() <= 100 + 8);
    let held = machine.mmu.frames() - machine.mmu.stash_frames() as u64 - machine.mmu.retired.len() as u64;
    assert_eq!(held, 2 * u64::from(machine.mmu.live_pages()));
}

#[test]
fn h23_roots_that_are_no_ram_are_one_root() {
    let mut machine = guest();
    let paging = machine.cpu.paging;
    for i in 0..1000 {
        machine.set_paging(Paging { cr3: 0x1_0000_0000 + (i << 12), ..paging });
    }
    assert!(machine.mmu.live_pages() <= 2, "{} pages", machine.mmu.live_pages());
}

#[test]
fn h23_pieces_of_large_mmio_pages_stay_within_the_cap() {
    // 2 MiB pages over no RAM whose gfns fall into one chain.
    let mut machine = guest_on(Machine::new(BLOCKS, PAGES_MIN));
    machine.poke(PML4 + 0x10, 0x5_0000 | FLAGS);
    machine.poke(0x5_0000, 0x5_1000 | FLAGS);
    for i in 0..512 {
        machine.poke(0x5_1000 + 8 * i, ((1 << 32) + (i << 29)) | FLAGS | bits::PS);
    }
    for i in 0..512 {
        let landed = machine.access(Gva(2 * TOP + (i << 21)), WRITE);
        assert_eq!(landed, Landed::Mmio(Gpa((1 << 32) + (i << 29))));
        assert!(machine.mmu.live_pages() <= PAGES_MIN);
    }
    machine.audit();
    assert_eq!(machine.host.frames.load(machine.cpu.root_table(), 0), crate::spte::EMPTY);
}

#[test]
fn the_stash_never_outgrows_its_memory() {
    // Frames handed in while the cache is full, and then everything zapped.
    let mut machine = guest_on(Machine::new(BLOCKS, PAGES_MIN));
    for n in 0..PAGES_MIN as u64 {
        machine.poke(0x4_0000 + n * 0x1000, 0x20_0000 | FLAGS);
        machine.poke(PD + 8 * n, (0x4_0000 + n * 0x1000) | FLAGS);
    }
    for n in 0..30 {
        machine.access(Gva(TOP + (n << 21)), READ);
    }
    let capacity = machine.mmu.stash.capacity();
    let mut frame = 0x8_0000;
    while machine.mmu.provide(Pfn(frame)).is_ok() {
        frame += 1;
    }
    machine.mmu.reclaim(&machine.host, 100);
    machine.release();
    assert_eq!(machine.mmu.stash.capacity(), capacity, "nothing is allocated in an operation");
}
