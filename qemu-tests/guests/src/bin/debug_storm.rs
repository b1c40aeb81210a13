//! A debug exception whose handler's first instruction raises it again, on the same stack each time: no instruction is
//! ever carried out (H29, CVE-2015-8104).
#![no_std]
#![no_main]

use core::arch::asm;
use core::cell::UnsafeCell;

use test_guests::trap::{self, Frame, handle};
use test_guests::{entry, println};

#[repr(C, align(16))]
struct Stack(UnsafeCell<[u8; 4096]>);
// SAFETY: only the processor uses it.
unsafe impl Sync for Stack {}
static STACK: Stack = Stack(UnsafeCell::new([0; 4096]));

entry!(main);

fn never(_: &mut Frame) {
    println!("the handler runs: BAD");
}

fn main() -> u8 {
    handle(1, never);
    trap::use_stack(1, 1, STACK.0.get() as u64 + 4096);
    println!("debug exceptions for ever");
    // SAFETY: a breakpoint on the stub of vector 1, and INT1 to get there.
    unsafe { asm!("mov dr0, {0}", "mov dr7, {1}", ".byte 0xf1", in(reg) trap::stub(1), in(reg) 0x402_u64) };
    println!("the debug exception came back: BAD");
    1
}
