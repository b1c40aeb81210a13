//! Without typed input the same image takes the same ticks and says the same, run after run.

use std::{process::ExitCode, time::Duration};

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

const LINUX: &str = "
    [[guest]]
    name = \"linux\"
    kernel = \"debian\"
    initrd = \"debian\"
    memory = \"128M\"
    [[guest]]
    name = \"paging\"
    kernel = \"guest:paging\"
";

const SEVERAL_PROCESSORS: &str = "
    [[guest]]
    name = \"smp\"
    kernel = \"guest:smp\"
    [[guest]]
    name = \"paging\"
    kernel = \"guest:paging\"
";

fn twice(boot: &Boot, timeout: Duration) -> Result<()> {
    let run = || -> Result<_> {
        let verdict = boot.clone().run(timeout)?;
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
    let small = |cores| twice(&Boot::small(GUESTS).cores(cores), SMALL_TIMEOUT);
    qemu_tests::main(vec![
        test("the_same_ticks_twice_with_linux", || twice(&Boot::large(LINUX), Duration::from_secs(600))),
        test("the_same_ticks_twice_with_several_processors", || {
            twice(&Boot::small(SEVERAL_PROCESSORS).cores(3), SMALL_TIMEOUT)
        }),
        test("the_same_ticks_twice_on_one_core", move || small(1)),
        test("the_same_ticks_twice_on_two_cores", move || small(2)),
    ])
}
