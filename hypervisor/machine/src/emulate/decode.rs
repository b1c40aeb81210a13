//! From bytes to an [`Instruction`]: the commonest forms by hand, all others through iced-x86.

use iced_x86::{Decoder, DecoderOptions, Mnemonic, OpKind, Register};

use super::INSTRUCTION_BYTES_MAX;
use super::fast;
use super::instruction::{
    AluOperation, BitOperation, Instruction, MemoryOperand, Operand, Operation, StringKind,
};
use crate::cpu::registers::{CodeSize, Gpr, SegmentName, Width};

/// Builds the decoder's tables. The first decode makes thousands of allocations, which must happen at boot and
/// not on an exit path.
pub fn init() {
    for code in [CodeSize::Bits16, CodeSize::Bits32, CodeSize::Bits64] {
        let _ = decode_general(&[0x89, 0x00], code, 0);
    }
}

/// Decodes the instruction that begins at `rip`; `None` if it is none that the emulator carries out, or if
/// `bytes` end too early.
#[must_use]
#[inline]
pub fn decode(bytes: &[u8], code: CodeSize, rip: u64) -> Option<Instruction> {
    if code == CodeSize::Bits64
        && let Some(instruction) = fast::decode(bytes, rip)
    {
        return Some(instruction);
    }
    decode_general(bytes, code, rip)
}

/// As [`decode`], without the short cut.
#[must_use]
pub fn decode_general(bytes: &[u8], code: CodeSize, rip: u64) -> Option<Instruction> {
    let decoded = decode_raw(bytes, code, rip)?;
    let operation = operation_of(&decoded)?;
    let length = decoded.len() as u8;
    if let Operation::String { .. } = operation {
        let width = string_width(decoded.mnemonic())?;
        return Some(Instruction {
            operation,
            width,
            length,
            destination: Operand::None,
            source: Operand::None,
        });
    }
    let width = operand_width(&decoded, 0)?;
    // CMPXCHG8B and 16B name a memory operand twice as wide as the registers it is compared with.
    let width = match operation {
        Operation::CompareExchangePair => width.half()?,
        Operation::Push | Operation::Pop => {
            Width::from_bytes(decoded.stack_pointer_increment().unsigned_abs() as usize)?
        }
        _ => width.scalar()?,
    };
    let operation = match operation {
        Operation::MovZeroExtend(_) => Operation::MovZeroExtend(operand_width(&decoded, 1)?.scalar()?),
        Operation::MovSignExtend(_) => Operation::MovSignExtend(operand_width(&decoded, 1)?.scalar()?),
        other => other,
    };
    let destination = operand(&decoded, 0)?;
    let source = if decoded.op_count() > 1 { operand(&decoded, 1)? } else { Operand::None };
    // XCHG is encoded with either operand first.
    let (destination, source) = match (operation, destination, source) {
        (Operation::Exchange, register, memory @ Operand::Memory(_)) => (memory, register),
        (_, destination, source) => (destination, source),
    };
    Some(Instruction { operation, width, length, destination, source })
}

/// iced's own view of an instruction.
pub(super) fn decode_raw(bytes: &[u8], code: CodeSize, rip: u64) -> Option<iced_x86::Instruction> {
    let bytes = &bytes[..bytes.len().min(INSTRUCTION_BYTES_MAX)];
    let mut decoder = Decoder::with_ip(code.bits(), bytes, rip, DecoderOptions::NONE);
    if !decoder.can_decode() {
        return None;
    }
    let decoded = decoder.decode();
    if decoded.is_invalid() { None } else { Some(decoded) }
}

/// Widths of the `String`, `MovZeroExtend` and `MovSignExtend` operations are placeholders here.
fn operation_of(decoded: &iced_x86::Instruction) -> Option<Operation> {
    let string = |kind| string_operation(decoded, kind);
    Some(match decoded.mnemonic() {
        Mnemonic::Mov | Mnemonic::Movnti => Operation::Mov,
        Mnemonic::Movzx => Operation::MovZeroExtend(Width::Byte),
        Mnemonic::Movsx | Mnemonic::Movsxd => Operation::MovSignExtend(Width::Byte),
        Mnemonic::Add => Operation::Alu(AluOperation::Add),
        Mnemonic::Or => Operation::Alu(AluOperation::Or),
        Mnemonic::Adc => Operation::Alu(AluOperation::Adc),
        Mnemonic::Sbb => Operation::Alu(AluOperation::Sbb),
        Mnemonic::And => Operation::Alu(AluOperation::And),
        Mnemonic::Sub => Operation::Alu(AluOperation::Sub),
        Mnemonic::Xor => Operation::Alu(AluOperation::Xor),
        Mnemonic::Cmp => Operation::Alu(AluOperation::Cmp),
        Mnemonic::Test => Operation::Test,
        Mnemonic::Inc => Operation::Increment,
        Mnemonic::Dec => Operation::Decrement,
        Mnemonic::Neg => Operation::Negate,
        Mnemonic::Not => Operation::Not,
        Mnemonic::Bt => Operation::Bit(BitOperation::Test),
        Mnemonic::Bts => Operation::Bit(BitOperation::Set),
        Mnemonic::Btr => Operation::Bit(BitOperation::Reset),
        Mnemonic::Btc => Operation::Bit(BitOperation::Complement),
        Mnemonic::Xchg => Operation::Exchange,
        Mnemonic::Xadd => Operation::ExchangeAdd,
        Mnemonic::Cmpxchg => Operation::CompareExchange,
        Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b => Operation::CompareExchangePair,
        Mnemonic::Push => Operation::Push,
        Mnemonic::Pop => Operation::Pop,
        Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq => string(StringKind::Store)?,
        // MOVSD is an SSE instruction too, with other operands: `string_operation` tells.
        Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq => string(StringKind::Move)?,
        Mnemonic::Lodsb | Mnemonic::Lodsw | Mnemonic::Lodsd | Mnemonic::Lodsq => string(StringKind::Load)?,
        _ => return None,
    })
}

fn string_operation(decoded: &iced_x86::Instruction, kind: StringKind) -> Option<Operation> {
    let memory = if kind == StringKind::Store { decoded.op0_kind() } else { decoded.op1_kind() };
    let address = string_address(memory)?;
    // The destination of STOS and MOVS is ES whatever the prefix says.
    let segment = match kind {
        StringKind::Store => SegmentName::Es,
        StringKind::Move | StringKind::Load => segment(decoded.memory_segment())?,
    };
    let repeat = decoded.has_rep_prefix() || decoded.has_repne_prefix();
    Some(Operation::String { kind, address, segment, repeat })
}

/// Width of the index register of a string operand.
pub(super) fn string_address(kind: OpKind) -> Option<Width> {
    match kind {
        OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => Some(Width::Word),
        OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => Some(Width::Dword),
        OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => Some(Width::Qword),
        _ => None,
    }
}

fn string_width(mnemonic: Mnemonic) -> Option<Width> {
    match mnemonic {
        Mnemonic::Stosb | Mnemonic::Movsb | Mnemonic::Lodsb => Some(Width::Byte),
        Mnemonic::Stosw | Mnemonic::Movsw | Mnemonic::Lodsw => Some(Width::Word),
        Mnemonic::Stosd | Mnemonic::Movsd | Mnemonic::Lodsd => Some(Width::Dword),
        Mnemonic::Stosq | Mnemonic::Movsq | Mnemonic::Lodsq => Some(Width::Qword),
        _ => None,
    }
}

/// Bytes of an operand; 16 only for CMPXCHG16B.
struct OperandBytes(usize);

impl OperandBytes {
    fn scalar(&self) -> Option<Width> {
        Width::from_bytes(self.0)
    }
    fn half(&self) -> Option<Width> {
        Width::from_bytes(self.0 / 2)
    }
}

fn operand_width(decoded: &iced_x86::Instruction, number: u32) -> Option<OperandBytes> {
    match decoded.op_kind(number) {
        OpKind::Register => Some(OperandBytes(decoded.op_register(number).size())),
        OpKind::Memory => Some(OperandBytes(decoded.memory_size().size())),
        // PUSH of an immediate; its width is taken from the stack pointer's step.
        _ => Some(OperandBytes(8)),
    }
}

fn operand(decoded: &iced_x86::Instruction, number: u32) -> Option<Operand> {
    Some(match decoded.op_kind(number) {
        OpKind::Register => register_operand(decoded.op_register(number))?,
        OpKind::Memory => Operand::Memory(memory_operand(decoded)?),
        OpKind::Immediate8
        | OpKind::Immediate16
        | OpKind::Immediate32
        | OpKind::Immediate64
        | OpKind::Immediate8to16
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32to64 => Operand::Immediate(decoded.immediate(number)),
        _ => return None,
    })
}

/// General-purpose registers alone: MOV to and from segment registers is not carried out.
fn register_operand(register: Register) -> Option<Operand> {
    match register {
        Register::AH | Register::CH | Register::DH | Register::BH => {
            Some(Operand::HighByte(Gpr::from_number((register.number() - 4) as u8)))
        }
        _ => gpr(register).map(Operand::Register),
    }
}

fn gpr(register: Register) -> Option<Gpr> {
    register.is_gpr().then(|| Gpr::from_number(register.full_register().number() as u8))
}

fn segment(register: Register) -> Option<SegmentName> {
    register.is_segment_register().then(|| SegmentName::from_number(register.number() as u8))?
}

fn memory_operand(decoded: &iced_x86::Instruction) -> Option<MemoryOperand> {
    let (base, index) = (decoded.memory_base(), decoded.memory_index());
    let relative = matches!(base, Register::RIP | Register::EIP);
    let named = if base != Register::None { base } else { index };
    let address = match named {
        Register::None => decoded.memory_displ_size() as usize,
        register => register.size(),
    };
    let optional = |register: Register| match register {
        Register::None => Some(None),
        register => gpr(register).map(Some),
    };
    Some(MemoryOperand {
        segment: segment(decoded.memory_segment())?,
        base: if relative { None } else { optional(base)? },
        index: optional(index)?,
        shift: decoded.memory_index_scale().trailing_zeros() as u8,
        displacement: decoded.memory_displacement64(),
        address: Width::from_bytes(address)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode64(bytes: &[u8]) -> Instruction {
        decode_general(bytes, CodeSize::Bits64, 0x1000).unwrap()
    }

    #[test]
    fn forms() {
        // lock cmpxchg16b [rdi]
        let i = decode64(&[0xf0, 0x48, 0x0f, 0xc7, 0x0f]);
        assert_eq!((i.operation, i.width, i.length), (Operation::CompareExchangePair, Width::Qword, 5));
        // push qword [rax]
        let i = decode64(&[0xff, 0x30]);
        assert_eq!((i.operation, i.width), (Operation::Push, Width::Qword));
        // push 0x12 in 32-bit code
        let i = decode_general(&[0x6a, 0x12], CodeSize::Bits32, 0).unwrap();
        assert_eq!(
            (i.operation, i.width, i.destination),
            (Operation::Push, Width::Dword, Operand::Immediate(0x12))
        );
        // xchg eax, [rdi]: the memory operand comes first
        let i = decode64(&[0x87, 0x07]);
        assert!(matches!(i.destination, Operand::Memory(_)) && i.source == Operand::Register(Gpr::Rax));
        // movzx eax, byte [rip + 0x10]
        let i = decode64(&[0x0f, 0xb6, 0x05, 0x10, 0, 0, 0]);
        let Operand::Memory(memory) = i.source else { panic!("{i:?}") };
        assert_eq!(
            (i.operation, memory.displacement, memory.base),
            (Operation::MovZeroExtend(Width::Byte), 0x1017, None)
        );
        // mov eax, moffs64
        let i = decode64(&[0xa1, 0xf0, 0, 0xe0, 0xfe, 0, 0, 0, 0]);
        let Operand::Memory(memory) = i.source else { panic!("{i:?}") };
        assert_eq!((memory.displacement, memory.address, i.length), (0xfee0_00f0, Width::Qword, 9));
        // rep stosq
        let i = decode64(&[0xf3, 0x48, 0xab]);
        assert_eq!(i.width, Width::Qword);
        assert!(matches!(
            i.operation,
            Operation::String { kind: StringKind::Store, address: Width::Qword, repeat: true, .. }
        ));
    }

    #[test]
    fn what_is_not_carried_out() {
        for bytes in [
            &[0xf2, 0x0f, 0x10, 0x00][..], // movsd xmm0, [rax]
            &[0x8c, 0x18],                 // mov [rax], ds
            &[0x0f, 0x0b],                 // ud2
            &[0x48],                       // cut off
            &[],
            &[0xff, 0x10], // call [rax]
        ] {
            assert_eq!(decode_general(bytes, CodeSize::Bits64, 0), None, "{bytes:x?}");
        }
    }
}
