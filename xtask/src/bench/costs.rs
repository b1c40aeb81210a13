//! Frames and counters on the bare machine: boot/costs prints `cost NAME TICKS`, exactly the same each time.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xtask::{
    emulator::{Backend, Machine},
    hypervisor, image,
};

use super::{Row, markdown, run};

const TIMEOUT: Duration = Duration::from_secs(120);
/// A frame from the core's cache may cost this many ticks: the 64 that were measured, and a tenth more.
const FRAME_ALLOC_TICKS_MAX: f64 = 70.0;
/// A frame back into the core's cache: 72, and a tenth more.
const FRAME_FREE_TICKS_MAX: f64 = 79.0;
/// Between the cheapest and the dearest query over the numbers of guests: it does not know of guests.
const QUERY_SPREAD_TICKS_MAX: f64 = 1.0;

/// What the names mean; a name may go on with a number.
const WORDS: &[(&str, &str)] = &[
    ("frame_alloc", "a frame from the core's cache"),
    ("frame_alloc_mean", "the same, mean of 1024, with the pool's batches"),
    ("frame_free", "a frame back into the core's cache"),
    ("frame_free_mean", "the same, mean of 1024, with the pool's batches"),
    ("counter_allocated", "a page counted as allocated"),
    ("counter_freed", "a page counted as freed"),
];
const GUESTS: &str = "query_guests_";
const CORES: &str = "query_cores_";

/// Every figure, by name, in the order in which they came.
pub struct Costs(Vec<(String, f64)>);

/// Builds the program, boots it on one processor, and reads.
pub fn measure() -> Result<Costs> {
    let program = hypervisor::build_bare_metal("costs", &["--quiet"])?;
    let program = program.first().context("package costs has no binary")?;
    let image = image::pack(&hypervisor::strip(program)?, None)?;
    let machine = Machine { cores: 1, memory_mib: 128, backend: Backend::Bochs, ..Machine::new(image) };
    let outcome = run(&machine, TIMEOUT)?;
    let costs = read(&outcome.output);
    ensure!(
        outcome.exit_code == Some(0) && costs.over(GUESTS).count() > 1 && costs.over(CORES).count() > 1,
        "the program did not come to its end; its output:\n{}",
        outcome.output
    );
    Ok(costs)
}

fn read(output: &str) -> Costs {
    let cost = |line: &str| {
        let (name, ticks) = line.trim().strip_prefix("cost ")?.split_once(' ')?;
        Some((name.to_owned(), ticks.parse().ok()?))
    };
    Costs(output.lines().filter_map(cost).collect())
}

/// A straight line through points, and how far the farthest lies from it.
#[derive(Debug, PartialEq)]
struct Fit {
    slope: f64,
    base: f64,
    deviation: f64,
}

/// The line of least squares.
fn fit(points: &[(f64, f64)]) -> Fit {
    let count = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (x, y) = (mean(|point| point.0), mean(|point| point.1));
    let covariance: f64 = points.iter().map(|point| (point.0 - x) * (point.1 - y)).sum();
    let slope = covariance / points.iter().map(|point| (point.0 - x).powi(2)).sum::<f64>();
    let base = y - slope * x;
    let deviations = points.iter().map(|point| (point.1 - base - slope * point.0).abs());
    Fit { slope, base, deviation: deviations.fold(0.0, f64::max) }
}

impl Costs {
    fn ticks(&self, name: &str) -> Option<f64> {
        self.0.iter().find(|cost| cost.0 == name).map(|cost| cost.1)
    }

    /// (number, ticks) of the figures whose names are `prefix` and a number.
    fn over(&self, prefix: &str) -> impl Iterator<Item = (f64, f64)> {
        self.0
            .iter()
            .filter_map(move |(name, ticks)| Some((name.strip_prefix(prefix)?.parse().ok()?, *ticks)))
    }

    /// As rows beside the other operations'.
    pub fn rows(&self) -> impl Iterator<Item = Row> {
        self.0.iter().map(|(name, ticks)| Row {
            op: name.clone(),
            ticks: *ticks,
            exits: None,
            native: None,
            kvm: None,
        })
    }

    /// How the query grows with the cores.
    pub fn growth(&self) -> String {
        let Fit { slope, base, deviation } = fit(&self.over(CORES).collect::<Vec<_>>());
        format!(
            "a size query takes {base:.1} ticks and {slope:.1} for each core (least squares; largest deviation {deviation:.1})"
        )
    }

    /// What is not as it should be.
    pub fn missed(&self) -> Vec<String> {
        let mut missed = Vec::new();
        for (name, most) in [("frame_alloc", FRAME_ALLOC_TICKS_MAX), ("frame_free", FRAME_FREE_TICKS_MAX)] {
            match self.ticks(name) {
                Some(ticks) if ticks <= most => {}
                Some(ticks) => missed.push(format!("{name} costs {ticks:.0} ticks, the target is {most:.0}")),
                None => missed.push(format!("{name} was not measured")),
            }
        }
        let (least, most) = self
            .over(GUESTS)
            .fold((f64::MAX, f64::MIN), |(least, most), (_, ticks)| (least.min(ticks), most.max(ticks)));
        if most - least > QUERY_SPREAD_TICKS_MAX {
            missed.push(format!("a size query is not level over guests: {least:.0} to {most:.0} ticks"));
        }
        missed
    }

    /// All of them in words, for a page.
    pub fn table(&self) -> String {
        let words = |name: &str| {
            let known = WORDS.iter().find(|(known, _)| *known == name).map(|(_, words)| (*words).to_owned());
            let over = |prefix: &str, what: &str| {
                let number = name.strip_prefix(prefix)?;
                Some(format!("a query, {what} {number}"))
            };
            known
                .or_else(|| over(GUESTS, "8 cores, guests:"))
                .or_else(|| over(CORES, "100 guests, cores:"))
                .unwrap_or_else(|| name.to_owned())
        };
        let rows: Vec<_> =
            self.0.iter().map(|(name, ticks)| vec![words(name), format!("{ticks:.1}")]).collect();
        format!("{}\n{}.\n", markdown::table(&["operation", "ticks"], &rows), capital(&self.growth()))
    }
}

/// The sentence's first letter in upper case.
fn capital(sentence: &str) -> String {
    let mut letters = sentence.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "booted\ncost frame_alloc 50.0\r\ncost frame_free 40.0\ncost query_guests_1 80.0\n\
        cost query_guests_1000 81.0\ncost query_cores_1 10.0\ncost query_cores_2 20.0\ncost query_cores_4 40.0\n";

    #[test]
    fn what_is_level_and_cheap_misses_nothing() {
        let costs = read(GOOD);
        assert_eq!((costs.0.len(), costs.missed()), (7, Vec::<String>::new()));
        assert!(
            costs.table().contains("| a query, 8 cores, guests: 1000     |  81.0 |"),
            "{}",
            costs.table()
        );
        assert!(costs.growth().contains("10.0 for each core"), "{}", costs.growth());
    }

    #[test]
    fn each_miss_is_told() {
        let dear = GOOD.replace("frame_alloc 50", "frame_alloc 5000").replace("_1000 81.0", "_1000 81.5");
        assert_eq!(read(&dear).missed().len(), 2);
        assert_eq!(read(&GOOD.replace("cost frame_free", "kost")).missed(), ["frame_free was not measured"]);
    }

    #[test]
    fn the_line_of_least_squares_is_found() {
        let Fit { slope, base, deviation } = fit(&[(1.0, 7.0), (2.0, 9.0), (4.0, 13.0), (8.0, 21.0)]);
        assert!((slope - 2.0).abs() < 1e-9 && (base - 5.0).abs() < 1e-9 && deviation < 1e-9);
        let bent = fit(&[(0.0, 0.0), (1.0, 3.0), (2.0, 0.0)]);
        assert_eq!((bent.slope, bent.base, bent.deviation), (0.0, 1.0, 2.0));
    }
}
