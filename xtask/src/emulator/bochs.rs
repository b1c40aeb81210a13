//! Bochs: its configuration and its log.

use std::{
    fs::{self, File},
    process::Stdio,
};

use anyhow::{Context, Result};
use tempfile::TempDir;

use super::{
    Machine, Running, Sink,
    running::{self, Port},
    seed,
};

/// The model that suits guests that calibrate their timers.
pub const DEFAULT_CPU: &str = "broadwell_ult";
/// One cylinder: the disk's geometry has to be whole.
const CYLINDER_BYTES: u64 = 16 * 63 * 512;

pub fn start(machine: &Machine, folder: TempDir, sinks: Vec<Sink>) -> Result<Running> {
    // A copy: Bochs locks the image, leaves the lock behind when killed, and may write to the disk.
    let disk = folder.path().join("disk.img");
    fs::copy(&machine.image, &disk).with_context(|| format!("cannot copy {}", machine.image.display()))?;
    let file = File::options().write(true).open(&disk)?;
    let disk_bytes = file.metadata()?.len().next_multiple_of(CYLINDER_BYTES);
    file.set_len(disk_bytes)?;

    let port = if machine.typed { Port::listen()? } else { Port::file(folder.path().join("serial.txt"))? };
    fs::write(folder.path().join("bochsrc"), configuration(machine, disk_bytes, &port))?;
    // Debian builds Bochs with its debugger, which waits for a command before the first instruction.
    fs::write(folder.path().join("debugger"), "c\n")?;

    let mut command = running::dying_with_us("bochs-bin");
    command
        .args(["-q", "-f", "bochsrc", "-rc", "debugger"])
        .current_dir(folder.path())
        .env("TERM", "dumb")
        .env_remove("BXSHARE")
        .stdin(Stdio::null())
        .stdout(File::create(folder.path().join("stdout.txt"))?)
        .stderr(File::create(folder.path().join("stderr.txt"))?);
    if let Some(library) = seed::library() {
        command.env("LD_PRELOAD", library);
    }
    Running::new(command, port, folder, "bochs.log", sinks)
}

fn configuration(machine: &Machine, disk_bytes: u64, port: &Port) -> String {
    let Machine { cores, ips, memory_mib, .. } = machine;
    let cpu = machine.cpu.as_deref().unwrap_or(DEFAULT_CPU);
    let cylinders = disk_bytes / CYLINDER_BYTES;
    let com1 = match port {
        Port::File(_) => "mode=file, dev=serial.txt".to_owned(),
        Port::Socket(_, number) => format!("mode=socket-client, dev=127.0.0.1:{number}"),
    };
    let info = if machine.verbose_log { "report" } else { "ignore" };
    // The Cirrus adapter: with the plain one the bootloader finds no pixel format it knows. `quantum` is left at
    // its default: slices of 5 instructions interleave the cores finely, which is what tests want.
    format!(
        "plugin_ctrl: unmapped=true\n\
         display_library: term\n\
         cpu: model={cpu}, count={cores}, ips={ips}, reset_on_triple_fault=0, ignore_bad_msrs=1\n\
         memory: guest={memory_mib}, host={memory_mib}\n\
         romimage: file=/usr/share/bochs/BIOS-bochs-latest\n\
         vgaromimage: file=/usr/share/vgabios/vgabios.cirrus.bin\n\
         ata0: enabled=true, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14\n\
         ata0-master: type=disk, path=disk.img, mode=flat, cylinders={cylinders}, heads=16, spt=63, translation=auto\n\
         boot: disk\n\
         clock: sync=none, time0=1700000000, rtc_sync=0\n\
         com1: enabled=true, {com1}\n\
         pci: enabled=1, chipset=i440fx, slot1=cirrus\n\
         vga: extension=cirrus, update_freq=1, realtime=0\n\
         log: bochs.log\n\
         panic: action=fatal, term=report\n\
         error: action=report\n\
         info: action={info}\n\
         debug: action=ignore\n\
         sound: driver=dummy\n"
    )
}

/// The tick at which the log ends. Each of its lines begins with eleven digits of ticks and a letter.
pub fn last_tick(log: &str) -> Option<u64> {
    log.lines().rev().find_map(|line| {
        let digits = line.bytes().take_while(u8::is_ascii_digit).count();
        if digits >= 11 { line[..digits].parse().ok() } else { None }
    })
}

/// The names of the processor models this Bochs knows and that can run a 64-bit hypervisor with VMX.
pub const VMX_MODELS: &[&str] = &[
    "core2_penryn_t9600",
    "corei5_lynnfield_750",
    "corei5_arrandale_m520",
    "corei7_sandy_bridge_2600k",
    "corei7_ivy_bridge_3770k",
    "corei7_haswell_4770",
    "broadwell_ult",
    "corei7_skylake_x",
    "corei3_cnl",
    "corei7_icelake_u",
    "tigerlake",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_tick_is_read_from_the_log() {
        let log = "00000000000i[      ] Bochs\n12345678901i[CPU0  ] x\n12345678902p[UNMAP ] >>PANIC<< Shutdown\nend\n";
        assert_eq!(last_tick(log), Some(12_345_678_902));
        assert_eq!(last_tick("nothing\n"), None);
    }

    #[test]
    fn the_configuration_names_the_machine() {
        let machine = Machine { cores: 4, memory_mib: 256, ..Machine::new("x".into()) };
        let text = configuration(&machine, 2 * CYLINDER_BYTES, &Port::File("serial.txt".into()));
        assert!(text.contains("cpu: model=broadwell_ult, count=4, ips=100000000,"));
        assert!(text.contains("memory: guest=256, host=256"));
        assert!(text.contains("cylinders=2,"));
        assert!(text.contains("com1: enabled=true, mode=file"));
    }
}
