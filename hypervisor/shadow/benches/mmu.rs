//! What the parts of the shadow MMU cost on the machine that runs this: `cargo xtask bench --host`.
//!
//! The exact figures are those of `cargo xtask bench`, in instructions; these are for comparing two versions under a
//! real processor's caches and branch predictors. The names say what one iteration is.

#[path = "../tests/guest/mod.rs"]
mod guest;

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkGroup, Criterion, criterion_group, criterion_main, measurement::WallTime};
use guest::{FLAGS, Guest, READ, WRITE};
use memory::{Gfn, Gva};
use shadow::paging::bits;
use shadow::walk::{load_pdptes, walk};
use shadow::{Fill, Mode, Paging};

const MIB: u64 = 1 << 20;
const ROOT: u64 = 0x1_0000;
/// The tables below PML4 slot 1: a PDPT, a directory, and [`TABLES`] leaf tables, of 512 pages each.
const PDPT: u64 = 0x2_0000;
const DIRECTORY: u64 = 0x2_1000;
const LEAVES: u64 = 0x2_2000;
const TABLES: u64 = 64;
/// The first address that they translate.
const SMALL: u64 = 1 << 39;

/// Entry `i` of leaf table 0.
fn page(i: u64) -> u64 {
    (2 * MIB + i * 0x1000) | FLAGS
}

fn new_guest() -> (Guest, Paging) {
    let mut guest = Guest::new(16, 1024, 4096);
    let paging = guest.identity(ROOT);
    guest.poke(ROOT + 8, PDPT | FLAGS);
    guest.poke(PDPT, DIRECTORY | FLAGS);
    guest.poke_all(DIRECTORY, TABLES, |i| (LEAVES + i * 0x1000) | FLAGS);
    for table in 0..TABLES {
        guest.poke_all(LEAVES + table * 0x1000, 512, page);
    }
    guest.load(paging);
    (guest, paging)
}

/// Empties leaf table 0 and its shadow, and fills the table with `entry`.
fn refill(guest: &mut Guest, entry: impl Fn(u64) -> u64) {
    guest.mmu.before_write(&guest.host, Gfn(LEAVES >> 12));
    guest.poke_all(LEAVES, 512, |_| 0);
    guest.mmu.flush(&guest.host, &mut guest.cpu);
    guest.poke_all(LEAVES, 512, entry);
}

/// Maps all of leaf table 0.
fn fill_all(guest: &mut Guest) {
    refill(guest, page);
    (0..512).step_by(16).for_each(|i| touch(guest, SMALL + i * 0x1000));
}

fn touch(guest: &mut Guest, gva: u64) {
    guest.ready();
    assert_eq!(guest.fault(gva, WRITE), Fill::Filled);
}

/// Times `operation(0..count)`, over and over, each time after `prepare`.
fn each(
    group: &mut BenchmarkGroup<WallTime>,
    name: &str,
    count: u64,
    mut prepare: impl FnMut(),
    mut operation: impl FnMut(u64),
) {
    group.bench_function(name, |bencher| {
        bencher.iter_custom(|iterations| {
            let mut spent = Duration::ZERO;
            for _ in 0..iterations.div_ceil(count) {
                prepare();
                let start = Instant::now();
                (0..count).for_each(&mut operation);
                spent += start.elapsed();
            }
            spent.mul_f64(iterations as f64 / (iterations.div_ceil(count) * count) as f64)
        });
    });
}

/// The same where both change the guest.
fn each_of(
    group: &mut BenchmarkGroup<WallTime>,
    name: &str,
    count: u64,
    prepare: impl Fn(&mut Guest),
    operation: impl Fn(&mut Guest, u64),
) {
    let guest = std::cell::RefCell::new(new_guest().0);
    each(group, name, count, || prepare(&mut guest.borrow_mut()), |i| operation(&mut guest.borrow_mut(), i));
}

fn walks(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("walk");
    let (guest, four_level) = new_guest();
    let ram = &guest.host.ram;
    let pdpt = 0x1f_0000;
    guest.poke(pdpt, DIRECTORY | bits::P);
    let pdptes = load_pdptes(ram, pdpt, 40).expect("no reserved bit");
    let pae = Paging { mode: Mode::Pae, cr3: pdpt, pdptes, ..four_level };
    for (name, paging, base) in [("4-level", four_level, SMALL), ("PAE", pae, 0)] {
        each(
            &mut group,
            name,
            512,
            || (),
            |i| {
                assert!(black_box(walk(&paging, ram, Gva(base + i * 0x1000), WRITE)).is_ok());
            },
        );
    }
    each(
        &mut group,
        "to a 2 MiB page",
        512,
        || (),
        |i| {
            assert!(black_box(walk(&four_level, ram, Gva(i * 0x1000), READ)).is_ok());
        },
    );
    group.finish();
}

fn fills(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("fill");
    let fresh = |guest: &mut Guest| refill(guest, |i| page(i) & !(bits::A | bits::D));
    each_of(&mut group, "a page never used", 512, fresh, |guest, i| touch(guest, SMALL + i * 0x1000));
    let used = |guest: &mut Guest| refill(guest, page);
    each_of(&mut group, "a page and 15 neighbours", 32, used, |guest, i| touch(guest, SMALL + i * 0x1_0000));
    let no_tables = |guest: &mut Guest| {
        guest.mmu.reclaim(&guest.host, u32::MAX);
    };
    let new_table = |guest: &mut Guest, i| touch(guest, SMALL + i * 2 * MIB);
    each_of(&mut group, "a page in a new table", TABLES, no_tables, new_table);
    each_of(&mut group, "a 2 MiB page", 8, no_tables, |guest, i| touch(guest, (i + 4) * 2 * MIB));
    group.finish();
}

fn syncs(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("sync of 512 entries");
    let behind = |entry: fn(u64) -> u64| {
        move |guest: &mut Guest| {
            fill_all(guest);
            guest.mmu.before_write(&guest.host, Gfn(LEAVES >> 12));
            guest.poke_all(LEAVES, 512, entry);
        }
    };
    let sync = |guest: &mut Guest, _| guest.mmu.flush(&guest.host, &mut guest.cpu);
    each_of(&mut group, "that are the same", 1, behind(page), sync);
    each_of(&mut group, "that lost W", 1, behind(|i| page(i) & !bits::W), sync);
    each_of(&mut group, "that are gone", 1, behind(|_| 0), sync);
    each_of(&mut group, "that lead elsewhere", 1, behind(|i| page(i ^ 1)), sync);
    group.finish();
}

fn zaps(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("zap");
    let (_, paging) = new_guest();
    let filled = move |guest: &mut Guest| {
        guest.load(paging);
        fill_all(guest);
        guest.mmu.drop_root(&mut guest.cpu);
    };
    each_of(&mut group, "a root with 512 pages below it", 1, filled, |guest, _| {
        guest.mmu.zap_all(&guest.host);
    });
    group.finish();
}

fn lookups(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("lookup by gfn and role");
    let roots = |guest: &mut Guest| (0..8).for_each(|i| guest.poke(8 * MIB + i * 0x1000, PDPT | FLAGS));
    let (_, paging) = new_guest();
    each_of(&mut group, "of one in 8 roots (MOV to CR3)", 64, roots, |guest, i| {
        guest.load(Paging { cr3: 8 * MIB + i % 8 * 0x1000, ..paging });
    });
    group.finish();
}

fn invlpgs(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("INVLPG");
    let invlpg = |guest: &mut Guest, i| {
        guest.mmu.invlpg(&guest.host, &mut guest.cpu, Gva(SMALL + i * 0x1000));
    };
    each_of(&mut group, "with all in sync", 512, fill_all, invlpg);
    let behind = |guest: &mut Guest| {
        fill_all(guest);
        guest.mmu.before_write(&guest.host, Gfn(LEAVES >> 12));
        guest.poke_all(LEAVES, 512, |i| page(i) & !bits::W);
    };
    each_of(&mut group, "of a changed entry", 512, behind, invlpg);
    group.finish();
}

fn quick() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .sample_size(50)
        .without_plots()
}

criterion_group! {
    name = mmu;
    config = quick();
    targets = walks, fills, syncs, zaps, lookups, invlpgs
}
criterion_main!(mmu);
