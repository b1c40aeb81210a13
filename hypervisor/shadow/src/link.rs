//! Lists of sptes: the reverse map (all sptes that map a guest page) and the parents of a shadow page.
//!
//! Every shadow page has a second frame beside its table, with two 32-bit links for each of its 512 sptes:
//! an spte is on at most one list (a leaf on its guest page's, a pointer on its child's), so the links need no
//! memory of their own, cannot run out, and taking an spte off a list with ten thousand aliases costs the
//! same as off a list of one (H23). The first element's `previous` names the list's head instead.

use memory::TableMemory;

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
            Head::Parents(page) => self.arena[page].parents = first,
        }
    }

    fn load<T: TableMemory>(&self, tables: &T, id: SpteId) -> (u32, u32) {
        let raw = tables.load(self.arena[id.page()].links, id.index());
        ((raw >> 32) as u32, raw as u32)
    }

    fn store<T: TableMemory>(&self, tables: &T, id: SpteId, previous: u32, next: u32) {
        tables.store(self.arena[id.page()].links, id.index(), u64::from(previous) << 32 | u64::from(next));
    }

    /// Puts `id` first on the list.
    pub fn insert<T: TableMemory>(&mut self, tables: &T, head: Head, id: SpteId) {
        let first = self.get(head);
        self.store(tables, id, head.mark(), first);
        if first != NIL {
            let (_, next) = self.load(tables, SpteId(first));
            self.store(tables, SpteId(first), id.0, next);
        }
        self.set(head, id.0);
    }

    /// Takes `id` off its list; `kind` makes the head from its index. Returns the head if the list is now
    /// empty.
    pub fn remove<T: TableMemory>(
        &mut self,
        tables: &T,
        id: SpteId,
        kind: impl Fn(u32) -> Head,
    ) -> Option<Head> {
        let (previous, next) = self.load(tables, id);
        if next != NIL {
            let (_, after) = self.load(tables, SpteId(next));
            self.store(tables, SpteId(next), previous, after);
        }
        if previous & HEAD == 0 {
            let (before, _) = self.load(tables, SpteId(previous));
            self.store(tables, SpteId(previous), before, next);
            return None;
        }
        let head = kind(previous & !HEAD);
        self.set(head, next);
        (next == NIL).then_some(head)
    }

    /// The element after `id`.
    pub fn next<T: TableMemory>(&self, tables: &T, id: SpteId) -> Option<SpteId> {
        let (_, next) = self.load(tables, id);
        (next != NIL).then_some(SpteId(next))
    }

    /// The first element.
    pub fn first(&self, head: Head) -> Option<SpteId> {
        let first = self.get(head);
        (first != NIL).then_some(SpteId(first))
    }
}
