//! Our own page tables: what is mapped, with which rights, and the check that nothing writable is executable.
//!
//! Built once at boot by one core, over [`TableMemory`], so that the host tests run the same code.

use memory::{BLOCK_SIZE, Hpa, PAGE_SIZE, Pfn, TableMemory};

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const WRITE_THROUGH: u64 = 1 << 3;
const CACHE_DISABLE: u64 = 1 << 4;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// What may be done with a mapping. Writable code has no name here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Data that nobody writes.
    ReadOnly,
    /// Data.
    ReadWrite,
    /// Code.
    ReadExecute,
}

impl Rights {
    const fn bits(self) -> u64 {
        match self {
            Self::ReadOnly => NO_EXECUTE,
            Self::ReadWrite => NO_EXECUTE | WRITABLE,
            Self::ReadExecute => 0,
        }
    }
}

/// The memory type of a mapping, as entries of the PAT that [`super::cpu::PAT`] holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// RAM.
    WriteBack,
    /// A framebuffer.
    WriteCombining,
    /// Device registers.
    Uncached,
}

impl Cache {
    const fn bits(self) -> u64 {
        match self {
            Self::WriteBack => 0,
            Self::WriteCombining => WRITE_THROUGH,
            Self::Uncached => WRITE_THROUGH | CACHE_DISABLE,
        }
    }
}

/// Why a range was not mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapError {
    /// No frame left for a table.
    OutOfFrames,
    /// Something is mapped at this address already.
    InUse(u64),
    /// The range is not made of whole pages.
    Misaligned,
}

/// Where an address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The physical address.
    pub hpa: Hpa,
    /// Every level allows writing.
    pub writable: bool,
    /// Every level allows execution.
    pub executable: bool,
}

/// What a walk of all the tables found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Audit {
    /// Present leaf entries.
    pub mappings: u64,
    /// Those that allow execution.
    pub executable: u64,
    /// The first address that is both writable and executable.
    pub violation: Option<u64>,
    /// A page at virtual address 0 is mapped.
    pub null_mapped: bool,
}

/// A tree of 4-level page tables.
#[derive(Clone, Copy, Debug)]
pub struct PageTables<M> {
    memory: M,
    root: Pfn,
}

const fn index(virt: u64, level: u32) -> usize {
    (virt >> (12 + 9 * (level - 1))) as usize & 511
}

impl<M: TableMemory> PageTables<M> {
    /// The tables whose top one is in `root`.
    pub const fn at(memory: M, root: Pfn) -> Self {
        Self { memory, root }
    }

    /// An empty tree.
    ///
    /// # Errors
    /// [`MapError::OutOfFrames`].
    pub fn new(memory: M, frames: &mut dyn FnMut() -> Option<Pfn>) -> Result<Self, MapError> {
        let root = frames().ok_or(MapError::OutOfFrames)?;
        memory.fill(root, 0);
        Ok(Self { memory, root })
    }

    /// The frame of the top table.
    pub const fn root(&self) -> Pfn {
        self.root
    }

    /// The table of `level` that covers `virt`, made if it is missing.
    fn table(&self, frames: &mut dyn FnMut() -> Option<Pfn>, virt: u64, level: u32) -> Result<Pfn, MapError> {
        let mut table = self.root;
        for above in (level + 1..=4).rev() {
            let slot = index(virt, above);
            let entry = self.memory.load(table, slot);
            table = if entry & PRESENT == 0 {
                let new = frames().ok_or(MapError::OutOfFrames)?;
                self.memory.fill(new, 0);
                // Rights are the leaves' business.
                self.memory.store(table, slot, new.address().0 | PRESENT | WRITABLE);
                new
            } else if above < 4 && entry & LARGE != 0 {
                return Err(MapError::InUse(virt));
            } else {
                Hpa(entry & ADDRESS).page()
            };
        }
        Ok(table)
    }

    /// Maps `bytes` at `virt` to `phys`, with 2 MiB pages where both are aligned. Nothing may be mapped there.
    ///
    /// # Errors
    /// See [`MapError`]; what was mapped before the error stays.
    pub fn map(
        &self,
        frames: &mut dyn FnMut() -> Option<Pfn>,
        virt: u64,
        phys: Hpa,
        bytes: u64,
        rights: Rights,
        cache: Cache,
    ) -> Result<(), MapError> {
        if (virt | phys.0 | bytes) & (PAGE_SIZE - 1) != 0 {
            return Err(MapError::Misaligned);
        }
        let bits = PRESENT | rights.bits() | cache.bits();
        let mut done = 0;
        while done < bytes {
            let (virt, phys) = (virt + done, phys.0 + done);
            let large = (virt | phys) & (BLOCK_SIZE - 1) == 0 && bytes - done >= BLOCK_SIZE;
            let (level, size, leaf) = if large { (2, BLOCK_SIZE, LARGE) } else { (1, PAGE_SIZE, 0) };
            let table = self.table(frames, virt, level)?;
            if self.memory.load(table, index(virt, level)) != 0 {
                return Err(MapError::InUse(virt));
            }
            self.memory.store(table, index(virt, level), phys | bits | leaf);
            done += size;
        }
        Ok(())
    }

    /// Removes the 4 KiB mapping at `virt`, if there is one. The caller flushes the TLBs.
    pub fn unmap_page(&self, virt: u64) {
        let mut table = self.root;
        for level in (2..=4).rev() {
            let entry = self.memory.load(table, index(virt, level));
            if entry & PRESENT == 0 || level < 4 && entry & LARGE != 0 {
                return;
            }
            table = Hpa(entry & ADDRESS).page();
        }
        self.memory.store(table, index(virt, 1), 0);
    }

    /// Where `virt` leads.
    pub fn translate(&self, virt: u64) -> Option<Translation> {
        let (mut table, mut writable, mut executable) = (self.root, true, true);
        for level in (1..=4).rev() {
            let entry = self.memory.load(table, index(virt, level));
            if entry & PRESENT == 0 {
                return None;
            }
            writable &= entry & WRITABLE != 0;
            executable &= entry & NO_EXECUTE == 0;
            if level == 1 || level < 4 && entry & LARGE != 0 {
                let within = (1u64 << (12 + 9 * (level - 1))) - 1;
                // Bit 12 of a large entry is its PAT bit, below `within`.
                return Some(Translation {
                    hpa: Hpa(entry & ADDRESS & !within | virt & within),
                    writable,
                    executable,
                });
            }
            table = Hpa(entry & ADDRESS).page();
        }
        None
    }

    /// Walks everything that is mapped.
    pub fn audit(&self) -> Audit {
        let mut audit = Audit::default();
        self.audit_table(self.root, 4, 0, (true, true), &mut audit);
        audit
    }

    fn audit_table(
        &self,
        table: Pfn,
        level: u32,
        base: u64,
        (writable, executable): (bool, bool),
        audit: &mut Audit,
    ) {
        for slot in 0..512 {
            let entry = self.memory.load(table, slot);
            if entry & PRESENT == 0 {
                continue;
            }
            let virt = base | (slot as u64) << (12 + 9 * (level - 1));
            let rights = (writable && entry & WRITABLE != 0, executable && entry & NO_EXECUTE == 0);
            if level > 1 && (level == 4 || entry & LARGE == 0) {
                self.audit_table(Hpa(entry & ADDRESS).page(), level - 1, virt, rights, audit);
                continue;
            }
            audit.mappings += 1;
            audit.executable += u64::from(rights.1);
            audit.null_mapped |= virt == 0;
            if rights == (true, true) && audit.violation.is_none() {
                // Addresses of the upper half carry bit 47 up.
                audit.violation = Some(((virt << 16) as i64 >> 16) as u64);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use core::cell::RefCell;

    use super::*;

    struct Model(RefCell<Vec<[u64; 512]>>);

    impl TableMemory for &Model {
        fn load(&self, pfn: Pfn, index: usize) -> u64 {
            self.0.borrow()[pfn.0 as usize][index]
        }
        fn store(&self, pfn: Pfn, index: usize, value: u64) {
            self.0.borrow_mut()[pfn.0 as usize][index] = value;
        }
        fn swap(&self, pfn: Pfn, index: usize, value: u64) -> u64 {
            core::mem::replace(&mut self.0.borrow_mut()[pfn.0 as usize][index], value)
        }
        fn fill(&self, pfn: Pfn, value: u64) {
            self.0.borrow_mut()[pfn.0 as usize] = [value; 512];
        }
    }

    fn model(frames: usize) -> (Model, impl FnMut() -> Option<Pfn>) {
        let mut next = 0;
        // Stale contents: a table must be emptied before use.
        (Model(RefCell::new(vec![[u64::MAX; 512]; frames])), move || {
            next += 1;
            (next <= frames as u64).then(|| Pfn(next - 1))
        })
    }

    const HALF: u64 = 0xffff_8000_0000_0000;

    #[test]
    fn large_pages_where_aligned_and_small_ones_at_the_edges() {
        let (memory, mut frames) = model(16);
        let tables = PageTables::new(&memory, &mut frames).unwrap();
        let bytes = 2 * BLOCK_SIZE + 3 * PAGE_SIZE;
        tables
            .map(
                &mut frames,
                HALF + BLOCK_SIZE - PAGE_SIZE,
                Hpa(BLOCK_SIZE - PAGE_SIZE),
                bytes,
                Rights::ReadWrite,
                Cache::WriteBack,
            )
            .unwrap();
        assert_eq!(tables.audit().mappings, 1 + 2 + 2);
        for at in [BLOCK_SIZE - PAGE_SIZE, BLOCK_SIZE + 5, 3 * BLOCK_SIZE, 3 * BLOCK_SIZE + 2 * PAGE_SIZE - 1]
        {
            let found = tables.translate(HALF + at).unwrap();
            assert_eq!(found, Translation { hpa: Hpa(at), writable: true, executable: false });
        }
        assert_eq!(tables.translate(HALF + BLOCK_SIZE - PAGE_SIZE - 1), None);
        assert_eq!(tables.translate(HALF + 3 * BLOCK_SIZE + 2 * PAGE_SIZE), None);
    }

    #[test]
    fn nothing_is_mapped_twice_and_frames_may_run_out() {
        let (memory, mut frames) = model(4);
        let tables = PageTables::new(&memory, &mut frames).unwrap();
        let mut map =
            |virt, rights| tables.map(&mut frames, virt, Hpa(0x1000), PAGE_SIZE, rights, Cache::WriteBack);
        assert_eq!(map(0x1000, Rights::ReadOnly), Ok(()));
        assert_eq!(map(0x1000, Rights::ReadExecute), Err(MapError::InUse(0x1000)));
        assert_eq!(map(0x1001, Rights::ReadExecute), Err(MapError::Misaligned));
        assert_eq!(map(HALF, Rights::ReadWrite), Err(MapError::OutOfFrames));
        tables.unmap_page(0x1000);
        assert_eq!(tables.translate(0x1000), None);
    }

    #[test]
    fn the_audit_finds_writable_code_and_the_null_page() {
        let (memory, mut frames) = model(16);
        let tables = PageTables::new(&memory, &mut frames).unwrap();
        tables.map(&mut frames, HALF, Hpa(0), PAGE_SIZE, Rights::ReadExecute, Cache::WriteBack).unwrap();
        assert_eq!(tables.audit(), Audit { mappings: 1, executable: 1, violation: None, null_mapped: false });
        tables.map(&mut frames, 0, Hpa(0), PAGE_SIZE, Rights::ReadOnly, Cache::WriteBack).unwrap();
        assert!(tables.audit().null_mapped);
        let leaf = Pfn(3);
        (&memory).store(leaf, 0, (&memory).load(leaf, 0) | WRITABLE);
        assert_eq!(tables.audit().violation, Some(HALF));
    }
}
