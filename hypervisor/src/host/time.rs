//! Time from the TSC: calibrated once against the PIT or the ACPI timer, converted by multiply and shift.

use core::sync::atomic::{AtomicU64, Ordering};

use super::legacy;

/// How long the calibration looks at the reference clock.
const WINDOW_NS: u64 = 10_000_000;

/// The conversion between TSC ticks and nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scale {
    /// Nanoseconds per tick, times 2^32.
    ns_per_tick: u64,
    /// Ticks per nanosecond, times 2^32.
    ticks_per_ns: u64,
}

impl Scale {
    /// For a TSC of `hz` ticks a second (1 MHz to 4 GHz and far above: 1,000,000..=10^12).
    #[must_use]
    pub const fn new(hz: u64) -> Self {
        Self {
            ns_per_tick: (((1_000_000_000u128 << 32) + (hz / 2) as u128) / hz as u128) as u64,
            ticks_per_ns: ((((hz as u128) << 32) + 500_000_000) / 1_000_000_000) as u64,
        }
    }

    /// Ticks to nanoseconds; wraps after 584 years.
    #[inline]
    #[must_use]
    pub const fn ns(self, ticks: u64) -> u64 {
        ((ticks as u128 * self.ns_per_tick as u128) >> 32) as u64
    }

    /// Nanoseconds to ticks; saturates.
    #[inline]
    #[must_use]
    pub const fn ticks(self, ns: u64) -> u64 {
        let ticks = (ns as u128 * self.ticks_per_ns as u128) >> 32;
        if ticks > u64::MAX as u128 { u64::MAX } else { ticks as u64 }
    }
}

static HZ: AtomicU64 = AtomicU64::new(0);
static NS_PER_TICK: AtomicU64 = AtomicU64::new(0);
static TICKS_PER_NS: AtomicU64 = AtomicU64::new(0);
static START: AtomicU64 = AtomicU64::new(0);

/// The time stamp counter, now. Not ordered against other instructions.
#[inline]
#[must_use]
pub fn tsc() -> u64 {
    // SAFETY: RDTSC reads a counter and changes nothing else.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Whether [`calibrate`] is done.
#[must_use]
pub fn is_calibrated() -> bool {
    HZ.load(Ordering::Relaxed) != 0
}

/// TSC ticks a second; 0 before [`calibrate`].
#[must_use]
pub fn tsc_hz() -> u64 {
    HZ.load(Ordering::Relaxed)
}

/// The conversion in use; zero before [`calibrate`].
#[inline]
#[must_use]
pub fn scale() -> Scale {
    Scale {
        ns_per_tick: NS_PER_TICK.load(Ordering::Relaxed),
        ticks_per_ns: TICKS_PER_NS.load(Ordering::Relaxed),
    }
}

/// TSC ticks to nanoseconds.
#[inline]
#[must_use]
pub fn ticks_to_ns(ticks: u64) -> u64 {
    scale().ns(ticks)
}

/// Nanoseconds to TSC ticks.
#[inline]
#[must_use]
pub fn ns_to_ticks(ns: u64) -> u64 {
    scale().ticks(ns)
}

/// Nanoseconds since [`mark_start`].
#[inline]
#[must_use]
pub fn now_ns() -> u64 {
    ticks_to_ns(tsc().wrapping_sub(START.load(Ordering::Relaxed)))
}

/// Makes now the zero of [`now_ns`].
pub fn mark_start() {
    START.store(tsc(), Ordering::Relaxed);
}

/// Spins for at least `ns` nanoseconds.
pub fn busy_wait_ns(ns: u64) {
    let start = tsc();
    let ticks = ns_to_ticks(ns);
    while tsc().wrapping_sub(start) < ticks {
        core::hint::spin_loop();
    }
}

/// What the processor says of its TSC (CPUID 15h, else 16h), in Hz. Emulators repeat the model's real value here
/// whatever their speed.
fn nominal_hz() -> Option<u64> {
    let cpuid = raw_cpuid::CpuId::new();
    let exact = cpuid.get_tsc_info().and_then(|info| info.tsc_frequency());
    exact.or_else(|| {
        let base = cpuid.get_processor_frequency_info()?.processor_base_frequency();
        (base != 0).then(|| u64::from(base) * 1_000_000)
    })
}

/// Chooses between a measured and a stated frequency: the stated one is exact, but only believed if the
/// measurement agrees to 0.5 %.
fn believe(measured: u64, stated: Option<u64>) -> u64 {
    match stated {
        Some(stated) if stated.abs_diff(measured) <= measured / 200 => stated,
        _ => measured,
    }
}

/// Where the frequency came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Measured against PIT channel 2.
    Pit,
    /// Measured against the ACPI power management timer.
    AcpiTimer,
    /// No clock to measure with: taken from CPUID, unchecked.
    Cpuid,
}

/// Finds the TSC's frequency. `acpi_timer` is the PM timer's I/O port, if the machine has one.
/// `None` if nothing tells the time here.
pub fn calibrate(acpi_timer: Option<u16>) -> Option<(u64, Source)> {
    let stated = nominal_hz();
    let measured = legacy::measure_with_pit(WINDOW_NS)
        .map(|hz| (believe(hz, stated), Source::Pit))
        .or_else(|| {
            let hz = legacy::measure_with_acpi_timer(acpi_timer?, WINDOW_NS)?;
            Some((believe(hz, stated), Source::AcpiTimer))
        })
        .or_else(|| stated.map(|hz| (hz, Source::Cpuid)));
    let (hz, source) = measured.filter(|&(hz, _)| hz >= 1_000_000)?;
    let scale = Scale::new(hz);
    NS_PER_TICK.store(scale.ns_per_tick, Ordering::Relaxed);
    TICKS_PER_NS.store(scale.ticks_per_ns, Ordering::Relaxed);
    HZ.store(hz, Ordering::Relaxed);
    Some((hz, source))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversions_are_exact_to_a_millionth_percent() {
        for hz in [1_000_000, 4_000_000, 100_000_000, 2_112_000_000, 3_500_000_000, 5_300_000_001] {
            let scale = Scale::new(hz);
            for seconds in [1u64, 60, 86_400] {
                let ns = scale.ns(hz * seconds);
                assert!(ns.abs_diff(seconds * 1_000_000_000) <= seconds * 10, "{hz} {seconds} {ns}");
                let ticks = scale.ticks(seconds * 1_000_000_000);
                assert!(ticks.abs_diff(hz * seconds) <= seconds, "{hz} {seconds} {ticks}");
            }
        }
    }

    #[test]
    fn conversions_survive_the_extremes() {
        let scale = Scale::new(5_000_000_000);
        assert_eq!(scale.ns(0), 0);
        assert_eq!(scale.ticks(u64::MAX), u64::MAX);
        let _ = scale.ns(u64::MAX);
    }

    #[test]
    fn a_stated_frequency_is_believed_only_if_the_measurement_agrees() {
        assert_eq!(believe(2_995_000_000, Some(3_000_000_000)), 3_000_000_000);
        assert_eq!(believe(100_000_000, Some(3_500_000_000)), 100_000_000);
        assert_eq!(believe(100_000_000, None), 100_000_000);
    }
}
