//! Where things are, and how cargo is called.

use std::{
    env,
    ffi::OsString,
    fs,
    hash::Hasher,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

/// The target of the bare-metal crates.
pub const BARE_METAL: &str = "x86_64-unknown-none";

/// The project's top folder.
pub fn root() -> &'static Path {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask)
}

/// Cargo's target folder: `CARGO_TARGET_DIR` is honoured.
pub fn target_folder() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => env::current_dir().unwrap_or_default().join(folder),
        None => root().join("target"),
    }
}

/// A folder of ours below the target folder, made if missing: what is there can be made again.
pub fn cache_folder(name: &str) -> Result<PathBuf> {
    let folder = target_folder().join("umbra").join(name);
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    Ok(folder)
}

/// Cargo at the project's top, rid of what the cargo that started us has set for this one crate.
pub fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")));
    command.current_dir(root());
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_"]
            .iter()
            .any(|prefix| text.starts_with(prefix))
        {
            command.env_remove(&name);
        }
    }
    command
}

/// Runs a command whose output the person may see, and insists on success.
pub fn must_succeed(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot start `{}`", line(command)))?;
    ensure!(status.success(), "`{}` ended with {status}", line(command));
    Ok(())
}

/// Runs a command and gives back its standard output; its errors are part of ours.
pub fn output_of(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot start `{}`", line(command)))?;
    if !output.status.success() {
        bail!(
            "`{}` ended with {}: {}",
            line(command),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A command as a person would type it.
fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Whether a program is on the path.
pub fn has_program(name: &str) -> bool {
    env::var_os("PATH").is_some_and(|path| env::split_paths(&path).any(|folder| folder.join(name).is_file()))
}

/// The toolchain's `lib/rustlib`, a folder for each target and component.
pub fn rustlib() -> Result<PathBuf> {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let sysroot = output_of(Command::new(rustc).args(["--print", "sysroot"]).current_dir(root()))?;
    Ok(Path::new(sysroot.trim()).join("lib/rustlib"))
}

/// A name for the given files' contents together, the same on every run.
pub fn content_key(files: &[&Path]) -> Result<String> {
    // SipHash with fixed keys: it guards against stale caches, not against an enemy.
    let mut hasher = std::hash::DefaultHasher::new();
    for file in files {
        let bytes = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        hasher.write_u64(bytes.len() as u64);
        hasher.write(&bytes);
    }
    Ok(format!("{:016x}", hasher.finish()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_holds_the_workspace() {
        assert!(root().join("Cargo.toml").is_file());
        assert!(root().join("boot/image/Cargo.toml").is_file());
    }

    #[test]
    fn the_key_tells_where_one_file_ends() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            path
        };
        let (ab, c, a, bc) = (write("ab", "ab"), write("c", "c"), write("a", "a"), write("bc", "bc"));
        assert_eq!(content_key(&[&ab, &c]).unwrap(), content_key(&[&ab, &c]).unwrap());
        assert_ne!(content_key(&[&ab, &c]).unwrap(), content_key(&[&a, &bc]).unwrap());
    }
}
