//! From a manifest to a disk image: what run, image and bench have in common.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::{
    hypervisor::{self, Hypervisor},
    image,
    manifest::{self, Limits, Source},
    payload::{self, Options, Payload},
    progress::stage,
};

/// What is booted.
pub struct Prepared {
    /// The hypervisor's two ELFs.
    pub hypervisor: Hypervisor,
    /// The disk image.
    pub image: PathBuf,
}

/// Checks the manifest (without one: the default), makes the payload, and packs both with the hypervisor.
///
/// `kernel`: a hypervisor ELF to take instead of building one.
pub fn prepare(
    manifest: Option<&Path>,
    limits: &Limits,
    options: &Options,
    kernel: Option<&Path>,
) -> Result<Prepared> {
    // The manifest first: its errors should not wait for a build.
    let source = manifest.map_or_else(|| Ok(Source::default_manifest()), Source::read)?;
    let plan = manifest::check(&source, limits)?;
    let hypervisor = elf(kernel)?;
    let Payload { path, notes, .. } = stage("preparing the guests", || payload::assemble(&plan, options))?;
    for note in notes {
        eprintln!("note: {note}");
    }
    pack(hypervisor, Some(&path))
}

/// Packs a payload as it is.
pub fn prepare_blob(payload: &Path, kernel: Option<&Path>) -> Result<Prepared> {
    pack(elf(kernel)?, Some(payload))
}

/// The hypervisor: this ELF, or built now.
pub fn elf(kernel: Option<&Path>) -> Result<Hypervisor> {
    match kernel {
        Some(symbols) => Ok(Hypervisor { symbols: symbols.into(), stripped: hypervisor::strip(symbols)? }),
        None => stage("building the hypervisor", hypervisor::build),
    }
}

fn pack(hypervisor: Hypervisor, payload: Option<&Path>) -> Result<Prepared> {
    let image = stage("packing the disk image", || image::pack(&hypervisor.stripped, payload))?;
    Ok(Prepared { hypervisor, image })
}
