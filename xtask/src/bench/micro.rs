//! Single operations, timed by small guests that print `B NAME n=COUNT ticks=TOTAL per=EACH`.

use std::{collections::HashMap, time::Duration};

use anyhow::{Result, ensure};
use xtask::{
    emulator::{Backend, Machine},
    hypervisor::Hypervisor,
    image,
    manifest::{self, Limits, Source},
    payload::{self, Options},
};

use super::{Row, run};

const TIMEOUT: Duration = Duration::from_secs(900);
/// The published figures were measured with this model and one processor.
const CPU: &str = "corei7_skylake_x";
/// `op,native,kvm_ept1,kvm_ept0_small_host,kvm_ept0_debian_host`, in ticks per operation.
const BASELINE: &str = include_str!("kvm-baseline.csv");

/// The rows of guest:cpuid-bench and guest:bench.
pub fn measure(umbra: &Hypervisor) -> Result<Vec<Row>> {
    let baseline = baseline();
    let mut rows: Vec<Row> = Vec::new();
    for guest in ["cpuid-bench", "bench"] {
        let text = format!("[[guest]]\nname = \"{guest}\"\nkernel = \"guest:{guest}\"\nexpect = \"any\"\n");
        let plan = manifest::check(&Source::from_text("bench", &text), &Limits::default())?;
        let payload = payload::assemble(&plan, &Options::default())?.path;
        let image = image::pack(&umbra.stripped, Some(&payload))?;
        let machine =
            Machine { cores: 1, cpu: Some(CPU.into()), backend: Backend::Bochs, ..Machine::new(image) };
        let outcome = run(&machine, TIMEOUT)?;
        let found = least_of_rounds(&outcome.output);
        ensure!(!found.is_empty(), "guest:{guest} printed no figure; its output:\n{}", outcome.output);
        for (op, ticks) in found {
            if rows.iter().any(|row| row.op == op) {
                continue;
            }
            let known = baseline.get(op.as_str());
            let exits = exits_per_op(&outcome.output, &op);
            rows.push(Row { ticks, exits, native: known.map(|it| it.0), kvm: known.map(|it| it.1), op });
        }
    }
    Ok(rows)
}

/// Native and KVM's shadow MMU, by operation.
fn baseline() -> HashMap<&'static str, (f64, f64)> {
    BASELINE
        .lines()
        .skip(1)
        .filter_map(|line| {
            let cells: Vec<&str> = line.split(',').collect();
            Some((*cells.first()?, (cells.get(1)?.parse().ok()?, cells.get(3)?.parse().ok()?)))
        })
        .collect()
}

/// Each operation's least figure, in the order in which they first came.
fn least_of_rounds(output: &str) -> Vec<(String, f64)> {
    let mut found: Vec<(String, f64)> = Vec::new();
    for line in output.lines() {
        let Some((op, ticks)) = figure(line) else { continue };
        match found.iter_mut().find(|(known, _)| known == op) {
            Some((_, least)) => *least = least.min(ticks),
            None => found.push((op.to_owned(), ticks)),
        }
    }
    found
}

/// The operation and its ticks each, whatever name of a guest stands before.
fn figure(line: &str) -> Option<(&str, f64)> {
    let (_, rest) = line.split_once("B ")?;
    let mut words = rest.split_whitespace();
    let op = words.next()?;
    let value = |word: &str, key: &str| word.strip_prefix(key)?.parse::<f64>().ok();
    let (count, total) = (value(words.next()?, "n=")?, value(words.next()?, "ticks=")?);
    if count > 0.0 { Some((op, total / count)) } else { None }
}

/// The hypervisor counts the exits between a guest's two marks, and says `umbra: guest NAME: exits=N` behind the
/// second; the operation's own line follows.
fn exits_per_op(output: &str, op: &str) -> Option<f64> {
    let mut exits: Option<f64> = None;
    for line in output.lines() {
        if let Some((_, count)) =
            line.split_once("umbra: guest ").and_then(|(_, rest)| rest.split_once(": exits="))
        {
            exits = count.trim().parse().ok();
        } else if let Some((_, rest)) = line.split_once("B ")
            && rest.split_whitespace().next() == Some(op)
        {
            let count =
                rest.split_whitespace().find_map(|word| word.strip_prefix("n=")?.parse::<f64>().ok())?;
            return exits.map(|exits| exits / count);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "[bench] ROUND 0\n[bench] B cpuid_leaf0 n=1000 ticks=109000 per=109.0\n\
        [  12] umbra: guest bench: exits=2000\n[bench] B cr3 n=1000 ticks=5000 per=5.0\n[bench] B cpuid_leaf0 n=1000 ticks=105000\n";

    #[test]
    fn the_least_of_the_rounds_counts() {
        assert_eq!(least_of_rounds(OUTPUT), [("cpuid_leaf0".to_owned(), 105.0), ("cr3".to_owned(), 5.0)]);
    }

    #[test]
    fn exits_stand_before_their_operation() {
        assert_eq!(exits_per_op(OUTPUT, "cr3"), Some(2.0));
        assert_eq!(exits_per_op(OUTPUT, "cpuid_leaf0"), None);
    }

    #[test]
    fn the_published_figures_are_readable() {
        let baseline = baseline();
        assert_eq!(baseline["cpuid_leaf0"], (5.0, 867.1));
        assert!(baseline.len() > 20);
    }
}
