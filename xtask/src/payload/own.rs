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
    /// The virtual processors that it gets where the manifest says nothing.
    pub vcpus: u32,
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
    /// By the C compiler.
    C(&'static CProgram),
}

/// A guest in C and assembly.
#[derive(Debug, PartialEq, Eq)]
struct CProgram {
    /// Where its files are, from the workspace's root.
    folder: &'static str,
    /// Files that are compiled, in this order.
    sources: &'static [&'static str],
    /// Files that these include.
    headers: &'static [&'static str],
    /// The linker script, from the folder.
    script: &'static str,
    /// What the compiler is told beside [`C_FLAGS`].
    flags: &'static [&'static str],
}

/// The peer's benchmark as it is.
const BENCH_PROGRAM: CProgram = CProgram {
    folder: "qemu-tests/bench",
    sources: &["start.S", "guest.c"],
    headers: &[],
    script: "guest.ld",
    flags: &["-mcmodel=large"],
};

const RIGHTS64: CProgram = CProgram {
    folder: "qemu-tests/guests/c",
    sources: &["start64.S", "machine.c", "reference.c", "rights.c"],
    headers: &["machine.h", "reference.h"],
    script: "../guest.ld",
    flags: &["-m64", "-std=gnu2x", "-Wall", "-Wextra", "-Werror"],
};

const RIGHTS32: CProgram = CProgram {
    sources: &["start32.S", "machine.c", "reference.c", "rights.c"],
    flags: &["-m32", "-std=gnu2x", "-Wall", "-Wextra", "-Werror"],
    ..RIGHTS64
};

const ENDS: CProgram = CProgram { sources: &["start32.S", "machine.c", "ends32.S", "ends.c"], ..RIGHTS32 };

const DEVICES: DeviceSet =
    DeviceSet { exit_port: true, shutdown_port: false, debug_console: false, bench_marks: false };
const CONSOLE: DeviceSet = DeviceSet { debug_console: true, ..DEVICES };
const BENCH: DeviceSet = DeviceSet { bench_marks: true, ..CONSOLE };

const fn elf64(name: &'static str, memory_mib: u64, devices: DeviceSet, expect: Expect) -> OwnGuest {
    let memory_bytes = memory_mib << 20;
    OwnGuest {
        name,
        protocol: Protocol::Elf64,
        vcpus: 1,
        memory_bytes,
        devices,
        expect,
        language: Language::Rust,
    }
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
    OwnGuest { vcpus: 4, ..elf64("smp", 16, DEVICES, Expect::Exit(0)) },
    OwnGuest { vcpus: 4, ..elf64("smp-crash", 16, DEVICES, Expect::Crash) },
    OwnGuest { vcpus: 3, ..elf64("smp-halt", 16, DEVICES, Expect::Halt) },
    OwnGuest { protocol: Protocol::Multiboot, ..elf64("multiboot32", 32, DEVICES, Expect::Exit(0)) },
    OwnGuest { language: Language::C(&BENCH_PROGRAM), ..elf64("bench", 96, BENCH, Expect::Exit(0)) },
    OwnGuest { language: Language::C(&RIGHTS64), ..elf64("rights64", 16, DEVICES, Expect::Exit(0)) },
    OwnGuest {
        protocol: Protocol::Multiboot,
        language: Language::C(&RIGHTS32),
        ..elf64("rights32", 16, DEVICES, Expect::Exit(0))
    },
    OwnGuest {
        protocol: Protocol::Multiboot,
        language: Language::C(&ENDS),
        ..elf64("ends", 4, DEVICES, Expect::Any)
    },
    elf64("deliveries", 16, DEVICES, Expect::Exit(0)),
    elf64("debug-storm", 16, DEVICES, Expect::Any),
    elf64("table-writes", 16, DEVICES, Expect::Exit(0)),
    elf64("mov-ss", 16, DEVICES, Expect::Exit(0)),
    elf64("exits", 16, DEVICES, Expect::Exit(0)),
    OwnGuest { protocol: Protocol::Multiboot, ..elf64("churn", 64, DEVICES, Expect::Exit(0)) },
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
            Language::C(program) => program.build(self.name),
        }
    }
}

/// Of every guest in C. They decide what guest:bench measures: they are those of the published figures.
const C_FLAGS: &[&str] = &[
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
    "-nostdlib",
    "-static",
    "-Wl,--build-id=none",
    "-Wl,-z,noexecstack",
];

impl CProgram {
    fn build(&self, name: &str) -> Result<PathBuf> {
        let folder = workspace::root().join(self.folder);
        let in_folder =
            |files: &[&str]| -> Vec<PathBuf> { files.iter().map(|file| folder.join(file)).collect() };
        let (sources, script) = (in_folder(self.sources), folder.join(self.script));
        let all = [sources.clone(), in_folder(self.headers), vec![script.clone()]].concat();
        let key = workspace::content_key(&all.iter().map(PathBuf::as_path).collect::<Vec<_>>())?;
        let elf = workspace::cache_folder(name)?.join(format!("guest-{key}.elf"));
        if !elf.is_file() {
            let unfinished = elf.with_extension(format!("part{}", std::process::id()));
            let mut command = Command::new("cc");
            command
                .args(C_FLAGS)
                .args(self.flags)
                .arg("-T")
                .arg(script)
                .arg("-o")
                .arg(&unfinished)
                .args(sources);
            workspace::must_succeed(&mut command).with_context(|| {
                format!("guest:{name} is written in C and needs gcc: apt-get install gcc")
            })?;
            std::fs::rename(&unfinished, &elf)?;
        }
        Ok(elf)
    }
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
