//! `cargo xtask`: run, test, image, bench, fuzz, check.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use xtask::manifest::Problems;

mod bench;
mod check;
mod fuzz;
mod run;
mod test;
mod write_image;

/// Builds Umbra, boots it and tests it.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build everything, pack the image and boot it
    Run(run::Arguments),
    /// Run all tests, host and emulator
    Test(test::Arguments),
    /// Write a disk image for a USB stick, for BIOS and UEFI
    Image(write_image::Arguments),
    /// Measure what operations cost, in exact ticks
    Bench(bench::Arguments),
    /// Fuzz the shadow MMU, guided by coverage
    Fuzz(fuzz::Arguments),
    /// Check formatting, lints, documentation, unsafe code and licences
    Check,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Run(arguments) => run::run(&arguments),
        Command::Test(arguments) => test::test(&arguments),
        Command::Image(arguments) => write_image::write(&arguments),
        Command::Bench(arguments) => bench::bench(&arguments),
        Command::Fuzz(arguments) => fuzz::fuzz(&arguments),
        Command::Check => check::check(),
    };
    result.unwrap_or_else(|error| {
        match error.downcast_ref::<Problems>() {
            // Each problem says "error" itself, and shows its place.
            Some(problems) => eprintln!("{problems}"),
            None => eprintln!("error: {error:#}"),
        }
        ExitCode::FAILURE
    })
}
