//! Text on COM1 and on the debug console (port 0xE9), both at once unless said otherwise.

use core::fmt;

use crate::cpu;

const COM1: u16 = 0x3f8;
const LINE_STATUS: u16 = COM1 + 5;
const TRANSMITTER_EMPTY: u8 = 1 << 5;
const DEBUG_CONSOLE: u16 = 0xe9;

/// Writes to COM1, waiting for the transmitter as a driver does.
pub struct Serial;

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            while cpu::in8(LINE_STATUS) & TRANSMITTER_EMPTY == 0 {}
            cpu::out8(COM1, byte);
        }
        Ok(())
    }
}

/// Writes to port 0xE9, one instruction a byte.
pub struct Debug;

impl fmt::Write for Debug {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(|byte| cpu::out8(DEBUG_CONSOLE, byte));
        Ok(())
    }
}

/// Prints a line on COM1.
#[macro_export]
macro_rules! println {
    ($($argument:tt)*) => {{
        use core::fmt::Write as _;
        // Neither console can fail.
        let _ = writeln!($crate::console::Serial, $($argument)*);
    }};
}

/// Prints a line on the debug console.
#[macro_export]
macro_rules! debugln {
    ($($argument:tt)*) => {{
        use core::fmt::Write as _;
        let _ = writeln!($crate::console::Debug, $($argument)*);
    }};
}
