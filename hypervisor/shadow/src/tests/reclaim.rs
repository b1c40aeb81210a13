//! Reclaim: what goes, in which order, when its frame is free, and that nothing is lost.

use std::collections::BTreeSet;

use memory::{Gpa, Gva, Pfn};

use super::guest::{FLAGS, PD, PDPT, PML4, TOP, guest};
use crate::model::machine::{Landed, Machine, READ, WRITE};
use crate::pages::PageId;
use crate::paging::bits;
use crate::{Class, Flush, Mode, Paging, Short};

#[test]
fn reclaim_loses_nothing() {
    let mut machine = guest();
    machine.access(Gva(TOP), READ);
    machine.access(Gva(0x1000), WRITE);
    let live = machine.mmu.live_pages();
    assert!(live > 4);
    assert_eq!(machine.mmu.reclaim(&machine.host, 100), live - 1, "all but the loaded root");
    machine.audit();
    assert_eq!(machine.access(Gva(TOP), READ), Landed::Ram(Gpa(0x20_0000)));
    machine.mmu.drop_root(&mut machine.cpu);
    machine.mmu.zap_all(&machine.host);
    machine.release();
    assert_eq!(machine.host.allocated.get(), machine.host.freed.get());
}

#[test]
fn h07_reclaim_in_the_middle_of_a_change_of_root() {
    let mut machine = guest();
    machine.access(Gva(TOP), READ);
    let (home, old) = (machine.cpu.paging, machine.cpu.root_table());
    machine.poke(0x1_a000, 0x1_1000 | FLAGS);
    // The new root cannot be made for want of frames: the old one stays, loaded.
    while machine.mmu.take_back().is_some() {}
    machine.cpu.paging = Paging { cr3: 0x1_a000, ..home };
    assert_eq!(machine.mmu.load_root(&machine.host, &mut machine.cpu, Flush::All), Err(Short));
    machine.mmu.reclaim(&machine.host, 100);
    machine.audit();
    assert_eq!(machine.cpu.root_table(), old);
    machine.release();
    assert!(!machine.mmu.stash.contains(&old), "the root that the processor still has");
    machine.cpu.paging = home;
    assert_eq!(machine.access(Gva(TOP), READ), Landed::Ram(Gpa(0x20_0000)));

    // Now it can; the old root goes at once, but its frame only when every core has flushed.
    machine.set_paging(Paging { cr3: 0x1_a000, ..home });
    machine.mmu.reclaim(&machine.host, 100);
    let due = machine.host.generation.get();
    assert!(machine.mmu.retired.contains(&old));
    for flushed in [0, 1, due - 1] {
        machine.mmu.release(&machine.host, flushed);
        assert!(!machine.mmu.stash.contains(&old), "flushed up to {flushed} of {due}");
    }
    machine.mmu.release(&machine.host, due);
    assert!(machine.mmu.stash.contains(&old));
    assert_eq!(machine.host.allocated.get() - machine.host.freed.get(), u64::from(machine.mmu.live_pages()));
}

#[test]
fn h07_a_frame_retired_later_holds_back_those_before_it() {
    // `release` is told one generation: the newest one counts for all.
    let mut machine = guest();
    machine.access(Gva(TOP), READ);
    machine.mmu.reclaim(&machine.host, 1);
    let first = machine.host.generation.get();
    machine.mmu.reclaim(&machine.host, 1);
    assert!(machine.host.generation.get() > first);
    let waiting: Vec<Pfn> = machine.mmu.retired.clone();
    assert_eq!(waiting.len(), 2);
    machine.mmu.release(&machine.host, first);
    assert_eq!(machine.mmu.retired, waiting);
    machine.mmu.release(&machine.host, machine.host.generation.get());
    assert!(machine.mmu.retired.is_empty());
}

/// The live shadow pages: guest table and level.
fn live(machine: &Machine) -> BTreeSet<(u64, u8)> {
    let pages = &machine.mmu.pages;
    let live = (0..pages.capacity()).map(PageId).filter(|&id| pages[id].live);
    live.map(|id| (pages[id].gfn.address().0, pages[id].role.level())).collect()
}

/// Reclaims one page and tells which, and why it.
fn victim(machine: &mut Machine) -> (Class, u64, u8) {
    let before = live(machine);
    machine.mmu.turn += 1;
    let class = machine.mmu.evict_next(&machine.host).expect("a victim");
    machine.mmu.publish(&machine.host);
    machine.audit();
    let after = live(machine);
    let gone: Vec<(u64, u8)> = before.difference(&after).copied().collect();
    assert_eq!(gone.len(), 1, "one asked for, one gone");
    (class, gone[0].0, gone[0].1)
}

/// Leaf table number `n` of the golden test, at entry `n` of the page directory.
fn leaf_table(n: u64) -> u64 {
    0x4_0000 + n * 0x1000
}

fn use_leaf_tables(machine: &mut Machine, tables: &[u64]) {
    for n in tables {
        let landed = machine.access(Gva(TOP + (n << 21)), READ);
        assert_eq!(landed, Landed::Ram(Gpa(0x20_0000)));
    }
}

#[test]
fn h25_the_order_of_victims_is_golden() {
    let mut machine = guest();
    let home = machine.cpu.paging;
    let leaf_tables = 0..8_u64;
    for n in leaf_tables.clone() {
        machine.poke(leaf_table(n), 0x20_0000 | FLAGS);
        machine.poke(PD + 8 * n, leaf_table(n) | FLAGS);
    }
    // Two idle roots, the older one used last before the other: each with a table of its own below.
    let (older, newer) = (0x2_0000, 0x2_2000);
    for root in [newer, older, newer] {
        machine.poke(root, (root + 0x1000) | FLAGS);
        machine.poke(root + 0x1000, 0); // an empty PDPT
        machine.set_paging(Paging { cr3: root, ..home });
        assert!(matches!(machine.access(Gva(0), READ), Landed::Fault(_)));
    }
    for root in [older, newer] {
        // Its PDPT is shadowed once something below is reached.
        machine.poke(root + 0x1000, (PML4 + 0x2000) | FLAGS);
        machine.set_paging(Paging { cr3: root, ..home });
        assert_eq!(machine.access(Gva(0x60_0000), READ), Landed::Ram(Gpa(0x60_0000)));
    }
    machine.set_paging(home);
    use_leaf_tables(&mut machine, &[6, 7, 0, 1, 2, 3, 4]);
    // Two tables lose their parent, 7 before 6.
    for n in [7, 6] {
        machine.device_store(PD + 8 * n, 0);
        machine.flush();
    }
    machine.audit();

    let mut order: Vec<(Class, u64, u8)> = Vec::new();
    let mut take = |machine: &mut Machine, count: usize| {
        order.extend((0..count).map(|_| victim(machine)));
    };
    take(&mut machine, 2);
    // The older root, what hung below it, then the newer one with what hung below it, and last what hung below both.
    take(&mut machine, 5);
    // Every table counts as used since the last look: the oldest leaf goes. From here on two are in use.
    take(&mut machine, 1);
    for _ in 0..2 {
        use_leaf_tables(&mut machine, &[1, 3]);
        take(&mut machine, 1);
    }
    use_leaf_tables(&mut machine, &[1, 3]);
    take(&mut machine, 1);
    use_leaf_tables(&mut machine, &[3]);
    take(&mut machine, 1);
    // Nobody walked through the upper ones any more.
    take(&mut machine, 2);

    let golden = [
        (Class::Parentless, leaf_table(7), 1),
        (Class::Parentless, leaf_table(6), 1),
        (Class::IdleRoot, older, 4),
        (Class::Parentless, older + 0x1000, 3),
        (Class::IdleRoot, newer, 4),
        (Class::Parentless, newer + 0x1000, 3),
        (Class::Parentless, PML4 + 0x2000, 2),
        (Class::HotLeaf, leaf_table(0), 1),
        (Class::ColdLeaf, leaf_table(2), 1),
        (Class::ColdLeaf, leaf_table(4), 1),
        (Class::HotLeaf, leaf_table(1), 1),
        (Class::HotLeaf, leaf_table(3), 1),
        (Class::ColdUpper, PDPT, 3),
        (Class::Parentless, PD, 2),
    ];
    assert_eq!(order, golden);
    assert_eq!(live(&machine), BTreeSet::from([(PML4, 4)]), "the loaded root stays");
    assert_eq!(machine.mmu.reclaim(&machine.host, 1), 0);
}

/// PDPTEs have no A bit, so the page directories of a loaded PAE root are never cold.
#[test]
fn h25_in_pae_mode_a_leaf_goes_before_the_directory_above_it() {
    let mut machine = guest();
    let (root, directory) = (0x2_0000, 0x2_1000);
    for n in 0..3 {
        machine.poke(leaf_table(n), 0x20_0000 | FLAGS);
        machine.poke(directory + 8 * n, leaf_table(n) | FLAGS);
    }
    let pae = Paging {
        mode: Mode::Pae,
        cr3: root,
        pdptes: [directory | bits::P, 0, 0, 0],
        gib_pages: false,
        ..machine.cpu.paging
    };
    machine.set_paging(pae);
    for n in 0..3 {
        assert_eq!(machine.access(Gva(n << 21), READ), Landed::Ram(Gpa(0x20_0000)));
    }
    let order: Vec<_> =
        (0..5).map(|_| victim(&mut machine)).filter(|victim| victim.0 > Class::IdleRoot).collect();
    let leaf = |class, n| (class, leaf_table(n), 1);
    let golden = [leaf(Class::HotLeaf, 0), leaf(Class::ColdLeaf, 1), leaf(Class::ColdLeaf, 2)];
    assert_eq!(order[..3], golden);
    assert_eq!(order[3..], [(Class::HotUpper, directory, 2)]);
}

#[test]
fn h25_classes_stand_in_the_order_in_which_they_go() {
    let classes = [
        Class::Parentless,
        Class::IdleRoot,
        Class::ColdLeaf,
        Class::ColdUpper,
        Class::HotLeaf,
        Class::HotUpper,
    ];
    assert!(classes.is_sorted());
}
