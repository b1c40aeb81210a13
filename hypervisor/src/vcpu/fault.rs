//! The page-fault exit.

use core::sync::atomic::Ordering;

use machine::cpu::event::Exception;
use memory::{Event, Gpa, Gva};
use shadow::{Access, ErrorCode, Fill, Kind, walk};

use super::{Next, Vcpu};
use crate::schedule::Core;
use crate::vmx::fields;
use crate::vmx::vmcs::CurrentVmcs;

/// Faults in a row of one instruction, at addresses that it faulted at before, after which the guest is taken for
/// stuck (H27). A legitimate instruction needs a few: its own page, its operands, a split, a table gone unsync.
const STUCK_AFTER: u32 = 500;
/// Faults in a row after which an access that AC excused from SMAP is taken for an implicit one, to a descriptor table
/// or a TSS, which AC does not excuse (SDM Vol. 3, "Access Rights"): an exit does not tell the two apart, but the
/// processor keeps refusing what the fill has made. One that AC does excuse faults once or twice.
const IMPLICIT_AFTER: u32 = 8;
/// Addresses that one instruction can touch, and more: two that keep evicting each other are found too.
const ADDRESSES: usize = 4;

/// Tells a guest that makes no progress.
#[derive(Debug, Default)]
pub(crate) struct Stuck {
    rip: u64,
    pages: [u64; ADDRESSES],
    next: usize,
    times: u32,
    /// The number of the last exit that was such a fault.
    exit: u64,
    /// The guest's flush generation after it was dealt with.
    generation: u64,
}

impl Stuck {
    /// Notes the fault of exit number `exit` at `rip`, at flush generation `generation`. Returns how often in a row this
    /// instruction has faulted at pages that it had faulted at before.
    #[inline]
    fn again(&mut self, exit: u64, rip: u64, gva: u64, generation: u64) -> u32 {
        let page = gva >> 12;
        // Any other exit in between is progress.
        let in_a_row = self.rip == rip && self.exit.wrapping_add(1) == exit;
        self.exit = exit;
        if !in_a_row {
            let pages = [page, u64::MAX, u64::MAX, u64::MAX];
            *self = Stuck { rip, pages, next: 1, times: 0, exit, generation };
            return 0;
        }
        if self.generation != generation {
            // Another vCPU, or reclaim, took something away since: that may be why it faults again. (A loop of one
            // instruction that writes a page table which another vCPU keeps flushing looks like this for ever.)
            return 0;
        }
        if self.pages.contains(&page) {
            self.times += 1;
        } else {
            self.pages[self.next % ADDRESSES] = page;
            self.next += 1;
        }
        self.times
    }

    /// The instruction has been carried out.
    fn forget(&mut self) {
        *self = Stuck::default();
    }
}

impl Vcpu {
    /// What the hardware's error code and the guest's state say of the access.
    #[inline]
    fn access(&self, vmcs: &CurrentVmcs, code: ErrorCode) -> Access {
        let user = code.has(ErrorCode::USER);
        // Only an explicit access can be excused by AC; one at CPL 3 that is not a user access is implicit.
        let smap_overridden = self.mmu.paging.smap
            && !user
            && vmcs.read(fields::GUEST_RFLAGS) & 1 << 18 != 0
            && vmcs.read(fields::GUEST_SS_ACCESS_RIGHTS) >> 5 & 3 != 3;
        Access { kind: code.kind(), user, smap_overridden }
    }

    pub(crate) fn page_fault(&mut self, core: &Core, vmcs: &CurrentVmcs) -> Next {
        let gva = Gva(vmcs.read(fields::EXIT_QUALIFICATION));
        let code = ErrorCode(vmcs.read(fields::EXIT_INTERRUPTION_ERROR_CODE));
        let access = self.access(vmcs, code);
        // The mark says that this was no RAM when it was made, and the translation that it is none now.
        let is_device = |gfn| code.has(ErrorCode::RESERVED) && self.guest.ram.slots.pfn(gfn).is_none();
        if self.recent.find(gva, access).is_some_and(is_device) {
            return self.marked(core, vmcs);
        }
        let result = walk::walk(&self.mmu.paging, &self.guest.ram, gva, access);
        let found = match &result {
            Ok(found) if is_device(found.gfn) => {
                self.recent.note(gva, access, found.gfn);
                return self.marked(core, vmcs);
            }
            Ok(found) => found,
            Err(fault) => {
                core.writer.count(Event::FaultGuest);
                let exception = Exception::page_fault(fault.code.0, fault.address.0);
                return self.fault(core, vmcs, exception);
            }
        };
        core.writer.count(Event::FaultShadow);
        let generation = self.guest.generation.load(Ordering::Relaxed);
        let times = self.stuck.again(self.exits(), vmcs.read(fields::GUEST_RIP), gva.0, generation);
        if times > IMPLICIT_AFTER && access.smap_overridden {
            let implicit = Access { smap_overridden: false, ..access };
            if let Err(fault) = walk::walk(&self.mmu.paging, &self.guest.ram, gva, implicit) {
                let exception = Exception::page_fault(fault.code.0, fault.address.0);
                return self.fault(core, vmcs, exception);
            }
        }
        if times > STUCK_AFTER {
            return Next::Leave(self.stop(
                core,
                vmcs,
                &format_args!(
                    "no progress: its accesses to {gva} and near it faulted {STUCK_AFTER} times in a row"
                ),
            ));
        }
        loop {
            let host = self.guest.surroundings(core);
            let outcome = self.guest.mmu.lock().fill(&host, &self.mmu, gva, access, found);
            match outcome {
                Fill::Filled | Fill::Changed => {
                    self.stuck.generation = self.guest.generation.load(Ordering::Relaxed);
                    return Next::Resume;
                }
                Fill::Mmio(_) => {
                    core.writer.count(Event::Mmio);
                    if code.has(ErrorCode::RESERVED) {
                        core.writer.count(Event::MmioMarked);
                    }
                    return self.emulate_access(core, vmcs);
                }
                Fill::EmulateWrite(_) => return self.emulate_access(core, vmcs),
                Fill::Short => {
                    // A fill makes no root: any frame will do.
                    if self.guest.supply(core, false).is_err() {
                        return self.starved(core, vmcs);
                    }
                }
            }
        }
    }

    /// An access to device memory, known by its mark.
    fn marked(&mut self, core: &Core, vmcs: &CurrentVmcs) -> Next {
        core.writer.count(Event::FaultShadow);
        core.writer.count(Event::Mmio);
        core.writer.count(Event::MmioMarked);
        self.emulate_access(core, vmcs)
    }

    /// The access cannot go through the shadow: its instruction is carried out by the emulator.
    pub(super) fn emulate_access(&mut self, core: &Core, vmcs: &CurrentVmcs) -> Next {
        if self.event.is_some() {
            // The access is not the instruction's but the event's, and no emulator delivers events here.
            return Next::Leave(self.stop(
                core,
                vmcs,
                &"the delivery of an event touches device memory: its IDT, TSS or stack is no RAM",
            ));
        }
        self.stuck.forget();
        self.emulate(core, vmcs)
    }

    /// Translates `gva` for an access that the emulator makes on the guest's behalf.
    ///
    /// # Errors
    /// The guest's page fault.
    pub(crate) fn translate(
        &self,
        gva: Gva,
        kind: Kind,
        user: bool,
        alignment_check: bool,
    ) -> Result<Gpa, Exception> {
        let access = Access { kind, user, smap_overridden: !user && alignment_check };
        if let Some(gfn) = self.recent.find(gva, access) {
            return Ok(Gpa(gfn.address().0 | gva.offset()));
        }
        match walk::walk(&self.mmu.paging, &self.guest.ram, gva, access) {
            Ok(found) => {
                self.recent.note(gva, access, found.gfn);
                Ok(Gpa(found.gfn.address().0 | gva.offset()))
            }
            Err(fault) => Err(Exception::page_fault(fault.code.0, fault.address.0)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Faults of one instruction, exit by exit, at each of `pages` in turn; the number of the one that is too many.
    fn stuck_at(pages: &[u64], between: u64) -> Option<u32> {
        let mut stuck = Stuck::default();
        let turns = pages.iter().cycle().zip(1..10_000);
        turns
            .map(|(page, fault)| {
                (fault, stuck.again(u64::from(fault) * between, 0x1000, page << 12 | 0x123, 0))
            })
            .find_map(|(fault, times)| (times > STUCK_AFTER).then_some(fault))
    }

    #[test]
    fn h27_an_instruction_that_faults_for_ever_is_found() {
        assert_eq!(stuck_at(&[7], 1), Some(STUCK_AFTER + 2));
        // Two that evict each other's translation, and as many as are kept apart.
        assert_eq!(stuck_at(&[7, 8], 1), Some(STUCK_AFTER + 3));
        assert_eq!(stuck_at(&[7, 8, 9, 10], 1), Some(STUCK_AFTER + 5));
    }

    #[test]
    fn h27_progress_is_not_taken_for_a_loop() {
        // Another exit in between each time.
        assert_eq!(stuck_at(&[7], 2), None);
        // A long string instruction goes on to new pages.
        let mut stuck = Stuck::default();
        assert!((1..10_000).all(|exit| stuck.again(exit, 0x1000, exit << 12, 0) == 0));
        // A loop of two instructions.
        assert!((1..10_000).all(|exit| stuck.again(exit, 0x1000 + exit % 2, 7 << 12, 0) == 0));
        // Another vCPU takes its translation away each time.
        let mut stuck = Stuck::default();
        assert!((1..10_000).all(|exit| stuck.again(exit, 0x1000, 7 << 12, exit) == 0));
        // What was emulated has been carried out.
        let mut stuck = Stuck::default();
        for exit in 1..10_000 {
            assert!(stuck.again(exit, 0x1000, 7 << 12, 0) < STUCK_AFTER);
            if exit % 400 == 0 {
                stuck.forget();
            }
        }
    }
}
