//! The guest's shadow MMU in its surroundings: frames from the allocator, flushes on other cores, reclaim.

use core::sync::atomic::Ordering;

use memory::{Claim, Event, FrameAllocator, Owner, Pfn, Pressure, Slots};
use shadow::{Audited, FRAMES_PER_OPERATION, Host, PAGES_PER_OPERATION, Violation, pages_min};

use super::{Guest, ram::GuestRam, registry};
use crate::host::{DirectMap, frames};
use crate::schedule::Core;

/// Frames brought into a guest's stash at a time: a few operations' worth, so that most fills take none.
const SUPPLY_FRAMES: usize = 3 * FRAMES_PER_OPERATION;
/// Pages reclaimed with one shoot-down.
const BATCH_PAGES: u32 = 32;

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

    /// Asks every vCPU that is in the guest with older translations to come out, all of them first, then waits for
    /// each: it flushes before it goes in again. None can wait for us meanwhile in a way that keeps it in: there it
    /// only runs guest code. vCPUs on this core, this one among them, are outside.
    fn shoot_down(&self) {
        let generation = self.guest.generation.load(Ordering::SeqCst);
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

/// There is no frame left for this guest, and nothing that could be reclaimed.
#[derive(Clone, Copy, Debug)]
pub struct Starved;

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
        let owner = Owner::Shadow(self.id);
        let allocator = frames::allocator();
        if allocator.pressure() != Pressure::Plenty {
            reclaim(core, allocator);
        }
        {
            let mut mmu = self.mmu.lock();
            let host = self.surroundings(core);
            if mmu.pages_left() < PAGES_PER_OPERATION {
                // The guest's own cap: it gives from its own.
                let batch = BATCH_PAGES.min(mmu.live_pages() / 4).max(PAGES_PER_OPERATION);
                let gone = mmu.reclaim(&host, batch);
                core.writer.count(Event::Reclaim);
                core.writer.add(Event::ReclaimedPage, u64::from(gone));
                if gone == 0 {
                    return Err(Starved);
                }
            }
            if mmu.has_retired() {
                host.shoot_down();
                mmu.release(&host, self.generation.load(Ordering::SeqCst));
            }
        }
        let mut taken = [Pfn(0); SUPPLY_FRAMES];
        loop {
            let missing = {
                let mmu = self.mmu.lock();
                self.shadow_frames.store(mmu.frames(), Ordering::Relaxed);
                if mmu.stash_frames() >= FRAMES_PER_OPERATION {
                    let low = mmu.has_low_frame();
                    drop(mmu);
                    return if below_4g && !low { self.supply_low(core) } else { Ok(()) };
                }
                SUPPLY_FRAMES - mmu.stash_frames()
            };
            let mut count = 0;
            while count < missing {
                let Some(frame) = allocator.alloc(core.index, owner, Claim::Guest) else { break };
                taken[count] = frame;
                count += 1;
            }
            let mut mmu = self.mmu.lock();
            for &frame in &taken[..count] {
                if let Err(frame) = mmu.provide(frame) {
                    give_back(core, frame, owner);
                }
            }
            if mmu.stash_frames() < FRAMES_PER_OPERATION {
                drop(mmu);
                core.writer.count(Event::FramesShort);
                // Another vCPU may have used up what this one brought in, and another core have reclaimed what there was:
                // starved is who gains nothing while there is nothing.
                let gained = reclaim(core, allocator) + count as u64;
                let exhausted = allocator.free_frames() <= allocator.marks().min_frames();
                if gained == 0 && exhausted && self.mmu.lock().stash_frames() < FRAMES_PER_OPERATION {
                    return Err(Starved);
                }
            }
        }
    }

    /// Puts one frame from below 4 GiB into the stash.
    #[cold]
    fn supply_low(&self, core: &Core) -> Result<(), Starved> {
        let owner = Owner::Shadow(self.id);
        let frame = frames::allocator().alloc_below_4g(owner, Claim::Begun).ok_or(Starved)?;
        let mut mmu = self.mmu.lock();
        // A stash that takes no more has others to give for it.
        let mut low = Err(frame);
        while let Err(frame) = low {
            low = mmu.provide(frame);
            if low.is_err()
                && let Some(other) = mmu.take_back()
            {
                give_back(core, other, owner);
            }
        }
        Ok(())
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
        let mut mmu = self.mmu.lock();
        let host = self.surroundings(core);
        mmu.zap_all(&host);
        mmu.release(&host, self.generation.load(Ordering::SeqCst));
        while let Some(frame) = mmu.take_back() {
            give_back(core, frame, Owner::Shadow(self.id));
        }
        self.shadow_frames.store(0, Ordering::Relaxed);
    }
}

/// Returns a frame to the allocator.
///
/// # Panics
/// If it was not this owner's: our own bug.
fn give_back(core: &Core, frame: Pfn, owner: Owner) {
    if let Err(error) = frames::allocator().free(core.index, frame, owner) {
        panic!("{error}");
    }
}

/// Shrinks the cache from the low mark up to the high one: batch by batch, the guest with the largest excess over
/// its guarantee first. Runs on the core that crossed the mark, between operations, without a global stop.
/// Returns how many frames or shadow pages came free.
fn reclaim(core: &Core, allocator: &FrameAllocator) -> u64 {
    let high = allocator.marks().high_frames();
    let mut gained = 0;
    // Those that had nothing to give, by number.
    let mut exhausted = 0_u64;
    while allocator.free_frames() < high {
        let Some(victim) = registry::largest_excess(exhausted) else { break };
        let owner = Owner::Shadow(victim.id);
        let mut mmu = victim.mmu.lock();
        let host = victim.surroundings(core);
        let above = mmu.live_pages().saturating_sub(pages_min(victim.config.vcpus));
        let gone = mmu.reclaim(&host, BATCH_PAGES.min(above));
        host.shoot_down();
        mmu.release(&host, victim.generation.load(Ordering::SeqCst));
        let mut returned = 0;
        while mmu.stash_frames() > SUPPLY_FRAMES
            && let Some(frame) = mmu.take_back()
        {
            give_back(core, frame, owner);
            returned += 1;
        }
        victim.shadow_frames.store(mmu.frames(), Ordering::Relaxed);
        drop(mmu);
        core.writer.count(Event::Reclaim);
        core.writer.add(Event::ReclaimedPage, u64::from(gone));
        gained += returned.max(gone.into());
        if gone == 0 && returned == 0 {
            // Its excess is what it needs to go on.
            exhausted |= 1 << (victim.id.index() % 64);
        }
    }
    gained
}
