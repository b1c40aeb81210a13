//! Shrinking one guest's part of the cache.
//!
//! Nothing is lost by it: a shadow page can always be made again from the guest's tables. What counts is the
//! order, cheapest to miss first. Never a loaded root.

use memory::TableMemory;

use crate::host::Host;
use crate::link::{Head, NIL};
use crate::mmu::Mmu;
use crate::pages::PageId;

/// The classes of victims, in the order in which they go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Nothing points to it, and it is no root: only a future link could use it.
    Parentless,
    /// A root that no vCPU runs on; its subtree becomes parentless.
    IdleRoot,
    /// A leaf table that no processor walked through since the last look.
    ColdLeaf,
    /// A leaf table in use.
    HotLeaf,
    /// An upper table in use.
    Upper,
}

impl Mmu {
    /// Removes up to `pages` shadow pages, least valuable first, least recently used first within a class.
    /// Returns how many went. Their frames are free after the flush that the advanced generation asks for.
    pub fn reclaim<H: Host>(&mut self, host: &H, pages: u32) -> u32 {
        let before = self.stats.pages_zapped;
        let gone = |mmu: &Mmu| (mmu.stats.pages_zapped - before) as u32;
        let mut missing = pages;
        for class in [Class::Parentless, Class::IdleRoot, Class::ColdLeaf, Class::HotLeaf, Class::Upper] {
            if missing == 0 {
                break;
            }
            self.sweep(host, class, missing);
            if class == Class::IdleRoot {
                // What hung below the idle roots hangs on nothing now, level by level.
                for _ in 0..4 {
                    let left = pages.saturating_sub(gone(self));
                    if left == 0 || self.sweep(host, Class::Parentless, left) == 0 {
                        break;
                    }
                }
            }
            missing = pages.saturating_sub(gone(self));
        }
        let gone = gone(self);
        self.stats.reclaimed += u64::from(gone);
        self.publish(host);
        gone
    }

    fn sweep<H: Host>(&mut self, host: &H, class: Class, pages: u32) -> u32 {
        let mut gone = 0;
        let mut at = self.pages.oldest();
        while let Some(id) = at {
            if gone == pages {
                break;
            }
            at = self.pages.newer(id);
            if self.belongs(host.tables(), id, class) {
                self.zap(host, id);
                gone += 1;
            }
        }
        gone
    }

    fn belongs<T: TableMemory>(&mut self, tables: &T, id: PageId, class: Class) -> bool {
        let page = &self.pages[id];
        if page.roots > 0 {
            return false;
        }
        let (role, parentless) = (page.role, page.parents == NIL);
        match class {
            Class::Parentless => parentless && !role.is_root(),
            Class::IdleRoot => role.is_root(),
            Class::ColdLeaf => role.level() == 1 && !self.walked_through(tables, id),
            Class::HotLeaf => role.level() == 1,
            Class::Upper => true,
        }
    }

    /// Whether a processor went through any spte that points to `id` since the last look: the hardware sets A
    /// in our own tables, so age costs nothing to keep. The cleared bits count anew only after a flush, which
    /// the end of the reclaim brings.
    fn walked_through<T: TableMemory>(&mut self, tables: &T, id: PageId) -> bool {
        let mut walked = false;
        let mut next = self.heads().first(Head::Parents(id));
        while let Some(parent) = next {
            next = self.heads().next(tables, parent);
            walked |= self.test_and_clear_accessed(tables, parent);
        }
        if walked {
            self.narrowed = true;
        }
        walked
    }
}
