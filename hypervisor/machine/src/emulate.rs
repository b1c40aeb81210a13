//! Carries out, in the guest's place, an instruction that touched memory it may not touch by itself: MMIO, or RAM
//! that no shadow entry can open to it alone; and string port I/O.
//!
//! The hypervisor lends the vCPU's registers ([`Cpu`]) and its linear address space ([`Bus`]); the emulator
//! decodes, calculates and calls back. Everything it is given is an allegation: any bytes, any registers.
//! What it does not know is [`Outcome::Unsupported`]: the guest is stopped with a report.

mod alu;
mod decode;
mod execute;
mod fast;
mod instruction;
mod invpcid;
mod port;
mod string;

use memory::Gva;

use crate::cpu::event::Exception;
use crate::cpu::registers::{CodeSize, Gpr, SegmentName, SegmentState, Width};

pub use decode::{decode, decode_general, init};
pub use execute::execute;
pub use instruction::{
    AluOperation, BitOperation, Instruction, MemoryOperand, Operand, Operation, StringKind,
};
pub use invpcid::{Invalidation, Invpcid, invpcid};
pub use port::{Flow, Ports, StringIo, string_io};

/// Bytes of the longest instruction.
pub const INSTRUCTION_BYTES_MAX: usize = 15;

/// Elements that one call carries out of a repeated string instruction: a page of quadwords. The guest's
/// interrupts wait for no longer.
pub const REPEAT_MAX: u64 = 512;

/// The vCPU's registers. Only what an instruction uses is asked for, because some cost a VMREAD.
pub trait Cpu {
    /// All 64 bits of a general-purpose register.
    fn register(&self, register: Gpr) -> u64;
    /// Sets all 64 bits of a general-purpose register.
    fn set_register(&mut self, register: Gpr, value: u64);
    /// RIP: where the instruction begins.
    fn rip(&self) -> u64;
    /// Sets RIP.
    fn set_rip(&mut self, rip: u64);
    /// RFLAGS.
    fn rflags(&self) -> u64;
    /// Sets RFLAGS.
    fn set_rflags(&mut self, rflags: u64);
    /// Default size of the code that runs.
    fn code_size(&self) -> CodeSize;
    /// The hidden part of a segment register.
    fn segment(&self, name: SegmentName) -> SegmentState;
    /// Its base alone; all that 64-bit mode asks for, of FS and GS.
    fn segment_base(&self, name: SegmentName) -> u64 {
        self.segment(name).base
    }
}

/// Why an access did not take place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The guest's own doing: inject this.
    Exception(Exception),
    /// Something is missing on our side (a frame, a mapping that changed meanwhile): enter the guest again at
    /// the same instruction.
    Retry,
}

impl From<Exception> for Fault {
    fn from(exception: Exception) -> Self {
        Self::Exception(exception)
    }
}

/// The guest's memory by linear address, with the privilege of the guest's current level. The emulator splits
/// accesses at page boundaries: no call crosses one.
pub trait Bus {
    /// Reads memory or a device; the value is zero-extended.
    ///
    /// # Errors
    /// [`Fault`]; nothing was read.
    fn load(&mut self, gva: Gva, width: Width) -> Result<u64, Fault>;

    /// Writes memory (through the write tracker) or a device; only the low `width` of `value` counts.
    ///
    /// # Errors
    /// [`Fault`]; nothing was written.
    fn store(&mut self, gva: Gva, width: Width, value: u64) -> Result<(), Fault>;

    /// Whether a write of `bytes` bytes (1..=16) would be allowed, without doing it.
    ///
    /// # Errors
    /// [`Fault`] as the write would give it.
    fn check_write(&mut self, gva: Gva, bytes: usize) -> Result<(), Fault>;

    /// Replaces memory that still holds `old`; `Ok(false)` if it does not. Atomic on RAM, where other vCPUs may
    /// write at the same time; on a device it is a plain write.
    ///
    /// # Errors
    /// [`Fault`]; nothing was written.
    fn compare_exchange(&mut self, gva: Gva, width: Width, old: u64, new: u64) -> Result<bool, Fault>;

    /// The same for 16 aligned bytes, low half first. Unless overridden it is not atomic.
    ///
    /// # Errors
    /// [`Fault`].
    fn compare_exchange_pair(&mut self, gva: Gva, old: [u64; 2], new: [u64; 2]) -> Result<bool, Fault> {
        let upper = Gva(gva.0.wrapping_add(8));
        if self.load(gva, Width::Qword)? != old[0] || self.load(upper, Width::Qword)? != old[1] {
            return Ok(false);
        }
        self.store(gva, Width::Qword, new[0])?;
        self.store(upper, Width::Qword, new[1])?;
        Ok(true)
    }
}

/// What became of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// Carried out; RIP is behind it. STI and MOV SS blocking has ended, a single step is due if RFLAGS.TF is
    /// set: see `cpu::event`.
    Done,
    /// Some iterations of a repeated instruction are carried out, RIP is still at it: deliver what is pending,
    /// then enter the guest again. For blocking and single steps as `Done`.
    Continue,
    /// Inject this; RIP is at the instruction, no more than whole iterations have taken effect.
    Exception(Exception),
    /// Enter the guest again at the same instruction.
    Retry,
    /// The emulator does not know this instruction, or was not given enough of its bytes.
    Unsupported,
}

impl From<Fault> for Outcome {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Exception(exception) => Self::Exception(exception),
            Fault::Retry => Self::Retry,
        }
    }
}

/// Decodes and carries out the instruction at RIP, of which `bytes` are what could be read (at most 15 count).
pub fn emulate<M: Cpu + Bus>(machine: &mut M, bytes: &[u8]) -> Outcome {
    match decode(bytes, machine.code_size(), machine.rip()) {
        Some(instruction) => execute(machine, &instruction),
        None => Outcome::Unsupported,
    }
}

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
