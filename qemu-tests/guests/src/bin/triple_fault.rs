//! Ends by a triple fault: no interrupt table, then a breakpoint.
#![no_std]
#![no_main]

use test_guests::{entry, println, trap};

entry!(main);

fn main() -> u8 {
    println!("triple fault next");
    trap::triple_fault();
    println!("still alive after a triple fault");
    1
}
