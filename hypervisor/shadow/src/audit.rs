//! The invariants, checked over everything: tests call it after every step, a debug build can call it live.

use alloc::vec;

use memory::{BLOCK_PAGES, Pfn, TableMemory};

use crate::host::Host;
use crate::link::{Head, NIL};
use crate::mmu::Mmu;
use crate::pages::{PageId, SpteId};
use crate::paging::{Rights, bits};
use crate::spte::{self, Spte};
use crate::walk;

/// A broken invariant, with its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation {
    /// What should have held.
    pub invariant: &'static str,
    /// The shadow page's number in its guest's arena.
    pub page: u32,
    /// The spte's index.
    pub index: usize,
    /// The spte.
    pub spte: u64,
}

impl Mmu {
    /// Checks every invariant of the shadow structures. Costs some ten instructions for each spte.
    ///
    /// # Errors
    /// The first violation found.
    pub fn audit<H: Host>(&mut self, host: &H) -> Result<(), Violation> {
        let mut leaves = 0_usize;
        let mut tracked = vec![0_u32; self.guest_blocks.len()];
        for number in 0..self.pages.capacity() {
            let id = PageId(number);
            if !self.pages[id].live {
                continue;
            }
            let page = self.pages[id].clone();
            let level = page.role.level();
            if page.is_tracked()
                && let Some(index) = host.slots().index(page.gfn)
            {
                tracked[index / BLOCK_PAGES as usize] += 1;
            }
            for index in 0..512 {
                let raw = host.tables().load(page.table, index);
                let no = |invariant| Err(Violation { invariant, page: number, index, spte: raw });
                let present = page.present[index >> 6] >> (index & 63) & 1 != 0;
                let entry = spte::decode(level, raw);
                if present == (entry == Spte::Empty) {
                    return no("the present map tells which sptes are not empty");
                }
                match entry {
                    Spte::Empty => {}
                    Spte::Mmio if level == 1 => {}
                    Spte::Mmio => return no("MMIO marks stand at level 1"),
                    Spte::Device(pfn) if level == 1 && self.device.is_some_and(|(_, page)| page == pfn) => {}
                    Spte::Device(_) => return no("only the page that stands for a device is mapped as one"),
                    Spte::Table(table) => {
                        let child = self.parent_of(host, id, index);
                        match child {
                            Some(child) if self.pages[child].live && self.pages[child].table == table => {
                                let down = self.pages[child].role;
                                if down.level() != level - 1 || !page.role.rights().has(down.rights()) {
                                    return no("a child is one level down and has no more rights");
                                }
                            }
                            _ => return no("a pointer is on the parent list of the page it points to"),
                        }
                        self.audit_pointer(host, id, index, raw, child)?;
                    }
                    Spte::Leaf(pfn) => {
                        leaves += 1;
                        self.audit_leaf(host, id, index, raw, pfn)?;
                    }
                }
            }
        }
        let no = |invariant| Err(Violation { invariant, page: NIL, index: 0, spte: 0 });
        if tracked.iter().zip(&self.guest_blocks).any(|(&n, block)| n != block.tracked) {
            return no("each block counts the tables shadowed in it");
        }
        let mut listed = 0;
        let heads = (0..self.guest_pages.len() as u32)
            .map(Head::Page)
            .chain((0..self.guest_blocks.len() as u32).map(Head::Block));
        for head in heads {
            let mut next = self.heads().first(head);
            while let Some(id) = next {
                listed += 1;
                if listed > leaves {
                    return no("the reverse map lists each leaf once");
                }
                next = self.heads().next(host.tables(), id);
            }
        }
        if listed != leaves {
            return no("the reverse map lists each leaf once");
        }
        Ok(())
    }

    /// In a table in sync, the guest's entry must justify the pointer, D aside.
    fn audit_pointer<H: Host>(
        &mut self,
        host: &H,
        id: PageId,
        index: usize,
        raw: u64,
        child: Option<PageId>,
    ) -> Result<(), Violation> {
        let role = self.pages[id].role;
        if !Self::has_entry(role) || self.pages[id].is_unsync() {
            return Ok(());
        }
        let paging = self.paging_of(role);
        let gpte =
            walk::load_entry(&paging, host.guest(), self.pages[id].gfn, Self::guest_index(role, index));
        let justified = [gpte, gpte | bits::D, gpte & !bits::D].iter().any(|&gpte| {
            let (gfn, role) = self.child_of(id, index, gpte);
            child.is_some_and(|child| self.pages[child].gfn == gfn && self.pages[child].role == role)
        });
        if gpte & bits::P == 0 || !justified {
            return Err(Violation {
                invariant: "a pointer in sync is what the guest's entry says",
                page: id.0,
                index,
                spte: raw,
            });
        }
        Ok(())
    }

    /// Walks the list that the pointer `(id, index)` is on back to the page whose parent it is.
    fn parent_of<H: Host>(&mut self, host: &H, id: PageId, index: usize) -> Option<PageId> {
        let mut at = SpteId::new(id, index);
        for _ in 0..=self.pages.live() * 512 {
            let previous = (host.tables().load(self.pages[at.page()].links, at.index()) >> 32) as u32;
            if previous >> 31 != 0 {
                return Some(PageId(previous & 0x7fff_ffff));
            }
            at = SpteId(previous);
        }
        None
    }

    fn audit_leaf<H: Host>(
        &mut self,
        host: &H,
        id: PageId,
        index: usize,
        raw: u64,
        pfn: Pfn,
    ) -> Result<(), Violation> {
        let no = |invariant| Err(Violation { invariant, page: id.0, index, spte: raw });
        let role = self.pages[id].role;
        let level = role.level();
        // The list that it is on names the guest page.
        let mut at = SpteId::new(id, index);
        let guest_page = loop {
            let previous = (host.tables().load(self.pages[at.page()].links, at.index()) >> 32) as u32;
            if previous >> 31 != 0 {
                break (previous & 0x7fff_ffff) as usize * if level == 1 { 1 } else { BLOCK_PAGES as usize };
            }
            at = SpteId(previous);
        };
        let Some(gfn) = host.slots().gfn_at(guest_page) else {
            return no("the reverse map names guest pages");
        };
        let own = if level == 1 { host.slots().pfn(gfn) } else { host.slots().block(gfn) };
        if own != Some(pfn) {
            return no("an spte maps only this guest's own frame");
        }
        let writable = raw & bits::W != 0;
        let blocked = if level == 1 {
            self.is_tracked(guest_page)
        } else {
            self.guest_blocks[guest_page / BLOCK_PAGES as usize].tracked > 0
        };
        if writable && blocked {
            return no("a table whose shadow is in sync is not writable");
        }
        if raw & bits::A == 0 || (writable && raw & bits::D == 0) {
            return no("a cached translation has A, a writable one D");
        }
        if !Self::has_entry(role) || self.pages[id].is_unsync() {
            return Ok(());
        }
        // In sync: the guest's entry must justify it.
        let paging = self.paging_of(role);
        let gpte =
            walk::load_entry(&paging, host.guest(), self.pages[id].gfn, Self::guest_index(role, index));
        let rights = role.rights().and(Rights::of_entry(gpte));
        // With CR0.WP = 0 a supervisor page may be writable beyond its entries (see `fill`).
        let beyond = !paging.wp && raw & bits::U == 0;
        if gpte & bits::P == 0
            || self.leaf_base(role, index, gpte) != gfn
            || (writable && !(rights.has(Rights::WRITE) && gpte & bits::D != 0) && !beyond)
            || (raw & bits::U != 0 && !rights.has(Rights::USER))
            || (raw & bits::NX == 0 && !rights.has(Rights::EXECUTE))
        {
            return no("an spte in sync grants no more than the guest's entry");
        }
        Ok(())
    }
}
