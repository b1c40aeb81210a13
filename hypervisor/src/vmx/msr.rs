//! Model-specific registers: the numbers VMX needs, and a way to read them that tests can replace.

/// `IA32_FEATURE_CONTROL`: the firmware's decision whether VMX may be used.
pub const FEATURE_CONTROL: u32 = 0x3a;
/// `IA32_SPEC_CTRL`.
pub const SPEC_CTRL: u32 = 0x48;
/// `IA32_PRED_CMD`.
pub const PRED_CMD: u32 = 0x49;
/// `IA32_ARCH_CAPABILITIES`.
pub const ARCH_CAPABILITIES: u32 = 0x10a;
/// `IA32_SYSENTER_CS`.
pub const SYSENTER_CS: u32 = 0x174;
/// `IA32_SYSENTER_ESP`.
pub const SYSENTER_ESP: u32 = 0x175;
/// `IA32_SYSENTER_EIP`.
pub const SYSENTER_EIP: u32 = 0x176;
/// `IA32_VMX_BASIC`.
pub const VMX_BASIC: u32 = 0x480;
/// `IA32_VMX_PINBASED_CTLS`.
pub const VMX_PINBASED_CTLS: u32 = 0x481;
/// `IA32_VMX_PROCBASED_CTLS`.
pub const VMX_PROCBASED_CTLS: u32 = 0x482;
/// `IA32_VMX_EXIT_CTLS`.
pub const VMX_EXIT_CTLS: u32 = 0x483;
/// `IA32_VMX_ENTRY_CTLS`.
pub const VMX_ENTRY_CTLS: u32 = 0x484;
/// `IA32_VMX_MISC`.
pub const VMX_MISC: u32 = 0x485;
/// `IA32_VMX_CR0_FIXED0`.
pub const VMX_CR0_FIXED0: u32 = 0x486;
/// `IA32_VMX_CR0_FIXED1`.
pub const VMX_CR0_FIXED1: u32 = 0x487;
/// `IA32_VMX_CR4_FIXED0`.
pub const VMX_CR4_FIXED0: u32 = 0x488;
/// `IA32_VMX_CR4_FIXED1`.
pub const VMX_CR4_FIXED1: u32 = 0x489;
/// `IA32_VMX_PROCBASED_CTLS2`.
pub const VMX_PROCBASED_CTLS2: u32 = 0x48b;
/// `IA32_VMX_EPT_VPID_CAP`.
pub const VMX_EPT_VPID_CAP: u32 = 0x48c;
/// `IA32_VMX_TRUE_PINBASED_CTLS`.
pub const VMX_TRUE_PINBASED_CTLS: u32 = 0x48d;
/// `IA32_VMX_TRUE_PROCBASED_CTLS`.
pub const VMX_TRUE_PROCBASED_CTLS: u32 = 0x48e;
/// `IA32_VMX_TRUE_EXIT_CTLS`.
pub const VMX_TRUE_EXIT_CTLS: u32 = 0x48f;
/// `IA32_VMX_TRUE_ENTRY_CTLS`.
pub const VMX_TRUE_ENTRY_CTLS: u32 = 0x490;
/// `IA32_EFER`.
pub const EFER: u32 = 0xc000_0080;
/// `IA32_FS_BASE`.
pub const FS_BASE: u32 = 0xc000_0100;
/// `IA32_GS_BASE`.
pub const GS_BASE: u32 = 0xc000_0101;

/// A source of MSR values: the processor, or a table in a test.
pub trait MsrRead {
    /// The value of the MSR `index`. Called only for MSRs whose existence the caller has established.
    fn read(&self, index: u32) -> u64;
}

/// The MSRs of the processor this code runs on. Reading one that does not exist is a #GP, hence a panic.
#[derive(Clone, Copy, Debug, Default)]
pub struct Processor;

impl MsrRead for Processor {
    fn read(&self, index: u32) -> u64 {
        // SAFETY: RDMSR at CPL 0 has no effect on memory; a missing MSR faults, and the fault is reported.
        unsafe { x86_64::registers::model_specific::Msr::new(index).read() }
    }
}

/// Tables of capability MSRs for host tests, with the values of real processors' documentation.
#[cfg(test)]
pub(crate) mod tables {
    use super::*;

    /// A processor given as (MSR, value) pairs; an MSR outside the table fails the test that reads it.
    pub(crate) struct Table(pub(crate) std::vec::Vec<(u32, u64)>);

    impl MsrRead for Table {
        fn read(&self, index: u32) -> u64 {
            self.0
                .iter()
                .find(|entry| entry.0 == index)
                .unwrap_or_else(|| panic!("MSR {index:#x} read, but this processor has none"))
                .1
        }
    }

    impl Table {
        /// The same processor with one MSR changed.
        pub(crate) fn with(mut self, index: u32, value: u64) -> Self {
            self.0.retain(|entry| entry.0 != index);
            self.0.push((index, value));
            self
        }
    }

    fn common() -> std::vec::Vec<(u32, u64)> {
        std::vec![(VMX_CR0_FIXED0, 0x8000_0021), (VMX_CR0_FIXED1, 0xffff_ffff), (VMX_CR4_FIXED0, 0x2000),]
    }

    /// Core 2 (Penryn): no TRUE MSRs' extras, no VPID, no preemption timer, no EFER switching.
    pub(crate) fn penryn() -> Table {
        let mut msrs = common();
        msrs.extend([
            (VMX_BASIC, 0x005a_0800_0000_000d),
            (VMX_PINBASED_CTLS, 0x0000_003f_0000_0016),
            (VMX_PROCBASED_CTLS, 0xf7f9_fffe_0401_e172),
            (VMX_PROCBASED_CTLS2, 0x0000_0041_0000_0000),
            (VMX_EXIT_CTLS, 0x0003_ffff_0003_6dff),
            (VMX_ENTRY_CTLS, 0x0000_3fff_0000_11ff),
            (VMX_MISC, 0x0000_0000_0000_03c0),
            (VMX_CR4_FIXED1, 0x0000_27ff),
        ]);
        Table(msrs)
    }

    /// Broadwell: TRUE MSRs, VPID, preemption timer, INVPCID, no XSAVES in VMX.
    pub(crate) fn broadwell() -> Table {
        let mut msrs = common();
        msrs.extend([
            (VMX_BASIC, 0x00da_0400_0000_0012),
            (VMX_TRUE_PINBASED_CTLS, 0x0000_007f_0000_0016),
            (VMX_TRUE_PROCBASED_CTLS, 0xfff9_fffe_0400_6172),
            (VMX_PROCBASED_CTLS2, 0x0007_ffff_0000_0000),
            (VMX_TRUE_EXIT_CTLS, 0x007f_ffff_0003_6dfb),
            (VMX_TRUE_ENTRY_CTLS, 0x0000_ffff_0000_11fb),
            (VMX_MISC, 0x0000_0000_3004_81e5),
            (VMX_CR4_FIXED1, 0x0037_67ff),
            (VMX_EPT_VPID_CAP, 0x0000_0f01_0633_4141),
        ]);
        Table(msrs)
    }

    /// Skylake server: as Broadwell, and XSAVES.
    pub(crate) fn skylake() -> Table {
        broadwell().with(VMX_PROCBASED_CTLS2, 0x005f_ffff_0000_0000)
    }
}
