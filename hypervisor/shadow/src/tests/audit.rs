//! The audit itself: each invariant, broken by hand, is missed; and its cost.

use memory::{Gfn, Gva, Pfn, TableMemory};

use super::guest::{BLOCKS, FLAGS, PD, PT, TOP, guest, guest_on};
use crate::model::machine::{FETCH, Machine, READ, WRITE};
use crate::pages::PageId;
use crate::paging::bits;
use crate::spte::{self, MMIO, Spte};
use crate::{Fill, walk};

/// The shadow page of the guest table at `gpa`.
fn shadow_of(machine: &Machine, gpa: u64) -> PageId {
    let index = machine.host.slots.index(memory::Gpa(gpa).page()).unwrap();
    PageId(machine.mmu.guest_pages[index].shadows)
}

/// What the spte `index` of the shadow of the table at `gpa` holds, replaced.
fn change(machine: &mut Machine, gpa: u64, index: usize, new: impl Fn(u64) -> u64) {
    let table = machine.mmu.pages[shadow_of(machine, gpa)].table;
    let old = machine.host.frames.load(table, index);
    machine.host.frames.store(table, index, new(old));
}

/// The same for its links.
fn relink(machine: &mut Machine, gpa: u64, index: usize, new: impl Fn(u64) -> u64) {
    let links = machine.mmu.pages[shadow_of(machine, gpa)].links;
    let old = machine.host.frames.load(links, index);
    machine.host.frames.store(links, index, new(old));
}

/// A guest that has used pages 0 (twice, by two addresses), 1 and 2 of its table, one of them for reading only, and a
/// device; and wrote its leaf table's own page never.
fn used() -> Machine {
    let mut machine = guest();
    machine.poke(PT + 8 * 2, 0x20_2000 | FLAGS & !bits::W);
    machine.poke(PT + 8 * 100, 0x20_0000 | FLAGS);
    machine.poke(PT + 8 * 101, 0xfee0_0000 | FLAGS);
    machine.poke(PT + 8 * 102, PT | FLAGS);
    machine.set_paging(machine.cpu.paging);
    for page in [0, 1, 100] {
        machine.access(Gva(TOP + page * 0x1000), WRITE);
    }
    for page in [2, 101, 102] {
        machine.access(Gva(TOP + page * 0x1000), READ);
    }
    // A block of 2 MiB, and the guest's own tables (at level 1, because they are tables).
    machine.access(Gva(0x40_0000), WRITE);
    machine.access(Gva(0x10_0000), WRITE);
    machine.audit();
    machine
}

#[test]
fn the_audit_finds_whatever_is_broken() {
    type Break = fn(&mut Machine);
    let broken: [(&str, Break); 19] = [
        ("maps only this guest's own frame", |m| change(m, PT, 1, |raw| raw ^ 0x20_0000_0000)),
        ("maps only this guest's own frame", |m| change(m, PT, 1, |raw| raw ^ 0x1000)),
        ("grants no more than the guest's entry", |m| change(m, PT, 2, |raw| raw | bits::W | bits::D)),
        ("grants no more than the guest's entry", |m| m.poke(PT + 8, m.peek(PT + 8) & !bits::U)),
        ("grants no more than the guest's entry", |m| m.poke(PT + 8, m.peek(PT + 8) | bits::NX)),
        ("grants no more than the guest's entry", |m| m.poke(PT + 8, m.peek(PT + 8) & !bits::D)),
        ("grants no more than the guest's entry", |m| m.poke(PT + 8, 0x20_3000 | FLAGS)),
        ("a table whose shadow is in sync", |m| change(m, PT, 102, |raw| raw | bits::W | bits::D)),
        ("a cached translation has A", |m| change(m, PT, 1, |raw| raw & !bits::A)),
        ("a cached translation has A, a writable one D", |m| change(m, PT, 1, |raw| raw & !bits::D)),
        ("the present map", |m| change(m, PT, 1, |_| 0)),
        ("an MMIO mark in sync", |m| m.poke(PT + 8 * 101, 0x20_0000 | FLAGS)),
        ("what stands for a device", |m| change(m, PD, 0, |_| MMIO)),
        ("a pointer in sync", |m| m.poke(PD, (PT + 0x1000) | FLAGS)),
        ("a pointer is on the parent list", |m| change(m, PD, 0, |_| spte::table(Pfn(1), false))),
        ("lists each leaf once", |m| relink(m, PT, 0, |_| 0)),
        ("lists each leaf once", |m| {
            // Off its list by both neighbours, which know nothing of it: a ring of one.
            let own = shadow_of(m, PT).0 << 9 | 1;
            relink(m, PT, 1, |_| u64::from(own) << 32 | u64::from(own));
        }),
        ("each block counts", |m| m.mmu.guest_blocks[1].tracked += 1),
        ("each unsync page", |m| {
            let id = shadow_of(m, PT);
            m.mmu.pages[id].unsync = 0;
        }),
    ];
    for (number, (invariant, break_it)) in broken.into_iter().enumerate() {
        let mut machine = used();
        break_it(&mut machine);
        let violation = machine.mmu.audit(&machine.host).expect_err("nothing was found");
        let text = violation.to_string();
        assert!(text.contains(invariant), "{number}: not `{invariant}`, but: {text}");
        // The counts that it takes apart are as they were.
        assert_eq!(machine.mmu.audit(&machine.host), Err(violation), "{number}");
    }
}

#[test]
fn the_audit_of_everything_finds_what_should_be_empty() {
    type Break = fn(&mut Machine);
    let broken: [(&str, Break); 4] = [
        ("the present map", |m| change(m, PT, 200, |_| 1)),
        ("leads to its first element", |m| {
            let first = m.mmu.guest_pages[512].sptes;
            m.mmu.guest_pages[513 + 50].sptes = first;
        }),
        ("on the chain of its gfn", |m| m.mmu.guest_pages[700].shadows = 200),
        ("either free or live", |m| {
            // A ring.
            let last = m.mmu.pages.capacity() - 1;
            m.mmu.pages[PageId(last)].chain = last;
        }),
    ];
    for (number, (invariant, break_it)) in broken.into_iter().enumerate() {
        let mut machine = used();
        let audited = machine.mmu.audit_all(&machine.host).unwrap();
        assert!(audited.pages >= 7 && audited.sptes >= 12, "{audited:?}");
        break_it(&mut machine);
        assert_eq!(machine.mmu.audit(&machine.host), Ok(()), "{number}: what is there is right");
        let text = machine.mmu.audit_all(&machine.host).expect_err("nothing was found").to_string();
        assert!(text.contains(invariant), "{number}: not `{invariant}`, but: {text}");
    }
}

/// It can run live: it looks at each spte a fixed number of times, however many aliases a page has.
#[test]
fn the_audit_takes_linear_time() {
    let mut machine = guest_on(Machine::new(BLOCKS, 256));
    let mut loads = Vec::new();
    for aliases in [50_u64, 200, 511] {
        for index in 0..aliases {
            machine.device_store(PT + 8 * index, 0x20_0000 | FLAGS);
        }
        machine.flush();
        machine.set_paging(machine.cpu.paging);
        for index in 0..aliases {
            machine.access(Gva(TOP + index * 0x1000), WRITE);
        }
        let before = machine.host.frames.loads.get();
        assert_eq!(machine.mmu.audit(&machine.host), Ok(()));
        loads.push(machine.host.frames.loads.get() - before);
    }
    assert!(loads[2] <= 5 * 560, "{loads:?}");
}

#[test]
fn no_code_is_fetched_from_the_page_that_stands_for_a_device() {
    let mut machine = guest();
    let (device, frame, gva) = (Gfn(0xfee00), Pfn(0x77), Gva(TOP + 101 * 0x1000));
    machine.device_store(PT + 8 * 101, 0xfee0_0000 | FLAGS);
    machine.mmu.set_device_page(&machine.host, Some((device, frame)));
    machine.set_paging(machine.cpu.paging);
    for (access, outcome) in [(READ, Fill::Filled), (FETCH, Fill::Mmio(device.address()))] {
        let found = walk::walk(&machine.cpu.paging, &machine.host.ram, gva, access).unwrap();
        machine.ready();
        assert_eq!(machine.mmu.fill(&machine.host, &machine.cpu, gva, access, &found), outcome);
        change(&mut machine, PT, 101, |raw| {
            assert_eq!((spte::decode(1, raw), raw & bits::NX), (Spte::Device(frame), bits::NX));
            raw
        });
    }
    assert_eq!(machine.mmu.audit(&machine.host), Ok(()));
    // Only what the guest's entry says is the device's page is mapped as it, and only that frame.
    machine.poke(PT + 8 * 101, 0xfee0_1000 | FLAGS);
    assert!(machine.mmu.audit(&machine.host).is_err());
    machine.poke(PT + 8 * 101, 0xfee0_0000 | FLAGS);
    change(&mut machine, PT, 101, |raw| raw + 0x1000);
    assert!(machine.mmu.audit(&machine.host).is_err());
}
