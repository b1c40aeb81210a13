//! A vCPU as others see it: where it is, and how to get it to look around.

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use spin::Mutex;

use super::account::ExitAccount;
use crate::host::{apic, cores};
use crate::schedule;

/// One vCPU, as others see it; on cache lines of its own, since it writes them at every entry and exit.
///
/// A shoot-down rests on the order of two stores and two loads: the vCPU says that it goes in, then reads the guest's
/// flush generation, and if that is newer than what its translations are good for it flushes and says so, then enters.
/// Who advances the generation and then finds it inside, with an older one flushed, sends a kick and waits; who finds it
/// outside knows that it will read the new one before it goes in, and flush.
#[derive(Debug)]
#[repr(align(128))]
pub struct Presence {
    /// From before the last look at the flush generation to the exit: anything but 0.
    inside: AtomicU64,
    /// The newest generation at which it has flushed; no tag that is older is entered with, once this is stored.
    flushed: AtomicU64,
    /// The core that it is on, for good.
    core: AtomicU32,
    /// Somebody wants it to look around.
    attention: AtomicBool,
    /// It has nothing to do, and may run again only when it is asked to, or at a time that its core knows.
    sleeps: AtomicBool,
    /// Its exits so far, as of its last look around.
    pub exits: AtomicU64,
    /// The same by reason.
    pub account: Mutex<ExitAccount>,
}

impl Default for Presence {
    fn default() -> Self {
        Self {
            inside: AtomicU64::new(0),
            flushed: AtomicU64::new(0),
            core: AtomicU32::new(0),
            attention: AtomicBool::new(false),
            sleeps: AtomicBool::new(false),
            exits: AtomicU64::new(0),
            account: Mutex::default(),
        }
    }
}

impl Presence {
    /// It goes in; the guest's generation is to be read after this. `mark`: anything but 0 that is at hand.
    #[inline(always)]
    pub fn enters(&self, mark: u64) {
        self.inside.store(mark, Ordering::SeqCst);
    }

    /// On its way in it has flushed, having read `generation`.
    #[inline]
    pub fn flushes(&self, generation: u64) {
        self.flushed.store(generation, Ordering::Release);
    }

    /// It came out.
    #[inline(always)]
    pub fn came_out(&self) {
        self.inside.store(0, Ordering::Release);
    }

    #[inline]
    fn is_inside(&self) -> bool {
        self.inside.load(Ordering::SeqCst) != 0
    }

    /// Whether it is in its guest with translations older than `generation`.
    #[inline]
    #[must_use]
    pub fn is_behind(&self, generation: u64) -> bool {
        self.is_inside() && self.flushed.load(Ordering::SeqCst) < generation
    }

    /// The core that it is on, or on its way to.
    #[must_use]
    pub fn core(&self) -> usize {
        self.core.load(Ordering::Relaxed) as usize
    }

    /// It will live on `core`.
    pub fn place(&self, core: usize) {
        self.core.store(core as u32, Ordering::Relaxed);
    }

    /// Interrupts it, if it is in its guest.
    pub fn interrupt(&self) {
        if let Some(core) = cores::core(self.core()) {
            cores::kick(core);
        }
    }

    /// It shall look around soon: what was changed before this call it sees. Costs the other core an interrupt only
    /// where it would not look by itself.
    pub fn kick(&self) {
        if self.attention.swap(true, Ordering::SeqCst) {
            return; // asked already, and has not looked yet
        }
        let Some(core) = cores::core(self.core()) else { return };
        let here = core.index() == cores::this_core().index();
        if !here {
            // On its way in it sees the byte, or we see that it is in.
            cores::ask(core);
        }
        let inside = self.is_inside();
        if !inside {
            schedule::wake(core.index());
        }
        if !here && (inside || self.sleeps.load(Ordering::SeqCst)) {
            apic::send_nmi(core.apic_id());
        }
    }

    /// Whether somebody wants it to look around.
    #[inline]
    #[must_use]
    pub fn is_kicked(&self) -> bool {
        self.attention.load(Ordering::SeqCst)
    }

    /// It looks around now: what was changed before a kick that this ends, it sees.
    #[inline]
    pub fn looks(&self) {
        self.attention.store(false, Ordering::SeqCst);
    }

    /// It goes to sleep, unless it was kicked since it looked: then it must look again.
    #[must_use]
    pub fn try_to_sleep(&self) -> bool {
        self.sleeps.store(true, Ordering::SeqCst);
        // A kick before that store is seen here; one after it finds the sleeper.
        let may = !self.is_kicked();
        if !may {
            self.wakes();
        }
        may
    }

    /// It has got its core again.
    #[inline]
    pub fn wakes(&self) {
        self.sleeps.store(false, Ordering::Relaxed);
    }
}
