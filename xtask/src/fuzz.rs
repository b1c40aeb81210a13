//! `cargo xtask fuzz`: random guests of the shadow MMU, their steps chosen for the code that they reach.

use std::{
    fs, panic,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, bail, ensure};
use shadow::model::{listing, trial};
use xtask::{
    progress::stage,
    workspace::{self, root},
};

/// What makes rustc and LLVM count the edges that an input takes, for libFuzzer.
const COVERAGE: &[&str] = &[
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "--cfg=fuzzing",
];
/// Coverage flags are for the fuzzer alone, not for build scripts: so a target is named, though it is the host's.
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// The longest input: its set-up and 240 steps of eight bytes.
const INPUT_BYTES: usize = 8 * 241;

/// The command's arguments.
#[derive(clap::Args)]
pub struct Arguments {
    /// Stop after so many seconds; 0: when a counterexample is found, or by Ctrl-c
    #[arg(long, default_value_t = 0)]
    seconds: u64,
    /// Run this one input or corpus file instead
    #[arg(long, value_name = "FILE")]
    replay: Option<PathBuf>,
}

/// Fuzzes; fails with a counterexample, which is shown as short as it gets.
pub fn fuzz(arguments: &Arguments) -> Result<ExitCode> {
    if let Some(file) = &arguments.replay {
        return replay(file);
    }
    let fuzzer = stage("building the fuzzer", build)?;
    let found = workspace::cache_folder("fuzz/corpus")?;
    let artifacts = workspace::cache_folder("fuzz/found")?;
    seed(&found)?;
    println!("what is new to it goes to {}", found.display());
    let before = inputs(&artifacts)?;
    let status = Command::new(fuzzer)
        .arg(&found)
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .arg(format!("-max_total_time={}", arguments.seconds))
        .arg(format!("-max_len={INPUT_BYTES}"))
        .args(["-len_control=0", "-timeout=20", "-print_final_stats=1"])
        .status()
        .context("cannot start the fuzzer")?;
    if status.success() {
        return Ok(ExitCode::SUCCESS);
    }
    match inputs(&artifacts)?.into_iter().find(|file| !before.contains(file)) {
        Some(file) => replay(&file),
        None => bail!("the fuzzer ended with {status}, without a counterexample"),
    }
}

fn inputs(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    entries.map(|entry| Ok(entry?.path())).collect()
}

/// The kept counterexamples are what the fuzzer starts from.
fn seed(folder: &Path) -> Result<()> {
    for file in inputs(&root().join("hypervisor/shadow/corpus"))? {
        let name = file.file_stem().unwrap_or_default();
        fs::write(folder.join(name), listing::to_bytes(&read(&file)?))?;
    }
    Ok(())
}

/// A sequence from the corpus (text) or the fuzzer (bytes).
fn read(file: &Path) -> Result<Vec<u64>> {
    let bytes = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    if file.extension().is_none_or(|extension| extension != "txt") {
        return Ok(listing::from_bytes(&bytes));
    }
    listing::from_text(&String::from_utf8_lossy(&bytes))
        .map_err(|error| anyhow::anyhow!("{}: {error}", file.display()))
}

fn replay(file: &Path) -> Result<ExitCode> {
    let numbers = read(file)?;
    // Each attempt to leave out a step may panic.
    let loud = panic::take_hook();
    panic::set_hook(Box::new(|_| ()));
    let reduced = listing::reduced(&numbers);
    panic::set_hook(loud);
    let Some(numbers) = reduced else {
        println!("{}: nothing wrong", file.display());
        return Ok(ExitCode::SUCCESS);
    };
    println!("{} fails. The steps that it needs, for a file in hypervisor/shadow/corpus:\n", file.display());
    println!("{}", listing::to_text(&numbers));
    // Once more, to say why.
    let _ = panic::catch_unwind(|| trial::run(&numbers));
    Ok(ExitCode::FAILURE)
}

fn build() -> Result<PathBuf> {
    ensure!(workspace::has_program("g++"), "libFuzzer wants a C++ compiler: apt-get install g++");
    let folder = workspace::target_folder().join("fuzz");
    workspace::must_succeed(
        workspace::cargo()
            .args(["build", "--quiet", "--profile", "tool", "--package", "shadow-fuzz", "--target", TARGET])
            .env("RUSTFLAGS", COVERAGE.join(" "))
            .env("CARGO_TARGET_DIR", &folder),
    )?;
    Ok(folder.join(TARGET).join("tool/shadow-fuzz"))
}
