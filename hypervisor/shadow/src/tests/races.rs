//! Between the walk and the fill another vCPU writes the guest's tables.

use memory::{Gpa, Gva};

use super::guest::{BLOCKS, FLAGS, PD, PDPT, PML4, PT, TOP, guest_on};
use crate::model::machine::{Landed, Machine, READ, WRITE, config};
use crate::paging::bits;
use crate::{Access, Fill, walk};

/// The guest on a machine with two vCPUs, of which the first runs.
pub fn two_vcpus() -> Machine {
    guest_on(Machine::configured(BLOCKS, config(256, 2)))
}

/// One vCPU's fault at `TOP`, with `meanwhile` between its walk and its fill.
fn fault(machine: &mut Machine, access: Access, meanwhile: impl FnOnce(&mut Machine)) -> Fill {
    let found = walk::walk(&machine.cpu.paging, &machine.host.ram, Gva(TOP), access).unwrap();
    meanwhile(machine);
    machine.ready();
    machine.mmu.fill(&machine.host, &machine.cpu, Gva(TOP), access, &found)
}

#[test]
fn h03_an_entry_that_changed_between_walk_and_fill() {
    // Not shadowed before, so that nobody hears of the write; and shadowed, so that it comes by the tracker.
    for shadowed in [false, true] {
        for entry in [PML4 + 8, PDPT, PD, PT] {
            for (value, what) in [
                (0, "gone"),
                (0x3_0000 | FLAGS, "elsewhere"),
                (FLAGS & !bits::W, "read-only"),
                (FLAGS & !bits::U, "the supervisor's"),
                (FLAGS | bits::NX, "not executable"),
                (FLAGS & !bits::A, "not accessed"),
            ] {
                let mut machine = two_vcpus();
                if shadowed {
                    machine.access(Gva(TOP + 0x10_0000), READ);
                }
                let value = if value & bits::FRAME == 0 && value != 0 {
                    machine.peek(entry) & bits::FRAME | value
                } else {
                    value
                };
                let outcome = fault(&mut machine, WRITE, |machine| machine.device_store(entry, value));
                assert_eq!(outcome, Fill::Changed, "{what}: entry at {entry:#x}, shadowed: {shadowed}");
                assert_eq!(machine.hardware(Gva(TOP), READ), None, "{what}");
                // The next round sees the tables as they are.
                let expected = machine.expected(Gva(TOP), WRITE);
                assert_eq!(machine.access(Gva(TOP), WRITE), expected, "{what}");
            }
        }
    }
}

#[test]
fn h03_a_refused_fill_links_nothing_by_an_entry_that_changed() {
    let mut machine = two_vcpus();
    // A second way to the leaf table, so that its shadow is full.
    machine.poke(PML4 + 0x10, 0x3_0000 | FLAGS);
    machine.poke(0x3_0000, 0x3_1000 | FLAGS);
    machine.poke(0x3_1000, PT | FLAGS);
    machine.access(Gva(2 * TOP), READ);
    let outcome = fault(&mut machine, READ, |machine| machine.device_store(PD, 0));
    assert_eq!(outcome, Fill::Changed);
    machine.audit();
    machine.flush();
    assert!(matches!(machine.access(Gva(TOP), READ), Landed::Fault(_)), "through a table that is not linked");
}

#[test]
fn h03_a_table_is_shut_to_the_other_cores_before_its_entry_is_checked() {
    let mut machine = two_vcpus();
    let paging = machine.cpu.paging;
    // The other vCPU may write the table, and is in the guest.
    machine.next_vcpu();
    machine.set_paging(paging);
    machine.access(Gva(PT), WRITE);
    machine.next_vcpu();
    let shoot_downs = machine.host.shoot_downs.get();
    assert_eq!(fault(&mut machine, READ, |_| ()), Fill::Filled);
    assert!(machine.host.shoot_downs.get() > shoot_downs, "it may write on, unheard");
}

#[test]
fn h03_the_writable_bit_toggled_under_every_walk() {
    let mut machine = two_vcpus();
    for round in 0..16_u64 {
        let flags = if round % 2 == 0 { FLAGS & !bits::W } else { FLAGS };
        let value = 0x20_0000 | flags;
        if walk::peek(&machine.cpu.paging, &machine.host.ram, Gva(TOP), READ).is_ok() {
            let outcome = fault(&mut machine, READ, |machine| {
                machine.next_vcpu();
                machine.device_store(PT, value);
                machine.next_vcpu();
            });
            assert_eq!(outcome, Fill::Changed);
        }
        machine.invlpg(Gva(TOP));
        let expected = machine.expected(Gva(TOP), WRITE);
        assert_eq!(machine.access(Gva(TOP), WRITE), expected, "round {round}");
        assert_eq!(matches!(expected, Landed::Ram(_)), flags & bits::W != 0);
    }
}

#[test]
fn h03_a_and_d_set_meanwhile_are_no_change() {
    let mut machine = two_vcpus();
    for entry in [PML4 + 8, PDPT, PD] {
        machine.poke(entry, machine.peek(entry) & !bits::D);
    }
    machine.poke(PT, 0x20_0000 | (FLAGS & !bits::D));
    let outcome = fault(&mut machine, READ, |machine| {
        for entry in [PML4 + 8, PDPT, PD, PT] {
            machine.poke(entry, machine.peek(entry) | bits::A | bits::D);
        }
    });
    assert_eq!(outcome, Fill::Filled);
    assert_eq!(machine.hardware(Gva(TOP), READ), Some(Gpa(0x20_0000)));
}

#[test]
fn h03_a_sync_shuts_the_other_cores_writes_out_before_it_looks() {
    let mut machine = two_vcpus();
    let paging = machine.cpu.paging;
    machine.access(Gva(TOP), READ);
    machine.store(Gva(PT), 0x60_0000 | FLAGS);
    machine.next_vcpu();
    machine.set_paging(paging);
    machine.store(Gva(PT), 0x40_0000 | FLAGS);
    let (generation, shoot_downs) = (machine.host.generation.get(), machine.host.shoot_downs.get());
    machine.flush();
    assert!(machine.host.shoot_downs.get() > shoot_downs);
    assert!(machine.host.generation.get() > generation);
    machine.next_vcpu();
    assert_eq!(machine.hardware(Gva(PT), WRITE), None, "not writable while its shadow is in sync");
}

#[test]
fn a_d_cleared_between_walk_and_fill_is_set_again() {
    let mut machine = two_vcpus();
    let outcome = fault(&mut machine, WRITE, |machine| {
        machine.poke(PT, 0x20_0000 | (FLAGS & !bits::D)); // not shadowed yet: nobody hears of it
    });
    machine.invlpg(Gva(TOP)); // the other vCPU's shoot-down arrives
    machine.access(Gva(TOP), WRITE);
    assert_eq!(machine.peek(PT) & bits::D, bits::D, "{outcome:?}");
}
