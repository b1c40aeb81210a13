//! A machine that cannot run guests is told so, in words, and nothing else happens.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use qemu_tests::{Boot, SMALL_TIMEOUT, Verdict, skip, test};
use xtask::emulator::{Backend, End, Firmware};

const GUEST: &str = "[[guest]]\nname = \"hello\"\nkernel = \"guest:hello\"\n";

fn refused(verdict: &Verdict) -> Result<()> {
    verdict.says("umbra: ")?.says("VMX")?.never_says("hello on COM1")?.never_says("panic")?;
    let end = verdict.outcome.end;
    ensure!(matches!(end, End::Verdict(1..)), "the run ended with {end:?}; {}", verdict.outcome.output);
    Ok(())
}

fn qemu_without_kvm(firmware: Firmware) -> Result<()> {
    skip::without_program("qemu-system-x86_64")?;
    let mut boot = Boot::small(GUEST);
    boot.machine.backend = Backend::Qemu;
    boot.machine.firmware = firmware;
    // A model without VMX, even where KVM could offer it.
    boot.machine.cpu = Some("qemu64".to_owned());
    boot.pack()?;
    refused(&Verdict::new(boot.machine.run(SMALL_TIMEOUT)?))
}

fn main() -> ExitCode {
    qemu_tests::main(vec![
        test("bios", || qemu_without_kvm(Firmware::Bios)),
        test("uefi", || qemu_without_kvm(Firmware::Uefi)),
        test("amd", || {
            // Bochs' own model of a processor that has SVM instead.
            refused(&Boot::small(GUEST).cpu("ryzen").run(SMALL_TIMEOUT)?)
        }),
    ])
}
