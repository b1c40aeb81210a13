//! Reclaim: what goes, in which order, and that nothing is lost.

use memory::{Gpa, Gva};

use super::guest::{TOP, guest};
use super::machine::{Landed, READ, WRITE};

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
    machine.release();
    assert_eq!(machine.host.allocated.get(), machine.host.freed.get());
}
