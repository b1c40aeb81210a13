//! Large pages: kept, split, and flushed as one.

use memory::{Gpa, Gva};

use super::guest::{BLOCKS, FLAGS, PML4, guest};
use crate::model::machine::{FETCH, Landed, Machine, READ, WRITE, identity};
use crate::paging::bits;
use crate::{Mode, Paging};

#[test]
fn large_pages_stay_large_where_no_table_lies_inside() {
    let mut machine = guest();
    machine.access(Gva(0x20_0000), WRITE);
    machine.access(Gva(0x3f_f000), WRITE);
    assert_eq!(machine.exits, 1);
    // The block with the tables is mapped piecewise.
    machine.access(Gva(0x0), WRITE);
    machine.access(Gva(0x10_0000), WRITE);
    assert_eq!(machine.exits, 3);
    machine.audit();
}

#[test]
fn no_large_page_over_tables_that_the_same_fill_shadows() {
    // The PML4 in block 0; a PDPT and a PD of 2 MiB identity pages in block 1.
    let mut machine = Machine::new(BLOCKS, 256);
    machine.poke(PML4, 0x20_1000 | FLAGS);
    machine.poke(0x20_1000, 0x20_2000 | FLAGS);
    for block in 0..BLOCKS {
        machine.poke(0x20_2000 + 8 * block, block << 21 | FLAGS | bits::PS);
    }
    let paging = Paging {
        mode: Mode::FourLevel,
        cr3: PML4,
        nxe: true,
        wp: true,
        gib_pages: true,
        physical_address_bits: 40,
        ..Paging::default()
    };
    machine.set_paging(paging);
    assert_eq!(machine.access(Gva(0x20_0000), WRITE), Landed::Ram(Gpa(0x20_0000)));
    machine.audit();
    assert_eq!(machine.access(Gva(0x60_0000), READ), Landed::Ram(Gpa(0x60_0000)));
    machine.store(Gva(0x20_2000 + 24), 0x40_0000 | FLAGS | bits::PS);
    machine.flush();
    assert_eq!(machine.access(Gva(0x60_0000), READ), Landed::Ram(Gpa(0x40_0000)));
    machine.audit();
}

#[test]
fn h22_no_large_spte_is_executable_on_affected_processors() {
    let mut machine = Machine::with(BLOCKS, 256, true);
    let paging = identity(&machine, PML4, BLOCKS);
    machine.set_paging(paging);
    machine.access(Gva(0x20_0000), WRITE);
    machine.access(Gva(0x2f_f000), WRITE);
    assert_eq!(machine.exits, 1, "data stays large");
    machine.access(Gva(0x20_0000), FETCH);
    assert_eq!(machine.exits, 2, "a fetch splits");
    machine.access(Gva(0x20_1000), WRITE);
    machine.access(Gva(0x20_1000), FETCH);
    assert_eq!(machine.exits, 2, "and the neighbours came with it");
    machine.audit();
}

#[test]
fn h22_a_sync_leaves_no_large_spte_executable_either() {
    let mut machine = Machine::with(BLOCKS, 256, true);
    let paging = identity(&machine, PML4, BLOCKS);
    machine.set_paging(paging);
    machine.access(Gva(0x20_0000), WRITE);
    let entry = PML4 + 0x2008;
    machine.device_store(entry, machine.peek(entry) & !bits::U);
    machine.flush();
    machine.audit();
    assert!(machine.hardware(Gva(0x20_0000), WRITE).is_some(), "still there");
    assert_eq!(machine.hardware(Gva(0x20_0000), FETCH), None);
}

#[test]
fn invlpg_of_one_address_flushes_both_halves_of_a_4_mib_page() {
    let mut machine = Machine::new(6, 256);
    let flags = (FLAGS | bits::PS) as u32;
    machine.poke_u32(PML4, flags);
    machine.poke_u32(PML4 + 4, 0x40_0000 | flags);
    let paging = Paging {
        mode: Mode::TwoLevel,
        cr3: PML4,
        wp: true,
        pse: true,
        physical_address_bits: 40,
        ..Paging::default()
    };
    machine.set_paging(paging);
    machine.access(Gva(0x40_0000), READ);
    machine.access(Gva(0x60_0000), READ);
    machine.access(Gva(PML4), WRITE);
    machine.poke_u32(PML4 + 4, flags);
    machine.invlpg(Gva(0x40_0000));
    assert_eq!(machine.access(Gva(0x40_0000), READ), Landed::Ram(Gpa(0)));
    assert_eq!(machine.access(Gva(0x60_0000), READ), Landed::Ram(Gpa(0x20_0000)));
}
