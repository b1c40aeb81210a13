//! Integer arithmetic with the flags that it leaves (SDM Vol. 1 "EFLAGS Register"; Vol. 2, each instruction).

use super::instruction::AluOperation;
use crate::cpu::registers::Width;

/// Carry.
pub(super) const CF: u64 = 1 << 0;
/// Parity of the low byte.
pub(super) const PF: u64 = 1 << 2;
/// Carry out of bit 3.
pub(super) const AF: u64 = 1 << 4;
/// Zero.
pub(super) const ZF: u64 = 1 << 6;
/// Sign.
pub(super) const SF: u64 = 1 << 7;
/// Overflow.
pub(super) const OF: u64 = 1 << 11;
/// The six status flags.
pub(super) const STATUS: u64 = CF | PF | AF | ZF | SF | OF;

/// A result cut to its width, and the status flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Computed {
    pub(super) value: u64,
    pub(super) flags: u64,
}

fn result_flags(width: Width, value: u64) -> u64 {
    let parity = if (value as u8).count_ones().is_multiple_of(2) { PF } else { 0 };
    let zero = if value == 0 { ZF } else { 0 };
    let sign = if value & width.sign_bit() != 0 { SF } else { 0 };
    parity | zero | sign
}

fn flag(condition: bool, flag: u64) -> u64 {
    if condition { flag } else { 0 }
}

pub(super) fn add(width: Width, a: u64, b: u64, carry: bool) -> Computed {
    let (a, b) = (a & width.mask(), b & width.mask());
    let wide = u128::from(a) + u128::from(b) + u128::from(carry);
    let value = wide as u64 & width.mask();
    let flags = result_flags(width, value)
        | flag(wide > u128::from(width.mask()), CF)
        | flag((a ^ b ^ value) & 0x10 != 0, AF)
        | flag((a ^ value) & (b ^ value) & width.sign_bit() != 0, OF);
    Computed { value, flags }
}

pub(super) fn subtract(width: Width, a: u64, b: u64, borrow: bool) -> Computed {
    let (a, b) = (a & width.mask(), b & width.mask());
    let value = a.wrapping_sub(b).wrapping_sub(u64::from(borrow)) & width.mask();
    let flags = result_flags(width, value)
        | flag(u128::from(a) < u128::from(b) + u128::from(borrow), CF)
        | flag((a ^ b ^ value) & 0x10 != 0, AF)
        | flag((a ^ b) & (a ^ value) & width.sign_bit() != 0, OF);
    Computed { value, flags }
}

/// AF is undefined after logic; it is cleared, as processors do.
pub(super) fn logic(width: Width, value: u64) -> Computed {
    let value = value & width.mask();
    Computed { value, flags: result_flags(width, value) }
}

pub(super) fn compute(operation: AluOperation, width: Width, a: u64, b: u64, carry: bool) -> Computed {
    match operation {
        AluOperation::Add => add(width, a, b, false),
        AluOperation::Adc => add(width, a, b, carry),
        AluOperation::Sub | AluOperation::Cmp => subtract(width, a, b, false),
        AluOperation::Sbb => subtract(width, a, b, carry),
        AluOperation::And => logic(width, a & b),
        AluOperation::Or => logic(width, a | b),
        AluOperation::Xor => logic(width, a ^ b),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All pairs of bytes against a definition by wider signed and unsigned arithmetic.
    #[test]
    fn bytes_exhaustively() {
        for a in 0..=255u64 {
            for b in 0..=255u64 {
                for carry in [false, true] {
                    let c = u64::from(carry);
                    let sum = add(Width::Byte, a, b, carry);
                    assert_eq!(sum.value, (a + b + c) & 0xff);
                    assert_eq!(sum.flags & CF != 0, a + b + c > 255);
                    assert_eq!(sum.flags & AF != 0, (a & 15) + (b & 15) + c > 15);
                    let signed = i64::from(a as u8 as i8) + i64::from(b as u8 as i8) + c as i64;
                    assert_eq!(sum.flags & OF != 0, !(-128..=127).contains(&signed));
                    let difference = subtract(Width::Byte, a, b, carry);
                    assert_eq!(difference.value, a.wrapping_sub(b + c) & 0xff);
                    assert_eq!(difference.flags & CF != 0, a < b + c);
                    assert_eq!(difference.flags & AF != 0, (a & 15) < (b & 15) + c);
                    let signed = i64::from(a as u8 as i8) - i64::from(b as u8 as i8) - c as i64;
                    assert_eq!(difference.flags & OF != 0, !(-128..=127).contains(&signed));
                    assert_eq!(difference.flags & ZF != 0, difference.value == 0);
                    assert_eq!(difference.flags & SF != 0, difference.value >= 128);
                }
            }
        }
    }

    #[test]
    fn wide_edges() {
        let sum = add(Width::Qword, u64::MAX, 0, true);
        assert_eq!((sum.value, sum.flags), (0, CF | PF | AF | ZF));
        let difference = subtract(Width::Qword, 0, u64::MAX, true);
        assert_eq!((difference.value, difference.flags & CF), (0, CF));
        assert_eq!(logic(Width::Dword, 0x1_0000_0000).flags, PF | ZF);
    }
}
