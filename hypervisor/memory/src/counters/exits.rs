//! Exits by reason, taken as differences of a core's counters: so a guest's share of them costs its exits nothing.

use super::Total;
use super::event::{EXIT_REASONS, ExitCounter};

/// A number of exits for each reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExitCounts(pub(super) [u64; EXIT_REASONS]);

impl Default for ExitCounts {
    fn default() -> Self {
        Self([0; EXIT_REASONS])
    }
}

impl ExitCounts {
    /// Adds what one core counted from `earlier` to `later`.
    pub fn add_between(&mut self, earlier: &Self, later: &Self) {
        for (sum, (earlier, later)) in self.0.iter_mut().zip(earlier.0.iter().zip(&later.0)) {
            *sum = sum.wrapping_add(later.wrapping_sub(*earlier));
        }
    }

    /// Each reason with its name, description and number, ascending by reason.
    pub fn totals(&self) -> impl Iterator<Item = Total> + '_ {
        ExitCounter::all().map(|(shown, name, description)| {
            let counted = ExitCounter::each().filter(|exit| exit.counts_as(shown));
            Total { name, description, sum: counted.map(|exit| self.0[exit.index()]).sum() }
        })
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::super::Counters;
    use super::*;

    #[test]
    fn a_share_is_what_was_counted_meanwhile_on_that_core() {
        let counters = Counters::new(2);
        let writers = [counters.writer(0).unwrap(), counters.writer(1).unwrap()];
        writers[0].exit(10);
        let before = counters.exits_on(0);
        for _ in 0..3 {
            writers[0].exit(10);
        }
        writers[0].exit(0xffff);
        writers[1].exit(12);
        let mut share = ExitCounts::default();
        share.add_between(&before, &counters.exits_on(0));
        share.add_between(&before, &before);
        let found: Vec<_> =
            share.totals().filter(|total| total.sum != 0).map(|total| (total.name, total.sum)).collect();
        assert_eq!(found, [("exit_cpuid", 3), ("exit_other", 1)]);
        assert_eq!(counters.exits_on(7), ExitCounts::default());
    }
}
