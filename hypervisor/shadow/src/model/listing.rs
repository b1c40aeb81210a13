//! Sequences of steps as text for people and the corpus, and as bytes for a fuzzer.

use std::format;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::string::String;
use std::vec::Vec;

use super::step::Step;
use super::trial::{Setup, run};

/// A sequence as the corpus holds it: a number a line, and behind it what it stands for.
pub fn to_text(numbers: &[u64]) -> String {
    let Some((&first, steps)) = numbers.split_first() else { return String::new() };
    let mut text = format!("{first:#018x} # {:?}\n", Setup::decode(first));
    for &number in steps {
        text += &format!("{number:#018x} # {:?}\n", Step::decode(number));
    }
    text
}

/// The numbers of a text.
///
/// # Errors
/// The first line that has none where it should.
pub fn from_text(text: &str) -> Result<Vec<u64>, String> {
    let words = text.lines().map(|line| (line, line.split('#').next().unwrap_or_default().trim()));
    words
        .filter(|(_, word)| !word.is_empty())
        .map(|(line, word)| {
            let digits = word.strip_prefix("0x").unwrap_or_default();
            u64::from_str_radix(digits, 16)
                .map_err(|_| format!("`{line}` does not begin with 0x and a number"))
        })
        .collect()
}

/// As a fuzzer's input: eight bytes a number, the least first.
pub fn to_bytes(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// The numbers of a fuzzer's input; what is left over at its end is left out.
pub fn from_bytes(bytes: &[u8]) -> Vec<u64> {
    bytes.as_chunks().0.iter().map(|&number| u64::from_le_bytes(number)).collect()
}

/// A sequence that fails, without the steps that it fails without. `None` if it does not fail.
pub fn reduced(numbers: &[u64]) -> Option<Vec<u64>> {
    let fails = |numbers: &[u64]| catch_unwind(AssertUnwindSafe(|| run(numbers))).is_err();
    if !fails(numbers) {
        return None;
    }
    let mut rest = numbers.to_vec();
    let mut chunk = rest.len() / 2;
    while chunk > 0 {
        let mut at = 1; // the set-up stays
        while at < rest.len() {
            let mut without = rest.clone();
            without.drain(at..(at + chunk).min(rest.len()));
            if fails(&without) {
                rest = without;
            } else {
                at += chunk;
            }
        }
        chunk /= 2;
    }
    Some(rest)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn text_and_bytes_hold_what_was_put_in() {
        let numbers = [3, u64::MAX, 0x1234_5678];
        assert_eq!(from_text(&to_text(&numbers)).as_deref(), Ok(&numbers[..]));
        assert_eq!(from_bytes(&to_bytes(&numbers)), numbers);
        assert_eq!(from_bytes(&[1, 0, 0, 0, 0, 0, 0, 0, 9]), [1]);
        assert_eq!(from_text("# only words\n\n0x10 # and a number\n"), Ok(Vec::from([16])));
        assert!(from_text("16\n").is_err());
    }

    #[test]
    fn a_failing_sequence_is_cut_to_what_it_fails_by() {
        use crate::defect::{Defect, with};
        assert_eq!(reduced(&[0, 1, 2]), None);
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/corpus");
        let file = std::fs::read_dir(path).unwrap().map(|file| file.unwrap().path());
        let file = file.into_iter().find(|path| path.to_string_lossy().contains("prefill")).unwrap();
        let mut numbers = from_text(&std::fs::read_to_string(file).unwrap()).unwrap();
        let least = numbers.len();
        numbers.splice(1..1, [0, 0, 0, 0, 0]);
        let found =
            crate::tests::random::quietly(|| with(Defect::PrefillIgnoresTracker, || reduced(&numbers)));
        assert!(found.is_some_and(|found| found.len() <= least));
    }
}
