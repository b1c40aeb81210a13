//! The shadow pages of all guests as one cache of the machine's frames: how an MMU comes to frames, and where they come
//! from when there are few.
//!
//! | when | what |
//! | --- | --- |
//! | an operation of a guest's MMU is to begin | [`Cache::supply`] brings its stash to what the operation can need |
//! | the guest is at its own cap | it reclaims from itself |
//! | free frames at or below the `low` mark | [`Cache::shrink`]: up to `high`, in batches, from whoever has most |
//! | free frames at or below `min` | guests get none; work begun is served |
//!
//! All of it runs on the core that asked, between operations: no core waits but for a batch's shoot-down.

use core::ops::Deref;
use core::sync::atomic::{AtomicU64, Ordering};

use memory::{Claim, Event, FrameAllocator, GuestId, Owner, Pfn, Pressure, TableMemory};

use crate::host::Host;
use crate::mmu::{FRAMES_PER_OPERATION, Mmu, PAGES_MIN, PAGES_PER_OPERATION, STASH_MAX, pages_min};
use crate::reclaim::Share;

/// Frames brought into a guest's stash at a time: a few operations' worth, so that most fills take none.
pub const SUPPLY_FRAMES: usize = 3 * FRAMES_PER_OPERATION;
/// Frames for each virtual processor of a guest beyond what the guest may keep: those that are ready for its next operations,
/// or on the way there.
pub const FRAMES_BEYOND_KEPT: u64 = STASH_MAX as u64;
/// The smallest budget for each virtual processor, in frames: with less a guest can starve between others.
pub const BUDGET_FRAMES_PER_VCPU: u64 = (2 * PAGES_MIN as u64 + FRAMES_BEYOND_KEPT).next_multiple_of(16);
/// Pages reclaimed with one shoot-down.
pub const BATCH_PAGES: u32 = 32;

/// Rounds of reclaim that find nothing, with nothing free between, until a guest counts as starved.
const BARREN_ROUNDS_MAX: u32 = 4;

/// A guest, as far as its part of the cache goes.
pub trait Tenant {
    /// Its number.
    fn id(&self) -> GuestId;
    /// Its virtual processors.
    fn vcpus(&self) -> u32;
    /// Frames that its MMU holds, as last seen under its lock: what guests are compared by.
    fn held_frames(&self) -> &AtomicU64;
    /// Frames that reclaim for others leaves to it.
    fn guarantee_frames(&self) -> u64;

    /// Frames that no reclaim takes from it: what it may keep, and a stash.
    fn unreclaimable_frames(&self) -> u64 {
        self.share().kept_frames + SUPPLY_FRAMES as u64
    }

    /// Its part of the cache. It may keep its guarantee, and what it needs to go on: two frames for each page.
    fn share(&self) -> Share {
        Share {
            held_frames: self.held_frames().load(Ordering::Relaxed),
            kept_frames: self.guarantee_frames().max(2 * u64::from(pages_min(self.vcpus()))),
        }
    }
}

/// The machine as the cache sees it from one core.
pub trait Cache {
    /// A guest.
    type Tenant: Tenant;
    /// What keeps a guest from going away meanwhile.
    type Handle: Deref<Target = Self::Tenant>;
    /// A guest's surroundings.
    type Host<'a>: Host;
    /// What the frames hold.
    type Tables: TableMemory;

    /// The machine's frames.
    fn frames(&self) -> &FrameAllocator;
    /// What they hold: in debug builds a free frame is poisoned.
    fn tables(&self) -> &Self::Tables;
    /// The number of this core.
    fn core(&self) -> usize;
    /// This core counts an event.
    fn count(&self, event: Event);
    /// Of the running guests but those in the set `without` (a bit for each number, modulo 64), the one that
    /// [`next_guest`](crate::next_guest) chooses.
    fn next_guest(&self, without: u64) -> Option<Self::Handle>;
    /// The guest that is first on the list, which then goes to its end: for the comparison with KVM's order.
    #[cfg(any(test, feature = "model", feature = "first-guest"))]
    fn first_guest(&self) -> Option<Self::Handle> {
        None
    }
    /// Calls `f` with the guest's MMU locked.
    fn with<R>(&self, tenant: &Self::Tenant, f: impl FnOnce(&mut Mmu, &Self::Host<'_>) -> R) -> R;

    /// Brings in what the next operation of the guest's MMU can need. `below_4g`: its root must lie there (PAE).
    ///
    /// # Errors
    /// [`Starved`]: the guest cannot go on.
    fn supply(&self, tenant: &Self::Tenant, below_4g: bool) -> Result<(), Starved> {
        let owner = Owner::Shadow(tenant.id());
        if self.frames().pressure() != Pressure::Plenty {
            self.shrink();
        }
        self.with(tenant, |mmu, host| {
            let room = make_room(mmu, host);
            trim(self, mmu, owner);
            room
        })?;
        let mut taken = [Pfn(0); SUPPLY_FRAMES];
        let mut barren_rounds = 0;
        loop {
            let (stash, low) = self.with(tenant, |mmu, _| {
                tenant.held_frames().store(mmu.frames(), Ordering::Relaxed);
                (mmu.stash_frames(), mmu.has_low_frame())
            });
            if stash >= FRAMES_PER_OPERATION {
                return if below_4g && !low { supply_low(self, tenant) } else { Ok(()) };
            }
            let mut count = 0;
            while count < SUPPLY_FRAMES - stash {
                let frame = self.frames().alloc_checked(self.tables(), self.core(), owner, Claim::Guest);
                let Some(frame) = frame else { break };
                taken[count] = frame;
                count += 1;
            }
            let stash = self.with(tenant, |mmu, _| {
                for &frame in &taken[..count] {
                    if let Err(frame) = mmu.provide(frame) {
                        give_back(self, frame, owner);
                    }
                }
                mmu.stash_frames()
            });
            if stash < FRAMES_PER_OPERATION {
                self.count(Event::FramesShort);
                // Another vCPU may have used up what this one brought in, and other cores have reclaimed what there was, or
                // have it in their hands: starved is who gains nothing, again and again, while there is nothing.
                let gained = self.shrink() + count as u64;
                let exhausted = self.frames().pressure() == Pressure::Min;
                barren_rounds = if gained == 0 && exhausted { barren_rounds + 1 } else { 0 };
                if barren_rounds == BARREN_ROUNDS_MAX
                    && self.with(tenant, |mmu, _| mmu.stash_frames()) < FRAMES_PER_OPERATION
                {
                    return Err(Starved);
                }
            }
        }
    }

    /// Shrinks the cache from the low mark up to the high one. Returns how many frames or shadow pages came free.
    fn shrink(&self) -> u64 {
        #[cfg(feature = "first-guest")]
        return crate::reclaim::first_guest::shrink(self);
        #[cfg(not(feature = "first-guest"))]
        shrink(self)
    }

    /// Takes a batch of pages from `victim`, but none that it may keep, and what its stash has beyond a few operations'
    /// worth. Returns how many pages went, and how many frames the allocator has of it.
    fn take_batch(&self, victim: &Self::Tenant) -> (u32, u64) {
        self.with(victim, |mmu, host| {
            let kept_pages = victim.share().kept_frames.div_ceil(2) as u32;
            let above = mmu.live_pages().saturating_sub(kept_pages);
            let gone = if above > 0 { mmu.reclaim(host, BATCH_PAGES.min(above)) } else { 0 };
            (gone, give_excess_back(self, victim, mmu, host))
        })
    }

    /// Removes every shadow page of the guest, which runs no more, and gives all frames back.
    fn drop_all(&self, tenant: &Self::Tenant) {
        self.with(tenant, |mmu, host| {
            mmu.zap_all(host);
            mmu.release(host, host.generation());
            while let Some(frame) = mmu.take_back() {
                give_back(self, frame, Owner::Shadow(tenant.id()));
            }
        });
        tenant.held_frames().store(0, Ordering::Relaxed);
    }
}

/// There is no frame left for this guest, and nothing that could be reclaimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Starved;

/// Batch by batch, from the guest with the largest excess over what it may keep, until the `high` mark is reached or
/// nobody has any left.
#[cfg_attr(feature = "first-guest", allow(dead_code, reason = "the other order is compared"))]
pub(crate) fn shrink<C: Cache + ?Sized>(cache: &C) -> u64 {
    let mut gained = 0;
    // Those that had nothing to give, by number.
    let mut exhausted = 0_u64;
    while cache.frames().shortfall_frames() > 0
        && let Some(more) = take_from_largest(cache, &mut exhausted)
    {
        gained += more;
    }
    gained
}

/// One batch, from whoever has most beyond what it may keep: how many frames or shadow pages came free, `None` if nobody has
/// any to give. `exhausted`: those that were found to have none, by number.
fn take_from_largest<C: Cache + ?Sized>(cache: &C, exhausted: &mut u64) -> Option<u64> {
    loop {
        let victim = cache.next_guest(*exhausted)?;
        match cache.take_batch(&victim) {
            // Its excess is what it needs to go on.
            (0, 0) => *exhausted |= 1 << (victim.id().index() % 64),
            (gone, returned) => return Some(returned.max(gone.into())),
        }
    }
}

/// A guest at its own cap gives from its own; and what waits for a flush gets it.
fn make_room<H: Host>(mmu: &mut Mmu, host: &H) -> Result<(), Starved> {
    if mmu.pages_left() < PAGES_PER_OPERATION {
        let batch = BATCH_PAGES.min(mmu.live_pages() / 4).max(PAGES_PER_OPERATION);
        if mmu.reclaim(host, batch) == 0 {
            return Err(Starved);
        }
    }
    release(mmu, host);
    Ok(())
}

/// What a reclaim has freed goes back to the allocator, but for a few operations' worth; how many frames it was.
pub(crate) fn give_excess_back<C: Cache + ?Sized>(
    cache: &C,
    victim: &C::Tenant,
    mmu: &mut Mmu,
    host: &C::Host<'_>,
) -> u64 {
    release(mmu, host);
    let returned = trim(cache, mmu, Owner::Shadow(victim.id()));
    victim.held_frames().store(mmu.frames(), Ordering::Relaxed);
    returned
}

/// What the stash has beyond a few operations' worth goes back to the allocator; how many frames it was.
fn trim<C: Cache + ?Sized>(cache: &C, mmu: &mut Mmu, owner: Owner) -> u64 {
    let mut returned = 0;
    while mmu.stash_frames() > SUPPLY_FRAMES
        && let Some(frame) = mmu.take_back()
    {
        give_back(cache, frame, owner);
        returned += 1;
    }
    returned
}

/// One shoot-down makes the frames of all zapped tables free.
fn release<H: Host>(mmu: &mut Mmu, host: &H) {
    if mmu.has_retired() {
        host.shoot_down();
        mmu.release(host, host.generation());
    }
}

/// Puts one frame from below 4 GiB into the stash.
#[cold]
fn supply_low<C: Cache + ?Sized>(cache: &C, tenant: &C::Tenant) -> Result<(), Starved> {
    let owner = Owner::Shadow(tenant.id());
    let claim = |claim| cache.frames().alloc_below_4g(tenant.id(), claim);
    let mut exhausted = 0;
    // There may be many free frames, and none of these: reclaim goes on until one comes, whatever the marks say. When
    // nobody has anything to give, the next one is worth more than the mark.
    let frame = loop {
        if let Some(frame) = claim(Claim::Guest) {
            break frame;
        }
        if take_from_largest(cache, &mut exhausted).is_none() {
            break claim(Claim::Begun).ok_or(Starved)?;
        }
    };
    cache.with(tenant, |mmu, _| {
        // A stash that takes no more has others to give for it.
        let mut low = Err(frame);
        while let Err(frame) = low {
            low = mmu.provide(frame);
            if low.is_err()
                && let Some(other) = mmu.take_back()
            {
                give_back(cache, other, owner);
            }
        }
        tenant.held_frames().store(mmu.frames(), Ordering::Relaxed);
    });
    Ok(())
}

/// Returns a frame to the allocator.
///
/// # Panics
/// If it was not this owner's: our own bug.
fn give_back<C: Cache + ?Sized>(cache: &C, frame: Pfn, owner: Owner) {
    if let Err(error) = cache.frames().free_poisoned(cache.tables(), cache.core(), frame, owner) {
        panic!("{error}");
    }
}
