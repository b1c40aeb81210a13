//! The state of one processor that is the same on all of them: control registers, EFER, PAT.

use raw_cpuid::CpuId;
use x86_64::registers::control::{Cr0, Cr0Flags, Cr4, Cr4Flags, Efer, EferFlags};
use x86_64::registers::model_specific::Msr;

/// IA32_PAT as the hypervisor keeps it, guests running or not: write-back, write-combining, UC-, uncached in
/// entries 0 to 3 (as [`super::paging::Cache`] selects them), and what Linux has in the others.
pub const PAT: u64 = 0x0407_0500_0007_0106;

const IA32_PAT: u32 = 0x277;

/// CR0 as every core runs: paging and write protection on, caches on, FPU usable without traps.
#[must_use]
pub const fn wanted_cr0(old: u64) -> u64 {
    let set = Cr0Flags::PROTECTED_MODE_ENABLE.bits()
        | Cr0Flags::MONITOR_COPROCESSOR.bits()
        | Cr0Flags::EXTENSION_TYPE.bits()
        | Cr0Flags::NUMERIC_ERROR.bits()
        | Cr0Flags::WRITE_PROTECT.bits()
        | Cr0Flags::PAGING.bits();
    // CD and NW are set after INIT, and under some firmware on the boot core too.
    let clear = Cr0Flags::CACHE_DISABLE.bits()
        | Cr0Flags::NOT_WRITE_THROUGH.bits()
        | Cr0Flags::TASK_SWITCHED.bits()
        | Cr0Flags::EMULATE_COPROCESSOR.bits()
        | Cr0Flags::ALIGNMENT_MASK.bits();
    (old | set) & !clear
}

/// CR4 as every core runs. `xsave` and `smep`: the processor has them.
#[must_use]
pub const fn wanted_cr4(xsave: bool, smep: bool) -> u64 {
    let mut value = Cr4Flags::PHYSICAL_ADDRESS_EXTENSION.bits()
        | Cr4Flags::MACHINE_CHECK_EXCEPTION.bits()
        | Cr4Flags::OSFXSR.bits()
        | Cr4Flags::OSXMMEXCPT_ENABLE.bits();
    if xsave {
        value |= Cr4Flags::OSXSAVE.bits();
    }
    if smep {
        value |= Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION.bits();
    }
    value
}

/// Sets EFER.NXE, CR0, CR4 and the PAT of this core. What is mapped does not change by it.
pub fn set_up() {
    let cpuid = CpuId::new();
    let xsave = cpuid.get_feature_info().is_some_and(|info| info.has_xsave());
    let smep = cpuid.get_extended_feature_info().is_some_and(|info| info.has_smep());
    // SAFETY: long mode stays on; NXE is there on every processor that has VMX and long mode.
    unsafe { Efer::update(|efer| efer.insert(EferFlags::NO_EXECUTE_ENABLE)) };
    // SAFETY: paging and protection stay on.
    unsafe { Cr0::write_raw(wanted_cr0(Cr0::read_raw())) };
    // SAFETY: PAE stays on; PCIDE and LA57 were off under the bootloader's 4-level tables.
    unsafe { Cr4::write_raw(wanted_cr4(xsave, smep)) };
    // SAFETY: entry 0, the only one that our RAM uses, is write-back before and after.
    unsafe { Msr::new(IA32_PAT).write(PAT) };
    if xsave {
        // SAFETY: x87 and SSE state are always allowed.
        unsafe { core::arch::asm!("xsetbv", in("ecx") 0, in("eax") 3, in("edx") 0, options(nostack)) };
    }
}

/// The processor's name as it gives it, and its family, model and stepping.
pub fn describe(out: &mut dyn core::fmt::Write) -> core::fmt::Result {
    let cpuid = CpuId::new();
    match cpuid.get_processor_brand_string() {
        Some(brand) => out.write_str(brand.as_str().trim())?,
        None => out.write_str("a processor without a name")?,
    }
    if let Some(info) = cpuid.get_feature_info() {
        write!(
            out,
            " (family {:#x}, model {:#x}, stepping {})",
            info.family_id(),
            info.model_id(),
            info.stepping_id()
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_caches_are_on_after_init() {
        // CR0 after INIT (SDM Vol. 3, "Processor State After Reset").
        let cr0 = wanted_cr0(0x6000_0010);
        assert_eq!(cr0, 0x8001_0033);
    }

    #[test]
    fn cr4_never_has_what_the_processor_lacks() {
        assert_eq!(wanted_cr4(false, false), 0x660);
        assert_eq!(wanted_cr4(true, true), 0x660 | 1 << 18 | 1 << 20);
    }
}
