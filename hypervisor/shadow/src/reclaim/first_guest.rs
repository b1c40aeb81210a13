//! What KVM did until 2024, for comparison: of the first guest on the list, which then goes to its end, the page that was
//! made first and is no loaded root; one at a time, each with a flush of its own (`mmu_shrink_scan` of Linux 6.1).
//! Nothing of it is in a product build.

use crate::cache::{Cache, give_excess_back};
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
            let gone = mmu.zap_first_made(host);
            give_excess_back(cache, &guest, mmu, host);
            gone
        });
        if gone {
            gained += 1;
            tries = 0;
        }
    }
    gained
}

impl Mmu {
    /// Removes the page that was made first of those that are no loaded root, if the guest has more than it needs.
    fn zap_first_made<H: Host>(&mut self, host: &H) -> bool {
        if self.live_pages() <= crate::pages_min(self.config.vcpus) {
            return false;
        }
        let live = core::iter::successors(self.pages.first(), |&id| self.pages.after(id));
        let oldest = live.filter(|&id| self.pages[id].roots == 0).min_by_key(|&id| self.pages[id].serial);
        let Some(id) = oldest else { return false };
        self.evict(host, id);
        self.stats.reclaims += 1;
        self.publish(host);
        true
    }
}
