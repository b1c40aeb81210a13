//! Makes RDRAND and RDSEED repeat themselves in Bochs.
//!
//! Bochs answers them with the C library's `rand`, seeded with the time of day. Linux places itself in memory by
//! them, so two runs of one image would differ by some ten thousand ticks. Preloading a `srand` that does nothing
//! leaves `rand` at the seed it starts with.

use std::{io::Write, path::PathBuf, process::Command, process::Stdio, sync::OnceLock};

use anyhow::{Context, Result, ensure};

use crate::workspace;

const SOURCE: &str = "void srand(unsigned seed) { (void)seed; }\n";

/// The library to preload; none where there is no C compiler, and then runs with Linux guests vary.
pub fn library() -> Option<PathBuf> {
    static LIBRARY: OnceLock<Option<PathBuf>> = OnceLock::new();
    LIBRARY
        .get_or_init(|| {
            build().inspect_err(|error| eprintln!("note: ticks will vary from run to run: {error:#}")).ok()
        })
        .clone()
}

fn build() -> Result<PathBuf> {
    let folder = workspace::cache_folder("bochs")?;
    let library = folder.join("fixed-seed.so");
    if library.is_file() {
        return Ok(library);
    }
    let unfinished = folder.join(format!("fixed-seed.{}", std::process::id()));
    let mut compiler = Command::new("cc")
        .args(["-shared", "-fPIC", "-x", "c", "-", "-o"])
        .arg(&unfinished)
        .stdin(Stdio::piped())
        .spawn()
        .context("no C compiler (apt-get install gcc)")?;
    if let Some(mut input) = compiler.stdin.take() {
        input.write_all(SOURCE.as_bytes())?;
    }
    ensure!(compiler.wait()?.success(), "the C compiler failed");
    // At one stroke: another run may be doing the same.
    std::fs::rename(&unfinished, &library)?;
    Ok(library)
}
