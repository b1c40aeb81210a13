//! Between the walk and the fill another vCPU writes the guest's tables.

use memory::Gva;

use super::guest::{BLOCKS, FLAGS, PT, TOP, guest_on};
use super::machine::{Machine, WRITE};
use crate::paging::bits;
use crate::{Config, walk};

/// A machine with two vCPUs.
fn two_vcpus() -> Machine {
    guest_on(Machine::configured(
        BLOCKS,
        Config {
            physical_address_bits: 40,
            gib_pages: true,
            mark_mmio: true,
            split_executable: false,
            pages_max: 256,
            vcpus: 2,
        },
    ))
}

#[test]
fn a_d_cleared_between_walk_and_fill_is_set_again() {
    let mut machine = two_vcpus();
    let found = walk::walk(&machine.cpu.paging, &machine.host.ram, Gva(TOP), WRITE).unwrap();
    machine.poke(PT, 0x20_0000 | (FLAGS & !bits::D)); // not shadowed yet: nobody hears of it
    machine.ready();
    let outcome = machine.mmu.fill(&machine.host, &machine.cpu, Gva(TOP), WRITE, &found);
    machine.invlpg(Gva(TOP)); // the other vCPU's shoot-down arrives
    machine.access(Gva(TOP), WRITE);
    assert_eq!(machine.peek(PT) & bits::D, bits::D, "{outcome:?}");
}
