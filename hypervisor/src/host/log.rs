//! The `log` facade on COM1 and the screen.
//!
//! A line is `umbra: message`, `umbra: warning: message` or `umbra: error: message`, with `[   ms]` before it
//! once the TSC is calibrated. What a program looks for (`umbra: exit N`, `umbra: backtrace: ...`) is printed by
//! [`raw`], which puts nothing before it.

use core::fmt::{self, Write};

use bootloader_api::info::FrameBuffer;
use log::{Level, LevelFilter, Log, Metadata, Record};
use spin::Mutex;

use super::{framebuffer, serial, time};

/// Longer lines are cut.
const LINE_BYTES: usize = 512;

struct Sink;

static SINK: Sink = Sink;

/// Keeps the lines of several cores in one order on both sinks.
static ORDER: Mutex<()> = Mutex::new(());

/// A line under construction; what does not fit is dropped.
struct LineBuffer(heapless::Vec<u8, LINE_BYTES>);

impl Write for LineBuffer {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = LINE_BYTES - self.0.len();
        let _ = self.0.extend_from_slice(&text.as_bytes()[..text.len().min(room)]);
        Ok(())
    }
}

impl Log for Sink {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let mut line = LineBuffer(heapless::Vec::new());
        if time::is_calibrated() {
            let _ = write!(line, "[{:6}] ", time::now_ns() / 1_000_000);
        }
        let level = match record.level() {
            Level::Error => "error: ",
            Level::Warn => "warning: ",
            Level::Info | Level::Debug | Level::Trace => "",
        };
        let _ = write!(line, "umbra: {level}{}", record.args());
        emit(&line);
    }

    fn flush(&self) {
        serial::flush();
    }
}

fn emit(line: &LineBuffer) {
    let _order = ORDER.lock();
    for part in line.0.split(|&byte| byte == b'\n') {
        serial::write_line(part);
        framebuffer::write_line(part);
    }
}

/// Prints one line as it is, on both sinks.
pub fn raw(arguments: fmt::Arguments<'_>) {
    let mut line = LineBuffer(heapless::Vec::new());
    let _ = line.write_fmt(arguments);
    emit(&line);
}

/// Opens COM1 and the screen, and makes this the logger. The first thing that runs.
pub fn init(screen: Option<FrameBuffer>) {
    const GREETING: &str = concat!("umbra: Umbra ", env!("CARGO_PKG_VERSION"), " starts");
    let serial = serial::init();
    // Before the screen is touched: the earliest sign of life.
    serial::write_line(GREETING.as_bytes());
    // Fails only if there is a logger already, which is then this one.
    let _ = log::set_logger(&SINK);
    log::set_max_level(LevelFilter::Info);
    let screen = screen.is_some_and(framebuffer::init).then(framebuffer::size).flatten();
    framebuffer::write_line(GREETING.as_bytes());
    match screen {
        Some((width, height)) => log::info!("screen: {width} x {height} pixels"),
        None => log::info!("screen: none that can show text"),
    }
    if !serial {
        log::warn!("no serial port at 0x3f8 (COM1): this log is on the screen only");
    }
}

/// Takes every lock of the log away from whoever holds it.
///
/// # Safety
/// Only while panicking, when the other cores are stopped or about to be.
pub unsafe fn break_locks() {
    if ORDER.is_locked() {
        // SAFETY: the caller panics: the holder is this core (interrupted in the middle) or stopped.
        unsafe { ORDER.force_unlock() }
    }
    // SAFETY: as the caller promised.
    unsafe { serial::break_lock() };
    // SAFETY: as the caller promised.
    unsafe { framebuffer::break_lock() };
}
