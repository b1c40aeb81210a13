//! The hazards of docs/hazards.md that only a guest on a processor can show, each named after its row.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context, Result, ensure};
use qemu_tests::{Boot, SMALL_TIMEOUT, Verdict, test};

/// With and without virtual NMIs, VPIDs, a preemption timer and an APIC-access page.
const TWO_MODELS: [&str; 2] = ["corei7_skylake_x", "core2_penryn_t9600"];

/// Wall time of the rights matrix, which takes two minutes of a core.
const MATRIX_TIMEOUT: Duration = Duration::from_secs(900);

/// The models that the rights matrix runs on: without SMEP and SMAP, with one, with both; from the oldest to the newest
/// virtualization features.
const MATRIX_MODELS: [&str; 6] = [
    "core2_penryn_t9600",
    "corei5_lynnfield_750",
    "corei7_sandy_bridge_2600k",
    "broadwell_ult",
    "corei7_skylake_x",
    "tigerlake",
];
/// The paging modes of guests of our own, and the least number of combinations in each.
const MATRIX_MODES: [(&str, &str, u64); 3] =
    [("rights64", "4-level", 100_000), ("rights32", "PAE", 100_000), ("rights32", "2-level", 10_000)];

/// Rights at every level x WP, SMEP, SMAP, NXE x kinds of access x A and D x reserved bits, as the SDM has it.
fn h15_every_combination_of_rights(model: &str) -> Result<()> {
    let manifest = "
        [[guest]]
        name = \"rights64\"
        kernel = \"guest:rights64\"
        [[guest]]
        name = \"rights32\"
        kernel = \"guest:rights32\"
    ";
    let verdict = Boot::small(manifest).cpu(model).cores(2).run(MATRIX_TIMEOUT)?;
    for (guest, mode, combinations_min) in MATRIX_MODES {
        let combinations = combinations(&verdict, guest, mode)?;
        println!("{model}, {mode}: {combinations} combinations");
        ensure!(combinations >= combinations_min, "only {combinations} combinations in {mode}");
    }
    for guest in ["rights64", "rights32"] {
        verdict.guest_says_times(guest, "BAD", 0)?.guest_ended(guest, "exit 0")?;
    }
    verdict.success()?;
    Ok(())
}

/// From the guest's last word on a mode: `rights: MODE: N combinations, 0 bad`.
fn combinations(verdict: &Verdict, guest: &str, mode: &str) -> Result<u64> {
    let begin = format!("rights: {mode}: ");
    let lines = verdict.lines_of(guest);
    let line = lines.iter().find_map(|line| line.strip_prefix(&begin)?.strip_suffix(" combinations, 0 bad"));
    line.and_then(|count| count.parse().ok())
        .with_context(|| format!("guest {guest} did not go through {mode}, or found faults: {lines:?}"))
}

/// A guest in a manifest.
fn guest(name: &str, kernel: &str, more: &str) -> String {
    format!("[[guest]]\nname = \"{name}\"\nkernel = \"guest:{kernel}\"\n{more}\n")
}

/// Every instruction that can exit, and sweeps of CPUID, MSRs and ports, beside a guest that works.
fn h28_every_instruction_that_exits(model: &str) -> Result<()> {
    let manifest = guest("exits", "exits", "") + &guest("beside", "memory", "");
    let verdict = Boot::small(&manifest).cpu(model).cores(2).run(SMALL_TIMEOUT)?;
    verdict
        .guest_says("exits", "exits done: 0 bad")?
        .guest_says_times("exits", "BAD", 0)?
        .guest_says("beside", "memory done")?
        .success()?;
    Ok(())
}

/// What guest:ends can be told to do, and how it ends then.
const ENDS: &[(&str, &str)] = &[
    ("triple-fault", "crash"),
    ("reset-cf9", "reset"),
    ("reset-keyboard", "reset"),
    ("reset-fast", "reset"),
    ("power-off", "power-off"),
    ("halt", "halt"),
    ("task-switch", "crash"),
    ("real-mode", "crash"),
    ("virtual-8086", "crash"),
    ("gates-in-hole", "crash"),
    ("gates-in-apic", "crash"),
    ("stack-in-hole", "crash"),
    ("segments-in-hole", "crash"),
    ("code-in-hole", "crash"),
    ("code-in-apic", "crash"),
    ("wide-write-to-apic", "crash"),
    ("tables-in-hole", "crash"),
    ("tables-nowhere", "crash"),
];

/// Each way to end ends that guest alone, as the architecture or the report has it, beside a guest that works.
fn h28_every_way_to_end(model: &str) -> Result<()> {
    let end = |&(word, expect): &(&str, &str)| {
        guest(word, "ends", &format!("cmdline = \"{word}\"\nexpect = \"{expect}\""))
    };
    let manifest = ENDS.iter().map(end).collect::<String>() + &guest("beside", "memory", "");
    let verdict = Boot::small(&manifest).cpu(model).cores(2).run(SMALL_TIMEOUT)?;
    for (word, _) in ENDS {
        verdict.guest_says(word, &format!("ends: {word}"))?.guest_says_times(word, "BAD", 0)?;
    }
    verdict.guest_says("beside", "memory done")?.success()?;
    Ok(())
}

/// Writes of 1 to 512 bytes of every kind into live page tables, across two of them too; and by a string port instruction
/// (H16), which the hypervisor carries out.
fn h13_h16_writes_into_live_tables(model: &str) -> Result<()> {
    let verdict = Boot::small(&guest("writes", "table-writes", "")).cpu(model).run(SMALL_TIMEOUT)?;
    verdict
        .guest_says("writes", "table-writes done: 0 bad")?
        .guest_says_times("writes", "BAD", 0)?
        .success()?;
    Ok(())
}

/// A guest whose exception is raised again in its own delivery, for ever: the core stays ours, and a guest beside it on
/// the same core works on.
fn h29_an_exception_raised_for_ever(storm: &str, model: &str) -> Result<()> {
    let (kernel, more, said) = match storm {
        "debug" => ("debug-storm", "", "debug exceptions for ever"),
        _ => ("ends", "cmdline = \"alignment-storm\"", "ends: alignment checks"),
    };
    let manifest = guest("storm", kernel, more) + &guest("beside", "memory", "");
    let running = Boot::small(&manifest).cpu(model).start()?;
    running.wait_from(0, &format!("[storm] {said}"), SMALL_TIMEOUT)?;
    running.wait_from(0, "umbra: guest beside ended: exit 0", SMALL_TIMEOUT)?;
    for text in ["umbra: guest storm ended", "BAD"] {
        ensure!(!running.output().contains(text), "there is `{text}` in:\n{}", running.output());
    }
    Ok(())
}

/// The debug exception of a breakpoint on MOV SS's operand comes once, after the next instruction, which exits.
fn h30_mov_ss_puts_a_debug_exception_off(model: &str) -> Result<()> {
    let verdict = Boot::small(&guest("mov-ss", "mov-ss", "")).cpu(model).run(SMALL_TIMEOUT)?;
    verdict.guest_says("mov-ss", "mov-ss done: 0 bad")?.guest_says_times("mov-ss", "BAD", 0)?.success()?;
    Ok(())
}

/// Each kind of event with each part of its delivery not in the shadow, and little room for it there: it arrives exactly
/// once, NMIs after the IRET of the one before. It has a core to itself: Bochs 2.7 carries the NMI blocking of one guest
/// over to the next one that enters on the same processor.
fn h31_each_event_arrives_once(model: &str) -> Result<()> {
    let manifest = "[hypervisor]\nshadow_frames = 256\n".to_owned()
        + &guest("deliveries", "deliveries", "shadow_cap = 80")
        + &guest("beside", "memory", "");
    let verdict = Boot::small(&manifest).cpu(model).cores(2).run(SMALL_TIMEOUT)?;
    verdict
        .guest_says("deliveries", "deliveries: 2560 events")?
        .guest_says("deliveries", "deliveries done: 0 bad")?
        .guest_says("beside", "memory done")?
        .success()?;
    Ok(())
}

fn main() -> ExitCode {
    let mut tests = Vec::new();
    for model in TWO_MODELS {
        tests.push(test(format!("h28_every_instruction_that_exits_{model}"), move || {
            h28_every_instruction_that_exits(model)
        }));
        tests.push(test(format!("h28_every_way_to_end_{model}"), move || h28_every_way_to_end(model)));
        tests.push(test(format!("h13_h16_writes_into_live_tables_{model}"), move || {
            h13_h16_writes_into_live_tables(model)
        }));
        tests.push(test(format!("h30_mov_ss_puts_a_debug_exception_off_{model}"), move || {
            h30_mov_ss_puts_a_debug_exception_off(model)
        }));
        tests.push(test(format!("h31_each_event_arrives_once_{model}"), move || {
            h31_each_event_arrives_once(model)
        }));
        for storm in ["debug", "alignment"] {
            tests.push(test(format!("h29_{storm}_exceptions_raised_for_ever_{model}"), move || {
                h29_an_exception_raised_for_ever(storm, model)
            }));
        }
    }
    for model in MATRIX_MODELS {
        tests.push(test(format!("h15_every_combination_of_rights_{model}"), move || {
            h15_every_combination_of_rights(model)
        }));
    }
    qemu_tests::main(tests)
}
