//! `cargo xtask check`: what must hold before a change is offered.

use std::{
    fs,
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, ensure};
use xtask::{
    packages,
    workspace::{self, BARE_METAL},
};

/// Crates that run, or whose tests run, on the host.
const HOST: &[&str] = &["memory", "shadow", "machine", "hypervisor", "xtask", "qemu-tests"];
/// Crates that are built for the bare machine.
const BARE: &[&str] =
    &["memory", "shadow", "machine", "hypervisor", "boot", "costs", "native", "test-guests"];
/// Crates without unsafe code, by design: all that is hard to get right about guests is in them.
const PURE: &[&str] = &["hypervisor/machine", "hypervisor/shadow", "hypervisor/memory"];
/// Crates that offer privileged instructions; a pure crate depends on none.
const PRIVILEGED: &[&str] = &["x86", "x86_64", "uart_16550", "acpi", "raw-cpuid"];

type Check = fn() -> Result<()>;

/// Runs every check, also after one has failed.
pub fn check() -> Result<ExitCode> {
    packages::ensure_rust()?;
    let checks: &[(&str, Check)] = &[
        ("formatting", formatting),
        ("lints, host crates and tests", host_lints),
        ("lints, bare-metal crates", bare_lints),
        ("lints, image tool", image_lints),
        ("documentation", documentation),
        ("pure crates without unsafe code", pure_crates),
        ("licences and sources of dependencies", dependencies),
    ];
    let mut failed = Vec::new();
    for (name, check) in checks {
        println!("--- {name}");
        if let Err(error) = check() {
            eprintln!("error: {name}: {error:#}");
            failed.push(*name);
        }
    }
    if failed.is_empty() {
        println!("all checks passed");
        return Ok(ExitCode::SUCCESS);
    }
    println!("failed: {}", failed.join("; "));
    Ok(ExitCode::FAILURE)
}

fn formatting() -> Result<()> {
    workspace::must_succeed(workspace::cargo().args(["fmt", "--all", "--check"]))?;
    workspace::must_succeed(image_tool().args(["fmt", "--check"]))
}

/// Cargo in the image tool's folder, which has its own settings.
fn image_tool() -> Command {
    let mut cargo = workspace::cargo();
    cargo.current_dir(workspace::root().join("boot/image"));
    for name in ["CARGO_TARGET_DIR", "CARGO_BUILD_TARGET_DIR", "RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS"] {
        cargo.env_remove(name);
    }
    cargo
}

fn host_lints() -> Result<()> {
    workspace::must_succeed(
        with_packages(workspace::cargo().args(["clippy", "--profile", "tool", "--all-targets"]), HOST)
            .args(["--", "-D", "warnings"]),
    )
}

fn bare_lints() -> Result<()> {
    let lint = |packages, features: &[&str]| {
        let mut cargo = workspace::cargo();
        cargo.args(["clippy", "--release", "--target", BARE_METAL]).args(features);
        workspace::must_succeed(with_packages(&mut cargo, packages).args(["--", "-D", "warnings"]))
    };
    lint(BARE, &[])?;
    // What `bench --reclaim` compares with.
    lint(&["shadow", "hypervisor"], &["--features", "first-guest"])
}

fn image_lints() -> Result<()> {
    // In release mode, as it is built: the bootloader's stages take minutes and are made once.
    workspace::must_succeed(image_tool().args(["clippy", "--release", "--", "-D", "warnings"]))
}

fn documentation() -> Result<()> {
    workspace::must_succeed(
        with_packages(workspace::cargo().args(["doc", "--no-deps", "--profile", "tool"]), HOST)
            .args(["--document-private-items"])
            .env("RUSTDOCFLAGS", "-D warnings"),
    )
}

fn with_packages<'a>(command: &'a mut Command, packages: &[&str]) -> &'a mut Command {
    for package in packages {
        command.args(["--package", package]);
    }
    command
}

fn pure_crates() -> Result<()> {
    for folder in PURE {
        let folder = workspace::root().join(folder);
        let lib = folder.join("src/lib.rs");
        let text = fs::read_to_string(&lib).with_context(|| format!("cannot read {}", lib.display()))?;
        ensure!(text.contains("#![forbid(unsafe_code)]"), "{} lacks #![forbid(unsafe_code)]", lib.display());
        let manifest = fs::read_to_string(folder.join("Cargo.toml"))?;
        for name in PRIVILEGED {
            let named = manifest.lines().any(|line| depends_on(line, name));
            ensure!(!named, "{} depends on {name}, which offers privileged instructions", folder.display());
        }
    }
    Ok(())
}

/// Whether a line of a Cargo.toml names this dependency.
fn depends_on(line: &str, name: &str) -> bool {
    let key = line.split(['=', '.']).next().unwrap_or_default();
    key.trim() == name
}

fn dependencies() -> Result<()> {
    if !workspace::has_program("cargo-deny") {
        println!("skipped: cargo-deny is not installed (cargo install --locked cargo-deny)");
        return Ok(());
    }
    // Advisories want a network, and a new one must not break a build: they are for a person to look at.
    let (rules, what) = (workspace::root().join("deny.toml"), ["licenses", "bans", "sources"]);
    for mut cargo in [workspace::cargo(), image_tool()] {
        workspace::must_succeed(cargo.args(["deny", "--config"]).arg(&rules).arg("check").args(what))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::depends_on;

    #[test]
    fn a_dependency_is_named_by_its_key() {
        assert!(depends_on("x86.workspace = true", "x86"));
        assert!(depends_on("x86 = \"0.52\"", "x86"));
        assert!(!depends_on("iced-x86.workspace = true", "x86"));
        assert!(!depends_on("x86_64.workspace = true", "x86"));
    }
}
