//! QEMU: with KVM where nested VMX works, else interpreting, which has no VMX.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context, Result};
use tempfile::TempDir;

use super::{
    Firmware, Machine, Running, Sink, probe,
    running::{self, Port},
};

/// The emulator's program.
pub const PROGRAM: &str = "qemu-system-x86_64";

/// Where distributions keep OVMF's code and the variable store that belongs to it.
const OVMF: &[(&str, &str)] = &[
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
];

pub fn start(machine: &Machine, folder: TempDir, sinks: Vec<Sink>) -> Result<Running> {
    let port = if machine.typed { Port::listen()? } else { Port::file(folder.path().join("serial.txt"))? };
    let mut command = running::dying_with_us(PROGRAM);
    command
        .args(["-nodefaults", "-no-reboot", "-display", "none", "-vga", "std", "-machine", "pc"])
        .args(["-smp", &machine.cores.to_string(), "-m", &machine.memory_mib.to_string()])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"]);
    let default_cpu = if probe::kvm_has_vmx() {
        command.args(["-accel", "kvm"]);
        "host,+vmx"
    } else {
        // A thread for each processor changes how their steps interleave from run to run.
        command.args(["-accel", "tcg,thread=single"]);
        // All there is, and not AMD's, or the hypervisor would say that this is what is wrong.
        "max,vendor=GenuineIntel"
    };
    command.args(["-cpu", machine.cpu.as_deref().unwrap_or(default_cpu)]);
    command.arg("-drive").arg(drive(&machine.image, "snapshot=on"));
    command.arg("-chardev").arg(match &port {
        Port::File(path) => format!("file,id=com1,path={}", escaped(path)),
        Port::Socket(_, number) => format!("socket,id=com1,host=127.0.0.1,port={number},server=off"),
    });
    command.args(["-serial", "chardev:com1"]);
    if machine.firmware == Firmware::Uefi {
        let (code, variables) = ovmf().context("OVMF is not installed (package ovmf)")?;
        let own_variables = folder.path().join("variables.fd");
        fs::copy(variables, &own_variables)?;
        command.arg("-drive").arg(drive(code, "if=pflash,readonly=on"));
        command.arg("-drive").arg(drive(&own_variables, "if=pflash"));
    }
    command
        .current_dir(folder.path())
        .stdin(Stdio::null())
        .stdout(File::create(folder.path().join("stdout.txt"))?)
        .stderr(File::create(folder.path().join("stderr.txt"))?);
    Running::new(command, port, folder, "stdout.txt", sinks)
}

fn drive(file: &Path, options: &str) -> String {
    format!("format=raw,file={},{options}", escaped(file))
}

/// QEMU's options end at a comma; a comma in a name is doubled.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// OVMF's code and variables, if installed.
pub fn ovmf() -> Option<(&'static Path, PathBuf)> {
    OVMF.iter()
        .map(|(code, variables)| (Path::new(*code), PathBuf::from(variables)))
        .find(|(code, variables)| code.exists() && variables.exists())
}
