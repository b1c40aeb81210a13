//! What a manifest says, as the hypervisor reads it.

use alloc::{string::String, vec::Vec};
use serde::{Deserialize, Serialize};

use crate::load::Protocol;

/// Ctrl-a: the console's escape where the manifest names none.
pub const DEFAULT_ESCAPE: u8 = 1;

/// All that a boot needs to know beside the files themselves.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The hypervisor's own settings.
    pub hypervisor: HypervisorConfig,
    /// The guests, in the order in which they are started; 1 to 64 of them, with distinct names.
    pub guests: Vec<GuestConfig>,
}

/// The hypervisor's own settings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HypervisorConfig {
    /// The most 4 KiB frames that all shadow pages together may take; `None`: what the machine has.
    pub shadow_frames: Option<u32>,
    /// Frames kept for work already begun; `None`: the hypervisor's choice.
    pub min_frames: Option<u32>,
    /// Reclaim starts when no more frames than this are free.
    pub low_frames: Option<u32>,
    /// Reclaim stops when this many frames are free.
    pub high_frames: Option<u32>,
    /// Milliseconds between two lines of statistics in the log; `None`: none.
    pub stats_interval_ms: Option<u32>,
    /// Milliseconds between two audits of all guests' shadow pages; `None`: only when the console asks.
    pub audit_interval_ms: Option<u32>,
    /// The control character (1..=31) after which the console takes a command.
    pub escape: u8,
    /// Whether the machine is switched off when the last guest has ended: "Shutdown" on port 0x8900 (Bochs)
    /// and isa-debug-exit on 0xF4 (QEMU). On hardware neither port is there.
    pub exit_when_done: bool,
    /// Whether a person is at the console. Without one no input is read: the run is deterministic.
    pub interactive: bool,
}

impl Default for HypervisorConfig {
    fn default() -> Self {
        Self {
            shadow_frames: None,
            min_frames: None,
            low_frames: None,
            high_frames: None,
            stats_interval_ms: None,
            audit_interval_ms: None,
            escape: DEFAULT_ESCAPE,
            exit_when_done: true,
            interactive: false,
        }
    }
}

/// One guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestConfig {
    /// 1 to 32 bytes of `[a-z0-9-]`; prefixes the guest's lines on the console.
    pub name: String,
    /// How the kernel is entered.
    pub protocol: Protocol,
    /// The kernel; never empty.
    pub kernel: FileRef,
    /// Linux: the initial RAM disk.
    pub initrd: Option<FileRef>,
    /// Multiboot: the modules, in order; at most 16.
    pub modules: Vec<ModuleRef>,
    /// The kernel's command line; at most 2,047 bytes, no control characters.
    pub cmdline: String,
    /// Guest RAM in bytes, a multiple of 2 MiB, at least 4 MiB.
    pub memory_bytes: u64,
    /// Virtual processors, 1..=64.
    pub vcpus: u32,
    /// Cores (by index, 0 = the boot processor) the guest may run on; empty: any.
    pub cores: Vec<u32>,
    /// The opt-in devices.
    pub devices: DeviceSet,
    /// What happens when it ends.
    pub on_end: OnEnd,
    /// How it has to end for the run to count as a success.
    pub expect: Expect,
    /// Shadow frames that reclaim for other guests leaves to this one.
    pub shadow_guarantee_frames: Option<u32>,
    /// Shadow frames it may hold at most; at its cap it reclaims from itself.
    pub shadow_cap_frames: Option<u32>,
}

/// One file of the package: a range of bytes from the start of its file area.
///
/// Out of [`unpack`](super::unpack) it is known to lie inside the package.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FileRef {
    /// Bytes from the start of the file area, a multiple of 4 KiB.
    pub offset: u64,
    /// The file's length in bytes.
    pub length_bytes: u64,
}

/// A Multiboot module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleRef {
    /// Its bytes.
    pub file: FileRef,
    /// Its command line, under the same limits as the kernel's.
    pub cmdline: String,
}

/// Devices a guest has only if its manifest says so; all serve tests and benchmarks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceSet {
    /// Port 0xF4: a byte written there ends the guest with that exit code.
    pub exit_port: bool,
    /// Port 0x8900: "Shutdown", letter by letter, powers the guest off.
    pub shutdown_port: bool,
    /// Port 0xE9: a console of one instruction per byte.
    pub debug_console: bool,
    /// Port 0xE8: 0 and 1 mark the begin and end of a benchmark operation.
    pub bench_marks: bool,
}

/// What to do when a guest has ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnEnd {
    /// Leave it ended.
    #[default]
    Stop,
    /// Start it again, at most `max` times; after that it stays ended.
    Restart {
        /// Restarts, at least 1.
        max: u32,
    },
}

/// How a guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// By ACPI or the shutdown port.
    PowerOff,
    /// By the exit port, with this code.
    Exit(u8),
    /// It asked for a reset (0xCF9, 0x92, 0x64).
    Reset,
    /// It halted for good: HLT with interrupts off.
    Halted,
    /// The hypervisor stopped it, with a report: a triple fault, say.
    Crash,
    /// A person stopped it from the console.
    Stopped,
}

/// How a guest has to end for the run to count as a success.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Expect {
    /// It powers itself off.
    #[default]
    PowerOff,
    /// It writes this code to the exit port.
    Exit(u8),
    /// It resets itself.
    Reset,
    /// It halts for good.
    Halt,
    /// The hypervisor has to stop it, with a report.
    Crash,
    /// Any end will do.
    Any,
}

impl Expect {
    /// Whether this end is the expected one.
    #[must_use]
    pub fn is_met_by(self, end: End) -> bool {
        match self {
            Self::PowerOff => end == End::PowerOff,
            Self::Exit(code) => end == End::Exit(code),
            Self::Reset => end == End::Reset,
            Self::Halt => end == End::Halted,
            Self::Crash => end == End::Crash,
            Self::Any => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expectation_is_met_by_its_own_end_alone() {
        let ends = [End::PowerOff, End::Exit(0), End::Exit(3), End::Reset, End::Crash, End::Stopped];
        for (expect, met) in [
            (Expect::PowerOff, [true, false, false, false, false, false]),
            (Expect::Exit(3), [false, false, true, false, false, false]),
            (Expect::Reset, [false, false, false, true, false, false]),
            (Expect::Crash, [false, false, false, false, true, false]),
            (Expect::Any, [true; 6]),
        ] {
            for (end, met) in ends.into_iter().zip(met) {
                assert_eq!(expect.is_met_by(end), met, "{expect:?} {end:?}");
            }
        }
    }
}
