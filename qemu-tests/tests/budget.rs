//! Shadow pages far fewer than the guests would like: everything still works, only slower.

use std::{process::ExitCode, time::Duration};

use anyhow::Result;
use qemu_tests::{Boot, SMALL_TIMEOUT, test};

fn small_guests_in_a_tight_budget() -> Result<()> {
    let manifest = "
        [hypervisor]
        shadow_frames = 64
        [[guest]]
        name = \"paging\"
        kernel = \"guest:paging\"
        [[guest]]
        name = \"memory\"
        kernel = \"guest:memory\"
    ";
    Boot::small(manifest)
        .run(SMALL_TIMEOUT)?
        .guest_says("paging", "paging: checksum 2648df4df0a8b800")?
        .guest_says("paging", "paging done: 0 bad")?
        .guest_says("memory", "memory round 1 checksum 189141fe684b082b")?
        .success()?;
    Ok(())
}

fn two_linux_guests_in_a_tight_budget() -> Result<()> {
    // A booted Debian guest would like some 2,000 tables.
    let manifest = "
        [hypervisor]
        shadow_frames = 768
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
    Ok(())
}

fn a_guest_at_its_cap_reclaims_from_itself() -> Result<()> {
    let manifest = "
        [[guest]]
        name = \"capped\"
        kernel = \"guest:memory\"
        shadow_cap = 32
        [[guest]]
        name = \"free\"
        kernel = \"guest:paging\"
        shadow_guarantee = 64
    ";
    Boot::small(manifest)
        .run(SMALL_TIMEOUT)?
        .guest_says("capped", "memory done")?
        .guest_says("free", "paging done: 0 bad")?
        .success()?;
    Ok(())
}

fn main() -> ExitCode {
    qemu_tests::main(vec![
        test("small_guests_in_a_tight_budget", small_guests_in_a_tight_budget),
        test("two_linux_guests_in_a_tight_budget", two_linux_guests_in_a_tight_budget),
        test("a_guest_at_its_cap_reclaims_from_itself", a_guest_at_its_cap_reclaims_from_itself),
    ])
}
