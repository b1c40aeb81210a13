//! The random guests find every deliberate defect, and how many steps that takes.

use std::time::Instant;

use super::random::from_seed;
use crate::Mode;
use crate::defect::{Defect, with};

/// Steps within which each has to be found, in each of the modes.
const STEPS: u64 = 1_000_000;
const MODES: [Mode; 4] = [Mode::FourLevel, Mode::Pae, Mode::TwoLevel, Mode::FiveLevel];

/// Steps until the defect was found, with the first seed of each mode.
fn found(defect: Defect) -> Option<(u64, String)> {
    let mut before = 0;
    for mode in MODES {
        match with(defect, || from_seed(7, mode, STEPS)) {
            Ok(steps) => before += steps,
            Err((reason, _, steps)) => return Some((before + steps, reason)),
        }
    }
    None
}

fn hunt(part: usize, parts: usize) {
    let mut missed = Vec::new();
    for &defect in Defect::ALL.iter().skip(part).step_by(parts) {
        let start = Instant::now();
        match found(defect) {
            Some((steps, reason)) => {
                let reason: String = reason.lines().next().unwrap_or_default().chars().take(100).collect();
                println!("{steps:>7} steps: {}: {reason}", defect.description());
            }
            None => missed.push(defect),
        }
        println!("          {:?}", start.elapsed());
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

/// Without any, the same steps find nothing: what is found is the defect.
#[test]
fn without_a_defect_nothing_is_found() {
    for mode in MODES {
        if let Err((reason, numbers, steps)) = from_seed(7, mode, STEPS) {
            panic!("{reason}\nafter {steps} steps; smallest:\n{}", super::random::shown(&numbers));
        }
    }
}
