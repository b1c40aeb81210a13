//! Every 64-bit processor model with VMX that Bochs has, with what each of them lacks.

use std::process::ExitCode;

use anyhow::Result;
use qemu_tests::{Boot, SMALL_TIMEOUT, test};
use xtask::emulator::VMX_MODELS;

const GUESTS: &str = "
    [[guest]]
    name = \"hello\"
    kernel = \"guest:hello\"
    [[guest]]
    name = \"faults\"
    kernel = \"guest:faults\"
    [[guest]]
    name = \"paging\"
    kernel = \"guest:paging\"
    [[guest]]
    name = \"multiboot32\"
    kernel = \"guest:multiboot32\"
    [[guest]]
    name = \"modes\"
    kernel = \"guest:modes\"
    [[guest]]
    name = \"tasks\"
    kernel = \"guest:tasks\"
    [[guest]]
    name = \"timer\"
    kernel = \"guest:timer\"
    [[guest]]
    name = \"memory\"
    kernel = \"guest:memory\"
    [[guest]]
    name = \"registers\"
    kernel = \"guest:registers\"
    [[guest]]
    name = \"cpuid-bench\"
    kernel = \"guest:cpuid-bench\"
";

/// What the guests have together, and 64 MiB that are kept, and a bit.
const MEMORY_MIB: u32 = 320;

fn run(model: &'static str) -> Result<()> {
    let mut boot = Boot::small(GUESTS);
    boot.machine.memory_mib = MEMORY_MIB;
    boot.cpu(model)
        .cores(2)
        .run(SMALL_TIMEOUT)?
        .guest_says("hello", "hello on COM1")?
        .guest_says("faults", "faults done: 0 bad")?
        .guest_says("paging", "paging done: 0 bad")?
        .guest_says("multiboot32", "multiboot done")?
        .guest_says("modes", "modes done: 0 bad")?
        .guest_says("tasks", "tasks done: 0 bad")?
        .guest_says("timer", "timer: 10 APIC ticks")?
        .guest_says("memory", "memory done")?
        .guest_says("registers", "registers done: 0 bad")?
        .guest_says("cpuid-bench", "B cpuid_leaf0 n=1000")?
        .success()?;
    Ok(())
}

fn main() -> ExitCode {
    qemu_tests::main(VMX_MODELS.iter().map(|&model| test(model, move || run(model))).collect())
}
