//! Times the CPUID exit, in the format of `qemu-tests/bench/guest.c`: `B name n=.. ticks=.. per=..`.
#![no_std]
#![no_main]

use test_guests::{cpu, entry, println};

/// Operations in one measurement.
const COUNT: u64 = 1000;
/// 0 and 1 mark the begin and the end of an operation, for the exit counters.
const BENCH_MARKS: u16 = 0xe8;

entry!(main);

fn measure(name: &str, operation: impl Fn()) {
    cpu::out8(BENCH_MARKS, 0);
    let begin = cpu::rdtsc();
    for _ in 0..COUNT {
        operation();
    }
    let ticks = cpu::rdtsc() - begin;
    cpu::out8(BENCH_MARKS, 1);
    println!("B {name} n={COUNT} ticks={ticks} per={}.{}", ticks / COUNT, ticks % COUNT * 10 / COUNT);
}

fn main() -> u8 {
    for _ in 0..3 {
        measure("empty_loop", || core::hint::black_box(()));
        measure("cpuid_leaf0", || {
            let _ = cpu::cpuid(0, 0);
        });
    }
    0
}
