//! Two vCPUs on two cores, in every interleaving (up to a few preemptions): the crate's own code under the guest's
//! lock, a processor that reads the tables without it, and the order of stores on which a shoot-down rests.
//!
//! Run by `cargo xtask test loom`, compiled with `--cfg loom`. Each test has a twin that must fail, with the defect
//! switched on that the test is there to find.

use std::collections::HashMap;
use std::sync::Mutex as Plain;

use loom::sync::atomic::{AtomicU64, Ordering, fence};
use loom::sync::{Arc, Mutex};
use loom::thread;
use memory::{Gfn, Gpa, GuestMemory, Gva, Pfn, Slots, TableMemory, Unbacked};

use crate::defect::{Defect, with};
use crate::paging::bits;
use crate::{Access, Config, Fill, Flush, Host, Kind, Mmu, Mode, Paging, VcpuMmu, walk};

const ALL: u64 = bits::P | bits::W | bits::U | bits::A | bits::D;
/// The guest's tables: `PT` maps page 0 to `OLD`, and at `EDIT` itself.
const PML4: u64 = 0x1000;
const PT: u64 = 0x4000;
const OLD: u64 = 0x10_0000;
const NEW: u64 = 0x11_0000;
const EDIT: u64 = 0x10_0000;
/// The entries that the processor reads: the model can tell who else uses them once they are there.
const SEEN: [usize; 4] = [0, 1, 0x10, (EDIT >> 12) as usize];
/// A second address space.
const OTHER: u64 = 0x5000;
const RAM: Pfn = Pfn(0x10_0000);
/// What a free frame is filled with: nobody may ever read it.
const POISON: u64 = 0xdead << 12 | ALL;

const READ: Access = Access { kind: Kind::Read, user: false, smap_overridden: false };
const WRITE: Access = Access { kind: Kind::Write, user: false, smap_overridden: false };

/// A table's words: those that were never stored hold `base`.
struct Frame {
    base: u64,
    words: HashMap<usize, Arc<AtomicU64>>,
}

/// The machine. Frames with odd numbers hold tables, which the processor reads; the others hold links, which are the
/// MMU's own and need no interleaving.
struct World {
    slots: Slots,
    /// The one guest entry that changes: the first of `PT`.
    entry: AtomicU64,
    rest: HashMap<u64, u64>,
    frames: Plain<HashMap<Pfn, Frame>>,
    generation: AtomicU64,
    presence: [Presence; 2],
    mmu: Mutex<Mmu>,
    counts: Plain<(u64, u64)>,
}

/// As `guest::Presence` of the hypervisor.
struct Presence {
    in_guest: AtomicU64,
    flushed: AtomicU64,
    kicked: AtomicU64,
}

impl World {
    /// A word of a table.
    fn word(&self, pfn: Pfn, index: usize) -> Arc<AtomicU64> {
        let mut frames = self.frames.lock().unwrap();
        let frame = frames.entry(pfn).or_insert(Frame { base: 0, words: HashMap::new() });
        let base = frame.base;
        Arc::clone(frame.words.entry(index).or_insert_with(|| Arc::new(AtomicU64::new(base))))
    }

    /// An entry, as the processor reads it.
    fn read(&self, pfn: Pfn, index: usize) -> u64 {
        self.word(pfn, index).load(Ordering::Acquire)
    }
}

impl TableMemory for World {
    fn load(&self, pfn: Pfn, index: usize) -> u64 {
        let word = {
            let frames = self.frames.lock().unwrap();
            let Some(frame) = frames.get(&pfn) else { return 0 };
            let Some(word) = frame.words.get(&index) else { return frame.base };
            Arc::clone(word)
        };
        word.load(Ordering::Acquire)
    }
    fn store(&self, pfn: Pfn, index: usize, value: u64) {
        if pfn.0 % 2 == 0 {
            let mut frames = self.frames.lock().unwrap();
            let frame = frames.entry(pfn).or_insert(Frame { base: 0, words: HashMap::new() });
            frame.words.insert(index, Arc::new(AtomicU64::new(value)));
            return;
        }
        self.word(pfn, index).store(value, Ordering::Release);
    }
    fn swap(&self, pfn: Pfn, index: usize, value: u64) -> u64 {
        let old = self.load(pfn, index);
        self.store(pfn, index, value);
        old
    }
    fn fill(&self, pfn: Pfn, value: u64) {
        let words: Vec<_> = {
            let mut frames = self.frames.lock().unwrap();
            let frame = frames.entry(pfn).or_insert(Frame { base: 0, words: HashMap::new() });
            frame.base = value;
            if pfn.0 % 2 != 0 {
                for index in SEEN {
                    frame.words.entry(index).or_insert_with(|| Arc::new(AtomicU64::new(value)));
                }
            }
            frame.words.values().cloned().collect()
        };
        for word in words {
            word.store(value, Ordering::Release);
        }
    }
}

impl GuestMemory for World {
    fn read(&self, _: Gpa, _: &mut [u8]) -> Result<(), Unbacked> {
        unreachable!("the MMU reads entries")
    }
    fn write(&self, _: Gpa, _: &[u8]) -> Result<(), Unbacked> {
        unreachable!("the MMU writes nothing")
    }
    fn load_u32(&self, gpa: Gpa) -> Result<u32, Unbacked> {
        unreachable!("no 4-byte entries: {gpa:?}")
    }
    fn load_u64(&self, gpa: Gpa) -> Result<u64, Unbacked> {
        if gpa.0 == PT {
            return Ok(self.entry.load(Ordering::Acquire));
        }
        Ok(self.rest.get(&gpa.0).copied().unwrap_or(0))
    }
    fn compare_exchange_u32(&self, gpa: Gpa, _: u32, _: u32) -> Result<bool, Unbacked> {
        unreachable!("no 4-byte entries: {gpa:?}")
    }
    fn compare_exchange_u64(&self, gpa: Gpa, _: u64, _: u64) -> Result<bool, Unbacked> {
        unreachable!("every entry has A and D: {gpa:?}")
    }
}

/// What the MMU sees from one vCPU's core.
struct Core<'a> {
    world: &'a World,
    vcpu: usize,
}

impl Host for Core<'_> {
    type Guest = World;
    type Tables = World;
    fn guest(&self) -> &World {
        self.world
    }
    fn tables(&self) -> &World {
        self.world
    }
    fn slots(&self) -> &Slots {
        &self.world.slots
    }
    fn page_allocated(&self) {
        self.world.counts.lock().unwrap().0 += 1;
    }
    fn pages_freed(&self, pages: u64) {
        self.world.counts.lock().unwrap().1 += pages;
    }
    fn advance_generation(&self) -> u64 {
        let now = self.world.generation.fetch_add(1, Ordering::SeqCst) + 1;
        fence(Ordering::SeqCst);
        now
    }
    fn generation(&self) -> u64 {
        self.world.generation.load(Ordering::SeqCst)
    }
    fn shoot_down(&self) {
        let other = &self.world.presence[1 - self.vcpu];
        fence(Ordering::SeqCst);
        let now = self.world.generation.load(Ordering::SeqCst);
        let is_behind =
            || other.in_guest.load(Ordering::SeqCst) != 0 && other.flushed.load(Ordering::SeqCst) < now;
        if is_behind() {
            other.kicked.store(1, Ordering::SeqCst);
            while is_behind() {
                thread::yield_now();
            }
        }
    }
}

/// One vCPU on its core, with a TLB of one translation and a cache of where the leaf table is.
struct Cpu {
    world: Arc<World>,
    vcpu: usize,
    mmu: VcpuMmu,
    entries: u64,
    tlb: Vec<(u64, Pfn, u64)>,
    leaf_table: Option<Pfn>,
}

impl Cpu {
    fn new(world: &Arc<World>, vcpu: usize) -> Cpu {
        let mut mmu = VcpuMmu::new(vcpu as u8);
        mmu.paging = Paging {
            mode: Mode::FourLevel,
            cr3: PML4,
            nxe: true,
            wp: true,
            physical_address_bits: 40,
            ..Paging::default()
        };
        Cpu { world: Arc::clone(world), vcpu, mmu, entries: 0, tlb: Vec::new(), leaf_table: None }
    }

    fn core(&self) -> Core<'_> {
        Core { world: &self.world, vcpu: self.vcpu }
    }

    fn load_root(&mut self, flush: Flush) {
        let world = Arc::clone(&self.world);
        let host = Core { world: &world, vcpu: self.vcpu };
        world.mmu.lock().unwrap().load_root(&host, &mut self.mmu, flush).unwrap();
    }

    /// From the store of `in_guest` to the flush of an old tag: as `Vcpu::enter`.
    fn enter(&mut self) {
        self.entries += 1;
        let presence = &self.world.presence[self.vcpu];
        presence.in_guest.store(self.entries, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let now = self.world.generation.load(Ordering::SeqCst);
        if !self.mmu.is_good(now) {
            self.tlb.clear();
            self.leaf_table = None;
            self.mmu.flushed(now);
            presence.flushed.store(now, Ordering::Release);
        }
    }

    fn leave(&self) {
        self.world.presence[self.vcpu].in_guest.store(0, Ordering::Release);
    }

    /// Comes out and goes in again, if somebody wants that.
    fn heed(&mut self) {
        if self.world.presence[self.vcpu].kicked.swap(0, Ordering::SeqCst) != 0 {
            self.leave();
            self.enter();
        }
    }

    /// What the processor does in the guest. It uses what it remembers.
    fn hardware(&mut self, gva: u64, access: Access) -> Option<Pfn> {
        let permits = |raw: u64| access.kind != Kind::Write || raw & bits::W != 0;
        if let Some(&(_, pfn, raw)) = self.tlb.iter().find(|it| it.0 == gva) {
            if permits(raw) {
                return Some(pfn);
            }
            self.tlb.retain(|it| it.0 != gva);
        }
        let table = match self.leaf_table {
            Some(table) => table,
            None => {
                let mut table = self.mmu.root_table();
                for level in [4, 3, 2] {
                    let raw = self.world.read(table, (gva >> (3 + 9 * level) & 511) as usize);
                    assert_ne!(raw, POISON, "a free frame is walked");
                    if raw & bits::P == 0 {
                        return None;
                    }
                    table = Pfn((raw & bits::FRAME) >> 12);
                }
                self.leaf_table = Some(table);
                table
            }
        };
        let raw = self.world.read(table, (gva >> 12 & 511) as usize);
        assert_ne!(raw, POISON, "a free frame is walked");
        if raw & bits::P == 0 || !permits(raw) {
            self.leaf_table = None;
            return None;
        }
        let pfn = Pfn((raw & bits::FRAME) >> 12);
        self.tlb.push((gva, pfn, raw));
        Some(pfn)
    }

    /// One access of the guest's, with its exits. The vCPU is in the guest before and after.
    fn access(&mut self, gva: u64, access: Access) -> u64 {
        loop {
            self.heed();
            if let Some(pfn) = self.hardware(gva, access) {
                return (pfn.0 - RAM.0) << 12;
            }
            self.leave();
            let found = walk::walk(&self.mmu.paging, &*self.world, Gva(gva), access).unwrap();
            let outcome = {
                let mut mmu = self.world.mmu.lock().unwrap();
                mmu.fill(&self.core(), &self.mmu, Gva(gva), access, &found)
            };
            assert!(matches!(outcome, Fill::Filled | Fill::Changed), "{outcome:?}");
            self.enter();
        }
    }

    /// The guest stores `value` into the entry that changes.
    fn edit(&mut self, value: u64) {
        assert_eq!(self.access(EDIT, WRITE), PT);
        // The store goes by the translation just used: a kick that comes now finds the vCPU in the guest still.
        self.world.entry.store(value, Ordering::Release);
    }

    fn invlpg(&mut self, gva: u64) {
        self.leave();
        let world = Arc::clone(&self.world);
        let host = Core { world: &world, vcpu: self.vcpu };
        world.mmu.lock().unwrap().invlpg(&host, &mut self.mmu, Gva(gva));
        self.tlb.retain(|it| it.0 != gva);
        self.enter();
    }

    fn flush(&mut self) {
        self.leave();
        self.load_root(Flush::Pcid);
        self.tlb.clear();
        self.leaf_table = None;
        self.enter();
    }

    /// The cache shrinks; what comes free goes back to the allocator, and is nobody's.
    fn reclaim(&self) {
        let world = Arc::clone(&self.world);
        let mut mmu = world.mmu.lock().unwrap();
        let host = self.core();
        mmu.reclaim(&host, 100);
        host.shoot_down();
        mmu.release(&host, world.generation.load(Ordering::SeqCst));
        let free: Vec<Pfn> = core::iter::from_fn(|| mmu.take_back()).collect();
        poison(&world, &free);
        supply(&mut mmu, 100);
    }
}

/// Nobody may read these any more.
fn poison(world: &World, free: &[Pfn]) {
    for &frame in free.iter().filter(|frame| frame.0 % 2 != 0) {
        world.fill(frame, POISON);
    }
}

/// New frames, from number `first`. A page takes a table first, then links: the last two of the stash.
fn supply(mmu: &mut Mmu, first: u64) {
    for pair in 0..12 {
        mmu.provide(Pfn(first + 2 * pair + 2)).unwrap();
        mmu.provide(Pfn(first + 2 * pair + 1)).unwrap();
    }
}

fn world() -> Arc<World> {
    let slots = Slots::new(&[(Gfn(0), RAM)]).unwrap();
    let config = Config {
        physical_address_bits: 40,
        gib_pages: false,
        mark_mmio: true,
        split_executable: false,
        pages_max: 64,
        vcpus: 2,
    };
    let mut mmu = Mmu::new(config, &slots);
    supply(&mut mmu, 0);
    let rest = [
        (PML4, 0x2000),
        (0x2000, 0x3000),
        (0x3000, PT),
        (OTHER, 0x6000),
        (0x6000, 0x7000),
        (0x7000, 0x8000),
        (0x8000, NEW),
        (PT + 8 * (EDIT >> 12), PT),
    ];
    let presence =
        || Presence { in_guest: AtomicU64::new(0), flushed: AtomicU64::new(0), kicked: AtomicU64::new(0) };
    Arc::new(World {
        slots,
        entry: AtomicU64::new(OLD | ALL),
        rest: rest.into_iter().map(|(gpa, target)| (gpa, target | ALL)).collect(),
        frames: Plain::new(HashMap::new()),
        generation: AtomicU64::new(1),
        presence: [presence(), presence()],
        mmu: Mutex::new(mmu),
        counts: Plain::new((0, 0)),
    })
}

/// In every interleaving with up to `preemptions` preemptions.
fn check(preemptions: usize, test: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(preemptions);
    model.max_branches = 20_000;
    model.check(test);
}

/// The same, which must fail with `defect` and say `what`.
fn must_fail(defect: Defect, what: &str, preemptions: usize, test: impl Fn() + Sync + Send + 'static) {
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        with(defect, || check(preemptions, test));
    }));
    with(defect, || ()); // switched off, though the run panicked
    let Err(payload) = result else { panic!("the model does not see {defect:?}") };
    let said = payload.downcast_ref::<String>().map(String::as_str);
    let said = said.or(payload.downcast_ref::<&str>().copied()).unwrap_or_default();
    assert!(said.contains(what), "{defect:?} fails otherwise: {said}");
}

/// A store into a table by the one vCPU, a flush by the other: what the table says is seen after the next flush.
fn unsync_mark_before_writable_spte() {
    let world = world();
    let mut a = Cpu::new(&world, 0);
    a.load_root(Flush::All);
    a.enter();
    assert_eq!(a.access(0, READ), OLD);
    let mut b = Cpu::new(&world, 1);
    b.load_root(Flush::All);
    let other = thread::spawn(move || {
        b.enter();
        b.flush();
        let seen = b.access(0, READ);
        assert!(seen == OLD || seen == NEW);
        b.leave();
    });
    a.edit(NEW | ALL);
    a.leave();
    other.join().unwrap();
    a.flush();
    assert_eq!(a.access(0, READ), NEW, "H4: the store went by without the mark");
    a.leave();
}

#[test]
fn loom_h04_unsync_mark_before_writable_spte() {
    check(3, unsync_mark_before_writable_spte);
}

#[test]
fn loom_h04_writable_without_mark_must_fail() {
    must_fail(Defect::WritableWithoutMark, "H4", 3, unsync_mark_before_writable_spte);
}

#[test]
fn loom_h03_sync_without_shutting_out_must_fail() {
    must_fail(Defect::NotShutOut, "H4", 3, unsync_mark_before_writable_spte);
}

/// The one vCPU walks without the lock and fills; the other changes the entry, and tells the first to flush it.
fn walk_against_change_and_zap() {
    let world = world();
    let told = Arc::new(AtomicU64::new(0));
    let mut b = Cpu::new(&world, 1);
    b.load_root(Flush::All);
    b.enter();
    assert_eq!(b.access(EDIT, WRITE), PT, "not shadowed yet: it may store unheard");
    b.leave();
    let mut a = Cpu::new(&world, 0);
    a.load_root(Flush::All);
    let other = {
        let told = Arc::clone(&told);
        thread::spawn(move || {
            b.enter();
            b.edit(NEW | ALL);
            b.leave();
            b.reclaim();
            told.store(1, Ordering::Release);
        })
    };
    a.enter();
    let seen = a.access(0, READ);
    assert!(seen == OLD || seen == NEW);
    let late = told.load(Ordering::Acquire) == 1;
    if late {
        a.invlpg(0);
        assert_eq!(a.access(0, READ), NEW, "H3: what the walk read was installed after it had changed");
    }
    a.leave();
    other.join().unwrap();
}

#[test]
fn loom_h03_walk_without_lock_against_change_and_zap() {
    check(3, walk_against_change_and_zap);
}

#[test]
fn loom_h03_walk_trusted_must_fail() {
    must_fail(Defect::WalkTrusted, "H3", 3, walk_against_change_and_zap);
}

/// The one vCPU runs in the guest; the other takes its tables away, and what comes free of them is nobody's.
fn flush_against_free(take_away: fn(&Cpu)) {
    let world = world();
    let mut a = Cpu::new(&world, 0);
    a.load_root(Flush::All);
    a.enter();
    assert_eq!(a.access(0, READ), OLD);
    let mut b = Cpu::new(&world, 1);
    b.load_root(Flush::All);
    let other = thread::spawn(move || take_away(&b));
    for page in [0, 0x10, 0] {
        a.heed();
        if let Some(pfn) = a.hardware(page << 12, READ) {
            assert_eq!((pfn.0 - RAM.0) << 12, OLD);
        }
    }
    a.leave();
    other.join().unwrap();
}

#[test]
fn loom_h07_flush_before_free() {
    check(3, || flush_against_free(Cpu::reclaim));
}

#[test]
fn loom_h07_freed_before_flush_must_fail() {
    // What the MMU calls free is given away before anyone has flushed: with the defect, tables are among it.
    fn give_away(cpu: &Cpu) {
        let mut mmu = cpu.world.mmu.lock().unwrap();
        mmu.reclaim(&cpu.core(), 100);
        let free: Vec<Pfn> = core::iter::from_fn(|| mmu.take_back()).collect();
        poison(&cpu.world, &free);
    }
    check(3, || flush_against_free(give_away));
    must_fail(Defect::FreedBeforeFlush, "free frame", 3, || flush_against_free(give_away));
}

/// The one vCPU loads a root; the other shrinks the cache.
fn root_against_reclaim() {
    let world = world();
    let mut a = Cpu::new(&world, 0);
    a.load_root(Flush::All);
    a.mmu.paging.cr3 = OTHER;
    a.load_root(Flush::All);
    a.mmu.paging.cr3 = PML4;
    let mut b = Cpu::new(&world, 1);
    b.mmu.paging.cr3 = OTHER;
    b.load_root(Flush::All);
    let other = thread::spawn(move || b.reclaim());
    // The first root has been idle: it may be gone, but not from under us.
    let loaded = {
        let host = Core { world: &world, vcpu: 0 };
        let loaded = world.mmu.lock().unwrap().load_root(&host, &mut a.mmu, Flush::Pcid);
        loaded.is_ok()
    };
    if loaded {
        a.enter();
        a.heed();
        a.hardware(0, READ);
        a.leave();
    }
    other.join().unwrap();
    if loaded {
        a.enter();
        a.hardware(0x1000, READ);
        a.leave();
    }
}

#[test]
fn loom_h07_root_kept_against_reclaim() {
    check(3, root_against_reclaim);
}

#[test]
fn loom_h07_root_not_counted_must_fail() {
    must_fail(Defect::RootNotCounted, "free frame", 3, root_against_reclaim);
}
