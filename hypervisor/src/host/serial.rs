//! COM1, shared by the log and the guests' console. A machine without the port works on in silence.

use core::sync::atomic::{AtomicBool, Ordering};

use spin::Mutex;
use uart_16550::backend::PioBackend;
use uart_16550::{BaudRate, Config, Uart16550};

const COM1: u16 = 0x3f8;

/// Polls of a transmitter that takes nothing before the port counts as dead. At 115200 baud a full FIFO
/// empties in 1.4 ms; a poll of a real port takes about 1 us.
const DEAD_AFTER_POLLS: u32 = 1 << 20;

struct Line {
    uart: Option<Uart16550<PioBackend>>,
    at_line_start: bool,
}

static LINE: Mutex<Line> = Mutex::new(Line { uart: None, at_line_start: true });
static PRESENT: AtomicBool = AtomicBool::new(false);

/// Looks for COM1 and sets it to 115200 baud, 8N1, FIFO on. Returns whether it is there.
pub fn init() -> bool {
    // SAFETY: the log and the console reach COM1 only through this module, under its lock.
    let Ok(mut uart) = (unsafe { Uart16550::new_port(COM1) }) else { return false };
    // The scratch register tells whether there is a port; the loop-back test would wait for ever on a bad one.
    let config = Config { baud_rate: BaudRate::Baud115200, ..Config::DEFAULT };
    if uart.init(config).is_err() {
        return false;
    }
    LINE.lock().uart = Some(uart);
    PRESENT.store(true, Ordering::Release);
    true
}

/// Whether COM1 was found and still takes bytes.
#[must_use]
pub fn is_present() -> bool {
    PRESENT.load(Ordering::Acquire)
}

impl Line {
    fn write(&mut self, mut bytes: &[u8]) {
        let Some(uart) = &mut self.uart else { return };
        if let Some(&last) = bytes.last() {
            self.at_line_start = last == b'\n';
        }
        let mut polls = 0;
        while !bytes.is_empty() {
            let sent = uart.send_bytes(bytes);
            bytes = &bytes[sent..];
            polls = if sent == 0 { polls + 1 } else { 0 };
            if polls > DEAD_AFTER_POLLS {
                self.uart = None;
                PRESENT.store(false, Ordering::Release);
                return;
            }
        }
    }
}

/// Sends bytes as they are, waiting for the port.
pub fn write_bytes(bytes: &[u8]) {
    LINE.lock().write(bytes);
}

/// Sends one line and its end, at the start of a line: ends what another writer left unfinished first.
pub fn write_line(line: &[u8]) {
    let mut port = LINE.lock();
    if !port.at_line_start {
        port.write(b"\r\n");
    }
    port.write(line);
    port.write(b"\r\n");
}

/// Sends what the port takes at once (up to its FIFO's 16 bytes) and returns how many those are. Never waits:
/// fit for an exit path.
pub fn try_write(bytes: &[u8]) -> usize {
    let Some(mut line) = LINE.try_lock() else { return 0 };
    let Some(uart) = &mut line.uart else { return bytes.len() };
    let sent = uart.send_bytes(bytes);
    if let Some(&last) = bytes[..sent].last() {
        line.at_line_start = last == b'\n';
    }
    sent
}

/// The next byte that came in, if any. Never waits.
pub fn try_read() -> Option<u8> {
    if !is_present() {
        return None;
    }
    LINE.try_lock()?.uart.as_mut()?.try_receive_byte().ok()
}

/// Waits until the last bit has left the transmitter: what follows may end the machine.
pub fn flush() {
    let mut line = LINE.lock();
    let Some(uart) = &mut line.uart else { return };
    for _ in 0..DEAD_AFTER_POLLS {
        if uart.lsr().contains(uart_16550::spec::registers::LSR::TRANSMITTER_EMPTY) {
            return;
        }
        core::hint::spin_loop();
    }
}

/// Takes the lock away from whoever holds it, if it is not given back soon.
///
/// # Safety
/// Only while panicking, when the other cores are stopped or about to be.
pub unsafe fn break_lock() {
    for _ in 0..1_000_000 {
        if !LINE.is_locked() {
            return;
        }
        core::hint::spin_loop();
    }
    // SAFETY: the caller panics: the holder is this core (interrupted in the middle) or stopped.
    unsafe { LINE.force_unlock() }
}
