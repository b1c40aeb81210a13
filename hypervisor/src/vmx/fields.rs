//! VMCS fields, typed by width and by whether they can be written
//! (SDM Vol. 3, Appendix B "Field Encoding in VMCS").

use core::marker::PhantomData;

/// How wide a field is; its value's Rust type follows from it.
pub trait Width {
    /// The field's value.
    type Value: Copy;
    /// The value as VMWRITE takes it.
    fn to_raw(value: Self::Value) -> u64;
    /// The value from what VMREAD gave; VMREAD clears the bits above the field's width.
    fn from_raw(raw: u64) -> Self::Value;
}

macro_rules! width {
    ($(#[$doc:meta])* $name:ident, $value:ty) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        pub enum $name {}

        impl Width for $name {
            type Value = $value;
            #[inline(always)]
            fn to_raw(value: $value) -> u64 {
                value.into()
            }
            #[inline(always)]
            fn from_raw(raw: u64) -> $value {
                raw as $value
            }
        }
    };
}

width! {
    /// 16-bit fields.
    W16, u16
}
width! {
    /// 32-bit fields.
    W32, u32
}
width! {
    /// 64-bit fields.
    W64, u64
}
width! {
    /// Fields of natural width: 64 bits, as the host is.
    Natural, u64
}

/// A field that the hypervisor writes and reads.
#[derive(Clone, Copy, Debug)]
pub enum ReadWrite {}
/// A field that only the processor writes (exit information).
#[derive(Clone, Copy, Debug)]
pub enum ReadOnly {}

/// One VMCS field.
#[derive(Debug)]
pub struct Field<W, A = ReadWrite> {
    encoding: u32,
    kind: PhantomData<(W, A)>,
}

impl<W, A> Clone for Field<W, A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<W, A> Copy for Field<W, A> {}

/// A 16-bit field.
pub type Field16 = Field<W16>;
/// A 32-bit field.
pub type Field32 = Field<W32>;
/// A 64-bit field.
pub type Field64 = Field<W64>;
/// A field of natural width.
pub type FieldNatural = Field<Natural>;

/// The code of a width in an encoding's bits 14:13.
const fn width_code(width: &str) -> u32 {
    match width.as_bytes() {
        b"W16" => 0,
        b"W64" => 1,
        b"W32" => 2,
        _ => 3,
    }
}

impl<W, A> Field<W, A> {
    /// The encoding VMREAD and VMWRITE take.
    #[inline(always)]
    #[must_use]
    pub const fn encoding(self) -> u32 {
        self.encoding
    }
}

macro_rules! fields {
    ($($(#[$doc:meta])* $name:ident: $width:ident $(($access:ident))? = $encoding:literal;)*) => {
        $(
            $(#[$doc])*
            pub const $name: Field<$width $(, $access)?> = {
                // The encoding's own width and type bits must agree with the field's type.
                assert!(($encoding >> 13) & 3 == width_code(stringify!($width)));
                Field { encoding: $encoding, kind: PhantomData }
            };
        )*

        /// The constant's name for an encoding, for messages.
        #[must_use]
        pub fn name(encoding: u32) -> &'static str {
            match encoding {
                $($encoding => stringify!($name),)*
                _ => "(unnamed field)",
            }
        }

        #[cfg(test)]
        const ALL: &[(u32, &str, &str)] =
            &[$(($encoding, stringify!($name), concat!("" $(, stringify!($access))?))),*];
    };
}

fields! {
    /// The tag of this vCPU's TLB entries, 1..=65535; 0 is the host's.
    VPID: W16 = 0x0000;

    /// Guest ES selector.
    GUEST_ES_SELECTOR: W16 = 0x0800;
    /// Guest CS selector.
    GUEST_CS_SELECTOR: W16 = 0x0802;
    /// Guest SS selector.
    GUEST_SS_SELECTOR: W16 = 0x0804;
    /// Guest DS selector.
    GUEST_DS_SELECTOR: W16 = 0x0806;
    /// Guest FS selector.
    GUEST_FS_SELECTOR: W16 = 0x0808;
    /// Guest GS selector.
    GUEST_GS_SELECTOR: W16 = 0x080a;
    /// Guest LDTR selector.
    GUEST_LDTR_SELECTOR: W16 = 0x080c;
    /// Guest TR selector.
    GUEST_TR_SELECTOR: W16 = 0x080e;

    /// Host ES selector.
    HOST_ES_SELECTOR: W16 = 0x0c00;
    /// Host CS selector.
    HOST_CS_SELECTOR: W16 = 0x0c02;
    /// Host SS selector.
    HOST_SS_SELECTOR: W16 = 0x0c04;
    /// Host DS selector.
    HOST_DS_SELECTOR: W16 = 0x0c06;
    /// Host FS selector.
    HOST_FS_SELECTOR: W16 = 0x0c08;
    /// Host GS selector.
    HOST_GS_SELECTOR: W16 = 0x0c0a;
    /// Host TR selector.
    HOST_TR_SELECTOR: W16 = 0x0c0c;

    /// Physical address of I/O bitmap A (ports 0 to 7FFFh).
    IO_BITMAP_A: W64 = 0x2000;
    /// Physical address of I/O bitmap B (ports 8000h to FFFFh).
    IO_BITMAP_B: W64 = 0x2002;
    /// Physical address of the MSR bitmap page.
    MSR_BITMAP: W64 = 0x2004;
    /// Physical address of the list of MSRs stored at exit.
    EXIT_MSR_STORE_ADDRESS: W64 = 0x2006;
    /// Physical address of the list of MSRs loaded at exit.
    EXIT_MSR_LOAD_ADDRESS: W64 = 0x2008;
    /// Physical address of the list of MSRs loaded at entry.
    ENTRY_MSR_LOAD_ADDRESS: W64 = 0x200a;
    /// Added to the TSC as the guest reads it.
    TSC_OFFSET: W64 = 0x2010;
    /// Physical address of the virtual-APIC page.
    VIRTUAL_APIC_ADDRESS: W64 = 0x2012;
    /// Physical address of the APIC-access page.
    APIC_ACCESS_ADDRESS: W64 = 0x2014;
    /// XSS bits whose XSAVES/XRSTORS exit.
    XSS_EXITING_BITMAP: W64 = 0x202c;

    /// VMCS link pointer: all ones.
    VMCS_LINK_POINTER: W64 = 0x2800;
    /// Guest IA32_DEBUGCTL.
    GUEST_DEBUGCTL: W64 = 0x2802;
    /// Guest IA32_PAT (only with its controls).
    GUEST_PAT: W64 = 0x2804;
    /// Guest IA32_EFER (only with its controls).
    GUEST_EFER: W64 = 0x2806;
    /// Guest PDPTE 0 (only with EPT).
    GUEST_PDPTE0: W64 = 0x280a;

    /// Host IA32_PAT (only with its control).
    HOST_PAT: W64 = 0x2c00;
    /// Host IA32_EFER (only with its control).
    HOST_EFER: W64 = 0x2c02;

    /// Pin-based VM-execution controls.
    PIN_CONTROLS: W32 = 0x4000;
    /// Primary processor-based VM-execution controls.
    PRIMARY_CONTROLS: W32 = 0x4002;
    /// Exceptions that exit, a bit per vector.
    EXCEPTION_BITMAP: W32 = 0x4004;
    /// Page-fault error-code mask.
    PAGE_FAULT_ERROR_CODE_MASK: W32 = 0x4006;
    /// Page-fault error-code match.
    PAGE_FAULT_ERROR_CODE_MATCH: W32 = 0x4008;
    /// Number of CR3 values that load without an exit.
    CR3_TARGET_COUNT: W32 = 0x400a;
    /// VM-exit controls.
    EXIT_CONTROLS: W32 = 0x400c;
    /// Number of MSRs stored at exit.
    EXIT_MSR_STORE_COUNT: W32 = 0x400e;
    /// Number of MSRs loaded at exit.
    EXIT_MSR_LOAD_COUNT: W32 = 0x4010;
    /// VM-entry controls.
    ENTRY_CONTROLS: W32 = 0x4012;
    /// Number of MSRs loaded at entry.
    ENTRY_MSR_LOAD_COUNT: W32 = 0x4014;
    /// The event to deliver at entry; bit 31 is cleared by every exit.
    ENTRY_INTERRUPTION_INFO: W32 = 0x4016;
    /// The error code of that event.
    ENTRY_EXCEPTION_ERROR_CODE: W32 = 0x4018;
    /// The instruction length of that event, where it is a software one.
    ENTRY_INSTRUCTION_LENGTH: W32 = 0x401a;
    /// The task priority below which a TPR-shadow write exits, 0..=15.
    TPR_THRESHOLD: W32 = 0x401c;
    /// Secondary processor-based VM-execution controls.
    SECONDARY_CONTROLS: W32 = 0x401e;
    /// Two PAUSEs no further apart than this, in TSC ticks, are of one loop.
    PAUSE_LOOP_GAP: W32 = 0x4020;
    /// A loop of PAUSEs that lasts longer than this, in TSC ticks, exits.
    PAUSE_LOOP_WINDOW: W32 = 0x4022;

    /// Why VMLAUNCH, VMRESUME or another VMX instruction failed.
    INSTRUCTION_ERROR: W32(ReadOnly) = 0x4400;
    /// Exit reason; bit 31: the entry failed.
    EXIT_REASON: W32(ReadOnly) = 0x4402;
    /// The exception, NMI or interrupt that caused the exit.
    EXIT_INTERRUPTION_INFO: W32(ReadOnly) = 0x4404;
    /// Its error code.
    EXIT_INTERRUPTION_ERROR_CODE: W32(ReadOnly) = 0x4406;
    /// The event whose delivery the exit interrupted.
    IDT_VECTORING_INFO: W32(ReadOnly) = 0x4408;
    /// Its error code.
    IDT_VECTORING_ERROR_CODE: W32(ReadOnly) = 0x440a;
    /// Length of the exiting instruction in bytes, where the SDM says that it is valid.
    EXIT_INSTRUCTION_LENGTH: W32(ReadOnly) = 0x440c;
    /// Operands of the exiting instruction, for some exits.
    EXIT_INSTRUCTION_INFO: W32(ReadOnly) = 0x440e;

    /// Guest ES limit in bytes.
    GUEST_ES_LIMIT: W32 = 0x4800;
    /// Guest CS limit in bytes.
    GUEST_CS_LIMIT: W32 = 0x4802;
    /// Guest SS limit in bytes.
    GUEST_SS_LIMIT: W32 = 0x4804;
    /// Guest DS limit in bytes.
    GUEST_DS_LIMIT: W32 = 0x4806;
    /// Guest FS limit in bytes.
    GUEST_FS_LIMIT: W32 = 0x4808;
    /// Guest GS limit in bytes.
    GUEST_GS_LIMIT: W32 = 0x480a;
    /// Guest LDTR limit in bytes.
    GUEST_LDTR_LIMIT: W32 = 0x480c;
    /// Guest TR limit in bytes.
    GUEST_TR_LIMIT: W32 = 0x480e;
    /// Guest GDTR limit in bytes.
    GUEST_GDTR_LIMIT: W32 = 0x4810;
    /// Guest IDTR limit in bytes.
    GUEST_IDTR_LIMIT: W32 = 0x4812;
    /// Guest ES access rights.
    GUEST_ES_ACCESS_RIGHTS: W32 = 0x4814;
    /// Guest CS access rights.
    GUEST_CS_ACCESS_RIGHTS: W32 = 0x4816;
    /// Guest SS access rights.
    GUEST_SS_ACCESS_RIGHTS: W32 = 0x4818;
    /// Guest DS access rights.
    GUEST_DS_ACCESS_RIGHTS: W32 = 0x481a;
    /// Guest FS access rights.
    GUEST_FS_ACCESS_RIGHTS: W32 = 0x481c;
    /// Guest GS access rights.
    GUEST_GS_ACCESS_RIGHTS: W32 = 0x481e;
    /// Guest LDTR access rights.
    GUEST_LDTR_ACCESS_RIGHTS: W32 = 0x4820;
    /// Guest TR access rights.
    GUEST_TR_ACCESS_RIGHTS: W32 = 0x4822;
    /// Blocking by STI, MOV SS, SMI, NMI.
    GUEST_INTERRUPTIBILITY: W32 = 0x4824;
    /// Active, HLT, shutdown or wait-for-SIPI.
    GUEST_ACTIVITY: W32 = 0x4826;
    /// Guest IA32_SYSENTER_CS.
    GUEST_SYSENTER_CS: W32 = 0x482a;
    /// What is left of the time slice, in preemption-timer counts.
    PREEMPTION_TIMER_VALUE: W32 = 0x482e;

    /// Host IA32_SYSENTER_CS.
    HOST_SYSENTER_CS: W32 = 0x4c00;

    /// CR0 bits the host owns.
    CR0_GUEST_HOST_MASK: Natural = 0x6000;
    /// CR4 bits the host owns.
    CR4_GUEST_HOST_MASK: Natural = 0x6002;
    /// What the guest reads for the CR0 bits the host owns.
    CR0_READ_SHADOW: Natural = 0x6004;
    /// What the guest reads for the CR4 bits the host owns.
    CR4_READ_SHADOW: Natural = 0x6006;

    /// Exit qualification.
    EXIT_QUALIFICATION: Natural(ReadOnly) = 0x6400;
    /// RCX as an I/O string instruction began.
    IO_RCX: Natural(ReadOnly) = 0x6402;
    /// RSI as an I/O string instruction began.
    IO_RSI: Natural(ReadOnly) = 0x6404;
    /// RDI as an I/O string instruction began.
    IO_RDI: Natural(ReadOnly) = 0x6406;
    /// RIP as an I/O string instruction began.
    IO_RIP: Natural(ReadOnly) = 0x6408;
    /// The linear address an exit is about, for some exits.
    GUEST_LINEAR_ADDRESS: Natural(ReadOnly) = 0x640a;

    /// Guest CR0.
    GUEST_CR0: Natural = 0x6800;
    /// Guest CR3: the shadow root.
    GUEST_CR3: Natural = 0x6802;
    /// Guest CR4.
    GUEST_CR4: Natural = 0x6804;
    /// Guest ES base.
    GUEST_ES_BASE: Natural = 0x6806;
    /// Guest CS base.
    GUEST_CS_BASE: Natural = 0x6808;
    /// Guest SS base.
    GUEST_SS_BASE: Natural = 0x680a;
    /// Guest DS base.
    GUEST_DS_BASE: Natural = 0x680c;
    /// Guest FS base.
    GUEST_FS_BASE: Natural = 0x680e;
    /// Guest GS base.
    GUEST_GS_BASE: Natural = 0x6810;
    /// Guest LDTR base.
    GUEST_LDTR_BASE: Natural = 0x6812;
    /// Guest TR base.
    GUEST_TR_BASE: Natural = 0x6814;
    /// Guest GDTR base.
    GUEST_GDTR_BASE: Natural = 0x6816;
    /// Guest IDTR base.
    GUEST_IDTR_BASE: Natural = 0x6818;
    /// Guest DR7.
    GUEST_DR7: Natural = 0x681a;
    /// Guest RSP.
    GUEST_RSP: Natural = 0x681c;
    /// Guest RIP.
    GUEST_RIP: Natural = 0x681e;
    /// Guest RFLAGS.
    GUEST_RFLAGS: Natural = 0x6820;
    /// Guest pending debug exceptions.
    GUEST_PENDING_DEBUG_EXCEPTIONS: Natural = 0x6822;
    /// Guest IA32_SYSENTER_ESP.
    GUEST_SYSENTER_ESP: Natural = 0x6824;
    /// Guest IA32_SYSENTER_EIP.
    GUEST_SYSENTER_EIP: Natural = 0x6826;

    /// Host CR0.
    HOST_CR0: Natural = 0x6c00;
    /// Host CR3.
    HOST_CR3: Natural = 0x6c02;
    /// Host CR4.
    HOST_CR4: Natural = 0x6c04;
    /// Host FS base.
    HOST_FS_BASE: Natural = 0x6c06;
    /// Host GS base.
    HOST_GS_BASE: Natural = 0x6c08;
    /// Host TR base.
    HOST_TR_BASE: Natural = 0x6c0a;
    /// Host GDTR base.
    HOST_GDTR_BASE: Natural = 0x6c0c;
    /// Host IDTR base.
    HOST_IDTR_BASE: Natural = 0x6c0e;
    /// Host IA32_SYSENTER_ESP.
    HOST_SYSENTER_ESP: Natural = 0x6c10;
    /// Host IA32_SYSENTER_EIP.
    HOST_SYSENTER_EIP: Natural = 0x6c12;
    /// Host RSP.
    HOST_RSP: Natural = 0x6c14;
    /// Host RIP.
    HOST_RIP: Natural = 0x6c16;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_encoding_occurs_twice() {
        for (i, a) in ALL.iter().enumerate() {
            assert!(ALL[i + 1..].iter().all(|b| b.0 != a.0), "{} has the encoding of another", a.1);
        }
    }

    #[test]
    fn exactly_the_exit_information_is_read_only() {
        for (encoding, name, access) in ALL {
            // Bits 11:10: 0 control, 1 exit information, 2 guest state, 3 host state.
            assert_eq!((encoding >> 10) & 3 == 1, *access == "ReadOnly", "{name}");
        }
    }

    #[test]
    fn the_name_says_which_state_it_belongs_to() {
        for (encoding, name, _) in ALL {
            if name.starts_with("HOST_") {
                assert_eq!((encoding >> 10) & 3, 3, "{name}");
            }
            if name.starts_with("GUEST_") && *name != "GUEST_LINEAR_ADDRESS" {
                assert_eq!((encoding >> 10) & 3, 2, "{name}");
            }
        }
    }

    #[test]
    fn names_are_found() {
        assert_eq!(name(0x681e), "GUEST_RIP");
        assert_eq!(name(0x7ffe), "(unnamed field)");
    }
}
