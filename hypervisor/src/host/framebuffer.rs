//! Log text on the screen, for machines that have no serial port.
//!
//! Drawn in grey, so the order of the colours does not matter. Reading a framebuffer back is slow and moving it
//! is slower: at the bottom, the screen is cleared and only the last lines are drawn again.

use bootloader_api::info::{FrameBuffer, FrameBufferInfo};
use heapless::Deque;
use noto_sans_mono_bitmap::{FontWeight, RasterHeight, get_raster, get_raster_width};
use spin::Mutex;

const HEIGHT: usize = RasterHeight::Size16.val();
const WIDTH: usize = get_raster_width(FontWeight::Regular, RasterHeight::Size16);
/// Columns used of a wider screen.
const COLUMNS_MAX: usize = 160;
/// Rows that survive when the screen starts anew.
const KEPT_ROWS: usize = 16;

type Text = heapless::Vec<u8, COLUMNS_MAX>;

struct Screen {
    base: *mut u8,
    info: FrameBufferInfo,
    row: usize,
    kept: Deque<Text, KEPT_ROWS>,
}

// SAFETY: the pointer is used only under the lock of `SCREEN`, and the memory belongs to the screen alone.
unsafe impl Send for Screen {}

static SCREEN: Mutex<Option<Screen>> = Mutex::new(None);

/// Takes the bootloader's framebuffer, if its pixels have 1 to 4 bytes and at least one line of text fits.
pub fn init(buffer: FrameBuffer) -> bool {
    let info = buffer.info();
    let base = buffer.into_buffer().as_mut_ptr();
    let fits = (1..=4).contains(&info.bytes_per_pixel)
        && info.height >= HEIGHT
        && info.width >= WIDTH
        && info.stride >= info.width
        && info.stride * info.height * info.bytes_per_pixel <= info.byte_len;
    if !fits {
        return false;
    }
    let mut screen = Screen { base, info, row: 0, kept: Deque::new() };
    screen.clear();
    *SCREEN.lock() = Some(screen);
    true
}

/// Where the screen is mapped (virtual address) and its size in bytes.
#[must_use]
pub fn mapping() -> Option<(u64, u64)> {
    SCREEN.lock().as_ref().map(|screen| (screen.base as u64, screen.info.byte_len as u64))
}

/// Tells that the screen is now mapped elsewhere.
///
/// # Safety
/// `base` maps the same bytes, writable, for ever.
pub unsafe fn remap(base: *mut u8) {
    if let Some(screen) = SCREEN.lock().as_mut() {
        screen.base = base;
    }
}

/// Width, height (pixels) of the screen.
#[must_use]
pub fn size() -> Option<(usize, usize)> {
    SCREEN.lock().as_ref().map(|screen| (screen.info.width, screen.info.height))
}

/// Writes one line of ASCII text, on as many rows as it needs; other characters show as `?`.
pub fn write_line(line: &[u8]) {
    if let Some(screen) = SCREEN.lock().as_mut() {
        if line.is_empty() {
            screen.line(line);
        }
        for part in line.chunks(screen.columns()) {
            screen.line(part);
        }
    }
}

impl Screen {
    fn columns(&self) -> usize {
        (self.info.width / WIDTH).min(COLUMNS_MAX)
    }

    fn rows(&self) -> usize {
        self.info.height / HEIGHT
    }

    fn clear(&mut self) {
        // SAFETY: `init` checked that the whole screen lies in the mapped buffer.
        unsafe {
            core::ptr::write_bytes(
                self.base,
                0,
                self.info.stride * self.info.height * self.info.bytes_per_pixel,
            )
        }
    }

    fn line(&mut self, line: &[u8]) {
        let text: Text = line.iter().copied().take(COLUMNS_MAX).collect();
        if self.row >= self.rows() {
            self.clear();
            self.row = 0;
            let kept = core::mem::take(&mut self.kept);
            for old in kept.iter().skip(KEPT_ROWS.saturating_sub(self.rows() / 2)) {
                self.draw(old);
            }
            self.kept = kept;
        }
        self.draw(&text);
        if self.kept.is_full() {
            self.kept.pop_front();
        }
        let _ = self.kept.push_back(text);
    }

    fn draw(&mut self, text: &[u8]) {
        for (column, &byte) in text.iter().enumerate() {
            if byte != b' ' {
                self.glyph(column, if (0x20..0x7f).contains(&byte) { byte } else { b'?' });
            }
        }
        self.row += 1;
    }

    fn glyph(&mut self, column: usize, byte: u8) {
        let Some(raster) = get_raster(byte.into(), FontWeight::Regular, RasterHeight::Size16) else { return };
        let bytes = self.info.bytes_per_pixel;
        for (y, pixels) in raster.rows().enumerate() {
            let start = ((self.row * HEIGHT + y) * self.info.stride + column * WIDTH) * bytes;
            for (x, &grey) in pixels.iter().enumerate().filter(|&(_, &grey)| grey != 0) {
                self.pixel(start + x * bytes, grey);
            }
        }
    }

    /// Sets the pixel at byte `offset` to `grey`; the screen was black there.
    fn pixel(&mut self, offset: usize, grey: u8) {
        let value = u32::from(grey) * 0x0101_0101;
        // SAFETY: `init` checked the geometry; `write_line` and `line` keep columns and rows inside it.
        let pixel = unsafe { self.base.add(offset) };
        if self.info.bytes_per_pixel == 4 {
            // SAFETY: four bytes of this pixel, inside the buffer; devices want no particular alignment.
            unsafe { pixel.cast::<u32>().write_unaligned(value) }
        } else {
            // SAFETY: the pixel's one to three bytes, inside the buffer.
            unsafe { core::ptr::write_bytes(pixel, grey, self.info.bytes_per_pixel) }
        }
    }
}

/// Takes the lock away from whoever holds it.
///
/// # Safety
/// Only while panicking, when the other cores are stopped or about to be.
pub unsafe fn break_lock() {
    if SCREEN.is_locked() {
        // SAFETY: the caller panics: the holder is this core (interrupted in the middle) or stopped.
        unsafe { SCREEN.force_unlock() }
    }
}
