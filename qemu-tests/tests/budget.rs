//! Shadow pages far fewer than the guests would like: everything still works, only slower.

use std::{process::ExitCode, time::Duration};

use anyhow::{Result, ensure};
use qemu_tests::{Boot, SMALL_TIMEOUT, Verdict, test};

/// Reclaim was at work: this many shadow pages at least were taken back.
fn pressed(verdict: &Verdict, pages_min: u64) -> Result<()> {
    let (batches, pages) = (verdict.counter("reclaims")?, verdict.counter("reclaimed")?);
    println!("{pages} pages reclaimed in {batches} batches");
    ensure!(
        pages >= pages_min,
        "{pages} pages reclaimed in {batches} batches: {pages_min} were to be expected"
    );
    Ok(())
}

fn small_guests_in_a_tight_budget() -> Result<()> {
    // guest:bench goes through some 2,500 shadow pages, two frames each.
    let manifest = "
        [hypervisor]
        shadow_frames = 384
        stats_interval_ms = 2000
        [[guest]]
        name = \"bench\"
        kernel = \"guest:bench\"
        [[guest]]
        name = \"paging\"
        kernel = \"guest:paging\"
        [[guest]]
        name = \"memory\"
        kernel = \"guest:memory\"
    ";
    let verdict = Boot::small(manifest).run(SMALL_TIMEOUT)?;
    verdict
        .guest_says("bench", "GUEST done tsc=")?
        .guest_says("paging", "paging: checksum 2648df4df0a8b800")?
        .guest_says("paging", "paging done: 0 bad")?
        .guest_says("memory", "memory round 1 checksum 189141fe684b082b")?
        .success()?;
    pressed(&verdict, 500)
}

/// The frames come from those who hold most: from two alike about as many, and from one that has no more than it needs
/// none, wherever it stands in the manifest.
fn h26_reclaim_takes_from_whoever_holds_most() -> Result<()> {
    let manifest = "
        [hypervisor]
        shadow_frames = 512
        stats_interval_ms = 1000
        [[guest]]
        name = \"small\"
        kernel = \"guest:memory\"
        [[guest]]
        name = \"first\"
        kernel = \"guest:bench\"
        [[guest]]
        name = \"second\"
        kernel = \"guest:bench\"
    ";
    let mut boot = Boot::small(manifest).cores(2);
    boot.machine.memory_mib = 512;
    let verdict = boot.run(SMALL_TIMEOUT)?;
    verdict.success()?;
    pressed(&verdict, 500)?;
    let [small, first, second] =
        ["small", "first", "second"].map(|guest| verdict.shadow_count(guest, "reclaimed"));
    let (small, first, second) = (small?, first?, second?);
    println!("reclaimed: {first} and {second} pages of two alike, {small} of the small one");
    ensure!(small == 0, "{small} pages of the small guest were reclaimed");
    ensure!(first.max(second) <= 2 * first.min(second), "unequal shares: {first} and {second}");
    Ok(())
}

fn two_linux_guests_in_a_tight_budget() -> Result<()> {
    // Room for 150 shadow pages of two frames each; the two make some 800.
    let manifest = "
        [hypervisor]
        shadow_frames = 300
        stats_interval_ms = 1000
        [[guest]]
        name = \"first\"
        kernel = \"debian\"
        initrd = \"debian\"
        memory = \"256M\"
        [[guest]]
        name = \"second\"
        kernel = \"debian\"
        initrd = \"debian\"
        memory = \"256M\"
    ";
    let verdict = Boot::large(manifest).run(Duration::from_secs(900))?;
    for guest in ["first", "second"] {
        verdict.guest_says(guest, "umbra-init: script done")?.guest_ended(guest, "power-off")?;
    }
    verdict.success()?;
    pressed(&verdict, 100)
}

fn a_guest_at_its_cap_reclaims_from_itself() -> Result<()> {
    let manifest = "
        [hypervisor]
        stats_interval_ms = 500
        [[guest]]
        name = \"capped\"
        kernel = \"guest:bench\"
        shadow_cap = 128
        [[guest]]
        name = \"free\"
        kernel = \"guest:memory\"
        shadow_guarantee = 64
    ";
    let verdict = Boot::small(manifest).run(SMALL_TIMEOUT)?;
    verdict.guest_says("capped", "GUEST done tsc=")?.guest_says("free", "memory done")?.success()?;
    pressed(&verdict, 500)?;
    let (capped, free) =
        (verdict.shadow_count("capped", "reclaimed")?, verdict.shadow_count("free", "reclaimed")?);
    ensure!(capped > 0 && free == 0, "reclaimed: {capped} pages of the capped guest, {free} of the other");
    Ok(())
}

/// RAM is beside the budget: a guest that ends leaves no more room for shadow pages than there was, and finds its RAM when
/// it comes again.
fn a_guest_comes_again_beside_a_budget() -> Result<()> {
    let manifest = "
        [hypervisor]
        shadow_frames = 256
        stats_interval_ms = 1000
        [[guest]]
        name = \"again\"
        kernel = \"guest:memory\"
        on_end = \"restart 2\"
        [[guest]]
        name = \"beside\"
        kernel = \"guest:bench\"
    ";
    let verdict = Boot::small(manifest).run(SMALL_TIMEOUT)?;
    verdict.guest_says("beside", "GUEST done tsc=")?.success()?;
    let lives = verdict.lines_of("again").iter().filter(|line| line.contains("memory done")).count();
    ensure!(lives == 3, "{lives} lives of three");
    for line in verdict.statistics()? {
        let frames = Verdict::shadow_frames(&line);
        ensure!(frames <= 256, "{frames} frames in a budget of 256: {line}");
    }
    pressed(&verdict, 500)
}

fn main() -> ExitCode {
    qemu_tests::main(vec![
        test("a_guest_comes_again_beside_a_budget", a_guest_comes_again_beside_a_budget),
        test("two_linux_guests_in_a_tight_budget", two_linux_guests_in_a_tight_budget),
        test("h26_reclaim_takes_from_whoever_holds_most", h26_reclaim_takes_from_whoever_holds_most),
        test("small_guests_in_a_tight_budget", small_guests_in_a_tight_budget),
        test("a_guest_at_its_cap_reclaims_from_itself", a_guest_at_its_cap_reclaims_from_itself),
    ])
}
