//! The write tracker: writes of devices and of the emulator, and its own limits.

use memory::{Gfn, Gpa, Gva};

use super::guest::{FLAGS, PD, PDPT, PML4, PT, TOP, guest};
use crate::model::machine::{Landed, READ, WRITE};
use crate::paging::bits;

#[test]
fn h16_a_device_writes_a_live_table_of_each_level() {
    // A second set of tables that maps page 0x60_0000 at the first address of every level.
    let second = [0x2_0000, 0x2_1000, 0x2_2000, 0x60_0000];
    for (level, (entry, target)) in
        [PT, PD, PDPT, PML4 + 8].into_iter().zip([0x60_0000, second[2], second[1], second[0]]).enumerate()
    {
        for by_invlpg in [false, true] {
            let mut machine = guest();
            for pair in second.windows(2) {
                machine.poke(pair[0], pair[1] | FLAGS);
            }
            assert_eq!(machine.access(Gva(TOP), WRITE), Landed::Ram(Gpa(0x20_0000)));
            machine.device_store(entry, target | FLAGS);
            machine.audit();
            if by_invlpg {
                machine.invlpg(Gva(TOP));
            } else {
                machine.flush();
            }
            machine.audit();
            assert_eq!(machine.access(Gva(TOP), WRITE), Landed::Ram(Gpa(0x60_0000)), "level {}", level + 1);
            // And gone.
            machine.device_store(entry, 0);
            machine.flush();
            assert!(matches!(machine.access(Gva(TOP), READ), Landed::Fault(_)));
            machine.audit();
        }
    }
}

#[test]
fn h16_a_device_write_beside_the_tables_costs_nothing() {
    let mut machine = guest();
    machine.access(Gva(TOP), WRITE);
    let before = machine.state();
    machine.mmu.before_write(&machine.host, Gfn(0x300));
    machine.mmu.before_write(&machine.host, Gfn(0xfee00)); // no RAM
    machine.mmu.before_write(&machine.host, Gfn(u64::MAX >> 12));
    assert_eq!(machine.state(), before);
}

#[test]
fn a_table_in_sync_is_never_writable_by_prefill() {
    // The table maps itself, beside a page that is used first.
    let mut machine = guest();
    machine.poke(PT + 8, PT | FLAGS);
    machine.access(Gva(TOP), READ);
    assert_eq!(machine.hardware(Gva(TOP + 0x1000), READ), Some(Gpa(PT)), "the neighbour is prefilled");
    assert_eq!(machine.hardware(Gva(TOP + 0x1000), WRITE), None, "read-only");
    machine.audit();
    machine.store(Gva(TOP + 0x1000), 0x40_0000 | FLAGS);
    machine.invlpg(Gva(TOP));
    assert_eq!(machine.access(Gva(TOP), READ), Landed::Ram(Gpa(0x40_0000)));
    machine.audit();
}

#[test]
fn a_table_that_was_data_is_writable_no_more() {
    // Mapped writable first, by a small page and by a large one, then used as a table.
    let mut machine = guest();
    machine.poke(PT + 8 * 100, 0x60_0000 | FLAGS);
    assert_eq!(machine.access(Gva(TOP + 100 * 0x1000), WRITE), Landed::Ram(Gpa(0x60_0000)));
    assert_eq!(machine.access(Gva(0x60_0000), WRITE), Landed::Ram(Gpa(0x60_0000)));
    machine.store(Gva(0x60_0000), 0x20_0000 | FLAGS);
    machine.store(Gva(PD + 0x10), 0x60_0000 | FLAGS);
    assert_eq!(machine.access(Gva(TOP + 0x40_0000), READ), Landed::Ram(Gpa(0x20_0000)));
    machine.audit();
    for alias in [0x60_0000, TOP + 100 * 0x1000] {
        assert_eq!(machine.hardware(Gva(alias), WRITE), None);
    }
    for (alias, page) in [(0x60_0000, 0x21_0000), (TOP + 100 * 0x1000, 0x22_0000)] {
        machine.store(Gva(alias), page | FLAGS);
        machine.invlpg(Gva(TOP + 0x40_0000));
        assert_eq!(machine.access(Gva(TOP + 0x40_0000), READ), Landed::Ram(Gpa(page)));
        machine.audit();
    }
}

#[test]
fn a_page_is_writable_in_its_large_page_again_when_no_table_is_left_in_it() {
    let mut machine = guest();
    machine.poke(PD + 0x10, 0x60_0000 | FLAGS);
    machine.poke(0x60_0000, 0x20_0000 | FLAGS);
    machine.access(Gva(TOP + 0x40_0000), READ);
    machine.device_store(PD + 0x10, 0);
    machine.flush();
    machine.mmu.reclaim(&machine.host, 100);
    machine.audit();
    machine.access(Gva(0x60_0000), WRITE);
    let exits = machine.exits;
    machine.access(Gva(0x7f_f000), WRITE);
    assert_eq!(machine.exits, exits, "one large page");
    assert_eq!(machine.peek(PML4 + 0x2000 + 24) & bits::D, bits::D);
    machine.audit();
}
