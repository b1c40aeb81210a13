//! Ticks of the time-stamp counter.

use core::arch::asm;
use core::hint::black_box;

/// The counter now. What stands before it in the program is done before it, and what stands after it afterwards: the
/// compiler takes it for a use of all memory, and the emulator executes one instruction after the other. Always the same
/// three instructions, so that what [`reading`] finds can be taken off.
#[inline(always)]
fn now() -> u64 {
    let ticks;
    // SAFETY: reading the counter has no effect; CR4.TSD is clear, and this is the kernel anyway.
    unsafe { asm!("rdtsc", "shl rdx, 32", "or rax, rdx", out("rax") ticks, out("rdx") _, options(nostack)) };
    ticks
}

/// Ticks between two readings with nothing between them.
fn reading() -> u64 {
    let start = now();
    now() - start
}

/// What one `operation` takes, and what `times` of them take together. `prepare` makes what each needs, and `keep` takes
/// what each gives, untimed.
pub fn least<A, R>(
    times: u32,
    mut prepare: impl FnMut() -> A,
    mut operation: impl FnMut(A) -> R,
    mut keep: impl FnMut(R),
) -> (u64, u64) {
    let reading = reading();
    let (mut least, mut sum) = (u64::MAX, 0);
    for _ in 0..times {
        let input = black_box(prepare());
        let start = now();
        let result = black_box(operation(input));
        let ticks = now() - start - reading;
        keep(result);
        least = least.min(ticks);
        sum += ticks;
    }
    (least, sum)
}
