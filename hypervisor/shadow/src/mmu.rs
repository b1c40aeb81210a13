//! One guest's shadow MMU: its state, and the primitives that every reaction is made of.
//!
//! Kept under one lock per guest. All of its memory is taken when it is made, and the frames that an operation
//! can need are in its stash before it begins, so nothing allocates or fails half-way.

use alloc::vec;
use alloc::vec::Vec;

use memory::{BLOCK_PAGES, Event, Gfn, Pfn, Slots, TableMemory};

use crate::defect::{Defect, has};
use crate::host::Host;
use crate::link::{Head, Heads, NIL};
use crate::pages::{PageId, Pages, ShadowPage, SpteId, Sptes};
use crate::paging::{Mode, Paging, Rights, bits};
use crate::reclaim::Ghosts;
use crate::rmap::{GuestBlock, GuestPage};
use crate::role::Role;
use crate::spte::{self, EMPTY, Spte};
use crate::trail::Trail;

/// Frames that must be in the stash before a fill or a change of root begins: five levels, each a table and
/// its links.
pub const FRAMES_PER_OPERATION: usize = 10;
/// Frames up to which the stash takes more: a few operations' worth.
pub(crate) const STASH_MAX: usize = 4 * FRAMES_PER_OPERATION;
/// Shadow pages that one fill or change of root can create.
pub const PAGES_PER_OPERATION: u32 = 5;
/// Most ways that one instruction needs through the guest's tables at once, each to a page of its own: a far call through
/// memory to a call gate. Code, operand, gate, code descriptor, TSS and the new stack may each cross a page. (A gather
/// keeps what it has got; tasks are switched by us.)
const WAYS_MAX: u32 = 12;
/// Most shadow pages that one instruction needs at once, with four levels: a root, and three tables a way.
pub const PAGES_PER_INSTRUCTION: u32 = 1 + 3 * WAYS_MAX;
/// The fewest shadow pages with which a guest with one vCPU makes progress: all that an instruction needs, and the
/// pages that an operation creates. Then an instruction takes at most [`fills_max`] fills.
pub const PAGES_MIN: u32 = PAGES_PER_INSTRUCTION + PAGES_PER_OPERATION;

/// Most fills until an instruction retires of a guest with `vcpus` virtual processors, [`pages_min`] pages or more,
/// and a cap of `pages_max`; its event's delivery apart, which counts as an instruction of its own.
///
/// With one vCPU: a fill is either the first for its page, or follows a reclaim of what the instruction had. In the
/// first turn of the clocks all pages are judged, and what the instruction does not need is cold from then on, while
/// each new attempt uses again what it has come to. Pages go in the order of use: within two more turns, of at most
/// `pages_max` pages each, all that the instruction does not need is gone. Then everything that it needs fits, and no
/// reclaim comes any more.
///
/// With several, it is the fills of all together until one of them retires an instruction: a guest goes on. Tests
/// find it far from reached in many orders of their turns; it is not shown for all, since what a vCPU needs looks
/// cold too while the vCPU waits. **It does not bound the fills of each**: one that is slower than the rest loses
/// what it has to their next instructions, time after time, and may wait for as long as they go on like that.
#[must_use]
pub const fn fills_max(vcpus: u32, pages_max: u32) -> u32 {
    WAYS_MAX * vcpus + 3 * pages_max
}

/// The fewest shadow pages of a guest with `vcpus` virtual processors: what the instructions of all need at once fits.
#[must_use]
pub const fn pages_min(vcpus: u32) -> u32 {
    PAGES_MIN * if vcpus > 1 { vcpus } else { 1 }
}

/// What does not change while a guest lives.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// The guest's MAXPHYADDR in bits.
    pub physical_address_bits: u8,
    /// Whether the guest may use 1 GiB pages.
    pub gib_pages: bool,
    /// Mark pages that are no RAM by a reserved bit; off where the processor has none left (52 bits).
    pub mark_mmio: bool,
    /// No large spte is executable: fetches are served by 4 KiB ones (iTLB multihit, CVE-2018-12207).
    pub split_executable: bool,
    /// Most shadow pages at a time.
    pub pages_max: u32,
    /// Virtual processors; with one, nothing can change between a walk and its fill.
    pub vcpus: u32,
}

/// Chains for shadow pages whose gfn is no RAM.
pub(crate) const STRAY_CHAINS: usize = 256;

/// The chain for a gfn that is no RAM.
pub(crate) fn stray_chain(gfn: Gfn) -> usize {
    (gfn.0 / BLOCK_PAGES) as usize % STRAY_CHAINS
}

macro_rules! stats {
    ($($field:ident $event:ident,)*) => {
        /// What the MMU counted since the guest started, each as the event of the core's counters that it is a share of.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Stats { $(#[doc = concat!("See [`Event::", stringify!($event), "`].")] pub $field: u64,)* }
        impl Stats {
            /// Each event with its count.
            pub fn each(&self) -> impl Iterator<Item = (Event, u64)> + use<> {
                [$((Event::$event, self.$field)),*].into_iter()
            }
        }
    };
}

stats! {
    fills Fill,
    prefills Prefill,
    pages_made PageMade,
    pages_zapped Zap,
    unsyncs Unsync,
    syncs Sync,
    root_loads RootLoad,
    invlpgs_looked InvlpgLooked,
    reclaims Reclaim,
    reclaimed ReclaimedPage,
    thrash Thrash,
}

/// Whether a frame lies below 4 GiB.
pub(crate) fn is_low(frame: Pfn) -> bool {
    frame.0 < 1 << 20
}

/// A shadow page that may be behind its guest table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unsync {
    pub page: PageId,
    /// The MMU's clock when it fell behind, or when something was last added to it: a root that was left later
    /// had seen all of it.
    pub added: u64,
}

/// One guest's shadow MMU.
#[derive(Debug)]
pub struct Mmu {
    pub(crate) config: Config,
    pub(crate) pages: Pages,
    pub(crate) guest_pages: Vec<GuestPage>,
    pub(crate) guest_blocks: Vec<GuestBlock>,
    /// Shadow pages whose gfn is no RAM (dummy roots, pieces of large pages over MMIO), in chains by block.
    pub(crate) strays: [u32; STRAY_CHAINS],
    pub(crate) unsync: Vec<Unsync>,
    /// How many of them are above level 1.
    pub(crate) unsync_upper: u32,
    /// Shadow pages that are being synced: off the list of unsync ones, their tables not writable any more.
    pub(crate) due: Vec<PageId>,
    /// Orders departures from roots and flushes against additions to unsync pages. Starts at 1: 0 is before all.
    pub(crate) clock: u64,
    /// Frames at hand.
    pub(crate) stash: Vec<Pfn>,
    /// Frames of zapped tables that some TLB may still lead to.
    pub(crate) retired: Vec<Pfn>,
    /// The flush generation that makes the retired frames free.
    pub(crate) retired_generation: u64,
    /// Something was taken away since the generation last advanced.
    pub(crate) narrowed: bool,
    pub(crate) stats: Stats,
    /// How often a page has gone unsync, from 1 on: a new tag has looked at none. While it stays the same no root comes
    /// to lead to an unsync page: what a new pointer leads to has been synced before it is made.
    pub(crate) times_unsync: u64,
    /// How often something was added to an unsync page.
    pub(crate) additions: u64,
    /// How many pointers to shadow pages have been taken away.
    pub(crate) cut: u64,
    pub(crate) trail: Option<Trail>,
    /// Pages that reclaim took.
    pub(crate) ghosts: Ghosts,
    /// The number of the present or last reclaim, from 1 on.
    pub(crate) turn: u32,
    /// The page that stands for the local APIC, and where the guest has it.
    pub(crate) device: Option<(Gfn, Pfn)>,
}

impl Mmu {
    /// Bytes of heap that [`Mmu::new`] takes for `ram_pages` pages of guest RAM and up to `pages_max` shadow pages.
    #[must_use]
    pub const fn heap_bytes(ram_pages: usize, pages_max: usize) -> usize {
        let each_page = size_of::<GuestPage>();
        let each_block = size_of::<GuestBlock>();
        let each_shadow =
            size_of::<ShadowPage>() + size_of::<Unsync>() + size_of::<PageId>() + 4 * size_of::<Pfn>();
        ram_pages * each_page
            + ram_pages / BLOCK_PAGES as usize * each_block
            + pages_max * each_shadow
            + Ghosts::places(pages_max) * size_of::<u64>()
            + 2 * STASH_MAX * size_of::<Pfn>()
    }

    /// An MMU for a guest with the RAM of `slots`. Takes 8 bytes for each of its pages, and about 190 for each
    /// shadow page of `config.pages_max` (raised to [`pages_min`]).
    #[must_use]
    pub fn new(config: Config, slots: &Slots) -> Mmu {
        let pages_max = config.pages_max.clamp(pages_min(config.vcpus), crate::pages::PAGES_MAX);
        let ram_pages = slots.pages();
        Mmu {
            config: Config { pages_max, ..config },
            pages: Pages::new(pages_max),
            guest_pages: vec![GuestPage::default(); ram_pages],
            guest_blocks: vec![GuestBlock::default(); ram_pages.div_ceil(BLOCK_PAGES as usize)],
            strays: [NIL; STRAY_CHAINS],
            unsync_upper: 0,
            clock: 1,
            unsync: Vec::with_capacity(pages_max as usize),
            due: Vec::with_capacity(pages_max as usize),
            stash: Vec::with_capacity(2 * pages_max as usize + STASH_MAX),
            retired: Vec::with_capacity(2 * pages_max as usize + STASH_MAX),
            retired_generation: 0,
            narrowed: false,
            stats: Stats::default(),
            times_unsync: 1,
            additions: 0,
            cut: 0,
            trail: None,
            ghosts: Ghosts::new(pages_max),
            turn: 1,
            device: None,
        }
    }

    /// Counts since the start.
    #[must_use]
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Live shadow pages.
    #[must_use]
    pub fn live_pages(&self) -> u32 {
        self.pages.live()
    }

    /// Frames held: two for each live page, the stash, and what waits for a flush.
    #[must_use]
    pub fn frames(&self) -> u64 {
        2 * u64::from(self.pages.live()) + self.stash.len() as u64 + self.retired.len() as u64
    }

    /// Frames at hand for the next operation.
    #[must_use]
    pub fn stash_frames(&self) -> usize {
        self.stash.len()
    }

    /// Puts a frame into the stash. Gives it back if a few operations' worth are there already: beside what all
    /// pages that the guest may have give back when they are zapped, the stash has room for no more.
    ///
    /// # Errors
    /// The frame itself.
    pub fn provide(&mut self, frame: Pfn) -> Result<(), Pfn> {
        if self.stash.len() >= STASH_MAX {
            return Err(frame);
        }
        self.stash.push(frame);
        Ok(())
    }

    /// Whether the stash has a frame below 4 GiB, as the root of a PAE-format shadow needs.
    #[must_use]
    pub fn has_low_frame(&self) -> bool {
        self.stash.iter().any(|&frame| is_low(frame))
    }

    /// Takes a frame out of the stash: back to the allocator.
    pub fn take_back(&mut self) -> Option<Pfn> {
        self.stash.pop()
    }

    /// Shadow pages that may still be made before the guest's cap.
    #[must_use]
    pub fn pages_left(&self) -> u32 {
        self.config.pages_max - self.pages.live()
    }

    /// Frames of zapped tables wait for a flush, and for [`Mmu::release`].
    #[must_use]
    pub fn has_retired(&self) -> bool {
        !self.retired.is_empty()
    }

    /// The frames retired up to `flushed`, a generation that every core of the guest has flushed, go to the
    /// stash: this is the only way a table's frame becomes free.
    pub fn release<H: Host>(&mut self, host: &H, flushed: u64) {
        if self.retired.is_empty() || flushed < self.retired_generation {
            return;
        }
        host.pages_freed(self.retired.len() as u64);
        self.stash.append(&mut self.retired);
    }

    /// Ends an operation: what was taken away gets a flush generation.
    pub(crate) fn publish<H: Host>(&mut self, host: &H) {
        if self.narrowed {
            self.narrowed = false;
            let generation = host.advance_generation();
            if !self.retired.is_empty() {
                self.retired_generation = generation;
            }
        }
    }

    /// After this no other core of the guest writes a tracked table unheard: what is read of it next is what holds (H3).
    /// Other cores may hold translations whose sptes are long gone, so it does not matter whether any was narrowed
    /// just now. One round, whatever the number of tables.
    pub(crate) fn shut_out<H: Host>(&mut self, host: &H) {
        if self.config.vcpus > 1 && !has(Defect::NotShutOut) {
            self.publish(host);
            host.shoot_down();
        }
    }

    pub(crate) fn heads(&mut self) -> Heads<'_> {
        Heads { pages: &mut self.guest_pages, blocks: &mut self.guest_blocks, arena: &mut self.pages }
    }

    #[inline(always)]
    pub(crate) fn paging_of(&self, role: Role) -> Paging {
        role.paging(self.config.physical_address_bits, self.config.gib_pages)
    }

    // ---- shadow pages, by (gfn, role) ----

    fn chain<H: Host>(&mut self, host: &H, gfn: Gfn) -> &mut u32 {
        match host.slots().index(gfn) {
            Some(index) => &mut self.guest_pages[index].shadows,
            None => &mut self.strays[stray_chain(gfn)],
        }
    }

    pub(crate) fn find<H: Host>(&self, host: &H, gfn: Gfn, role: Role) -> Option<PageId> {
        let mut id = match host.slots().index(gfn) {
            Some(index) => self.guest_pages[index].shadows,
            None => self.strays[stray_chain(gfn)],
        };
        while id != NIL {
            let page = &self.pages[PageId(id)];
            if page.is(gfn, role) {
                return Some(PageId(id));
            }
            id = page.chain;
        }
        None
    }

    /// Makes a shadow page: from here on no spte lets the guest write the table unnoticed, and after
    /// [`Mmu::shut_out`] no TLB does. `None` if there is no frame or descriptor left, which the caller rules out
    /// beforehand.
    pub(crate) fn make<H: Host>(&mut self, host: &H, gfn: Gfn, role: Role) -> Option<PageId> {
        if self.stash.len() < 2 {
            return None;
        }
        let table = if role.is_root() && role.mode().shadow_is_pae() {
            // PAE paging takes bits 31:5 of CR3 alone (SDM Vol. 3, "PAE Paging").
            let low = self.stash.iter().rposition(|&frame| is_low(frame))?;
            self.stash.swap_remove(low)
        } else {
            self.stash.pop()?
        };
        let links = self.stash.pop()?;
        let Some(id) = self.pages.allocate(table, links, gfn, role) else {
            self.stash.push(table);
            self.stash.push(links);
            return None;
        };
        host.tables().fill(table, EMPTY);
        let chain = self.chain(host, gfn);
        let next = core::mem::replace(chain, id.0);
        self.pages[id].chain = next;
        if !role.is_direct()
            && let Some(index) = host.slots().index(gfn)
        {
            self.track(host, index);
            if self.has_two_formats(index) {
                self.keep_unsync(index);
            }
        }
        host.page_allocated();
        self.stats.pages_made += 1;
        if self.ghosts.recall(gfn, role).is_some_and(|distance| distance <= self.pages.live()) {
            self.stats.thrash += 1;
        }
        Some(id)
    }

    /// The guest page `index` now holds a shadowed table: no spte may map it writable.
    fn track<H: Host>(&mut self, host: &H, index: usize) {
        let block = index / BLOCK_PAGES as usize;
        self.guest_blocks[block].tracked += 1;
        if self.guest_blocks[block].tracked == 1 {
            let mut next = self.heads().first(Head::Block(block as u32));
            while let Some(id) = next {
                next = self.heads().next(host.tables(), id);
                let raw = host.tables().load(self.pages[id.page()].table, id.index());
                if raw & bits::W != 0 {
                    self.clear(host, id.page(), id.index());
                }
            }
        }
        self.protect(host, index);
    }

    /// Whether the guest page `index` is shadowed both as a table of 4-byte entries and as one of 8-byte ones. Where the
    /// walk sets A and D in the one, it changes numbers in the other, and no tracker hears of it: such shadows are
    /// never taken for in sync.
    pub(crate) fn has_two_formats(&self, index: usize) -> bool {
        let mut seen = 0_u8;
        let mut id = self.guest_pages[index].shadows;
        while id != NIL {
            let page = &self.pages[PageId(id)];
            if page.is_tracked() {
                seen |= if page.role.mode() == Mode::TwoLevel { 1 } else { 2 };
            }
            id = page.chain;
        }
        seen == 3 && !has(Defect::TwoFormatsInSync)
    }

    /// Lets all shadows of the guest page `index` be unsync.
    fn keep_unsync(&mut self, index: usize) {
        let mut next = self.guest_pages[index].shadows;
        while next != NIL {
            let id = PageId(next);
            next = self.pages[id].chain;
            if self.pages[id].is_tracked() && !self.pages[id].is_unsync() {
                self.mark_unsync(id);
            }
        }
    }

    /// The shadow page may be behind its table from here on.
    pub(crate) fn mark_unsync(&mut self, id: PageId) {
        self.pages[id].unsync = self.unsync.len() as u32;
        self.unsync_upper += u32::from(self.pages[id].role.level() > 1);
        self.unsync.push(Unsync { page: id, added: self.clock });
        self.times_unsync += 1;
        self.stats.unsyncs += 1;
    }

    /// Takes write permission from every spte at level 1 that maps the guest page `index`.
    pub(crate) fn protect<H: Host>(&mut self, host: &H, index: usize) {
        let mut next = self.heads().first(Head::Page(index as u32));
        while let Some(id) = next {
            let table = self.pages[id.page()].table;
            let raw = host.tables().load(table, id.index());
            if raw & bits::W != 0 {
                host.tables().store(table, id.index(), raw & !(bits::W | bits::D));
                self.narrowed = true;
            }
            next = self.heads().next(host.tables(), id);
        }
    }

    /// Whether the guest page `index` holds a table whose shadow relies on hearing of every write.
    pub(crate) fn is_tracked(&self, index: usize) -> bool {
        let mut id = self.guest_pages[index].shadows;
        while id != NIL {
            let page = &self.pages[PageId(id)];
            if page.is_tracked() && !page.is_unsync() {
                return true;
            }
            id = page.chain;
        }
        false
    }

    // ---- sptes ----

    /// Empties an spte and takes it off its list.
    pub(crate) fn clear<H: Host>(&mut self, host: &H, page: PageId, index: usize) {
        self.clear_at(host, self.pages.sptes(page), index);
    }

    /// Empties spte `index` of `at` and takes it off its list.
    #[inline]
    pub(crate) fn clear_at<H: Host>(&mut self, host: &H, at: Sptes, index: usize) {
        let Sptes { page, level, table, links } = at;
        let tables = host.tables();
        let old = tables.swap(table, index, EMPTY);
        self.pages[page].clear_present(index);
        match spte::decode(level, old) {
            Spte::Empty | Spte::Mmio => return,
            Spte::Device(_) => {}
            Spte::Leaf(_) if level == 1 => self.heads().remove(tables, links, index, Head::Page),
            Spte::Leaf(_) => self.heads().remove(tables, links, index, Head::Block),
            Spte::Table(_) => {
                self.cut += 1;
                self.heads().remove(tables, links, index, |raw| Head::Parents(PageId(raw)));
            }
        }
        self.narrowed = true;
    }

    /// Maps: writes the leaf `new` for the guest page with dense index `guest_page`.
    pub(crate) fn set_leaf<H: Host>(
        &mut self,
        host: &H,
        page: PageId,
        index: usize,
        guest_page: usize,
        new: u64,
    ) {
        let at = self.pages.sptes(page);
        let old = host.tables().load(at.table, index);
        if spte::same_frame(old, new) {
            if old != new {
                host.tables().store(at.table, index, new);
                self.narrowed |= spte::narrows(old, new);
            }
            return;
        }
        if old != EMPTY {
            self.clear_at(host, at, index);
        }
        self.add_leaf(host, at, index, guest_page, new);
    }

    /// The same where spte `index` of `at` is empty.
    #[inline]
    pub(crate) fn add_leaf<H: Host>(
        &mut self,
        host: &H,
        at: Sptes,
        index: usize,
        guest_page: usize,
        new: u64,
    ) {
        let head = if at.level == 1 {
            Head::Page(guest_page as u32)
        } else {
            Head::Block((guest_page / BLOCK_PAGES as usize) as u32)
        };
        self.heads().insert(host.tables(), at.links, head, SpteId::new(at.page, index));
        self.pages[at.page].set_present(index);
        host.tables().store(at.table, index, new);
    }

    /// Marks a page that is no RAM.
    pub(crate) fn set_mmio<H: Host>(&mut self, host: &H, page: PageId, index: usize) {
        let table = self.pages[page].table;
        if spte::decode(1, host.tables().load(table, index)) != Spte::Mmio {
            self.clear(host, page, index);
            self.pages[page].set_present(index);
            let frame = if has(Defect::FrameNumberInMark) { 0x42 << 12 } else { 0 };
            host.tables().store(table, index, spte::MMIO & !frame);
        }
    }

    /// Maps the page that stands for a device.
    pub(crate) fn set_device<H: Host>(&mut self, host: &H, page: PageId, index: usize, new: u64) {
        let table = self.pages[page].table;
        if host.tables().load(table, index) != new {
            self.clear(host, page, index);
            self.pages[page].set_present(index);
            host.tables().store(table, index, new);
        }
    }

    /// Lets the guest's page `gfn`, which is no RAM, be served by the host page `pfn`: the APIC-access page, whose
    /// accesses the processor recognises. `None`: no page is. A change empties the cache but for the loaded roots,
    /// so that no spte of the old place stays; the frames are free after the flush that follows.
    pub fn set_device_page<H: Host>(&mut self, host: &H, device: Option<(Gfn, Pfn)>) {
        if self.device != device {
            self.device = device;
            self.empty(host);
        }
    }

    /// Points spte `index` of `page` to `child`.
    pub(crate) fn set_table<H: Host>(&mut self, host: &H, page: PageId, index: usize, child: PageId) {
        let at = self.pages.sptes(page);
        if host.tables().load(at.table, index) != EMPTY {
            self.clear_at(host, at, index);
        }
        self.heads().insert(host.tables(), at.links, Head::Parents(child), SpteId::new(page, index));
        self.pages[page].set_present(index);
        let pdpte = at.level == 3 && self.pages[page].role.mode().shadow_is_pae();
        host.tables().store(at.table, index, spte::table(self.pages[child].table, pdpte));
    }

    // ---- what the guest's entries say ----

    /// The index in the guest's table of the entry behind spte `index` of a page with `role`.
    pub(crate) fn guest_index(role: Role, index: usize) -> u64 {
        let index = index as u64;
        let quadrant = u64::from(role.quadrant());
        match (role.mode(), role.level()) {
            (Mode::TwoLevel, 1) => quadrant << 9 | index,
            (Mode::TwoLevel, 2) => quadrant << 8 | index >> 1,
            _ => index,
        }
    }

    /// Whether spte `index` of a page with `role` has a guest entry in memory behind it.
    pub(crate) fn has_entry(role: Role) -> bool {
        !(role.is_direct() || role.level() == 3 && role.mode().shadow_is_pae())
    }

    /// The first guest page that spte `index` maps if the guest's entry behind it is the leaf `gpte`.
    pub(crate) fn leaf_base(&self, role: Role, index: usize, gpte: u64) -> Gfn {
        let base = self.paging_of(role).leaf_gfn(role.level(), gpte);
        // A 4 MiB page of a 32-bit guest fills two sptes at level 2.
        let half = role.mode() == Mode::TwoLevel && role.level() == 2 && index & 1 != 0;
        Gfn(base.0 + if half { BLOCK_PAGES } else { 0 })
    }

    /// Which table spte `index` of `page` must point to, if it points to one, where the guest's entry behind
    /// it is `gpte` (ignored where [`Mmu::has_entry`] is false, but for a PDPTE register).
    pub(crate) fn child_of(&self, page: PageId, index: usize, gpte: u64) -> (Gfn, Role) {
        let (role, gfn) = (self.pages[page].role, self.pages[page].gfn);
        let level = role.level();
        if role.is_direct() {
            let span = 1_u64 << (9 * (level - 1));
            return (Gfn(gfn.0 + index as u64 * span), role.direct_child(role.rights()));
        }
        if level == 3 && role.mode() == Mode::TwoLevel {
            return (gfn, role.child(Rights::ALL).with_quadrant(index as u32));
        }
        let paging = self.paging_of(role);
        if level == 3 && role.mode() == Mode::Pae {
            return (paging.table_gfn(gpte), role.child(Rights::ALL));
        }
        let rights = role.rights().and(Rights::of_entry(gpte));
        if paging.is_leaf(level, gpte) {
            let rights = if gpte & bits::D == 0 { rights.without(Rights::WRITE) } else { rights };
            let child = role.direct_child(rights);
            // Without D and without W are two roles: with CR0.WP = 0 a write is allowed in both, and must set D.
            let child = if gpte & bits::D == 0 { child.clean() } else { child };
            return (self.leaf_base(role, index, gpte), child);
        }
        let quadrant = if role.mode() == Mode::TwoLevel { index as u32 & 1 } else { 0 };
        (paging.table_gfn(gpte), role.child(rights).with_quadrant(quadrant))
    }
}
