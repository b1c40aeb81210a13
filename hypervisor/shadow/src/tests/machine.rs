//! A model machine: guest RAM, table frames, and a processor without a TLB that walks the shadow tables.

use core::cell::{Cell, RefCell};
use std::collections::HashMap;

use memory::{BLOCK_PAGES, Gfn, Gpa, GuestMemory, Gva, PAGE_SIZE, Pfn, Slots, TableMemory, Unbacked};

use crate::paging::bits;
use crate::{Access, Config, ErrorCode, FRAMES_PER_OPERATION, Fill, Host, Kind, Mmu, PageFault, Paging, VcpuMmu, walk};

/// Where the model's guest RAM lies in host memory: far from the table frames.
const RAM_BASE: u64 = 0x10_0000;

pub struct Ram {
    words: RefCell<Vec<u64>>,
}

impl Ram {
    fn word(&self, gpa: Gpa) -> Result<usize, Unbacked> {
        let word = (gpa.0 / 8) as usize;
        if word < self.words.borrow().len() { Ok(word) } else { Err(Unbacked(gpa)) }
    }
}

impl GuestMemory for Ram {
    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), Unbacked> {
        for (i, byte) in buf.iter_mut().enumerate() {
            let at = Gpa(gpa.0 + i as u64);
            *byte = (self.words.borrow()[self.word(at)?] >> (8 * (at.0 % 8))) as u8;
        }
        Ok(())
    }
    fn write(&self, gpa: Gpa, bytes: &[u8]) -> Result<(), Unbacked> {
        for (i, &byte) in bytes.iter().enumerate() {
            let at = Gpa(gpa.0 + i as u64);
            let word = self.word(at)?;
            let shift = 8 * (at.0 % 8);
            let words = &mut self.words.borrow_mut()[word];
            *words = *words & !(0xff << shift) | u64::from(byte) << shift;
        }
        Ok(())
    }
    fn load_u32(&self, gpa: Gpa) -> Result<u32, Unbacked> {
        Ok((self.words.borrow()[self.word(gpa)?] >> (8 * (gpa.0 & 4))) as u32)
    }
    fn load_u64(&self, gpa: Gpa) -> Result<u64, Unbacked> {
        Ok(self.words.borrow()[self.word(gpa)?])
    }
    fn compare_exchange_u32(&self, gpa: Gpa, old: u32, new: u32) -> Result<bool, Unbacked> {
        if self.load_u32(gpa)? != old {
            return Ok(false);
        }
        self.write(gpa, &new.to_le_bytes()).map(|()| true)
    }
    fn compare_exchange_u64(&self, gpa: Gpa, old: u64, new: u64) -> Result<bool, Unbacked> {
        if self.load_u64(gpa)? != old {
            return Ok(false);
        }
        self.write(gpa, &new.to_le_bytes()).map(|()| true)
    }
}

#[derive(Default)]
pub struct Frames {
    tables: RefCell<HashMap<Pfn, [u64; 512]>>,
}

impl TableMemory for Frames {
    fn load(&self, pfn: Pfn, index: usize) -> u64 {
        self.tables.borrow()[&pfn][index]
    }
    fn store(&self, pfn: Pfn, index: usize, value: u64) {
        self.tables.borrow_mut().entry(pfn).or_insert([0; 512])[index] = value;
    }
    fn swap(&self, pfn: Pfn, index: usize, value: u64) -> u64 {
        let old = self.load(pfn, index);
        self.store(pfn, index, value);
        old
    }
    fn fill(&self, pfn: Pfn, value: u64) {
        self.tables.borrow_mut().insert(pfn, [value; 512]);
    }
}

pub struct Surroundings {
    pub ram: Ram,
    pub frames: Frames,
    slots: Slots,
    pub generation: Cell<u64>,
    pub allocated: Cell<u64>,
    pub freed: Cell<u64>,
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
    fn page_allocated(&self) {
        self.allocated.set(self.allocated.get() + 1);
    }
    fn pages_freed(&self, pages: u64) {
        self.freed.set(self.freed.get() + pages);
    }
    fn advance_generation(&self) -> u64 {
        self.generation.set(self.generation.get() + 1);
        self.generation.get()
    }
    fn shoot_down(&self) {}
}

/// What an access came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Landed {
    Ram(Gpa),
    Mmio(Gpa),
    Fault(PageFault),
}

pub struct Machine {
    pub host: Surroundings,
    pub mmu: Mmu,
    pub cpu: VcpuMmu,
    next_frame: u64,
    pub exits: u64,
}

pub const READ: Access = Access { kind: Kind::Read, user: false, smap_overridden: false };
pub const WRITE: Access = Access { kind: Kind::Write, user: false, smap_overridden: false };

impl Machine {
    pub fn new(blocks: u64, pages_max: u32) -> Machine {
        Machine::with(blocks, pages_max, false)
    }

    pub fn with(blocks: u64, pages_max: u32, split_executable: bool) -> Machine {
        let map: Vec<(Gfn, Pfn)> =
            (0..blocks).map(|b| (Gfn(b * BLOCK_PAGES), Pfn(RAM_BASE + (blocks - b) * BLOCK_PAGES))).collect();
        let slots = Slots::new(&map).unwrap();
        let words = vec![0; (blocks * BLOCK_PAGES * PAGE_SIZE / 8) as usize];
        let config = Config {
            physical_address_bits: 40,
            gib_pages: true,
            mark_mmio: true,
            split_executable,
            pages_max,
            vcpus: 1,
        };
        let mmu = Mmu::new(config, &slots);
        let host = Surroundings {
            ram: Ram { words: RefCell::new(words) },
            frames: Frames::default(),
            slots,
            generation: Cell::new(0),
            allocated: Cell::new(0),
            freed: Cell::new(0),
        };
        Machine { host, mmu, cpu: VcpuMmu::new(0), next_frame: 1, exits: 0 }
    }

    fn ready(&mut self) {
        if !self.mmu.is_ready() && self.mmu.pages_left() < crate::PAGES_PER_OPERATION {
            let gone = self.mmu.reclaim(&self.host, 16);
            assert!(gone > 0, "reclaim makes room");
        }
        self.mmu.release(&self.host, self.host.generation.get());
        while self.mmu.stash_frames() < FRAMES_PER_OPERATION {
            self.next_frame += 1;
            self.mmu.provide(Pfn(self.next_frame)).unwrap();
        }
    }

    pub fn set_paging(&mut self, paging: Paging) {
        self.cpu.paging = paging;
        self.ready();
        self.mmu.load_root(&self.host, &mut self.cpu).unwrap();
    }

    pub fn flush(&mut self) {
        self.mmu.flush(&self.host, &self.cpu);
    }

    pub fn invlpg(&mut self, gva: Gva) {
        self.mmu.invlpg(&self.host, &self.cpu, gva);
    }

    /// What the hardware does: walks the shadow tables; `Err` is the error code of its #PF.
    fn hardware(&self, gva: Gva, access: Access) -> Result<u64, u32> {
        let paging = &self.cpu.paging;
        let mut table = self.cpu.root_table();
        let mut level = paging.mode.root_level();
        loop {
            let index = (gva.0 >> (12 + 9 * (u32::from(level) - 1)) & 511) as usize;
            let raw = self.host.frames.load(table, index);
            if raw & bits::P == 0 {
                return Err(0);
            }
            if raw & (bits::FRAME & !((1 << 40) - 1)) != 0 {
                return Err(ErrorCode::PRESENT | ErrorCode::RESERVED);
            }
            let frame = Pfn((raw & bits::FRAME) >> 12);
            if level == 1 || raw & bits::PS != 0 {
                let rights = crate::Rights::of_entry(raw);
                let hardware = Paging { wp: true, nxe: true, ..*paging };
                if !walk::permits(&hardware, rights, access) {
                    return Err(ErrorCode::PRESENT);
                }
                let span = 1_u64 << (12 + 9 * (u32::from(level) - 1));
                return Ok(frame.0 << 12 | gva.0 & (span - 1));
            }
            table = frame;
            level -= 1;
        }
    }

    /// One access of the guest's, with all the exits that it takes.
    pub fn access(&mut self, gva: Gva, access: Access) -> Landed {
        for _ in 0..8 {
            if let Ok(hpa) = self.hardware(gva, access) {
                let (gfn, _) = self
                    .host
                    .slots
                    .blocks()
                    .find(|(_, pfn)| (pfn.0..pfn.0 + BLOCK_PAGES).contains(&(hpa >> 12)))
                    .map(|(gfn, pfn)| (gfn.0 + (hpa >> 12) - pfn.0, pfn))
                    .expect("the guest's own frame");
                return Landed::Ram(Gpa(gfn << 12 | gva.0 & 0xfff));
            }
            self.exits += 1;
            let found = match walk::walk(&self.cpu.paging, &self.host.ram, gva, access) {
                Err(fault) => return Landed::Fault(fault),
                Ok(found) => found,
            };
            self.ready();
            match self.mmu.fill(&self.host, &self.cpu, gva, access, &found) {
                Fill::Filled | Fill::Changed => {}
                Fill::Mmio(gpa) => return Landed::Mmio(gpa),
                Fill::EmulateWrite(gpa) => {
                    self.mmu.before_write(&self.host, gpa.page());
                    return Landed::Ram(gpa);
                }
                Fill::Short => panic!("the stash was filled"),
            }
        }
        panic!("no progress at {gva:?} {access:?}");
    }

    /// A guest's store of eight bytes.
    pub fn store(&mut self, gva: Gva, value: u64) -> Landed {
        let result = self.access(gva, WRITE);
        if let Landed::Ram(gpa) = result {
            self.host.ram.write(gpa, &value.to_le_bytes()).unwrap();
        }
        result
    }

    /// What the guest's tables say, by the architecture; sets no bits.
    pub fn expected(&self, gva: Gva, access: Access) -> Landed {
        match walk::peek(&self.cpu.paging, &self.host.ram, gva, access) {
            Err(fault) => Landed::Fault(fault),
            Ok(found) => {
                let gpa = Gpa(found.gfn.address().0 | gva.offset());
                if self.host.slots.index(found.gfn).is_some() { Landed::Ram(gpa) } else { Landed::Mmio(gpa) }
            }
        }
    }

    pub fn audit(&mut self) {
        if let Err(violation) = self.mmu.audit(&self.host) {
            panic!("{violation:?}");
        }
        let live = self.host.allocated.get() - self.host.freed.get();
        assert!(live >= u64::from(self.mmu.live_pages()), "what lives is counted");
    }

    /// Raw set-up of memory, before the guest runs.
    pub fn poke(&self, gpa: u64, value: u64) {
        self.host.ram.write(Gpa(gpa), &value.to_le_bytes()).unwrap();
    }
}

/// 4-level tables at `root`: PML4, PDPT, and a PD whose 2 MiB pages map `blocks` of RAM to themselves.
pub fn identity(machine: &Machine, root: u64, blocks: u64) -> Paging {
    let flags = bits::P | bits::W | bits::U | bits::A;
    machine.poke(root, root + 0x1000 | flags);
    machine.poke(root + 0x1000, root + 0x2000 | flags);
    for block in 0..blocks {
        machine.poke(root + 0x2000 + 8 * block, block << 21 | flags | bits::D | bits::PS);
    }
    Paging {
        mode: crate::Mode::FourLevel,
        cr3: root,
        nxe: true,
        wp: true,
        gib_pages: true,
        physical_address_bits: 40,
        ..Paging::default()
    }
}
