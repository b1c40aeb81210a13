//! What the MMU sees of the model machine: guest RAM, table frames, counters, the flush generation.

use core::cell::{Cell, RefCell};
use std::collections::HashMap;

use memory::{BLOCK_PAGES, Gfn, Gpa, GuestMemory, PAGE_SIZE, Pfn, Slots, TableMemory, Unbacked};

use crate::Host;

/// Where the model's guest RAM lies in host memory: far from the table frames.
pub const RAM_BASE: u64 = 0x10_0000;

/// Guest RAM from guest physical address 0 on.
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

/// The frames that hold shadow tables and their links.
#[derive(Default)]
pub struct Frames {
    tables: RefCell<HashMap<Pfn, [u64; 512]>>,
    /// How many words were loaded: what an operation costs.
    pub loads: Cell<u64>,
}

impl TableMemory for Frames {
    fn load(&self, pfn: Pfn, index: usize) -> u64 {
        self.loads.set(self.loads.get() + 1);
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

/// One guest's surroundings.
pub struct Surroundings {
    pub ram: Ram,
    pub frames: Frames,
    pub slots: Slots,
    pub generation: Cell<u64>,
    pub allocated: Cell<u64>,
    pub freed: Cell<u64>,
    pub shoot_downs: Cell<u64>,
}

impl Surroundings {
    /// With `blocks` of 2 MiB of RAM, which host memory holds in the reverse order.
    pub fn new(blocks: u64) -> Surroundings {
        let map: Vec<(Gfn, Pfn)> =
            (0..blocks).map(|b| (Gfn(b * BLOCK_PAGES), Pfn(RAM_BASE + (blocks - b) * BLOCK_PAGES))).collect();
        let words = vec![0; (blocks * BLOCK_PAGES * PAGE_SIZE / 8) as usize];
        Surroundings {
            ram: Ram { words: RefCell::new(words) },
            frames: Frames::default(),
            slots: Slots::new(&map).unwrap(),
            generation: Cell::new(1),
            allocated: Cell::new(0),
            freed: Cell::new(0),
            shoot_downs: Cell::new(0),
        }
    }

    /// The guest's page that lies in host frame `pfn`, if it is one of the guest's own.
    pub fn owned(&self, pfn: Pfn) -> Option<Gfn> {
        self.slots
            .blocks()
            .find(|(_, first)| (first.0..first.0 + BLOCK_PAGES).contains(&pfn.0))
            .map(|(gfn, first)| Gfn(gfn.0 + pfn.0 - first.0))
    }
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
    fn shoot_down(&self) {
        self.shoot_downs.set(self.shoot_downs.get() + 1);
    }
}
