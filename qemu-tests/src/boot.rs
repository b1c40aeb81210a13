//! From a manifest's text to a running machine.

use std::{path::PathBuf, sync::OnceLock, time::Duration};

use anyhow::{Error, Result};
use xtask::{
    emulator::{Machine, Running},
    hypervisor, image,
    manifest::{self, Limits, Source},
    payload::{self, Options},
};

use crate::{skip, verdict::Verdict};

/// Wall time that small guests may take, emulator and BIOS included.
pub const SMALL_TIMEOUT: Duration = Duration::from_secs(180);
/// Instructions per emulated second that suit small guests: the BIOS waits in emulated time.
const SMALL_IPS: u64 = 4_000_000;

/// A machine to be booted with a manifest.
#[derive(Clone, Debug)]
pub struct Boot {
    manifest: String,
    /// The machine; its image is packed at the start.
    pub machine: Machine,
    interactive: bool,
}

impl Boot {
    /// Bochs, one core, 256 MiB: enough for guests of our own.
    pub fn small(manifest: &str) -> Self {
        let machine = Machine { cores: 1, memory_mib: 256, ips: SMALL_IPS, ..Machine::new(PathBuf::new()) };
        Self { manifest: manifest.to_owned(), machine, interactive: false }
    }

    /// Bochs, two cores, 1 GiB, a speed at which Linux calibrates its timers well.
    pub fn large(manifest: &str) -> Self {
        Self { manifest: manifest.to_owned(), machine: Machine::new(PathBuf::new()), interactive: false }
    }

    /// With this many cores.
    #[must_use]
    pub fn cores(mut self, cores: u32) -> Self {
        self.machine.cores = cores;
        self
    }

    /// With this processor model.
    #[must_use]
    pub fn cpu(mut self, model: &str) -> Self {
        self.machine.cpu = Some(model.to_owned());
        self
    }

    /// With a person, or a test, at the keyboard: Linux guests come to a shell.
    #[must_use]
    pub fn typed(mut self) -> Self {
        self.machine.typed = true;
        self.interactive = true;
        self
    }

    /// The payload, checked and packed.
    pub fn payload(&self) -> Result<PathBuf> {
        let source = Source::from_text("test.toml", &self.manifest);
        let limits = Limits { memory_mib: Some(self.machine.memory_mib), cores: Some(self.machine.cores) };
        let plan = manifest::check(&source, &limits)?;
        if self.manifest.contains("\"debian\"") {
            skip::without_debian()?;
        }
        Ok(payload::assemble(&plan, &Options { interactive: self.interactive })?.path)
    }

    /// Packs the image, if that has not been done.
    pub fn pack(&mut self) -> Result<&mut Self> {
        let payload = self.payload()?;
        self.pack_blob(&payload)
    }

    /// Packs the image with these bytes as its payload, whatever they are.
    pub fn pack_blob(&mut self, payload: &std::path::Path) -> Result<&mut Self> {
        self.machine.image = image::pack(&hypervisor()?, Some(payload))?;
        Ok(self)
    }

    /// Starts the machine.
    pub fn start(mut self) -> Result<Running> {
        skip::without_program("bochs-bin")?;
        self.pack()?;
        self.machine.start()
    }

    /// Runs the machine to its end.
    pub fn run(self, timeout: Duration) -> Result<Verdict> {
        Ok(Verdict::new(self.start()?.finish(timeout)?))
    }
}

/// The stripped hypervisor, built once for a file of tests.
fn hypervisor() -> Result<PathBuf> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let built =
        BUILT.get_or_init(|| hypervisor::build().map(|it| it.stripped).map_err(|error| format!("{error:#}")));
    built.clone().map_err(Error::msg)
}
