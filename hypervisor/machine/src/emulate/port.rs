//! INS and OUTS: string port I/O, from what the exit says or from the instruction itself.

use iced_x86::Mnemonic;

use super::decode::{decode_raw, string_address};
use super::execute::{check_write, read, read_register, segmented, write};
use super::instruction::Operand;
use super::string::{repeated, step};
use super::{Bus, Cpu, Outcome};
use crate::cpu::exit::{IoAccess, StringIoInformation};
use crate::cpu::registers::{CodeSize, Gpr, SegmentName, Width};

/// Whether a string instruction may go on after this element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Go on.
    Continue,
    /// The write asks for something that cannot wait (a reset, a power-off): leave after this element.
    Leave,
}

/// The guest's I/O ports.
pub trait Ports {
    /// Reads a port; zero-extended.
    fn input(&mut self, port: u16, width: Width) -> u32;
    /// Writes a port; only the low `width` of `value` counts.
    fn output(&mut self, port: u16, width: Width, value: u32) -> Flow;
}

/// An INS or OUTS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StringIo {
    /// The port, from DX.
    pub port: u16,
    /// Byte, word or dword.
    pub width: Width,
    /// INS.
    pub input: bool,
    /// With a REP prefix.
    pub repeat: bool,
    /// Width of RSI, RDI and RCX as used.
    pub address: Width,
    /// Source segment of OUTS.
    pub segment: SegmentName,
    /// Bytes of the instruction.
    pub length: u8,
}

impl StringIo {
    /// From the exit's own fields, where IA32_VMX_BASIC bit 54 says that the processor gives them.
    #[must_use]
    pub const fn from_exit(access: IoAccess, information: StringIoInformation, length: u32) -> Self {
        Self {
            port: access.port,
            width: access.width,
            input: access.input,
            repeat: access.repeat,
            address: information.address,
            segment: information.segment,
            length: (length & 15) as u8,
        }
    }

    /// From the instruction, where the processor does not say.
    #[must_use]
    pub fn from_instruction(access: IoAccess, bytes: &[u8], code: CodeSize, rip: u64) -> Option<Self> {
        let decoded = decode_raw(bytes, code, rip)?;
        let (kind, segment) = match decoded.mnemonic() {
            Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => (decoded.op0_kind(), SegmentName::Es),
            Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => {
                let number = decoded.memory_segment().number() as u8;
                (decoded.op1_kind(), SegmentName::from_number(number)?)
            }
            _ => return None,
        };
        Some(Self {
            port: access.port,
            width: access.width,
            input: access.input,
            repeat: access.repeat,
            address: string_address(kind)?,
            segment,
            length: decoded.len() as u8,
        })
    }
}

/// Carries out an INS or OUTS. A byte is taken from a port only once it is sure that it can be stored.
pub fn string_io<M: Cpu + Bus + Ports>(machine: &mut M, io: &StringIo) -> Outcome {
    let StringIo { port, width, input, repeat, address, segment, length } = *io;
    let bytes = width.bytes() as u64;
    repeated(machine, length, repeat, address, |machine| {
        if input {
            let offset = read_register(machine, Operand::Register(Gpr::Rdi), address);
            let gva = segmented(machine, SegmentName::Es, offset, bytes, true)?;
            check_write(machine, gva, width.bytes())?;
            let value = machine.input(port, width);
            write(machine, gva, width, u64::from(value))?;
            step(machine, Gpr::Rdi, address, width);
            Ok(true)
        } else {
            let offset = read_register(machine, Operand::Register(Gpr::Rsi), address);
            let gva = segmented(machine, segment, offset, bytes, false)?;
            let value = read(machine, gva, width)?;
            let flow = machine.output(port, width, value as u32);
            step(machine, Gpr::Rsi, address, width);
            Ok(flow == Flow::Continue)
        }
    })
}
