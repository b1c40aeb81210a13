//! Lists of sptes: the reverse map (all sptes that map a guest page) and the parents of a shadow page.
//!
//! Every shadow page has a second frame beside its table, with two 32-bit links for each of its 512 sptes:
//! an spte is on at most one list (a leaf on its guest page's, a pointer on its child's), so the links need no
//! memory of their own, cannot run out, and taking an spte off a list with ten thousand aliases costs the
//! same as off a list of one (H23). The first element's `previous` names the list's head instead.

use memory::{Pfn, TableMemory};

use crate::pages::{PageId, Pages, SpteId};

/// No element.
pub(crate) const NIL: u32 = u32::MAX;
/// In place of an element's predecessor: its list's head.
pub(crate) const HEAD: u32 = 1 << 31;

/// A list's head: an index into the array that the kind of spte implies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Head {
    /// Sptes at level 1 that map the guest page with this dense index.
    Page(u32),
    /// Sptes at level 2 that map the 2 MiB block with this dense index.
    Block(u32),
    /// Sptes that point to this shadow page.
    Parents(PageId),
}

impl Head {
    /// What the first element of its list has for a predecessor.
    pub fn mark(self) -> u32 {
        HEAD | match self {
            Head::Page(i) | Head::Block(i) => i,
            Head::Parents(page) => page.0,
        }
    }
}

/// The index of the head of the list that spte `index` is on, if it is its first element; `links` is the frame of its
/// page's links.
#[inline]
pub(crate) fn named_head<T: TableMemory>(tables: &T, links: Pfn, index: usize) -> Option<u32> {
    let (previous, _) = Heads::load(tables, links, index);
    (previous & HEAD != 0).then_some(previous & !HEAD)
}

/// The heads of a guest's reverse map.
#[derive(Debug)]
pub(crate) struct Heads<'a> {
    pub pages: &'a mut [crate::rmap::GuestPage],
    pub blocks: &'a mut [crate::rmap::GuestBlock],
    pub arena: &'a mut Pages,
}

impl Heads<'_> {
    fn get(&self, head: Head) -> u32 {
        match head {
            Head::Page(i) => self.pages[i as usize].sptes,
            Head::Block(i) => self.blocks[i as usize].sptes,
            Head::Parents(page) => self.arena[page].parents,
        }
    }

    fn set(&mut self, head: Head, first: u32) {
        match head {
            Head::Page(i) => self.pages[i as usize].sptes = first,
            Head::Block(i) => self.blocks[i as usize].sptes = first,
            Head::Parents(page) => self.arena.set_parents(page, first),
        }
    }

    fn load<T: TableMemory>(tables: &T, links: Pfn, index: usize) -> (u32, u32) {
        let raw = tables.load(links, index);
        ((raw >> 32) as u32, raw as u32)
    }

    fn store<T: TableMemory>(tables: &T, links: Pfn, index: usize, previous: u32, next: u32) {
        tables.store(links, index, u64::from(previous) << 32 | u64::from(next));
    }

    /// Makes `previous` what stands before `id`.
    fn set_previous<T: TableMemory>(&self, tables: &T, id: SpteId, previous: u32) {
        let links = self.arena[id.page()].links;
        let (_, next) = Self::load(tables, links, id.index());
        Self::store(tables, links, id.index(), previous, next);
    }

    /// Puts `id`, whose page has its links in the frame `links`, first on the list.
    #[inline]
    pub fn insert<T: TableMemory>(&mut self, tables: &T, links: Pfn, head: Head, id: SpteId) {
        let first = self.get(head);
        Self::store(tables, links, id.index(), head.mark(), first);
        if first != NIL {
            self.set_previous(tables, SpteId(first), id.0);
        }
        self.set(head, id.0);
    }

    /// Takes spte `index` of the page that has its links in the frame `links` off its list; `kind` makes the head
    /// from its index.
    #[inline]
    pub fn remove<T: TableMemory>(
        &mut self,
        tables: &T,
        links: Pfn,
        index: usize,
        kind: impl Fn(u32) -> Head,
    ) {
        let (previous, next) = Self::load(tables, links, index);
        if next != NIL {
            self.set_previous(tables, SpteId(next), previous);
        }
        if previous & HEAD != 0 {
            self.set(kind(previous & !HEAD), next);
            return;
        }
        let before = SpteId(previous);
        let links = self.arena[before.page()].links;
        let (before_it, _) = Self::load(tables, links, before.index());
        Self::store(tables, links, before.index(), before_it, next);
    }

    /// The element after `id`.
    pub fn next<T: TableMemory>(&self, tables: &T, id: SpteId) -> Option<SpteId> {
        let (_, next) = Self::load(tables, self.arena[id.page()].links, id.index());
        (next != NIL).then_some(SpteId(next))
    }

    /// The first element.
    pub fn first(&self, head: Head) -> Option<SpteId> {
        let first = self.get(head);
        (first != NIL).then_some(SpteId(first))
    }
}
