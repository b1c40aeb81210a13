//! `cargo xtask run`.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, Result};
use xtask::{
    emulator::{self, Backend, End, Firmware, Machine, Outcome, Running, Sink},
    hypervisor::Hypervisor,
    manifest::Limits,
    packages,
    payload::Options,
    prepare::{Prepared, prepare, prepare_blob},
    symbols::Annotator,
    terminal::{self, Raw, RawScreen},
};

/// The exit status of a run whose time was up, as timeout(1) has it.
const TIMED_OUT: u8 = 124;
/// The exit status of a run whose emulator ended without a verdict.
const DIED: u8 = 125;
/// The exit status after Ctrl-], as a shell has it after Ctrl-C.
const HUNG_UP: u8 = 130;
/// How many of the emulator's last log lines are shown when it ends without a verdict.
const LOG_LINES_SHOWN: usize = 20;

/// The command's arguments.
#[derive(clap::Args)]
pub struct Arguments {
    /// The guests to run; without one: two Debian guests and one of our own
    manifest: Option<PathBuf>,
    #[command(flatten)]
    machine: MachineArguments,
    /// A packed payload to boot as it is
    #[arg(long, value_name = "FILE", conflicts_with = "manifest")]
    payload: Option<PathBuf>,
    /// A hypervisor ELF to boot instead of building one
    #[arg(long, value_name = "ELF")]
    kernel: Option<PathBuf>,
    /// End the run after this many seconds and fail
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Copy all serial output into this file
    #[arg(long, value_name = "FILE")]
    serial_log: Option<PathBuf>,
    /// Keep the emulator's own log, with its informational lines, in this file
    #[arg(long, value_name = "FILE")]
    emulator_log: Option<PathBuf>,
}

/// Which machine to boot on.
#[derive(clap::Args)]
pub struct MachineArguments {
    /// What stands for the machine
    #[arg(long, value_enum, default_value_t = Choice::Auto)]
    backend: Choice,
    /// What starts the loader (UEFI: QEMU only)
    #[arg(long, value_enum, default_value_t)]
    firmware: Firmware,
    /// The processor model, by the emulator's name for it
    #[arg(long, value_name = "MODEL")]
    cpu: Option<String>,
    /// Processors
    #[arg(long, value_name = "N", default_value_t = 2)]
    cores: u32,
    /// The machine's memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    pub memory: u32,
    /// Emulated instructions in an emulated second (Bochs)
    #[arg(long, value_name = "N", default_value_t = 100_000_000)]
    ips: u64,
}

/// The emulator to use, or the best there is.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Choice {
    /// QEMU where KVM's nested VMX works, else Bochs
    Auto,
    /// Bochs, which emulates VMX
    Bochs,
    /// QEMU; without nested VMX the hypervisor can only say that it has none
    Qemu,
}

impl MachineArguments {
    /// The machine, with its emulator installed.
    pub fn machine(&self, image: PathBuf) -> Result<Machine> {
        let backend = match (self.backend, self.firmware) {
            (Choice::Bochs, _) => Backend::Bochs,
            (Choice::Qemu, _) | (Choice::Auto, Firmware::Uefi) => Backend::Qemu,
            (Choice::Auto, Firmware::Bios) => emulator::choose(),
        };
        let machine = Machine {
            backend,
            firmware: self.firmware,
            cpu: self.cpu.clone(),
            cores: self.cores,
            memory_mib: self.memory,
            ips: self.ips,
            ..Machine::new(image)
        };
        packages::ensure(&machine.needs())?;
        Ok(machine)
    }
}

/// Builds, packs, boots; the exit status is the guests' verdict.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let interactive = terminal::is_interactive();
    let limits = Limits { memory_mib: Some(arguments.machine.memory), cores: Some(arguments.machine.cores) };
    let kernel = arguments.kernel.as_deref();
    let Prepared { hypervisor, image } = match &arguments.payload {
        Some(payload) => prepare_blob(payload, kernel)?,
        None => prepare(arguments.manifest.as_deref(), &limits, &Options { interactive }, kernel)?,
    };
    let mut machine = arguments.machine.machine(image)?;
    machine.typed = interactive;
    machine.verbose_log = arguments.emulator_log.is_some();

    eprintln!("booting on {machine}");
    let mut sinks = Vec::new();
    if let Some(path) = &arguments.serial_log {
        sinks.push(log_to(path)?);
    }
    let timeout = arguments.timeout.map_or(Duration::MAX, Duration::from_secs);
    let outcome = if interactive {
        eprintln!("Ctrl-a h: help of the console; Ctrl-]: switch the machine off");
        sinks.push(screen(RawScreen::default(), &hypervisor));
        let running = machine.start_with(sinks)?;
        type_until_the_end(running, timeout)?
    } else {
        sinks.push(screen(io::stdout(), &hypervisor));
        machine.start_with(sinks)?.finish(timeout)?
    };
    if let Some(path) = &arguments.emulator_log {
        fs::write(path, &outcome.emulator_log).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(ExitCode::from(report(&outcome, arguments.timeout)))
}

fn type_until_the_end(running: Running, timeout: Duration) -> Result<Outcome> {
    let terminal = Raw::start(running.keyboard()?)?;
    running.finish_unless(timeout, || terminal.hung_up())
}

fn log_to(path: &Path) -> Result<Sink> {
    let mut file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    let name = path.display().to_string();
    let mut failed = false;
    Ok(Box::new(move |bytes| {
        if let Err(error) = file.write_all(bytes)
            && !failed
        {
            failed = true;
            eprintln!("warning: {name} is incomplete: {error}");
        }
    }))
}

fn screen(out: impl Write + Send + 'static, hypervisor: &Hypervisor) -> Sink {
    let mut annotator = Annotator::new(out, hypervisor.symbols.clone());
    // Where output goes may be gone, as with `| head`; the run's verdict does not depend on it.
    Box::new(move |bytes| drop(annotator.feed(bytes)))
}

/// Says how the run ended, if not by a verdict; the exit status.
fn report(outcome: &Outcome, timeout_s: Option<u64>) -> u8 {
    match outcome.end {
        End::Verdict(code) => code,
        End::TimedOut => {
            eprintln!(
                "error: timeout: the machine was still running after {} s",
                timeout_s.unwrap_or_default()
            );
            TIMED_OUT
        }
        End::HungUp => {
            eprintln!("switched off");
            HUNG_UP
        }
        End::Died => {
            let lines: Vec<&str> =
                outcome.emulator_log.lines().filter(|line| !is_information(line)).collect();
            for line in &lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..] {
                eprintln!("emulator: {line}");
            }
            eprintln!("error: the emulator ended without the line `umbra: exit N`");
            DIED
        }
    }
}

/// Whether a line of Bochs's log (ticks, then a letter for its weight) is of no weight.
fn is_information(line: &str) -> bool {
    line.trim_start_matches(|letter: char| letter.is_ascii_digit()).starts_with("i[")
}
