//! The MOVs and XCHGs that kernels use on devices and page tables, decoded by hand: 64-bit code, no prefix but
//! REX. A general decode costs some 200 instructions, this one a few dozen.

use super::instruction::{Instruction, MemoryOperand, Operand, Operation};
use crate::cpu::registers::{Gpr, SegmentName, Width};

/// Bytes still to be read.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    #[inline]
    fn byte(&mut self) -> Option<u8> {
        let byte = *self.bytes.get(self.at)?;
        self.at += 1;
        Some(byte)
    }
    #[inline]
    fn signed8(&mut self) -> Option<u64> {
        Some(Width::Byte.sign_extend(u64::from(self.byte()?)))
    }
    #[inline]
    fn signed32(&mut self) -> Option<u64> {
        let bytes = self.bytes.get(self.at..)?.first_chunk::<4>()?;
        self.at += 4;
        Some(Width::Dword.sign_extend(u64::from(u32::from_le_bytes(*bytes))))
    }
}

/// `None` for whatever is not one of these forms; that is no verdict on the instruction.
#[inline]
pub(super) fn decode(bytes: &[u8], rip: u64) -> Option<Instruction> {
    let mut cursor = Cursor { bytes, at: 0 };
    let mut byte = cursor.byte()?;
    let mut rex = 0;
    if byte & 0xf0 == 0x40 {
        rex = byte;
        byte = cursor.byte()?;
    }
    let wide = if rex & 8 != 0 { Width::Qword } else { Width::Dword };
    let (operation, width, store) = match byte {
        0x88 => (Operation::Mov, Width::Byte, true),
        0x89 => (Operation::Mov, wide, true),
        0x8a => (Operation::Mov, Width::Byte, false),
        0x8b => (Operation::Mov, wide, false),
        0x86 => (Operation::Exchange, Width::Byte, true),
        0x87 => (Operation::Exchange, wide, true),
        0xc6 => (Operation::Mov, Width::Byte, true),
        0xc7 => (Operation::Mov, wide, true),
        0x0f => match cursor.byte()? {
            0xb6 => (Operation::MovZeroExtend(Width::Byte), wide, false),
            0xb7 => (Operation::MovZeroExtend(Width::Word), wide, false),
            _ => return None,
        },
        _ => return None,
    };
    let immediate = matches!(byte, 0xc6 | 0xc7);
    let modrm = cursor.byte()?;
    let number = modrm >> 3 & 7;
    if immediate && number != 0 {
        return None;
    }
    let (memory, relative) = memory_operand(&mut cursor, modrm, rex)?;
    let other = if immediate {
        Operand::Immediate(if width == Width::Byte { cursor.signed8()? } else { cursor.signed32()? })
    } else if width == Width::Byte && rex == 0 && number >= 4 {
        Operand::HighByte(Gpr::from_number(number - 4))
    } else {
        Operand::Register(Gpr::from_number(number | (rex & 4) << 1))
    };
    let displacement = if relative {
        memory.displacement.wrapping_add(rip).wrapping_add(cursor.at as u64)
    } else {
        memory.displacement
    };
    let memory = Operand::Memory(MemoryOperand { displacement, ..memory });
    let (destination, source) = if store { (memory, other) } else { (other, memory) };
    Some(Instruction { operation, width, length: cursor.at as u8, destination, source })
}

/// The operand of ModRM, SIB and displacement (SDM Vol. 2 "Addressing-Mode Encoding of ModR/M and SIB Bytes"),
/// and whether it is relative to the next instruction.
#[inline]
fn memory_operand(cursor: &mut Cursor<'_>, modrm: u8, rex: u8) -> Option<(MemoryOperand, bool)> {
    let mode = modrm >> 6;
    if mode == 3 {
        return None;
    }
    let mut base = Some((modrm & 7) | (rex & 1) << 3);
    let mut index = None;
    let mut shift = 0;
    let mut relative = false;
    let mut wide_displacement = false;
    if modrm & 7 == 4 {
        let sib = cursor.byte()?;
        let number = sib >> 3 & 7 | (rex & 2) << 2;
        if number != 4 {
            index = Some(Gpr::from_number(number));
            shift = sib >> 6;
        }
        base = Some(sib & 7 | (rex & 1) << 3);
        if sib & 7 == 5 && mode == 0 {
            base = None;
            wide_displacement = true;
        }
    } else if modrm & 7 == 5 && mode == 0 {
        base = None;
        relative = true;
        wide_displacement = true;
    }
    let displacement = match mode {
        1 => cursor.signed8()?,
        2 => cursor.signed32()?,
        _ if wide_displacement => cursor.signed32()?,
        _ => 0,
    };
    let segment = if matches!(base, Some(4 | 5)) { SegmentName::Ss } else { SegmentName::Ds };
    let base = base.map(Gpr::from_number);
    Some((MemoryOperand { segment, base, index, shift, displacement, address: Width::Qword }, relative))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::decode::decode_general;
    use super::*;
    use crate::cpu::registers::CodeSize;

    #[track_caller]
    fn check(bytes: &[u8], rip: u64) -> bool {
        let Some(fast) = decode(bytes, rip) else { return false };
        let general = decode_general(bytes, CodeSize::Bits64, rip);
        assert_eq!(Some(canonical_form(fast)), general.map(canonical_form), "{bytes:02x?}");
        true
    }

    /// An index that is not there has no scale.
    fn canonical_form(mut instruction: Instruction) -> Instruction {
        for operand in [&mut instruction.destination, &mut instruction.source] {
            match operand {
                Operand::Memory(memory) if memory.index.is_none() => memory.shift = 0,
                Operand::Immediate(value) => *value &= instruction.width.mask(),
                _ => {}
            }
        }
        instruction
    }

    /// Every REX, opcode, ModRM and a spread of SIBs: where the short cut answers, it agrees with iced.
    #[test]
    fn agrees_with_the_general_decoder() {
        let mut seen = 0u32;
        for rex in [None].into_iter().chain((0x40..0x50).map(Some)) {
            for opcode in [
                &[0x88u8][..],
                &[0x89],
                &[0x8a],
                &[0x8b],
                &[0x86],
                &[0x87],
                &[0xc6],
                &[0xc7],
                &[0x0f, 0xb6],
                &[0x0f, 0xb7],
            ] {
                for modrm in 0..=255u8 {
                    for sib in (0..=255u8).step_by(if modrm & 7 == 4 { 1 } else { 255 }) {
                        let mut bytes = Vec::new();
                        bytes.extend(rex);
                        bytes.extend_from_slice(opcode);
                        bytes.extend_from_slice(&[modrm, sib, 0x91, 0x82, 0x73, 0x64, 0xf5, 0xe6, 0xd7]);
                        seen += u32::from(check(&bytes, 0xffff_ffff_8100_0000));
                    }
                }
            }
        }
        assert!(seen > 100_000, "{seen}");
    }

    #[test]
    fn linux_local_apic_forms() {
        // mov ds:0xffffffffff5fd0b0, esi; mov eax, ds:0xffffffffff5fd020
        assert!(check(&[0x89, 0x34, 0x25, 0xb0, 0xd0, 0x5f, 0xff], 0));
        assert!(check(&[0x8b, 0x04, 0x25, 0x20, 0xd0, 0x5f, 0xff], 0));
        // mov [rdi], rsi; xchg [rdi], rax
        assert!(check(&[0x48, 0x89, 0x37], 0));
        assert!(check(&[0x48, 0x87, 0x07], 0));
    }

    proptest! {
        #[test]
        fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..20), rip: u64) {
            check(&bytes, rip);
        }
    }
}
