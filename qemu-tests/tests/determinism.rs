//! Without typed input the same image takes the same ticks and says the same, run after run.

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use qemu_tests::{Boot, SMALL_TIMEOUT, test};

const GUESTS: &str = "
    [[guest]]
    name = \"paging\"
    kernel = \"guest:paging\"
    [[guest]]
    name = \"timer\"
    kernel = \"guest:timer\"
    [[guest]]
    name = \"faults\"
    kernel = \"guest:faults\"
";

fn twice(cores: u32) -> Result<()> {
    let run = || -> Result<_> {
        let verdict = Boot::small(GUESTS).cores(cores).run(SMALL_TIMEOUT)?;
        verdict.success()?;
        let ticks = verdict.outcome.ticks.context("the emulator's log names no tick")?;
        Ok((ticks, verdict.outcome.output))
    };
    let (first, second) = (run()?, run()?);
    ensure!(first.0 == second.0, "{} ticks, then {}", first.0, second.0);
    ensure!(first.1 == second.1, "the output differs:\n{}\nthen\n{}", first.1, second.1);
    Ok(())
}

fn main() -> ExitCode {
    qemu_tests::main(vec![
        test("the_same_ticks_twice_on_one_core", || twice(1)),
        test("the_same_ticks_twice_on_two_cores", || twice(2)),
    ])
}
