//! The page-fault exit.

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
}

impl Stuck {
    /// Notes the fault of exit number `exit`; true if there were too many.
    #[inline]
    fn again(&mut self, exit: u64, rip: u64, gva: u64) -> bool {
        let page = gva >> 12;
        // Any other exit in between is progress.
        let in_a_row = self.rip == rip && self.exit.wrapping_add(1) == exit;
        self.exit = exit;
        if !in_a_row {
            *self = Stuck { rip, pages: [page, u64::MAX, u64::MAX, u64::MAX], next: 1, times: 0, exit };
            return false;
        }
        if self.pages.contains(&page) {
            self.times += 1;
            return self.times > STUCK_AFTER;
        }
        self.pages[self.next % ADDRESSES] = page;
        self.next += 1;
        false
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
        if self.stuck.again(self.exits(), vmcs.read(fields::GUEST_RIP), gva.0) {
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
                Fill::Filled | Fill::Changed => return Next::Resume,
                Fill::Mmio(_) => {
                    core.writer.count(Event::Mmio);
                    if code.has(ErrorCode::RESERVED) {
                        core.writer.count(Event::MmioMarked);
                    }
                    return self.emulate_access(core, vmcs);
                }
                Fill::EmulateWrite(_) => return self.emulate_access(core, vmcs),
                Fill::Short => {
                    if self.guest.supply(core, self.mmu.paging.mode.shadow_is_pae()).is_err() {
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
