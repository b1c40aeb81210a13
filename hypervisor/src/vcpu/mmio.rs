//! Instructions that touch device memory (or, rarely, a page the shadow cannot express): the emulator, lent this
//! vCPU's registers and address space.

use machine::cpu::event::Exception;
use machine::cpu::registers::{CodeSize, Gpr, SegmentName, SegmentState, Width};
use machine::device::{self, Outcome as DeviceOutcome};
use machine::emulate::{self, Bus, Cpu, Fault, INSTRUCTION_BYTES_MAX, Outcome};
use memory::{Gpa, GuestMemory, Gva};
use shadow::Kind;

use super::{Next, Vcpu};
use crate::guest::ram::GuestRam;
use crate::schedule::Core;
use crate::vmx::fields;
use crate::vmx::guest_state::SegmentName as VmcsSegment;
use crate::vmx::vmcs::CurrentVmcs;

/// A vCPU as the emulator sees it.
pub(super) struct View<'a> {
    pub vcpu: &'a mut Vcpu,
    pub vmcs: &'a CurrentVmcs,
    pub core: &'a Core,
    /// What a port write led to.
    pub outcome: DeviceOutcome,
    /// A device was written to: it may want something now.
    pub wrote_device: bool,
}

fn vmcs_segment(name: SegmentName) -> VmcsSegment {
    match name {
        SegmentName::Es => VmcsSegment::Es,
        SegmentName::Cs => VmcsSegment::Cs,
        SegmentName::Ss => VmcsSegment::Ss,
        SegmentName::Ds => VmcsSegment::Ds,
        SegmentName::Fs => VmcsSegment::Fs,
        SegmentName::Gs => VmcsSegment::Gs,
    }
}

pub(super) fn device_width(width: Width) -> device::Width {
    match width {
        Width::Byte => device::Width::Byte,
        Width::Word => device::Width::Word,
        Width::Dword => device::Width::Dword,
        Width::Qword => device::Width::Qword,
    }
}

impl Cpu for View<'_> {
    fn register(&self, register: Gpr) -> u64 {
        self.vcpu.register(self.vmcs, register)
    }
    fn set_register(&mut self, register: Gpr, value: u64) {
        self.vcpu.set_register(self.vmcs, register, value);
    }
    fn rip(&self) -> u64 {
        self.vmcs.read(fields::GUEST_RIP)
    }
    fn set_rip(&mut self, rip: u64) {
        self.vmcs.write(fields::GUEST_RIP, rip);
    }
    fn rflags(&self) -> u64 {
        self.vmcs.read(fields::GUEST_RFLAGS)
    }
    fn set_rflags(&mut self, rflags: u64) {
        self.vmcs.write(fields::GUEST_RFLAGS, rflags);
    }
    fn code_size(&self) -> CodeSize {
        self.vcpu.code_size(self.vmcs)
    }
    fn segment(&self, name: SegmentName) -> SegmentState {
        let segment = vmcs_segment(name).read(self.vmcs);
        SegmentState {
            selector: segment.selector,
            base: segment.base,
            limit: segment.limit,
            rights: segment.access.0,
        }
    }
    fn segment_base(&self, name: SegmentName) -> u64 {
        match name {
            SegmentName::Fs => self.vmcs.read(fields::GUEST_FS_BASE),
            SegmentName::Gs => self.vmcs.read(fields::GUEST_GS_BASE),
            other => self.segment(other).base,
        }
    }
}

impl<'a> View<'a> {
    /// The vCPU, whose exit is at hand.
    pub fn new(vcpu: &'a mut Vcpu, core: &'a Core, vmcs: &'a CurrentVmcs) -> View<'a> {
        View { vcpu, vmcs, core, outcome: DeviceOutcome::Done, wrote_device: false }
    }

    fn translate(&self, gva: Gva, kind: Kind) -> Result<Gpa, Fault> {
        let user = self.vmcs.read(fields::GUEST_SS_ACCESS_RIGHTS) >> 5 & 3 == 3;
        let alignment_check = self.vmcs.read(fields::GUEST_RFLAGS) & 1 << 18 != 0;
        Ok(self.vcpu.translate(gva, kind, user, alignment_check)?)
    }

    /// Writes to RAM: the shadow hears of it before it happens (H16). Under the lock to the end, or another vCPU's flush
    /// could bring a table up to date in between and never hear of the write (H12).
    fn write_ram<R>(&self, gpa: Gpa, write: impl FnOnce(&GuestRam) -> R) -> R {
        let guest = &self.vcpu.guest;
        let host = guest.surroundings(self.core);
        let mut mmu = guest.mmu.lock();
        mmu.before_write(&host, gpa.page());
        write(&guest.ram)
    }
}

impl Bus for View<'_> {
    fn load(&mut self, gva: Gva, width: Width) -> Result<u64, Fault> {
        let gpa = self.translate(gva, Kind::Read)?;
        let guest = &self.vcpu.guest;
        let mut bytes = [0; 8];
        if guest.ram.read(gpa, &mut bytes[..width.bytes()]).is_ok() {
            return Ok(u64::from_le_bytes(bytes));
        }
        let (index, now_ns) = (self.vcpu.index, guest.now_ns());
        let width = device_width(width);
        let read = self.vcpu.operate(|devices| devices.mmio_read(index, gpa, width, now_ns));
        Ok(read.unwrap_or(width.ones()))
    }

    fn store(&mut self, gva: Gva, width: Width, value: u64) -> Result<(), Fault> {
        let gpa = self.translate(gva, Kind::Write)?;
        if self.vcpu.guest.ram.slots.pfn(gpa.page()).is_some() {
            // Just found to be RAM, and RAM does not go away.
            let _ = self.write_ram(gpa, |ram| ram.write(gpa, &value.to_le_bytes()[..width.bytes()]));
            return Ok(());
        }
        let (index, now_ns) = (self.vcpu.index, self.vcpu.guest.now_ns());
        self.wrote_device = true;
        let width = device_width(width);
        // A write that nobody takes is lost, as on a bus.
        let _ = self.vcpu.operate(|devices| devices.mmio_write(index, gpa, width, value, now_ns));
        Ok(())
    }

    fn check_write(&mut self, gva: Gva, bytes: usize) -> Result<(), Fault> {
        self.translate(gva, Kind::Write)?;
        let last = Gva(gva.0.wrapping_add(bytes as u64 - 1));
        if last.0 >> 12 != gva.0 >> 12 {
            self.translate(last, Kind::Write)?;
        }
        Ok(())
    }

    fn compare_exchange(&mut self, gva: Gva, width: Width, old: u64, new: u64) -> Result<bool, Fault> {
        let gpa = self.translate(gva, Kind::Write)?;
        if self.vcpu.guest.ram.slots.pfn(gpa.page()).is_some() {
            let aligned = gpa.0 % width.bytes() as u64 == 0;
            let exchanged = self.write_ram(gpa, |ram| match width {
                Width::Qword if aligned => ram.compare_exchange_u64(gpa, old, new),
                Width::Dword if aligned => ram.compare_exchange_u32(gpa, old as u32, new as u32),
                Width::Byte | Width::Word if aligned => {
                    // As a part of the dword that it lies in.
                    let shift = 8 * (gpa.0 & 3);
                    let mask = (device_width(width).ones() as u32) << shift;
                    let word = Gpa(gpa.0 & !3);
                    let around = ram.load_u32(word)? & !mask;
                    let part = |value: u64| around | (value as u32) << shift & mask;
                    ram.compare_exchange_u32(word, part(old), part(new))
                }
                // Across its boundary: not in one piece.
                _ => ram.write(gpa, &new.to_le_bytes()[..width.bytes()]).map(|()| true),
            });
            return Ok(exchanged.unwrap_or(true));
        }
        self.store(gva, width, new)?;
        Ok(true)
    }
}

impl Vcpu {
    /// The instruction's bytes, as far as they can be fetched.
    pub(super) fn instruction_bytes(
        &self,
        vmcs: &CurrentVmcs,
        bytes: &mut [u8; INSTRUCTION_BYTES_MAX],
    ) -> usize {
        let base = match self.code_size(vmcs) {
            CodeSize::Bits64 => 0,
            _ => vmcs.read(fields::GUEST_CS_BASE),
        };
        let start = base.wrapping_add(vmcs.read(fields::GUEST_RIP));
        let user = vmcs.read(fields::GUEST_SS_ACCESS_RIGHTS) >> 5 & 3 == 3;
        let mut done = 0;
        while done < bytes.len() {
            let at = Gva(start.wrapping_add(done as u64));
            let Ok(gpa) = self.translate(at, Kind::Fetch, user, false) else { break };
            let count = (bytes.len() - done).min((memory::PAGE_SIZE - at.offset()) as usize);
            if self.guest.ram.read(gpa, &mut bytes[done..done + count]).is_err() {
                break;
            }
            done += count;
        }
        done
    }

    /// Carries out the present instruction in the guest's place.
    pub(crate) fn emulate(&mut self, core: &Core, vmcs: &CurrentVmcs) -> Next {
        self.take_task_priority();
        let mut bytes = [0; INSTRUCTION_BYTES_MAX];
        let count = self.instruction_bytes(vmcs, &mut bytes);
        let mut view = View::new(self, core, vmcs);
        let outcome = emulate::emulate(&mut view, &bytes[..count]);
        if view.wrote_device {
            self.attend();
        }
        self.after_emulation(core, vmcs, outcome)
    }

    /// What an emulated instruction leaves to be done.
    pub(super) fn after_emulation(&mut self, core: &Core, vmcs: &CurrentVmcs, outcome: Outcome) -> Next {
        match outcome {
            Outcome::Done | Outcome::Continue => {
                self.instruction_done(vmcs);
                Next::Resume
            }
            Outcome::Retry => Next::Resume,
            Outcome::Exception(exception) => {
                let exception: Exception = exception;
                self.fault(core, vmcs, exception)
            }
            Outcome::Unsupported => Next::Leave(self.stop(
                core,
                vmcs,
                &"an access to device memory by an instruction that the emulator does not know",
            )),
        }
    }
}
