//! One guest's end, crash or idleness is no other guest's business.

use std::{process::ExitCode, time::Duration};

use anyhow::Result;
use qemu_tests::{Boot, SMALL_TIMEOUT, test};

fn guest(name: &str, kernel: &str, more: &str) -> String {
    format!("[[guest]]\nname = \"{name}\"\nkernel = \"{kernel}\"\n{more}\n")
}

fn a_triple_fault_ends_one_guest() -> Result<()> {
    let manifest = guest("dying", "guest:triple-fault", "") + &guest("living", "guest:memory", "");
    let verdict = Boot::small(&manifest).cores(2).run(SMALL_TIMEOUT)?;
    verdict
        .guest_says("dying", "triple fault next")?
        .guest_says_times("dying", "still alive", 0)?
        .guest_ended("dying", "crash")?
        .guest_says("living", "memory done")?
        .guest_ended("living", "exit 0")?
        .success()?;
    Ok(())
}

fn linux_goes_on_beside_a_triple_fault() -> Result<()> {
    let linux = guest("living", "debian", "initrd = \"debian\"\nmemory = \"256M\"");
    let manifest = guest("dying", "guest:triple-fault", "") + &linux;
    let verdict = Boot::large(&manifest).run(Duration::from_secs(600))?;
    verdict
        .guest_ended("dying", "crash")?
        .guest_says("living", "umbra-init: script done")?
        .guest_ended("living", "power-off")?
        .success()?;
    Ok(())
}

fn an_unexpected_end_is_a_failure() -> Result<()> {
    let manifest = guest("dying", "guest:triple-fault", "expect = \"exit 0\"");
    Boot::small(&manifest).run(SMALL_TIMEOUT)?.guest_ended("dying", "crash")?.exit(1)?;
    Ok(())
}

fn a_crashed_guest_is_restarted() -> Result<()> {
    let manifest = guest("again", "guest:triple-fault", "on_end = \"restart 2\"");
    Boot::small(&manifest)
        .run(SMALL_TIMEOUT)?
        .guest_says_times("again", "triple fault next", 3)?
        .guest_ended("again", "crash")?
        .success()?;
    Ok(())
}

fn main() -> ExitCode {
    qemu_tests::main(vec![
        test("a_triple_fault_ends_one_guest", a_triple_fault_ends_one_guest),
        test("linux_goes_on_beside_a_triple_fault", linux_goes_on_beside_a_triple_fault),
        test("an_unexpected_end_is_a_failure", an_unexpected_end_is_a_failure),
        test("a_crashed_guest_is_restarted", a_crashed_guest_is_restarted),
    ])
}
