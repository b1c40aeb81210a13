//! The guest-state area: segments, initial states, and a reader for reports.

use super::capability::Capabilities;
use super::controls::{Controls, Feature};
use super::fields::{self, Field16, Field32, FieldNatural};
use super::vmcs::CurrentVmcs;

/// Segment access rights as the VMCS holds them (SDM Vol. 3, Section 25.4.1 "Guest Register State").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct AccessRights(pub u32);

impl AccessRights {
    /// 64-bit code: execute/read, accessed, DPL 0, L.
    pub const CODE_64: Self = Self(0xa09b);
    /// 32-bit code: execute/read, accessed, DPL 0, D, 4 KiB granularity.
    pub const CODE_32: Self = Self(0xc09b);
    /// Data: read/write, accessed, DPL 0, B, 4 KiB granularity.
    pub const DATA: Self = Self(0xc093);
    /// A busy 32-bit or 64-bit TSS.
    pub const TSS_BUSY: Self = Self(0x008b);
    /// An LDT.
    pub const LDT: Self = Self(0x0082);
    /// No segment is loaded.
    pub const UNUSABLE: Self = Self(1 << 16);

    /// From the high word of a segment descriptor (bytes 4 to 7), as LAR shows it.
    #[must_use]
    pub const fn from_descriptor(high: u32) -> Self {
        Self((high >> 8) & 0xf0ff)
    }

    /// The descriptor privilege level, 0..=3. That of SS is the CPL.
    #[must_use]
    pub const fn dpl(self) -> u8 {
        (self.0 >> 5) as u8 & 3
    }

    /// The null segment, or none that can be used.
    #[must_use]
    pub const fn is_unusable(self) -> bool {
        self.0 & (1 << 16) != 0
    }

    /// L: a 64-bit code segment, if EFER.LMA is set.
    #[must_use]
    pub const fn is_long(self) -> bool {
        self.0 & (1 << 13) != 0
    }

    /// D/B: 32-bit operands and addresses by default.
    #[must_use]
    pub const fn is_default_32(self) -> bool {
        self.0 & (1 << 14) != 0
    }

    /// The type, 0..=15; together with [`Self::is_code_or_data`].
    #[must_use]
    pub const fn kind(self) -> u8 {
        self.0 as u8 & 15
    }

    /// S: a code or data segment, else a system segment.
    #[must_use]
    pub const fn is_code_or_data(self) -> bool {
        self.0 & (1 << 4) != 0
    }
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Segment {
    /// The selector.
    pub selector: u16,
    /// The base (linear address).
    pub base: u64,
    /// The limit in bytes: the last valid offset.
    pub limit: u32,
    /// The access rights.
    pub access: AccessRights,
}

impl Segment {
    /// No segment.
    pub const UNUSABLE: Self = Self { selector: 0, base: 0, limit: 0, access: AccessRights::UNUSABLE };

    /// From 0 to 4 GiB.
    #[must_use]
    pub const fn flat(selector: u16, access: AccessRights) -> Self {
        Self { selector, base: 0, limit: u32::MAX, access }
    }
}

/// Names a segment register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentName {
    /// ES.
    Es,
    /// CS.
    Cs,
    /// SS.
    Ss,
    /// DS.
    Ds,
    /// FS.
    Fs,
    /// GS.
    Gs,
    /// LDTR.
    Ldtr,
    /// TR.
    Tr,
}

/// The four fields of a segment register.
struct SegmentFields {
    selector: Field16,
    base: FieldNatural,
    limit: Field32,
    access: Field32,
}

macro_rules! segment_fields {
    ($selector:ident, $base:ident, $limit:ident, $access:ident) => {
        SegmentFields {
            selector: fields::$selector,
            base: fields::$base,
            limit: fields::$limit,
            access: fields::$access,
        }
    };
}

impl SegmentName {
    /// All eight, in the order of [`GuestState::segments`].
    pub const ALL: [Self; 8] =
        [Self::Es, Self::Cs, Self::Ss, Self::Ds, Self::Fs, Self::Gs, Self::Ldtr, Self::Tr];

    #[inline(always)]
    const fn fields(self) -> SegmentFields {
        match self {
            Self::Es => {
                segment_fields!(GUEST_ES_SELECTOR, GUEST_ES_BASE, GUEST_ES_LIMIT, GUEST_ES_ACCESS_RIGHTS)
            }
            Self::Cs => {
                segment_fields!(GUEST_CS_SELECTOR, GUEST_CS_BASE, GUEST_CS_LIMIT, GUEST_CS_ACCESS_RIGHTS)
            }
            Self::Ss => {
                segment_fields!(GUEST_SS_SELECTOR, GUEST_SS_BASE, GUEST_SS_LIMIT, GUEST_SS_ACCESS_RIGHTS)
            }
            Self::Ds => {
                segment_fields!(GUEST_DS_SELECTOR, GUEST_DS_BASE, GUEST_DS_LIMIT, GUEST_DS_ACCESS_RIGHTS)
            }
            Self::Fs => {
                segment_fields!(GUEST_FS_SELECTOR, GUEST_FS_BASE, GUEST_FS_LIMIT, GUEST_FS_ACCESS_RIGHTS)
            }
            Self::Gs => {
                segment_fields!(GUEST_GS_SELECTOR, GUEST_GS_BASE, GUEST_GS_LIMIT, GUEST_GS_ACCESS_RIGHTS)
            }
            Self::Ldtr => segment_fields!(
                GUEST_LDTR_SELECTOR,
                GUEST_LDTR_BASE,
                GUEST_LDTR_LIMIT,
                GUEST_LDTR_ACCESS_RIGHTS
            ),
            Self::Tr => {
                segment_fields!(GUEST_TR_SELECTOR, GUEST_TR_BASE, GUEST_TR_LIMIT, GUEST_TR_ACCESS_RIGHTS)
            }
        }
    }

    /// Reads this segment register of the guest.
    #[inline]
    #[must_use]
    pub fn read(self, vmcs: &CurrentVmcs) -> Segment {
        let fields = self.fields();
        Segment {
            selector: vmcs.read(fields.selector),
            base: vmcs.read(fields.base),
            limit: vmcs.read(fields.limit),
            access: AccessRights(vmcs.read(fields.access)),
        }
    }

    /// Writes this segment register of the guest.
    #[inline]
    pub fn write(self, vmcs: &CurrentVmcs, segment: &Segment) {
        let fields = self.fields();
        vmcs.write(fields.selector, segment.selector);
        vmcs.write(fields.base, segment.base);
        vmcs.write(fields.limit, segment.limit);
        vmcs.write(fields.access, segment.access.0);
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Table {
    /// The base (linear address).
    pub base: u64,
    /// The limit in bytes: the last valid offset.
    pub limit: u16,
}

/// Active: the vCPU runs instructions (GUEST_ACTIVITY).
pub const ACTIVITY_ACTIVE: u32 = 0;
/// The vCPU waits in HLT.
pub const ACTIVITY_HLT: u32 = 1;
/// The vCPU has had a triple fault.
pub const ACTIVITY_SHUTDOWN: u32 = 2;
/// The vCPU waits for a start-up IPI.
pub const ACTIVITY_WAIT_FOR_SIPI: u32 = 3;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR0_CD_NW: u64 = 3 << 29;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;
const DR7_RESET: u64 = 0x400;
const RFLAGS_RESET: u64 = 2;

/// The guest-state area: what the hardware holds, which for CR0, CR3, CR4 and EFER is not what the guest believes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct GuestState {
    /// Hardware CR0.
    pub cr0: u64,
    /// Hardware CR3: the shadow root.
    pub cr3: u64,
    /// Hardware CR4.
    pub cr4: u64,
    /// Hardware EFER; in the VMCS only where the controls switch it, else LMA and LME by the entry control.
    pub efer: u64,
    /// DR7.
    pub dr7: u64,
    /// IA32_DEBUGCTL.
    pub debugctl: u64,
    /// RIP.
    pub rip: u64,
    /// RSP.
    pub rsp: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// By [`SegmentName::ALL`].
    pub segments: [Segment; 8],
    /// GDTR.
    pub gdtr: Table,
    /// IDTR.
    pub idtr: Table,
    /// IA32_SYSENTER_CS.
    pub sysenter_cs: u32,
    /// IA32_SYSENTER_ESP.
    pub sysenter_esp: u64,
    /// IA32_SYSENTER_EIP.
    pub sysenter_eip: u64,
    /// Blocking by STI (bit 0), MOV SS (1), SMI (2), NMI (3).
    pub interruptibility: u32,
    /// One of the `ACTIVITY_` constants.
    pub activity: u32,
    /// Pending debug exceptions.
    pub pending_debug_exceptions: u64,
}

impl GuestState {
    /// 64-bit mode, flat, interrupts off, null IDT. `cr3` is the shadow root.
    #[must_use]
    pub fn long_mode(capabilities: &Capabilities, cr3: u64, rip: u64, rsp: u64) -> Self {
        Self {
            efer: EFER_LME | EFER_LMA | EFER_NXE,
            ..Self::flat(capabilities, cr3, rip, rsp, AccessRights::CODE_64)
        }
    }

    /// 32-bit protected mode, flat, interrupts off, null IDT. Paging and PAE are on in hardware: `cr3` is a shadow
    /// root of PAE shape, whatever the guest believes.
    #[must_use]
    pub fn protected_mode(capabilities: &Capabilities, cr3: u64, rip: u32, rsp: u32) -> Self {
        let code = AccessRights::CODE_32;
        Self { efer: EFER_NXE, ..Self::flat(capabilities, cr3, rip.into(), rsp.into(), code) }
    }

    fn flat(capabilities: &Capabilities, cr3: u64, rip: u64, rsp: u64, code: AccessRights) -> Self {
        let data = Segment::flat(0x10, AccessRights::DATA);
        let tss = Segment { selector: 0, base: 0, limit: 0x67, access: AccessRights::TSS_BUSY };
        Self {
            cr0: capabilities.cr0.apply(CR0_PE | CR0_ET | CR0_WP | CR0_PG) & !CR0_CD_NW,
            cr3,
            cr4: capabilities.cr4.apply(CR4_PAE),
            dr7: DR7_RESET,
            rip,
            rsp,
            rflags: RFLAGS_RESET,
            segments: [data, Segment::flat(8, code), data, data, data, data, Segment::UNUSABLE, tss],
            activity: ACTIVITY_ACTIVE,
            ..Self::default()
        }
    }

    /// A segment register.
    #[must_use]
    pub const fn segment(&self, name: SegmentName) -> &Segment {
        &self.segments[name as usize]
    }

    /// A segment register, to be changed.
    #[must_use]
    pub const fn segment_mut(&mut self, name: SegmentName) -> &mut Segment {
        &mut self.segments[name as usize]
    }

    /// Writes the whole area into the current VMCS.
    pub fn write(&self, vmcs: &CurrentVmcs, controls: &Controls) {
        vmcs.write(fields::VMCS_LINK_POINTER, u64::MAX);
        vmcs.write(fields::GUEST_CR0, self.cr0);
        vmcs.write(fields::GUEST_CR3, self.cr3);
        vmcs.write(fields::GUEST_CR4, self.cr4);
        if controls.has(Feature::EferSwitch) {
            vmcs.write(fields::GUEST_EFER, self.efer);
        }
        vmcs.write(fields::GUEST_DR7, self.dr7);
        vmcs.write(fields::GUEST_DEBUGCTL, self.debugctl);
        vmcs.write(fields::GUEST_RIP, self.rip);
        vmcs.write(fields::GUEST_RSP, self.rsp);
        vmcs.write(fields::GUEST_RFLAGS, self.rflags);
        for name in SegmentName::ALL {
            name.write(vmcs, self.segment(name));
        }
        vmcs.write(fields::GUEST_GDTR_BASE, self.gdtr.base);
        vmcs.write(fields::GUEST_GDTR_LIMIT, self.gdtr.limit.into());
        vmcs.write(fields::GUEST_IDTR_BASE, self.idtr.base);
        vmcs.write(fields::GUEST_IDTR_LIMIT, self.idtr.limit.into());
        vmcs.write(fields::GUEST_SYSENTER_CS, self.sysenter_cs);
        vmcs.write(fields::GUEST_SYSENTER_ESP, self.sysenter_esp);
        vmcs.write(fields::GUEST_SYSENTER_EIP, self.sysenter_eip);
        vmcs.write(fields::GUEST_INTERRUPTIBILITY, self.interruptibility);
        vmcs.write(fields::GUEST_ACTIVITY, self.activity);
        vmcs.write(fields::GUEST_PENDING_DEBUG_EXCEPTIONS, self.pending_debug_exceptions);
    }

    /// Reads the whole area back, for reports. Without EFER switching, `efer` is what the entry control says.
    #[must_use]
    pub fn read(vmcs: &CurrentVmcs, controls: &Controls) -> Self {
        let efer = if controls.has(Feature::EferSwitch) {
            vmcs.read(fields::GUEST_EFER)
        } else if vmcs.read(fields::ENTRY_CONTROLS) & super::controls::EntryControls::IA32E_MODE_GUEST.bits()
            != 0
        {
            EFER_LME | EFER_LMA | EFER_NXE
        } else {
            EFER_NXE
        };
        Self {
            cr0: vmcs.read(fields::GUEST_CR0),
            cr3: vmcs.read(fields::GUEST_CR3),
            cr4: vmcs.read(fields::GUEST_CR4),
            efer,
            dr7: vmcs.read(fields::GUEST_DR7),
            debugctl: vmcs.read(fields::GUEST_DEBUGCTL),
            rip: vmcs.read(fields::GUEST_RIP),
            rsp: vmcs.read(fields::GUEST_RSP),
            rflags: vmcs.read(fields::GUEST_RFLAGS),
            segments: SegmentName::ALL.map(|name| name.read(vmcs)),
            gdtr: Table {
                base: vmcs.read(fields::GUEST_GDTR_BASE),
                limit: vmcs.read(fields::GUEST_GDTR_LIMIT) as u16,
            },
            idtr: Table {
                base: vmcs.read(fields::GUEST_IDTR_BASE),
                limit: vmcs.read(fields::GUEST_IDTR_LIMIT) as u16,
            },
            sysenter_cs: vmcs.read(fields::GUEST_SYSENTER_CS),
            sysenter_esp: vmcs.read(fields::GUEST_SYSENTER_ESP),
            sysenter_eip: vmcs.read(fields::GUEST_SYSENTER_EIP),
            interruptibility: vmcs.read(fields::GUEST_INTERRUPTIBILITY),
            activity: vmcs.read(fields::GUEST_ACTIVITY),
            pending_debug_exceptions: vmcs.read(fields::GUEST_PENDING_DEBUG_EXCEPTIONS),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::msr::tables::penryn;
    use super::*;

    #[test]
    fn access_rights_from_a_descriptor() {
        // The usual flat 64-bit code descriptor, 00af9b000000ffff.
        let rights = AccessRights::from_descriptor(0x00af_9b00);
        assert_eq!(rights, AccessRights::CODE_64);
        assert!(rights.is_long() && rights.is_code_or_data() && !rights.is_default_32());
        assert_eq!((rights.dpl(), rights.kind()), (0, 11));
        assert_eq!(AccessRights::from_descriptor(0x00cf_f300).dpl(), 3);
    }

    #[test]
    fn long_mode_has_a_64_bit_code_segment_and_the_fixed_bits() {
        let capabilities = Capabilities::read(&penryn());
        let state = GuestState::long_mode(&capabilities, 0x1000, 0x2000, 0x3000);
        assert!(state.segment(SegmentName::Cs).access.is_long());
        assert_eq!(state.segment(SegmentName::Tr).access, AccessRights::TSS_BUSY);
        assert!(state.segment(SegmentName::Ldtr).access.is_unusable());
        assert_eq!(state.cr0, 0x8001_0031);
        assert_eq!(state.cr4, 0x2020);
        assert_eq!(state.efer, 0xd00);
    }

    #[test]
    fn protected_mode_pages_in_hardware() {
        let capabilities = Capabilities::read(&penryn());
        let state = GuestState::protected_mode(&capabilities, 0x1000, 0x10_0000, 0);
        assert!(state.segment(SegmentName::Cs).access.is_default_32());
        assert_eq!(state.cr0 & 0x8000_0001, 0x8000_0001);
        assert_eq!((state.cr4, state.efer), (0x2020, 0x800));
    }
}
