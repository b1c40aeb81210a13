//! `cargo xtask bench`: what operations cost, in exact ticks of Bochs.
//!
//! A tick is an instruction, not a cycle: the number of exits stands beside the ticks.

mod costs;
mod host;
mod linux;
mod markdown;
mod micro;
mod overhead;
mod reclaim;
mod size_query;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Result, bail};
use comfy_table::{CellAlignment, Table, presets::NOTHING};
use xtask::{
    emulator::{End, Machine, Outcome},
    packages::{self, Need},
    prepare::elf,
    progress::stage,
};

/// A CPUID exit may cost this many ticks.
const CPUID_TICKS_MAX: f64 = 150.0;
/// Linux may take this many times as long as natively.
const LINUX_RATIO_MAX: f64 = 1.25;

/// The command's arguments.
#[derive(clap::Args)]
pub struct Arguments {
    /// How to print the figures
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// Leave out Debian's kernel, which takes a minute
    #[arg(long)]
    no_linux: bool,
    /// A hypervisor ELF to measure instead of building one
    #[arg(long, value_name = "ELF")]
    kernel: Option<PathBuf>,
    /// Measure the shadow MMU's parts on this machine instead, by its clock
    #[arg(long, conflicts_with_all = ["format", "no_linux", "kernel"])]
    host: bool,
    /// Compare four ways to count shadow pages on this machine, and write the figures into docs/counting.md
    #[arg(long, conflicts_with_all = ["format", "no_linux", "kernel", "host"])]
    size_query: bool,
    /// Compare the order in which shadow pages are reclaimed with KVM's of until 2024
    #[arg(long, conflicts_with_all = ["format", "no_linux", "host", "size_query"])]
    reclaim: bool,
}

/// A table to read or one to compute with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// Columns, with native and KVM's figures beside ours
    #[default]
    Table,
    /// op,ticks,exits,native,kvm_ept0_small_host,overhead_ratio
    Csv,
}

/// One operation.
struct Row {
    op: String,
    /// Ticks each.
    ticks: f64,
    /// Exits each, where the hypervisor counts them.
    exits: Option<f64>,
    /// Ticks without a hypervisor.
    native: Option<f64>,
    /// Ticks under KVM's shadow MMU.
    kvm: Option<f64>,
}

/// Measures and prints; fails where a figure misses its target.
pub fn bench(arguments: &Arguments) -> Result<ExitCode> {
    if arguments.host {
        return host::run();
    }
    if arguments.size_query {
        return size_query::run();
    }
    packages::ensure(&[Need::Bochs])?;
    let umbra = elf(arguments.kernel.as_deref())?;
    if arguments.reclaim {
        let fewer = reclaim::compare(&umbra)?;
        return Ok(if fewer { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let mut rows = Vec::new();
    let mut complete = true;
    let mut take = |what: &str, result: Result<Vec<Row>>| match result {
        Ok(more) => rows.extend(more),
        Err(error) => {
            eprintln!("error: {what}: {error:#}");
            complete = false;
        }
    };
    take("single operations", stage("timing single operations", || micro::measure(&umbra)));
    let mut costs = None;
    take(
        "frames and counters",
        stage("timing frames and counters", || {
            let measured = costs.insert(costs::measure()?);
            Ok(measured.rows().collect())
        }),
    );
    if !arguments.no_linux {
        take("Linux", stage("timing Linux, natively and as a guest", || linux::measure(&umbra)));
    }
    match arguments.format {
        Format::Csv => print_csv(&rows),
        Format::Table => {
            print_table(&rows);
            if let Some(summary) = overhead::summary(&rows) {
                println!(
                    "overhead of the {} operations that exit, as a part of KVM's: geometric mean {:.3}; worst: {} {:.3}",
                    summary.count, summary.mean, summary.worst.0, summary.worst.1
                );
            }
            if let Some(costs) = &costs {
                println!("{}", costs.growth());
            }
        }
    }
    let mut missed = missed(&rows);
    missed.extend(costs.iter().flat_map(costs::Costs::missed));
    for text in &missed {
        eprintln!("missed: {text}");
    }
    Ok(if complete && missed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Boots and insists on an end of its own.
fn run(machine: &Machine, timeout: Duration) -> Result<Outcome> {
    let outcome = machine.run(timeout)?;
    if outcome.end == End::TimedOut {
        bail!("still running after {} s; its output:\n{}", timeout.as_secs(), outcome.output);
    }
    Ok(outcome)
}

/// What the hypervisor says when a guest has ended: `umbra: guest NAME ended: HOW (N exits, T ticks)`.
struct Ended {
    exits: f64,
    ticks: f64,
}

fn ended(output: &str) -> Option<Ended> {
    output.lines().find_map(|line| {
        let (_, summary) = line.split_once("umbra: guest ")?.1.rsplit_once('(')?;
        let words: Vec<&str> = summary.split([' ', ',', ')']).filter(|word| !word.is_empty()).collect();
        let count = |unit: &str| words.windows(2).find(|pair| pair[1] == unit)?[0].parse().ok();
        Some(Ended { exits: count("exits")?, ticks: count("ticks")? })
    })
}

fn missed(rows: &[Row]) -> Vec<String> {
    let row = |op: &str| rows.iter().find(|row| row.op == op);
    let mut missed = Vec::new();
    if let Some(cpuid) = row("cpuid_leaf0").filter(|row| row.ticks > CPUID_TICKS_MAX) {
        missed
            .push(format!("a CPUID exit costs {:.0} ticks, the target is {CPUID_TICKS_MAX:.0}", cpuid.ticks));
    }
    if let Some((linux, native)) = row("linux_entry_to_init").and_then(|row| Some((row.ticks, row.native?)))
        && linux > native * LINUX_RATIO_MAX
    {
        missed.push(format!(
            "Linux takes {:.2} x its native time, the target is {LINUX_RATIO_MAX}",
            linux / native
        ));
    }
    missed.extend(overhead::missed(rows));
    missed
}

/// A cell of a table; empty where there is no value.
fn cell(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(String::new, |value| format!("{value:.digits$}"))
}

fn print_csv(rows: &[Row]) {
    println!("op,ticks,exits,native,kvm_ept0_small_host,overhead_ratio");
    for row in rows {
        println!(
            "{},{:.1},{},{},{},{}",
            row.op,
            row.ticks,
            cell(row.exits, 4),
            cell(row.native, 1),
            cell(row.kvm, 1),
            cell(row.ratio(), 4)
        );
    }
}

fn print_table(rows: &[Row]) {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header([
        "operation",
        "ticks",
        "exits",
        "native",
        "KVM shadow",
        "x native",
        "x KVM",
        "overhead",
    ]);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    for row in rows {
        table.add_row([
            row.op.clone(),
            cell(Some(row.ticks), 1),
            cell(row.exits, 3),
            cell(row.native, 1),
            cell(row.kvm, 1),
            cell(row.native.map(|native| row.ticks / native), 2),
            cell(row.kvm.map(|kvm| row.ticks / kvm), 2),
            cell(row.ratio(), 3),
        ]);
    }
    println!("{table}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_judged() {
        let row = |op: &str, ticks, native| Row { op: op.into(), ticks, exits: None, native, kvm: None };
        let good = [row("cpuid_leaf0", 149.0, None), row("linux_entry_to_init", 1.2e9, Some(1e9))];
        assert!(missed(&good).is_empty());
        let bad = [row("cpuid_leaf0", 151.0, None), row("linux_entry_to_init", 1.3e9, Some(1e9))];
        assert_eq!(missed(&bad).len(), 2);
    }

    #[test]
    fn the_summary_of_a_guest_is_read() {
        let ended =
            ended("[g] (5 exits, 1 ticks)\n[ 1668] umbra: guest g ended: power-off (52 exits, 156 ticks)\n");
        assert!(ended.is_some_and(|ended| ended.exits == 52.0 && ended.ticks == 156.0));
        assert!(super::ended("umbra: exit 0\n").is_none());
    }
}
