//! A bad manifest is refused before anything boots; a damaged payload is refused by the hypervisor.
//!
//! That every kind of error is told with file, line and remedy is tested where the checks are, in
//! `xtask::manifest`; here it is seen through what a person types.

use std::{fs, process::ExitCode};

use anyhow::{Context, Result, ensure};
use qemu_tests::{Boot, SMALL_TIMEOUT, skip, test};
use xtask::workspace;

const GOOD: &str = "[[guest]]\nname = \"a\"\nkernel = \"guest:hello\"\n";

/// Lines behind a good guest, and what `cargo xtask run` has to say about them.
const BAD: &[(&str, &str, &[&str])] = &[
    ("unknown_key", "memroy = \"16M\"", &["guests.toml:4:1", "did you mean `memory`?"]),
    ("wrong_type", "memory = 128", &["guests.toml:4:10", "memory = \"128M\""]),
    ("not_toml", "[[guest", &["guests.toml:4:"]),
    ("memory_unit", "memory = \"33M\"", &["guests.toml:4:10", "give \"32M\" or \"34M\""]),
    ("too_much_memory", "memory = \"900G\"", &["guests.toml:4:10", "--memory"]),
    ("too_many_processors", "vcpus = 65", &["guests.toml:4:9", "give 1 to 64"]),
    ("no_such_core", "cores = [200]", &["guests.toml:4:10", "--cores 201"]),
    ("missing_file", "initrd = \"none.cpio\"", &["guests.toml:4:10", "none.cpio"]),
    (
        "not_a_kernel",
        "[[guest]]\nname = \"b\"\nkernel = \"guests.toml\"",
        &["guests.toml:6:10", "is not a kernel", "/boot/vmlinuz"],
    ),
    (
        "two_of_one_name",
        "[[guest]]\nname = \"a\"\nkernel = \"guest:hello\"",
        &["guests.toml:5:8", "first used here", "its own name"],
    ),
    (
        "too_small_a_budget",
        "[hypervisor]\nshadow_frames = 100",
        &["guests.toml:5:17", "too few", "give at least 128"],
    ),
    (
        "a_budget_below_the_guarantees",
        "shadow_guarantee = 200\n[hypervisor]\nshadow_frames = 200",
        &["guests.toml:6:17", "guaranteed", "give at least 240"],
    ),
    ("unknown_device", "devices = [\"lpt\"]", &["guests.toml:4:12", "`exit-port`"]),
    ("unknown_expectation", "expect = \"poweroff\"", &["guests.toml:4:10", "did you mean `power-off`?"]),
];

fn refused(lines: &str, said: &[&str]) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("guests.toml");
    fs::write(&path, format!("{GOOD}{lines}\n"))?;
    let output = workspace::cargo()
        .args(["xtask", "run", "--backend", "bochs", "--timeout", "60"])
        .arg(&path)
        .output()
        .context("cargo does not start")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success(), "it ran: {}", String::from_utf8_lossy(&output.stdout));
    for text in said {
        ensure!(errors.contains(text), "`{text}` is not in:\n{errors}");
    }
    ensure!(!String::from_utf8_lossy(&output.stdout).contains("umbra: "), "something was booted");
    Ok(())
}

/// The hypervisor with a payload that was changed on its way.
fn damaged(change: fn(&mut Vec<u8>)) -> Result<()> {
    skip::without_program("bochs-bin")?;
    let mut boot = Boot::small(GOOD);
    let mut payload = fs::read(boot.payload()?)?;
    change(&mut payload);
    let file = tempfile::NamedTempFile::new()?;
    fs::write(file.path(), &payload)?;
    boot.pack_blob(file.path())?;
    let verdict = qemu_tests::Verdict::new(boot.machine.run(SMALL_TIMEOUT)?);
    verdict.says("make the image anew")?.never_says("panic")?.never_says("hello on COM1")?.exit(1)?;
    Ok(())
}

fn main() -> ExitCode {
    let mut tests: Vec<_> =
        BAD.iter().map(|&(name, lines, said)| test(name, move || refused(lines, said))).collect();
    tests.push(test("damaged_payload", || damaged(|payload| payload[5000] ^= 1)));
    tests.push(test("payload_cut_short", || damaged(|payload| payload.truncate(6000))));
    tests.push(test("payload_of_another_version", || damaged(|payload| payload[8] = 0xff)));
    qemu_tests::main(tests)
}
