//! Roots: what a vCPU's CR3 really holds, and the TLB tags of the roots that it used lately.

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
        let slot = match self.tags.get(usize::from(hint)) {
            Some(tag) if tag.serial == serial => usize::from(hint),
            _ => {
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
}

impl Mmu {
    /// Finds or makes the root for `cpu.paging`, and syncs what it leads to: the reaction to a CR3 write and to
    /// every change of the paging mode.
    ///
    /// # Errors
    /// [`Short`] if a root had to be made and the stash could not back it: it has too few frames, or, for a PAE
    /// format, none below 4 GiB.
    pub fn load_root<H: Host>(&mut self, host: &H, cpu: &mut VcpuMmu) -> Result<(), Short> {
        let gfn = match cpu.paging.root_gfn() {
            // Roots that are no RAM all translate nothing: one stands for all (H20).
            gfn if cpu.paging.mode != Mode::Off && host.slots().index(gfn).is_none() => DUMMY,
            gfn => gfn,
        };
        let role = Role::root(&cpu.paging, cpu.vcpu);
        let root = match cpu.root {
            Some(root) if self.pages[root].gfn == gfn && self.pages[root].role == role => root,
            _ => {
                let root = match self.find(host, gfn, role) {
                    Some(root) => root,
                    None if self.is_ready() => self.make(host, gfn, role).ok_or(Short)?,
                    None => return Err(Short),
                };
                self.drop_root(cpu);
                self.pages[root].roots += u32::from(!has(Defect::RootNotCounted));
                self.pages.touch(root);
                cpu.root = Some(root);
                let hint = self.pages[root].tag;
                let tag = cpu.choose_tag(self.pages[root].serial, hint);
                self.pages[root].tag = tag;
                root
            }
        };
        cpu.table = self.pages[root].table;
        if cpu.paging.mode == Mode::Pae && !has(Defect::StalePdpte) {
            self.load_pdptes(host, cpu, root);
        }
        self.stats.root_loads += 1;
        if !self.unsync.is_empty() {
            self.sync_from(host, root);
        }
        self.publish(host);
        Ok(())
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
