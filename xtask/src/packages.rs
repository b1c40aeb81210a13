//! Gets what is missing: emulators by apt, Rust components by rustup.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

use crate::workspace::{self, BARE_METAL};

/// A Debian package, and how to see that what it brings is there, whoever brought it.
struct Package {
    name: &'static str,
    present: fn() -> bool,
}

const BOCHS: &[Package] = &[
    Package { name: "bochs", present: || workspace::has_program("bochs-bin") },
    Package { name: "bochs-term", present: bochs_has_term },
    Package { name: "bochsbios", present: || Path::new("/usr/share/bochs/BIOS-bochs-latest").exists() },
    Package { name: "vgabios", present: || Path::new("/usr/share/vgabios/vgabios.cirrus.bin").exists() },
];
const QEMU: &[Package] =
    &[Package { name: "qemu-system-x86", present: || workspace::has_program("qemu-system-x86_64") }];
const OVMF: &[Package] = &[Package { name: "ovmf", present: crate::emulator::has_ovmf }];

/// What can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Bochs with its text display, BIOS and VGA BIOS.
    Bochs,
    /// QEMU for x86.
    Qemu,
    /// UEFI firmware for QEMU.
    Ovmf,
}

/// Installs what is missing, as root or by `sudo -n`; else the error says the one command to type.
pub fn ensure(needs: &[Need]) -> Result<()> {
    let missing = missing(needs);
    if missing.is_empty() {
        return Ok(());
    }
    let Some(mut apt) = apt_get() else {
        let names = missing.join(" ");
        if workspace::has_program("apt-get") {
            bail!("{names} missing; type: sudo apt-get install -y --no-install-recommends {names}");
        }
        bail!("missing here: what Debian calls {names}; install them with your system's package manager");
    };
    eprintln!("installing {}", missing.join(" "));
    let arguments = |apt: &mut Command| {
        apt.args(["install", "-y", "--no-install-recommends"]).args(&missing).stdout(Stdio::null());
    };
    arguments(&mut apt);
    // A fresh system has no package lists yet.
    if !apt.status().context("cannot start apt-get")?.success() {
        if let Some(mut update) = apt_get() {
            workspace::must_succeed(update.arg("update").stdout(Stdio::null()))?;
        }
        if let Some(mut again) = apt_get() {
            arguments(&mut again);
            workspace::must_succeed(&mut again)?;
        }
    }
    let still = self::missing(needs);
    if !still.is_empty() {
        bail!("apt-get installed {}, but it is still not where it is looked for", still.join(" "));
    }
    Ok(())
}

/// Which packages are missing.
pub fn missing(needs: &[Need]) -> Vec<&'static str> {
    needs
        .iter()
        .flat_map(|need| match need {
            Need::Bochs => BOCHS,
            Need::Qemu => QEMU,
            Need::Ovmf => OVMF,
        })
        .filter(|package| !(package.present)())
        .map(|package| package.name)
        .collect()
}

/// apt-get with the rights to install, where they are to be had without a question.
fn apt_get() -> Option<Command> {
    if !workspace::has_program("apt-get") {
        return None;
    }
    let mut command = if fs::metadata("/proc/self").is_ok_and(|this| this.uid() == 0) {
        Command::new("apt-get")
    } else {
        let granted = Command::new("sudo")
            .args(["-n", "true"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success());
        if !granted {
            return None;
        }
        let mut sudo = Command::new("sudo");
        sudo.args(["-n", "apt-get"]);
        sudo
    };
    command.env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null());
    Some(command)
}

fn bochs_has_term() -> bool {
    let multiarch = fs::read_dir("/usr/lib").into_iter().flatten().flatten().map(|entry| entry.path());
    multiarch.chain(["/usr/lib".into()]).any(|folder| {
        fs::read_dir(folder.join("bochs/plugins"))
            .into_iter()
            .flatten()
            .flatten()
            .any(|plugin| plugin.file_name().to_string_lossy().starts_with("libbx_term"))
    })
}

/// Sees that the toolchain has the bare-metal target and the components of rust-toolchain.toml.
///
/// rustup installs them unasked with the toolchain itself, but not into one that was there before.
pub fn ensure_rust() -> Result<()> {
    let rustlib = workspace::rustlib()?;
    let has_tools = fs::read_dir(&rustlib)
        .with_context(|| format!("cannot read {}", rustlib.display()))?
        .flatten()
        .any(|target| target.path().join("bin/llvm-strip").is_file());
    if has_tools && rustlib.join(BARE_METAL).is_dir() && rustlib.join("src/rust/library").is_dir() {
        return Ok(());
    }
    eprintln!("installing the components that rust-toolchain.toml names");
    workspace::must_succeed(
        Command::new("rustup")
            .args(["toolchain", "install"])
            .current_dir(workspace::root())
            // Set by the cargo that started us; it would hide the file.
            .env_remove("RUSTUP_TOOLCHAIN"),
    )
    .context("needed: the target and components that rust-toolchain.toml names")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_needed_by_nothing() {
        assert!(missing(&[]).is_empty());
        ensure(&[]).unwrap();
    }
}
