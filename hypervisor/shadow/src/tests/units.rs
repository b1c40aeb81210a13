//! One behaviour each.

use memory::Gva;

use super::machine::{Machine, Landed, READ, WRITE, identity};
use crate::paging::bits;
use crate::{Access, Kind};
use memory::Gpa;

const FLAGS: u64 = bits::P | bits::W | bits::U | bits::A | bits::D;

/// A machine with an identity map, and at 0x80_0000_0000 (PML4 slot 1) a leaf table at 0x18000.
fn guest() -> Machine {
    let mut machine = Machine::new(4, 256);
    let paging = identity(&machine, 0x10000, 4);
    machine.poke(0x10008, 0x16000 | FLAGS);
    machine.poke(0x16000, 0x17000 | FLAGS);
    machine.poke(0x17000, 0x18000 | FLAGS);
    for i in 0..512 {
        machine.poke(0x18000 + 8 * i, (0x20_0000 + i * 0x1000) | FLAGS);
    }
    machine.set_paging(paging);
    machine
}

const TOP: u64 = 0x80_0000_0000;

#[test]
fn neighbours_are_prefilled() {
    let mut machine = guest();
    for i in 0..512 {
        assert_eq!(machine.access(Gva(TOP + i * 0x1000), WRITE), Landed::Ram(Gpa(0x20_0000 + i * 0x1000)));
    }
    assert_eq!(machine.exits, 512 / 16);
    machine.audit();
}

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
fn a_write_to_a_table_is_seen_after_invlpg() {
    let mut machine = guest();
    machine.access(Gva(TOP), READ);
    machine.store(Gva(0x18000), 0x40_0000 | FLAGS);
    machine.audit();
    machine.invlpg(Gva(TOP));
    machine.audit();
    assert_eq!(machine.access(Gva(TOP), READ), Landed::Ram(Gpa(0x40_0000)));
}

#[test]
fn an_unsync_table_takes_writes_without_exits_until_the_flush() {
    let mut machine = guest();
    machine.access(Gva(TOP), READ);
    machine.store(Gva(0x18000), 0);
    let exits = machine.exits;
    for i in 1..512 {
        machine.store(Gva(0x18000 + 8 * i), 0);
    }
    assert_eq!(machine.exits, exits);
    machine.flush();
    machine.audit();
    for i in 0..512 {
        assert!(matches!(machine.access(Gva(TOP + i * 0x1000), READ), Landed::Fault(_)));
    }
    machine.store(Gva(0x18000), 0x40_0000 | FLAGS);
    assert_eq!(machine.access(Gva(TOP), READ), Landed::Ram(Gpa(0x40_0000)));
}

#[test]
fn h01_role_inherits_access() {
    // Two PML4 slots lead to one PDPT: one path for users, one read-only for the supervisor.
    let mut machine = guest();
    machine.poke(0x10010, 0x16000 | bits::P | bits::A);
    let user = Access { user: true, ..READ };
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
    machine.store(Gva(0x18008), 0x40_0000 | FLAGS); // unsync, no INVLPG
    machine.store(Gva(0x17008), 0x18000 | FLAGS); // the same table, 2 MiB further up
    assert_eq!(machine.access(Gva(TOP + 0x20_0000), READ), Landed::Ram(Gpa(0x20_0000)));
    assert_eq!(machine.access(Gva(TOP + 0x20_1000), READ), Landed::Ram(Gpa(0x40_0000)));
    machine.audit();
}

#[test]
fn h05_self_mapped_top_table() {
    let mut machine = guest();
    machine.poke(0x10000 + 8 * 510, 0x10000 | FLAGS);
    let slot = 510_u64;
    let own = Gva(0xffff << 48 | slot << 39 | slot << 30 | slot << 21 | slot << 12);
    assert_eq!(machine.access(own, READ), Landed::Ram(Gpa(0x10000)));
    // Through the self-map: link slot 3 to the PDPT of slot 1.
    assert_eq!(machine.store(Gva(own.0 + 24), 0x16000 | FLAGS), Landed::Ram(Gpa(0x10018)));
    machine.audit();
    assert_eq!(machine.access(Gva(3 << 39), READ), Landed::Ram(Gpa(0x20_0000)));
    machine.store(Gva(own.0 + 24), 0);
    machine.flush();
    machine.audit();
    assert!(matches!(machine.access(Gva(3 << 39), READ), Landed::Fault(_)));
}

#[test]
fn h09_every_address_bit_above_the_width_is_reserved() {
    for bit in 40..52 {
        let mut machine = guest();
        machine.poke(0x18000, 0x20_0000 | FLAGS | 1 << bit);
        match machine.access(Gva(TOP), READ) {
            Landed::Fault(fault) => assert_eq!(fault.code.0, 9, "bit {bit}"),
            other => panic!("bit {bit}: {other:?}"),
        }
    }
}

#[test]
fn h11_h18_tables_that_are_no_ram_fault_and_are_not_written() {
    let mut machine = guest();
    machine.poke(0x17000, 0xfee0_0000 | FLAGS);
    assert!(matches!(machine.access(Gva(TOP), WRITE), Landed::Fault(_)));
    machine.audit();
}

#[test]
fn h20_an_unbacked_root_is_the_guests_fault() {
    let mut machine = guest();
    let paging = crate::Paging { cr3: 0x7f_ffff_f000, ..machine.cpu.paging };
    machine.set_paging(paging);
    assert!(matches!(machine.access(Gva(0x1000), READ), Landed::Fault(_)));
    machine.audit();
}

#[test]
fn mmio_is_marked() {
    let mut machine = guest();
    machine.poke(0x18000, 0xfee0_0000 | FLAGS);
    assert_eq!(machine.access(Gva(TOP + 0x30), READ), Landed::Mmio(Gpa(0xfee0_0030)));
    machine.audit();
}

#[test]
fn a_supervisor_write_under_wp_0_takes_the_page_from_the_user() {
    let mut machine = guest();
    machine.poke(0x18000, 0x20_0000 | (FLAGS & !bits::W));
    let paging = crate::Paging { wp: false, ..machine.cpu.paging };
    machine.set_paging(paging);
    let user = Access { user: true, ..WRITE };
    assert_eq!(machine.access(Gva(TOP), WRITE), Landed::Ram(Gpa(0x20_0000)));
    assert!(matches!(machine.access(Gva(TOP), user), Landed::Fault(_)));
    assert_eq!(machine.access(Gva(TOP), Access { kind: Kind::Read, ..user }), Landed::Ram(Gpa(0x20_0000)));
    machine.audit();
}

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
    machine.mmu.release(&machine.host, machine.host.generation.get());
    assert_eq!(machine.host.allocated.get(), machine.host.freed.get());
}

#[test]
fn h22_no_large_spte_is_executable_on_affected_processors() {
    let mut machine = Machine::with(4, 256, true);
    let paging = identity(&machine, 0x10000, 4);
    machine.set_paging(paging);
    let fetch = Access { kind: Kind::Fetch, ..READ };
    machine.access(Gva(0x20_0000), WRITE);
    machine.access(Gva(0x2f_f000), WRITE);
    assert_eq!(machine.exits, 1, "data stays large");
    machine.access(Gva(0x20_0000), fetch);
    assert_eq!(machine.exits, 2, "a fetch splits");
    machine.access(Gva(0x20_1000), WRITE);
    machine.access(Gva(0x20_1000), fetch);
    assert_eq!(machine.exits, 2, "and the neighbours came with it");
    machine.audit();
}
