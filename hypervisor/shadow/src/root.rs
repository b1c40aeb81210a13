//! Roots: what a vCPU's CR3 really holds, and the TLB tags of the roots that it used lately.
//!
//! A PCID is no part of a root's identity: two PCIDs with one CR3 share the root. A tag remembers the PCID that
//! its root last ran under and when it was left ([`Tag::left`]). Coming back to it with the same PCID and without
//! a flush, what was there when it was left may still show, however stale, because a processor could have cached
//! it under that PCID. What was added later may not: it came into a table that other roots share while another
//! PCID was the current one, and if the guest has changed the entry since, this PCID must see the change.

use memory::{Gfn, Pfn, TableMemory};

use crate::defect::{Defect, has};
use crate::host::Host;
use crate::mmu::Mmu;
use crate::pages::PageId;
use crate::paging::{Mode, Paging, bits};
use crate::role::Role;
use crate::spte::{self, Spte};

/// The gfn of all roots that are no RAM; no slot reaches so far.
const DUMMY: Gfn = Gfn(u64::MAX >> memory::PAGE_SHIFT);

/// Roots whose translations a vCPU keeps apart, each under a tag (VPID) of its own.
pub const TAGS: usize = 8;

#[derive(Clone, Copy, Debug, Default)]
struct Tag {
    /// The root's serial number.
    serial: u32,
    /// The flush generation up to which the tag's translations are good; 0 if they are another root's.
    generation: u64,
    /// When it was last used.
    used: u64,
    /// The PCID that the root last ran under.
    pcid: Option<u16>,
    /// The MMU's clock when the vCPU left the root; what it then showed, a processor may have cached under `pcid`.
    /// 0 if that PCID has been flushed since.
    left: u64,
    /// [`Mmu::times_unsync`] and [`Mmu::additions`] together, when the root last came back without a flush.
    looked: u64,
    /// [`Mmu::times_unsync`] when the root was last found to lead to no unsync page.
    settled: u64,
}

/// In place of when a root was left: the vCPU is on it.
const NEVER_LEFT: u64 = u64::MAX;

/// What a load of a root takes of the translations that the guest may still have cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// Nothing (MOV to CR3 with bit 63).
    Keep,
    /// Those of the PCID that is loaded; without PCIDs, all but global ones (MOV to CR3, a task switch).
    Pcid,
    /// Those of all PCIDs (changes of CR0, CR4, EFER).
    All,
}

/// One vCPU's side of the MMU.
#[derive(Debug)]
pub struct VcpuMmu {
    /// What the guest's control registers say; change it, then call [`Mmu::load_root`].
    pub paging: Paging,
    pub(crate) vcpu: u8,
    pub(crate) root: Option<PageId>,
    table: Pfn,
    tag: usize,
    /// The flush generation up to which the present tag is good; 0, which no generation is, if a flush is due.
    good: u64,
    tags: [Tag; TAGS],
    clock: u64,
    /// The MMU's clock at the last flush that was not of one PCID: tags left before are to be synced when they are
    /// loaded again.
    flushed_all: u64,
}

/// Every frame that the operation can need must be in the stash first; nothing was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Short;

impl VcpuMmu {
    /// The side of vCPU number `vcpu`, with no root yet.
    #[must_use]
    pub fn new(vcpu: u8) -> VcpuMmu {
        VcpuMmu {
            paging: Paging::default(),
            vcpu,
            root: None,
            table: Pfn(0),
            tag: 0,
            good: 0,
            tags: [Tag::default(); TAGS],
            clock: 0,
            flushed_all: 0,
        }
    }

    /// The frame of the root table, for the guest's CR3 field. [`Mmu::load_root`] comes first.
    #[must_use]
    pub fn root_table(&self) -> Pfn {
        self.table
    }

    /// The tag to enter with, 0..[`TAGS`].
    #[must_use]
    pub fn tag(&self) -> usize {
        self.tag
    }

    /// Whether the present tag is good for an entry at flush generation `now` (never 0): one comparison.
    #[inline]
    #[must_use]
    pub fn is_good(&self, now: u64) -> bool {
        self.good == now
    }

    /// The present tag has been flushed at generation `now`.
    pub fn flushed(&mut self, now: u64) {
        self.good = now;
        self.tags[self.tag].generation = now;
    }

    /// All tags must be flushed before their next use: the vCPU moved to another core.
    pub fn forget_tags(&mut self) {
        self.good = 0;
        for tag in &mut self.tags {
            tag.generation = 0;
        }
    }

    fn choose_tag(&mut self, serial: u32, hint: u8) -> u8 {
        self.clock += 1;
        // The hint is of whichever vCPU used the root last.
        let hinted = self.tags.get(usize::from(hint)).is_some_and(|tag| tag.serial == serial);
        let own = || self.tags.iter().position(|tag| tag.serial == serial);
        let slot = match if hinted { Some(usize::from(hint)) } else { own() } {
            Some(slot) => slot,
            None => {
                let (slot, tag) = self
                    .tags
                    .iter_mut()
                    .enumerate()
                    .min_by_key(|(_, tag)| tag.used)
                    .unwrap_or_else(|| unreachable!());
                let generation = if has(Defect::TagKeptForAnotherRoot) { tag.generation } else { 0 };
                *tag = Tag { serial, generation, ..Tag::default() };
                slot
            }
        };
        self.tags[slot].used = self.clock;
        self.tag = slot;
        self.good = self.tags[slot].generation;
        slot as u8
    }

    /// The MMU's clock up to which all that the present tag's root shows may have been cached under `pcid`; 0 if
    /// nothing may.
    fn kept(&self, pcid: Option<u16>) -> u64 {
        let tag = &self.tags[self.tag];
        let same = tag.pcid == pcid || has(Defect::PcidIgnored);
        if pcid.is_some() && same && tag.left > self.flushed_all { tag.left } else { 0 }
    }

    /// A flush of `pcid`: the other roots that ran under it may show nothing stale when they are loaded again.
    pub(crate) fn forget_pcid(&mut self, pcid: u16) {
        for (slot, tag) in self.tags.iter_mut().enumerate() {
            if slot != self.tag && tag.pcid == Some(pcid) && !has(Defect::OtherRootsKept) {
                tag.left = 0;
            }
        }
    }

    /// A flush at `clock` of more than one PCID, or of global translations: the same for all other roots.
    pub(crate) fn forget_all(&mut self, clock: u64) {
        self.flushed_all = clock;
    }
}

impl Mmu {
    /// Finds or makes the root for `cpu.paging`, and syncs what it leads to as far as `flush` and the tag say: the
    /// reaction to a CR3 write and to every change of the paging mode.
    ///
    /// # Errors
    /// [`Short`] if a root had to be made and the stash could not back it: it has too few frames, or, for a PAE
    /// format, none below 4 GiB.
    pub fn load_root<H: Host>(&mut self, host: &H, cpu: &mut VcpuMmu, flush: Flush) -> Result<(), Short> {
        let gfn = match cpu.paging.root_gfn() {
            // Roots that are no RAM all translate nothing: one stands for all (H20).
            gfn if cpu.paging.mode != Mode::Off && host.slots().index(gfn).is_none() => DUMMY,
            gfn => gfn,
        };
        let role = Role::root(&cpu.paging, cpu.vcpu);
        let pcid = cpu.paging.pcid;
        let (root, kept) = match cpu.root {
            Some(root) if self.pages[root].gfn == gfn && self.pages[root].role == role => {
                // It was never left: all that it shows may have been cached.
                let same = cpu.tags[cpu.tag].pcid == pcid;
                (root, if same { NEVER_LEFT } else { 0 })
            }
            _ => {
                let root = match self.find(host, gfn, role) {
                    Some(root) => root,
                    None if self.is_ready() => self.make(host, gfn, role).ok_or(Short)?,
                    None => return Err(Short),
                };
                if cpu.root.is_some() {
                    cpu.tags[cpu.tag].left = self.tick();
                }
                self.drop_root(cpu);
                let page = &mut self.pages[root];
                page.roots += u32::from(!has(Defect::RootNotCounted));
                let (serial, hint) = (page.serial, page.tag);
                cpu.root = Some(root);
                let tag = cpu.choose_tag(serial, hint);
                if tag != hint {
                    self.pages[root].tag = tag;
                }
                self.pages.touch(root);
                (root, cpu.kept(pcid))
            }
        };
        cpu.tags[cpu.tag].pcid = pcid;
        match (flush, pcid) {
            (Flush::Pcid, Some(pcid)) => cpu.forget_pcid(pcid),
            (Flush::All, _) => cpu.forget_all(self.tick()),
            (Flush::Keep, _) | (Flush::Pcid, None) => {}
        }
        cpu.table = self.pages[root].table;
        if cpu.paging.mode == Mode::Pae && !has(Defect::StalePdpte) {
            self.load_pdptes(host, cpu, root);
        }
        self.stats.root_loads += 1;
        // Unsync pages of other roots wait for these: this one has looked at them before.
        let tag = &mut cpu.tags[cpu.tag];
        if !self.unsync.is_empty() && tag.settled != self.times_unsync {
            let (times_unsync, additions) = (self.times_unsync, self.additions);
            if flush != Flush::Keep || kept == 0 {
                tag.settled = times_unsync;
                self.sync_since(host, root, 0);
            } else if kept != NEVER_LEFT && tag.looked != times_unsync + additions {
                // What it then left as it was, it may still show: nothing has been added to it since.
                tag.looked = times_unsync + additions;
                self.sync_since(host, root, kept);
            }
        }
        self.publish(host);
        Ok(())
    }

    /// The time now; what is added to a table from here on is added later.
    pub(crate) fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock - 1
    }

    /// The vCPU runs on no root any more.
    pub fn drop_root(&mut self, cpu: &mut VcpuMmu) {
        if let Some(old) = cpu.root.take() {
            self.pages[old].roots -= u32::from(!has(Defect::RootNotCounted));
        }
    }

    /// Removes the links of a PAE root that the PDPTE registers no longer justify (H17).
    fn load_pdptes<H: Host>(&mut self, host: &H, cpu: &VcpuMmu, root: PageId) {
        for (index, &pdpte) in cpu.paging.pdptes.iter().enumerate() {
            let raw = host.tables().load(self.pages[root].table, index);
            let Spte::Table(table) = spte::decode(3, raw) else { continue };
            let (gfn, role) = self.child_of(root, index, pdpte);
            let child = self.find(host, gfn, role).filter(|_| pdpte & bits::P != 0);
            if child.is_none_or(|child| self.pages[child].table != table) {
                self.clear(host, root, index);
            }
        }
    }
}
