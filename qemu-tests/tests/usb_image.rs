//! `cargo xtask image`: one file for a USB stick that boots from BIOS and from UEFI.

use std::{fs, path::PathBuf, process::ExitCode};

use anyhow::{Context, Result, ensure};
use qemu_tests::{SMALL_TIMEOUT, Verdict, skip, test};
use tempfile::TempDir;
use xtask::{
    emulator::{Backend, End, Firmware, Machine},
    workspace,
};

const GUEST: &str = "[[guest]]\nname = \"hello\"\nkernel = \"guest:hello\"\n";

/// What a person types; the file lives as long as its folder.
fn image() -> Result<(TempDir, PathBuf)> {
    let folder = tempfile::tempdir()?;
    let (manifest, image) = (folder.path().join("guests.toml"), folder.path().join("umbra.img"));
    fs::write(&manifest, GUEST)?;
    let output = workspace::cargo()
        .args(["xtask", "image"])
        .arg(&manifest)
        .arg("-o")
        .arg(&image)
        .output()
        .context("cargo does not start")?;
    let (said, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "cargo xtask image failed:\n{errors}");
    ensure!(said.contains("dd if="), "nobody says how to write the stick:\n{said}");
    Ok((folder, image))
}

fn machine(image: PathBuf) -> Machine {
    Machine { cores: 2, memory_mib: 256, ips: 4_000_000, ..Machine::new(image) }
}

/// Up to the report that this machine has no VMX: QEMU without KVM has none.
fn up_to_the_report(firmware: Firmware) -> Result<()> {
    skip::without_program("qemu-system-x86_64")?;
    let (_folder, image) = image()?;
    let cpu = Some("qemu64".to_owned());
    let machine = Machine { backend: Backend::Qemu, firmware, cpu, ..machine(image) };
    let verdict = Verdict::new(machine.run(SMALL_TIMEOUT)?);
    verdict.says("umbra: Umbra ")?.says("VMX")?.never_says("panic")?.never_says("hello on COM1")?;
    let end = verdict.outcome.end;
    ensure!(matches!(end, End::Verdict(1..)), "the run ended with {end:?}; {}", verdict.outcome.output);
    Ok(())
}

fn to_the_end() -> Result<()> {
    skip::without_program("bochs-bin")?;
    let (_folder, image) = image()?;
    let verdict = Verdict::new(machine(image).run(SMALL_TIMEOUT)?);
    verdict.guest_says("hello", "hello on COM1")?.guest_ended("hello", "exit 0")?.success()?;
    Ok(())
}

/// A partition table whose boot flag a BIOS asks for, and a partition that UEFI looks into.
fn it_has_the_marks_of_a_bootable_stick() -> Result<()> {
    let (_folder, image) = image()?;
    let bytes = fs::read(&image)?;
    ensure!(bytes.len() % 512 == 0, "{} bytes are no whole number of sectors", bytes.len());
    ensure!(bytes.get(510..512) == Some(&[0x55, 0xaa]), "the first sector lacks the boot signature");
    ensure!(bytes[..446].iter().any(|&byte| byte != 0), "the first sector has no boot code");
    let kinds: Vec<u8> = bytes[446..510].chunks(16).map(|entry| entry[4]).collect();
    // 0xEE: a GUID partition table behind it; 0xEF: an EFI system partition; 0x0C: FAT, where UEFI looks as well
    // (UEFI specification, "Removable Media Boot Behavior").
    ensure!(
        kinds.iter().any(|kind| [0x0c, 0xee, 0xef].contains(kind)),
        "no partition for UEFI: {kinds:02x?}"
    );
    // Many a BIOS starts no stick without an active partition.
    ensure!(bytes[446..510].chunks(16).any(|entry| entry[0] == 0x80), "no partition is active");
    Ok(())
}

fn main() -> ExitCode {
    qemu_tests::main(vec![
        test("bios_up_to_the_report", || up_to_the_report(Firmware::Bios)),
        test("uefi_up_to_the_report", || up_to_the_report(Firmware::Uefi)),
        test("bios_to_the_end", to_the_end),
        test("it_has_the_marks_of_a_bootable_stick", it_has_the_marks_of_a_bootable_stick),
    ])
}
