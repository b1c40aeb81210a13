//! Disk images: packed by the tool in boot/image, kept by their contents.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result};

use crate::workspace;

/// How many packed images stay; older ones go when a new one is made.
const IMAGES_KEPT: usize = 24;
/// An image younger than this may be in use by another run.
const IN_USE: Duration = Duration::from_secs(3600);

/// The packing tool, built if need be.
///
/// The `bootloader` crate builds its stages with `-Zbuild-std`, hence `RUSTC_BOOTSTRAP` for this one build. Its
/// nested builds wait for ever on their own lock when `CARGO_TARGET_DIR` is set, and our flags would spoil them.
pub fn tool() -> Result<PathBuf> {
    let folder = workspace::root().join("boot/image");
    workspace::must_succeed(
        workspace::cargo()
            .current_dir(&folder)
            .args(["build", "--release", "--quiet"])
            .env("RUSTC_BOOTSTRAP", "1")
            .env_remove("CARGO_TARGET_DIR")
            .env_remove("CARGO_BUILD_TARGET_DIR")
            .env_remove("CARGO_BUILD_TARGET")
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_ENCODED_RUSTFLAGS"),
    )
    .context("the image tool does not build")?;
    Ok(folder.join("target/release/image"))
}

/// A disk image with this kernel (a stripped ELF) and payload that boots from BIOS and UEFI.
///
/// The same contents give the same file, packed once.
pub fn pack(kernel: &Path, payload: Option<&Path>) -> Result<PathBuf> {
    let tool = tool()?;
    let mut inputs = vec![tool.as_path(), kernel];
    inputs.extend(payload);
    let folder = workspace::cache_folder("images")?;
    let image = folder.join(format!("{}.img", workspace::content_key(&inputs)?));
    if !image.is_file() {
        prune(&folder);
        let unfinished = tempfile::Builder::new().suffix(".part").tempfile_in(&folder)?.into_temp_path();
        let mut command = Command::new(&tool);
        command.arg(kernel).arg(&unfinished).args(payload);
        workspace::must_succeed(&mut command)?;
        unfinished.persist(&image).with_context(|| format!("cannot write {}", image.display()))?;
    }
    Ok(image)
}

/// Removes the oldest images. What fails stays: it only costs space.
fn prune(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    let mut images: Vec<(SystemTime, PathBuf)> = entries
        .flatten()
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    images.sort();
    let excess = images.len().saturating_sub(IMAGES_KEPT);
    for (written, path) in images.into_iter().take(excess) {
        if written.elapsed().is_ok_and(|age| age > IN_USE) {
            let _ = fs::remove_file(path);
        }
    }
}
