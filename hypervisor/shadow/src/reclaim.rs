//! Shrinking one guest's part of the cache.
//!
//! Nothing is lost by it: a shadow page can always be made again from the guest's tables. What counts is the
//! [order], cheapest to miss first. Never a loaded root.

#[cfg(any(test, feature = "model", feature = "first-guest"))]
pub(crate) mod first_guest;
mod ghosts;
pub(crate) mod order;

use memory::TableMemory;

use crate::host::Host;
use crate::link::Head;
use crate::mmu::Mmu;
use crate::pages::{PageId, Shelf};
pub(crate) use ghosts::Ghosts;
pub use order::{Class, Share, next_guest};
use order::{View, next_victim};

/// The pages of an MMU with its tables: the processor's marks are in there.
struct Seen<'a, T> {
    mmu: &'a mut Mmu,
    tables: &'a T,
}

impl<T: TableMemory> View for Seen<'_, T> {
    fn oldest(&self, shelf: Shelf) -> Option<PageId> {
        self.mmu.pages.oldest(shelf)
    }
    fn newer(&self, page: PageId) -> Option<PageId> {
        self.mmu.pages.newer(page)
    }
    fn is_loaded(&self, page: PageId) -> bool {
        self.mmu.pages[page].roots > 0
    }
    /// By the A bits of the sptes that point to it: the hardware sets them in our own tables, so age costs nothing to
    /// keep. A cleared bit counts anew only after a flush, which the end of the reclaim brings. PDPTEs have no A: what
    /// they point to counts as walked through while the root is loaded, and with an idle root it has gone before.
    fn was_walked(&mut self, page: PageId) -> bool {
        let mut walked = false;
        let mut next = self.mmu.heads().first(Head::Parents(page));
        while let Some(parent) = next {
            next = self.mmu.heads().next(self.tables, parent);
            let role = self.mmu.pages[parent.page()].role;
            walked |= role.level() == 3 && role.mode().shadow_is_pae()
                || self.mmu.test_and_clear_accessed(self.tables, parent);
        }
        self.mmu.narrowed |= walked;
        walked
    }
    fn spare(&mut self, page: PageId) {
        self.mmu.pages.touch(page);
        self.mmu.pages[page].spared_in = self.mmu.turn;
    }
    fn is_spared(&self, page: PageId) -> bool {
        self.mmu.pages[page].spared_in == self.mmu.turn
    }
}

impl Mmu {
    /// Removes up to `pages` shadow pages, least valuable first. Returns how many went. Their frames are free after the
    /// flush that the advanced generation asks for.
    pub fn reclaim<H: Host>(&mut self, host: &H, pages: u32) -> u32 {
        self.turn = self.turn.wrapping_add(1);
        let gone = (0..pages).take_while(|_| self.evict_next(host).is_some()).count() as u32;
        self.stats.reclaims += 1;
        self.publish(host);
        gone
    }

    /// Removes the next victim; of which class it was.
    pub(crate) fn evict_next<H: Host>(&mut self, host: &H) -> Option<Class> {
        let (class, id) = next_victim(&mut Seen { mmu: self, tables: host.tables() })?;
        self.evict(host, id);
        Some(class)
    }

    /// Removes a page, to be known if it is soon made again.
    pub(crate) fn evict<H: Host>(&mut self, host: &H, id: PageId) {
        self.ghosts.leave(self.pages[id].gfn, self.pages[id].role);
        self.zap(host, id);
        self.stats.reclaimed += 1;
    }

    /// Removes every shadow page but loaded roots: what they all hold is to be made anew.
    pub(crate) fn empty<H: Host>(&mut self, host: &H) {
        while let Some((_, id)) = next_victim(&mut Seen { mmu: self, tables: host.tables() }) {
            self.zap(host, id);
        }
        self.publish(host);
    }
}
