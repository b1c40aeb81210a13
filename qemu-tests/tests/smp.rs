//! Guests with several virtual processors: on a core each, on fewer, in tight budgets; their ends.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context, Result, ensure};
use qemu_tests::{Boot, SMALL_TIMEOUT, test};

/// Neither VPID nor preemption timer nor PAUSE-loop exiting.
const OLDEST: &str = "core2_penryn_t9600";
/// Wall time where the processors share a core: those that spin keep the others waiting.
const SHARED_TIMEOUT: Duration = Duration::from_secs(400);

/// Audits of the shadow pages, beside processors that use them, that a run in a tight budget has at least.
const AUDITS_MIN: usize = 3;

const STAGES: [&str; 8] = [
    "counters: ok",
    "pings: ok",
    "kinds of interrupts: ok",
    "many tables: ok",
    "one root: ok",
    "a root each: ok",
    "toggled entries: ok",
    "RAM or a device: ok",
];

fn guest(name: &str, kernel: &str, more: &str) -> String {
    format!("[[guest]]\nname = \"{name}\"\nkernel = \"guest:{kernel}\"\n{more}\n")
}

/// The guest's own checks (H3, H12, H14) on that many cores.
fn all_is_well(vcpus: u32, cores: u32, model: &str, hypervisor: &str, more: &str) -> Result<()> {
    let manifest = format!("{hypervisor}\n{}", guest("smp", "smp", &format!("vcpus = {vcpus}\n{more}")));
    let timeout = if vcpus > cores { SHARED_TIMEOUT } else { SMALL_TIMEOUT };
    let verdict = Boot::small(&manifest).cores(cores).cpu(model).run(timeout)?;
    for stage in STAGES {
        verdict.guest_says("smp", stage)?;
    }
    verdict
        .guest_says("smp", &format!("{vcpus} processors"))?
        .guest_says_times("smp", "BAD", 0)?
        .guest_ended("smp", "exit 0")?
        .success()?;
    if !hypervisor.is_empty() {
        let pages = verdict.counter("reclaimed")?;
        ensure!(pages > 0, "the budget was not tight: {pages} pages reclaimed");
        // A broken invariant is a panic.
        let audits = verdict.outcome.output.matches(": sound").count();
        ensure!(audits >= AUDITS_MIN, "{audits} audits while it ran");
    }
    Ok(())
}

/// One processor's crash ends its guest, whatever the others do, with one report, and no other guest.
fn one_processor_crashes() -> Result<()> {
    let manifest = guest("dying", "smp-crash", "on_end = \"restart 1\"") + &guest("living", "memory", "");
    let verdict = Boot::small(&manifest).cores(3).run(SMALL_TIMEOUT)?;
    verdict
        .guest_says_times("dying", "the end comes", 2)?
        .says("guest dying is stopped by its vCPU 2: triple fault")?
        .says("guest dying vcpu 2 stopped")?
        .guest_ended("dying", "crash")?
        .guest_says("living", "memory done")?
        .guest_ended("living", "exit 0")?
        .never_says("did not come back")?
        .success()?;
    let reports = verdict.outcome.output.matches("guest dying vcpu").count();
    ensure!(reports == 2, "{reports} reports of two lives");
    Ok(())
}

/// One that halts with interrupts off is not the guest's end while another may send it an NMI.
fn halted_processors_wake_by_nmi() -> Result<()> {
    for cores in [3, 1] {
        let verdict = Boot::small(&guest("halting", "smp-halt", "")).cores(cores).run(SMALL_TIMEOUT)?;
        verdict
            .guest_says("halting", "woken by 1 NMI")?
            .guest_says("halting", "woken again after INIT: true")?
            .says("vCPU 2 is not started by a start-up message, at 0x80000")?
            .guest_says_times("halting", "BAD", 0)?
            .guest_ended("halting", "halted")?
            .success()?;
    }
    Ok(())
}

/// A guest that is stopped from the console while its processors run, spin, sleep or wait to be woken.
fn stop_and_restart_from_the_console() -> Result<()> {
    let manifest = guest("several", "smp", "expect = \"any\"") + &guest("other", "memory", "");
    let mut running = Boot::small(&manifest).cores(2).typed().start()?;
    running.wait_for("[several] smp: pings: ok", SMALL_TIMEOUT)?;
    // The escape, then the key.
    running.send(b"\x01r")?;
    running.wait_for("umbra: guest several ended: stopped from the console", SMALL_TIMEOUT)?;
    running.wait_for("[several] smp: pings: ok", SMALL_TIMEOUT)?;
    running.send(b"\x01l\x01s")?;
    running.wait_for("vcpu 3 on core", SMALL_TIMEOUT)?;
    running.send(b"\x01x")?;
    running.wait_for("umbra: guest several ended: stopped from the console", SMALL_TIMEOUT)?;
    running.wait_from(0, "umbra: guest other ended: exit 0", SMALL_TIMEOUT)?;
    running.wait_for("umbra: exit 0", SMALL_TIMEOUT)?;
    let output = running.finish(SMALL_TIMEOUT)?.output;
    ensure!(!output.contains("did not come back"), "frames were lost");
    let line = output.lines().find(|line| line.contains(" several ") && line.contains("runs"));
    let line = line.context("the list does not show the guest")?;
    let cores = line.split(' ').find(|word| word.contains(',')).unwrap_or_default();
    let mut cores: Vec<&str> = cores.split(',').collect();
    cores.sort_unstable();
    ensure!(cores == ["0", "0", "1", "1"], "four vCPUs are not two on each core: {line}");
    Ok(())
}

fn main() -> ExitCode {
    const TIGHT: &str =
        "[hypervisor]\nshadow_frames = 512\nstats_interval_ms = 500\naudit_interval_ms = 3000";
    const STATISTICS: &str = "[hypervisor]\nstats_interval_ms = 500\naudit_interval_ms = 3000";
    let well =
        |name: &str, vcpus, cores, model: &'static str, hypervisor: &'static str, more: &'static str| {
            test(name, move || all_is_well(vcpus, cores, model, hypervisor, more))
        };
    qemu_tests::main(vec![
        well("h14_four_processors_on_one_core", 4, 1, "broadwell_ult", "", ""),
        well("h14_four_processors_on_two_cores", 4, 2, "broadwell_ult", "", ""),
        well("h14_four_processors_on_four_cores", 4, 4, "broadwell_ult", "", ""),
        well("h14_four_processors_in_a_tight_budget", 4, 4, "broadwell_ult", TIGHT, ""),
        well("h14_four_processors_at_their_cap", 4, 2, "broadwell_ult", STATISTICS, "shadow_cap = 80"),
        well("two_processors_on_the_oldest_model", 2, 2, OLDEST, "", ""),
        well("two_processors_on_skylake", 2, 2, "corei7_skylake_x", "", ""),
        well("eight_processors_on_four_cores", 8, 4, "tigerlake", "", ""),
        test("one_processor_crashes", one_processor_crashes),
        test("halted_processors_wake_by_nmi", halted_processors_wake_by_nmi),
        test("stop_and_restart_from_the_console", stop_and_restart_from_the_console),
    ])
}
