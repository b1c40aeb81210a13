//! Debian's kernel from its entry to the first line of init: natively and under the hypervisor, the same files.

use std::{fs, io::Cursor, path::PathBuf, process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use cpio::{
    newc::{self, ModeFileType},
    write_cpio,
};
use xtask::{
    emulator::{Backend, Machine},
    hypervisor::{self, Hypervisor},
    image, kernels,
    manifest::{self, Limits, Source},
    payload::{self, Options},
    workspace,
};

use super::{Ended, Row, ended, run};

/// Native is about 20 s of wall time here.
const TIMEOUT: Duration = Duration::from_secs(600);

/// The row for Debian's kernel, and how it runs without a hypervisor.
pub fn measure(umbra: &Hypervisor) -> Result<Vec<Row>> {
    let debian = kernels::debian().map_err(anyhow::Error::msg)?;
    let initrd = initramfs(&debian.initramfs)?;
    let text = format!(
        "[[guest]]\nname = \"linux\"\nkernel = {:?}\ninitrd = {initrd:?}\nmemory = \"256M\"\n\
         cmdline = \"console=ttyS0,115200 quiet\"\ndevices = [\"shutdown-port\"]\nexpect = \"power-off\"\n",
        debian.kernel
    );
    let plan = manifest::check(&Source::from_text("bench", &text), &Limits::default())?;
    let payload = payload::assemble(&plan, &Options::default())?.path;

    let native = hypervisor::build_bare_metal("native", &["--quiet"])?;
    let native = native.first().context("package native has no binary")?;
    let image = image::pack(&hypervisor::strip(native)?, Some(&payload))?;
    let (native_ticks, _) = boot(image)?;
    let image = image::pack(&umbra.stripped, Some(&payload))?;
    let (ticks, exits) = boot(image)?;
    Ok(vec![Row { op: "linux_entry_to_init".into(), ticks, exits, native: Some(native_ticks), kvm: None }])
}

/// Ticks from the guest's entry to its end, and its exits where there is a hypervisor to count them.
fn boot(image: PathBuf) -> Result<(f64, Option<f64>)> {
    let machine = Machine { cores: 1, backend: Backend::Bochs, ..Machine::new(image) };
    let outcome = run(&machine, TIMEOUT)?;
    ensure!(
        outcome.output.contains("umbra-init: first line"),
        "the guest did not come to its init; its output:\n{}",
        outcome.output
    );
    if let Some(Ended { exits, ticks }) = ended(&outcome.output) {
        return Ok((ticks, Some(exits)));
    }
    let entered =
        entry_tick(&outcome.output).context("neither the guest's entry nor its end was reported")?;
    let ended = outcome.ticks.context("Bochs left no log")?;
    Ok((ended.saturating_sub(entered) as f64, None))
}

/// N of `umbra: guest NAME entered at tick N`, which boot/native prints, decimal or with 0x.
fn entry_tick(output: &str) -> Option<u64> {
    let word = output.split_once(" entered at tick ")?.1.split_whitespace().next()?;
    match word.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => word.parse().ok(),
    }
}

/// Debian's initramfs with another /init behind it: the kernel unpacks both, and the later file stays.
fn initramfs(debian: &std::path::Path) -> Result<PathBuf> {
    let folder = workspace::cache_folder("bench")?;
    let source = workspace::root().join("xtask/src/bench/init.c");
    let program = folder.join("init");
    workspace::must_succeed(
        Command::new("cc")
            .args([
                "-O2",
                "-static",
                "-nostdlib",
                "-ffreestanding",
                "-fno-stack-protector",
                "-fno-pic",
                "-no-pie",
            ])
            .args(["-fcf-protection=none", "-Wl,--build-id=none", "-s", "-o"])
            .arg(&program)
            .arg(source),
    )
    .context("the benchmark's init is written in C and needs gcc: apt-get install gcc")?;
    let entry =
        newc::Builder::new("init").ino(1).mode(0o755).set_mode_file_type(ModeFileType::Regular).nlink(1);
    let own = write_cpio(std::iter::once((entry, Cursor::new(fs::read(&program)?))), Vec::new())?;
    let mut both = fs::read(debian)?;
    both.resize(both.len().next_multiple_of(4), 0);
    both.extend_from_slice(&own);
    let path = folder.join("initramfs.cpio");
    fs::write(&path, both)?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::entry_tick;

    #[test]
    fn the_entry_tick_may_be_of_either_base() {
        assert_eq!(entry_tick("x\numbra: guest linux entered at tick 0x0000000000000010\r\n"), Some(16));
        assert_eq!(entry_tick("umbra: guest linux entered at tick 123456\n"), Some(123_456));
        assert_eq!(entry_tick("nothing"), None);
    }
}
