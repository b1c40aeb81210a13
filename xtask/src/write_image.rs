//! `cargo xtask image`.

use std::{fs, path::PathBuf, process::ExitCode};

use anyhow::{Context, Result};
use xtask::{manifest::Limits, payload::Options, prepare::prepare};

/// The command's arguments.
#[derive(clap::Args)]
pub struct Arguments {
    /// The guests; without one: two Debian guests and one of our own
    manifest: Option<PathBuf>,
    /// The image's file
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

/// Writes one disk image that boots from BIOS and from UEFI.
pub fn write(arguments: &Arguments) -> Result<ExitCode> {
    // A real machine has a person before it; how much memory and how many cores it has is not known here.
    let options = Options { interactive: true };
    let prepared = prepare(arguments.manifest.as_deref(), &Limits::default(), &options, None)?;
    let output = &arguments.output;
    // Written, not copied: the cached image is private to us, this one is the person's.
    let bytes = fs::read(&prepared.image)?;
    fs::write(output, &bytes).with_context(|| format!("cannot write {}", output.display()))?;
    println!("{} ({} MiB) boots from BIOS and from UEFI.", output.display(), bytes.len().div_ceil(1 << 20));
    println!("To a USB stick (all that is on it will be lost):");
    println!("  sudo dd if={} of=/dev/sdX bs=4M conv=fsync status=progress", output.display());
    Ok(ExitCode::SUCCESS)
}
