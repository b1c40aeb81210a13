//! `cargo xtask run`.

use std::{
    fs::File,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, Result};
use xtask::{
    emulator::{self, Backend, End, Firmware, Machine, Outcome, Sink},
    hypervisor::{self, Hypervisor},
    image,
};

/// The exit status of a run whose time was up, as timeout(1) has it.
const TIMED_OUT: u8 = 124;
/// The exit status of a run whose emulator ended without a verdict.
const DIED: u8 = 125;
/// How many of the emulator's last log lines are shown when it ends without a verdict.
const LOG_LINES_SHOWN: usize = 20;

/// The command's arguments.
#[derive(clap::Args)]
pub struct Arguments {
    /// A packed payload to boot as it is
    #[arg(long, value_name = "FILE")]
    payload: Option<PathBuf>,
    /// A hypervisor ELF to boot instead of building one
    #[arg(long, value_name = "ELF")]
    kernel: Option<PathBuf>,
    /// What stands for the machine; auto: QEMU where KVM's nested VMX works, else Bochs
    #[arg(long, value_enum, default_value_t = Choice::Auto)]
    backend: Choice,
    /// BIOS or UEFI (UEFI: QEMU only)
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
    memory: u32,
    /// Emulated instructions in an emulated second (Bochs)
    #[arg(long, value_name = "N", default_value_t = 100_000_000)]
    ips: u64,
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

/// The emulator to use, or the best there is.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Choice {
    /// QEMU where KVM's nested VMX works, else Bochs
    Auto,
    /// Bochs
    Bochs,
    /// QEMU; without KVM's nested VMX the hypervisor can only say that it has no VMX
    Qemu,
}

/// Builds, packs, boots; the exit status is the guests' verdict.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let hypervisor = match &arguments.kernel {
        Some(symbols) => Hypervisor { symbols: symbols.clone(), stripped: hypervisor::strip(symbols)? },
        None => hypervisor::build()?,
    };
    let image = image::pack(&hypervisor.stripped, arguments.payload.as_deref())?;
    let backend = match (arguments.backend, arguments.firmware) {
        (Choice::Bochs, _) => Backend::Bochs,
        (Choice::Qemu, _) | (Choice::Auto, Firmware::Uefi) => Backend::Qemu,
        (Choice::Auto, Firmware::Bios) => emulator::choose(),
    };
    let machine = Machine {
        backend,
        firmware: arguments.firmware,
        cpu: arguments.cpu.clone(),
        cores: arguments.cores,
        memory_mib: arguments.memory,
        ips: arguments.ips,
        verbose_log: arguments.emulator_log.is_some(),
        ..Machine::new(image)
    };
    let mut sinks: Vec<Sink> = vec![Box::new(|bytes| {
        let mut stdout = io::stdout().lock();
        let _ = stdout.write_all(bytes).and_then(|()| stdout.flush());
    })];
    if let Some(path) = &arguments.serial_log {
        let mut file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        sinks.push(Box::new(move |bytes| {
            let _ = file.write_all(bytes);
        }));
    }
    let timeout = arguments.timeout.map_or(Duration::MAX, Duration::from_secs);
    let outcome = machine.start_with(sinks)?.finish(timeout)?;
    if let Some(path) = &arguments.emulator_log {
        std::fs::write(path, &outcome.emulator_log)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(ExitCode::from(report(&outcome, arguments.timeout)))
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
        End::Died => {
            let lines: Vec<&str> = outcome.emulator_log.lines().collect();
            for line in &lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..] {
                eprintln!("emulator: {line}");
            }
            eprintln!("error: the emulator ended without the line `umbra: exit N`");
            DIED
        }
    }
}
