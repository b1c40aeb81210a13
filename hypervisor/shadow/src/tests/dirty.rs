//! The guest's D bit: set by every write, however the page is mapped.

use memory::Gva;

use super::guest::{PD, PT, TOP, guest};
use crate::Paging;
use crate::model::machine::{Landed, READ, WRITE};
use crate::paging::bits;

const READ_ONLY: u64 = bits::P | bits::U | bits::A;

#[test]
fn a_write_sets_d_though_reads_came_first() {
    let mut machine = guest();
    for i in 0..32 {
        machine.poke(PT + 8 * i, (0x20_0000 + i * 0x1000) | READ_ONLY | bits::W);
    }
    for i in 0..32 {
        machine.access(Gva(TOP + i * 0x1000), READ);
        assert_eq!(machine.peek(PT + 8 * i) & bits::D, 0, "a read sets no D");
    }
    for i in 0..32 {
        machine.access(Gva(TOP + i * 0x1000), WRITE);
        assert_eq!(machine.peek(PT + 8 * i) & bits::D, bits::D);
    }
    machine.audit();
}

#[test]
fn the_second_alias_of_a_large_read_only_page_has_a_d_of_its_own() {
    // Under CR0.WP = 0 both are written; their pieces are shadowed alike.
    let mut machine = guest();
    machine.poke(PD + 0x10, 0x20_0000 | READ_ONLY | bits::PS);
    machine.poke(PD + 0x18, 0x20_0000 | READ_ONLY | bits::PS);
    machine.set_paging(Paging { wp: false, ..machine.cpu.paging });
    machine.access(Gva(TOP + 0x60_0000 + 100 * 0x1000), READ);
    machine.access(Gva(TOP + 0x40_0000), WRITE);
    machine.access(Gva(TOP + 0x60_0000), WRITE);
    assert_eq!(machine.peek(PD + 0x18) & bits::D, bits::D);
}

#[test]
fn a_d_that_the_guest_cleared_is_set_again() {
    let entry = 0x20_0000 | READ_ONLY | bits::PS;
    for (wp, entry) in [(false, entry), (true, entry | bits::W)] {
        let mut machine = guest();
        machine.poke(PD + 0x10, entry);
        machine.set_paging(Paging { wp, ..machine.cpu.paging });
        machine.access(Gva(TOP + 0x40_0000), WRITE);
        assert_eq!(machine.peek(PD + 0x10) & bits::D, bits::D);
        machine.store(Gva(PD + 0x10), entry);
        machine.invlpg(Gva(TOP + 0x40_0000));
        machine.flush();
        machine.access(Gva(TOP + 0x40_0000), WRITE);
        assert_eq!(machine.peek(PD + 0x10) & bits::D, bits::D, "CR0.WP = {wp}");
    }
}

#[test]
fn a_is_set_on_the_whole_path_and_only_there() {
    let mut machine = guest();
    for at in [PD, PT, PT + 8] {
        machine.poke(at, machine.peek(at) & !(bits::A | bits::D));
    }
    assert!(matches!(machine.access(Gva(TOP), READ), Landed::Ram(_)));
    for (at, accessed) in [(PD, bits::A), (PT, bits::A), (PT + 8, 0)] {
        assert_eq!(machine.peek(at) & (bits::A | bits::D), accessed, "entry at {at:#x}");
    }
}
