//! TLB tags and flush generations.

use memory::{Gpa, Gva};

use super::guest::{FLAGS, PML4, PT, TOP, guest};
use super::races::two_vcpus;
use crate::model::machine::{Landed, Machine, READ, WRITE};
use crate::{Flush, Paging, TAGS};

/// Root number `n`: shares the identity map of the guest, and maps page `n` of block 1 at `TOP`.
fn root(machine: &Machine, n: u64) -> Paging {
    let base = 0x2_0000 + n * 0x4000;
    machine.poke(base, machine.peek(PML4));
    machine.poke(base + 8, (base + 0x1000) | FLAGS);
    machine.poke(base + 0x1000, (base + 0x2000) | FLAGS);
    machine.poke(base + 0x2000, (base + 0x3000) | FLAGS);
    machine.poke(base + 0x3000, (0x20_0000 + n * 0x1000) | FLAGS);
    Paging { cr3: base, ..machine.cpu.paging }
}

/// Whether the tag that would be entered with now needs no flush.
fn good(machine: &Machine) -> bool {
    machine.cpu.is_good(machine.host.generation.get())
}

/// A guest that used two roots and runs on the second; the first.
fn on_the_second_of_two_roots() -> (Machine, Paging) {
    let mut machine = guest();
    let (a, b) = (root(&machine, 0), root(&machine, 1));
    for paging in [a, b] {
        machine.set_paging(paging);
        machine.access(Gva(TOP), READ);
    }
    (machine, a)
}

#[test]
fn h14_a_cached_root_keeps_its_tag_and_needs_no_flush() {
    let mut machine = guest();
    let (a, b) = (root(&machine, 0), root(&machine, 1));
    machine.set_paging(a);
    assert!(!good(&machine), "a new tag is flushed before its first use");
    machine.access(Gva(TOP), READ);
    let tag = machine.cpu.tag();
    machine.set_paging(b);
    assert_ne!(machine.cpu.tag(), tag);
    machine.access(Gva(TOP), READ);
    machine.set_paging(a);
    assert_eq!(machine.cpu.tag(), tag);
    assert!(good(&machine), "nothing was taken away meanwhile");
    assert_eq!(machine.access(Gva(TOP), READ), Landed::Ram(Gpa(0x20_0000)));
}

#[test]
fn h14_what_was_taken_away_meanwhile_is_flushed_from_every_tag() {
    let (mut machine, a) = on_the_second_of_two_roots();
    // The first root's table is edited under the second.
    machine.store(Gva(0x2_3000), 0x60_0000 | FLAGS);
    machine.set_paging(a);
    assert!(!good(&machine));
    assert_eq!(machine.access(Gva(TOP), READ), Landed::Ram(Gpa(0x60_0000)));
}

#[test]
fn h14_a_tag_that_changes_its_root_is_flushed() {
    let mut machine = guest();
    let roots: Vec<Paging> = (0..=TAGS as u64).map(|n| root(&machine, n)).collect();
    let mut tags = Vec::new();
    for (n, &paging) in roots.iter().enumerate() {
        machine.set_paging(paging);
        assert!(!good(&machine), "root {n}");
        let landed = machine.access(Gva(TOP), WRITE);
        assert_eq!(landed, Landed::Ram(Gpa(0x20_0000 + n as u64 * 0x1000)));
        tags.push(machine.cpu.tag());
    }
    // The guest's first root came before these, and then the least recently used ones had to go.
    assert_eq!(tags[TAGS], tags[0]);
    assert!(tags.iter().all(|&tag| tag < TAGS));
    machine.set_paging(roots[0]);
    assert_eq!(machine.cpu.tag(), tags[1], "least recently used");
    assert!(!good(&machine));
    assert_eq!(machine.access(Gva(TOP), WRITE), Landed::Ram(Gpa(0x20_0000)));
    // The one used just before it is still good.
    machine.set_paging(roots[TAGS]);
    assert_eq!(machine.access(Gva(TOP), WRITE), Landed::Ram(Gpa(0x20_0000 + TAGS as u64 * 0x1000)));
}

#[test]
fn h14_a_root_made_anew_does_not_inherit_a_tag() {
    let (mut machine, a) = on_the_second_of_two_roots();
    // The idle root goes; another one takes its descriptor, and its frames.
    machine.mmu.reclaim(&machine.host, 100);
    machine.set_paging(root(&machine, 2));
    assert!(!good(&machine));
    assert_eq!(machine.access(Gva(TOP), READ), Landed::Ram(Gpa(0x20_2000)));
    machine.set_paging(a);
    assert!(!good(&machine));
    assert_eq!(machine.access(Gva(TOP), READ), Landed::Ram(Gpa(0x20_0000)));
    machine.audit();
}

#[test]
fn h14_a_vcpu_that_moved_to_another_core_trusts_no_tag() {
    let mut machine = guest();
    let roots: Vec<Paging> = (0..4).map(|n| root(&machine, n)).collect();
    for &paging in &roots {
        machine.set_paging(paging);
        machine.access(Gva(TOP), READ);
    }
    machine.cpu.forget_tags();
    assert!(!good(&machine));
    for &paging in &roots {
        machine.cpu.paging = paging;
        machine.mmu.load_root(&machine.host, &mut machine.cpu, Flush::All).unwrap();
        assert!(!good(&machine));
        machine.access(Gva(TOP), READ);
        assert!(good(&machine));
    }
}

#[test]
fn h14_no_generation_is_good_before_the_first_flush() {
    let machine = guest();
    assert!(!machine.cpu.is_good(1));
    assert!(!crate::VcpuMmu::new(3).is_good(1));
}

#[test]
fn h14_a_root_on_two_vcpus_has_a_tag_of_each() {
    let mut machine = two_vcpus();
    let home = machine.cpu.paging;
    // The first vCPU uses some tags before, so that the two number the shared root differently.
    for n in 0..3 {
        machine.set_paging(root(&machine, n));
        machine.access(Gva(TOP), READ);
    }
    machine.set_paging(home);
    assert_eq!(machine.access(Gva(TOP), READ), Landed::Ram(Gpa(0x20_0000)));
    machine.next_vcpu();
    for n in [3, 4] {
        machine.set_paging(Paging { cr3: root(&machine, n).cr3, ..home });
        assert_eq!(machine.access(Gva(TOP), READ), Landed::Ram(Gpa(0x20_0000 + n * 0x1000)));
    }
    for _ in 0..4 {
        machine.set_paging(home);
        assert_eq!(machine.access(Gva(TOP), READ), Landed::Ram(Gpa(0x20_0000)));
        machine.set_paging(Paging { cr3: root(&machine, 1).cr3, ..home });
        assert_eq!(machine.access(Gva(TOP), READ), Landed::Ram(Gpa(0x20_1000)));
        machine.next_vcpu();
    }
    machine.audit();
}

/// A root remembers the tag of whoever loaded it last: the other vCPU must find its own all the same, or it would take a
/// new one, and flush it, at every change.
#[test]
fn a_vcpu_finds_its_tag_of_a_root_that_another_used_since() {
    let mut machine = two_vcpus();
    let home = machine.cpu.paging;
    let roots = [home, root(&machine, 0), root(&machine, 1)];
    let mut tags = [[0; 3]; 2];
    for round in 0..4 {
        for (vcpu, tags) in tags.iter_mut().enumerate() {
            // In different orders, so that the two number the roots differently.
            for n in [[0, 1, 2], [2, 0, 1]][vcpu] {
                machine.set_paging(Paging { cr3: roots[n].cr3, ..home });
                assert!(
                    round == 0 || good(&machine) && machine.cpu.tag() == tags[n],
                    "vCPU {vcpu}, root {n}"
                );
                machine.access(Gva(TOP), READ);
                tags[n] = machine.cpu.tag();
            }
            machine.next_vcpu();
        }
    }
    machine.audit();
}

#[test]
fn h14_what_one_vcpu_takes_away_both_flush() {
    let mut machine = two_vcpus();
    let paging = machine.cpu.paging;
    machine.access(Gva(TOP), WRITE);
    machine.next_vcpu();
    machine.set_paging(paging);
    machine.access(Gva(TOP), WRITE);
    // The second edits and flushes; then it kicks the first, which does INVLPG.
    machine.store(Gva(PT), 0x60_0000 | FLAGS);
    machine.invlpg(Gva(TOP));
    machine.next_vcpu();
    machine.invlpg(Gva(TOP));
    for _ in 0..2 {
        assert_eq!(machine.access(Gva(TOP), WRITE), Landed::Ram(Gpa(0x60_0000)));
        machine.next_vcpu();
    }
    // Reclaim, while both run on the root: they find their way again.
    machine.mmu.reclaim(&machine.host, 100);
    machine.release();
    for _ in 0..2 {
        assert_eq!(machine.access(Gva(TOP), WRITE), Landed::Ram(Gpa(0x60_0000)));
        machine.next_vcpu();
    }
    machine.audit();
}
