//! COM1, and the emulator's way out.

use core::{arch::asm, fmt};

/// The port of its data register.
pub const COM1: u16 = 0x3f8;
/// Its line status register.
pub const LINE_STATUS: u16 = COM1 + 5;
/// It takes a byte.
pub const THR_EMPTY: u8 = 1 << 5;
const ALL_SENT: u8 = 1 << 6;

/// COM1, polled.
pub struct Serial;

impl Serial {
    /// 115200 baud, 8 bits, no interrupts.
    pub fn set_up() {
        for (offset, value) in [(1, 0), (3, 0x80), (0, 1), (1, 0), (3, 3), (2, 7)] {
            write(COM1 + offset, value);
        }
    }
}

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            wait_for(THR_EMPTY);
            write(COM1, byte);
        }
        Ok(())
    }
}

/// Ends the emulator once all is sent.
pub fn end() -> ! {
    wait_for(ALL_SENT);
    write(0xf4, 0);
    for byte in *b"Shutdown" {
        write(0x8900, byte);
    }
    loop {
        // SAFETY: halting has no effect on memory.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}

fn wait_for(status: u8) {
    while read(LINE_STATUS) & status == 0 {}
}

/// Writes to a port.
pub fn write(port: u16, value: u8) {
    // SAFETY: the ports used here are the UART's, PCI's and the emulator's; none of them touches our memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) };
}

fn read(port: u16) -> u8 {
    let value;
    // SAFETY: as in `write`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) };
    value
}
