//! From a plain core to VMX root operation, or a refusal that a person can act on.

use core::fmt;

use memory::Hpa;
use x86_64::registers::control::{Cr0, Cr0Flags, Cr4, Cr4Flags};
use x86_64::registers::model_specific::Msr;

use super::capability::{Capabilities, FixedBits, MissingControl};
use super::controls::Controls;
use super::mitigation::Mitigations;
use super::msr::{self, MsrRead, Processor};
use super::vmcs::{self, VmxError};

/// FEATURE_CONTROL: the MSR cannot be changed until reset.
const LOCK: u64 = 1 << 0;
/// FEATURE_CONTROL: VMXON is allowed outside SMX (with the lock set).
const VMX_OUTSIDE_SMX: u64 = 1 << 2;

/// CR0 bit 29, not write-through.
const CR0_NW: u64 = 1 << 29;
/// CR0 bit 30, cache disable.
const CR0_CD: u64 = 1 << 30;
/// CR4 bit 13, VMX enable.
const CR4_VMXE: u64 = 1 << 13;

/// What CPUID says that matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// CPUID.1:ECX\[5\].
    pub vmx: bool,
    /// CPUID.1:ECX\[31\]: we run inside another hypervisor.
    pub hypervisor: bool,
    /// The vendor string is "AuthenticAMD" or "HygonGenuine".
    pub amd: bool,
    /// CPUID.7.0:EDX: the defences against speculation; 0 where there is no such leaf.
    pub leaf_7_edx: u32,
}

impl Identity {
    /// Of the processor this code runs on.
    #[must_use]
    pub fn of_processor() -> Self {
        let cpuid = raw_cpuid::CpuId::new();
        let features = cpuid.get_feature_info();
        let vendor = cpuid.get_vendor_info();
        let leaves = raw_cpuid::native_cpuid::cpuid_count(0, 0).eax;
        let leaf_7_edx = if leaves >= 7 { raw_cpuid::native_cpuid::cpuid_count(7, 0).edx } else { 0 };
        Self {
            leaf_7_edx,
            vmx: features.as_ref().is_some_and(raw_cpuid::FeatureInfo::has_vmx),
            hypervisor: features.as_ref().is_some_and(raw_cpuid::FeatureInfo::has_hypervisor),
            amd: vendor.is_some_and(|v| matches!(v.as_str(), "AuthenticAMD" | "HygonGenuine")),
        }
    }
}

/// Why this machine cannot run Umbra. Its `Display` names the cause and the remedy in one line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// CPUID offers no VMX.
    NoVmx(Identity),
    /// IA32_FEATURE_CONTROL is locked with VMX off; its value.
    LockedOff(u64),
    /// A required control is missing.
    MissingControl(MissingControl),
    /// VMXON failed although everything was in order.
    VmxonFailed(VmxError),
}

impl From<MissingControl> for Refusal {
    fn from(missing: MissingControl) -> Self {
        Self::MissingControl(missing)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoVmx(Identity { amd: true, .. }) => f.write_str(
                "this processor has no VMX (CPUID.1:ECX bit 5 is clear): it is an AMD one, and Umbra needs Intel \
                 VT-x. Use an Intel machine, or `cargo xtask run --backend bochs`",
            ),
            Self::NoVmx(Identity { hypervisor: true, .. }) => f.write_str(
                "this processor has no VMX (CPUID.1:ECX bit 5 is clear), and another hypervisor or emulator is \
                 beneath us (bit 31 is set). QEMU without KVM never has VMX: use KVM with nested VMX (kvm_intel \
                 nested=1, -cpu host), enable nested virtualization in the hypervisor, or use `cargo xtask run \
                 --backend bochs`",
            ),
            Self::NoVmx(_) => f.write_str(
                "this processor has no VMX (CPUID.1:ECX bit 5 is clear). Umbra needs Intel VT-x: look for \
                 \"Intel Virtualization Technology\" in the firmware setup, run on a processor that has it, under \
                 nested VMX, or use `cargo xtask run --backend bochs`",
            ),
            Self::LockedOff(value) => write!(
                f,
                "VMX is disabled and locked by the firmware (IA32_FEATURE_CONTROL, MSR 0x3a, is {value:#x}: lock bit \
                 0 is set, VMX bit 2 is clear). Enable \"Intel Virtualization Technology\" (VT-x, VMX) in the \
                 firmware setup and switch the machine off and on again",
            ),
            Self::MissingControl(missing) => missing.fmt(f),
            Self::VmxonFailed(error) => write!(
                f,
                "VMXON failed although the processor offers VMX and the firmware allows it ({error}). If Umbra runs \
                 inside another hypervisor, its nested VMX is incomplete: update it; else this is a bug in Umbra, \
                 please report it",
            ),
        }
    }
}

/// What a core's IA32_FEATURE_CONTROL needs before VMXON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureControl {
    /// Nothing: it is locked with VMX on.
    Ready,
    /// The firmware left it open: write this value, which enables and locks.
    Write(u64),
}

/// Decides from IA32_FEATURE_CONTROL (SDM Vol. 3, Section 24.7 "Enabling and Entering VMX Operation").
///
/// # Errors
/// [`Refusal::LockedOff`].
pub const fn feature_control(value: u64) -> Result<FeatureControl, Refusal> {
    match (value & LOCK != 0, value & VMX_OUTSIDE_SMX != 0) {
        (true, true) => Ok(FeatureControl::Ready),
        (true, false) => Err(Refusal::LockedOff(value)),
        (false, _) => Ok(FeatureControl::Write(value | LOCK | VMX_OUTSIDE_SMX)),
    }
}

/// CR0 for VMX operation: the fixed bits, and the caches on (CD and NW clear), whatever the firmware left.
#[must_use]
pub const fn host_cr0(value: u64, fixed: FixedBits) -> u64 {
    fixed.apply(value & !(CR0_CD | CR0_NW))
}

/// CR4 for VMX operation: the fixed bits and VMXE.
#[must_use]
pub const fn host_cr4(value: u64, fixed: FixedBits) -> u64 {
    fixed.apply(value | CR4_VMXE)
}

/// What [`examine`] found: all that other code needs to know of the processor's VMX.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vmx {
    /// What the processor can do.
    pub capabilities: Capabilities,
    /// What we use of it.
    pub controls: Controls,
    /// What is done against speculation across the boundary.
    pub mitigations: Mitigations,
}

/// CPUID.7.0:EDX: IA32_ARCH_CAPABILITIES exists.
const HAS_ARCH_CAPABILITIES: u32 = 1 << 29;

/// Decides whether a processor can run Umbra. Pure: `identity` and `msrs` may be a test's.
///
/// # Errors
/// The first reason why not.
pub fn decide(identity: Identity, msrs: &impl MsrRead) -> Result<Vmx, Refusal> {
    if !identity.vmx {
        return Err(Refusal::NoVmx(identity));
    }
    feature_control(msrs.read(msr::FEATURE_CONTROL))?;
    let capabilities = Capabilities::read(msrs);
    let controls = Controls::choose(&capabilities)?;
    let has_arch_capabilities = identity.leaf_7_edx & HAS_ARCH_CAPABILITIES != 0;
    let arch_capabilities = if has_arch_capabilities { msrs.read(msr::ARCH_CAPABILITIES) } else { 0 };
    let mitigations = Mitigations::choose(identity.leaf_7_edx, arch_capabilities);
    Ok(Vmx { capabilities, controls, mitigations })
}

/// [`decide`] for the processor this code runs on. Changes nothing. Call it once, on the boot core, before any
/// other core is started.
///
/// # Errors
/// The first reason why this machine cannot run Umbra.
pub fn examine() -> Result<Vmx, Refusal> {
    decide(Identity::of_processor(), &Processor)
}

/// Takes this core into VMX root operation.
///
/// # Errors
/// This core's FEATURE_CONTROL is locked off (firmware that set up one core only), or VMXON fails.
///
/// # Safety
/// [`examine`] succeeded on this machine; the core is not yet in VMX operation; `region` is the address of a page
/// made by [`vmcs::Region::prepare`] with these capabilities' revision, which nothing else uses from now on.
pub unsafe fn enable(capabilities: &Capabilities, region: Hpa) -> Result<(), Refusal> {
    match feature_control(Processor.read(msr::FEATURE_CONTROL))? {
        FeatureControl::Ready => {}
        FeatureControl::Write(value) => {
            let mut register = Msr::new(msr::FEATURE_CONTROL);
            // SAFETY: the MSR exists (VMX does) and is not locked; setting these bits has no other effect.
            unsafe { register.write(value) };
        }
    }
    let cr0 = host_cr0(Cr0::read_raw(), capabilities.cr0);
    // SAFETY: paging, protection and write protection stay as they are; the added bits are those VMX demands.
    unsafe { Cr0::write_raw(cr0) };
    let cr4 = host_cr4(Cr4::read_raw(), capabilities.cr4);
    // SAFETY: VMXE is added, and what VMX demands; the paging bits in use are allowed by FIXED1.
    unsafe { Cr4::write_raw(cr4) };
    debug_assert!(Cr0::read().contains(Cr0Flags::PAGING | Cr0Flags::NUMERIC_ERROR));
    debug_assert!(Cr4::read().contains(Cr4Flags::VIRTUAL_MACHINE_EXTENSIONS));
    // SAFETY: the caller's promise about `region`; the registers were set up above.
    unsafe { vmcs::vmxon(region) }.map_err(Refusal::VmxonFailed)
}

#[cfg(test)]
mod tests {
    use super::super::msr::tables::{broadwell, penryn, skylake};
    use super::*;

    const INTEL: Identity = Identity { vmx: true, hypervisor: false, amd: false, leaf_7_edx: 0 };

    fn refusal(identity: Identity) -> std::string::String {
        // No MSR may be read: they do not exist without VMX.
        let none = msr::tables::Table(std::vec![]);
        std::format!("{}", decide(identity, &none).unwrap_err())
    }

    #[test]
    fn every_known_processor_is_taken() {
        for table in [penryn(), broadwell(), skylake()] {
            assert!(decide(INTEL, &table.with(msr::FEATURE_CONTROL, 5)).is_ok());
        }
    }

    #[test]
    fn arch_capabilities_are_read_only_where_they_exist() {
        let table = broadwell().with(msr::FEATURE_CONTROL, 5);
        assert!(!decide(INTEL, &table).unwrap().mitigations.speculation_control);
        let table = table.with(msr::ARCH_CAPABILITIES, 1 << 1);
        let identity = Identity { leaf_7_edx: 1 << 26 | HAS_ARCH_CAPABILITIES, ..INTEL };
        let mitigations = decide(identity, &table).unwrap().mitigations;
        assert!(mitigations.speculation_control && !mitigations.restrict_on_exit);
    }

    #[test]
    fn without_vmx_the_message_names_cause_and_remedy_and_no_msr_is_read() {
        let bare = Identity { vmx: false, ..INTEL };
        for text in [
            refusal(bare),
            refusal(Identity { hypervisor: true, ..bare }),
            refusal(Identity { amd: true, hypervisor: true, ..bare }),
        ] {
            assert!(text.contains("no VMX"), "{text}");
            assert!(text.contains("--backend bochs"), "{text}");
            assert!(!text.contains('\n'), "{text}");
        }
        assert!(refusal(Identity { hypervisor: true, ..bare }).contains("nested"));
        assert!(refusal(Identity { amd: true, ..bare }).contains("AMD"));
        assert!(refusal(bare).contains("firmware"));
    }

    #[test]
    fn feature_control_by_lock_and_enable() {
        assert_eq!(feature_control(5), Ok(FeatureControl::Ready));
        assert_eq!(feature_control(0xff07), Ok(FeatureControl::Ready));
        assert_eq!(feature_control(0), Ok(FeatureControl::Write(5)));
        assert_eq!(feature_control(4), Ok(FeatureControl::Write(5)));
        assert_eq!(feature_control(1), Err(Refusal::LockedOff(1)));
        // Only inside SMX is as good as not at all.
        assert_eq!(feature_control(3), Err(Refusal::LockedOff(3)));
    }

    #[test]
    fn locked_off_names_the_msr_and_the_firmware_setting() {
        let refused = decide(INTEL, &broadwell().with(msr::FEATURE_CONTROL, 1)).unwrap_err();
        let text = std::format!("{refused}");
        for part in ["0x3a", "IA32_FEATURE_CONTROL", "firmware", "VT-x", "is 0x1"] {
            assert!(text.contains(part), "{part:?} is not in {text:?}");
        }
    }

    #[test]
    fn a_missing_control_is_a_refusal() {
        let table = broadwell()
            .with(msr::FEATURE_CONTROL, 5)
            .with(msr::VMX_TRUE_PINBASED_CTLS, 0x0000_0077_0000_0016);
        let Refusal::MissingControl(missing) = decide(INTEL, &table).unwrap_err() else { panic!() };
        assert_eq!((missing.msr, missing.bit, missing.name), (0x48d, 3, "NMI exiting"));
    }

    #[test]
    fn the_caches_are_switched_on() {
        let fixed = FixedBits { must_be_one: 0x8000_0021, may_be_one: 0xffff_ffff };
        assert_eq!(host_cr0(0xe000_0011, fixed), 0x8000_0031);
    }

    #[test]
    fn cr4_keeps_what_is_allowed_and_gains_vmxe() {
        let fixed = FixedBits { must_be_one: 0x2000, may_be_one: 0x27ff };
        assert_eq!(host_cr4(0x4_0620, fixed), 0x2620);
    }
}
