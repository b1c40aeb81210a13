//! What a query and an update take by this machine's clock.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkGroup, Criterion, measurement::WallTime};

use crate::load::{Load, next_to, under};
use crate::ways::{Core, Setting, Visitor, Way, each};

/// Operations between two looks at the clock.
const BATCH: u64 = 64;

/// Measures both of all ways.
pub fn measure() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800))
        .sample_size(20)
        .without_plots()
        .configure_from_args();
    each(&mut Queries(criterion.benchmark_group("query")));
    each(&mut Updates(criterion.benchmark_group("update")));
    criterion.final_summary();
}

/// A query, while the updaters are at work.
struct Queries<'a>(BenchmarkGroup<'a, WallTime>);

impl Visitor for Queries<'_> {
    fn visit<W: Way>(&mut self, setting: Setting, new: impl Fn() -> W) {
        self.0.bench_function(setting.name, |bencher| {
            let way = new();
            under(&way, setting, Load::OneCore, || {
                bencher.iter_custom(|iterations| median(iterations, || _ = black_box(way.query())));
            });
        });
    }
}

/// An update, while the other updater is at work.
struct Updates<'a>(BenchmarkGroup<'a, WallTime>);

impl Visitor for Updates<'_> {
    fn visit<W: Way>(&mut self, setting: Setting, new: impl Fn() -> W) {
        self.0.bench_function(setting.name, |bencher| {
            let way = new();
            next_to(&way, setting, |core| {
                let mut guest = 0;
                bencher.iter_custom(|iterations| {
                    let pair = || {
                        guest = if guest + 1 < setting.guests { guest + 1 } else { 0 };
                        core.allocated(black_box(guest));
                        core.freed(black_box(guest));
                    };
                    // Two updates each.
                    median(iterations, pair) / 2
                });
            });
        });
    }
}

/// `iterations` times what one operation takes in the median batch. Where there are fewer processors than threads, the
/// one that measures loses its own now and then, which is no part of an operation.
fn median(iterations: u64, mut operation: impl FnMut()) -> Duration {
    let mut batches: Vec<Duration> = (0..iterations.div_ceil(BATCH))
        .map(|_| {
            let start = Instant::now();
            (0..BATCH).for_each(|_| operation());
            start.elapsed()
        })
        .collect();
    batches.sort_unstable();
    batches[batches.len() / 2].mul_f64(iterations as f64 / BATCH as f64)
}
