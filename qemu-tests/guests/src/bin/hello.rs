//! Says hello on both consoles and exits with 0.
#![no_std]
#![no_main]

use test_guests::{debugln, entry, println};

entry!(main);

fn main() -> u8 {
    println!("hello on COM1");
    debugln!("hello on 0xE9");
    0
}
