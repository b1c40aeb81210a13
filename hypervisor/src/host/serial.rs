//! COM1, shared by the log and the guests' console. A machine without the port works on in silence.
//!
//! While the machine boots, and when it ends, writers wait for the port. In between ([`go_on_in_background`]) they
//! only put their bytes into a ring, which [`pump`] sends as the port takes them; a writer waits only where the ring
//! is full. What the log and the guests print goes through the one ring, so its order is that of the writing.

mod open;
mod ring;

use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};

use spin::Mutex;
use uart_16550::backend::PioBackend;
use uart_16550::{BaudRate, Config, Uart16550};

pub use open::{Open, Writer};
pub use ring::Ring;

const COM1: u16 = 0x3f8;

/// Polls of a transmitter that takes nothing before the port counts as dead. At 115200 baud a full FIFO
/// empties in 1.4 ms; a poll of a real port takes about 1 us.
const DEAD_AFTER_POLLS: u32 = 1 << 20;

/// Output that waits for the port, at most: the whole log of a Linux boot, which the port takes seconds to send.
const OUTPUT_BYTES: usize = 64 * 1024;
/// Input that waits to be read, at most; what comes on top is lost, as on any serial line.
const INPUT_BYTES: usize = 4096;
/// Bytes sent by one [`pump`], at most: an emulated port takes them at once, for ever.
const PUMP_BYTES: usize = 64;

/// How often [`pump`] wants to be called while [`wants_pump`]: sooner than a full FIFO of 16 bytes is sent, or an
/// empty one overrun (1.39 ms at 115200 baud).
pub const PUMP_NS: u64 = 1_000_000;

struct Line {
    uart: Option<Uart16550<PioBackend>>,
    open: Open,
    /// Writers do not wait.
    background: bool,
    /// Input is read.
    receiving: bool,
    output: Ring<OUTPUT_BYTES>,
    input: Ring<INPUT_BYTES>,
}

static LINE: Mutex<Line> = Mutex::new(Line {
    uart: None,
    open: Open::new(),
    background: false,
    receiving: false,
    output: Ring::new(),
    input: Ring::new(),
});
static PRESENT: AtomicBool = AtomicBool::new(false);
/// Output waits, or input may arrive: somebody must pump.
static WANTS_PUMP: AtomicBool = AtomicBool::new(false);
/// Input was received and not yet read.
static HAS_INPUT: AtomicBool = AtomicBool::new(false);

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

/// From now on writers do not wait, and somebody calls [`pump`].
pub fn go_on_in_background() {
    LINE.lock().background = true;
}

/// From now on input is read, and kept for [`take_input`]. Without a person the port is left alone: what arrives
/// when would make runs differ.
pub fn receive() {
    let mut line = LINE.lock();
    line.receiving = true;
    line.note();
}

impl Line {
    fn write(&mut self, mut bytes: &[u8]) {
        if self.uart.is_none() {
            return;
        }
        if self.background {
            loop {
                bytes = &bytes[self.output.push(bytes)..];
                if bytes.is_empty() {
                    return;
                }
                // At least 16 bytes at a time: room for one is no reason to go round again.
                self.wait(OUTPUT_BYTES - PUMP_BYTES);
                if self.uart.is_none() {
                    return;
                }
            }
        }
        let mut polls = 0;
        while !bytes.is_empty() {
            let Some(uart) = &mut self.uart else { return };
            let sent = uart.send_bytes(bytes);
            bytes = &bytes[sent..];
            polls = if sent == 0 { polls + 1 } else { 0 };
            if polls > DEAD_AFTER_POLLS {
                self.bury();
            }
        }
    }

    /// Sends until at most `left` bytes wait.
    fn wait(&mut self, left: usize) {
        let mut polls = 0;
        while self.output.len() > left {
            polls = if self.send() == 0 { polls + 1 } else { 0 };
            self.read();
            if polls > DEAD_AFTER_POLLS {
                self.bury();
            }
        }
    }

    /// The port takes nothing any more.
    fn bury(&mut self) {
        self.uart = None;
        self.output.consume(OUTPUT_BYTES);
        PRESENT.store(false, Ordering::Release);
    }

    /// Sends what the port takes without waiting; returns how many bytes those were.
    fn send(&mut self) -> usize {
        let Some(uart) = &mut self.uart else {
            self.output.consume(OUTPUT_BYTES);
            return 0;
        };
        let mut total = 0;
        while total < PUMP_BYTES {
            let sent = uart.send_bytes(self.output.front());
            if sent == 0 {
                break;
            }
            self.output.consume(sent);
            total += sent;
        }
        total
    }

    /// Takes what has arrived.
    fn read(&mut self) {
        let Some(uart) = self.uart.as_mut().filter(|_| self.receiving) else { return };
        while self.input.room() > 0
            && let Ok(byte) = uart.try_receive_byte()
        {
            self.input.push(&[byte]);
        }
        HAS_INPUT.store(!self.input.is_empty(), Ordering::Relaxed);
    }

    fn note(&self) {
        WANTS_PUMP.store(!self.output.is_empty() || self.receiving, Ordering::Relaxed);
    }

    fn write_line(&mut self, parts: &[&[u8]]) {
        self.end_open();
        parts.iter().for_each(|part| self.write(part));
        self.write(b"\r\n");
        self.note();
    }

    fn end_open(&mut self) {
        let mut open = core::mem::take(&mut self.open);
        open.end(&mut |bytes| self.write(bytes));
        self.open = open;
    }
}

/// Sends one line and its end, at the start of a line: ends what another writer left unfinished first.
pub fn write_line(line: &[u8]) {
    write_line_of(&[line]);
}

/// Like [`write_line`] for a line in several parts.
pub fn write_line_of(parts: &[&[u8]]) {
    LINE.lock().write_line(parts);
}

/// Like [`write_line`] for a line of any length, from what `write` writes. Nothing else comes in between; `write`
/// must not use this module itself.
pub fn write_line_with(write: impl FnOnce(&mut dyn fmt::Write)) {
    struct Text<'a>(&'a mut Line);
    impl fmt::Write for Text<'_> {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            self.0.write(text.as_bytes());
            Ok(())
        }
    }
    let mut line = LINE.lock();
    line.end_open();
    write(&mut Text(&mut line));
    line.write(b"\r\n");
    line.note();
}

/// Sends a piece of a line that may stay unfinished; see [`Open::piece`].
pub fn write_piece(writer: Writer, head: &[&[u8]], text: &[u8], ends: bool) {
    let mut line = LINE.lock();
    let mut open = core::mem::take(&mut line.open);
    open.piece(&mut |bytes| line.write(bytes), writer, head, text, ends);
    line.open = open;
    line.note();
}

/// Whether the unfinished line at the end of the output is this writer's.
#[must_use]
pub fn is_open_by(writer: Writer) -> bool {
    LINE.lock().open.is_by(writer)
}

/// How often anything was written.
#[must_use]
pub fn changes() -> u64 {
    LINE.lock().open.changes()
}

/// Whether [`pump`] is to be called every [`PUMP_NS`].
#[inline]
#[must_use]
pub fn wants_pump() -> bool {
    WANTS_PUMP.load(Ordering::Relaxed)
}

/// Sends and receives what the port has ready. Never waits: fit for an exit path.
pub fn pump() {
    if wants_pump()
        && let Some(mut line) = LINE.try_lock()
    {
        line.send();
        line.read();
        line.note();
    }
}

/// Whether there is something for [`take_input`].
#[inline]
#[must_use]
pub fn has_input() -> bool {
    HAS_INPUT.load(Ordering::Relaxed)
}

/// Moves the oldest input to `target` and returns how many bytes. Never waits for the port.
pub fn take_input(target: &mut [u8]) -> usize {
    let mut line = LINE.lock();
    line.read();
    let count = line.input.pop(target);
    HAS_INPUT.store(!line.input.is_empty(), Ordering::Relaxed);
    count
}

/// Waits until the last bit has left the transmitter: what follows may end the machine.
pub fn flush() {
    let mut line = LINE.lock();
    line.wait(0);
    line.note();
    let Some(uart) = &mut line.uart else { return };
    for _ in 0..DEAD_AFTER_POLLS {
        if uart.lsr().contains(uart_16550::spec::registers::LSR::TRANSMITTER_EMPTY) {
            return;
        }
        core::hint::spin_loop();
    }
}

/// Waits until nobody is in the middle of a line, or for longer than a line takes.
pub fn await_writer() {
    for _ in 0..1_000_000 {
        if !LINE.is_locked() {
            break;
        }
        core::hint::spin_loop();
    }
}

/// Takes the lock away from whoever holds it, if it is not given back soon, sends what waits, and lets writers wait
/// for the port again. What is written next begins a line.
///
/// # Safety
/// Only at the end, when the other cores are stopped or about to be.
pub unsafe fn break_lock() {
    await_writer();
    let in_the_middle = LINE.is_locked();
    if in_the_middle {
        // SAFETY: the machine ends: the holder is this core (interrupted in the middle) or stopped.
        unsafe { LINE.force_unlock() }
    }
    let mut line = LINE.lock();
    line.background = false;
    line.wait(0);
    if in_the_middle {
        line.write(b"\r\n");
    }
}
