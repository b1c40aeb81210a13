//! More vCPUs than cores: time slices, whatever the guests do and whatever timer the processor has.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context, Result};
use qemu_tests::{Boot, SMALL_TIMEOUT, Verdict, test};

/// It has no preemption timer: its slices end by an NMI.
const WITHOUT_PREEMPTION_TIMER: &str = "core2_penryn_t9600";
const WITH_PREEMPTION_TIMER: &str = "broadwell_ult";
const BOTH: [(&str, &str); 2] =
    [("with_a_preemption_timer", WITH_PREEMPTION_TIMER), ("without_one", WITHOUT_PREEMPTION_TIMER)];

fn guest(name: &str, kernel: &str, more: &str) -> String {
    format!("[[guest]]\nname = \"{name}\"\nkernel = \"{kernel}\"\n{more}\n")
}

/// TSC ticks of a guest's life, from its last line: `umbra: guest NAME ended: WHY (E exits, T ticks)`.
fn ticks(output: &str, name: &str) -> Result<u64> {
    let mark = format!("umbra: guest {name} ended: ");
    let line = output.lines().find(|line| line.contains(&mark)).context("no last line")?;
    let number =
        line.rsplit_once(" ticks)").and_then(|(rest, _)| rest.rsplit_once(", ")).context("no ticks")?;
    Ok(number.1.parse()?)
}

/// Two guests that spin with interrupts off share one core with two that work: both get through.
fn spinning_guests_hold_nobody_up(model: &str) -> Result<()> {
    let manifest = guest("spin-1", "guest:spin", "")
        + &guest("spin-2", "guest:spin", "")
        + &guest("working", "guest:memory", "")
        + &guest("waiting", "guest:timer", "");
    let running = Boot::small(&manifest).cpu(model).start()?;
    for guest in ["spin-1", "spin-2"] {
        running.wait_from(0, &format!("[{guest}] spinning"), SMALL_TIMEOUT)?;
    }
    for guest in ["working", "waiting"] {
        running.wait_from(0, &format!("umbra: guest {guest} ended: exit 0"), SMALL_TIMEOUT)?;
    }
    Ok(())
}

/// Every core's slices end, not only the boot core's.
fn all_cores_have_slices(model: &str) -> Result<()> {
    let mut manifest = String::new();
    for core in 0..2 {
        let place = format!("cores = [{core}]");
        manifest += &guest(&format!("spin-{core}"), "guest:spin", &place);
        manifest += &guest(&format!("working-{core}"), "guest:memory", &place);
    }
    let running = Boot::small(&manifest).cpu(model).cores(2).start()?;
    for core in 0..2 {
        running.wait_from(0, &format!("umbra: guest working-{core} ended: exit 0"), SMALL_TIMEOUT)?;
    }
    Ok(())
}

/// Equal guests on one core end at about the same time: nobody gets more than the others.
fn equal_guests_get_equal_shares() -> Result<()> {
    let manifest: String = (0..3).map(|i| guest(&format!("equal-{i}"), "guest:memory", "")).collect();
    let verdict = Boot::small(&manifest).run(SMALL_TIMEOUT)?;
    verdict.success()?;
    let mut all = Vec::new();
    for i in 0..3 {
        all.push(ticks(&verdict.outcome.output, &format!("equal-{i}"))?);
    }
    let (least, most) = (all.iter().min().unwrap_or(&0), all.iter().max().unwrap_or(&0));
    anyhow::ensure!(most - least < most / 5, "shares differ by more than a fifth: {all:?}");
    Ok(())
}

/// What neither the VMCS nor the entry switches is switched with the vCPU.
fn registers_are_switched_with_the_vcpu(model: &str) -> Result<()> {
    let manifest: String = (0..3).map(|i| guest(&format!("registers-{i}"), "guest:registers", "")).collect();
    let verdict = Boot::small(&manifest).cpu(model).run(SMALL_TIMEOUT)?;
    for i in 0..3 {
        verdict.guest_says(&format!("registers-{i}"), "registers done: 0 bad")?;
    }
    verdict.success()?;
    Ok(())
}

/// Linux beside two guests that spin with interrupts off, all on one core.
fn linux_boots_beside_spinning_guests() -> Result<()> {
    let manifest = guest("spin-1", "guest:spin", "")
        + &guest("spin-2", "guest:spin", "")
        + &guest("linux", "debian", "initrd = \"debian\"\nmemory = \"256M\"");
    let running = Boot::large(&manifest).cores(1).start()?;
    running.wait_from(0, "umbra: guest linux ended: power-off", Duration::from_secs(900))?;
    Ok(())
}

/// Without a preemption timer, EFER switching or VPID.
fn linux_boots_on_the_oldest_processor() -> Result<()> {
    let manifest = guest("linux", "debian", "initrd = \"debian\"\nmemory = \"256M\"\nexpect = \"power-off\"");
    let verdict: Verdict =
        Boot::large(&manifest).cpu(WITHOUT_PREEMPTION_TIMER).cores(1).run(Duration::from_secs(600))?;
    verdict.guest_says("linux", "umbra-init: script done")?.success()?;
    Ok(())
}

fn main() -> ExitCode {
    let mut tests = vec![
        test("equal_guests_get_equal_shares", equal_guests_get_equal_shares),
        test("linux_boots_beside_spinning_guests", linux_boots_beside_spinning_guests),
        test("linux_boots_on_the_oldest_processor", linux_boots_on_the_oldest_processor),
    ];
    for (name, model) in BOTH {
        tests.push(test(format!("spinning_guests_hold_nobody_up_{name}"), move || {
            spinning_guests_hold_nobody_up(model)
        }));
        tests.push(test(format!("all_cores_have_slices_{name}"), move || all_cores_have_slices(model)));
        tests.push(test(format!("registers_are_switched_with_the_vcpu_{name}"), move || {
            registers_are_switched_with_the_vcpu(model)
        }));
    }
    qemu_tests::main(tests)
}
