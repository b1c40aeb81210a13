//! STOS, MOVS and LODS, with and without REP.

use super::execute::{read, read_register, retire, segmented, write, write_register};
use super::instruction::{Operand, StringKind};
use super::{Bus, Cpu, Fault, Outcome, REPEAT_MAX};
use crate::cpu::event::RFLAGS_TRAP;
use crate::cpu::registers::{Gpr, SegmentName, Width};

/// RFLAGS.DF: string instructions go down.
const DIRECTION: u64 = 1 << 10;

/// A string instruction on memory.
pub(super) struct StringOperation {
    pub(super) kind: StringKind,
    pub(super) width: Width,
    pub(super) address: Width,
    pub(super) segment: SegmentName,
    pub(super) repeat: bool,
}

/// Repeats `element` as RCX says, at most [`REPEAT_MAX`] times and once under single-step. The element moves the
/// index registers itself, after the last thing that can fault, and says whether it may go on.
pub(super) fn repeated<M: Cpu>(
    machine: &mut M,
    length: u8,
    repeat: bool,
    address: Width,
    mut element: impl FnMut(&mut M) -> Result<bool, Fault>,
) -> Outcome {
    const COUNT: Operand = Operand::Register(Gpr::Rcx);
    if !repeat {
        return match element(machine) {
            Ok(_) => {
                retire(machine, length);
                Outcome::Done
            }
            Err(fault) => fault.into(),
        };
    }
    let count = read_register(machine, COUNT, address);
    let limit = if machine.rflags() & RFLAGS_TRAP != 0 { 1 } else { REPEAT_MAX };
    let mut left = count;
    let mut fault = None;
    while left != 0 && count - left < limit {
        match element(machine) {
            Ok(go_on) => {
                left -= 1;
                if !go_on {
                    break;
                }
            }
            Err(why) => {
                fault = Some(why);
                break;
            }
        }
    }
    if left != count {
        write_register(machine, COUNT, address, left);
    }
    match fault {
        Some(fault) => fault.into(),
        None if left == 0 => {
            retire(machine, length);
            Outcome::Done
        }
        None => Outcome::Continue,
    }
}

/// Moves an index register past one element.
pub(super) fn step<M: Cpu>(machine: &mut M, register: Gpr, address: Width, width: Width) {
    let bytes = width.bytes() as u64;
    let delta = if machine.rflags() & DIRECTION != 0 { bytes.wrapping_neg() } else { bytes };
    let moved = machine.register(register).wrapping_add(delta);
    write_register(machine, Operand::Register(register), address, moved);
}

pub(super) fn execute<M: Cpu + Bus>(machine: &mut M, operation: &StringOperation, length: u8) -> Outcome {
    let StringOperation { kind, width, address, segment, repeat } = *operation;
    let bytes = width.bytes() as u64;
    repeated(machine, length, repeat, address, |machine| {
        let source = || Operand::Register(Gpr::Rsi);
        let value = match kind {
            StringKind::Store => read_register(machine, Operand::Register(Gpr::Rax), width),
            StringKind::Move | StringKind::Load => {
                let offset = read_register(machine, source(), address);
                let gva = segmented(machine, segment, offset, bytes, false)?;
                read(machine, gva, width)?
            }
        };
        match kind {
            StringKind::Load => write_register(machine, Operand::Register(Gpr::Rax), width, value),
            StringKind::Store | StringKind::Move => {
                let offset = read_register(machine, Operand::Register(Gpr::Rdi), address);
                let gva = segmented(machine, SegmentName::Es, offset, bytes, true)?;
                write(machine, gva, width, value)?;
                step(machine, Gpr::Rdi, address, width);
            }
        }
        if kind != StringKind::Store {
            step(machine, Gpr::Rsi, address, width);
        }
        Ok(true)
    })
}
