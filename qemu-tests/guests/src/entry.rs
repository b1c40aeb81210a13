//! From the loader's entry point to the guest's main function, and the way out.

use core::arch::global_asm;
use core::panic::PanicInfo;

use crate::{cpu, println};

/// A byte written here ends the guest with that code.
const EXIT_PORT: u16 = 0xf4;
/// "Shutdown" ends the machine, where the exit port is not there.
const SHUTDOWN_PORT: u16 = 0x8900;
/// The line status register of COM1.
const LINE_STATUS: u16 = 0x3fd;
/// Nothing is left to be sent.
const TRANSMITTER_EMPTY: u8 = 1 << 6;
/// The exit code of a panic or an unexpected trap.
pub const FAILED: u8 = 0xee;

global_asm!(
    ".section .text.entry, \"ax\"",
    ".global _start",
    "_start:",
    "cli",
    "cld",
    "lea rsp, [rip + {stack} + {stack_bytes}]",
    "xor ebp, ebp",
    "call guest_start",
    "ud2",
    ".text",
    stack = sym STACK,
    stack_bytes = const STACK_BYTES,
);

const STACK_BYTES: usize = 64 * 1024;

#[repr(C, align(4096))]
struct Stack([u8; STACK_BYTES]);
static mut STACK: Stack = Stack([0; STACK_BYTES]);

/// Names the guest's main function, `fn() -> u8`; what it returns is the exit code.
#[macro_export]
macro_rules! entry {
    ($main:path) => {
        /// Called by the entry stub, on the guest's own stack.
        #[unsafe(no_mangle)]
        pub extern "C" fn guest_start() -> ! {
            $crate::trap::install();
            let main: fn() -> u8 = $main;
            $crate::entry::exit(main())
        }
    };
}

/// Ends the guest: exit port first, "Shutdown" for machines without one, then a halt for ever.
pub fn exit(code: u8) -> ! {
    cpu::out8(EXIT_PORT, code);
    // No hypervisor took it: what was printed is on its way yet.
    while cpu::in8(LINE_STATUS) & TRANSMITTER_EMPTY == 0 {}
    for byte in *b"Shutdown" {
        cpu::out8(SHUTDOWN_PORT, byte);
    }
    loop {
        cpu::halt_for_ever();
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    println!("guest panic: {info}");
    exit(FAILED)
}
