//! The cache of all guests' shadow pages on four threads at once: guests that work, and cores that reclaim from each
//! other's guests meanwhile. Every page of a guest holds a number that the guest knows, so a translation that
//! outlives its table, or leads to another page, is seen.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use memory::{Event, Gpa, GuestMemory, Gva};

use super::cache::{Random, processes_at};
use super::guest::FLAGS;
use crate::model::cores::{Core, Guest, Shared, Vcpu};
use crate::model::machine::{READ, WRITE};
use crate::paging::bits;
use crate::walk::peek;
use crate::{Mode, Paging};

/// Cores that guests run on; one more, the test's own thread, looks after them.
const CORES: usize = 4;
/// RAM of a guest, in blocks: roots and the like, leaf tables, twice data.
const BLOCKS: u64 = 4;
/// The first of a guest's leaf tables, one a page.
const TABLES: u64 = 0x20_0000;
const TABLES_MAX: u64 = 512;
/// Of these, the first ones are shared by all vCPUs and never change.
const TABLES_SHARED: u64 = 64;
/// Entries of a leaf table that are used.
const ENTRIES: u64 = 8;
/// The first page of data.
const DATA: u64 = 0x40_0000;
const PAGES: u64 = 1024;
/// Of these, the first ones are read only, by all vCPUs.
const PAGES_SHARED: u64 = 128;
/// Where a process has its leaf tables, with four levels and in PAE paging.
const PROCESS: u64 = 1 << 39;
const PAE_PROCESS: u64 = 1 << 30;

/// Frames that a budget of all there is makes, and the smallest legal one: 128 for each vCPU.
const PLENTY: u64 = 16_384;
const SMALLEST: u64 = CORES as u64 * 128;

/// Steps of each vCPU.
const STEPS: u64 = 40_000;

/// A machine that has not finished after so long never will.
const LIMIT: Duration = Duration::from_secs(120);

/// Where vCPU number `vcpu` has its roots.
fn root(vcpu: u64) -> u64 {
    0x1_0000 * (vcpu + 1)
}

/// A vCPU's processes: one, its fork, which may not write, and the same tables in PAE paging.
fn processes(vcpu: u64) -> [Paging; 3] {
    let root = root(vcpu);
    processes_at([root, root + 0x5000, root + 0x9000], root + 0x8000)
}

/// Entry `index` of leaf table `table`.
fn entry(table: u64, index: u64) -> Gpa {
    Gpa(TABLES + table * 0x1000 + 8 * index)
}

/// Of the pages that vCPU number `vcpu` of `vcpus` may write, one.
fn own_page(vcpu: u64, vcpus: u64, number: u64) -> u64 {
    PAGES_SHARED + (number * vcpus + vcpu) % (PAGES - PAGES_SHARED)
}

fn page(number: u64) -> u64 {
    DATA + number * 0x1000
}

/// What a page holds at first.
fn first_number(guest: usize, page: u64) -> u64 {
    (guest as u64 + 1) << 32 | page
}

/// Builds a guest's tables and numbers its pages.
fn build(number: usize, vcpus: u64, guarantee_frames: u64) -> Guest {
    let guest = Guest::new(number, BLOCKS, vcpus as u32, guarantee_frames);
    for vcpu in 0..vcpus {
        let root = root(vcpu);
        guest.poke(root + 0x1000, (root + 0x2000) | FLAGS);
        for block in 0..BLOCKS {
            guest.poke(root + 0x2000 + 8 * block, block << 21 | FLAGS | bits::PS);
        }
        for (process, rights) in [(root, FLAGS), (root + 0x5000, FLAGS & !bits::W)] {
            let pdpt = if process == root { root + 0x3000 } else { process + 0x1000 };
            guest.poke(process, (root + 0x1000) | FLAGS);
            guest.poke(process + 8, pdpt | FLAGS);
            guest.poke(pdpt, (pdpt + 0x1000) | FLAGS);
            for table in 0..TABLES_MAX {
                guest.poke(pdpt + 0x1000 + 8 * table, entry(table, 0).0 | rights);
            }
        }
        for table in 0..TABLES_MAX {
            guest.poke(root + 0x8000 + 8 * table, entry(table, 0).0 | FLAGS);
        }
    }
    for table in 0..TABLES_MAX {
        for index in 0..ENTRIES {
            let number = table * ENTRIES + index;
            let target = if table < TABLES_SHARED {
                number % PAGES_SHARED
            } else {
                own_page(table % vcpus, vcpus, number)
            };
            guest.poke(entry(table, index).0, page(target) | FLAGS);
        }
    }
    (0..PAGES).for_each(|at| guest.poke(page(at), first_number(number, at)));
    guest
}

/// What a vCPU does: the same for the same seed, wherever and beside whomever it runs.
struct Work<'a> {
    vcpu: Vcpu<'a>,
    guest: Arc<Guest>,
    number: u64,
    vcpus: u64,
    processes: [Paging; 3],
    random: Random,
    /// What its pages hold.
    numbers: Vec<u64>,
    found: DefaultHasher,
}

impl<'a> Work<'a> {
    fn new(core: &'a Core<'a>, guest: &Arc<Guest>, number: u64, vcpus: u64) -> Work<'a> {
        let processes = processes(number);
        Work {
            vcpu: Vcpu::new(core, guest, number as u8, processes[0]),
            guest: Arc::clone(guest),
            number,
            vcpus,
            processes,
            random: Random(1 + number + 8 * guest.number() as u64),
            numbers: (0..PAGES).map(|at| first_number(guest.number(), at)).collect(),
            found: DefaultHasher::new(),
        }
    }

    fn own_table(&mut self) -> u64 {
        let end = (TABLES_MAX - TABLES_SHARED) / self.vcpus;
        // Some are used more than others.
        let table = self.random.below(end).min(self.random.below(end));
        TABLES_SHARED + table * self.vcpus + self.number
    }

    /// Reads and writes, maps, unmaps, copies, changes of process and of mode.
    fn step(&mut self) {
        let index = self.random.below(ENTRIES);
        match self.random.below(100) {
            0..55 => {
                let shared = self.random.below(4) == 0;
                let table = if shared { self.random.below(TABLES_SHARED) } else { self.own_table() };
                self.read(table, index);
            }
            55..85 => {
                let table = self.own_table();
                self.write(table, index);
            }
            kind @ 85..95 => {
                let table = self.own_table();
                self.map(table, index, kind);
            }
            _ => self.vcpu.load(self.processes[self.random.below(3) as usize]),
        }
    }

    fn gva(&self, table: u64, index: u64) -> Gva {
        let base = if self.vcpu.paging().mode == Mode::Pae { PAE_PROCESS } else { PROCESS };
        Gva(base + (table << 21) + (index << 12))
    }

    fn read(&mut self, table: u64, index: u64) {
        let gva = self.gva(table, index);
        let expected = peek(self.vcpu.paging(), &self.guest.ram, gva, READ).map(|found| found.gfn);
        let loaded = self.vcpu.load_u64(gva, READ);
        assert_eq!(loaded.map(|(gpa, _)| gpa.page()), expected, "{gva}");
        if let Ok((gpa, number)) = loaded {
            assert_eq!(number, self.numbers[((gpa.0 - DATA) >> 12) as usize], "{gva} is {gpa}");
        }
        format!("{loaded:?}").hash(&mut self.found);
    }

    fn write(&mut self, table: u64, index: u64) {
        let gva = self.gva(table, index);
        let expected = peek(self.vcpu.paging(), &self.guest.ram, gva, WRITE).map(|found| found.gfn);
        let number = self.random.below(u64::MAX);
        let stored = self.vcpu.store_u64(gva, WRITE, number);
        assert_eq!(stored.map(Gpa::page), expected, "{gva}");
        if let Ok(gpa) = stored {
            self.numbers[((gpa.0 - DATA) >> 12) as usize] = number;
        }
        format!("{stored:?}").hash(&mut self.found);
    }

    /// Maps, unmaps, or copies from another table: by a store of its own where it can reach its tables.
    fn map(&mut self, table: u64, index: u64, kind: u64) {
        let at = entry(table, index);
        let value = match kind {
            85..88 => {
                page(own_page(self.number, self.vcpus, self.random.below(PAGES)))
                    | FLAGS & !(bits::A | bits::D)
            }
            88..91 => 0,
            _ => {
                let from = self.own_table();
                self.guest.ram.load_u64(entry(from, index)).unwrap()
            }
        };
        if self.vcpu.paging().mode == Mode::FourLevel {
            assert_eq!(self.vcpu.store_u64(Gva(at.0), WRITE, value), Ok(at));
        } else {
            self.vcpu.device_store_u64(at, value);
        }
        if self.random.below(2) == 0 { self.vcpu.flush() } else { self.vcpu.invlpg(self.gva(table, index)) }
    }

    /// The vCPU leaves for good: all that it found, as a checksum.
    fn leave(self) -> u64 {
        self.vcpu.leave();
        self.found.finish()
    }
}

/// Lets every core work at once, each with a count of its steps. What each came to, or a report of who is stuck where.
fn on_all_cores<R: Send + 'static>(
    shared: &Arc<Shared>,
    work: impl Fn(&Core<'_>, usize, &AtomicU64) -> R + Send + Sync + 'static,
) -> Vec<R> {
    let work = Arc::new((work, [const { AtomicU64::new(0) }; CORES]));
    let mut threads: Vec<_> = (0..CORES)
        .map(|index| {
            let (shared, work) = (Arc::clone(shared), Arc::clone(&work));
            Some(thread::spawn(move || work.0(&shared.core(index), index, &work.1[index])))
        })
        .collect();
    let mut results: Vec<Option<R>> = (0..CORES).map(|_| None).collect();
    let start = Instant::now();
    while results.iter().any(Option::is_none) {
        for (thread, result) in threads.iter_mut().zip(&mut results) {
            if let Some(finished) = thread.take_if(|thread| thread.is_finished()) {
                *result = Some(finished.join().unwrap_or_else(|panic| resume_unwind(panic)));
            }
        }
        let steps = || work.1.each_ref().map(|steps| steps.load(Ordering::Relaxed));
        assert!(start.elapsed() < LIMIT, "stuck: the cores have come to steps {:?}", steps());
        thread::sleep(Duration::from_millis(1));
    }
    results.into_iter().flatten().collect()
}

/// What a run came to.
struct Run {
    /// What each core's vCPU found.
    checksums: Vec<u64>,
    /// Batches reclaimed, and pages that cores took from guests that live elsewhere.
    batches: u64,
    taken_elsewhere: u64,
    /// Shoot-downs that found a vCPU in its guest.
    shoot_downs: u64,
}

/// Guests of `vcpus` vCPUs each, one vCPU on each core, work for so many steps.
fn at_work(budget_frames: u64, vcpus: u64, steps: u64) -> Run {
    let shared = Arc::new(Shared::new(CORES + 1, budget_frames));
    for number in 0..CORES / vcpus as usize {
        shared.enlist(build(number, vcpus, if number == 1 { 150 * vcpus } else { 0 }));
    }
    let guests = shared.running();
    let results = on_all_cores(&shared, {
        let guests = guests.clone();
        move |core, index, done| {
            let mut work = Work::new(core, &guests[index / vcpus as usize], index as u64 % vcpus, vcpus);
            for step in 0..steps {
                work.step();
                if step % 500 == 0 {
                    work.vcpu.audit(&guests[(index + step as usize / 500) % guests.len()]);
                }
                done.store(step, Ordering::Relaxed);
            }
            (work.leave(), core.taken_elsewhere.get())
        }
    });
    let core = shared.core(CORES);
    shared.audit_at_rest(&core);
    let batches = guests.iter().map(|guest| guest.mmu().stats().reclaims).sum();
    guests.iter().for_each(|guest| core.end(guest));
    shared.audit_at_rest(&core);
    Run {
        checksums: results.iter().map(|&(checksum, _)| checksum).collect(),
        batches,
        taken_elsewhere: results.iter().map(|&(_, taken)| taken).sum(),
        shoot_downs: shared.counters.event(Event::ShootDown),
    }
}

/// Every vCPU finds the same with all the frames that it wants and with few, down to the fewest that are legal.
fn the_same_at_every_budget(vcpus: u64) {
    let golden = at_work(PLENTY, vcpus, STEPS);
    assert_eq!(golden.batches, 0, "there is plenty");
    for budget_frames in [2 * SMALLEST, SMALLEST] {
        let Run { checksums, batches, taken_elsewhere, shoot_downs } = at_work(budget_frames, vcpus, STEPS);
        println!(
            "{} guests of {vcpus} vCPUs on {CORES} threads in {budget_frames} frames: {batches} batches reclaimed, \
             {taken_elsewhere} pages from other cores' guests, {shoot_downs} shoot-downs",
            CORES as u64 / vcpus
        );
        assert_eq!(checksums, golden.checksums);
        assert!(batches > 100 && shoot_downs > 100, "{batches} batches, {shoot_downs} shoot-downs");
        assert!(vcpus as usize == CORES || taken_elsewhere > 100, "{taken_elsewhere}");
    }
}

#[test]
fn cores_reclaim_from_each_others_guests() {
    the_same_at_every_budget(1);
}

#[test]
fn guests_of_two_vcpus_share_the_cores() {
    the_same_at_every_budget(2);
}

#[test]
fn one_guest_has_all_cores() {
    the_same_at_every_budget(4);
}

#[test]
fn a_guest_ends_and_starts_while_others_reclaim() {
    const LIVES: u64 = 30;
    let shared = Arc::new(Shared::new(CORES + 1, SMALLEST));
    for number in 1..CORES {
        shared.enlist(build(number, 1, 0));
    }
    let guests = shared.running();
    let over = Arc::new(AtomicBool::new(false));
    let results = on_all_cores(&shared, {
        let shared = shared.clone();
        move |core, index, done| {
            if index > 0 {
                let mut work = Work::new(core, &guests[index - 1], 0, 1);
                while !over.load(Ordering::Relaxed) {
                    work.step();
                    done.fetch_add(1, Ordering::Relaxed);
                }
                work.leave();
                return (Vec::new(), core.taken_elsewhere.get());
            }
            let life = |_| {
                let guest = shared.enlist(build(0, 1, 0));
                let mut work = Work::new(core, &guest, 0, 1);
                for _ in 0..500 {
                    work.step();
                    done.fetch_add(1, Ordering::Relaxed);
                }
                let found = work.leave();
                core.end(&guest);
                found
            };
            let lives = (0..LIVES).map(life).collect();
            over.store(true, Ordering::Relaxed);
            (lives, 0)
        }
    });
    let core = shared.core(CORES);
    shared.audit_at_rest(&core);
    shared.running().iter().for_each(|guest| core.end(guest));
    shared.audit_at_rest(&core);
    let lives = &results[0].0;
    assert!(lives.iter().all(|found| found == &lives[0]), "{lives:x?}");
    let taken_elsewhere: u64 = results.iter().map(|&(_, taken)| taken).sum();
    println!("{} lives of a guest, all the same; others took {taken_elsewhere} pages meanwhile", lives.len());
    assert!(taken_elsewhere > 100, "{taken_elsewhere}");
}
