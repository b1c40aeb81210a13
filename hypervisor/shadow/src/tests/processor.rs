//! The model's processor: walks the shadow tables as hardware does, and remembers what it found under the tag
//! it runs with until that tag is flushed or the address faults.
//!
//! It keeps leaf translations and, like a paging-structure cache, where the leaf tables lie. It always uses what
//! it remembers, so a flush that is missing shows.

use std::collections::HashMap;

use memory::{Gva, Pfn, TableMemory};

use super::architecture::{Controls, Path, permitted};
use super::surroundings::Frames;
use crate::paging::bits;
use crate::{Access, Mode, Paging};

/// The physical-address width of the model's processor, in bits: that of real ones with VMX and no EPT.
const PHYSICAL_ADDRESS_BITS: u32 = 40;

/// The translations of one tag.
#[derive(Default)]
struct Tlb {
    /// By virtual page: the frame, and what the path to it permits.
    pages: HashMap<u64, (Pfn, Path)>,
    /// By 2 MiB of virtual addresses: the leaf table.
    leaf_tables: HashMap<u64, (Pfn, Path)>,
}

/// The TLBs of all vCPUs, by vCPU and tag.
#[derive(Default)]
pub struct Processor {
    tlbs: HashMap<(u8, usize), Tlb>,
}

/// The shadow holds no translation for the access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Miss;

impl Processor {
    /// INVVPID, all contexts of one tag of one vCPU.
    pub fn flush(&mut self, vcpu: u8, tag: usize) {
        self.tlbs.remove(&(vcpu, tag));
    }

    /// Translates `gva` for `access` with the tables at `root`.
    pub fn translate(
        &mut self,
        frames: &Frames,
        (vcpu, tag): (u8, usize),
        root: Pfn,
        paging: &Paging,
        gva: Gva,
        access: Access,
    ) -> Result<Pfn, Miss> {
        let tlb = self.tlbs.entry((vcpu, tag)).or_default();
        let found = tlb.walk(frames, root, paging, gva, access);
        if found.is_err() {
            // A page fault drops what is cached for its address (SDM Vol. 3, "Operations that Invalidate TLBs and
            // Paging-Structure Caches").
            tlb.pages.remove(&(gva.0 >> 12));
            tlb.leaf_tables.remove(&(gva.0 >> 21));
        }
        found
    }
}

impl Tlb {
    fn walk(
        &mut self,
        frames: &Frames,
        root: Pfn,
        paging: &Paging,
        gva: Gva,
        access: Access,
    ) -> Result<Pfn, Miss> {
        let off = paging.mode == Mode::Off;
        let controls = Controls { wp: true, xd: true, smep: paging.smep && !off, smap: paging.smap && !off };
        if let Some(&(pfn, path)) = self.pages.get(&(gva.0 >> 12)) {
            if permitted(controls, path, access) {
                return Ok(pfn);
            }
            self.pages.remove(&(gva.0 >> 12));
        }
        let (mut level, mut table, mut path) = match self.leaf_tables.get(&(gva.0 >> 21)) {
            Some(&(table, path)) => (1, table, path),
            None => (paging.mode.root_level(), root, Path::OPEN),
        };
        loop {
            let index = (gva.0 >> (12 + 9 * (u32::from(level) - 1)) & 511) as usize;
            let raw = frames.load(table, index);
            if raw & bits::P == 0 {
                return Err(Miss);
            }
            if raw & bits::FRAME & !((1 << PHYSICAL_ADDRESS_BITS) - 1) != 0 {
                return Err(Miss);
            }
            let frame = Pfn((raw & bits::FRAME) >> 12);
            let leaf = level == 1 || raw & bits::PS != 0;
            if paging.mode.shadow_is_pae() && level == 3 {
                // A PDPTE register: with a reserved bit the VM entry would fail.
                assert_eq!(raw & 0x8000_0000_0000_01e6, 0, "PDPTE {raw:#x}");
                assert!(table.0 < 1 << 20, "a PAE root lies below 4 GiB");
            } else {
                path = path.through(raw);
                assert_eq!(raw & (1 << 8), 0, "never global");
            }
            if leaf {
                if !permitted(controls, path, access) {
                    return Err(Miss);
                }
                assert!(raw & bits::A != 0, "a leaf has A set before anyone uses it");
                let pfn = match level {
                    1 => frame,
                    2 => Pfn(frame.0 | gva.0 >> 12 & 511),
                    _ => panic!("a leaf at level {level}"),
                };
                self.pages.insert(gva.0 >> 12, (pfn, path));
                return Ok(pfn);
            }
            if !(paging.mode.shadow_is_pae() && level == 3) {
                frames.store(table, index, raw | bits::A);
            }
            if level == 2 {
                self.leaf_tables.insert(gva.0 >> 21, (frame, path));
            }
            table = frame;
            level -= 1;
        }
    }
}
