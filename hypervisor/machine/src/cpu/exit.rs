//! Why a guest left VMX non-root operation: exit reasons by name, exit qualifications as structs.

use core::fmt;

use super::event::Vector;
use super::registers::{Gpr, SegmentName, Width};

/// A basic exit reason, bits 15:0 of the exit-reason field. Numbers that no SDM of ours names stay representable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ExitReason(pub u16);

macro_rules! reasons {
    ($($number:literal $constant:ident $name:literal,)*) => {
        /// SDM Vol. 3 Appendix "VMX Basic Exit Reasons".
        #[allow(missing_docs)] // the name beside each says it
        impl ExitReason {
            $(pub const $constant: Self = Self($number);)*

            /// The SDM's name; `"unknown"` for a number it does not list.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self.0 {
                    $($number => $name,)*
                    _ => "unknown",
                }
            }
        }
    };
}

reasons! {
    0 EXCEPTION_OR_NMI "exception or NMI",
    1 EXTERNAL_INTERRUPT "external interrupt",
    2 TRIPLE_FAULT "triple fault",
    3 INIT "INIT signal",
    4 SIPI "start-up IPI",
    5 IO_SMI "I/O system-management interrupt",
    6 OTHER_SMI "other SMI",
    7 INTERRUPT_WINDOW "interrupt window",
    8 NMI_WINDOW "NMI window",
    9 TASK_SWITCH "task switch",
    10 CPUID "CPUID",
    11 GETSEC "GETSEC",
    12 HLT "HLT",
    13 INVD "INVD",
    14 INVLPG "INVLPG",
    15 RDPMC "RDPMC",
    16 RDTSC "RDTSC",
    17 RSM "RSM",
    18 VMCALL "VMCALL",
    19 VMCLEAR "VMCLEAR",
    20 VMLAUNCH "VMLAUNCH",
    21 VMPTRLD "VMPTRLD",
    22 VMPTRST "VMPTRST",
    23 VMREAD "VMREAD",
    24 VMRESUME "VMRESUME",
    25 VMWRITE "VMWRITE",
    26 VMXOFF "VMXOFF",
    27 VMXON "VMXON",
    28 CR_ACCESS "control-register access",
    29 MOV_DR "MOV DR",
    30 IO "I/O instruction",
    31 RDMSR "RDMSR",
    32 WRMSR "WRMSR",
    33 INVALID_GUEST_STATE "VM-entry failure due to invalid guest state",
    34 MSR_LOADING "VM-entry failure due to MSR loading",
    36 MWAIT "MWAIT",
    37 MONITOR_TRAP "monitor trap flag",
    39 MONITOR "MONITOR",
    40 PAUSE "PAUSE",
    41 MACHINE_CHECK_ON_ENTRY "VM-entry failure due to machine-check event",
    43 TPR_BELOW_THRESHOLD "TPR below threshold",
    44 APIC_ACCESS "APIC access",
    45 VIRTUALIZED_EOI "virtualized EOI",
    46 GDTR_OR_IDTR "access to GDTR or IDTR",
    47 LDTR_OR_TR "access to LDTR or TR",
    48 EPT_VIOLATION "EPT violation",
    49 EPT_MISCONFIGURATION "EPT misconfiguration",
    50 INVEPT "INVEPT",
    51 RDTSCP "RDTSCP",
    52 PREEMPTION_TIMER "VMX-preemption timer expired",
    53 INVVPID "INVVPID",
    54 WBINVD "WBINVD or WBNOINVD",
    55 XSETBV "XSETBV",
    56 APIC_WRITE "APIC write",
    57 RDRAND "RDRAND",
    58 INVPCID "INVPCID",
    59 VMFUNC "VMFUNC",
    60 ENCLS "ENCLS",
    61 RDSEED "RDSEED",
    62 PAGE_MODIFICATION_LOG_FULL "page-modification log full",
    63 XSAVES "XSAVES",
    64 XRSTORS "XRSTORS",
    65 PCONFIG "PCONFIG",
    66 SPP "SPP-related event",
    67 UMWAIT "UMWAIT",
    68 TPAUSE "TPAUSE",
    69 LOADIWKEY "LOADIWKEY",
    70 ENCLV "ENCLV",
    72 ENQCMD_PASID "ENQCMD PASID translation failure",
    73 ENQCMDS_PASID "ENQCMDS PASID translation failure",
    74 BUS_LOCK "bus lock",
    75 INSTRUCTION_TIMEOUT "instruction timeout",
    76 SEAMCALL "SEAMCALL",
    77 TDCALL "TDCALL",
}

impl ExitReason {
    /// One more than the largest number above: the size of a table of counters by reason.
    pub const COUNT: usize = 78;

    /// The basic reason of the 32-bit exit-reason field.
    #[must_use]
    #[inline]
    pub const fn from_field(field: u32) -> Self {
        Self(field as u16)
    }

    /// Bit 31 of the exit-reason field: the VM entry failed, no guest instruction was executed.
    #[must_use]
    #[inline]
    pub const fn entry_failed(field: u32) -> bool {
        field >> 31 != 0
    }
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name(), self.0)
    }
}

/// How an event comes about: bits 10:8 of the interruption-information fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum InterruptionType {
    /// External interrupt.
    External = 0,
    /// Not used by the architecture.
    Reserved = 1,
    /// Non-maskable interrupt.
    Nmi = 2,
    /// Faults and aborts, #DB included.
    HardwareException = 3,
    /// INT n.
    SoftwareInterrupt = 4,
    /// INT1.
    PrivilegedSoftwareException = 5,
    /// INT3 and INTO.
    SoftwareException = 6,
    /// At VM entry: a pending monitor-trap-flag exit.
    Other = 7,
}

impl InterruptionType {
    /// Whether the return address lies behind the instruction that raised it.
    #[must_use]
    #[inline]
    pub const fn has_instruction_length(self) -> bool {
        matches!(self, Self::SoftwareInterrupt | Self::PrivilegedSoftwareException | Self::SoftwareException)
    }
}

/// The VM-exit interruption-information field, and the IDT-vectoring one (SDM Vol. 3 "Information for VM Exits
/// Due to Vectored Events").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct InterruptionInfo(pub u32);

impl InterruptionInfo {
    /// Bit 31: the field says something.
    #[must_use]
    #[inline]
    pub const fn valid(self) -> bool {
        self.0 >> 31 != 0
    }
    /// Bits 7:0.
    #[must_use]
    #[inline]
    pub const fn vector(self) -> Vector {
        Vector(self.0 as u8)
    }
    /// Bits 10:8.
    #[must_use]
    #[inline]
    pub const fn kind(self) -> InterruptionType {
        match self.0 >> 8 & 7 {
            0 => InterruptionType::External,
            1 => InterruptionType::Reserved,
            2 => InterruptionType::Nmi,
            3 => InterruptionType::HardwareException,
            4 => InterruptionType::SoftwareInterrupt,
            5 => InterruptionType::PrivilegedSoftwareException,
            6 => InterruptionType::SoftwareException,
            _ => InterruptionType::Other,
        }
    }
    /// Bit 11: the error-code field is valid.
    #[must_use]
    #[inline]
    pub const fn has_error_code(self) -> bool {
        self.0 >> 11 & 1 != 0
    }
    /// Bit 12: the exit happened in an IRET that had already ended NMI blocking. Undefined in the IDT-vectoring
    /// field.
    #[must_use]
    #[inline]
    pub const fn nmi_unblocking_due_to_iret(self) -> bool {
        self.0 >> 12 & 1 != 0
    }
}

/// Exit qualification of a control-register access (SDM Vol. 3 "Exit Qualification for Control-Register
/// Accesses").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrAccess {
    /// MOV to `cr` (0, 3, 4 or 8) from `register`.
    Write {
        /// Which control register.
        cr: u8,
        /// Where the value is.
        register: Gpr,
    },
    /// MOV from `cr` (3 or 8) to `register`.
    Read {
        /// Which control register.
        cr: u8,
        /// Where the value goes.
        register: Gpr,
    },
    /// CLTS.
    Clts,
    /// LMSW with this source, whether it came from a register or from memory.
    Lmsw {
        /// The 16-bit machine status word.
        source: u16,
    },
}

impl CrAccess {
    /// From the exit qualification.
    #[must_use]
    #[inline]
    pub const fn from_qualification(qualification: u64) -> Self {
        let cr = (qualification & 15) as u8;
        let register = Gpr::from_number((qualification >> 8) as u8);
        match qualification >> 4 & 3 {
            0 => Self::Write { cr, register },
            1 => Self::Read { cr, register },
            2 => Self::Clts,
            _ => Self::Lmsw { source: (qualification >> 16) as u16 },
        }
    }
}

/// Exit qualification of a MOV DR (SDM Vol. 3 "Exit Qualification for MOV DR").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrAccess {
    /// 0..8; 4 and 5 stand for 6 and 7 while CR4.DE is 0.
    pub dr: u8,
    /// From the debug register to the general one.
    pub read: bool,
    /// The general register.
    pub register: Gpr,
}

impl DrAccess {
    /// From the exit qualification.
    #[must_use]
    pub const fn from_qualification(qualification: u64) -> Self {
        Self {
            dr: (qualification & 7) as u8,
            read: qualification >> 4 & 1 != 0,
            register: Gpr::from_number((qualification >> 8) as u8),
        }
    }
}

/// Exit qualification of an I/O instruction (SDM Vol. 3 "Exit Qualification for I/O Instructions").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoAccess {
    /// The port.
    pub port: u16,
    /// Byte, word or dword.
    pub width: Width,
    /// IN or INS.
    pub input: bool,
    /// INS or OUTS.
    pub string: bool,
    /// With a REP prefix.
    pub repeat: bool,
}

impl IoAccess {
    /// From the exit qualification.
    #[must_use]
    #[inline]
    pub const fn from_qualification(qualification: u64) -> Self {
        Self {
            port: (qualification >> 16) as u16,
            width: match qualification & 7 {
                0 => Width::Byte,
                1 => Width::Word,
                _ => Width::Dword,
            },
            input: qualification & 1 << 3 != 0,
            string: qualification & 1 << 4 != 0,
            repeat: qualification & 1 << 5 != 0,
        }
    }
}

/// VM-exit instruction information of INS and OUTS (SDM Vol. 3 "Information for VM Exits Due to Instruction
/// Execution"). Exists only where IA32_VMX_BASIC bit 54 is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StringIoInformation {
    /// Width of the index register.
    pub address: Width,
    /// Source segment of OUTS; INS always uses ES.
    pub segment: SegmentName,
}

impl StringIoInformation {
    /// From the VM-exit instruction-information field; `None` if it holds what the SDM does not define.
    #[must_use]
    pub const fn from_field(field: u32) -> Option<Self> {
        let address = match field >> 7 & 7 {
            0 => Width::Word,
            1 => Width::Dword,
            2 => Width::Qword,
            _ => return None,
        };
        match SegmentName::from_number((field >> 15 & 7) as u8) {
            Some(segment) => Some(Self { address, segment }),
            None => None,
        }
    }
}

/// What touched the APIC-access page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApicAccessKind {
    /// A data read by an instruction.
    Read,
    /// A data write by an instruction.
    Write,
    /// An instruction fetch.
    Fetch,
    /// Event delivery.
    EventDelivery,
    /// What no SDM of ours names.
    Unknown(u8),
}

/// Exit qualification of an APIC access (SDM Vol. 3 "Exit Qualification for APIC-Access VM Exits").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApicAccess {
    /// Offset in the page, 0..4096; defined for linear accesses only.
    pub offset: u16,
    /// What kind of access.
    pub kind: ApicAccessKind,
}

impl ApicAccess {
    /// From the exit qualification.
    #[must_use]
    #[inline]
    pub const fn from_qualification(qualification: u64) -> Self {
        Self {
            offset: (qualification & 0xfff) as u16,
            kind: match (qualification >> 12 & 15) as u8 {
                0 => ApicAccessKind::Read,
                1 => ApicAccessKind::Write,
                2 => ApicAccessKind::Fetch,
                3 => ApicAccessKind::EventDelivery,
                other => ApicAccessKind::Unknown(other),
            },
        }
    }
}

/// Exit qualification of a #DB (SDM Vol. 3 "Exit Qualification for Debug Exceptions").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DebugQualification(pub u64);

impl DebugQualification {
    /// DR6 as the guest finds it when the #DB is injected: the SDM says an exit leaves DR6 alone, so the
    /// hypervisor merges. B0-B3 are replaced, BD and BS accumulate, RTM (bit 16) reads 1 without RTM.
    #[must_use]
    pub const fn merge_dr6(self, dr6: u64) -> u64 {
        (dr6 & !0xf | self.0 & 0x600f) & 0xffff_ffff & !(1 << 12) | 0xffff_0ff0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_prints() {
        for number in 0..=u16::MAX {
            let reason = ExitReason(number);
            assert!(!reason.name().is_empty());
            if reason.name() != "unknown" {
                assert!(usize::from(number) < ExitReason::COUNT);
            }
        }
        assert_eq!(format!("{}", ExitReason::CPUID), "CPUID (10)");
        assert_eq!(ExitReason::from_field(0x8000_0021), ExitReason::INVALID_GUEST_STATE);
        assert!(ExitReason::entry_failed(0x8000_0021));
    }

    #[test]
    fn qualifications() {
        assert_eq!(CrAccess::from_qualification(0x703), CrAccess::Write { cr: 3, register: Gpr::Rdi });
        assert_eq!(CrAccess::from_qualification(0x818), CrAccess::Read { cr: 8, register: Gpr::R8 });
        assert_eq!(CrAccess::from_qualification(0x20), CrAccess::Clts);
        assert_eq!(CrAccess::from_qualification(0x000b_0030), CrAccess::Lmsw { source: 0xb });
        assert_eq!(DrAccess::from_qualification(0x017), DrAccess { dr: 7, read: true, register: Gpr::Rax });
        assert_eq!(
            IoAccess::from_qualification(0x03f8_0038),
            IoAccess { port: 0x3f8, width: Width::Byte, input: true, string: true, repeat: true }
        );
        assert_eq!(
            ApicAccess::from_qualification(0x10b0),
            ApicAccess { offset: 0xb0, kind: ApicAccessKind::Write }
        );
        assert_eq!(DebugQualification(0x4001).merge_dr6(0xffff_0ff4), 0xffff_4ff1);
    }

    #[test]
    fn string_io_information() {
        assert_eq!(
            StringIoInformation::from_field(2 << 7 | 3 << 15),
            Some(StringIoInformation { address: Width::Qword, segment: SegmentName::Ds })
        );
        assert_eq!(StringIoInformation::from_field(3 << 7), None);
        assert_eq!(StringIoInformation::from_field(7 << 15), None);
    }
}
