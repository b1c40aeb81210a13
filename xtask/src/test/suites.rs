//! Which tests there are, and how cargo builds them.

use std::{
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use xtask::workspace;

use super::report::Totals;

/// Tests that are built alike.
pub struct Suite {
    /// What they are called together.
    pub name: &'static str,
    packages: &'static [&'static str],
    /// Which of a package's targets.
    targets: &'static [&'static str],
    /// Compiled for the model checker.
    loom: bool,
    /// They boot emulators: two at a time.
    pub emulators: bool,
}

/// Every suite, the quickest first.
pub const ALL: &[Suite] = &[
    Suite {
        name: "host",
        packages: &["memory", "shadow", "machine", "hypervisor", "xtask"],
        targets: &["--lib", "--bins", "--tests"],
        loom: false,
        emulators: false,
    },
    Suite {
        name: "loom",
        packages: &["memory"],
        targets: &["--lib", "--test", "loom_*"],
        loom: true,
        emulators: false,
    },
    Suite { name: "loom (shadow)", packages: &["shadow"], targets: &["--lib"], loom: true, emulators: false },
    Suite {
        name: "emulator",
        packages: &["qemu-tests"],
        targets: &["--lib", "--tests"],
        loom: false,
        emulators: true,
    },
];

/// One program of tests.
pub struct Binary {
    /// Its package and target.
    pub name: String,
    executable: PathBuf,
    /// The package's folder: tests look for their files from there.
    folder: PathBuf,
}

impl Suite {
    /// Builds the suite's programs. A package that does not build is a failure, and the others are tested.
    pub fn build(&self, totals: &mut Totals) -> Vec<Binary> {
        // Together first: then cargo builds what they share once.
        if let Ok(binaries) = self.build_packages(self.packages) {
            return binaries;
        }
        let mut all = Vec::new();
        for package in self.packages {
            match self.build_packages(&[package]) {
                Ok(binaries) => all.extend(binaries),
                Err(error) => totals.fail(format!("{} ({package}): {error:#}", self.name)),
            }
        }
        all
    }

    fn build_packages(&self, packages: &[&str]) -> Result<Vec<Binary>> {
        let mut command = workspace::cargo();
        command
            .args([
                "test",
                "--no-run",
                "--profile",
                "tool",
                "--quiet",
                "--message-format=json-render-diagnostics",
            ])
            .args(self.targets)
            .stderr(Stdio::inherit());
        for package in packages {
            command.args(["--package", package]);
        }
        if self.loom {
            // A folder of its own, or the two ways of compiling would chase each other's artefacts.
            command
                .env("RUSTFLAGS", "--cfg loom")
                .env("CARGO_TARGET_DIR", workspace::target_folder().join("loom"));
        }
        let output = command.output().context("cannot start cargo")?;
        ensure!(output.status.success(), "does not build");
        let messages = String::from_utf8_lossy(&output.stdout);
        Ok(messages
            .lines()
            .filter_map(|line| Binary::in_message(&serde_json::from_str(line).ok()?))
            .collect())
    }
}

impl Binary {
    /// The test program that one of cargo's messages speaks of.
    fn in_message(message: &Value) -> Option<Self> {
        if !message["profile"]["test"].as_bool()? {
            return None;
        }
        let manifest = PathBuf::from(message["manifest_path"].as_str()?);
        let folder = manifest.parent()?.to_path_buf();
        let package = folder.file_name()?.to_string_lossy().into_owned();
        let (target, kind) = (message["target"]["name"].as_str()?, message["target"]["kind"][0].as_str()?);
        let name = match kind {
            "lib" => package,
            "bin" => format!("{package} ({target}, the program)"),
            _ => format!("{package}/{target}"),
        };
        Some(Self { name, executable: PathBuf::from(message["executable"].as_str()?), folder })
    }

    /// The program, ready to start.
    pub fn command(&self, filter: Option<&str>) -> Command {
        let mut command = Command::new(&self.executable);
        command.current_dir(&self.folder).env("CARGO_MANIFEST_DIR", &self.folder).args(filter);
        command.stdin(Stdio::null());
        command
    }

    /// The names of its tests.
    pub fn names(&self, filter: Option<&str>) -> Vec<String> {
        let output = workspace::output_of(self.command(filter).arg("--list")).unwrap_or_default();
        output.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn binary(message: &str) -> Option<Binary> {
        Binary::in_message(&serde_json::from_str(message).unwrap())
    }

    #[test]
    fn test_programs_are_told_from_other_artefacts() {
        let lib = binary(
            r#"{"manifest_path":"/p/memory/Cargo.toml","target":{"name":"memory","kind":["lib"]},
                "profile":{"test":true},"executable":"/t/memory-1"}"#,
        )
        .unwrap();
        assert_eq!((lib.name.as_str(), lib.folder.to_str()), ("memory", Some("/p/memory")));
        let test = r#"{"manifest_path":"/p/memory/Cargo.toml","target":{"name":"loom_counters","kind":["test"]},
                "profile":{"test":true},"executable":"/t/loom-1"}"#;
        assert_eq!(binary(test).unwrap().name, "memory/loom_counters");
        assert!(binary(&test.replace("true", "false")).is_none());
        assert!(binary(r#"{"reason":"build-finished","success":true}"#).is_none());
    }
}
