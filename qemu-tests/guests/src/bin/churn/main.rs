//! Work on page tables, for the reclaim of shadow pages: its command line says which.
//!
//! | command line | what it does |
//! | --- | --- |
//! | `work SEED ROUNDS PROCESSES TABLES` | every kind of work with address spaces, each with a checksum |
//! | `fit TABLES ROUNDS` | goes over that many leaf tables again and again, and says how many ticks that took |
//! | `thrash TABLES ROUNDS` | the same, with one address space |
//! | `worst INSTRUCTION ROUNDS` | an instruction that needs as many tables at once as any, after all were forgotten |
#![no_std]
#![no_main]

mod fit;
mod frames;
mod modes;
mod space;
mod work;
mod worst;

use core::arch::global_asm;

use test_guests::paging::AddressSpace;
use test_guests::{cpu, entry, println};

global_asm!(
    ".section .multiboot, \"a\"",
    ".balign 8",
    "multiboot_header:",
    ".long 0x1badb002",
    // Memory information, and with it the command line; address fields valid.
    ".long 0x00010002",
    ".long -(0x1badb002 + 0x00010002)",
    ".long multiboot_header",
    ".long __image_start",
    ".long __data_end",
    ".long __image_end",
    ".long multiboot_entry",
    include_str!("../../multiboot/long.s"),
    options(att_syntax),
);

unsafe extern "C" {
    static multiboot_info: u32;
}

/// Of the command line.
const BYTES_MAX: usize = 80;
/// How long it stays when it is done, in ticks: some lines of statistics show all that was counted.
const LINGER_TICKS: u64 = 6_000_000;

entry!(main);

fn command_line() -> [u8; BYTES_MAX] {
    // SAFETY: written by the first instructions, before Rust code ran.
    let info = u64::from(unsafe { (&raw const multiboot_info).read_volatile() });
    let text = u64::from(cpu::read32(info + 16));
    let mut line = [0; BYTES_MAX];
    for (at, byte) in line.iter_mut().enumerate() {
        *byte = cpu::read32(text + at as u64) as u8;
        if *byte == 0 {
            break;
        }
    }
    line
}

/// Folds a value into a sum, whose order counts.
fn mix(sum: u64, value: u64) -> u64 {
    (sum ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23)
}

fn main() -> u8 {
    let identity = AddressSpace::install();
    space::adopt(identity.root());
    let line = command_line();
    let line = core::str::from_utf8(&line).unwrap_or_default().trim_end_matches('\0');
    let mut words = line.split(' ');
    let role = words.next().unwrap_or_default();
    let first = words.next().unwrap_or_default();
    let number = |word: Option<&str>| word.and_then(|word| word.parse::<u64>().ok());
    let numbers: [Option<u64>; 4] =
        [number(Some(first)), number(words.next()), number(words.next()), number(words.next())];
    let bad = match (role, numbers) {
        ("work", [Some(seed), Some(rounds), Some(processes), Some(tables)]) => {
            work::run(seed, rounds, processes as usize, tables)
        }
        ("fit", [Some(tables), Some(rounds), ..]) => fit::fit(tables, rounds),
        ("thrash", [Some(tables), Some(rounds), ..]) => fit::thrash(tables, rounds),
        ("worst", [_, Some(rounds), ..]) => worst::run(first, rounds),
        _ => {
            println!("churn: `{line}` is no work that it knows");
            1
        }
    };
    println!("churn done: {bad} bad");
    let end = cpu::rdtsc() + LINGER_TICKS;
    while cpu::rdtsc() < end {
        core::hint::spin_loop();
    }
    u8::from(bad != 0)
}
