//! The guests of our own: what there is, what each needs, and how it is built.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use machine::{
    load::Protocol,
    manifest::{DeviceSet, Expect},
};

use crate::{hypervisor, workspace};

/// A guest that this project builds.
#[derive(Debug, PartialEq, Eq)]
pub struct OwnGuest {
    /// Its name: `kernel = "guest:NAME"`.
    pub name: &'static str,
    /// How it is entered.
    pub protocol: Protocol,
    /// The memory it counts on, in bytes; what it gets where the manifest says nothing.
    pub memory_bytes: u64,
    /// The devices it uses; the manifest may add more.
    pub devices: DeviceSet,
    /// How it ends, where the manifest says nothing.
    pub expect: Expect,
    language: Language,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Language {
    /// A binary of package `test-guests`.
    Rust,
    /// qemu-tests/bench, by the C compiler.
    C,
}

const DEVICES: DeviceSet =
    DeviceSet { exit_port: true, shutdown_port: false, debug_console: false, bench_marks: false };
const CONSOLE: DeviceSet = DeviceSet { debug_console: true, ..DEVICES };
const BENCH: DeviceSet = DeviceSet { bench_marks: true, ..CONSOLE };

const fn elf64(name: &'static str, memory_mib: u64, devices: DeviceSet, expect: Expect) -> OwnGuest {
    let memory_bytes = memory_mib << 20;
    OwnGuest { name, protocol: Protocol::Elf64, memory_bytes, devices, expect, language: Language::Rust }
}

/// All of them.
pub const OWN_GUESTS: &[OwnGuest] = &[
    elf64("hello", 16, CONSOLE, Expect::Exit(0)),
    elf64("cpuid-bench", 16, BENCH, Expect::Exit(0)),
    elf64("triple-fault", 16, DEVICES, Expect::Crash),
    elf64("spin", 16, DEVICES, Expect::Any),
    elf64("paging", 16, DEVICES, Expect::Exit(0)),
    elf64("memory", 64, DEVICES, Expect::Exit(0)),
    elf64("faults", 16, DEVICES, Expect::Exit(0)),
    elf64("timer", 16, DEVICES, Expect::Exit(0)),
    elf64("registers", 16, DEVICES, Expect::Exit(0)),
    elf64("tasks", 16, DEVICES, Expect::Exit(0)),
    elf64("modes", 16, DEVICES, Expect::Exit(0)),
    elf64("bad-cr3", 16, DEVICES, Expect::Crash),
    OwnGuest { protocol: Protocol::Multiboot, ..elf64("multiboot32", 32, DEVICES, Expect::Exit(0)) },
    OwnGuest { language: Language::C, ..elf64("bench", 96, BENCH, Expect::Exit(0)) },
];

impl OwnGuest {
    /// The guest of this name.
    pub fn find(name: &str) -> Option<&'static Self> {
        OWN_GUESTS.iter().find(|own| own.name == name)
    }

    /// Builds it, if need be; the stripped ELF.
    pub fn build(&self) -> Result<PathBuf> {
        match self.language {
            Language::Rust => {
                let built = hypervisor::build_bare_metal("test-guests", &["--quiet", "--bin", self.name])?;
                let elf = built.first().with_context(|| format!("guest:{} was not built", self.name))?;
                hypervisor::strip(elf)
            }
            Language::C => build_bench(),
        }
    }
}

/// The flags decide what is measured: they are those of the published figures.
const BENCH_FLAGS: &[&str] = &[
    "-O2",
    "-ffreestanding",
    "-fno-pic",
    "-no-pie",
    "-mno-red-zone",
    "-mgeneral-regs-only",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fno-tree-loop-distribute-patterns",
    "-fcf-protection=none",
    "-mcmodel=large",
    "-nostdlib",
    "-static",
    "-Wl,--build-id=none",
    "-Wl,-z,noexecstack",
];

fn build_bench() -> Result<PathBuf> {
    let folder = workspace::root().join("qemu-tests/bench");
    let sources = ["start.S", "guest.c", "guest.ld"].map(|name| folder.join(name));
    let key = workspace::content_key(&sources.each_ref().map(PathBuf::as_path))?;
    let elf = workspace::cache_folder("bench")?.join(format!("guest-{key}.elf"));
    if !elf.is_file() {
        let unfinished = elf.with_extension(format!("part{}", std::process::id()));
        let mut command = Command::new("cc");
        command.args(BENCH_FLAGS).arg("-T").arg(&sources[2]).arg("-o").arg(&unfinished).args(&sources[..2]);
        workspace::must_succeed(&mut command)
            .context("guest:bench is written in C and needs gcc: apt-get install gcc")?;
        std::fs::rename(&unfinished, &elf)?;
    }
    Ok(elf)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_guest_has_a_name_of_its_own_and_legal_memory() {
        for (index, own) in OWN_GUESTS.iter().enumerate() {
            assert_eq!(machine::manifest::check_name(own.name), Ok(()));
            assert_eq!(machine::manifest::check_memory(own.memory_bytes), Ok(()));
            assert!(OWN_GUESTS[..index].iter().all(|earlier| earlier.name != own.name));
        }
    }
}
