//! The reaction to a page fault that is not the guest's own: make the translation that it asks for.

use memory::{BLOCK_PAGES, Gfn, Gpa, Gva, TableMemory};

use crate::defect::{Defect, has};
use crate::host::Host;
use crate::leaf::GROUP;
use crate::link::NIL;
use crate::mmu::{FRAMES_PER_OPERATION, Mmu, PAGES_PER_OPERATION};
use crate::pages::{PageId, Sptes};
use crate::paging::{Mode, Rights, bits};
use crate::role::Role;
use crate::root::VcpuMmu;
use crate::spte;
use crate::walk::{self, Access, Kind, Walk};

/// How many sptes are looked at when one of them faults (an aligned group): [`GROUP`] of a guest's leaf table, so many
/// of a piece of a large page, where no guest entry has to be read.
const PREFILL_DIRECT: usize = 32;

/// What a fill came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// The translation is there: run the instruction again.
    Filled,
    /// The address is no RAM: emulate the access.
    Mmio(Gpa),
    /// The guest's tables changed under the walk: fault again.
    Changed,
    /// A write that CR0.WP = 0 permits but no spte can express under SMAP: emulate it.
    EmulateWrite(Gpa),
    /// Nothing was done: bring the stash to [`FRAMES_PER_OPERATION`] and leave room for
    /// [`PAGES_PER_OPERATION`] pages, then try again.
    Short,
}

/// One step of the way from the root: the page, and whether it was there before.
#[derive(Clone, Copy)]
struct Down {
    child: PageId,
    found: bool,
}

impl Mmu {
    /// Whether an operation may begin: every frame that it can need is there.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.stash.len() >= FRAMES_PER_OPERATION - if has(Defect::TooFewReserved) { 4 } else { 0 }
            && self.pages_left() >= PAGES_PER_OPERATION
    }

    /// Makes the translation of `gva` for `access`, which `walk` found permitted.
    pub fn fill<H: Host>(&mut self, host: &H, cpu: &VcpuMmu, gva: Gva, access: Access, walk: &Walk) -> Fill {
        let Some(root) = cpu.root.filter(|_| self.is_ready()) else {
            return Fill::Short;
        };
        let backing = host.slots().page(walk.gfn);
        let guest_page = backing.map(|(index, _)| index);
        let device = self.device.filter(|&(gfn, _)| gfn == walk.gfn && guest_page.is_none());
        if guest_page.is_none() && device.is_none() && !self.config.mark_mmio {
            return Fill::Mmio(Gpa(walk.gfn.address().0 | gva.offset()));
        }
        let write = access.kind == Kind::Write;
        let mut rights = if walk.dirty { walk.rights } else { walk.rights.without(Rights::WRITE) };
        if write && guest_page.is_some() && !rights.has(Rights::WRITE) {
            // CR0.WP = 0: a supervisor's write to a read-only page. A user page loses U meanwhile, so that
            // no user write slips through, and is then not to be fetched from under SMEP either.
            if rights.has(Rights::USER) {
                if cpu.paging.smap {
                    return Fill::EmulateWrite(Gpa(walk.gfn.address().0 | gva.offset()));
                }
                if !has(Defect::UserKeepsPage) {
                    rights = rights.without(Rights::USER);
                }
                if cpu.paging.smep {
                    rights = rights.without(Rights::EXECUTE);
                }
            }
            rights = Rights::from_bits(rights.bits() | Rights::WRITE.bits());
        }

        let block = guest_page.and_then(|index| {
            let tracked =
                self.guest_blocks[index / BLOCK_PAGES as usize].tracked > 0 && !has(Defect::LargeOverTable);
            let large = walk.level >= 2
                && rights == walk.rights.and(rights)
                && !(tracked && rights.has(Rights::WRITE))
                // A fetch from a page that may not be large and executable wants the small ones.
                && !(self.config.split_executable && access.kind == Kind::Fetch);
            if large { host.slots().block(walk.gfn) } else { None }
        });
        let target = if block.is_some() { 2 } else { 1 };

        let cut = self.cut;
        let known = if target == 1 { self.on_trail(root, gva, walk) } else { None };
        let (mut page, mut target) = match known {
            Some(leaf) => (leaf, 1),
            None => match self.descend(host, cpu, root, gva, walk, target) {
                Ok(down) => down,
                Err(outcome) => return outcome,
            },
        };
        let mut block = block.filter(|_| target == 2);
        if let (Some(index), Some(_)) = (guest_page, block)
            && rights.has(Rights::WRITE)
            && self.guest_blocks[index / BLOCK_PAGES as usize].tracked > 0
            && !has(Defect::LargeOverTable)
        {
            // The way down made shadows of tables that lie inside this very block.
            (page, target) = match self.descend(host, cpu, root, gva, walk, 1) {
                Ok(down) => down,
                Err(outcome) => return outcome,
            };
            block = None;
        }
        if self.config.vcpus > 1 && !Self::unchanged(host, cpu, gva, walk) {
            self.publish(host);
            return Fill::Changed;
        }
        if target == 1 && known.is_none() {
            self.leave_trail(cut, root, gva, walk, page);
        }
        let index = shadow_index(target, gva);
        let outcome = match (guest_page, block) {
            (None, _) if let Some((_, pfn)) = device => {
                if access.kind == Kind::Fetch || write && !rights.has(Rights::WRITE) {
                    // No code is there; and CR0.WP = 0 is not worth an spte.
                    Fill::Mmio(Gpa(walk.gfn.address().0 | gva.offset()))
                } else {
                    let rights = rights.without(Rights::EXECUTE);
                    self.set_device(host, page, index, spte::device(pfn, rights));
                    Fill::Filled
                }
            }
            (None, _) => {
                self.set_mmio(host, page, index);
                Fill::Mmio(Gpa(walk.gfn.address().0 | gva.offset()))
            }
            (Some(guest_page), Some(block)) => {
                if self.config.split_executable && !has(Defect::LargeExecutable) {
                    rights = rights.without(Rights::EXECUTE);
                }
                self.set_leaf(host, page, index, guest_page, spte::leaf(block, 2, rights));
                Fill::Filled
            }
            (Some(guest_page), None) => {
                if rights.has(Rights::WRITE) && self.is_tracked(guest_page) {
                    if write && !has(Defect::WritableWithoutMark) {
                        self.let_unsync(host, guest_page);
                    } else if !write {
                        rights = rights.without(Rights::WRITE);
                    }
                }
                if let Some((_, pfn)) = backing {
                    self.set_leaf(host, page, index, guest_page, spte::leaf(pfn, 1, rights));
                }
                self.prefill(host, page, index);
                Fill::Filled
            }
        };
        self.note_addition(page);
        self.stats.fills += 1;
        self.publish(host);
        outcome
    }

    /// From the root down to the shadow page at level `target`: makes what is missing, links it, and replaces
    /// links that the guest's entries no longer justify. Returns the page and its level, which is 1 where a large
    /// page that may not be executable has been split for a fetch: it stays split.
    fn descend<H: Host>(
        &mut self,
        host: &H,
        cpu: &VcpuMmu,
        root: PageId,
        gva: Gva,
        walk: &Walk,
        mut target: u8,
    ) -> Result<(PageId, u8), Fill> {
        let mut page = root;
        let mut role = self.pages[page].role;
        let mut level = role.level();
        while level > target {
            let index = shadow_index(level, gva);
            let (gfn, child_role) = self.next_down(page, role, index, level, walk);
            let first = self.first_child(host, page, index, level);
            let linked = first.filter(|&child| self.pages[child].is(gfn, child_role)).or_else(|| {
                self.find(host, gfn, child_role).filter(|&child| self.leads_to(host, page, index, child))
            });
            page = match linked {
                Some(child) => child,
                None => return self.way_down(host, cpu, gva, walk, page, target),
            };
            role = child_role;
            level -= 1;
            if level == 2 && target == 2 && self.is_split(host, page, gva) {
                target = 1;
            }
        }
        Ok((page, target))
    }

    /// The page that spte `index` of `page` points to, where the links tell: it is first in that page's list of parents.
    /// Most tables have one parent, so most of the way down to what is there needs no search.
    #[inline]
    fn first_child<H: Host>(&self, host: &H, page: PageId, index: usize, level: u8) -> Option<PageId> {
        let at = &self.pages[page];
        match spte::decode(level, host.tables().load(at.table, index)) {
            spte::Spte::Table(_) => crate::link::named_head(host.tables(), at.links, index).map(PageId),
            _ => None,
        }
    }

    /// The way from `top` down where a link is missing: makes what is missing, and links it. All tables are made before
    /// the first link, so that one shoot-down shuts the other cores out of all of them.
    #[inline(never)]
    fn way_down<H: Host>(
        &mut self,
        host: &H,
        cpu: &VcpuMmu,
        gva: Gva,
        walk: &Walk,
        top: PageId,
        mut target: u8,
    ) -> Result<(PageId, u8), Fill> {
        let mut steps = [Down { child: top, found: true }; PAGES_PER_OPERATION as usize];
        let mut count = 0;
        let mut page = top;
        let mut level = self.pages[top].role.level();
        while level > target {
            let index = shadow_index(level, gva);
            let (gfn, role) = self.next_down(page, self.pages[page].role, index, level, walk);
            let found = self.find(host, gfn, role);
            let Some(child) = found.or_else(|| self.make(host, gfn, role)) else {
                // Ruled out by what was reserved.
                self.unpin(&steps[..count]);
                return Err(Fill::Short);
            };
            // Nothing may take it for an orphan while it has no parent yet.
            self.pages[child].roots += 1;
            steps[count] = Down { child, found: found.is_some() };
            count += 1;
            page = child;
            level -= 1;
            if level == 2 && target == 2 && self.is_split(host, page, gva) {
                target = 1;
            }
        }
        self.shut_out(host);
        let outcome = self.link(host, cpu, gva, walk, top, &steps[..count]);
        self.unpin(&steps[..count]);
        outcome.map(|()| (page, target))
    }

    fn unpin(&mut self, steps: &[Down]) {
        for down in steps {
            self.pages[down.child].roots -= 1;
        }
    }

    /// Whether spte `index` of `page` points to `child`.
    fn leads_to<H: Host>(&self, host: &H, page: PageId, index: usize, child: PageId) -> bool {
        let raw = host.tables().load(self.pages[page].table, index);
        spte::decode(self.pages[page].role.level(), raw) == spte::Spte::Table(self.pages[child].table)
    }

    /// Whether an executable large page at `gva` has been split: it stays so.
    fn is_split<H: Host>(&self, host: &H, page: PageId, gva: Gva) -> bool {
        self.config.split_executable && {
            let raw = host.tables().load(self.pages[page].table, shadow_index(2, gva));
            matches!(spte::decode(2, raw), spte::Spte::Table(_))
        }
    }

    /// Links the pages of `steps` to each other, the first one to `top`, as the guest's entries say now.
    fn link<H: Host>(
        &mut self,
        host: &H,
        cpu: &VcpuMmu,
        gva: Gva,
        walk: &Walk,
        top: PageId,
        steps: &[Down],
    ) -> Result<(), Fill> {
        let mut page = top;
        for &Down { child, found } in steps {
            let role = self.pages[page].role;
            let index = shadow_index(role.level(), gva);
            if !self.leads_to(host, page, index, child) {
                // What was last looked at under another parent, or none, may be behind, and so may anything that
                // hangs below it (H2).
                if found && !self.unsync.is_empty() && !has(Defect::UnsyncTableLinked) {
                    self.sync_from(host, child);
                }
                // The table is tracked, and shut to the other cores: what its entry says holds until we hear of a
                // change (H3).
                if self.config.vcpus > 1
                    && Self::has_entry(role)
                    && !Self::entry_unchanged(host, cpu, gva, walk, role.level())
                {
                    self.publish(host);
                    return Err(Fill::Changed);
                }
                self.set_table(host, page, index, child);
                self.note_addition(page);
                self.pages.touch(child);
            }
            page = child;
        }
        Ok(())
    }

    /// Which table spte `index` of `page` with `role` at `level` must point to on the way of `walk`: what [`Mmu::child_of`]
    /// says, without looking at the guest's entry again where the walk has followed it.
    #[inline]
    fn next_down(&self, page: PageId, role: Role, index: usize, level: u8, walk: &Walk) -> (Gfn, Role) {
        if !Self::has_entry(role) || level <= walk.level {
            return self.child_of(page, index, walk.entry(level));
        }
        let quadrant = if role.mode() == Mode::TwoLevel { index as u32 & 1 } else { 0 };
        let gfn = self.paging_of(role).table_gfn(walk.entry(level));
        (gfn, role.child(walk.inherited(level - 1)).with_quadrant(quadrant))
    }

    /// Whether every guest entry that `walk` used still says the same.
    fn unchanged<H: Host>(host: &H, cpu: &VcpuMmu, gva: Gva, walk: &Walk) -> bool {
        let top = Self::top_level(cpu);
        (walk.level..=top).all(|level| Self::entry_unchanged(host, cpu, gva, walk, level))
    }

    /// The highest level whose entries lie in the guest's memory; 0 with paging off.
    fn top_level(cpu: &VcpuMmu) -> u8 {
        match cpu.paging.mode {
            Mode::Off => 0,
            Mode::TwoLevel | Mode::Pae => 2,
            Mode::FourLevel => 4,
            Mode::FiveLevel => 5,
        }
    }

    /// Whether the guest's entry at `level` that `walk` used still says the same, A and D apart. Asked after its
    /// table is tracked and shut to the other cores: a change from here on is heard of, or may stay unheard until
    /// a flush (H3).
    fn entry_unchanged<H: Host>(host: &H, cpu: &VcpuMmu, gva: Gva, walk: &Walk, level: u8) -> bool {
        if has(Defect::WalkTrusted) {
            return true;
        }
        let top = Self::top_level(cpu);
        let index = cpu.paging.guest_index(level, gva);
        let table = if level == top && cpu.paging.mode != Mode::Pae {
            cpu.paging.root_gfn()
        } else {
            cpu.paging.table_gfn(walk.entry(level + 1))
        };
        let now = walk::load_entry(&cpu.paging, host.guest(), table, index);
        let then = walk.entry(level);
        // A and D may have been set meanwhile, but not cleared; D counts in the leaf alone.
        let cleared = then & !now & if level == walk.level { bits::A | bits::D } else { bits::A };
        (now ^ then) & !(bits::A | bits::D) == 0 && cleared == 0
    }

    /// The guest is about to write a page that holds shadowed tables: lets their shadows fall behind until the
    /// next flush. Shadows that nothing leads to any more are removed instead.
    pub(crate) fn let_unsync<H: Host>(&mut self, host: &H, guest_page: usize) {
        let mut next = self.guest_pages[guest_page].shadows;
        while next != NIL {
            let id = PageId(next);
            let page = &self.pages[id];
            next = page.chain;
            if !page.is_tracked() || page.is_unsync() {
                continue;
            }
            if page.parents == NIL && page.roots == 0 && !page.role.is_root() {
                self.zap(host, id);
                continue;
            }
            self.mark_unsync(id);
            if has(Defect::OneShadowUnsync) {
                break;
            }
        }
    }

    /// Someone other than the guest's processors (a device, the emulator) is about to write `gfn`: the same
    /// tracker hears of it (H16).
    pub fn before_write<H: Host>(&mut self, host: &H, gfn: Gfn) {
        if let Some(index) = host.slots().index(gfn)
            && self.guest_pages[index].shadows != NIL
            && !has(Defect::DeviceWriteUnheard)
        {
            self.let_unsync(host, index);
            self.publish(host);
        }
    }

    /// Fills the neighbours of a leaf that the guest's entries already show as used. Never makes a tracked
    /// page writable.
    fn prefill<H: Host>(&mut self, host: &H, id: PageId, at: usize) {
        let page = &self.pages[id];
        let (role, gfn) = (page.role, page.gfn);
        if role.is_direct() {
            let first = at & !(PREFILL_DIRECT - 1);
            let (absent, at) = (page.absent(first, PREFILL_DIRECT), self.pages.sptes(id));
            for index in each_bit(absent).map(|bit| first + bit) {
                self.prefill_one(host, at, index, Gfn(gfn.0 + index as u64), role.rights());
            }
            return;
        }
        let first = at & !(GROUP - 1);
        let absent = page.absent(first, GROUP);
        if absent == 0 {
            return;
        }
        let leaf = self.leaf_table(id);
        let gptes = leaf.entries(host.guest(), first);
        // Most entries are of no use: which are, is found without a branch for each.
        let used = gptes.iter().rev().fold(0, |set, gpte| set << 1 | gpte & gpte >> 5 & bits::P);
        for bit in each_bit(used & absent) {
            if let Some((target, rights)) = leaf.cacheable(gptes[bit % GROUP]) {
                self.prefill_one(host, leaf.at, first + bit, target, rights);
            }
        }
    }

    /// Maps `target` by the empty spte `index` of `at`, with `rights` as far as its page may be written.
    #[inline]
    fn prefill_one<H: Host>(&mut self, host: &H, at: Sptes, index: usize, target: Gfn, rights: Rights) {
        let Some((guest_page, pfn)) = host.slots().page(target) else { return };
        let rights =
            if has(Defect::PrefillIgnoresTracker) { rights } else { self.tracked_rights(guest_page, rights) };
        self.add_leaf(host, at, index, guest_page, spte::leaf(pfn, 1, rights));
        self.stats.prefills += 1;
    }
}

/// The numbers of the bits that are set, ascending.
fn each_bit(mut set: u64) -> impl Iterator<Item = usize> {
    core::iter::from_fn(move || {
        let bit = set.trailing_zeros() as usize;
        set &= set.wrapping_sub(1);
        (bit < 64).then_some(bit)
    })
}

/// The index of the spte for `gva` at shadow level `level`.
pub(crate) fn shadow_index(level: u8, gva: Gva) -> usize {
    (gva.0 >> (12 + 9 * (u32::from(level) - 1)) & 511) as usize
}
