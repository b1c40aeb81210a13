//! One guest: its memory, its shadow MMU, its devices, its processor model.

pub mod account;
pub mod budget;
pub mod life;
pub mod presence;
pub mod ram;
pub mod registry;
pub mod shadow;
pub mod start;

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use ::shadow::Mmu;
use machine::cpu::control::{ControlModel, FixedBits};
use machine::cpu::cpuid::CpuidModel;
use machine::cpu::msr::MsrModel;
use machine::device::{Devices, Requests};
use machine::load::firmware::wakeup;
use machine::manifest::{End, GuestConfig};
use memory::{Gpa, GuestId, Hpa};
use spin::{Mutex, Once};

use crate::host::time;
use presence::Presence;
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
    /// Its vCPUs, as others see them, by number.
    pub vcpus: Box<[Arc<Presence>]>,
    /// vCPUs that still hold anything of it: who is the last one to go takes it down.
    vcpus_left: AtomicU32,
    /// vCPUs that wait to be woken through `mailbox`, a bit each.
    pub parked: AtomicU64,
    /// vCPUs that executed HLT with interrupts off, a bit each: only an NMI could wake one.
    pub dead: AtomicU64,
    /// Where its first processor wakes the others; with one vCPU there is none.
    pub mailbox: Option<Gpa>,
    /// Frames that its MMU holds, as last seen under the lock: what reclaim compares.
    pub shadow_frames: AtomicU64,
    /// Frames that reclaim for others leaves to it.
    pub guarantee_frames: u64,
    /// How it ends, from the moment that somebody said so: a vCPU of its own, or the console.
    end: Once<End>,
    /// It was told in the log that a start-up message starts nothing here.
    pub startup_told: Once,
    /// The host's TSC when it started: guest time 0.
    start_tsc: u64,
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

    /// Tells this guest from any other that a core ran before, an earlier life of its own included.
    #[must_use]
    pub fn identity(&self) -> (GuestId, u64) {
        (self.id, self.start_tsc)
    }

    /// Exits of all vCPUs so far, as of their last look around.
    #[must_use]
    pub fn exits(&self) -> u64 {
        self.vcpus.iter().map(|vcpu| vcpu.exits.load(Ordering::Relaxed)).sum()
    }

    /// Its end begins, unless it has begun already: all its vCPUs come out and go. Returns whether this is the end
    /// that counts.
    pub fn end(&self, end: End) -> bool {
        let mut first = false;
        self.end.call_once(|| {
            first = true;
            end
        });
        if first {
            self.vcpus.iter().for_each(|vcpu| vcpu.kick());
        }
        first
    }

    /// How it ends, if it does.
    #[inline]
    #[must_use]
    pub fn ends(&self) -> Option<End> {
        self.end.get().copied()
    }

    /// Kicks the vCPUs in the set, a bit each.
    pub fn kick(&self, set: u64) {
        let mut left = set;
        while left != 0 {
            if let Some(vcpu) = self.vcpus.get(left.trailing_zeros() as usize) {
                vcpu.kick();
            }
            left &= left - 1;
        }
    }

    /// A vCPU is gone, or could not be made. Returns whether it was the last one.
    #[must_use]
    pub fn vcpu_gone(&self) -> bool {
        self.vcpus_left.fetch_sub(1, Ordering::AcqRel) == 1
    }

    /// Whether none of its vCPUs will ever run again: all that were started have halted with interrupts off, and no NMI
    /// is on its way to any.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        let devices = self.devices.lock();
        let waits = |vcpu| devices.requests(vcpu).contains(Requests::NMI);
        // Under the lock: who takes an NMI is not in the set any more. One that is parked takes none.
        let dead = self.dead.load(Ordering::SeqCst);
        // Before `parked`: who is woken is parked no more before the command is taken out of the mailbox.
        let woken = self.mailbox.and_then(|mailbox| wakeup::wanted(&self.ram, mailbox).ok().flatten());
        let parked = self.parked.load(Ordering::SeqCst);
        (0..self.vcpus.len()).all(|vcpu| {
            let sleeps = parked >> vcpu & 1 != 0 && woken != Some(vcpu as u32);
            sleeps || dead >> vcpu & 1 != 0 && !waits(vcpu)
        })
    }
}
