//! Names and widths of the guest's general-purpose and segment registers.

/// A general-purpose register, numbered as instructions and exit qualifications number it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)] // the architecture's own names
pub enum Gpr {
    Rax,
    Rcx,
    Rdx,
    Rbx,
    Rsp,
    Rbp,
    Rsi,
    Rdi,
    R8,
    R9,
    R10,
    R11,
    R12,
    R13,
    R14,
    R15,
}

impl Gpr {
    /// All sixteen, by number.
    pub const ALL: [Self; 16] = [
        Self::Rax,
        Self::Rcx,
        Self::Rdx,
        Self::Rbx,
        Self::Rsp,
        Self::Rbp,
        Self::Rsi,
        Self::Rdi,
        Self::R8,
        Self::R9,
        Self::R10,
        Self::R11,
        Self::R12,
        Self::R13,
        Self::R14,
        Self::R15,
    ];

    /// The register with this number; only the low four bits count.
    #[must_use]
    #[inline]
    pub const fn from_number(number: u8) -> Self {
        Self::ALL[(number & 15) as usize]
    }

    /// 0..16.
    #[must_use]
    #[inline]
    pub const fn number(self) -> usize {
        self as usize
    }
}

/// A segment register, numbered as instructions and the VM-exit instruction information number it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)] // the architecture's own names
pub enum SegmentName {
    Es,
    Cs,
    Ss,
    Ds,
    Fs,
    Gs,
}

impl SegmentName {
    /// All six, by number.
    pub const ALL: [Self; 6] = [Self::Es, Self::Cs, Self::Ss, Self::Ds, Self::Fs, Self::Gs];

    /// The segment with this number; none for 6 and above.
    #[must_use]
    pub const fn from_number(number: u8) -> Option<Self> {
        if number < 6 { Some(Self::ALL[number as usize]) } else { None }
    }
}

/// The hidden part of a segment register, as the VMCS holds it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SegmentState {
    /// Visible selector.
    pub selector: u16,
    /// Linear address of offset 0.
    pub base: u64,
    /// Last valid offset, in bytes.
    pub limit: u32,
    /// Access rights in the VMCS format (SDM Vol. 3 "Guest Register State"): type 3:0, S 4, DPL 6:5, P 7,
    /// L 13, D/B 14, G 15, unusable 16.
    pub rights: u32,
}

impl SegmentState {
    /// A flat, present, writable data segment of 4 GiB.
    pub const FLAT: Self = Self { selector: 0, base: 0, limit: u32::MAX, rights: 0xc093 };

    /// Loaded with a null selector: any use faults outside 64-bit mode.
    #[must_use]
    pub const fn unusable(&self) -> bool {
        self.rights & 1 << 16 != 0
    }
    /// Holds code (type bit 3), so that writes fault.
    #[must_use]
    pub const fn is_code(&self) -> bool {
        self.rights & 1 << 3 != 0
    }
    /// May be written: a data segment with the W bit.
    #[must_use]
    pub const fn writable(&self) -> bool {
        !self.is_code() && self.rights & 1 << 1 != 0
    }
    /// May be read: data, or code with the R bit.
    #[must_use]
    pub const fn readable(&self) -> bool {
        !self.is_code() || self.rights & 1 << 1 != 0
    }
    /// A data segment whose valid offsets lie above the limit.
    #[must_use]
    pub const fn expands_down(&self) -> bool {
        !self.is_code() && self.rights & 1 << 2 != 0
    }
    /// The L bit: 64-bit code while the processor is in IA-32e mode.
    #[must_use]
    pub const fn long(&self) -> bool {
        self.rights & 1 << 13 != 0
    }
    /// The D/B bit: 32-bit operands and addresses by default.
    #[must_use]
    pub const fn big(&self) -> bool {
        self.rights & 1 << 14 != 0
    }
}

/// Default size of the code a processor runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodeSize {
    /// Real mode, virtual-8086 mode and 16-bit segments.
    Bits16,
    /// 32-bit segments, compatibility mode included.
    Bits32,
    /// 64-bit mode.
    Bits64,
}

impl CodeSize {
    /// From EFER.LMA and CS.
    #[must_use]
    #[inline]
    pub const fn of(long_mode_active: bool, cs: &SegmentState) -> Self {
        if long_mode_active && cs.long() {
            Self::Bits64
        } else if cs.big() {
            Self::Bits32
        } else {
            Self::Bits16
        }
    }

    /// 16, 32 or 64.
    #[must_use]
    pub const fn bits(self) -> u32 {
        match self {
            Self::Bits16 => 16,
            Self::Bits32 => 32,
            Self::Bits64 => 64,
        }
    }
}

/// Size of an integer access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Width {
    /// 1 byte.
    Byte,
    /// 2 bytes.
    Word,
    /// 4 bytes.
    Dword,
    /// 8 bytes.
    Qword,
}

impl Width {
    /// 1, 2, 4 or 8.
    #[must_use]
    #[inline]
    pub const fn bytes(self) -> usize {
        1 << self as usize
    }
    /// 8, 16, 32 or 64.
    #[must_use]
    #[inline]
    pub const fn bits(self) -> u32 {
        8 << self as u32
    }
    /// All ones in this width.
    #[must_use]
    #[inline]
    pub const fn mask(self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }
    /// The top bit of this width.
    #[must_use]
    #[inline]
    pub const fn sign_bit(self) -> u64 {
        1 << (self.bits() - 1)
    }
    /// `value` cut to this width and sign-extended to 64 bits.
    #[must_use]
    #[inline]
    pub const fn sign_extend(self, value: u64) -> u64 {
        let shift = 64 - self.bits();
        (((value << shift) as i64) >> shift) as u64
    }
    /// The width of so many bytes.
    #[must_use]
    pub const fn from_bytes(bytes: usize) -> Option<Self> {
        match bytes {
            1 => Some(Self::Byte),
            2 => Some(Self::Word),
            4 => Some(Self::Dword),
            8 => Some(Self::Qword),
            _ => None,
        }
    }
}

impl From<Width> for crate::device::Width {
    #[inline]
    fn from(width: Width) -> Self {
        match width {
            Width::Byte => Self::Byte,
            Width::Word => Self::Word,
            Width::Dword => Self::Dword,
            Width::Qword => Self::Qword,
        }
    }
}

/// Whether bits 63:47 of `address` are all equal, as 4-level paging demands of linear addresses.
#[must_use]
#[inline]
pub const fn canonical(address: u64) -> bool {
    ((address << 16) as i64 >> 16) as u64 == address
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths() {
        assert_eq!(Width::Byte.mask(), 0xff);
        assert_eq!(Width::Qword.mask(), u64::MAX);
        assert_eq!(Width::Word.sign_extend(0x1_8000), 0xffff_ffff_ffff_8000);
        assert_eq!(Width::from_bytes(4), Some(Width::Dword));
        assert_eq!(Width::from_bytes(3), None);
    }

    #[test]
    fn canonical_addresses() {
        assert!(canonical(0x7fff_ffff_ffff));
        assert!(!canonical(0x8000_0000_0000));
        assert!(!canonical(0xffff_7fff_ffff_ffff));
        assert!(canonical(0xffff_8000_0000_0000));
    }

    #[test]
    fn numbers() {
        for (number, register) in Gpr::ALL.iter().enumerate() {
            assert_eq!(register.number(), number);
        }
        assert_eq!(SegmentName::from_number(5), Some(SegmentName::Gs));
        assert_eq!(SegmentName::from_number(6), None);
    }
}
