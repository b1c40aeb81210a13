//! Builds the bare-metal binary: one ELF with symbols, for backtraces, and a stripped one, for booting.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

use crate::{
    packages,
    workspace::{self, BARE_METAL},
};

/// The hypervisor, built.
#[derive(Clone, Debug)]
pub struct Hypervisor {
    /// With symbols and line tables.
    pub symbols: PathBuf,
    /// What is booted.
    pub stripped: PathBuf,
}

/// Builds package `boot` for the bare machine, in release mode.
pub fn build() -> Result<Hypervisor> {
    packages::ensure_rust()?;
    let symbols = build_bare_metal("boot", &[])?.into_iter().next().context("package boot has no binary")?;
    let stripped = strip(&symbols)?;
    Ok(Hypervisor { symbols, stripped })
}

/// Builds a package for the bare machine, in release mode, and returns its executables.
pub fn build_bare_metal(package: &str, arguments: &[&str]) -> Result<Vec<PathBuf>> {
    let mut command = workspace::cargo();
    command
        .args(["build", "--release", "--target", BARE_METAL, "--package", package])
        .args(arguments)
        .arg("--message-format=json-render-diagnostics")
        // These would replace the target's flags of .cargo/config.toml, frame pointers among them.
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .stderr(Stdio::inherit());
    let output = command.output().context("cannot start cargo")?;
    if !output.status.success() {
        bail!("package {package} does not build");
    }
    Ok(executables(&String::from_utf8_lossy(&output.stdout)))
}

/// The executables that cargo's JSON messages name.
pub fn executables(messages: &str) -> Vec<PathBuf> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter_map(|message| message.get("executable")?.as_str().map(PathBuf::from))
        .collect()
}

/// A copy of `elf` without symbols and debug sections, beside it.
pub fn strip(elf: &Path) -> Result<PathBuf> {
    let stripped = elf.with_extension("stripped");
    let newer = |a: &Path, b: &Path| -> Option<bool> {
        Some(fs::metadata(a).ok()?.modified().ok()? > fs::metadata(b).ok()?.modified().ok()?)
    };
    if newer(&stripped, elf) != Some(true) {
        workspace::must_succeed(
            Command::new(llvm_tool("llvm-strip")?).args(["--strip-all", "-o"]).arg(&stripped).arg(elf),
        )?;
    }
    Ok(stripped)
}

/// A program of the toolchain's `llvm-tools` component.
fn llvm_tool(name: &str) -> Result<PathBuf> {
    let rustlib = workspace::rustlib()?;
    let tool = fs::read_dir(&rustlib)
        .with_context(|| format!("cannot read {}", rustlib.display()))?
        .flatten()
        .map(|target| target.path().join("bin").join(name))
        .find(|tool| tool.is_file());
    tool.with_context(|| {
        format!("the toolchain has no {name}; `rustup toolchain install` adds it (llvm-tools)")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn executables_are_found_among_other_messages() {
        let messages = concat!(
            "{\"reason\":\"compiler-artifact\",\"executable\":null}\n",
            "not JSON\n",
            "{\"reason\":\"compiler-artifact\",\"executable\":\"/t/boot\"}\n",
            "{\"reason\":\"build-finished\",\"success\":true}\n",
        );
        assert_eq!(executables(messages), [PathBuf::from("/t/boot")]);
    }
}
