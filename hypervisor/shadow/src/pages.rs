//! The shadow pages of one guest: an arena of descriptors, found by (gfn, role), each on a shelf in order of use.

use alloc::vec::Vec;

use memory::{Gfn, Pfn};

use crate::link::NIL;
use crate::role::Role;

/// The number of a shadow page's descriptor in its guest's arena.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub struct PageId(pub(crate) u32);

/// An spte's place: a shadow page and an index, in 31 bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct SpteId(pub u32);

impl SpteId {
    pub fn new(page: PageId, index: usize) -> SpteId {
        SpteId(page.0 << 9 | index as u32)
    }
    pub fn page(self) -> PageId {
        PageId(self.0 >> 9)
    }
    pub fn index(self) -> usize {
        (self.0 & 511) as usize
    }
}

/// Most shadow pages a guest can have: what [`SpteId`] can name.
pub const PAGES_MAX: u32 = 1 << 22;

/// What a page is to reclaim: each live page stands on one of these, in order of use. So a victim is found without a
/// look at the pages of other kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shelf {
    /// Nothing points to it, and it is no root.
    Parentless,
    /// A root, loaded or not.
    Roots,
    /// A table above level 1 that something points to.
    Uppers,
    /// A table of level 1 that something points to.
    Leaves,
}

impl Shelf {
    /// All of them.
    pub const ALL: [Shelf; 4] = [Shelf::Parentless, Shelf::Roots, Shelf::Uppers, Shelf::Leaves];
}

/// A shadow page's descriptor.
#[derive(Clone, Debug)]
pub(crate) struct ShadowPage {
    /// The frame of the table itself.
    pub table: Pfn,
    /// The frame of the links: for each spte, its neighbours in the list it is on (see [`crate::link`]).
    pub links: Pfn,
    /// The guest table (or, direct, the first page mapped).
    pub gfn: Gfn,
    pub role: Role,
    /// Sptes that point here: head of the list.
    pub parents: u32,
    /// Next shadow page of the same gfn; in the free list, the next free descriptor.
    pub chain: u32,
    /// Neighbours in order of use, on the same shelf.
    newer: u32,
    older: u32,
    /// How many vCPUs run on it as their root.
    pub roots: u32,
    /// Position in the list of unsync pages, or NIL.
    pub unsync: u32,
    /// Tells a reused descriptor from the page that a cached root meant.
    pub serial: u32,
    /// The reclaim that last spared it.
    pub spared_in: u32,
    /// The vCPU's tag slot that last held it as a root.
    pub tag: u8,
    pub live: bool,
    /// Which of the 512 sptes are not empty.
    pub present: [u64; 8],
}

/// Where a shadow page's sptes are, looked up once for many of them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sptes {
    pub page: PageId,
    pub level: u8,
    /// The frame of the sptes.
    pub table: Pfn,
    /// The frame of their links.
    pub links: Pfn,
}

impl ShadowPage {
    /// Whether it is the shadow of `gfn` with `role`.
    pub fn is(&self, gfn: Gfn, role: Role) -> bool {
        self.role == role && self.gfn == gfn
    }
    pub fn is_unsync(&self) -> bool {
        self.unsync != NIL
    }
    pub fn is_tracked(&self) -> bool {
        !self.role.is_direct()
    }
    /// Where it has to stand.
    pub fn shelf(&self) -> Shelf {
        if self.role.is_root() {
            Shelf::Roots
        } else if self.parents == NIL {
            Shelf::Parentless
        } else if self.role.level() == 1 {
            Shelf::Leaves
        } else {
            Shelf::Uppers
        }
    }
    pub fn set_present(&mut self, index: usize) {
        self.present[index >> 6] |= 1 << (index & 63);
    }
    pub fn clear_present(&mut self, index: usize) {
        self.present[index >> 6] &= !(1 << (index & 63));
    }
    /// Which of sptes `first..first + count`, an aligned group of less than 64, are empty.
    pub fn absent(&self, first: usize, count: usize) -> u64 {
        self.group(first, count) ^ ((1 << count) - 1)
    }
    /// The presence of sptes `first..first + count`, an aligned group of less than 64, in the low bits.
    pub fn group(&self, first: usize, count: usize) -> u64 {
        self.present[first >> 6] >> (first & 63) & ((1 << count) - 1)
    }
}

/// The arena. All of its memory is taken when it is made.
#[derive(Debug)]
pub(crate) struct Pages {
    pages: Vec<ShadowPage>,
    free: u32,
    live: u32,
    shelves: [Order; Shelf::ALL.len()],
    serial: u32,
}

/// A shelf's two ends.
#[derive(Clone, Copy, Debug)]
struct Order {
    newest: u32,
    oldest: u32,
}

impl Pages {
    pub fn new(capacity: u32) -> Pages {
        let capacity = capacity.min(PAGES_MAX);
        let blank = |i: u32| ShadowPage {
            table: Pfn(0),
            links: Pfn(0),
            gfn: Gfn(0),
            role: Role::root(&crate::paging::Paging::default(), 0),
            parents: NIL,
            chain: if i + 1 < capacity { i + 1 } else { NIL },
            newer: NIL,
            older: NIL,
            roots: 0,
            unsync: NIL,
            serial: 0,
            spared_in: 0,
            tag: 0,
            live: false,
            present: [0; 8],
        };
        Pages {
            pages: (0..capacity).map(blank).collect(),
            free: if capacity > 0 { 0 } else { NIL },
            live: 0,
            shelves: [Order { newest: NIL, oldest: NIL }; Shelf::ALL.len()],
            serial: 0,
        }
    }

    /// Where the sptes of `page` are.
    #[inline]
    pub fn sptes(&self, page: PageId) -> Sptes {
        let ShadowPage { table, links, role, .. } = self[page];
        Sptes { page, level: role.level(), table, links }
    }

    pub fn capacity(&self) -> u32 {
        self.pages.len() as u32
    }

    pub fn live(&self) -> u32 {
        self.live
    }

    /// Counts the free descriptors; `None` if their list does not end.
    pub fn count_free(&self) -> Option<u32> {
        let mut count = 0;
        let mut at = self.free;
        while at != NIL && count <= self.capacity() {
            count += 1;
            at = self.pages[at as usize].chain;
        }
        (at == NIL).then_some(count)
    }

    /// Makes a descriptor live; `None` when all are.
    pub fn allocate(&mut self, table: Pfn, links: Pfn, gfn: Gfn, role: Role) -> Option<PageId> {
        let id = self.free;
        if id == NIL {
            return None;
        }
        self.serial = self.serial.wrapping_add(1);
        let serial = self.serial;
        let page = &mut self.pages[id as usize];
        self.free = page.chain;
        *page = ShadowPage {
            table,
            links,
            gfn,
            role,
            parents: NIL,
            chain: NIL,
            newer: NIL,
            older: NIL,
            roots: 0,
            unsync: NIL,
            serial,
            spared_in: 0,
            tag: u8::MAX,
            live: true,
            present: [0; 8],
        };
        self.live += 1;
        let shelf = self[PageId(id)].shelf();
        self.push_newest(shelf, id);
        Some(PageId(id))
    }

    /// Gives a descriptor back; its frames are the caller's again.
    pub fn release(&mut self, id: PageId) {
        self.unlink_age(self[id].shelf(), id.0);
        let page = &mut self.pages[id.0 as usize];
        debug_assert!(page.live && page.parents == NIL && page.roots == 0 && page.unsync == NIL);
        page.live = false;
        page.chain = self.free;
        self.free = id.0;
        self.live -= 1;
    }

    /// Marks a page as used just now.
    pub fn touch(&mut self, id: PageId) {
        let shelf = self[id].shelf();
        if self.shelves[shelf as usize].newest != id.0 {
            self.unlink_age(shelf, id.0);
            self.push_newest(shelf, id.0);
        }
    }

    /// Makes `first` the head of the list of what points to `id`. Who gets its first parent or loses its last one changes
    /// its shelf, as one used just now.
    #[inline]
    pub fn set_parents(&mut self, id: PageId, first: u32) {
        let (before, had) = (self[id].shelf(), self[id].parents);
        self[id].parents = first;
        if (had == NIL) != (first == NIL) && before != Shelf::Roots {
            self.unlink_age(before, id.0);
            self.push_newest(self[id].shelf(), id.0);
        }
    }

    /// The page of the shelf that was used longest ago.
    pub fn oldest(&self, shelf: Shelf) -> Option<PageId> {
        let Order { oldest, .. } = self.shelves[shelf as usize];
        (oldest != NIL).then_some(PageId(oldest))
    }

    /// The page of the same shelf that was used next after `id`.
    pub fn newer(&self, id: PageId) -> Option<PageId> {
        let newer = self[id].newer;
        (newer != NIL).then_some(PageId(newer))
    }

    /// Where a look at all live pages begins: shelf by shelf, not by age.
    pub fn first(&self) -> Option<PageId> {
        Shelf::ALL.into_iter().find_map(|shelf| self.oldest(shelf))
    }

    /// The live page after `id`: the next newer one, then the oldest of the next shelf.
    pub fn after(&self, id: PageId) -> Option<PageId> {
        let later = Shelf::ALL.into_iter().skip(self[id].shelf() as usize + 1);
        self.newer(id).or_else(|| later.into_iter().find_map(|shelf| self.oldest(shelf)))
    }

    fn push_newest(&mut self, shelf: Shelf, id: u32) {
        let order = &mut self.shelves[shelf as usize];
        let before = core::mem::replace(&mut order.newest, id);
        if before == NIL {
            order.oldest = id;
        } else {
            self.pages[before as usize].newer = id;
        }
        let page = &mut self.pages[id as usize];
        (page.older, page.newer) = (before, NIL);
    }

    fn unlink_age(&mut self, shelf: Shelf, id: u32) {
        let ShadowPage { older, newer, .. } = self.pages[id as usize];
        let order = &mut self.shelves[shelf as usize];
        if older == NIL {
            order.oldest = newer;
        }
        if newer == NIL {
            order.newest = older;
        }
        if older != NIL {
            self.pages[older as usize].newer = newer;
        }
        if newer != NIL {
            self.pages[newer as usize].older = older;
        }
    }
}

impl core::ops::Index<PageId> for Pages {
    type Output = ShadowPage;
    fn index(&self, id: PageId) -> &ShadowPage {
        &self.pages[id.0 as usize]
    }
}

impl core::ops::IndexMut<PageId> for Pages {
    fn index_mut(&mut self, id: PageId) -> &mut ShadowPage {
        &mut self.pages[id.0 as usize]
    }
}
