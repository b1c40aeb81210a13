//! A decoded instruction, reduced to what the emulator knows to do.

use crate::cpu::registers::{Gpr, SegmentName, Width};

/// An instruction with its operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// What it does.
    pub operation: Operation,
    /// Width of its operands; of the destination where they differ.
    pub width: Width,
    /// Bytes, 1..=15.
    pub length: u8,
    /// Written, or read and written, or (CMP, TEST, BT, PUSH) only read.
    pub destination: Operand,
    /// Read.
    pub source: Operand,
}

/// What an instruction does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// MOV and MOVNTI.
    Mov,
    /// MOVZX from this width.
    MovZeroExtend(Width),
    /// MOVSX and MOVSXD from this width.
    MovSignExtend(Width),
    /// Two-operand arithmetic and logic.
    Alu(AluOperation),
    /// TEST.
    Test,
    /// INC.
    Increment,
    /// DEC.
    Decrement,
    /// NEG.
    Negate,
    /// NOT.
    Not,
    /// BT, BTS, BTR, BTC.
    Bit(BitOperation),
    /// XCHG.
    Exchange,
    /// XADD.
    ExchangeAdd,
    /// CMPXCHG.
    CompareExchange,
    /// CMPXCHG8B (width dword) and CMPXCHG16B (width qword).
    CompareExchangePair,
    /// PUSH.
    Push,
    /// POP.
    Pop,
    /// A string instruction; the operands are implied.
    String {
        /// Which.
        kind: StringKind,
        /// Width of RSI, RDI and RCX as used.
        address: Width,
        /// Segment of the source.
        segment: SegmentName,
        /// With a REP prefix.
        repeat: bool,
    },
}

/// Arithmetic and logic on two operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the instructions' own names
pub enum AluOperation {
    Add,
    Or,
    Adc,
    Sbb,
    And,
    Sub,
    Xor,
    Cmp,
}

/// What a bit instruction does with the bit that it has copied to CF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitOperation {
    /// BT.
    Test,
    /// BTS.
    Set,
    /// BTR.
    Reset,
    /// BTC.
    Complement,
}

/// String instructions on memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StringKind {
    /// STOS.
    Store,
    /// MOVS.
    Move,
    /// LODS.
    Load,
}

/// Where an operand is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operand {
    /// There is none.
    None,
    /// The low part of a register.
    Register(Gpr),
    /// AH, CH, DH or BH: bits 15:8 of this register.
    HighByte(Gpr),
    /// Sign-extended to 64 bits.
    Immediate(u64),
    /// In memory.
    Memory(MemoryOperand),
}

/// How a memory operand's address is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryOperand {
    /// Which segment.
    pub segment: SegmentName,
    /// Base register.
    pub base: Option<Gpr>,
    /// Index register.
    pub index: Option<Gpr>,
    /// The index is shifted left by so many bits, 0..=3.
    pub shift: u8,
    /// Displacement, sign-extended; the target itself if RIP-relative.
    pub displacement: u64,
    /// Width of the address before the segment's base is added.
    pub address: Width,
}
