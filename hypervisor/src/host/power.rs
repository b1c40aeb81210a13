//! The end: a verdict on the serial line, and the machine off where the payload asked for it.

use core::sync::atomic::{AtomicBool, Ordering};

use super::port::IoPort;
use super::{cores, log, serial};

// SAFETY: QEMU's isa-debug-exit device, or nobody.
const DEBUG_EXIT: IoPort = unsafe { IoPort::new(0xf4) };
// SAFETY: the power port of Bochs, or nobody.
const BOCHS_POWER: IoPort = unsafe { IoPort::new(0x8900) };

static TEST_EXIT: AtomicBool = AtomicBool::new(false);

/// Lets [`exit`] write to the emulators' exit ports (0xf4 and 0x8900). On a real machine somebody else may own
/// them, so only a payload that asks for it turns this on.
pub fn allow_test_exit() {
    TEST_EXIT.store(true, Ordering::Release);
}

/// Prints `umbra: exit CODE`, stops the other cores and ends: the emulator, where that was allowed, else this
/// core halts for ever. 0: every guest ended as its manifest expects; 101: panic.
pub fn exit(code: u8) -> ! {
    // The line that another core is printing is let finish, if it can be.
    serial::await_writer();
    cores::stop_others();
    // SAFETY: the other cores are stopped or about to be, maybe in the middle of a line.
    unsafe { log::break_locks() };
    log::raw(format_args!("umbra: exit {code}"));
    serial::flush();
    if TEST_EXIT.load(Ordering::Acquire) {
        DEBUG_EXIT.write_u32(code.into());
        for &letter in b"Shutdown" {
            BOCHS_POWER.write(letter);
        }
    }
    halt()
}

/// Halts this core for ever; an NMI wakes it only to halt again.
pub fn halt() -> ! {
    loop {
        x86_64::instructions::interrupts::disable();
        x86_64::instructions::hlt();
    }
}
