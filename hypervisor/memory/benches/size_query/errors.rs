//! How far the answers are from the truth.

use std::time::{Duration, Instant};

use crate::load::{Load, Progress, TRUTH, under};
use crate::ways::{Answer, Setting, Visitor, Way, each};

/// How long each way is asked under each load.
const ASKED: Duration = Duration::from_millis(700);

struct Errors {
    answers: u64,
    /// Answers with no number in them that can have lived.
    wrong: u64,
    /// Pages between the worst answer and the truth.
    largest: i64,
    /// Answers that say of themselves that they are exact.
    exact: u64,
    /// Pages between the ends of the widest bracket.
    widest: i64,
    /// How many answers had ends so many pages apart, by the bits of that number.
    widths: [u64; 65],
}

impl Errors {
    fn new() -> Self {
        Self { answers: 0, wrong: 0, largest: 0, exact: 0, widest: 0, widths: [0; 65] }
    }

    fn take(&mut self, answer: Answer) {
        let error = (answer.low - TRUTH.end()).max(TRUTH.start() - answer.high).max(0);
        let width = answer.high - answer.low;
        self.answers += 1;
        self.wrong += u64::from(error > 0);
        self.largest = self.largest.max(error);
        self.exact += u64::from(answer.exact);
        self.widest = self.widest.max(width);
        self.widths[(u64::BITS - width.cast_unsigned().leading_zeros()) as usize] += 1;
    }

    /// A width that 99 of 100 answers do not exceed: a power of two less one.
    fn usual_width(&self) -> u64 {
        let mut narrower = 0;
        let bits = self.widths.iter().position(|count| {
            narrower += count;
            narrower * 100 >= self.answers * 99
        });
        (1 << bits.unwrap_or(63)) - 1
    }
}

struct Printer;

/// Prints a line for each way and load.
pub fn print() {
    each(&mut Printer);
}

impl Visitor for Printer {
    fn visit<W: Way>(&mut self, setting: Setting, new: impl Fn() -> W) {
        for (name, load) in [("one-core", Load::OneCore), ("two-cores", Load::TwoCores)] {
            if !load.fits(setting) {
                continue;
            }
            let way = new();
            let errors = under(&way, setting, load, |progress| ask(&way, progress));
            let usual = errors.usual_width();
            let Errors { answers, wrong, largest, exact, widest, .. } = errors;
            println!(
                "error {} {name} answers={answers} wrong={wrong} largest={largest} exact={exact} usual={usual} \
                 widest={widest}",
                setting.name
            );
        }
    }
}

/// Asks a few times at once, and takes the answers if anything changed meanwhile: where the updaters have no processor
/// every answer is right.
fn ask(way: &impl Way, progress: &Progress) -> Errors {
    let mut errors = Errors::new();
    let start = Instant::now();
    while start.elapsed() < ASKED {
        let before = progress.look();
        let answers: [Answer; 32] = std::array::from_fn(|_| way.query());
        if before != progress.look() {
            answers.into_iter().for_each(|answer| errors.take(answer));
        }
    }
    errors
}
