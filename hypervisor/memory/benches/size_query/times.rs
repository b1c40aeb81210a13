//! What a query and an update take by this machine's clock.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkGroup, Criterion, measurement::WallTime};

use crate::load::{BURST, Load, Progress, next_to, under};
use crate::ways::{Core, Setting, Visitor, Way, each};

/// What lies between two looks at the clock, at least, unless one operation takes longer.
const BATCH: Duration = Duration::from_micros(4);
/// A batch that takes longer than this was interrupted.
const INTERRUPTED: Duration = Duration::from_micros(500);
/// How often as many batches as needed are run, at most, until there are enough that count.
const TRIES: u64 = 8;

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
            under(&way, setting, Load::OneCore, |progress| {
                bencher.iter_custom(|iterations| median(iterations, progress, || _ = black_box(way.query())));
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
            next_to(&way, setting, |core, progress| {
                let (mut guest, mut updates) = (0, 0);
                bencher.iter_custom(|iterations| {
                    let update = || {
                        guest = if guest + 1 < setting.guests { guest + 1 } else { 0 };
                        if (updates / BURST).is_multiple_of(2) {
                            core.allocated(black_box(guest));
                        } else {
                            core.freed(black_box(guest));
                        }
                        updates += 1;
                    };
                    median(iterations, progress, update)
                });
            });
        });
    }
}

/// `iterations` times what one operation takes in the median batch.
///
/// A batch counts if it was disturbed by the updaters and by nobody else. Where there are fewer processors than threads,
/// or others want them, the thread that measures loses its own now and then; or the updaters have none, and an operation
/// takes what it takes when nobody else is there. Should no batch count, then those without updaters do.
fn median(iterations: u64, progress: &Progress, mut operation: impl FnMut()) -> Duration {
    let mut time = |operations: u64| {
        let (before, start) = (progress.look(), Instant::now());
        (0..operations).for_each(|_| operation());
        let took = start.elapsed();
        (took, before.is_none() || before != progress.look())
    };
    let mut operations = 1;
    while time(operations).0 < BATCH {
        operations *= 2;
    }
    let (mut disturbed, mut quiet) = (Vec::new(), Vec::new());
    let wanted = iterations.div_ceil(operations);
    let mut tries = 0;
    while (disturbed.len() as u64) < wanted && (tries < wanted * TRIES || disturbed.len() + quiet.len() == 0)
    {
        match time(operations) {
            (took, true) if took < INTERRUPTED => disturbed.push(took),
            (_, true) => {}
            (took, false) => quiet.push(took),
        }
        tries += 1;
    }
    let mut batches = if disturbed.is_empty() { quiet } else { disturbed };
    batches.sort_unstable();
    batches[batches.len() / 2].mul_f64(iterations as f64 / operations as f64)
}
