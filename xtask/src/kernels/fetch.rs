//! Files out of Debian's packages, without installing them: apt-get download, dpkg-deb.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};

use crate::workspace;

/// The package that `package` depends on and whose name begins so: a meta-package's current version.
pub fn dependency(package: &str, prefix: &str) -> Result<String> {
    for program in ["apt-cache", "apt-get", "dpkg-deb", "tar"] {
        ensure!(workspace::has_program(program), "this system has no {program}: it is not Debian");
    }
    if let Some(found) = depends(package, prefix)? {
        return Ok(found);
    }
    update();
    depends(package, prefix)?.with_context(|| format!("apt knows no package {package}; try `apt-get update`"))
}

fn depends(package: &str, prefix: &str) -> Result<Option<String>> {
    let output = Command::new("apt-cache")
        .args(["depends", "--important", package])
        .env("LC_ALL", "C")
        .stderr(Stdio::null())
        .output()
        .context("apt-cache does not start")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let found = parse_depends(&text).find(|name| name.starts_with(prefix));
    Ok(found.map(str::to_owned))
}

fn parse_depends(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .filter_map(|line| line.trim().trim_start_matches('|').strip_prefix("Depends:"))
        .map(str::trim)
}

/// A fresh system has no package lists yet. Without the right to fetch them the next step says what is missing.
fn update() {
    eprintln!("umbra: apt has no package lists; fetching them");
    let sudo = !is_root();
    let mut command = Command::new(if sudo { "sudo" } else { "apt-get" });
    if sudo {
        command.args(["-n", "apt-get"]);
    }
    let _ = command.arg("update").stdout(Stdio::null()).stderr(Stdio::null()).status();
}

fn is_root() -> bool {
    // The owner of our own process's folder.
    use std::os::unix::fs::MetadataExt;
    fs::metadata("/proc/self").is_ok_and(|metadata| metadata.uid() == 0)
}

/// Fetches a package and puts its files whose path begins so into `into`, without their folders.
pub fn files(package: &str, path_prefix: &str, into: &Path) -> Result<()> {
    eprintln!("umbra: fetching Debian's {package} (once)");
    let work = tempfile::Builder::new().prefix("fetch-").tempdir_in(into)?;
    download(package, work.path()).or_else(|error| {
        // Lists that are older than the mirror's packages point nowhere.
        update();
        download(package, work.path()).map_err(|_| error)
    })?;
    let deb = fs::read_dir(work.path())?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .with_context(|| format!("apt-get download {package} left no package"))?;
    // Only what is wanted: a kernel's modules are ten times its size.
    let mut unpack = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(&deb)
        .stdout(Stdio::piped())
        .spawn()
        .context("dpkg-deb does not start")?;
    let tar = unpack.stdout.take().context("dpkg-deb has no output")?;
    let status = Command::new("tar")
        .args(["-x", "--wildcards", "--no-wildcards-match-slash", "-C"])
        .arg(work.path())
        .arg(format!("{path_prefix}*"))
        .stdin(tar)
        .status()
        .context("tar does not start")?;
    let unpacked = unpack.wait()?;
    ensure!(status.success() && unpacked.success(), "{package} cannot be unpacked");
    let source = work.path().join(Path::new(path_prefix).parent().unwrap_or(Path::new("")));
    let mut count = 0;
    for entry in fs::read_dir(&source).with_context(|| format!("{package} has no {path_prefix}*"))? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            fs::rename(entry.path(), into.join(entry.file_name()))?;
            count += 1;
        }
    }
    ensure!(count > 0, "{package} has no {path_prefix}*");
    Ok(())
}

fn download(package: &str, folder: &Path) -> Result<()> {
    let output = Command::new("apt-get")
        // As root apt wants to become its own user, who may not write here.
        .args(["-q", "-o", "APT::Sandbox::User=root", "download", package])
        .current_dir(folder)
        .env("LC_ALL", "C")
        .output()
        .context("apt-get does not start")?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let last = text.lines().rfind(|line| line.starts_with("E:")).unwrap_or("no network?");
        bail!("apt-get download {package} failed: {last}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read() {
        let text = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n |Depends: x\n";
        let names: Vec<&str> = parse_depends(text).collect();
        assert_eq!(names, ["linux-image-6.1.0-56-cloud-amd64", "x"]);
    }
}
