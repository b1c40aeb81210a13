//! One guest: its memory, its shadow MMU, its devices, its processor model.

pub mod account;
pub mod budget;
pub mod life;
pub mod ram;
pub mod registry;
pub mod shadow;
pub mod start;

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use ::shadow::Mmu;
use machine::cpu::control::{ControlModel, FixedBits};
use machine::cpu::cpuid::CpuidModel;
use machine::cpu::msr::MsrModel;
use machine::device::Devices;
use machine::manifest::GuestConfig;
use memory::{GuestId, Hpa};
use spin::Mutex;

use crate::host::time;
use ram::GuestRam;

/// What all processors of a guest are like.
pub struct CpuModel {
    /// What CPUID says.
    pub cpuid: CpuidModel,
    /// What the control registers may hold.
    pub control: ControlModel,
    /// What the model-specific registers are.
    pub msr: MsrModel,
    /// Executable pages are mapped by 4 KiB only (iTLB multihit).
    pub split_executable: bool,
    /// 1 GiB pages are offered.
    pub gib_pages: bool,
    /// What VMX demands of CR0 and CR4.
    pub fixed: FixedBits,
    /// The page of the MSR bitmap.
    pub msr_bitmap: Hpa,
}

/// Where a guest's only vCPU is just now, for those who must reach it.
///
/// The order of `in_guest` and the flush generation is what a shoot-down rests on: the vCPU sets `in_guest`, then
/// reads the generation and flushes if it is behind, then enters. Who advances the generation and then finds
/// `in_guest` clear knows that the next entry flushes; who finds it set sends a kick and waits for the exit.
#[derive(Debug, Default)]
pub struct Presence {
    /// From before the last look at the flush generation to the exit: the TSC at the entry, which is different for
    /// each; else 0.
    pub in_guest: AtomicU64,
    /// The core that it runs on.
    pub core: AtomicU32,
}

/// One guest, from its start to its end. A restart makes a new one.
pub struct Guest {
    /// Its number, which owns its frames.
    pub id: GuestId,
    /// Its place in the manifest.
    pub config: GuestConfig,
    /// Its RAM.
    pub ram: GuestRam,
    /// Its shadow MMU. Lock order: see ARCHITECTURE.md.
    pub mmu: Mutex<Mmu>,
    /// Its devices.
    pub devices: Mutex<Devices>,
    /// Its processor model.
    pub model: CpuModel,
    /// Advanced whenever sptes were removed or narrowed.
    pub generation: AtomicU64,
    /// Its vCPU's whereabouts.
    pub presence: Presence,
    /// Frames that its MMU holds, as last seen under the lock: what reclaim compares.
    pub shadow_frames: AtomicU64,
    /// The most frames its shadow MMU may hold, and what reclaim for others leaves to it.
    pub guarantee_frames: u64,
    /// Somebody wants it to end: the console.
    pub stop_requested: AtomicBool,
    /// Something changed in its devices behind its vCPU's back (typed input).
    pub attention: AtomicBool,
    /// The host's TSC when it started: guest time 0.
    start_tsc: u64,
    /// Exits of its vCPU so far, as of its last look around.
    pub exits: AtomicU64,
    /// The same by reason.
    pub account: Mutex<account::ExitAccount>,
}

impl Guest {
    /// Guest time now, in nanoseconds since its start.
    #[inline]
    #[must_use]
    pub fn now_ns(&self) -> u64 {
        time::ticks_to_ns(time::tsc().saturating_sub(self.start_tsc))
    }

    /// The host's TSC at guest time `ns`.
    #[must_use]
    pub fn tsc_at(&self, ns: u64) -> u64 {
        self.start_tsc.saturating_add(time::ns_to_ticks(ns))
    }

    /// The host's TSC when the guest started.
    #[must_use]
    pub fn start_tsc(&self) -> u64 {
        self.start_tsc
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.config.name
    }

    /// The vCPU must come out of the guest and look around.
    pub fn kick(&self) {
        self.attention.store(true, Ordering::Release);
        if let Some(core) = crate::host::cores::core(self.presence.core.load(Ordering::Acquire) as usize) {
            crate::host::cores::kick(core);
        }
    }
}
