//! The one exit dispatch.

use machine::cpu::control::{ControlState, Cr4, Effects, check_cr8};
use machine::cpu::event::{
    Exception, Interruptibility, PENDING_DEBUG_SINGLE_STEP, PendingEvent, RFLAGS_INTERRUPT, RFLAGS_TRAP,
    Vector,
};
use machine::cpu::exit::{
    CrAccess, DebugQualification, DrAccess, ExitReason, InterruptionInfo, InterruptionType,
};
use machine::cpu::registers::Gpr;
use machine::manifest::End;

use super::{Leave, Next, Vcpu};
use crate::host::{interrupts, machine_check};
use crate::schedule::{self, Core};
use crate::vmx::fields;
use crate::vmx::vmcs::CurrentVmcs;

/// What a guest gets for VMCALL: KVM's "no such hypercall", which guests of any kind take for "nothing there".
const NO_HYPERCALL: u64 = -1000_i64 as u64;

impl Vcpu {
    /// Handles one exit other than CPUID. What nobody knows ends this guest alone.
    #[inline(always)]
    pub(crate) fn handle(&mut self, core: &Core, vmcs: &CurrentVmcs, reason: ExitReason) -> Next {
        match reason {
            ExitReason::EXCEPTION_OR_NMI => self.exception(core, vmcs),
            ExitReason::CR_ACCESS => self.control_register(core, vmcs),
            ExitReason::INVLPG => self.invlpg(core, vmcs),
            ExitReason::APIC_ACCESS => self.apic_access(core, vmcs),
            ExitReason::IO => self.port(core, vmcs),
            ExitReason::RDMSR => self.read_msr(core, vmcs),
            ExitReason::WRMSR => self.write_msr(core, vmcs),
            ExitReason::PREEMPTION_TIMER
            | ExitReason::TPR_BELOW_THRESHOLD
            | ExitReason::NMI_WINDOW
            | ExitReason::INTERRUPT_WINDOW => {
                self.attend();
                Next::Resume
            }
            ExitReason::HLT => self.halt(vmcs),
            ExitReason::XSETBV => self.set_xcr(vmcs),
            ExitReason::MOV_DR => self.debug_register(vmcs),
            ExitReason::INVPCID => self.invpcid(core, vmcs),
            _ => self.rare(core, vmcs, reason),
        }
    }

    /// CPUID: a round trip of its own, and the measure of all others.
    #[inline(always)]
    pub(super) fn cpuid(&mut self, vmcs: &CurrentVmcs, rip: u64) {
        let registers = &mut self.entry.registers;
        match self.guest.model.cpuid.fixed(registers.rax as u32) {
            Some(&[eax, ebx, ecx, edx]) => {
                registers.rax = eax.into();
                registers.rbx = ebx.into();
                registers.rcx = ecx.into();
                registers.rdx = edx.into();
            }
            None => self.varying_cpuid(),
        }
        self.advance(vmcs, rip, vmcs.read(fields::EXIT_INSTRUCTION_LENGTH).into());
    }

    /// A leaf whose answer depends on the subleaf or on the vCPU.
    #[inline(never)]
    fn varying_cpuid(&mut self) {
        let registers = &mut self.entry.registers;
        let (leaf, subleaf) = (registers.rax as u32, registers.rcx as u32);
        let [eax, ebx, ecx, edx] = self.guest.model.cpuid.query(leaf, subleaf, &self.cpuid_state);
        registers.rax = eax.into();
        registers.rbx = ebx.into();
        registers.rcx = ecx.into();
        registers.rdx = edx.into();
    }

    /// Exits that no guest makes often.
    #[inline(never)]
    fn rare(&mut self, core: &Core, vmcs: &CurrentVmcs, reason: ExitReason) -> Next {
        match reason {
            ExitReason::EXTERNAL_INTERRUPT => {
                // Acknowledged by the exit. Ours are the timer and what is spurious: both only mean "look".
                let vector = vmcs.read(fields::EXIT_INTERRUPTION_INFO) as u8;
                if vector != crate::host::apic::SPURIOUS_VECTOR {
                    crate::host::apic::eoi();
                }
                self.attend();
                Next::Resume
            }
            ExitReason::VMCALL => {
                self.entry.registers.rax = NO_HYPERCALL;
                self.skip(vmcs);
                Next::Resume
            }
            // Caches are coherent with all that a guest can reach: nothing to write back.
            ExitReason::WBINVD | ExitReason::INVD => {
                self.skip(vmcs);
                Next::Resume
            }
            ExitReason::PAUSE => {
                // It spins for another vCPU, which may be waiting for this core.
                schedule::wake(core.index);
                self.skip(vmcs);
                self.attend();
                Next::Resume
            }
            // Not offered by CPUID, or not without VMX.
            ExitReason::RDPMC => self.raise(vmcs, Exception::PROTECTION),
            ExitReason::MWAIT
            | ExitReason::MONITOR
            | ExitReason::GETSEC
            | ExitReason::INVEPT
            | ExitReason::INVVPID
            | ExitReason::VMCLEAR
            | ExitReason::VMLAUNCH
            | ExitReason::VMPTRLD
            | ExitReason::VMPTRST
            | ExitReason::VMREAD
            | ExitReason::VMRESUME
            | ExitReason::VMWRITE
            | ExitReason::VMXOFF
            | ExitReason::VMXON
            | ExitReason::VMFUNC
            | ExitReason::RSM => self.raise(vmcs, Exception::UNDEFINED),
            ExitReason::TRIPLE_FAULT => Next::Leave(self.stop(
                core,
                vmcs,
                &"triple fault: an exception while delivering a double fault",
            )),
            ExitReason::TASK_SWITCH => self.task_switch(core, vmcs),
            ExitReason::MACHINE_CHECK_ON_ENTRY => {
                self.entry.cleared();
                self.machine_check(core, vmcs)
            }
            ExitReason::INVALID_GUEST_STATE | ExitReason::MSR_LOADING => {
                self.entry.cleared();
                Next::Leave(self.stop(core, vmcs, &format_args!("its state was refused at entry: {reason}")))
            }
            _ => Next::Leave(self.stop(core, vmcs, &format_args!("an exit nobody handles: {reason}"))),
        }
    }

    /// The hardware found an error of its own: this guest's end, or everybody's where the core is damaged.
    fn machine_check(&mut self, core: &Core, vmcs: &CurrentVmcs) -> Next {
        let finding = machine_check::examine();
        assert!(!finding.is_fatal(), "a machine check left core {} unsound: {finding}", core.index);
        Next::Leave(self.stop(core, vmcs, &format_args!("a machine check while it ran: {finding}")))
    }

    /// An exception that exits whatever the guest wants, or an NMI, which is a kick.
    #[inline(never)]
    fn exception(&mut self, core: &Core, vmcs: &CurrentVmcs) -> Next {
        let info = InterruptionInfo(vmcs.read(fields::EXIT_INTERRUPTION_INFO));
        if info.kind() == InterruptionType::Nmi {
            interrupts::nmi_exit();
            self.attend();
            return Next::Resume;
        }
        self.keep_interrupted_event(vmcs);
        self.restore_nmi_blocking(vmcs, info);
        match info.vector() {
            Vector::PF => self.page_fault(core, vmcs),
            Vector::DB if info.kind() == InterruptionType::PrivilegedSoftwareException => {
                self.event = Some(PendingEvent::int1(vmcs.read(fields::EXIT_INSTRUCTION_LENGTH)));
                self.attend();
                Next::Resume
            }
            Vector::DB => {
                // An exit leaves DR6 as it was.
                let qualification = DebugQualification(vmcs.read(fields::EXIT_QUALIFICATION));
                self.extended.merge_dr6(qualification);
                // An entry that injects it under STI or MOV SS blocking wants the single step pending (SDM Vol. 3,
                // "Checks on Guest Non-Register State").
                let blocked =
                    vmcs.read(fields::GUEST_INTERRUPTIBILITY) & Interruptibility::ONE_INSTRUCTION.bits() != 0;
                if blocked && vmcs.read(fields::GUEST_RFLAGS) & RFLAGS_TRAP != 0 {
                    let pending = vmcs.read(fields::GUEST_PENDING_DEBUG_EXCEPTIONS);
                    vmcs.write(fields::GUEST_PENDING_DEBUG_EXCEPTIONS, pending | PENDING_DEBUG_SINGLE_STEP);
                }
                self.fault(core, vmcs, Exception::DEBUG)
            }
            Vector::MC => self.machine_check(core, vmcs),
            vector => {
                let error_code =
                    info.has_error_code().then(|| vmcs.read(fields::EXIT_INTERRUPTION_ERROR_CODE));
                self.fault(core, vmcs, Exception { vector, error_code, cr2: None })
            }
        }
    }

    #[inline(never)]
    fn control_register(&mut self, core: &Core, vmcs: &CurrentVmcs) -> Next {
        let access = CrAccess::from_qualification(vmcs.read(fields::EXIT_QUALIFICATION));
        let change = match access {
            CrAccess::Write { cr: 3, register } => {
                let value = self.control_source(vmcs, register);
                match self.control.write_cr3(&self.guest.model.control, value) {
                    // By far the most frequent of them, and nothing but CR3 changes.
                    Ok(change) if !change.effects.contains(Effects::LOAD_PDPTES) => {
                        return self.change_root(core, vmcs, change);
                    }
                    other => other,
                }
            }
            CrAccess::Read { cr: 3, register } => {
                self.set_register(vmcs, register, self.control.cr3);
                self.skip(vmcs);
                return Next::Resume;
            }
            CrAccess::Write { cr: 0, register } => {
                self.refresh_control(vmcs);
                let value = self.control_source(vmcs, register);
                self.control.write_cr0(value, self.code_size(vmcs))
            }
            CrAccess::Write { cr: 4, register } => {
                self.refresh_control(vmcs);
                let value = self.control_source(vmcs, register);
                match self.control.write_cr4(&self.guest.model.control, value) {
                    // How kernels flush what is global too: back and forth, and nothing else changes.
                    Ok(change)
                        if change.effects == Effects::FLUSH_ALL
                            && change.state.cr4 ^ self.control.cr4 == Cr4::PGE =>
                    {
                        return self.toggle_global_pages(core, vmcs);
                    }
                    other => other,
                }
            }
            CrAccess::Write { cr: 8, register } => {
                return match check_cr8(self.register(vmcs, register)) {
                    Ok(cr8) => {
                        let index = self.index;
                        self.operate(|devices| devices.set_cr8(index, cr8));
                        self.attend();
                        self.skip(vmcs);
                        Next::Resume
                    }
                    Err(exception) => self.raise(vmcs, exception),
                };
            }
            CrAccess::Read { register, .. } => {
                let cr8 = self.guest.devices.lock().cr8(self.index);
                self.set_register(vmcs, register, cr8.into());
                self.skip(vmcs);
                return Next::Resume;
            }
            CrAccess::Clts => {
                self.refresh_control(vmcs);
                Ok(self.control.clear_task_switched())
            }
            CrAccess::Lmsw { source } => {
                self.refresh_control(vmcs);
                self.control.load_machine_status(source, self.code_size(vmcs))
            }
            CrAccess::Write { .. } => Err(Exception::UNDEFINED),
        };
        match change {
            Ok(change) => self.apply(core, vmcs, change),
            Err(exception) => self.raise(vmcs, exception),
        }
    }

    fn halt(&mut self, vmcs: &CurrentVmcs) -> Next {
        self.skip(vmcs);
        self.halted = true;
        self.attend();
        Next::Resume
    }

    /// Nothing has ended the HLT yet: the core is free until something is due in the devices.
    pub(crate) fn still_halted(&mut self, vmcs: &CurrentVmcs, until_tsc: Option<u64>) -> Next {
        if vmcs.read(fields::GUEST_RFLAGS) & RFLAGS_INTERRUPT == 0 {
            // Only an NMI can wake it, and only another vCPU sends one.
            self.die();
            if self.guest.is_dead() {
                return Next::Leave(Leave::Ended(End::Halted));
            }
        }
        Next::Leave(self.sleep(until_tsc))
    }

    #[inline(never)]
    fn debug_register(&mut self, vmcs: &CurrentVmcs) -> Next {
        let access = DrAccess::from_qualification(vmcs.read(fields::EXIT_QUALIFICATION));
        if self.segment_rights(vmcs, machine::cpu::registers::SegmentName::Ss) >> 5 & 3 != 0 {
            return self.raise(vmcs, Exception::PROTECTION);
        }
        let debug_extensions = self.guest_cr4(vmcs) & 1 << 3 != 0;
        let number = match access.dr {
            4 | 5 if debug_extensions => return self.raise(vmcs, Exception::UNDEFINED),
            4 | 5 => access.dr + 2,
            other => other,
        };
        if access.read {
            let value = if number == 7 { vmcs.read(fields::GUEST_DR7) } else { self.extended.dr(number) };
            self.set_register(vmcs, access.register, value);
        } else {
            let value = self.register(vmcs, access.register);
            if number >= 6 && value >> 32 != 0 {
                return self.raise(vmcs, Exception::PROTECTION);
            }
            match number {
                // Bit 10 reads 1; 11, 12, 14 and 15 read 0. General detect would hide from us what we emulate.
                7 => vmcs.write(fields::GUEST_DR7, value & 0xffff_0fff & !(1 << 11 | 1 << 13) | 1 << 10),
                _ => self.extended.set_dr(number, value),
            }
        }
        self.skip(vmcs);
        Next::Resume
    }

    #[inline(never)]
    fn set_xcr(&mut self, vmcs: &CurrentVmcs) -> Next {
        self.refresh_control(vmcs);
        let registers = &self.entry.registers;
        let (number, value) = (registers.rcx as u32, registers.edx_eax());
        if self.segment_rights(vmcs, machine::cpu::registers::SegmentName::Ss) >> 5 & 3 != 0 {
            return self.raise(vmcs, Exception::PROTECTION);
        }
        match self.control.write_xcr(&self.guest.model.control, number, value) {
            Ok(change) => {
                let state: ControlState = change.state;
                self.control = state;
                self.cpuid_state.xcr0 = state.xcr0;
                self.extended.set_xcr0(state.xcr0);
                self.skip(vmcs);
                Next::Resume
            }
            Err(exception) => self.raise(vmcs, exception),
        }
    }

    /// A general register; RSP is in the VMCS.
    #[inline]
    pub(crate) fn register(&self, vmcs: &CurrentVmcs, register: Gpr) -> u64 {
        match register {
            Gpr::Rsp => vmcs.read(fields::GUEST_RSP),
            other => self.entry.registers.get(other.number() as u8),
        }
    }

    /// Sets a general register; RSP is in the VMCS.
    #[inline]
    pub(crate) fn set_register(&mut self, vmcs: &CurrentVmcs, register: Gpr, value: u64) {
        match register {
            Gpr::Rsp => vmcs.write(fields::GUEST_RSP, value),
            other => self.entry.registers.set(other.number() as u8, value),
        }
    }
}
