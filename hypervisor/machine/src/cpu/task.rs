//! Hardware task switches of 32-bit guests: VMX has none, so every attempt exits and is carried out here (SDM
//! Vol. 3, "Task Management" and "Treatment of Task Switches").
//!
//! In three steps, so that the caller can change the address space between them: [`prepare`] checks and reads and
//! changes nothing, and what it refuses is the old task's exception; [`depart`] saves the old task and turns the
//! busy bits, and is the point of no return; [`arrive`] loads the segments of the new task in its own address
//! space, and what it refuses is the new task's exception.

mod segment;

use core::fmt;

use super::event::{Exception, RFLAGS_RESUME};
use super::registers::SegmentState;
use segment::{Descriptor, Loader, Table};

/// EFLAGS.NT.
const NESTED: u32 = 1 << 14;
/// EFLAGS.VM.
const VIRTUAL_8086: u32 = 1 << 17;
/// EFLAGS bits that exist; the others read 0, but for bit 1.
const FLAGS_DEFINED: u32 = 0x003f_7fd5;

/// Type of a system descriptor: 32-bit TSS, available.
const TSS32_AVAILABLE: u8 = 9;
/// 32-bit TSS, busy.
const TSS32_BUSY: u8 = 11;
/// What tells the two apart, in a descriptor's type.
const BUSY: u8 = 2;
/// 16-bit TSS, available or busy.
const TSS16: [u8; 2] = [1, 3];

/// Bytes of a 32-bit TSS up to the I/O map.
const TSS_BYTES: u32 = 104;
/// The last byte of what is saved in it.
const SAVED_LAST: u32 = 95;

/// Offsets in a 32-bit TSS (SDM Vol. 3, "Task-State Segment (TSS)").
mod offset {
    pub const LINK: usize = 0;
    pub const CR3: usize = 28;
    /// EIP, EFLAGS and the eight registers are in a row from here on.
    pub const EIP: usize = 32;
    pub const EFLAGS: usize = 36;
    pub const REGISTERS: usize = 40;
    /// ES, CS, SS, DS, FS, GS, each in four bytes.
    pub const SEGMENTS: usize = 72;
    pub const LDT: usize = 96;
    pub const TRAP: usize = 100;
}

/// What made the processor switch tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// CALL.
    Call,
    /// IRET with EFLAGS.NT set.
    Iret,
    /// JMP.
    Jump,
    /// An event through a task gate in the IDT.
    Gate,
}

/// Exit qualification of a task switch (SDM Vol. 3, "Exit Qualification for Task Switches").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskSwitch {
    /// Selector of the new task's TSS.
    pub selector: u16,
    /// What made it.
    pub source: Source,
}

impl TaskSwitch {
    /// From the exit qualification.
    #[must_use]
    pub const fn from_qualification(qualification: u64) -> Self {
        let source = match qualification >> 30 & 3 {
            0 => Source::Call,
            1 => Source::Iret,
            2 => Source::Jump,
            _ => Source::Gate,
        };
        Self { selector: qualification as u16, source }
    }
}

/// An event whose delivery goes through the task gate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// It is no instruction's own (INT n, INT3, INTO): error codes of what goes wrong say so by EXT.
    pub external: bool,
    /// It is a fault: RF is set in the flags that the old task goes on with.
    pub fault: bool,
    /// Pushed on the new task's stack.
    pub error_code: Option<u32>,
}

/// What a task switch saves and loads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Task {
    /// EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI.
    pub registers: [u32; 8],
    /// Where it goes on.
    pub eip: u32,
    /// EFLAGS.
    pub eflags: u32,
    /// CR3, which is loaded if paging is on, and never saved.
    pub cr3: u32,
    /// By [`super::registers::SegmentName`].
    pub segments: [SegmentState; 6],
    /// LDTR.
    pub ldtr: SegmentState,
    /// TR.
    pub tr: SegmentState,
}

/// GDTR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gdt {
    /// Linear address.
    pub base: u32,
    /// The last valid offset, in bytes.
    pub limit: u16,
}

/// With which rights an access is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privilege {
    /// The processor's own, of tables and task-state segments.
    Supervisor,
    /// The new task's at CPL 3.
    User,
}

/// The guest's memory by linear address, in the address space that is loaded.
pub trait Linear {
    /// Reads.
    ///
    /// # Errors
    /// The page fault.
    fn read(&self, address: u32, bytes: &mut [u8]) -> Result<(), Exception>;

    /// Whether `count` bytes could be written.
    ///
    /// # Errors
    /// The page fault that the write would raise.
    fn check_write(&self, address: u32, count: u32, privilege: Privilege) -> Result<(), Exception>;

    /// Writes what [`Linear::check_write`] has allowed.
    fn write(&mut self, address: u32, bytes: &[u8], privilege: Privilege);
}

/// Why no switch takes place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The old task's exception.
    Exception(Exception),
    /// What Umbra does not emulate.
    Unsupported(Unsupported),
}

/// Task switches that are not emulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsupported {
    /// To or from a task with a 16-bit TSS.
    Tss16,
    /// To a task in virtual-8086 mode.
    Virtual8086,
}

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tss16 => {
                "a task switch to or from a 16-bit TSS, which Umbra does not emulate: build the kernel with \
                 32-bit task-state segments"
            }
            Self::Virtual8086 => {
                "a task switch to a task in virtual-8086 mode, which Umbra does not emulate: build the kernel \
                 without virtual-8086 tasks"
            }
        })
    }
}

impl From<Exception> for Refusal {
    fn from(exception: Exception) -> Self {
        Self::Exception(exception)
    }
}

/// A task switch that may take place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prepared {
    source: Source,
    event: Event,
    gdt: Gdt,
    new: Task,
    selectors: [u16; 6],
    trap: bool,
    tss: Descriptor,
}

/// A new task, loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// Its state. Segments that could not be loaded hold what lets the exception be delivered.
    pub task: Task,
    /// What its segments or its stack raise, before its first instruction.
    pub exception: Option<Exception>,
    /// Its T bit: else, #DB with DR6.BT before its first instruction.
    pub trap: bool,
}

impl Prepared {
    /// CR3 of the new task.
    #[must_use]
    pub const fn cr3(&self) -> u32 {
        self.new.cr3
    }
}

/// Reads and checks all that a switch from `old` needs. (The processor has checked selector and descriptor of the
/// new TSS before the exit; another one may have changed the descriptor since.)
///
/// # Errors
/// [`Refusal`]; nothing has changed.
pub fn prepare<M: Linear>(
    memory: &M,
    gdt: Gdt,
    old: &Task,
    switch: TaskSwitch,
    event: Event,
) -> Result<Prepared, Refusal> {
    let code = u32::from(switch.selector & !3) | u32::from(event.external);
    let by_iret = switch.source == Source::Iret;
    let refused = if by_iret { Exception::invalid_tss(code) } else { Exception::general_protection(code) };
    let table = Table::new(gdt);
    if switch.selector & 4 != 0 || switch.selector >> 3 == 0 {
        return Err(refused.into());
    }
    let Some(tss) = table.read(memory, switch.selector)? else { return Err(refused.into()) };
    let wanted = if by_iret { TSS32_BUSY } else { TSS32_AVAILABLE };
    if tss.is_system() && TSS16.contains(&tss.kind()) || TSS16.contains(&(old.tr.rights as u8 & 15)) {
        return Err(Refusal::Unsupported(Unsupported::Tss16));
    }
    if !tss.is_system() || tss.kind() != wanted {
        return Err(refused.into());
    }
    if !tss.present() {
        return Err(Exception::not_present(code).into());
    }
    if tss.limit() < TSS_BYTES - 1 {
        return Err(Exception::invalid_tss(code).into());
    }
    if old.tr.limit < SAVED_LAST {
        let code = u32::from(old.tr.selector & !3) | u32::from(event.external);
        return Err(Exception::invalid_tss(code).into());
    }
    let mut image = [0; TSS_BYTES as usize];
    memory.read(tss.base(), &mut image)?;
    let dword = |at: usize| u32::from_le_bytes([image[at], image[at + 1], image[at + 2], image[at + 3]]);
    let eflags = dword(offset::EFLAGS) & FLAGS_DEFINED | 2;
    if eflags & VIRTUAL_8086 != 0 {
        return Err(Refusal::Unsupported(Unsupported::Virtual8086));
    }
    let nested = match switch.source {
        Source::Call | Source::Gate => NESTED,
        Source::Iret | Source::Jump => 0,
    };
    let mut new = Task {
        registers: core::array::from_fn(|n| dword(offset::REGISTERS + 4 * n)),
        eip: dword(offset::EIP),
        eflags: eflags | nested,
        cr3: dword(offset::CR3),
        tr: tss.segment(switch.selector),
        ..Task::default()
    };
    new.tr.rights |= u32::from(BUSY);
    new.ldtr.selector = dword(offset::LDT) as u16;
    // All that is going to be written, before anything is.
    memory.check_write(
        (old.tr.base as u32).wrapping_add(offset::EIP as u32),
        SAVED_LAST + 1 - offset::EIP as u32,
        Privilege::Supervisor,
    )?;
    if nested != 0 {
        memory.check_write(tss.base(), 2, Privilege::Supervisor)?;
    }
    if !by_iret {
        memory.check_write(tss.address(), 8, Privilege::Supervisor)?;
    }
    if !stays_busy(switch.source)
        && let Some(address) = table.address(old.tr.selector)
    {
        memory.check_write(address, 8, Privilege::Supervisor)?;
    }
    Ok(Prepared {
        source: switch.source,
        event,
        gdt,
        new,
        selectors: core::array::from_fn(|n| dword(offset::SEGMENTS + 4 * n) as u16),
        trap: image[offset::TRAP] & 1 != 0,
        tss,
    })
}

/// Whether the old task stays busy: it waits for the new one to return.
const fn stays_busy(source: Source) -> bool {
    matches!(source, Source::Call | Source::Gate)
}

/// Saves `old`, whose EIP is where it is to go on, and marks which tasks are busy.
///
/// # Errors
/// A page fault of the old task's, if another processor has changed the tables since [`prepare`].
pub fn depart<M: Linear>(memory: &mut M, old: &Task, prepared: &Prepared) -> Result<(), Exception> {
    let mut eflags = old.eflags;
    if prepared.source == Source::Iret {
        eflags &= !NESTED;
    }
    if prepared.event.fault {
        eflags |= RFLAGS_RESUME as u32;
    }
    let base = old.tr.base as u32;
    let mut saved = [0; 40];
    let values = [old.eip, eflags].into_iter().chain(old.registers);
    for (bytes, value) in saved.as_chunks_mut::<4>().0.iter_mut().zip(values) {
        *bytes = value.to_le_bytes();
    }
    let table = Table::new(prepared.gdt);
    let released = if stays_busy(prepared.source) { None } else { table.read(memory, old.tr.selector)? };
    memory.write(base.wrapping_add(offset::EIP as u32), &saved, Privilege::Supervisor);
    for (n, segment) in old.segments.iter().enumerate() {
        memory.write(
            base.wrapping_add((offset::SEGMENTS + 4 * n) as u32),
            &segment.selector.to_le_bytes(),
            Privilege::Supervisor,
        );
    }
    if let Some(mut descriptor) = released {
        descriptor.set_kind(descriptor.kind() & !BUSY);
        descriptor.write_back(memory);
    }
    if stays_busy(prepared.source) {
        memory.write(
            prepared.tss.base().wrapping_add(offset::LINK as u32),
            &old.tr.selector.to_le_bytes(),
            Privilege::Supervisor,
        );
    }
    if prepared.source != Source::Iret {
        let mut descriptor = prepared.tss;
        descriptor.set_kind(TSS32_BUSY);
        descriptor.write_back(memory);
    }
    Ok(())
}

/// Loads the new task's segments, and pushes the event's error code. The new task's CR3 is loaded.
pub fn arrive<M: Linear>(memory: &mut M, prepared: &Prepared) -> Arrival {
    let mut task = prepared.new;
    let mut loader = Loader { memory, gdt: Table::new(prepared.gdt), external: prepared.event.external };
    let loaded = loader.load(&mut task, &prepared.selectors);
    let exception = loaded.err().or_else(|| {
        let code = prepared.event.error_code?;
        push(memory, &mut task, code, prepared.event.external).err()
    });
    Arrival { task, exception, trap: prepared.trap }
}

/// Pushes an error code on the new task's stack.
fn push<M: Linear>(memory: &mut M, task: &mut Task, code: u32, external: bool) -> Result<(), Exception> {
    let stack = task.segments[super::registers::SegmentName::Ss as usize];
    let (mask, top) = if stack.big() { (u32::MAX, u32::MAX) } else { (0xffff, 0xffff) };
    let old = task.registers[4];
    let offset = old.wrapping_sub(4) & mask;
    let last = u64::from(offset) + 3;
    let inside = if stack.expands_down() {
        offset > stack.limit && last <= u64::from(top)
    } else {
        last <= u64::from(stack.limit)
    };
    if !inside {
        return Err(Exception::stack_fault(external.into()));
    }
    let address = (stack.base as u32).wrapping_add(offset);
    let privilege = if stack.rights >> 5 & 3 == 3 { Privilege::User } else { Privilege::Supervisor };
    memory.check_write(address, 4, privilege)?;
    memory.write(address, &code.to_le_bytes(), privilege);
    task.registers[4] = old & !mask | offset;
    Ok(())
}

#[cfg(test)]
mod tests;
