//! The cache of all guests' shadow pages, on the host: four guests share one machine's frames, and reclaim is always at
//! work. What comes out must be right, bounded, fair, and better than what KVM had until 2024.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};

use memory::{Counters, Event, Gva};

use super::guest::FLAGS;
use crate::model::machine::{Landed, READ, WRITE, identity};
use crate::model::tenants::{Policy, Setup, Tenants};
use crate::paging::bits;
use crate::{Mode, Paging};

/// RAM of a guest, in blocks.
const BLOCKS: u64 = 4;
/// The first of a guest's leaf tables, one a page.
const TABLES: u64 = 0x20_0000;
/// How many leaf tables a guest has.
const TABLES_MAX: u64 = 512;
/// The pages that they map.
const DATA: u64 = 0x40_0000;
/// A guest's roots: of the process, of its fork, which may not write, and of the same in PAE paging.
pub const PARENT: u64 = 0x1_0000;
const FORK: u64 = 0x1_8000;
const PAE: u64 = 0x1_c000;
/// Where a process has its leaf tables.
pub const PROCESS: u64 = 1 << 39;
/// Where they are in PAE paging.
const PAE_PROCESS: u64 = 1 << 30;

/// A generator of numbers (xorshift).
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// A guest's processes: one, its fork, and the same tables in PAE paging.
pub fn processes() -> [Paging; 3] {
    processes_at([PARENT, FORK, PAE], PAE + 0x1000)
}

/// The same with other roots; `directory`: the page directory of the last one.
pub fn processes_at([parent, fork, pae]: [u64; 3], directory: u64) -> [Paging; 3] {
    let four = |cr3| Paging {
        mode: Mode::FourLevel,
        cr3,
        nxe: true,
        wp: true,
        gib_pages: true,
        physical_address_bits: 40,
        ..Paging::default()
    };
    let pae =
        Paging { mode: Mode::Pae, pdptes: [0, directory | bits::P, 0, 0], gib_pages: false, ..four(pae) };
    [four(parent), four(fork), pae]
}

/// Builds a guest's tables, and starts it in its first process.
fn start(tenants: &Tenants<'_>, number: usize) {
    let machine = tenants.guests[number].machine.borrow();
    for (root, rights) in [(PARENT, FLAGS), (FORK, FLAGS & !bits::W)] {
        identity(&machine, root, BLOCKS);
        machine.poke(root + 8, (root + 0x3000) | FLAGS);
        machine.poke(root + 0x3000, (root + 0x4000) | FLAGS);
        for table in 0..TABLES_MAX {
            machine.poke(root + 0x4000 + 8 * table, (TABLES + table * 0x1000) | rights);
        }
    }
    for table in 0..TABLES_MAX {
        machine.poke(PAE + 0x1000 + 8 * table, (TABLES + table * 0x1000) | FLAGS);
        for index in 0..8 {
            machine.poke(entry(table, index), page(table * 8 + index) | FLAGS);
        }
    }
    drop(machine);
    tenants.load(number, processes()[0]);
}

/// Four guests that have started.
pub fn four<'a>(counters: &'a Counters, setup: Setup, guarantees: [u64; 4]) -> Tenants<'a> {
    let tenants = Tenants::new(counters, setup, &guarantees);
    (0..4).for_each(|number| start(&tenants, number));
    tenants
}

/// Entry `index` of leaf table `table`.
fn entry(table: u64, index: u64) -> u64 {
    TABLES + table * 0x1000 + 8 * index
}

/// A page of data.
pub fn page(number: u64) -> u64 {
    DATA + number % (2 * 512) * 0x1000
}

/// Guest number `number` works for `steps` steps on `tables` leaf tables: reads and writes, maps, unmaps, copies, changes
/// of process and of mode. What it found, as a checksum, which depends on the seed alone.
fn work(
    tenants: &Tenants<'_>,
    number: usize,
    random: &mut Random,
    at: &mut usize,
    steps: u64,
    tables: u64,
) -> u64 {
    let processes = processes();
    let mut checksum = DefaultHasher::new();
    for _ in 0..steps {
        // Some tables are used more than others.
        let table = random.below(tables).min(random.below(tables));
        let index = random.below(8);
        let base = if processes[*at].mode == Mode::Pae { PAE_PROCESS } else { PROCESS };
        let gva = Gva(base + (table << 21) + (index << 12));
        let kind = random.below(100);
        match kind {
            0..85 => {
                let access = if kind < 30 { WRITE } else { READ };
                let landed = tenants.access(number, gva, access);
                let machine = tenants.guests[number].machine.borrow();
                assert_eq!(landed, machine.expected(gva, access), "guest {number} at {gva:?}");
                format!("{landed:?}").hash(&mut checksum);
            }
            85..95 => {
                // Maps, unmaps, or copies from another table: by a store of its own where it can reach its tables.
                let value = match kind {
                    85..88 => page(random.below(1024)) | FLAGS & !(bits::A | bits::D),
                    88..91 => 0,
                    _ => tenants.guests[number].machine.borrow().peek(entry(random.below(tables), index)),
                };
                let gpa = entry(table, index);
                if processes[*at].mode == Mode::FourLevel {
                    assert!(matches!(tenants.access(number, Gva(gpa), WRITE), Landed::Ram(_)));
                    tenants.guests[number].machine.borrow().poke(gpa, value);
                } else {
                    tenants.guests[number].machine.borrow_mut().device_store(gpa, value);
                }
                tenants.guests[number].machine.borrow_mut().flush();
            }
            _ => {
                *at = random.below(processes.len() as u64) as usize;
                tenants.load(number, processes[*at]);
            }
        }
    }
    checksum.finish()
}

/// Frames that a budget of all there is makes.
const PLENTY: u64 = 16_384;
/// The smallest legal budget: 128 frames for each vCPU.
pub const SMALLEST: u64 = 4 * 128;

pub fn setup(budget_frames: u64, policy: Policy) -> Setup {
    Setup { blocks: BLOCKS, vcpus: 1, pages_max: 4096, budget_frames, policy }
}

/// Four guests work in turn; their checksums, the most frames they held, and how many batches were reclaimed.
fn four_at_work(budget_frames: u64, rounds: u64) -> (Vec<u64>, u64, u64) {
    let counters = Counters::new(4);
    let tenants = four(&counters, setup(budget_frames, Policy::Ours), [0, 150, 0, 0]);
    let mut state: Vec<(Random, usize)> = (1..=4).map(|seed| (Random(seed), 0)).collect();
    let mut checksums = vec![0_u64; 4];
    let mut held_max = 0;
    for round in 0..rounds {
        for (number, (random, at)) in state.iter_mut().enumerate() {
            let tables = [400, 200, 500, TABLES_MAX][number];
            let found = work(&tenants, number, random, at, 50, tables);
            checksums[number] = checksums[number].rotate_left(1) ^ found;
        }
        if round % 16 == 0 {
            tenants.audit();
        }
        let (free, all) = tenants.free_frames();
        held_max = held_max.max(all - free);
    }
    tenants.audit();
    let batches = tenants.total(Event::Reclaim);
    (0..4).for_each(|number| tenants.end(number));
    let (free, all) = tenants.free_frames();
    assert_eq!(free, all, "what ended guests had is free");
    assert_eq!(counters.shadow_pages(), memory::Population::Exact(0));
    (checksums, held_max, batches)
}

#[test]
fn guests_compute_the_same_at_every_budget() {
    let rounds = 400;
    let (golden, working_set, batches) = four_at_work(PLENTY, rounds);
    assert_eq!(batches, 0, "there is plenty");
    println!("working set: {working_set} frames");
    for (name, budget) in [
        ("100 %", working_set),
        ("50 %", working_set / 2),
        ("25 %", working_set / 4),
        ("10 %", (working_set / 10).max(SMALLEST)),
        ("smallest", SMALLEST),
    ] {
        let (found, _, batches) = four_at_work(budget, rounds);
        println!("budget {name:>8} = {budget:4} frames: {batches:5} batches reclaimed, same results");
        assert_eq!(found, golden, "at a budget of {budget} frames");
    }
}

#[test]
fn a_hundred_thousand_reclaims_lose_nothing() {
    let counters = Counters::new(4);
    let tenants = four(&counters, setup(SMALLEST, Policy::Ours), [0, 0, 150, 0]);
    let mut state: Vec<(Random, usize)> = (11..=14).map(|seed| (Random(seed), 0)).collect();
    let mut audits = 0;
    while tenants.total(Event::Reclaim) < 100_000 {
        for (number, (random, at)) in state.iter_mut().enumerate() {
            work(&tenants, number, random, at, 100, TABLES_MAX);
        }
        tenants.audit();
        audits += 1;
    }
    let [batches, pages, thrash] =
        [Event::Reclaim, Event::ReclaimedPage, Event::Thrash].map(|event| tenants.total(event));
    println!(
        "{batches} reclaims of {pages} pages, {thrash} of them made again too soon; {audits} audits, all clean"
    );
}

/// Fills that guest `number` took for `accesses` accesses, round robin or at random, to so many leaf tables.
pub fn touch(tenants: &Tenants<'_>, number: usize, random: &mut Random, tables: u64, accesses: u64) {
    for i in 0..accesses {
        let table = if random.0 == 0 { i % tables } else { random.below(tables) };
        tenants.access(number, Gva(PROCESS + (table << 21)), READ);
    }
}

/// A run of four guests: three that fit, and one that wants far more than there is, or nothing. Fills of each, shares of
/// the evictions, and pages made.
fn three_and_one(policy: Policy, thrasher: bool) -> ([u64; 4], [u64; 4], u64) {
    let counters = Counters::new(4);
    let tenants = four(&counters, setup(4 * 200, policy), [0; 4]);
    let mut random: Vec<Random> = (21..25).map(Random).collect();
    for _ in 0..400 {
        for (number, random) in random.iter_mut().enumerate().take(3) {
            touch(&tenants, number, random, 40, 100);
        }
        if thrasher {
            touch(&tenants, 3, &mut random[3], TABLES_MAX, 100);
        }
    }
    tenants.audit();
    let each = |count: &dyn Fn(usize) -> u64| [0, 1, 2, 3].map(count);
    (
        each(&|number| tenants.guests[number].fills.get()),
        each(&|number| tenants.count_of(number, Event::ReclaimedPage)),
        tenants.total(Event::PageMade),
    )
}

#[test]
fn who_fits_loses_nothing_to_who_thrashes() {
    let (alone, ..) = three_and_one(Policy::Ours, false);
    let (beside, evictions, _) = three_and_one(Policy::Ours, true);
    let all: u64 = evictions.iter().sum();
    let shares = evictions.map(|share| 100 * share / all);
    println!(
        "fills alone {:?}, beside a guest that thrashes {:?}; evictions {shares:?} %",
        &alone[..3],
        &beside[..3]
    );
    assert_eq!(alone[..3], beside[..3]);
    assert_eq!(evictions[..3], [0, 0, 0]);
    let (kvm, kvm_evictions, _) = three_and_one(Policy::FirstGuestOldestPage, true);
    let all: u64 = kvm_evictions.iter().sum();
    println!(
        "by first guest, oldest page: {:?}; evictions {:?} %",
        &kvm[..3],
        kvm_evictions.map(|e| 100 * e / all)
    );
    assert!(kvm[0] > 2 * beside[0], "the other order is told from this one");
}

/// Guests with a few tables in constant use and many that are used once in a while, as a working set and a scan.
fn mixed(policy: Policy) -> (u64, u64, u64) {
    let counters = Counters::new(4);
    let tenants = four(&counters, setup(4 * 200, policy), [0; 4]);
    let mut random: Vec<Random> = (31..35).map(Random).collect();
    let mut scan = 0;
    for _ in 0..1500 {
        for (number, random) in random.iter_mut().enumerate() {
            touch(&tenants, number, random, 40, 40);
            for _ in 0..4 {
                scan += 1;
                tenants.access(number, Gva(PROCESS + ((60 + scan / 4 % 400) << 21)), READ);
            }
        }
    }
    tenants.audit();
    let fills = tenants.guests.iter().map(|guest| guest.fills.get()).sum();
    (fills, tenants.total(Event::PageMade), tenants.total(Event::Thrash))
}

#[test]
fn fewer_pages_are_made_again_than_by_first_guest_and_oldest_page() {
    let (fills, made, thrash) = mixed(Policy::Ours);
    let (kvm_fills, kvm_made, kvm_thrash) = mixed(Policy::FirstGuestOldestPage);
    println!("working set and scan:    ours {made} pages made, {fills} fills, {thrash} thrash");
    println!("first guest, oldest page:     {kvm_made} pages made, {kvm_fills} fills, {kvm_thrash} thrash");
    println!("{:.1} % fewer pages, {:.1} % fewer fills", fewer(made, kvm_made), fewer(fills, kvm_fills));
    assert!(made < kvm_made && fills < kvm_fills && thrash < kvm_thrash);

    let (.., made) = three_and_one(Policy::Ours, true);
    let (.., kvm_made) = three_and_one(Policy::FirstGuestOldestPage, true);
    println!(
        "three that fit, one that thrashes: {made} pages made and {kvm_made}, {:.1} % fewer",
        fewer(made, kvm_made)
    );
    assert!(made < kvm_made);
}

fn fewer(ours: u64, other: u64) -> f64 {
    100.0 * (1.0 - ours as f64 / other as f64)
}
