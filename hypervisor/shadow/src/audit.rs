//! The invariants, checked over everything: tests call it after every step, a build that is asked to audits live.
//!
//! No memory is taken, and each spte and each list is looked at once, so it can run beside a guest, under the lock of
//! its MMU. What other processors of the guest do meanwhile breaks nothing of it: they write guest tables whose
//! shadows are unsync, and set A and D, which justify an spte all the more.

use memory::{BLOCK_PAGES, Gfn, Pfn, TableMemory};

use crate::host::Host;
use crate::link::{HEAD, Head, NIL};
use crate::mmu::{Mmu, is_low, stray_chain};
use crate::pages::{PageId, Shelf, SpteId};
use crate::paging::{Rights, bits};
use crate::role::Role;
use crate::spte::{self, EMPTY, Spte};
use crate::walk;

/// A broken invariant, with its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation {
    /// What should have held.
    pub invariant: &'static str,
    /// The shadow page's number in its guest's arena; `u32::MAX` where it is none's.
    pub page: u32,
    /// The spte's index.
    pub index: usize,
    /// The spte.
    pub spte: u64,
}

impl core::fmt::Display for Violation {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let Violation { invariant, page, index, spte } = self;
        write!(f, "broken invariant: {invariant}")?;
        if *page == NIL {
            return Ok(());
        }
        write!(f, " (page {page}, index {index}, spte {spte:#x})")
    }
}

/// What an audit of everything looked at, and found right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Audited {
    /// Shadow pages.
    pub pages: u32,
    /// Sptes in them that are not empty.
    pub sptes: u64,
}

/// What the tables hold, and what of it the lists lead to: in the end the two agree.
#[derive(Default)]
struct Tally {
    leaves: usize,
    leaves_listed: usize,
    pointers: usize,
    pointers_listed: usize,
    chained: u32,
    unsync: usize,
    unsync_upper: u32,
}

/// An spte and its links.
#[derive(Clone, Copy)]
struct Linked {
    id: SpteId,
    role: Role,
    raw: u64,
    previous: u32,
    next: u32,
}

impl Linked {
    fn no(&self, invariant: &'static str) -> Result<(), Violation> {
        let (page, index) = (self.id.page().0, self.id.index());
        Err(Violation { invariant, page, index, spte: self.raw })
    }
}

/// A violation of a page as a whole.
fn of_page(page: u32, invariant: &'static str) -> Result<(), Violation> {
    Err(Violation { invariant, page, index: 0, spte: 0 })
}

const REVERSE_MAP: &str = "the reverse map lists each leaf once";
const PARENTS: &str = "a pointer is on the parent list of the page it points to";
const CHAINS: &str = "each live page is on the chain of its gfn";
const ORDER: &str = "each live page is in the order of use of the shelf where it belongs";
const UNSYNC: &str = "each unsync page is on the list of them";

impl Mmu {
    /// Checks every invariant over all that the shadow pages hold: some fifty instructions for each spte that is not
    /// empty. [`Mmu::audit_all`] looks at what ought to be empty as well.
    ///
    /// # Errors
    /// The first violation found.
    pub fn audit<H: Host>(&mut self, host: &H) -> Result<(), Violation> {
        self.audit_order()?;
        self.audit_blocks(host)?;
        let mut tally = Tally::default();
        self.audit_strays(host, &mut tally)?;
        let mut next = self.pages.first();
        while let Some(id) = next {
            self.audit_page(host, id, &mut tally)?;
            self.audit_parents(host, id, &mut tally)?;
            next = self.pages.after(id);
        }
        if tally.leaves_listed != tally.leaves {
            return of_page(NIL, REVERSE_MAP);
        }
        if tally.pointers_listed != tally.pointers {
            return of_page(NIL, PARENTS);
        }
        if tally.chained != self.pages.live() {
            return of_page(NIL, CHAINS);
        }
        if (tally.unsync, tally.unsync_upper) != (self.unsync.len(), self.unsync_upper) {
            return of_page(NIL, UNSYNC);
        }
        Ok(())
    }

    /// [`Mmu::audit`], and then all 512 sptes of each page, the heads of all lists, and the free descriptors.
    ///
    /// # Errors
    /// The first violation found.
    pub fn audit_all<H: Host>(&mut self, host: &H) -> Result<Audited, Violation> {
        self.audit(host)?;
        let mut sptes = 0;
        let mut next = self.pages.first();
        while let Some(id) = next {
            let page = &self.pages[id];
            sptes += page.present.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
            for index in (0..512).filter(|index| page.present[index >> 6] >> (index & 63) & 1 == 0) {
                let spte = host.tables().load(page.table, index);
                if spte != EMPTY {
                    let invariant = "the present map tells which sptes are not empty";
                    return Err(Violation { invariant, page: id.0, index, spte });
                }
            }
            next = self.pages.after(id);
        }
        for index in 0..self.guest_pages.len() as u32 {
            self.audit_head(host, Head::Page(index))?;
            let first = self.guest_pages[index as usize].shadows;
            if first != NIL && self.live(first).is_none() {
                of_page(first, CHAINS)?;
            }
        }
        for index in 0..self.guest_blocks.len() as u32 {
            self.audit_head(host, Head::Block(index))?;
        }
        if self.pages.count_free() != Some(self.pages.capacity() - self.pages.live()) {
            of_page(NIL, "a descriptor is either free or live")?;
        }
        Ok(Audited { pages: self.pages.live(), sptes })
    }

    /// The live page with this number.
    fn live(&self, number: u32) -> Option<PageId> {
        Some(PageId(number)).filter(|&id| number < self.pages.capacity() && self.pages[id].live)
    }

    /// The spte `id` with its links; `None` if there is no such spte, or it is empty.
    fn linked<H: Host>(&self, host: &H, id: SpteId) -> Option<Linked> {
        let page = &self.pages[self.live(id.page().0)?];
        if page.present[id.index() >> 6] >> (id.index() & 63) & 1 == 0 {
            return None;
        }
        let links = host.tables().load(page.links, id.index());
        let raw = host.tables().load(page.table, id.index());
        Some(Linked { id, role: page.role, raw, previous: (links >> 32) as u32, next: links as u32 })
    }

    /// The shelves lead to each live page once, and it belongs where it stands. (What follows may rely on it to end.)
    fn audit_order(&self) -> Result<(), Violation> {
        let mut count = 0;
        for shelf in Shelf::ALL {
            let mut next = self.pages.oldest(shelf);
            while let Some(id) = next {
                count += 1;
                if count > self.pages.live() || !self.pages[id].live || self.pages[id].shelf() != shelf {
                    return of_page(id.0, ORDER);
                }
                next = self.pages.newer(id);
            }
        }
        if count == self.pages.live() { Ok(()) } else { of_page(NIL, ORDER) }
    }

    /// Each block counts the tables shadowed in it: its count goes down by one for each, and must come to nothing;
    /// then it is put back.
    fn audit_blocks<H: Host>(&mut self, host: &H) -> Result<(), Violation> {
        self.count_tracked(host, u32::wrapping_sub);
        let wrong = self.guest_blocks.iter().any(|block| block.tracked != 0);
        self.count_tracked(host, u32::wrapping_add);
        if wrong { of_page(NIL, "each block counts the tables shadowed in it") } else { Ok(()) }
    }

    fn count_tracked<H: Host>(&mut self, host: &H, count: impl Fn(u32, u32) -> u32) {
        let mut next = self.pages.first();
        while let Some(id) = next {
            let page = &self.pages[id];
            if page.is_tracked()
                && let Some(index) = host.slots().index(page.gfn)
            {
                let tracked = &mut self.guest_blocks[index / BLOCK_PAGES as usize].tracked;
                *tracked = count(*tracked, 1);
            }
            next = self.pages.after(id);
        }
    }

    /// The chains of pages whose gfn is no RAM.
    fn audit_strays<H: Host>(&self, host: &H, tally: &mut Tally) -> Result<(), Violation> {
        for (number, &first) in self.strays.iter().enumerate() {
            if first != NIL {
                self.audit_chain(first, tally, |gfn| {
                    host.slots().index(gfn).is_none() && stray_chain(gfn) == number
                })?;
            }
        }
        Ok(())
    }

    /// The chain that begins at page `first`, all of whose gfns `belong` there.
    fn audit_chain(
        &self,
        first: u32,
        tally: &mut Tally,
        belongs: impl Fn(Gfn) -> bool,
    ) -> Result<(), Violation> {
        let mut at = first;
        while at != NIL {
            tally.chained += 1;
            let Some(id) = self.live(at) else { return of_page(at, CHAINS) };
            if tally.chained > self.pages.live() || !belongs(self.pages[id].gfn) {
                return of_page(at, CHAINS);
            }
            at = self.pages[id].chain;
        }
        Ok(())
    }

    /// What is on the list of `head` knows it.
    fn audit_head<H: Host>(&mut self, host: &H, head: Head) -> Result<(), Violation> {
        let Some(first) = self.heads().first(head) else { return Ok(()) };
        if self.linked(host, first).is_none_or(|first| first.previous != head.mark()) {
            return of_page(first.page().0, "the head of a list leads to its first element");
        }
        Ok(())
    }

    /// One page: its place on chain and list, and every spte in it that is not empty.
    fn audit_page<H: Host>(&mut self, host: &H, id: PageId, tally: &mut Tally) -> Result<(), Violation> {
        let page = &self.pages[id];
        let (role, gfn, table, links, present) = (page.role, page.gfn, page.table, page.links, page.present);
        if role.is_root() && role.mode().shadow_is_pae() && !is_low(table) {
            return of_page(id.0, "the root of a PAE format lies below 4 GiB");
        }
        if page.is_unsync() {
            if self.unsync.get(page.unsync as usize).is_none_or(|behind| behind.page != id) {
                return of_page(id.0, UNSYNC);
            }
            tally.unsync += 1;
            tally.unsync_upper += u32::from(role.level() > 1);
        }
        if let Some(index) = host.slots().index(gfn)
            && self.guest_pages[index].shadows == id.0
        {
            self.audit_chain(id.0, tally, |other| other == gfn)?;
        }
        let level = role.level();
        for (word, mut present) in present.into_iter().enumerate() {
            while present != 0 {
                let index = word << 6 | present.trailing_zeros() as usize;
                present &= present - 1;
                let raw = host.tables().load(table, index);
                let mut at = Linked { id: SpteId::new(id, index), role, raw, previous: NIL, next: NIL };
                match spte::decode(level, raw) {
                    Spte::Empty => return at.no("the present map tells which sptes are not empty"),
                    Spte::Table(_) if level == 1 => return at.no("pointers stand above level 1"),
                    Spte::Table(_) => tally.pointers += 1,
                    Spte::Leaf(_) if level > 2 => return at.no("leaves stand at levels 1 and 2"),
                    Spte::Leaf(_) => {
                        tally.leaves += 1;
                        let links = host.tables().load(links, index);
                        (at.previous, at.next) = ((links >> 32) as u32, links as u32);
                        if at.previous & HEAD != 0 {
                            self.audit_reverse_map(host, at, tally)?;
                        }
                    }
                    Spte::Mmio | Spte::Device(_) if level > 1 => {
                        return at.no("what stands for a device stands at level 1");
                    }
                    Spte::Mmio => self.audit_mmio(host, &at)?,
                    Spte::Device(pfn) => match self.device {
                        Some((gfn, device)) if device == pfn => self.audit_rights(host, &at, gfn)?,
                        _ => return at.no("only the page that stands for a device is mapped as one"),
                    },
                }
            }
        }
        Ok(())
    }

    /// The pointers to the page `child`.
    fn audit_parents<H: Host>(
        &mut self,
        host: &H,
        child: PageId,
        tally: &mut Tally,
    ) -> Result<(), Violation> {
        let page = &self.pages[child];
        let (role, table) = (page.role, page.table);
        let mut before = HEAD | child.0;
        let mut next = page.parents;
        while next != NIL {
            let Some(at) = self.linked(host, SpteId(next)) else { return of_page(child.0, PARENTS) };
            let level = at.role.level();
            if at.previous != before || spte::decode(level, at.raw) != Spte::Table(table) {
                return at.no(PARENTS);
            }
            if role.level() != level - 1 || !at.role.rights().has(role.rights()) {
                return at.no("a child is one level down and has no more rights");
            }
            self.audit_pointer(host, &at, child)?;
            tally.pointers_listed += 1;
            (before, next) = (next, at.next);
        }
        Ok(())
    }

    /// In a table in sync, the guest's entry must justify the pointer, D aside.
    fn audit_pointer<H: Host>(&self, host: &H, at: &Linked, child: PageId) -> Result<(), Violation> {
        let Some(gpte) = self.entry_in_sync(host, at) else { return Ok(()) };
        let child = &self.pages[child];
        let justified = [gpte | bits::D, gpte & !bits::D]
            .iter()
            .any(|&gpte| self.child_of(at.id.page(), at.id.index(), gpte) == (child.gfn, child.role));
        if gpte & bits::P == 0 || !justified {
            return at.no("a pointer in sync is what the guest's entry says");
        }
        Ok(())
    }

    /// The list of leaves that begins with `first`: they map the guest page, or block, whose list it is.
    fn audit_reverse_map<H: Host>(
        &mut self,
        host: &H,
        first: Linked,
        tally: &mut Tally,
    ) -> Result<(), Violation> {
        let (level, number) = (first.role.level(), first.previous & !HEAD);
        let head = if level == 1 { Head::Page(number) } else { Head::Block(number) };
        let guest_page = number as usize * if level == 1 { 1 } else { BLOCK_PAGES as usize };
        let Some(gfn) = host.slots().gfn_at(guest_page) else {
            return first.no("the reverse map names guest pages");
        };
        if self.heads().first(head) != Some(first.id) {
            return first.no(REVERSE_MAP);
        }
        let (own, blocked) = if level == 1 {
            (host.slots().pfn(gfn), self.is_tracked(guest_page))
        } else {
            (host.slots().block(gfn), self.guest_blocks[number as usize].tracked > 0)
        };
        let mut at = first;
        loop {
            tally.leaves_listed += 1;
            self.audit_leaf(host, &at, (level, gfn, own), blocked)?;
            if at.next == NIL {
                return Ok(());
            }
            let Some(next) = self.linked(host, SpteId(at.next)) else { return at.no(REVERSE_MAP) };
            if next.previous != at.id.0 {
                return next.no(REVERSE_MAP);
            }
            at = next;
        }
    }

    /// One leaf on the list of `gfn`, whose frame is `own`. `blocked`: none of them may be writable.
    fn audit_leaf<H: Host>(
        &self,
        host: &H,
        at: &Linked,
        (level, gfn, own): (u8, Gfn, Option<Pfn>),
        blocked: bool,
    ) -> Result<(), Violation> {
        match spte::decode(level, at.raw) {
            Spte::Leaf(pfn) if at.role.level() == level && own == Some(pfn) => {}
            _ => return at.no("an spte maps only this guest's own frame"),
        }
        let writable = at.raw & bits::W != 0;
        if writable && blocked {
            return at.no("a table whose shadow is in sync is not writable");
        }
        if at.raw & bits::A == 0 || (writable && at.raw & bits::D == 0) {
            return at.no("a cached translation has A, a writable one D");
        }
        self.audit_rights(host, at, gfn)
    }

    /// In sync, the guest's entry must justify the leaf `at`, which maps `gfn`.
    fn audit_rights<H: Host>(&self, host: &H, at: &Linked, gfn: Gfn) -> Result<(), Violation> {
        let Some(gpte) = self.entry_in_sync(host, at) else { return Ok(()) };
        let (raw, writable) = (at.raw, at.raw & bits::W != 0);
        let paging = self.paging_of(at.role);
        let rights = at.role.rights().and(Rights::of_entry(gpte));
        // With CR0.WP = 0 a supervisor page may be writable beyond its entries (see `fill`).
        let beyond = !paging.wp && raw & bits::U == 0;
        if gpte & bits::P == 0
            || self.leaf_base(at.role, at.id.index(), gpte) != gfn
            || (writable && !(rights.has(Rights::WRITE) && gpte & bits::D != 0) && !beyond)
            || (raw & bits::U != 0 && !rights.has(Rights::USER))
            || (raw & bits::NX == 0 && !rights.has(Rights::EXECUTE))
        {
            return at.no("an spte in sync grants no more than the guest's entry");
        }
        Ok(())
    }

    /// In sync, an MMIO mark stands where the guest's entry leads to no RAM.
    fn audit_mmio<H: Host>(&self, host: &H, at: &Linked) -> Result<(), Violation> {
        let Some(gpte) = self.entry_in_sync(host, at) else { return Ok(()) };
        let target = self.leaf_base(at.role, at.id.index(), gpte);
        if gpte & bits::P == 0 || host.slots().index(target).is_some() {
            return at.no("an MMIO mark in sync stands for a page that is no RAM");
        }
        Ok(())
    }

    /// The guest's entry behind `at`; `None` if there is none, or its table may be ahead of the shadow.
    fn entry_in_sync<H: Host>(&self, host: &H, at: &Linked) -> Option<u64> {
        let page = &self.pages[at.id.page()];
        if !Self::has_entry(at.role) || page.is_unsync() {
            return None;
        }
        let index = Self::guest_index(at.role, at.id.index());
        Some(walk::load_entry(&self.paging_of(at.role), host.guest(), page.gfn, index))
    }
}
