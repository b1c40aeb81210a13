//! Removing shadow pages.

use memory::TableMemory;

use crate::defect::{Defect, has};
use crate::host::Host;
use crate::link::{Head, NIL};
use crate::mmu::{Mmu, stray_chain};
use crate::pages::PageId;

impl Mmu {
    /// Removes a shadow page: everything that points to it, and all that it holds. Its table's frame waits for
    /// the next flush; the frame of its links, which no processor ever sees, is free at once. Never a page
    /// that a vCPU runs on as its root.
    pub(crate) fn zap<H: Host>(&mut self, host: &H, id: PageId) {
        debug_assert_eq!(self.pages[id].roots, 0, "a loaded root is never zapped");
        while let Some(parent) = self.heads().first(Head::Parents(id)) {
            self.clear(host, parent.page(), parent.index());
        }
        for word in 0..8 {
            let mut present = self.pages[id].present[word];
            while present != 0 {
                let index = word << 6 | present.trailing_zeros() as usize;
                present &= present - 1;
                self.clear(host, id, index);
            }
        }
        self.forget_unsync(id);
        self.unchain(host, id);
        let page = &self.pages[id];
        if has(Defect::FreedBeforeFlush) {
            self.stash.push(page.table);
            host.pages_freed(1);
        } else {
            self.retired.push(page.table);
        }
        self.stash.push(page.links);
        self.pages.release(id);
        self.narrowed = true;
        self.stats.pages_zapped += 1;
    }

    fn unchain<H: Host>(&mut self, host: &H, id: PageId) {
        let (gfn, after, tracked) = {
            let page = &self.pages[id];
            (page.gfn, page.chain, page.is_tracked())
        };
        let index = host.slots().index(gfn);
        let mut at = match index {
            Some(index) => self.guest_pages[index].shadows,
            None => self.strays[stray_chain(gfn)],
        };
        if at == id.0 {
            match index {
                Some(index) => self.guest_pages[index].shadows = after,
                None => self.strays[stray_chain(gfn)] = after,
            }
        } else {
            while at != NIL && self.pages[PageId(at)].chain != id.0 {
                at = self.pages[PageId(at)].chain;
            }
            debug_assert_ne!(at, NIL, "a live page is on its gfn's chain");
            if at != NIL {
                self.pages[PageId(at)].chain = after;
            }
        }
        if let (Some(index), true) = (index, tracked) {
            self.guest_blocks[index / memory::BLOCK_PAGES as usize].tracked -= 1;
        }
    }

    /// Removes every shadow page: the guest has stopped, and no vCPU of it will be entered again. The frames
    /// become free as always, through [`Mmu::release`].
    pub fn zap_all<H: Host>(&mut self, host: &H) {
        while let Some(id) = self.pages.first() {
            self.pages[id].roots = 0;
            self.zap(host, id);
        }
        self.publish(host);
    }

    /// Whether the spte's A bit at `(page, index)` was set; clears it.
    pub(crate) fn test_and_clear_accessed<T: TableMemory>(
        &mut self,
        tables: &T,
        id: crate::pages::SpteId,
    ) -> bool {
        let table = self.pages[id.page()].table;
        let raw = tables.load(table, id.index());
        let accessed = raw & crate::paging::bits::A != 0;
        if accessed {
            tables.store(table, id.index(), raw & !crate::paging::bits::A);
        }
        accessed
    }
}
