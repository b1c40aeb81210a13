//! The task-switch exit: lends the vCPU's registers and address space to `machine::cpu::task`.

use machine::cpu::control::{Cr0, Paging as GuestPaging};
use machine::cpu::event::{Exception, Interruptibility, RFLAGS_RESUME, Vector};
use machine::cpu::exit::InterruptionType;
use machine::cpu::registers::{Gpr, SegmentState};
use machine::cpu::task::{self, Arrival, Event, Gdt, Linear, Privilege, Refusal, Source, Task, TaskSwitch};
use memory::{GuestMemory, Gva};
use shadow::{Flush, Kind, walk};

use super::{Next, Vcpu};
use crate::schedule::Core;
use crate::vmx::fields;
use crate::vmx::guest_state::{AccessRights, Segment, SegmentName};
use crate::vmx::vmcs::CurrentVmcs;

/// Local breakpoints (L0 to L3) and LE in DR7: off in a new task.
const DR7_LOCAL: u64 = 0x155;
/// BT in DR6: the T bit of the new task's TSS.
const DR6_TASK: u64 = 1 << 15;
/// DR6's number.
const DR6: u8 = 6;

/// The segment registers in the order of [`Task::segments`].
const SEGMENTS: [SegmentName; 6] =
    [SegmentName::Es, SegmentName::Cs, SegmentName::Ss, SegmentName::Ds, SegmentName::Fs, SegmentName::Gs];

/// The guest's address space, for the processor's own accesses.
struct Space<'a> {
    vcpu: &'a Vcpu,
    core: &'a Core,
}

impl Space<'_> {
    /// Calls `each(gva, offset, count)` for every piece of `count` bytes that lies in one page.
    fn pieces<E>(
        address: u32,
        count: usize,
        mut each: impl FnMut(Gva, usize, usize) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut done = 0;
        while done < count {
            let gva = Gva(address.wrapping_add(done as u32).into());
            let bytes = (count - done).min((memory::PAGE_SIZE - gva.offset()) as usize);
            each(gva, done, bytes)?;
            done += bytes;
        }
        Ok(())
    }
}

impl Linear for Space<'_> {
    fn read(&self, address: u32, bytes: &mut [u8]) -> Result<(), Exception> {
        Self::pieces(address, bytes.len(), |gva, at, count| {
            let gpa = self.vcpu.translate(gva, Kind::Read, false, false)?;
            let piece = &mut bytes[at..at + count];
            if self.vcpu.guest.ram.read(gpa, piece).is_err() {
                // No descriptor and no TSS is in a device: as on a bus where nobody answers.
                piece.fill(0xff);
            }
            Ok(())
        })
    }

    fn check_write(&self, address: u32, count: u32, privilege: Privilege) -> Result<(), Exception> {
        Self::pieces(address, count as usize, |gva, _, _| {
            self.vcpu.translate(gva, Kind::Write, privilege == Privilege::User, false).map(|_| ())
        })
    }

    fn write(&mut self, address: u32, bytes: &[u8], privilege: Privilege) {
        // What has been checked can fail only if another processor has changed the tables since; what is no RAM
        // takes no write.
        let _ = Self::pieces(address, bytes.len(), |gva, at, count| {
            let user = privilege == Privilege::User;
            let gpa = self.vcpu.translate(gva, Kind::Write, user, false)?;
            let guest = &self.vcpu.guest;
            let host = guest.surroundings(self.core);
            // Under the lock: a flush of another vCPU's must not fall between the two.
            let mut mmu = guest.mmu.lock();
            mmu.before_write(&host, gpa.page());
            let _ = guest.ram.write(gpa, &bytes[at..at + count]);
            Ok::<(), Exception>(())
        });
    }
}

fn state_of(segment: Segment) -> SegmentState {
    SegmentState {
        selector: segment.selector,
        base: segment.base,
        limit: segment.limit,
        rights: segment.access.0,
    }
}

fn segment_of(state: SegmentState) -> Segment {
    Segment {
        selector: state.selector,
        base: state.base,
        limit: state.limit,
        access: AccessRights(state.rights),
    }
}

impl Vcpu {
    /// A task switch: the guest's old task is saved, the new one loaded.
    #[cold]
    pub(crate) fn task_switch(&mut self, core: &Core, vmcs: &CurrentVmcs) -> Next {
        let switch = TaskSwitch::from_qualification(vmcs.read(fields::EXIT_QUALIFICATION));
        self.keep_interrupted_event(vmcs);
        self.refresh_control(vmcs);
        let event = self.event_at_gate(switch.source);
        let old = self.task(vmcs, switch.source);
        let gdt = Gdt {
            base: vmcs.read(fields::GUEST_GDTR_BASE) as u32,
            limit: vmcs.read(fields::GUEST_GDTR_LIMIT) as u16,
        };
        let prepared = match task::prepare(&Space { vcpu: self, core }, gdt, &old, switch, event) {
            Ok(prepared) => prepared,
            Err(Refusal::Exception(exception)) => return self.fault(core, vmcs, exception),
            Err(Refusal::Unsupported(what)) => return Next::Leave(self.stop(core, vmcs, &what)),
        };
        // A CR3 with bad PDPTEs is refused before anything has changed.
        let cr3 = u64::from(prepared.cr3());
        let changes_cr3 = self.control.cr0.contains(Cr0::PG) && cr3 != self.control.cr3;
        let mut pdptes = self.mmu.paging.pdptes;
        if changes_cr3 && self.control.paging() == GuestPaging::Pae {
            let bits = self.guest.model.control.physical_bits;
            match walk::load_pdptes(&self.guest.ram, cr3, bits) {
                Ok(loaded) => pdptes = loaded,
                Err(_) => return self.fault(core, vmcs, Exception::PROTECTION),
            }
        }
        if let Err(exception) = task::depart(&mut Space { vcpu: self, core }, &old, &prepared) {
            return self.fault(core, vmcs, exception);
        }
        let before = self.control;
        self.control.cr0 |= Cr0::TS;
        self.write_control_registers(vmcs, Some(&before));
        if changes_cr3 {
            self.control.cr3 = cr3;
            self.mmu.paging.pdptes = pdptes;
            self.refresh_paging();
            if let Err(next) = self.load_root(core, vmcs, Flush::Pcid) {
                return next;
            }
        }
        let arrival = task::arrive(&mut Space { vcpu: self, core }, &prepared);
        self.begin_task(core, vmcs, switch.source, &arrival)
    }

    /// The event whose delivery met a task gate.
    fn event_at_gate(&self, source: Source) -> Event {
        match &self.event {
            Some(event) if source == Source::Gate => Event {
                external: !event.kind.has_instruction_length(),
                fault: event.kind == InterruptionType::HardwareException
                    && !matches!(event.vector, Vector::DB | Vector::DF | Vector::MC),
                error_code: event.error_code,
            },
            _ => Event::default(),
        }
    }

    /// The old task. It goes on behind the instruction that made the switch, if one did.
    fn task(&self, vmcs: &CurrentVmcs, source: Source) -> Task {
        let by_instruction = match &self.event {
            Some(event) if source == Source::Gate => event.kind.has_instruction_length(),
            _ => true,
        };
        let length = if by_instruction { vmcs.read(fields::EXIT_INSTRUCTION_LENGTH) } else { 0 };
        // An instruction that is complete leaves no RF behind.
        let resume = if by_instruction { RFLAGS_RESUME } else { 0 };
        Task {
            registers: core::array::from_fn(|n| self.register(vmcs, Gpr::from_number(n as u8)) as u32),
            eip: (vmcs.read(fields::GUEST_RIP) as u32).wrapping_add(length),
            eflags: (vmcs.read(fields::GUEST_RFLAGS) & !resume) as u32,
            cr3: self.control.cr3 as u32,
            segments: SEGMENTS.map(|name| state_of(name.read(vmcs))),
            ldtr: state_of(SegmentName::Ldtr.read(vmcs)),
            tr: state_of(SegmentName::Tr.read(vmcs)),
        }
    }

    /// Installs the new task, and what it begins with.
    fn begin_task(&mut self, core: &Core, vmcs: &CurrentVmcs, source: Source, arrival: &Arrival) -> Next {
        let Arrival { task, exception, trap } = arrival;
        for (n, &value) in task.registers.iter().enumerate() {
            self.set_register(vmcs, Gpr::from_number(n as u8), value.into());
        }
        vmcs.write(fields::GUEST_RIP, task.eip.into());
        vmcs.write(fields::GUEST_RFLAGS, task.eflags.into());
        for (name, &state) in SEGMENTS.iter().zip(&task.segments) {
            name.write(vmcs, &segment_of(state));
        }
        SegmentName::Ldtr.write(vmcs, &segment_of(task.ldtr));
        SegmentName::Tr.write(vmcs, &segment_of(task.tr));
        vmcs.write(fields::GUEST_DR7, vmcs.read(fields::GUEST_DR7) & !DR7_LOCAL);

        let state = Interruptibility::from_bits_retain(vmcs.read(fields::GUEST_INTERRUPTIBILITY));
        let by_nmi = self.event.is_some_and(|event| event.kind == InterruptionType::Nmi);
        let after = match source {
            Source::Iret => state.after_instruction() - Interruptibility::NMI,
            Source::Gate if by_nmi => state.after_instruction() | Interruptibility::NMI,
            _ => state.after_instruction(),
        };
        vmcs.write(fields::GUEST_INTERRUPTIBILITY, after.bits());
        vmcs.write(fields::GUEST_PENDING_DEBUG_EXCEPTIONS, 0);
        self.attend();
        if let Some(exception) = exception {
            // Raised in the delivery of the event, if there is one. An interrupt has been taken by then, and does not come
            // again; an exception and this one may make a double fault.
            let taken = [InterruptionType::External, InterruptionType::Nmi];
            self.event = self.event.take().filter(|event| !taken.contains(&event.kind));
            return self.fault(core, vmcs, *exception);
        }
        self.event = None;
        if *trap {
            self.extended.set_dr(DR6, self.extended.dr(DR6) | DR6_TASK);
            return self.fault(core, vmcs, Exception::DEBUG);
        }
        Next::Resume
    }
}
