//! Frames for tables and data, with a count of those who use each.

use core::arch::asm;
use core::sync::atomic::{AtomicU16, AtomicU64, Ordering::Relaxed};

use test_guests::cpu;

/// 16 MiB to 62 MiB; the last 2 MiB are left to what the loader put there.
const BEGIN: u64 = 16 << 20;
const END: u64 = 62 << 20;
const COUNT: usize = ((END - BEGIN) >> 12) as usize;

static USERS: [AtomicU16; COUNT] = [const { AtomicU16::new(0) }; COUNT];
/// The first that was never taken.
static NEXT: AtomicU64 = AtomicU64::new(BEGIN);
/// The one given back last, each of which holds the address of the one before; 0: none.
static FREE: AtomicU64 = AtomicU64::new(0);

fn users(frame: u64) -> &'static AtomicU16 {
    &USERS[((frame - BEGIN) >> 12) as usize]
}

/// A frame of zeros, one that was given back if there is any: what was a table becomes data, and the reverse.
pub fn take() -> u64 {
    let mut frame = FREE.load(Relaxed);
    if frame != 0 {
        FREE.store(cpu::read64(frame), Relaxed);
    } else {
        frame = NEXT.fetch_add(4096, Relaxed);
        assert!(frame < END, "no more frames");
    }
    // SAFETY: nobody uses the frame.
    unsafe {
        asm!("rep stosq", inout("rdi") frame => _, inout("rcx") 512_u64 => _, in("rax") 0_u64,
             options(nostack, preserves_flags))
    }
    users(frame).store(1, Relaxed);
    frame
}

/// One more uses it.
pub fn share(frame: u64) {
    users(frame).fetch_add(1, Relaxed);
}

/// More than one use it.
pub fn is_shared(frame: u64) -> bool {
    users(frame).load(Relaxed) > 1
}

/// One less uses it.
pub fn give(frame: u64) {
    if users(frame).fetch_sub(1, Relaxed) == 1 {
        cpu::write64(frame, FREE.swap(frame, Relaxed));
    }
}

/// Copies all of a frame.
pub fn copy(from: u64, to: u64) {
    // SAFETY: both are frames of this module's.
    unsafe {
        asm!("rep movsq", inout("rsi") from => _, inout("rdi") to => _, inout("rcx") 512_u64 => _,
             options(nostack, preserves_flags))
    }
}
