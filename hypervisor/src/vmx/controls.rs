//! The VM-execution, VM-exit and VM-entry controls: those we want, as constants, and those we got.
//!
//! Left out on purpose: EPT and unrestricted guest (this is a shadow-paging hypervisor), saving EFER at exit
//! (every guest write of it exits, so hardware never holds a value we did not put there), saving the preemption
//! timer (see [`super::preemption`]), and loading or saving PAT (the hardware PAT is never the guest's).

use core::fmt;

use super::capability::{Capabilities, MissingControl, adjust};
use super::fields;
use super::msr;
use super::vmcs::CurrentVmcs;

/// The five control fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// Pin-based VM-execution controls.
    Pin,
    /// Primary processor-based VM-execution controls.
    Primary,
    /// Secondary processor-based VM-execution controls.
    Secondary,
    /// VM-exit controls.
    Exit,
    /// VM-entry controls.
    Entry,
}

impl Group {
    /// The capability MSR and its SDM name; `true_controls`: the processor has the TRUE variants.
    #[must_use]
    pub const fn msr(self, true_controls: bool) -> (u32, &'static str) {
        match (self, true_controls) {
            (Self::Pin, false) => (msr::VMX_PINBASED_CTLS, "IA32_VMX_PINBASED_CTLS"),
            (Self::Pin, true) => (msr::VMX_TRUE_PINBASED_CTLS, "IA32_VMX_TRUE_PINBASED_CTLS"),
            (Self::Primary, false) => (msr::VMX_PROCBASED_CTLS, "IA32_VMX_PROCBASED_CTLS"),
            (Self::Primary, true) => (msr::VMX_TRUE_PROCBASED_CTLS, "IA32_VMX_TRUE_PROCBASED_CTLS"),
            (Self::Secondary, _) => (msr::VMX_PROCBASED_CTLS2, "IA32_VMX_PROCBASED_CTLS2"),
            (Self::Exit, false) => (msr::VMX_EXIT_CTLS, "IA32_VMX_EXIT_CTLS"),
            (Self::Exit, true) => (msr::VMX_TRUE_EXIT_CTLS, "IA32_VMX_TRUE_EXIT_CTLS"),
            (Self::Entry, false) => (msr::VMX_ENTRY_CTLS, "IA32_VMX_ENTRY_CTLS"),
            (Self::Entry, true) => (msr::VMX_TRUE_ENTRY_CTLS, "IA32_VMX_TRUE_ENTRY_CTLS"),
        }
    }

    /// The SDM name of the control at `bit`, and what Umbra needs it for.
    #[must_use]
    pub fn describe(self, bit: u8) -> (&'static str, &'static str) {
        let table = match self {
            Self::Pin => PinControls::TABLE,
            Self::Primary => PrimaryControls::TABLE,
            Self::Secondary => SecondaryControls::TABLE,
            Self::Exit => ExitControls::TABLE,
            Self::Entry => EntryControls::TABLE,
        };
        table
            .iter()
            .find(|entry| entry.0 == bit)
            .map_or(("(unnamed)", "nothing Umbra knows of"), |entry| (entry.1, entry.2))
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pin => "pin-based",
            Self::Primary => "primary processor-based",
            Self::Secondary => "secondary processor-based",
            Self::Exit => "VM-exit",
            Self::Entry => "VM-entry",
        })
    }
}

macro_rules! controls {
    ($(#[$doc:meta])* $name:ident { $($flag:ident = $bit:literal, $sdm:literal, $purpose:literal;)* }) => {
        bitflags::bitflags! {
            $(#[$doc])*
            #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
            pub struct $name: u32 {
                $(
                    #[doc = concat!("\"", $sdm, "\": ", $purpose, ".")]
                    const $flag = 1 << $bit;
                )*
                /// Bits the processor insists on and Umbra has no name for.
                const _ = !0;
            }
        }

        impl $name {
            /// Bit, SDM name, what needs it.
            const TABLE: &'static [(u8, &'static str, &'static str)] = &[$(($bit, $sdm, $purpose)),*];
        }
    };
}

controls! {
    /// SDM Vol. 3, Section 25.6.1 "Pin-Based VM-Execution Controls".
    PinControls {
        EXTERNAL_INTERRUPT_EXITING = 0, "external-interrupt exiting", "taking our own interrupts while a guest runs";
        NMI_EXITING = 3, "NMI exiting", "kicks and TLB shoot-downs, which are NMIs";
        VIRTUAL_NMIS = 5, "virtual NMIs", "knowing when a guest can take its next NMI";
        PREEMPTION_TIMER = 6, "activate VMX-preemption timer", "ending a vCPU's time slice";
    }
}

controls! {
    /// SDM Vol. 3, Section 25.6.2 "Processor-Based VM-Execution Controls", first table.
    PrimaryControls {
        INTERRUPT_WINDOW_EXITING = 2, "interrupt-window exiting", "delivering a guest's interrupt once it can take it";
        USE_TSC_OFFSETTING = 3, "use TSC offsetting", "giving each guest its own time";
        HLT_EXITING = 7, "HLT exiting", "yielding the core of an idle vCPU";
        INVLPG_EXITING = 9, "INVLPG exiting", "keeping shadow page tables in step with the guest's";
        MWAIT_EXITING = 10, "MWAIT exiting", "keeping a guest from putting the core to sleep";
        RDPMC_EXITING = 11, "RDPMC exiting", "hiding the performance counters";
        CR3_LOAD_EXITING = 15, "CR3-load exiting", "shadow paging: the hardware CR3 is never the guest's";
        CR3_STORE_EXITING = 16, "CR3-store exiting", "shadow paging: the hardware CR3 is never the guest's";
        CR8_LOAD_EXITING = 19, "CR8-load exiting", "the guest's task priority where there is no TPR shadow";
        CR8_STORE_EXITING = 20, "CR8-store exiting", "the guest's task priority where there is no TPR shadow";
        USE_TPR_SHADOW = 21, "use TPR shadow", "CR8 without exits";
        NMI_WINDOW_EXITING = 22, "NMI-window exiting", "delivering a guest's NMI once it can take it";
        MOV_DR_EXITING = 23, "MOV-DR exiting", "switching debug registers only for guests that use them";
        UNCONDITIONAL_IO_EXITING = 24, "unconditional I/O exiting", "device emulation: no guest owns a port";
        USE_MSR_BITMAPS = 28, "use MSR bitmaps", "guest MSRs that are switched with the vCPU and need no exit";
        MONITOR_EXITING = 29, "MONITOR exiting", "hiding MONITOR and MWAIT";
        ACTIVATE_SECONDARY_CONTROLS = 31, "activate secondary controls", "the secondary controls";
    }
}

controls! {
    /// SDM Vol. 3, Section 25.6.2 "Processor-Based VM-Execution Controls", second table.
    SecondaryControls {
        VIRTUALIZE_APIC_ACCESSES = 0, "virtualize APIC accesses", "local-APIC accesses without a walk and a decode";
        ENABLE_EPT = 1, "enable EPT", "nothing: Umbra shadows";
        ENABLE_RDTSCP = 3, "enable RDTSCP", "offering RDTSCP to guests";
        ENABLE_VPID = 5, "enable VPID", "keeping TLB entries across exits";
        WBINVD_EXITING = 6, "WBINVD exiting", "keeping a guest from emptying everybody's caches";
        UNRESTRICTED_GUEST = 7, "unrestricted guest", "nothing: it needs EPT";
        PAUSE_LOOP_EXITING = 10, "PAUSE-loop exiting", "giving the core to the vCPU that another one spins for";
        ENABLE_INVPCID = 12, "enable INVPCID", "offering INVPCID to guests (it exits, with INVLPG exiting)";
        ENABLE_XSAVES = 20, "enable XSAVES/XRSTORS", "offering XSAVES to guests";
    }
}

controls! {
    /// SDM Vol. 3, Section 25.7.1 "VM-Exit Controls".
    ExitControls {
        SAVE_DEBUG_CONTROLS = 2, "save debug controls", "keeping the guest's DR7 and IA32_DEBUGCTL";
        HOST_ADDRESS_SPACE_SIZE = 9, "host address-space size", "returning to 64-bit mode";
        ACKNOWLEDGE_INTERRUPT = 15, "acknowledge interrupt on exit", "learning the vector without an interrupt gate";
        LOAD_EFER = 21, "load IA32_EFER", "switching EFER by hardware";
    }
}

controls! {
    /// SDM Vol. 3, Section 25.8.1 "VM-Entry Controls".
    EntryControls {
        LOAD_DEBUG_CONTROLS = 2, "load debug controls", "giving the guest its DR7 and IA32_DEBUGCTL";
        IA32E_MODE_GUEST = 9, "IA-32e mode guest", "64-bit guests";
        LOAD_EFER = 15, "load IA32_EFER", "switching EFER by hardware";
    }
}

const PIN_REQUIRED: PinControls = PinControls::EXTERNAL_INTERRUPT_EXITING.union(PinControls::NMI_EXITING);
const PIN_OPTIONAL: PinControls = PinControls::VIRTUAL_NMIS.union(PinControls::PREEMPTION_TIMER);

const PRIMARY_REQUIRED: PrimaryControls = PrimaryControls::USE_TSC_OFFSETTING
    .union(PrimaryControls::HLT_EXITING)
    .union(PrimaryControls::INVLPG_EXITING)
    .union(PrimaryControls::MWAIT_EXITING)
    .union(PrimaryControls::RDPMC_EXITING)
    .union(PrimaryControls::CR3_LOAD_EXITING)
    .union(PrimaryControls::CR3_STORE_EXITING)
    .union(PrimaryControls::MOV_DR_EXITING)
    .union(PrimaryControls::UNCONDITIONAL_IO_EXITING)
    .union(PrimaryControls::MONITOR_EXITING)
    .union(PrimaryControls::INTERRUPT_WINDOW_EXITING);
const PRIMARY_OPTIONAL: PrimaryControls = PrimaryControls::USE_TPR_SHADOW
    .union(PrimaryControls::NMI_WINDOW_EXITING)
    .union(PrimaryControls::USE_MSR_BITMAPS)
    .union(PrimaryControls::ACTIVATE_SECONDARY_CONTROLS);
/// Must be possible, but are switched on only while an event waits.
const PRIMARY_WINDOWS: PrimaryControls =
    PrimaryControls::INTERRUPT_WINDOW_EXITING.union(PrimaryControls::NMI_WINDOW_EXITING);
const PRIMARY_CR8_EXITING: PrimaryControls =
    PrimaryControls::CR8_LOAD_EXITING.union(PrimaryControls::CR8_STORE_EXITING);

const SECONDARY_OPTIONAL: SecondaryControls = SecondaryControls::VIRTUALIZE_APIC_ACCESSES
    .union(SecondaryControls::ENABLE_RDTSCP)
    .union(SecondaryControls::ENABLE_VPID)
    .union(SecondaryControls::WBINVD_EXITING)
    .union(SecondaryControls::PAUSE_LOOP_EXITING)
    .union(SecondaryControls::ENABLE_INVPCID)
    .union(SecondaryControls::ENABLE_XSAVES);

const EXIT_REQUIRED: ExitControls = ExitControls::SAVE_DEBUG_CONTROLS
    .union(ExitControls::HOST_ADDRESS_SPACE_SIZE)
    .union(ExitControls::ACKNOWLEDGE_INTERRUPT);
const EXIT_OPTIONAL: ExitControls = ExitControls::LOAD_EFER;

const ENTRY_REQUIRED: EntryControls =
    EntryControls::LOAD_DEBUG_CONTROLS.union(EntryControls::IA32E_MODE_GUEST);
const ENTRY_OPTIONAL: EntryControls = EntryControls::LOAD_EFER;

/// Exceptions that exit, as a bit per vector: every #PF (the error-code mask and match are 0), #MC, and #AC and
/// #DB, which a guest can otherwise make the processor deliver for ever (CVE-2015-5307, CVE-2015-8104).
/// NMIs exit by a pin-based control.
pub const EXCEPTION_BITMAP: u32 = 1 << 14 | 1 << 18 | 1 << 17 | 1 << 1;

/// PAUSEs that follow each other so closely are of one loop.
const PAUSE_LOOP_GAP_TICKS: u32 = 128;
/// As long as several ordinary exits take: who waits for a processor that runs has seen it come by then.
const PAUSE_LOOP_WINDOW_TICKS: u32 = 8192;

/// What a processor may or may not have, and code elsewhere must know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// Guest NMI blocking is tracked apart from ours, and NMI-window exiting can be used.
    VirtualNmis,
    /// The VMX-preemption timer counts.
    PreemptionTimer,
    /// CR8 reads and writes go to the virtual-APIC page; without it they exit.
    TprShadow,
    /// RDMSR and WRMSR exit by bitmap; without it all exit.
    MsrBitmaps,
    /// EFER is switched by VM entry and exit; without it SCE is switched with the vCPU, and NXE stays on.
    EferSwitch,
    /// The APIC-access page.
    VirtualizeApicAccesses,
    /// RDTSCP works in a guest.
    Rdtscp,
    /// TLB entries are tagged, and INVVPID exists.
    Vpid,
    /// WBINVD exits; without it a guest's WBINVD runs.
    WbinvdExiting,
    /// A loop of PAUSEs exits after a while.
    PauseLoopExiting,
    /// INVPCID works in a guest (and exits).
    Invpcid,
    /// XSAVES and XRSTORS work in a guest.
    Xsaves,
}

/// The chosen values of all control fields for one processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Controls {
    /// Pin-based controls.
    pub pin: PinControls,
    /// Primary processor-based controls, with both window exits off.
    pub primary: PrimaryControls,
    /// Secondary processor-based controls; empty where they are not activated.
    pub secondary: SecondaryControls,
    /// VM-exit controls.
    pub exit: ExitControls,
    /// VM-entry controls without "IA-32e mode guest", which is the vCPU's.
    pub entry: EntryControls,
}

impl Controls {
    /// Adjusts the wanted controls to the processor.
    ///
    /// # Errors
    /// The first required control it does not have.
    pub fn choose(capabilities: &Capabilities) -> Result<Self, MissingControl> {
        let adjust = |group, required, optional| adjust(group, required, optional, capabilities);

        let mut pin =
            PinControls::from_bits_retain(adjust(Group::Pin, PIN_REQUIRED.bits(), PIN_OPTIONAL.bits())?);
        let mut primary = PrimaryControls::from_bits_retain(adjust(
            Group::Primary,
            PRIMARY_REQUIRED.bits(),
            PRIMARY_OPTIONAL.bits(),
        )?);
        // Virtual NMIs are of use only with the window exit that says when the next one can go in.
        if !primary.contains(PrimaryControls::NMI_WINDOW_EXITING) {
            pin.remove(PinControls::VIRTUAL_NMIS);
        }
        if !primary.contains(PrimaryControls::USE_TPR_SHADOW) {
            adjust(Group::Primary, PRIMARY_CR8_EXITING.bits(), 0)?;
            primary.insert(PRIMARY_CR8_EXITING);
        }
        primary.remove(PRIMARY_WINDOWS);

        let secondary = if primary.contains(PrimaryControls::ACTIVATE_SECONDARY_CONTROLS) {
            let mut wanted = SECONDARY_OPTIONAL;
            if !capabilities.invvpid.all_contexts {
                wanted.remove(SecondaryControls::ENABLE_VPID);
            }
            let mut secondary =
                SecondaryControls::from_bits_retain(adjust(Group::Secondary, 0, wanted.bits())?);
            // PCIDs are offered where there are VPIDs; without them INVPCID is to be #UD.
            if !secondary.contains(SecondaryControls::ENABLE_VPID) {
                secondary.remove(SecondaryControls::ENABLE_INVPCID);
            }
            secondary
        } else {
            SecondaryControls::empty()
        };

        let mut exit =
            ExitControls::from_bits_retain(adjust(Group::Exit, EXIT_REQUIRED.bits(), EXIT_OPTIONAL.bits())?);
        let mut entry = EntryControls::from_bits_retain(adjust(
            Group::Entry,
            ENTRY_REQUIRED.bits(),
            ENTRY_OPTIONAL.bits(),
        )?);
        entry.remove(EntryControls::IA32E_MODE_GUEST);
        // One without the other would leak the guest's EFER into the host, or the host's into the guest.
        if !(exit.contains(ExitControls::LOAD_EFER) && entry.contains(EntryControls::LOAD_EFER)) {
            exit.remove(ExitControls::LOAD_EFER);
            entry.remove(EntryControls::LOAD_EFER);
        }
        Ok(Self { pin, primary, secondary, exit, entry })
    }

    /// Whether `feature` is there and switched on.
    #[must_use]
    pub const fn has(&self, feature: Feature) -> bool {
        match feature {
            Feature::VirtualNmis => self.pin.contains(PinControls::VIRTUAL_NMIS),
            Feature::PreemptionTimer => self.pin.contains(PinControls::PREEMPTION_TIMER),
            Feature::TprShadow => self.primary.contains(PrimaryControls::USE_TPR_SHADOW),
            Feature::MsrBitmaps => self.primary.contains(PrimaryControls::USE_MSR_BITMAPS),
            Feature::EferSwitch => self.entry.contains(EntryControls::LOAD_EFER),
            Feature::VirtualizeApicAccesses => {
                self.secondary.contains(SecondaryControls::VIRTUALIZE_APIC_ACCESSES)
            }
            Feature::Rdtscp => self.secondary.contains(SecondaryControls::ENABLE_RDTSCP),
            Feature::Vpid => self.secondary.contains(SecondaryControls::ENABLE_VPID),
            Feature::WbinvdExiting => self.secondary.contains(SecondaryControls::WBINVD_EXITING),
            Feature::PauseLoopExiting => self.secondary.contains(SecondaryControls::PAUSE_LOOP_EXITING),
            Feature::Invpcid => self.secondary.contains(SecondaryControls::ENABLE_INVPCID),
            Feature::Xsaves => self.secondary.contains(SecondaryControls::ENABLE_XSAVES),
        }
    }

    /// The VM-entry controls for a vCPU that is (or is not) in long mode (EFER.LMA).
    #[must_use]
    pub const fn entry_for(&self, long_mode: bool) -> u32 {
        if long_mode { self.entry.bits() | EntryControls::IA32E_MODE_GUEST.bits() } else { self.entry.bits() }
    }

    /// Writes all control fields, the exception bitmap included, into the current VMCS, and zeroes those that
    /// select nothing (page-fault masks, CR3 targets, MSR lists, event injection). The addresses of the pages
    /// that features need (MSR bitmap, virtual-APIC, APIC-access), the VPID and the XSS-exiting bitmap are the
    /// caller's.
    pub fn write(&self, vmcs: &CurrentVmcs, long_mode: bool) {
        vmcs.write(fields::PIN_CONTROLS, self.pin.bits());
        vmcs.write(fields::PRIMARY_CONTROLS, self.primary.bits());
        if self.primary.contains(PrimaryControls::ACTIVATE_SECONDARY_CONTROLS) {
            vmcs.write(fields::SECONDARY_CONTROLS, self.secondary.bits());
        }
        vmcs.write(fields::EXIT_CONTROLS, self.exit.bits());
        vmcs.write(fields::ENTRY_CONTROLS, self.entry_for(long_mode));
        vmcs.write(fields::EXCEPTION_BITMAP, EXCEPTION_BITMAP);
        vmcs.write(fields::PAGE_FAULT_ERROR_CODE_MASK, 0);
        vmcs.write(fields::PAGE_FAULT_ERROR_CODE_MATCH, 0);
        vmcs.write(fields::CR3_TARGET_COUNT, 0);
        vmcs.write(fields::EXIT_MSR_STORE_COUNT, 0);
        vmcs.write(fields::EXIT_MSR_LOAD_COUNT, 0);
        vmcs.write(fields::ENTRY_MSR_LOAD_COUNT, 0);
        vmcs.write(fields::ENTRY_INTERRUPTION_INFO, 0);
        vmcs.write(fields::TSC_OFFSET, 0);
        if self.has(Feature::TprShadow) {
            vmcs.write(fields::TPR_THRESHOLD, 0);
        }
        if self.has(Feature::PauseLoopExiting) {
            vmcs.write(fields::PAUSE_LOOP_GAP, PAUSE_LOOP_GAP_TICKS);
            vmcs.write(fields::PAUSE_LOOP_WINDOW, PAUSE_LOOP_WINDOW_TICKS);
        }
        if self.has(Feature::Xsaves) {
            // Every XSS bit a guest could save exits; none is offered at first.
            vmcs.write(fields::XSS_EXITING_BITMAP, !0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::msr::tables::{Table, broadwell, penryn, skylake};
    use super::*;

    fn choose(table: &Table) -> Result<Controls, MissingControl> {
        Controls::choose(&Capabilities::read(table))
    }

    #[test]
    fn penryn_launches_without_the_later_features() {
        let controls = choose(&penryn()).unwrap();
        for absent in [
            Feature::PreemptionTimer,
            Feature::EferSwitch,
            Feature::Vpid,
            Feature::Rdtscp,
            Feature::PauseLoopExiting,
            Feature::Invpcid,
            Feature::Xsaves,
        ] {
            assert!(!controls.has(absent), "{absent:?}");
        }
        for present in [Feature::TprShadow, Feature::MsrBitmaps, Feature::VirtualizeApicAccesses] {
            assert!(controls.has(present), "{present:?}");
        }
        assert!(controls.exit.contains(ExitControls::HOST_ADDRESS_SPACE_SIZE));
        // default1 bits are forced.
        assert_eq!(controls.pin.bits() & 0x16, 0x16);
        assert_eq!(controls.exit.bits() & 0x3_6dff, 0x3_6dff);
    }

    #[test]
    fn broadwell_has_all_but_xsaves_and_skylake_has_that_too() {
        let controls = choose(&broadwell()).unwrap();
        for present in [
            Feature::VirtualNmis,
            Feature::PreemptionTimer,
            Feature::EferSwitch,
            Feature::Vpid,
            Feature::Rdtscp,
            Feature::Invpcid,
            Feature::WbinvdExiting,
        ] {
            assert!(controls.has(present), "{present:?}");
        }
        assert!(!controls.has(Feature::Xsaves));
        assert!(choose(&skylake()).unwrap().has(Feature::Xsaves));
    }

    #[test]
    fn ept_and_unrestricted_guest_are_never_on() {
        for table in [penryn(), broadwell(), skylake()] {
            let controls = choose(&table).unwrap();
            assert!(
                !controls
                    .secondary
                    .intersects(SecondaryControls::ENABLE_EPT | SecondaryControls::UNRESTRICTED_GUEST)
            );
        }
    }

    #[test]
    fn window_exits_are_possible_but_off() {
        let controls = choose(&broadwell()).unwrap();
        assert!(!controls.primary.intersects(PRIMARY_WINDOWS));
        let table = broadwell().with(msr::VMX_TRUE_PROCBASED_CTLS, 0xfff9_fffa_0400_6172);
        assert_eq!(choose(&table).unwrap_err().name, "interrupt-window exiting");
    }

    #[test]
    fn vpid_needs_the_all_contexts_fallback() {
        let table = broadwell().with(msr::VMX_EPT_VPID_CAP, 0x0000_0b01_0633_4141);
        let controls = choose(&table).unwrap();
        assert!(!controls.has(Feature::Vpid));
        assert!(!controls.has(Feature::Invpcid), "no PCIDs, no INVPCID");
    }

    #[test]
    fn efer_is_switched_on_both_ways_or_not_at_all() {
        let table = broadwell().with(msr::VMX_TRUE_EXIT_CTLS, 0x005f_ffff_0003_6dfb);
        let controls = choose(&table).unwrap();
        assert!(!controls.has(Feature::EferSwitch));
        assert!(!controls.entry.contains(EntryControls::LOAD_EFER));
    }

    #[test]
    fn without_tpr_shadow_cr8_exits() {
        let table = broadwell().with(msr::VMX_TRUE_PROCBASED_CTLS, 0xffd9_fffe_0400_6172);
        let controls = choose(&table).unwrap();
        assert!(!controls.has(Feature::TprShadow));
        assert!(controls.primary.contains(PRIMARY_CR8_EXITING));
        assert!(!choose(&broadwell()).unwrap().primary.intersects(PRIMARY_CR8_EXITING));
    }

    #[test]
    fn a_processor_without_64_bit_guests_is_refused() {
        let table = penryn().with(msr::VMX_ENTRY_CTLS, 0x0000_3dff_0000_11ff);
        assert_eq!(choose(&table).unwrap_err().name, "IA-32e mode guest");
    }

    #[test]
    fn ia32e_mode_is_the_vcpus() {
        let controls = choose(&broadwell()).unwrap();
        assert_eq!(controls.entry_for(true), controls.entry_for(false) | 1 << 9);
    }
}
