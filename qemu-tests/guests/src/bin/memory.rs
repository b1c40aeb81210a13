//! Writes and reads all RAM that its image does not use, from 4 MiB to the end told below, in two patterns.
#![no_std]
#![no_main]

use core::arch::asm;

use test_guests::{cpu, entry, println};

/// The manifest of the tests gives this guest 64 MiB; the last 2 MiB are left to what the loader put there.
const BEGIN: u64 = 4 << 20;
const END: u64 = 62 << 20;

entry!(main);

fn pattern(address: u64, round: u64) -> u64 {
    (address ^ round).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn walk(round: u64) -> Result<u64, u64> {
    for address in (BEGIN..END).step_by(64) {
        cpu::write64(address, pattern(address, round));
    }
    let mut sum = 0u64;
    for address in (BEGIN..END).step_by(64) {
        let found = cpu::read64(address);
        if found != pattern(address, round) {
            return Err(address);
        }
        sum = sum.rotate_left(1) ^ found;
    }
    Ok(sum)
}

fn fill_all() -> bool {
    // A string instruction over many pages: it must restart where a fault stopped it.
    // SAFETY: all of it is RAM beyond the image and the stack.
    unsafe {
        asm!("rep stosq", inout("rdi") BEGIN => _, inout("rcx") (END - BEGIN) / 8 => _, in("rax") !0u64,
             options(nostack, preserves_flags))
    }
    (BEGIN..END).step_by(4096).all(|page| cpu::read64(page) == !0 && cpu::read64(page + 4088) == !0)
}

fn main() -> u8 {
    for round in 0..2 {
        match walk(round) {
            Ok(sum) => println!("memory round {round} checksum {sum:016x}"),
            Err(address) => {
                println!("memory differs at {address:#x}");
                return 1;
            }
        }
    }
    if !fill_all() {
        println!("memory fill differs");
        return 2;
    }
    println!("memory done");
    0
}
