//! The manifest a person writes: TOML, checked before anything is built or booted.
//!
//! [`Source::read`] and [`check()`] give a [`Plan`], or [`Problems`]: every one with file, line and remedy. The
//! plan still names its files; `payload` reads, builds or fetches them and packs the blob.

mod check;
mod diagnose;
mod document;
mod words;

use std::{fs, path::Path, path::PathBuf};

use anyhow::{Context, Result};
use machine::{
    load::Protocol,
    manifest::{DeviceSet, Expect, HypervisorConfig, OnEnd},
};

pub use check::check;
pub use diagnose::{Problem, Problems};

/// What `cargo xtask run` boots when no manifest is given.
const DEFAULT: &str = include_str!("../manifests/default.toml");

/// A manifest's text and where it came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Its file, for messages.
    pub path: PathBuf,
    /// The folder that file names in it are relative to.
    pub folder: PathBuf,
    /// The TOML.
    pub text: String,
    /// Whether guests whose kernel cannot be had are left out with a note. A person's own manifest is carried
    /// out as it stands or not at all.
    pub lenient: bool,
}

impl Source {
    /// Reads a person's manifest.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path)
            .with_context(|| format!("cannot read the manifest {}", path.display()))?;
        let folder = path.parent().unwrap_or(Path::new("")).to_path_buf();
        Ok(Self { path: path.to_path_buf(), folder, text, lenient: false })
    }

    /// The default manifest: two Debian guests and one of our own.
    pub fn default_manifest() -> Self {
        Self { lenient: true, ..Self::from_text("xtask/manifests/default.toml", DEFAULT) }
    }

    /// A manifest out of a program, a test say; files in it are relative to the current folder.
    pub fn from_text(name: &str, text: &str) -> Self {
        Self { path: name.into(), folder: PathBuf::new(), text: text.to_owned(), lenient: false }
    }
}

/// The machine a manifest has to fit; `None` where it is not known (an image for a USB stick).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// The machine's memory in MiB.
    pub memory_mib: Option<u32>,
    /// Its cores.
    pub cores: Option<u32>,
}

/// A checked manifest.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Where it came from: errors found later point into it.
    pub source: Source,
    /// The hypervisor's settings; `interactive` is the caller's to set.
    pub hypervisor: HypervisorConfig,
    /// The guests; at least one, names distinct.
    pub guests: Vec<Guest>,
}

/// One guest of a plan. Every field keeps the rules of [`machine::manifest`].
#[derive(Clone, Debug)]
pub struct Guest {
    /// Its name.
    pub name: String,
    /// How it is entered; `None`: as its kernel's file says.
    pub protocol: Option<Protocol>,
    /// Its kernel.
    pub kernel: FileName,
    /// Its initial RAM disk.
    pub initrd: Option<FileName>,
    /// Multiboot modules: file and command line.
    pub modules: Vec<(FileName, String)>,
    /// The command line, if given.
    pub cmdline: Option<String>,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Virtual processors.
    pub vcpus: u32,
    /// Cores it may run on; empty: any.
    pub cores: Vec<u32>,
    /// The opt-in devices.
    pub devices: DeviceSet,
    /// What happens when it ends.
    pub on_end: OnEnd,
    /// How it has to end.
    pub expect: Expect,
    /// Shadow frames that are left to it.
    pub shadow_guarantee_frames: Option<u32>,
    /// Shadow frames it may hold at most.
    pub shadow_cap_frames: Option<u32>,
}

/// A file of a guest, with its place in the manifest for errors that only its content can show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileName {
    /// What it is.
    pub file: File,
    /// Bytes `start..end` of the manifest's text.
    pub span: std::ops::Range<usize>,
}

/// What a file name in a manifest stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum File {
    /// A file of this computer, which was there when the manifest was checked.
    Host(PathBuf),
    /// `"debian"`: Debian's cloud kernel, or the initramfs made for it.
    Debian,
    /// `"guest:NAME"`: one of our own guests.
    Own(&'static crate::payload::OwnGuest),
}
