//! A guest and its MMU in a few vectors, for the benchmarks and for the test that nothing allocates: as plain as the
//! hypervisor's direct map, and nothing here allocates once it is made.

use std::cell::Cell;

use memory::{BLOCK_PAGES, Gfn, Gpa, GuestMemory, Gva, PAGE_SIZE, Pfn, Slots, TableMemory, Unbacked};
use shadow::paging::bits;
use shadow::walk::walk;
use shadow::{Access, Config, Fill, Flush, Host, Kind, Mmu, Mode, Paging, VcpuMmu};

/// A supervisor's read.
pub const READ: Access = Access { kind: Kind::Read, user: false, smap_overridden: false };
/// A supervisor's write.
pub const WRITE: Access = Access { kind: Kind::Write, user: false, smap_overridden: false };
/// An entry with everything permitted and used before.
pub const FLAGS: u64 = bits::P | bits::W | bits::U | bits::A | bits::D;
/// A directory entry of a large page with the same.
pub const LARGE: u64 = FLAGS | bits::PS;

/// Where RAM lies in the host, far from the frames of tables.
const RAM_BASE: u64 = 1 << 24;

/// Guest RAM from guest physical address 0 on.
pub struct Ram(Vec<Cell<u64>>);

impl Ram {
    fn word(&self, gpa: Gpa) -> Result<&Cell<u64>, Unbacked> {
        self.0.get((gpa.0 >> 3) as usize).ok_or(Unbacked(gpa))
    }
}

impl GuestMemory for Ram {
    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), Unbacked> {
        for (at, byte) in (gpa.0..).zip(buf) {
            *byte = self.word(Gpa(at))?.get().to_le_bytes()[(at % 8) as usize];
        }
        Ok(())
    }

    fn write(&self, gpa: Gpa, bytes: &[u8]) -> Result<(), Unbacked> {
        for (at, &byte) in (gpa.0..).zip(bytes) {
            let word = self.word(Gpa(at))?;
            let mut changed = word.get().to_le_bytes();
            changed[(at % 8) as usize] = byte;
            word.set(u64::from_le_bytes(changed));
        }
        Ok(())
    }

    fn load_u32(&self, gpa: Gpa) -> Result<u32, Unbacked> {
        Ok((self.word(gpa)?.get() >> (8 * (gpa.0 & 4))) as u32)
    }

    fn load_u64(&self, gpa: Gpa) -> Result<u64, Unbacked> {
        Ok(self.word(gpa)?.get())
    }

    fn compare_exchange_u32(&self, gpa: Gpa, old: u32, new: u32) -> Result<bool, Unbacked> {
        let same = self.load_u32(gpa)? == old;
        if same {
            self.write(gpa, &new.to_le_bytes())?;
        }
        Ok(same)
    }

    fn compare_exchange_u64(&self, gpa: Gpa, old: u64, new: u64) -> Result<bool, Unbacked> {
        let word = self.word(gpa)?;
        let same = word.get() == old;
        if same {
            word.set(new);
        }
        Ok(same)
    }
}

/// The frames of tables and links, one after the other.
pub struct Frames(Vec<Cell<u64>>);

impl Frames {
    fn entry(&self, pfn: Pfn, index: usize) -> &Cell<u64> {
        &self.0[pfn.0 as usize * 512 + index]
    }
}

impl TableMemory for Frames {
    fn load(&self, pfn: Pfn, index: usize) -> u64 {
        self.entry(pfn, index).get()
    }
    fn store(&self, pfn: Pfn, index: usize, value: u64) {
        self.entry(pfn, index).set(value);
    }
    fn swap(&self, pfn: Pfn, index: usize, value: u64) -> u64 {
        self.entry(pfn, index).replace(value)
    }
    fn fill(&self, pfn: Pfn, value: u64) {
        (0..512).for_each(|index| self.store(pfn, index, value));
    }
}

/// What the MMU sees.
pub struct Surroundings {
    pub ram: Ram,
    frames: Frames,
    slots: Slots,
    generation: Cell<u64>,
}

impl Host for Surroundings {
    type Guest = Ram;
    type Tables = Frames;

    fn guest(&self) -> &Ram {
        &self.ram
    }
    fn tables(&self) -> &Frames {
        &self.frames
    }
    fn slots(&self) -> &Slots {
        &self.slots
    }
    fn page_allocated(&self) {}
    fn pages_freed(&self, _pages: u64) {}
    fn advance_generation(&self) -> u64 {
        self.generation.set(self.generation.get() + 1);
        self.generation.get()
    }
    fn generation(&self) -> u64 {
        self.generation.get()
    }
    fn shoot_down(&self) {}
}

/// The guest, with one vCPU.
pub struct Guest {
    pub host: Surroundings,
    pub mmu: Mmu,
    pub cpu: VcpuMmu,
    next_frame: u64,
}

impl Guest {
    /// With `blocks` of 2 MiB of RAM, and up to `pages_max` shadow pages of whose frames `frames_max` are ever made.
    pub fn new(blocks: u64, pages_max: u32, frames_max: usize) -> Guest {
        let words = |bytes: u64| (0..bytes / 8).map(|_| Cell::new(0)).collect();
        let map: Vec<_> =
            (0..blocks).map(|b| (Gfn(b * BLOCK_PAGES), Pfn(RAM_BASE + b * BLOCK_PAGES))).collect();
        let host = Surroundings {
            ram: Ram(words(blocks * BLOCK_PAGES * PAGE_SIZE)),
            frames: Frames(words(frames_max as u64 * PAGE_SIZE)),
            slots: Slots::new(&map).expect("blocks in order"),
            generation: Cell::new(1),
        };
        let config = Config {
            physical_address_bits: 40,
            gib_pages: true,
            mark_mmio: true,
            split_executable: false,
            pages_max,
            vcpus: 1,
        };
        let mmu = Mmu::new(config, &host.slots);
        Guest { host, mmu, cpu: VcpuMmu::new(0), next_frame: 0 }
    }

    /// Writes eight bytes of RAM past the MMU.
    pub fn poke(&self, gpa: u64, value: u64) {
        self.host.ram.word(Gpa(gpa)).expect("RAM").set(value);
    }

    /// Writes `count` entries of eight bytes from `table` on.
    pub fn poke_all(&self, table: u64, count: u64, entry: impl Fn(u64) -> u64) {
        (0..count).for_each(|i| self.poke(table + 8 * i, entry(i)));
    }

    /// 4-level tables in the four pages from `root` on: the first 2 GiB map to themselves, RAM or not, by large pages
    /// below PML4 slot 0.
    pub fn identity(&self, root: u64) -> Paging {
        let (pdpt, directory) = (root + 0x1000, root + 0x2000);
        self.poke(root, pdpt | FLAGS);
        self.poke_all(pdpt, 2, |i| (directory + 0x1000 * i) | FLAGS);
        self.poke_all(directory, 1024, |i| i << 21 | LARGE);
        Paging {
            mode: Mode::FourLevel,
            cr3: root,
            nxe: true,
            wp: true,
            gib_pages: true,
            physical_address_bits: 40,
            ..Paging::default()
        }
    }

    /// What the exit path does before an operation that may make tables.
    pub fn ready(&mut self) {
        self.mmu.release(&self.host, self.host.generation.get());
        if self.mmu.pages_left() < shadow::PAGES_PER_OPERATION {
            self.mmu.reclaim(&self.host, 8);
            self.mmu.release(&self.host, self.host.generation.get());
        }
        while self.mmu.stash_frames() < shadow::FRAMES_PER_OPERATION {
            self.mmu.provide(Pfn(self.next_frame)).expect("the stash has room");
            self.next_frame += 1;
        }
    }

    /// MOV to CR3, or another change of the paging.
    pub fn load(&mut self, paging: Paging) {
        self.ready();
        self.cpu.paging = paging;
        self.mmu.load_root(&self.host, &mut self.cpu, Flush::Pcid).expect("all frames are there");
    }

    /// A page fault that is not the guest's own.
    pub fn fault(&mut self, gva: u64, access: Access) -> Fill {
        let found = walk(&self.cpu.paging, &self.host.ram, Gva(gva), access).expect("permitted");
        self.mmu.fill(&self.host, &self.cpu, Gva(gva), access, &found)
    }
}
