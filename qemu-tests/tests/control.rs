//! Control registers, by the hazards that they are known for: what the guests that change them say.

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use qemu_tests::{Boot, SMALL_TIMEOUT, skip, test};
use xtask::{emulator::Machine, hypervisor, image};

/// Runs guest `modes`, which counts what it checks by hazard.
fn modes(hazard: &str) -> Result<()> {
    let verdict =
        Boot::small("[[guest]]\nname = \"modes\"\nkernel = \"guest:modes\"\n").run(SMALL_TIMEOUT)?;
    verdict.guest_says("modes", &format!("{hazard}: 0 bad of "))?.success()?;
    verdict.guest_says_times("modes", "BAD", 0)?;
    Ok(())
}

/// The guest beside it goes on.
fn no_ram() -> Result<()> {
    let manifest = "[[guest]]\nname = \"lost\"\nkernel = \"guest:bad-cr3\"\n\
                    [[guest]]\nname = \"memory\"\nkernel = \"guest:memory\"\n";
    let verdict = Boot::small(manifest).run(SMALL_TIMEOUT)?;
    verdict
        .guest_says("lost", "a CR3 that is no RAM next")?
        .guest_ended("lost", "crash")?
        .says("guest lost vcpu 0 stopped: triple fault")?
        .guest_says("memory", "memory done")?
        .guest_ended("memory", "exit 0")?
        .success()?;
    Ok(())
}

/// What the guest expects of a processor holds without a hypervisor: the emulated processor is the judge of the guest.
fn natively(guest: &str) -> Result<()> {
    skip::without_program("bochs-bin")?;
    let boot = Boot::large(&format!("[[guest]]\nname = \"{guest}\"\nkernel = \"guest:{guest}\"\n")).cores(1);
    let built = hypervisor::build_bare_metal("native", &["--quiet"])?;
    let native = hypervisor::strip(built.first().context("package native has no binary")?)?;
    let image = image::pack(&native, Some(&boot.payload()?))?;
    let outcome = Machine { image, ..boot.machine }.run(SMALL_TIMEOUT)?;
    let said = format!("{guest} done: 0 bad");
    ensure!(outcome.output.contains(&said), "it never said `{said}`; its output:\n{}", outcome.output);
    Ok(())
}

fn main() -> ExitCode {
    qemu_tests::main(vec![
        test("h17_pdptes_are_loaded_when_they_should_be", || modes("H17")),
        test("h19_every_flush_in_every_mode", || modes("H19")),
        test("h20_a_cr3_that_is_no_ram_while_paging_is_off", || modes("H20")),
        test("h20_a_cr3_that_is_no_ram", no_ram),
        test("modes_without_a_hypervisor", || natively("modes")),
        test("tasks_without_a_hypervisor", || natively("tasks")),
    ])
}
