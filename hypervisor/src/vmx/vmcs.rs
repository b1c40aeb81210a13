//! VMXON and VMCS regions, and the VMX instructions, each in one `asm!` with the flags it leaves.
//!
//! SDM Vol. 3, Section 31.2 "Conventions": a VMX instruction that fails sets CF (no current VMCS) or ZF (with the
//! reason in the current VMCS). The flags are taken inside the same `asm!`: between two of them the compiler may
//! put anything.

use core::arch::asm;
use core::fmt;
use core::marker::PhantomData;

use memory::Hpa;

use super::fields::{self, Field, ReadWrite, Width};

/// A page that becomes a VMXON region or a VMCS. It must be reachable at its physical address by the processor
/// alone as soon as it is in use: nothing reads or writes it but VMX instructions.
#[repr(C, align(4096))]
#[derive(Debug)]
pub struct Region([u8; 4096]);

impl Region {
    /// Zeroes the page and writes the revision identifier, with bit 31 clear: an ordinary VMCS, no shadow VMCS.
    pub fn prepare(&mut self, revision: u32) {
        self.0.fill(0);
        self.0[..4].copy_from_slice(&(revision & 0x7fff_ffff).to_le_bytes());
    }
}

/// Why a VMX instruction failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmxError {
    /// VMfailInvalid: there is no current VMCS (or, for VMXON, the region is not acceptable).
    FailInvalid,
    /// VMfailValid, with the reason from the current VMCS.
    FailValid(InstructionError),
}

impl fmt::Display for VmxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FailInvalid => f.write_str("VMfailInvalid: no current VMCS, or its region is bad"),
            Self::FailValid(error) => write!(f, "VMfailValid: {error}"),
        }
    }
}

/// The VM-instruction error number (SDM Vol. 3, Section 31.4 "VM Instruction Error Numbers").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InstructionError(pub u32);

impl InstructionError {
    /// What the SDM says of it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self.0 {
            1 => "VMCALL executed in VMX root operation",
            2 => "VMCLEAR with invalid physical address",
            3 => "VMCLEAR with VMXON pointer",
            4 => "VMLAUNCH with non-clear VMCS",
            5 => "VMRESUME with non-launched VMCS",
            6 => "VMRESUME after VMXOFF",
            7 => "VM entry with invalid control field(s)",
            8 => "VM entry with invalid host-state field(s)",
            9 => "VMPTRLD with invalid physical address",
            10 => "VMPTRLD with VMXON pointer",
            11 => "VMPTRLD with incorrect VMCS revision identifier",
            12 => "VMREAD/VMWRITE from/to unsupported VMCS component",
            13 => "VMWRITE to read-only VMCS component",
            15 => "VMXON executed in VMX root operation",
            16 => "VM entry with invalid executive-VMCS pointer",
            17 => "VM entry with non-launched executive VMCS",
            18 => "VM entry with executive-VMCS pointer not VMXON pointer",
            19 => "VMCALL with non-clear VMCS",
            20 => "VMCALL with invalid VM-exit control fields",
            22 => "VMCALL with incorrect MSEG revision identifier",
            23 => "VMXOFF under dual-monitor treatment of SMIs and SMM",
            24 => "VMCALL with invalid SMM-monitor features",
            25 => "VM entry with invalid VM-execution control fields in executive VMCS",
            26 => "VM entry with events blocked by MOV SS",
            28 => "invalid operand to INVEPT/INVVPID",
            _ => "unknown error number",
        }
    }
}

impl fmt::Display for InstructionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (error {})", self.name(), self.0)
    }
}

/// Turns the flags of a VMX instruction into its outcome.
fn outcome(carry: u8, zero: u8) -> Result<(), VmxError> {
    match (carry, zero) {
        (0, 0) => Ok(()),
        (0, _) => Err(VmxError::FailValid(InstructionError(last_error()))),
        _ => Err(VmxError::FailInvalid),
    }
}

/// The VM-instruction error field. Valid after VMfailValid only.
pub(super) fn last_error() -> u32 {
    // VMfailValid says that there is a current VMCS, and this field exists in each.
    raw_read(fields::INSTRUCTION_ERROR.encoding()).2 as u32
}

/// VMREAD: (CF, ZF, value).
#[inline(always)]
fn raw_read(encoding: u32) -> (u8, u8, u64) {
    let value: u64;
    let (carry, zero): (u8, u8);
    // SAFETY: VMREAD into a register touches no memory. Outside VMX root operation it is a #UD, which is reported
    // as our bug; the two callers hold a `CurrentVmcs` or have just seen an instruction fail on one.
    unsafe {
        asm!(
            "vmread {value}, {encoding}",
            "setc {carry}",
            "setz {zero}",
            encoding = in(reg) u64::from(encoding),
            value = out(reg) value,
            carry = out(reg_byte) carry,
            zero = out(reg_byte) zero,
            options(nostack),
        );
    }
    (carry, zero, value)
}

macro_rules! on_region {
    ($(#[$doc:meta])* $name:ident, $instruction:literal) => {
        $(#[$doc])*
        unsafe fn $name(region: Hpa) -> Result<(), VmxError> {
            let (carry, zero): (u8, u8);
            // SAFETY: the caller's, see above: the region is a prepared page that only VMX instructions use.
            unsafe {
                asm!(
                    concat!($instruction, " [{address}]"),
                    "setc {carry}",
                    "setz {zero}",
                    address = in(reg) &raw const region.0,
                    carry = out(reg_byte) carry,
                    zero = out(reg_byte) zero,
                    options(nostack),
                );
            }
            outcome(carry, zero)
        }
    };
}

on_region! {
    /// VMXON.
    ///
    /// # Safety
    /// `region` is a page made by [`Region::prepare`] that nothing else uses until VMXOFF; CR0 and CR4 hold their
    /// fixed bits.
    raw_vmxon, "vmxon"
}
on_region! {
    /// VMCLEAR.
    ///
    /// # Safety
    /// `region` is a page made by [`Region::prepare`] that no other core has loaded.
    raw_vmclear, "vmclear"
}
on_region! {
    /// VMPTRLD.
    ///
    /// # Safety
    /// As for VMCLEAR, and VMCLEAR was done once.
    raw_vmptrld, "vmptrld"
}

/// Enters VMX root operation.
///
/// # Errors
/// [`VmxError::FailInvalid`]: the region is not a page of the right revision.
///
/// # Safety
/// `region` is a page made by [`Region::prepare`] that nothing else touches until VMXOFF, and
/// [`super::enable`] has set up CR0, CR4 and IA32_FEATURE_CONTROL.
pub unsafe fn vmxon(region: Hpa) -> Result<(), VmxError> {
    // SAFETY: the caller's.
    unsafe { raw_vmxon(region) }
}

/// Leaves VMX operation.
///
/// # Safety
/// Every VMCS this core has loaded was cleared, and nobody will use a [`CurrentVmcs`] of this core any more.
pub unsafe fn vmxoff() {
    // SAFETY: the caller's.
    unsafe { asm!("vmxoff", options(nostack)) };
}

/// One VMCS: a page that was prepared and cleared.
#[derive(Debug)]
pub struct Vmcs {
    region: Hpa,
}

impl Vmcs {
    /// Takes a prepared page as a VMCS and clears it.
    ///
    /// # Errors
    /// The processor refused the page.
    ///
    /// # Safety
    /// This core is in VMX root operation; `region` is a page made by [`Region::prepare`], not the VMXON region,
    /// and belongs to the returned value until it is cleared for the last time.
    pub unsafe fn new(region: Hpa) -> Result<Self, VmxError> {
        // SAFETY: the caller's.
        unsafe { raw_vmclear(region) }?;
        Ok(Self { region })
    }

    /// The page's address.
    #[must_use]
    pub const fn region(&self) -> Hpa {
        self.region
    }

    /// Makes this VMCS the core's current one.
    ///
    /// # Errors
    /// The processor refused the page: it was overwritten.
    ///
    /// # Safety
    /// This core is in VMX root operation, no other core has this VMCS loaded, and the [`CurrentVmcs`] of the VMCS
    /// that was current before is used no more.
    pub unsafe fn load(&self) -> Result<CurrentVmcs, VmxError> {
        // SAFETY: the caller's.
        unsafe { raw_vmptrld(self.region) }?;
        Ok(CurrentVmcs(PhantomData))
    }

    /// Writes the VMCS back to its page, so that another core can load it or the page be freed. The next entry
    /// must be a VMLAUNCH: see [`super::entry::Entry::cleared`].
    ///
    /// # Errors
    /// The processor refused the page.
    ///
    /// # Safety
    /// This core is in VMX root operation, no other core has this VMCS loaded, and its [`CurrentVmcs`] is used
    /// no more.
    pub unsafe fn clear(&self) -> Result<(), VmxError> {
        // SAFETY: the caller's.
        unsafe { raw_vmclear(self.region) }
    }
}

/// The VMCS that is current on this core. It stays on this core (not `Send`).
///
/// Writing a field harms nothing by itself; what the fields say together takes effect in
/// [`super::entry::Entry::enter`], which is where the unsafety lies.
#[derive(Debug)]
pub struct CurrentVmcs(PhantomData<*const ()>);

impl CurrentVmcs {
    /// Reads a field. Release builds check nothing: a field that exists cannot fail to be read.
    #[inline(always)]
    #[must_use]
    pub fn read<W: Width, A>(&self, field: Field<W, A>) -> W::Value {
        if cfg!(debug_assertions) {
            let (carry, zero, value) = raw_read(field.encoding());
            if carry | zero != 0 {
                failed("VMREAD", field.encoding());
            }
            return W::from_raw(value);
        }
        let value: u64;
        // SAFETY: as in `raw_read`; `self` shows that there is a current VMCS.
        unsafe {
            asm!(
                "vmread {value}, {encoding}",
                encoding = in(reg) u64::from(field.encoding()),
                value = out(reg) value,
                options(nostack),
            );
        }
        W::from_raw(value)
    }

    /// Writes a field. A failure is our bug and panics: the check is one jump that is not taken.
    #[inline(always)]
    pub fn write<W: Width>(&self, field: Field<W, ReadWrite>, value: W::Value) {
        // SAFETY: VMWRITE changes the VMCS's page only, which nothing else uses; `self` shows that there is one.
        unsafe {
            asm!(
                "vmwrite {encoding}, {value}",
                "jbe {fail}",
                encoding = in(reg) u64::from(field.encoding()),
                value = in(reg) W::to_raw(value),
                fail = label { failed("VMWRITE", field.encoding()) },
                options(nostack),
            );
        }
    }

    /// Reads a field that this processor may not have.
    ///
    /// # Errors
    /// The field does not exist (error 12).
    pub fn try_read<W: Width, A>(&self, field: Field<W, A>) -> Result<W::Value, VmxError> {
        let (carry, zero, value) = raw_read(field.encoding());
        outcome(carry, zero)?;
        Ok(W::from_raw(value))
    }

    /// Writes a field that this processor may not have.
    ///
    /// # Errors
    /// The field does not exist (error 12) or cannot be written (error 13).
    pub fn try_write<W: Width>(&self, field: Field<W, ReadWrite>, value: W::Value) -> Result<(), VmxError> {
        let (carry, zero): (u8, u8);
        // SAFETY: as in `write`.
        unsafe {
            asm!(
                "vmwrite {encoding}, {value}",
                "setc {carry}",
                "setz {zero}",
                encoding = in(reg) u64::from(field.encoding()),
                value = in(reg) W::to_raw(value),
                carry = out(reg_byte) carry,
                zero = out(reg_byte) zero,
                options(nostack),
            );
        }
        outcome(carry, zero)
    }
}

#[cold]
#[inline(never)]
fn failed(instruction: &str, encoding: u32) -> ! {
    panic!(
        "{instruction} of VMCS field {encoding:#06x} ({}) failed: no such field on this processor",
        fields::name(encoding)
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prepared_region_holds_the_revision_with_bit_31_clear() {
        let mut region = std::boxed::Box::new(Region([0xaa; 4096]));
        region.prepare(0x8000_0012);
        assert_eq!(region.0[..4], [0x12, 0, 0, 0]);
        assert!(region.0[4..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn outcomes_by_flags() {
        assert_eq!(outcome(0, 0), Ok(()));
        assert_eq!(outcome(1, 0), Err(VmxError::FailInvalid));
    }

    #[test]
    fn errors_are_told_by_name_and_number() {
        let error = VmxError::FailValid(InstructionError(7));
        assert_eq!(std::format!("{error}"), "VMfailValid: VM entry with invalid control field(s) (error 7)");
    }
}
