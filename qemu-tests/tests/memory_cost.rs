//! What the hypervisor takes of the machine's memory, for itself and for a guest, as its `stats` say.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context, Result, ensure};
use qemu_tests::{Boot, SMALL_TIMEOUT, test};
use xtask::emulator::Running;

/// The hypervisor itself: code, tables, stacks, heap; without the payload.
const HYPERVISOR_KIB_MAX: u64 = 16 * 1024;
/// What a guest takes beside its RAM and its shadow pages.
const BESIDE_KIB_MAX: u64 = 4 * 1024;
/// Wall time for an answer of the console.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// A machine of usual size: what is kept for each frame and each core counts.
fn start(memory: &str) -> Result<Running> {
    let manifest = format!(
        "[[guest]]\nname = \"guest\"\nkernel = \"guest:spin\"\nmemory = \"{memory}\"\nexpect = \"any\"\n"
    );
    let mut boot = Boot::small(&manifest).cores(2).typed();
    boot.machine.memory_mib = 1024;
    let mut running = boot.start()?;
    running.wait_for("[guest] spinning", SMALL_TIMEOUT)?;
    Ok(running)
}

/// What stands between `before` and `after` on the line of `output` that has both.
fn number(output: &str, before: &str, after: &str) -> Result<u64> {
    let found = output.lines().find_map(|line| line.split_once(before)?.1.split_once(after)?.0.parse().ok());
    found.with_context(|| format!("no line has `{before}N{after}`:\n{output}"))
}

/// The figures of the hypervisor and of its guest, in KiB: itself, the guest's RAM, beside it.
fn figures(running: &mut Running) -> Result<(u64, u64, u64)> {
    let start = running.output_bytes();
    running.send(b"\x01s")?;
    running.wait_from(start, "in all, on all cores:", ANSWER_TIMEOUT)?;
    let output = running.output();
    Ok((
        number(&output, "memory: the hypervisor ", " KiB (")?,
        number(&output, "; RAM ", " KiB, beside it ")?,
        number(&output, " KiB, beside it ", " KiB; ")?,
    ))
}

fn a_guest_of_128_mib() -> Result<()> {
    let (hypervisor, ram, beside) = figures(&mut start("128M")?)?;
    ensure!(hypervisor <= HYPERVISOR_KIB_MAX, "the hypervisor takes {hypervisor} KiB");
    // A figure of nothing would be within every bound.
    ensure!(hypervisor > 256, "the hypervisor's own {hypervisor} KiB cannot be");
    ensure!(ram == 128 * 1024, "the guest's RAM is {ram} KiB");
    ensure!(beside <= BESIDE_KIB_MAX, "the guest takes {beside} KiB beside its RAM");
    ensure!(beside > 0, "a guest has at least its MSR bitmap beside its RAM");
    Ok(())
}

fn the_figures_follow_the_guest() -> Result<()> {
    let (small, large) = (figures(&mut start("16M")?)?, figures(&mut start("256M")?)?);
    ensure!((small.1, large.1) == (16 * 1024, 256 * 1024), "RAM: {} and {} KiB", small.1, large.1);
    ensure!(small.2 <= large.2, "beside the RAM: {} KiB for 16 MiB, {} for 256", small.2, large.2);
    ensure!(large.2 <= 2 * BESIDE_KIB_MAX, "a guest of 256 MiB takes {} KiB beside its RAM", large.2);
    Ok(())
}

fn main() -> ExitCode {
    qemu_tests::main(vec![
        test("a_guest_of_128_mib", a_guest_of_128_mib),
        test("the_figures_follow_the_guest", the_figures_follow_the_guest),
    ])
}
