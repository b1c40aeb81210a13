//! The report when a guest is stopped: what it did last, and everything a person needs to see why it ended.

use core::fmt;

use super::control::ControlState;
use super::exit::{ExitReason, InterruptionInfo};
use super::registers::SegmentState;

/// Exits remembered per vCPU.
pub const HISTORY: usize = 16;

/// One exit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExitRecord {
    /// Why.
    pub reason: ExitReason,
    /// The exit qualification.
    pub qualification: u64,
    /// Where.
    pub rip: u64,
}

/// The last exits of a vCPU; a push is a handful of instructions.
#[derive(Clone, Debug, Default)]
pub struct ExitLog {
    records: [ExitRecord; HISTORY],
    pushed: usize,
}

impl ExitLog {
    /// Remembers an exit, and forgets the oldest.
    #[inline]
    pub fn push(&mut self, reason: ExitReason, qualification: u64, rip: u64) {
        self.records[self.pushed % HISTORY] = ExitRecord { reason, qualification, rip };
        self.pushed = self.pushed.wrapping_add(1);
    }

    /// Exits seen in all.
    #[must_use]
    pub const fn total(&self) -> usize {
        self.pushed
    }

    /// The last exits, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &ExitRecord> {
        let known = self.pushed.min(HISTORY);
        (self.pushed - known..self.pushed).map(|n| &self.records[n % HISTORY])
    }
}

/// A descriptor-table register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableRegister {
    /// Linear address.
    pub base: u64,
    /// Last valid offset, bytes.
    pub limit: u32,
}

/// Everything that is shown of a stopped vCPU. Its `Display` is the report, over several lines.
#[derive(Clone)]
pub struct Report<'a> {
    /// The guest's name.
    pub guest: &'a str,
    /// Which of its processors.
    pub vcpu: u32,
    /// Why it was stopped, in words that a person can act on.
    pub cause: &'a dyn fmt::Display,
    /// The whole 32-bit exit-reason field.
    pub reason_field: u32,
    /// Exit qualification.
    pub qualification: u64,
    /// VM-exit interruption information.
    pub interruption: InterruptionInfo,
    /// Its error code.
    pub interruption_error: u32,
    /// IDT-vectoring information.
    pub vectoring: InterruptionInfo,
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15, by number.
    pub registers: [u64; 16],
    /// RIP.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// CR2.
    pub cr2: u64,
    /// What the guest believes its control registers hold.
    pub control: ControlState,
    /// ES, CS, SS, DS, FS, GS, LDTR, TR.
    pub segments: [SegmentState; 8],
    /// GDTR.
    pub gdtr: TableRegister,
    /// IDTR.
    pub idtr: TableRegister,
    /// The bytes at RIP, as far as they could be read.
    pub instruction: &'a [u8],
    /// What led here.
    pub history: &'a ExitLog,
}

const REGISTER_NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];
const SEGMENT_NAMES: [&str; 8] = ["es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr"];

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reason = ExitReason::from_field(self.reason_field);
        writeln!(f, "guest {} vcpu {} stopped: {}", self.guest, self.vcpu, self.cause)?;
        let failed = if ExitReason::entry_failed(self.reason_field) { ", at VM entry" } else { "" };
        writeln!(f, "  exit   {reason}{failed}  qualification {:#x}", self.qualification)?;
        write_event(f, "event", self.interruption, self.interruption_error)?;
        write_event(f, "during delivery of", self.vectoring, 0)?;
        writeln!(f, "  rip {:016x}  rflags {:08x}  cr2 {:016x}", self.rip, self.rflags, self.cr2)?;
        for (names, values) in REGISTER_NAMES.chunks(4).zip(self.registers.chunks(4)) {
            f.write_str(" ")?;
            for (name, value) in names.iter().zip(values) {
                write!(f, " {name:>3} {value:016x}")?;
            }
            writeln!(f)?;
        }
        let control = &self.control;
        writeln!(
            f,
            "  cr0 {:08x}  cr3 {:016x}  cr4 {:08x}  efer {:03x}  xcr0 {:x}  paging {:?}",
            control.cr0.bits(),
            control.cr3,
            control.cr4.bits(),
            control.efer.bits(),
            control.xcr0,
            control.paging(),
        )?;
        for (name, segment) in SEGMENT_NAMES.iter().zip(&self.segments) {
            write!(
                f,
                "  {name:<4} {:04x} base {:016x} limit {:08x} rights {:05x}",
                segment.selector, segment.base, segment.limit, segment.rights
            )?;
            writeln!(f, "{}", if segment.unusable() { " (unusable)" } else { "" })?;
        }
        writeln!(
            f,
            "  gdtr base {:016x} limit {:04x}  idtr base {:016x} limit {:04x}",
            self.gdtr.base, self.gdtr.limit, self.idtr.base, self.idtr.limit
        )?;
        f.write_str("  code")?;
        if self.instruction.is_empty() {
            f.write_str(" (not readable)")?;
        }
        for byte in self.instruction {
            write!(f, " {byte:02x}")?;
        }
        writeln!(f)?;
        writeln!(f, "  last exits of {}, oldest first:", self.history.total())?;
        for record in self.history.iter() {
            writeln!(f, "    {:016x}  {}  {:#x}", record.rip, record.reason, record.qualification)?;
        }
        Ok(())
    }
}

fn write_event(f: &mut fmt::Formatter<'_>, what: &str, info: InterruptionInfo, error: u32) -> fmt::Result {
    if !info.valid() {
        return Ok(());
    }
    write!(f, "  {what}  {} ({:?})", info.vector(), info.kind())?;
    if info.has_error_code() {
        write!(f, "  error code {error:#x}")?;
    }
    writeln!(f)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_keeps_the_last_sixteen_in_order() {
        let mut log = ExitLog::default();
        assert_eq!(log.iter().count(), 0);
        for n in 0..40 {
            log.push(ExitReason::CPUID, n, n);
        }
        let seen: Vec<u64> = log.iter().map(|r| r.rip).collect();
        assert_eq!(seen, (24..40).collect::<Vec<u64>>());
    }

    #[test]
    fn the_report_names_what_happened() {
        let mut log = ExitLog::default();
        log.push(ExitReason::CR_ACCESS, 3, 0x1000);
        log.push(ExitReason::TRIPLE_FAULT, 0, 0x2000);
        let report = Report {
            guest: "debian-1",
            vcpu: 0,
            cause: &"triple fault",
            reason_field: 2,
            qualification: 0,
            interruption: InterruptionInfo(0x8000_0b0e),
            interruption_error: 2,
            vectoring: InterruptionInfo(0x8000_0020),
            registers: core::array::from_fn(|n| n as u64),
            rip: 0x2000,
            rflags: 2,
            cr2: 0xdead,
            control: ControlState::long(0x5000),
            segments: [SegmentState::FLAT; 8],
            gdtr: TableRegister::default(),
            idtr: TableRegister::default(),
            instruction: &[0x0f, 0x0b],
            history: &log,
        };
        let text = format!("{report}");
        for needle in [
            "guest debian-1 vcpu 0 stopped: triple fault",
            "triple fault (2)",
            "#PF (HardwareException)  error code 0x2",
            "during delivery of  vector 0x20 (External)",
            "r15 000000000000000f",
            "paging FourLevel",
            "code 0f 0b",
            "control-register access (28)  0x3",
        ] {
            assert!(text.contains(needle), "{needle:?} not in:\n{text}");
        }
    }
}
