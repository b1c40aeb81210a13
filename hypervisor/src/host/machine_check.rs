//! Machine checks: the banks are armed at a core's start, and asked when one happens whom it concerns.

use core::fmt;

use x86_64::registers::model_specific::Msr;

const MCG_CAP: u32 = 0x179;
const MCG_STATUS: u32 = 0x17a;
const MCG_CTL: u32 = 0x17b;
/// Bank `n`'s control register; its status is the next one.
const MC0_CTL: u32 = 0x400;
const MSRS_PER_BANK: u32 = 4;

/// MCG_CAP: MCG_CTL exists.
const CTL_PRESENT: u64 = 1 << 8;
/// MCi_STATUS: there is something in it.
const VALID: u64 = 1 << 63;
/// MCi_STATUS: not corrected.
const UNCORRECTED: u64 = 1 << 61;
/// MCi_STATUS: the processor's own state is damaged.
const CONTEXT_CORRUPT: u64 = 1 << 57;

/// The worst of what the banks hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Finding {
    /// The bank's number and MCi_STATUS; `None` if no bank knows of an error.
    pub bank: Option<(u32, u64)>,
}

impl Finding {
    /// Whether the core cannot be trusted to go on, whoever ran.
    #[must_use]
    pub const fn is_fatal(self) -> bool {
        matches!(self.bank, Some((_, status)) if status & CONTEXT_CORRUPT != 0)
    }

    /// The graver one of this and what bank `number` holds.
    const fn with(self, number: u32, status: u64) -> Self {
        const GRAVITY: u64 = UNCORRECTED | CONTEXT_CORRUPT;
        let graver = match self.bank {
            None => true,
            Some((_, worst)) => status & GRAVITY > worst & GRAVITY,
        };
        if status & VALID != 0 && graver { Self { bank: Some((number, status)) } } else { self }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.bank {
            Some((bank, status)) => write!(f, "bank {bank}, status {status:#018x}"),
            None => f.write_str("no bank holds an error"),
        }
    }
}

fn read(index: u32) -> u64 {
    // SAFETY: the callers have established that the MSR exists; reading it changes nothing.
    unsafe { Msr::new(index).read() }
}

fn write(index: u32, value: u64) {
    // SAFETY: the callers have established that the MSR exists; these decide what is reported, and touch no memory.
    unsafe { Msr::new(index).write(value) }
}

/// MCG_CAP, where the processor has the machine-check architecture.
fn capabilities() -> Option<u64> {
    let info = raw_cpuid::CpuId::new().get_feature_info()?;
    (info.has_mce() && info.has_mca()).then(|| read(MCG_CAP))
}

const fn banks(capabilities: u64) -> u32 {
    (capabilities & 0xff) as u32
}

/// Arms this core's banks and forgets what they held (SDM Vol. 3, "Machine-Check Initialization").
pub fn arm() {
    let Some(capabilities) = capabilities() else { return };
    if capabilities & CTL_PRESENT != 0 {
        write(MCG_CTL, u64::MAX);
    }
    for bank in 0..banks(capabilities) {
        let control = MC0_CTL + bank * MSRS_PER_BANK;
        // Bank 0's control is the platform's on the older processors of family 6.
        if bank != 0 {
            write(control, u64::MAX);
        }
        write(control + 1, 0);
    }
}

/// Looks through this core's banks, after a machine check, and clears them and "machine check in progress": another
/// one before that is a shutdown.
pub fn examine() -> Finding {
    let mut finding = Finding::default();
    let Some(capabilities) = capabilities() else { return finding };
    for bank in 0..banks(capabilities) {
        let status = MC0_CTL + bank * MSRS_PER_BANK + 1;
        finding = finding.with(bank, read(status));
        write(status, 0);
    }
    write(MCG_STATUS, 0);
    finding
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gravest_bank_is_told() {
        let none = Finding::default();
        assert_eq!(none.with(0, UNCORRECTED | CONTEXT_CORRUPT), none);
        assert!(!none.is_fatal());
        let corrected = none.with(1, VALID);
        let uncorrected = corrected.with(2, VALID | UNCORRECTED | 5);
        assert_eq!(uncorrected.bank, Some((2, VALID | UNCORRECTED | 5)));
        assert_eq!(uncorrected.with(3, VALID), uncorrected);
        let both = VALID | UNCORRECTED | CONTEXT_CORRUPT;
        assert!(!uncorrected.is_fatal() && uncorrected.with(4, both).is_fatal());
    }
}
