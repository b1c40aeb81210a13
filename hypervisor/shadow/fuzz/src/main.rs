//! The random guests of the `shadow` crate's tests, with their steps chosen by libFuzzer for the code that they reach.
//!
//! An input is a sequence of numbers of eight bytes, as in `shadow::model::listing`. Built and run by `cargo xtask fuzz`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use shadow::model::{listing, trial};

fuzz_target!(|input: &[u8]| {
    trial::run(&listing::from_bytes(input));
});
