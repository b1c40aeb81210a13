//! Reasons not to run a test.

use std::sync::OnceLock;

use anyhow::Result;
use xtask::{kernels, workspace};

/// The error that skips a test instead of failing it.
#[derive(Clone, Debug)]
pub struct Skip(pub String);

impl std::fmt::Display for Skip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// Skips where this program is not installed.
pub fn without_program(name: &str) -> Result<()> {
    if workspace::has_program(name) {
        return Ok(());
    }
    Err(Skip(format!("{name} is not installed")).into())
}

/// Skips where Debian's kernel cannot be had.
pub fn without_debian() -> Result<()> {
    // Asked once: without a network each attempt takes its time.
    static KNOWN: OnceLock<Result<(), String>> = OnceLock::new();
    let known = KNOWN.get_or_init(|| kernels::debian().map(|_| ()));
    known.clone().map_err(|reason| Skip(reason).into())
}
