//! What the tables hold that the processor reads: nothing but what it may find there.

use memory::{Gpa, Gva};
use proptest::prelude::*;

use super::guest::{FLAGS, PD, PDPT, PML4, PT, TOP, guest};
use crate::model::contents::{scan, sptes};
use crate::model::machine::{Landed, READ, WRITE};
use crate::paging::bits;
use crate::spte::{EMPTY, MMIO};
use crate::{Access, Kind, Paging};

#[test]
fn h21_what_maps_nothing_holds_no_frame_number() {
    assert_eq!(
        (EMPTY, MMIO),
        (0, 0x000f_ffff_ffff_f001),
        "nothing, and every frame bit: no frame that is cached"
    );
    let mut machine = guest();
    machine.poke(PT, 0xfee0_0000 | FLAGS);
    machine.poke(PT + 8, (0x21_0000 | FLAGS) & !bits::P);
    machine.poke(PT + 0x10, 0x21_0000 | FLAGS | 1 << 45);
    for i in 0..64 {
        machine.access(Gva(TOP + i * 0x1000), READ);
    }
    scan(&machine);
    // Removed in each of the ways there are.
    machine.store(Gva(PT + 8 * 20), 0);
    machine.invlpg(Gva(TOP + 20 * 0x1000));
    scan(&machine);
    machine.store(Gva(PT + 8 * 21), (0x21_0000 | FLAGS) & !bits::P);
    machine.flush();
    scan(&machine);
    machine.store(Gva(PD), (PT | FLAGS) & !bits::P);
    machine.flush();
    scan(&machine);
    machine.mmu.reclaim(&machine.host, 3);
    scan(&machine);
    machine.mmu.drop_root(&mut machine.cpu);
    machine.mmu.zap_all(&machine.host);
    scan(&machine);
}

#[test]
fn h32_the_guests_cache_attributes_never_reach_an_spte() {
    let reference = {
        let mut machine = guest();
        machine.access(Gva(TOP), WRITE);
        machine.access(Gva(0x40_0000), WRITE);
        sptes(&machine)
    };
    let (pwt, pcd) = (1 << 3, 1 << 4);
    for combination in 0..8 {
        let attributes = ((combination & 1) * pwt) | ((combination >> 1 & 1) * pcd);
        let pat = combination >> 2 & 1;
        let mut machine = guest();
        for entry in [PML4, PML4 + 8, PML4 + 0x1000, PDPT, PD] {
            machine.poke(entry, machine.peek(entry) | attributes);
        }
        for i in 0..512 {
            machine.poke(PT + 8 * i, machine.peek(PT + 8 * i) | attributes | pat << 7);
        }
        for block in 0..4 {
            let entry = PML4 + 0x2000 + 8 * block;
            machine.poke(entry, machine.peek(entry) | attributes | pat << 12);
        }
        machine.set_paging(Paging { cr3: PML4 | attributes, ..machine.cpu.paging });
        assert_eq!(machine.access(Gva(TOP), WRITE), Landed::Ram(Gpa(0x20_0000)));
        assert_eq!(machine.access(Gva(0x40_0000), WRITE), Landed::Ram(Gpa(0x40_0000)));
        assert_eq!(sptes(&machine), reference, "PAT, PCD, PWT = {combination:03b}");
        // Global and ignored bits neither.
        machine.device_store(PT + 8, machine.peek(PT + 8) | 0xf00 | 0x7ff0_0000_0000_0000);
        machine.flush();
        machine.access(Gva(TOP + 0x1000), WRITE);
        scan(&machine);
    }
}

/// An entry as a hostile guest writes it: any bits, or ones that look well.
fn hostile_entry() -> impl Strategy<Value = u64> {
    let table = prop_oneof![Just(PML4), Just(PDPT), Just(PD), Just(PT)];
    prop_oneof![
        1 => any::<u64>(),
        2 => any::<u64>().prop_map(|raw| raw & 0x8000_00ff_ffff_ffff | bits::P),
        4 => (table, any::<u64>()).prop_map(|(table, raw)| table | raw & 0xf7f & !bits::PS | bits::P),
        4 => (0..0x900_u64, any::<u64>()).prop_map(|(page, raw)| page << 12 | raw & (0xfff | bits::NX) | bits::P),
        2 => (any::<u64>()).prop_map(|raw| raw & 0xc000_0000 | FLAGS | bits::PS),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn h10_whatever_top_level_slots_say_the_guest_reaches_only_itself(
        entries in prop::collection::vec((0..4_usize, 0..512_u64, hostile_entry()), 1..24),
        looks in prop::collection::vec((any::<prop::sample::Index>(), any::<u64>(), 0..3_u8, any::<bool>()), 1..24),
    ) {
        let mut machine = guest();
        for &(table, slot, value) in &entries {
            // The slots that the guest runs by stay.
            if table > 0 || slot > 1 {
                machine.device_store([PML4, PDPT, PD, PT][table] + 8 * slot, value);
            }
        }
        machine.flush();
        for (which, low, kind, user) in looks {
            // An address below one of the slots that were written.
            let (table, slot, _) = entries[which.index(entries.len())];
            let shift = [39, 30, 21, 12][table];
            let spread = low & 0x0000_00c0_4020_3fff;
            let gva = Gva((TOP * u64::from(table > 0)) | slot << shift | spread & ((1 << shift) - 1));
            let kind = [Kind::Read, Kind::Write, Kind::Fetch][usize::from(kind)];
            let access = Access { kind, user, smap_overridden: false };
            let expected = machine.expected(gva, access);
            // `Machine::access` panics on a frame that is not the guest's.
            prop_assert_eq!(machine.access(gva, access), expected);
            machine.audit();
        }
    }
}
