//! The model's processor: walks the shadow tables as hardware does, and remembers what it found under the tag it
//! runs with until that tag is flushed or the address faults.
//!
//! It keeps translations and, as paging-structure caches do, where the tables of every level lie. It always uses what
//! it remembers, so a flush that is missing shows; and it may walk any address at any time on its own account.

use std::vec::Vec;

use memory::{Gva, Pfn};

use super::reference::{Attempt, Controls, Path, permitted};
use super::surroundings::VCPUS_MAX;
use crate::TAGS;
use crate::paging::bits;

/// The physical-address width of the model's processor, in bits: that of real ones with VMX and no EPT.
const PHYSICAL_ADDRESS_BITS: u32 = 40;
/// Entries of each cache: the oldest goes.
const ENTRIES: usize = 96;

/// What a processor runs a guest with: what the VMCS told it at the entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    pub vcpu: u8,
    pub tag: usize,
    /// The root table.
    pub root: Pfn,
    /// The level of the root: 3 stands for PAE paging.
    pub levels: u8,
    pub smep: bool,
    pub smap: bool,
}

impl Context {
    /// CR0.WP and EFER.NXE are on whatever the guest says.
    pub fn controls(&self) -> Controls {
        Controls { wp: true, xd: true, smep: self.smep, smap: self.smap }
    }
}

/// Something remembered: a translation (level 0), or where the table of a level lies.
#[derive(Clone, Copy, Debug)]
pub struct Cached {
    /// 0: `frame` holds the page; else it holds the table of this level.
    pub level: u8,
    /// The linear address without what the level translates.
    pub prefix: u64,
    pub frame: Pfn,
    pub path: Path,
}

/// What is remembered under one tag.
#[derive(Default)]
struct Tlb(Vec<Cached>);

/// log2 of the bytes that the table of `level` translates; level 0: a page.
const fn reach_shift(level: u8) -> u32 {
    12 + 9 * level as u32
}

impl Tlb {
    fn find(&self, level: u8, gva: Gva) -> Option<Cached> {
        let prefix = gva.0 >> reach_shift(level);
        self.0.iter().copied().find(|cached| cached.level == level && cached.prefix == prefix)
    }

    fn note(&mut self, level: u8, gva: Gva, frame: Pfn, path: Path) {
        self.forget(level, gva);
        if self.0.len() == ENTRIES {
            self.0.remove(0);
        }
        self.0.push(Cached { level, prefix: gva.0 >> reach_shift(level), frame, path });
    }

    fn forget(&mut self, level: u8, gva: Gva) {
        let prefix = gva.0 >> reach_shift(level);
        self.0.retain(|cached| cached.level != level || cached.prefix != prefix);
    }
}

/// The TLBs of all vCPUs, by vCPU and tag. (A vCPU stays on its core, so each has its own.)
pub struct Processor {
    tlbs: Vec<Tlb>,
}

impl Default for Processor {
    fn default() -> Processor {
        Processor { tlbs: (0..VCPUS_MAX * TAGS).map(|_| Tlb::default()).collect() }
    }
}

/// Tables that a processor walks.
pub trait Walked {
    /// The processor reads an entry.
    fn read(&self, pfn: Pfn, index: usize) -> u64;
    /// The processor sets A in an entry that it found present.
    fn set_accessed(&self, pfn: Pfn, index: usize);
}

/// The shadow holds no translation for the access: #PF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Miss;

impl Processor {
    fn tlb(&mut self, vcpu: u8, tag: usize) -> &mut Tlb {
        &mut self.tlbs[usize::from(vcpu) * TAGS + tag]
    }

    /// INVVPID, single context.
    pub fn flush(&mut self, vcpu: u8, tag: usize) {
        self.tlb(vcpu, tag).0.clear();
    }

    /// What is remembered under one tag.
    pub fn remembered(&self, vcpu: u8, tag: usize) -> &[Cached] {
        &self.tlbs[usize::from(vcpu) * TAGS + tag].0
    }

    /// Translates `gva` for an access.
    pub fn translate(
        &mut self,
        frames: &impl Walked,
        context: &Context,
        gva: Gva,
        attempt: Attempt,
    ) -> Result<Pfn, Miss> {
        let tlb = self.tlb(context.vcpu, context.tag);
        if let Some(cached) = tlb.find(0, gva) {
            if permitted(context.controls(), cached.path, attempt) {
                return Ok(cached.frame);
            }
            tlb.forget(0, gva);
        }
        let found = tlb.walk(frames, context, gva).filter(|&(_, path)| {
            // A translation that does not permit the access is not used, and not kept.
            permitted(context.controls(), path, attempt)
        });
        let Some((frame, path)) = found else {
            // A page fault drops what is cached for its address (SDM Vol. 3, "Operations that Invalidate TLBs and
            // Paging-Structure Caches").
            for level in 0..5 {
                tlb.forget(level, gva);
            }
            return Err(Miss);
        };
        tlb.note(0, gva, frame, path);
        Ok(frame)
    }

    /// Walks `gva` without being asked to, and remembers what it finds (SDM Vol. 3, "Details of TLB Use": "the processor may
    /// cache translations for prefetches and for accesses that are a result of speculative execution").
    pub fn speculate(&mut self, frames: &impl Walked, context: &Context, gva: Gva) {
        let tlb = self.tlb(context.vcpu, context.tag);
        if tlb.find(0, gva).is_none()
            && let Some((frame, path)) = tlb.walk(frames, context, gva)
        {
            tlb.note(0, gva, frame, path);
        }
    }
}

impl Tlb {
    /// Walks from the lowest table that is remembered, or from the root.
    fn walk(&mut self, frames: &impl Walked, context: &Context, gva: Gva) -> Option<(Pfn, Path)> {
        let pae = context.levels == 3;
        let (mut level, mut table, mut path) = (1..context.levels)
            .find_map(|level| self.find(level, gva).map(|cached| (level, cached.frame, cached.path)))
            .unwrap_or((context.levels, context.root, Path::OPEN));
        loop {
            let index = (gva.0 >> reach_shift(level - 1) & 511) as usize;
            if pae && level == 3 && index > 3 {
                return None; // no linear address reaches so far
            }
            let raw = frames.read(table, index);
            if raw & bits::P == 0 || raw & bits::FRAME & !((1 << PHYSICAL_ADDRESS_BITS) - 1) != 0 {
                return None;
            }
            let frame = Pfn((raw & bits::FRAME) >> 12);
            let leaf = level == 1 || raw & bits::PS != 0;
            if pae && level == 3 {
                // A PDPTE register: with a reserved bit the VM entry would fail.
                assert_eq!(raw & 0x8000_0000_0000_01e6, 0, "PDPTE {raw:#x}");
                assert!(table.0 < 1 << 20, "a PAE root lies below 4 GiB");
            } else {
                path = path.through(raw);
                assert_eq!(raw & (1 << 8), 0, "never global");
            }
            if leaf {
                assert!(raw & bits::A != 0, "a leaf has A set before anyone uses it");
                assert!(raw & bits::W == 0 || raw & bits::D != 0, "what may be written has D set");
                return match level {
                    1 => Some((frame, path)),
                    2 => Some((Pfn(frame.0 | gva.0 >> 12 & 511), path)),
                    _ => panic!("a leaf at level {level}"),
                };
            }
            if !(pae && level == 3) {
                frames.set_accessed(table, index);
            }
            level -= 1;
            table = frame;
            self.note(level, gva, table, path);
        }
    }
}
