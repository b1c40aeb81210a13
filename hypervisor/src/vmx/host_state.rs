//! The host-state area: what this core is again after every exit.

use x86_64::instructions::tables::{sgdt, sidt};
use x86_64::registers::control::{Cr0, Cr3, Cr4};
use x86_64::registers::segmentation::{CS, SS, Segment};

use super::controls::{Controls, Feature};
use super::entry;
use super::fields;
use super::msr::{self, MsrRead, Processor};
use super::vmcs::CurrentVmcs;

/// The host state of one core. DS, ES, FS and GS become null selectors at an exit, which 64-bit mode does not mind;
/// the bases of FS and GS are loaded apart. RSP is written by the entry itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostState {
    /// CR0, as VMX demands it.
    pub cr0: u64,
    /// CR3: the hypervisor's own page tables.
    pub cr3: u64,
    /// CR4, with VMXE.
    pub cr4: u64,
    /// IA32_EFER; written only where VM exits load it.
    pub efer: u64,
    /// CS selector; not null, RPL 0, in the GDT.
    pub cs: u16,
    /// SS selector; RPL 0, in the GDT.
    pub ss: u16,
    /// TR selector; not null: a VM entry needs a host task register.
    pub tr: u16,
    /// FS base.
    pub fs_base: u64,
    /// GS base: the per-core block.
    pub gs_base: u64,
    /// TSS base.
    pub tr_base: u64,
    /// GDT base. Its limit becomes FFFFh at every exit.
    pub gdtr_base: u64,
    /// IDT base. Its limit becomes FFFFh at every exit.
    pub idtr_base: u64,
    /// IA32_SYSENTER_CS.
    pub sysenter_cs: u32,
    /// IA32_SYSENTER_ESP.
    pub sysenter_esp: u64,
    /// IA32_SYSENTER_EIP.
    pub sysenter_eip: u64,
}

impl HostState {
    /// Reads the state of this core. The SYSENTER MSRs become 0: the hypervisor has no use for them, and what they
    /// hold may be the guest's.
    ///
    /// # Panics
    /// The task register is null: the host's tables are not loaded yet.
    ///
    /// # Safety
    /// The task register was loaded from the GDT that is now loaded, and that GDT is readable.
    #[must_use]
    pub unsafe fn of_this_core() -> Self {
        let gdtr = sgdt();
        // SAFETY: STR at CPL 0 only reads the selector.
        let tr = unsafe { x86::task::tr() }.bits();
        assert!(tr & !7 != 0, "VM entry needs a host TSS: load TR before the host state is read");
        let descriptor = (gdtr.base.as_u64() + u64::from(tr & !7)) as *const [u64; 2];
        // SAFETY: the caller says that TR's descriptor lies in this GDT; a 64-bit TSS descriptor has 16 bytes.
        let descriptor = unsafe { descriptor.read_unaligned() };
        let (root, flags) = Cr3::read_raw();
        Self {
            cr0: Cr0::read_raw(),
            cr3: root.start_address().as_u64() | u64::from(flags),
            cr4: Cr4::read_raw(),
            efer: Processor.read(msr::EFER),
            cs: CS::get_reg().0 & !7,
            ss: SS::get_reg().0 & !7,
            tr: tr & !7,
            fs_base: Processor.read(msr::FS_BASE),
            gs_base: Processor.read(msr::GS_BASE),
            tr_base: tss_base(descriptor),
            gdtr_base: gdtr.base.as_u64(),
            idtr_base: sidt().base.as_u64(),
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
        }
    }

    /// Writes the state into the current VMCS. To be done again when the vCPU changes its core.
    pub fn write(&self, vmcs: &CurrentVmcs, controls: &Controls) {
        vmcs.write(fields::HOST_CR0, self.cr0);
        vmcs.write(fields::HOST_CR3, self.cr3);
        vmcs.write(fields::HOST_CR4, self.cr4);
        if controls.has(Feature::EferSwitch) {
            vmcs.write(fields::HOST_EFER, self.efer);
        }
        vmcs.write(fields::HOST_CS_SELECTOR, self.cs);
        vmcs.write(fields::HOST_SS_SELECTOR, self.ss);
        vmcs.write(fields::HOST_DS_SELECTOR, 0);
        vmcs.write(fields::HOST_ES_SELECTOR, 0);
        vmcs.write(fields::HOST_FS_SELECTOR, 0);
        vmcs.write(fields::HOST_GS_SELECTOR, 0);
        vmcs.write(fields::HOST_TR_SELECTOR, self.tr);
        vmcs.write(fields::HOST_FS_BASE, self.fs_base);
        vmcs.write(fields::HOST_GS_BASE, self.gs_base);
        vmcs.write(fields::HOST_TR_BASE, self.tr_base);
        vmcs.write(fields::HOST_GDTR_BASE, self.gdtr_base);
        vmcs.write(fields::HOST_IDTR_BASE, self.idtr_base);
        vmcs.write(fields::HOST_SYSENTER_CS, self.sysenter_cs);
        vmcs.write(fields::HOST_SYSENTER_ESP, self.sysenter_esp);
        vmcs.write(fields::HOST_SYSENTER_EIP, self.sysenter_eip);
        vmcs.write(fields::HOST_RIP, entry::exit_address());
    }
}

/// The base in a 64-bit TSS descriptor (SDM Vol. 3, Section 8.2.3 "TSS Descriptor in 64-bit mode").
const fn tss_base(descriptor: [u64; 2]) -> u64 {
    (descriptor[0] >> 16) & 0xff_ffff | (descriptor[0] >> 56) << 24 | descriptor[1] << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tss_base_is_put_together() {
        let base: u64 = 0xffff_8123_4567_89ab;
        let low = 0x67 | (base & 0xff_ffff) << 16 | 0x8b << 40 | (base >> 24 & 0xff) << 56;
        assert_eq!(tss_base([low, base >> 32]), base);
    }
}
