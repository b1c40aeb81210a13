//! What may not be stale any more: after INVLPG, after a CR3 write, after a flush.

use memory::{Gpa, Gva};

use super::guest::{FLAGS, PD, PDPT, PT, TOP, guest};
use crate::Paging;
use crate::model::machine::{Landed, READ, WRITE};

#[test]
fn a_write_to_a_table_is_seen_after_invlpg() {
    let mut machine = guest();
    machine.access(Gva(TOP), READ);
    machine.store(Gva(PT), 0x40_0000 | FLAGS);
    machine.audit();
    machine.invlpg(Gva(TOP));
    machine.audit();
    assert_eq!(machine.access(Gva(TOP), READ), Landed::Ram(Gpa(0x40_0000)));
}

#[test]
fn an_unsync_table_takes_writes_without_exits_until_the_flush() {
    let mut machine = guest();
    machine.access(Gva(TOP), READ);
    machine.store(Gva(PT), 0);
    let exits = machine.exits;
    for i in 1..512 {
        machine.store(Gva(PT + 8 * i), 0);
    }
    assert_eq!(machine.exits, exits);
    machine.flush();
    machine.audit();
    for i in 0..512 {
        assert!(matches!(machine.access(Gva(TOP + i * 0x1000), READ), Landed::Fault(_)));
    }
    machine.store(Gva(PT), 0x40_0000 | FLAGS);
    assert_eq!(machine.access(Gva(TOP), READ), Landed::Ram(Gpa(0x40_0000)));
}

#[test]
fn a_new_root_leads_to_no_stale_table() {
    let mut machine = guest();
    machine.access(Gva(TOP), READ);
    machine.access(Gva(0x5000), WRITE);
    // A root that shares both subtrees.
    machine.poke(0x1_a000, 0x1_1000 | FLAGS);
    machine.poke(0x1_a008, PDPT | FLAGS);
    machine.store(Gva(PT + 8), 0x40_0000 | FLAGS);
    machine.set_paging(Paging { cr3: 0x1_a000, ..machine.cpu.paging });
    assert_eq!(machine.access(Gva(TOP), READ), Landed::Ram(Gpa(0x20_0000)));
    assert_eq!(machine.access(Gva(TOP + 0x1000), READ), Landed::Ram(Gpa(0x40_0000)));
}

#[test]
fn an_old_root_leads_to_no_stale_table() {
    let mut machine = guest();
    let home = machine.cpu.paging;
    machine.access(Gva(TOP), READ);
    // Edited under another root, then back.
    machine.poke(0x1_a000, 0x1_1000 | FLAGS);
    machine.set_paging(Paging { cr3: 0x1_a000, ..home });
    machine.store(Gva(PT), 0x40_0000 | FLAGS);
    machine.set_paging(home);
    assert_eq!(machine.access(Gva(TOP), READ), Landed::Ram(Gpa(0x40_0000)));
    machine.audit();
}

#[test]
fn invlpg_of_any_address_brings_upper_tables_up_to_date() {
    // It empties the paging-structure caches, whatever its address.
    let mut machine = guest();
    let other = 0x1_9000;
    machine.poke(PT + 8 * 300, 0);
    for i in 0..512 {
        machine.poke(other + 8 * i, 0x60_0000 | FLAGS);
    }
    machine.poke(PD + 8, PT | FLAGS);
    machine.access(Gva(TOP), READ);
    machine.access(Gva(TOP + 0x20_0000), READ);
    machine.store(Gva(PD), other | FLAGS);
    machine.invlpg(Gva(0x5000));
    machine.store(Gva(PT + 8 * 300), 0x40_0000 | FLAGS);
    assert_eq!(machine.access(Gva(TOP + 0x20_0000 + 300 * 0x1000), READ), Landed::Ram(Gpa(0x40_0000)));
    let landed = machine.access(Gva(TOP + 300 * 0x1000), READ);
    assert_eq!(landed, Landed::Ram(Gpa(0x60_0000)), "it was never cached before the INVLPG");
}
