//! What KVM did until 2024, for comparison: of the first guest on the list, which then goes to its end, the pages that were
//! made first and are no loaded roots (`mmu_shrink_scan` of Linux 6.1). As many with one flush as ours, so that only
//! the orders differ. Nothing of it is in a product build.

use crate::cache::{BATCH_PAGES, Cache, give_excess_back};
use crate::host::Host;
use crate::mmu::Mmu;

/// Guests in a row that had nothing to give until nobody has.
const TRIES_MAX: u32 = 64;

/// Frees pages until the `high` mark is reached or nobody has any left; how many it were.
pub(crate) fn shrink<C: Cache + ?Sized>(cache: &C) -> u64 {
    let mut gained = 0;
    let mut tries = 0;
    while cache.frames().shortfall_frames() > 0 && tries < TRIES_MAX {
        tries += 1;
        let Some(guest) = cache.first_guest() else { break };
        let gone = cache.with(&guest, |mmu, host| {
            let gone = mmu.zap_first_made(host, BATCH_PAGES);
            give_excess_back(cache, &guest, mmu, host);
            gone
        });
        if gone > 0 {
            gained += u64::from(gone);
            tries = 0;
        }
    }
    gained
}

impl Mmu {
    /// Removes up to `pages` pages, those made first of all that are no loaded roots, but none that the guest needs; how many.
    fn zap_first_made<H: Host>(&mut self, host: &H, pages: u32) -> u32 {
        let mut gone = 0;
        while gone < pages && self.live_pages() > crate::pages_min(self.config.vcpus) {
            let live = core::iter::successors(self.pages.first(), |&id| self.pages.after(id));
            let idle = live.filter(|&id| self.pages[id].roots == 0);
            let Some(oldest) = idle.min_by_key(|&id| self.pages[id].serial) else { break };
            self.evict(host, oldest);
            gone += 1;
        }
        if gone > 0 {
            self.stats.reclaims += 1;
            self.publish(host);
        }
        gone
    }
}
