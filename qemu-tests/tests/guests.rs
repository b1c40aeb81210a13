//! Each small guest by itself: what it says and how it ends.

use std::process::{Command, ExitCode};

use anyhow::{Context, ensure};
use qemu_tests::{Boot, SMALL_TIMEOUT, skip, test};
use xtask::{payload::OWN_GUESTS, workspace};

/// Guests with tests of their own: slices.rs, hazards.rs, smp.rs, reclaim.rs.
const ELSEWHERE: &[&str] = &[
    "spin",
    "rights64",
    "rights32",
    "ends",
    "exits",
    "deliveries",
    "debug-storm",
    "table-writes",
    "mov-ss",
    "smp",
    "smp-crash",
    "smp-halt",
    "churn",
];

/// What each guest says when all is well.
const SAID: &[(&str, &[&str])] = &[
    ("hello", &["hello on COM1", "hello on 0xE9"]),
    ("cpuid-bench", &["B cpuid_leaf0 n=1000 ticks="]),
    ("triple-fault", &["triple fault next"]),
    ("paging", &["paging: checksum 2648df4df0a8b800", "RSVD fault: ok", "paging done: 0 bad"]),
    (
        "memory",
        &[
            "memory round 0 checksum 7fa371d6d903e8f9",
            "memory round 1 checksum 189141fe684b082b",
            "memory done",
        ],
    ),
    ("faults", &["#DB step over CPUID: 1 of vector 1 error 0x0: ok", "faults done: 0 bad"]),
    ("timer", &["timer: 10 PIT ticks", "timer: 10 APIC ticks"]),
    ("registers", &["registers done: 0 bad"]),
    ("bad-cr3", &["a CR3 that is no RAM next"]),
    ("modes", &["modes: 32-bit paging", "modes: PAE", "modes: 4-level", "modes done: 0 bad"]),
    ("tasks", &["#DF by a task gate: ok", "PAE: the PDPTEs are loaded anew: ok", "tasks done: 0 bad"]),
    (
        "multiboot32",
        &[
            "stage 0: 32-bit, paging off",
            "stage 1: two-level paging",
            "stage 2: PAE",
            "stage 3: compatibility mode",
            "stage 4: long mode, magic 0x2badb002",
            "multiboot done",
        ],
    ),
    ("bench", &["GUEST start hv=1", "B cpuid_leaf0 n=1000 ticks=", "GUEST done tsc="]),
];

fn run(name: &'static str, said: &'static [&'static str]) -> anyhow::Result<()> {
    let manifest = format!("[[guest]]\nname = \"{name}\"\nkernel = \"guest:{name}\"\n");
    let verdict = Boot::small(&manifest).run(SMALL_TIMEOUT)?;
    for text in said {
        verdict.guest_says(name, text)?;
    }
    verdict.guest_says_times(name, "BAD", 0)?;
    verdict.guest_ended(name, if matches!(name, "triple-fault" | "bad-cr3") { "crash" } else { "exit 0" })?;
    verdict.success()?;
    Ok(())
}

/// A CPUID exit and the way back, in ticks, as the bench counts it.
const CPUID_TICKS_MAX: u64 = 150;

/// The published figure, on the model and at the speed it was measured with: at a lower one the console wants
/// more attention in between.
fn cpuid_is_cheap() -> anyhow::Result<()> {
    let manifest = "[[guest]]\nname = \"a\"\nkernel = \"guest:cpuid-bench\"\n";
    let verdict = Boot::large(manifest).cores(1).cpu("corei7_skylake_x").run(SMALL_TIMEOUT)?;
    verdict.success()?;
    let ticks = verdict.lines_of("a").into_iter().filter_map(|line| {
        let total = line.strip_prefix("B cpuid_leaf0 n=1000 ticks=")?;
        total.split(' ').next()?.parse::<u64>().ok()
    });
    let least = ticks.min().context("no figure was printed")?.div_ceil(1000);
    ensure!(least <= CPUID_TICKS_MAX, "a CPUID exit costs {least} ticks");
    // An exit alone is 31: whoever reads less reads wrong.
    ensure!(least > 31, "{least} ticks cannot be an exit");
    Ok(())
}

/// How guest.c is built for the published figures, as one types it.
const BY_HAND: &str = "gcc -O2 -ffreestanding -fno-pic -no-pie -mno-red-zone -mgeneral-regs-only \
    -fno-stack-protector -fno-asynchronous-unwind-tables -fno-tree-loop-distribute-patterns -fcf-protection=none \
    -mcmodel=large -nostdlib -static -T guest.ld -o guest.elf start.S guest.c -Wl,--build-id=none -Wl,-z,noexecstack";

/// The benchmark program runs as anybody's ELF64 file, and its marks on port 0xE8 count the exits of each operation.
fn bench_by_hand() -> anyhow::Result<()> {
    skip::without_program("gcc")?;
    let folder = tempfile::tempdir()?;
    for file in ["guest.c", "start.S", "guest.ld"] {
        std::fs::copy(workspace::root().join("qemu-tests/bench").join(file), folder.path().join(file))?;
    }
    workspace::must_succeed(Command::new("sh").args(["-c", BY_HAND]).current_dir(&folder))?;
    let manifest = format!(
        "[[guest]]\nname = \"a\"\nkernel = {:?}\nmemory = \"96M\"\n\
         devices = [\"exit-port\", \"debug-console\", \"bench-marks\"]\nexpect = \"exit 0\"\n",
        folder.path().join("guest.elf")
    );
    let verdict = Boot::small(&manifest).run(SMALL_TIMEOUT)?;
    verdict.success()?.guest_says("a", "GUEST start hv=1")?.guest_says("a", "GUEST done tsc=")?;
    verdict.guest_says_times("a", "BAD", 0)?;
    // Faults, table writes, flushes, changes of root, ports, MSRs, interrupts: no exit allocates.
    verdict.never_says("the heap was used")?;
    // The count comes with the second mark, the figure after it. A timer's exits may fall into any.
    let lines: Vec<&str> = verdict.outcome.output.lines().collect();
    for (own, figure) in [
        (0, "B rdtsc n=1000 ticks="),
        (1000, "B cpuid_leaf0 n=1000 ticks="),
        (2000, "B cr4_pge_toggle_pair n=1000 ticks="),
        (1024, "B fill_rd_A0 n=1024 ticks="),
        (2, "B cr3_and_reread512_after n=512 ticks="),
    ] {
        let at = lines.iter().position(|line| line.starts_with(&format!("[a] {figure}")));
        let before = &lines[..at.with_context(|| format!("no line `{figure}`"))?];
        let counted = before.iter().rev().find_map(|line| line.split_once("umbra: guest a: exits="));
        let exits: u32 = counted.context("no count of exits")?.1.parse()?;
        ensure!((own..=own + 20).contains(&exits), "before `{figure}`: {exits} exits, not {own}");
    }
    Ok(())
}

fn main() -> ExitCode {
    let mut tests: Vec<_> = SAID.iter().map(|&(name, said)| test(name, move || run(name, said))).collect();
    tests.push(test("cpuid_is_cheap", cpuid_is_cheap));
    tests.push(test("bench_by_hand", bench_by_hand));
    tests.push(test("every_guest_is_tested", || {
        for own in OWN_GUESTS.iter().filter(|own| !ELSEWHERE.contains(&own.name)) {
            ensure!(SAID.iter().any(|(name, _)| *name == own.name), "{} is not", own.name);
        }
        Ok(())
    }));
    qemu_tests::main(tests)
}
