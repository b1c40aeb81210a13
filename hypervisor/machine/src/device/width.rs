//! How wide an access to a port or a register is.

/// The width of one access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Width {
    /// One byte.
    Byte = 1,
    /// Two bytes.
    Word = 2,
    /// Four bytes.
    Dword = 4,
    /// Eight bytes (memory only; no port access is so wide).
    Qword = 8,
}

impl Width {
    /// The width of `bytes` bytes, if there is one.
    #[must_use]
    pub const fn from_bytes(bytes: u64) -> Option<Self> {
        match bytes {
            1 => Some(Self::Byte),
            2 => Some(Self::Word),
            4 => Some(Self::Dword),
            8 => Some(Self::Qword),
            _ => None,
        }
    }

    /// Bytes, 1..=8.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self as u64
    }

    /// All ones in this width: what a bus answers where nobody listens.
    #[must_use]
    pub const fn ones(self) -> u64 {
        u64::MAX >> (64 - 8 * self as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ones() {
        assert_eq!(Width::Byte.ones(), 0xff);
        assert_eq!(Width::Dword.ones(), 0xffff_ffff);
        assert_eq!(Width::Qword.ones(), u64::MAX);
        assert_eq!(Width::from_bytes(2), Some(Width::Word));
        assert_eq!(Width::from_bytes(3), None);
    }
}
