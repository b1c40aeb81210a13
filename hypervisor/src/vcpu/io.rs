//! Port I/O.

use machine::cpu::exit::{IoAccess, StringIoInformation};
use machine::cpu::registers::Width;
use machine::device::Outcome as DeviceOutcome;
use machine::device::debug::BenchMark;
use machine::emulate::{Flow, INSTRUCTION_BYTES_MAX, Ports, StringIo, string_io};
use machine::manifest::End;
use memory::Event;

use super::mmio::{View, device_width};
use super::{Leave, Next, Vcpu};
use crate::schedule::Core;
use crate::vmx::fields;
use crate::vmx::vmcs::CurrentVmcs;

impl Ports for View<'_> {
    fn input(&mut self, port: u16, width: Width) -> u32 {
        let now_ns = self.vcpu.guest.now_ns();
        self.vcpu.operate(|devices| devices.port_read(port, device_width(width), now_ns))
    }

    fn output(&mut self, port: u16, width: Width, value: u32) -> Flow {
        let now_ns = self.vcpu.guest.now_ns();
        self.outcome =
            self.vcpu.operate(|devices| devices.port_write(port, device_width(width), value, now_ns));
        if self.outcome == DeviceOutcome::Done { Flow::Continue } else { Flow::Leave }
    }
}

impl Vcpu {
    #[inline(never)]
    pub(crate) fn port(&mut self, core: &Core, vmcs: &CurrentVmcs) -> Next {
        let access = IoAccess::from_qualification(vmcs.read(fields::EXIT_QUALIFICATION));
        if access.string {
            return self.string_port(core, vmcs, access);
        }
        let now_ns = self.guest.now_ns();
        let width = device_width(access.width);
        if access.input {
            core.writer.count(Event::PortRead);
            let value = self.operate(|devices| devices.port_read(access.port, width, now_ns));
            let rax = &mut self.entry.registers.rax;
            *rax = match access.width {
                Width::Byte => *rax & !0xff | u64::from(value & 0xff),
                Width::Word => *rax & !0xffff | u64::from(value & 0xffff),
                _ => u64::from(value),
            };
            self.skip(vmcs);
            return Next::Resume;
        }
        core.writer.count(Event::PortWrite);
        let value = self.entry.registers.rax as u32;
        let outcome = self.operate(|devices| devices.port_write(access.port, width, value, now_ns));
        self.skip(vmcs);
        self.after_port_write(outcome)
    }

    fn after_port_write(&mut self, outcome: DeviceOutcome) -> Next {
        match outcome {
            DeviceOutcome::Done => Next::Resume,
            DeviceOutcome::ConsoleReady => {
                let mut devices = self.guest.devices.lock();
                crate::console::drain(&self.guest, &mut devices);
                Next::Resume
            }
            DeviceOutcome::BenchMark(mark) => {
                self.bench_mark(mark == BenchMark::Begin);
                Next::Resume
            }
            DeviceOutcome::Exit(code) => Next::Leave(Leave::Ended(End::Exit(code))),
            DeviceOutcome::PowerOff => Next::Leave(Leave::Ended(End::PowerOff)),
            DeviceOutcome::Reset => Next::Leave(Leave::Ended(End::Reset)),
        }
    }

    fn string_port(&mut self, core: &Core, vmcs: &CurrentVmcs, access: IoAccess) -> Next {
        let mut bytes = [0; INSTRUCTION_BYTES_MAX];
        let information = StringIoInformation::from_field(vmcs.read(fields::EXIT_INSTRUCTION_INFO));
        let io = match information.filter(|_| core.host.vmx.capabilities.string_io_information) {
            Some(information) => {
                Some(StringIo::from_exit(access, information, vmcs.read(fields::EXIT_INSTRUCTION_LENGTH)))
            }
            None => {
                let count = self.instruction_bytes(vmcs, &mut bytes);
                let rip = vmcs.read(fields::GUEST_RIP);
                StringIo::from_instruction(access, &bytes[..count], self.code_size(vmcs), rip)
            }
        };
        let Some(io) = io else {
            return Next::Leave(self.stop(core, vmcs, &"a string port instruction that could not be read"));
        };
        let mut view = View::new(self, core, vmcs);
        let outcome = string_io(&mut view, &io);
        let device = view.outcome;
        self.attend();
        match self.after_emulation(core, vmcs, outcome) {
            Next::Resume => self.after_port_write(device),
            leave => leave,
        }
    }
}
