//! RDMSR and WRMSR that exit.

use machine::cpu::event::Exception;
use machine::cpu::msr::{MsrRead, MsrWrite, NativeMsr};
use machine::device::lapic::MSR_EOI;
use memory::Event;

use super::{Next, Vcpu};
use crate::host::time;
use crate::schedule::Core;
use crate::vmx::fields;
use crate::vmx::vmcs::CurrentVmcs;

impl Vcpu {
    /// The guest's TSC now.
    fn guest_tsc(&self) -> u64 {
        time::tsc().wrapping_add(self.tsc_offset)
    }

    fn shift_tsc(&mut self, vmcs: &CurrentVmcs, ticks: u64) {
        self.tsc_offset = self.tsc_offset.wrapping_add(ticks);
        vmcs.write(fields::TSC_OFFSET, self.tsc_offset);
        let (now_tsc, now_ns, index) = (self.guest_tsc(), self.guest.now_ns(), self.index);
        self.operate(|devices| {
            let deadline = devices.tsc_deadline(index);
            if deadline != 0 {
                devices.set_tsc_deadline(index, deadline, now_tsc, now_ns);
            }
        });
        self.attend();
    }

    #[inline(never)]
    pub(crate) fn read_msr(&mut self, core: &Core, vmcs: &CurrentVmcs) -> Next {
        let index = self.entry.registers.rcx as u32;
        let value = match self.msrs.read(index) {
            MsrRead::Value(value) => Some(value),
            MsrRead::Native(native) => Some(self.native_msr(vmcs, native)),
            MsrRead::Tsc => Some(self.guest_tsc()),
            MsrRead::ApicBase => Some(self.guest.devices.lock().apic_base(self.index)),
            MsrRead::TscDeadline => Some(self.guest.devices.lock().tsc_deadline(self.index)),
            MsrRead::Lapic(index) => {
                self.take_task_priority();
                let (vcpu, now_ns) = (self.index, self.guest.now_ns());
                self.operate(|devices| devices.x2apic_read(vcpu, index, now_ns)).ok()
            }
            MsrRead::Efer => Some(self.control.efer.bits()),
            MsrRead::GeneralProtection => None,
        };
        match value {
            Some(value) => {
                self.entry.registers.set_edx_eax(value);
                self.skip(vmcs);
                Next::Resume
            }
            None => self.unknown_msr(core, vmcs),
        }
    }

    #[inline(never)]
    pub(crate) fn write_msr(&mut self, core: &Core, vmcs: &CurrentVmcs) -> Next {
        let registers = &self.entry.registers;
        let (index, value) = (registers.rcx as u32, registers.edx_eax());
        match self.msrs.write(index, value) {
            MsrWrite::Done => {}
            MsrWrite::Native(native, value) => self.set_native_msr(vmcs, native, value),
            MsrWrite::Tsc(value) => {
                let ticks = value.wrapping_sub(self.guest_tsc());
                self.msrs.tsc_shifted(ticks);
                self.shift_tsc(vmcs, ticks);
            }
            MsrWrite::ShiftTsc(ticks) => self.shift_tsc(vmcs, ticks),
            MsrWrite::ApicBase(value) => {
                let index = self.index;
                let base = self.operate(|devices| {
                    devices.set_apic_base(index, value).map(|()| devices.apic_base(index))
                });
                let Ok(base) = base else { return self.raise(vmcs, Exception::PROTECTION) };
                self.cpuid_state.apic_enabled = base & 1 << 11 != 0;
                self.place_apic_page(core);
                self.attend();
            }
            MsrWrite::TscDeadline(deadline) => {
                let (now_tsc, now_ns, index) = (self.guest_tsc(), self.guest.now_ns(), self.index);
                self.operate(|devices| devices.set_tsc_deadline(index, deadline, now_tsc, now_ns));
                self.attend();
            }
            MsrWrite::Lapic(index, value) => {
                self.take_task_priority();
                let (vcpu, now_ns) = (self.index, self.guest.now_ns());
                let written = self.operate(|devices| {
                    let written = devices.x2apic_write(vcpu, index, value, now_ns);
                    written.map(|()| index == MSR_EOI && devices.is_quiet(vcpu))
                });
                let Ok(quiet) = written else {
                    return self.raise(vmcs, Exception::PROTECTION);
                };
                if !quiet {
                    self.attend();
                }
            }
            MsrWrite::Efer(value) => {
                self.refresh_control(vmcs);
                return match self.control.write_efer(&self.guest.model.control, value) {
                    Ok(change) => self.apply(core, vmcs, change),
                    Err(exception) => self.raise(vmcs, exception),
                };
            }
            MsrWrite::Xss(value) => self.cpuid_state.xss = value,
            MsrWrite::SpeculationControl(value) => {
                self.entry.set_speculation_control(value);
                core.host.vmx.mitigations.switch(value, false);
            }
            MsrWrite::PredictionBarrier => core.host.vmx.mitigations.barrier(),
            MsrWrite::GeneralProtection => return self.unknown_msr(core, vmcs),
        }
        self.skip(vmcs);
        Next::Resume
    }

    #[cold]
    fn unknown_msr(&mut self, core: &Core, vmcs: &CurrentVmcs) -> Next {
        core.writer.count(Event::MsrUnknown);
        self.raise(vmcs, Exception::PROTECTION)
    }

    /// A register that the guest reaches by itself where there is an MSR bitmap.
    fn native_msr(&self, vmcs: &CurrentVmcs, native: NativeMsr) -> u64 {
        match native {
            NativeMsr::SysenterCs => vmcs.read(fields::GUEST_SYSENTER_CS).into(),
            NativeMsr::SysenterEsp => vmcs.read(fields::GUEST_SYSENTER_ESP),
            NativeMsr::SysenterEip => vmcs.read(fields::GUEST_SYSENTER_EIP),
            NativeMsr::FsBase => vmcs.read(fields::GUEST_FS_BASE),
            NativeMsr::GsBase => vmcs.read(fields::GUEST_GS_BASE),
            other => self.extended.msr(other),
        }
    }

    fn set_native_msr(&mut self, vmcs: &CurrentVmcs, native: NativeMsr, value: u64) {
        match native {
            NativeMsr::SysenterCs => vmcs.write(fields::GUEST_SYSENTER_CS, value as u32),
            NativeMsr::SysenterEsp => vmcs.write(fields::GUEST_SYSENTER_ESP, value),
            NativeMsr::SysenterEip => vmcs.write(fields::GUEST_SYSENTER_EIP, value),
            NativeMsr::FsBase => vmcs.write(fields::GUEST_FS_BASE, value),
            NativeMsr::GsBase => vmcs.write(fields::GUEST_GS_BASE, value),
            other => self.extended.set_msr(other, value),
        }
    }
}
