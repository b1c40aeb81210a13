//! Bringing shadow pages up to date with the guest's tables: at flushes, and for one address at INVLPG.
//!
//! Tables of every level may fall behind. A fill always follows the guest's tables as they now are, from the
//! root down, so a stale upper entry leads to nothing new; what it still leads to are translations that a
//! processor could have cached, which the architecture lets it keep until the flush.

use memory::{Gva, TableMemory};

use crate::defect::{Defect, has};
use crate::fill::shadow_index;
use crate::host::Host;
use crate::link::NIL;
use crate::mmu::{Mmu, Unsync};
use crate::pages::PageId;
use crate::paging::{Rights, bits};
use crate::role::Role;
use crate::root::VcpuMmu;
use crate::spte::{self, Spte};
use crate::walk;

/// Unsync pages of other roots that are left as they are at a change of root.
const UNSYNC_KEPT: usize = 32;

/// What a root has to do with an unsync page.
enum Reach {
    /// It may lead there.
    Yes,
    /// It does not.
    No,
    /// Nothing leads there.
    Orphan,
}

impl Mmu {
    /// The vCPU flushed the translations of all its PCIDs (INVPCID of types 2 and 3): nothing that its root leads
    /// to may be behind any more, nor what its other roots lead to when it loads them again.
    pub fn flush<H: Host>(&mut self, host: &H, cpu: &mut VcpuMmu) {
        cpu.forget_all(self.tick());
        self.flush_root(host, cpu);
    }

    /// The vCPU flushed the translations of `pcid` but for global ones (INVPCID of type 1).
    pub fn flush_pcid<H: Host>(&mut self, host: &H, cpu: &mut VcpuMmu, pcid: u16) {
        cpu.forget_pcid(pcid);
        if cpu.paging.pcid.unwrap_or(0) == pcid {
            self.flush_root(host, cpu);
        }
    }

    /// The vCPU flushed the translation of `gva` in `pcid` unless it is a global one (INVPCID of type 0).
    pub fn flush_address<H: Host>(&mut self, host: &H, cpu: &mut VcpuMmu, pcid: u16, gva: Gva) {
        cpu.forget_pcid(pcid);
        if cpu.paging.pcid.unwrap_or(0) == pcid {
            self.flush_address_here(host, cpu, gva);
        }
    }

    /// The vCPU flushed the translation of `gva` in the present PCID, and in all if it is a global one (INVLPG).
    pub fn invlpg<H: Host>(&mut self, host: &H, cpu: &mut VcpuMmu, gva: Gva) {
        // No spte tells whether its guest entry was a global one. That no page is behind now would be no excuse: a
        // page of another root can fall behind before that root comes back, and show what was flushed here.
        cpu.forget_all(self.tick());
        self.flush_address_here(host, cpu, gva);
    }

    fn flush_root<H: Host>(&mut self, host: &H, cpu: &VcpuMmu) {
        if let Some(root) = cpu.root {
            self.sync_from(host, root);
            self.publish(host);
        }
    }

    /// Brings the upper tables below the present root up to date, then the leaf entry of `gva`.
    fn flush_address_here<H: Host>(&mut self, host: &H, cpu: &VcpuMmu, gva: Gva) {
        let Some(page) = cpu.root else { return };
        if self.unsync.is_empty() {
            return; // every shadow page says what the guest's tables say
        }
        self.stats.invlpgs_looked += 1;
        if self.unsync_upper > 0 && !has(Defect::InvlpgLeafOnly) {
            self.sync_upper(host, page);
        }
        // The upper tables are in sync now: the sptes lead to the leaf table that the guest's entries lead to.
        let mut table = self.pages[page].table;
        let mut level = self.pages[page].role.level();
        while level > 1 {
            let Spte::Table(next) = spte::decode(level, host.tables().load(table, shadow_index(level, gva)))
            else {
                break;
            };
            table = next;
            level -= 1;
        }
        if level == 1
            && let Some(leaf) =
                self.unsync.iter().map(|behind| behind.page).find(|&id| self.pages[id].table == table)
        {
            self.reconcile_one(host, leaf, shadow_index(1, gva));
            self.note_addition(leaf);
        }
        self.publish(host);
    }

    /// Syncs every unsync upper table that `root` may lead to: INVLPG empties the paging-structure caches whatever
    /// its address, and drops all of a large page (SDM Vol. 3, "Operations that Invalidate TLBs and
    /// Paging-Structure Caches").
    fn sync_upper<H: Host>(&mut self, host: &H, root: PageId) {
        let mut at = self.unsync.len();
        while at > 0 {
            at -= 1;
            let Some(&Unsync { page: id, .. }) = self.unsync.get(at) else { continue };
            if self.pages[id].role.level() > 1 && matches!(self.reach(host, id, root), Reach::Yes) {
                self.shut(host, id);
            }
        }
        self.sync_due(host);
    }

    /// Syncs every unsync page that `root`, a root or any other page, may lead to.
    pub(crate) fn sync_from<H: Host>(&mut self, host: &H, root: PageId) {
        self.sync_since(host, root, 0);
    }

    /// The same for those that fell behind, or got an spte, after `kept` on the MMU's clock.
    pub(crate) fn sync_since<H: Host>(&mut self, host: &H, root: PageId, kept: u64) {
        let mut at = self.unsync.len();
        while at > 0 {
            at -= 1;
            let Some(&Unsync { page: id, added }) = self.unsync.get(at) else { continue };
            if added <= kept {
                continue;
            }
            match self.reach(host, id, root) {
                Reach::Yes => self.shut(host, id),
                Reach::Orphan => self.zap(host, id),
                // Too many that wait for their own root would make every change of root look at all of them.
                Reach::No if self.unsync.len() > UNSYNC_KEPT => self.shut(host, id),
                Reach::No => {}
            }
        }
        self.sync_due(host);
    }

    /// Follows the parents of `id` upwards. Where there is more than one, the answer is yes: syncing what need
    /// not be is allowed, and telling exactly would cost more.
    fn reach<H: Host>(&mut self, host: &H, id: PageId, root: PageId) -> Reach {
        let mut at = id;
        loop {
            if at == root {
                return Reach::Yes;
            }
            let page = &self.pages[at];
            if page.parents == NIL {
                let orphan = at == id && page.roots == 0 && !page.role.is_root();
                return if orphan { Reach::Orphan } else { Reach::No };
            }
            let parent = crate::pages::SpteId(page.parents);
            if self.heads().next(host.tables(), parent).is_some() {
                return Reach::Yes;
            }
            at = parent.page();
        }
    }

    /// Begins the sync of a shadow page: the guest's writes are shut out before anything is looked at, so that no write
    /// falls between the look at an entry and the end (H3), and before another page's sync could grant them anew (H5).
    fn shut<H: Host>(&mut self, host: &H, id: PageId) {
        self.forget_unsync(id);
        if let Some(guest_page) = host.slots().index(self.pages[id].gfn) {
            self.protect(host, guest_page);
        }
        self.due.push(id);
    }

    /// Brings the pages that are due up to date.
    #[inline]
    fn sync_due<H: Host>(&mut self, host: &H) {
        if !self.due.is_empty() {
            self.sync_all_due(host);
        }
    }

    #[inline(never)]
    fn sync_all_due<H: Host>(&mut self, host: &H) {
        self.shut_out(host);
        while let Some(id) = self.due.pop() {
            if Self::is_leaf_table(self.pages[id].role) {
                self.reconcile_leaves(host, id);
            } else {
                for word in 0..8 {
                    let mut present = self.pages[id].present[word];
                    while present != 0 {
                        let index = word << 6 | present.trailing_zeros() as usize;
                        present &= present - 1;
                        self.reconcile(host, id, index);
                    }
                }
            }
            self.stats.syncs += 1;
            if has(Defect::NoFlushAfterSync) {
                self.narrowed = false;
            }
            if host.slots().index(self.pages[id].gfn).is_some_and(|index| self.has_two_formats(index)) {
                self.mark_unsync(id);
            }
        }
    }

    pub(crate) fn forget_unsync(&mut self, id: PageId) {
        let at = core::mem::replace(&mut self.pages[id].unsync, NIL);
        if at != NIL {
            self.unsync_upper -= u32::from(self.pages[id].role.level() > 1);
            self.unsync.swap_remove(at as usize);
            if let Some(moved) = self.unsync.get(at as usize) {
                self.pages[moved.page].unsync = at;
            }
        }
    }

    /// An spte of `id` was made or changed: if the page is behind, no root that was left before may show it.
    #[inline]
    pub(crate) fn note_addition(&mut self, id: PageId) {
        if let Some(behind) = self.unsync.get_mut(self.pages[id].unsync as usize) {
            behind.added = self.clock;
            self.additions += 1;
        }
    }

    /// Makes a non-empty spte above level 1 say what the guest's entry behind it now says, or empties it.
    fn reconcile<H: Host>(&mut self, host: &H, id: PageId, index: usize) {
        let page = &self.pages[id];
        let (role, gfn, table) = (page.role, page.gfn, page.table);
        if !Self::has_entry(role) {
            return;
        }
        let level = role.level();
        let old = spte::decode(level, host.tables().load(table, index));
        if old == Spte::Empty {
            return;
        }
        let paging = self.paging_of(role);
        let gpte = walk::load_entry(&paging, host.guest(), gfn, Self::guest_index(role, index));
        // An entry with A clear is one that no processor may have cached.
        if gpte & (bits::P | bits::A) != bits::P | bits::A || gpte & paging.reserved(level, gpte) != 0 {
            self.clear(host, id, index);
            return;
        }
        if let Spte::Table(child_table) = old {
            let (child_gfn, child_role) = self.child_of(id, index, gpte);
            let child = self.find(host, child_gfn, child_role);
            if child.is_none_or(|child| self.pages[child].table != child_table) {
                self.clear(host, id, index);
            }
            return;
        }
        match self.large_leaf(host, role, index, gpte) {
            Some((guest_page, new)) => self.set_leaf(host, id, index, guest_page, new),
            None => self.clear(host, id, index),
        }
    }

    /// The large spte that the guest's entry `gpte` permits, and the page it begins with.
    fn large_leaf<H: Host>(&self, host: &H, role: Role, index: usize, gpte: u64) -> Option<(usize, u64)> {
        if role.level() > 2 || !self.paging_of(role).is_leaf(2, gpte) {
            return None;
        }
        let target = self.leaf_base(role, index, gpte);
        let guest_page = host.slots().index(target)?;
        let mut rights = role.rights().and(Rights::of_entry(gpte));
        if gpte & bits::D == 0 {
            rights = rights.without(Rights::WRITE);
        }
        if self.config.split_executable {
            rights = rights.without(Rights::EXECUTE);
        }
        let tracked = self.guest_blocks[guest_page / memory::BLOCK_PAGES as usize].tracked > 0;
        if tracked && rights.has(Rights::WRITE) {
            return None;
        }
        Some((guest_page, spte::leaf(host.slots().block(target)?, 2, rights)))
    }
}
