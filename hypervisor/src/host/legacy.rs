//! The PC's old devices: the 8259 pair (masked), the 8254 timer, the ACPI power management timer.

use x86_64::instructions::port::Port;

use super::port::IoPort;
use super::time::tsc;

// SAFETY: the first 8259's command register, ours alone.
const PIC1_COMMAND: IoPort = unsafe { IoPort::new(0x20) };
// SAFETY: the first 8259's data register, ours alone.
const PIC1_DATA: IoPort = unsafe { IoPort::new(0x21) };
// SAFETY: the second 8259's command register, ours alone.
const PIC2_COMMAND: IoPort = unsafe { IoPort::new(0xa0) };
// SAFETY: the second 8259's data register, ours alone.
const PIC2_DATA: IoPort = unsafe { IoPort::new(0xa1) };
// SAFETY: the 8254's channel 0, ours alone.
const PIT_0: IoPort = unsafe { IoPort::new(0x40) };
// SAFETY: the 8254's channel 2, ours alone.
const PIT_2: IoPort = unsafe { IoPort::new(0x42) };
// SAFETY: the 8254's command register, ours alone.
const PIT_COMMAND: IoPort = unsafe { IoPort::new(0x43) };
// SAFETY: system control port B: gate and output of channel 2, and the speaker.
const PORT_B: IoPort = unsafe { IoPort::new(0x61) };

/// The 8254's input clock.
pub const PIT_HZ: u64 = 1_193_182;
/// The ACPI power management timer's clock.
const ACPI_TIMER_HZ: u64 = 3_579_545;

/// First of the 16 vectors that the 8259 pair would use: they are masked, but their spurious interrupts must not
/// look like exceptions.
pub const PIC_VECTORS: u8 = 0x20;

/// Initialises both 8259s, so that their spurious vectors are known, and masks all their inputs.
pub fn mask_pics() {
    let pics =
        [(PIC1_COMMAND, PIC1_DATA, PIC_VECTORS, 1 << 2), (PIC2_COMMAND, PIC2_DATA, PIC_VECTORS + 8, 2)];
    for (command, data, vectors, wiring) in pics {
        command.write(0x11);
        data.write(vectors);
        data.write(wiring);
        data.write(0x01);
        data.write(0xff);
    }
}

/// Counts TSC ticks over `window_ns` (up to 50 ms) of PIT channel 2 and returns the TSC's frequency in Hz.
/// `None` if the PIT does not count.
pub fn measure_with_pit(window_ns: u64) -> Option<u64> {
    let count = (PIT_HZ * window_ns / 1_000_000_000).min(0xffff) as u16;
    let old = PORT_B.read();
    // Gate off, speaker off; one-shot mode (0) on channel 2, low byte then high byte.
    PORT_B.write(old & !0x03);
    PIT_COMMAND.write(0b1011_0000);
    PIT_2.write(count as u8);
    PIT_2.write((count >> 8) as u8);
    PORT_B.write((old & !0x02) | 0x01);
    let start = tsc();
    let mut polls = 0u32;
    // The output (bit 5) goes high when the count is over. A poll takes about 1 us on a real machine.
    while PORT_B.read() & 0x20 == 0 {
        polls += 1;
        if polls > 10_000_000 {
            PORT_B.write(old);
            return None;
        }
    }
    let ticks = tsc().wrapping_sub(start);
    PORT_B.write(old & !0x01);
    // An output that was high all along counts nothing.
    (polls > 10).then(|| (u128::from(ticks) * u128::from(PIT_HZ) / u128::from(count)) as u64)
}

/// As [`measure_with_pit`], with the ACPI timer at I/O `port`.
pub fn measure_with_acpi_timer(port: u16, window_ns: u64) -> Option<u64> {
    let mut register: Port<u32> = Port::new(port);
    let mut read = || {
        // SAFETY: the FADT names this port as the timer's; reading it changes nothing.
        unsafe { register.read() & 0x00ff_ffff }
    };
    let target = (ACPI_TIMER_HZ * window_ns / 1_000_000_000) as u32;
    let first = read();
    let start = tsc();
    for _ in 0..10_000_000u32 {
        let passed = read().wrapping_sub(first) & 0x00ff_ffff;
        if passed >= target {
            let ticks = tsc().wrapping_sub(start);
            return Some((u128::from(ticks) * u128::from(ACPI_TIMER_HZ) / u128::from(passed)) as u64);
        }
    }
    None
}

/// Lets PIT channel 0 raise its interrupt line every `period_ns` (up to 54 ms): the clock of the slices on
/// processors without a preemption timer.
pub fn start_periodic_pit(period_ns: u64) {
    let count = (PIT_HZ.saturating_mul(period_ns) / 1_000_000_000).clamp(2, 0xffff) as u16;
    // Channel 0, low byte then high byte, rate generator (mode 2).
    PIT_COMMAND.write(0b0011_0100);
    PIT_0.write(count as u8);
    PIT_0.write((count >> 8) as u8);
}
