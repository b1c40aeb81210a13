//! Emulated machines: started, watched, typed at and ended.
//!
//! Without typed input a Bochs run is deterministic: its serial port goes to a file that we follow. With typed
//! input the port is a socket. The verdict of a run is the line `umbra: exit N`, never the emulator's status.

mod bochs;
mod probe;
mod qemu;
mod running;
mod seed;

pub use bochs::VMX_MODELS;
pub use probe::{choose, kvm_has_vmx};
pub use running::{End, Outcome, Running, Sink, WaitError};

use std::{fmt, path::PathBuf, time::Duration};

use anyhow::{Result, bail, ensure};

use crate::packages::Need;

/// What stands for the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Backend {
    /// Bochs: VT-x emulated, exact ticks.
    Bochs,
    /// QEMU with KVM where its nested VMX works, else plain QEMU, which has no VMX.
    Qemu,
}

/// What starts the loader.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Firmware {
    /// A PC BIOS.
    #[default]
    Bios,
    /// OVMF; QEMU only.
    Uefi,
}

/// A machine to be started.
#[derive(Clone, Debug)]
pub struct Machine {
    /// The disk image; the run works on a copy.
    pub image: PathBuf,
    /// Which emulator.
    pub backend: Backend,
    /// BIOS or UEFI.
    pub firmware: Firmware,
    /// The processor model, by the emulator's name for it; `None`: the backend's default.
    pub cpu: Option<String>,
    /// Processors, 1 to 8.
    pub cores: u32,
    /// Memory in MiB, 64 to 2048 for Bochs.
    pub memory_mib: u32,
    /// Emulated instructions per emulated second (Bochs only).
    pub ips: u64,
    /// Whether [`Running::send`] will be used. Costs determinism.
    pub typed: bool,
    /// Whether the emulator's log keeps its informational lines.
    pub verbose_log: bool,
}

impl Machine {
    /// Two cores, 1 GiB, Bochs with the model and speed at which guests calibrate their timers well.
    pub fn new(image: PathBuf) -> Self {
        Self {
            image,
            backend: Backend::Bochs,
            firmware: Firmware::Bios,
            cpu: None,
            cores: 2,
            memory_mib: 1024,
            ips: 100_000_000,
            typed: false,
            verbose_log: false,
        }
    }

    /// What has to be installed for this machine.
    pub fn needs(&self) -> Vec<Need> {
        match (self.backend, self.firmware) {
            (Backend::Bochs, _) => vec![Need::Bochs],
            (Backend::Qemu, Firmware::Bios) => vec![Need::Qemu],
            (Backend::Qemu, Firmware::Uefi) => vec![Need::Qemu, Need::Ovmf],
        }
    }

    /// Starts the machine; its output is kept and can be waited for.
    pub fn start(&self) -> Result<Running> {
        self.start_with(Vec::new())
    }

    /// Starts the machine; each sink is given the serial output as it comes.
    pub fn start_with(&self, sinks: Vec<Sink>) -> Result<Running> {
        self.check()?;
        let folder = running::folder()?;
        match self.backend {
            Backend::Bochs => bochs::start(self, folder, sinks),
            Backend::Qemu => qemu::start(self, folder, sinks),
        }
    }

    /// Starts the machine, and ends it at the latest after `timeout`.
    pub fn run(&self, timeout: Duration) -> Result<Outcome> {
        self.start()?.finish(timeout)
    }

    /// Refuses what the emulator would refuse less clearly.
    fn check(&self) -> Result<()> {
        ensure!(self.image.is_file(), "there is no disk image {}", self.image.display());
        ensure!((1..=8).contains(&self.cores), "{} cores: 1 to 8 can be emulated", self.cores);
        ensure!(
            self.memory_mib >= 64,
            "{} MiB of memory: the loader and the hypervisor want 64",
            self.memory_mib
        );
        ensure!(self.ips >= 1_000_000, "{} instructions a second: the BIOS wants a million", self.ips);
        if self.backend == Backend::Bochs {
            if self.firmware == Firmware::Uefi {
                bail!("Bochs has a BIOS only; use --backend qemu for UEFI");
            }
            ensure!(self.memory_mib <= 2048, "{} MiB of memory: Bochs takes 2048 at most", self.memory_mib);
        }
        Ok(())
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, default_cpu) = match self.backend {
            Backend::Bochs => ("Bochs", bochs::DEFAULT_CPU),
            Backend::Qemu if kvm_has_vmx() => ("QEMU with KVM", "host"),
            Backend::Qemu => ("QEMU without VMX", "max"),
        };
        let cpu = self.cpu.as_deref().unwrap_or(default_cpu);
        let plural = if self.cores == 1 { "" } else { "s" };
        write!(f, "{name}: {} core{plural} ({cpu}), {} MiB", self.cores, self.memory_mib)
    }
}

/// Whether UEFI firmware for QEMU is installed.
pub fn has_ovmf() -> bool {
    qemu::ovmf().is_some()
}
