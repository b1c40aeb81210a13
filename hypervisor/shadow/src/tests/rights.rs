//! Rights: modes x entries x control bits x accesses.

use memory::{Gpa, Gva};

use super::guest::{FLAGS, PT, TOP, guest};
use super::machine::{Landed, READ, WRITE, by_user};
use crate::Paging;
use crate::paging::bits;

#[test]
fn a_supervisor_write_under_wp_0_takes_the_page_from_the_user() {
    let mut machine = guest();
    machine.poke(PT, 0x20_0000 | (FLAGS & !bits::W));
    machine.set_paging(Paging { wp: false, ..machine.cpu.paging });
    assert_eq!(machine.access(Gva(TOP), WRITE), Landed::Ram(Gpa(0x20_0000)));
    assert!(matches!(machine.access(Gva(TOP), by_user(WRITE)), Landed::Fault(_)));
    assert_eq!(machine.access(Gva(TOP), by_user(READ)), Landed::Ram(Gpa(0x20_0000)));
    machine.audit();
}
