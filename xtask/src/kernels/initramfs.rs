//! The initramfs: busybox, three device nodes and `/init`.

use std::{
    fs,
    io::Cursor,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use cpio::{
    newc::{self, ModeFileType},
    write_cpio,
};

use crate::workspace;

/// With this word on the kernel's command line `/init` runs a short script and powers off; without it there is
/// a shell.
pub const SCRIPT_WORD: &str = "umbra.script";

const INIT: &str = include_str!("init.sh");

/// Names under which busybox is called. A shell finds no applet without its link.
const APPLETS: &[&str] = &[
    "[",
    "ash",
    "awk",
    "basename",
    "cat",
    "chmod",
    "chown",
    "chvt",
    "clear",
    "cp",
    "cttyhack",
    "cut",
    "date",
    "dd",
    "df",
    "dmesg",
    "du",
    "echo",
    "env",
    "expr",
    "false",
    "find",
    "free",
    "grep",
    "gunzip",
    "gzip",
    "halt",
    "head",
    "hexdump",
    "hostname",
    "id",
    "kill",
    "less",
    "ln",
    "ls",
    "md5sum",
    "mkdir",
    "mknod",
    "mount",
    "mv",
    "nproc",
    "od",
    "poweroff",
    "printf",
    "ps",
    "pwd",
    "reboot",
    "rm",
    "rmdir",
    "sed",
    "seq",
    "setsid",
    "sh",
    "sha256sum",
    "sleep",
    "sort",
    "stat",
    "stty",
    "sync",
    "tail",
    "tar",
    "tee",
    "test",
    "time",
    "top",
    "touch",
    "tr",
    "true",
    "umount",
    "uname",
    "uniq",
    "uptime",
    "usleep",
    "vi",
    "wc",
    "which",
    "xargs",
    "yes",
    "zcat",
];

/// Makes the initramfs in `folder`, or finds it there. Uncompressed: the processor that would unpack it is
/// emulated, and so is the disk, and the one costs as much as the other.
pub fn make(busybox: &Path, folder: &Path) -> Result<PathBuf> {
    let program = fs::read(busybox).with_context(|| format!("cannot read {}", busybox.display()))?;
    let archive = archive(program)?;
    let unfinished = tempfile::NamedTempFile::new_in(folder)?;
    fs::write(unfinished.path(), &archive)?;
    let key = workspace::content_key(&[unfinished.path()])?;
    let path = folder.join(format!("initramfs-{key}.cpio"));
    unfinished.persist(&path).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

struct Entries {
    inputs: Vec<(newc::Builder, Cursor<Vec<u8>>)>,
}

impl Entries {
    fn add(&mut self, name: &str, kind: ModeFileType, mode: u32, content: Vec<u8>) -> &mut newc::Builder {
        // The same bytes whenever it is made: no time, numbered inodes, root's.
        let number = self.inputs.len() as u32 + 1;
        let builder = newc::Builder::new(name).ino(number).mode(mode).set_mode_file_type(kind).nlink(1);
        self.inputs.push((builder, Cursor::new(content)));
        let last = self.inputs.len() - 1;
        &mut self.inputs[last].0
    }

    fn device(&mut self, name: &str, mode: u32, major: u32, minor: u32) {
        let builder = self.add(name, ModeFileType::Char, mode, Vec::new());
        *builder = std::mem::replace(builder, newc::Builder::new(name)).rdev_major(major).rdev_minor(minor);
    }
}

fn archive(busybox: Vec<u8>) -> Result<Vec<u8>> {
    let mut entries = Entries { inputs: Vec::new() };
    for folder in ["bin", "dev", "proc", "sys", "tmp", "root", "etc"] {
        entries.add(folder, ModeFileType::Directory, 0o755, Vec::new());
    }
    entries.device("dev/console", 0o600, 5, 1);
    entries.device("dev/null", 0o666, 1, 3);
    entries.device("dev/ttyS0", 0o600, 4, 64);
    entries.add("bin/busybox", ModeFileType::Regular, 0o755, busybox);
    for applet in APPLETS {
        entries.add(&format!("bin/{applet}"), ModeFileType::Symlink, 0o777, b"busybox".to_vec());
    }
    entries.add("init", ModeFileType::Regular, 0o755, INIT.as_bytes().to_vec());
    write_cpio(entries.inputs.into_iter(), Vec::new()).context("cannot write the cpio archive")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_holds_init_and_the_console() {
        let archive = archive(b"busybox!".to_vec()).unwrap();
        let mut names = Vec::new();
        let mut rest = &archive[..];
        loop {
            let reader = newc::Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            let entry = reader.entry();
            if entry.name() == "dev/console" {
                assert_eq!(
                    (entry.mode(), entry.rdev_major(), entry.rdev_minor()),
                    (0o020_600, 5, 1),
                    "a character device"
                );
            }
            names.push(entry.name().to_owned());
            rest = reader.finish().unwrap();
        }
        for name in ["init", "dev/console", "dev/null", "dev/ttyS0", "bin/sh", "bin/poweroff", "proc"] {
            assert!(names.iter().any(|known| known == name), "{name}");
        }
        assert!(INIT.contains(SCRIPT_WORD));
    }
}
