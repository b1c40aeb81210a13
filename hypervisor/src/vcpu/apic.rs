//! The local APIC's page, served by the processor where it can: an access to the APIC-access page exits by itself, and
//! the task priority, there and in CR8, is a byte of the virtual-APIC page that the guest reads and writes without an
//! exit (SDM Vol. 3, "APIC Virtualization and Virtual Interrupts"). Where it cannot, the page is marked as device
//! memory, and CR8 exits.

use core::sync::atomic::{AtomicU8, Ordering};

use machine::cpu::exit::{ApicAccess, ApicAccessKind};
use machine::device::LAPIC_BASE;
use machine::device::lapic::Access;
use memory::{Claim, Event, Hpa, Owner, Pfn};
use spin::Once;

use super::{Next, Vcpu};
use crate::host::{direct, frames};
use crate::schedule::Core;
use crate::vmx::controls::{Controls, PrimaryControls, SecondaryControls};
use crate::vmx::fields;
use crate::vmx::vmcs::CurrentVmcs;

/// Where the task priority is in the virtual-APIC page, in bytes.
const TASK_PRIORITY: usize = 0x80;

/// The APIC-access page: one for all guests, whose accesses never reach it.
static ACCESS_PAGE: Once<Option<Pfn>> = Once::new();

/// There is no frame left.
#[derive(Debug)]
pub(crate) struct NoFrame;

/// The pages of one vCPU.
pub(crate) struct ApicPages {
    access: Pfn,
    virtual_apic: Hpa,
    /// The task priority that both sides knew last.
    known: u8,
}

/// The APIC-access page of all vCPUs, where `controls` has the features; taken when it is first asked for, and for good.
pub(super) fn access_page(controls: &Controls) -> Option<Pfn> {
    let able = controls.primary.contains(PrimaryControls::USE_TPR_SHADOW)
        && controls.secondary.contains(SecondaryControls::VIRTUALIZE_APIC_ACCESSES);
    if able { *ACCESS_PAGE.call_once(page) } else { None }
}

fn page() -> Option<Pfn> {
    frames::allocator().alloc(0, Owner::Hypervisor, Claim::Begun)
}

impl ApicPages {
    /// Takes the pages, where `controls` has the features; else takes the features out of `controls`. The same for all
    /// vCPUs: one without the features would reach the access page itself.
    ///
    /// # Errors
    /// No frame is left.
    pub fn new(controls: &mut Controls) -> Result<Option<ApicPages>, NoFrame> {
        let Some(access) = access_page(controls) else {
            controls.primary.remove(PrimaryControls::USE_TPR_SHADOW);
            controls.primary.insert(PrimaryControls::CR8_LOAD_EXITING | PrimaryControls::CR8_STORE_EXITING);
            controls.secondary.remove(SecondaryControls::VIRTUALIZE_APIC_ACCESSES);
            return Ok(None);
        };
        let virtual_apic = page().ok_or(NoFrame)?.address();
        // SAFETY: the frame is ours alone.
        unsafe { core::ptr::write_bytes(direct(virtual_apic), 0, 4096) };
        Ok(Some(ApicPages { access, virtual_apic, known: 0 }))
    }

    /// Gives the virtual-APIC page back.
    pub fn dispose(&self, core: usize) {
        if let Err(error) = frames::allocator().free(core, self.virtual_apic.page(), Owner::Hypervisor) {
            panic!("{error}");
        }
    }

    /// Names the pages in the VMCS.
    pub fn write(&self, vmcs: &CurrentVmcs) {
        vmcs.write(fields::APIC_ACCESS_ADDRESS, self.access.address().0);
        vmcs.write(fields::VIRTUAL_APIC_ADDRESS, self.virtual_apic.0);
        vmcs.write(fields::TPR_THRESHOLD, 0);
    }

    fn task_priority(&self) -> &AtomicU8 {
        // SAFETY: inside the page.
        let byte = unsafe { direct(self.virtual_apic).add(TASK_PRIORITY) };
        // SAFETY: mapped while the vCPU lives; only the processor in guest mode writes it beside us.
        unsafe { AtomicU8::from_ptr(byte) }
    }
}

impl Vcpu {
    /// Tells the shadow MMU where the guest has its local APICs' pages, if the processor is to serve them there. All
    /// vCPUs share the tables: it serves them while all have theirs at the usual place. (One that has moved its own
    /// meanwhile exits there all the same, and is told by the devices that nothing is there.)
    pub(crate) fn place_apic_page(&mut self, core: &Core) {
        let Some(apic) = &self.apic else { return };
        let usual = {
            let devices = self.guest.devices.lock();
            let mut all = 0..self.guest.vcpus.len();
            all.all(|vcpu| devices.lapic_access(vcpu) == Access::Page(LAPIC_BASE.0))
        };
        let page = usual.then_some((LAPIC_BASE.page(), apic.access));
        let host = self.guest.surroundings(core);
        self.guest.mmu.lock().set_device_page(&host, page);
    }

    /// The guest may have changed its task priority without an exit: the devices hear of it before they are asked or
    /// changed.
    #[inline]
    pub(crate) fn take_task_priority(&mut self) {
        let Some(apic) = &mut self.apic else { return };
        let now = apic.task_priority().load(Ordering::Relaxed);
        if now != apic.known {
            apic.known = now;
            // Concerns nobody else: who took the lowest priority has it already.
            self.guest.devices.lock().set_tpr(self.index, now);
        }
    }

    /// The devices' task priority becomes the one that the guest reads, and the processor exits as soon as the guest
    /// lowers it far enough for what waits.
    pub(crate) fn give_task_priority(&mut self, vmcs: &CurrentVmcs) {
        let Some(apic) = &mut self.apic else { return };
        let (now, threshold) = {
            let devices = self.guest.devices.lock();
            (devices.tpr(self.index), devices.tpr_threshold(self.index))
        };
        if now != apic.known {
            apic.known = now;
            apic.task_priority().store(now, Ordering::Relaxed);
        }
        vmcs.write(fields::TPR_THRESHOLD, threshold.into());
    }

    /// An access to the APIC-access page: the emulator carries it out.
    #[inline(never)]
    pub(crate) fn apic_access(&mut self, core: &Core, vmcs: &CurrentVmcs) -> Next {
        self.keep_interrupted_event(vmcs);
        core.writer.count(Event::Mmio);
        let access = ApicAccess::from_qualification(vmcs.read(fields::EXIT_QUALIFICATION));
        if access.kind == ApicAccessKind::Fetch {
            return Next::Leave(self.stop(core, vmcs, &"it executes its local APIC's registers"));
        }
        self.emulate_access(core, vmcs)
    }
}
