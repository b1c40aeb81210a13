//! Random guests against the architecture, and every counterexample that was ever found.
//!
//! `SHADOW_STEPS` says how many steps all tests here take together; without it 20 million.

use std::cell::Cell;
use std::io::Write;
use std::panic;
use std::sync::Once;
use std::time::{SystemTime, UNIX_EPOCH};

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};

use crate::Mode;
use crate::model::listing;
use crate::model::step::MODES;
use crate::model::trial::run;

/// The longest sequence.
const LENGTH: usize = 240;
/// Steps of all tests here, unless the environment says otherwise.
const STEPS: u64 = 20_000_000;
/// Parts that they are divided into: a test for each mode.
const PARTS: u64 = 5;
/// Seeds that are run each time; half of the steps are theirs, the other half is a new seed's.
const SEEDS: [u64; 4] = [1, 0x5eed, 0x20_1007, 0xc0ffee];

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f` without the messages of its panics: those of a shrinking search are thousands.
pub fn quietly<R>(f: impl FnOnce() -> R) -> R {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let loud = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                loud(info);
            }
        }));
    });
    QUIET.set(true);
    let result = f();
    QUIET.set(false);
    result
}

/// Says it though the test passes.
pub fn say(line: &str) {
    // `println` would go with the output of the test, which is shown of those that fail.
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// A guest of `mode` with every other property at random.
fn setup(mode: Mode, number: u64) -> u64 {
    let mode = MODES.iter().position(|&it| it == mode).unwrap_or(0) as u64;
    number % (1 << 15) / 5 * 5 + mode
}

/// Runs about `steps` steps from one seed; a failure is shown as the smallest sequence that fails so.
pub fn from_seed(seed: u64, mode: Mode, steps: u64) -> Result<u64, (String, Vec<u64>, u64)> {
    let config = Config {
        cases: (2 * steps / LENGTH as u64).max(1) as u32,
        failure_persistence: None,
        max_shrink_iters: 20_000,
        ..Config::default()
    };
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let sequences = (any::<u64>(), prop::collection::vec(any::<u64>(), 1..LENGTH));
    let (done, failed) = (Cell::new(0), Cell::new(false));
    let result = quietly(|| {
        runner.run(&sequences, |(first, steps)| {
            let mut numbers = vec![setup(mode, first)];
            numbers.extend(steps);
            let count = numbers.len() as u64 - 1;
            // Counted before: up to the failure, what led to it is part of the price. Shrinking is not.
            done.set(done.get() + if failed.get() { 0 } else { count });
            failed.set(true);
            run(&numbers);
            failed.set(false);
            Ok(())
        })
    });
    match result {
        Ok(()) => Ok(done.get()),
        Err(TestError::Fail(reason, (first, steps))) => {
            let mut numbers = vec![setup(mode, first)];
            numbers.extend(steps);
            Err((reason.to_string(), numbers, done.get()))
        }
        Err(error) => panic!("{error}"),
    }
}

fn part(mode: Mode) {
    let total = std::env::var("SHADOW_STEPS").ok().and_then(|steps| steps.parse().ok()).unwrap_or(STEPS);
    let steps = total / PARTS;
    let new = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64);
    say(&format!("{mode:?}: {steps} steps, seeds {SEEDS:x?} and {new:#x}"));
    let each = steps / 2 / SEEDS.len() as u64;
    let mut done = 0;
    for (seed, steps) in SEEDS.into_iter().map(|seed| (seed, each)).chain([(new, steps / 2)]) {
        match from_seed(seed, mode, steps) {
            Ok(count) => done += count,
            Err((reason, numbers, _)) => {
                panic!(
                    "{reason}\nseed {seed:#x}; the smallest sequence found, as a file for corpus/:\n{}",
                    listing::to_text(&numbers)
                )
            }
        }
    }
    say(&format!("{mode:?}: {done} steps done"));
}

#[test]
fn four_level() {
    part(Mode::FourLevel);
}

#[test]
fn five_level() {
    part(Mode::FiveLevel);
}

#[test]
fn pae() {
    part(Mode::Pae);
}

#[test]
fn two_level() {
    part(Mode::TwoLevel);
}

#[test]
fn paging_off_at_first() {
    part(Mode::Off);
}

/// Where counterexamples are kept.
pub const CORPUS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/corpus");

/// The numbers in a file of the corpus.
pub fn numbers(path: &std::path::Path) -> Vec<u64> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{path:?}: {error}"));
    listing::from_text(&text).unwrap_or_else(|error| panic!("{path:?}: {error}"))
}

#[test]
fn every_counterexample_in_the_corpus() {
    let mut files: Vec<_> = std::fs::read_dir(CORPUS).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty());
    for path in files {
        println!("{path:?}");
        run(&numbers(&path));
    }
}
