//! Several guests on several threads at once: each thread is a core of the machine, and what is the hypervisor's
//! there is as the hypervisor has it: a lock for each guest's MMU, a presence for each vCPU, a list of the guests
//! that run. The frame allocator, the counters and [`crate::cache`] are the real ones.

use core::cell::Cell;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::vec::Vec;

use memory::counters::Writer;
use memory::{
    BLOCK_PAGES, Counters, Event, FrameAllocator, Gpa, GuestId, GuestMemory, Gva, Marks, Owner, PAGE_SIZE,
    Pfn, Population, Slots, TableMemory,
};

use super::machine::{attempt, config, context};
use super::processor::{Context, Processor, Walked};
use super::surroundings::{RAM_BASE, Ram, owned, slots};
use crate::cache::{Cache, Starved, Tenant};
use crate::paging::bits;
use crate::reclaim::next_guest;
use crate::{Access, Fill, Flush, Host, Mmu, PageFault, Paging, VcpuMmu, walk};

/// The first frame of the allocator.
const FIRST_FRAME: Pfn = Pfn(1);
/// Frames that the machine has beyond what its guests may use.
const KEPT_FRAMES: u64 = 64;
/// Exits after which an access must have landed, whatever the other guests, and the guest's other vCPUs, do.
const ATTEMPTS_MAX: u32 = 100_000;
/// Accesses until a vCPU lets another thread run while it is inside, between its translation and what it does there:
/// there may be fewer processors than cores of the model.
const ACCESSES_PER_YIELD: u64 = 16;
/// Leaf tables that the processor then walks through on its own account, before and after.
const TABLES_AHEAD: u64 = 24;

/// The frames that hold shadow tables and their links, one after the other.
pub struct Frames(Vec<AtomicU64>);

impl Frames {
    fn word(&self, pfn: Pfn, index: usize) -> &AtomicU64 {
        &self.0[pfn.0 as usize * 512 + index]
    }
}

impl TableMemory for Frames {
    fn load(&self, pfn: Pfn, index: usize) -> u64 {
        self.word(pfn, index).load(Ordering::Acquire)
    }
    fn store(&self, pfn: Pfn, index: usize, value: u64) {
        self.word(pfn, index).store(value, Ordering::Release);
    }
    fn swap(&self, pfn: Pfn, index: usize, value: u64) -> u64 {
        self.word(pfn, index).swap(value, Ordering::AcqRel)
    }
    fn fill(&self, pfn: Pfn, value: u64) {
        (0..512).for_each(|index| self.store(pfn, index, value));
    }
}

/// A vCPU as others see it. The order of these stores and loads is that of the hypervisor's `guest::presence`.
#[derive(Default)]
struct Presence {
    /// It may be in the guest.
    inside: AtomicBool,
    /// The newest generation at which it has flushed.
    flushed: AtomicU64,
    /// Somebody waits for it to come out.
    asked: AtomicBool,
}

impl Presence {
    fn is_behind(&self, generation: u64) -> bool {
        self.inside.load(Ordering::SeqCst) && self.flushed.load(Ordering::SeqCst) < generation
    }
}

/// A guest, from its start to its end.
pub struct Guest {
    id: GuestId,
    pub ram: Ram,
    slots: Slots,
    mmu: Mutex<Mmu>,
    generation: AtomicU64,
    vcpus: Vec<Presence>,
    held_frames: AtomicU64,
    guarantee_frames: u64,
}

impl Guest {
    /// A guest with `blocks` of 2 MiB of RAM and nothing in them.
    ///
    /// # Panics
    /// If no guest has this number.
    pub fn new(number: usize, blocks: u64, vcpus: u32, guarantee_frames: u64) -> Guest {
        let slots = slots(blocks, Pfn(RAM_BASE + number as u64 * (blocks + 1) * BLOCK_PAGES));
        Guest {
            id: GuestId::new(number as u16).expect("so few guests have numbers"),
            ram: Ram::new(slots.pages()),
            mmu: Mutex::new(Mmu::new(config(4096, vcpus), &slots)),
            slots,
            generation: AtomicU64::new(1),
            vcpus: (0..vcpus).map(|_| Presence::default()).collect(),
            held_frames: AtomicU64::new(0),
            guarantee_frames,
        }
    }

    /// Its number.
    pub fn number(&self) -> usize {
        self.id.index()
    }

    /// Its MMU, for a look when it is at rest.
    ///
    /// # Panics
    /// If another thread has panicked in it.
    pub fn mmu(&self) -> MutexGuard<'_, Mmu> {
        self.mmu.lock().expect("no other core failed in this MMU")
    }

    /// Raw set-up of memory, before the guest runs.
    ///
    /// # Panics
    /// If it is no RAM.
    pub fn poke(&self, gpa: u64, value: u64) {
        self.ram.write(Gpa(gpa), &value.to_le_bytes()).expect("RAM");
    }
}

impl Tenant for Guest {
    fn id(&self) -> GuestId {
        self.id
    }
    fn vcpus(&self) -> u32 {
        self.vcpus.len() as u32
    }
    fn held_frames(&self) -> &AtomicU64 {
        &self.held_frames
    }
    fn guarantee_frames(&self) -> u64 {
        self.guarantee_frames
    }
}

/// What all cores share.
pub struct Shared {
    frames: FrameAllocator,
    tables: Frames,
    pub counters: Counters,
    /// The guests that run.
    running: Mutex<Vec<Arc<Guest>>>,
    /// Frames free before any guest began.
    at_rest: u64,
}

impl Shared {
    /// A machine of so many cores, with `budget_frames` for the shadow pages of all guests.
    pub fn new(cores: usize, budget_frames: u64) -> Shared {
        let all = budget_frames + KEPT_FRAMES;
        // What guests will keep is not known yet.
        let marks = Marks::for_budget(all, budget_frames, 0, KEPT_FRAMES).ok();
        let frames = FrameAllocator::new(&[(FIRST_FRAME, all)], cores, marks);
        Shared {
            at_rest: frames.free_frames(),
            frames,
            tables: Frames((0..(FIRST_FRAME.0 + all) * 512).map(|_| AtomicU64::new(0)).collect()),
            counters: Counters::new(cores),
            running: Mutex::default(),
        }
    }

    /// A core, for the one thread that is it.
    ///
    /// # Panics
    /// If there is no such core, or another thread is it.
    pub fn core(&self, index: usize) -> Core<'_> {
        let writer = self.counters.writer(index).expect("one thread a core");
        Core { shared: self, index, writer, home: Cell::new(None), taken_elsewhere: Cell::new(0) }
    }

    /// The guest runs from here on.
    ///
    /// # Panics
    /// If another thread has panicked.
    pub fn enlist(&self, guest: Guest) -> Arc<Guest> {
        let guest = Arc::new(guest);
        self.running.lock().expect("no panic").push(Arc::clone(&guest));
        guest
    }

    /// The guests that run.
    ///
    /// # Panics
    /// If another thread has panicked.
    pub fn running(&self) -> Vec<Arc<Guest>> {
        self.running.lock().expect("no panic").clone()
    }

    /// With no core at work: audits every guest, and compares the three accounts of what lives: the counters, the
    /// guests' own, and the frame table.
    ///
    /// # Panics
    /// If anything is wrong.
    pub fn audit_at_rest(&self, core: &Core<'_>) {
        let (mut live, mut held) = (0, 0);
        for guest in self.running() {
            core.audit(&guest);
            let mmu = guest.mmu();
            let owned = self.frames.owned_by(Owner::Shadow(guest.id));
            assert_eq!(owned, mmu.frames(), "the frame table knows what the guest holds");
            // What waits for a flush counts until its frame is free.
            live += u64::from(mmu.live_pages()) + mmu.retired.len() as u64;
            held += owned;
        }
        assert_eq!(self.counters.shadow_pages(), Population::Exact(live));
        assert_eq!(self.frames.free_frames() + held, self.at_rest, "no frame is lost");
    }
}

/// A core, on its thread.
pub struct Core<'a> {
    shared: &'a Shared,
    index: usize,
    writer: Writer<'a>,
    /// The number of the guest whose vCPU lives here.
    home: Cell<Option<usize>>,
    /// Shadow pages that this core has reclaimed from guests that live elsewhere.
    pub taken_elsewhere: Cell<u64>,
}

impl Core<'_> {
    /// Checks every invariant of the guest's shadow pages, while its vCPUs run.
    ///
    /// # Panics
    /// If one is broken.
    pub fn audit(&self, guest: &Guest) {
        if let Err(violation) = self.with(guest, |mmu, host| mmu.audit_all(host)) {
            panic!("{violation}");
        }
    }

    /// The guest has ended: its vCPUs have left it. All that it had is free again.
    ///
    /// # Panics
    /// If anything is left.
    pub fn end(&self, guest: &Guest) {
        self.shared.running.lock().expect("no panic").retain(|other| other.id != guest.id);
        self.drop_all(guest);
        assert_eq!(
            self.shared.frames.owned_by(Owner::Shadow(guest.id)),
            0,
            "what an ended guest had is free"
        );
    }
}

impl Cache for Core<'_> {
    type Tenant = Guest;
    type Handle = Arc<Guest>;
    type Host<'b> = Surroundings<'b>;
    type Tables = Frames;

    fn frames(&self) -> &FrameAllocator {
        &self.shared.frames
    }
    fn tables(&self) -> &Frames {
        &self.shared.tables
    }
    fn core(&self) -> usize {
        self.index
    }
    fn count(&self, event: Event) {
        self.writer.count(event);
    }
    fn next_guest(&self, without: u64) -> Option<Arc<Guest>> {
        let running = self.shared.running.lock().expect("no panic");
        let asked = || running.iter().filter(|guest| without >> guest.id.index() & 1 == 0);
        asked().nth(next_guest(asked().map(|guest| guest.share()))?).cloned()
    }
    fn with<R>(&self, guest: &Guest, f: impl FnOnce(&mut Mmu, &Surroundings<'_>) -> R) -> R {
        let mmu = &mut *guest.mmu();
        let reclaimed_before = mmu.stats().reclaimed;
        let result = f(mmu, &Surroundings { guest, core: self });
        let taken = mmu.stats().reclaimed - reclaimed_before;
        if taken > 0 && self.home.get() != Some(guest.number()) {
            self.taken_elsewhere.set(self.taken_elsewhere.get() + taken);
            let (left, kept) = (2 * u64::from(mmu.live_pages()), guest.share().kept_frames);
            assert!(
                left >= kept,
                "guest {} has {left} frames left of the {kept} it may keep",
                guest.number()
            );
        }
        result
    }
}

/// What a guest's MMU sees of the machine on one core.
pub struct Surroundings<'a> {
    guest: &'a Guest,
    core: &'a Core<'a>,
}

impl Host for Surroundings<'_> {
    type Guest = Ram;
    type Tables = Frames;

    fn guest(&self) -> &Ram {
        &self.guest.ram
    }
    fn tables(&self) -> &Frames {
        &self.core.shared.tables
    }
    fn slots(&self) -> &Slots {
        &self.guest.slots
    }
    fn page_allocated(&self) {
        self.core.writer.shadow_page_allocated();
    }
    fn pages_freed(&self, pages: u64) {
        self.core.writer.shadow_pages_freed(pages);
    }
    fn advance_generation(&self) -> u64 {
        self.guest.generation.fetch_add(1, Ordering::SeqCst) + 1
    }
    fn generation(&self) -> u64 {
        self.guest.generation.load(Ordering::SeqCst)
    }
    fn shoot_down(&self) {
        let generation = self.generation();
        let mut asked = false;
        for vcpu in self.guest.vcpus.iter().filter(|vcpu| vcpu.is_behind(generation)) {
            vcpu.asked.store(true, Ordering::SeqCst);
            asked = true;
        }
        if asked {
            self.core.writer.count(Event::ShootDown);
        }
        for vcpu in &self.guest.vcpus {
            while vcpu.is_behind(generation) {
                thread::yield_now();
            }
        }
    }
}

/// What the processor that a guest's vCPU is on reads of the tables.
struct Walker<'a> {
    shared: &'a Shared,
    guest: GuestId,
}

impl Walked for Walker<'_> {
    /// A table that a processor can still come to is its guest's until that processor has flushed (H7).
    fn read(&self, pfn: Pfn, index: usize) -> u64 {
        let owner = self.shared.frames.owner(pfn);
        assert_eq!(owner, Some(Owner::Shadow(self.guest)), "a processor walks through frame {pfn}");
        self.shared.tables.load(pfn, index)
    }
    fn set_accessed(&self, pfn: Pfn, index: usize) {
        // It may have been emptied since it was read.
        let set = |raw: u64| (raw & bits::P != 0).then_some(raw | bits::A);
        let _ = self.shared.tables.word(pfn, index).try_update(Ordering::AcqRel, Ordering::Acquire, set);
    }
}

/// A vCPU, on its core.
pub struct Vcpu<'a> {
    core: &'a Core<'a>,
    guest: Arc<Guest>,
    cpu: VcpuMmu,
    /// Its core's TLB.
    processor: Processor,
    inside: bool,
    accesses: u64,
}

impl<'a> Vcpu<'a> {
    /// vCPU number `number` of the guest, in its first process.
    pub fn new(core: &'a Core<'a>, guest: &Arc<Guest>, number: u8, paging: Paging) -> Vcpu<'a> {
        core.home.set(Some(guest.number()));
        let mut vcpu = Vcpu {
            core,
            guest: Arc::clone(guest),
            cpu: VcpuMmu::new(number),
            processor: Processor::default(),
            inside: false,
            accesses: 0,
        };
        vcpu.load(paging);
        vcpu
    }

    /// What its control registers say.
    pub fn paging(&self) -> &Paging {
        &self.cpu.paging
    }

    fn presence(&self) -> &Presence {
        &self.guest.vcpus[usize::from(self.cpu.vcpu)]
    }

    /// It is in the guest after this. Who asked it out is answered first.
    fn enter(&mut self) -> Context {
        if self.presence().asked.swap(false, Ordering::SeqCst) {
            self.exit();
        }
        if !self.inside {
            self.inside = true;
            self.presence().inside.store(true, Ordering::SeqCst);
            let generation = self.guest.generation.load(Ordering::SeqCst);
            if !self.cpu.is_good(generation) {
                self.processor.flush(self.cpu.vcpu, self.cpu.tag());
                self.cpu.flushed(generation);
                self.presence().flushed.store(generation, Ordering::Release);
            }
        }
        context(&self.cpu)
    }

    /// It is out of the guest after this: what follows is the hypervisor's.
    fn exit(&mut self) {
        self.inside = false;
        self.presence().inside.store(false, Ordering::Release);
    }

    /// An access of the guest's, with all the exits that it takes: what `f` makes of the place where it lands.
    ///
    /// # Errors
    /// The guest's own page fault.
    ///
    /// # Panics
    /// If it lands in a frame that is not the guest's, or never, or if the guest starves: with a legal budget none does.
    fn access<R>(
        &mut self,
        gva: Gva,
        access: Access,
        f: impl Fn(&Ram, Gpa) -> R,
    ) -> Result<(Gpa, R), PageFault> {
        for _ in 0..ATTEMPTS_MAX {
            let context = self.enter();
            let tables = Walker { shared: self.core.shared, guest: self.guest.id };
            if let Ok(pfn) = self.processor.translate(&tables, &context, gva, attempt(access)) {
                let gfn = owned(&self.guest.slots, pfn);
                let gfn =
                    gfn.unwrap_or_else(|| panic!("{gva} leads to frame {pfn}, which is not the guest's"));
                let gpa = Gpa(gfn.address().0 | gva.offset());
                self.accesses += 1;
                if self.accesses.is_multiple_of(ACCESSES_PER_YIELD) {
                    // It remembers tables, others take them away, and it walks through what it remembers.
                    self.walk_ahead(&context, gva, 0);
                    thread::yield_now();
                    self.walk_ahead(&context, gva, PAGE_SIZE);
                }
                return Ok((gpa, f(&self.guest.ram, gpa)));
            }
            self.exit();
            let found = walk::walk(&self.cpu.paging, &self.guest.ram, gva, access)?;
            loop {
                let fill =
                    |mmu: &mut Mmu, host: &Surroundings<'_>| mmu.fill(host, &self.cpu, gva, access, &found);
                match self.core.with(&self.guest, fill) {
                    Fill::Filled | Fill::Changed => break,
                    Fill::Short => self.supply(false),
                    outcome @ (Fill::Mmio(_) | Fill::EmulateWrite(_)) => panic!("{outcome:?} at {gva}"),
                }
            }
        }
        panic!("no progress at {gva}");
    }

    /// The processor walks through this leaf table and the next ones on its own account.
    fn walk_ahead(&mut self, context: &Context, gva: Gva, offset: u64) {
        let tables = Walker { shared: self.core.shared, guest: self.guest.id };
        for table in 0..TABLES_AHEAD {
            let gva = Gva(gva.0.wrapping_add(table << 21) ^ offset);
            self.processor.speculate(&tables, context, gva);
        }
    }

    fn supply(&self, below_4g: bool) {
        if self.core.supply(&self.guest, below_4g) == Err(Starved) {
            panic!("guest {} starves", self.guest.number());
        }
    }

    /// Loads eight bytes: where they are, and what they are.
    ///
    /// # Errors
    /// The guest's own page fault.
    pub fn load_u64(&mut self, gva: Gva, access: Access) -> Result<(Gpa, u64), PageFault> {
        self.access(gva, access, |ram, gpa| ram.load_u64(gpa).expect("RAM"))
    }

    /// Stores eight bytes: where they are.
    ///
    /// # Errors
    /// The guest's own page fault.
    pub fn store_u64(&mut self, gva: Gva, access: Access, value: u64) -> Result<Gpa, PageFault> {
        let stored = self.access(gva, access, |ram, gpa| ram.write(gpa, &value.to_le_bytes()).expect("RAM"));
        stored.map(|(gpa, ())| gpa)
    }

    /// A device stores eight bytes for it: through the write tracker, and under the MMU's lock to the end, or another
    /// vCPU's flush could bring a table up to date in between and never hear of the write (H12).
    pub fn device_store_u64(&mut self, gpa: Gpa, value: u64) {
        self.exit();
        self.core.with(&self.guest, |mmu, host| {
            mmu.before_write(host, gpa.page());
            self.guest.poke(gpa.0, value);
        });
    }

    /// MOV to CR3, or any change of the paging mode.
    pub fn load(&mut self, paging: Paging) {
        self.exit();
        self.cpu.paging = paging;
        loop {
            let load =
                |mmu: &mut Mmu, host: &Surroundings<'_>| mmu.load_root(host, &mut self.cpu, Flush::All);
            if self.core.with(&self.guest, load).is_ok() {
                return;
            }
            self.supply(paging.mode.shadow_is_pae());
        }
    }

    /// A flush of everything.
    pub fn flush(&mut self) {
        self.exit();
        self.core.with(&self.guest, |mmu, host| mmu.flush(host, &mut self.cpu));
    }

    /// INVLPG.
    pub fn invlpg(&mut self, gva: Gva) {
        self.exit();
        self.core.with(&self.guest, |mmu, host| mmu.invlpg(host, &mut self.cpu, gva));
    }

    /// It comes out, and its core audits a guest, whose vCPUs may be inside.
    pub fn audit(&mut self, guest: &Guest) {
        self.exit();
        self.core.audit(guest);
    }

    /// It leaves the guest for good.
    pub fn leave(mut self) {
        self.exit();
        self.core.with(&self.guest, |mmu, _| mmu.drop_root(&mut self.cpu));
    }
}

impl Drop for Vcpu<'_> {
    /// Also where a test fails: nobody shall wait for it.
    fn drop(&mut self) {
        self.exit();
    }
}
