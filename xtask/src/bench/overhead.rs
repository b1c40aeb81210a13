//! The overhead of an operation, which is what it costs beyond native, as a part of KVM's.

use super::Row;

/// An operation that bears exits may cost at most this part of KVM's overhead.
const RATIO_MAX: f64 = 0.5;
/// The geometric mean over those that exit may be at most this.
const MEAN_MAX: f64 = 0.35;
/// Where KVM costs more than this beyond native it exits, in ticks.
const KVM_EXITS_TICKS: f64 = 5.0;
/// Overheads below this are none, in ticks: a timer's exit that falls into an operation is spread over all its rounds.
const NONE_TICKS: f64 = 1.0;

impl Row {
    /// Our overhead and KVM's, where native was measured.
    fn overheads(&self) -> Option<(f64, f64)> {
        let native = self.native?;
        Some((self.ticks - native, self.kvm? - native))
    }

    /// Whether it exits under Umbra. One exit that many operations share counts as well, where it costs a tick each.
    fn exits(&self) -> bool {
        self.exits.is_some_and(|exits| exits > 0.0)
            && self.overheads().is_some_and(|(ours, _)| ours >= NONE_TICKS)
    }

    /// Our overhead as a part of KVM's, if the operation bears exits: it exits under Umbra, or under KVM. Infinite where
    /// it costs KVM nothing.
    pub fn ratio(&self) -> Option<f64> {
        let (ours, kvm) = self.overheads()?;
        (self.exits() || kvm > KVM_EXITS_TICKS).then(|| ours.max(0.0) / kvm.max(0.0))
    }
}

/// All ratios in two numbers.
pub struct Summary<'a> {
    /// The geometric mean over the operations that exit under Umbra. Those that exit under KVM alone have a ratio of
    /// nothing: they would flatter it.
    pub mean: f64,
    /// How many those are.
    pub count: usize,
    /// The operation with the largest ratio, and that.
    pub worst: (&'a str, f64),
}

/// `None` if no operation exits.
pub fn summary(rows: &[Row]) -> Option<Summary<'_>> {
    let ratios = || rows.iter().filter_map(|row| Some((row, row.ratio()?)));
    let logarithms: Vec<f64> = ratios().filter(|(row, _)| row.exits()).map(|(_, ratio)| ratio.ln()).collect();
    let worst = ratios().max_by(|a, b| a.1.total_cmp(&b.1))?;
    let count = logarithms.len();
    (count > 0).then(|| Summary {
        mean: (logarithms.iter().sum::<f64>() / count as f64).exp(),
        count,
        worst: (&worst.0.op, worst.1),
    })
}

/// The targets that are not met.
pub fn missed(rows: &[Row]) -> Vec<String> {
    let above = rows.iter().filter_map(|row| Some((row, row.ratio().filter(|&ratio| ratio > RATIO_MAX)?)));
    let mut missed: Vec<String> = above
        .map(|(row, ratio)| format!("{} has {ratio:.2} of KVM's overhead, the target is {RATIO_MAX}", row.op))
        .collect();
    if let Some(summary) = summary(rows).filter(|summary| summary.mean > MEAN_MAX) {
        missed.push(format!(
            "the overheads' geometric mean is {:.2} of KVM's, the target is {MEAN_MAX}",
            summary.mean
        ));
    }
    missed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(op: &str, ticks: f64, exits: f64, native: f64, kvm: f64) -> Row {
        Row { op: op.into(), ticks, exits: Some(exits), native: Some(native), kvm: Some(kvm) }
    }

    #[test]
    fn an_operation_bears_exits_here_or_under_kvm() {
        assert_eq!(row("here and there", 205.0, 1.0, 5.0, 805.0).ratio(), Some(0.25));
        assert_eq!(row("shared by 512", 8.0, 1.0 / 512.0, 4.0, 12.0).ratio(), Some(0.5));
        assert_eq!(row("under KVM alone", 4.0, 0.0, 4.0, 974.0).ratio(), Some(0.0));
        assert_eq!(row("here alone", 200.0, 1.0, 4.0, 4.0).ratio(), Some(f64::INFINITY));
        assert_eq!(row("nowhere", 4.0, 0.0, 4.0, 4.0).ratio(), None);
        assert_eq!(row("a timer's exit fell into it", 4.3, 0.001, 4.0, 4.0).ratio(), None);
        assert_eq!(Row { native: None, ..row("not native", 161.0, 1.0, 0.0, 910.0) }.ratio(), None);
        assert_eq!(Row { kvm: None, ..row("Linux", 1e9, 1e4, 1e9, 0.0) }.ratio(), None);
    }

    #[test]
    fn the_mean_is_of_what_exits_and_the_worst_of_all() {
        let rows = [
            row("a", 104.0, 1.0, 4.0, 404.0),
            row("b", 4.0, 0.0, 4.0, 974.0),
            row("c", 404.0, 1.0, 4.0, 4004.0),
        ];
        let summary = summary(&rows).unwrap();
        assert_eq!((summary.count, summary.worst), (2, ("a", 0.25)));
        assert!((summary.mean - (0.25_f64 * 0.1).sqrt()).abs() < 1e-9, "{}", summary.mean);
        assert!(super::summary(&rows[1..2]).is_none());
    }

    #[test]
    fn each_miss_is_told() {
        assert!(missed(&[row("a", 204.0, 1.0, 4.0, 804.0)]).is_empty());
        let bad = missed(&[row("a", 604.0, 1.0, 4.0, 1004.0), row("b", 404.0, 1.0, 4.0, 1004.0)]);
        assert_eq!(bad.len(), 2, "{bad:?}");
        assert!(bad[0].contains("a has 0.60") && bad[1].contains("mean is 0.49"), "{bad:?}");
    }
}
