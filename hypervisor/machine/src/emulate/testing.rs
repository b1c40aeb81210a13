//! A machine of a few pages for the emulator's tests.

use memory::Gva;

use super::{Bus, Cpu, Fault, Flow, Ports};
use crate::cpu::event::Exception;
use crate::cpu::registers::{CodeSize, Gpr, SegmentName, SegmentState, Width};

/// Bytes of memory, at linear address 0.
pub(super) const MEMORY_BYTES: u64 = 0x4000;

/// Another vCPU maps page 2 elsewhere.
#[derive(Debug)]
pub(super) struct Remap {
    /// After so many more accesses.
    pub(super) accesses: usize,
    /// To the page at this address.
    pub(super) to: u64,
}

/// Memory from 0 to [`MEMORY_BYTES`], of which `[read_only_from, ..)` is read-only; all else faults.
#[derive(Debug)]
pub(super) struct Machine {
    pub(super) registers: [u64; 16],
    pub(super) rip: u64,
    pub(super) rflags: u64,
    pub(super) code: CodeSize,
    pub(super) segments: [SegmentState; 6],
    pub(super) memory: Vec<u8>,
    pub(super) read_only_from: u64,
    /// So many compare-exchanges fail, as if another vCPU had been quicker.
    pub(super) contended: usize,
    pub(super) remap: Option<Remap>,
    pub(super) written: Vec<(u16, u32)>,
    pub(super) to_read: u32,
    pub(super) flow: Flow,
}

impl Machine {
    pub(super) fn new(code: CodeSize) -> Self {
        Self {
            registers: [0; 16],
            rip: 0x1000,
            rflags: 2,
            code,
            segments: [SegmentState::FLAT; 6],
            memory: vec![0; MEMORY_BYTES as usize],
            read_only_from: MEMORY_BYTES,
            contended: 0,
            remap: None,
            written: Vec::new(),
            to_read: 0,
            flow: Flow::Continue,
        }
    }

    /// Where in memory the bytes at `gva` lie.
    fn range(&mut self, gva: Gva, bytes: usize, write: bool) -> Result<core::ops::Range<usize>, Fault> {
        assert!((gva.0 & 0xfff) + bytes as u64 <= 0x1000, "{gva:?} + {bytes} crosses a page");
        let gva = match &mut self.remap {
            Some(Remap { accesses: 0, to }) if gva.0 >> 12 == 2 => Gva(*to | gva.0 & 0xfff),
            Some(remap) => {
                remap.accesses = remap.accesses.saturating_sub(1);
                gva
            }
            None => gva,
        };
        let code = if write { 2 } else { 0 };
        let end = gva.0.saturating_add(bytes as u64);
        if end > MEMORY_BYTES || write && end > self.read_only_from {
            return Err(Exception::page_fault(code, gva.0).into());
        }
        Ok(gva.0 as usize..end as usize)
    }

    pub(super) fn peek(&self, at: u64, width: Width) -> u64 {
        let mut bytes = [0; 8];
        bytes[..width.bytes()].copy_from_slice(&self.memory[at as usize..][..width.bytes()]);
        u64::from_le_bytes(bytes)
    }

    pub(super) fn poke(&mut self, at: u64, width: Width, value: u64) {
        self.memory[at as usize..][..width.bytes()].copy_from_slice(&value.to_le_bytes()[..width.bytes()]);
    }
}

impl Cpu for Machine {
    fn register(&self, register: Gpr) -> u64 {
        self.registers[register.number()]
    }
    fn set_register(&mut self, register: Gpr, value: u64) {
        self.registers[register.number()] = value;
    }
    fn rip(&self) -> u64 {
        self.rip
    }
    fn set_rip(&mut self, rip: u64) {
        self.rip = rip;
    }
    fn rflags(&self) -> u64 {
        self.rflags
    }
    fn set_rflags(&mut self, rflags: u64) {
        self.rflags = rflags;
    }
    fn code_size(&self) -> CodeSize {
        self.code
    }
    fn segment(&self, name: SegmentName) -> SegmentState {
        self.segments[name as usize]
    }
}

impl Bus for Machine {
    fn load(&mut self, gva: Gva, width: Width) -> Result<u64, Fault> {
        let at = self.range(gva, width.bytes(), false)?.start;
        Ok(self.peek(at as u64, width))
    }
    fn store(&mut self, gva: Gva, width: Width, value: u64) -> Result<(), Fault> {
        let at = self.range(gva, width.bytes(), true)?.start;
        self.poke(at as u64, width, value);
        Ok(())
    }
    fn check_write(&mut self, gva: Gva, bytes: usize) -> Result<(), Fault> {
        self.range(gva, bytes, true).map(|_| ())
    }
    fn compare_exchange(&mut self, gva: Gva, width: Width, old: u64, new: u64) -> Result<bool, Fault> {
        let at = self.range(gva, width.bytes(), true)?.start as u64;
        if self.contended > 0 {
            self.contended -= 1;
            return Ok(false);
        }
        if self.peek(at, width) != old & width.mask() {
            return Ok(false);
        }
        self.poke(at, width, new);
        Ok(true)
    }
}

impl Ports for Machine {
    fn input(&mut self, _port: u16, _width: Width) -> u32 {
        self.to_read += 1;
        self.to_read
    }
    fn output(&mut self, port: u16, _width: Width, value: u32) -> Flow {
        self.written.push((port, value));
        self.flow
    }
}
