//! What the guest's control registers may hold, what follows from a write, and what the hardware's hold instead.
//!
//! [`ControlState`] is what the guest believes. The hardware's CR0, CR4 and EFER differ: the shadow tables need
//! paging, PAE, write protection and NX always on.

use bitflags::bitflags;

use super::event::Exception;
use super::registers::CodeSize;

bitflags! {
    /// CR0 (SDM Vol. 3 "Control Registers").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Cr0: u64 {
        /// Protection enable.
        const PE = 1 << 0;
        /// Monitor coprocessor.
        const MP = 1 << 1;
        /// Emulation of the x87.
        const EM = 1 << 2;
        /// Task switched.
        const TS = 1 << 3;
        /// Extension type; always 1.
        const ET = 1 << 4;
        /// Numeric error.
        const NE = 1 << 5;
        /// Write protect, for the supervisor too.
        const WP = 1 << 16;
        /// Alignment mask.
        const AM = 1 << 18;
        /// Not write-through.
        const NW = 1 << 29;
        /// Cache disable.
        const CD = 1 << 30;
        /// Paging.
        const PG = 1 << 31;
    }

    /// CR4 (SDM Vol. 3 "Control Registers").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Cr4: u64 {
        /// Virtual-8086 mode extensions.
        const VME = 1 << 0;
        /// Protected-mode virtual interrupts.
        const PVI = 1 << 1;
        /// Time-stamp disable for user mode.
        const TSD = 1 << 2;
        /// Debugging extensions.
        const DE = 1 << 3;
        /// Page-size extensions.
        const PSE = 1 << 4;
        /// Physical-address extension.
        const PAE = 1 << 5;
        /// Machine-check enable.
        const MCE = 1 << 6;
        /// Global pages.
        const PGE = 1 << 7;
        /// RDPMC in user mode.
        const PCE = 1 << 8;
        /// FXSAVE and SSE.
        const OSFXSR = 1 << 9;
        /// #XM.
        const OSXMMEXCPT = 1 << 10;
        /// User-mode instruction prevention.
        const UMIP = 1 << 11;
        /// 57-bit linear addresses.
        const LA57 = 1 << 12;
        /// VMX.
        const VMXE = 1 << 13;
        /// Safer-mode extensions.
        const SMXE = 1 << 14;
        /// RDFSBASE and its kin.
        const FSGSBASE = 1 << 16;
        /// Process-context identifiers.
        const PCIDE = 1 << 17;
        /// XSAVE and XCR0.
        const OSXSAVE = 1 << 18;
        /// No supervisor fetch from user pages.
        const SMEP = 1 << 20;
        /// No supervisor access to user pages.
        const SMAP = 1 << 21;
        /// Protection keys for user pages.
        const PKE = 1 << 22;
        /// Control-flow enforcement.
        const CET = 1 << 23;
        /// Protection keys for supervisor pages.
        const PKS = 1 << 24;
    }

    /// IA32_EFER (SDM Vol. 3 "Extended Feature Enable Register").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Efer: u64 {
        /// SYSCALL.
        const SCE = 1 << 0;
        /// IA-32e mode enable.
        const LME = 1 << 8;
        /// IA-32e mode active; the processor sets it.
        const LMA = 1 << 10;
        /// Execute disable.
        const NXE = 1 << 11;
    }

    /// What the hypervisor must do after a control register changed.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Effects: u32 {
        /// Something that selects a shadow root's role changed (paging mode, WP, NXE, SMEP, SMAP, PSE):
        /// find the root anew.
        const ROLE = 1 << 0;
        /// All translations of this vCPU are to be dropped, global ones included.
        const FLUSH_ALL = 1 << 1;
        /// The non-global translations of the current PCID are to be dropped.
        const FLUSH_NON_GLOBAL = 1 << 2;
        /// PAE paging: read the four PDPTEs from memory and check them; a bad one is #GP(0), and the write
        /// is then not to take place.
        const LOAD_PDPTES = 1 << 3;
        /// IA-32e mode was entered or left: the "IA-32e mode guest" entry control changes.
        const LONG_MODE = 1 << 4;
        /// CPUID leaf 1 or 0xD answers differently (CR4.OSXSAVE, XCR0).
        const CPUID = 1 << 5;
    }
}

/// How the guest's linear addresses become its physical ones (SDM Vol. 3 "Paging Modes and Control Bits").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Paging {
    /// CR0.PG clear: they are the same.
    Off,
    /// 32-bit paging: two levels of 4-byte entries.
    TwoLevel,
    /// PAE paging: four PDPTE registers over two levels of 8-byte entries.
    Pae,
    /// IA-32e, four levels.
    FourLevel,
    /// IA-32e with CR4.LA57, five levels.
    FiveLevel,
}

/// What the guest believes its control registers hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControlState {
    /// CR0. Bits the guest owns ([`GUEST_OWNED_CR0`]) may be newer in the VMCS: see [`ControlState::refresh`].
    pub cr0: Cr0,
    /// CR3 as last written, without the no-flush bit, with the PCID.
    pub cr3: u64,
    /// CR4; the same holds for the bits the guest owns.
    pub cr4: Cr4,
    /// EFER, LMA included.
    pub efer: Efer,
    /// XCR0.
    pub xcr0: u64,
}

/// What one guest may set, after its CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControlModel {
    /// CR4 bits that are not reserved for this guest.
    pub cr4_allowed: Cr4,
    /// EFER bits that are not reserved for this guest.
    pub efer_allowed: Efer,
    /// XCR0 bits on offer; 0 without XSAVE.
    pub xcr0_allowed: u64,
    /// MAXPHYADDR, 32..=52.
    pub physical_bits: u8,
}

/// The processor's fixed bits under VMX: the four IA32_VMX_CRx_FIXEDx MSRs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FixedBits {
    /// Must be 1 in CR0.
    pub cr0_fixed0: u64,
    /// May be 1 in CR0.
    pub cr0_fixed1: u64,
    /// Must be 1 in CR4.
    pub cr4_fixed0: u64,
    /// May be 1 in CR4.
    pub cr4_fixed1: u64,
}

/// The outcome of an allowed write: install `state`, then do what `effects` names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Change {
    /// The guest's new belief.
    pub state: ControlState,
    /// What follows.
    pub effects: Effects,
}

/// CR0 bits that the guest changes without an exit: those that neither paging nor VMX care about. TS is the one
/// that matters; the hypervisor switches FPU state eagerly, so it never needs TS for itself.
pub const GUEST_OWNED_CR0: Cr0 = Cr0::TS.union(Cr0::MP).union(Cr0::EM).union(Cr0::AM);

/// CR4 bits that the guest could change without an exit, where its CPUID offers them. PGE is not one: toggling
/// it is how kernels flush, and the shadow tables must hear of that.
const GUEST_OWNED_CR4: Cr4 = Cr4::VME
    .union(Cr4::PVI)
    .union(Cr4::TSD)
    .union(Cr4::DE)
    .union(Cr4::PCE)
    .union(Cr4::OSFXSR)
    .union(Cr4::OSXMMEXCPT)
    .union(Cr4::UMIP)
    .union(Cr4::FSGSBASE);

/// Bits of CR0 that exist; others in 31:0 are dropped silently.
const CR0_DEFINED: u64 = Cr0::all().bits();
/// CR0 and CR4 bits that take part in a role.
const ROLE_CR0: Cr0 = Cr0::PG.union(Cr0::WP);
const ROLE_CR4: Cr4 = Cr4::PAE.union(Cr4::PSE).union(Cr4::LA57).union(Cr4::SMEP).union(Cr4::SMAP);
/// Bit 63 of a value moved to CR3 while CR4.PCIDE is set: keep the translations of the new PCID.
const CR3_NO_FLUSH: u64 = 1 << 63;

/// The operand of a MOV outside 64-bit mode.
const LOW_HALF: u64 = 0xffff_ffff;

/// XCR0 components.
pub mod xcr0 {
    /// x87 state; always set.
    pub const X87: u64 = 1 << 0;
    /// SSE state.
    pub const SSE: u64 = 1 << 1;
    /// AVX state.
    pub const AVX: u64 = 1 << 2;
    /// MPX, both components.
    pub const MPX: u64 = 3 << 3;
    /// AVX-512, all three components.
    pub const AVX512: u64 = 7 << 5;
    /// AMX, both components.
    pub const AMX: u64 = 3 << 17;
}

impl ControlState {
    /// After power-up (SDM Vol. 3 "Processor State After Reset").
    pub const RESET: Self = Self {
        cr0: Cr0::CD.union(Cr0::NW).union(Cr0::ET),
        cr3: 0,
        cr4: Cr4::empty(),
        efer: Efer::empty(),
        xcr0: xcr0::X87,
    };

    /// 32-bit protected mode with paging off, as Multiboot wants it.
    pub const PROTECTED: Self = Self { cr0: Cr0::PE.union(Cr0::ET), ..Self::RESET };

    /// 64-bit mode over the tables at `cr3`, as the Linux boot protocol wants it.
    #[must_use]
    pub const fn long(cr3: u64) -> Self {
        Self {
            cr0: Cr0::PE.union(Cr0::ET).union(Cr0::NE).union(Cr0::WP).union(Cr0::PG),
            cr3,
            cr4: Cr4::PAE,
            efer: Efer::LME.union(Efer::LMA),
            xcr0: xcr0::X87,
        }
    }

    /// The paging mode that these registers select.
    #[must_use]
    #[inline]
    pub const fn paging(&self) -> Paging {
        if !self.cr0.contains(Cr0::PG) {
            Paging::Off
        } else if self.efer.contains(Efer::LMA) {
            if self.cr4.contains(Cr4::LA57) { Paging::FiveLevel } else { Paging::FourLevel }
        } else if self.cr4.contains(Cr4::PAE) {
            Paging::Pae
        } else {
            Paging::TwoLevel
        }
    }

    /// The current PCID; `None` while CR4.PCIDE is clear.
    #[must_use]
    #[inline]
    pub const fn pcid(&self) -> Option<u16> {
        if self.cr4.contains(Cr4::PCIDE) { Some((self.cr3 & 0xfff) as u16) } else { None }
    }

    /// What a MOV to a control register takes of its source: a 32-bit operand outside IA-32e mode.
    #[inline]
    const fn operand(&self, register: u64) -> u64 {
        if self.efer.contains(Efer::LMA) { register } else { register & LOW_HALF }
    }

    /// Takes over the bits that the guest may have changed without an exit, from the VMCS guest CR0 and CR4.
    #[inline]
    pub fn refresh(&mut self, model: &ControlModel, fixed: &FixedBits, hardware_cr0: u64, hardware_cr4: u64) {
        let owned = GUEST_OWNED_CR0.bits();
        self.cr0 = Cr0::from_bits_retain(self.cr0.bits() & !owned | hardware_cr0 & owned);
        let owned = guest_owned_cr4(model, fixed).bits();
        self.cr4 = Cr4::from_bits_retain(self.cr4.bits() & !owned | hardware_cr4 & owned);
    }

    /// MOV to CR0 (SDM Vol. 2 "MOV—Move to/from Control Registers"; Vol. 3 "Initializing IA-32e Mode").
    ///
    /// # Errors
    /// The exception to inject; nothing has changed.
    pub fn write_cr0(&self, value: u64, code: CodeSize) -> Result<Change, Exception> {
        let value = if code == CodeSize::Bits64 { value } else { value & LOW_HALF };
        if value >> 32 != 0 {
            return Err(Exception::PROTECTION);
        }
        let new = Cr0::from_bits_retain(value & CR0_DEFINED) | Cr0::ET;
        let paging_without_protection = new.contains(Cr0::PG) && !new.contains(Cr0::PE);
        let writeback_nonsense = new.contains(Cr0::NW) && !new.contains(Cr0::CD);
        let control_flow_needs_wp = self.cr4.contains(Cr4::CET) && !new.contains(Cr0::WP);
        if paging_without_protection || writeback_nonsense || control_flow_needs_wp {
            return Err(Exception::PROTECTION);
        }
        let mut state = Self { cr0: new, ..*self };
        let changed = self.cr0 ^ new;
        let mut effects = Effects::empty();
        if changed.contains(Cr0::PG) {
            if new.contains(Cr0::PG) {
                if self.efer.contains(Efer::LME) {
                    if !self.cr4.contains(Cr4::PAE) || code == CodeSize::Bits64 {
                        return Err(Exception::PROTECTION);
                    }
                    state.efer |= Efer::LMA;
                    effects |= Effects::LONG_MODE;
                }
            } else {
                if self.cr4.contains(Cr4::PCIDE) || code == CodeSize::Bits64 {
                    return Err(Exception::PROTECTION);
                }
                if self.efer.contains(Efer::LMA) {
                    state.efer -= Efer::LMA;
                    effects |= Effects::LONG_MODE;
                }
            }
            effects |= Effects::FLUSH_ALL;
        }
        if changed.intersects(ROLE_CR0) {
            effects |= Effects::ROLE;
        }
        if state.paging() == Paging::Pae && changed.intersects(Cr0::CD | Cr0::NW | Cr0::PG) {
            effects |= Effects::LOAD_PDPTES;
        }
        Ok(Change { state, effects })
    }

    /// CLTS.
    pub fn clear_task_switched(&self) -> Change {
        Change { state: Self { cr0: self.cr0 - Cr0::TS, ..*self }, effects: Effects::empty() }
    }

    /// LMSW: loads PE, MP, EM and TS, but never clears PE.
    ///
    /// # Errors
    /// As [`ControlState::write_cr0`].
    pub fn load_machine_status(&self, source: u16, code: CodeSize) -> Result<Change, Exception> {
        let low = u64::from(source) & 0xf;
        let kept = self.cr0.bits() & !0xe;
        self.write_cr0(kept | low, code)
    }

    /// MOV to CR3; outside IA-32e mode the register's low 32 bits count. Where it succeeds the TLB is flushed
    /// unless the guest said otherwise: `effects` tells. Writing the same value still reloads the PDPTEs.
    ///
    /// # Errors
    /// The exception to inject; nothing has changed.
    #[inline]
    pub fn write_cr3(&self, model: &ControlModel, value: u64) -> Result<Change, Exception> {
        let keep = self.cr4.contains(Cr4::PCIDE) && value & CR3_NO_FLUSH != 0;
        let value = if keep { value & !CR3_NO_FLUSH } else { self.operand(value) };
        if value >> model.physical_bits != 0 {
            return Err(Exception::PROTECTION);
        }
        let mut effects = if keep { Effects::empty() } else { Effects::FLUSH_NON_GLOBAL };
        if self.paging() == Paging::Pae {
            effects |= Effects::LOAD_PDPTES;
        }
        Ok(Change { state: Self { cr3: value, ..*self }, effects })
    }

    /// MOV to CR4; outside IA-32e mode the register's low 32 bits count.
    ///
    /// # Errors
    /// The exception to inject; nothing has changed.
    pub fn write_cr4(&self, model: &ControlModel, value: u64) -> Result<Change, Exception> {
        let value = self.operand(value);
        if value & !model.cr4_allowed.bits() != 0 {
            return Err(Exception::PROTECTION);
        }
        let new = Cr4::from_bits_retain(value);
        let changed = self.cr4 ^ new;
        let set = changed & new;
        if self.efer.contains(Efer::LMA) && (!new.contains(Cr4::PAE) || changed.contains(Cr4::LA57)) {
            return Err(Exception::PROTECTION);
        }
        if set.contains(Cr4::PCIDE) && (!self.efer.contains(Efer::LMA) || self.cr3 & 0xfff != 0) {
            return Err(Exception::PROTECTION);
        }
        if new.contains(Cr4::CET) && !self.cr0.contains(Cr0::WP) {
            return Err(Exception::PROTECTION);
        }
        let state = Self { cr4: new, ..*self };
        // SDM Vol. 3 "Operations that Invalidate TLBs and Paging-Structure Caches". SMAP and a set PCIDE flush
        // too: the role, or the name of the current context, changes with them, and the architecture allows any
        // extra flush.
        let mut effects = Effects::empty();
        if changed.intersects(Cr4::PGE | Cr4::PAE | Cr4::PSE | Cr4::SMEP | Cr4::SMAP | Cr4::LA57 | Cr4::PCIDE)
        {
            effects |= Effects::FLUSH_ALL;
        }
        if changed.intersects(ROLE_CR4) {
            effects |= Effects::ROLE;
        }
        if changed.contains(Cr4::OSXSAVE) {
            effects |= Effects::CPUID;
        }
        if state.paging() == Paging::Pae && changed.intersects(Cr4::PAE | Cr4::PGE | Cr4::PSE | Cr4::SMEP) {
            effects |= Effects::LOAD_PDPTES;
        }
        Ok(Change { state, effects })
    }

    /// WRMSR to IA32_EFER. LMA is the processor's: what is written there is ignored.
    ///
    /// # Errors
    /// The exception to inject; nothing has changed.
    pub fn write_efer(&self, model: &ControlModel, value: u64) -> Result<Change, Exception> {
        if value & !(model.efer_allowed | Efer::LMA).bits() != 0 {
            return Err(Exception::PROTECTION);
        }
        let new = (Efer::from_bits_retain(value) - Efer::LMA) | (self.efer & Efer::LMA);
        let changed = self.efer ^ new;
        if changed.contains(Efer::LME) && self.cr0.contains(Cr0::PG) {
            return Err(Exception::PROTECTION);
        }
        let effects =
            if changed.contains(Efer::NXE) { Effects::ROLE | Effects::FLUSH_ALL } else { Effects::empty() };
        Ok(Change { state: Self { efer: new, ..*self }, effects })
    }

    /// XSETBV with `register` from ECX. The processor has checked the privilege level before the exit.
    ///
    /// # Errors
    /// The exception to inject; nothing has changed.
    pub fn write_xcr(&self, model: &ControlModel, register: u32, value: u64) -> Result<Change, Exception> {
        if !self.cr4.contains(Cr4::OSXSAVE) {
            return Err(Exception::UNDEFINED);
        }
        if register != 0 || !valid_xcr0(value, model.xcr0_allowed) {
            return Err(Exception::PROTECTION);
        }
        Ok(Change { state: Self { xcr0: value, ..*self }, effects: Effects::CPUID })
    }
}

/// MOV to CR8: the task priority, 0..16.
///
/// # Errors
/// #GP(0) if a reserved bit is set.
pub const fn check_cr8(value: u64) -> Result<u8, Exception> {
    if value > 15 { Err(Exception::PROTECTION) } else { Ok(value as u8) }
}

/// SDM Vol. 1 "Enabling the XSAVE Feature Set and XSAVE-Enabled Features".
fn valid_xcr0(value: u64, allowed: u64) -> bool {
    let all_or_none = |mask: u64| value & mask == 0 || value & mask == mask;
    let needs = |mask: u64, base: u64| value & mask == 0 || value & base == base;
    value & !allowed == 0
        && value & xcr0::X87 != 0
        && needs(xcr0::AVX, xcr0::SSE)
        && needs(xcr0::AVX512, xcr0::AVX)
        && all_or_none(xcr0::AVX512)
        && all_or_none(xcr0::MPX)
        && all_or_none(xcr0::AMX)
}

/// CR4 bits that this guest changes without an exit. A bit that its CPUID does not offer is the host's, so that
/// setting it exits and becomes #GP.
#[must_use]
#[inline]
pub const fn guest_owned_cr4(model: &ControlModel, fixed: &FixedBits) -> Cr4 {
    let free = fixed.cr4_fixed1 & !fixed.cr4_fixed0;
    Cr4::from_bits_retain(GUEST_OWNED_CR4.bits() & model.cr4_allowed.bits() & free)
}

/// The CR0 guest/host mask: bits set here are the host's.
#[must_use]
pub const fn cr0_host_mask() -> u64 {
    !GUEST_OWNED_CR0.bits()
}

/// The CR4 guest/host mask: bits set here are the host's.
#[must_use]
pub const fn cr4_host_mask(model: &ControlModel, fixed: &FixedBits) -> u64 {
    !guest_owned_cr4(model, fixed).bits()
}

/// The CR0 that the guest really runs with. Without EPT there is no unrestricted guest: PE and PG stay on; the
/// shadow tables need WP; the guest's CD and NW stay emulated state (the cache is not the guest's to turn off).
/// The CR0 read shadow is simply `state.cr0`.
#[must_use]
#[inline]
pub const fn hardware_cr0(state: &ControlState, fixed: &FixedBits) -> u64 {
    const FORCED: u64 = Cr0::PE.bits() | Cr0::PG.bits() | Cr0::NE.bits() | Cr0::WP.bits() | Cr0::ET.bits();
    const HIDDEN: u64 = Cr0::CD.bits() | Cr0::NW.bits();
    (state.cr0.bits() & !HIDDEN | FORCED | fixed.cr0_fixed0) & fixed.cr0_fixed1
}

/// The CR4 that the guest really runs with. The CR4 read shadow is simply `state.cr4`.
///
/// PAE: the shadow tables are PAE or 4-level whatever the guest's are. MCE: a machine check must reach us, not
/// shut the core down. PCIDE and PGE stay off: VPIDs do their work. SMEP and SMAP have no meaning while the
/// guest's paging is off.
#[must_use]
#[inline]
pub const fn hardware_cr4(state: &ControlState, fixed: &FixedBits) -> u64 {
    const FORCED: u64 = Cr4::PAE.bits() | Cr4::VMXE.bits() | Cr4::MCE.bits();
    const HIDDEN: u64 = Cr4::PSE.bits() | Cr4::PGE.bits() | Cr4::PCIDE.bits() | Cr4::LA57.bits();
    const PAGING_ONLY: u64 = Cr4::SMEP.bits() | Cr4::SMAP.bits();
    let mut value = state.cr4.bits() & !HIDDEN;
    if !state.cr0.contains(Cr0::PG) {
        value &= !PAGING_ONLY;
    }
    (value | FORCED | fixed.cr4_fixed0) & fixed.cr4_fixed1
}

/// The EFER that the guest really runs with: NXE always on; LME equals LMA, because the hardware's PG is on even
/// while the guest's is not.
#[must_use]
#[inline]
pub const fn hardware_efer(state: &ControlState) -> u64 {
    let mode = if state.efer.contains(Efer::LMA) { Efer::LME.bits() | Efer::LMA.bits() } else { 0 };
    state.efer.bits() & Efer::SCE.bits() | Efer::NXE.bits() | mode
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MODEL: ControlModel = ControlModel {
        cr4_allowed: Cr4::from_bits_retain(0x37_07ff & !(1 << 13) | 1 << 11),
        efer_allowed: Efer::SCE.union(Efer::LME).union(Efer::NXE),
        xcr0_allowed: 0xe7,
        physical_bits: 40,
    };
    const FIXED: FixedBits = FixedBits {
        cr0_fixed0: 0x8000_0021,
        cr0_fixed1: 0xffff_ffff,
        cr4_fixed0: 0x2000,
        cr4_fixed1: 0x37_67ff | 1 << 11,
    };
    const GP: Result<Change, Exception> = Err(Exception::PROTECTION);

    fn protected() -> ControlState {
        ControlState::PROTECTED
    }

    #[test]
    fn cr0_combinations() {
        let state = protected();
        assert_eq!(state.write_cr0(Cr0::PG.bits(), CodeSize::Bits32), GP);
        assert_eq!(state.write_cr0((Cr0::PE | Cr0::NW).bits(), CodeSize::Bits32), GP);
        assert_eq!(state.write_cr0(1 << 32 | 1, CodeSize::Bits64), GP);
        assert!(state.write_cr0(1 << 32 | 1, CodeSize::Bits32).is_ok(), "a 32-bit operand");
        let change = state.write_cr0(0x11 | 1 << 6, CodeSize::Bits32).unwrap();
        assert_eq!(change.state.cr0, Cr0::PE | Cr0::ET, "reserved bits are dropped");
        assert_eq!(change.effects, Effects::empty());
    }

    #[test]
    fn into_long_mode_and_out_again() {
        let state = protected();
        let state = state.write_efer(&MODEL, Efer::LME.bits()).unwrap().state;
        let pg = (Cr0::PE | Cr0::PG).bits();
        assert_eq!(state.write_cr0(pg, CodeSize::Bits32), GP, "LME without PAE");
        let state = state.write_cr4(&MODEL, Cr4::PAE.bits()).unwrap().state;
        let change = state.write_cr0(pg, CodeSize::Bits32).unwrap();
        assert!(change.effects.contains(Effects::LONG_MODE | Effects::ROLE | Effects::FLUSH_ALL));
        let state = change.state;
        assert_eq!(state.paging(), Paging::FourLevel);
        assert_eq!(state.write_cr4(&MODEL, 0), GP, "PAE in long mode");
        assert_eq!(state.write_cr0(Cr0::PE.bits(), CodeSize::Bits64), GP, "PG in 64-bit mode");
        assert_eq!(state.write_efer(&MODEL, 0), GP, "LME while PG");
        let change = state.write_cr0(Cr0::PE.bits(), CodeSize::Bits32).unwrap();
        assert_eq!(change.state.efer, Efer::LME);
        assert_eq!(change.state.paging(), Paging::Off);
    }

    #[test]
    fn cr3_reserved_bits_and_no_flush() {
        let state = ControlState::long(0x1000);
        assert_eq!(state.write_cr3(&MODEL, 1 << 40), GP);
        assert_eq!(state.write_cr3(&MODEL, 1 << 63 | 0x1000), GP, "no-flush without PCIDE");
        let change = state.write_cr3(&MODEL, 0x1000).unwrap();
        assert_eq!(change.effects, Effects::FLUSH_NON_GLOBAL);
        let pcid = ControlState { cr4: state.cr4 | Cr4::PCIDE, ..state };
        let change = pcid.write_cr3(&MODEL, 1 << 63 | 0x2001).unwrap();
        assert_eq!((change.state.cr3, change.effects), (0x2001, Effects::empty()));
        assert_eq!(pcid.write_cr0(Cr0::PE.bits(), CodeSize::Bits32), GP, "PG off with PCIDE");
    }

    #[test]
    fn pcide_wants_long_mode_and_a_clean_cr3() {
        let value = (Cr4::PAE | Cr4::PCIDE).bits();
        assert_eq!(protected().write_cr4(&MODEL, value), GP);
        assert_eq!(ControlState::long(0x1001).write_cr4(&MODEL, value), GP);
        assert!(ControlState::long(0x1018).write_cr4(&MODEL, value).is_err());
        let change = ControlState::long(0x1000).write_cr4(&MODEL, value).unwrap();
        assert_eq!((change.state.pcid(), change.effects), (Some(0), Effects::FLUSH_ALL));
        let running = change.state.write_cr3(&MODEL, 0x2003).unwrap().state;
        assert_eq!(running.pcid(), Some(3));
        // It may be cleared with any PCID, and then the PCID's bits are plain bits of CR3 again.
        let change = running.write_cr4(&MODEL, Cr4::PAE.bits()).unwrap();
        assert_eq!((change.state.pcid(), change.state.cr3), (None, 0x2003));
        assert_eq!(change.effects, Effects::FLUSH_ALL);
        assert_eq!(change.state.write_cr4(&MODEL, value), GP, "CR3[11:0] is not 0 now");
        let none = ControlModel { cr4_allowed: MODEL.cr4_allowed - Cr4::PCIDE, ..MODEL };
        assert_eq!(ControlState::long(0x1000).write_cr4(&none, value), GP, "not offered");
    }

    #[test]
    fn cr3_with_pcids() {
        let state = ControlState { cr4: Cr4::PAE | Cr4::PCIDE, ..ControlState::long(0x1000) };
        let change = state.write_cr3(&MODEL, 0x2fff).unwrap();
        assert_eq!((change.state.pcid(), change.effects), (Some(0xfff), Effects::FLUSH_NON_GLOBAL));
        for bit in 40..63 {
            assert_eq!(state.write_cr3(&MODEL, 1 << bit | 0x2000), GP, "bit {bit}");
            assert_eq!(state.write_cr3(&MODEL, 1 << 63 | 1 << bit | 0x2000), GP, "bit {bit} with bit 63");
        }
    }

    /// SDM Vol. 3 "PDPTE Registers": which bits reload them, and that none other does.
    #[test]
    fn h17_the_bits_that_reload_the_pdptes() {
        let pae = ControlState {
            cr0: Cr0::PE | Cr0::PG | Cr0::ET | Cr0::CD,
            cr4: Cr4::PAE | Cr4::PGE,
            ..ControlState::RESET
        };
        let reloads = |change: Change| change.effects.contains(Effects::LOAD_PDPTES);
        let cr0 = |bits: Cr0| reloads(pae.write_cr0((pae.cr0 ^ bits).bits(), CodeSize::Bits32).unwrap());
        for (bits, loaded) in [
            (Cr0::CD, true),
            (Cr0::NW, true),
            (Cr0::WP, false),
            (Cr0::AM, false),
            (Cr0::TS, false),
            (Cr0::PG, false),
        ] {
            assert_eq!(cr0(bits), loaded, "{bits:?}");
        }
        for (bits, loaded) in [
            (Cr4::PGE, true),
            (Cr4::PSE, true),
            (Cr4::SMEP, true),
            (Cr4::SMAP, false),
            (Cr4::PAE, false),
            (Cr4::TSD, false),
            (Cr4::OSXSAVE, false),
        ] {
            assert_eq!(reloads(pae.write_cr4(&MODEL, (pae.cr4 ^ bits).bits()).unwrap()), loaded, "{bits:?}");
        }
        let off = ControlState { cr0: Cr0::PE | Cr0::ET, ..pae };
        assert!(reloads(off.write_cr0((Cr0::PE | Cr0::PG).bits(), CodeSize::Bits32).unwrap()));
        assert!(!reloads(off.write_cr3(&MODEL, 0x1000).unwrap()), "paging is off");
        assert!(!reloads(off.write_cr4(&MODEL, Cr4::PAE.bits()).unwrap()));
        let two_level = ControlState { cr4: Cr4::empty(), ..pae };
        assert!(reloads(two_level.write_cr4(&MODEL, Cr4::PAE.bits()).unwrap()), "32-bit paging to PAE");
        assert!(!reloads(two_level.write_cr3(&MODEL, 0x1000).unwrap()));
        assert!(!reloads(two_level.write_cr4(&MODEL, Cr4::PGE.bits()).unwrap()));
        assert!(!reloads(ControlState::long(0x1000).write_cr3(&MODEL, 0x1000).unwrap()));
        let nxe = pae.write_efer(&MODEL, Efer::NXE.bits()).unwrap();
        assert!(!reloads(nxe) && nxe.effects.contains(Effects::FLUSH_ALL | Effects::ROLE));
    }

    /// H17: PDPTEs are reloaded by CR3 writes of the same value and by a toggle of PGE.
    #[test]
    fn pae_pdpte_reload() {
        let state = ControlState { cr0: Cr0::PE | Cr0::PG | Cr0::ET, cr4: Cr4::PAE, ..ControlState::RESET };
        assert_eq!(state.paging(), Paging::Pae);
        assert!(state.write_cr3(&MODEL, state.cr3).unwrap().effects.contains(Effects::LOAD_PDPTES));
        let change = state.write_cr4(&MODEL, (Cr4::PAE | Cr4::PGE).bits()).unwrap();
        assert!(change.effects.contains(Effects::LOAD_PDPTES | Effects::FLUSH_ALL));
        let change = state.write_cr0((state.cr0 | Cr0::CD).bits(), CodeSize::Bits32).unwrap();
        assert!(change.effects.contains(Effects::LOAD_PDPTES));
        let change = state.write_cr0((state.cr0 | Cr0::TS).bits(), CodeSize::Bits32).unwrap();
        assert_eq!(change.effects, Effects::empty());
    }

    #[test]
    fn unoffered_cr4_bits() {
        for bit in [Cr4::VMXE, Cr4::SMXE, Cr4::LA57, Cr4::PKE, Cr4::CET] {
            assert_eq!(protected().write_cr4(&MODEL, bit.bits()), GP, "{bit:?}");
        }
        let poor = ControlModel { cr4_allowed: Cr4::PAE | Cr4::PGE, ..MODEL };
        assert_eq!(guest_owned_cr4(&poor, &FIXED), Cr4::empty());
    }

    #[test]
    fn lmsw_never_clears_pe() {
        let change = protected().load_machine_status(0, CodeSize::Bits32).unwrap();
        assert!(change.state.cr0.contains(Cr0::PE));
        let change = protected().load_machine_status(0x8, CodeSize::Bits32).unwrap();
        assert!(change.state.cr0.contains(Cr0::TS | Cr0::PE));
        assert!(!change.state.clear_task_switched().state.cr0.contains(Cr0::TS));
    }

    #[test]
    fn xcr0_rules() {
        let on = ControlState { cr4: Cr4::OSXSAVE, ..protected() };
        assert_eq!(protected().write_xcr(&MODEL, 0, 1), Err(Exception::UNDEFINED));
        for (value, good) in [
            (1, true),
            (3, true),
            (7, true),
            (0xe7, true),
            (0, false),
            (2, false),
            (5, false),
            (0x27, false),
            (0x1f, false),
            (0xe3, false),
        ] {
            assert_eq!(on.write_xcr(&MODEL, 0, value).is_ok(), good, "{value:#x}");
        }
        assert_eq!(on.write_xcr(&MODEL, 1, 1), GP);
        assert_eq!(check_cr8(16), Err(Exception::PROTECTION));
        assert_eq!(check_cr8(15), Ok(15));
    }

    #[test]
    fn hardware_values_in_every_mode() {
        for state in [ControlState::RESET, protected(), ControlState::long(0x1000)] {
            let cr0 = Cr0::from_bits_retain(hardware_cr0(&state, &FIXED));
            assert!(cr0.contains(Cr0::PE | Cr0::PG | Cr0::WP | Cr0::NE));
            assert!(!cr0.intersects(Cr0::CD | Cr0::NW));
            let cr4 = Cr4::from_bits_retain(hardware_cr4(&state, &FIXED));
            assert!(cr4.contains(Cr4::PAE | Cr4::VMXE | Cr4::MCE));
            let efer = Efer::from_bits_retain(hardware_efer(&state));
            assert!(efer.contains(Efer::NXE));
            assert_eq!(efer.contains(Efer::LME), efer.contains(Efer::LMA));
        }
        let smep = ControlState { cr4: Cr4::SMEP | Cr4::SMAP, ..protected() };
        assert_eq!(hardware_cr4(&smep, &FIXED) & (Cr4::SMEP | Cr4::SMAP).bits(), 0);
    }

    #[test]
    fn guest_owned_bits_are_taken_over() {
        let mut state = ControlState::long(0);
        let hardware = hardware_cr0(&state, &FIXED) | Cr0::TS.bits();
        let cr4 = hardware_cr4(&state, &FIXED) | Cr4::TSD.bits();
        state.refresh(&MODEL, &FIXED, hardware, cr4);
        assert!(state.cr0.contains(Cr0::TS));
        assert_eq!(state.cr4, Cr4::PAE | Cr4::TSD);
        assert_eq!(cr0_host_mask() & Cr0::TS.bits(), 0);
        assert_ne!(cr4_host_mask(&MODEL, &FIXED) & Cr4::PGE.bits(), 0);
    }

    proptest! {
        /// From any reachable state, what any write leaves behind is consistent, and fit for VM entry.
        #[test]
        fn states_stay_consistent(writes in proptest::collection::vec((0..5u8, any::<u64>(), 0..3u8), 0..64)) {
            let mut state = ControlState::RESET;
            for (which, value, mode) in writes {
                let code = match (mode, state.efer.contains(Efer::LMA)) {
                    (0, true) => CodeSize::Bits64,
                    _ => CodeSize::Bits32,
                };
                // Mostly plausible values, or nearly everything is #GP.
                let result = match which {
                    0 => state.write_cr0(value & 0xe005_003f | 1, code),
                    1 => state.write_cr3(&MODEL, value >> (value & 31)),
                    2 => state.write_cr4(&MODEL, value & 0x37_07ff),
                    3 => state.write_efer(&MODEL, value & 0xd01),
                    _ => state.write_xcr(&MODEL, 0, value & 0xe7),
                };
                if let Ok(change) = result {
                    state = change.state;
                }
                let long = state.cr0.contains(Cr0::PG) && state.efer.contains(Efer::LME);
                prop_assert_eq!(state.efer.contains(Efer::LMA), long);
                prop_assert!(!long || state.cr4.contains(Cr4::PAE));
                prop_assert!(!state.cr0.contains(Cr0::PG) || state.cr0.contains(Cr0::PE));
                prop_assert!(!state.cr4.contains(Cr4::PCIDE) || long);
                prop_assert_eq!(state.cr3 >> 40, 0);
                let cr0 = hardware_cr0(&state, &FIXED);
                prop_assert_eq!(cr0 & FIXED.cr0_fixed0, FIXED.cr0_fixed0);
                prop_assert_eq!(cr0 & !FIXED.cr0_fixed1, 0);
                let cr4 = hardware_cr4(&state, &FIXED);
                prop_assert_eq!(cr4 & FIXED.cr4_fixed0, FIXED.cr4_fixed0);
                prop_assert_eq!(cr4 & !FIXED.cr4_fixed1, 0);
            }
        }
    }
}
