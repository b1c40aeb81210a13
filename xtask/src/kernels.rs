//! Debian's cloud kernel and an initramfs around its static busybox: fetched once, cached, never committed.

mod fetch;
mod initramfs;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use crate::workspace;

pub use initramfs::SCRIPT_WORD;

/// Debian's files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Debian {
    /// The bzImage.
    pub kernel: PathBuf,
    /// The initramfs made for it.
    pub initramfs: PathBuf,
    /// The kernel's release, such as `6.1.0-56-cloud-amd64`.
    pub release: String,
}

/// Debian's kernel and the initramfs; the error is one line with a remedy.
pub fn debian() -> Result<Debian, String> {
    prepare().map_err(|error| {
        format!(
            "no Debian kernel ({}); to give a kernel write `kernel = \"/boot/vmlinuz-...\"` in a manifest",
            one_line(&error)
        )
    })
}

fn one_line(error: &anyhow::Error) -> String {
    let text = format!("{error:#}");
    text.lines().next().unwrap_or_default().trim_end_matches('.').to_owned()
}

fn prepare() -> Result<Debian> {
    let folder = workspace::cache_folder("debian")?;
    // Two runs at once must not both fetch; the second finds what the first has left.
    let _lock = Lock::take(&folder)?;
    let kernel = match cached_kernel(&folder)? {
        Some(kernel) => kernel,
        None => {
            let package = fetch::dependency("linux-image-cloud-amd64", "linux-image-")?;
            fetch::files(&package, "./boot/vmlinuz-", &folder)?;
            cached_kernel(&folder)?.context("the kernel's package has no ./boot/vmlinuz-*")?
        }
    };
    let busybox = folder.join("busybox");
    if !busybox.is_file() {
        fetch::files("busybox-static", "./bin/busybox", &folder)?;
    }
    if !busybox.is_file() {
        bail!("the package busybox-static has no ./bin/busybox");
    }
    let initramfs = initramfs::make(&busybox, &folder)?;
    let name = kernel.file_name().unwrap_or_default().to_string_lossy();
    let release = name.trim_start_matches("vmlinuz-").to_owned();
    Ok(Debian { kernel, initramfs, release })
}

/// The newest kernel in the cache.
fn cached_kernel(folder: &Path) -> Result<Option<PathBuf>> {
    let mut kernels: Vec<PathBuf> = fs::read_dir(folder)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-")))
        .collect();
    kernels.sort();
    Ok(kernels.pop())
}

/// An exclusive lock that ends with its process, whatever happens.
struct Lock(fs::File);

impl Lock {
    fn take(folder: &Path) -> Result<Self> {
        let path = folder.join("lock");
        let file = fs::File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
        Ok(Self(file))
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = self.0.unlock();
    }
}
