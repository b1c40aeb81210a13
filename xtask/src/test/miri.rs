//! The pure crates' tests under Miri, which sees undefined behaviour and overflows that a processor lets pass. Each
//! instruction costs a thousand there, so it is a part of the tests.

use std::process::{Command, Stdio};

use xtask::workspace;

use super::report::{self, Totals};

/// The filter that means these tests alone.
pub const WORD: &str = "miri";
/// The toolchain: Miri is no part of a stable one.
const TOOLCHAIN: &str = "nightly-2026-10-15";

/// A crate, and words that the names of its tests contain which are run: what takes seconds there, not minutes. (Not the
/// emulator's: its decoder library breaks Miri's experimental rules of borrowing.)
const PARTS: &[(&str, &[&str])] = &[
    ("memory", &["slots::tests::ram", "slots::tests::the", "counters::exits", "marks::"]),
    ("machine", &["cpu::control", "cpu::cpuid", "cpu::event", "cpu::registers", "cpu::task"]),
    ("shadow", &["architecture::", "tests::dirty", "tests::large", "tests::modes::h17"]),
];

/// Runs them; where the toolchain cannot be had they are skipped, with the reason.
pub fn run(totals: &mut Totals) {
    if let Err(reason) = ensure_toolchain() {
        println!("--- Miri\nskipped: {reason}");
        totals.skip(PARTS.len() as u64);
        return;
    }
    for (package, words) in PARTS {
        let name = format!("{package} (Miri)");
        println!("--- {name}");
        let mut command = rustup();
        command
            .args([
                "run",
                TOOLCHAIN,
                "cargo",
                "miri",
                "test",
                "--quiet",
                "--profile",
                "tool",
                "--lib",
                "--package",
                package,
                "--",
            ])
            .args(*words)
            .env("CARGO_TARGET_DIR", workspace::target_folder().join("miri"))
            .env("MIRIFLAGS", "-Zmiri-disable-isolation")
            .env("PROPTEST_CASES", "1")
            .stdin(Stdio::null());
        report::follow(&mut command, &name, totals);
    }
}

/// rustup, rid of what the toolchain that runs us has set.
fn rustup() -> Command {
    let mut command = Command::new("rustup");
    command.current_dir(workspace::root());
    for name in ["RUSTUP_TOOLCHAIN", "CARGO", "RUSTC", "RUSTFLAGS"] {
        command.env_remove(name);
    }
    command
}

/// Installs the toolchain if it is missing.
fn ensure_toolchain() -> Result<(), String> {
    let there = rustup().args(["run", TOOLCHAIN, "cargo", "miri", "--version"]).output();
    if there.is_ok_and(|output| output.status.success()) {
        return Ok(());
    }
    println!("installing {TOOLCHAIN} with Miri");
    let install = ["toolchain", "install", TOOLCHAIN, "--profile", "minimal", "--component", "miri,rust-src"];
    match rustup().args(install).output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let last = said.lines().last().unwrap_or("it failed");
            Err(format!("`rustup {}`: {last}", install.join(" ")))
        }
        Err(error) => Err(format!("rustup: {error}")),
    }
}
