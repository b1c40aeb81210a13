//! The shadow MMU's parts on the machine that we are on: criterion's benchmarks, in nanoseconds of its clock.

use std::process::ExitCode;

use anyhow::Result;
use xtask::{packages, workspace};

/// Builds and runs them.
pub fn run() -> Result<ExitCode> {
    packages::ensure_rust()?;
    workspace::must_succeed(workspace::cargo().args(["bench", "--package", "shadow", "--bench", "mmu"]))?;
    Ok(ExitCode::SUCCESS)
}
