//! Carries out a decoded instruction.
//!
//! Order of effects: every check that can fault comes first, memory is written next, registers and flags last;
//! so a fault or a retry in the middle leaves the guest as if the instruction had not begun.

use memory::{Gva, PAGE_SIZE};

use super::alu::{self, CF, Computed, STATUS, ZF};
use super::instruction::{AluOperation, BitOperation, Instruction, MemoryOperand, Operand, Operation};
use super::{Bus, Cpu, Fault, Outcome, string};
use crate::cpu::event::{Exception, RFLAGS_RESUME};
use crate::cpu::registers::{CodeSize, Gpr, SegmentName, Width, canonical};

/// Attempts at an atomic update before the guest is let go to try it again itself.
const ATTEMPTS_MAX: usize = 16;

/// Carries out `instruction`, which was decoded at the machine's RIP and code size.
pub fn execute<M: Cpu + Bus>(machine: &mut M, instruction: &Instruction) -> Outcome {
    if let Operation::String { kind, address, segment, repeat } = instruction.operation {
        let operation = string::StringOperation { kind, width: instruction.width, address, segment, repeat };
        return string::execute(machine, &operation, instruction.length);
    }
    match perform(machine, instruction) {
        Ok(()) => {
            retire(machine, instruction.length);
            Outcome::Done
        }
        Err(fault) => fault.into(),
    }
}

/// Moves RIP behind the instruction.
pub(super) fn retire<M: Cpu>(machine: &mut M, length: u8) {
    let next = machine.rip().wrapping_add(u64::from(length));
    machine.set_rip(if machine.code_size() == CodeSize::Bits64 { next } else { next & 0xffff_ffff });
    let flags = machine.rflags();
    if flags & RFLAGS_RESUME != 0 {
        machine.set_rflags(flags & !RFLAGS_RESUME);
    }
}

fn perform<M: Cpu + Bus>(machine: &mut M, instruction: &Instruction) -> Result<(), Fault> {
    let width = instruction.width;
    let Instruction { destination, source, .. } = *instruction;
    match instruction.operation {
        Operation::Mov => {
            let value = read_operand(machine, source, width)?;
            write_operand(machine, destination, width, value)
        }
        Operation::MovZeroExtend(from) => {
            let value = read_operand(machine, source, from)?;
            write_operand(machine, destination, width, value)
        }
        Operation::MovSignExtend(from) => {
            let value = read_operand(machine, source, from)?;
            write_operand(machine, destination, width, from.sign_extend(value))
        }
        Operation::Alu(AluOperation::Cmp) => {
            let a = read_operand(machine, destination, width)?;
            let b = read_operand(machine, source, width)?;
            set_status(machine, STATUS, alu::subtract(width, a, b, false).flags);
            Ok(())
        }
        Operation::Test => {
            let a = read_operand(machine, destination, width)?;
            let b = read_operand(machine, source, width)?;
            set_status(machine, STATUS, alu::logic(width, a & b).flags);
            Ok(())
        }
        Operation::Alu(operation) => {
            let b = read_operand(machine, source, width)?;
            let carry = machine.rflags() & CF != 0;
            let (_, done) =
                update(machine, destination, width, |a| alu::compute(operation, width, a, b, carry))?;
            set_status(machine, STATUS, done.flags);
            Ok(())
        }
        Operation::Increment => {
            let (_, done) = update(machine, destination, width, |a| alu::add(width, a, 1, false))?;
            set_status(machine, STATUS & !CF, done.flags);
            Ok(())
        }
        Operation::Decrement => {
            let (_, done) = update(machine, destination, width, |a| alu::subtract(width, a, 1, false))?;
            set_status(machine, STATUS & !CF, done.flags);
            Ok(())
        }
        Operation::Negate => {
            let (_, done) = update(machine, destination, width, |a| alu::subtract(width, 0, a, false))?;
            set_status(machine, STATUS, done.flags);
            Ok(())
        }
        Operation::Not => {
            update(machine, destination, width, |a| Computed { value: !a & width.mask(), flags: 0 })?;
            Ok(())
        }
        Operation::Bit(operation) => bit(machine, instruction, operation),
        Operation::Exchange => {
            let new = read_operand(machine, source, width)?;
            let (old, _) = update(machine, destination, width, |_| Computed { value: new, flags: 0 })?;
            write_operand(machine, source, width, old)
        }
        Operation::ExchangeAdd => {
            let b = read_operand(machine, source, width)?;
            let (old, done) = update(machine, destination, width, |a| alu::add(width, a, b, false))?;
            // XADD of a register to itself leaves the sum.
            if source != destination {
                write_operand(machine, source, width, old)?;
            }
            set_status(machine, STATUS, done.flags);
            Ok(())
        }
        Operation::CompareExchange => {
            let expected = read_register(machine, Operand::Register(Gpr::Rax), width);
            let new = read_operand(machine, source, width)?;
            // Where it does not match, the old value is written back, as the processor does.
            let (old, done) = update(machine, destination, width, |a| Computed {
                value: if a == expected { new } else { a },
                flags: alu::subtract(width, expected, a, false).flags,
            })?;
            if old != expected {
                write_register(machine, Operand::Register(Gpr::Rax), width, old);
            }
            set_status(machine, STATUS, done.flags);
            Ok(())
        }
        Operation::CompareExchangePair => compare_exchange_pair(machine, instruction),
        Operation::Push => push(machine, instruction),
        Operation::Pop => pop(machine, instruction),
        // `execute` has taken it out.
        Operation::String { .. } => Ok(()),
    }
}

/// BT and its kin. A bit number in a register reaches beyond the operand, in both directions.
fn bit<M: Cpu + Bus>(
    machine: &mut M,
    instruction: &Instruction,
    operation: BitOperation,
) -> Result<(), Fault> {
    let width = instruction.width;
    let offset = read_operand(machine, instruction.source, width)?;
    let number = offset as u32 & (width.bits() - 1);
    let mut destination = instruction.destination;
    if let (Operand::Memory(memory), Operand::Register(_)) = (&mut destination, instruction.source) {
        let elements = width.sign_extend(offset) as i64 >> width.bits().trailing_zeros();
        let bytes = elements.wrapping_mul(width.bytes() as i64);
        memory.displacement = memory.displacement.wrapping_add_signed(bytes);
    }
    let mask = 1u64 << number;
    let old = match operation {
        BitOperation::Test => read_operand(machine, destination, width)?,
        BitOperation::Set => update(machine, destination, width, |a| plain(a | mask))?.0,
        BitOperation::Reset => update(machine, destination, width, |a| plain(a & !mask))?.0,
        BitOperation::Complement => update(machine, destination, width, |a| plain(a ^ mask))?.0,
    };
    set_status(machine, CF, if old & mask != 0 { CF } else { 0 });
    Ok(())
}

const fn plain(value: u64) -> Computed {
    Computed { value, flags: 0 }
}

/// CMPXCHG8B and CMPXCHG16B.
fn compare_exchange_pair<M: Cpu + Bus>(machine: &mut M, instruction: &Instruction) -> Result<(), Fault> {
    let width = instruction.width;
    let Operand::Memory(memory) = instruction.destination else { return Err(Exception::UNDEFINED.into()) };
    let bytes = 2 * width.bytes();
    let gva = linear(machine, &memory, bytes as u64, true)?;
    if width == Width::Qword && gva.0 & 15 != 0 {
        return Err(Exception::PROTECTION.into());
    }
    check_write(machine, gva, bytes)?;
    let register = |machine: &M, name| machine.register(name) & width.mask();
    let expected = [register(machine, Gpr::Rax), register(machine, Gpr::Rdx)];
    let new = [register(machine, Gpr::Rbx), register(machine, Gpr::Rcx)];
    for _ in 0..ATTEMPTS_MAX {
        let upper = Gva(gva.0.wrapping_add(width.bytes() as u64));
        let old = [read(machine, gva, width)?, read(machine, upper, width)?];
        let matches = old == expected;
        let value = if matches { new } else { old };
        let exchanged = match width {
            Width::Qword => machine.compare_exchange_pair(gva, old, value)?,
            _ => {
                let join = |pair: [u64; 2]| pair[0] | pair[1] << 32;
                compare_exchange(machine, gva, Width::Qword, join(old), join(value))?
            }
        };
        if exchanged {
            if !matches {
                write_register(machine, Operand::Register(Gpr::Rax), width, old[0]);
                write_register(machine, Operand::Register(Gpr::Rdx), width, old[1]);
            }
            set_status(machine, ZF, if matches { ZF } else { 0 });
            return Ok(());
        }
    }
    Err(Fault::Retry)
}

fn stack_address_width<M: Cpu>(machine: &M) -> Width {
    if machine.code_size() == CodeSize::Bits64 {
        Width::Qword
    } else if machine.segment(SegmentName::Ss).big() {
        Width::Dword
    } else {
        Width::Word
    }
}

const fn stack_operand(displacement: u64, address: Width) -> MemoryOperand {
    MemoryOperand {
        segment: SegmentName::Ss,
        base: Some(Gpr::Rsp),
        index: None,
        shift: 0,
        displacement,
        address,
    }
}

fn push<M: Cpu + Bus>(machine: &mut M, instruction: &Instruction) -> Result<(), Fault> {
    let width = instruction.width;
    let address = stack_address_width(machine);
    let step = (width.bytes() as u64).wrapping_neg();
    let value = read_operand(machine, instruction.destination, width)?;
    write_operand(machine, Operand::Memory(stack_operand(step, address)), width, value)?;
    let pointer = machine.register(Gpr::Rsp).wrapping_add(step);
    write_register(machine, Operand::Register(Gpr::Rsp), address, pointer);
    Ok(())
}

/// POP to memory makes its address with the stack pointer already moved; POP RSP keeps what it popped.
fn pop<M: Cpu + Bus>(machine: &mut M, instruction: &Instruction) -> Result<(), Fault> {
    let width = instruction.width;
    let address = stack_address_width(machine);
    let value = read_operand(machine, Operand::Memory(stack_operand(0, address)), width)?;
    let before = machine.register(Gpr::Rsp);
    let after = before.wrapping_add(width.bytes() as u64);
    write_register(machine, Operand::Register(Gpr::Rsp), address, after);
    let written = write_operand(machine, instruction.destination, width, value);
    if written.is_err() {
        machine.set_register(Gpr::Rsp, before);
    }
    written
}

/// Reads, computes and writes an operand; gives the old value and what was computed of it. Atomic on memory.
fn update<M: Cpu + Bus>(
    machine: &mut M,
    operand: Operand,
    width: Width,
    compute: impl Fn(u64) -> Computed,
) -> Result<(u64, Computed), Fault> {
    let Operand::Memory(memory) = operand else {
        let old = read_register(machine, operand, width);
        let new = compute(old);
        write_register(machine, operand, width, new.value);
        return Ok((old, new));
    };
    let gva = linear(machine, &memory, width.bytes() as u64, true)?;
    check_write(machine, gva, width.bytes())?;
    for _ in 0..ATTEMPTS_MAX {
        let old = read(machine, gva, width)?;
        let new = compute(old);
        if compare_exchange(machine, gva, width, old, new.value)? {
            return Ok((old, new));
        }
    }
    Err(Fault::Retry)
}

fn set_status<M: Cpu>(machine: &mut M, mask: u64, flags: u64) {
    let old = machine.rflags();
    machine.set_rflags(old & !mask | flags & mask);
}

fn read_operand<M: Cpu + Bus>(machine: &mut M, operand: Operand, width: Width) -> Result<u64, Fault> {
    match operand {
        Operand::Memory(memory) => {
            let gva = linear(machine, &memory, width.bytes() as u64, false)?;
            read(machine, gva, width)
        }
        other => Ok(read_register(machine, other, width)),
    }
}

fn write_operand<M: Cpu + Bus>(
    machine: &mut M,
    operand: Operand,
    width: Width,
    value: u64,
) -> Result<(), Fault> {
    match operand {
        Operand::Memory(memory) => {
            let gva = linear(machine, &memory, width.bytes() as u64, true)?;
            write(machine, gva, width, value)
        }
        other => {
            write_register(machine, other, width, value);
            Ok(())
        }
    }
}

/// Registers and immediates; memory reads as 0.
pub(super) fn read_register<M: Cpu>(machine: &M, operand: Operand, width: Width) -> u64 {
    match operand {
        Operand::Register(register) => machine.register(register) & width.mask(),
        Operand::HighByte(register) => machine.register(register) >> 8 & 0xff,
        Operand::Immediate(value) => value & width.mask(),
        Operand::None | Operand::Memory(_) => 0,
    }
}

/// A dword clears the upper half of its register, a byte or word leaves the rest alone.
pub(super) fn write_register<M: Cpu>(machine: &mut M, operand: Operand, width: Width, value: u64) {
    match operand {
        Operand::Register(register) => {
            let value = match width {
                Width::Dword | Width::Qword => value & width.mask(),
                Width::Byte | Width::Word => {
                    machine.register(register) & !width.mask() | value & width.mask()
                }
            };
            machine.set_register(register, value);
        }
        Operand::HighByte(register) => {
            let kept = machine.register(register) & !0xff00;
            machine.set_register(register, kept | (value & 0xff) << 8);
        }
        Operand::None | Operand::Immediate(_) | Operand::Memory(_) => {}
    }
}

/// The linear address of `bytes` bytes at a memory operand, after the checks of segmentation (SDM Vol. 3
/// "Limit Checking", "Type Checking") or of canonical form.
pub(super) fn linear<M: Cpu>(
    machine: &M,
    memory: &MemoryOperand,
    bytes: u64,
    write: bool,
) -> Result<Gva, Exception> {
    let base = memory.base.map_or(0, |register| machine.register(register));
    let index = memory.index.map_or(0, |register| machine.register(register)) << memory.shift;
    let offset = base.wrapping_add(index).wrapping_add(memory.displacement) & memory.address.mask();
    segmented(machine, memory.segment, offset, bytes, write)
}

/// As [`linear`], from an offset that is already made.
pub(super) fn segmented<M: Cpu>(
    machine: &M,
    name: SegmentName,
    offset: u64,
    bytes: u64,
    write: bool,
) -> Result<Gva, Exception> {
    let refused = match name {
        SegmentName::Ss => Exception::stack_fault(0),
        _ => Exception::PROTECTION,
    };
    if machine.code_size() == CodeSize::Bits64 {
        let base = match name {
            SegmentName::Fs | SegmentName::Gs => machine.segment_base(name),
            _ => 0,
        };
        let address = base.wrapping_add(offset);
        return if canonical(address) && canonical(address.wrapping_add(bytes - 1)) {
            Ok(Gva(address))
        } else {
            Err(refused)
        };
    }
    let segment = machine.segment(name);
    let last = offset.saturating_add(bytes - 1);
    let limit = u64::from(segment.limit);
    let inside = if segment.expands_down() {
        let top = if segment.big() { 0xffff_ffff } else { 0xffff };
        offset > limit && last <= top
    } else {
        last <= limit
    };
    let allowed = if write { segment.writable() } else { segment.readable() };
    if segment.unusable() || !inside || !allowed {
        return Err(refused);
    }
    Ok(Gva(segment.base.wrapping_add(offset) & 0xffff_ffff))
}

/// Whether so many bytes cross a page boundary.
fn crosses(gva: Gva, bytes: usize) -> bool {
    (gva.0 & (PAGE_SIZE - 1)) + bytes as u64 > PAGE_SIZE
}

pub(super) fn read<M: Bus>(machine: &mut M, gva: Gva, width: Width) -> Result<u64, Fault> {
    if !crosses(gva, width.bytes()) {
        return machine.load(gva, width);
    }
    let mut value = 0;
    for n in 0..width.bytes() as u64 {
        value |= machine.load(Gva(gva.0.wrapping_add(n)), Width::Byte)? << (8 * n);
    }
    Ok(value)
}

/// Both pages are checked before the first byte is written.
pub(super) fn write<M: Bus>(machine: &mut M, gva: Gva, width: Width, value: u64) -> Result<(), Fault> {
    if !crosses(gva, width.bytes()) {
        return machine.store(gva, width, value);
    }
    check_write(machine, gva, width.bytes())?;
    for (n, &byte) in value.to_le_bytes()[..width.bytes()].iter().enumerate() {
        machine.store(Gva(gva.0.wrapping_add(n as u64)), Width::Byte, u64::from(byte))?;
    }
    Ok(())
}

pub(super) fn check_write<M: Bus>(machine: &mut M, gva: Gva, bytes: usize) -> Result<(), Fault> {
    if !crosses(gva, bytes) {
        return machine.check_write(gva, bytes);
    }
    let first = (PAGE_SIZE - (gva.0 & (PAGE_SIZE - 1))) as usize;
    machine.check_write(gva, first)?;
    machine.check_write(Gva(gva.0.wrapping_add(first as u64)), bytes - first)
}

/// Across a page boundary it is not atomic: no kernel keeps a lock there.
fn compare_exchange<M: Bus>(
    machine: &mut M,
    gva: Gva,
    width: Width,
    old: u64,
    new: u64,
) -> Result<bool, Fault> {
    if crosses(gva, width.bytes()) {
        write(machine, gva, width, new)?;
        return Ok(true);
    }
    machine.compare_exchange(gva, width, old, new)
}
