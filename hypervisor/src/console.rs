//! The console on COM1: what the guests print, and what a person types.

use machine::device::Devices;

use crate::guest::Guest;
use crate::host::serial;

/// Longest piece of a guest's output that is taken at once, in bytes.
const PIECE_BYTES: usize = 256;

/// Prints what the guest's devices hold, each line behind the guest's name.
pub fn drain(guest: &Guest, devices: &mut Devices) {
    let mut piece = [0; PIECE_BYTES];
    loop {
        let count = devices.take_output(&mut piece);
        print(guest, &piece[..count]);
        if count < piece.len() {
            return;
        }
    }
}

fn print(guest: &Guest, bytes: &[u8]) {
    for line in bytes.split_inclusive(|&byte| byte == b'\n') {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let mut text = heapless::Vec::<u8, 300>::new();
        for part in [b"[".as_slice(), guest.name().as_bytes(), b"] ", line] {
            let _ = text.extend_from_slice(part);
        }
        serial::write_line(&text);
    }
}

/// Tells how many exits a benchmark operation took.
pub fn bench(guest: &Guest, exits: u64) {
    log::info!("guest {}: exits={exits}", guest.name());
}
