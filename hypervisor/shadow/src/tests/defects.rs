//! The random guests find every deliberate defect, and how many steps that takes.

use std::path::PathBuf;

use super::random::{CORPUS, from_seed, numbers, quietly, say};
use crate::Mode;
use crate::defect::{Defect, with};
use crate::model::listing::to_text;
use crate::model::trial::run;

/// Steps within which each has to be found, in each of the modes.
const STEPS: u64 = 1_000_000;
const MODES: [Mode; 4] = [Mode::FourLevel, Mode::Pae, Mode::TwoLevel, Mode::FiveLevel];

/// Steps until the defect was found, with the first seed of each mode.
fn found(defect: Defect) -> Option<(u64, String, Vec<u64>)> {
    let mut before = 0;
    for mode in MODES {
        match with(defect, || from_seed(7, mode, STEPS)) {
            Ok(steps) => before += steps,
            Err((reason, numbers, steps)) => return Some((before + steps, reason, numbers)),
        }
    }
    None
}

/// The shortest sequence known that finds the defect.
fn file(defect: Defect) -> PathBuf {
    let name = defect.description().replace([':', ',', '.', '/'], "").replace([' ', '='], "-");
    [CORPUS, &format!("{name}.txt")].iter().collect()
}

/// `SHADOW_CORPUS=1` writes what is found into the corpus.
fn hunt(part: usize, parts: usize) {
    let mut missed = Vec::new();
    for &defect in Defect::ALL.iter().skip(part).step_by(parts) {
        match found(defect) {
            Some((steps, reason, numbers)) => {
                if std::env::var_os("SHADOW_CORPUS").is_some() {
                    std::fs::write(file(defect), to_text(&numbers)).unwrap();
                }
                let reason: String = reason.lines().next().unwrap_or_default().chars().take(60).collect();
                say(&format!("{steps:>7} steps: {}: {reason}", defect.description()));
            }
            None => missed.push(defect),
        }
    }
    assert!(missed.is_empty(), "not found: {missed:?}");
}

#[test]
fn every_deliberate_defect_is_found_even_ones() {
    hunt(0, 2);
}

#[test]
fn every_deliberate_defect_is_found_odd_ones() {
    hunt(1, 2);
}

#[test]
fn every_deliberate_defect_is_found_by_its_sequence_in_the_corpus() {
    for &defect in Defect::ALL {
        let sequence = numbers(&file(defect));
        let result = quietly(|| std::panic::catch_unwind(|| with(defect, || run(&sequence))));
        with(defect, || ()); // switched off, though the run panicked
        assert!(result.is_err(), "{defect:?}");
    }
}

/// Without any, the same steps find nothing: what is found is the defect.
#[test]
fn without_a_defect_nothing_is_found() {
    for mode in MODES {
        if let Err((reason, numbers, steps)) = from_seed(7, mode, STEPS) {
            panic!("{reason}\nafter {steps} steps; smallest:\n{}", to_text(&numbers));
        }
    }
}
