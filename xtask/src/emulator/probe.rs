//! Finds out whether KVM's nested VMX works here, and chooses the emulator.

use std::{
    fs,
    process::{Command, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};

use super::{Backend, qemu};

/// QEMU where a guest of KVM is given a working VMX, else Bochs, which emulates it.
pub fn choose() -> Backend {
    if kvm_has_vmx() { Backend::Qemu } else { Backend::Bochs }
}

/// Whether QEMU can start a KVM guest that has VMX. Found out once.
///
/// The module's parameter alone proves nothing: in a container or a nested host KVM may be there and fail to make
/// a machine, so one is made, with the processor `enforce`d to have what it is asked for.
pub fn kvm_has_vmx() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| nested_is_enabled() && a_machine_starts())
}

fn nested_is_enabled() -> bool {
    fs::read_to_string("/sys/module/kvm_intel/parameters/nested").is_ok_and(|value| is_on(&value))
        && fs::File::options().read(true).write(true).open("/dev/kvm").is_ok()
        && crate::workspace::has_program(qemu::PROGRAM)
}

fn is_on(value: &str) -> bool {
    matches!(value.trim(), "Y" | "1")
}

/// Starts a machine that stops at its first instruction, and has its monitor end it.
fn a_machine_starts() -> bool {
    use std::io::Write;
    let child = Command::new(qemu::PROGRAM)
        .args(["-nodefaults", "-display", "none", "-S", "-m", "64", "-monitor", "stdio"])
        .args(["-accel", "kvm", "-cpu", "host,+vmx,enforce"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut child) = child else { return false };
    if let Some(mut input) = child.stdin.take() {
        let _ = input.write_all(b"quit\n");
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        if let Ok(Some(status)) = child.try_wait() {
            return status.success();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let _ = child.kill();
    let _ = child.wait();
    false
}

#[cfg(test)]
mod tests {
    use super::is_on;

    #[test]
    fn both_spellings_of_the_parameter_are_known() {
        assert!(is_on("Y\n") && is_on("1\n"));
        assert!(!is_on("N\n") && !is_on("0\n") && !is_on(""));
    }
}
