//! `cargo xtask test`: every test there is, host and emulator, and one line of totals.

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
    /// Only tests whose name contains this
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
    let mut totals = Totals::default();
    for suite in suites::ALL.iter().filter(|suite| !(arguments.host_only && suite.emulators)) {
        if arguments.list {
            suite.list(filter, &mut totals);
        } else {
            suite.run(filter, &mut totals)?;
        }
    }
    if arguments.list {
        println!("{} tests", totals.listed);
        return Ok(if totals.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    for failure in &totals.failures {
        println!("FAILED {failure}");
    }
    if totals.is_empty() {
        println!("no test's name contains `{}`", filter.unwrap_or_default());
    }
    println!("{totals}");
    Ok(if totals.failures.is_empty() && !totals.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
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
            binary.run(self, filter, totals);
        }
        Ok(())
    }

    fn list(&self, filter: Option<&str>, totals: &mut Totals) {
        for binary in self.build(totals) {
            for name in binary.names(filter) {
                println!("{}: {name}", binary.name);
                totals.listed += 1;
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
