//! The VMX-preemption timer: which count makes it end a guest's run at a given TSC value.

/// How long a count is believed, in nanoseconds.
///
/// The timer counts only in the guest and starts again from the VMCS's value at each entry, so every exit after the
/// value was written makes it late by the time since. Who writes the value looks at the TSC before each entry
/// anyway: once it is this old, it is written anew, which bounds the lateness by as much. So the value need not be
/// saved at exits.
pub const BELIEVED_NS: u64 = 200_000;

/// The least count: a guest whose devices are always overdue gets a few instructions done between two of them.
const COUNT_MIN: u32 = 2;

/// The count that ends a run entered now at `due_tsc`: never earlier, and at most two counts (`1 << shift` ticks
/// each) later, plus what passes until the entry.
///
/// The timer counts down each time TSC bit `shift` (0..=31) changes, so what matters is how many multiples of
/// `1 << shift` lie between (SDM Vol. 3, Section 26.5.1 "VMX-Preemption Timer").
#[inline]
#[must_use]
pub const fn count(now_tsc: u64, due_tsc: u64, shift: u32) -> u32 {
    if due_tsc <= now_tsc {
        return COUNT_MIN;
    }
    // Rounded up without an overflow: due_tsc is not 0.
    let due = ((due_tsc - 1) >> shift) + 1;
    let count = due - (now_tsc >> shift);
    if count > u32::MAX as u64 {
        u32::MAX
    } else if count < COUNT_MIN as u64 {
        COUNT_MIN
    } else {
        count as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The TSC value at which a timer loaded with `count` at `now` has counted to 0.
    fn fires(now: u64, count: u32, shift: u32) -> u64 {
        ((now >> shift) + u64::from(count)) << shift
    }

    #[test]
    fn never_early_and_at_most_two_counts_late() {
        for shift in [0, 1, 5, 7] {
            for now in 1000..1200 {
                for wait in 1..300 {
                    let end = fires(now, count(now, now + wait, shift), shift);
                    assert!(end >= now + wait && end < now + wait + (2 << shift), "{shift} {now} {wait}");
                }
            }
        }
    }

    #[test]
    fn what_is_due_ends_the_run_soon_and_long_waits_are_cut() {
        assert_eq!(count(1000, 1000, 5), COUNT_MIN);
        assert_eq!(count(1000, 0, 5), COUNT_MIN);
        assert_eq!(count(0, u64::MAX, 0), u32::MAX);
        assert_eq!(count(0, u64::MAX, 31), u32::MAX);
    }
}
