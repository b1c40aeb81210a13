//! Events on their way into the guest: what was interrupted, what is raised, what waits.

use machine::cpu::control::Efer;
use machine::cpu::event::{
    Delivery, Exception, Injection, Interruptibility, PendingEvent, RFLAGS_RESUME, RFLAGS_TRAP, Waiting,
    choose, combine, pending_debug_after_instruction,
};
use machine::cpu::exit::{InterruptionInfo, InterruptionType};
use machine::device::Requests;
use memory::Event;

use super::{Next, Vcpu};
use crate::schedule::Core;
use crate::vmx::controls::{Feature, PrimaryControls};
use crate::vmx::entry::write_cr2;
use crate::vmx::fields;
use crate::vmx::vmcs::CurrentVmcs;

impl Vcpu {
    /// An exit in the middle of an event's delivery: the event is delivered again, unless the exit's handler puts
    /// something else in its place.
    #[inline]
    pub(crate) fn keep_interrupted_event(&mut self, vmcs: &CurrentVmcs) {
        let info = InterruptionInfo(vmcs.read(fields::IDT_VECTORING_INFO));
        if info.valid() {
            self.event = PendingEvent::from_vectoring(
                info,
                vmcs.read(fields::IDT_VECTORING_ERROR_CODE),
                vmcs.read(fields::EXIT_INSTRUCTION_LENGTH),
            );
            self.attend();
        }
    }

    /// An IRET that faulted had already ended NMI blocking, and must not have.
    pub(crate) fn restore_nmi_blocking(&self, vmcs: &CurrentVmcs, info: InterruptionInfo) {
        if info.nmi_unblocking_due_to_iret() {
            let state = Interruptibility::from_bits_retain(vmcs.read(fields::GUEST_INTERRUPTIBILITY));
            let state = state.after_fault_exit(info, self.event.is_some());
            vmcs.write(fields::GUEST_INTERRUPTIBILITY, state.bits());
        }
    }

    /// The guest's own fault, at the present instruction or in the delivery of the present event.
    pub(crate) fn fault(&mut self, core: &Core, vmcs: &CurrentVmcs, exception: Exception) -> Next {
        match combine(self.event.take(), exception) {
            Delivery::Inject { event, postponed } => {
                match postponed {
                    Some(postponed) if postponed.kind == InterruptionType::Nmi => self.nmi = true,
                    Some(postponed) => self.postponed = Some(postponed),
                    None => {}
                }
                if postponed.is_some() {
                    self.attend();
                }
                // Nothing comes before it: it goes in without a look at what else waits.
                let state = Interruptibility::from_bits_retain(vmcs.read(fields::GUEST_INTERRUPTIBILITY));
                inject(core, vmcs, &event, state);
                Next::Resume
            }
            Delivery::TripleFault => Next::Leave(self.stop(
                core,
                vmcs,
                &"triple fault: an exception while delivering a double fault",
            )),
        }
    }

    /// A fault that an intercepted instruction raises: no event is in delivery then. Its handler finds RF set, which
    /// the exit has cleared (SDM Vol. 3, "Saving RIP, RSP, RFLAGS, and SSP").
    pub(crate) fn raise(&mut self, vmcs: &CurrentVmcs, exception: Exception) -> Next {
        vmcs.write(fields::GUEST_RFLAGS, vmcs.read(fields::GUEST_RFLAGS) | RFLAGS_RESUME);
        self.event = Some(exception.into());
        self.attend();
        Next::Resume
    }

    /// Moves on by `length` bytes from `rip`, as an instruction does that has been carried out.
    #[inline(always)]
    pub(crate) fn advance(&mut self, vmcs: &CurrentVmcs, rip: u64, length: u64) {
        let mut rip = rip.wrapping_add(length);
        if !self.control.efer.contains(Efer::LMA) {
            rip &= 0xffff_ffff;
        }
        vmcs.write(fields::GUEST_RIP, rip);
        self.end_instruction(vmcs, RFLAGS_TRAP | RFLAGS_RESUME);
    }

    /// What the end of an instruction that the emulator has carried out brings with it; RIP and RFLAGS.RF it has
    /// seen to itself.
    #[inline(always)]
    pub(crate) fn instruction_done(&mut self, vmcs: &CurrentVmcs) {
        self.end_instruction(vmcs, RFLAGS_TRAP);
    }

    /// Ends blocking by STI and MOV SS, and looks at RFLAGS if a bit of `watched` is set: one test for TF and RF,
    /// so that the CPUID path pays nothing for the clearing of RF.
    #[inline(always)]
    fn end_instruction(&mut self, vmcs: &CurrentVmcs, watched: u64) {
        let state = vmcs.read(fields::GUEST_INTERRUPTIBILITY);
        if state & Interruptibility::ONE_INSTRUCTION.bits() != 0 {
            self.end_blocking(vmcs, state);
        }
        let rflags = vmcs.read(fields::GUEST_RFLAGS);
        if rflags & watched != 0 {
            end_flags(vmcs, rflags, rflags & watched & RFLAGS_RESUME);
        }
    }

    #[cold]
    fn end_blocking(&mut self, vmcs: &CurrentVmcs, state: u32) {
        let state = Interruptibility::from_bits_retain(state).after_instruction();
        vmcs.write(fields::GUEST_INTERRUPTIBILITY, state.bits());
        self.attend();
    }

    /// What was to be injected and has not been, because the entry was given up or not made, comes first in the
    /// next one.
    #[inline]
    pub(crate) fn take_back_event(&mut self, vmcs: &CurrentVmcs) {
        let info = InterruptionInfo(vmcs.read(fields::ENTRY_INTERRUPTION_INFO));
        if info.valid() {
            // CR2, if it belongs to the event, is loaded already.
            self.event = PendingEvent::from_vectoring(
                info,
                vmcs.read(fields::ENTRY_EXCEPTION_ERROR_CODE),
                vmcs.read(fields::ENTRY_INSTRUCTION_LENGTH),
            );
            vmcs.write(fields::ENTRY_INTERRUPTION_INFO, 0);
        }
    }

    /// Chooses what the next entry injects, and asks for an exit when what waits can go in. Returns whether
    /// anything is injected.
    pub(crate) fn choose_event(&mut self, core: &Core, vmcs: &CurrentVmcs) -> bool {
        let requests = {
            let mut devices = self.guest.devices.lock();
            let mut requests = devices.requests(self.index);
            if requests.contains(Requests::NMI) && !self.nmi {
                self.nmi = devices.take_nmi(self.index);
                requests = devices.requests(self.index);
            }
            requests
        };
        if !requests.contains(Requests::INTERRUPT)
            && self.event.is_none()
            && !self.nmi
            && self.postponed.is_none()
        {
            self.set_windows(vmcs, false, false);
            return false;
        }
        let state = Interruptibility::from_bits_retain(vmcs.read(fields::GUEST_INTERRUPTIBILITY));
        let waiting = Waiting {
            event: self.event,
            nmi: self.nmi,
            interrupt: requests.contains(Requests::INTERRUPT) || self.postponed.is_some(),
        };
        let choice = choose(&waiting, vmcs.read(fields::GUEST_RFLAGS), state);
        let event = match choice.injection {
            Injection::None => None,
            Injection::Event(event) => {
                self.event = None;
                Some(event)
            }
            Injection::Nmi => {
                self.nmi = false;
                core.writer.count(Event::NmiInjected);
                Some(PendingEvent::NMI)
            }
            Injection::Interrupt => {
                core.writer.count(Event::Interrupt);
                let postponed = self.postponed.take();
                postponed.or_else(|| {
                    let mut devices = self.guest.devices.lock();
                    devices.acknowledge(self.index).map(PendingEvent::external)
                })
            }
        };
        if let Some(event) = event {
            inject(core, vmcs, &event, state);
        }
        // A second interrupt may wait behind the one that goes in.
        let more = choice.injection == Injection::Interrupt
            && self.guest.devices.lock().requests(self.index).contains(Requests::INTERRUPT);
        self.set_windows(vmcs, choice.interrupt_window || more, choice.nmi_window);
        event.is_some()
    }

    fn set_windows(&mut self, vmcs: &CurrentVmcs, interrupt: bool, nmi: bool) {
        let mut primary = PrimaryControls::from_bits_retain(self.controls.primary.bits());
        primary.set(PrimaryControls::INTERRUPT_WINDOW_EXITING, interrupt);
        primary.set(PrimaryControls::NMI_WINDOW_EXITING, nmi && self.controls.has(Feature::VirtualNmis));
        if primary.bits() != self.primary {
            self.primary = primary.bits();
            vmcs.write(fields::PRIMARY_CONTROLS, self.primary);
        }
    }
}

/// Clears `resume`, the RF of an instruction that is complete; and a single step may be due.
#[cold]
fn end_flags(vmcs: &CurrentVmcs, rflags: u64, resume: u64) {
    if resume != 0 {
        vmcs.write(fields::GUEST_RFLAGS, rflags & !resume);
    }
    let pending = vmcs.read(fields::GUEST_PENDING_DEBUG_EXCEPTIONS);
    vmcs.write(fields::GUEST_PENDING_DEBUG_EXCEPTIONS, pending_debug_after_instruction(pending, rflags));
}

/// Writes the VM-entry fields for `event`.
fn inject(core: &Core, vmcs: &CurrentVmcs, event: &PendingEvent, state: Interruptibility) {
    if let Some(cr2) = event.cr2 {
        write_cr2(cr2);
    }
    if event.kind == InterruptionType::HardwareException {
        core.writer.count(Event::Exception);
    }
    let fields = event.encode();
    vmcs.write(fields::ENTRY_INTERRUPTION_INFO, fields.info);
    if fields.info & 1 << 11 != 0 {
        vmcs.write(fields::ENTRY_EXCEPTION_ERROR_CODE, fields.error_code);
    }
    if event.kind.has_instruction_length() {
        vmcs.write(fields::ENTRY_INSTRUCTION_LENGTH, fields.instruction_bytes);
    }
    let after = state.for_injection(event);
    if after != state {
        vmcs.write(fields::GUEST_INTERRUPTIBILITY, after.bits());
    }
}
