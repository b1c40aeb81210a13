//! `cargo xtask test`: every test there is, host and emulator, and one line of totals.

mod miri;
mod report;
mod suites;

use std::process::ExitCode;

use anyhow::Result;
use xtask::{
    hypervisor, image,
    packages::{self, Need},
    progress::stage,
};

use report::Totals;
use suites::{Binary, Suite};

/// The command's arguments.
#[derive(clap::Args)]
pub struct Arguments {
    /// Only tests whose name contains this; `miri`: only those under Miri
    filter: Option<String>,
    /// Name the tests instead of running them
    #[arg(long)]
    list: bool,
    /// Leave out the tests that boot an emulator
    #[arg(long)]
    host_only: bool,
}

/// Runs the suites one after another: the quick ones first, the emulators last.
pub fn test(arguments: &Arguments) -> Result<ExitCode> {
    let filter = arguments.filter.as_deref();
    let whole = filter.is_none() && !arguments.host_only;
    let mut totals = Totals::default();
    let ordinary = |suite: &&Suite| filter != Some(miri::WORD) && !(arguments.host_only && suite.emulators);
    for suite in suites::ALL.iter().filter(ordinary) {
        if arguments.list {
            suite.list(filter, &mut totals);
        } else {
            suite.run(filter, &mut totals)?;
        }
    }
    if !arguments.list && filter.is_none_or(|filter| filter == miri::WORD) {
        miri::run(&mut totals);
    }
    if whole {
        for row in hazards_without_a_test(&totals.names) {
            totals.fail(format!("docs/hazards.md: no test is named after row H{row}"));
        }
    }
    for failure in &totals.failures {
        println!("FAILED {failure}");
    }
    if arguments.list {
        println!("{} tests", totals.names.len());
        return Ok(if totals.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    if totals.is_empty() {
        println!("no test's name contains `{}`", filter.unwrap_or_default());
    }
    println!("{totals}");
    Ok(if totals.failures.is_empty() && !totals.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Rows of docs/hazards.md.
const HAZARDS: u32 = 32;

/// The rows that no test is named after: `h07_...`, or `h11_h18_...` for two.
fn hazards_without_a_test(names: &[String]) -> Vec<u32> {
    let is_named = |row: &u32| {
        let mark = format!("h{row:02}_");
        names.iter().any(|name| name.rsplit("::").next().unwrap_or_default().contains(&mark))
    };
    (1..=HAZARDS).filter(|row| !is_named(row)).collect()
}

/// Once, with its progress in view, not inside the first test that needs it.
fn build_what_boots() -> Result<()> {
    stage("building the hypervisor", hypervisor::build)?;
    stage("building the image tool and the loader's stages", image::tool)?;
    Ok(())
}

impl Suite {
    fn run(&self, filter: Option<&str>, totals: &mut Totals) -> Result<()> {
        let mut binaries = stage(&format!("building the {} tests", self.name), || self.build(totals));
        if filter.is_some() {
            // A page of programs that have nothing to run would hide the one that has.
            binaries.retain(|binary| !binary.names(filter).is_empty());
        }
        if self.emulators && !binaries.is_empty() {
            packages::ensure(&[Need::Bochs, Need::Qemu, Need::Ovmf])?;
            if let Err(error) = build_what_boots() {
                totals.fail(format!("{}: {error:#}", self.name));
                return Ok(());
            }
        }
        for binary in binaries {
            totals.names.extend(binary.names(filter));
            binary.run(self, filter, totals);
        }
        Ok(())
    }

    fn list(&self, filter: Option<&str>, totals: &mut Totals) {
        for binary in self.build(totals) {
            for name in binary.names(filter) {
                println!("{}: {name}", binary.name);
                totals.names.push(name);
            }
        }
    }
}

impl Binary {
    fn run(&self, suite: &Suite, filter: Option<&str>, totals: &mut Totals) {
        let mut command = self.command(filter);
        if suite.emulators {
            command.args(["--test-threads", "2"]);
        }
        println!("--- {}", self.name);
        report::follow(&mut command, &self.name, totals);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hazard_without_a_test_is_missed() {
        let mut names: Vec<String> =
            (1..=HAZARDS).map(|row| format!("tests::tables::h{row:02}_of_it")).collect();
        assert!(hazards_without_a_test(&names).is_empty());
        names[17] = "tests::tables::h11_h18_two_in_one".to_owned();
        assert!(hazards_without_a_test(&names).is_empty());
        names.remove(3);
        names.push("h04::something_else".to_owned());
        assert_eq!(hazards_without_a_test(&names), [4]);
    }
}
