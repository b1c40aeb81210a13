//! The guest's shadow MMU in its surroundings: flushes on other cores, and its part of the cache of all shadow pages.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicU64, Ordering};

use memory::{Event, FrameAllocator, GuestId, Slots};
use shadow::cache::{Cache, Starved, Tenant};
use shadow::{Audited, Host, Mmu, Violation};

use super::{Guest, ram::GuestRam, registry};
use crate::host::{DirectMap, frames};
use crate::schedule::Core;

/// What a guest's MMU sees of the host, on one core.
pub struct Surroundings<'a> {
    guest: &'a Guest,
    core: &'a Core,
}

impl Host for Surroundings<'_> {
    type Guest = GuestRam;
    type Tables = DirectMap;

    #[inline]
    fn guest(&self) -> &GuestRam {
        &self.guest.ram
    }
    #[inline]
    fn tables(&self) -> &DirectMap {
        &DirectMap
    }
    #[inline]
    fn slots(&self) -> &Slots {
        &self.guest.ram.slots
    }
    #[inline]
    fn page_allocated(&self) {
        self.core.writer.shadow_page_allocated();
    }
    #[inline]
    fn pages_freed(&self, pages: u64) {
        self.core.writer.shadow_pages_freed(pages);
    }
    #[inline]
    fn advance_generation(&self) -> u64 {
        self.guest.generation.fetch_add(1, Ordering::SeqCst) + 1
    }
    #[inline]
    fn generation(&self) -> u64 {
        self.guest.generation.load(Ordering::SeqCst)
    }

    /// Asks every vCPU that is in the guest with older translations to come out, all of them first, then waits for
    /// each: it flushes before it goes in again. None can wait for us meanwhile in a way that keeps it in: there it
    /// only runs guest code. vCPUs on this core, this one among them, are outside.
    fn shoot_down(&self) {
        let generation = self.generation();
        let mut asked = false;
        for vcpu in self.guest.vcpus.iter().filter(|vcpu| vcpu.is_behind(generation)) {
            vcpu.interrupt();
            asked = true;
        }
        if !asked {
            return;
        }
        self.core.writer.count(Event::ShootDown);
        for vcpu in &self.guest.vcpus {
            while vcpu.is_behind(generation) {
                core::hint::spin_loop();
            }
        }
    }
}

impl Tenant for Guest {
    fn id(&self) -> GuestId {
        self.id
    }
    fn vcpus(&self) -> u32 {
        self.config.vcpus
    }
    fn held_frames(&self) -> &AtomicU64 {
        &self.shadow_frames
    }
    fn guarantee_frames(&self) -> u64 {
        self.guarantee_frames
    }
}

/// The cache of all guests' shadow pages, as a core uses it.
impl Cache for Core {
    type Tenant = Guest;
    type Handle = Arc<Guest>;
    type Host<'a> = Surroundings<'a>;
    type Tables = DirectMap;

    fn frames(&self) -> &FrameAllocator {
        frames::allocator()
    }
    fn tables(&self) -> &DirectMap {
        &DirectMap
    }
    fn core(&self) -> usize {
        self.index
    }
    fn count(&self, event: Event) {
        self.writer.count(event);
    }
    fn next_guest(&self, without: u64) -> Option<Arc<Guest>> {
        registry::next_guest(without)
    }
    #[cfg(feature = "first-guest")]
    fn first_guest(&self) -> Option<Arc<Guest>> {
        registry::first_guest()
    }
    fn with<R>(&self, guest: &Guest, f: impl FnOnce(&mut Mmu, &Surroundings<'_>) -> R) -> R {
        f(&mut guest.mmu.lock(), &guest.surroundings(self))
    }
}

impl Guest {
    /// The surroundings for a call of the MMU on `core`.
    #[inline]
    pub fn surroundings<'a>(&'a self, core: &'a Core) -> Surroundings<'a> {
        Surroundings { guest: self, core }
    }

    /// Brings in what the next operation of the MMU can need. `below_4g`: its root must lie there (PAE).
    ///
    /// # Errors
    /// [`Starved`]: the guest cannot go on.
    pub fn supply(&self, core: &Core, below_4g: bool) -> Result<(), Starved> {
        Cache::supply(core, self, below_4g)
    }

    /// Checks every invariant of its shadow pages, while its vCPU may run: some milliseconds under the MMU's lock.
    ///
    /// # Errors
    /// The first violation found.
    pub fn audit(&self, core: &Core) -> Result<Audited, Violation> {
        self.mmu.lock().audit_all(&self.surroundings(core))
    }

    /// Removes every shadow page and gives all frames back. The guest's vCPU runs no more.
    pub fn drop_shadow(&self, core: &Core) {
        core.drop_all(self);
    }
}
