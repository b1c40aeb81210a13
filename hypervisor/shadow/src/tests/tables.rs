//! Tables found, shared, linked and broken.

use memory::{Gpa, Gva};

use super::guest::{FLAGS, PD, PDPT, PML4, PT, TOP, guest};
use crate::model::machine::{Landed, Machine, READ, WRITE, by_user};
use crate::paging::bits;
use crate::walk::{ReservedPdpte, load_pdptes};
use crate::{Mode, Paging};

#[test]
fn neighbours_are_prefilled() {
    let mut machine = guest();
    for i in 0..512 {
        let landed = machine.access(Gva(TOP + i * 0x1000), WRITE);
        assert_eq!(landed, Landed::Ram(Gpa(0x20_0000 + i * 0x1000)));
    }
    assert_eq!(machine.exits, 512 / 16);
    machine.audit();
}

#[test]
fn mmio_is_marked() {
    let mut machine = guest();
    machine.poke(PT, 0xfee0_0000 | FLAGS);
    assert_eq!(machine.access(Gva(TOP + 0x30), READ), Landed::Mmio(Gpa(0xfee0_0030)));
    machine.audit();
}

#[test]
fn h01_role_inherits_access() {
    // Two PML4 slots lead to one PDPT: one path for users, one read-only for the supervisor.
    let mut machine = guest();
    machine.poke(PML4 + 0x10, PDPT | bits::P | bits::A);
    let user = by_user(READ);
    for _ in 0..2 {
        assert_eq!(machine.access(Gva(TOP), user), Landed::Ram(Gpa(0x20_0000)));
        assert!(matches!(machine.access(Gva(2 * TOP), user), Landed::Fault(_)));
        assert!(matches!(machine.access(Gva(2 * TOP), WRITE), Landed::Fault(_)));
        assert_eq!(machine.access(Gva(2 * TOP), READ), Landed::Ram(Gpa(0x20_0000)));
        assert_eq!(machine.access(Gva(TOP), WRITE), Landed::Ram(Gpa(0x20_0000)));
    }
    machine.audit();
}

#[test]
fn h02_stale_unsync_table_is_synced_before_it_is_linked() {
    let mut machine = guest();
    machine.access(Gva(TOP), READ);
    machine.store(Gva(PT + 8), 0x40_0000 | FLAGS); // unsync, no INVLPG
    machine.store(Gva(PD + 8), PT | FLAGS); // the same table, 2 MiB further up
    assert_eq!(machine.access(Gva(TOP + 0x20_0000), READ), Landed::Ram(Gpa(0x20_0000)));
    assert_eq!(machine.access(Gva(TOP + 0x20_1000), READ), Landed::Ram(Gpa(0x40_0000)));
    machine.audit();
}

#[test]
fn h02_stale_table_below_the_one_that_is_linked() {
    let mut machine = guest();
    machine.access(Gva(TOP), READ);
    machine.access(Gva(TOP + 0x10_0000), READ);
    machine.store(Gva(PT + 8), 0x40_0000 | FLAGS);
    machine.store(Gva(PDPT + 8), PD | FLAGS); // the page directory, in sync itself, 1 GiB further up
    assert_eq!(machine.access(Gva(TOP + (1 << 30)), READ), Landed::Ram(Gpa(0x20_0000)));
    assert_eq!(machine.access(Gva(TOP + (1 << 30) + 0x1000), READ), Landed::Ram(Gpa(0x40_0000)));
}

#[test]
fn h05_self_mapped_top_table() {
    let mut machine = guest();
    machine.poke(PML4 + 8 * 510, PML4 | FLAGS);
    let slot = 510_u64;
    let own = Gva(0xffff << 48 | slot << 39 | slot << 30 | slot << 21 | slot << 12);
    assert_eq!(machine.access(own, READ), Landed::Ram(Gpa(PML4)));
    // Through the self-map: link slot 3 to the PDPT of slot 1.
    assert_eq!(machine.store(Gva(own.0 + 24), PDPT | FLAGS), Landed::Ram(Gpa(PML4 + 0x18)));
    machine.audit();
    assert_eq!(machine.access(Gva(3 << 39), READ), Landed::Ram(Gpa(0x20_0000)));
    machine.store(Gva(own.0 + 24), 0);
    machine.flush();
    machine.audit();
    assert!(matches!(machine.access(Gva(3 << 39), READ), Landed::Fault(_)));
}

/// The error code of the fault that reading `TOP` ends in.
fn code(machine: &mut Machine) -> u32 {
    match machine.access(Gva(TOP), READ) {
        Landed::Fault(fault) => fault.code.0,
        other => panic!("{other:?}"),
    }
}

#[test]
fn h09_every_address_bit_above_the_width_is_reserved_at_every_level() {
    for bit in 40..52 {
        for entry in [PML4 + 8, PDPT, PD, PT] {
            let mut machine = guest();
            machine.poke(entry, machine.peek(entry) | 1 << bit);
            assert_eq!(code(&mut machine), 9, "bit {bit} of the entry at {entry:#x}");
            assert_eq!(machine.peek(entry) & bits::D, bits::D, "nothing else changed");
        }
    }
}

#[test]
fn h09_low_address_bits_of_a_large_page_are_reserved() {
    for (entry, low_bits) in [(PDPT, 13..30), (PD, 13..21), (PML4 + 8, 7..8)] {
        for bit in low_bits {
            let mut machine = guest();
            machine.poke(entry, FLAGS | bits::PS | 1 << bit);
            assert_eq!(code(&mut machine), 9, "bit {bit} of the entry at {entry:#x}");
        }
    }
}

#[test]
fn h09_a_reserved_bit_of_a_neighbour_or_of_a_later_value_is_not_overlooked() {
    // XD without EFER.NXE; in PAE tables also the ignored bits of other modes.
    for (mode, reserved) in [(Mode::FourLevel, bits::NX), (Mode::Pae, 1 << 52), (Mode::Pae, 1 << 62)] {
        let mut machine = guest();
        machine.poke(PT + 8, machine.peek(PT + 8) | reserved);
        let paging = Paging { mode, nxe: false, ..machine.cpu.paging };
        let (paging, base) = match mode {
            Mode::Pae => (Paging { cr3: 0x1_a000, pdptes: [PD | bits::P, 0, 0, 0], ..paging }, 0),
            _ => (paging, TOP),
        };
        machine.set_paging(paging);
        let is_reserved = |landed| matches!(landed, Landed::Fault(fault) if fault.code.0 == 9);
        assert_eq!(machine.access(Gva(base), READ), Landed::Ram(Gpa(0x20_0000)));
        assert!(is_reserved(machine.access(Gva(base + 0x1000), READ)), "beside: {reserved:#x}");
        machine.device_store(PT, machine.peek(PT) | reserved);
        machine.flush();
        assert!(is_reserved(machine.access(Gva(base), READ)), "after: {reserved:#x}");
        machine.audit();
    }
}

#[test]
fn h09_a_frame_number_is_never_cut() {
    // Each address bit below the width takes the page out of RAM, to exactly that address.
    for bit in 23..40 {
        let mut machine = guest();
        machine.poke(PT, 1 << bit | FLAGS);
        assert_eq!(machine.access(Gva(TOP), READ), Landed::Mmio(Gpa(1 << bit)), "bit {bit}");
        machine.audit();
    }
}

#[test]
fn h11_h18_tables_that_are_no_ram_fault_and_are_not_written() {
    for entry in [PML4 + 8, PDPT, PD] {
        let mut machine = guest();
        machine.poke(entry, 0xfee0_0000 | FLAGS);
        assert_eq!(code(&mut machine), 0, "what is no RAM reads as not present");
        machine.audit();
    }
}

#[test]
fn h11_empty_and_reserved_pdptes() {
    let mut machine = guest();
    let pae = Paging { mode: Mode::Pae, cr3: 0x1_a000, ..machine.cpu.paging };
    machine.set_paging(pae);
    for quarter in 0..4 {
        assert!(matches!(machine.access(Gva(quarter << 30), READ), Landed::Fault(_)));
    }
    machine.audit();
    for bit in [1, 2, 5, 6, 7, 8, 40, 51, 52, 62, 63] {
        machine.poke(0x1_a010, PD | bits::P | 1 << bit);
        assert_eq!(load_pdptes(&machine.host.ram, 0x1_a000, 40), Err(ReservedPdpte), "bit {bit}");
        machine.poke(0x1_a010, PD | 1 << bit);
        assert!(load_pdptes(&machine.host.ram, 0x1_a000, 40).is_ok(), "not present: nothing is reserved");
    }
    assert_eq!(load_pdptes(&machine.host.ram, 0xffff_f000, 40), Ok([0; 4]), "no RAM");
}

#[test]
fn h20_an_unbacked_root_is_the_guests_fault() {
    let mut machine = guest();
    for cr3 in [0x7f_ffff_f000, 0x80_0000, 0xf_ffff_ffff_f000, 0xfee0_0000] {
        for mode in [Mode::TwoLevel, Mode::Pae, Mode::FourLevel, Mode::FiveLevel] {
            let paging = Paging { mode, cr3, ..machine.cpu.paging };
            machine.set_paging(paging);
            assert!(matches!(machine.access(Gva(0x1000), READ), Landed::Fault(_)), "{mode:?} {cr3:#x}");
            machine.audit();
        }
    }
}
