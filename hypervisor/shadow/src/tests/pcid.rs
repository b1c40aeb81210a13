//! PCIDs: what may stay stale over a MOV to CR3 with bit 63, and what may not.

use memory::{Gpa, Gva};

use super::guest::{FLAGS, PD, PML4, PT, TOP, guest};
use super::races::two_vcpus;
use crate::model::machine::{Landed, Machine, READ, WRITE};
use crate::{Flush, Paging, TAGS};

/// Each root's own leaf table, under its PML4 slot 2.
const OWN: u64 = 2 << 39;
/// A page that the entries of the tests lead to, and two others.
const OLD: u64 = 0x20_0000;
const NEW: u64 = 0x60_0000;
const NEWER: u64 = 0x60_1000;

/// The own leaf table of root `n`.
fn own_table(n: u64) -> u64 {
    0x2_3000 + n * 0x4000
}

/// Root `n`, which shares with the others the identity map and what lies at [`TOP`], run under `pcid`.
fn space(machine: &Machine, n: u64, pcid: u16) -> Paging {
    let base = own_table(n) - 0x3000;
    machine.poke(base, machine.peek(PML4));
    machine.poke(base + 8, machine.peek(PML4 + 8));
    machine.poke(base + 16, (base + 0x1000) | FLAGS);
    machine.poke(base + 0x1000, (base + 0x2000) | FLAGS);
    machine.poke(base + 0x2000, (base + 0x3000) | FLAGS);
    for i in 0..512 {
        machine.poke(base + 0x3000 + 8 * i, (OLD + i * 0x1000) | FLAGS);
    }
    Paging { cr3: base, pcid: Some(pcid), ..machine.cpu.paging }
}

/// A guest with two roots, each used under a PCID of its own; it runs on the first.
fn two_spaces() -> (Machine, Paging, Paging) {
    let mut machine = guest();
    let (a, b) = (space(&machine, 0, 1), space(&machine, 1, 2));
    for paging in [b, a] {
        machine.load(paging, Flush::Pcid);
        machine.access(Gva(TOP), READ);
        machine.access(Gva(OWN), READ);
    }
    (machine, a, b)
}

/// Where a read at `gva` lands.
fn read(machine: &mut Machine, gva: u64) -> u64 {
    match machine.access(Gva(gva), READ) {
        Landed::Ram(gpa) => gpa.0,
        other => panic!("{other:?}"),
    }
}

#[test]
fn without_a_flush_nothing_is_synced() {
    let (mut machine, a, b) = two_spaces();
    machine.load(b, Flush::Keep);
    machine.store(Gva(own_table(1)), NEW | FLAGS);
    machine.load(a, Flush::Keep);
    let before = machine.mmu.stats().syncs;
    for _ in 0..4 {
        machine.load(b, Flush::Keep);
        machine.load(a, Flush::Keep);
    }
    machine.load(b, Flush::Keep);
    assert_eq!(machine.mmu.stats().syncs, before);
    assert_eq!(read(&mut machine, OWN), OLD, "what the PCID had cached");
    machine.load(b, Flush::Pcid);
    assert_eq!(read(&mut machine, OWN), NEW);
    machine.audit();
}

#[test]
fn what_another_pcid_cached_does_not_show() {
    let (mut machine, _, b) = two_spaces();
    // The shared entry is new, used, and changed again while the second PCID is not the current one. (Spot 100 of
    // the table: no neighbour of what was used.)
    let (entry, gva) = (PT + 8 * 100, TOP + 0x64_000);
    machine.store(Gva(entry), NEW | FLAGS);
    assert_eq!(read(&mut machine, gva), NEW);
    machine.store(Gva(entry), NEWER | FLAGS);
    assert_eq!(read(&mut machine, gva), NEW, "not flushed yet");
    machine.load(b, Flush::Keep);
    assert_eq!(read(&mut machine, gva), NEWER);
    machine.audit();
}

/// Two vCPUs on one root. The first has left it, after the table at `behind` fell behind, for a root that shares
/// nothing of it; the second runs on it. Also returns what the first comes back to.
fn first_is_elsewhere(behind: u64) -> (Machine, Paging) {
    let mut machine = two_vcpus();
    let (a, b) = (space(&machine, 0, 1), space(&machine, 1, 2));
    machine.poke(a.cr3 + 8, 0);
    machine.next_vcpu();
    machine.load(Paging { pcid: Some(3), ..b }, Flush::Pcid);
    machine.access(Gva(TOP), READ);
    machine.next_vcpu();
    machine.load(b, Flush::Pcid);
    machine.access(Gva(TOP), READ);
    machine.store(Gva(behind), machine.peek(behind));
    machine.load(a, Flush::Pcid);
    // It has come back and seen that all is as it was, so that the next time it looks only if something was added.
    machine.load(b, Flush::Keep);
    machine.load(a, Flush::Pcid);
    machine.next_vcpu();
    assert_eq!(machine.mmu.unsync.len(), 1, "left as it is");
    (machine, b)
}

/// The first vCPU comes back without a flush.
fn back(machine: &mut Machine, b: Paging) {
    machine.next_vcpu();
    machine.load(b, Flush::Keep);
}

#[test]
fn what_another_vcpu_cached_does_not_show() {
    let (mut machine, b) = first_is_elsewhere(PT);
    let (entry, gva) = (PT + 8 * 100, TOP + 0x64_000);
    machine.store(Gva(entry), NEW | FLAGS);
    assert_eq!(read(&mut machine, gva), NEW);
    machine.store(Gva(entry), NEWER | FLAGS);
    back(&mut machine, b);
    assert_eq!(read(&mut machine, gva), NEWER);
    machine.audit();
}

#[test]
fn what_another_vcpu_linked_does_not_show() {
    let (mut machine, b) = first_is_elsewhere(PD);
    let gva = TOP + (7 << 21);
    for (table, page) in [(0x6_0000, NEW), (0x6_1000, NEWER)] {
        machine.poke(table, page | FLAGS);
    }
    machine.store(Gva(PD + 8 * 7), 0x6_0000 | FLAGS);
    assert_eq!(read(&mut machine, gva), NEW);
    machine.store(Gva(PD + 8 * 7), 0x6_1000 | FLAGS);
    assert_eq!(read(&mut machine, gva), NEW, "not flushed yet");
    back(&mut machine, b);
    assert_eq!(read(&mut machine, gva), NEWER);
    machine.audit();
}

#[test]
fn what_another_vcpus_invlpg_brought_in_does_not_show() {
    let (mut machine, b) = first_is_elsewhere(PT);
    machine.store(Gva(PT), NEW | FLAGS);
    machine.invlpg(Gva(TOP));
    machine.store(Gva(PT), NEWER | FLAGS);
    back(&mut machine, b);
    assert_eq!(read(&mut machine, TOP), NEWER);
    machine.audit();
}

#[test]
fn what_one_pcid_cached_another_does_not_show_after_a_third() {
    let (mut machine, a, b) = two_spaces();
    machine.load(b, Flush::Keep);
    machine.store(Gva(own_table(1)), NEW | FLAGS);
    machine.load(a, Flush::Keep);
    machine.load(Paging { pcid: Some(5), ..b }, Flush::Keep);
    assert_eq!(read(&mut machine, OWN), NEW);
}

#[test]
fn one_root_under_two_pcids_is_synced_when_the_pcid_changes() {
    let (mut machine, a, _) = two_spaces();
    machine.store(Gva(own_table(0)), NEW | FLAGS);
    assert_eq!(read(&mut machine, OWN), OLD);
    machine.load(Paging { pcid: Some(3), ..a }, Flush::Keep);
    assert_eq!(read(&mut machine, OWN), NEW);
    machine.store(Gva(own_table(0)), NEWER | FLAGS);
    machine.load(a, Flush::Keep);
    assert_eq!(read(&mut machine, OWN), NEWER, "the third PCID's");
    machine.load(a, Flush::Keep);
    machine.store(Gva(own_table(0)), OLD | FLAGS);
    machine.load(a, Flush::Keep);
    assert_eq!(read(&mut machine, OWN), NEWER, "the same PCID keeps it");
}

/// Leaves the second root with a stale entry, does `flush` under the first, and comes back without one.
fn stale_after(flush: impl FnOnce(&mut Machine, Paging, Paging)) -> bool {
    let (mut machine, a, b) = two_spaces();
    machine.load(b, Flush::Keep);
    machine.store(Gva(own_table(1)), NEW | FLAGS);
    machine.load(a, Flush::Keep);
    flush(&mut machine, a, b);
    machine.load(b, Flush::Keep);
    machine.audit();
    match read(&mut machine, OWN) {
        OLD => true,
        NEW => false,
        other => panic!("{other:#x}"),
    }
}

#[test]
fn flushes_reach_the_pcids_that_they_name() {
    assert!(stale_after(|_, _, _| {}));
    assert!(stale_after(|m, _, _| m.mmu.flush_pcid(&m.host, &mut m.cpu, 1)));
    assert!(!stale_after(|m, _, _| m.mmu.flush_pcid(&m.host, &mut m.cpu, 2)));
    assert!(stale_after(|m, _, _| m.mmu.flush_address(&m.host, &mut m.cpu, 1, Gva(OWN))));
    assert!(!stale_after(|m, _, _| m.mmu.flush_address(&m.host, &mut m.cpu, 2, Gva(OWN))));
    assert!(!stale_after(|m, _, _| m.flush()));
    assert!(!stale_after(|m, _, _| m.invlpg(Gva(OWN))), "it may have been a global one");
    assert!(stale_after(|m, a, _| m.load(a, Flush::Pcid)));
    assert!(!stale_after(|m, a, _| m.load(a, Flush::All)));
    assert!(!stale_after(|m, a, _| m.load(Paging { pcid: Some(2), ..a }, Flush::Pcid)), "of the same PCID");
    assert!(stale_after(|m, a, _| m.load(Paging { pcid: Some(3), ..a }, Flush::Pcid)));
    assert!(!stale_after(|m, a, _| m.load(Paging { wp: false, pcid: None, ..a }, Flush::All)));
}

#[test]
fn invlpg_reaches_what_falls_behind_after_it() {
    let (mut machine, _, b) = two_spaces();
    // Nothing is behind. A global translation of the second root goes; then its entry changes.
    machine.invlpg(Gva(OWN));
    machine.store(Gva(own_table(1)), NEW | FLAGS);
    machine.load(b, Flush::Keep);
    assert_eq!(read(&mut machine, OWN), NEW);
}

#[test]
fn flushes_of_the_present_pcid_work_at_once() {
    let flushes: [fn(&mut Machine); 4] = [
        |m| m.mmu.flush_pcid(&m.host, &mut m.cpu, 1),
        |m| m.mmu.flush_address(&m.host, &mut m.cpu, 1, Gva(OWN)),
        |m| m.mmu.flush(&m.host, &mut m.cpu),
        |m| m.invlpg(Gva(OWN)),
    ];
    for flush in flushes {
        let (mut machine, _, _) = two_spaces();
        machine.store(Gva(own_table(0)), NEW | FLAGS);
        machine.mmu.flush_pcid(&machine.host, &mut machine.cpu, 2);
        machine.mmu.flush_address(&machine.host, &mut machine.cpu, 2, Gva(OWN));
        assert_eq!(read(&mut machine, OWN), OLD);
        flush(&mut machine);
        assert_eq!(read(&mut machine, OWN), NEW);
        machine.audit();
    }
}

#[test]
fn without_pcids_the_one_context_is_number_0() {
    let mut machine = guest();
    machine.access(Gva(TOP), READ);
    for flush in [0, 1] {
        machine.store(Gva(PT), (NEW + flush * 0x1000) | FLAGS);
        if flush == 0 {
            machine.mmu.flush_address(&machine.host, &mut machine.cpu, 0, Gva(TOP));
        } else {
            machine.mmu.flush_pcid(&machine.host, &mut machine.cpu, 0);
        }
        assert_eq!(read(&mut machine, TOP), NEW + flush * 0x1000);
    }
}

#[test]
fn a_flush_of_a_pcid_reaches_all_roots_that_ran_under_it() {
    let (mut machine, a, b) = two_spaces();
    let c = space(&machine, 2, 2);
    machine.load(c, Flush::Pcid);
    machine.access(Gva(OWN), READ);
    machine.store(Gva(own_table(2)), NEW | FLAGS);
    machine.load(b, Flush::Keep);
    machine.store(Gva(own_table(1)), NEW | FLAGS);
    machine.load(a, Flush::Keep);
    machine.mmu.flush_pcid(&machine.host, &mut machine.cpu, 2);
    for paging in [b, c] {
        machine.load(paging, Flush::Keep);
        assert_eq!(read(&mut machine, OWN), NEW);
    }
}

#[test]
fn a_tag_that_changed_its_root_keeps_nothing() {
    let (mut machine, a, b) = two_spaces();
    machine.store(Gva(own_table(1)), NEW | FLAGS);
    for n in 2..2 + TAGS as u64 {
        let other = space(&machine, n, 2);
        machine.load(other, Flush::Keep);
        assert_eq!(read(&mut machine, OWN), OLD);
    }
    machine.load(b, Flush::Keep);
    assert_eq!(read(&mut machine, OWN), NEW);
    machine.load(a, Flush::Keep);
    machine.audit();
}

#[test]
fn a_root_made_anew_keeps_nothing() {
    let (mut machine, a, b) = two_spaces();
    machine.load(b, Flush::Keep);
    machine.store(Gva(own_table(1)), NEW | FLAGS);
    machine.load(a, Flush::Keep);
    machine.mmu.reclaim(&machine.host, 100);
    machine.load(b, Flush::Keep);
    assert_eq!(read(&mut machine, OWN), NEW);
    machine.audit();
}

#[test]
fn a_vcpu_that_moved_keeps_what_is_stale_and_flushes_its_tags() {
    let (mut machine, a, b) = two_spaces();
    machine.load(b, Flush::Keep);
    machine.store(Gva(own_table(1)), NEW | FLAGS);
    machine.load(a, Flush::Keep);
    machine.cpu.forget_tags();
    machine.cpu.paging = b;
    machine.mmu.load_root(&machine.host, &mut machine.cpu, Flush::Keep).unwrap();
    assert!(!machine.cpu.is_good(machine.host.generation.get()));
    assert_eq!(read(&mut machine, OWN), OLD);
    machine.load(b, Flush::Pcid);
    assert_eq!(read(&mut machine, OWN), NEW);
}

#[test]
fn too_much_that_is_behind_is_synced_all_the_same() {
    let (mut machine, a, b) = two_spaces();
    machine.load(b, Flush::Keep);
    // Forty leaf tables of the second root, each used and then behind.
    let directory = own_table(1) - 0x1000;
    for n in 1..41 {
        let table = 0x8_0000 + n * 0x1000;
        machine.poke(table, OLD | FLAGS);
        machine.store(Gva(directory + 8 * n), table | FLAGS);
        assert_eq!(read(&mut machine, OWN + (n << 21)), OLD);
        machine.store(Gva(table), NEW | FLAGS);
    }
    machine.load(a, Flush::Keep);
    machine.load(b, Flush::Keep);
    assert!(machine.mmu.unsync.len() <= 33, "{}", machine.mmu.unsync.len());
    machine.audit();
}

#[test]
fn a_write_that_nobody_flushed_is_never_lost() {
    let (mut machine, a, b) = two_spaces();
    for round in 0..6_u64 {
        let (here, table) = if round & 1 == 0 { (b, 1) } else { (a, 0) };
        machine.load(here, Flush::Keep);
        let entry = own_table(table) + 8 * (64 + round);
        machine.store(Gva(entry), NEW | FLAGS);
        assert_eq!(machine.peek(entry), NEW | FLAGS);
        machine.invlpg(Gva(OWN + (64 + round) * 0x1000));
        assert_eq!(machine.access(Gva(OWN + (64 + round) * 0x1000), WRITE), Landed::Ram(Gpa(NEW)));
        machine.audit();
    }
}
