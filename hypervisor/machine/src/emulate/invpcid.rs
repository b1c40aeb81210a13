//! INVPCID: what it names, after all the checks that the processor leaves to whoever takes its exit.

use memory::Gva;

use super::execute::{linear, read};
use super::instruction::MemoryOperand;
use super::{Bus, Cpu, Fault};
use crate::cpu::event::Exception;
use crate::cpu::registers::{CodeSize, Gpr, SegmentName, Width, canonical};

/// The operands of an INVPCID that exited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Invpcid {
    kind: Gpr,
    descriptor: MemoryOperand,
}

/// The translations that an INVPCID invalidates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invalidation {
    /// Of one address in one PCID, unless it is global.
    Address {
        /// The PCID, 0..4096.
        pcid: u16,
        /// The address, which is canonical.
        gva: Gva,
    },
    /// All of one PCID but global ones.
    Pcid(u16),
    /// All of every PCID. (Type 3 spares global ones; the architecture allows more to go.)
    All,
}

impl Invpcid {
    /// From the exit's instruction information and qualification, which holds the displacement (SDM Vol. 3,
    /// "Format of the VM-Exit Instruction-Information Field as Used for INVEPT, INVPCID, and INVVPID"). `None` if
    /// they hold what the SDM does not define.
    #[must_use]
    pub fn from_exit(information: u32, displacement: u64) -> Option<Self> {
        let address = match information >> 7 & 7 {
            0 => Width::Word,
            1 => Width::Dword,
            2 => Width::Qword,
            _ => return None,
        };
        let register = |shift: u32| Gpr::from_number((information >> shift) as u8);
        let valid = |invalid_bit: u32| information >> invalid_bit & 1 == 0;
        Some(Self {
            kind: register(28),
            descriptor: MemoryOperand {
                segment: SegmentName::from_number((information >> 15 & 7) as u8)?,
                base: valid(27).then(|| register(23)),
                index: valid(22).then(|| register(18)),
                shift: (information & 3) as u8,
                displacement,
                address,
            },
        })
    }
}

/// Reads and checks the operands of `instruction` (SDM Vol. 2, "INVPCID—Invalidate Process-Context Identifier").
/// `pcide`: CR4.PCIDE. The processor has checked the privilege level before the exit.
///
/// # Errors
/// The exception to inject; or try again.
pub fn invpcid<M: Cpu + Bus>(
    machine: &mut M,
    instruction: &Invpcid,
    pcide: bool,
) -> Result<Invalidation, Fault> {
    let kind = machine.register(instruction.kind);
    let kind = if machine.code_size() == CodeSize::Bits64 { kind } else { kind & Width::Dword.mask() };
    if kind > 3 {
        return Err(Exception::PROTECTION.into());
    }
    let descriptor = linear(machine, &instruction.descriptor, 16, false)?;
    let context = read(machine, descriptor, Width::Qword)?;
    let address = read(machine, Gva(descriptor.0.wrapping_add(8)), Width::Qword)?;
    let needs_pcide = kind < 2 && context != 0;
    if context >> 12 != 0 || needs_pcide && !pcide || kind == 0 && !canonical(address) {
        return Err(Exception::PROTECTION.into());
    }
    let pcid = context as u16;
    Ok(match kind {
        0 => Invalidation::Address { pcid, gva: Gva(address) },
        1 => Invalidation::Pcid(pcid),
        _ => Invalidation::All,
    })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{MEMORY_BYTES, Machine};
    use super::*;
    use crate::cpu::event::Vector;
    use crate::cpu::registers::SegmentState;

    const PROTECTION: Result<Invalidation, Fault> = Err(Fault::Exception(Exception::PROTECTION));

    /// RDX + 8 * RCX + displacement in DS, 64-bit addresses, the type in RAX.
    const INFORMATION: u32 = 3 | 2 << 7 | 3 << 15 | 1 << 18 | 2 << 23;

    fn run(
        code: CodeSize,
        kind: u64,
        context: u64,
        address: u64,
        pcide: bool,
    ) -> Result<Invalidation, Fault> {
        let mut machine = Machine::new(code);
        machine.registers[Gpr::Rax.number()] = kind;
        machine.registers[Gpr::Rcx.number()] = 2;
        machine.registers[Gpr::Rdx.number()] = 0x2000;
        // Across a page boundary: 0x2000 + 8 * 2 + 0xfe8 = 0x2ff8.
        machine.poke(0x2ff8, Width::Qword, context);
        machine.poke(0x3000, Width::Qword, address);
        invpcid(&mut machine, &Invpcid::from_exit(INFORMATION, 0xfe8).unwrap(), pcide)
    }

    #[test]
    fn each_type_names_what_it_should() {
        let run = |kind, context| run(CodeSize::Bits64, kind, context, 0xffff_8000_0000_1000, true);
        assert_eq!(run(0, 5), Ok(Invalidation::Address { pcid: 5, gva: Gva(0xffff_8000_0000_1000) }));
        assert_eq!(run(1, 0xfff), Ok(Invalidation::Pcid(0xfff)));
        assert_eq!(run(2, 7), Ok(Invalidation::All));
        assert_eq!(run(3, 0), Ok(Invalidation::All));
        for kind in [4, 1 << 32, u64::MAX] {
            assert_eq!(run(kind, 0), PROTECTION, "type {kind:#x}");
        }
        assert_eq!(super::tests::run(CodeSize::Bits32, 1 << 32 | 1, 0, 0, true), Ok(Invalidation::Pcid(0)));
    }

    #[test]
    fn reserved_bits_pcids_without_pcide_and_addresses() {
        for kind in 0..4 {
            for bit in 12..64 {
                assert_eq!(run(CodeSize::Bits64, kind, 1 << bit, 0, true), PROTECTION, "{kind} bit {bit}");
            }
            assert_eq!(run(CodeSize::Bits64, kind, 1, 0, false).is_ok(), kind >= 2, "{kind} without PCIDE");
            assert!(run(CodeSize::Bits64, kind, 0, 0, false).is_ok(), "{kind}: PCID 0 is always there");
            assert_eq!(
                run(CodeSize::Bits64, kind, 1, 1 << 47, true).is_ok(),
                kind != 0,
                "{kind} not canonical"
            );
        }
    }

    #[test]
    fn the_descriptor_is_read_through_segment_and_paging() {
        let vector = |machine: &mut Machine, information: u32, at: u64| {
            machine.registers[Gpr::Rdx.number()] = at;
            match invpcid(machine, &Invpcid::from_exit(information, 0).unwrap(), true) {
                Err(Fault::Exception(exception)) => (exception.vector, exception.cr2),
                other => panic!("{other:?}"),
            }
        };
        let (ds, ss) = (2 << 7 | 3 << 15 | 1 << 22 | 2 << 23, 2 << 7 | 2 << 15 | 1 << 22 | 2 << 23);
        let mut machine = Machine::new(CodeSize::Bits64);
        assert_eq!(vector(&mut machine, ds, 1 << 47), (Vector::GP, None));
        assert_eq!(vector(&mut machine, ss, 1 << 47), (Vector::SS, None));
        assert_eq!(vector(&mut machine, ds, (1 << 47) - 8), (Vector::GP, None), "its end is not canonical");
        assert_eq!(vector(&mut machine, ds, MEMORY_BYTES - 8), (Vector::PF, Some(MEMORY_BYTES)));
        let mut machine = Machine::new(CodeSize::Bits32);
        machine.segments = [SegmentState { limit: 0x100f, ..SegmentState::FLAT }; 6];
        assert_eq!(vector(&mut machine, ds, 0x1001), (Vector::GP, None), "beyond the limit");
        assert_eq!(vector(&mut machine, ss, 0x1001), (Vector::SS, None));
        machine.registers[Gpr::Rdx.number()] = 0x1000;
        assert!(invpcid(&mut machine, &Invpcid::from_exit(ds, 0).unwrap(), true).is_ok());
        assert_eq!(Invpcid::from_exit(3 << 7, 0), None);
        assert_eq!(Invpcid::from_exit(2 << 7 | 6 << 15, 0), None);
    }
}
