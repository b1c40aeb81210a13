//! What the processor's VMX can do: its capability MSRs, read once, and the pure adjustment of wanted controls.

use core::fmt;

use super::controls::{Group, PrimaryControls, SecondaryControls};
use super::msr::{self, MsrRead};

/// Which bits of one control field may be 0 and which may be 1
/// (SDM Vol. 3, Appendix A.3 "VM-Execution Controls" and following).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Allowed {
    /// Bits that must be 1.
    pub must_be_one: u32,
    /// Bits that may be 1.
    pub may_be_one: u32,
}

impl Allowed {
    /// From the MSR: the low half names the bits that must be 1, the high half those that may be.
    #[must_use]
    pub const fn from_msr(value: u64) -> Self {
        Self { must_be_one: value as u32, may_be_one: (value >> 32) as u32 }
    }
}

/// The bits of CR0 or CR4 that VMX operation fixes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct FixedBits {
    /// A bit that is 1 here must be 1 (the FIXED0 MSR).
    pub must_be_one: u64,
    /// A bit that is 0 here must be 0 (the FIXED1 MSR).
    pub may_be_one: u64,
}

impl FixedBits {
    /// `value` with the fixed bits forced.
    #[must_use]
    pub const fn apply(self, value: u64) -> u64 {
        (value | self.must_be_one) & self.may_be_one
    }
}

/// The contents of the VMX capability MSRs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// The identifier that the first word of each VMCS and of the VMXON region must hold (31 bits).
    pub revision: u32,
    /// Bytes the processor uses of a VMCS or VMXON region, 1..=4096.
    pub region_bytes: u16,
    /// Whether the controls come from the TRUE MSRs, where the "default1" bits may be 0.
    pub true_controls: bool,
    /// Exits of INS and OUTS tell address size and segment.
    pub string_io_information: bool,
    /// Pin-based controls.
    pub pin: Allowed,
    /// Primary processor-based controls.
    pub primary: Allowed,
    /// Secondary processor-based controls; nothing is allowed where the processor has none.
    pub secondary: Allowed,
    /// VM-exit controls.
    pub exit: Allowed,
    /// VM-entry controls.
    pub entry: Allowed,
    /// CR0 in VMX operation.
    pub cr0: FixedBits,
    /// CR4 in VMX operation.
    pub cr4: FixedBits,
    /// `IA32_VMX_MISC`.
    pub misc: Misc,
    /// Which INVVPID there is.
    pub invvpid: InvvpidTypes,
}

impl Capabilities {
    /// Reads the capability MSRs. The caller has checked CPUID.1:ECX.VMX.
    #[must_use]
    pub fn read(msrs: &impl MsrRead) -> Self {
        let basic = msrs.read(msr::VMX_BASIC);
        let true_controls = basic & (1 << 55) != 0;
        let allowed = |group: Group| Allowed::from_msr(msrs.read(group.msr(true_controls).0));
        let primary = allowed(Group::Primary);
        let secondary = if primary.may_be_one & PrimaryControls::ACTIVATE_SECONDARY_CONTROLS.bits() != 0 {
            allowed(Group::Secondary)
        } else {
            Allowed::default()
        };
        // The MSR exists only with EPT or VPID.
        let ept_or_vpid = (SecondaryControls::ENABLE_EPT | SecondaryControls::ENABLE_VPID).bits();
        let ept_vpid =
            if secondary.may_be_one & ept_or_vpid != 0 { msrs.read(msr::VMX_EPT_VPID_CAP) } else { 0 };
        Self {
            revision: basic as u32 & 0x7fff_ffff,
            region_bytes: (basic >> 32) as u16 & 0x1fff,
            string_io_information: basic & (1 << 54) != 0,
            true_controls,
            pin: allowed(Group::Pin),
            primary,
            secondary,
            exit: allowed(Group::Exit),
            entry: allowed(Group::Entry),
            cr0: FixedBits {
                must_be_one: msrs.read(msr::VMX_CR0_FIXED0),
                may_be_one: msrs.read(msr::VMX_CR0_FIXED1),
            },
            cr4: FixedBits {
                must_be_one: msrs.read(msr::VMX_CR4_FIXED0),
                may_be_one: msrs.read(msr::VMX_CR4_FIXED1),
            },
            misc: Misc(msrs.read(msr::VMX_MISC)),
            invvpid: InvvpidTypes::from_msr(ept_vpid),
        }
    }

    /// What this processor allows of one group of controls.
    #[must_use]
    pub const fn allowed(&self, group: Group) -> Allowed {
        match group {
            Group::Pin => self.pin,
            Group::Primary => self.primary,
            Group::Secondary => self.secondary,
            Group::Exit => self.exit,
            Group::Entry => self.entry,
        }
    }
}

/// `IA32_VMX_MISC` (SDM Vol. 3, Appendix A.6 "Miscellaneous Data").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Misc(pub u64);

impl Misc {
    /// The preemption timer counts down by one each time TSC bit `shift` changes: one count is
    /// `1 << shift` TSC ticks, 0..=31.
    #[must_use]
    pub const fn preemption_timer_shift(self) -> u32 {
        (self.0 & 0x1f) as u32
    }

    /// A vCPU may be entered in the HLT activity state.
    #[must_use]
    pub const fn activity_hlt(self) -> bool {
        self.0 & (1 << 6) != 0
    }

    /// A vCPU may be entered in the wait-for-SIPI activity state.
    #[must_use]
    pub const fn activity_wait_for_sipi(self) -> bool {
        self.0 & (1 << 8) != 0
    }
}

/// The kinds of INVVPID (SDM Vol. 3, Appendix A.10 "VPID and EPT Capabilities").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct InvvpidTypes {
    /// One address of one VPID.
    pub individual_address: bool,
    /// Everything of one VPID.
    pub single_context: bool,
    /// Everything of every VPID but 0. VPIDs are used only where there is this one.
    pub all_contexts: bool,
}

impl InvvpidTypes {
    /// From `IA32_VMX_EPT_VPID_CAP`.
    #[must_use]
    pub const fn from_msr(value: u64) -> Self {
        let supported = value & (1 << 32) != 0;
        Self {
            individual_address: supported && value & (1 << 40) != 0,
            single_context: supported && value & (1 << 41) != 0,
            all_contexts: supported && value & (1 << 42) != 0,
        }
    }
}

/// A control that Umbra cannot do without and this processor does not offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MissingControl {
    /// The group the control belongs to.
    pub group: Group,
    /// The capability MSR that says so.
    pub msr: u32,
    /// The MSR's SDM name.
    pub msr_name: &'static str,
    /// The control's bit in its field, 0..=31; its "may be 1" bit in the MSR is 32 higher.
    pub bit: u8,
    /// The control's SDM name.
    pub name: &'static str,
    /// What in Umbra needs it.
    pub needed_by: &'static str,
}

impl fmt::Display for MissingControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "this processor's VMX lacks the {} control \"{}\" ({} (MSR {:#x}) has bit {} clear), needed for {}. \
             If Umbra runs inside another hypervisor, enable full nested VMX there; else use another processor",
            self.group,
            self.name,
            self.msr_name,
            self.msr,
            u32::from(self.bit) + 32,
            self.needed_by,
        )
    }
}

/// The value for one group of controls: all of `required`, what is possible of `optional`, and what the
/// processor insists on.
///
/// # Errors
/// The lowest required bit that may not be 1.
pub fn adjust(
    group: Group,
    required: u32,
    optional: u32,
    capabilities: &Capabilities,
) -> Result<u32, MissingControl> {
    let allowed = capabilities.allowed(group);
    let missing = required & !allowed.may_be_one;
    if missing != 0 {
        let bit = missing.trailing_zeros() as u8;
        let (msr, msr_name) = group.msr(capabilities.true_controls);
        let (name, needed_by) = group.describe(bit);
        return Err(MissingControl { group, msr, msr_name, bit, name, needed_by });
    }
    Ok(required | (optional & allowed.may_be_one) | allowed.must_be_one)
}

#[cfg(test)]
mod tests {
    use super::super::msr::tables::{broadwell, penryn};
    use super::*;

    #[test]
    fn penryn_has_no_true_controls_and_no_ept_vpid_msr() {
        let capabilities = Capabilities::read(&penryn());
        assert!(!capabilities.true_controls);
        assert_eq!(capabilities.revision, 0xd);
        assert_eq!(capabilities.region_bytes, 0x800);
        assert_eq!(capabilities.invvpid, InvvpidTypes::default());
    }

    #[test]
    fn broadwell_reads_the_true_msrs() {
        let capabilities = Capabilities::read(&broadwell());
        assert!(capabilities.true_controls);
        assert_eq!(capabilities.region_bytes, 0x400);
        assert!(capabilities.invvpid.individual_address);
        assert!(capabilities.invvpid.all_contexts);
        assert_eq!(capabilities.misc.preemption_timer_shift(), 5);
    }

    #[test]
    fn a_processor_without_secondary_controls_is_not_asked_for_them() {
        // Table::read panics on an MSR that is not there.
        let mut table = penryn().with(msr::VMX_PROCBASED_CTLS, 0x77f9_fffe_0401_e172);
        table.0.retain(|entry| entry.0 != msr::VMX_PROCBASED_CTLS2);
        assert_eq!(Capabilities::read(&table).secondary, Allowed::default());
    }

    #[test]
    fn adjust_takes_required_possible_optional_and_forced_bits() {
        let mut capabilities = Capabilities::read(&broadwell());
        capabilities.pin = Allowed { must_be_one: 0b0001, may_be_one: 0b0111 };
        assert_eq!(adjust(Group::Pin, 0b0010, 0b1100, &capabilities), Ok(0b0111));
        assert_eq!(adjust(Group::Pin, 0, 0, &capabilities), Ok(0b0001));
    }

    #[test]
    fn a_missing_control_is_named_with_msr_bit_purpose_and_remedy() {
        let mut capabilities = Capabilities::read(&penryn());
        let hlt = PrimaryControls::HLT_EXITING.bits();
        capabilities.primary.may_be_one &= !hlt;
        let missing = adjust(Group::Primary, hlt, 0, &capabilities).unwrap_err();
        assert_eq!((missing.msr, missing.bit, missing.name), (0x482, 7, "HLT exiting"));
        let text = std::format!("{missing}");
        for part in ["HLT exiting", "IA32_VMX_PROCBASED_CTLS", "0x482", "bit 39", "idle", "nested VMX"] {
            assert!(text.contains(part), "{part:?} is not in {text:?}");
        }
        capabilities.true_controls = true;
        let missing = adjust(Group::Primary, hlt, 0, &capabilities).unwrap_err();
        assert_eq!(missing.msr_name, "IA32_VMX_TRUE_PROCBASED_CTLS");
    }

    #[test]
    fn fixed_bits_force_and_forbid() {
        let fixed = FixedBits { must_be_one: 0x21, may_be_one: 0xff };
        assert_eq!(fixed.apply(0x100), 0x21);
        assert_eq!(fixed.apply(0x42), 0x63);
    }
}
