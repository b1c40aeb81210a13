//! Turning guest nanoseconds into ticks of a device's oscillator and back, without a division.

/// Nanoseconds in a second.
pub const NS_PER_S: u64 = 1_000_000_000;

/// No deadline: later than any time a guest can reach (584 years).
pub const NEVER: u64 = u64::MAX;

/// The shortest time between two interrupts of a periodic timer, in nanoseconds. A guest may program periods
/// far below what an exit costs; its timer then skips beats instead of keeping a core busy with nothing else.
pub const PERIOD_NS_MIN: u64 = 50_000;

/// The frequency of an oscillator that has run since guest time 0.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    /// Ticks in a nanosecond, in units of 2^-64, rounded up: whole seconds then give whole ticks.
    ticks_per_ns: u64,
    /// Whole nanoseconds in a tick.
    ns_per_tick: u64,
    /// The rest of a tick, in units of 2^-64 ns, rounded down.
    ns_per_tick_fraction: u64,
}

impl Rate {
    /// An oscillator of `hz` ticks a second, 1..1_000_000_000.
    ///
    /// # Panics
    /// If `hz` is out of range: our own error, meant to be met at compile time.
    #[must_use]
    pub const fn new(hz: u64) -> Self {
        assert!(hz > 0 && hz < NS_PER_S);
        let fraction = (((NS_PER_S % hz) as u128) << 64) / hz as u128;
        Self {
            ticks_per_ns: (((hz as u128) << 64).div_ceil(NS_PER_S as u128)) as u64,
            ns_per_tick: NS_PER_S / hz,
            ns_per_tick_fraction: fraction as u64,
        }
    }

    /// Ticks since guest time 0.
    #[must_use]
    pub const fn ticks(self, ns: u64) -> u64 {
        ((ns as u128 * self.ticks_per_ns as u128) >> 64) as u64
    }

    /// The first nanosecond at which [`Self::ticks`] has reached `ticks`; [`NEVER`] if beyond range.
    #[must_use]
    pub const fn ns_at(self, ticks: u64) -> u64 {
        let Some(whole) = ticks.checked_mul(self.ns_per_tick) else { return NEVER };
        let fraction = ((ticks as u128 * self.ns_per_tick_fraction as u128) >> 64) as u64;
        let Some(mut ns) = whole.checked_add(fraction) else { return NEVER };
        // Both roundings together are less than three nanoseconds.
        while self.ticks(ns) < ticks && ns < NEVER {
            ns += 1;
        }
        while ns > 0 && self.ticks(ns - 1) >= ticks {
            ns -= 1;
        }
        ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn whole_seconds_are_whole_ticks() {
        let pit = Rate::new(1_193_182);
        assert_eq!(pit.ticks(NS_PER_S), 1_193_182);
        assert_eq!(pit.ticks(3600 * NS_PER_S), 3600 * 1_193_182);
        assert_eq!(pit.ns_at(1_193_182), NS_PER_S);
    }

    proptest! {
        #[test]
        fn inverse(hz in prop::sample::select(vec![32_768u64, 1_193_182, 3_579_545, 999_999_999]),
                   ticks in 0u64..1 << 44) {
            let rate = Rate::new(hz);
            let ns = rate.ns_at(ticks);
            prop_assert!(rate.ticks(ns) >= ticks);
            prop_assert!(ns == 0 || rate.ticks(ns - 1) < ticks);
        }

        #[test]
        fn any_input(ns: u64, ticks: u64) {
            let rate = Rate::new(1_193_182);
            let _ = rate.ticks(ns);
            let _ = rate.ns_at(ticks);
        }
    }
}
