//! Segment descriptors: where they are, what they say, and what a task switch demands of them (SDM Vol. 3,
//! "Exception Conditions Checked During a Task Switch").

use super::super::event::Exception;
use super::super::registers::{SegmentName, SegmentState};
use super::{Gdt, Linear, Privilege, Task};

/// Access rights of a segment register that holds no segment.
const UNUSABLE: u32 = 1 << 16;
/// Flat, present, accessed code of 32 bits, DPL 0.
const CODE_32: u32 = 0xc09b;
/// The accessed bit of a code or data segment's type.
const ACCESSED: u8 = 1;
/// Type of an LDT's descriptor.
const LDT: u8 = 2;

/// A segment descriptor as it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Descriptor {
    address: u32,
    raw: u64,
}

impl Descriptor {
    /// Where it lies.
    pub const fn address(&self) -> u32 {
        self.address
    }
    /// The type, 0..16.
    pub const fn kind(&self) -> u8 {
        (self.raw >> 40) as u8 & 15
    }
    pub const fn set_kind(&mut self, kind: u8) {
        self.raw = self.raw & !(15 << 40) | (kind as u64) << 40;
    }
    /// No code or data.
    pub const fn is_system(&self) -> bool {
        self.raw >> 44 & 1 == 0
    }
    /// The descriptor privilege level.
    pub const fn dpl(&self) -> u16 {
        (self.raw >> 45) as u16 & 3
    }
    pub const fn present(&self) -> bool {
        self.raw >> 47 & 1 != 0
    }
    pub const fn base(&self) -> u32 {
        (self.raw >> 16 & 0xff_ffff | self.raw >> 56 << 24) as u32
    }
    /// The last valid offset, in bytes.
    pub const fn limit(&self) -> u32 {
        let raw = (self.raw & 0xffff | self.raw >> 32 & 0xf_0000) as u32;
        if self.raw >> 55 & 1 != 0 { raw << 12 | 0xfff } else { raw }
    }
    const fn is_code(&self) -> bool {
        !self.is_system() && self.kind() & 8 != 0
    }
    const fn is_conforming(&self) -> bool {
        self.is_code() && self.kind() & 4 != 0
    }
    const fn is_readable(&self) -> bool {
        !self.is_system() && (!self.is_code() || self.kind() & 2 != 0)
    }
    const fn is_writable(&self) -> bool {
        !self.is_system() && !self.is_code() && self.kind() & 2 != 0
    }

    /// What a segment register holds once it is loaded with it.
    pub const fn segment(&self, selector: u16) -> SegmentState {
        SegmentState {
            selector,
            base: self.base() as u64,
            limit: self.limit(),
            rights: (self.raw >> 40) as u32 & 0xf0ff,
        }
    }

    /// Writes the byte with the type back.
    pub fn write_back<M: Linear>(&self, memory: &mut M) {
        memory.write(self.address.wrapping_add(5), &[(self.raw >> 40) as u8], Privilege::Supervisor);
    }
}

/// A descriptor table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table {
    base: u32,
    limit: u32,
}

impl Table {
    pub const fn new(gdt: Gdt) -> Self {
        Self { base: gdt.base, limit: gdt.limit as u32 }
    }

    /// Where the descriptor of `selector` lies, whichever table its TI names; `None` if not in this one, and for
    /// the null selector.
    pub const fn address(&self, selector: u16) -> Option<u32> {
        let offset = selector as u32 & !7;
        if offset + 7 > self.limit || selector & !3 == 0 {
            None
        } else {
            Some(self.base.wrapping_add(offset))
        }
    }

    pub fn read<M: Linear>(&self, memory: &M, selector: u16) -> Result<Option<Descriptor>, Exception> {
        let Some(address) = self.address(selector) else { return Ok(None) };
        let mut bytes = [0; 8];
        memory.read(address, &mut bytes)?;
        Ok(Some(Descriptor { address, raw: u64::from_le_bytes(bytes) }))
    }
}

/// Loads a new task's segment registers.
pub(super) struct Loader<'a, M> {
    pub memory: &'a mut M,
    pub gdt: Table,
    pub external: bool,
}

impl<M: Linear> Loader<'_, M> {
    /// Loads LDTR and the six segment registers of `task`, whose LDTR holds its selector. What comes after the first
    /// that cannot be loaded is left as a VM entry takes it: no segment, or a code segment that nothing is fetched
    /// from, since the exception is delivered before the first instruction.
    pub fn load(&mut self, task: &mut Task, selectors: &[u16; 6]) -> Result<(), Exception> {
        let cs = selectors[SegmentName::Cs as usize];
        let level = cs & 3;
        task.ldtr.rights = UNUSABLE;
        for (segment, &selector) in task.segments.iter_mut().zip(selectors) {
            *segment = SegmentState { selector, rights: UNUSABLE, ..SegmentState::default() };
        }
        task.segments[SegmentName::Cs as usize] =
            SegmentState { selector: cs, base: 0, limit: u32::MAX, rights: CODE_32 | u32::from(level) << 5 };
        // An entry wants its RPL and its DPL to be those of CS, even where it is no segment.
        task.segments[SegmentName::Ss as usize] = SegmentState {
            selector: level,
            rights: UNUSABLE | u32::from(level) << 5,
            ..SegmentState::default()
        };

        self.load_ldtr(&mut task.ldtr)?;
        let ldt = task.ldtr;
        let code = self.code(&ldt, cs)?;
        task.segments[SegmentName::Cs as usize] = code;
        let stack = self.stack(&ldt, selectors[SegmentName::Ss as usize], level)?;
        task.segments[SegmentName::Ss as usize] = stack;
        for name in [SegmentName::Ds, SegmentName::Es, SegmentName::Fs, SegmentName::Gs] {
            let selector = selectors[name as usize];
            if selector & !3 != 0 {
                task.segments[name as usize] = self.data(&ldt, selector, level)?;
            }
        }
        Ok(())
    }

    fn error_code(&self, selector: u16) -> u32 {
        u32::from(selector & !3) | u32::from(self.external)
    }

    fn invalid(&self, selector: u16) -> Exception {
        Exception::invalid_tss(self.error_code(selector))
    }

    fn load_ldtr(&mut self, ldtr: &mut SegmentState) -> Result<(), Exception> {
        let selector = ldtr.selector;
        if selector & !3 == 0 {
            return Ok(());
        }
        let found = if selector & 4 == 0 { self.gdt.read(self.memory, selector)? } else { None };
        match found {
            Some(found) if found.is_system() && found.kind() == LDT && found.present() => {
                *ldtr = found.segment(selector);
                Ok(())
            }
            _ => Err(self.invalid(selector)),
        }
    }

    /// The descriptor of `selector`, in the table that it names.
    fn find(&self, ldt: &SegmentState, selector: u16) -> Result<Descriptor, Exception> {
        let table = if selector & 4 == 0 {
            self.gdt
        } else if ldt.unusable() {
            return Err(self.invalid(selector));
        } else {
            Table { base: ldt.base as u32, limit: ldt.limit }
        };
        table.read(self.memory, selector)?.ok_or(self.invalid(selector))
    }

    /// Marks the descriptor as accessed, and loads it.
    fn accessed(&mut self, mut found: Descriptor, selector: u16) -> Result<SegmentState, Exception> {
        if found.kind() & ACCESSED == 0 {
            self.memory.check_write(found.address, 8, Privilege::Supervisor)?;
            found.set_kind(found.kind() | ACCESSED);
            found.write_back(self.memory);
        }
        Ok(found.segment(selector))
    }

    fn code(&mut self, ldt: &SegmentState, selector: u16) -> Result<SegmentState, Exception> {
        let found = self.find(ldt, selector)?;
        let level = selector & 3;
        let privileged = if found.is_conforming() { found.dpl() <= level } else { found.dpl() == level };
        if !found.is_code() || !privileged {
            return Err(self.invalid(selector));
        }
        if !found.present() {
            return Err(Exception::not_present(self.error_code(selector)));
        }
        self.accessed(found, selector)
    }

    fn stack(&mut self, ldt: &SegmentState, selector: u16, level: u16) -> Result<SegmentState, Exception> {
        let found = self.find(ldt, selector)?;
        if !found.is_writable() || found.dpl() != level || selector & 3 != level {
            return Err(self.invalid(selector));
        }
        if !found.present() {
            return Err(Exception::stack_fault(self.error_code(selector)));
        }
        self.accessed(found, selector)
    }

    fn data(&mut self, ldt: &SegmentState, selector: u16, level: u16) -> Result<SegmentState, Exception> {
        let found = self.find(ldt, selector)?;
        let privileged = found.is_conforming() || found.dpl() >= level.max(selector & 3);
        if !found.is_readable() || !privileged {
            return Err(self.invalid(selector));
        }
        if !found.present() {
            return Err(Exception::not_present(self.error_code(selector)));
        }
        self.accessed(found, selector)
    }
}
