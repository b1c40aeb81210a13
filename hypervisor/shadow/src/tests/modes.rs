//! Every paging mode, and the ways between them.

use memory::{Gpa, Gva, Pfn};

use super::guest::{BLOCKS, FLAGS, PML4, PT, TOP, guest};
use crate::model::machine::{Landed, Machine, READ, WRITE, identity};
use crate::paging::bits;
use crate::walk::load_pdptes;
use crate::{FRAMES_PER_OPERATION, Flush, Mode, PAGES_PER_OPERATION, Paging, Short, VcpuMmu};

/// The page with the four PDPTEs of the PAE guests here.
const PDPTES: u64 = 0x2_0000;
/// Two page directories, each of 2 MiB pages.
const DIRECTORIES: [u64; 2] = [0x2_1000, 0x2_2000];

/// What a processor does at a MOV to CR3 (and at a change of CR4.PGE) in PAE mode.
fn reload(machine: &mut Machine, cr3: u64) {
    let pdptes = load_pdptes(&machine.host.ram, cr3, 40).unwrap();
    machine.set_paging(Paging { mode: Mode::Pae, cr3, pdptes, ..machine.cpu.paging });
}

/// A guest in PAE mode: the first directory maps block 1 at 0, the second block 2.
fn pae_guest() -> Machine {
    let mut machine = guest();
    for (i, directory) in DIRECTORIES.into_iter().enumerate() {
        machine.poke(directory, (i as u64 + 1) << 21 | FLAGS | bits::PS);
    }
    machine.poke(PDPTES, DIRECTORIES[0] | bits::P);
    reload(&mut machine, PDPTES);
    machine
}

#[test]
fn h17_a_pdpte_counts_from_the_reload_of_the_same_cr3_on() {
    let mut machine = pae_guest();
    assert_eq!(machine.access(Gva(0x5000), READ), Landed::Ram(Gpa(0x20_5000)));
    machine.device_store(PDPTES, DIRECTORIES[1] | bits::P);
    machine.flush();
    machine.invlpg(Gva(0x5000));
    let landed = machine.access(Gva(0x6000), READ);
    assert_eq!(landed, Landed::Ram(Gpa(0x20_6000)), "the registers are what they were");
    reload(&mut machine, PDPTES);
    assert_eq!(machine.access(Gva(0x5000), READ), Landed::Ram(Gpa(0x40_5000)));
    machine.device_store(PDPTES, 0);
    reload(&mut machine, PDPTES);
    assert!(matches!(machine.access(Gva(0x5000), READ), Landed::Fault(_)));
    machine.audit();
}

#[test]
fn h17_a_pdpte_that_goes_and_comes_back() {
    let mut machine = pae_guest();
    for round in 0..6 {
        let which = round % 3;
        machine.device_store(PDPTES, DIRECTORIES.get(which).map_or(0, |directory| directory | bits::P));
        reload(&mut machine, PDPTES);
        let landed = machine.access(Gva(0x1000), WRITE);
        match which {
            2 => assert!(matches!(landed, Landed::Fault(_))),
            _ => assert_eq!(landed, Landed::Ram(Gpa((which as u64 + 1) << 21 | 0x1000))),
        }
        machine.audit();
    }
}

#[test]
fn pdptes_with_the_same_cr3_are_each_vcpus_own() {
    let mut machine = super::races::two_vcpus();
    for (i, directory) in DIRECTORIES.into_iter().enumerate() {
        machine.poke(directory, (i as u64 + 1) << 21 | FLAGS | bits::PS);
    }
    for directory in DIRECTORIES {
        machine.poke(PDPTES, directory | bits::P);
        let paging = Paging { wp: true, physical_address_bits: 40, ..machine.cpu.paging };
        machine.cpu.paging = paging;
        reload(&mut machine, PDPTES);
        machine.next_vcpu();
    }
    for _ in 0..2 {
        assert_eq!(machine.access(Gva(0), READ), Landed::Ram(Gpa(0x20_0000)));
        machine.next_vcpu();
        assert_eq!(machine.access(Gva(0), READ), Landed::Ram(Gpa(0x40_0000)));
        machine.next_vcpu();
    }
    machine.audit();
}

/// Each mode with a root of its own, that maps address 0x1000 to itself.
fn modes(machine: &Machine) -> [Paging; 5] {
    let base = identity(machine, PML4, BLOCKS);
    machine.poke(0x3_0000, PML4 | FLAGS);
    machine.poke_u32(0x3_1000, (FLAGS | bits::PS) as u32);
    machine.poke(0x3_2000, FLAGS | bits::PS);
    [
        Paging { mode: Mode::Off, cr3: 0, ..base },
        Paging { mode: Mode::TwoLevel, cr3: 0x3_1000, pse: true, ..base },
        Paging { mode: Mode::Pae, cr3: 0x3_3000, pdptes: [0x3_2000 | bits::P, 0, 0, 0], ..base },
        base,
        Paging { mode: Mode::FiveLevel, cr3: 0x3_0000, ..base },
    ]
}

/// Addresses that a guest may name in INVLPG and INVPCID: any.
const NAMED: [u64; 9] = [
    0,
    0x1000,
    0x3fff_ffff,
    0xffff_ffff,
    0x1_0000_0000,
    0x0000_7fff_ffff_ffff,
    0x0000_8000_0000_0000,
    0xffff_8000_0000_0000,
    u64::MAX,
];

#[test]
fn h19_every_flush_in_every_mode() {
    let mut machine = guest();
    for paging in modes(&machine) {
        machine.set_paging(paging);
        for round in 0..2 {
            assert_eq!(machine.access(Gva(0x1000), WRITE), Landed::Ram(Gpa(0x1000)), "{:?}", paging.mode);
            // In the second round there are tables that fell behind, this mode's root among them.
            if round == 1 {
                machine.mmu.before_write(&machine.host, paging.root_gfn());
            }
            for gva in NAMED {
                machine.invlpg(Gva(gva));
                machine.audit();
            }
            machine.flush();
            machine.audit();
        }
    }
}

#[test]
fn h19_flushes_without_a_root() {
    let mut machine = guest();
    machine.access(Gva(TOP), READ);
    machine.device_store(PT, 0);
    let before = machine.state();
    let mut rootless = VcpuMmu::new(1);
    machine.mmu.invlpg(&machine.host, &mut rootless, Gva(TOP));
    machine.mmu.flush(&machine.host, &mut rootless);
    assert_eq!(machine.state(), before);
}

#[test]
fn h19_what_is_edited_while_paging_is_off_counts_when_it_is_on_again() {
    let mut machine = guest();
    let on = machine.cpu.paging;
    let [off, ..] = modes(&machine);
    machine.access(Gva(TOP), READ);
    machine.access(Gva(TOP + 0x10_0000), READ);
    machine.set_paging(off);
    assert_eq!(machine.store(Gva(PT), 0x40_0000 | FLAGS), Landed::Ram(Gpa(PT)));
    machine.invlpg(Gva(TOP));
    machine.flush();
    machine.set_paging(on);
    assert_eq!(machine.access(Gva(TOP), READ), Landed::Ram(Gpa(0x40_0000)));
    machine.audit();
}

#[test]
fn smep_and_smap_are_off_while_paging_is() {
    let mut machine = guest();
    let [off, ..] = modes(&machine);
    machine.set_paging(Paging { smep: true, smap: true, wp: true, ..off });
    for access in [READ, WRITE, crate::model::machine::FETCH] {
        assert_eq!(machine.access(Gva(0x30_0000), access), Landed::Ram(Gpa(0x30_0000)));
    }
    assert_eq!(machine.access(Gva(0xfee0_0000), READ), Landed::Mmio(Gpa(0xfee0_0000)));
    machine.audit();
}

#[test]
fn the_root_of_a_pae_shadow_lies_below_4_gib() {
    const HIGH: u64 = 1 << 20;
    let mut machine = Machine::new(BLOCKS, 256);
    let [off, two_level, pae, four_level, _] = modes(&machine);
    for paging in [off, two_level, pae] {
        for frame in 0..FRAMES_PER_OPERATION as u64 {
            machine.mmu.provide(Pfn(HIGH + frame)).unwrap();
        }
        assert!(!machine.mmu.has_low_frame());
        machine.cpu.paging = paging;
        let before = machine.state();
        assert_eq!(machine.mmu.load_root(&machine.host, &mut machine.cpu, Flush::All), Err(Short));
        assert_eq!(machine.state(), before, "nothing was done");
        machine.mmu.provide(Pfn(0x77)).unwrap();
        machine.mmu.load_root(&machine.host, &mut machine.cpu, Flush::All).unwrap();
        assert_eq!(machine.cpu.root_table(), Pfn(0x77), "{:?}", paging.mode);
        while machine.mmu.take_back().is_some() {}
        // Let go of the low frame.
        machine.mmu.drop_root(&mut machine.cpu);
        machine.mmu.zap_all(&machine.host);
        machine.release();
        while machine.mmu.take_back().is_some() {}
        assert!(machine.mmu.pages_left() >= PAGES_PER_OPERATION);
    }
    // Other roots may lie anywhere.
    for frame in 0..FRAMES_PER_OPERATION as u64 {
        machine.mmu.provide(Pfn(HIGH + frame)).unwrap();
    }
    machine.cpu.paging = four_level;
    assert_eq!(machine.mmu.load_root(&machine.host, &mut machine.cpu, Flush::All), Ok(()));
}
