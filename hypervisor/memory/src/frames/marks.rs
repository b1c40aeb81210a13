//! The allocator's three marks, in free frames.

use core::fmt;

/// Free-frame marks: `min` is kept for work already begun, at `low` reclaim starts, at `high` it stops.
/// Always `min < low < high`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    min_frames: u64,
    low_frames: u64,
    high_frames: u64,
}

/// Why marks are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MarksError {
    /// Not `min < low < high`.
    Order {
        /// The `min` mark that was asked for.
        min_frames: u64,
        /// The `low` mark that was asked for.
        low_frames: u64,
        /// The `high` mark that was asked for.
        high_frames: u64,
    },
    /// The machine has too few frames for reclaim ever to stop.
    TooHigh {
        /// The `high` mark that was asked for.
        high_frames: u64,
        /// All frames of the allocator.
        total_frames: u64,
    },
}

impl fmt::Display for MarksError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Order { min_frames, low_frames, high_frames } => write!(
                f,
                "the marks min {min_frames}, low {low_frames}, high {high_frames} do not ascend; \
                 give min < low < high"
            ),
            Self::TooHigh { high_frames, total_frames } => write!(
                f,
                "the high mark of {high_frames} frames is not below the {total_frames} frames there are; \
                 lower the marks, or give the guests less memory or the machine more"
            ),
        }
    }
}

impl core::error::Error for MarksError {}

impl Marks {
    /// Marks in frames.
    ///
    /// # Errors
    /// [`MarksError::Order`] unless `min < low < high`.
    pub const fn new(min_frames: u64, low_frames: u64, high_frames: u64) -> Result<Self, MarksError> {
        if min_frames < low_frames && low_frames < high_frames {
            Ok(Self { min_frames, low_frames, high_frames })
        } else {
            Err(MarksError::Order { min_frames, low_frames, high_frames })
        }
    }

    /// The default for a machine of `total_frames`: `min` is a 512th of it, from 32 to 4096 frames (but an
    /// eighth of a tiny machine at most), `low` twice and `high` three times that.
    #[must_use]
    pub fn for_memory(total_frames: u64) -> Self {
        let min_frames = (total_frames / 512).clamp(32, 4096).min(total_frames / 8);
        let step = min_frames.max(1);
        Self { min_frames, low_frames: min_frames + step, high_frames: min_frames + 2 * step }
    }

    /// These marks, but for those that are given; what is not given follows them: `min` stays or goes below them, `low` is
    /// twice and `high` three times as far up, or `low` in the middle.
    ///
    /// # Errors
    /// [`MarksError::Order`] if those that are given do not ascend, or leave no room.
    pub fn with(self, min: Option<u64>, low: Option<u64>, high: Option<u64>) -> Result<Self, MarksError> {
        if (min, low, high) == (None, None, None) {
            return Ok(self);
        }
        let below = low.map(|low| low / 2).or(high.map(|high| high / 3)).unwrap_or(u64::MAX);
        let min = min.unwrap_or(self.min_frames.min(below));
        let middle = high.map(|high| min.saturating_add(high.saturating_sub(min) / 2));
        let low = low.or(middle).unwrap_or(min.saturating_add(min.max(1)));
        let high = high.unwrap_or(low.saturating_add(low.saturating_sub(min)));
        Self::new(min, low, high)
    }

    /// The marks that leave `budget_frames` of `available_frames` to whoever asks, and never less than `least_frames`
    /// free. `kept_frames` of the budget cannot be reclaimed: `high` lies below what comes free of the rest, so that a
    /// reclaim comes to its end. A sixteenth of the budget apart, from 8 to 256 frames, if there is room for that.
    ///
    /// # Errors
    /// [`MarksError::Order`] where the numbers are so large that the marks cannot rise.
    pub fn for_budget(
        available_frames: u64,
        budget_frames: u64,
        kept_frames: u64,
        least_frames: u64,
    ) -> Result<Self, MarksError> {
        let min_frames = available_frames.saturating_sub(budget_frames).max(least_frames);
        let budget_frames = available_frames.saturating_sub(min_frames);
        let reclaimable = budget_frames.saturating_sub(kept_frames);
        let step = (budget_frames / 16).clamp(8, 256).min(reclaimable / 4).max(1);
        Self::new(min_frames, min_frames.saturating_add(step), min_frames.saturating_add(2 * step))
    }

    /// All three moved alike.
    pub(super) fn moved(self, by: impl Fn(u64) -> u64) -> Self {
        let Self { min_frames, low_frames, high_frames } = self;
        Self { min_frames: by(min_frames), low_frames: by(low_frames), high_frames: by(high_frames) }
    }

    /// Whether an allocator of `total_frames` can rise to the high mark.
    ///
    /// # Errors
    /// [`MarksError::TooHigh`] if it cannot.
    pub const fn fits(self, total_frames: u64) -> Result<Self, MarksError> {
        if self.high_frames < total_frames {
            Ok(self)
        } else {
            Err(MarksError::TooHigh { high_frames: self.high_frames, total_frames })
        }
    }

    /// Free frames kept for work already begun.
    #[must_use]
    pub const fn min_frames(self) -> u64 {
        self.min_frames
    }

    /// Free frames at or below which reclaim starts.
    #[must_use]
    pub const fn low_frames(self) -> u64 {
        self.low_frames
    }

    /// Free frames at which reclaim stops.
    #[must_use]
    pub const fn high_frames(self) -> u64 {
        self.high_frames
    }
}

/// How the free count stands to the marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pressure {
    /// Above `low`.
    Plenty,
    /// At or below `low`: reclaim is due.
    Low,
    /// At or below `min`: only work already begun gets frames.
    Min,
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn defaults_ascend_for_every_size_and_fit() {
        for total in (0..5000).chain((0..40).map(|shift| 1 << shift)) {
            let marks = Marks::for_memory(total);
            assert!(Marks::new(marks.min_frames, marks.low_frames, marks.high_frames).is_ok());
            assert!(total < 3 || marks.fits(total).is_ok(), "{total} {marks:?}");
        }
        assert_eq!(Marks::for_memory(1 << 16), Marks::new(128, 256, 384).unwrap());
    }

    #[test]
    fn a_budget_is_what_lies_between_the_mark_and_what_there_is() {
        let marks = |available, budget, kept| Marks::for_budget(available, budget, kept, 100).unwrap();
        assert_eq!(marks(10_000, 800, 0), Marks::new(9_200, 9_250, 9_300).unwrap());
        // A budget larger than the machine is none.
        assert_eq!(marks(10_000, 20_000, 0).min_frames, 100);
        // Nearly all of it is kept: reclaim can still come to its end.
        assert_eq!(marks(10_000, 800, 740), Marks::new(9_200, 9_215, 9_230).unwrap());
        assert_eq!(marks(10_000, 800, 900), Marks::new(9_200, 9_201, 9_202).unwrap());
        assert_eq!(marks(1_000, 20_000, 840), Marks::new(100, 115, 130).unwrap());
        assert!(Marks::for_budget(u64::MAX, 0, 0, 0).is_err());
    }

    #[test]
    fn marks_that_are_not_given_follow_those_that_are() {
        let default = Marks::new(500, 1000, 1500).unwrap();
        let with = |min, low, high| {
            default.with(min, low, high).map(|m| (m.min_frames, m.low_frames, m.high_frames))
        };
        assert_eq!(with(None, None, None), Ok((500, 1000, 1500)));
        assert_eq!(with(Some(5000), None, None), Ok((5000, 10_000, 15_000)));
        assert_eq!(with(None, Some(600), None), Ok((300, 600, 900)));
        assert_eq!(with(None, Some(4000), None), Ok((500, 4000, 7500)));
        assert_eq!(with(None, None, Some(900)), Ok((300, 600, 900)));
        assert_eq!(with(Some(10), None, Some(20)), Ok((10, 15, 20)));
        assert_eq!(with(Some(1), Some(2), Some(3)), Ok((1, 2, 3)));
        assert!(with(Some(7), Some(7), None).is_err() && with(None, None, Some(1)).is_err());
        assert!(with(Some(u64::MAX), None, None).is_err());
    }

    #[test]
    fn marks_that_do_not_ascend_are_refused() {
        for (min, low, high) in [(2, 2, 3), (1, 3, 3), (3, 2, 1)] {
            assert!(matches!(Marks::new(min, low, high), Err(MarksError::Order { .. })));
        }
        assert!(matches!(Marks::new(1, 2, 100).unwrap().fits(100), Err(MarksError::TooHigh { .. })));
    }
}
