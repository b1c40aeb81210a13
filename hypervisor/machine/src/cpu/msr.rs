//! The guest's model-specific registers: which are its own, which are emulated; any other is #GP.
//!
//! Registers as in SDM Vol. 4. The machine's parts keep what is theirs (the local APIC its base and its x2APIC
//! registers, the control registers EFER and XSS, time the TSC); [`MsrState`] keeps the rest and says who is meant.

use alloc::boxed::Box;

use super::registers::canonical;

macro_rules! indices {
    ($($name:ident = $value:literal,)*) => {
        /// MSR numbers, by the SDM's names without the IA32 prefix.
        #[allow(missing_docs)] // the architecture's own names
        pub mod index {
            $(pub const $name: u32 = $value;)*
        }
    };
}

indices! {
    P5_MC_ADDR = 0x0,
    P5_MC_TYPE = 0x1,
    TSC = 0x10,
    PLATFORM_ID = 0x17,
    APIC_BASE = 0x1b,
    EBL_CR_POWERON = 0x2a,
    SMI_COUNT = 0x34,
    FEATURE_CONTROL = 0x3a,
    TSC_ADJUST = 0x3b,
    SPEC_CTRL = 0x48,
    PRED_CMD = 0x49,
    BIOS_UPDT_TRIG = 0x79,
    BIOS_SIGN_ID = 0x8b,
    PLATFORM_INFO = 0xce,
    MTRRCAP = 0xfe,
    ARCH_CAPABILITIES = 0x10a,
    SYSENTER_CS = 0x174,
    SYSENTER_ESP = 0x175,
    SYSENTER_EIP = 0x176,
    MCG_CAP = 0x179,
    MCG_STATUS = 0x17a,
    MISC_ENABLE = 0x1a0,
    DEBUGCTL = 0x1d9,
    LASTBRANCHFROMIP = 0x1db,
    LASTBRANCHTOIP = 0x1dc,
    LASTINTFROMIP = 0x1dd,
    LASTINTTOIP = 0x1de,
    MTRR_PHYSBASE0 = 0x200,
    MTRR_PHYSMASK_LAST = 0x20f,
    MTRR_FIX64K_00000 = 0x250,
    MTRR_FIX16K_80000 = 0x258,
    MTRR_FIX16K_A0000 = 0x259,
    MTRR_FIX4K_C0000 = 0x268,
    MTRR_FIX4K_F8000 = 0x26f,
    PAT = 0x277,
    MTRR_DEF_TYPE = 0x2ff,
    TSC_DEADLINE = 0x6e0,
    X2APIC_FIRST = 0x800,
    X2APIC_LAST = 0x8ff,
    XSS = 0xda0,
    EFER = 0xc000_0080,
    STAR = 0xc000_0081,
    LSTAR = 0xc000_0082,
    CSTAR = 0xc000_0083,
    SFMASK = 0xc000_0084,
    FS_BASE = 0xc000_0100,
    GS_BASE = 0xc000_0101,
    KERNEL_GS_BASE = 0xc000_0102,
    TSC_AUX = 0xc000_0103,
}

use index as i;

/// A register that the guest reads and writes without an exit, because its value is switched with the vCPU: in
/// the VMCS, or by the hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the architecture's own names
pub enum NativeMsr {
    SysenterCs,
    SysenterEsp,
    SysenterEip,
    Star,
    Lstar,
    Cstar,
    Sfmask,
    FsBase,
    GsBase,
    KernelGsBase,
    TscAux,
}

impl NativeMsr {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::SysenterCs,
        Self::SysenterEsp,
        Self::SysenterEip,
        Self::Star,
        Self::Lstar,
        Self::Cstar,
        Self::Sfmask,
        Self::FsBase,
        Self::GsBase,
        Self::KernelGsBase,
        Self::TscAux,
    ];

    /// Its number.
    #[must_use]
    pub const fn index(self) -> u32 {
        match self {
            Self::SysenterCs => i::SYSENTER_CS,
            Self::SysenterEsp => i::SYSENTER_ESP,
            Self::SysenterEip => i::SYSENTER_EIP,
            Self::Star => i::STAR,
            Self::Lstar => i::LSTAR,
            Self::Cstar => i::CSTAR,
            Self::Sfmask => i::SFMASK,
            Self::FsBase => i::FS_BASE,
            Self::GsBase => i::GS_BASE,
            Self::KernelGsBase => i::KERNEL_GS_BASE,
            Self::TscAux => i::TSC_AUX,
        }
    }

    const fn from_index(index: u32) -> Option<Self> {
        Some(match index {
            i::SYSENTER_CS => Self::SysenterCs,
            i::SYSENTER_ESP => Self::SysenterEsp,
            i::SYSENTER_EIP => Self::SysenterEip,
            i::STAR => Self::Star,
            i::LSTAR => Self::Lstar,
            i::CSTAR => Self::Cstar,
            i::SFMASK => Self::Sfmask,
            i::FS_BASE => Self::FsBase,
            i::GS_BASE => Self::GsBase,
            i::KERNEL_GS_BASE => Self::KernelGsBase,
            i::TSC_AUX => Self::TscAux,
            _ => return None,
        })
    }

    /// Whether the processor would take this value. 32-bit registers drop their upper half.
    const fn accepts(self, value: u64) -> bool {
        match self {
            Self::SysenterEsp
            | Self::SysenterEip
            | Self::Lstar
            | Self::Cstar
            | Self::FsBase
            | Self::GsBase
            | Self::KernelGsBase => canonical(value),
            Self::TscAux | Self::Sfmask => value >> 32 == 0,
            Self::SysenterCs | Self::Star => true,
        }
    }
}

/// Who answers a RDMSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsrRead {
    /// This value.
    Value(u64),
    /// The guest's own register, wherever it is kept just now.
    Native(NativeMsr),
    /// The guest's TSC, now.
    Tsc,
    /// The local APIC's base register.
    ApicBase,
    /// The local APIC's deadline register.
    TscDeadline,
    /// The local APIC's register of this MSR number, 0x800..=0x8FF; #GP unless it is in x2APIC mode.
    Lapic(u32),
    /// The guest's EFER (`ControlState::efer`).
    Efer,
    /// No such register: inject #GP(0).
    GeneralProtection,
}

/// What follows from a WRMSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum MsrWrite {
    /// Nothing more.
    Done,
    /// Load the guest's own register; the value is checked.
    Native(NativeMsr, u64),
    /// Make the guest's TSC read this now, then call [`MsrState::tsc_shifted`] with the distance.
    Tsc(u64),
    /// Shift the guest's TSC by this many ticks (modulo 2^64); TSC_ADJUST is up to date.
    ShiftTsc(u64),
    /// For the local APIC's base register.
    ApicBase(u64),
    /// For the local APIC's deadline register.
    TscDeadline(u64),
    /// For the local APIC's register of this MSR number; #GP unless it is in x2APIC mode.
    Lapic(u32, u64),
    /// For `ControlState::write_efer`, which checks it.
    Efer(u64),
    /// The new IA32_XSS, checked; CPUID leaf 0xD changes with it.
    Xss(u64),
    /// The new SPEC_CTRL, checked.
    SpeculationControl(u64),
    /// Issue an indirect-branch prediction barrier.
    PredictionBarrier,
    /// Not allowed: inject #GP(0).
    GeneralProtection,
}

/// What one guest's registers are, after its CPUID: see `CpuidModel::msr_model`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrModel {
    /// MAXPHYADDR, 32..=52.
    pub physical_bits: u8,
    /// IA32_ARCH_CAPABILITIES, where it is offered.
    pub arch_capabilities: Option<u64>,
    /// SPEC_CTRL and PRED_CMD are offered.
    pub speculation_control: bool,
    /// TSC_AUX is offered.
    pub rdtscp: bool,
    /// IA32_XSS is offered.
    pub xsaves: bool,
    /// Upper half of IA32_BIOS_SIGN_ID.
    pub microcode_revision: u32,
    /// For the ratio in PLATFORM_INFO.
    pub tsc_khz: u32,
}

/// MSR numbers that one bitmap covers from each of its two bases.
const BITMAP_RANGE: u32 = 0x2000;
/// Variable-range MTRR pairs.
const MTRR_PAIRS: usize = 8;
/// Fixed-range MTRRs.
const MTRR_FIXED: usize = 11;
/// IA32_MTRRCAP: 8 pairs, fixed ranges, write-combining.
const MTRRCAP_VALUE: u64 = MTRR_PAIRS as u64 | 1 << 8 | 1 << 10;
/// IA32_PAT after reset: WB, WT, UC-, UC, twice.
const PAT_RESET: u64 = 0x0007_0406_0007_0406;
/// IA32_MISC_ENABLE: fast strings; no branch-trace store, no PEBS.
const MISC_ENABLE_RESET: u64 = 1 | 1 << 11 | 1 << 12;
/// Of MISC_ENABLE the guest may change fast strings alone; other writes are accepted and dropped.
const MISC_ENABLE_WRITABLE: u64 = 1;
/// FEATURE_CONTROL: locked, VMX off.
const FEATURE_CONTROL_VALUE: u64 = 1;
/// Memory types.
const UNCACHEABLE: u64 = 0;
const WRITE_BACK: u64 = 6;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_FIXED_ENABLE: u64 = 1 << 10;
const MTRR_VALID: u64 = 1 << 11;
/// The range below 4 GiB that is never RAM.
const MMIO_BASE: u64 = 0xc000_0000;
const MMIO_BYTES: u64 = 0x4000_0000;

/// The emulated registers of one vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MsrState {
    model: MsrModel,
    pat: u64,
    misc_enable: u64,
    mcg_status: u64,
    tsc_adjust: u64,
    speculation_control: u64,
    xss: u64,
    mtrr_def_type: u64,
    mtrr_variable: [u64; MTRR_PAIRS * 2],
    mtrr_fixed: [u64; MTRR_FIXED],
}

impl MsrState {
    /// As firmware would leave them: memory is write-back, the range for devices below 4 GiB is not. (Linux
    /// gives up PAT where it finds the MTRRs off.)
    #[must_use]
    pub fn new(model: &MsrModel) -> Self {
        let mut mtrr_variable = [0; MTRR_PAIRS * 2];
        mtrr_variable[0] = MMIO_BASE | UNCACHEABLE;
        mtrr_variable[1] = physical_mask(model.physical_bits) & !(MMIO_BYTES - 1) | MTRR_VALID;
        let mut mtrr_fixed = [WRITE_BACK * 0x0101_0101_0101_0101; MTRR_FIXED];
        // 0xA0000-0xBFFFF, where graphics memory would be.
        mtrr_fixed[2] = 0;
        Self {
            model: *model,
            pat: PAT_RESET,
            misc_enable: MISC_ENABLE_RESET,
            mcg_status: 0,
            tsc_adjust: 0,
            speculation_control: 0,
            xss: 0,
            mtrr_def_type: MTRR_ENABLE | MTRR_FIXED_ENABLE | WRITE_BACK,
            mtrr_variable,
            mtrr_fixed,
        }
    }

    /// The guest's PAT; emulated state only, never the hardware's.
    #[must_use]
    pub const fn pat(&self) -> u64 {
        self.pat
    }

    /// The guest's IA32_XSS.
    #[must_use]
    pub const fn xss(&self) -> u64 {
        self.xss
    }

    /// The guest's SPEC_CTRL.
    #[must_use]
    pub const fn speculation_control(&self) -> u64 {
        self.speculation_control
    }

    /// The guest's TSC moved by `ticks` (modulo 2^64) because it was written: TSC_ADJUST moves along.
    pub fn tsc_shifted(&mut self, ticks: u64) {
        self.tsc_adjust = self.tsc_adjust.wrapping_add(ticks);
    }

    /// RDMSR.
    #[must_use]
    pub fn read(&self, index: u32) -> MsrRead {
        if let Some(native) = self.native(index) {
            return MsrRead::Native(native);
        }
        MsrRead::Value(match index {
            i::TSC => return MsrRead::Tsc,
            i::APIC_BASE => return MsrRead::ApicBase,
            i::TSC_DEADLINE => return MsrRead::TscDeadline,
            i::X2APIC_FIRST..=i::X2APIC_LAST => return MsrRead::Lapic(index),
            i::EFER => return MsrRead::Efer,
            i::TSC_ADJUST => self.tsc_adjust,
            i::PAT => self.pat,
            i::MTRRCAP => MTRRCAP_VALUE,
            i::MTRR_DEF_TYPE => self.mtrr_def_type,
            i::MTRR_PHYSBASE0..=i::MTRR_PHYSMASK_LAST => {
                self.mtrr_variable[(index - i::MTRR_PHYSBASE0) as usize]
            }
            i::MISC_ENABLE => self.misc_enable,
            i::MCG_STATUS => self.mcg_status,
            i::FEATURE_CONTROL => FEATURE_CONTROL_VALUE,
            i::BIOS_SIGN_ID => u64::from(self.model.microcode_revision) << 32,
            i::PLATFORM_INFO => u64::from((self.model.tsc_khz / 100_000) & 0xff) << 8,
            i::XSS if self.model.xsaves => self.xss,
            i::SPEC_CTRL if self.model.speculation_control => self.speculation_control,
            i::ARCH_CAPABILITIES => match self.model.arch_capabilities {
                Some(value) => value,
                None => return MsrRead::GeneralProtection,
            },
            // Banks, branch records and SMIs that there are none of.
            i::MCG_CAP
            | i::P5_MC_ADDR
            | i::P5_MC_TYPE
            | i::PLATFORM_ID
            | i::EBL_CR_POWERON
            | i::SMI_COUNT
            | i::DEBUGCTL
            | i::LASTBRANCHFROMIP
            | i::LASTBRANCHTOIP
            | i::LASTINTFROMIP
            | i::LASTINTTOIP => 0,
            _ => match fixed_mtrr(index) {
                Some(number) => self.mtrr_fixed[number],
                None => return MsrRead::GeneralProtection,
            },
        })
    }

    /// WRMSR.
    pub fn write(&mut self, index: u32, value: u64) -> MsrWrite {
        if let Some(native) = self.native(index) {
            return if native.accepts(value) {
                MsrWrite::Native(native, value)
            } else {
                MsrWrite::GeneralProtection
            };
        }
        match index {
            i::TSC => MsrWrite::Tsc(value),
            i::APIC_BASE => MsrWrite::ApicBase(value),
            i::TSC_DEADLINE => MsrWrite::TscDeadline(value),
            i::X2APIC_FIRST..=i::X2APIC_LAST => MsrWrite::Lapic(index, value),
            i::EFER => MsrWrite::Efer(value),
            i::TSC_ADJUST => {
                let shift = value.wrapping_sub(self.tsc_adjust);
                self.tsc_adjust = value;
                MsrWrite::ShiftTsc(shift)
            }
            i::PAT => store(&mut self.pat, value, types_valid(value, true)),
            i::MTRR_DEF_TYPE => {
                let defined = 0xff | MTRR_ENABLE | MTRR_FIXED_ENABLE;
                store(&mut self.mtrr_def_type, value, value & !defined == 0 && type_valid(value as u8, false))
            }
            i::MTRR_PHYSBASE0..=i::MTRR_PHYSMASK_LAST => {
                let mask = index & 1 != 0;
                let low = if mask { MTRR_VALID } else { 0xff };
                let defined = physical_mask(self.model.physical_bits) & !0xfff | low;
                let valid = value & !defined == 0 && (mask || type_valid(value as u8, false));
                store(&mut self.mtrr_variable[(index - i::MTRR_PHYSBASE0) as usize], value, valid)
            }
            i::MISC_ENABLE => {
                self.misc_enable = self.misc_enable & !MISC_ENABLE_WRITABLE | value & MISC_ENABLE_WRITABLE;
                MsrWrite::Done
            }
            i::MCG_STATUS => store(&mut self.mcg_status, value, value == 0),
            // A loader clears the revision before it asks for it by CPUID; there is no update to load.
            i::BIOS_SIGN_ID | i::BIOS_UPDT_TRIG => MsrWrite::Done,
            // Bits 0 and 1 (LBR, BTF) are dropped: debuggers set them and look at nothing.
            i::DEBUGCTL if value & !3 == 0 => MsrWrite::Done,
            i::P5_MC_ADDR | i::P5_MC_TYPE | i::EBL_CR_POWERON => MsrWrite::Done,
            // No supervisor state component is offered.
            i::XSS if self.model.xsaves && value == 0 => {
                self.xss = 0;
                MsrWrite::Xss(0)
            }
            i::SPEC_CTRL if self.model.speculation_control && value & !7 == 0 => {
                self.speculation_control = value;
                MsrWrite::SpeculationControl(value)
            }
            i::PRED_CMD if self.model.speculation_control => match value {
                0 => MsrWrite::Done,
                1 => MsrWrite::PredictionBarrier,
                _ => MsrWrite::GeneralProtection,
            },
            _ => match fixed_mtrr(index) {
                Some(number) => store(&mut self.mtrr_fixed[number], value, types_valid(value, false)),
                None => MsrWrite::GeneralProtection,
            },
        }
    }

    fn native(&self, index: u32) -> Option<NativeMsr> {
        NativeMsr::from_index(index).filter(|native| *native != NativeMsr::TscAux || self.model.rdtscp)
    }
}

/// Stores a value that passed its check.
fn store(register: &mut u64, value: u64, valid: bool) -> MsrWrite {
    if valid {
        *register = value;
        MsrWrite::Done
    } else {
        MsrWrite::GeneralProtection
    }
}

const fn physical_mask(bits: u8) -> u64 {
    u64::MAX >> (64 - bits as u32)
}

/// Memory types: UC, WC, WT, WP, WB; in PAT also UC-.
const fn type_valid(value: u8, pat: bool) -> bool {
    matches!(value, 0 | 1 | 4 | 5 | 6) || pat && value == 7
}

fn types_valid(value: u64, pat: bool) -> bool {
    value.to_le_bytes().iter().all(|&byte| type_valid(byte, pat))
}

const fn fixed_mtrr(index: u32) -> Option<usize> {
    Some(match index {
        i::MTRR_FIX64K_00000 => 0,
        i::MTRR_FIX16K_80000 => 1,
        i::MTRR_FIX16K_A0000 => 2,
        i::MTRR_FIX4K_C0000..=i::MTRR_FIX4K_F8000 => (index - i::MTRR_FIX4K_C0000) as usize + 3,
        _ => return None,
    })
}

/// The MSR bitmap of a guest (SDM Vol. 3 "MSR-Bitmap Address"): every access exits but those to [`NativeMsr`] and
/// reads of the TSC, which the processor offsets by itself. The same for all vCPUs of a guest.
#[must_use]
pub fn bitmap(model: &MsrModel) -> Box<[u8; 4096]> {
    let mut bits = Box::new([0xff; 4096]);
    for native in NativeMsr::ALL {
        if native != NativeMsr::TscAux || model.rdtscp {
            pass(&mut bits, native.index(), true, true);
        }
    }
    pass(&mut bits, i::TSC, true, false);
    bits
}

/// Layout: reads of 0.., reads of 0xC0000000.., writes of 0.., writes of 0xC0000000.., 1 KiB each.
fn pass(bits: &mut [u8; 4096], index: u32, read: bool, write: bool) {
    let (area, number) = match index {
        0..BITMAP_RANGE => (0, index as usize),
        0xc000_0000..0xc000_2000 => (1024, (index & (BITMAP_RANGE - 1)) as usize),
        _ => return,
    };
    let keep = !(1 << (number % 8));
    if read {
        bits[area + number / 8] &= keep;
    }
    if write {
        bits[2048 + area + number / 8] &= keep;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MODEL: MsrModel = MsrModel {
        physical_bits: 40,
        arch_capabilities: Some(0x21),
        speculation_control: false,
        rdtscp: true,
        xsaves: true,
        microcode_revision: 0x2a,
        tsc_khz: 3_500_000,
    };

    fn state() -> MsrState {
        MsrState::new(&MODEL)
    }

    /// What Debian's 6.1 kernel reads on its way to a shell without expecting a fault.
    #[test]
    fn debian_reads() {
        let reads = [
            i::TSC,
            i::APIC_BASE,
            i::PLATFORM_ID,
            i::TSC_ADJUST,
            i::BIOS_SIGN_ID,
            i::MTRRCAP,
            i::ARCH_CAPABILITIES,
            i::MCG_CAP,
            i::MISC_ENABLE,
            i::PAT,
            i::MTRR_DEF_TYPE,
            i::TSC_DEADLINE,
            i::EFER,
            i::FS_BASE,
            i::GS_BASE,
            i::KERNEL_GS_BASE,
            i::DEBUGCTL,
            i::XSS,
            0x200,
            0x201,
            0x20e,
            0x20f,
            0x250,
            0x258,
            0x259,
            0x268,
            0x26f,
            0x802,
            0x803,
        ];
        for index in reads {
            assert_ne!(state().read(index), MsrRead::GeneralProtection, "{index:#x}");
        }
    }

    /// What it reads with rdmsr_safe: a fault tells it that the thing is not there.
    #[test]
    fn debian_probes() {
        for index in [0x33u32, 0x122, 0x140, 0x186, 0x345, 0x606, 0x611, 0x639, 0xc001_0015, 0xc001_1029] {
            assert_eq!(state().read(index), MsrRead::GeneralProtection, "{index:#x}");
        }
        assert_eq!(state().read(i::FEATURE_CONTROL), MsrRead::Value(1), "locked, VMX off");
        assert_eq!(state().read(i::PLATFORM_INFO), MsrRead::Value(35 << 8));
    }

    /// What it writes.
    #[test]
    fn debian_writes() {
        let writes = [
            (i::SYSENTER_CS, 0x10),
            (i::SYSENTER_ESP, 0xffff_8880_0000_0000),
            (i::STAR, 0x23_0010_0000_0000),
            (i::LSTAR, 0xffff_ffff_8100_0000),
            (i::CSTAR, 0xffff_ffff_8100_1000),
            (i::SFMASK, 0x0025_7fd5),
            (i::GS_BASE, 0xffff_8880_0000_0000),
            (i::KERNEL_GS_BASE, 0),
            (i::EFER, 0xd01),
            (i::PAT, 0x0407_0506_0007_0106),
            (i::BIOS_SIGN_ID, 0),
            (i::TSC_AUX, 1),
            (i::MISC_ENABLE, 0x85_0089),
            (i::APIC_BASE, 0xfee0_0900),
            (i::TSC_DEADLINE, 1),
            (i::TSC_ADJUST, 0),
            (i::MTRR_DEF_TYPE, 6),
            (i::XSS, 0),
            (i::DEBUGCTL, 0),
            (0x80b, 0),
            (0x830, 0x40fb),
        ];
        let mut state = state();
        for (index, value) in writes {
            assert_ne!(state.write(index, value), MsrWrite::GeneralProtection, "{index:#x}");
        }
        assert_eq!(state.pat(), 0x0407_0506_0007_0106);
    }

    #[test]
    fn bad_values_are_general_protection_and_change_nothing() {
        let mut state = state();
        let before = state.clone();
        let writes = [
            (i::LSTAR, 0x8000_0000_0000u64),
            (i::KERNEL_GS_BASE, 1 << 63),
            (i::SYSENTER_EIP, 1 << 47),
            (i::SFMASK, 1 << 32),
            (i::TSC_AUX, 1 << 32),
            (i::PAT, 2),
            (i::PAT, 8 << 56),
            (i::MTRR_DEF_TYPE, 7),
            (i::MTRR_DEF_TYPE, 1 << 12),
            (0x200, 0x1_0000_0700),
            (0x200, 1 << 40),
            (0x201, 1),
            (0x250, 2 << 8),
            (i::MTRRCAP, 0),
            (i::FEATURE_CONTROL, 5),
            (i::ARCH_CAPABILITIES, 0),
            (i::XSS, 1),
            (i::MCG_STATUS, 1),
            (i::SPEC_CTRL, 1),
            (i::PRED_CMD, 1),
            (0x480, 0),
            (0x1234, 0),
            (0xffff_ffff, 0),
        ];
        for (index, value) in writes {
            assert_eq!(state.write(index, value), MsrWrite::GeneralProtection, "{index:#x} {value:#x}");
        }
        assert_eq!(state, before);
    }

    #[test]
    fn speculation_registers_where_offered() {
        let mut state = MsrState::new(&MsrModel { speculation_control: true, ..MODEL });
        assert_eq!(state.write(i::SPEC_CTRL, 4), MsrWrite::SpeculationControl(4));
        assert_eq!(state.read(i::SPEC_CTRL), MsrRead::Value(4));
        assert_eq!(state.write(i::SPEC_CTRL, 8), MsrWrite::GeneralProtection);
        assert_eq!(state.write(i::PRED_CMD, 1), MsrWrite::PredictionBarrier);
        assert_eq!(state.read(i::PRED_CMD), MsrRead::GeneralProtection, "write-only");
    }

    #[test]
    fn tsc_adjust_follows_both_ways() {
        let mut state = state();
        assert_eq!(state.write(i::TSC_ADJUST, 100), MsrWrite::ShiftTsc(100));
        assert_eq!(state.write(i::TSC_ADJUST, 40), MsrWrite::ShiftTsc(60u64.wrapping_neg()));
        state.tsc_shifted(2);
        assert_eq!(state.read(i::TSC_ADJUST), MsrRead::Value(42));
    }

    #[test]
    fn mtrrs_describe_the_machine() {
        assert_eq!(state().read(i::MTRR_DEF_TYPE), MsrRead::Value(0xc06));
        assert_eq!(state().read(0x200), MsrRead::Value(0xc000_0000));
        assert_eq!(state().read(0x201), MsrRead::Value(0xff_c000_0800));
        assert_eq!(state().read(i::MTRR_FIX16K_A0000), MsrRead::Value(0));
    }

    #[test]
    fn the_bitmap_passes_what_is_native_and_nothing_else() {
        for rdtscp in [true, false] {
            let model = MsrModel { rdtscp, ..MODEL };
            let bits = bitmap(&model);
            let state = MsrState::new(&model);
            for index in (0..0x2000).chain(0xc000_0000..0xc000_2000) {
                let area = if index >= 0xc000_0000 { 1024 } else { 0 };
                let number = (index & 0x1fff) as usize;
                let exits = |base: usize| bits[base + area + number / 8] >> (number % 8) & 1 != 0;
                let native = matches!(state.read(index), MsrRead::Native(_));
                assert_eq!(!exits(0), native || index == i::TSC, "read {index:#x}");
                assert_eq!(!exits(2048), native, "write {index:#x}");
            }
        }
    }

    proptest! {
        /// What was stored is read back; nothing panics.
        #[test]
        fn stored_is_read_back(index in prop_oneof![0u32..0x1000, 0xc000_0000u32..0xc000_0200, any::<u32>()], value: u64) {
            let mut state = state();
            let before = state.read(index);
            if state.write(index, value) == MsrWrite::GeneralProtection {
                prop_assert_eq!(state.read(index), before);
            }
            let _ = state.read(index);
        }
    }
}
