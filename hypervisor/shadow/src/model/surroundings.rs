//! What the MMU sees of the model machine: guest RAM, table frames, counters, the flush generation, the other
//! vCPUs, which run on while it works.

use core::cell::{Cell, RefCell};
use core::sync::atomic::{AtomicU64, Ordering};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::OnceLock;
use std::vec::Vec;

use memory::{
    BLOCK_PAGES, Gfn, Gpa, GuestMemory, Gva, PAGE_SHIFT, PAGE_SIZE, Pfn, Slots, TableMemory, Unbacked,
};

use super::processor::{Context, Processor, Walked};
use super::reference::Attempt;
use crate::Host;
use crate::paging::bits;

/// Where the model's guest RAM lies in host memory: far from the table frames.
pub const RAM_BASE: u64 = 0x10_0000;
/// Words of eight bytes in a page.
const WORDS: usize = (PAGE_SIZE / 8) as usize;

/// Guest RAM from guest physical address 0 on. Pages that nothing was ever written to take no memory. Other threads may
/// be at it, too.
pub struct Ram {
    pages: Vec<Page>,
}

type Page = OnceLock<Box<[AtomicU64; WORDS]>>;

impl Ram {
    pub fn new(pages: usize) -> Ram {
        Ram { pages: (0..pages).map(|_| OnceLock::new()).collect() }
    }

    /// A word's page and place in it.
    fn place(&self, gpa: Gpa) -> Result<(&Page, usize), Unbacked> {
        let page = self.pages.get((gpa.0 >> PAGE_SHIFT) as usize).ok_or(Unbacked(gpa))?;
        Ok((page, (gpa.0 % PAGE_SIZE / 8) as usize))
    }

    /// A word that is to be written.
    fn word(&self, gpa: Gpa) -> Result<&AtomicU64, Unbacked> {
        let (page, word) = self.place(gpa)?;
        Ok(&page.get_or_init(|| Box::new([const { AtomicU64::new(0) }; WORDS]))[word])
    }
}

impl GuestMemory for Ram {
    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), Unbacked> {
        for (i, byte) in buf.iter_mut().enumerate() {
            let at = Gpa(gpa.0 + i as u64);
            *byte = (self.load_u64(Gpa(at.0 & !7))? >> (8 * (at.0 % 8))) as u8;
        }
        Ok(())
    }
    fn write(&self, gpa: Gpa, bytes: &[u8]) -> Result<(), Unbacked> {
        if let (0, Ok(bytes)) = (gpa.0 % 8, bytes.try_into()) {
            self.word(gpa)?.store(u64::from_le_bytes(bytes), Ordering::Release);
            return Ok(());
        }
        for (i, &byte) in bytes.iter().enumerate() {
            let at = Gpa(gpa.0 + i as u64);
            let shift = 8 * (at.0 % 8);
            let change = |word: u64| Some(word & !(0xff << shift) | u64::from(byte) << shift);
            let _ = self.word(at)?.try_update(Ordering::AcqRel, Ordering::Acquire, change);
        }
        Ok(())
    }
    fn load_u32(&self, gpa: Gpa) -> Result<u32, Unbacked> {
        Ok((self.load_u64(Gpa(gpa.0 & !7))? >> (8 * (gpa.0 & 4))) as u32)
    }
    fn load_u64(&self, gpa: Gpa) -> Result<u64, Unbacked> {
        let (page, word) = self.place(gpa)?;
        Ok(page.get().map_or(0, |words| words[word].load(Ordering::Acquire)))
    }
    fn compare_exchange_u32(&self, gpa: Gpa, old: u32, new: u32) -> Result<bool, Unbacked> {
        let shift = 8 * (gpa.0 & 4);
        let change = |word: u64| {
            ((word >> shift) as u32 == old)
                .then_some(word & !(u64::from(u32::MAX) << shift) | u64::from(new) << shift)
        };
        let word = self.word(Gpa(gpa.0 & !7))?;
        Ok(word.try_update(Ordering::AcqRel, Ordering::Acquire, change).is_ok())
    }
    fn compare_exchange_u64(&self, gpa: Gpa, old: u64, new: u64) -> Result<bool, Unbacked> {
        Ok(self.word(gpa)?.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire).is_ok())
    }
}

/// One frame, and which of its words are not 0.
#[derive(Clone)]
struct Frame {
    words: [u64; WORDS],
    used: [u64; WORDS / 64],
}

impl Frame {
    const ZERO: Frame = Frame { words: [0; WORDS], used: [0; WORDS / 64] };

    fn store(&mut self, index: usize, value: u64) {
        self.words[index] = value;
        let bit = 1 << (index & 63);
        if value == 0 {
            self.used[index >> 6] &= !bit;
        } else {
            self.used[index >> 6] |= bit;
        }
    }
}

/// Frames with numbers below this are in a vector.
const NEAR: u64 = 1 << 12;

/// The frames that hold shadow tables and their links.
#[derive(Default)]
pub struct Frames {
    near: RefCell<Vec<Frame>>,
    far: RefCell<HashMap<Pfn, Frame>>,
    /// How many words were loaded: what an operation costs.
    pub loads: Cell<u64>,
    /// How many words were stored, but for the bits that the processor sets.
    pub stores: Cell<u64>,
}

impl Walked for Frames {
    fn read(&self, pfn: Pfn, index: usize) -> u64 {
        self.load(pfn, index)
    }
    fn set_accessed(&self, pfn: Pfn, index: usize) {
        self.with(pfn, |frame| frame.words[index] |= bits::A);
    }
}

impl Frames {
    fn with<R>(&self, pfn: Pfn, act: impl FnOnce(&mut Frame) -> R) -> R {
        if pfn.0 < NEAR {
            let mut near = self.near.borrow_mut();
            let index = pfn.0 as usize;
            if near.len() <= index {
                near.resize(index + 1, Frame::ZERO);
            }
            return act(&mut near[index]);
        }
        act(self.far.borrow_mut().entry(pfn).or_insert(Frame::ZERO))
    }

    /// Which entries of the table in `pfn` are not 0, a bit each.
    pub fn used(&self, pfn: Pfn) -> [u64; WORDS / 64] {
        self.with(pfn, |frame| frame.used)
    }
}

impl TableMemory for Frames {
    fn load(&self, pfn: Pfn, index: usize) -> u64 {
        self.loads.set(self.loads.get() + 1);
        self.with(pfn, |frame| frame.words[index])
    }
    fn store(&self, pfn: Pfn, index: usize, value: u64) {
        self.stores.set(self.stores.get() + 1);
        self.with(pfn, |frame| frame.store(index, value));
    }
    fn swap(&self, pfn: Pfn, index: usize, value: u64) -> u64 {
        let old = self.load(pfn, index);
        self.store(pfn, index, value);
        old
    }
    fn fill(&self, pfn: Pfn, value: u64) {
        let used = if value == 0 { 0 } else { u64::MAX };
        self.with(pfn, |frame| *frame = Frame { words: [value; WORDS], used: [used; WORDS / 64] });
    }
}

/// A store by another vCPU that runs in the guest while the MMU works on this core.
#[derive(Clone, Copy, Debug)]
pub struct Late {
    /// After so many accesses of the MMU's to its tables.
    pub after: u32,
    /// Who stores.
    pub vcpu: u8,
    /// Where.
    pub gva: Gva,
    /// The word of the page.
    pub word: u64,
    /// What.
    pub value: u64,
}

/// The most vCPUs of a model guest.
pub const VCPUS_MAX: usize = 4;

/// The processors that the guest's vCPUs run on.
#[derive(Default)]
pub struct Cores {
    /// Their TLBs.
    pub processor: Processor,
    /// Who calls the MMU: that vCPU is out of the guest.
    pub acting: u8,
    /// What each vCPU that is in the guest runs with.
    pub running: [Option<Context>; VCPUS_MAX],
}

/// `blocks` of 2 MiB of RAM, which host memory holds behind frame `base` in the reverse order.
pub fn slots(blocks: u64, base: Pfn) -> Slots {
    let map: Vec<(Gfn, Pfn)> =
        (0..blocks).map(|b| (Gfn(b * BLOCK_PAGES), Pfn(base.0 + (blocks - b) * BLOCK_PAGES))).collect();
    Slots::new(&map).unwrap_or_else(|error| unreachable!("{error}"))
}

/// The page that lies in host frame `pfn`, if it is one of these.
pub fn owned(slots: &Slots, pfn: Pfn) -> Option<Gfn> {
    slots
        .blocks()
        .find(|(_, first)| (first.0..first.0 + BLOCK_PAGES).contains(&pfn.0))
        .map(|(gfn, first)| Gfn(gfn.0 + pfn.0 - first.0))
}

/// One guest's surroundings.
pub struct Surroundings {
    pub ram: Ram,
    /// Shared with the other guests of the same machine, if there are any.
    pub frames: Rc<Frames>,
    pub slots: Slots,
    pub generation: Cell<u64>,
    pub allocated: Cell<u64>,
    pub freed: Cell<u64>,
    pub shoot_downs: Cell<u64>,
    pub cores: RefCell<Cores>,
    /// The other vCPU's store that is still to come.
    pub late: Cell<Option<Late>>,
}

impl Surroundings {
    /// With `blocks` of 2 MiB of RAM.
    pub fn new(blocks: u64) -> Surroundings {
        Surroundings {
            ram: Ram::new((blocks * BLOCK_PAGES) as usize),
            frames: Rc::default(),
            slots: slots(blocks, Pfn(RAM_BASE)),
            generation: Cell::new(1),
            allocated: Cell::new(0),
            freed: Cell::new(0),
            shoot_downs: Cell::new(0),
            cores: RefCell::default(),
            late: Cell::new(None),
        }
    }

    /// The guest's page that lies in host frame `pfn`, if it is one of the guest's own.
    pub fn owned(&self, pfn: Pfn) -> Option<Gfn> {
        owned(&self.slots, pfn)
    }

    /// The MMU touches its tables: the other vCPU's store comes nearer.
    fn tick(&self) {
        if let Some(late) = self.late.get() {
            if late.after > 0 {
                self.late.set(Some(Late { after: late.after - 1, ..late }));
            } else {
                self.late.set(None);
                self.store_late(late);
            }
        }
    }

    /// The store itself: it lands if the other vCPU needs no exit for it.
    fn store_late(&self, late: Late) {
        let cores = &mut *self.cores.borrow_mut();
        if late.vcpu == cores.acting {
            return;
        }
        let Some(context) = cores.running[usize::from(late.vcpu)] else { return };
        let attempt = Attempt { write: true, ..Attempt::default() };
        if let Ok(pfn) = cores.processor.translate(&*self.frames, &context, late.gva, attempt)
            && let Some(gfn) = self.owned(pfn)
        {
            let gpa = Gpa(gfn.address().0 + 8 * late.word);
            let _ = self.ram.write(gpa, &late.value.to_le_bytes());
        }
    }
}

impl TableMemory for Surroundings {
    fn load(&self, pfn: Pfn, index: usize) -> u64 {
        self.tick();
        self.frames.load(pfn, index)
    }
    fn store(&self, pfn: Pfn, index: usize, value: u64) {
        self.tick();
        self.frames.store(pfn, index, value);
    }
    fn swap(&self, pfn: Pfn, index: usize, value: u64) -> u64 {
        self.tick();
        self.frames.swap(pfn, index, value)
    }
    fn fill(&self, pfn: Pfn, value: u64) {
        self.tick();
        self.frames.fill(pfn, value);
    }
}

impl Host for Surroundings {
    type Guest = Ram;
    type Tables = Surroundings;
    fn guest(&self) -> &Ram {
        &self.ram
    }
    fn tables(&self) -> &Surroundings {
        self
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
        self.tick();
        let cores = &mut *self.cores.borrow_mut();
        cores.running[usize::from(cores.acting)] = None;
        self.generation.set(self.generation.get() + 1);
        self.generation.get()
    }
    fn generation(&self) -> u64 {
        self.generation.get()
    }
    fn shoot_down(&self) {
        self.tick();
        {
            // The others come out, flush, and go straight in again.
            let cores = &mut *self.cores.borrow_mut();
            cores.running[usize::from(cores.acting)] = None;
            for context in cores.running.iter().flatten() {
                cores.processor.flush(context.vcpu, context.tag);
            }
        }
        self.shoot_downs.set(self.shoot_downs.get() + 1);
    }
}
