//! Four-level page tables of the guest's own, in RAM above its image.

use crate::cpu;

/// Present.
pub const P: u64 = 1;
/// Writable.
pub const W: u64 = 1 << 1;
/// User.
pub const U: u64 = 1 << 2;
/// Accessed.
pub const A: u64 = 1 << 5;
/// Dirty.
pub const D: u64 = 1 << 6;
/// A large page, in an upper table.
pub const LARGE: u64 = 1 << 7;
/// No execution.
pub const NX: u64 = 1 << 63;

const FRAME: u64 = 0x000f_ffff_ffff_f000;
const EFER: u32 = 0xc000_0080;
const EFER_NXE: u64 = 1 << 11;
const CR0_WP: u64 = 1 << 16;

/// Where tables are taken from: 4 MiB up to 8 MiB.
pub const POOL: u64 = 4 << 20;
const POOL_END: u64 = 8 << 20;
/// Pages for the guest to map: 8 MiB up to 16 MiB. A guest of this kind needs 16 MiB of memory.
pub const DATA: u64 = 8 << 20;

/// An address space: the first 4 GiB identity-mapped for the supervisor and the user, and what is mapped on
/// top of it from [`FREE`] on.
pub struct AddressSpace {
    root: u64,
    next: u64,
}

/// The first address that the identity map leaves alone (512 GiB).
pub const FREE: u64 = 1 << 39;

/// Loads a root on this processor, with NX and WP on.
pub fn load(root: u64) {
    cpu::wrmsr(EFER, cpu::rdmsr(EFER) | EFER_NXE);
    cpu::write_cr0(cpu::read_cr0() | CR0_WP);
    cpu::write_cr3(root);
}

impl AddressSpace {
    /// Builds the identity map and loads it, with NX and WP on.
    #[must_use]
    pub fn install() -> Self {
        let mut space = Self { root: 0, next: POOL };
        space.root = space.table();
        let directory_pointers = space.table();
        cpu::write64(space.root, directory_pointers | P | W | U | A);
        for gib in 0..4 {
            let directory = space.table();
            cpu::write64(directory_pointers + gib * 8, directory | P | W | U | A);
            for block in 0..512 {
                let page = gib << 30 | block << 21;
                cpu::write64(directory + block * 8, page | P | W | U | A | D | LARGE);
            }
        }
        load(space.root);
        space
    }

    /// The root table.
    #[must_use]
    pub fn root(&self) -> u64 {
        self.root
    }

    /// A root of its own over the same tables: what is mapped below an entry that there is now is in both.
    #[must_use]
    pub fn sibling(&mut self) -> u64 {
        let root = self.table();
        for entry in 0..512 {
            cpu::write64(root + entry * 8, cpu::read64(self.root + entry * 8));
        }
        root
    }

    fn table(&mut self) -> u64 {
        let table = self.next;
        assert!(table < POOL_END, "no more page tables");
        self.next += 4096;
        for entry in 0..512 {
            cpu::write64(table + entry * 8, 0);
        }
        table
    }

    /// The address of the leaf entry for `address`, with tables made on the way.
    pub fn entry(&mut self, address: u64) -> u64 {
        self.table_of(address, &[39, 30, 21]) + (address >> 12 & 511) * 8
    }

    /// The address of the page-directory entry for `address`, with tables made on the way.
    pub fn directory_entry(&mut self, address: u64) -> u64 {
        self.table_of(address, &[39, 30]) + (address >> 21 & 511) * 8
    }

    fn table_of(&mut self, address: u64, shifts: &[u32]) -> u64 {
        let mut table = self.root;
        for &shift in shifts {
            let slot = table + (address >> shift & 511) * 8;
            let mut entry = cpu::read64(slot);
            if entry & P == 0 {
                entry = self.table() | P | W | U;
                cpu::write64(slot, entry);
            }
            table = entry & FRAME;
        }
        table
    }

    /// Maps one page with the flags given (and only those: [`P`] too is the caller's to say).
    pub fn map(&mut self, address: u64, frame: u64, flags: u64) {
        let slot = self.entry(address);
        cpu::write64(slot, frame & FRAME | flags);
    }

    /// The leaf entry's flags as they stand now, A and D included.
    #[must_use]
    pub fn flags(&mut self, address: u64) -> u64 {
        let slot = self.entry(address);
        cpu::read64(slot) & !FRAME
    }
}
