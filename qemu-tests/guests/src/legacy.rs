//! 32-bit protected mode, for guests that live in long mode: a script of single instructions, run with any paging
//! or none, each with what it found or which exception it raised.

use core::arch::global_asm;

use crate::{cpu, trap};

global_asm!(include_str!("legacy.s"), options(att_syntax));

unsafe extern "C" {
    fn legacy_run(first: *mut Step);
    static legacy_gdt: [u64; 32];
    static legacy_idt: [u64; 128];
    static legacy_stubs: [[u8; 16]; 32];
    static legacy_task: [u8; 0];
}

/// What a step does; its operands are `a`, `b` and `c`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs)] // the instructions' own names
pub enum Do {
    /// Back to long mode.
    Exit,
    /// Reads four bytes at `a`.
    Read,
    /// Writes `b` to `a`.
    Write,
    WriteCr0,
    WriteCr3,
    WriteCr4,
    ReadCr0,
    ReadCr3,
    ReadCr4,
    /// Writes `c`:`b` to register `a`.
    WriteMsr,
    ReadMsr,
    Invlpg,
    /// Of type `a`, with the descriptor at `b`.
    Invpcid,
    /// STR.
    TaskRegister,
    Flags,
    SetFlags,
    /// A far jump to selector `a`.
    Jump,
    /// A far call of selector `a`.
    Call,
    /// IRET.
    Return,
    /// INT 0x40.
    Interrupt,
    /// INT3.
    Breakpoint,
    /// Takes a dword off the stack.
    Pop,
    StackPointer,
    /// Reads four bytes at `a` in FS.
    ReadFs,
    /// LTR.
    LoadTaskRegister,
    ReadDr6,
    ReadDr7,
    WriteDr7,
    WriteDr6,
    ReadCr2,
    /// The sum of EBX, EBP and EDI.
    Registers,
    /// Sets EBX, EBP and EDI.
    SetRegisters,
    /// CLTS.
    ClearTaskSwitched,
}

/// No exception.
pub const NONE: u32 = u32::MAX;

/// One instruction, and what became of it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Step {
    what: Do,
    operands: [u32; 3],
    /// What it found; after an exception the EIP that was pushed.
    pub result: u32,
    /// The upper half of what it found.
    pub high: u32,
    /// The exception that it raised, or [`NONE`].
    pub vector: u32,
    /// Its error code.
    pub error: u32,
}

impl Step {
    /// A step with its operands.
    #[must_use]
    pub const fn new(what: Do, a: u32, b: u32, c: u32) -> Self {
        Self { what, operands: [a, b, c], result: 0, high: 0, vector: NONE, error: 0 }
    }

    /// What it found, if it raised nothing.
    #[must_use]
    pub fn found(&self) -> Option<u32> {
        (self.vector == NONE).then_some(self.result)
    }

    /// The exception that it raised, with its error code.
    #[must_use]
    pub fn raised(&self) -> Option<(u32, u32)> {
        (self.vector != NONE).then_some((self.vector, self.error))
    }
}

/// Steps, one after the other. A script of the main program ends with [`Do::Exit`], which [`run`] adds.
pub struct Script<const N: usize> {
    steps: [Step; N],
    length: usize,
}

impl<const N: usize> Default for Script<N> {
    fn default() -> Self {
        Self { steps: [Step::new(Do::Exit, 0, 0, 0); N], length: 0 }
    }
}

impl<const N: usize> Script<N> {
    /// Forgets all steps.
    pub fn clear(&mut self) {
        self.steps = [Step::new(Do::Exit, 0, 0, 0); N];
        self.length = 0;
    }

    /// Adds a step; its number.
    pub fn add(&mut self, what: Do, a: u32, b: u32) -> usize {
        self.add_three(what, a, b, 0)
    }

    /// The same with three operands.
    pub fn add_three(&mut self, what: Do, a: u32, b: u32, c: u32) -> usize {
        assert!(self.length + 1 < N, "a longer script is needed");
        self.steps[self.length] = Step::new(what, a, b, c);
        self.length += 1;
        self.length - 1
    }

    /// The address of its first step.
    #[must_use]
    pub fn address(&self) -> u32 {
        self.steps.as_ptr() as u32
    }

    /// A step after the run.
    #[must_use]
    pub fn step(&self, number: usize) -> Step {
        // SAFETY: inside the array; volatile because code that the compiler does not see has written it.
        unsafe { (&raw const self.steps[number]).read_volatile() }
    }

    /// Leaves long mode, carries the script out from 32-bit mode with paging off on, and comes back.
    pub fn run(&mut self) {
        // SAFETY: the script ends with `Exit`, whose last step no `add` overwrites; the way back restores all
        // registers that the ABI keeps, and the tables that `trap::install` makes are loaded anew.
        unsafe { legacy_run(self.steps.as_mut_ptr()) }
        trap::install();
    }
}

/// Sets entry `selector` of the GDT that scripts run with, whose 32 entries from number 4 on are free.
pub fn set_descriptor(selector: u32, raw: u64) {
    cpu::write64(descriptor_address(selector), raw);
}

/// An entry of the GDT that scripts run with.
#[must_use]
pub fn descriptor(selector: u32) -> u64 {
    cpu::read64(descriptor_address(selector))
}

fn descriptor_address(selector: u32) -> u64 {
    assert!(selector < 32 * 8);
    &raw const legacy_gdt as u64 + u64::from(selector & !7)
}

/// Sets a gate of the IDT that scripts run with, which has 128.
pub fn set_gate(vector: u32, raw: u64) {
    assert!(vector < 128);
    cpu::write64(u64::from(gates_address()) + 8 * u64::from(vector), raw);
}

/// The interrupt gates of the exceptions: each notes itself in the step that raised it.
pub fn set_exception_gates() {
    for vector in 0..32 {
        set_gate(vector, exception_gate(vector));
    }
}

/// The interrupt gate of exception `vector`.
#[must_use]
pub fn exception_gate(vector: u32) -> u64 {
    // SAFETY: the stubs are 32 of 16 bytes each; the index is checked.
    let stub = unsafe { &raw const legacy_stubs[vector as usize] } as u64;
    stub & 0xffff | 0x08 << 16 | 0x8e << 40 | stub >> 16 << 48
}

/// Where the IDT that scripts run with lies, 8 bytes a gate.
#[must_use]
pub fn gates_address() -> u32 {
    &raw const legacy_idt as u32
}

/// Where a task begins that carries out the script in its ESI.
#[must_use]
pub fn task_entry() -> u32 {
    &raw const legacy_task as u32
}

/// Writes four bytes of memory that scripts or the processor use in 32-bit mode.
pub fn poke(address: u32, value: u32) {
    cpu::write32(address.into(), value);
}

/// Reads them.
#[must_use]
pub fn peek(address: u32) -> u32 {
    cpu::read32(address.into())
}
